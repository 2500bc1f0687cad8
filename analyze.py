"""What the network gets wrong, and why: a report on one screen, and pictures of its mistakes.

What it teaches: one accuracy hides most of what a test set can tell. Which digits are taken for
which, whether the network knows when it is guessing, where in the image it found its evidence, and
whether now and then it is the label that is wrong.

    python analyze.py                               the newest run under runs/
    python analyze.py --run runs/003                another run
    python analyze.py --suspects --runs runs/00*    is it the network or the label? (several seeds)
    python analyze.py --image photo.png             a digit of your own

Its pictures go into the run's own folder, under analysis/. The project's only evaluation loop, line
chart and gallery are here too; the other scripts import them.
"""
import io
import math
import zipfile
from pathlib import Path

from data import (PRESETS, Parser, UserError, augment, batches, load, normalize, reason,
                  run_command, save, user_path)

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn

from model import INPUT_SHAPES, build, count_parameters

# ---- The evaluation loop ----------------------------------------------------------------------


@torch.no_grad()                             # no gradient is wanted: keep no layer's output for one
def evaluate(net: nn.Module, images: Tensor, labels: Tensor, mean, std, batch_size=1000) -> dict:
    """Loss (mean over the images), accuracy (0 to 1), logits (N×10, on the CPU) of uint8 images."""
    was_training = net.training
    # Dropout now lets everything pass, and batch norm takes its running statistics: with those of
    # the batch, an image's logits would depend on which images happen to lie beside it.
    net.eval()
    parts = batches(images, labels, batch_size, shuffle=False)
    logits = torch.cat([net(normalize(part, mean, std)).float() for part, _ in parts]).cpu()
    net.train(was_training)                  # a caller in the midst of training finds it as it was
    labels = labels.cpu()
    # One mean over all images. A mean of the batches' means would let an image of a smaller last
    # batch count for more: a single one left over would weigh as much as 1,000 others together.
    return {"logits": logits, "loss": F.cross_entropy(logits, labels).item(),
            "accuracy": (logits.argmax(1) == labels).double().mean().item()}


# ---- What the numbers say ---------------------------------------------------------------------


def wilson(correct: int, total: int, z=1.96) -> tuple[float, float]:
    """The 95% interval of an accuracy (Wilson, 1927): all true accuracies for which the observed
    one, p, would be within 1.96 standard deviations, that is, no surprise.

    The textbook's p ± 1.96·sqrt(p(1−p)/n) takes the standard deviation at p itself. Near 100% that
    goes wrong: for 10 right of 10 it is 0, and the interval is the point 100%, as if ten images
    could prove perfection. Wilson takes it at each candidate: 10 of 10 means 72% to 100%.
    """
    p, z2 = correct / total, z * z / total
    centre = (p + z2 / 2) / (1 + z2)         # p, pulled towards 1/2 as if by z² ≈ 4 more images
    half = z / (1 + z2) * math.sqrt((p * (1 - p) + z2 / 4) / total)
    return centre - half, centre + half


def calibration(logits: Tensor, labels: Tensor, bins=15) -> tuple[float, float]:
    """Is it right in 90% of the cases in which it is 90% sure? Returns its mean confidence (largest
    probability) and the expected calibration error (Guo et al., 2017): in bins by confidence, how
    far mean confidence and accuracy lie apart, averaged, each bin weighted by its images."""
    confidence, predictions = logits.softmax(1).max(1)
    bin_of = (confidence * bins).long().clamp(max=bins - 1)          # clamp: 100% is the last bin's
    # confidence − right, summed in a bin, is images × distance. An image alone is right or wrong,
    # never "90% right", so it takes bins; a single bin would let too sure cancel too shy.
    gaps = torch.zeros(bins).index_add(0, bin_of, confidence - (predictions == labels).float())
    return confidence.mean().item(), gaps.abs().sum().item() / len(labels)


