"""The learning-rate range test (Smith, 2015): one short sweep instead of a dozen trainings.

What it teaches: train for up to 200 steps while the rate grows from far too small to far too large,
and watch the loss. It tells where learning starts, where it is fastest and where it blows up; then
a coarse grid or a search with early stopping can look closer, on held-out images.

    python lr_finder.py                          sweep, figure, and a train.py command to go on with
    python lr_finder.py --opt adam --model n3    train.py's flags say what is swept
    python lr_finder.py --grid                   four classic configurations, one epoch each
    python lr_finder.py --search 8               8 random (lr, weight decay), the worse half stops

A rate that is too small wastes the training, one that is too large breaks it, and between the two
lie decades. The lecture's way through them: the sanity checks (train.py --sanity), this sweep, a
coarse grid of one epoch each, then the two or three best for 10 to 20 epochs with a schedule; one
change at a time, compared with a baseline.

It prints each pick with its reason, and draws the curve as lr_range.png into the folder --out.
--grid and --search write a table there: trials-1.csv, trials-2.csv, ...; never over an old one.
"""
import copy, itertools, math, re, shlex, statistics
from pathlib import Path

from data import (Data, Parser, UserError, augment, batches, load, normalize, run_command, save,
                  to_csv, user_path)                 # before torch: see data.py

import torch
import torch.nn.functional as F
from torch import nn

from analyze import chart
from train import (DECAY, DEFAULT_LR, LR, make_config, make_network, make_optimizer, make_parser,
                   number, train)

# ---- The sweep --------------------------------------------------------------------------------

def range_test(net: nn.Module, optimizer_of, loss_of, start=1e-6, factor=1.1, steps=200) -> tuple:
    """Train a copy of `net` at growing rates; return (rates, losses), at most `steps` of each.

    Step i runs at start·factorⁱ. `optimizer_of(net)` makes the optimizer, `loss_of(net)` returns
    the loss of the next batch.
    """
    # A copy, with an optimizer of its own: the caller's network, its gradients, its mode and its
    # optimizer are not touched, so nothing has to be put back. Random numbers are forked likewise.
    net, rates, losses, lowest = copy.deepcopy(net).train(), [], [], math.inf
    # One optimizer for the whole sweep. The notes make a new one at each step, which throws its
    # momentum away. Kept, 0.9 adds up a steady gradient to ten times its step; thrown away, it
    # never acts, and the sweep is about another optimizer than the one that will train (a new Adam
    # takes steps of lr·sign(gradient)).
    optimizer = optimizer_of(net)
    with torch.random.fork_rng():                    # of the CPU, and of CUDA where it is in use
        for step in range(steps):
            # Multiplied, not added: the question is "how many zeros?", and 200 steps of 10% pass
            # through eight of them, 24 steps for each.
            lr = start * factor ** step
            for group in optimizer.param_groups:     # with and without weight decay: see train.py
                group["lr"] = lr
            loss = loss_of(net)
            rates.append(lr)
            losses.append(loss.item())               # before this step: the fruit of earlier ones
            # Enough is seen when the loss is not finite, or four times its lowest; the median of
            # five, so that a single unlucky batch does not end the sweep.
            recent = statistics.median(losses[-5:])
            lowest = min(lowest, recent)
            if not math.isfinite(losses[-1]) or recent > 4 * lowest:
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()                         # at this rate: the next loss will show it
    return rates, losses

# ---- Reading the curve ------------------------------------------------------------------------

