"""What a network gets wrong, and why: a report on one screen, and pictures of its mistakes.

What it teaches: one accuracy hides most of what a test set can tell. Which digits are taken for
which others? Does the network know when it is guessing? Is it better than another network, or only
luckier? Where in the image does it find its evidence? And is the label itself wrong now and then?

    python analyze.py                                the last run under runs/
    python analyze.py --run runs/003                 another run, also while it is still training
    python analyze.py --compare runs/001 runs/002    is one of two networks really better?
    python analyze.py --suspects runs/001 runs/002   is it the network or the label?
    python analyze.py --image photo.png              read a digit of your own

It prints a report and draws pictures into the folder of the run, under analysis/. The charts and
pictures of the other scripts are drawn here, too: see `chart` and `gallery`.
"""
import csv
import io
import math
from collections import namedtuple
from pathlib import Path

from data import (Parser, UserError, augment, font, load, normalize, quote, reason, run_command,
                  save, user_path)               # before torch: data.py says why

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageOps
from torch import Tensor, nn

from model import count_parameters, input_shape
from train import load_run, predict


# ---- The report -------------------------------------------------------------------------------

def report(name, run, data) -> Tensor:
    """Print what the run gets wrong on the test images. Return its logits, N×K for K classes."""
    images, labels = data.test
    logits = predict(run.network, images, run.mean, run.std)
    answers = logits.argmax(1)
    second_answers = logits.topk(2).indices[:, 1]
    loss = F.cross_entropy(logits, labels).item()
    total = len(labels)
    correct = (answers == labels).sum().item()
    low, high = wilson_interval(correct, total)
    confidence, calibration_error = calibration(logits, labels)

    print(f"{name}: {run.args.model}, {count_parameters(run.network):,} parameters")
    print(f"{data.name} test set: accuracy {correct / total:.2%} (95% interval {low:.2%} to "
          f"{high:.2%}), {total - correct} errors in {total}, loss {loss:.4f}")
    print(f"second guess: right in {(second_answers == labels).sum()} of the errors")
    print(f"calibration: {confidence:.2%} sure on average, expected calibration error "
          f"{calibration_error:.4f}")

    table = confusion_table(labels, answers, data.classes)
    print_table(table)
    print("\nmost confused")
    for count, a, b in most_confused(table):
        print(f"{a} and {b}: {table[a, b]} of label {a} called {b}, "
              f"{table[b, a]} of label {b} called {a}")
    return logits


def wilson_interval(correct: int, total: int, z=1.96) -> tuple[float, float]:
    """Return the 95% interval of an accuracy (Wilson, 1927): all true accuracies for which the
    measured one would be no surprise, that is, within 1.96 standard deviations.

    The usual p ± 1.96 · sqrt(p(1 - p) / n) fails near 100%. For 10 right of 10 it has no width,
    as if ten images could prove perfection. Wilson's interval goes from 72% to 100%.
    """
    p = correct / total
    centre = p + z ** 2 / (2 * total)
    half_width = z * math.sqrt(p * (1 - p) / total + z ** 2 / (4 * total ** 2))
    shrink = 1 + z ** 2 / total
    return (centre - half_width) / shrink, (centre + half_width) / shrink


def calibration(logits: Tensor, labels: Tensor, bins=15) -> tuple[float, float]:
    """Of the images on which a network is 90% sure, is it right on 90%?

    Return the mean confidence (the largest probability) and the expected calibration error (Guo et
    al., 2017). A single image is right or wrong, never "90% right". So images are sorted into bins
    by confidence, and each bin's mean confidence is compared with its accuracy. The error is the
    mean of these differences, each bin weighted by its images.

    Label smoothing asks for less than 100%. A network that learned with it is under-confident by
    design: it is right more often than it says.
    """
    confidence, answers = logits.softmax(1).max(1)
    right = (answers == labels).float()
    bin_of_image = (confidence * bins).long().clamp(max=bins - 1)        # 100% is in the last bin
    difference = 0.0
    for i in range(bins):
        in_bin = bin_of_image == i
        difference += abs(confidence[in_bin].sum() - right[in_bin].sum()).item()
    return confidence.mean().item(), difference / len(labels)


def confusion_table(labels: Tensor, answers: Tensor, classes: int) -> Tensor:
    """Return counts K×K: a row for each label, a column for each answer."""
    table = torch.zeros(classes, classes, dtype=torch.int64)
    for label, answer in zip(labels.tolist(), answers.tolist()):
        table[label, answer] += 1
    return table


