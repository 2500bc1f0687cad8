"""What the network gets wrong, and why: a report on one screen, and all pictures of the project.

What it teaches: one accuracy hides most of what a test set can tell. Which digits are confused, does
the network know when it is guessing, where in the image did it find its evidence, and is it
sometimes the label that is wrong?

    python analyze.py                                 the last run under runs/
    python analyze.py --run runs/003                  another run; also while it is still training
    python analyze.py --compare runs/001 runs/002     is one of two runs better, or is it noise?
    python analyze.py --suspects runs/001 runs/002    label errors, by one run or by several
    python analyze.py --image photo.png               a digit of your own

Its pictures go into the folder of the run, under analysis/.
"""
import csv
import io
import math
from collections import namedtuple
from pathlib import Path

from data import (AUGMENTATIONS, Parser, UserError, augment, font, load, normalize, quote, reason,
                  run_command, save, user_path)      # before torch: see data.py

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageOps
from torch import nn

from model import count_parameters, input_shape
from train import load_run, predict


# ---- The report -------------------------------------------------------------------------------

def report(run, data, folder, out) -> None:
    """Print what one run gets right and wrong on the test images, and draw its pictures."""
    images, labels = data.test
    logits = predict(run.network, images, run.mean, run.std)
    answers = logits.argmax(1)
    loss = F.cross_entropy(logits, labels)
    correct = int((answers == labels).sum())
    low, high = wilson_interval(correct, len(labels))
    second = logits.topk(2).indices[:, 1]
    confidence, error = calibration(logits, labels)

    print(f"{folder}: {run.args.model}, {count_parameters(run.network):,} parameters; "
          f"{run.args.opt}, {run.args.sched}, {run.args.epochs} epochs, seed {run.args.seed}")
    print(f"{data.name} test set: accuracy {correct / len(labels):.2%} (95% interval {low:.2%} to "
          f"{high:.2%}), {len(labels) - correct} errors in {len(labels)}, loss {loss:.4f}")
    print(f"second guess: right in {int((second == labels).sum())} of the errors")
    print(f"calibration: {confidence:.2%} sure on average, expected calibration error {error:.4f}")

    counts = confusion_table(labels, answers, data.classes)
    print_confusion(counts)
    print_confused_pairs(counts)
    draw_all(run, data, logits, counts, out)


