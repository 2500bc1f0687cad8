"""Receptive fields, computed and then measured: which pixels of the image can a unit see?

What it teaches: three one-line recurrences give every window of a chain of layers; where branches
meet, it is the smallest window around theirs. None of it needs to be believed: put ink on one row
or one column of the image at a time, and look which units get stained.

    python rf.py                              the default network of model.py, one row a layer
    python rf.py --model n3                   another of its networks
    python rf.py --torchvision resnet50       one of torchvision's classifiers
    python rf.py --model n2 --input 1x20x20   the shape debugger: which layer fails, why, what helps
    python rf.py --erf --run runs/003         the effective field: which pixels count, into rf.png
    python rf.py --slips                      printed figures of the course notes, corrected

    from rf import explain                    the same table and debugger for a network of yours
    explain(net, (1, 28, 28))

A unit is one place of a layer's map, with all its channels. Columns: `window` is kernel, stride,
padding and dilation; `jump` the pixels from one unit's window to the next one's; `RF` a window's
size, "global" where it may be the whole image, or is not known; `first` where unit 0's window
starts (negative: in the padding). `measured`, for images of H + W ≤ 128, counts the rows, and the
columns, that a unit was found to see, at most; its sign compares all units with their windows:
    =  each sees every row and column of its window, as far as the image goes, and no other
    <  some see fewer: the window is a bound (dilation leaves gaps)
    !  some see more: a formula is wrong
`multiply-adds` are those of convolutions and linear layers, for one image. What changes nothing
here (ReLU, dropout, a sum that sees no more than the row before it) gets no row.
"""
import copy, math, sys
from collections import namedtuple

from data import Parser, UserError, reason, run_command, user_path

import torch
from torch import Tensor, nn
from torch.fx.node import map_aggregate                # through lists, tuples and dictionaries
from torch.overrides import TorchFunctionMode          # to see each call of a network's functions

from analyze import gallery, heat, load_run
from model import INPUT_SHAPES, build, count_parameters

# ---- The arithmetic, along one axis -----------------------------------------------------------

# Axis: what the units of a map see of the image along one axis, height or width. Unit i's window
# starts at pixel first + i·jump and is `size` pixels long, as if the image had no border; the image
# has `pixels` of them. `dim`: the dimension of the tensor that the axis is, 2 for height in N×C×H×W
Axis = namedtuple("Axis", "jump size first pixels dim")
GLOBAL = {"jump": 0, "size": 0, "first": 0}            # any unit may see all pixels

def slide(axis: Axis, kernel: int, stride: int, padding: int, dilation: int) -> Axis:
    """One convolution or pooling further (Araujo, Norris and Sim, Distill, 2019).

    New unit i reads the old units i·stride − padding + k·dilation, for k = 0 to kernel − 1. Old
    unit n sees `size` pixels from first + n·jump on. Put the one into the other: the new window

        starts (k = 0) at               first + (i·stride − padding)·jump
                                      = (first − padding·jump)  +  i·(stride·jump)
        ends (k = kernel − 1) with an old window that starts (kernel − 1)·dilation·jump later.

    The three recurrences below are this, read off.
    """
    return axis._replace(
        jump=stride * axis.jump,                       # every second unit only: twice as far apart
        size=axis.size + (kernel - 1) * dilation * axis.jump,   # a 3×3 adds 2 at jump 1, 8 at 4
        first=axis.first - padding * axis.jump)        # unit 0 begins in the padding

def union(axes: list[Axis]) -> Axis:
    """Where branches are added, multiplied or concatenated: the smallest window around theirs."""
    if len({axis.jump for axis in axes}) > 1:          # one is global, or unit 5 is not the same
        return axes[0]._replace(**GLOBAL)              # place in all of them
    first = min(axis.first for axis in axes)           # the earliest start to the latest end
    return axes[0]._replace(first=first, size=max(a.first + a.size for a in axes) - first)

# ---- Following the two axes through any network -----------------------------------------------
# Windows are known of convolutions and poolings only. What any other call does to the two axes, one
# experiment shows, for permute, reshape, a norm, attention, or a function of your own alike: put
# ink on a few rows of its input, and look where the stains are in its result. The ink is NaN, for
# nothing washes it out: 0·NaN and NaN − NaN are NaN, too. Light would be worse: weights of both
# signs cancel it, a brighter neighbour hides it from a max pooling, rounding errors look like it.
# One batch does it all: image 0 has ink on some rows, image 1 on some columns; those after them
# (of small images only) are for the measurement, with ink on a single row or column each.

POOLS = {"max_pool2d": nn.MaxPool2d, "avg_pool2d": nn.AvgPool2d}

