"""Receptive fields: which pixels of the image can a unit see?

What it teaches: three formulas give the receptive field of each layer in a chain of convolutions
and poolings. The same formulas work for any network that torch.fx can trace. A formula may be
wrong, so the field is also measured: put ink on a row of the image and see which units it stains.

    python rf.py                               the default network of model.py, a row per layer
    python rf.py --model n3                    another of its networks
    python rf.py --torchvision resnet18        a network of torchvision
    python rf.py --model n2 --input 1x20x20    the shape debugger: which layer fails, what helps
    python rf.py --run runs/001                how much each pixel counts, before and after training

    from rf import explain                     the table and the debugger for your own network
    explain(network, (1, 28, 28))

A unit is one position of a layer's map, with all its channels. The columns of the table:

    window      kernel, stride, padding, and dilation where it is not 1
    jump        pixels from the field of one unit to the field of the next
    RF          the size of a unit's receptive field, in pixels
                "global": a unit may see the whole image
                "not followed": rf.py does not know what a unit sees
    start       the pixel at which the field of unit 0 begins; negative: in the padding
    measured    the most rows that one unit sees (and columns, if their number differs), found with
                ink; only where RF is a number, and for images with height + width up to 128. The
                sign compares all units:
                =  every unit sees all pixels of its field that lie in the image, and no others
                <  some units see fewer: a dilated window has gaps
                !  some units see more: a formula is wrong
    multiply-adds    of the layers nn.Conv2d and nn.Linear, per image

A layer that changes nothing here, such as ReLU, has no row. Parameters that are not part of a row's
layer, such as a weight for each position, have their own rows at the end.
"""
import copy
import math
import sys
from collections import namedtuple
from pathlib import Path

import data as digits           # before torch: data.py says why

import torch
import torch.fx
from PIL import Image, ImageDraw
from torch import Tensor, nn

import model
from analyze import gallery, heat, load_runs
from data import UserError, reason
from train import build_from, parse_args


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


def slide(axis, kernel, stride, padding, dilation):
    """The axis after one more convolution or pooling."""
    jump = axis.jump * stride
    size = axis.size + (kernel - 1) * dilation * axis.jump
    start = axis.start - padding * axis.jump
    return Axis(jump, size, start)


def receptive_fields(chain):
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
# torch.fx calls the network once with a stand-in for the images and writes down each operation as
# a node of a graph. We run the nodes one after the other. Each value that depends on the images
# gets a field:
#
#   (height, width)    two axes as above
#   GLOBAL             a unit may see the whole image
#   NOT_FOLLOWED       we do not know what a unit sees
#
# There are four kinds of operations:
#
#   window       Convolutions and poolings slide a window over the map.
#   GATHER       Flatten and global pooling make one position of all.
#   STAY         Activations, sums and concatenations of channels leave positions where they are.
#                Where branches meet, the new field is the smallest one around their fields.
#   any other    A flip, a slice, attention, a write into a tensor. We do not follow it,
#                nor anything after it: no number is better than a wrong one.

GLOBAL = "global"
NOT_FOLLOWED = "not followed"

# In lower case without "_", so that nn.LeakyReLU and F.leaky_relu have one name.
GATHER = {"flatten", "view", "reshape", "mean", "adaptiveavgpool2d", "adaptivemaxpool2d"}
STAY = {
    "relu", "relu6", "leakyrelu", "prelu", "elu", "selu", "gelu", "silu", "mish", "sigmoid",
    "tanh", "hardsigmoid", "hardswish", "batchnorm2d", "dropout", "dropout2d", "stochasticdepth",
    "identity", "add", "sub", "mul", "truediv", "cat",
    "adaptiveavgpool2d",                    # to the size that the map has
}
NO_PIXELS = (int, torch.Size, torch.dtype, torch.device)    # such as x.size(0), x.shape

# F.max_pool2d(x, 2) has the arguments of nn.MaxPool2d(2), after x.
POOLING = {"max_pool2d": nn.MaxPool2d, "avg_pool2d": nn.AvgPool2d}

# What a node does. layer: its name in the table; function: "Conv2d", "add" and so on; module: the
# nn.Module that it calls, or None; inputs: the values it takes that depend on the images; fields:
# the fields of the inputs.
Call = namedtuple("Call", "layer function module inputs fields")

