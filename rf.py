"""Receptive fields: which pixels of the image can a unit see?

What it teaches: three formulas give the receptive field of each layer in a chain of convolutions
and poolings. The same formulas then follow any network that torch.fx can trace, branches included.
And because a formula may be wrong, the field is measured, too: put ink on one row of the image and
look which units are stained.

    python rf.py                               the default network of model.py, a row per layer
    python rf.py --model n3                    another of its networks
    python rf.py --torchvision resnet18        a network of torchvision
    python rf.py --model n2 --input 1x20x20    the shape debugger: which layer fails, what helps
    python rf.py --erf                         the effective field: how much each pixel counts
    python rf.py --run runs/001                the same of a trained network, beside a fresh one

    from rf import explain                     the table and the debugger for your own network
    explain(network, (1, 28, 28))

A unit is one position of a layer's map, with all its channels. The columns of the table:

    window      kernel, stride, padding and dilation, where it is not 1
    jump        pixels from the field of one unit to the field of the next
    RF          the size of a unit's receptive field, in pixels
                "global": a unit may see the whole image
                "not followed": rf.py does not know what this operation does to positions
    start       the pixel at which the field of unit 0 begins; negative: in the padding
    measured    for images with height + width up to 128: the most rows that one unit sees (and
                columns, if their number differs), found with ink, and a comparison of all units:
                =  every unit sees all pixels of its field and no others
                <  some units see fewer: a dilated window has gaps
                !  some units see more: a formula is wrong
    multiply-adds    those of 2-D convolutions and linear layers, per image

ReLU, dropout and whatever else changes none of this has no row.
"""
import copy
import math
import sys
from collections import namedtuple

import data as digits

import torch
import torch.fx
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

import model as networks
from analyze import gallery, heat
from data import UserError, reason
from train import build_from, load_run


# ---- The lesson: three recurrences ------------------------------------------------------------
#
# Look at one axis of the image, say its height. Three numbers say what the units of a layer see:
#
#   jump     the distance in pixels from the field of one unit to the field of the next
#   size     the receptive field: how many pixels one unit sees
#   start    the first pixel that unit 0 sees
#
# A pixel sees itself: jump 1, size 1, start 0. Now add a convolution or a pooling with kernel k,
# stride s, padding p and dilation d. Its unit i reads k of the old units. The first of them is old
# unit i·s - p, the others follow at a distance of d units. So:
#
#   jump     The next unit reads s old units further on, which is s·jump pixels.
#   size     The last of the k old units is (k - 1)·d units behind the first, which is
#            (k - 1)·d·jump pixels. It sees another `size` pixels itself.
#   start    Unit 0 begins p old units before old unit 0, which is p·jump pixels.
#
# (Araujo, Norris and Sim, "Computing Receptive Fields of Convolutional Neural Networks", 2019.)

Axis = namedtuple("Axis", "jump size start")

PIXEL = Axis(jump=1, size=1, start=0)


def slide(axis: Axis, kernel: int, stride: int, padding: int, dilation: int) -> Axis:
    """The axis after one more convolution or pooling."""
    jump = axis.jump * stride
    size = axis.size + (kernel - 1) * dilation * axis.jump
    start = axis.start - padding * axis.jump
    return Axis(jump, size, start)


def receptive_fields(chain) -> None:
    """Print the fields of a chain of layers: (name, kernel, stride, padding, dilation) each.

    >>> receptive_fields([("conv1", 3, 1, 1, 1), ("pool", 2, 2, 0, 1), ("conv2", 3, 1, 1, 1)])
    layer        jump    RF  start
    conv1           1     3     -1
    pool            2     4     -1
    conv2           2     8     -3
    """
    print("layer        jump    RF  start")
    axis = PIXEL
    for name, kernel, stride, padding, dilation in chain:
        axis = slide(axis, kernel, stride, padding, dilation)
        print(f"{name:10} {axis.jump:6} {axis.size:5} {axis.start:6}")


