"""What the network gets wrong, and why: a report on one screen, and pictures of its mistakes.

What it teaches: one accuracy hides most of what a test set can tell. Which digits are taken for
which, whether the network knows when it is guessing, where in the image it found its evidence, and
whether now and then it is the label that is wrong.

    python analyze.py                               the last run under runs/
    python analyze.py --run runs/003                another run
    python analyze.py --suspects --runs runs/00*    is it the network or the label? (several seeds)
    python analyze.py --image photo.png             a digit of your own

Its pictures go into the run's own folder, under analysis/. The project's only evaluation loop, line
chart and gallery are here too; the other scripts import them.
"""
import io, math, zipfile
from pathlib import Path

from data import (PRESETS, Parser, UserError, augment, batches, load, normalize, reason,
                  run_command, save, user_path)

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn

from model import INPUT_SHAPES, build, count_parameters

# ---- The evaluation loop, and what its numbers say --------------------------------------------

@torch.no_grad()                             # no backward follows: do not keep layers' outputs
def evaluate(net: nn.Module, images: Tensor, labels: Tensor, mean, std, batch_size=1000) -> dict:
    """Loss (mean over the images), accuracy (0 to 1), logits (N×10, on the CPU) of uint8 images."""
    # Dropout now lets everything pass, and batch norm takes its running statistics: with those of
    # the batch, an image's logits would depend on which images happen to lie beside it.
    net.eval()
    parts = batches(images, labels, batch_size, shuffle=False)
    logits = torch.cat([net(normalize(part, mean, std)) for part, _ in parts]).cpu()
    labels = labels.cpu()
    # One mean over all images. A mean of the batches' means would let an image of a smaller last
    # batch count for more: a single one left over would weigh as much as 1,000 others together.
    return {"logits": logits, "loss": F.cross_entropy(logits, labels).item(),
            "accuracy": (logits.argmax(1) == labels).double().mean().item()}

def wilson(correct: int, total: int, z=1.96) -> tuple[float, float]:
    """The 95% interval of an accuracy (Wilson, 1927): all true accuracies for which the observed
    one, p, would be within 1.96 standard deviations, that is, no surprise.

    The textbook's p ± 1.96·sqrt(p(1−p)/n) takes the standard deviation at p itself: for 10 right of
    10 it is 0, as if ten images could prove perfection. Wilson's says 72% to 100%.
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
    (index, label, best other digit, self-confidence, margin). (Northcutt, Jiang, Chuang, 2021)

    Self-confidence is the label's probability, averaged over the runs; the margin is that less the
    best other digit's: +1, all are certain of the label; below 0, an error; −1, all are certain
    that it is wrong. Softmax comes before the average: one vote a run, however large its logits.
    """
    probabilities, own = logits.softmax(-1).mean(0), labels[:, None]                # N×10, N×1
    given = probabilities.gather(1, own)[:, 0]
    best, other = probabilities.scatter(1, own, -1.0).max(1)         # the label is out of the way
    columns = (torch.arange(len(labels)), labels, other, given, given - best)
    return sorted(zip(*(column.tolist() for column in columns)), key=lambda row: row[-1])

