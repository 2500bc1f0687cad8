"""Receptive fields, computed and then measured: which pixels of the image can a unit see?

What it teaches: three one-line recurrences give every window of a chain of layers, and where
branches meet, the union of their windows. None of it needs to be believed: light the image one
row and one column at a time, and watch which units notice.

    python rf.py                              the default network of model.py, one row a layer
    python rf.py --model n3                   another of its networks
    python rf.py --torchvision resnet50       one of torchvision's convolutional classifiers
    python rf.py --model n2 --input 1x20x20   the shape debugger: which layer fails, why, what helps
    python rf.py --erf --run runs/003         the effective field: which pixels count, into rf.png
    python rf.py --slips                      printed figures of the course notes, corrected

    from rf import explain                    the same table and debugger for a network of yours
    explain(net, (1, 28, 28))

Columns: `window` is kernel, stride, padding and dilation; `jump` the pixels from one unit's window
to the next one's; `RF` a window's size; `first` where unit 0's starts (negative: in the padding).
`measured` is the widest window found, cut off by the image's border; ✓ says that every unit, also
at the border, sees exactly the pixels that it was computed to see. Layers that work on each number
alone and have no parameters (ReLU, dropout) change nothing and get no row.
"""
import copy
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Iterator, NamedTuple

import torch
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, fx, nn
from torchvision.transforms.functional import to_pil_image

from analyze import find_run, gallery, heat, load_run, mean_std_of
from data import NAMES, Parser, UserError, load, normalize, one_line, run_command
from model import INPUT_SHAPES, build, count_parameters

# ---- The arithmetic, along one axis -----------------------------------------------------------


class Axis(NamedTuple):
    """What the units of a map see of the image along one axis, height or width, in pixels.

    Unit i's window starts at first + i·jump and is `size` long, as if the image had no border.
    jump 0 marks a global map, whose units all see the same. `seen` is what the border leaves over.
    """
    jump: int
    size: int
    first: int
    seen: Tensor                                     # bool, units×pixels: does unit i see pixel p?


def slide(axis: Axis, kernel: int, stride: int, padding: int, dilation: int, units: int) -> Axis:
    """One convolution or pooling further (Araujo, Norris and Sim, Distill, 2019).

    New unit i reads the old units i·stride − padding + k·dilation, for k = 0 to kernel − 1. Old
    unit n sees `size` pixels from first + n·jump on. Put the one into the other: the new window

        starts (k = 0) at               first + (i·stride − padding)·jump
                                      = (first − padding·jump)  +  i·(stride·jump)
        ends (k = kernel − 1) with an old window that starts (kernel − 1)·dilation·jump later.

    The three recurrences below are this, read off. A late 3×3 convolution therefore adds more than
    an early one: 2 pixels at jump 1, 8 at jump 4. Padding sees nothing, so near the border a unit
    sees what those of its old units see that exist.
    """
    reads = stride * torch.arange(units)[:, None] - padding + dilation * torch.arange(kernel)
    exists = (reads >= 0) & (reads < len(axis.seen))                            # units×kernel
    seen = axis.seen[reads.clamp(0, len(axis.seen) - 1)] & exists[:, :, None]
    return Axis(jump=stride * axis.jump,
                size=axis.size + (kernel - 1) * dilation * axis.jump,
                first=axis.first - padding * axis.jump,
                seen=seen.any(1))


def union(axes: list[Axis]) -> Axis:
    """Where branches are added, multiplied or concatenated: the smallest window around theirs."""
    seen = axes[0].seen
    for axis in axes[1:]:
        seen = seen | axis.seen                      # the one unit of a global map counts for all
    steps = {(axis.jump, len(axis.seen)) for axis in axes}
    if any(jump == 0 for jump, _ in steps):
        return Axis(0, 0, 0, seen)
    if len(steps) > 1:
        raise UserError("joins branches that are out of step: " + " and ".join(
            f"{units} units at jump {jump}" for jump, units in sorted(steps)))
    first = min(axis.first for axis in axes)
    return Axis(axes[0].jump, max(axis.first + axis.size for axis in axes) - first, first, seen)


