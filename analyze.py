"""What a network gets wrong, and why: a report on one screen, and pictures of its mistakes.

What it teaches: one accuracy hides most of what a test set can tell. Which digits are taken for
which others? Does the network know when it is guessing? Is it better than another network, or only
luckier? Where in the image does it find its evidence? And is the label itself wrong now and then?

    python analyze.py                                the last run under runs/
    python analyze.py --run runs/003                 another run, from its first epoch on
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

# Before torch: data.py says why.
from data import Parser, UserError, augment, load, normalize, reason, run_command, save

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn

from model import count_parameters, input_shape
from train import load_run, predict


# ---- The report -------------------------------------------------------------------------------

def report(name, run, data):
    """Print what the run gets wrong on the test images. Return its logits, N×K for K classes."""
    images, labels = data.test
    logits = predict(run.network, images, run.mean, run.std)
    answers = logits.argmax(1)
    loss = F.cross_entropy(logits, labels).item()
    total = len(labels)
    correct = (answers == labels).sum().item()
    low, high = wilson_interval(correct, total)
    confidence, calibration_error = calibration(logits, labels)

    print(f"{name}: {run.args.model}, {count_parameters(run.network):,} parameters")
    print(f"{data.name} test set: accuracy {correct / total:.2%} (95% interval {low:.2%} to "
          f"{high:.2%}), {total - correct} errors in {total}, loss {loss:.4f}")
    print(f"calibration: {confidence:.2%} sure on average, expected calibration error "
          f"{calibration_error:.4f}")

    table = confusion_table(labels, answers, data.classes)
    print_table(table)
    print("\nmost confused")
    for _, a, b in most_confused(table):
        print(f"{a} and {b}: {table[a, b]} of label {a} called {b}, "
              f"{table[b, a]} of label {b} called {a}")
    return logits


def wilson_interval(correct, total, z=1.96):
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


def calibration(logits: Tensor, labels: Tensor, bins=15):
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
        # images of the bin · difference of the two means = difference of the two sums
        difference += abs(confidence[in_bin].sum() - right[in_bin].sum()).item()
    return confidence.mean().item(), difference / len(labels)


def confusion_table(labels: Tensor, answers: Tensor, classes):
    """Return counts K×K: a row for each label, a column for each answer."""
    cells = labels * classes + answers               # a number for each pair (label, answer)
    return cells.bincount(minlength=classes ** 2).view(classes, classes)


def print_table(table: Tensor):
    """Print the confusion table with recall and precision.

    Recall divides by the row: how many of the real 4s were called 4? Precision divides by the
    column: how many of those called 4 are real? A network that calls everything 4 has a recall of
    100% for it and a precision of 10%. Each of the two is easy to have alone.
    """
    classes = range(len(table))
    recalls = 100 * table.diag() / table.sum(1)      # nan for a label without images
    precisions = 100 * table.diag() / table.sum(0)
    print("\nlabel called" + "".join(f"{k:6}" for k in classes) + "  recall, %")
    for k in classes:
        counts = "".join(f"{count:6}" for count in table[k].tolist())
        counts = counts.replace("     0", "     .")      # a dot for 0, so that the errors stand out
        print(f"{k:<12}{counts}{recalls[k]:11.2f}")
    print("precision, %" + "".join(f"{precision:6.1f}" for precision in precisions))


def most_confused(table: Tensor):
    """Return the five most confused pairs as (errors, a, b). Both directions count together."""
    pairs = []
    for a in range(len(table)):
        for b in range(a + 1, len(table)):
            errors = (table[a, b] + table[b, a]).item()
            if errors > 0:
                pairs.append((errors, a, b))
    return sorted(pairs, reverse=True)[:5]


# ---- Two networks on the same images ----------------------------------------------------------

def compare(folders, data_dir):
    """Print whether one of two runs is better than the other on the same test images.

    Two intervals that overlap do not answer this. Most images are easy or hard for both networks,
    and tell nothing about the difference. Only the images on which one is right do.
    """
    runs, data = load_runs(folders, data_dir)
    images, labels = data.test
    right = []
    for folder, run in zip(folders, runs):
        answers = predict(run.network, images, run.mean, run.std).argmax(1)
        right.append(answers == labels)
        print(f"{folder}: {(answers != labels).sum()} errors in {len(labels)}")
    only_first = (right[0] & ~right[1]).sum().item()
    only_second = (right[1] & ~right[0]).sum().item()
    print(f"only the first is right on {only_first} images, only the second on {only_second}")
    p_value = mcnemar(only_first, only_second)
    print(f"McNemar's test: p = {p_value:.3g}, the chance of a difference at least this large "
          "between two equally good networks")


def mcnemar(only_a_right, only_b_right):
    """Return the p-value of the exact test (McNemar, 1947).

    If two networks are equally good, each image on which they differ is a coin toss. How likely
    are so many heads, or so many tails, or more?
    """
    tosses = only_a_right + only_b_right
    more = max(only_a_right, only_b_right)
    ways = sum(math.comb(tosses, heads) for heads in range(more, tosses + 1))
    return min(1.0, 2 * ways / 2 ** tosses)


# ---- Label errors -----------------------------------------------------------------------------

# index: the number of an image. other: the most probable of the other classes. margin: probability
# of the label minus that of `other`, averaged over the runs. At 1 all runs are certain of the label,
# below 0 it is an error, at -1 all runs are certain that the label is wrong (Northcutt, Jiang,
# Chuang, 2021).
Suspect = namedtuple("Suspect", "index label other margin")


def rank_labels(logits: Tensor, labels: Tensor):
    """Return all N images, the least believed label first, from logits R×N×K of R runs."""
    # Each run has one vote: probabilities are averaged, not logits, which may be of any size.
    probabilities = logits.softmax(2).mean(0)                                           # N×K
    column = labels[:, None]                                                            # N×1
    of_label = probabilities.gather(1, column)[:, 0]
    others = probabilities.scatter(1, column, -1.0)                      # never choose the label
    of_other, other = others.max(1)
    margin = of_label - of_other

    found = []
    for i in margin.argsort().tolist():
        found.append(Suspect(i, labels[i].item(), other[i].item(), margin[i].item()))
    return found


def report_suspects(folders, data_dir):
    """Print the 20 least believed test labels of one or several runs, and draw 48 of them.

    This is no proof: runs of one recipe make the same mistakes, and an odd digit with a right
    label looks the same here. People found 15 of MNIST's 10,000 test labels to be wrong
    (Northcutt, Athalye, Mueller, 2021). With four runs, all 15 were among the first 100 here.
    """
    runs, data = load_runs(folders, data_dir)
    images, labels = data.test
    logits = [predict(run.network, images, run.mean, run.std) for run in runs]
    found = rank_labels(torch.stack(logits), labels)
    for suspect in found[:20]:
        print(f"#{suspect.index:<5} label {suspect.label}, or {suspect.other}?  margin "
              f"{suspect.margin:+.3f}")
    path = Path(folders[0], "analysis/suspects.png")
    draw_suspects(found, images, path)
    print(f"\ndrawn: {path}")


def draw_suspects(found, images: Tensor, path):
    """Draw the first 48, eight in a row."""
    shown = found[:48]
    rows = []
    for start in range(0, len(shown), 8):
        row = []
        for suspect in shown[start:start + 8]:
            row.append((tile(images[suspect.index]), f"#{suspect.index}  {suspect.margin:+.2f}\n"
                        f"label {suspect.label}, or {suspect.other}?"))
        rows.append(row)
    gallery(rows, path,
            title="The least believed labels: #index, margin (below 0: an error, -1: a sure one)")


# ---- Your own digit ---------------------------------------------------------------------------
#
# A network knows only digits like those it has seen. The makers of MNIST scaled each digit to fit
# into 20×20 pixels and put its centre of mass into the middle of 28×28 (LeCun et al., 1998). A
# picture of your own has to go the same way: find paper and ink, crop, scale, centre.

def prepare(picture: Tensor):
    """Return a picture C×H×W of one digit as MNIST would hold it: light on black, uint8 1×1×28×28.
    Raises UserError if nothing can be seen.
    """
    ink = find_ink(resize(picture, 128))
    rows = (ink > 0.5).any(dim=1).nonzero().flatten()
    columns = (ink > 0.5).any(dim=0).nonzero().flatten()
    if len(rows) == 0:
        raise UserError("--image: blank, nothing in it is darker or brighter than the paper")
    digit = ink[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]

    digit = resize(digit[None], 20)[0]
    height, width = digit.shape
    top = first_pixel(digit.sum(dim=1))
    left = first_pixel(digit.sum(dim=0))
    image = torch.zeros(28, 28)
    image[top:top + height, left:left + width] = digit
    return (255 * image).round().byte()[None, None]


def find_ink(picture: Tensor):
    """Return how much ink is at each pixel of a picture C×128×128 or less: H×W, from 0 to 1."""
    brightness = picture.mean(0)                     # H×W; the opacity counts, too
    # Paper is what most of the border shows. In a tightly cropped picture ink may cover more than
    # half of the area, but seldom of the border.
    border = [brightness[0], brightness[-1], brightness[:, 0], brightness[:, -1]]
    difference = brightness - torch.cat(border).median()
    # Ink is what differs most from the paper. Divided by that difference, paper is 0 and ink is 1.
    # On white paper a bright spot is below 0.
    largest = difference.flatten()[difference.abs().argmax()]            # dark ink: below 0
    if largest.abs() < 0.06:
        return torch.zeros_like(difference)          # nothing but noise: blank
    amount = difference / largest

    # Up to 0.3 it is shadow or a ruled line, from 0.7 on it is all ink. In between, edges stay
    # soft: a small scan has hardly more than edges.
    ink = ((amount - 0.3) / 0.4).clamp(0, 1)
    # Dust has no ink around it: at least 5 of the 9×9 pixels around a pixel have to be ink.
    share = F.avg_pool2d((ink > 0.5).float()[None], 9, stride=1, padding=4)[0]
    return ink * (share > 4.5 / 81)


def first_pixel(ink: Tensor):
    """Return the row (or column) of 28 at which a digit begins if its centre of mass is to be in
    the middle. `ink` is the ink in each of its rows (or columns)."""
    positions = torch.arange(len(ink)) + 0.5                             # the middle of each pixel
    centre = (ink * positions).sum() / ink.sum()
    first = round(14 - centre.item())
    return min(max(first, 0), 28 - len(ink))         # the whole digit has to be in the image


def resize(image: Tensor, side):
    """Scale an image C×H×W, up or down, so that its longer side has `side` pixels."""
    height, width = image.shape[1:]
    scale = side / max(height, width)
    size = (max(1, round(scale * height)), max(1, round(scale * width)))
    return F.interpolate(image[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1)


def open_picture(path):
    """Return a picture, upright, as numbers 4×H×W from 0 to 1: red, green, blue and opacity.
    Raises UserError.
    """
    try:
        picture = ImageOps.exif_transpose(Image.open(path))      # a camera stores how it was held
        if picture.mode[0] in "IF":
            raise ValueError("it has 16 or 32 bits per pixel: save it with 8")
        # RGBa is colour times opacity: a colour hidden by full transparency becomes 0.
        picture = picture.convert("RGBA").convert("RGBa")
        picture.thumbnail((1000, 1000))              # only makes it smaller: photos take time
    except Exception as error:                       # each format can be damaged in its own way
        raise UserError(f"--image {path} cannot be read as a picture ({reason(error)})")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def report_image(path, folder):
    """Print what the network of a run is shown and the probability of each digit."""
    run = load_run(folder)
    if input_shape(run.args.model) != (1, 28, 28):
        raise UserError(f"--image: the network {run.args.model!r} reads no grey images of 28x28")
    image = prepare(open_picture(path))
    for row in image[0, 0].tolist():
        characters = [2 * " .:+#"[math.ceil(value / 64)] for value in row]
        print("".join(characters).rstrip())
    print(f"{folder} reads")
    probabilities = predict(run.network, image, run.mean, run.std)[0].softmax(0)
    for digit, probability in enumerate(probabilities.tolist()):
        print(f"{digit}  {probability:7.2%}")


# ---- Inside the network -----------------------------------------------------------------------

@torch.no_grad()
def evidence_maps(network, inputs: Tensor):
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


def draw_evidence(run, images: Tensor, path):
    """Draw one row per image: the image, then the evidence map of each class and its sum."""
    all_maps = evidence_maps(run.network, normalize(images, run.mean, run.std))
    if all_maps is None:
        print("no evidence maps: they need an nn.Sequential that ends in global average pooling")
        return
    rows = []
    for image, maps in zip(images, all_maps):
        row = [(tile(image), "")]
        limit = maps.abs().max()                     # one scale for all classes
        for k, evidence in enumerate(maps):
            row.append((heat(evidence, limit), f"{k}: {evidence.sum():+.1f}"))
        rows.append(row)
    gallery(rows, path, zoom=2, title="Evidence for each class (red) and against it (blue)\n"
            "The number is the sum of the map: the logit of the class")


@torch.no_grad()
def draw_filters(run, image: Tensor, path):
    """Draw filters of the first layer, and the maps of one image C×H×W after each layer.

    The first filters find edges of some direction, or spots. Each layer combines the maps of the
    layer before it. The later the layer, the less its maps look like the image.
    """
    convolutions = [layer for layer in run.network.modules() if isinstance(layer, nn.Conv2d)]
    if not isinstance(run.network, nn.Sequential) or not convolutions:
        print(f"no picture of filters: {run.args.model} is no nn.Sequential with convolutions")
        return
    filters = convolutions[0].weight.mean(1)         # C×H×W: the mean over the image's channels
    rows = [heat_row(filters, f"filters of the first layer: 8 of {len(filters)}"),
            [(tile(image), "the image")]]

    maps = normalize(image[None], run.mean, run.std)
    for number, layer in enumerate(run.network, start=1):
        maps = layer(maps)
        if maps.dim() != 4 or maps.shape[-1] == 1:
            break                                    # no maps any more, but scores
        if isinstance(layer, nn.Dropout):
            continue                                 # off: it changes nothing here
        channels, height, width = maps.shape[1:]
        rows.append(heat_row(maps[0], f"after layer {number}: 8 of {channels} maps, "
                                      f"{height}x{width}"))
    gallery(rows, path, zoom=3,
            title="The first filters, and one image on its way through the network\n"
                  "White is 0, red is positive, blue is negative")


def heat_row(maps: Tensor, caption):
    """Return the first 8 of some maps C×H×W as a row for `gallery`, all on one scale."""
    shown = maps[:8]
    row = [(heat(values, shown.abs().max()), "") for values in shown]
    first_picture, _ = row[0]
    row[0] = (first_picture, caption)
    return row


def draw_augmented(image: Tensor, path):
    """Draw one image C×H×W as it is, then seven times as each recipe varies it."""
    torch.manual_seed(0)                             # the same picture each time
    rows = []
    for recipe in ("default", "n1", "n2", "n3"):
        row = [(tile(image), f"original, then --augment {recipe}")]
        for variation in augment(image.repeat(7, 1, 1, 1), recipe):
            row.append((tile(255 * variation), ""))
        rows.append(row)
    gallery(rows, path, zoom=3)


# ---- Curves -----------------------------------------------------------------------------------

def curves(history, path):
    """Draw loss and accuracy after each epoch, on training, held-out and test images.

    `history` has a dict per epoch, as train.py returns it and read_log reads it.
    """
    epochs = [row["epoch"] for row in history]
    panels = []
    for quantity, unit in (("loss", "mean per image"), ("accuracy", "% of the images")):
        lines = {}
        for column in history[0]:
            if column.endswith(quantity):
                lines[column.replace("_", " ")] = (epochs, [row[column] for row in history])
        panels.append({"title": quantity, "x_title": "epoch", "y_title": unit, "lines": lines})
    chart(panels, path)


def read_log(path):
    """Return the rows of a run's log.csv as dicts of numbers. Raises UserError."""
    history = []
    try:
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                history.append({name: float(value) for name, value in row.items()})
        missing = {"epoch", "train_loss", "train_accuracy"} - set(history[0])
        if missing:
            raise ValueError(f"no column {missing}")
    except Exception as error:                       # whatever a missing or damaged file can do
        raise UserError(f"{path} is no log of train.py; a run has one after its first epoch "
                        f"({reason(error)})")
    return history