def report_run(folder: Path, net: nn.Module, config: dict, data, out: Path) -> None:
    """Print the report of one run and draw its pictures."""
    images, labels = data.test
    result = evaluate(net, images, labels, *mean_std_of(config))
    logits = result["logits"]
    # A row for each label, a column for each answer. label·10 + answer numbers the 100 cells row by
    # row, so counting how often each number occurs fills the whole table.
    confusion = torch.bincount(labels * 10 + logits.argmax(1), minlength=100).view(10, 10)
    errors = confusion - confusion.diag().diag()
    low, high = wilson(confusion.trace().item(), len(labels))
    sure, ece = calibration(logits, labels)
    second = (logits.topk(2).indices[:, 1] == labels).sum()
    print(f"{folder}: {config['model']}, {count_parameters(net):,} parameters\n"
          f"{data.name} test set: accuracy {result['accuracy']:.2%} (95% interval {low:.2%} to "
          f"{high:.2%}), {errors.sum()} errors in {len(labels)}, loss {result['loss']:.4f}\n"
          f"second guess: right in {second} of the errors\ncalibration: {sure:.2%} sure on average"
          f", expected calibration error {ece:.4f}\n\n"
          f"label called{''.join(f'{digit:6}' for digit in range(10))}   recall")
    # Recall divides by the row: of the real 4s, how many were called 4? Precision divides by the
    # column: of all called 4, how many are 4s? A network that calls everything 4 has a recall of
    # 100% there and a precision of 10%: either alone is easy to have.
    recall, precision = (100 * confusion.diag() / confusion.sum(dim).clamp(min=1) for dim in (1, 0))
    for digit, row in enumerate(confusion.tolist()):
        print(f"{digit:<12}", *(f"{n or '.':>6}" for n in row), f"{recall[digit]:8.2f}%", sep="")
    print("precision, %", *(f"{p:6.1f}" for p in precision), "\n\nmost confused", sep="")
    pairs = (errors + errors.T).triu().flatten()         # 4 called 9 and 9 called 4: one confusion
    for a, b in (divmod(cell, 10) for cell in pairs.topk(5).indices.tolist() if pairs[cell]):
        print(f"{a} and {b}: {errors[a, b]} {a}s called {b}, {errors[b, a]} {b}s called {a}")
    ranked = suspects(logits[None], labels)
    draw_ranked(ranked, images, out / "failures.png")
    # Without the diagonal, and the colour is log(1 + count): beside a cell of 30 those of 1 would
    # be as dark as those of 0.
    gallery([heat(errors.float().log1p())], ["Rows: label, from 0 at the top. Columns: answer"],
            out / "confusion.png", 1, 40)
    torch.manual_seed(0)                                 # the same picture each time
    tiles = [tile(255 * torch.cat([*augment(data.train[0][:10], name)], 2)) for name in PRESETS]
    gallery(tiles, list(PRESETS), out / "augmented.png", 1, 2)       # a tile: ten images, one row
    shown = [0, 1, 2, 3] + [row[0] for row in ranked[:4]]            # ordinary ones, and the worst
    draw_evidence(net, config, images[shown], out / "features.png")

def report_suspects(runs: list, data, out: Path) -> None:
    """Print the 20 least believed test labels of one run or several, and draw more of them. This
    proves nothing: runs of one recipe share their blind spots, and an odd digit with a right label
    looks the same from here. Of MNIST's 10,000 test labels people found 15 wrong (Northcutt et al.,
    2021): with four runs, all 15 were among the first 100 here."""
    if any(config["data"] != data.name for _, config in runs):
        raise UserError("--runs: these were trained on different data")
    logits = [evaluate(net, *data.test, *mean_std_of(config))["logits"] for net, config in runs]
    ranked = suspects(torch.stack(logits), data.test[1])
    for row in ranked[:20]:
        print("#{:<5} label {}, or {}?  confidence {:.4f}, margin {:+.3f}".format(*row))
    draw_ranked(ranked, data.test[0], out / "suspects.png")

# ---- Your own digit ---------------------------------------------------------------------------

def open_picture(path) -> Tensor:
    """A picture as numbers from 0 to 1, C×H×W, upright, at most 128 pixels wide and high: one
    channel where pixels have 16 or 32 bits, else red, green, blue, opacity. Raises UserError."""
    try:
        picture = ImageOps.exif_transpose(Image.open(path))          # cameras note their turn
        # RGBa is colour times opacity: whatever colour hides where nothing is opaque becomes 0, and
        # transparent paper is one colour, from which ink of any colour differs in its opacity.
        deep = picture.mode[0] in "IF"
        picture = picture.convert("F") if deep else picture.convert("RGBA").convert("RGBa")
        picture.thumbnail((128, 128))        # a mean of many pixels: little is left of their noise
        x = torch.tensor(np.atleast_3d(picture).astype(np.float32))                     # H×W×C
    except Exception as error:               # each format is damaged in its own way
        raise UserError(f"--image {path} cannot be read as a picture ({reason(error)})")
    return x.movedim(2, 0) / x.abs().max().clamp(min=1e-9)