# ---- Following the image through any network --------------------------------------------------
# torch.fx runs forward() once with a stand-in for the image and writes down every call in it. These
# are the modules and functions whose windows are known here; any other is named, never guessed.

SLIDING = set("Conv2d MaxPool2d max_pool2d AvgPool2d avg_pool2d".split())
ADAPTIVE = {"AdaptiveAvgPool2d", "AdaptiveMaxPool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"}
ARGUMENTS = {"max_pool2d": "input kernel_size stride padding dilation".split(),
             "avg_pool2d": "input kernel_size stride padding".split()}          # by their position
BRANCHES = set("add iadd sub mul imul truediv cat concat".split())
POINTWISE = set("Identity ReLU relu relu_ ReLU6 relu6 LeakyReLU leaky_relu PReLU ELU elu SELU GELU "
                "gelu SiLU silu Mish Sigmoid sigmoid Hardsigmoid Hardswish Tanh tanh BatchNorm1d "
                "BatchNorm2d Dropout dropout Dropout2d dropout2d stochastic_depth "
                "contiguous".split())
SOFTMAX = set("Softmax softmax LogSoftmax log_softmax".split())
# These and ADAPTIVE are known when they leave one unit: a vector, or a map of 1×1.
GLOBAL = ADAPTIVE | SOFTMAX | set("Flatten flatten view reshape squeeze mean Linear".split())


class Row(NamedTuple):
    """One layer of the table."""
    name: str                                        # where, what: "0.1 BatchNorm2d", "layer1 add"
    shape: tuple                                     # C×H×W, or the length of a vector
    windows: list                                    # per axis: kernel, stride, padding, dilation
    axes: tuple[Axis, Axis]                          # height and width, computed
    measured: tuple                                  # their `seen` by experiment, or empty
    parameters: int
    multiply_adds: int                               # of one image
    note: str


class Tracer(fx.Tracer):
    """torch.fx looks into every module that is not torch's. Of model.py's own batch norm and
    dropout, which are kinds of torch's, it need not: one layer, one row."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return (isinstance(module, (nn.BatchNorm2d, nn.Dropout))
                or super().is_leaf_module(module, name))


def trace(net: nn.Module, images: Tensor, probe: bool) -> tuple[fx.GraphModule, fx.Interpreter]:
    """A copy of the network in eval mode as a list of calls, and what runs them one at a time."""
    try:
        net = copy.deepcopy(net).eval()
        traced = fx.GraphModule(net, Tracer().trace(net)).to(images)
    except Exception as error:                       # whatever the reader's forward() does
        raise UserError(f"torch.fx cannot follow {type(net).__name__}: {one_line(error)}")
    if probe:
        for name, weights in traced.named_parameters():
            weights.data.fill_(0 if name.endswith("bias") else 1)
    run = fx.Interpreter(traced, garbage_collect_values=False)
    run.args_iter = iter([images])
    return traced, run


def identify(node: fx.Node, traced: fx.GraphModule) -> tuple[str, str, object]:
    """A call's name, its kind ("Conv2d", "add"), and its module, or the arguments of a function."""
    if node.op == "call_module":
        module = traced.get_submodule(node.target)
        return f"{node.target} {type(module).__name__}", type(module).__name__, module
    kind = getattr(node.target, "__name__", str(node.target))
    inside = list(node.meta.get("nn_module_stack") or [""])[-1]                 # "layer1.0"
    arguments = dict(zip(ARGUMENTS.get(kind, ()), node.args)) | node.kwargs
    call = SimpleNamespace(**{"stride": None, "padding": 0} | arguments)
    return f"{inside} {node.name}".strip(), kind, call


