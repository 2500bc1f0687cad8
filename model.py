"""The networks, each a list of layers that is read from top to bottom.

What it teaches: how far fewer than 20,000 parameters go when each one is spent with care. The
project's own network comes first; then every network of the course notes it grew out of, built
from the same few lines, so that they can be compared fairly:

    from model import build
    net = build("default")          # images N×C×H×W, normalized  ->  logits N×10

Every network returns logits: ten unbounded scores. Softmax lives in the loss (train.py), nowhere
else; a network that ends in softmax and is then given to cross-entropy applies it twice.

How to read the layer lines:  # output shape   RF receptive field   learnable parameters
`RF 8`: one unit of that output sees an 8×8 window of the image; `RF all`: all of it. `python rf.py`
derives all three columns, and a test recomputes every comment in this file from the modules.
"""
import math

import torch
from torch import Tensor, nn

# ---- Building lines ---------------------------------------------------------------------------

def block(c_in: int, c_out: int, kernel=3, padding=1, dropout=0.0, bias=False,
          activation=nn.ReLU) -> nn.Sequential:
    """Convolution -> batch norm -> activation (-> dropout). Height and width shrink by
    kernel - 1 - 2·padding.

    Batch norm (Ioffe and Szegedy, 2015) brings each channel to mean 0, deviation 1 over the batch,
    then to a learned scale and shift. It cancels a bias before it; only the notes' nets have one.
    """
    layers = [nn.Conv2d(c_in, c_out, kernel, padding=padding, bias=bias),
              nn.BatchNorm2d(c_out), activation()]
    return nn.Sequential(*layers, *([nn.Dropout(dropout)] if dropout else []))

def down_block(c_in: int, c_out: int, down="pool", activation=nn.ReLU) -> nn.Sequential:
    """A 3×3 block that also halves height and width.

    "pool":    the maximum of each 2×2, before batch norm and activation: they then work on a
               quarter of the numbers. It is not the same function as "late": batch norm measures
               the maxima only, and SiLU, which falls before it rises, may make another the largest.
    "late":    the same after the activation, where most networks have it.
    "overlap": the maximum of 3×3 windows, two pixels apart. They share their edges, so a stroke
               that moves by a pixel changes less (Krizhevsky et al., 2012).
    "stride":  computes only every second output to begin with: cheaper still, but it never looks
               at the three other positions that a pool compares.
    """
    conv = nn.Conv2d(c_in, c_out, 3, padding=1, stride=2 if down == "stride" else 1, bias=False)
    norm = [nn.BatchNorm2d(c_out), activation()]
    return nn.Sequential(*{"pool": [conv, nn.MaxPool2d(2), *norm],
                           "late": [conv, *norm, nn.MaxPool2d(2)],
                           "overlap": [conv, nn.MaxPool2d(3, 2, 1), *norm],
                           "stride": [conv, *norm]}[down])

def make_head(c_in: int, kind="conv", side=7) -> nn.Sequential:
    """From a C×side×side map to ten logits.

    "conv":   1×1 convolution to ten evidence maps, then the average of each: global average
              pooling (Lin, Chen, Yan, 2013). The maps can be looked at: analyze.py draws where in
              the image the network finds its "4".
    "linear": average first, then a linear map of the C averages. Averaging and a linear map
              commute, so with equal weights both return the same logits (a test shows it).
    "place":  like "conv", but a weighted average: see Places.
    """
    average, evidence = nn.AdaptiveAvgPool2d(1), nn.Conv2d(c_in, 10, 1)
    return nn.Sequential(*{"conv": [evidence, average, nn.Flatten()],
                           "linear": [average, nn.Flatten(), nn.Linear(c_in, 10)],
                           "place": [evidence, Places(10, side), average, nn.Flatten()]}[kind])

class Places(nn.Module):
    """A weight for each channel and place of a C×side×side map (as in Chen et al., 2018).

    An average forgets where evidence was seen, and a loop at the top makes a 9, at the bottom a 6.
    Evidence times weight is still a map to look at, and its average is the logit. The price: 490
    parameters for ten maps of 7×7, and a network that is no longer indifferent to where the digit
    stands; how far it may move, it has to learn from the augmentation's shifts.
    """

    def __init__(self, channels: int, side: int):
        super().__init__()
        # They act as 1 at first, as the plain average, and are stored as 1/side: a step of sgd then
        # moves them side² = 49 times as far as if stored as 1, which small networks and short
        # trainings need. (Stored as 1/side², 2,401 times as far: large rates break that.)
        self.weight, self.side = nn.Parameter(torch.full((channels, side, side), 1 / side)), side

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.weight * self.side)