def prepare(picture: Tensor) -> Tensor:
    """A picture C×H×W of one digit as MNIST would hold it, uint8 1×1×28×28, light on black. Raises
    UserError for a blank picture.

    MNIST's makers scaled each black-and-white digit to fit 20×20 pixels, which made its edges grey,
    and put its centre of mass in the middle of 28×28 (LeCun et al., 1998). A network that has seen
    nothing else is lost on anything else.
    """
    # Ink is the minority, so in each channel the median is the paper's. Far from it is ink of any
    # colour, chalk on a board or yellow on white.
    paper = picture.flatten(1).median(1).values[:, None, None]
    far = (picture - paper).abs().amax(0)                                               # H×W
    # How far ink is, the middle half shows: a black frame or a desk at a side may be farther. Less
    # than 40% of it is shadow, less than 0.15 is noise.
    h, w = far.shape
    farthest = far[h // 4:h - h // 4, w // 4:w - w // 4].max().item()
    ink = (far > max(0.4 * farthest, 0.15)).float()[None]                               # 1×H×W
    ink *= F.avg_pool2d(ink, 9, 1, 4) > 0.055            # a stroke has neighbours, dust has none
    # Frame and desk touch the border: from there, spread to all ink within two pixels, again and
    # again. What is reached is no digit, unless there is nothing else.
    outside = ink.clone()
    outside[:, 1:-1, 1:-1] = 0
    for _ in range(h + w):
        outside = F.max_pool2d(outside, 5, 1, 2) * ink
    ink = (ink if outside.equal(ink) else ink - outside)[0]
    if not ink.any():
        raise UserError("--image: the picture is blank, nothing in it stands out from the paper")
    ink = ink[ink.amax(1) > 0][:, ink.amax(0) > 0]       # rows and columns without it go
    h, w = (max(1, round(20 * side / max(ink.shape))) for side in ink.shape)
    ink = F.interpolate(ink[None, None], (h, w), mode="bilinear", antialias=True)[0, 0]
    top = round(14 - np.average(range(h), weights=ink.sum(1)))       # the centre of mass goes to 14
    left = round(14 - np.average(range(w), weights=ink.sum(0)))
    return (255 * F.pad(ink, (left, 28 - w - left, top, 28 - h - top))).byte()[None, None]

def report_image(path: Path, net: nn.Module, config: dict, out: Path) -> None:
    """Print what the network is shown and the ten probabilities, and draw the evidence maps."""
    if INPUT_SHAPES[config["model"]] != (1, 28, 28):
        raise UserError(f"--image: the network {config['model']!r} reads no 28x28 grey images")
    image = prepare(open_picture(path))
    for row in image[0, 0].tolist():                     # characters that every encoding has
        print("".join(2 * " .:+#"[math.ceil(value / 64)] for value in row).rstrip())
    for digit, p in enumerate(net(normalize(image, *mean_std_of(config)))[0].softmax(0).tolist()):
        print(f"{digit}  {p:7.2%}")
    draw_evidence(net, config, image, out / "image.png")

# ---- Pictures ---------------------------------------------------------------------------------

INK, GREY, PALE, font = "#222222", "#6b6b6b", "#e3e3e3", ImageFont.load_default
LINES = ("#1f6fb4", "#d9622b", "#2e8b57", "#8e44ad", "#b8860b", "#008b8b", "#c2185b", "#555555")

def draw_ranked(ranked: list, images: Tensor, path) -> None:
    """A gallery of the 48 images whose labels `suspects` ranks as the least believed."""
    gallery([tile(images[row[0]]) for row in ranked[:48]],
            ["#{0}  {4:+.2f}\nlabel {1}, or {2}?".format(*row) for row in ranked[:48]], path, title=
            "The least believed labels: #index, margin (below 0: an error, -1: a sure one)")

@torch.no_grad()
def evidence_maps(net: nn.Module, x: Tensor) -> Tensor | None:
    """N×10×H×W: for each class a map of evidence, whose sum is the class's logit: what each place
    adds to it. None for networks that do not end in a head "conv" or "place"."""
    *body, head = net.children() if isinstance(net, nn.Sequential) else [None]
    if isinstance(head, nn.Sequential) and isinstance(head[-2:][0], nn.AdaptiveAvgPool2d):
        maps = nn.Sequential(*body, *head[:-2])(x)       # all but the average and its flattening
        return maps / maps[0, 0].numel()

def draw_evidence(net: nn.Module, config: dict, images: Tensor, path) -> None:
    """A row an image: the image, then its ten evidence maps on one scale, each with its sum."""
    maps = evidence_maps(net, normalize(images, *mean_std_of(config)))
    if maps is None:
        return print(f"no evidence maps: {config['model']} does not end in a head that has them")
    tiles, texts = [], []
    for image, ten in zip(images, maps):
        tiles += [tile(image), *(heat(x, ten.abs().max()) for x in ten)]
        texts += ["", *(f"{digit}:  {x.sum():+.1f}" for digit, x in enumerate(ten))]
    gallery(tiles, texts, path, 11, 3, "Where it sees evidence for each digit (bright) or against "
            "it (dark)\nThe number is the sum of the map: the digit's logit")

def curves(rows: list[dict], path) -> None:
    """The notes' 2×2 figure, from a log's rows: loss and accuracy in percent, train and test."""
    epochs = [row["epoch"] for row in rows]
    chart([{"title": f"{title} {kind}", "x": "epoch", "y": unit, "lines": {
                name: (epochs, [row[f"{name}_{kind}"] for row in rows])
                for name in names if f"{name}_{kind}" in rows[0]}}
           for kind, unit in (("loss", "mean"), ("accuracy", "percent"))
           for title, *names in (("Training", "train"), ("Test", "test", "val"))], path)

def axis(values, log=False):
    """(places, ticks) of an axis on which all these values lie. places(values) go from 0, its low
    end, to 1, its high end, NaN for what is not on it; ticks are (place, label)."""
    def scaled(values) -> Tensor:
        x = torch.tensor(values, dtype=torch.float64)
        return x.log10() if log else x                   # 0 becomes -inf, what is below it NaN
    def places(values) -> list[float]:
        x = (scaled(values) - low) / span
        return x.where((x >= 0) & (x <= 1), math.nan).tolist()
    known = [x for x in scaled(values).tolist() if abs(x) < 1e100] or [0]      # no NaN, no infinity
    low, span = min(known), max(known) - min(known) or 1
    # The first of ... 0.1, 0.2, 0.5, 1, 2, 5 ... that makes at most seven steps. On a log axis it
    # counts decades: by halves of them, ticks are 1, 3.2, 10.
    steps = (digit * 10.0 ** power for power in range(-20, 101) for digit in (1, 2, 5))
    step = next(step for step in steps if span <= 7 * step)
    ticks = [i * step for i in range(math.ceil(low / step), math.floor((low + span) / step) + 1)]
    return places, [((x - low) / span, f"{10 ** x:.2g}" if log else f"{x:.6g}") for x in ticks]

def draw_panel(panel: dict, width: int, height=420) -> Image.Image:
    """The axes and lines of one panel of a chart, the lines' names at the right."""
    marks, text = panel.get("marks", {}), font(30)
    xs, ys = ([v for line in panel["lines"].values() for v in line[i]] for i in (0, 1))
    x_of, x_ticks = axis([*xs, *marks.values()], panel.get("log_x"))
    y_of, y_ticks = axis(panel.get("y_range", ys), panel.get("log_y"))
    lines = {name: (x_of(xs), y_of(ys)) for name, (xs, ys) in panel["lines"].items()}
    lines |= {name: (x_of([x, x]), (0, 1)) for name, x in marks.items()}      # bottom to top
    image = Image.new("RGB", (2 * width, 2 * height), "white")
    draw = ImageDraw.Draw(image)
    names = max((draw.textlength(name, text) for name in lines), default=0)
    left, top, w, h = 132, 20, 2 * width - 172 - names, 2 * height - 90        # of the axes' frame
    for x, label in x_ticks:
        draw.line((left + w * x, top, left + w * x, top + h), PALE, 2)
        draw.text((left + w * x, top + h + 16), label, GREY, text, anchor="ma")
    for y, label in y_ticks:
        draw.line((left, top + h - h * y, left + w, top + h - h * y), PALE, 2)
        draw.text((left - 16, top + h - h * y), label, GREY, text, anchor="rm")
    for i, (name, line) in enumerate(lines.items()):
        colour = LINES[i % len(LINES)]
        draw.text((left + w + 24, top + 44 * i), name, colour, text)
        points = [(left + w * x, top + h - h * y) for x, y in zip(*line)]         # y points down
        for here, there in zip(points, points[1:] + points[-1:]):
            if not math.isnan(sum(here + there)):        # NaN leaves a gap
                draw.line(here + there, colour, 4)
                draw.circle(here, 4, colour)             # a single point is seen, too
    return image.reduce(2)                               # drawn twice as large: halving smooths it

def chart(panels: list[dict], path, columns=2) -> None:
    """Draw line charts into one PNG, panels 600 pixels wide (900 in a single column):

        {"title": "Loss", "x": "epoch", "y": "mean", "lines": {"train": (xs, ys), ...}}

    A panel may also have "log_x": True, "log_y": True, "y_range": (low, high), and for vertical
    lines "marks": {name: x}. NaN, infinite values and those out of range leave a gap.
    """
    gallery([draw_panel(panel, 900 if columns == 1 else 600) for panel in panels],
            ["{title}: {y} by {x}".format(**panel) for panel in panels], path, columns, 1)

def tile(image: Tensor) -> Image.Image:
    """A picture of a tensor C×H×W, 0 to 255, of one channel or three."""
    return Image.fromarray(image.cpu().byte().expand(3, -1, -1).permute(1, 2, 0).numpy())  # H×W×3

def heat(values: Tensor, limit=None) -> Image.Image:
    """H×W numbers as a picture, one pixel each, dark to bright from the smallest to the largest, or
    from -limit to limit."""
    low, high = (values.min(), values.max()) if limit is None else (-limit, limit)
    grey = (values.detach() - low) / max(high - low, 1e-12) * 255
    return ImageOps.colorize(tile(grey[None]).convert("L"), "#08051d", "#ffee2a", mid="#bc3754")

def gallery(tiles: list, captions: list[str], path, columns=8, zoom=4, title="") -> None:
    """Tiles (one or more) in rows, all enlarged to `zoom` times the largest one's size; below each
    its caption, of one line or more, hardly wider than the tile."""
    wide, tall = (zoom * max(picture.size[i] for picture in tiles) for i in (0, 1))
    across, down = wide + 16, tall + 35 + 19 * max(text.count("\n") for text in captions)
    top, rows = 20 + 24 * len(title.splitlines()), math.ceil(len(tiles) / columns)
    sheet = Image.new("RGB", (16 + columns * across, top + rows * down), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((16, 12), title, INK, font(18))
    for i, (picture, caption) in enumerate(zip(tiles, captions)):
        x, y = 16 + i % columns * across, top + i // columns * down
        sheet.paste(picture.resize((wide, tall), Image.NEAREST), (x, y))
        draw.text((x, y + tall + 6), caption, INK, font(15))
    sheet.save(content := io.BytesIO(), "PNG")
    save(path, content.getvalue())

# ---- Runs, and the command line ---------------------------------------------------------------

def read_pt(path) -> dict:
    """What train.py saved in a .pt file, "config" and more; the only place that loads one. Raises
    UserError for whatever is wrong with it: missing, damaged, foreign, not finite."""
    try:
        # A .pt file is a ZIP, which keeps a checksum of each of its parts. torch does not look at
        # them: with one bit flipped it loads other weights, and nobody notices.
        intact = zipfile.ZipFile(path).testzip() is None
        # weights_only: a pickle can name any function for its reader to call, so to load a
        # stranger's file would run a stranger's code. Now it may hold tensors, numbers, text only.
        state = torch.load(path, map_location="cpu", weights_only=True)
        finite = all(x.isfinite().all() for name in ("weights", "net", "average")
                     for x in state.get(name, {}).values())
        if not (intact and finite and state["config"]):
            raise ValueError                 # not finite: the training had diverged
    except Exception as error:   # whatever a missing, damaged or foreign file can do to these
        raise UserError(f"{path} is missing, damaged, not finite or not made by this train.py "
                        f"({type(error).__name__}): go on with --resume, or train a new run")
    return state

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

def main() -> None:
    parser = Parser(prog="analyze.py", description="What a trained network gets wrong, and why.")
    add = parser.add_argument
    add("--run", "--runs", type=user_path, nargs="+", metavar="FOLDER", help="none: the last run")
    add("--data-dir", type=user_path, help="where the data set is; none: where the run found it")
    add("--out", type=user_path, metavar="FOLDER", help="for the pictures; none: RUN/analysis")
    add("--image", type=user_path, metavar="FILE", help="read a picture of one digit")
    add("--suspects", action="store_true", help="rank the test labels by how wrong they look")
    args = parser.parse_args()
    finished = Path("runs").glob("[0-9]*/weights.pt")    # train.py numbers them: take the last
    folders = args.run or [max(finished, default=Path("runs/001/weights.pt")).parent]
    runs = [load_run(folder) for folder in folders]
    config, out = runs[0][1], args.out or folders[0] / "analysis"
    data = None if args.image else load(config["data"], args.data_dir or config["data_dir"])
    if args.image:
        report_image(args.image, *runs[0], out)
    elif args.suspects or len(runs) > 1:
        report_suspects(runs, data, out)
    else:
        report_run(folders[0], *runs[0], data, out)
    print(f"\ndrawn in {out}")

if __name__ == "__main__":
    run_command(main)
