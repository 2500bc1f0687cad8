"""What the network gets wrong, and why: a report on one screen, and pictures of its mistakes.

What it teaches: one accuracy hides most of what a test set can tell. Which digits are taken for
which, whether the network knows when it is guessing, where in the image it found its evidence, and
whether now and then it is the label that is wrong.

    python analyze.py                               the newest run under runs/
    python analyze.py --run runs/003                another run
    python analyze.py --suspects --runs runs/00*    is it the network or the label? (several seeds)
    python analyze.py --image photo.png             a digit of your own

It prints the report and puts its pictures into the run's own folder, under analysis/. The project's
only evaluation loop, line chart and gallery are here too; the other scripts import them.
"""
import csv
import json
import math
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

from data import (PRESETS, Parser, UserError, augment, batches, load, normalize, one_line,
                  run_command, write_aside)
from model import INPUT_SHAPES, build, count_parameters

# ---- The evaluation loop ----------------------------------------------------------------------


@torch.no_grad()
def evaluate(net: nn.Module, images: Tensor, labels: Tensor, mean: Tensor, std: Tensor,
             batch_size=1000) -> dict:
    """Loss (mean over the images), accuracy (0 to 1) and logits (N×10, on the CPU) of uint8 images.

    The loss is taken over all images at once: a mean of batch means would let each image of a
    smaller last batch count for more. Raises ValueError for an empty set.
    """
    if not len(labels):
        raise ValueError("there are no images to evaluate")
    was_training = net.training
    net.eval()                               # dropout off, batch norm by its running statistics
    logits = torch.cat([net(normalize(part, mean, std)).float()
                        for part, _ in batches(images, labels, batch_size, shuffle=False)])
    net.train(was_training)
    return {"loss": F.cross_entropy(logits, labels).item(),
            "accuracy": (logits.argmax(1) == labels).sum().item() / len(labels),
            "logits": logits.cpu()}


# ---- Pictures: a line chart, a heat map, a gallery --------------------------------------------
# Pillow's own font has no arrow and no multiplication sign: captions do without them.

INK, GREY, PALE = "#222222", "#6b6b6b", "#e3e3e3"
LINES = ("#1f6fb4", "#d9622b", "#2e8b57", "#8e44ad", "#b8860b", "#008b8b", "#c2185b", "#555555")
RAMP = ("#08051d", "#451077", "#a02f70", "#e4593d", "#fba40a", "#fcffa4")   # dark to light, evenly
font = ImageFont.load_default                                               # of a size in pixels


def save_png(image: Image.Image, path) -> None:
    with write_aside(path) as aside:
        image.save(aside, format="PNG")


def on_axis(value, log: bool) -> float | None:
    """A value's place on a linear or a log axis; None where it has none (NaN, infinite, beyond
    1e100; on a log axis zero and less)."""
    value = float(value)
    if not abs(value) < 1e100 or (log and value < 1e-100):
        return None
    return math.log10(value) if log else value


def make_axis(places: list, log: bool, given=(), air=0.05) -> tuple[float, float, list]:
    """(low, high, ticks) of an axis. Limits: the given ones, or those of the places on it and some
    air. Ticks (place, label) lie at 1, 2 or 5 times a power of ten. Places on a log axis are
    logarithms, labels are the values themselves."""
    low, high = min(places, default=0.0), max(places, default=1.0)
    air = air * (high - low) or 0.1 * abs(low) or 1.0
    low, high = low - air, high + air
    if given and None not in given and given[0] < given[1]:
        low, high = given
    if log and high - low < 3:
        ticks = [decade + math.log10(digit) for decade in range(math.floor(low), math.ceil(high))
                 for digit in ((1, 2, 5) if high - low > 1 else range(1, 10))]
    else:
        finest = max(high - low, 6.0 if log else 0.0) / 6
        power = 10 ** math.floor(math.log10(finest))
        step = power * next(digit for digit in (1, 2, 5, 10) if digit * power >= finest)
        ticks = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return low, high, [(tick, f"{10 ** tick if log else tick:.6g}") for tick in ticks
                       if low <= tick <= high]