# ---- Drawing: a sheet of small pictures -------------------------------------------------------

BLACK, GREY, PALE, PALE_BLUE = "#222222", "#6b6b6b", "#e3e3e3", "#c7dbec"
RED = torch.tensor([178.0, 24.0, 43.0])[:, None, None]                                  # 3×1×1
BLUE = torch.tensor([33.0, 102.0, 172.0])[:, None, None]


def tile(image):
    """Return a tensor C×H×W, 0 to 255, as a picture: in colour if C is 3, else grey."""
    if len(image) != 3:
        image = image[:1].expand(3, -1, -1)
    pixels = image.detach().cpu().clamp(0, 255).byte().permute(1, 2, 0)                 # H×W×3
    return Image.fromarray(pixels.numpy())


def heat(values, limit):
    """Return numbers H×W as a picture: zero is white, `limit` full red, -limit full blue."""
    strength = (values.detach().cpu() / limit.clamp(min=1e-12)).clamp(-1, 1)            # H×W
    colour = torch.where(strength > 0, RED, BLUE)                                       # 3×H×W
    return tile(255 + strength.abs() * (colour - 255))


def gallery(rows, path, zoom=4, title=""):
    """Draw rows of pairs (picture, caption) into one PNG. A caption stands below its picture.

    All pictures get the same size: `zoom` times that of the largest.
    """
    pairs = sum(rows, [])
    width = zoom * max(picture.width for picture, _ in pairs)
    height = zoom * max(picture.height for picture, _ in pairs)
    caption_lines = max(len(caption.splitlines()) for _, caption in pairs)
    column_width = width + 16
    row_height = height + 16 + 19 * caption_lines
    top = 16 + 24 * len(title.splitlines())

    most = max(len(row) for row in rows)
    sheet = Image.new("RGB", (16 + most * column_width, top + len(rows) * row_height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((16, 10), title, BLACK, ImageFont.load_default(18))
    font = ImageFont.load_default(15)
    for i, row in enumerate(rows):
        y = top + i * row_height
        for j, (picture, caption) in enumerate(row):
            x = 16 + j * column_width
            sheet.paste(picture.resize((width, height), Image.NEAREST), (x, y))
            draw.text((x, y + height + 4), caption, BLACK, font)
    save_png(sheet, path)


def save_png(picture, path):
    content = io.BytesIO()
    picture.save(content, "PNG")
    save(path, content.getvalue())


# ---- Drawing: line charts ---------------------------------------------------------------------

COLOURS = ("#1f6fb4", "#d9622b", "#2e8b57", "#8e44ad", "#b8860b", "#008b8b", "#c2185b", "#555555")

FONT = ImageFont.load_default(28)                    # of a chart before it is halved

# Values from low to high lie at the pixels from first to last. `whole`: ticks at whole numbers only,
# for epochs and for powers of ten.
Axis = namedtuple("Axis", "low high first last whole")


def chart(panels, path):
    """Draw line charts, one below the other, into one PNG. A panel is a dict:

        "title", "x_title", "y_title"
        "lines": {name: (xs, ys)}
        "band": (name, xs, lows, highs)        a shaded area behind the lines, not with log_x
        "marks": {name: x}                     vertical lines, three at most
        "log_x": True                          a logarithmic x axis
        "y_range": (low, high)                 otherwise the axis fits what is drawn
    NaN, infinite values and values off the axes leave a gap.
    """
    sheet = Image.new("RGB", (800, 420 * len(panels)), "white")
    for i, panel in enumerate(panels):
        sheet.paste(draw_panel(**panel), (0, 420 * i))
    save_png(sheet, path)


def draw_panel(title, x_title, y_title, lines, band=None, marks={}, log_x=False, y_range=None):
    """Return one chart as a picture. It is drawn twice as large and halved, for smooth lines."""
    if log_x:                                        # from here on x is a power of ten
        lines = {name: (np.log10(xs), ys) for name, (xs, ys) in lines.items()}
        marks = {name: math.log10(x) for name, x in marks.items()}
    image = Image.new("RGB", (1600, 840), "white")
    draw = ImageDraw.Draw(image)
    all_xs = np.concatenate([xs for xs, _ in lines.values()])
    all_ys = np.concatenate([ys for _, ys in lines.values()])
    if band:
        band_name, band_xs, lows, highs = band
        all_ys = np.concatenate([all_ys, lows, highs])
    left, right, top, bottom = 130, 1280, 110, 730       # pixels are counted downwards
    x_axis = make_axis(all_xs, left, right, whole=log_x)
    y_axis = make_axis(y_range or all_ys, bottom, top)
    draw_axes(draw, x_axis, y_axis, log_x)
    draw.text((32, 16), title, BLACK, ImageFont.load_default(34))
    draw.text((32, 66), y_title, GREY, FONT)
    draw.text(((left + right) / 2, bottom + 54), x_title, GREY, FONT, anchor="ma")

    legend = []
    if band:
        lower_edge = list(zip(position(x_axis, band_xs), position(y_axis, lows)))
        upper_edge = list(zip(position(x_axis, band_xs), position(y_axis, highs)))
        draw.polygon(lower_edge + upper_edge[::-1], PALE_BLUE)
        legend.append((band_name, PALE_BLUE, 24))
    # Lines may coincide. The first is drawn as the thickest, so the later ones do not hide it.
    for i, (name, (xs, ys)) in enumerate(lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        thickness = 4 + 3 * min(len(lines) - 1 - i, 4)
        draw_line(draw, position(x_axis, xs), position(y_axis, ys), colour, thickness)
        legend.append((name, colour, thickness))

    for i, (name, colour, thickness) in enumerate(legend):
        y = top + 16 + 44 * i
        draw.line((right + 20, y, right + 56, y), colour, thickness)
        draw.text((right + 68, y), name, BLACK, FONT, anchor="lm")
    for i, (name, value) in enumerate(marks.items()):
        x = position(x_axis, value)
        draw.line((x, top, x, bottom), BLACK, 3)
        draw.text((x - 12, top + 8 + 44 * i), name, BLACK, FONT, anchor="ra")
    return image.reduce(2)


def draw_axes(draw, x_axis, y_axis, log_x):
    """Draw the grid and its numbers."""
    for value in ticks(x_axis):
        x = position(x_axis, value)
        draw.line((x, y_axis.first, x, y_axis.last), PALE, 2)
        label = 10.0 ** value if log_x else value
        draw.text((x, y_axis.first + 12), f"{label:.6g}", GREY, FONT, anchor="ma")
    for value in ticks(y_axis):
        y = position(y_axis, value)
        draw.line((x_axis.first, y, x_axis.last, y), PALE, 2)
        draw.text((x_axis.first - 14, y), f"{value:.6g}", GREY, FONT, anchor="rm")


def make_axis(values, first, last, whole=False):
    """Return an axis from the lowest to the highest of these values, with a little room. If all of
    them are whole numbers, so are the ticks."""
    values = np.array(values, dtype=float)
    values = values[np.isfinite(values)]
    if len(values) == 0:
        values = np.array([0.0, 1.0])
    low, high = values.min(), values.max()
    room = max((high - low) / 40, abs(high) / 1000, 1e-6)
    whole = whole or (values == values.round()).all()
    return Axis(low - room, high + room, first, last, whole)


def position(axis, values):
    """Return at which pixels values lie. NaN if they are off the axis."""
    share = (np.array(values) - axis.low) / (axis.high - axis.low)
    share = np.where((share >= 0) & (share <= 1), share, np.nan)
    return axis.first + share * (axis.last - axis.first)


def ticks(axis):
    """Return the round numbers on an axis, nine at most: multiples of 1, 2 or 5 times a power of
    ten."""
    smallest_step = (axis.high - axis.low) / 8
    if axis.whole:
        smallest_step = max(smallest_step, 1)
    power = 10.0 ** math.floor(math.log10(smallest_step))
    for factor in (1, 2, 5, 10):
        step = factor * power
        if step >= smallest_step:
            break
    return step * np.arange(math.ceil(axis.low / step), math.floor(axis.high / step) + 1)


def draw_line(draw, xs, ys, colour, thickness):
    """Draw a line from point to point, with gaps where a coordinate is NaN."""
    points = list(zip(xs, ys))
    for start, end in zip(points, points[1:]):
        if np.isfinite([start, end]).all():
            draw.line([start, end], colour, thickness)
    radius = thickness / 2
    if len(points) <= 40:
        radius += 2                                  # few points: mark each
    for x, y in points:
        if np.isfinite([x, y]).all():
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), colour)


# ---- The command line -------------------------------------------------------------------------

def report_run(folder, data_dir):
    """Print the report of a run and draw all its pictures; only the curves if it still trains."""
    out = Path(folder, "analysis")
    curves(read_log(Path(folder, "log.csv")), out / "curves.png")
    if not Path(folder, "weights.pt").exists():
        print(f"{folder} is not finished: only {out / 'curves.png'} is drawn so far")
        return

    runs, data = load_runs([folder], data_dir)
    images, labels = data.test
    logits = report(folder, runs[0], data)
    print()
    found = rank_labels(logits[None], labels)
    draw_suspects(found, images, out / "failures.png")       # the least believed are mostly errors
    draw_augmented(data.train[0][0], out / "augmented.png")
    worst = [suspect.index for suspect in found[:4]]
    draw_evidence(runs[0], images[[0, 1, 2, 3] + worst], out / "features.png")
    draw_filters(runs[0], images[0], out / "filters.png")
    print(f"drawn in {out}")


def load_runs(folders, data_dir):
    """Load runs, and the data that they were trained on, from data_dir or from where it was then.
    Raises UserError if the runs were trained on different data."""
    runs = [load_run(folder) for folder in folders]
    first = runs[0].args
    for run in runs:
        if run.args.data != first.data:
            raise UserError("these runs were trained on different data")
    return runs, load(first.data, data_dir or first.data_dir)


def last_run():
    """Return the run with the highest number under runs/."""
    folders = [path for path in Path("runs").glob("*") if path.name.isdecimal()]
    if not folders:
        raise UserError("there is no run under runs/: train one, or name it with --run")
    return max(folders, key=lambda path: int(path.name))


def main():
    parser = Parser(prog="analyze.py", description="What a trained network gets wrong, and why.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--run", metavar="FOLDER", help="a run; not given: the last one")
    which.add_argument("--compare", nargs=2, metavar="FOLDER", help="two runs: is one better?")
    which.add_argument("--suspects", nargs="+", metavar="FOLDER",
                       help="one or more runs: which test labels may be wrong?")
    parser.add_argument("--image", metavar="FILE",
                        help="a picture of one digit: what does the run read?")
    parser.add_argument("--data-dir", help="not given: where the run found its data")
    args = parser.parse_args()

    if args.image and (args.compare or args.suspects):
        raise UserError("--image goes with --run only")
    if args.compare:
        compare(args.compare, args.data_dir)
    elif args.suspects:
        report_suspects(args.suspects, args.data_dir)
    elif args.image:
        report_image(args.image, args.run or last_run())
    else:
        report_run(args.run or last_run(), args.data_dir)


if __name__ == "__main__":
    run_command(main)