def print_table(table: Tensor) -> None:
    """Print the confusion table with recall and precision.

    Recall divides by the row: how many of the real 4s were called 4? Precision divides by the
    column: how many of those called 4 are real? A network that calls everything 4 has a recall of
    100% for it and a precision of 10%. Each of the two is easy to have alone.
    """
    classes = range(len(table))
    correct = table.diag().tolist()
    labels = table.sum(1).tolist()                   # how many images have each label
    answers = table.sum(0).tolist()                  # how many images got each answer
    print("\nlabel called" + "".join(f"{k:6}" for k in classes) + "  recall, %")
    for k in classes:
        counts = "".join(f"{count:6}" for count in table[k].tolist())
        counts = counts.replace("     0", "     .")      # a dot for 0, so that the errors stand out
        print(f"{k:<12}{counts}{percent(correct[k], labels[k]):>11}")
    precisions = [percent(correct[k], answers[k], 1) for k in classes]
    print("precision, %" + "".join(f"{precision:>6}" for precision in precisions))


def percent(part: int, whole: int, digits=2) -> str:
    """Return a share in percent. A class without images in the test set has no recall: "-"."""
    if whole == 0:
        return "-"
    return f"{100 * part / whole:.{digits}f}"


def most_confused(table: Tensor, limit=5) -> list[tuple[int, int, int]]:
    """Return the most confused pairs as (errors, a, b). Both directions count together."""
    pairs = []
    for a in range(len(table)):
        for b in range(a + 1, len(table)):
            errors = (table[a, b] + table[b, a]).item()
            if errors > 0:
                pairs.append((errors, a, b))
    pairs.sort(key=lambda pair: -pair[0])
    return pairs[:limit]


# ---- Two networks on the same images ----------------------------------------------------------

def compare(names: list, runs: list, data) -> None:
    """Print whether one of two runs is better than the other on the same test images.

    Two intervals that overlap do not answer this. Most images are easy or hard for both networks,
    and tell nothing about the difference. Only the images on which one is right do.
    """
    images, labels = data.test
    right = []
    for name, run in zip(names, runs):
        answers = predict(run.network, images, run.mean, run.std).argmax(1)
        right.append(answers == labels)
        print(f"{name}: {(answers != labels).sum()} errors in {len(labels)}")
    only_first = (right[0] & ~right[1]).sum().item()
    only_second = (right[1] & ~right[0]).sum().item()
    print(f"only the first is right on {only_first} images, only the second on {only_second}")
    p_value = mcnemar(only_first, only_second)
    print(f"McNemar's test: p = {p_value:.3g}, the chance of a difference at least this large "
          f"between two equally good networks")


def mcnemar(only_a_right: int, only_b_right: int) -> float:
    """Return the p-value of the exact test (McNemar, 1947).

    If two networks are equally good, each image on which they differ is a coin toss. How likely
    are so many heads, or so many tails, or more?
    """
    tosses = only_a_right + only_b_right
    more = max(only_a_right, only_b_right)
    ways = sum(math.comb(tosses, heads) for heads in range(more, tosses + 1))
    return min(1.0, 2 * ways / 2 ** tosses)


# ---- Label errors -----------------------------------------------------------------------------

Suspect = namedtuple("Suspect", "index label other confidence margin")


def rank_labels(logits: Tensor, labels: Tensor) -> list[Suspect]:
    """Return all N images, the least believed label first, from logits R×N×K of R runs.

    confidence   the probability of the label, averaged over the runs
    other        the most probable of the other classes
    margin       confidence less the probability of `other`. At 1 all runs are certain of the
                 label, below 0 it is an error, at -1 all runs are certain that the label is
                 wrong (Northcutt, Jiang, Chuang, 2021).
    Each run has one vote: probabilities are averaged, not logits, which may be of any size.
    """
    probabilities = logits.softmax(2).mean(0)                                           # N×K
    column = labels[:, None]                                                            # N×1
    confidence = probabilities.gather(1, column)[:, 0]
    others = probabilities.scatter(1, column, -1.0)                      # never choose the label
    other_confidence, other = others.max(1)
    margin = confidence - other_confidence

    found = []
    for i in margin.argsort().tolist():
        found.append(Suspect(i, labels[i].item(), other[i].item(), confidence[i].item(),
                             margin[i].item()))
    return found


def report_suspects(runs: list, data, out: Path) -> None:
    """Print the 20 least believed test labels of one or several runs, and draw 48 of them.

    This is no proof: runs of one recipe make the same mistakes, and an odd digit with a right
    label looks the same here. People found 15 of MNIST's 10,000 test labels to be wrong
    (Northcutt, Athalye, Mueller, 2021). With four runs, all 15 were among the first 100 here.
    """
    images, labels = data.test
    logits = [predict(run.network, images, run.mean, run.std) for run in runs]
    found = rank_labels(torch.stack(logits), labels)
    for suspect in found[:20]:
        print(f"#{suspect.index:<5} label {suspect.label}, or {suspect.other}?  confidence "
              f"{suspect.confidence:.4f}, margin {suspect.margin:+.3f}")
    draw_suspects(found, images, out / "suspects.png")