def draw_panel(panel: dict, width: int, height: int) -> Image.Image:
    """One panel of a chart, twice as wide and high as it will be shown, which smooths its lines."""
    log_x, log_y = panel.get("log_x", False), panel.get("log_y", False)
    lines = {name: [(on_axis(x, log_x), on_axis(y, log_y)) for x, y in zip(*line)]
             for name, line in panel["lines"].items()}
    points = [point for line in lines.values() for point in line if None not in point]
    marks = [(name, on_axis(x, log_x)) for name, x in panel.get("marks", {}).items()]
    marks = [(name, x) for name, x in marks if x is not None]
    y_range = [on_axis(y, log_y) for y in panel.get("y_range", ())]
    x0, x1, x_ticks = make_axis([x for x, _ in points] + [x for _, x in marks], log_x, air=0.02)
    y0, y1, y_ticks = make_axis([y for _, y in points], log_y, y_range)

    # A title, a row with the name of the y axis and the legend, and below them the frame.
    image = Image.new("RGB", (2 * width, 2 * height), "white")
    draw, text = ImageDraw.Draw(image), font(30)
    left, top, right, bottom = 152, 128, 2 * width - 48, 2 * height - 104
    draw.text((left, 28), panel["title"], INK, font(38))
    draw.text((left, top - 44), panel["y"], GREY, text)
    draw.text(((left + right) / 2, bottom + 60), panel["x"], GREY, text, anchor="ma")
    x = left + draw.textlength(panel["y"], text) + 48
    for name, colour in zip(lines, LINES * len(lines)):
        if x + 48 + draw.textlength(name, text) > right:                 # a further row of legend
            x, top = left, top + 40
        draw.line((x, top - 26, x + 36, top - 26), colour, 6)
        draw.text((x + 48, top - 44), name, INK, text)
        x += 84 + draw.textlength(name, text)
    frame = Image.new("RGB", (right - left, bottom - top), "white")      # cuts off what leaves it
    inside = ImageDraw.Draw(frame)

    def pixel(x, y):                                    # clamped: Pillow's coordinates are int32
        return (min(max((x - x0) / (x1 - x0) * frame.width, -1e4), 1e4),
                min(max((y1 - y) / (y1 - y0) * frame.height, -1e4), 1e4))

    for tick, label in x_ticks:
        x = pixel(tick, y0)[0]
        inside.line((x, 0, x, frame.height), PALE, 2)
        draw.text((left + x, bottom + 16), label, GREY, text, anchor="ma")
    for tick, label in y_ticks:
        y = pixel(x0, tick)[1]
        inside.line((0, y, frame.width, y), PALE, 2)
        draw.text((left - 16, top + y), label, GREY, text, anchor="rm")
    for line, colour in zip(lines.values(), LINES * len(lines)):
        pixels = [None if None in point else pixel(*point) for point in line]
        for here, there in zip(pixels, pixels[1:] + [None]):
            if here:
                r = 5 if len(line) <= 30 else 2
                inside.ellipse((here[0] - r, here[1] - r, here[0] + r, here[1] + r), colour)
            if here and there:
                inside.line((*here, *there), colour, 4)
    for row, (name, x) in enumerate(marks):
        x = pixel(x, y0)[0]
        inside.line((x, 0, x, frame.height), INK, 2)
        x = min(x + 12, frame.width - draw.textlength(name, text) - 12)
        inside.text((x, 12 + 40 * row), name, INK, text, stroke_width=6, stroke_fill="white")
    if not points:
        inside.text((frame.width / 2, frame.height / 2), "nothing to draw", GREY, text, anchor="mm")
    image.paste(frame, (left, top))
    draw.rectangle((left, top, right, bottom), outline=GREY, width=2)
    return image.resize((width, height))