# A row of the table. shape: of the output, per image; window: as find_window returns it.
Row = namedtuple("Row", "layer shape window field measured parameters multiply_adds")


class Follower(torch.fx.Interpreter):
    """Runs a traced network node by node and collects the rows of the table."""

    def __init__(self, traced, images):
        super().__init__(traced)
        self.extra_traceback = False                    # keeps an error's text as it is
        self.images = images
        first = next(iter(traced.graph.nodes))          # it stands for the images
        self.fields = {first: (PIXEL, PIXEL)}           # of the nodes that depend on the images
        self.counted = set()                            # the parameters of the rows
        self.shown = None                               # shape and field of the last row
        self.rows = []

    def run_node(self, node):
        """Run one node and find its field. torch.fx calls this for each node in turn."""
        self.node = node                                # kept for the debugger
        result = super().run_node(node)
        call = self.describe(node)
        if call.inputs and node.op != "output" and not isinstance(result, NO_PIXELS):
            window = self.find_window(call)
            self.fields[node] = self.find_field(call, window, result)
            self.add_row(call, window, self.fields[node], result)
        return result

    def describe(self, node):
        """What does this node do?"""
        module = None
        function = getattr(node.target, "__name__", str(node.target))
        if node.op == "call_module":
            module = self.fetch_attr(node.target)
            function = type(module).__name__
        layer = function
        stack = list(node.meta.get("nn_module_stack", {}).values())
        if stack:
            path, _ = stack[-1]                         # the innermost module
            layer = f"{path} {function}"
        sources = [source for source in node.all_input_nodes if source in self.fields]
        inputs = [self.env[source] for source in sources]
        fields = [self.fields[source] for source in sources]
        return Call(layer, function, module, inputs, fields)

    def find_window(self, call):
        """Kernel, stride, padding and dilation of a convolution or a pooling: a pair each, for
        height and width. None for any other operation."""
        module = call.module
        if call.function in POOLING and self.node.args:
            args, kwargs = self.fetch_args_kwargs_from_env(self.node)
            module = POOLING[call.function](*args[1:], **kwargs)
        if not isinstance(module, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
            return None
        if getattr(module, "padding_mode", "zeros") != "zeros":
            return None                     # the padding repeats pixels from inside the map
        kernel = pair(module.kernel_size)
        dilation = pair(getattr(module, "dilation", 1))
        padding = module.padding
        if padding == "valid":
            padding = 0
        elif padding == "same":             # if this is odd, bottom and right get one pixel more
            padding = [dilation[i] * (kernel[i] - 1) // 2 for i in range(2)]
        return kernel, pair(module.stride), pair(padding), dilation

    def find_field(self, call, window, result):
        """The field of a result, from the fields of the inputs."""
        if NOT_FOLLOWED in self.fields.values() or not isinstance(result, Tensor):
            return NOT_FOLLOWED
        if call.function.endswith("_"):
            return NOT_FOLLOWED             # it changes a tensor, which other nodes may hold
        if GLOBAL in call.fields:
            return GLOBAL
        operation = call.function.replace("_", "").lower()
        if operation in GATHER and result.shape[2:].numel() == 1:       # N×C or N×C×1×1
            return GLOBAL
        if window:
            height, width = call.fields[0]
            vertical, horizontal = zip(*window)         # kernel, stride, padding, dilation of each
            return slide(height, *vertical), slide(width, *horizontal)

        stays = operation in STAY
        if isinstance(call.module, nn.BatchNorm2d):
            stays = call.module.running_mean is not None    # else it takes the mean of the map
        if stays and all(value.shape[2:] == result.shape[2:] for value in call.inputs):
            return smallest_around(call.fields)
        return NOT_FOLLOWED

    def add_row(self, call, window, field, result):
        """Add a row if shape or field are new, or if there are parameters or multiply-adds."""
        shape = tuple(getattr(result, "shape", ()))[1:]
        new = set()
        if call.module:
            new = set(call.module.parameters()) - self.counted
            self.counted |= new
        parameters = sum(parameter.numel() for parameter in new)
        multiply_adds = 0
        if isinstance(call.module, (nn.Conv2d, nn.Linear)):
            weights = call.module.weight[0].numel()     # of one output number
            multiply_adds = math.prod(shape) * weights
        if parameters or multiply_adds or (shape, field) != self.shown:
            self.shown = (shape, field)
            measured = measure(result, field, self.images)
            self.rows.append(Row(call.layer, shape, window, field, measured, parameters,
                                 multiply_adds))


def pair(setting):
    """3 means 3×3."""
    if isinstance(setting, int):
        return setting, setting
    return setting[0], setting[-1]


def smallest_around(fields):
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


def follow(network, input_shape):
    """Send images C×H×W through a copy of the network.

    Returns the rows of the table and None; or the rows up to the layer that fails, and the problem
    in one line.
    """
    if len(input_shape) != 3 or min(input_shape) < 1:
        return [], f"rf.py takes images C×H×W, such as 1x28x28, not {times(input_shape)}"
    images = torch.zeros(2, *input_shape)
    if sum(input_shape[1:]) <= 128:         # to measure larger images would take minutes
        images = ink(input_shape)

    try:
        network = copy.deepcopy(network).cpu().float().eval()
        if not list(network.children()):
            network = nn.Sequential(network)            # a lone layer
        follower = Follower(torch.fx.symbolic_trace(network), images)
    except Exception as error:                          # of many types
        return [], f"torch.fx cannot copy and trace this network: {reason(error)}"
    rows = follower.rows
    try:
        # NNPACK, which some machines use for convolutions, works on blocks and smears the ink.
        with torch.no_grad(), torch.backends.nnpack.flags(enabled=False):
            result = follower.run(images)
    except Exception as error:
        call = follower.describe(follower.node)
        return rows, f"{call.layer} {diagnose(call, error)}"

    if isinstance(result, Tensor) and result.dim() == 2 and len(result) != len(images):
        return rows, (f"the network mixes the images: {len(images)} of them give {len(result)} "
                      "results. Write torch.flatten(x, 1), not view")
    for name, parameter in network.named_parameters():
        if parameter not in follower.counted:           # a function uses it, or nothing does
            rows.append(Row(name, parameter.shape, None, "", "", parameter.numel(), 0))
    return rows, None


# ---- Ink: what a unit really sees -------------------------------------------------------------
#
# Ink is NaN. A unit that reads it becomes NaN, whatever its weights: 0·NaN is NaN, and so is the
# maximum of NaN and 5. A bright value would not do: negative weights can cancel it, and a maximum
# can ignore it.
#
# Each row and each column has its own image.

def ink(input_shape):
    """(H + W)×C×H×W: image y has ink in row y, image H + x has ink in column x."""
    channels, height, width = input_shape
    images = torch.zeros(height + width, channels, height, width)
    for y in range(height):
        images[y, :, y, :] = math.nan
    for x in range(width):
        images[height + x, :, :, x] = math.nan
    return images


def measure(result, field, images):
    """How many rows and columns a unit sees at most, and how all units compare with the field."""
    height, width = images.shape[2:]
    if field in (GLOBAL, NOT_FOLLOWED):
        return ""                                       # no window to compare with
    if len(images) != height + width or len(result) != len(images):
        return ""                                       # no ink, or mixed images
    stained = result.isnan()
    # stained is images × channels × rows × columns of units. The first `height` images have ink in
    # a row of pixels: which rows of units are stained?
    rows = stained[:height].any(dim=3).any(dim=1)       # pixels × units
    columns = stained[height:].any(dim=2).any(dim=1)

    most = []
    sign = "="
    for axis, seen in zip(field, [rows.T, columns.T]):  # units × pixels
        inside = field_pixels(axis, *seen.shape)
        most.append(int(seen.sum(dim=1).max()))
        if (inside & ~seen).any() and sign == "=":
            sign = "<"
        if (seen & ~inside).any():
            sign = "!"
    return f"{both(most)} {sign}"


def field_pixels(axis, units, pixels):
    """units × pixels: which pixels are in the receptive field of which unit?"""
    start = axis.start + axis.jump * torch.arange(units)[:, None]
    pixel = torch.arange(pixels)
    return (start <= pixel) & (pixel < start + axis.size)


# ---- The table --------------------------------------------------------------------------------

HEADER = ("layer", "output", "window", "jump", "RF", "start", "measured", "parameters",
          "multiply-adds")
LINE = "{:{width}}  {:11} {:14} {:>4} {:>12} {:>6} {:>9} {:>11} {:>14}"


def explain(network, input_shape):
    """Print the table and the totals of a network for images of shape C×H×W.

    If a layer fails, print the table up to this layer and, on stderr, the problem in one line with
    what helps. Return the problem, or None.
    """
    rows, problem = follow(network, input_shape)
    if rows:
        width = max(len(row.layer) for row in rows)
        print(LINE.format(*HEADER, width=width))
        for row in rows:
            print(LINE.format(*cells(row), width=width))
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem
    parameters = sum(row.parameters for row in rows)
    multiply_adds = sum(row.multiply_adds for row in rows)
    print(f"\n{parameters:,} parameters, {multiply_adds:,} multiply-adds per image in "
          "convolutions and linear layers")


def cells(row):
    """A row of the table as texts."""
    window = jump = start = ""
    size = row.field
    if row.window:
        kernel, stride, padding, dilation = [both(numbers) for numbers in row.window]
        window = f"k{kernel} s{stride} p{padding}"
        if dilation != "1":
            window += f" d{dilation}"
    if isinstance(row.field, tuple):
        height, width = row.field
        jump, size, start = [both(numbers) for numbers in zip(height, width)]
    return (row.layer, times(row.shape), window, jump, size, start, row.measured,
            f"{row.parameters:,}", f"{row.multiply_adds:,}")


def both(numbers):
    """Height x width, or one number if they agree."""
    if numbers[0] == numbers[1]:
        return str(numbers[0])
    return times(numbers)


def times(shape):
    return "x".join(str(size) for size in shape)


# ---- The shape debugger -----------------------------------------------------------------------

def diagnose(call, error):
    """What an operation that failed wanted, what it got, and what helps. One line."""
    said = reason(error)
    shapes = [tuple(tensor.shape[1:]) for tensor in call.inputs if isinstance(tensor, Tensor)]
    if not shapes or not shapes[0]:
        return f"fails: {said}"
    shape = shapes[0]                               # per image
    got = times(shape)

    # First the number of axes: where that is wrong, no other number of channels helps.
    if call.function.endswith(("1d", "3d")) and len(shape) == 3:
        return f"does not take maps C×H×W, got {got}: layers for maps end in 2d"
    if call.function.endswith("2d") and len(shape) == 1:
        return f"wants a map C×H×W, got {got} numbers in a row: put it before nn.Flatten()"
    if call.function == "Linear" and len(shape) == 3:
        return f"wants numbers in a row, got the map {got}: put nn.Flatten() before it"

    for name, axis in (("in_features", -1), ("in_channels", 0), ("num_features", 0)):
        wanted = getattr(call.module, name, shape[axis])
        if wanted != shape[axis]:
            return f"has {name}={wanted}, got {got}. Write {name}={shape[axis]}"
    if "too small" in said or "can't be greater than actual input size" in said:
        return f"does not fit a {times(shape[1:])} map: pool less, or take a larger image"
    if call.function in ("view", "reshape"):
        return f"does not suit {got}: torch.flatten(x, 1) takes any size ({said})"
    if call.function in ("add", "mul", "cat") and len(shapes) == 2:
        return (f"cannot join {got} and {times(shapes[1])}: give both branches the same padding "
                "and strides, and for a sum the same channels")
    return f"fails: {said}"


# ---- The effective receptive field ------------------------------------------------------------
#
# The pixels of the field do not count equally. The gradient of a unit with respect to the pixels
# says how much the unit changes with each of them. A pixel in the middle reaches the unit on many
# paths through the layers, a pixel at the edge on few. So the gradient is roughly a Gaussian (Luo
# et al., 2016).

def effective_field(network: nn.Module, images: Tensor, layer):
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


def draw_fields(run, data, path):
    """Print and draw the effective field of a run's network, fresh and trained, on digits and on
    white noise."""
    images = data.test[0][:1000]
    inputs = {
        f"images of {data.name}": digits.normalize(images, data.mean, data.std),
        "white noise": torch.randn(images.shape),
    }
    torch.manual_seed(run.args.seed)                # the weights with which the training began
    networks = {"fresh": build_from(run.args), "trained": run.network}
    rows, _ = follow(run.network, images.shape[1:])
    known = [row for row in rows if row.layer.endswith(" Conv2d") and isinstance(row.field, tuple)]
    if not known:
        raise UserError("the network has no convolution whose receptive field is known: no picture")
    last = known[-1]
    picture_rows = []
    for state, network in networks.items():
        picture_row = []
        for kind, batch in inputs.items():
            amount = effective_field(network, batch, last.layer.split()[0])
            sums = amount.flatten().sort(descending=True).values.cumsum(dim=0)
            pixels = int((sums < 0.5).sum()) + 1
            result = f"half of the gradient in {pixels} of {amount.numel()} pixels"
            print(f"{state} network, {kind}: {result}")
            picture_row.append((outlined(amount, last), f"{state} network, {kind}:\n{result}"))
        picture_rows.append(picture_row)
    gallery(picture_rows, path, zoom=1, title=f"What moves the centre unit of {last.layer}\n"
            "Blue: its receptive field, grey: padding around the image")
    print(f"picture: {path}")


def outlined(amount, row):
    """An effective field as a picture. A blue line goes around the receptive field of the centre
    unit, which may reach into the padding. The padding is grey."""
    height, width = amount.shape
    vertical, horizontal = row.field
    top = vertical.start + vertical.jump * (row.shape[1] // 2)
    left = horizontal.start + horizontal.jump * (row.shape[2] // 2)
    bottom = top + vertical.size
    right = left + horizontal.size
    margin = 1 + max(0, -top, -left, bottom - height, right - width)

    zoom = max(1, 400 // (height + 2 * margin))     # screen pixels for a pixel of the image
    size = (zoom * (width + 2 * margin), zoom * (height + 2 * margin))
    picture = Image.new("RGB", size, "lightgrey")
    image = heat(amount, amount.max()).resize((zoom * width, zoom * height), Image.NEAREST)
    picture.paste(image, (zoom * margin, zoom * margin))
    edges = [zoom * (margin + edge) for edge in (left, top, right, bottom)]
    ImageDraw.Draw(picture).rectangle(edges, outline="blue", width=2)
    return picture


# ---- Command line -----------------------------------------------------------------------------

def shape(text):
    """A type for argparse: "1x28x28" -> (1, 28, 28)."""
    return tuple(int(size) for size in text.split("x"))


def torchvision_network(name):
    """One of torchvision's classifiers with random weights."""
    from torchvision import models          # it takes a second, so only where it is needed
    if name not in models.list_models(models):
        raise UserError(f"torchvision has no classifier {name!r}, but resnet18, vgg16 and others")
    return models.get_model(name)


def main():
    parser = digits.Parser(prog="rf.py", description="Receptive fields, computed and measured.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", choices=model.NETWORKS, default="default",
                       help="a network of model.py")
    which.add_argument("--torchvision", metavar="NAME", help="a network of torchvision, untrained")
    which.add_argument("--run", metavar="FOLDER",
                       help="the network of a run; draw its effective field, too")
    parser.add_argument("--input", metavar="CxHxW", type=shape,
                        help="the shape of an image for the table, such as 1x20x20")
    parser.add_argument("--data-dir", help="of --run; not given: where the run found its data")
    args = parser.parse_args()

    torch.manual_seed(0)                    # the same weights and the same noise each time
    if args.torchvision:
        network = torchvision_network(args.torchvision)
        input_shape = (3, 224, 224)
    elif args.run:
        runs, data = load_runs([args.run], args.data_dir)
        network = runs[0].network
        input_shape = data.test[0].shape[1:]
    else:
        network = build_from(parse_args(["--model", args.model]))
        input_shape = model.input_shape(args.model)

    problem = explain(network, args.input or input_shape)
    if problem:
        raise SystemExit(2)
    if args.run:
        draw_fields(runs[0], data, Path(args.run, "analysis/receptive_field.png"))


if __name__ == "__main__":
    digits.run_command(main)
