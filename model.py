"""The networks, each a list of layers that is read from top to bottom.

What it teaches: how much a network of fewer than 20,000 parameters can do. The project's own
network comes after the parts that it is built from. Then come the networks of the course notes that
this project re-implements, built from the same parts, so that they can be compared fairly.

    block, down_block    convolution, batch norm, activation; down_block also halves the map
    make_head            from the last map to ten scores, in three ways
    Places, Residual     two layers of our own
    he_init              the weights that a network starts with
    default              the project's own network: 19,626 parameters
    tiny, micro          the same idea with 7,815 and 1,863 parameters
    residual, n1 ... n3, cifar
    build                the named network with fresh weights

    from model import build
    network = build("default")      # normalized images N×1×28×28 -> logits N×10

Every network returns logits: one score per digit, of any size. Softmax turns scores into
probabilities, but it belongs to the loss (train.py): a network that ends in softmax and is trained
with cross-entropy applies softmax twice.

How to read the comments at the layers:   output shape   RF receptive field   parameters
"RF 8" means that one unit of this output sees 8×8 pixels of the image; "RF all" means all of the
image. `python rf.py` computes these three columns, and a test compares them with the comments.
"""
import math

import torch
from torch import Tensor, nn


# ---- Blocks -----------------------------------------------------------------------------------
#
# Convolution: each output channel is a small filter (3×3 over all input channels) that moves over
# the map and says, at each position, how well the map matches it there.
#
# Batch norm (Ioffe and Szegedy, 2015): for each channel, subtract the mean and divide by the
# standard deviation, both taken over the batch, the height and the width: the axes N, H and W. Then
# apply a learned scale and shift, two parameters per channel. In training the numbers come from the
# batch. In evaluation they come from running averages collected during training: the answer for an
# image must not depend on the images beside it. Batch norm subtracts the mean, and with it any
# bias, so the convolution before it needs none.
#
# Activation: ReLU, max(x, 0), or SiLU, x·sigmoid(x) (Elfwing et al., 2017), which is a ReLU without
# the kink. Without an activation, two convolutions would be no more than a single one.

ACTIVATIONS = {"silu": nn.SiLU, "relu": nn.ReLU}


def convolution(channels_in, channels_out, kernel=3, padding=1, stride=1, bias=False):
    """A convolution that keeps the channels of one pixel side by side in memory.

    The values are the same in this memory format, and a CPU computes them faster.
    """
    layer = nn.Conv2d(channels_in, channels_out, kernel, stride, padding, bias=bias)
    return layer.to(memory_format=torch.channels_last)


def block(channels_in, channels_out, kernel=3, padding=1, dropout=0.0, bias=False,
          activation="relu"):
    """Convolution -> batch norm -> activation (-> dropout).

    Height and width change by 2·padding + 1 - kernel: a 3×3 convolution with padding 1 keeps them.
    """
    layers = [
        convolution(channels_in, channels_out, kernel, padding, bias=bias),
        nn.BatchNorm2d(channels_out),
        ACTIVATIONS[activation](),
    ]
    if dropout:
        layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers)


def down_block(channels_in, channels_out, down="pool", activation="relu"):
    """A 3×3 block that also halves height and width.

    "pool":     take the maximum of each 2×2 square.
    "overlap":  take the maximum of 3×3 squares, two pixels apart. The squares share their edges, so
                the output changes less when a stroke moves by one pixel (Krizhevsky et al., 2012).
    "stride":   move the filter by two pixels at a time. Every pixel is still read, but three of
                four outputs are never computed.

    Pooling comes before batch norm and activation, which then work on a quarter of the numbers.
    """
    if down == "pool":
        halve = [convolution(channels_in, channels_out), nn.MaxPool2d(2)]
    elif down == "overlap":
        halve = [convolution(channels_in, channels_out), nn.MaxPool2d(3, stride=2, padding=1)]
    else:
        halve = [convolution(channels_in, channels_out, stride=2)]
    return nn.Sequential(*halve, nn.BatchNorm2d(channels_out), ACTIVATIONS[activation]())


# ---- Heads: from the last map to the scores ---------------------------------------------------