def chart(panels: list[dict], path, columns=2) -> None:
    """Draw line charts into one PNG, 600×450 pixels a panel (900×560 in a single column):

        {"title": "Loss", "x": "epoch", "y": "mean loss", "lines": {"train": (xs, ys), ...}}

    A panel may also have "log_x": True, "log_y": True, "y_range": (low, high), and for vertical
    lines "marks": {name: x}. NaN and infinite values leave a gap.
    """
    columns = max(1, min(columns, len(panels)))
    width, height = (600, 450) if columns > 1 else (900, 560)
    rows = max(1, math.ceil(len(panels) / columns))
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for i, panel in enumerate(panels):
        sheet.paste(draw_panel(panel, width, height), (i % columns * width, i // columns * height))
    save_png(sheet, path)


def curves(rows: list[dict], path) -> None:
    """The notes' 2×2 figure of a run, from the rows of its log: loss and accuracy in percent, on
    training and on test images."""
    def panel(title, kind, y, *sets):
        lines = {name: ([row["epoch"] for row in rows], [row[f"{name}_{kind}"] for row in rows])
                 for name in sets if rows and f"{name}_{kind}" in rows[0]}
        return {"title": title, "x": "epoch", "y": y, "lines": lines}

    chart([panel("Training loss (augmented, dropout on)", "loss", "mean", "train"),
           panel("Test loss", "loss", "mean", "test", "val"),
           panel("Training accuracy (augmented, dropout on)", "accuracy", "percent", "train"),
           panel("Test accuracy", "accuracy", "percent", "test", "val")], path)


def heat(values: Tensor, limit=None) -> Image.Image:
    """H×W numbers as a picture, one pixel each, dark to bright from the smallest to the largest, or
    from -limit to limit."""
    values = values.detach().cpu().float().nan_to_num(0.0, 0.0, 0.0)
    low, high = (values.min(), values.max()) if limit is None else (-limit, limit)
    colours = torch.tensor([list(bytes.fromhex(colour[1:])) for colour in RAMP]).float()
    place = (values - low) / max(high - low, 1e-12) * (len(RAMP) - 1)
    below = place.long().clamp(max=len(RAMP) - 2)
    mixed = torch.lerp(colours[below], colours[below + 1], (place - below)[..., None])      # H×W×3
    return Image.fromarray(mixed.round().byte().numpy())


def text_size(text: str, height: int) -> tuple[int, int]:
    box = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), text, font(height))
    return math.ceil(box[2]), math.ceil(box[3])


