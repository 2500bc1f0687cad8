"""Receptive fields, computed and then measured: which pixels of the image can a unit see?

What it teaches: three one-line recurrences give every window of a chain of layers, and where
branches meet, the window around theirs. None of it needs to be believed: put ink on one row or one
column of the image at a time, and look which units get stained.

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
size, "global" where a unit may see the whole image; `first` where unit 0's window starts (negative:
in the padding). `measured` counts the rows, and the columns, that a unit was found to see, at most;
the sign after it compares all units with their windows, as far as the image's border leaves them:
    =  each sees every row and column of its window, and no other
    <  some see fewer: the window is a bound (dilation leaves gaps)
    !  some see more: a formula is wrong
`multiply-adds` are those of convolutions and linear layers, for one image. Layers that change
nothing here (ReLU, dropout, a sum whose first window holds the others) get no row.
"""
import contextlib
import copy
import math
import sys
from collections import namedtuple
from typing import Iterator

from data import NAMES, Parser, UserError, load, normalize, reason, run_command, user_path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode

from analyze import find_run, gallery, heat, load_run, mean_std_of
from model import INPUT_SHAPES, build, count_parameters

# ---- The arithmetic, along one axis -----------------------------------------------------------

# Axis: what the units of a map see of the image along one axis, height or width. Unit i's window
# starts at pixel first + i·jump and is `size` pixels long, as if the image had no border; the image
# has `pixels` of them. `dim` says which dimension of the tensor the axis is: 2 for the height of
# N×C×H×W, None if no place is left. Jump and size 0 mean global: a unit sees what any unit saw.
Axis = namedtuple("Axis", "jump size first pixels dim")


class NotFollowed(UserError):
    """The network may be sound, but what its units see cannot be found out here."""


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
    if any(axis.jump == 0 for axis in axes):           # one global branch, and every unit is global
        return max(axes, key=lambda axis: axis.dim or 0)._replace(jump=0, size=0, first=0)
    if len({axis.jump for axis in axes}) > 1:          # unit 5 is not the same place in all of them
        raise NotFollowed(f"joins branches at jumps of {' and '.join(str(a.jump) for a in axes)}")
    first = min(axis.first for axis in axes)           # the earliest start to the latest end
    return axes[0]._replace(first=first, size=max(a.first + a.size for a in axes) - first)


def covered(axis: Axis, units: int) -> Tensor:
    """units×pixels: which pixels of the image lie in which unit's window?"""
    starts = axis.first + axis.jump * torch.arange(units)[:, None]
    pixels = torch.arange(axis.pixels)                 # the border cuts off what lies outside
    return (pixels >= starts) & (pixels < starts + axis.size) | (axis.jump == 0)