def draw_suspects(found: list[Suspect], images: Tensor, path) -> None:
    tiles, captions = [], []
    for suspect in found[:48]:
        tiles.append(tile(images[suspect.index]))
        captions.append(f"#{suspect.index}  {suspect.margin:+.2f}\n"
                        f"label {suspect.label}, or {suspect.other}?")
    gallery(tiles, captions, path,
            title="The least believed labels: #index, margin (below 0: an error, -1: a sure one)")


# ---- Your own digit ---------------------------------------------------------------------------
#
# A network knows only digits like those it has seen. The makers of MNIST scaled each digit to fit
# into 20×20 pixels and put its centre of mass into the middle of 28×28 (LeCun et al., 1998). A
# picture of your own has to go the same way: find paper and ink, crop, scale, centre.

def prepare(picture: Tensor) -> Tensor:
    """Return a picture C×H×W of one digit as MNIST would hold it: light on black, uint8 1×1×28×28.
    Raises UserError if nothing can be seen.
    """
    ink = find_ink(resize(picture, 128))
    rows = (ink > 0.5).any(dim=1).nonzero().flatten()
    columns = (ink > 0.5).any(dim=0).nonzero().flatten()
    if len(rows) == 0:
        raise UserError("--image: the picture is blank, nothing in it differs from the paper")
    digit = ink[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]

    digit = resize(digit[None], 20)[0]
    height, width = digit.shape
    top = first_pixel(digit.sum(dim=1))
    left = first_pixel(digit.sum(dim=0))
    image = torch.zeros(28, 28)
    image[top:top + height, left:left + width] = digit
    return (255 * image).round().byte()[None, None]


def find_ink(picture: Tensor) -> Tensor:
    """Return how much ink is at each pixel of a picture C×128×128 or less: H×W, from 0 to 1."""
    # Paper is what most of the border shows. In a tightly cropped picture ink may cover more than
    # half of the area, but seldom of the border.
    border = torch.cat([picture[:, 0], picture[:, -1], picture[:, :, 0], picture[:, :, -1]], dim=1)
    paper = border.median(dim=1).values[:, None, None]                                  # C×1×1
    difference = picture - paper

    # Ink is the colour that differs most from the paper. Of other pixels only the part that goes
    # in the direction from paper to ink counts: 0 is paper, 1 is ink, a bright spot is below 0.
    distance = difference.abs().mean(0)                                                 # H×W
    if distance.max() < 0.08:
        return torch.zeros_like(distance)            # nothing but noise: blank
    row, column = divmod(distance.argmax().item(), distance.shape[1])
    to_ink = difference[:, row, column][:, None, None]                                  # C×1×1
    amount = (difference * to_ink).sum(0) / to_ink.square().sum()

    # Up to 0.3 it is shadow or a ruled line, from 0.7 on it is all ink. In between, edges stay
    # soft: a small scan has hardly more than edges.
    ink = ((amount - 0.3) / 0.4).clamp(0, 1)
    # Dust has no ink around it: at least 5 of the 9×9 pixels around a pixel have to be ink.
    share = F.avg_pool2d((ink > 0.5).float()[None], 9, stride=1, padding=4)[0]
    return ink * (share > 4.5 / 81)


def first_pixel(ink: Tensor) -> int:
    """Return the row (or column) of 28 at which a digit begins if its centre of mass is to be in
    the middle. `ink` is the ink in each of its rows (or columns)."""
    positions = torch.arange(len(ink)) + 0.5                             # the middle of each pixel
    centre = (ink * positions).sum() / ink.sum()
    first = round(14 - centre.item())
    return min(max(first, 0), 28 - len(ink))         # the whole digit has to be in the image