def smooth(losses: list[float], beta=0.8) -> list[float]:
    """The curve without its noise; as long as `losses`. What is not finite counts as the worst."""
    worst = max((loss for loss in losses if math.isfinite(loss)), default=0.0)
    # NaN is neither larger nor smaller than anything: a single one would spoil what follows.
    finite = [loss if math.isfinite(loss) else worst for loss in losses]
    # First the median of five neighbours: a spike of one or two batches vanishes, in place of being
    # smeared over its surroundings, as any average would do.
    curve = [statistics.median(finite[max(0, i - 2):i + 3]) for i in range(len(finite))]     # ±2
    # Then an exponential moving average. It starts at 0, which pulls its first values down: divided
    # by 1 - betaⁿ they are right (Adam does the same). And it lags behind, by beta/(1 - beta) = 4
    # steps, a factor of 1.5 in the rate; so it is done again backwards, which undoes the lag.
    for _ in range(2):
        average, smoothed = 0.0, []
        for n, value in enumerate(curve, start=1):
            average = beta * average + (1 - beta) * value        # 80% of the past, 20% news
            smoothed.append(average / (1 - beta ** n))
        curve = smoothed[::-1]                       # twice reversed, it is the right way round
    return curve

def pick_rates(rates: list[float], losses: list[float], beta=0.8) -> dict[str, float]:
    """Named rates read off a sweep: {name: lr}, the most important first. Empty when the loss
    never falls by a twentieth: then the sweep was too short, or its rates too small."""
    curve = smooth(losses, beta)
    if len(curve) < 3:                               # no slope without a neighbour on either side
        return {}
    # The descent to read ends at the lowest point, and begins at the highest one before it. What
    # comes after the lowest is the explosion, and may be higher than both.
    lowest = min(range(len(curve)), key=curve.__getitem__)
    first = max(range(lowest + 1), key=curve.__getitem__)
    fall = curve[first] - curve[lowest]              # the way that is gone, in units of loss
    if not fall > 0.05 * abs(curve[first]):
        return {}
    # Where is 80% of the longest descent done? A long slope crosses a level in one place; the
    # steepest point, the maximum of a derivative, may jump to a wiggle (with adam it does: README).
    # OneCycle's maximum, touched for a moment, may be four times that (chosen on seeds 100 to 102).
    valley = next(i for i in range(first, lowest + 1) if curve[i] <= curve[first] - 0.8 * fall)
    picks = {"recommended": 4 * rates[valley], "valley": rates[valley]}
    # The slope is that against log(lr), as in the figure, where all steps are equally wide.
    if lowest > 1:
        picks["steepest"] = rates[min(range(1, lowest), key=lambda i: curve[i + 1] - curve[i - 1])]
    # At the lowest point the loss no longer falls: to be held, that rate is too large already.
    picks["minimum / 10"] = rates[lowest] / 10
    if losses[-1] > 2 * curve[lowest] or not math.isfinite(losses[-1]):
        # The sweep ended in an explosion. Where did that begin? Walk back down from the end while
        # the curve still falls; without the averages, which would blunt the edge. The loss of a
        # step is measured before the step, so the guilty rate is the one before.
        rough, onset = smooth(losses, beta=0), len(losses) - 1
        while onset > 0 and rough[onset - 1] < rough[onset]:
            onset -= 1
        picks["explosion"] = rates[max(0, onset - 1)]
        picks["explosion / 10"] = picks["explosion"] / 10
    return picks

# What each pick means, printed beside it: a number without its reason is a spell.
REASONS = {
    "recommended": "four times the valley, for OneCycle's maximum, touched for a moment only",
    "valley": "80% of the longest descent is done here: a rate to hold, clear of the edge",
    "steepest": "the loss falls fastest here",
    "minimum / 10": "a tenth of the rate at the lowest loss",
    "explosion": "the last rise begins here, the one that ends the sweep",
    "explosion / 10": "a tenth of that: the notes' rule of thumb",
}

# ---- Trying rates out -------------------------------------------------------------------------