def make_head(channels, kind="conv", side=7):
    """From a map of channels×side×side to ten logits.

    "conv":    a 1×1 convolution makes ten maps, one per digit, and the average of each map is its
               logit: global average pooling (Lin, Chen, Yan, 2013). The maps can be looked at:
               analyze.py draws them.
    "linear":  the average of each channel first, then a linear layer. The order of averaging and
               a linear layer does not matter, so with equal weights both heads return the same.
    "place":   like "conv", but a weighted average: see Places.
    """
    if kind == "conv":
        layers = [nn.Conv2d(channels, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    elif kind == "linear":
        layers = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]
    else:
        layers = [nn.Conv2d(channels, 10, 1), Places(10, side), nn.AdaptiveAvgPool2d(1),
                  nn.Flatten()]
    return nn.Sequential(*layers)


class Places(nn.Module):
    """One learned weight per channel and position of a map (as in Chen et al., 2018).

    A loop at the top makes a 9, a loop at the bottom makes a 6. A plain average gives every
    position the same weight; here the network learns how much evidence counts at each position.
    The price is 490 parameters for ten maps of 7×7, and the network is no longer
    translation-invariant: a digit that moves meets other weights. The small network `micro` gains
    about a percentage point from it; the larger ones gain nothing (assets/results.md).
    """

    def __init__(self, channels, side):
        super().__init__()
        # All weights act as 1 at first: the plain average. They are stored as 1/side and multiplied
        # by side, so that a step of SGD moves them side² = 49 times as far: `side` is once in the
        # gradient, once in the product. Small networks and short trainings need such large steps.
        self.side = side
        self.weight = nn.Parameter(torch.full((channels, side, side), 1 / side))

    def forward(self, x: Tensor):
        return x * (self.weight * self.side)


# ---- A residual block -------------------------------------------------------------------------

class Residual(nn.Module):
    """y = ReLU(x + F(x)), where F is two 3×3 convolutions with batch norm (He et al., 2015).

    F learns only what to add to x. A deep plain network has to learn to pass its input on, and
    beyond some depth even its training error rises. Here it only has to learn F = 0.
    """

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(
            block(channels, channels),
            convolution(channels, channels),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor):
        return torch.relu(x + self.body(x))


# ---- The first weights ------------------------------------------------------------------------

def he_init(network: nn.Module):
    """Draw the weights of convolutions and linear layers from N(0, 2 / fan_in) and set their
    biases to 0 (He et al., 2015).

    fan_in is the number of inputs of one output. An output is a sum of fan_in products, so its
    variance is fan_in · Var(weight) · E[x²].
    ReLU sets half of a symmetric signal to 0 and so halves E[x²]; the factor 2 restores it. Signals
    then keep their size through any number of layers. With a standard deviation of 0.01 they vanish
    after a few wide layers, with 0.1 they explode: a test runs this experiment. (After SiLU E[x²]
    is 0.355 instead of 0.5 for normal inputs, 29% less; batch norm restores the size.)

    No ReLU follows the last layer, so nothing is halved there. In a network without batch norm,
    max pooling makes signals grow as well. The logits of n2_plain start so large that its first
    loss is 3 to 8, depending on the random seed, instead of ln 10 = 2.3:
    `python train.py --sanity --model n2-plain` reports it.
    """
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            fan_in = layer.weight[0].numel()          # input channels · area of the kernel
            nn.init.normal_(layer.weight, 0.0, math.sqrt(2.0 / fan_in))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


# ---- The project's own networks ---------------------------------------------------------------

def default(head="conv", down="overlap", activation="silu", dropout=0.1):
    """The project's own network: 19,626 parameters.

    - It halves the maps right after the first convolution. Maps of 28×28 take the most time, and
      this network computes only one layer on them: the edges.
    - Its channels hardly grow. A 3×3 convolution has 9·in·out weights at any map size: one of 16→24
      and three of 24→24 use up the budget.
    - Dropout sets a tenth of the features to 0 at random, in training only, so that the network
      does not rely on any single feature (Srivastava et al., 2014). There is only one such layer,
      because it takes time.
    """
    return nn.Sequential(
        down_block(1, 16, down, activation),           # 16×14×14   RF 5          176
        block(16, 24, activation=activation),          # 24×14×14   RF 9        3,504
        down_block(24, 24, down, activation),          # 24×7×7     RF 17       5,232
        block(24, 24, activation=activation),          # 24×7×7     RF 25       5,232
        block(24, 24, activation=activation),          # 24×7×7     RF 33       5,232
        nn.Dropout(dropout),                           # 24×7×7     RF 33           0
        make_head(24, head),                           # 10         RF all        250
    )


def tiny(head="conv"):
    """The same idea, narrower: 7,815 parameters."""
    return nn.Sequential(
        down_block(1, 10, "overlap", "silu"),          # 10×14×14   RF 5          110
        block(10, 15, activation="silu"),              # 15×14×14   RF 9        1,380
        down_block(15, 15, "overlap", "silu"),         # 15×7×7     RF 17       2,055
        block(15, 15, activation="silu"),              # 15×7×7     RF 25       2,055
        block(15, 15, activation="silu"),              # 15×7×7     RF 33       2,055
        make_head(15, head),                           # 10         RF all        160
    )


def micro(head="place"):
    """The smallest network: 1,863 parameters. A quarter of them are weights of positions.

    Arithmetic costs no parameters, so this network computes more of it: it halves the map only
    after its second convolution.
    """
    return nn.Sequential(
        block(1, 6, activation="silu"),                # 6×28×28    RF 3           66
        down_block(6, 7, "overlap", "silu"),           # 7×14×14    RF 7          392
        down_block(7, 7, "overlap", "silu"),           # 7×7×7      RF 15         455
        block(7, 6, activation="silu"),                # 6×7×7      RF 23         390
        make_head(6, head),                            # 10         RF all        560
    )


def residual(head="conv"):
    """The same budget spent on two residual blocks."""
    return nn.Sequential(
        down_block(1, 16),                             # 16×14×14   RF 4          176
        Residual(16),                                  # 16×14×14   RF 12       4,672
        down_block(16, 24),                            # 24×7×7     RF 18       3,504
        Residual(24),                                  # 24×7×7     RF 34      10,464
        nn.Dropout(0.1),                               # 24×7×7     RF 34           0
        make_head(24, head),                           # 10         RF all        250
    )


# ---- The networks of the notes ----------------------------------------------------------------
#
# This project re-implements the networks of five sets of course notes, N0 to N4. Where the notes
# print another number of parameters than the layers have, the layers decide.


def n1():
    """Every block has dropout, from 0.15 down to 0.1. The notes count 18,746 parameters.

    The biases before batch norm are redundant, but the notes have them.
    """
    return nn.Sequential(
        block(1, 4, dropout=0.15, bias=True),          # 4×28×28    RF 3           48
        block(4, 8, dropout=0.125, bias=True),         # 8×28×28    RF 5          312
        nn.MaxPool2d(2),                               # 8×14×14    RF 6            0
        block(8, 16, dropout=0.1, bias=True),          # 16×14×14   RF 10       1,200
        block(16, 22, dropout=0.1, bias=True),         # 22×14×14   RF 14       3,234
        nn.MaxPool2d(2),                               # 22×7×7     RF 16           0
        block(22, 30, 3, 0, dropout=0.1, bias=True),   # 30×5×5     RF 24       6,030
        block(30, 30, 3, 0, dropout=0.1, bias=True),   # 30×3×3     RF 32       8,190
        nn.MaxPool2d(2, padding=1),                    # 30×2×2     RF 36           0
        nn.Conv2d(30, 10, 1),                          # 10×2×2     RF 36         310
        nn.BatchNorm2d(10),                            # 10×2×2     RF 36          20
        nn.Dropout(0.1),                               # 10×2×2     RF 36           0
        nn.AdaptiveAvgPool2d(1),                       # 10×1×1     RF all          0
        nn.Flatten(),                                  # 10         RF all          0
        nn.Dropout(0.1),                               # 10         RF all          0
    )


def conv_relu(channels_in, channels_out, kernel=3, padding=1):
    """Convolution and ReLU without batch norm, for the notes' first attempts."""
    layer = convolution(channels_in, channels_out, kernel, padding, bias=True)
    return nn.Sequential(layer, nn.ReLU())


def n2_plain():
    """The first of four iterations: convolution and ReLU only."""
    return nn.Sequential(
        conv_relu(1, 16),                              # 16×28×28   RF 3          160
        conv_relu(16, 16),                             # 16×28×28   RF 5        2,320
        conv_relu(16, 32),                             # 32×28×28   RF 7        4,640
        nn.MaxPool2d(2),                               # 32×14×14   RF 8            0
        conv_relu(32, 16, 1, 0),                       # 16×14×14   RF 8          528
        conv_relu(16, 32),                             # 32×14×14   RF 12       4,640
        nn.MaxPool2d(2),                               # 32×7×7     RF 14           0
        conv_relu(32, 16, 1, 0),                       # 16×7×7     RF 14         528
        conv_relu(16, 16, 3, 0),                       # 16×5×5     RF 22       2,320
        nn.Flatten(),                                  # 400        RF all          0
        nn.Linear(400, 10),                            # 10         RF all      4,010
    )


def n2():
    """Iterations 2 to 4: batch norm and dropout. The notes count 19,418, in another place 19,300."""
    return nn.Sequential(
        block(1, 16, bias=True),                       # 16×28×28   RF 3          192
        block(16, 16, bias=True),                      # 16×28×28   RF 5        2,352
        block(16, 32, bias=True),                      # 32×28×28   RF 7        4,704
        nn.MaxPool2d(2),                               # 32×14×14   RF 8            0
        block(32, 16, 1, 0, bias=True),                # 16×14×14   RF 8          560
        block(16, 32, bias=True),                      # 32×14×14   RF 12       4,704
        nn.MaxPool2d(2),                               # 32×7×7     RF 14           0
        block(32, 16, 1, 0, bias=True),                # 16×7×7     RF 14         560
        block(16, 16, 3, 0, bias=True),                # 16×5×5     RF 22       2,352
        nn.Flatten(),                                  # 400        RF all          0
        nn.Dropout(0.1),                               # 400        RF all          0
        nn.Linear(400, 10),                            # 10         RF all      4,010
    )


def n3_original():
    """The starting point: wide, no batch norm, no dropout. The notes say "about 2.3M" parameters."""
    return nn.Sequential(
        conv_relu(1, 32),                              # 32×28×28   RF 3          320
        conv_relu(32, 64),                             # 64×28×28   RF 5       18,496
        nn.MaxPool2d(2),                               # 64×14×14   RF 6            0
        conv_relu(64, 128),                            # 128×14×14  RF 10      73,856
        conv_relu(128, 256),                           # 256×14×14  RF 14     295,168
        nn.MaxPool2d(2),                               # 256×7×7    RF 16           0
        conv_relu(256, 512, 3, 0),                     # 512×5×5    RF 24   1,180,160
        conv_relu(512, 1024, 3, 0),                    # 1024×3×3   RF 32   4,719,616
        nn.Conv2d(1024, 10, 3),                        # 10×1×1     RF 40      92,170
        nn.Flatten(),                                  # 10         RF all          0
    )


def n3():
    """The optimized network. It ends in ReLU, so no score is negative: it can show evidence for
    a digit, but not against it."""
    return nn.Sequential(
        block(1, 10),                                  # 10×28×28   RF 3          110
        block(10, 18, dropout=0.05),                   # 18×28×28   RF 5        1,656
        nn.MaxPool2d(2),                               # 18×14×14   RF 6            0
        block(18, 18),                                 # 18×14×14   RF 10       2,952
        block(18, 28, dropout=0.05),                   # 28×14×14   RF 14       4,592
        nn.MaxPool2d(2),                               # 28×7×7     RF 16           0
        block(28, 28),                                 # 28×7×7     RF 24       7,112
        block(28, 10),                                 # 10×7×7     RF 32       2,540
        nn.AdaptiveAvgPool2d(1),                       # 10×1×1     RF all          0
        nn.Flatten(),                                  # 10         RF all          0
    )


def cifar():
    """The lecture's CIFAR-10 network, for 3×32×32 images. A quarter of it is the last layer."""
    return nn.Sequential(
        block(3, 32, 5, 2, bias=True),                 # 32×32×32   RF 5        2,496
        block(32, 64, bias=True),                      # 64×32×32   RF 7       18,624
        nn.MaxPool2d(2),                               # 64×16×16   RF 8            0
        block(64, 128, 5, 2, bias=True),               # 128×16×16  RF 16     205,184
        nn.MaxPool2d(2),                               # 128×8×8    RF 18           0
        nn.Flatten(),                                  # 8192       RF all          0
        nn.Linear(8192, 10),                           # 10         RF all     81,930
    )


# ---- All of them by name ----------------------------------------------------------------------

# A network of your own: write a function like those above and, at the end of this file,
# NETWORKS["mine"] = mine. It keeps the weights that PyTorch gave it.
NETWORKS = {
    "default": default,
    "tiny": tiny,
    "micro": micro,
    "residual": residual,
    "n1": n1,
    "n2-plain": n2_plain,
    "n2": n2,
    "n3-original": n3_original,
    "n3": n3,
    "cifar": cifar,
}

OURS = tuple(NETWORKS)          # those above, not those that you add


def build(name="default", **options):
    """The named network. Ours get fresh He weights; yours keeps the weights it comes with. The
    options go to its function, which raises TypeError for those that it does not have."""
    network = NETWORKS[name](**options)
    if name in OURS:
        he_init(network)
    return network


def input_shape(name):
    """Channels, height and width of the images that the named network is made for."""
    if name == "cifar":
        return (3, 32, 32)
    return (1, 28, 28)


def count_parameters(network: nn.Module):
    """The number of learned parameters. Batch norm's running averages are not learned by gradient
    descent and do not count."""
    return sum(parameter.numel() for parameter in network.parameters())