def windows_of(layer: nn.Module | None) -> list[tuple[int, int, int, int]]:
    """(kernel, stride, padding, dilation) for height and for width; [] if nothing slides."""
    if not isinstance(layer, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
        return []
    dilation, padding = getattr(layer, "dilation", 1), layer.padding
    if isinstance(padding, str):                       # "same": an odd pixel goes to the far end
        padding = [(k - 1) * d // 2 * (padding == "same")
                   for k, d in zip(layer.kernel_size, dilation)]
    # A pooling without a stride steps by its own size: its windows lie side by side.
    settings = layer.kernel_size, layer.stride or layer.kernel_size, padding, dilation
    return list(zip(*(torch.tensor(setting).expand(2).tolist() for setting in settings)))


# ---- Following the two axes through any network -----------------------------------------------
# NaN is ink that nothing washes out: whatever is computed from it is NaN, 0·NaN and NaN − NaN, too.
# Light would be worse: weights of both signs cancel it, a brighter neighbour hides it from a max
# pooling, a sigmoid makes 0.5 of darkness, and rounding errors look like faint light.
#
# Windows are known of convolutions and poolings only. What any other call does to the two axes, one
# experiment shows, for permute, reshape, a norm, attention, or a function of your own alike.


def inked_lines(units: int) -> list[int]:
    """Unevenly spaced, so that a flip or a cut shows; one stays clean, or all would look global."""
    return sorted({0, 1, 3, units - 2} & set(range(max(1, units - 1))))


def ink(shape: tuple, axes: list[Axis], dtype: torch.dtype) -> Tensor:
    """Clean images of this shape, with ink on rows of the first and on columns of the second."""
    images = torch.zeros(shape, dtype=dtype)           # shape: 2×C×H×W, or whatever it became
    for image, axis in zip(images, axes):
        if axis.dim:
            image.index_fill_(axis.dim - 1, torch.tensor(inked_lines(shape[axis.dim])), math.nan)
    images.axes = axes                                 # a tensor carries along what its units see
    return images


def follow(result: Tensor, inputs: list[Tensor]) -> list[Axis]:
    """What the units of a result see, from where the ink of the inputs has gone.

    Lines of one dimension are stained as they were in the input: there the axis is now. Everything
    is stained: each number depends on the whole axis, as behind an average, attention, or group
    norm, whose mean and variance come from the whole map. Raises NotFollowed for anything else.
    """
    found = []
    for i, stains in enumerate(result[:2].isnan()):    # height, then width
        axis = union([x.axes[i] for x in inputs])
        place = axis._replace(jump=0, size=0, first=0, dim=None)        # global
        # Where ink was put on the inputs, and where stains are now: the same lines, or all of them?
        asked = next((inked_lines(x.shape[x.axes[i].dim]) for x in inputs if x.axes[i].dim), [])
        if asked and result.dim() > 2 and not stains.all():    # N×C: a vector has no places
            for dim, units in enumerate(stains.shape, 1):
                lines = stains.movedim(dim - 1, 0).reshape(units, -1)  # × all the rest
                there = lines.any(1).nonzero().flatten().tolist()
                shift = max(there, default=0) - asked[-1]              # by F.pad, or x[..., 1:]
                moved = [line + shift for line in asked if line + shift >= 0]
                if there == moved and len(moved) > len(asked) - 2 and torch.equal(
                        lines, lines.any(1, keepdim=True) & lines.any(0)):     # whole lines
                    place = slide(axis, 1, 1, shift, 1)._replace(dim=dim)
            if place.dim is None and axis.jump and result.dim() > 3:   # N×C×tokens: both in one
                raise NotFollowed("is not known here: it moves or mixes places in its own way")
        found.append(place)
    return found


# Row: a line of the table. name: place and kind; shape: C×H×W, or a vector's length; axes: height
# and width, computed; measured: N×h×w, which unit of the h×w map noticed the ink of which of the N
# images of the measurement, in any of its channels; multiply_adds: for one image.
Row = namedtuple("Row", "name shape windows axes measured parameters multiply_adds")


class Follower(TorchFunctionMode):
    """While it is active, every function of torch that the network calls comes here to be run."""

    def __init__(self, net: nn.Module, image: tuple):
        super().__init__()
        self.rows, self.path, self.inputs, self.kind = [], [], [], ""
        self.map, self.counted, self.layer = image, {}, None
        # path: the layers that are now at work, the innermost last. It names each call's place, and
        # an error's: whatever raises, raises while its layer is on top.
        for name, layer in net.named_modules():
            layer.register_forward_pre_hook(lambda layer, _, n=name: self.path.append((n, layer)))
            layer.register_forward_hook(lambda *_: self.path.pop() and None)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kind, kwargs, given = getattr(func, "__name__", ""), kwargs or {}, []
        map_aggregate((args, kwargs), given.append)    # tensors in lists, too
        inputs = [x for x in given if hasattr(x, "axes")]
        self.counted.update((id(p), p) for p in given if isinstance(p, nn.Parameter))    # once each
        if not inputs:                                 # weights among themselves, or numbers
            return func(*args, **kwargs)
        self.kind, self.inputs, self.layer = kind, inputs, self.path[-1][1]      # for diagnose()
        if kind.endswith("_pool2d"):                   # F.max_pool2d(x, 2) is nn.MaxPool2d(2) of x
            pool = "".join(map(str.capitalize, kind.split("_")))
            self.layer = getattr(nn, pool)(*args[1:], **kwargs)
        cost = args[1][0].numel() if kind in ("conv2d", "linear") else 0    # weights of one unit
        value = map_aggregate(func(*args, **kwargs), lambda result: self.see(result, inputs, cost)
                              if isinstance(result, Tensor) and result.dim() else result)
        self.kind = ""                                 # an error from here on is not this call's
        return value

    def see(self, result: Tensor, inputs: list[Tensor], cost: int) -> Tensor:
        """Put fresh ink and what its units see on a result; add a row, if there is news."""
        before, axes, out = inputs[0], inputs[0].axes, tuple(result.shape[1:])
        if len(before) != len(result) and before.dim() != 3:     # attention may swap its axes
            raise UserError(f"turns {len(before)} images into {len(result)}: torch.flatten(x, 1)?")
        windows = windows_of(self.layer) if "2d" in self.kind else []
        # A window is slid only over a map N×C×H×W whose axes are still in their places.
        if windows and [axis.dim or d for d, axis in enumerate(axes, 2)] == [2, 3]:
            axes = [slide(axis, *window) for axis, window in zip(axes, windows)]
        elif self.kind == "linear" and before.dim() - 1 in [axis.dim for axis in axes]:
            raise ValueError("mixes the columns of a map, and fits by luck")
        else:
            axes = follow(result, inputs)
        if any(axis.dim for axis in axes):             # the images of the measurement stay inked
            result = torch.cat([ink((2, *out), axes, before.dtype), result[2:]])
        result.axes, self.map = axes, out if len(out) == 3 else self.map
        name, layer = self.path[-1]                    # "0.1 BatchNorm2d", or "layer1 add"
        row = Row(f"{name} {self.kind_of(layer)}".strip(), out, windows, axes,
                  noticed(result) if len(result) == len(before) > 2 else None,
                  sum(p.numel() for p in self.counted.values())
                  - sum(row.parameters for row in self.rows), cost * math.prod(out))
        # News: a window, products, parameters, or another shape or view than the row before.
        if windows or cost or row.parameters or not self.rows or (out, axes) != (
                self.rows[-1].shape, self.rows[-1].axes):
            self.rows.append(row)
        return result

    def kind_of(self, layer: nn.Module) -> str:
        """The type of a layer, that is, of a module that has none inside; in any other module, such
        as a whole network, the function at work, if one is."""
        inner = layer is not self.path[0][1] and next(layer.children(), None) is None
        return type(layer).__name__ if inner or not self.kind else self.kind


def walk(net: nn.Module, input_shape: tuple, probe: Tensor | None = None) -> Iterator[Row]:
    """Follow images of shape C×H×W through a copy of the network; yield a Row for each layer.

    `probe`: N more images, whose ink stays from end to end: the measurement. Raises UserError at
    the first layer that fails, with its place, the reason and the remedy, and NotFollowed at the
    first call that is not known.
    """
    try:
        net = copy.deepcopy(net).cpu().eval()          # eval: dropout and batch norm stand still
    except Exception as error:                         # lazy batch norm, for one
        raise NotFollowed(f"{type(net).__name__} cannot be copied: {reason(error)}")
    follower, problem = Follower(net, input_shape), None
    axes = [Axis(1, 1, 0, n, dim) for dim, n in enumerate(input_shape[1:], 2)]
    images = ink((2, *input_shape), axes, torch.float32)         # a pixel sees itself
    if probe is not None:                              # in float64: float32 may go through faster
        net.double()                                   # algorithms, which smear the ink
        images = torch.cat([images.double(), probe])
    images.axes = axes
    try:
        with torch.no_grad(), follower:                # one ordinary forward pass, watched
            net(images)
    except Exception as error:                         # PyTorch refuses with many types of it
        name, layer = follower.path[-1]
        kind = NotFollowed if isinstance(error, NotFollowed) else UserError
        problem = kind(f"{name} {follower.kind_of(layer)} {diagnose(error, follower)}".strip())
    yield from follower.rows                           # what was understood before the error
    if problem:
        raise problem


# ---- The measurement --------------------------------------------------------------------------


def probes(shape: tuple, each_pixel=False) -> Tensor:
    """(H+W)×C×H×W images: in image y row y is ink, in image H + x column x. Windows are rectangles,
    so their rows and their columns can be found apart, with few images. Where branches meet that is
    not quite so: with `each_pixel` there are H·W images, each with one pixel of ink."""
    _, height, width = shape                           # masks: images×H×W, True where ink is
    rows, columns = torch.eye(height).bool()[:, :, None], torch.eye(width).bool()[:, None]
    masks = (rows[:, None] & columns).flatten(0, 1) if each_pixel else torch.cat(
        [rows.expand(-1, -1, width), columns.expand(-1, height, -1)])
    return torch.zeros(len(masks), *shape).double().masked_fill(masks[:, None], math.nan)


def noticed(result: Tensor) -> Tensor:
    """N×h×w: which unit of the h×w map noticed the ink of which image, in any of its channels?"""
    # Height and width to the front, whatever else there is flattened behind them: a unit is all its
    # channels together, and has noticed what any of them has.
    dims = [axis.dim for axis in result.axes if axis.dim]
    stains = result[2:].isnan()[..., None].movedim(dims, list(range(1, len(dims) + 1)))
    units = [result.shape[axis.dim] if axis.dim else 1 for axis in result.axes]
    return stains.flatten(1 + len(dims)).any(-1).reshape(-1, *units)


# ---- The shape debugger -----------------------------------------------------------------------


def times(numbers) -> str:
    return "x".join(map(str, numbers))


def diagnose(error: Exception, follower: Follower) -> str:
    """What a layer wanted in place of what it got, and a remedy."""
    layer, inputs, area = follower.path[-1][1], follower.inputs, follower.map
    shape, kind = tuple(inputs[0].shape[1:]) if inputs else (), type(layer).__name__
    got, count = times(shape), shape[-1 if kind == "Linear" else 0] if shape else 1
    settings = "in_features", "in_channels", "num_features", "num_channels"
    setting = next((name for name in settings if hasattr(layer, name)), "")
    wants = getattr(layer, setting, count)
    windows = windows_of(follower.layer) if len(shape) == 3 and follower.kind.endswith("2d") else []
    reach = [(kernel - 1) * dilation + 1 for kernel, _, _, dilation in windows]
    room = [n + 2 * padding for n, (_, _, padding, _) in zip(shape[1:], windows)]
    if isinstance(error, UserError):                            # it is an explanation already
        return str(error)
    # First the number of dimensions: with that wrong, no number of channels would help.
    if kind == "Linear" and not shape:                          # averaged over the channels, too
        return f"wants {wants} features, got one number an image: average with x.mean((2, 3))"
    if kind == "Linear" and inputs[0].dim() - 1 in [axis.dim for axis in inputs[0].axes]:
        return f"wants numbers in a row, got the map {got}: put nn.Flatten() before it"
    if kind.endswith("2d") and len(shape) == 1:                 # Conv2d, BatchNorm2d, MaxPool2d
        return f"wants a map, got {got} numbers in a row: put it before nn.Flatten()"
    if kind == "BatchNorm1d" and len(shape) == 3:
        return f"wants numbers in a row, got the map {got}: write nn.BatchNorm2d({count})"
    if wants != count:                                          # channels or features
        side = math.isqrt(wants // area[0])
        if kind == "Linear" and count == math.prod(area):       # the vector is the latest map, flat
            got += f" = {times(area)}" + f": the map is {times(area[1:])}, not {side}x{side}" * (
                wants == area[0] * side ** 2)
        return f"wants {wants} {setting.split('_')[1]}, got {got}. Write {setting}={count}"
    if any(r > n for r, n in zip(reach, room)):                 # with dilation a 3×3 reaches 5
        return (f"has a {times(reach)} window, but the map is {times(shape[1:])}, with padding "
                f"{times(room)}: pool less, or take a larger image")
    if len(inputs) > 1 and follower.kind:
        shapes = " and ".join(times(x.shape[1:]) for x in inputs)
        return (f"cannot join {shapes}: give the branches the same padding and strides, and for a "
                "sum the same channels")
    return f"fails: {reason(error)}"


def check_network(net: nn.Module, images: Tensor, classes=10) -> None:
    """Before a training: does the network take images N×C×H×W, and does it return logits? If not,
    raises UserError with the reason and the remedy. Leaves the network and its mode as they are."""
    problem = ""
    try:
        with torch.no_grad(), torch.random.fork_rng([images.device] * images.is_cuda):
            # Of a copy, in eval mode: no dropout is drawn, no running mean moves, the training that
            # follows is the same, to the bit, as without this look.
            logits = copy.deepcopy(net).eval()(images)
        if not isinstance(logits, Tensor):
            problem = f"returns a {type(logits).__name__}: return the logits only"
        elif any(map(nn.parameter.is_lazy, net.parameters())):
            problem = "has a lazy layer: write the sizes that rf.py prints"
        elif logits.shape != (len(images), classes):
            problem = f"returns {times(logits.shape[1:])} an image, not {classes} logits: " + (
                "add nn.Flatten() at its end" if logits[0].numel() == classes
                else f"its last layer must give {classes}")
        elif not logits.isfinite().all():
            problem = "returns numbers that are not finite"
        elif (logits >= 0).all() and (logits.sum(1) - 1).abs().max() < 1e-3:     # a distribution
            problem = "ends in softmax, and cross-entropy applies softmax itself: remove the first"
    except Exception as error:
        with contextlib.suppress(NotFollowed):                   # then its own message must do
            list(walk(net, tuple(images.shape[1:])))             # the debugger says where and why
        problem = f"fails on images of {times(images.shape[1:])}: {reason(error)}"
    if problem:
        raise UserError(f"the network {problem}")


# ---- The table --------------------------------------------------------------------------------

AFFORDABLE = 2e10     # multiply-adds of all probes: seconds. ResNet-50 at 224×224 would need 2e12.


def both(numbers) -> str:
    """Height x width, or one number where they agree."""
    return times(numbers) if len(set(numbers)) > 1 else str(numbers[0])


def verdict(row: Row) -> str:
    """The most rows and columns that a unit was found to see, and: are they its window's?"""
    if row.measured is None:
        return ""
    height = row.axes[0].pixels                        # images 0 to H - 1 had ink on a row
    found = [row.measured[:height].any(2).T, row.measured[height:].any(1).T]     # units×pixels
    windows = [covered(axis, len(seen)) for axis, seen in zip(row.axes, found)]
    # Compared one by one: every unit, also at the border, with every row and column of pixels.
    sign = ("=" if all(map(torch.equal, found, windows)) else
            "!" if any((seen & ~window).any() for seen, window in zip(found, windows)) else "<")
    return f"{both([int(seen.sum(1).max()) for seen in found])} {sign}"


def table(rows: list[Row]) -> str:
    """The rows in aligned columns."""
    lines = ["layer output window jump RF first measured parameters multiply-adds".split()]
    for row in rows:
        jump, size, first, _, _ = map(both, zip(*row.axes))
        window = " ".join(letter + both(pair) for letter, pair in zip("kspd", zip(*row.windows))
                          if letter != "d" or pair != (1, 1))
        field = (jump, size, first) if all(axis.jump for axis in row.axes) else ("", "global", "")
        lines.append((row.name, times(row.shape), window, *field,
                      verdict(row), f"{row.parameters:,}", f"{row.multiply_adds:,}"))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(n) if i < 3 else cell.rjust(n)      # text left, numbers
                               for i, (cell, n) in enumerate(zip(line, widths)))    # right
                     for line in lines)