# ---- Any network ------------------------------------------------------------------------------
#
# torch.fx calls the network once with a stand-in for the images and writes down every operation:
# a graph. We run its nodes one after the other, and find the field of each value. It is one of
#
#   (height, width)    two axes as above
#   GLOBAL             a unit may see the whole image
#   NOT_FOLLOWED       we do not know what a unit sees
#
# There are four kinds of operations:
#
#   SLIDE        A window slides over the map: convolution and pooling.
#   GATHER       All positions become one: flatten, global pooling. Or (WHOLE_MAP) each position
#                learns about all others: group norm subtracts the mean of the map.
#   STAY         Positions stay where they are: activations, sums, concatenation of channels. Where
#                branches meet, the field is the smallest one around all of theirs.
#   any other    A flip, a slice, attention: not followed, nor is what comes after it.
#                We print no number rather than a wrong one.

GLOBAL = "global"
NOT_FOLLOWED = "not followed"

# All in small letters without "_", so that nn.MaxPool2d and F.max_pool2d have one name.
SLIDE = {"conv2d", "maxpool2d", "avgpool2d"}
GATHER = {"flatten", "view", "reshape", "mean", "adaptiveavgpool2d", "adaptivemaxpool2d"}
WHOLE_MAP = {"groupnorm", "instancenorm2d"}
STAY = {
    "relu", "relu6", "leakyrelu", "prelu", "elu", "selu", "gelu", "silu", "mish", "softplus",
    "sigmoid", "tanh", "hardtanh", "hardsigmoid", "hardswish", "clamp", "batchnorm2d", "dropout",
    "dropout2d", "stochasticdepth", "identity", "contiguous", "clone", "add", "sub", "mul", "div",
    "truediv", "neg", "cat", "adaptiveavgpool2d",       # the last one if it keeps the size
}
SHAPES = {"size", "shape", "dim", "ndim", "numel", "dtype", "device"}   # these hold no pixels

# What a node of the graph does. operation: a name as above; inputs: those tensors it is given that
# depend on the images; settings: its arguments by name.
Call = namedtuple("Call", "place operation inputs settings")

# A row of the table. shape: of the output, per image.
Row = namedtuple("Row", "place shape window field measured parameters multiply_adds")


def field_after(call: Call, fields: list, result):
    """The field of a result, from the fields of the inputs."""
    if NOT_FOLLOWED in fields or not isinstance(result, Tensor):
        return NOT_FOLLOWED
    if GLOBAL in fields or call.operation in WHOLE_MAP:
        return GLOBAL
    if call.operation in GATHER and result.shape[2:].numel() == 1:      # N×C or N×C×1×1
        return GLOBAL
    if call.operation in SLIDE and slides_over_images(call):
        return tuple(map(slide, fields[0], *window_of(call.settings)))  # height, then width
    if call.operation in STAY and positions_stay(call, result):
        return smallest_around(fields)
    return NOT_FOLLOWED


def slides_over_images(call: Call) -> bool:
    """False if the images are the filter, or if the padding is not made of zeros."""
    only_input = len(call.inputs) == 1 and call.inputs[0] is call.settings["input"]
    return only_input and call.settings.get("padding_mode", "zeros") == "zeros"


def positions_stay(call: Call, result: Tensor) -> bool:
    """Do all inputs have the images, the height and the width of the result?"""
    if call.operation == "batchnorm2d" and "running_mean" not in call.settings:
        return False                        # in evaluation, too, it takes the mean of the map
    for tensor in call.inputs:
        if tensor.shape[:1] != result.shape[:1] or tensor.shape[2:] != result.shape[2:]:
            return False
    return True


def writes_in_place(node, place: str) -> bool:
    """Does it change one of its arguments, as add_() and copy_() do? Other nodes may hold it."""
    if "out" in node.kwargs:
        return True
    return node.op in ("call_function", "call_method") and place.endswith("_")