def sweep(config: dict, data: Data, **options) -> tuple[list[float], list[float]]:
    """range_test for a configuration of train.py, on its own training batches: the same network,
    augmentation, loss and optimizer, or the rate found would be that of another training. Without
    clipping, which would hide the explosion."""
    endless = itertools.chain.from_iterable(         # one epoch after another, each shuffled anew
        batches(*data.train, config["batch_size"]) for _ in itertools.count())

    def loss_of(net):                                # the step of train.py's loop, up to the loss
        images, labels = next(endless)
        logits = net(normalize(augment(images, config["augment"]), data.mean, data.std))
        return F.cross_entropy(logits, labels, label_smoothing=config["label_smoothing"])
    return range_test(make_network(config, data), lambda net: make_optimizer(config, net), loss_of,
                      **options)

def trial(cell: dict, config: dict, data: Data) -> dict:
    """Train a fresh network with the cell's optimizer, rate and decay; return the cell with its
    accuracy in percent of the held-out images, and a note on how it went.

    Every trial starts from the same weights and sees the same batches. OneCycle even for one epoch:
    a constant rate leaves the accuracy of a short training noisy, the descent to zero takes the
    noise out. The test images are left out: choosing on them would use them up.
    """
    try:
        rows = train(config | cell, data._replace(test=tuple(x[:0] for x in data.test)))[1]
        accuracy, note = rows[-1]["val_accuracy"], ""
        if rows[0]["train_loss"] > 0.95 * math.log(10):      # ln 10: of ten digits, each as likely
            note = "the first epoch learned little: too large or too small"
    except UserError as error:
        if "the loss is" not in str(error):          # a network that cannot take the images, say
            raise
        # A rate that breaks the training is an answer, not an accident: the others go on.
        accuracy, note = math.nan, "not finite: too large"
    print(f"  {accuracy:6.2f}% of {data.name}  {cell['opt']:<8} lr {cell['lr']:<9.3g} weight decay "
          f"{cell['weight_decay']:<9.3g} {note}".rstrip(), flush=True)
    return cell | {"accuracy": accuracy, "note": note}

def compete(cells: list[dict], halve: bool, config: dict, data: Data, path: Path) -> None:
    """Train all cells and rank them on held-out images. With `halve`, the better half goes on to
    twice the epochs, and so on to the last one (Jamieson and Talwalkar, 2016): most random pairs
    are bad and show it early."""
    table = []                                       # all rows of all rungs, for the file
    while True:
        # A rung starts again from fresh weights: a schedule that ends with its rung makes short
        # trainings comparable, for at most twice the work.
        print(f"{len(cells)} trainings of {cells[0]['epochs']} epoch(s):", flush=True)
        rows = [trial(cell, config, data) for cell in cells]
        rows.sort(key=lambda row: -row["accuracy"] if row["accuracy"] >= 0 else 1)   # NaN is last
        table += rows
        save(path, to_csv(table))                    # after each rung, so Ctrl-C keeps earlier ones
        if math.isnan(rows[0]["accuracy"]):
            raise UserError(f"no training stayed finite: try lower rates (table: {path})")
        print(f"best on {len(data.val[0]):,} held-out images: {rows[0]['opt']}, lr "
              f"{rows[0]['lr']:g}, weight decay {rows[0]['weight_decay']:g}; table: {path}")
        if not halve or len(cells) == 1:
            return
        # With half as many for twice as long, each rung costs about as much as the first.
        cells = [row | {"epochs": 2 * row["epochs"]} for row in rows[:math.ceil(len(rows) / 2)]]

def cell(text: str) -> dict:
    """An argparse type: "sgd:1e-1,5e-4" -> {"opt", "lr", "weight_decay"}."""
    opt, lr, decay = re.split("[:,]", text)          # not three: a ValueError, for argparse to tell
    if opt not in DEFAULT_LR:
        raise ValueError
    return {"opt": opt, "lr": LR(lr), "weight_decay": DECAY(decay)}