def suspects(logits: Tensor, labels: Tensor) -> list[tuple[int, int, int, float, float]]:
    """All N images, the least believed label first, from R×N×10 logits of R runs, one or more:
    (index, label, best other digit, self-confidence, margin). (Northcutt, Athalye, Mueller, 2021)

    Self-confidence is the label's probability, averaged over the runs; the margin is that less the
    best other digit's: +1, all are certain of the label; below 0, an error; −1, all are certain
    that it is wrong. Softmax comes before the average: one vote a run, however large its logits.
    """
    probabilities, own = logits.softmax(-1).mean(0), labels[:, None]                # N×10, N×1
    given = probabilities.gather(1, own)[:, 0]
    best, other = probabilities.scatter(1, own, -1.0).max(1)         # the label is out of the way
    columns = (torch.arange(len(labels)), labels, other, given, given - best)
    return sorted(zip(*(column.tolist() for column in columns)), key=lambda row: row[-1])


@torch.no_grad()
def evidence_maps(net: nn.Module, x: Tensor) -> Tensor | None:
    """N×10×H×W: for each class a map of evidence, whose sum is the class's logit: what each place
    adds to it. None for networks that do not end in a head "conv" or "place"."""
    *body, head = net.children()
    if not isinstance(head, nn.Sequential) or not isinstance(head[0], nn.Conv2d):
        return None
    maps = nn.Sequential(*body, *head[:-2])(x)           # all but the average and its flattening
    maps = maps / maps[0, 0].numel()
    # There is no bias after the maps, so their sums should be the logits: checked, not believed.
    return maps if torch.allclose(maps.sum((2, 3)), net(x), 1e-3, 1e-3) else None


def report_run(folder: Path, net: nn.Module, config: dict, data, out: Path) -> None:
    """Print the report of one run and draw all its pictures."""
    images, labels = data.test
    result = evaluate(net, images, labels, *mean_std_of(config))
    logits = result["logits"]
    # A row for each label, a column for each answer. label·10 + answer numbers the 100 cells row by
    # row, so counting how often each number occurs fills the whole table.
    confusion = torch.bincount(labels * 10 + logits.argmax(1), minlength=100).view(10, 10)
    low, high = wilson(confusion.trace().item(), len(labels))
    sure, ece = calibration(logits, labels)
    second = (logits.topk(2).indices[:, 1] == labels).sum()
    ranked = suspects(logits[None], labels)
    wrong = [row for row in ranked if row[-1] < 0]       # of one run: a negative margin is an error
    print(f"{folder}: {config['model']}, {count_parameters(net):,} parameters\n"
          f"{data.name} test set: accuracy {result['accuracy']:.2%} (95% interval {low:.2%} to "
          f"{high:.2%}), {len(wrong)} errors in {len(labels)}, loss {result['loss']:.4f}\n"
          f"second guess: right in {second} of the errors\ncalibration: {sure:.2%} sure on average"
          f", expected calibration error {ece:.4f}\n\n"
          f"label called{''.join(f'{digit:6}' for digit in range(10))}   recall")
    # Recall divides by the row: of the real 4s, how many were called 4? Precision divides by the
    # column: of all called 4, how many are 4s? A network that calls everything 4 has a recall of
    # 100% there and a precision of 10%: either alone is easy to have.
    for digit, row in enumerate(confusion.tolist()):
        cells = "".join(f"{n or '.':>6}" for n in row)
        print(f"{digit:<12}{cells}  {row[digit] / max(1, sum(row)):7.2%}")
    precision = 100 * confusion.diag() / confusion.sum(0).clamp(min=1)
    print(f"precision, %{''.join(f'{p:6.1f}' for p in precision)}\n\nmost confused")
    pairs = (confusion + confusion.T).triu(1).flatten()  # 4 called 9 and 9 called 4: one confusion
    for a, b in (divmod(cell, 10) for cell in pairs.topk(5).indices.tolist()):
        print(f"{a} and {b}: {confusion[a, b]} {a}s called {b}, {confusion[b, a]} {b}s called {a}")

    draw_ranked(wrong[:48], images, out / "failures.png", 8, f"{len(wrong)} errors, worst first")
    # The colour is log(1 + count): on a linear scale a cell of 30 leaves all that are 1 as dark as
    # 0; the 1 is for log(0). The diagonal, a hundred times as large, stays out of it.
    colours = heat((confusion - confusion.diag().diag()).float().log1p().view(1, 100))
    texts = [f"{i // 10} as {i % 10}: {n}" if n else "" for i, n in enumerate(confusion.flatten())]
    gallery([colours.crop((i, 0, i + 1, 1)) for i in range(100)], texts, out / "confusion.png", 10,
            72, "Confusion: a row for each label, a column for each answer")
    digits = torch.stack([data.train[0][data.train[1] == digit][0] for digit in range(10)])
    torch.manual_seed(0)                                 # the same picture each time
    gallery([tile(255 * x) for name in PRESETS for x in augment(digits, name)],
            [text for name in PRESETS for text in [name] + 9 * [""]], out / "augmented.png", 10, 2,
            f"What each preset makes of ten digits. This run trained with {config['augment']!r}")
    shown = sorted(row[0] for row in ranked if row[-1] > 0)[:4] + [row[0] for row in wrong[:4]]
    draw_evidence(net, config, images[shown], out / "features.png")
    if (folder / "checkpoint.pt").is_file():
        curves(read_pt(folder / "checkpoint.pt")["rows"], out / "curves.png")