def gallery(tiles: list[Image.Image], captions: list[str], path, columns=8, zoom=4,
            title="") -> None:
    """Enlarged tiles in rows, each with its caption (of one or more lines) below, as one PNG."""
    tiles = [tile.convert("RGB").resize((tile.width * zoom, tile.height * zoom), Image.NEAREST)
             for tile in tiles]
    boxes = [text_size(caption, 15) for caption in captions]
    widths = [max(tile.width, box[0]) for tile, box in zip(tiles, boxes)]
    widths = [max(widths[c::columns]) for c in range(min(columns, len(tiles)))]     # of the columns
    tallest = max([tile.height for tile in tiles], default=0) + 6
    gap, title_box = 16, text_size(title, 18)
    pitch = tallest + max([box[1] for box in boxes], default=0) + gap
    top = title_box[1] + 2 * gap if title else gap
    sheet = Image.new("RGB", (max(sum(widths) + gap * len(widths), title_box[0] + gap) + gap,
                              top + pitch * math.ceil(len(tiles) / columns)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((gap, gap - 4), title, INK, font(18))
    for i, (tile, caption) in enumerate(zip(tiles, captions)):
        row, column = divmod(i, columns)
        x, y = gap + sum(widths[:column]) + gap * column, top + pitch * row
        sheet.paste(tile, (x, y))
        draw.multiline_text((x, y + tallest), caption, INK, font(15))
    save_png(sheet, path)


# ---- A run folder -----------------------------------------------------------------------------


def find_run(run=None, out="runs") -> Path:
    """The given run folder, or the one under `out` with the newest weights. Raises UserError."""
    if run is not None:
        if not (Path(run) / "weights.pt").is_file():
            raise UserError(f"{run} holds no weights.pt: train one first with python train.py")
        return Path(run)
    trained = sorted(Path(out).glob("*/weights.pt"), key=lambda path: path.stat().st_mtime)
    if not trained:
        raise UserError(f"{out}/ holds no trained run: train one first with python train.py")
    return trained[-1].parent


def load_run(folder) -> tuple[nn.Module, dict]:
    """(network in eval mode on the CPU, configuration) of a run of train.py. Raises UserError."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
        missing = {"model", "options", "data", "data_dir", "mean", "std", "seed"} - set(config)
        if missing:
            raise ValueError(f"it says nothing of {', '.join(sorted(missing))}")
        net = build(config["model"], **config["options"])
        path = Path(folder) / "weights.pt"
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: train a run first with python train.py")
    except Exception as error:       # whatever a damaged file can do to json, zip, pickle and torch
        raise UserError(f"{path} is damaged, or belongs to another network ({one_line(error)})")
    return net.eval(), config


def read_log(path) -> list[dict]:
    """The rows of a run's log.csv, one an epoch, as numbers. Raises UserError."""
    try:
        with open(path, newline="") as file:
            return [{name: float(value) for name, value in row.items()}
                    for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read as a log: {error}")


def mean_std_of(config: dict) -> tuple[Tensor, Tensor]:
    """The numbers that the run normalized its images with, each 1×C×1×1."""
    return tuple(torch.tensor(config[name]).view(1, -1, 1, 1) for name in ("mean", "std"))


# ---- What the numbers say ---------------------------------------------------------------------


def confusion_matrix(predictions: Tensor, labels: Tensor, classes=10) -> Tensor:
    """classes×classes counts: the row is the label, the column what the network said."""
    counts = torch.bincount(labels * classes + predictions, minlength=classes ** 2)
    return counts.view(classes, classes)


def precision_recall(confusion: Tensor) -> tuple[Tensor, Tensor]:
    """Precision: of all called 4, the share that are 4s. Recall: of the 4s, the share called 4."""
    right = confusion.diag()
    return right / confusion.sum(0).clamp(min=1), right / confusion.sum(1).clamp(min=1)


def confused_pairs(confusion: Tensor) -> list[tuple[int, int, int, int]]:
    """(a, b, times a was called b, times b was called a), the most confused pair first."""
    counts, classes = confusion.tolist(), range(len(confusion))
    pairs = [(a, b, counts[a][b], counts[b][a]) for a in classes for b in classes if a < b]
    return sorted((p for p in pairs if p[2] + p[3]), key=lambda p: -p[2] - p[3])


def wilson(correct: int, total: int, z=1.96) -> tuple[float, float]:
    """The 95% interval of an accuracy (Wilson, 1927): the true accuracies that would make the
    observed one plausible.

    The textbook's p ± 1.96·sqrt(p(1−p)/n) is too narrow near 100%, and reaches beyond it.
    """
    p, shrink = correct / total, 1 + z * z / total
    centre = (p + z * z / (2 * total)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return centre - half, centre + half


def calibration(logits: Tensor, labels: Tensor, bins=15) -> dict:
    """Is the network right in 90% of the cases in which it is 90% sure? (Guo et al., 2017)

    "ece", the expected calibration error: images go into bins by confidence; the distance between
    a bin's mean confidence and its accuracy, averaged over all images. "confidence": its mean.
    "least" and "most": accuracy among the tenth with the lowest and with the highest confidence.
    """
    confidence, predictions = logits.softmax(1).max(1)
    right = (predictions == labels).float()
    bin_of = (confidence * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins).index_add(0, bin_of, confidence - right)
    right, tenth = right[confidence.argsort()], max(1, len(labels) // 10)
    return {"ece": gaps.abs().sum().item() / len(labels), "confidence": confidence.mean().item(),
            "least": right[:tenth].mean().item(), "most": right[-tenth:].mean().item()}


def second_guesses(logits: Tensor, labels: Tensor) -> int:
    """How many errors would disappear if the second guess counted too."""
    return (logits.topk(2, dim=1).indices[:, 1] == labels).sum().item()


def failures(logits: Tensor, labels: Tensor) -> Tensor:
    """Indices of the misclassified images, worst first: the most confident in a wrong answer."""
    confidence, predictions = logits.softmax(1).max(1)
    wrong = (predictions != labels).nonzero()[:, 0]
    return wrong[confidence[wrong].argsort(descending=True)]


def print_report(result: dict, labels: Tensor, data_name: str) -> None:
    """All of the above, from what `evaluate` returned, on one screen."""
    logits, total = result["logits"], len(labels)
    confusion = confusion_matrix(logits.argmax(1), labels)
    errors = len(failures(logits, labels))
    low, high = wilson(total - errors, total)
    print(f"{data_name} test set: accuracy {result['accuracy']:.2%} (95% interval {low:.2%} to "
          f"{high:.2%}), {errors} errors in {total}, loss {result['loss']:.4f}\n")
    print("label    called" + "".join(f"{digit:6}" for digit in range(10)) + "    recall  failed")
    precision, recall = precision_recall(confusion)
    for digit, row in enumerate(confusion.tolist()):
        print(f"{digit:5}          " + "".join(f"{count or '.':>6}" for count in row)
              + f"   {recall[digit]:7.2%}  {1 - recall[digit]:6.2%}")
    print("precision, %   " + "".join(f"{100 * share:6.1f}" for share in precision.tolist()))
    print("\nMost confused:")
    for a, b, a_as_b, b_as_a in confused_pairs(confusion)[:5]:
        print(f"  {a} and {b}: {a_as_b + b_as_a:3} times ({a} called {b}: {a_as_b}, "
              f"{b} called {a}: {b_as_a})")
    saved, sure = second_guesses(logits, labels), calibration(logits, labels)
    print(f"\nSecond guess: if it counted too, {saved} of the {errors} errors would disappear "
          f"({saved / max(errors, 1):.0%}).")
    print(f"Calibration: {sure['confidence']:.2%} sure on average, {result['accuracy']:.2%} right; "
          f"expected calibration error {sure['ece']:.4f}.\n"
          f"  Right in the tenth it is least sure of: {sure['least']:.2%}; "
          f"in the tenth it is most sure of: {sure['most']:.2%}.")


# ---- Pictures of one run ----------------------------------------------------------------------


def draw_failures(images: Tensor, labels: Tensor, logits: Tensor, path, most=48) -> None:
    """A gallery of the misclassified images, worst first."""
    confidence, predictions = logits.softmax(1).max(1)
    wrong = failures(logits, labels)
    shown = f", the {most} worst of them" if len(wrong) > most else ", the worst first"
    gallery([to_pil_image(images[i]) for i in wrong[:most]],
            [f"#{i}  {confidence[i]:.0%}\ntrue {labels[i]}, said {predictions[i]}"
             for i in wrong[:most].tolist()], path,
            title=f"{len(wrong)} of {len(labels)} test images are misclassified{shown}\n"
                  "#index, and how sure the network was of the wrong answer")


def draw_confusion(confusion: Tensor, path) -> None:
    """The confusion matrix; the colour is log(1 + count), on which one error still shows beside
    thirty. The diagonal, a hundred times as large, is left out of the scale."""
    cell, left, top, classes = 60, 90, 110, range(len(confusion))
    mistakes = confusion - confusion.diag().diag()
    colours = heat(-mistakes.float().log1p())
    side = cell * len(confusion)
    sheet = Image.new("RGB", (left + side + 30, top + side + 30), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((left, 18), "Confusion: a row is a label, a column what the network said", INK,
              font(20))
    draw.text((left, 48), f"{mistakes.sum()} errors in {confusion.sum()}", GREY, font(16))
    for row in classes:
        y = top + cell * row
        draw.text((left - 20, y + cell / 2), str(row), INK, font(20), anchor="mm")
        draw.text((left + cell * (row + 0.5), top - 18), str(row), INK, font(20), anchor="mm")
        for column in classes:
            x, count = left + cell * column, confusion[row, column].item()
            fill = colours.getpixel((column, row)) if mistakes[row, column] else (240, 240, 240)
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill)
            if count:
                draw.text((x + cell / 2, y + cell / 2), str(count), anchor="mm", font=font(18),
                          fill="white" if sum(fill) < 380 else INK)
    save_png(sheet, path)


def draw_augmented(images: Tensor, labels: Tensor, preset: str, path) -> None:
    """One digit a row under each preset, then a plain batch beside its augmented self."""
    def strip(batch, columns):
        return to_pil_image(make_grid((255 * batch).byte(), nrow=columns, pad_value=90))

    digits = torch.stack([images[labels == digit][0] for digit in range(10)])
    tiles = [strip(augment(digits, name), 1) for name in PRESETS]
    tiles += [strip(augment(images[:60], name), 6) for name in ("none", preset)]
    gallery(tiles, [*PRESETS, "a plain batch", f"the same, augmented: {preset}"], path,
            columns=len(tiles), zoom=2, title="What each preset makes of ten digits, and a batch "
                                              "before and after")


@torch.no_grad()
def evidence_maps(net: nn.Module, x: Tensor) -> Tensor | None:
    """N×10×H×W: for each class a map of evidence, the average of which is the class's logit.

    Head "conv" makes this possible: it averages after its 1×1 convolution, so a map of each class
    exists and is caught here on its way into the global average. None for other networks.
    """
    caught = []
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
             for layer in net.modules() if isinstance(layer, nn.AdaptiveAvgPool2d)]
    net(x)
    for hook in hooks:
        hook.remove()
    return caught[-1] if caught and caught[-1].shape[1] == 10 else None


def draw_evidence(images: Tensor, maps: Tensor, captions: list[str], path) -> None:
    """A row an image: the image, then its ten evidence maps on one scale, each with its average."""
    tiles, texts = [], []
    for image, evidence, caption in zip(images, maps, captions):
        strip = heat(torch.cat(list(evidence), 1), limit=evidence.abs().max())      # H×10W
        strip = strip.resize((280, 28), Image.NEAREST)
        tiles += [to_pil_image(image)] + [strip.crop((x, 0, x + 28, 28)) for x in range(0, 280, 28)]
        texts += [caption] + [f"{digit}:  {evidence[digit].mean():+.1f}" for digit in range(10)]
    gallery(tiles, texts, path, columns=11, zoom=3,
            title="Where the network sees evidence for each digit (bright) and against it (dark)\n"
                  "The number is the average of the map: the digit's logit")


# ---- Is it the network or the label? ----------------------------------------------------------


def suspects(logits: Tensor, labels: Tensor) -> dict:
    """The images whose label several runs contradict: R×N×10 logits of R independently seeded runs.

    "self_confidence" is the probability of the given label, averaged over the runs; "margin" is
    that less the average probability of the best other label ("proposed"): −1 when all are certain
    that the label is wrong. Ranked by margin, lowest first, among the images ("index") on which
    all runs agree with each other against the label. After Northcutt, Athalye, Mueller (2021).
    """
    probabilities, answers = logits.softmax(-1).mean(0), logits.argmax(-1)             # N×10, R×N
    index = ((answers == answers[0]) & (answers != labels)).all(0).nonzero()[:, 0]
    given, proposed = probabilities[index, labels[index]], answers[0, index]
    margin = given - probabilities[index, proposed]
    order = margin.argsort()
    return {"index": index[order], "proposed": proposed[order], "self_confidence": given[order],
            "margin": margin[order]}


SUSPECTS_EXPLAINED = """
Self-confidence is the average probability that the runs give to the label; the margin is that less
the probability of what they say instead: -1 when all are certain that the label is wrong.
This ranks suspicions, it proves nothing: runs of one recipe share their blind spots, and an odd
digit with a right label looks the same from here. Look at the picture and judge for yourself. (For
MNIST's 10,000 test labels people who did so found 15 errors: Northcutt, Athalye, Mueller 2021.)"""


def report_suspects(folders: list[str], data_dir, out: Path, most=20) -> None:
    """Print the ranked list over the test images, and draw it as suspects.png."""
    if len({Path(folder).resolve() for folder in folders}) < 2:
        raise UserError("--suspects compares two or more runs: --runs FOLDER FOLDER ... (python "
                        "train.py --runs 5 trains five)")
    runs = [load_run(folder) for folder in folders]
    names = {config["data"] for _, config in runs}
    if len(names) > 1:
        raise UserError(f"--runs: trained on different data: {', '.join(sorted(names))}")
    data = load(names.pop(), data_dir or runs[0][1]["data_dir"])
    logits = []
    for folder, (net, config) in zip(folders, runs):
        result = evaluate(net, *data.test, *mean_std_of(config))
        logits.append(result["logits"])
        print(f"{folder}: {config['model']}, seed {config['seed']}, {data.name} test accuracy "
              f"{result['accuracy']:.2%}")
    images, labels = data.test
    found = suspects(torch.stack(logits), labels)
    rows = list(zip(*(column.tolist() for column in found.values())))
    print(f"\nAll {len(folders)} runs agree against {len(rows)} of {len(labels)} labels"
          f"{f'; the first {most}' if len(rows) > most else ''}:\n\n"
          "rank   index   label   the runs say   self-confidence    margin")
    for rank, (i, proposed, confidence, margin) in enumerate(rows[:most], 1):
        print(f"{rank:4}  {i:6}  {labels[i]:6}  {proposed:13}  {confidence:16.4f}  {margin:+8.4f}")
    print(SUSPECTS_EXPLAINED)
    gallery([to_pil_image(images[row[0]]) for row in rows[:most]],
            [f"#{i}  {margin:+.2f}\nlabel {labels[i]}, runs {said}"
             for i, said, _, margin in rows[:most]], out / "suspects.png", columns=5,
            title="Labels that all runs contradict\n#index, margin (-1: certainly not the label)")
    print(f"\nDrawn: {out / 'suspects.png'}")


# ---- Your own digit ---------------------------------------------------------------------------


def open_picture(path) -> Image.Image:
    """A picture as it is meant to be seen: upright, on white where it is transparent; in grey, at
    most 1000 pixels wide and high. Raises UserError."""
    try:
        with warnings.catch_warnings():      # a small file can unpack to gigabytes: do not try
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = ImageOps.exif_transpose(Image.open(path)).convert("RGBA")
    except Exception as error:               # each format is damaged in its own way
        raise UserError(f"--image {path} cannot be read as a picture: {error}")
    picture.thumbnail((1000, 1000))
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("L")


def prepare(picture: Image.Image) -> Tensor:
    """A grey picture of one digit as MNIST would hold it: uint8 1×1×28×28, light on black.

    MNIST's makers scaled each digit to fit 20×20 pixels and put its centre of mass in the middle
    of 28×28 (LeCun et al., 1998); a network that has seen nothing else is lost on anything else.
    Raises UserError for a blank picture.
    """
    picture = picture.filter(ImageFilter.GaussianBlur(max(picture.size) / 300))     # against specks
    grey = pil_to_tensor(picture)[0].float() / 255
    paper = torch.cat([grey[0], grey[-1], grey[:, 0], grey[:, -1]]).median()
    dark_ink = paper - grey.min() > grey.max() - paper
    ink = (paper - grey if dark_ink else grey - paper).clamp(min=0)
    if ink.max() < 0.15:
        raise UserError("--image: the picture is blank, nothing in it stands out from its border")
    ink = ((ink / ink.max() - 0.3) / 0.5).clamp(0, 1)             # paper has shadows, ink is uneven
    rows, columns = ink.amax(1).nonzero()[:, 0], ink.amax(0).nonzero()[:, 0]
    ink = ink[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
    height, width = (max(1, round(20 * side / max(ink.shape))) for side in ink.shape)
    ink = F.interpolate(ink[None, None], (height, width), mode="bilinear", antialias=True)[0, 0]
    ink = (1.5 * ink / ink.max()).clamp(max=1)     # a pen thinner than MNIST's has become pale
    y = (ink.sum(1) @ torch.arange(height).float() / ink.sum()).item()            # centre of mass
    x = (ink.sum(0) @ torch.arange(width).float() / ink.sum()).item()
    top, left = min(max(round(14 - y), 0), 28 - height), min(max(round(14 - x), 0), 28 - width)
    ink = F.pad(ink, (left, 28 - width - left, top, 28 - height - top))
    return (255 * ink).round().byte()[None, None]


def report_image(path: str, folder: Path, out: Path) -> None:
    """Print the prepared picture and the ten probabilities, and draw the evidence maps."""
    net, config = load_run(folder)
    if INPUT_SHAPES[config["model"]] != (1, 28, 28):
        raise UserError(f"--image: the network {config['model']!r} of {folder} reads no 28x28 grey")
    image = prepare(open_picture(path))
    x = normalize(image, *mean_std_of(config))
    probabilities = net(x)[0].softmax(0).tolist()
    print(f"{path} as {folder} sees it, which was trained on {config['data']}:")
    for row in image[0, 0].tolist():
        print("".join(2 * " ░▒▓█"[math.ceil(value / 64)] for value in row).rstrip())
    for digit, probability in enumerate(probabilities):
        print(f"{digit}  {probability:7.2%}  {'█' * round(50 * probability)}".rstrip())
    maps = evidence_maps(net, x)
    if maps is None:
        print(f"No evidence maps: {config['model']} does not average ten of them into its logits.")
    else:
        said = probabilities.index(max(probabilities))
        draw_evidence(image, maps, [f"said {said}"], out / "image.png")
        print(f"Drawn: {out / 'image.png'}")


# ---- The command line -------------------------------------------------------------------------


def report_run(folder: Path, data_dir, out: Path) -> None:
    """The report and all pictures of one run."""
    net, config = load_run(folder)
    data = load(config["data"], data_dir or config["data_dir"])
    images, labels = data.test
    result = evaluate(net, images, labels, *mean_std_of(config))
    logits, predictions = result["logits"], result["logits"].argmax(1)
    print(f"{folder}: network {config['model']!r}, {count_parameters(net):,} parameters")
    print_report(result, labels, data.name)

    torch.manual_seed(0)                     # the same augmented picture each time
    draw_failures(images, labels, logits, out / "failures.png")
    draw_confusion(confusion_matrix(predictions, labels), out / "confusion.png")
    draw_augmented(*data.train, config.get("augment", "default"), out / "augmented.png")
    drawn = ["failures.png", "confusion.png", "augmented.png"]
    if (folder / "log.csv").is_file():
        curves(read_log(folder / "log.csv"), out / "curves.png")
        drawn.append("curves.png")
    right = (predictions == labels).nonzero()[:4, 0]
    shown = torch.cat([right, failures(logits, labels)[:4]])
    maps = evidence_maps(net, normalize(images[shown], *mean_std_of(config)))
    if maps is not None:
        captions = [f"true {labels[i]}\nsaid {predictions[i]}" for i in shown]
        draw_evidence(images[shown], maps, captions, out / "features.png")
        drawn.append("features.png")
    else:
        print(f"\nNo features.png: {config['model']} does not average ten maps into its logits.")
    print(f"\nDrawn in {out}: {', '.join(drawn)}")


def main() -> None:
    parser = Parser(prog="analyze.py", description="What a trained network gets wrong, and why.")
    add = parser.add_argument
    add("--run", metavar="FOLDER", help="a run folder of train.py (default: the newest under runs)")
    add("--data-dir", help="where the data set is (default: where the run found it)")
    add("--out", type=Path, metavar="FOLDER", help="for the pictures (default: RUN/analysis)")
    add("--image", metavar="FILE", help="read a picture of one digit")
    add("--suspects", action="store_true", help="list the test labels that all --runs contradict")
    add("--runs", nargs="+", default=[], metavar="FOLDER", help="two or more run folders")
    args = parser.parse_args()
    if args.suspects != bool(args.runs) or (args.runs and (args.run or args.image)):
        raise UserError("--suspects goes with --runs FOLDER FOLDER ..., not with --run or --image")
    folder = find_run(args.runs[0] if args.runs else args.run)
    out = args.out or folder / "analysis"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {out}: {error.strerror}")
    if args.suspects:
        report_suspects(args.runs, args.data_dir, out)
    elif args.image is not None:
        report_image(args.image, folder, out)
    else:
        report_run(folder, args.data_dir, out)


if __name__ == "__main__":
    run_command(main)