def resize(image: Tensor, side: int) -> Tensor:
    """Scale an image C×H×W, up or down, so that its longer side has `side` pixels."""
    height, width = image.shape[1:]
    scale = side / max(height, width)
    size = (max(1, round(scale * height)), max(1, round(scale * width)))
    return F.interpolate(image[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1)


def open_picture(path) -> Tensor:
    """Return a picture, upright, as numbers C×H×W from 0 to 1.

    C is 1 for pictures with 16 or 32 bits per pixel, otherwise 4: red, green, blue and opacity.
    Raises UserError.
    """
    try:
        picture = ImageOps.exif_transpose(Image.open(path))      # a camera stores how it was held
        if picture.mode[0] in "IF":                              # 16 or 32 bits
            picture = picture.convert("F")
        else:
            # RGBa is colour times opacity: a colour hidden by full transparency becomes 0.
            picture = picture.convert("RGBA").convert("RGBa")
        picture.thumbnail((1000, 1000))              # only makes it smaller: photos take time
        pixels = torch.tensor(np.atleast_3d(picture).astype(np.float32))                # H×W×C
    except Exception as error:                       # each format can be damaged in its own way
        raise UserError(f"--image {path} cannot be read as a picture ({reason(error)})")
    pixels = pixels.permute(2, 0, 1).nan_to_num(0.0, 0.0, 0.0)
    return pixels / pixels.abs().max().clamp(min=1e-9)


def report_image(path: Path, run, out: Path) -> None:
    """Print what the network is shown and the probability of each digit."""
    if input_shape(run.args.model) != (1, 28, 28):
        raise UserError(f"--image: the network {run.args.model!r} reads no grey images of 28x28")
    image = prepare(open_picture(path))
    for row in image[0, 0].tolist():
        characters = [2 * " .:+#"[math.ceil(value / 64)] for value in row]
        print("".join(characters).rstrip())
    probabilities = predict(run.network, image, run.mean, run.std)[0].softmax(0)
    for digit, probability in enumerate(probabilities.tolist()):
        print(f"{digit}  {probability:7.2%}")
    draw_evidence(run, image, out / "image.png")


# ---- Inside the network -----------------------------------------------------------------------

@torch.no_grad()
def evidence_maps(network, inputs: Tensor) -> Tensor | None:
    """Return N×K×H×W: for each class a map of what each position adds to its logit.

    The sum of a map is the logit. Only a network that ends in global average pooling has such
    maps; for others the result is None. They say only coarsely where the evidence is: a unit of
    the default network's last map sees 33×33 pixels, more than the image has.
    """
    if not isinstance(network, nn.Sequential):
        return None
    layers = list(network)
    if isinstance(layers[-1], nn.Sequential):                            # a head of model.py
        layers = layers[:-1] + list(layers[-1])
    ends = [type(layer) for layer in layers[-2:]]
    if ends != [nn.AdaptiveAvgPool2d, nn.Flatten] or layers[-2].output_size != 1:
        return None
    maps = inputs
    for layer in layers[:-2]:
        maps = layer(maps)
    return maps / maps[0, 0].numel()                                     # a mean is a sum of these


def draw_evidence(run, images: Tensor, path) -> None:
    """Draw one row per image: the image, then the evidence map of each class and its sum."""
    maps = evidence_maps(run.network, normalize(images, run.mean, run.std))
    if maps is None:
        print(f"no evidence maps: {run.args.model} does not end in global average pooling")
        return
    tiles, captions = [], []
    for image, maps_of_image in zip(images, maps):
        tiles.append(tile(image))
        captions.append("")
        limit = maps_of_image.abs().max()            # one scale for all classes
        for k, evidence in enumerate(maps_of_image):
            tiles.append(heat(evidence, limit))
            captions.append(f"{k}: {evidence.sum():+.1f}")
    gallery(tiles, captions, path, columns=1 + maps.shape[1], zoom=2,
            title="Evidence for each class (red) and against it (blue)\n"
                  "The number is the sum of the map: the logit of the class")


@torch.no_grad()
def draw_filters(run, image: Tensor, path) -> None:
    """Draw the filters of the first layer, and the maps of one image C×H×W after each layer.

    The first filters find edges of some direction, or spots. Each layer combines the maps of the
    layer before it. The later the layer, the less its maps look like the image.
    """
    convolutions = [layer for layer in run.network.modules() if isinstance(layer, nn.Conv2d)]
    if not isinstance(run.network, nn.Sequential) or not convolutions:
        print(f"no picture of filters: {run.args.model} is no nn.Sequential with convolutions")
        return
    filters = convolutions[0].weight.mean(1)         # C×H×W: the mean over the image's channels
    tiles = [heat(values, filters.abs().max()) for values in filters[:16]]
    title = f"filters of the first layer: {len(tiles)} of {len(filters)}"
    captions = [title] + [""] * (len(tiles) - 1)
    add_blanks(tiles, captions)

    tiles.append(tile(image))
    captions.append("the image")
    add_blanks(tiles, captions)

    maps = normalize(image[None], run.mean, run.std)
    for number, layer in enumerate(run.network, start=1):
        maps = layer(maps)
        if maps.dim() != 4 or maps.shape[-1] == 1:
            break                                    # no maps any more, but scores
        if isinstance(layer, nn.Dropout):
            continue                                 # off: it changes nothing here
        channels, height, width = maps.shape[1:]
        shown = maps[0, :8]
        tiles += [heat(values, shown.abs().max()) for values in shown]
        text = f"after layer {number}: {len(shown)} of {channels} maps, {height}x{width}"
        captions += [text] + [""] * (len(shown) - 1)
        add_blanks(tiles, captions)
    gallery(tiles, captions, path, columns=8, zoom=3,
            title="The first filters, and one image on its way through the network\n"
                  "White is 0, red is positive, blue is negative")


def add_blanks(tiles: list, captions: list, columns=8) -> None:
    """Fill the last row of a gallery with white pictures."""
    while len(tiles) % columns:
        tiles.append(Image.new("RGB", (1, 1), "white"))
        captions.append("")


def draw_confusion(table: Tensor, path) -> None:
    """Draw the errors of the confusion table: a row for each label, a column for each answer.

    The colour grows with log(1 + count). Otherwise 1 would look like 0 beside a count of 30.
    """
    strength = table.float().log1p()
    limit = (strength - strength.diag().diag()).max()                    # of the errors only
    tiles, captions = [], []
    for label in range(len(table)):
        for answer in range(len(table)):
            count = table[label, answer]
            value = strength[label, answer]
            caption = ""
            if label == answer:
                value = torch.tensor(0.0)
                caption = f"{label}"
            elif count > 0:
                caption = f"{label} as {answer}: {count}"
            tiles.append(heat(value.view(1, 1), limit))
            captions.append(caption)
    gallery(tiles, captions, path, columns=len(table), zoom=56)


def draw_augmented(image: Tensor, path) -> None:
    """Draw one image C×H×W as it is, then seven times as each recipe varies it."""
    torch.manual_seed(0)                             # the same picture each time
    tiles, captions = [], []
    for recipe in ("default", "n1", "n2", "n3"):
        varied = augment(image.repeat(7, 1, 1, 1), recipe)
        tiles.append(tile(image))
        captions.append(f"original, then --augment {recipe}")
        for variation in varied:
            tiles.append(tile(255 * variation))
            captions.append("")
    gallery(tiles, captions, path, columns=8, zoom=3)


# ---- Curves -----------------------------------------------------------------------------------

def curves(history: list[dict], path) -> None:
    """Draw loss and accuracy after each epoch, on training and on test images.

    `history` has a dict per epoch, as train.py returns it and read_log reads it.
    """
    panels = []
    for quantity, unit in (("loss", "mean per image"), ("accuracy", "% of the images")):
        panels.append(curve_panel(history, f"Training {quantity}", unit, {
            "training": f"train_{quantity}"}))
        panels.append(curve_panel(history, f"Test {quantity}", unit, {
            "held-out": f"val_{quantity}", "test": f"test_{quantity}"}))
    chart(panels, path)


def curve_panel(history: list[dict], title: str, unit: str, columns: dict) -> dict:
    epochs = [row["epoch"] for row in history]
    lines = {}
    for name, column in columns.items():
        if column in history[0]:
            lines[name] = (epochs, [row[column] for row in history])
    return {"title": title, "x": "epoch", "y": unit, "lines": lines}


def read_log(path) -> list[dict]:
    """Return the rows of a run's log.csv as dicts of numbers. Raises UserError."""
    history = []
    try:
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                history.append({name: float(value) for name, value in row.items()})
        if not history:
            raise ValueError("it has no rows")
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{path} is no log of train.py ({reason(error)})")
    return history


# ---- Drawing: a sheet of small pictures -------------------------------------------------------

INK, GREY, PALE = "#222222", "#6b6b6b", "#e3e3e3"
RED = torch.tensor([178.0, 24.0, 43.0])[:, None, None]                                  # 3×1×1
BLUE = torch.tensor([33.0, 102.0, 172.0])[:, None, None]


def tile(image):
    """Return a tensor C×H×W, 0 to 255, as a picture: in colour if C is 3, else grey."""
    if len(image) != 3:
        image = image[:1].expand(3, -1, -1)
    pixels = image.detach().cpu().clamp(0, 255).byte().permute(1, 2, 0)                 # H×W×3
    return Image.fromarray(pixels.numpy())


def heat(values, limit=None):
    """Return numbers H×W as a picture, one pixel each: zero is white, more is red, less is blue.

    The colour is full at `limit` and at -limit. Without a limit it is full at the largest number.
    """
    values = values.detach().cpu().float().nan_to_num()
    if limit is None:
        limit = values.abs().max()
    strength = (values / max(float(limit), 1e-12)).clamp(-1, 1)                         # H×W
    colour = torch.where(strength > 0, RED, BLUE)                                       # 3×H×W
    return tile(255 + strength.abs() * (colour - 255))


def gallery(tiles, captions, path, columns=8, zoom=4, title=""):
    """Draw pictures in rows into one PNG, below each its caption of one line or more.

    All pictures get the same size: `zoom` times that of the largest. At least one is needed.
    """
    width = zoom * max(picture.width for picture in tiles)
    height = zoom * max(picture.height for picture in tiles)
    caption_lines = max(len(caption.splitlines()) for caption in captions)
    column_width = width + 16
    row_height = height + 16 + 19 * caption_lines
    title_lines = title.splitlines()
    top = 16 + 24 * len(title_lines)

    title_width = max([text_width(line, 18) for line in title_lines], default=0)
    sheet_width = 16 + max(columns * column_width, title_width + 16)
    rows = math.ceil(len(tiles) / columns)
    sheet = Image.new("RGB", (sheet_width, top + rows * row_height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((16, 10), title, INK, font(18))

    for i, (picture, caption) in enumerate(zip(tiles, captions)):
        x = 16 + column_width * (i % columns)
        y = top + row_height * (i // columns)
        sheet.paste(picture.resize((width, height), Image.NEAREST), (x, y))
        draw.text((x, y + height + 4), caption, INK, font(15))
    save_png(sheet, path)


def save_png(picture, path):
    content = io.BytesIO()
    picture.save(content, "PNG")
    save(path, content.getvalue())


def text_width(text, size):
    return math.ceil(font(size).getlength(text))


# ---- Drawing: line charts ---------------------------------------------------------------------

COLOURS = ("#1f6fb4", "#d9622b", "#2e8b57", "#8e44ad", "#b8860b", "#008b8b", "#c2185b", "#555555")

# Where the axes lie in the picture, in pixels, and the values at their ends. On a logarithmic
# axis these are logarithms.
Frame = namedtuple("Frame", "left right top bottom x_low x_high y_low y_high log_x log_y")


def chart(panels, path, columns=2):
    """Draw line charts into one PNG. Panels are 600 pixels wide, in a single column 900.

        {"title": "Loss", "x": "epoch", "y": "mean loss", "lines": {"train": (xs, ys), ...}}

    A panel may also have
        "bands": {name: (xs, lows, highs)}     a shaded area, in the colour of the first line
        "marks": {name: x}                     vertical lines, three at most
        "log_x": True, "log_y": True           a logarithmic axis
        "y_range": (low, high)                 otherwise the axis fits the data
    NaN, infinite values and values off the axes leave a gap.
    """
    width, height = 600, 420
    if columns == 1:
        width = 900
    rows = math.ceil(len(panels) / columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for i, panel in enumerate(panels):
        corner = (width * (i % columns), height * (i // columns))
        sheet.paste(draw_panel(panel, width, height), corner)
    save_png(sheet, path)


def draw_panel(panel, width, height):
    """Return one panel as a picture. It is drawn twice as large and halved, for smooth lines."""
    image = Image.new("RGB", (2 * width, 2 * height), "white")
    draw = ImageDraw.Draw(image)
    lines = panel["lines"]
    bands = panel.get("bands", {})
    names = list(bands) + list(lines)
    legend_width = 80 + max([text_width(name, 28) for name in names], default=0)
    right = max(width, 2 * width - legend_width)              # the axes get half of it at least
    frame = make_frame(panel, 130, right, 110, 2 * height - 110)
    draw_axes(draw, panel, frame)

    # Lines may coincide. The first is drawn as the thickest, so the later ones do not hide it.
    legend = []
    for i, (name, (xs, lows, highs)) in enumerate(bands.items()):
        colour = paler(COLOURS[i % len(COLOURS)])
        draw_band(draw, points(frame, xs, lows), points(frame, xs, highs), colour)
        legend.append((name, colour, 24))
    for i, (name, (xs, ys)) in enumerate(lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        thickness = 4 + 3 * min(len(lines) - 1 - i, 4)
        draw_line(draw, points(frame, xs, ys), colour, thickness)
        legend.append((name, colour, thickness))

    for i, (name, colour, thickness) in enumerate(legend):
        y = frame.top + 16 + 44 * i
        draw.line((right + 20, y, right + 56, y), colour, thickness)
        write(draw, right + 68, y - 16, name, INK, 28)
    for i, (name, x) in enumerate(panel.get("marks", {}).items()):
        draw_mark(draw, frame, x, name, frame.top + 8 + 44 * i)
    return image.reduce(2)


def make_frame(panel, left, right, top, bottom):
    """Return a frame that fits all values of the panel, or its "y_range" if it has one."""
    log_x = panel.get("log_x", False)
    log_y = panel.get("log_y", False)
    all_xs = [list(panel.get("marks", {}).values())]
    all_ys = []
    for xs, ys in panel["lines"].values():
        all_xs.append(xs)
        all_ys.append(ys)
    for xs, lows, highs in panel.get("bands", {}).values():
        all_xs.append(xs)
        all_ys += [lows, highs]

    x_low, x_high = limits(all_xs, log_x)
    y_low, y_high = limits(all_ys, log_y)
    room = (y_high - y_low) / 20
    y_low, y_high = y_low - room, y_high + room
    if "y_range" in panel:
        y_low, y_high = limits([panel["y_range"]], log_y)
    return Frame(left, right, top, bottom, x_low, x_high, y_low, y_high, log_x, log_y)


def to_axis(values, log=False):
    """Return values as an axis counts them, on a logarithmic axis in powers of ten.

    What an axis cannot show becomes NaN: infinity and, on a logarithmic axis, all below 1e-100.
    """
    values = np.array(values, dtype=float)
    known = np.abs(values) < 1e100
    if log:
        known = known & (values > 1e-100)
    values = np.where(known, values, np.nan)
    if log:
        values = np.log10(values)
    return values


def limits(lists, log=False):
    """Return the lowest and the highest of all values. Some room is around a single value."""
    values = []
    for numbers in lists:
        values.extend(to_axis(numbers, log))
    values = [value for value in values if math.isfinite(value)]
    if len(values) == 0:
        return 0.0, 1.0
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    if high - low <= 1e-9 * max(size, 1):
        room = max(size / 100, 1e-3)
        return low - room, high + room
    return low, high


def ticks(low, high, most=8):
    """Return the round numbers from low to high: multiples of 1, 2 or 5 times a power of ten."""
    smallest_step = (high - low) / most
    power = 10.0 ** math.floor(math.log10(smallest_step))
    for factor in (1, 2, 5, 10):
        step = factor * power
        if step >= smallest_step:
            break
    first, last = math.ceil(low / step), math.floor(high / step)
    return [step * i for i in range(first, last + 1)]


def axis_ticks(low, high, log):
    """Return pairs (value on the axis, label)."""
    if not log:
        return [(value, f"{value:.6g}") for value in ticks(low, high)]
    if high - low > 3:                               # more than a factor of 1,000: powers of ten
        powers = [power for power in ticks(low, high) if power == round(power)]
        return [(power, f"{10 ** power:.3g}") for power in powers]
    pairs = []
    for power in range(math.floor(low), math.ceil(high) + 1):
        for digit in (1, 2, 5):
            value = digit * 10.0 ** power
            pairs.append((math.log10(value), f"{value:.3g}"))
    return [pair for pair in pairs if low <= pair[0] <= high]


def x_pixel(frame, value):
    """Return where a value on the x axis lies in the picture. NaN stays NaN."""
    share = (value - frame.x_low) / (frame.x_high - frame.x_low)
    return frame.left + share * (frame.right - frame.left)


def y_pixel(frame, value):
    """Return where a value on the y axis lies in the picture. Pixels are counted downwards."""
    share = (value - frame.y_low) / (frame.y_high - frame.y_low)
    return frame.bottom - share * (frame.bottom - frame.top)


def points(frame, xs, ys):
    """Return the places (x, y) of points in the picture. y is NaN where it is off the axis."""
    xs = to_axis(xs, frame.log_x)
    ys = to_axis(ys, frame.log_y)
    ys = np.where((ys < frame.y_low) | (ys > frame.y_high), np.nan, ys)
    return list(zip(x_pixel(frame, xs), y_pixel(frame, ys)))


def draw_axes(draw, panel, frame):
    """Draw the grid, its numbers, and the titles of the panel and of its axes."""
    for value, label in axis_ticks(frame.x_low, frame.x_high, frame.log_x):
        if panel["x"] == "epoch" and value != round(value):
            continue                                 # there is no epoch 1.5
        x = x_pixel(frame, value)
        draw.line((x, frame.top, x, frame.bottom), PALE, 2)
        write(draw, x, frame.bottom + 12, label, GREY, 28, "middle")
    for value, label in axis_ticks(frame.y_low, frame.y_high, frame.log_y):
        y = y_pixel(frame, value)
        draw.line((frame.left, y, frame.right, y), PALE, 2)
        write(draw, frame.left - 14, y - 18, label, GREY, 28, "right")
    write(draw, 32, 16, panel["title"], INK, 34)
    write(draw, 32, 66, panel["y"], GREY, 28)
    write(draw, (frame.left + frame.right) / 2, frame.bottom + 54, panel["x"], GREY, 28, "middle")


def draw_line(draw, places, colour, thickness):
    """Draw the line from point to point. A point whose neighbours are unknown is drawn as a dot."""
    for here, there in zip(places, places[1:]):
        if not np.isnan([here, there]).any():
            draw.line([here, there], colour, thickness)
    radius = thickness / 2
    if len(places) <= 40:
        radius += 2                                  # few points: mark each
    for x, y in places:
        if not np.isnan([x, y]).any():
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), colour)


def draw_band(draw, lows, highs, colour):
    """Shade the area between two lines."""
    for i in range(1, len(lows)):
        corners = [lows[i - 1], lows[i], highs[i], highs[i - 1]]
        if not np.isnan(corners).any():
            draw.polygon(corners, colour)


def draw_mark(draw, frame, x, name, label_top):
    """Draw a vertical line and its name beside it, on the side where there is more room."""
    x = x_pixel(frame, to_axis(x, frame.log_x))
    if np.isnan(x):
        return
    draw.line((x, frame.top, x, frame.bottom), INK, 3)
    width = text_width(name, 28)
    left = x + 6
    if x > (frame.left + frame.right) / 2:
        left = x - 14 - width
    draw.rectangle((left, label_top, left + width + 8, label_top + 36), "white")
    write(draw, left + 4, label_top, name, INK, 28)


def write(draw, x, y, text, colour, size, align="left"):
    """Write a line of text. x is its left end, its middle or its right end."""
    if align == "middle":
        x -= text_width(text, size) / 2
    if align == "right":
        x -= text_width(text, size)
    draw.text((x, y), text, colour, font(size))


def paler(colour):
    """Return a colour mixed with three parts of white."""
    return tuple(255 - (255 - part) // 4 for part in ImageColor.getrgb(colour))


# ---- The command line -------------------------------------------------------------------------

def report_run(folder: Path, data_dir, out: Path) -> None:
    """Print the report of a run and draw all its pictures; only the curves if it still trains."""
    log, weights = folder / "log.csv", folder / "weights.pt"
    if not log.exists() and not weights.exists():
        raise UserError(f"{folder} has no log.csv and no weights.pt: it is no run of train.py, or "
                        f"its first epoch is not finished")
    if log.exists():
        curves(read_log(log), out / "curves.png")
    if not weights.exists():
        print(f"{folder} is not finished: only {quote(out / 'curves.png')} is drawn so far")
        return

    run = load_run(folder)
    data = load_data(run, data_dir)
    images, labels = data.test
    logits = report(folder, run, data)
    print()
    found = rank_labels(logits[None], labels)
    draw_suspects(found, images, out / "failures.png")
    draw_confusion(confusion_table(labels, logits.argmax(1), data.classes), out / "confusion.png")
    draw_augmented(data.train[0][0], out / "augmented.png")
    worst = [suspect.index for suspect in found[:4]]
    draw_evidence(run, images[[0, 1, 2, 3] + worst], out / "features.png")
    draw_filters(run, images[0], out / "filters.png")
    print(f"drawn in {quote(out)}")


def load_data(run, data_dir):
    """Load the data of a run from data_dir, or without one from where the run found them."""
    if data_dir is None:
        data_dir = run.args.data_dir
    return load(run.args.data, data_dir)


def load_runs(folders: list) -> list:
    """Load several runs. Raises UserError if they were not trained on the same data."""
    runs = [load_run(folder) for folder in folders]
    for run in runs:
        if run.args.data != runs[0].args.data:
            raise UserError("these runs were trained on different data")
    return runs


def last_run() -> Path:
    """Return the run with the highest number under runs/."""
    folders = [path for path in Path("runs").glob("*") if path.name.isdecimal()]
    if not folders:
        raise UserError("there is no run under runs/: train one, or name it with --run")
    return max(folders, key=lambda path: int(path.name))


def main() -> None:
    parser = Parser(prog="analyze.py", description="What a trained network gets wrong, and why.")
    parser.add_argument("--run", type=user_path, metavar="FOLDER", help="none: the last run")
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--compare", type=user_path, nargs=2, metavar="FOLDER",
                      help="two runs: is one better?")
    task.add_argument("--suspects", type=user_path, nargs="+", metavar="FOLDER",
                      help="one or more runs: which test labels may be wrong?")
    task.add_argument("--image", type=user_path, metavar="FILE",
                      help="a picture of one digit: what is it?")
    parser.add_argument("--data-dir", type=user_path, help="none: where the run found its data")
    parser.add_argument("--out", type=user_path, metavar="FOLDER", help="none: FOLDER/analysis")
    args = parser.parse_args()

    if args.run and (args.compare or args.suspects):
        raise UserError("--run: --compare and --suspects name their runs themselves")
    if args.compare:
        folders = args.compare
    elif args.suspects:
        folders = args.suspects
    elif args.run:
        folders = [args.run]
    else:
        folders = [last_run()]
    out = args.out
    if out is None:
        out = folders[0] / "analysis"

    if args.compare:
        runs = load_runs(folders)
        compare(folders, runs, load_data(runs[0], args.data_dir))
    elif args.suspects:
        runs = load_runs(folders)
        report_suspects(runs, load_data(runs[0], args.data_dir), out)
        print(f"\ndrawn: {quote(out / 'suspects.png')}")
    elif args.image:
        report_image(args.image, load_run(folders[0]), out)
    else:
        report_run(folders[0], args.data_dir, out)


if __name__ == "__main__":
    run_command(main)