def smallest_around(fields: list):
    """The smallest field around all of these, where branches meet."""
    around = []
    for axes in zip(*fields):               # all heights, then all widths
        jump = axes[0].jump
        start = min(axis.start for axis in axes)
        end = max(axis.start + axis.size for axis in axes)
        if any(axis.jump != jump for axis in axes):
            return NOT_FOLLOWED             # unit 5 is not at the same place in all branches
        around.append(Axis(jump, end - start, start))
    return tuple(around)


# ---- Running the graph ------------------------------------------------------------------------

class Follower(torch.fx.Interpreter):
    """Runs a traced network node by node and collects the rows of the table."""

    def __init__(self, traced, images: Tensor):
        super().__init__(traced)
        self.extra_traceback = False        # torch.fx would add it to the text of an error
        self.images = images
        self.fields = {}                    # of the nodes whose values depend on the images
        self.overwritten = False            # was a tensor changed in place?
        self.counted = set()                # the parameters used so far
        self.new_parameters = 0             # how many numbers of them no row has yet
        self.latest = None                  # shape and field of the last row
        self.rows = []

    def run_node(self, node):
        """Run one node and find its field. torch.fx calls this for each node in turn."""
        self.call = self.describe(node)     # kept for the debugger
        result = super().run_node(node)
        if node.op == "output":
            return result
        if node.op == "placeholder":
            if not self.fields:             # the first argument: the images
                self.fields[node] = (PIXEL, PIXEL)
            return result

        self.count_parameters(node, result)
        if writes_in_place(node, self.call.place):
            self.overwritten = True
        fields = [self.fields[source] for source in self.sources(node)]
        if fields and self.call.operation not in SHAPES:
            field = field_after(self.call, fields, result)
            if self.overwritten:
                field = NOT_FOLLOWED
            self.fields[node] = field
            if isinstance(result, Tensor):
                self.add_row(self.call, field, result)
        return result

    def sources(self, node) -> list:
        """The nodes whose values this one is given, as far as they depend on the images."""
        return [source for source in node.all_input_nodes if source in self.fields]

    def describe(self, node) -> Call:
        """Collect what the functions above want to know about a node."""
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        if node.op == "call_module":
            layer = self.fetch_attr(node.target)
            name = type(layer).__name__.removeprefix("Lazy")
            place = f"{node.target} {name}"
            settings = vars(layer) | dict(layer.named_parameters()) | dict(layer.named_buffers())
        else:
            name = getattr(node.target, "__name__", str(node.target))
            if name == "getattr":
                name = args[1]              # x.shape is getattr(x, "shape")
            place = name
            for path, kind in node.meta.get("nn_module_stack", {}).values():
                place = f"{path} {kind.__name__} {name}"        # the innermost module comes last
            settings = {}
        operation = name.replace("_", "").lower()
        settings = settings | dict(zip(ARGUMENTS.get(operation, ["input"]), args)) | kwargs
        values = [self.env[source] for source in self.sources(node)]
        inputs = [value for value in values if isinstance(value, Tensor)]
        return Call(place, operation, inputs, settings)

    def count_parameters(self, node, result) -> None:
        """Count the parameters that this node is the first to use."""
        parameters = []
        if node.op == "call_module":
            parameters = self.fetch_attr(node.target).parameters()
        elif isinstance(result, nn.Parameter):      # the node fetches self.weight
            parameters = [result]
        for parameter in parameters:
            if parameter not in self.counted:
                self.counted.add(parameter)
                self.new_parameters += parameter.numel()

    def add_row(self, call: Call, field, result: Tensor) -> None:
        """Add a row, if shape or field are new, or if there are parameters or multiply-adds."""
        shape = tuple(result.shape[1:])
        window = None
        if call.operation in SLIDE:
            window = window_of(call.settings)
        multiply_adds = 0
        if call.operation in ("conv2d", "linear"):  # each output number: one per weight
            outputs = result.numel() // len(self.images)
            multiply_adds = outputs * call.settings["weight"][0].numel()
        if self.new_parameters or multiply_adds or (shape, field) != self.latest:
            measured = measure(result, field, self.images)
            self.rows.append(Row(call.place, shape, window, field, measured, self.new_parameters,
                                 multiply_adds))
            self.new_parameters = 0
            self.latest = (shape, field)


