"""The learning-rate range test: one short sweep instead of a dozen trainings.

What it teaches: train for up to 200 steps while the learning rate grows from far too small to far
too large, and watch the loss. The curve shows where learning starts and where it breaks. Then a
grid of short trainings, or a random search, can look closer, on held-out images.

    python lr_finder.py                          the sweep, a picture, and the command to go on with
    python lr_finder.py --opt adam --model n3    another optimizer, another network
    python lr_finder.py --grid                   four classic settings, one epoch each
    python lr_finder.py --search 8               8 random settings, one epoch each

It takes the flags of train.py, too: network, data, optimizer, size of a batch and so on. (--clip
and --fade-from do not act in the sweep.)

Smith (2015) raised the rate linearly and watched the accuracy. fastai and the course notes (N4)
raise it exponentially and watch the loss, and so does this script.

It prints the rates that it reads off the curve. Each time it makes a new folder (lr_finder/001,
lr_finder/002, ...) for the picture lr_range.png or, with --grid and --search, the table trials.csv.
"""
import copy
import math
import shlex
import statistics

import data as digits           # before torch: data.py says why
from data import UserError, number, run_command, save

import torch
import torch.nn.functional as F

from analyze import chart
import train as training


# ---- The sweep --------------------------------------------------------------------------------

def range_test(network, make_optimizer, next_loss, start=1e-6, factor=1.1, steps=200):
    """Train a copy of the network at growing rates. Return (rates, losses), one of each per step.

    Step i has the rate start · factor^i. make_optimizer(network) returns its optimizer, which is
    kept for the whole sweep. next_loss(network) returns the loss of the next batch: of your own
    network, data and loss, if you like.
    """
    network = copy.deepcopy(network).train()         # the network of the caller stays as it is
    optimizer = make_optimizer(network)
    rates = []
    losses = []
    for step in range(steps):
        rate = start * factor ** step
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = next_loss(network)
        rates.append(rate)
        losses.append(loss.item())                   # it shows what the steps before this one did
        if is_over(losses):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return rates, losses


def is_over(losses):
    """Whether the training is broken: the loss is not finite, or each of the last ten losses is
    larger than each of the first ten."""
    if not math.isfinite(losses[-1]):
        return True
    return len(losses) >= 20 and min(losses[-10:]) > max(losses[:10])


# ---- Reading the curve ------------------------------------------------------------------------

def smooth(losses, reach=8):
    """For each step the median of its loss, of the `reach` losses before it and of those after it.

    The median ignores a single bad batch. Infinity and NaN count as the largest loss.
    """
    finite = [loss for loss in losses if math.isfinite(loss)]
    largest = max(finite, default=0.0)
    clean = [loss if math.isfinite(loss) else largest for loss in losses]
    curve = []
    for step in range(len(clean)):
        neighbours = clean[max(0, step - reach):step + reach + 1]
        curve.append(statistics.median(neighbours))
    return curve