def random_cells(count: int, opt: str, seed: int) -> list[dict]:
    """Random pairs of lr and weight decay: each tries a new value of both, where a grid of as many
    repeats each value (Bergstra and Bengio, 2012)."""
    draws = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)).tolist()
    # Log-uniform, so that each decade counts the same: 1.5 decades either way of the default rate,
    # and a decay of 1e-5 to 1e-1.
    return [{"opt": opt, "lr": float(f"{DEFAULT_LR[opt][1] * 10 ** (3 * a - 1.5):.3g}"),
             "weight_decay": float(f"{10 ** (4 * b - 5):.3g}")} for a, b in draws]

# ---- The command line -------------------------------------------------------------------------

def report(args, config: dict, data: Data) -> dict[str, float]:
    """Make the sweep that the flags ask for, draw it, print its picks, return them."""
    rates, losses = sweep(config, data, start=args.start, factor=args.factor, steps=args.steps)
    curve, picks, path = smooth(losses), pick_rates(rates, losses), args.out / "lr_range.png"
    title = f"{config['model']} on {data.name}, {config['opt']}, batches of {config['batch_size']}"
    # The curve leaves the picture where it explodes: the descent would be a flat line below that.
    chart([{"title": title, "x": "learning rate", "y": "training loss", "log_x": True,
            "y_range": (0.95 * min(losses), 1.5 * curve[0]), "marks": picks,
            "lines": {"loss of each batch": (rates, losses), "smoothed": (rates, curve)}}],
          path, columns=1)
    print(f"{title}: loss {curve[0]:.2f} to {min(curve):.2f} in {len(rates)} steps, {path}")
    if not picks:
        raise UserError("the loss never fell by a twentieth in this sweep: try more --steps or a "
                        "larger --factor; python train.py --sanity checks the rest")
    for name, rate in picks.items():
        print(f"  {name:<15} {rate:<9.2g} {REASONS[name]}")
    return picks

def main() -> None:
    parser = Parser(prog="lr_finder.py", description="Learning-rate range test, grid, search, with "
                    "the flags of train.py, but for --lr and --sched; --epochs is 1, if not given.")
    add, either = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    add("--start", type=LR, default=1e-6, help="first rate")
    add("--factor", type=number(float, 1.0001), default=1.1, help="growth a step")
    add("--steps", type=number(int, 10, 100_000), default=200, help="of the sweep")
    either("--grid", type=cell, nargs="*", metavar="OPT:LR,DECAY",
        help="train each of these, such as sgd:0.1,5e-4 adam:1e-3,0; alone: four classic ones")
    either("--search", type=number(int, 1), metavar="N", help="halve N random pairs down to one")
    add("--out", type=user_path, default="lr_finder", help="folder for lr_range.png and tables")
    args, words = parser.parse_known_args()          # words: the flags of train.py
    config = make_config(make_parser().parse_args(["--epochs=1", *words]))     # words come later
    config["sched"] = "onecycle"
    # --grid alone is the lecture's.
    grid = args.grid or map(cell, "sgd:1e-1,5e-4 sgd:1e-2,5e-4 adam:3e-4,5e-4 adam:1e-3,0".split())
    pairs = random_cells(args.search or 0, config["opt"], config["seed"])
    cells = [cell | {"epochs": config["epochs"]} for cell in (pairs if args.grid is None else grid)]
    if cells and not config["val"]:                  # choices are made on held-out images
        config["val"] = 1000 if config["data"] == "synthetic" else 10_000
    data = load(*(config[name] for name in ("data", "data_dir", "device", "val", "limit")))
    if cells:
        # The first name that is not taken: an earlier table is never written over, nor read.
        names = (args.out / f"trials-{n}.csv" for n in itertools.count(1))
        path = next(name for name in names if not name.exists())
        return compete(cells, bool(args.search), config, data, path)
    picks = report(args, config, data)
    # A longer training would choose larger batches, and a rate belongs to its batches.
    words += [] if "--batch-size" in words else ["--batch-size", str(config["batch_size"])]
    print("next: python train.py", shlex.join(words),
          f"--sched onecycle --lr {picks['recommended']:.2g}")

if __name__ == "__main__":
    run_command(main)