def follow(network: nn.Module, input_shape) -> tuple:
    """Send images C×H×W through a copy of the network.

    Returns the rows of the table and None; or the rows up to the layer that fails, and the problem
    in one line.
    """
    if len(input_shape) != 3 or min(input_shape) < 1:
        return [], f"rf.py takes images C×H×W, such as 1x28x28, not {times(input_shape)}"
    _, height, width = input_shape
    if height + width <= 128:
        images = ink(input_shape)
    else:
        images = torch.zeros(2, *input_shape)       # to measure large images would take minutes

    try:
        network = copy.deepcopy(network).cpu().float().eval()
        follower = Follower(torch.fx.symbolic_trace(network), images)
    except Exception as error:                      # of many types
        return [], f"torch.fx cannot copy and trace this network: {reason(error)}"
    try:
        # NNPACK, which some machines use for convolutions, works on blocks and smears the ink.
        with torch.no_grad(), torch.backends.nnpack.flags(enabled=False):
            result = follower.run(images)
    except Exception as error:
        return follower.rows, f"{follower.call.place} {diagnose(follower.call, error)}"

    if isinstance(result, Tensor) and result.dim() == 2 and len(result) != len(images):
        return follower.rows, (f"the network mixes the images: {len(images)} of them give "
                               f"{len(result)} results. Write torch.flatten(x, 1), not view")
    unused = networks.count_parameters(network) - sum(row.parameters for row in follower.rows)
    if unused:
        follower.rows.append(Row("not used", (), None, "", "", unused, 0))
    return follower.rows, None


# ---- The settings of layers and functions -----------------------------------------------------

# The names of the arguments, in the functions' order.
ARGUMENTS = {
    "conv2d": ["input", "weight", "bias", "stride", "padding", "dilation"],
    "maxpool2d": ["input", "kernel_size", "stride", "padding", "dilation"],
    "avgpool2d": ["input", "kernel_size", "stride", "padding"],
    "linear": ["input", "weight"],
}

# Each a pair, for height and width.
Window = namedtuple("Window", "kernel stride padding dilation")