def windows_of(kind: str, layer: nn.Module, settings: tuple, named: dict) -> list[list[int]]:
    """[kernel, stride, padding, dilation] for height and for width; [] if nothing slides."""
    if kind in POOLS:
        layer = POOLS[kind](*settings, **named)        # F.max_pool2d(x, 2) is nn.MaxPool2d(2) of x
    elif kind != "conv2d" or not isinstance(layer, nn.Conv2d):
        return []
    dilation, padding = getattr(layer, "dilation", 1), layer.padding
    if isinstance(padding, str):                       # "same": an odd pixel goes to the far end
        sizes = zip(layer.kernel_size, dilation)       # "valid": 0
        padding = [(k - 1) * d // 2 * (padding == "same") for k, d in sizes]
    return torch.stack([torch.tensor(setting).expand(2) for setting in (       # 3 means 3×3
        layer.kernel_size, layer.stride, padding, dilation)], 1).tolist()

def ink(shape: tuple, axes: list[Axis]) -> Tensor:
    """Two clean images of this shape, with ink on rows of the first and columns of the second."""
    images = torch.zeros(2, *shape, dtype=torch.float64)         # float32 convolutions may smear it
    for image, axis in zip(images, axes):
        if axis.dim:                                   # an image has no N: one dimension less
            # Unevenly spaced, and up to both ends, so that a flip, a step or a partition shows. The
            # last line stays clean: when all lines of a result are stained, that means global.
            n = shape[axis.dim - 1]
            lines = sorted({0, 1, 3, n - 2} & set(range(max(1, n - 1))))
            image.index_fill_(axis.dim - 1, torch.tensor(lines), math.nan)
    return images

def follow(result: Tensor, inputs: list[Tensor]) -> list[Axis]:
    """What the units of a result see, from where the ink of the inputs has gone.

    Lines of one dimension are stained as they were in the input: there the axis is now. Anything
    else counts as global, and often is: behind an average, attention, or group norm, whose mean
    and variance come from the whole map, each number depends on all lines.
    """
    axes = []
    for i, stains in enumerate(result[:2].isnan()):    # height, then width
        axis = union([x.axes[i] for x in inputs])
        place = axis._replace(**GLOBAL, dim=i + 2 if result.dim() == 4 else None)
        if axis.jump:
            inked = inputs[0][i].isnan().nonzero()[:, axis.dim - 1].unique()
            for dim, lines in enumerate(stains.nonzero().T, 1):
                lines = lines.unique()                 # of this dimension, those with any stain
                if torch.equal(lines - lines[:1], inked) and len(lines) < result.shape[dim]:
                    # F.pad moves all lines on: unit 0 is new, and lies before the old unit 0.
                    place = axis._replace(first=axis.first - int(lines[0]) * axis.jump, dim=dim)
        axes.append(place)                             # found, or global
    return axes

def measure(result: Tensor, axes: list[Axis]) -> str:
    """The most rows and columns that a unit was found to see, and the sign: are they its window's?
    The images of `result` from the third on are those of walk(), with ink on one line of each."""
    if len(result) != 2 + sum(axis.pixels for axis in axes):
        return ""                                      # too large to measure, or N is not in front
    most, more, fewer = [], False, False               # more, or fewer, than their windows have
    for axis, stains in zip(axes, result[2:].isnan().split([axis.pixels for axis in axes])):
        stains = stains.movedim(axis.dim, 1) if axis.dim else stains.unsqueeze(1)    # a vector: one
        # pixels×units×the rest: a unit has noticed what any channel of any unit of its row has.
        seen = stains.reshape(*stains.shape[:2], -1).any(2).T             # units×pixels
        pixels = torch.arange(axis.pixels)             # the border cuts off what lies outside
        starts = axis.first + axis.jump * torch.arange(len(seen))[:, None]
        window = (pixels >= starts) & (pixels < starts + axis.size) | (axis.jump == 0)
        more, fewer = more or (seen & ~window).any(), fewer or (window & ~seen).any()
        most.append(int(seen.sum(1).max()))
    return f"{both(most)} {'!' if more else '<' if fewer else '='}"

# Row: a line of the table. name: place and kind; shape: C×H×W, or a vector's length; axes: height
# and width; measured: what measure() says; multiply_adds: for one image.
Row = namedtuple("Row", "name shape windows axes measured parameters multiply_adds")

class Follower(TorchFunctionMode):
    """While it is active, every function of torch that the network calls comes here to be run. A
    tensor carries along what its units see, as its attribute `axes`."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.rows, self.inputs, self.windows, self.kind, self.counted = [], [], [], "", set()
        self.path = [("", net)]                        # the layers at work, the innermost last

    def place(self) -> str:
        """The layer at work and its type. In a module with layers inside, such as a whole network,
        the function at work, if one is: "0.1 BatchNorm2d", or "layer1 add"."""
        name, layer = self.path[-1]
        return f"{name} {list(layer.children()) and self.kind or type(layer).__name__}".strip()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given, kwargs = [], kwargs or {}
        map_aggregate((args, kwargs), given.append)    # tensors in lists, too
        self.counted.update(x for x in given if isinstance(x, nn.Parameter))    # each once
        inputs, kind = [x for x in given if hasattr(x, "axes")], getattr(func, "__name__", "")
        if not inputs or kind.startswith("new_") or kind.endswith("_like"):    # nothing of an image
            return func(*args, **kwargs)
        self.kind, self.inputs = kind, inputs
        self.windows = windows_of(self.kind, self.path[-1][1], args[1:], kwargs)
        self.cost = kind in ("conv2d", "linear") and [*args, kwargs.get("weight")][1][0].numel()
        value = func(*args, **kwargs)
        if not isinstance(value, torch.Size):          # it would come back as a plain tuple
            value = map_aggregate(value, self.see)
        self.kind = ""                                 # an error from here on is not this call's
        return value

    def see(self, result):
        """Put fresh ink on a result, note what its units see, add a row if there is news."""
        if not (isinstance(result, Tensor) and result.dim() and len(result) > 1):
            return result
        before, out = self.inputs[0], tuple(result.shape[1:])
        if before.dim() == 4 and len(out) < 2 and len(result) != len(before):
            raise ValueError("mixes the images: torch.flatten(x, 1)?")
        moved = before.axes[0].dim == 1                # by a permute: the windows slide elsewhere
        axes = [slide(axis, *self.windows[axis.dim - before.dim()]) if axis.dim else axis for axis
                in before.axes] if self.windows and not moved else follow(result, self.inputs)
        if result.is_floating_point():                 # the images of the measurement stay inked
            result = torch.cat([ink(out, axes), result[2:]])
        result.axes = axes                             # for the calls that get this result
        parameters = sum(p.numel() for p in self.counted) - sum(row.parameters for row in self.rows)
        # News: a window, products, parameters, or another shape or view than the row before.
        if self.windows or self.cost or parameters or not self.rows or (out, axes) != (
                self.rows[-1].shape, self.rows[-1].axes):
            self.rows.append(Row(self.place(), out, self.windows, axes, measure(result, axes),
                                 parameters, self.cost * math.prod(out)))      # cost: of one unit
        return result

def walk(net: nn.Module, input_shape: tuple) -> list[Row]:
    """Follow images of shape C×H×W through a copy of the network; return a Row for each layer.
    Raises UserError for the first that fails: place, reason, remedy; with the `rows` before it."""
    follower = Follower(net)
    try:
        _, height, width = input_shape
        net = copy.deepcopy(net).cpu().double().eval()     # eval: dropout, batch norm stand still
        for name, layer in net.named_modules():        # an error leaves its layer on the path
            layer.register_forward_pre_hook(
                lambda layer, _, name=name: follower.path.append((name, layer)))
            layer.register_forward_hook(lambda *_: follower.path.pop() and None)
        axes = [Axis(1, 1, 0, height, 2), Axis(1, 1, 0, width, 3)]       # a pixel sees itself
        images = ink(input_shape, axes)                # two, to follow the axes
        if height + width <= 128:                      # and to measure; 224×224 would take minutes
            # Windows are rectangles, so their rows and columns can be found apart, with few images:
            # in image y row y is ink, in image H + x column x. Their ink stays from end to end.
            probes = torch.zeros(height + width, *input_shape)
            y, x = torch.arange(height), torch.arange(width)
            probes[y, :, y] = probes[height + x, :, :, x] = math.nan
            images = torch.cat([images, probes])
        images.axes = axes
        with torch.no_grad(), follower:                # one ordinary forward pass, watched
            net(images)
    except Exception as error:                         # PyTorch refuses with many types of it
        problem = UserError(f"{follower.place()} {diagnose(error, follower)}")
        problem.rows = follower.rows                   # what was understood before the error
        raise problem
    return follower.rows

def times(numbers) -> str:
    return "x".join(map(str, numbers))

def both(numbers) -> str:
    """Height x width, or one number where they agree."""
    return times(numbers) if len(set(numbers)) > 1 else str(numbers[0])

def explain(net: nn.Module, input_shape: tuple) -> str | None:
    """Print the table and the totals for images of shape C×H×W, or H×W: one channel. If the network
    cannot take them, print the table up to there, then print on stderr, and return, the reason."""
    try:
        rows, problem = walk(net, (1, *input_shape)[-3:]), None
    except UserError as error:
        rows, problem = error.rows, str(error)
    lines = ["layer output window jump RF first measured parameters multiply-adds".split()]
    for row in rows:
        jump, size, first, _, _ = map(both, zip(*row.axes))
        window = " ".join(letter + both(pair) for letter, pair in zip("kspd", zip(*row.windows))
                          if letter != "d" or pair != (1, 1))
        field = (jump, size, first) if all(axis.jump for axis in row.axes) else ("", "global", "")
        lines.append((row.name, times(row.shape), window, *field, row.measured,
                      f"{row.parameters:,}", f"{row.multiply_adds:,}"))
    widths = [max(map(len, column)) for column in zip(*lines)]       # of the longest cell
    for line in lines:                                 # text to the left, numbers to the right
        print(*(f"{cell:{side}{n}}" for cell, side, n in zip(line, "<<<>>>>>>", widths)), sep="  ")
    if problem:
        print(f"error: {problem}", file=sys.stderr)
    else:       # Some papers count these as FLOPs, others count each one twice.
        print(f"\n{sum(row.parameters for row in rows):,} parameters, "
              f"{sum(row.multiply_adds for row in rows):,} multiply-adds an image.")
    return problem

# ---- The shape debugger -----------------------------------------------------------------------

def diagnose(error: Exception, follower: Follower) -> str:
    """What a layer wanted in place of what it got, and a remedy."""
    layer, inputs, said = follower.path[-1][1], follower.inputs, f"fails: {reason(error)}"
    shape = tuple(inputs[0].shape[1:]) if inputs else ()         # C×H×W, or the vector's length
    if not shape:                                      # before the first call, or a number an image
        return said
    # First the number of dimensions: with that wrong, no number of channels would help.
    dims = [axis.dim for axis in inputs[0].axes]       # [1, 2]: C is the last one, so Linear fits
    if isinstance(layer, nn.Linear) and len(shape) == 3 and dims != [1, 2]:
        return f"wants numbers in a row, got the map {times(shape)}: put nn.Flatten() before it"
    if type(layer).__name__.endswith("2d") and len(shape) == 1:     # convolution, batch norm, pool
        return f"wants a map, got {shape[0]} numbers in a row: put it before nn.Flatten()"
    for setting, dim in ("in_features", -1), ("in_channels", 0), ("num_features", 0), ("side", -1):
        if (has := getattr(layer, setting, shape[dim])) != shape[dim]:
            return f"has {setting}={has}, got {times(shape)}. Write {setting}={shape[dim]}"
    if follower.kind and follower.windows:             # with dilation, a 3×3 window is larger
        return f"does not fit a {times(shape[1:])} map: pool less, or take a larger image ({said})"
    if follower.kind and len(inputs) > 1:
        return (f"cannot join {' and '.join(times(x.shape[1:]) for x in inputs)}: give the "
                "branches the same padding and strides, and for a sum the same channels")
    return said

def check_network(net: nn.Module, images: Tensor, classes=10) -> None:
    """Before a training: does the network take images N×C×H×W, and does it return logits? If not,
    raises UserError with the reason and the remedy. Leaves the network in eval mode."""
    try:
        with torch.no_grad(), torch.random.fork_rng([images.device] * images.is_cuda):
            # In eval mode no dropout is drawn and no running mean moves: the training that follows
            # is the same, to the bit, as without this look. (Lazy layers are sized here, and draw
            # weights: hence fork_rng.)
            logits = net.eval()(images)
    except Exception as error:
        walk(net, tuple(images.shape[1:]))             # its error says where, why, and what helps
        raise UserError(f"the network fails on images {times(images.shape[1:])}: {reason(error)}")
    if not isinstance(logits, Tensor):                 # such as (logits, features)
        raise UserError(f"the network returns a {type(logits).__name__}: return the logits only")
    if logits.shape != (len(images), classes):
        got, flat = times(logits.shape[1:]), math.prod(logits.shape[1:]) == classes
        raise UserError(f"the network returns {got} an image, not {classes} logits: " + (
            "add nn.Flatten() at its end" if flat else f"its last layer must give {classes}"))
    if (logits >= 0).all() and (logits.sum(1) - 1).abs().max() < 1e-3:       # a distribution
        raise UserError("the network ends in softmax, and cross-entropy applies softmax itself: "
                        "remove the first")

# ---- The effective receptive field ------------------------------------------------------------

def effective_field(net: nn.Module, images: Tensor, layer: str) -> Tensor:
    """H×W, of sum 1: how much the centre unit of a layer's map changes with each pixel.

    |d unit / d pixel|, the unit summed over its channels, averaged over images N×C×H×W. Luo et al.
    (2016) find it roughly a Gaussian: most of the window hardly counts.
    """
    # backward() does not care whose gradient it is: here the pixels', not the weights'.
    images, maps = images.clone().requires_grad_(), []
    hook = net.get_submodule(layer).register_forward_hook(lambda *call: maps.append(call[2]))
    net.eval()(images)
    hook.remove()                                      # maps[0] is what the layer returned
    centre = maps[0][:, :, maps[0].shape[2] // 2, maps[0].shape[3] // 2]      # N×C: one unit
    mass = torch.autograd.grad(centre.sum(), images)[0].abs().sum(1).mean(0)       # N×C×H×W to H×W
    return mass / mass.sum()

def draw_fields(nets: dict, shape: tuple, path) -> None:
    """Print and draw the effective field of each {title: network} for noise of shape C×H×W."""
    convs = [row.name for row in walk(nets["fresh"], shape)
             if row.name.endswith("Conv2d") and row.axes[0].jump]
    if not convs:
        raise UserError("--erf: the network has no convolution whose window is known")
    # With mean 0 and deviation 1, as normalized images have; a million numbers in all.
    images, tiles, captions = torch.randn(1 + 10**6 // math.prod(shape), *shape), [], []
    for title, net in nets.items():
        mass = effective_field(net, images, convs[-1].split()[0])
        half = int((mass.flatten().sort(descending=True).values.cumsum(0) < 0.5).sum()) + 1
        captions.append(f"{title}: half of the gradient in {half} of {mass.numel()} pixels")
        tiles.append(heat(mass))
    gallery(tiles, captions, path, columns=2, zoom=14, title=f"What moves a unit of {convs[-1]}")
    print(*captions, f"picture: {path}", sep="\n")

# ---- Command line -----------------------------------------------------------------------------

def slips() -> str:
    """A Markdown table: what the course notes print, and what their layers give."""
    n1, n2, n3 = (f"{count_parameters(build(name)):,}" for name in ("n1", "n2", "n3-original"))
    last = [row for row in walk(build("n2"), (1, 28, 28)) if row.windows][-1]
    return ("| network | figure | printed | computed |\n| --- | --- | --- | --- |\n"
            f"| N1 | parameters | 18,746 | {n1} |\n| N2 | parameters | 19,418 and 19,300 | {n2} |\n"
            f"| N2 | receptive field of the last convolution | 18 | {last.axes[0].size} |\n"
            f"| N3, original | parameters | about 2.3M | {n3} |")

def shape(text: str) -> tuple[int, ...]:
    """"1x28x28" -> (1, 28, 28). What int() refuses, argparse reports."""
    return tuple(map(int, text.split("x")))

def main() -> None:
    parser = Parser(prog="rf.py", description="Receptive fields, computed and measured.")
    add, either = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    either("--model", choices=INPUT_SHAPES, default="default", help="a network of model.py")
    either("--torchvision", metavar="NAME", help="a network of torchvision, with random weights")
    either("--run", metavar="FOLDER", type=user_path, help="a trained one: draw its field, too")
    add("--input", metavar="CxHxW", type=shape, help="another image size, such as 1x20x20")
    add("--erf", action="store_true", help="draw the effective receptive field of a fresh network")
    add("--out", type=user_path, default="rf.png", help="the picture of --erf")
    add("--slips", action="store_true", help="the figures of the notes, corrected")
    args = parser.parse_args()
    if args.slips:
        return print(slips())
    config, trained = {"model": args.model, "options": {}}, {}
    if args.run:                                       # beside it, a fresh one of the same kind
        trained["trained"], config = load_run(args.run)
    torch.manual_seed(0)                               # the same fresh network each time
    net, size = build(config["model"], **config["options"]), INPUT_SHAPES[config["model"]]
    if args.torchvision:
        from torchvision import models                 # takes a second: only where it is needed
        if args.torchvision not in models.list_models(models):
            raise UserError(f"torchvision has no {args.torchvision}, but resnet50, vgg16, ...")
        net, size = models.get_model(args.torchvision), (3, 224, 224)
    size = (1, *(args.input or size))[-3:]
    if explain(net, size):
        raise SystemExit(2)
    if args.erf or args.run:
        draw_fields({"fresh": net, **trained}, size, args.out)

if __name__ == "__main__":
    run_command(main)