def report_suspects(runs: list, data, out: Path) -> None:
    """Print and draw the 20 least believed test labels of one run or several.

    This ranks suspicions, it proves nothing: runs of one recipe share their blind spots, and an odd
    digit with a right label looks the same from here. Of MNIST's 10,000 test labels people found 15
    wrong (Northcutt et al., 2021): with four runs, all 15 were among the first 100 here.
    """
    if any(config["data"] != data.name for _, config in runs):
        raise UserError("--runs: these were trained on different data")
    logits = [evaluate(net, *data.test, *mean_std_of(config))["logits"] for net, config in runs]
    ranked = suspects(torch.stack(logits), data.test[1])
    print(f"{data.name}: {sum(row[-1] < 0 for row in ranked)} of {len(ranked)} labels have a margin"
          " below 0. That proves nothing: look.\nindex  label  other  confidence  margin")
    for row in ranked[:20]:
        print("{:5}  {:5}  {:5}  {:10.4f}  {:+.3f}".format(*row))
    draw_ranked(ranked[:20], data.test[0], out / "suspects.png", 5, "The least believed labels")


# ---- Your own digit ---------------------------------------------------------------------------


def open_picture(path) -> Tensor:
    """A picture as numbers from 0 to 1, C×H×W, upright, at most 256 pixels wide and high: one
    channel where pixels have 16 or 32 bits, else red, green, blue, opacity. Raises UserError."""
    try:
        picture = ImageOps.exif_transpose(Image.open(path))          # cameras note their turn
        # RGBa is colour times opacity: whatever colour hides where nothing is opaque becomes 0, and
        # transparent paper is one colour, from which ink of any colour differs in its opacity.
        deep = picture.mode[0] in "IF"
        picture = picture.convert("F") if deep else picture.convert("RGBA").convert("RGBa")
        picture.thumbnail((256, 256))
        x = torch.tensor(np.asarray(picture, np.float32)).nan_to_num(0, 0, 0)
    except Exception as error:               # each format is damaged in its own way
        raise UserError(f"--image {path} cannot be read as a picture ({reason(error)})")
    return (x / x.abs().max().clamp(min=1e-9)).view(*x.shape[:2], -1).permute(2, 0, 1)