def pick_rates(rates, losses):
    """Rates read off a sweep, by name. Empty if the loss does not fall clearly.

    recommended     a good maximum for OneCycle. The curve is flat near its lowest point. "Flat"
                    means: at most 5% of the whole fall above the lowest loss. This is the middle
                    between the first and the last flat rate.
    lowest          the rate at which the smoothed loss is lowest
    steepest        the middle of that factor of ten over which the loss falls most
    explosion / 10  a tenth of the rate at which the loss is back at its first level: the rule of
                    the notes. There is none if the sweep ends before.
    """
    curve = smooth(losses)
    if len(curve) < 20:
        return {}
    lowest_loss = min(curve)
    lowest_step = curve.index(lowest_loss)
    fall = curve[0] - lowest_loss
    noise = statistics.median(abs(loss - level) for loss, level in zip(losses, curve))
    if lowest_step == 0 or not fall > 2 * noise:
        return {}

    flat = [rate for rate, loss in zip(rates, curve) if loss <= lowest_loss + 0.05 * fall]
    middle = math.sqrt(flat[0] * flat[-1])           # on a logarithmic axis
    picks = {"recommended": middle, "lowest": rates[lowest_step]}
    ten = max(1, round(math.log(10) / math.log(rates[1] / rates[0])))    # steps per factor of ten
    falls = [curve[step - ten] - curve[step] for step in range(ten, lowest_step + 1)]
    if falls:
        picks["steepest"] = rates[falls.index(max(falls)) + ten // 2]
    for step in range(lowest_step, len(curve)):
        if curve[step] > curve[0]:
            picks["explosion / 10"] = rates[step] / 10
            break
    return picks


MEANINGS = {
    "recommended": "the middle of the flat part around the lowest loss: a maximum for OneCycle",
    "lowest": "the loss is lowest here; beyond it, steps are too large",
    "steepest": "the loss falls fastest here",
    "explosion / 10": "a tenth of the rate at which the loss is back where it began",
}


def sweep(args, data):
    """range_test with the network, the batches, the loss and the optimizer of train.py."""
    network = training.make_network(args, data)
    batches = endless_batches(args, data)

    def next_loss(network):
        images, labels = next(batches)
        images = digits.augment(images, args.augment)
        logits = network(digits.normalize(images, data.mean, data.std))
        return F.cross_entropy(logits, labels, label_smoothing=args.label_smoothing)

    return range_test(network, lambda network: training.make_optimizer(args, network), next_loss)


def endless_batches(args, data):
    """Batches of the training images, one epoch after another."""
    while True:
        yield from digits.batches(*data.train, args.batch_size)


def report_sweep(args, data):
    """Make the sweep, draw it, print its rates and the command to go on with."""
    rates, losses = sweep(args, data)
    curve = smooth(losses)
    picks = pick_rates(rates, losses)
    marks = {name: picks[name] for name in picks if name in ("recommended", "lowest")}
    title = f"{args.model} on {data.name}, {args.opt}, batches of {args.batch_size}"
    path = training.new_folder(args.out) / "lr_range.png"
    lowest_loss = min(curve)
    first_loss = curve[0]
    margin = 0.3 * (first_loss - lowest_loss)        # the explosion may leave the picture
    chart([{
        "title": title, "x_title": "learning rate", "y_title": "training loss", "log_x": True,
        "y_range": (lowest_loss - margin, first_loss + 2 * margin), "marks": marks,
        "lines": {"smoothed": (rates, curve), "each batch": (rates, losses)},
    }], path)
    print(f"{title}: {len(rates)} steps, loss {first_loss:.2f} at first, "
          f"{lowest_loss:.2f} at its lowest")
    print(f"picture: {path}")
    if not picks:
        raise UserError("not clear: the loss does not fall by more than its noise. Try larger "
                        "batches, or python train.py --sanity")
    for name, rate in picks.items():
        print(f"  {name:<15} {rate:<9.2g} {MEANINGS[name]}")
    words = ["python", "train.py"] + args.given + ["--lr", f"{picks['recommended']:.2g}"]
    print(f"next: {shlex.join(words)}")


# ---- Trying rates out -------------------------------------------------------------------------
#
# A grid or a search compares short trainings on held-out images. The test images are not used:
# a setting that was chosen on them would look better than it is. Every training starts from the
# same weights, sees the same batches and runs one whole OneCycle, so that its last accuracy has
# little noise.

# The lecture's. Write your own settings here.
GRID = [
    {"opt": "sgd", "lr": 1e-1, "weight_decay": 5e-4},
    {"opt": "sgd", "lr": 1e-2, "weight_decay": 5e-4},
    {"opt": "adam", "lr": 3e-4, "weight_decay": 5e-4},
    {"opt": "adam", "lr": 1e-3, "weight_decay": 0.0},
]


def random_settings(count, opt, seed):
    """`count` settings like those of GRID, at random. Each tries a new value of both rate and weight
    decay, where a grid repeats the same few values (Bergstra and Bengio, 2012)."""
    generator = torch.Generator().manual_seed(seed)
    _, peak_rate, _ = training.OPTIMIZERS[opt]
    settings = []
    for _ in range(count):
        a, b = torch.rand(2, generator=generator).tolist()
        lr = peak_rate * 10 ** (3 * a - 1.5)         # log-uniform, up to 1.5 decades each way
        weight_decay = 10 ** (4 * b - 5)             # from 1e-5 to 1e-1
        settings.append({"opt": opt, "lr": lr, "weight_decay": weight_decay})
    return settings


def try_settings(settings, args, data):
    """Train with each setting, print its accuracy on the held-out images, and the best one."""
    path = training.new_folder(args.out) / "trials.csv"
    print(f"{len(settings)} trainings, epochs: {args.epochs}; accuracy on {len(data.val[0]):,} "
          f"held-out images of {data.name} (nan: the loss exploded)", flush=True)
    rows = []
    for setting in settings:
        trial = training.changed(args, **setting)
        try:
            _, history = training.train(trial, training.without_test(data), quiet=True)
            accuracy = history[-1]["val_accuracy"]
        except training.LossNotFinite:               # the rate is too large; the others go on
            accuracy = math.nan
        rows.append({**setting, "accuracy": accuracy})
        save(path, digits.to_csv(rows))              # Ctrl-C keeps what was finished before
        print(f"  {accuracy:6.2f}%  {describe(setting)}", flush=True)

    finite = [row for row in rows if math.isfinite(row["accuracy"])]
    if not finite:
        raise UserError(f"the loss was never finite: try lower rates (table: {path})")
    best = max(finite, key=lambda row: row["accuracy"])
    print(f"best: {describe(best)}; table: {path}")


def describe(setting):
    """A setting in a few words."""
    return f"{setting['opt']}, lr {setting['lr']:.3g}, weight decay {setting['weight_decay']:.3g}"


# ---- The command line -------------------------------------------------------------------------

def parse_args():
    """The flags of this script; all others go to train.py. args.given is a list of these others as
    they were typed, for the command printed at the end."""
    parser = digits.Parser(prog="lr_finder.py",
                           description="Learning-rate range test, grid and random search. "
                                       "Takes the flags of train.py, too.")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--grid", action="store_true", help="train with each setting of GRID")
    either.add_argument("--search", type=number(int, 1, 1000), metavar="N",
                        help="train with N random settings")
    parser.add_argument("--epochs", type=number(int, 1, 9999),
                        help="of --grid and --search; 1 if not given")
    parser.add_argument("--out", default="lr_finder", help="where the folders are made")
    own, others = parser.parse_known_args()
    for word in others:
        if word.split("=")[0] in ("--lr", "--sched", "--runs", "--resume", "--sanity"):
            raise UserError(f"{word} is for train.py only")
    if own.epochs and not (own.grid or own.search):
        raise UserError("--epochs belongs to --grid and --search")
    own.epochs = own.epochs or 1
    args = training.changed(training.parse_args(others), **vars(own), given=others)
    if args.val == 0 and (args.grid or args.search):
        args.val = 5000                              # images to choose on
    return args


def main():
    args = parse_args()
    data = training.load_data(args)
    if args.grid:
        try_settings(GRID, args, data)
    elif args.search:
        try_settings(random_settings(args.search, args.opt, args.seed), args, data)
    else:
        report_sweep(args, data)


if __name__ == "__main__":
    run_command(main)