class Residual(nn.Module):
    """y = ReLU(x + F(x)), F two 3×3 blocks: they learn only what to add to x (He et al., 2015).

    A plain deep stack has to learn to pass its input on; here that costs nothing (F = 0), which
    cures the degradation of deep plain networks: their training error rises with depth.
    """

    def __init__(self, channels: int):
        super().__init__()
        # Of the second block all but its ReLU, which comes after the sum.
        self.body = nn.Sequential(block(channels, channels), block(channels, channels)[:2])

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))

def he_init(net: nn.Module) -> None:
    """Draw weights of convolutions and linear layers from N(0, 2 / fan_in), set their biases to 0
    (He et al., 2015).

    Why 2 / fan_in: a unit sums fan_in products, so its variance is fan_in · Var(w) · E[x²]. Behind
    a ReLU half of a symmetric signal is cut to 0, which halves E[x²]; the factor 2 restores it.
    Signals then keep their size through any depth. With a standard deviation of 0.01 they die out
    within a few wide layers, with 0.1 they blow up: a test runs that experiment. (SiLU passes on
    a little less than ReLU; the batch norm before it restores the size.)

    Two things to know. Behind the last layer there is no ReLU, so nothing is halved there; and
    with no batch norm to keep sizes in check, pooling for the maximum makes them grow. The logits
    of n2_plain start so large that its first loss is 3 to 8, by seed, in place of ln 10 = 2.3:
    `python train.py --sanity --model n2-plain` says so.
    """
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and not nn.parameter.is_lazy(layer.weight):
            fan_in = layer.weight[0].numel()                    # in_channels · kernel area
            nn.init.normal_(layer.weight, 0.0, math.sqrt(2.0 / fan_in))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

# ---- The project's own network ----------------------------------------------------------------

def default(head="place", down="pool", activation="silu", dropout=0.1) -> nn.Sequential:
    """The project's own: 19,889 parameters, which read 99.6% of MNIST's test digits.

    - It pools right after the first convolution: 28×28 maps are the expensive ones, and one layer
      of edges is all that this network spends on them.
    - Its channels hardly grow. A 3×3 convolution costs 9·in·out parameters wherever it stands: one
      of 15→24 and three of 24→24 use up the budget.
    - SiLU, x·sigmoid(x), in place of ReLU (Elfwing et al., 2017): the same shape without the kink,
      and no unit is ever quite dead. `--activation relu` tells what it is worth.
    - Dropout (in training, a tenth of the features, at random, is 0) only here: it takes time.
    """
    act = {"silu": nn.SiLU, "relu": nn.ReLU}[activation]
    return nn.Sequential(
        down_block(1, 15, down, act),                  # 15×14×14   RF 4          165
        block(15, 24, activation=act),                 # 24×14×14   RF 8        3,288
        down_block(24, 24, down, act),                 # 24×7×7     RF 14       5,232
        block(24, 24, activation=act),                 # 24×7×7     RF 22       5,232
        block(24, 24, activation=act),                 # 24×7×7     RF 30       5,232
        nn.Dropout(dropout),                           # 24×7×7     RF 30           0
        make_head(24, head),                           # 10         RF all        740
    )

def tiny(head="place") -> nn.Sequential:
    """The same, narrower: 7,931 parameters. No dropout, and its pools overlap."""
    return nn.Sequential(
        down_block(1, 10, "overlap", nn.SiLU),         # 10×14×14   RF 5          110
        block(10, 14, activation=nn.SiLU),             # 14×14×14   RF 9        1,288
        down_block(14, 15, "overlap", nn.SiLU),        # 15×7×7     RF 17       1,920
        block(15, 15, activation=nn.SiLU),             # 15×7×7     RF 25       2,055
        block(15, 14, activation=nn.SiLU),             # 14×7×7     RF 33       1,918
        make_head(14, head),                           # 10         RF all        640
    )