def prepare(picture: Tensor) -> tuple[Tensor, str]:
    """A picture C×H×W of one digit as MNIST would hold it, uint8 1×1×28×28, light on black; and in
    words how the ink lies in it. Raises UserError for a blank picture.

    MNIST's makers scaled each digit to fit 20×20 pixels and put its centre of mass in the middle
    of 28×28 (LeCun et al., 1998); a network that has seen nothing else is lost on anything else.
    """
    # Ink is the minority: in each channel the median is the paper's. What is far from that colour
    # is ink, chalk on a board or yellow on white, too; up to 15% is noise and shadow.
    paper = picture.flatten(1).median(1).values[:, None, None]
    far = F.threshold((picture - paper).abs().amax(0), 0.15, 0.0)                       # H×W
    # How dark ink is, the middle half shows: a black frame or a desk at a side may be darker.
    h, w = far.shape
    mask = far > 0.4 * (far[h // 4:h - h // 4, w // 4:w - w // 4].max() or far.max())
    # Connected pieces: each pixel begins with a number of its own and takes over the largest one
    # within two pixels, again and again, until a piece has one number. Small ones are dust.
    number, before = torch.arange(1.0, h * w + 1).view(1, h, w) * mask, mask
    while not torch.equal(number, before):
        before, number = number, F.max_pool2d(number, 5, 1, 2) * mask
    number = number[0].long()
    number = number * (number.flatten().bincount()[number] >= h * w / 3000)
    # Frame and desk touch the border: what touches it is no ink, if there is anything else.
    border = torch.cat([number[0], number[-1], number[:, 0], number[:, -1]])
    inner = number * ~torch.isin(number, border)
    kept = inner if inner.any() else number
    if not kept.any():
        raise UserError("--image: the picture is blank, nothing in it stands out from the paper")
    ink = far / far[kept > 0].max() * F.max_pool2d((kept[None] > 0).float(), 5, 1, 2)[0]
    ink = ((ink - 0.3) / 0.5).clamp(0, 1)                # paper has shadows, ink is uneven
    ink = ink[ink.amax(1) > 0][:, ink.amax(0) > 0]       # rows and columns without it go
    seen = ("fills the picture: is it a digit?" if ink.shape == far.shape else "is in one piece" if
            len(kept[kept > 0].unique()) == 1 else "is in several pieces: is it one digit?")
    size = [max(1, round(20 * side / max(ink.shape))) for side in ink.shape]
    ink = F.interpolate(ink[None, None], size, mode="bilinear", antialias=True)[0, 0]
    top, left = (round(14 - (ink.sum(1 - d) @ torch.arange(n).float() / ink.sum()).item())
                 for d, n in enumerate(size))            # centre of mass; F.pad cuts what is < 0
    ink = F.pad(ink / ink.max(), (left, 28 - size[1] - left, top, 28 - size[0] - top))
    # A pen thinner than MNIST's has become pale: half as bright again.
    return (255 * 1.5 * ink).clamp(max=255).byte()[None, None], seen


def report_image(path: Path, net: nn.Module, config: dict, out: Path) -> None:
    """Print the prepared picture and the ten probabilities, and draw the evidence maps."""
    if INPUT_SHAPES[config["model"]] != (1, 28, 28):
        raise UserError(f"--image: the network {config['model']!r} reads no 28x28 grey images")
    image, seen = prepare(open_picture(path))
    for row in image[0, 0].tolist():                     # characters that every encoding has
        print("".join(2 * " .:+#"[math.ceil(value / 64)] for value in row).rstrip())
    for digit, p in enumerate(net(normalize(image, *mean_std_of(config)))[0].softmax(0).tolist()):
        print(f"{digit}  {p:7.2%}  {'#' * round(50 * p)}".rstrip())
    print(f"the ink {seen}")
    draw_evidence(net, config, image, out / "image.png")


# ---- The pictures of one run ------------------------------------------------------------------


def draw_ranked(rows: list, images: Tensor, path, columns: int, title: str) -> None:
    """A gallery of what `suspects` found."""
    gallery([tile(images[row[0]]) for row in rows],
            ["#{0}  {4:+.2f}\nlabel {1}, said {2}".format(*row) for row in rows], path, columns,
            title=f"{title}\n#index, margin (-1: certainly not the label)")


def draw_evidence(net: nn.Module, config: dict, images: Tensor, path) -> None:
    """A row an image: the image, then its ten evidence maps on one scale, each with its sum."""
    maps = evidence_maps(net, normalize(images, *mean_std_of(config)))
    if maps is None:
        return print(f"no evidence maps: {config['model']} does not end in a head that has them")
    tiles, texts = [], []
    for image, ten in zip(images, maps):
        tiles += [tile(image), *(heat(x, ten.abs().max()) for x in ten)]
        sums = ten.sum((1, 2)).tolist()
        texts += [f"said {np.argmax(sums)}", *(f"{i}:  {x:+.1f}" for i, x in enumerate(sums))]
    gallery(tiles, texts, path, 11, 3, "Where it sees evidence for each digit (bright) or against "
            "it (dark)\nThe number is the sum of the map: the digit's logit")


def curves(rows: list[dict], path) -> None:
    """The notes' 2×2 figure, from a log's rows: loss and accuracy in percent, train and test."""
    chart([{"title": f"{title} {kind}", "x": "epoch", "y": unit, "lines": {
                name: ([row["epoch"] for row in rows], [row[f"{name}_{kind}"] for row in rows])
                for name in names if rows and f"{name}_{kind}" in rows[0]}}
           for kind, unit in (("loss", "mean"), ("accuracy", "percent"))
           for title, *names in (("Augmented training", "train"), ("Test", "test", "val"))], path)


# ---- Drawing: a line chart, a heat map, a gallery ---------------------------------------------
# Pillow's own font has no arrow and no multiplication sign: captions do without them.

INK, GREY, PALE, font = "#222222", "#6b6b6b", "#e3e3e3", ImageFont.load_default
LINES = ("#1f6fb4", "#d9622b", "#2e8b57", "#8e44ad", "#b8860b", "#008b8b", "#c2185b", "#555555")


def axis(values, log=False):
    """(place, ticks) of an axis for these values: place(value) is 0 at its low end, 1 at its high
    end, NaN for what has no place on it; ticks are (place, label), round numbers."""
    def scaled(value):                                   # on a log axis a place is an exponent
        there = abs(value) < 1e100 and (value > 1e-100 or not log)        # false for NaN as well
        return math.nan if not there else math.log10(value) if log else value

    def place(value):                                    # clamped: Pillow's coordinates are int32
        return min(max((scaled(value) - low) / (high - low), -9), 9)

    known = [x for x in map(scaled, values) if x == x] or [0, 1]         # x == x is false for NaN
    air = 0.03 * (max(known) - min(known)) or 0.1 * abs(known[0]) or 1
    low, high = min(known) - air, max(known) + air
    finest = max((high - low) / 8, bool(log))            # up to eight ticks; on a log axis, decades
    step = 10 ** math.floor(math.log10(finest))
    step *= next(digit for digit in (1, 2, 5, 10) if digit * step >= finest)
    digits = (1, 2, 5) if log and high - low < 3 else (1,)               # few decades: more ticks
    ticks = [i * step + math.log10(digit) for digit in digits
             for i in range(math.floor(low / step), math.ceil(high / step))]
    return place, [((x - low) / (high - low), f"{10 ** x if log else x:.6g}")
                   for x in ticks if low <= x <= high]


def draw_panel(panel: dict, width: int, height: int) -> Image.Image:
    """One panel of a chart: title, the y axis's name and those of the lines, frame, x axis."""
    marks, log_y, text = panel.get("marks", {}), panel.get("log_y"), font(30)
    xs, ys = ([v for line in panel["lines"].values() for v in line[i]] for i in (0, 1))
    x_of, x_ticks = axis([*xs, *marks.values()], panel.get("log_x"))
    y_of, y_ticks = axis(panel.get("y_range", ys), log_y)
    ends = 1e-99 if log_y else -1e99, 1e99               # a mark is a line, from far below to above
    lines = panel["lines"] | {name: ((x, x), ends) for name, x in marks.items()}
    image = Image.new("RGB", (2 * width, 2 * height), "white")
    draw, left, x, y, w = ImageDraw.Draw(image), 152, 152, 84, 2 * width - 200
    draw.text((left, 28), panel["title"], INK, font(38))
    for name, colour in [(panel["y"], GREY), *zip(lines, LINES * len(lines))]:
        if x + draw.textlength(name, text) > left + w:   # a further row of names
            x, y = left, y + 40
        draw.text((x, y), name, colour, text)
        x += draw.textlength(name, text) + 40
    top, h = y + 44, 2 * height - 148 - y
    frame = Image.new("RGB", (w, h), "white")            # cuts off what leaves it
    inside = ImageDraw.Draw(frame)
    for place, label in x_ticks:
        inside.line((w * place, 0, w * place, h), PALE, 2)
        draw.text((left + w * place, top + h + 16), label, GREY, text, anchor="ma")
    for place, label in y_ticks:
        inside.line((0, h - h * place, w, h - h * place), PALE, 2)
        draw.text((left - 16, top + h - h * place), label, GREY, text, anchor="rm")
    for (xs, ys), colour in zip(lines.values(), LINES * len(lines)):
        points = [(w * x_of(x), h - h * y_of(y)) for x, y in zip(xs, ys)]
        for here, there in zip(points, points[1:] + points[-1:]):
            if not math.isnan(sum(here + there)):        # NaN leaves a gap
                inside.line(here + there, colour, 4)
                inside.circle(here, 5 if len(points) <= 30 else 2, colour)
    image.paste(frame, (left, top))
    draw.rectangle((left, top, left + w, top + h), outline=GREY, width=2)
    draw.text((left + w / 2, top + h + 60), panel["x"], GREY, text, anchor="ma")
    return image.reduce(2)                               # drawn twice as large: halving smooths it


def chart(panels: list[dict], path, columns=2) -> None:
    """Draw line charts into one PNG, 600×450 pixels a panel (900×560 in a single column):

        {"title": "Loss", "x": "epoch", "y": "mean loss", "lines": {"train": (xs, ys), ...}}

    A panel may also have "log_x": True, "log_y": True, "y_range": (low, high), and for vertical
    lines "marks": {name: x}. NaN and infinite values leave a gap.
    """
    columns = min(columns, len(panels))
    size = (600, 450) if columns > 1 else (900, 560)
    gallery([draw_panel(panel, *size) for panel in panels], [""] * len(panels), path, columns, 1)


def tile(image: Tensor) -> Image.Image:
    """A picture of a tensor C×H×W, 0 to 255, of one channel or three."""
    return Image.fromarray(image.cpu().byte().expand(3, -1, -1).permute(1, 2, 0).numpy())  # H×W×3


def heat(values: Tensor, limit=None) -> Image.Image:
    """H×W numbers as a picture, one pixel each, dark to bright from the smallest to the largest, or
    from -limit to limit."""
    values = values.detach().cpu().float().nan_to_num(0.0, 0.0, 0.0)
    low, high = (values.min(), values.max()) if limit is None else (-limit, limit)
    grey = Image.fromarray(((values - low) / max(high - low, 1e-12) * 255).byte().numpy())
    return ImageOps.colorize(grey, "#08051d", "#ffee2a", mid="#bc3754")


def gallery(tiles: list, captions: list[str], path, columns=8, zoom=4, title="") -> None:
    """Tiles in rows, all enlarged to `zoom` times the largest one's size; below each its caption,
    of one line or more, hardly wider than the tile."""
    wide, tall = (16 + zoom * max([0, *(x.size[i] for x in tiles)]) for i in (0, 1))
    high = tall + 19 * max([0, *(len(caption.splitlines()) for caption in captions)])
    top = 16 + (16 + 22 * len(title.splitlines()) if title else 0)
    sheet = Image.new("RGB", (16 + columns * wide, top + high * -(-len(tiles) // columns)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((16, 12), title, INK, font(18))
    for i, (picture, caption) in enumerate(zip(tiles, captions)):
        x, y = 16 + i % columns * wide, top + i // columns * high
        sheet.paste(picture.resize((wide - 16, tall - 16), Image.NEAREST), (x, y))
        draw.text((x, y + tall - 10), caption, INK, font(15))
    content = io.BytesIO()
    sheet.save(content, "PNG")
    save(path, content.getvalue())


# ---- A run folder -----------------------------------------------------------------------------


def read_pt(path) -> dict:
    """What train.py saved in a .pt file, "config" and more; the only place that loads one. Raises
    UserError for whatever is wrong with it: missing, damaged, foreign, not finite.

    weights_only: a pickle can name any function for its reader to call, so to load a stranger's
    file would run a stranger's code; this way it may hold tensors, numbers and text only.
    """
    try:
        content = Path(path).read_bytes()
        # A .pt file is a ZIP, which keeps a checksum of each of its parts. torch does not look at
        # them: with one bit flipped it loads other weights, and nobody notices.
        archive = zipfile.ZipFile(io.BytesIO(content))
        if archive.testzip() or any("constants.pkl" in name for name in archive.namelist()):
            raise zipfile.BadZipFile                     # constants: TorchScript, a whole program
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        nets = [state[name] for name in ("weights", "net", "average") if name in state]
        if not (state["config"] and all(x.isfinite().all() for net in nets for x in net.values())):
            raise FloatingPointError                     # the training had diverged
    except Exception as error:   # whatever a missing, damaged or foreign file can do to these
        raise UserError(f"{path} is missing, damaged, not finite or not made by this train.py "
                        f"({type(error).__name__}): python train.py trains a new run")
    return state


def find_run(run=None) -> Path:
    """The given run folder, or the one under runs/ with the newest weights."""
    newest = max(Path("runs").glob("*/weights.pt"), key=lambda path: path.stat().st_mtime,
                 default=Path("runs/001/weights.pt"))    # read_pt will say that it is missing
    return Path(run or newest.parent)


def load_run(folder) -> tuple[nn.Module, dict]:
    """(network in eval mode on the CPU, configuration) of a run of train.py. Raises UserError."""
    state = read_pt(Path(folder) / "weights.pt")
    try:
        config = state["config"]
        net = build(config["model"], **config["options"]).eval()
        net.load_state_dict(state["weights"])
        net(normalize(torch.zeros(1, *INPUT_SHAPES[config["model"]]), *mean_std_of(config)))
    except Exception as error:
        raise UserError(f"{folder}/weights.pt fits no network of model.py ({type(error).__name__})")
    return net, config


def mean_std_of(config: dict) -> tuple[Tensor, Tensor]:
    """The numbers that the run normalized its images with, each 1×C×1×1."""
    return tuple(torch.tensor(config[name]).view(1, -1, 1, 1) for name in ("mean", "std"))


# ---- The command line -------------------------------------------------------------------------


def main() -> None:
    parser = Parser(prog="analyze.py", description="What a trained network gets wrong, and why.")
    add = parser.add_argument
    add("--run", "--runs", type=user_path, nargs="+", metavar="FOLDER", help="none: the newest run")
    add("--data-dir", type=user_path, help="where the data set is; none: where the run found it")
    add("--out", type=user_path, metavar="FOLDER", help="for the pictures; none: RUN/analysis")
    add("--image", type=user_path, metavar="FILE", help="read a picture of one digit")
    add("--suspects", action="store_true", help="rank the test labels by how wrong they look")
    args = parser.parse_args()
    folders = args.run or [find_run()]
    runs = [load_run(folder) for folder in folders]
    (net, config), out = runs[0], args.out or folders[0] / "analysis"
    if args.image:
        report_image(args.image, net, config, out)
    else:
        data = load(config["data"], args.data_dir or config["data_dir"])
        if args.suspects or len(runs) > 1:
            report_suspects(runs, data, out)
        else:
            report_run(folders[0], net, config, data, out)
    print(f"\ndrawn in {out}")


if __name__ == "__main__":
    run_command(main)