def window_of(settings: dict) -> Window:
    """The window of a convolution or a pooling."""
    if "weight" in settings:                # a convolution
        kernel = pair(settings["weight"].shape[2:])
        stride = settings.get("stride", 1)
    else:
        kernel = pair(settings["kernel_size"])
        stride = settings.get("stride") or kernel
    dilation = pair(settings.get("dilation", 1))
    padding = settings.get("padding", 0)
    if padding == "valid":
        padding = 0
    elif padding == "same":                 # if it is odd, the end gets one pixel more
        padding = [dilation[i] * (kernel[i] - 1) // 2 for i in range(2)]
    return Window(kernel, pair(stride), pair(padding), dilation)


def pair(setting) -> tuple[int, int]:
    """3 means 3×3."""
    if isinstance(setting, int):
        return setting, setting
    return setting[0], setting[-1]


# ---- Ink: what a unit really sees -------------------------------------------------------------
#
# Ink is NaN. A unit that reads it becomes NaN, whatever its weights: 0·NaN is NaN, and so is the
# maximum of NaN and 5. A bright value would not do: negative weights can cancel it, and a maximum
# can ignore it.
#
# Rows and columns can be measured separately: one image for each row
# and one for each column, H + W in all.

def ink(input_shape) -> Tensor:
    """(H + W)×C×H×W: image y has ink in row y, image H + x has ink in column x."""
    channels, height, width = input_shape
    images = torch.zeros(height + width, channels, height, width)
    for y in range(height):
        images[y, :, y, :] = math.nan
    for x in range(width):
        images[height + x, :, :, x] = math.nan
    return images


def measure(result: Tensor, field, images: Tensor) -> str:
    """How many rows and columns a unit sees at most, and how all units compare with the field."""
    height, width = images.shape[2:]
    if height + width != len(images) or field == NOT_FOLLOWED:
        return ""                                   # there is no ink, or nothing to compare with
    if result.dim() not in (2, 4) or len(result) != len(images):
        return ""
    stained = result.isnan()
    rows = stained[:height]                         # pixels × units
    columns = stained[height:]
    if result.dim() == 4:
        rows = rows.any(dim=3).any(dim=1)           # a unit has all channels
        columns = columns.any(dim=2).any(dim=1)

    most = []
    sign = "="
    for i, seen in enumerate([rows.T, columns.T]):  # units × pixels
        inside = torch.ones_like(seen)
        if field != GLOBAL:
            inside = field_pixels(field[i], *seen.shape)
        most.append(int(seen.sum(dim=1).max()))
        if (inside & ~seen).any() and sign == "=":
            sign = "<"
        if (seen & ~inside).any():
            sign = "!"
    return f"{both(most)} {sign}"


def field_pixels(axis: Axis, units: int, pixels: int) -> Tensor:
    """units × pixels: which pixels are in the receptive field of which unit?"""
    start = axis.start + axis.jump * torch.arange(units)[:, None]
    pixel = torch.arange(pixels)
    return (start <= pixel) & (pixel < start + axis.size)


# ---- The table --------------------------------------------------------------------------------

HEADER = ("layer", "output", "window", "jump", "RF", "start", "measured", "parameters",
          "multiply-adds")


def explain(network: nn.Module, input_shape) -> str | None:
    """Print the table and the totals of a network for images of shape C×H×W.

    If the network cannot take them, print the table up to the layer that fails, then the problem
    on stderr, and return it: one line, with what helps.
    """
    rows, problem = follow(network, input_shape)
    if rows:
        print_table([HEADER] + [cells(row) for row in rows])
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem
    parameters = sum(row.parameters for row in rows)
    multiply_adds = sum(row.multiply_adds for row in rows)
    print(f"\n{parameters:,} parameters, {multiply_adds:,} multiply-adds per image in "
          "convolutions and linear layers")
    return None


def print_table(lines: list) -> None:
    width = max(len(line[0]) for line in lines)
    for place, output, window, jump, size, start, measured, parameters, multiply_adds in lines:
        print(f"{place:{width}}  {output:11} {window:14} {jump:>4} {size:>12} {start:>6} "
              f"{measured:>9} {parameters:>11} {multiply_adds:>14}")


def cells(row: Row) -> tuple:
    """A row of the table as texts."""
    window = jump = start = ""
    size = row.field
    if row.window:
        kernel, stride, padding, dilation = row.window
        window = f"k{both(kernel)} s{both(stride)} p{both(padding)}"
        if dilation != (1, 1):
            window += f" d{both(dilation)}"
    if isinstance(row.field, tuple):
        height, width = row.field
        jump = both([height.jump, width.jump])
        size = both([height.size, width.size])
        start = both([height.start, width.start])
    return (row.place, times(row.shape), window, jump, size, start, row.measured,
            f"{row.parameters:,}", f"{row.multiply_adds:,}")


def both(pair) -> str:
    """Height x width, or one number if they agree."""
    if pair[0] == pair[1]:
        return str(pair[0])
    return times(pair)


def times(shape) -> str:
    return "x".join(str(size) for size in shape)


# ---- The shape debugger -----------------------------------------------------------------------

def diagnose(call: Call, error: Exception) -> str:
    """What an operation that failed wanted, what it got, and what helps. One line."""
    said = reason(error)
    if not call.inputs:
        return f"fails: {said}"
    operation = call.operation
    shape = tuple(call.inputs[0].shape[1:])         # per image
    got = times(shape)

    # First the number of axes: where that is wrong, no other number of channels helps.
    if operation[-2:] in ("1d", "3d") and len(shape) == 3:
        return f"does not take maps C×H×W, got {got}: layers for maps end in 2d"
    if operation.endswith("2d") and len(shape) == 1:
        return f"wants a map C×H×W, got {got} numbers in a row: put it before nn.Flatten()"
    if operation == "linear" and len(shape) == 3:
        return f"wants numbers in a row, got the map {got}: put nn.Flatten() before it"

    for name, axis in (("in_features", -1), ("in_channels", 0), ("num_features", 0)):
        wanted = call.settings.get(name, shape[axis])
        if wanted != shape[axis]:
            return f"has {name}={wanted}, got {got}. Write {name}={shape[axis]}"
    if "too small" in said or "can't be greater than actual input size" in said:
        return f"does not fit a {times(shape[1:])} map: pool less, or take a larger image"
    if operation in ("view", "reshape"):
        return f"does not suit {got}: torch.flatten(x, 1) takes any size ({said})"
    if operation in ("add", "sub", "mul", "cat") and len(call.inputs) == 2:
        other = times(call.inputs[1].shape[1:])
        return (f"cannot join {got} and {other}: give both branches the same padding and strides, "
                "and for a sum the same channels")
    return f"fails: {said}"


# ---- The effective receptive field ------------------------------------------------------------
#
# Not every pixel of the field counts as much. The gradient of a unit with respect to the pixels
# says how much the unit changes with each of them. A pixel in the middle reaches the unit on many
# paths through the layers, a pixel at the edge on few: the result is roughly a Gaussian (Luo et
# al., 2016).

def effective_field(network: nn.Module, images: Tensor, layer: str) -> Tensor:
    """|d unit / d pixel| for the centre unit of a layer's map: H×W numbers with the sum 1.

    The value of the unit is the sum of its channels. The result is the mean over the images.
    """
    maps = []

    def keep(module, inputs, output):
        maps.append(output)

    hook = network.get_submodule(layer).register_forward_hook(keep)
    images = images.clone().requires_grad_()
    network.eval()
    network(images)
    hook.remove()

    _, _, height, width = maps[-1].shape
    unit = maps[-1][:, :, height // 2, width // 2]                      # N×C
    gradient = torch.autograd.grad(unit.sum(), images)[0]               # N×C×H×W
    amount = gradient.abs().sum(dim=1).mean(dim=0)                      # H×W
    return amount / amount.sum()


def draw_fields(candidates: dict, inputs: dict, input_shape, path) -> None:
    """Print and draw the effective field of each network on each kind of input, both by name."""
    rows, _ = follow(candidates["fresh"], input_shape)
    known = [row for row in rows if row.place.endswith(" Conv2d") and isinstance(row.field, tuple)]
    if not known:
        raise UserError("--erf: the network has no convolution whose receptive field is known")
    last = known[-1]
    rows = []
    for name, network in candidates.items():
        row = []
        for kind, images in inputs.items():
            amount = effective_field(network, images, last.place.split()[0])
            sums = amount.flatten().sort(descending=True).values.cumsum(dim=0)
            pixels = int((sums < 0.5).sum()) + 1
            result = f"half of the gradient in {pixels} of {amount.numel()} pixels"
            print(f"{name} network, {kind}: {result}")
            row.append((outlined(amount, last), f"{name} network, {kind}:\n{result}"))
        rows.append(row)
    gallery(rows, path, zoom=1,
            title=f"What moves the centre unit of {last.place} (grey: image, blue: receptive field)")
    print(f"picture: {path}")


def outlined(amount: Tensor, row: Row) -> Image.Image:
    """An effective field as a picture, with two outlines: the image, and the receptive field of the
    centre unit, which may reach into the padding."""
    height, width = amount.shape
    across = row.field[1]
    down = row.field[0]
    left = across.start + across.jump * (row.shape[2] // 2)
    top = down.start + down.jump * (row.shape[1] // 2)
    window = [left, top, left + across.size, top + down.size]
    margin = 1 + max(0, -left, -top, window[2] - width, window[3] - height)

    plane = F.pad(amount, [margin] * 4)
    zoom = max(1, 400 // len(plane))
    picture = heat(plane, plane.max()).resize((zoom * plane.shape[1], zoom * plane.shape[0]), Image.NEAREST)
    draw = ImageDraw.Draw(picture)
    for box, colour in (([0, 0, width, height], "#888888"), (window, "#0050ff")):
        draw.rectangle([zoom * (edge + margin) for edge in box], outline=colour, width=2)
    return picture


def make_inputs(input_shape, data_dir) -> dict:
    """Images by name: white noise, and digits for a network that takes them."""
    count = 1 + 10**6 // math.prod(input_shape)     # a million pixels
    inputs = {}
    if input_shape == (1, 28, 28):
        name = "synthetic"                          # these need no files
        if (data_dir / "MNIST").is_dir():
            name = "mnist"
        data = digits.load(name, data_dir)
        inputs[f"{name} digits"] = digits.normalize(data.test[0][:count], data.mean, data.std)
    inputs["white noise"] = torch.randn(count, *input_shape)
    return inputs


# ---- Command line -----------------------------------------------------------------------------

def shape(text: str) -> tuple[int, ...]:
    """A type for argparse: "1x28x28" -> (1, 28, 28)."""
    return tuple(int(size) for size in text.split("x"))


def make_parser() -> digits.Parser:
    parser = digits.Parser(prog="rf.py", description="Receptive fields, computed and measured.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", choices=networks.NETWORKS, default="default",
                       help="a network of model.py")
    which.add_argument("--torchvision", metavar="NAME", help="a network of torchvision, untrained")
    which.add_argument("--run", metavar="FOLDER", type=digits.user_path,
                       help="the trained network of a run: draw its effective field, too")
    parser.add_argument("--input", metavar="CxHxW", type=shape,
                        help="the shape of an image, such as 1x20x20")
    parser.add_argument("--erf", action="store_true", help="draw the effective receptive field")
    parser.add_argument("--out", type=digits.png_path, default="rf.png", help="its picture")
    parser.add_argument("--data-dir", type=digits.user_path, default="data",
                        help="where MNIST is; --erf takes synthetic digits if it is not there")
    return parser


def torchvision_network(name: str) -> nn.Module:
    """One of torchvision's classifiers with random weights."""
    from torchvision import models          # it takes a second, so only where it is needed
    if name not in models.list_models(models):
        raise UserError(f"torchvision has no classifier {name!r}, but resnet18, vgg16 and others")
    return models.get_model(name)


def main() -> None:
    args = make_parser().parse_args()
    torch.manual_seed(0)                    # the same weights and the same noise each time
    candidates = {}
    if args.torchvision:
        input_shape = (3, 224, 224)
        candidates["fresh"] = torchvision_network(args.torchvision)
    elif args.run:
        run = load_run(args.run)
        input_shape = networks.input_shape(run.args.model)
        candidates["fresh"] = build_from(run.args)
        candidates["trained"] = run.network
    else:
        input_shape = networks.input_shape(args.model)
        candidates["fresh"] = networks.build(args.model)
    input_shape = args.input or input_shape

    problem = explain(candidates["fresh"], input_shape)
    if problem:
        raise SystemExit(2)
    if args.erf or args.run:
        inputs = make_inputs(input_shape, args.data_dir)
        draw_fields(candidates, inputs, input_shape, args.out)


if __name__ == "__main__":
    digits.run_command(main)