def last_map(rows: list[Row]) -> Row | None:
    """The last layer whose units still have a place of their own in the image."""
    return next((row for row in reversed(rows) if all(axis.jump for axis in row.axes)), None)


def explain(net: nn.Module, input_shape: tuple) -> str | None:
    """Print the table and the totals for images of shape C×H×W, or H×W: one channel. If the network
    cannot take them, print the table up to there, then print on stderr, and return, the reason."""
    shape, rows = (1, *input_shape)[-3:], []
    try:
        for row in walk(net, shape):
            rows.append(row)                           # those before the one that fails, too
    except UserError as error:
        print(table(rows), flush=True)
        print(f"error: {error}", file=sys.stderr)
        return str(error)
    # Each product is two operations; "FLOPs" in papers are sometimes the one, sometimes the other.
    work, parameters = sum(row.multiply_adds for row in rows), sum(row.parameters for row in rows)
    if work * sum(shape[1:]) < AFFORDABLE:             # H + W images to measure with
        rows = list(walk(net, shape, probes(shape)))
    print(f"{table(rows)}\n\n{parameters:,} parameters, {work:,} multiply-adds an image.")
    spare = sum(p.numel() for p in net.parameters() if not nn.parameter.is_lazy(p)) - parameters
    if spare > 0:                                      # such as the heads that helped to train it
        print(f"note: {spare:,} parameters more are in layers that are not called here.")
    last, pixels = last_map(rows), math.prod(shape[1:])
    if last:
        seen = window = math.prod(min(axis.size, axis.pixels) for axis in last.axes)
        if work * pixels < AFFORDABLE / 20:            # small: ink each pixel alone, and count
            seen = int(last_map(list(walk(net, shape, probes(shape, True)))).measured.sum(0).max())
        print(f"A unit of the last local map, {last.name} {times(last.shape)}, sees at most {seen} "
              f"of {pixels} pixels{f': its window of {window} is a bound' * (seen < window)}.")


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
    hook.remove()
    centre = maps[0][:, :, maps[0].shape[2] // 2, maps[0].shape[3] // 2]      # N×C: one unit
    mass = torch.autograd.grad(centre.sum(), images)[0].abs().sum(1).mean(0)
    return mass / mass.sum()


def draw_fields(nets: dict, images: Tensor, path) -> None:
    """Print and draw the effective field of each {title: (network, mean, std)} for uint8 images."""
    last = last_map([row for row in walk(nets["fresh"][0], images.shape[1:]) if row.windows])
    (top, height), (left, width) = ((axis.first + units // 2 * axis.jump, axis.size)
                                    for axis, units in zip(last.axes, last.shape[1:]))
    # Squares around the window's centre: how large is the one that holds half of the gradient?
    y, x = ((torch.arange(n) - start - (size - 1) / 2).abs() for n, start, size in zip(
        images.shape[2:], (top, left), (height, width)))
    side = 2 * torch.maximum(y[:, None], x) + 1        # H×W: of the square that just holds a pixel
    window = left, top, left + width, top + height     # the pictures show the window and no more
    tiles = [Image.fromarray(images[0].movedim(0, 2).squeeze(2).numpy()).crop(window)]
    captions = [f"an image, in the computed\nwindow of {height}x{width} pixels"]
    for title, (net, mean, std) in nets.items():
        mass = effective_field(net, normalize(images, mean, std), last.name.split()[0])
        half, most = (next(int(s) for s in side.unique() if mass[side <= s].sum() >= share)
                      for share in (0.5, 0.95))
        tiles.append(heat(mass).crop(window))
        captions.append(f"{title}: half of the gradient in\n{half}x{half} pixels, "
                        f"95% in {most}x{most}")
        print(captions[-1].replace("\n", " "))
    gallery(tiles, captions, path, columns=3, zoom=8, title=f"What moves a unit of {last.name}")
    print(f"picture: {path}")


# ---- Command line -----------------------------------------------------------------------------


def slips() -> str:
    """A Markdown table: what the course notes print, and what their layers give."""
    n1, n2, n3 = (f"{count_parameters(build(name)):,}" for name in ("n1", "n2", "n3-original"))
    last = [row for row in walk(build("n2"), (1, 28, 28)) if "Conv2d" in row.name][-1]
    return ("| network | figure | printed | computed |\n| --- | --- | --- | --- |\n"
            f"| N1 | parameters | 18,746 | {n1} |\n| N2 | parameters | 19,418 and 19,300 | {n2} |\n"
            f"| N2 | receptive field of the last convolution | 18 | {last.axes[0].size} |\n"
            f"| N3, original | parameters | about 2.3M | {n3} |")


def parse_shape(text: str) -> tuple[int, ...]:
    """"1x28x28" -> (1, 28, 28). Raises UserError."""
    sizes = tuple(int(n) for n in text.split("x") if n.isdecimal() and 0 < int(n) <= 2048)
    if len(sizes) != 3 or text.count("x") != 2:
        raise UserError(f"--input {text}: channels x height x width, each 1 to 2048, as in 1x28x28")
    return sizes


def from_torchvision(name: str) -> nn.Module:
    """A classification network of torchvision with random weights. Raises UserError."""
    import torchvision                                 # takes a second: only where it is needed
    if name not in torchvision.models.list_models(torchvision.models):
        raise UserError(f"torchvision has no classifier {name!r}, but resnet50, vgg16 and others")
    slow = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, **slow)


def main() -> None:
    parser = Parser(prog="rf.py", description="Receptive fields, computed and measured.")
    add = parser.add_argument
    add("--model", choices=INPUT_SHAPES, default="default", help="a network of model.py")
    add("--torchvision", metavar="NAME", help="a network of torchvision, with random weights")
    add("--input", metavar="CxHxW", type=parse_shape, help="another image size, such as 1x20x20")
    add("--erf", action="store_true", help="draw the effective receptive field of a fresh network")
    add("--run", metavar="FOLDER", type=user_path, help="the same, beside that of a trained one")
    add("--data", choices=NAMES, default="mnist", help="images for --erf")
    add("--data-dir", type=user_path, default="data", help="where they are kept")
    add("--out", type=user_path, default="rf.png", help="the picture of --erf")
    add("--slips", action="store_true", help="the figures of the notes, corrected")
    args = parser.parse_args()
    if args.slips:
        return print(slips())
    # With --run, the trained network and a fresh one of the same kind, to be compared.
    trained, config = load_run(find_run(args.run)) if args.run else (
        None, {"model": args.model, "options": {}})
    torch.manual_seed(0)                               # the same fresh network each time
    net, shape = build(config["model"], **config["options"]), INPUT_SHAPES[config["model"]]
    if args.torchvision:
        net, shape = from_torchvision(args.torchvision), (3, 224, 224)
    if explain(net, args.input or shape):
        raise SystemExit(2)
    if args.erf or trained:
        digits = load(args.data, args.data_dir)
        images = digits.test[0][:200]
        if args.input or images.shape[1:] != shape:
            raise UserError(f"--erf: {args.data}'s images are {times(images.shape[1:])}")
        draw_fields({"fresh": (net, digits.mean, digits.std)} | (
            {"trained": (trained, *mean_std_of(config))} if trained else {}), images, args.out)


if __name__ == "__main__":
    run_command(main)