def wilson_interval(correct: int, total: int, z=1.96) -> tuple[float, float]:
    """The 95% interval of an accuracy (Wilson, 1927), as shares from 0 to 1.

    It holds all true accuracies that would explain the observed one, p, with an error of at most
    1.96 standard deviations. The simpler p ± 1.96 · sqrt(p(1 - p) / n) fails near 100%: for 10 of
    10 it is a single point, as if ten images could prove perfection. Wilson's says 72% to 100%.
    """
    p = correct / total
    centre = p + z * z / (2 * total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return (centre - half) / scale, (centre + half) / scale


def calibration(logits, labels, bins=15) -> tuple[float, float]:
    """Is the network right in 90% of the cases in which it is 90% sure?

    Returns its mean confidence (its largest probability) and the expected calibration error (Guo
    et al., 2017): images are sorted into bins by confidence; in each bin mean confidence and
    accuracy are compared; the differences are averaged, weighted by the images in the bin.
    A network that was trained with label smoothing is under-confident: it was asked for 95.5%.
    """
    confidence, answers = logits.softmax(1).max(1)
    correct = (answers == labels).float()
    bin_numbers = (confidence * bins).long().clamp(max=bins - 1)
    error = 0.0
    for number in range(bins):
        inside = bin_numbers == number
        if inside.any():
            difference = confidence[inside].mean() - correct[inside].mean()
            error += abs(difference.item()) * inside.sum().item() / len(labels)
    return confidence.mean().item(), error


def confusion_table(labels, answers, classes: int):
    """K×K counts: a row per label, a column per answer."""
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    for label, answer in zip(labels.tolist(), answers.tolist()):
        counts[label, answer] += 1
    return counts


def print_confusion(counts) -> None:
    """The table with recall and precision.

    Recall: of the real 4s, how many were called 4? Precision: of all that were called 4, how many
    are 4s? A network that calls everything 4 has a recall of 100% there, and a precision of 10%.
    """
    classes = len(counts)
    header = "".join(f"{answer:6}" for answer in range(classes))
    print(f"\nlabel called{header}   recall")
    for label, row in enumerate(counts.tolist()):
        cells = "".join(f"{count or '.':>6}" for count in row)
        print(f"{label:<12}{cells}{percent(row[label], sum(row)):>9}")
    cells = ""
    for answer, column in enumerate(counts.T.tolist()):
        cells += f"{percent(column[answer], sum(column), digits=1):>6}"
    print(f"{'precision, %':<12}{cells}")


def percent(part: int, whole: int, digits=2) -> str:
    if whole == 0:
        return "-"                                   # no such image, so there is no share
    return f"{100 * part / whole:.{digits}f}"


def print_confused_pairs(counts) -> None:
    """The five pairs of classes that are confused most often, in either direction."""
    pairs = []
    for a in range(len(counts)):
        for b in range(a + 1, len(counts)):
            total = int(counts[a, b] + counts[b, a])
            if total:
                pairs.append((total, a, b))
    pairs.sort(reverse=True)
    print("\nmost confused")
    for _, a, b in pairs[:5]:
        print(f"{a} and {b}: {counts[a, b]} {a}s called {b}, {counts[b, a]} {b}s called {a}")


# ---- Two runs on the same images --------------------------------------------------------------

def compare(first, second, data, names) -> None:
    """Print which of two runs makes fewer errors, and whether seed noise would explain it."""
    images, labels = data.test
    right = []
    for run in (first, second):
        answers = predict(run.network, images, run.mean, run.std).argmax(1)
        right.append(answers == labels)
    only_first = int((right[0] & ~right[1]).sum())
    only_second = int((right[1] & ~right[0]).sum())
    for name, correct in zip(names, right):
        print(f"{name}: {int((~correct).sum())} errors in {len(labels)}")
    print(f"only the first is right: {only_first} images; only the second: {only_second}")
    p = mcnemar(only_first, only_second)
    print(f"p = {p:.3f}: two equally good networks differ this much or more in {p:.0%} of cases")


def mcnemar(only_first: int, only_second: int) -> float:
    """The p-value of McNemar's exact test (1947).

    Both networks saw the same images. Those that both get right, or both wrong, say nothing about
    the difference. If the networks are equally good, each of the other images is a toss of a coin.
    """
    tosses = only_first + only_second
    fewer = min(only_first, only_second)
    ways = sum(math.comb(tosses, heads) for heads in range(fewer + 1))
    return min(1.0, 2 * ways / 2 ** tosses)


# ---- Label errors -----------------------------------------------------------------------------

Suspect = namedtuple("Suspect", "index label other confidence margin")


def rank_labels(logits, labels) -> list:
    """All N images, the least believed label first (Northcutt, Jiang, Chuang, 2021).

    `logits` R×N×K are those of one or more runs. `confidence` is the probability of the label,
    averaged over the runs. `margin` is that minus the probability of the best other class: 1 means
    that all runs are sure of the label, below 0 is an error, -1 means all are sure of another one.
    """
    probabilities = logits.softmax(2).mean(0)                                           # N×K
    of_label = probabilities.gather(1, labels[:, None])[:, 0]                           # N
    others = probabilities.scatter(1, labels[:, None], -1.0)         # the label is out of the way
    best, other = others.max(1)
    ranked = []
    for index in range(len(labels)):
        ranked.append(Suspect(index, labels[index].item(), other[index].item(),
                              of_label[index].item(), (of_label - best)[index].item()))
    ranked.sort(key=lambda suspect: suspect.margin)
    return ranked


def report_suspects(runs: list, data, out) -> None:
    """Print the 20 test labels that the runs believe least, and draw 48 of them.

    This proves nothing: an odd digit with a right label looks the same from here. People have found
    15 of MNIST's 10,000 test labels wrong (Northcutt, Athalye, Mueller, 2021).
    """
    images, labels = data.test
    logits = []
    for run in runs:
        if run.args.data != data.name:
            raise UserError("--suspects: these runs were trained on different data sets")
        logits.append(predict(run.network, images, run.mean, run.std))
    ranked = rank_labels(torch.stack(logits), labels)
    for suspect in ranked[:20]:
        print(f"#{suspect.index:<5} label {suspect.label}, or {suspect.other}?  confidence "
              f"{suspect.confidence:.4f}, margin {suspect.margin:+.3f}")
    draw_ranked(ranked, images, out / "suspects.png")


# ---- Your own digit ---------------------------------------------------------------------------
#
# MNIST's makers scaled each digit to fit 20×20 pixels, which made its edges grey, and put its centre
# of mass into the middle of 28×28 pixels, light on black (LeCun et al., 1998). A network that has
# seen nothing else cannot read anything else. So a picture goes the same way.

def read_own_digit(path, run, out) -> None:
    """Print what the network is shown and its ten probabilities. Draw its evidence."""
    if input_shape(run.args.model) != (1, 28, 28):
        raise UserError(f"--image: the network {run.args.model!r} reads no grey 28x28 images")
    image = prepare(open_picture(path))
    for row in image[0, 0].tolist():
        line = ""
        for value in row:
            line += 2 * " .:+#"[math.ceil(value / 64)]
        print(line.rstrip())
    probabilities = predict(run.network, image, run.mean, run.std)[0].softmax(0)
    for digit, probability in enumerate(probabilities.tolist()):
        print(f"{digit}  {probability:7.2%}")
    draw_evidence(run, image, out / "image.png")


def open_picture(path):
    """A picture as a tensor C×H×W from 0 to 1, upright. Raises UserError.

    C is 1 for pictures of 16 or 32 bits, otherwise 4: red, green, blue, opacity.
    """
    try:
        picture = ImageOps.exif_transpose(Image.open(path))      # cameras note how they were held
        if picture.mode[0] in "IF":
            picture = picture.convert("F")
        else:
            # RGBa is colour times opacity, so all that is transparent becomes one colour.
            picture = picture.convert("RGBA").convert("RGBa")
        pixels = torch.tensor(np.atleast_3d(picture).astype(np.float32))                # H×W×C
    except Exception as error:                       # each format is damaged in its own way
        raise UserError(f"--image {path} cannot be read as a picture ({reason(error)})")
    return pixels.permute(2, 0, 1) / pixels.abs().max().clamp(min=1e-9)


def prepare(picture):
    """A picture C×H×W of one digit as MNIST would hold it: uint8 1×1×28×28. Raises UserError."""
    ink = find_ink(picture)
    rows = (ink > 0.5).any(1).nonzero().flatten()
    columns = (ink > 0.5).any(0).nonzero().flatten()
    if len(rows) == 0:
        raise UserError("--image: the picture is blank, nothing in it differs from the paper")
    ink = ink[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
    ink = resize(ink[None], 20)[0]

    # Where does the digit lie if its centre of mass is in the middle?
    height, width = ink.shape
    centre_y = (ink.sum(1) @ (torch.arange(height) + 0.5)) / ink.sum()
    centre_x = (ink.sum(0) @ (torch.arange(width) + 0.5)) / ink.sum()
    top = min(max(round(14 - centre_y.item()), 0), 28 - height)
    left = min(max(round(14 - centre_x.item()), 0), 28 - width)
    image = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    image[0, 0, top:top + height, left:left + width] = (255 * ink).round().byte()
    return image


def find_ink(picture):
    """How much each pixel is ink, H×W from 0 to 1, the longer side scaled to 128 pixels."""
    picture = resize(picture, 128)
    border = torch.cat([picture[:, 0], picture[:, -1], picture[:, :, 0], picture[:, :, -1]], 1)
    paper = border.median(1).values                  # the colour of most of the border, C numbers

    # The pixel that differs most from the paper is ink. How far is each pixel on the way from the
    # paper to it? Below a quarter is shadow, above three quarters is ink, edges lie in between.
    difference = picture - paper[:, None, None]
    distance = difference.abs().mean(0)                                                 # H×W
    if distance.max() < 0.08:
        return torch.zeros_like(distance)            # no ink, only noise
    y, x = divmod(distance.argmax().item(), distance.shape[1])
    direction = difference[:, y, x]
    way = torch.einsum("chw,c->hw", difference, direction) / (direction ** 2).sum()
    ink = ((way - 0.25) / 0.5).clamp(0, 1)

    # A stroke has neighbours. Dust and the lines of ruled paper have few.
    neighbours = F.avg_pool2d((ink > 0.5).float()[None], 9, 1, 4)[0]
    return ink * (neighbours > 0.055)


def resize(image, side: int):
    """Scale C×H×W so that its longer side has `side` pixels."""
    _, height, width = image.shape
    scale = side / max(height, width)
    size = (max(1, round(scale * height)), max(1, round(scale * width)))
    return F.interpolate(image[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1)


# ---- Pictures of a run ------------------------------------------------------------------------

def draw_all(run, data, logits, counts, out) -> None:
    """Draw the pictures of the report."""
    images, labels = data.test
    ranked = rank_labels(logits[None], labels)
    draw_ranked(ranked, images, out / "failures.png")
    errors = counts - counts.diag().diag()           # the diagonal is right
    gallery([heat(errors.float().log1p())], ["rows: label from 0 on, columns: answer"],
            out / "confusion.png", columns=1, zoom=40)
    if images.shape[1:] == (1, 28, 28):
        draw_augmented(images[4:5], out / "augmented.png")
    worst = [suspect.index for suspect in ranked[:3]]
    draw_evidence(run, images[[0, 1, 2] + worst], out / "features.png")
    draw_filters(run, images[:1], out / "filters.png")


def draw_ranked(ranked, images, path) -> None:
    """The 48 images whose labels are believed least."""
    tiles = []
    captions = []
    for suspect in ranked[:48]:
        tiles.append(tile(images[suspect.index]))
        captions.append(f"#{suspect.index}  {suspect.margin:+.2f}\n"
                        f"label {suspect.label}, or {suspect.other}?")
    gallery(tiles, captions, path, title="The least believed labels: #index and margin "
            "(below 0: an error)")


def draw_augmented(image, path) -> None:
    """One digit, as it is and drawn seven times by each of four augmentation recipes."""
    torch.manual_seed(0)                             # the same picture each time
    tiles = []
    captions = []
    for recipe in ("default", "n1", "n2", "n3"):
        tiles.append(tile(image[0]))
        captions.append(recipe)
        for varied in augment(image.repeat(7, 1, 1, 1), recipe):
            tiles.append(tile(255 * varied))
            captions.append("")
    gallery(tiles, captions, path, columns=8, zoom=3,
            title="One digit (left), varied at random by four recipes")


@torch.no_grad()
def evidence_maps(network, inputs):
    """N×K×H×W: a map of evidence per class, whose sum is the logit of that class. None for a
    network that does not end in a head "conv" or "place" (see model.py)."""
    if not isinstance(network, nn.Sequential) or not isinstance(network[-1], nn.Sequential):
        return None
    head = network[-1]
    if len(head) < 3 or not isinstance(head[-2], nn.AdaptiveAvgPool2d):
        return None
    maps = head[:-2](network[:-1](inputs))           # all but the average and the flattening
    return maps / (maps.shape[2] * maps.shape[3])


def draw_evidence(run, images, path) -> None:
    """A row per image: the image, then its evidence maps, all on one scale.

    They say only roughly where the evidence is: a unit of the last map sees a window that is larger
    than the image (python rf.py).
    """
    maps = evidence_maps(run.network, normalize(images, run.mean, run.std))
    if maps is None:
        print(f"no evidence maps: {run.args.model} does not end in a head that has them")
        return
    tiles = []
    captions = []
    for image, of_classes in zip(images, maps):
        tiles.append(tile(image))
        captions.append("")
        limit = of_classes.abs().max()
        for digit, values in enumerate(of_classes):
            tiles.append(heat(values, limit))
            captions.append(f"{digit}: {values.sum():+.1f}")
    gallery(tiles, captions, path, columns=1 + maps.shape[1], zoom=2,
            title="Evidence for (red) and against (blue) each digit; the number is the sum: the "
                  "logit")


@torch.no_grad()
def draw_filters(run, image, path) -> None:
    """The filters of the first convolution, then one image on its way through the network: the
    first eight maps behind each of its blocks."""
    first = next((layer for layer in run.network.modules() if isinstance(layer, nn.Conv2d)), None)
    if first is None or not isinstance(run.network, nn.Sequential):
        print(f"no filters drawn: {run.args.model} is not a list of layers with a convolution")
        return
    tiles = []
    captions = []
    for number in range(16):
        if number < len(first.weight):
            tiles.append(heat(first.weight[number, 0]))
            captions.append(f"filter {number}")
    while len(tiles) % 8:
        tiles.append(Image.new("RGB", (1, 1), "white"))
        captions.append("")

    maps = normalize(image, run.mean, run.std)
    for number, layer in enumerate(run.network):
        maps = layer(maps)
        if maps.dim() != 4 or isinstance(layer, nn.Dropout):
            continue                                 # no map, or nothing new to see
        limit = maps[0, :8].abs().max()
        for channel in range(8):
            if channel < maps.shape[1]:
                tiles.append(heat(maps[0, channel], limit))
            else:
                tiles.append(Image.new("RGB", (1, 1), "white"))
            captions.append(f"after block {number}" if channel == 0 else "")
    gallery(tiles, captions, path, columns=8, zoom=4,
            title="The first filters, and the maps of one digit on its way through the network")


def draw_curves(folder, out) -> None:
    """Loss and accuracy after each epoch, for the training and the test images, from log.csv."""
    try:
        with open(folder / "log.csv") as file:
            rows = list(csv.DictReader(file))
        epochs = [int(row["epoch"]) for row in rows]
        panels = []
        for kind, unit in (("loss", "mean loss"), ("accuracy", "percent")):
            for title, names in (("Training", ["train"]), ("Test", ["test", "val"])):
                lines = {}
                for name in names:
                    key = f"{name}_{kind}"
                    if key in rows[0]:
                        lines[name] = (epochs, [float(row[key]) for row in rows])
                panels.append({"title": f"{title} {kind}", "x": "epoch", "y": unit, "lines": lines})
    except (OSError, KeyError, ValueError, IndexError, TypeError):
        raise UserError(f"{folder} has no log.csv with a finished epoch: train first, or --run")
    chart(panels, out / "curves.png")


# ---- Drawing: a sheet of small pictures -------------------------------------------------------

INK, GREY, PALE = "#222222", "#6b6b6b", "#e3e3e3"
RED = torch.tensor([178.0, 24.0, 43.0])[:, None, None]                                  # 3×1×1
BLUE = torch.tensor([33.0, 102.0, 172.0])[:, None, None]


def tile(image):
    """Return a tensor C×H×W, 0 to 255, as a picture: three channels as colours, else the first."""
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
    names = [*lines, *bands]
    legend_width = 80 + max([text_width(name, 28) for name in names], default=0)
    right = max(width, 2 * width - legend_width)              # the axes get half of it at least
    frame = make_frame(panel, 110, right, 110, 2 * height - 110)
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
    """Return the frame on which all values of the panel have a place."""
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
    values = np.concatenate([to_axis(values, log) for values in [[], *lists]])
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return 0.0, 1.0
    low, high = values.min(), values.max()
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
    """Draw the line from place to place. One without known neighbours is still seen as a dot."""
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

def last_run() -> Path:
    """The run under runs/ with the highest number."""
    folders = [path.parent for path in Path("runs").glob("*/checkpoint.pt")]
    numbered = [folder for folder in folders if folder.name.isdecimal()]
    return max(numbered, key=lambda folder: int(folder.name), default=Path("runs/001"))


def main() -> None:
    parser = Parser(prog="analyze.py", description="What a trained network gets wrong, and why.")
    add = parser.add_argument
    add("--run", type=user_path, metavar="RUN", help="folder of a run; none: the last one")
    add("--compare", type=user_path, nargs=2, metavar="RUN", help="compare two runs")
    add("--suspects", type=user_path, nargs="+", metavar="RUN", help="rank the test labels")
    add("--image", type=user_path, metavar="FILE", help="read a picture of one digit")
    add("--data-dir", type=user_path, help="where the data set is; none: where the run found it")
    add("--out", type=user_path, metavar="FOLDER", help="for the pictures; none: RUN/analysis")
    args = parser.parse_args()

    folders = args.compare or args.suspects or [args.run or last_run()]
    out = args.out or folders[0] / "analysis"
    reports = not (args.compare or args.suspects or args.image)
    if reports:
        draw_curves(folders[0], out)
        if not (folders[0] / "weights.pt").exists():
            print(f"{out / 'curves.png'} is drawn. The rest needs the end of the training.")
            return
    runs = [load_run(folder) for folder in folders]
    if args.image:
        read_own_digit(args.image, runs[0], out)
    else:
        first = runs[0].args
        data = load(first.data, args.data_dir or first.data_dir)
        if args.compare:
            compare(*runs, data, folders)
            return
        if args.suspects:
            report_suspects(runs, data, out)
        else:
            report(runs[0], data, folders[0], out)
    print(f"\npictures: {quote(out)}")


if __name__ == "__main__":
    run_command(main)