def micro(head="place") -> nn.Sequential:
    """The limit: how far do 1,863 parameters go? A quarter of them says where evidence counts. Work
    costs no parameters, so this network pools a layer later and spends it on 28×28 maps."""
    return nn.Sequential(
        block(1, 6, activation=nn.SiLU),               # 6×28×28    RF 3           66
        down_block(6, 7, "overlap", nn.SiLU),          # 7×14×14    RF 7          392
        down_block(7, 7, "overlap", nn.SiLU),          # 7×7×7      RF 15         455
        block(7, 6, activation=nn.SiLU),               # 6×7×7      RF 23         390
        make_head(6, head),                            # 10         RF all        560
    )

def residual(head="conv") -> nn.Sequential:
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
# Named N1 to N4 after the sets of course notes. Where a printed figure is wrong, the layers decide.

def n1() -> nn.Sequential:
    """"Session 5": dropout that fades as the maps grow more abstract. The notes count 18,746."""
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

def conv(c_in: int, c_out: int, kernel=3, padding=1) -> nn.Sequential:
    """Convolution and ReLU, no batch norm: for the notes' first attempts."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, kernel, padding=padding), nn.ReLU())

def n2_plain() -> nn.Sequential:
    """Iteration 1 of four: convolution and ReLU only."""
    return nn.Sequential(
        conv(1, 16),                                   # 16×28×28   RF 3          160
        conv(16, 16),                                  # 16×28×28   RF 5        2,320
        conv(16, 32),                                  # 32×28×28   RF 7        4,640
        nn.MaxPool2d(2),                               # 32×14×14   RF 8            0
        conv(32, 16, 1, 0),                            # 16×14×14   RF 8          528
        conv(16, 32),                                  # 32×14×14   RF 12       4,640
        nn.MaxPool2d(2),                               # 32×7×7     RF 14           0
        conv(32, 16, 1, 0),                            # 16×7×7     RF 14         528
        conv(16, 16, 3, 0),                            # 16×5×5     RF 22       2,320
        nn.Flatten(),                                  # 400        RF all          0
        nn.Linear(400, 10),                            # 10         RF all      4,010
    )

def n2() -> nn.Sequential:
    """Iterations 2 to 4: batch norm and dropout. The notes count 19,418, elsewhere 19,300."""
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

def n3_original() -> nn.Sequential:
    """The starting point: wide, no batch norm, no dropout. The notes say "about 2.3M"."""
    return nn.Sequential(
        conv(1, 32),                                   # 32×28×28   RF 3          320
        conv(32, 64),                                  # 64×28×28   RF 5       18,496
        nn.MaxPool2d(2),                               # 64×14×14   RF 6            0
        conv(64, 128),                                 # 128×14×14  RF 10      73,856
        conv(128, 256),                                # 256×14×14  RF 14     295,168
        nn.MaxPool2d(2),                               # 256×7×7    RF 16           0
        conv(256, 512, 3, 0),                          # 512×5×5    RF 24   1,180,160
        conv(512, 1024, 3, 0),                         # 1024×3×3   RF 32   4,719,616
        nn.Conv2d(1024, 10, 3),                        # 10×1×1     RF 40      92,170
        nn.Flatten(),                                  # 10         RF all          0
    )

def n3() -> nn.Sequential:
    """The optimized network. Its last ReLU lets no evidence speak against a digit."""
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

def cifar() -> nn.Sequential:
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

NETWORKS = {"default": default, "tiny": tiny, "micro": micro, "residual": residual, "n1": n1,
            "n2-plain": n2_plain, "n2": n2, "n3-original": n3_original, "n3": n3, "cifar": cifar}
INPUT_SHAPES = {name: (3, 32, 32) if name == "cifar" else (1, 28, 28) for name in NETWORKS}

def build(name="default", **options) -> nn.Module:
    """The named network with fresh He weights. `options` go to its function: most take none, and
    raise TypeError."""
    net = NETWORKS[name](**options)
    he_init(net)
    return net

def count_parameters(net: nn.Module) -> int:
    """Learnable parameters (batch norm's running statistics are buffers and do not count)."""
    return sum(p.numel() for p in net.parameters())