def geometry(kind: str, call, shape: tuple, out: tuple) -> list[tuple[int, int, int, int]]:
    """(kernel, stride, padding, dilation) of a sliding window, for height and for width."""
    if kind in ADAPTIVE:
        if any(n % m for n, m in zip(shape[1:], out[1:])):
            raise UserError(f"needs windows of unequal size from {times(shape)} to {times(out)}")
        return [(n // m, n // m, 0, 1) for n, m in zip(shape[1:], out[1:])]
    if kind not in SLIDING:
        return []
    if getattr(call, "padding_mode", "zeros") != "zeros":
        raise UserError(f"has padding_mode={call.padding_mode!r}, which is not known here")
    kernel, stride, padding, dilation = (
        (value, value) if isinstance(value, int) else value for value in (
            call.kernel_size, call.stride or call.kernel_size, call.padding,
            getattr(call, "dilation", 1)))
    if isinstance(padding, str):                     # "same": an odd pixel goes to the far end
        padding = [(k - 1) * d // 2 * (padding == "same") for k, d in zip(kernel, dilation)]
    return list(zip(kernel, stride, padding, dilation))


def see(kind: str, windows: list, axes: list[tuple], out: tuple) -> tuple[Axis, Axis]:
    """The windows of a call's result, of shape `out`, from those of its inputs."""
    if kind in POINTWISE:
        return axes[0]
    if kind in GLOBAL and out[1:] in ((), (1,), (1, 1)):     # one unit: it sees what any unit saw
        return tuple(Axis(0, 0, 0, axis.seen.any(0, keepdim=True)) for axis in axes[0])
    if kind in BRANCHES:
        result = tuple(union(pair) for pair in zip(*axes))
    else:
        result = tuple(slide(axis, *window, units)
                       for axis, window, units in zip(axes[0], windows, out[1:]))
    if tuple(len(axis.seen) for axis in result) != (out[1:] or (1, 1)):
        raise UserError("is not known here: what its units see cannot be computed")
    return result


def walk(net: nn.Module, input_shape: tuple, probe=False) -> Iterator[Row]:
    """Send an image of shape C×H×W through the network; yield a row a layer.

    Only shapes are needed, so it travels on the "meta" device, where tensors have no numbers; with
    `probe`, light does: see the next section. Raises UserError at the first layer that fails or is
    not known, with its place in the network, the reason, and the likely remedy.
    """
    images = lit(*input_shape) if probe else torch.zeros(1, *input_shape, device="meta")
    traced, run = trace(net, images, probe)
    axes, latest_map = {}, input_shape
    for node in traced.graph.nodes:
        name, kind, call = identify(node, traced)
        inputs = [source for source in node.all_input_nodes if source in axes]
        shapes = [tuple(run.env[source].shape[1:]) for source in inputs]
        before = [axes[source] for source in inputs]
        try:
            value = run.env[node] = spread(run, node, kind, inputs) if probe else run.run_node(node)
            if node.op == "placeholder" and isinstance(value, Tensor):
                axes[node] = [Axis(1, 1, 0, torch.eye(n).bool()) for n in input_shape[1:]]
            several = isinstance(value, tuple) and any(isinstance(v, Tensor) for v in value)
            if not inputs or node.op == "output" or not (several or isinstance(value, Tensor)):
                continue                             # a weight, or a number such as x.size(0)
            if several:
                raise UserError("returns several tensors, which is not known here")
            if len(value) != len(images):
                raise UserError(f"turns 1 image into {len(value)}: see torch.flatten(x, 1)")
            out = tuple(value.shape[1:])
            if 0 in out:                                 # torch 2.6 lets it pass on "meta"
                raise ValueError("leaves nothing of the map")
            windows = geometry(kind, call, shapes[0], out)
            axes[node] = see(kind, windows, before, out)
        except Exception as error:                   # PyTorch refuses with many types of exception
            raise UserError(f"{name} {diagnose(error, kind, call, shapes, latest_map)}")
        latest_map = out if len(out) == 3 else latest_map
        parameters = count_parameters(call) if isinstance(call, nn.Module) else 0
        products = call.weight[0].numel() if kind in ("Conv2d", "Linear") else 0
        if parameters or kind not in POINTWISE:
            measured = noticed(value, input_shape[1]) if probe else ()
            note = remark(windows, shapes[0], out, before, axes[node])
            yield Row(name, out, windows, axes[node], measured, parameters,
                      value[0].numel() * products, note)


# ---- The measurement --------------------------------------------------------------------------
# A probe must not deceive. Light must not cancel: all weights are 1, without biases. Max pooling
# must not hide it: all light is equally bright. Rounding must not look like light: fast algorithms
# (Winograd, FFT) may leave 1e-13 where a sum is really 0, while the faintest true light, one pixel
# in the average of a whole map, is above 1e-6. Each result is cut there, to 0 or 1.


def lit(channels: int, height: int, width: int) -> Tensor:
    """(H+W)×C×H×W images: in image y row y is lit, in image H + x column x; all else is dark.

    Windows are rectangles, so their rows and their columns can be found apart, with H + W images
    in place of the H·W that light one pixel each.
    """
    images = torch.zeros(height + width, channels, height, width, dtype=torch.float64)
    images[range(height), :, range(height), :] = 1
    images[range(height, height + width), :, :, range(width)] = 1
    return images


def spread(run: fx.Interpreter, node: fx.Node, kind: str, inputs: list[fx.Node]):
    """A call's result in light and dark. What works on each number alone lets light pass, even a
    sigmoid, which makes 0.5 of darkness; a product depends on both factors, as a sum does."""
    values = [run.env[source] for source in inputs]
    if kind in POINTWISE | SOFTMAX:
        return values[0]
    value = sum(values) if kind in BRANCHES - {"cat", "concat"} else run.run_node(node)
    return (value > 1e-6).double() if isinstance(value, Tensor) else value


def noticed(value: Tensor, height: int) -> tuple[Tensor, Tensor]:
    """Which row of units noticed which row of pixels, and the same for columns: units×pixels."""
    light = (value if value.ndim == 4 else value.flatten(1)[:, :, None, None]).bool().any(1)
    return light[:height].any(2).T, light[height:].any(1).T


# ---- The shape debugger -----------------------------------------------------------------------


def times(numbers) -> str:
    return "×".join(map(str, numbers))


def remark(windows: list, shape: tuple, out: tuple, axes: list, result: tuple) -> str:
    """What the reader may not expect of a call that works, or nothing."""
    if len(axes) > 1 and any(pair[0].jump for pair in axes) and result[0].jump == 0:
        return "a branch that sees the whole image joins here; from now on every unit does"
    for (k, s, p, d), n, m in zip(windows, shape[1:], out[1:]):
        unread = n - ((m - 1) * s - p + (k - 1) * d + 1)
        if unread > 0 and k >= s:
            return f"steps of {s} do not divide {times(shape)} evenly: the last {unread} go unread"
    return ""


def diagnose(error: Exception, kind: str, call, shapes: list, latest_map: tuple) -> str:
    """What a layer wanted in place of inputs of these shapes, and the likely remedy."""
    shape = shapes[0] if shapes else ()
    setting = {"Conv2d": "in_channels", "Linear": "in_features"}.get(kind, "num_features")
    wants = getattr(call, setting, None)
    if kind == "Linear" and len(shape) > 1:
        return f"wants a vector, got the map {times(shape)}: put nn.Flatten() before it"
    if isinstance(error, UserError):
        return str(error)
    if kind == "Linear" and shape[0] == math.prod(latest_map):
        channels, height, width = latest_map
        side = math.isqrt(wants // channels)
        map_text = f": the map is {height}×{width}, not {side}×{side}"
        return (f"wants {wants} features, got {shape[0]} = {times(latest_map)}"
                f"{map_text * (channels * side * side == wants)}. Write {setting}={shape[0]}, or "
                "change the size of the image")
    if wants and wants != shape[0]:
        return (f"wants {wants}-{setting[:-1].split('_')[1]} input, got {times(shape)}. Write "
                f"{setting}={shape[0]}, or change what comes before")
    if kind in SLIDING and len(shape) == 3:
        windows = geometry(kind, call, shape, ())
        reach = [(k - 1) * d + 1 for k, _, _, d in windows]
        room = [n + 2 * p for n, (_, _, p, _) in zip(shape[1:], windows)]
        if any(r > n for r, n in zip(reach, room)):
            return (f"has a {times(reach)} window, but the map is {times(shape[1:])}, with padding "
                    f"{times(room)}. Pool less, pad more, or take a larger image")
    if kind in BRANCHES:
        return (f"cannot join {' and '.join(map(times, shapes))}: give the branches the same "
                "padding and strides, and for a sum the same channels")
    return f"fails: {one_line(error)}"


# ---- The table --------------------------------------------------------------------------------

AFFORDABLE = 2e10     # multiply-adds of all probes: seconds. ResNet-50 at 224×224 would need 2e12.


def widest(seen: tuple[Tensor, Tensor]) -> list[int]:
    """The largest height and width, in pixels, that any unit sees."""
    spans = [[unit.nonzero() for unit in axis if unit.any()] for axis in seen]
    return [max((int(pixels[-1] - pixels[0]) + 1 for pixels in span), default=0) for span in spans]


def table(rows: list[Row]) -> str:
    """The rows in aligned columns. Where height and width differ, both are given: height×width."""
    def both(numbers) -> str:
        return times(numbers) if len(set(numbers)) > 1 else str(numbers[0])

    lines = [("layer", "output", "window", "jump", "RF", "first", "measured", "parameters",
              "multiply-adds")]
    for row in rows:
        window = " ".join(letter + both(pair) for letter, pair in zip("kspd", zip(*row.windows))
                          if letter != "d" or pair != (1, 1))
        jump, size, first, seen = zip(*row.axes)
        field = (both(jump), both(size), both(first)) if all(jump) else ("", "global", "")
        measured = row.measured and both(widest(row.measured)) + (
            " ✓" if all(map(torch.equal, seen, row.measured)) else " ✗")
        lines.append((row.name, times(row.shape), window, *field, measured or "",
                      f"{row.parameters:,}", f"{row.multiply_adds:,}"))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join([cell.ljust(width) for cell, width in zip(line[:3], widths)] + [
        cell.rjust(width) for cell, width in zip(line[3:], widths[3:])]) for line in lines)


def last_map(rows: list[Row]) -> Row | None:
    """The last layer whose units still have a place of their own in the image."""
    return next((row for row in reversed(rows) if all(axis.jump for axis in row.axes)), None)


def explain(net: nn.Module, input_shape: tuple) -> str | None:
    """Print the table and the totals for images of shape C×H×W. If the network cannot take them,
    print the table up to there, then print on stderr, and return, what is wrong."""
    rows = []
    try:
        for row in walk(net, input_shape):
            rows.append(row)
    except UserError as error:
        print(table(rows), flush=True)
        print(f"error: {error}", file=sys.stderr)
        return str(error)
    work = sum(row.multiply_adds for row in rows)
    probes = input_shape[1] + input_shape[2]
    if work * probes < AFFORDABLE:
        rows = list(walk(net, input_shape, probe=True))
    print(table(rows))
    for row in rows:
        if row.note:
            print(f"note: {row.name}: {row.note}")
    parameters, last = count_parameters(net), last_map(rows)
    print(f"\n{parameters:,} parameters ({parameters * 4 / 1000:,.0f} kB as 32-bit floats), "
          f"{work:,} multiply-adds an image.")
    if last:
        seen, image = times(widest([axis.seen for axis in last.axes])), times(input_shape[1:])
        print(f"Of the image's {image} pixels a unit of the last local map, {last.name} "
              f"{times(last.shape)}, sees at most {seen}{': all' * (seen == image)}.")
    if work * probes >= AFFORDABLE:
        print(f"Not measured: {work * probes:.0e} multiply-adds. Try a smaller --input.")


# ---- The effective receptive field ------------------------------------------------------------


def effective_field(net: nn.Module, images: Tensor, layer: str) -> Tensor:
    """H×W, of sum 1: how much the centre unit of a layer's map changes with each pixel.

    |d unit / d pixel|, the unit summed over its channels, averaged over images N×C×H×W. Luo et al.
    (2016) find it roughly a Gaussian: most of the window hardly counts.
    """
    images, maps = images.clone().requires_grad_(), []
    hook = net.get_submodule(layer).register_forward_hook(lambda *call: maps.append(call[2]))
    net.eval()(images)
    hook.remove()
    centre = maps[0][:, :, maps[0].shape[2] // 2, maps[0].shape[3] // 2]
    mass = torch.autograd.grad(centre.sum(), images)[0].abs().sum(1).mean(0)
    return mass / mass.sum()


def framed(image: Image.Image, window: list) -> Image.Image:
    """The image on grey ground, with a line around the window, which may be the larger one."""
    (top, bottom), (left, right) = window
    margin = 2 + max(0, -top, -left, bottom - image.height, right - image.width)
    ground = ImageOps.expand(image.convert("RGB"), margin, "#9a9a9a")
    ImageDraw.Draw(ground).rectangle((left + margin - 1, top + margin - 1, right + margin + 1,
                                      bottom + margin + 1), outline="#2ad4ff")
    return ground


def draw_fields(nets: dict, images: Tensor, path: Path) -> None:
    """Print and draw the effective field of each {title: (network, mean, std)} for uint8 images."""
    last = last_map(list(walk(nets["fresh"][0], tuple(images.shape[1:]))))
    begins = [axis.first + len(axis.seen) // 2 * axis.jump for axis in last.axes]
    window = [(begin, begin + axis.size - 1) for begin, axis in zip(begins, last.axes)]
    size = "x".join(str(axis.size) for axis in last.axes)
    y, x = ((torch.arange(n) - sum(ends) / 2).abs() for n, ends in zip(images.shape[2:], window))
    side = 2 * torch.maximum(y[:, None], x) + 1      # H×W: of the centred square that gets that far
    tiles = [framed(to_pil_image(images[0]), window)]
    captions = [f"an image, and the computed\nwindow of {size} pixels"]
    for title, (net, mean, std) in nets.items():
        mass = effective_field(net, normalize(images, mean, std), last.name.split()[0])
        half, most = (next(int(s) for s in side.unique() if mass[side <= s].sum() >= share)
                      for share in (0.5, 0.95))
        tiles.append(framed(heat(mass), window))
        captions.append(f"{title}: half of the gradient in\n{half}x{half}, 95% in {most}x{most}")
        print(captions[-1].replace("\n", " ") + f" pixels; the computed window is {size}")
    gallery(tiles, captions, path, columns=3, zoom=8,
            title=f"The pixels that move the centre unit of {last.name}")
    print(f"picture: {path}")


# ---- Command line -----------------------------------------------------------------------------


def slips() -> str:
    """A Markdown table: what the course notes print, and what their layers give."""
    counts = {name: f"{count_parameters(build(name)):,}" for name in ("n1", "n2", "n3-original")}
    last = [row for row in walk(build("n2"), (1, 28, 28)) if "Conv2d" in row.name][-1]
    lines = [("network", "figure", "printed", "computed"), ("---",) * 4,
             ("N1", "parameters", "18,746", counts["n1"]),
             ("N2", "parameters", "19,418 and 19,300", counts["n2"]),
             ("N2", "receptive field of the last convolution", "18", f"{last.axes[0].size}"),
             ("N3, original", "parameters", "about 2.3M", counts["n3-original"])]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parse_shape(text: str) -> tuple[int, int, int]:
    """"1x28x28" -> (1, 28, 28). Raises UserError."""
    sizes = [int(size) for size in text.split("x") if size.isdecimal() and 0 < int(size) <= 2048]
    if len(sizes) != 3 or text.count("x") != 2:
        raise UserError(f"--input {text}: channels x height x width, each 1 to 2048, as in 1x28x28")
    return tuple(sizes)


def from_torchvision(name: str) -> nn.Module:
    """A classification network of torchvision with random weights. Raises UserError."""
    if name not in torchvision.models.list_models(torchvision.models):
        raise UserError(f"torchvision has no classification network {name!r}; it has resnet50, "
                        "vgg16 and those that torchvision.models.list_models() names")
    extras = {"aux_logits": False, "init_weights": False}           # heads for training; slow
    return torchvision.models.get_model(
        name, **extras if name in ("googlenet", "inception_v3") else {})


def newest_run(model: str) -> Path | None:
    """The newest run folder, if it is one of this network."""
    try:
        folder = find_run()
    except UserError:
        return None
    return folder if load_run(folder)[1]["model"] == model else None


def main() -> None:
    parser = Parser(prog="rf.py", description="Receptive fields, computed and measured.")
    add = parser.add_argument
    add("--model", choices=INPUT_SHAPES, default="default", help="a network of model.py")
    add("--torchvision", metavar="NAME", help="a network of torchvision, with random weights")
    add("--input", metavar="CxHxW", type=parse_shape, help="another image size, such as 1x20x20")
    add("--erf", action="store_true", help="draw the effective receptive field, fresh and trained")
    add("--run", metavar="FOLDER", help="the trained one (default: the newest, if of this network)")
    add("--data", choices=NAMES, default="mnist", help="images for --erf")
    add("--data-dir", type=Path, default=Path("data"))
    add("--out", type=Path, default=Path("rf.png"), help="the picture of --erf")
    add("--slips", action="store_true", help="the figures of the notes, corrected")
    args = parser.parse_args()
    if args.slips:
        return print(slips())
    run = args.run or (newest_run(args.model) if args.erf else None)
    untrained = None, {"model": args.model, "options": {}}
    trained, config = load_run(find_run(run)) if run else untrained
    torch.manual_seed(0)                             # the same fresh network each time
    if args.torchvision:
        net, shape = from_torchvision(args.torchvision), (3, 224, 224)
    else:
        net, shape = build(config["model"], **config["options"]), INPUT_SHAPES[config["model"]]
    if explain(net, args.input or shape):
        raise SystemExit(2)
    if not (args.erf or args.run):
        return
    if args.data == "mnist" and len([*(args.data_dir / "MNIST" / "raw").glob("*ubyte*")]) < 4:
        print(f"MNIST is not in {args.data_dir}: synthetic digits take its place")
        args.data = "synthetic"                      # a picture is not worth a download
    digits = load(args.data, args.data_dir)
    if args.torchvision or args.input or digits.test[0].shape[1:] != shape:
        raise UserError("--erf takes a network of model.py and --data of the size made for it: "
                        f"{config['model']!r} wants {times(INPUT_SHAPES[config['model']])}")
    nets = {"fresh": (net, digits.mean, digits.std)}
    if trained:
        nets["trained"] = trained, *mean_std_of(config)
    print(f"trained: {run}" if run else f"No newest run of {args.model!r}: fresh only.")
    draw_fields(nets, digits.test[0][:200], args.out)


if __name__ == "__main__":
    run_command(main)
