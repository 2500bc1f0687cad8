"""The learning-rate range test (Smith, 2015): one short sweep instead of a dozen trainings.

What it teaches: train for 200 steps while the rate grows from far too small to far too large, and
watch the loss. It tells where learning starts, where it is fastest and where it blows up; then a
coarse grid or a search with early stopping can look closer, on held-out images.

    python lr_finder.py                          sweep, figure, and a train.py command to go on with
    python lr_finder.py --opt adam --model n3    for what is named by the same flags as train.py's
    python lr_finder.py --check 3                is the recommended rate good? 3 seeds, 9 rates each
    python lr_finder.py --grid                   four classic configurations, one epoch each
    python lr_finder.py --search 8               8 random (lr, weight decay), the worse half stops

It prints a text plot and each pick with its reason, and writes lr_range.png into the folder --out.
--check, --grid and --search add rows to a CSV file there, which a rerun continues.
"""
import copy
import csv
import json
import math
import shlex
import statistics
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor, nn

from analyze import chart
from data import Parser, UserError, augment, batches, normalize, run_command, write_csv
from train import (DEFAULT_LR, LOSSES, add_shared_flags, load_for, make_config, make_training,
                   number, run_epoch, steps_per_epoch)

# ---- The sweep --------------------------------------------------------------------------------


def range_test(net: nn.Module, optimizer, batch_loss: Callable[[], Tensor], start=1e-6, factor=1.1,
               steps=200, end=None) -> tuple[list[float], list[float]]:
    """Train `net` for `steps` steps at growing rates; return (rates, losses), both of equal length.

    Step i runs at start·factorⁱ, or, if `end` is given, on a straight line from start to end.
    `batch_loss()` returns the loss of the next batch. The sweep stops early when the loss is not
    finite, or when the median of the last five is four times the lowest such median: a median, so
    that a single unlucky batch does not end it.

    One optimizer serves the whole sweep. The notes make a new one at each step, which throws the
    momentum away. Kept, a momentum of 0.9 adds up a steady gradient to ten times its step; thrown
    away, it never acts, and the sweep describes another optimizer than the one that will train
    (a restarted Adam takes steps of lr · sign(gradient)). A test shows the difference.

    Weights, buffers, gradients, optimizer, mode and random state (of the CPU and of CUDA) are put
    back afterwards.
    """
    state = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    gradients, was_training = [p.grad for p in net.parameters()], net.training
    rates, losses, lowest = [], [], math.inf
    try:
        with torch.random.fork_rng():
            net.train()
            for step in range(steps):
                lr = start * factor ** step
                if end is not None:
                    lr = start + (end - start) * step / (steps - 1)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.zero_grad()
                loss = batch_loss()
                rates.append(lr)
                losses.append(loss.item())
                recent = statistics.median(losses[-5:])
                lowest = min(lowest, recent)
                if not math.isfinite(losses[-1]) or recent > 4 * lowest:
                    break
                loss.backward()
                optimizer.step()
    finally:
        net.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
        net.train(was_training)
        for parameter, gradient in zip(net.parameters(), gradients):
            parameter.grad = gradient
    return rates, losses


# ---- Reading the curve ------------------------------------------------------------------------


def smooth(losses: list[float], beta=0.8) -> list[float]:
    """The curve without its noise; as long as `losses`. What is not finite counts as the worst.

    1. Median of five neighbours: a spike of one or two batches vanishes, and does not smear.
    2. Exponential moving average, divided by 1 - betaⁿ: without that bias correction the first
       values would be pulled towards the 0 it starts from.
    3. The same backwards, because an average over the past lags behind: it would move every pick
       beta/(1 - beta) = 4 steps, a factor of 1.5, to the right.
    """
    worst = max((loss for loss in losses if math.isfinite(loss)), default=0.0)
    finite = [loss if math.isfinite(loss) else worst for loss in losses]
    curve = [statistics.median(finite[max(0, i - 2):i + 3]) for i in range(len(finite))]
    for _ in range(2):
        average, smoothed = 0.0, []
        for n, value in enumerate(curve, start=1):
            average = beta * average + (1 - beta) * value
            smoothed.append(average / (1 - beta ** n))
        curve = smoothed[::-1]
    return curve


def pick_rates(rates: list[float], losses: list[float], beta=0.8) -> dict[str, float]:
    """Named rates read off a sweep: {name: lr}. Empty when the loss never falls.

    steepest         where the loss falls fastest per factor of e in the rate
    minimum / 10     a tenth of the rate at the lowest loss
    explosion        where the last rise begins, the one that ends the sweep (if it ends in one)
    explosion / 10   the notes' rule of thumb
    valley           on the longest descent, from the highest point before the lowest down to it,
                     where 80% of the way is done. A long slope crosses a level in one place,
                     whatever the noise; a maximum of a derivative jumps to any wiggle.
    recommended      four times the valley, as OneCycle's maximum, which is touched for a moment
                     only. The 4 was chosen on seeds 100 to 102; --check tries it on any others.
    """
    curve = smooth(losses, beta)
    if len(curve) < 3:
        return {}
    lowest = min(range(len(curve)), key=curve.__getitem__)
    first = max(range(lowest + 1), key=curve.__getitem__)        # where the longest descent starts
    if curve[first] - curve[lowest] < 0.05 * abs(curve[first]):
        return {}
    logs = [math.log(rate) for rate in rates]
    slopes = [(curve[i + 1] - curve[i - 1]) / (logs[i + 1] - logs[i - 1]) for i in range(1, lowest)]
    level = curve[first] - 0.8 * (curve[first] - curve[lowest])
    valley = next(i for i in range(first, lowest + 1) if curve[i] <= level)
    picks = {"recommended": 4 * rates[valley], "valley": rates[valley],
             "minimum / 10": rates[lowest] / 10}
    if slopes:
        picks["steepest"] = rates[1 + min(range(len(slopes)), key=slopes.__getitem__)]
    if losses[-1] > 2 * curve[lowest] or not math.isfinite(losses[-1]):
        rough, onset = smooth(losses, beta=0), len(losses) - 1   # spikes removed, edges still sharp
        while onset > 0 and rough[onset - 1] < rough[onset]:
            onset -= 1
        guilty = rates[max(0, onset - 1)]    # a loss is measured before its step: blame the last
        picks |= {"explosion": guilty, "explosion / 10": guilty / 10}
    return picks


REASONS = {
    "recommended": "four times the valley, for OneCycle's maximum, touched for a moment only",
    "valley": "80% of the longest descent is done here: a rate to hold, clear of the edge",
    "steepest": "the loss falls fastest here",
    "minimum / 10": "a tenth of the rate at the lowest loss",
    "explosion / 10": "a tenth of the rate at which the loss explodes (explosion, in the figure)",
}


def text_plot(rates: list[float], curve: list[float], picks: dict, width=72, height=12) -> str:
    """The smoothed curve in characters, for a remote shell; picks are marked on the axis below."""
    low, high = min(curve), min(max(curve), 2 * curve[0])            # the explosion leaves the plot
    rows = [[" "] * width for _ in range(height)]
    for column in range(width):
        loss = curve[column * (len(curve) - 1) // (width - 1)]
        if loss <= high:
            rows[round((high - loss) / (high - low or 1) * (height - 1))][column] = "*"
    axis, names = ["-"] * width, []
    for name in reversed(REASONS):                                   # the most important on top
        if name in picks:
            nearest = min(range(len(rates)), key=lambda i: abs(math.log(rates[i] / picks[name])))
            axis[nearest * (width - 1) // max(1, len(rates) - 1)] = name[0].upper()
            names.insert(0, f"{name[0].upper()} {name}")
    labels = [f"{high:8.3f} "] + [" " * 9] * (height - 2) + [f"{low:8.3f} "]
    return "\n".join([f"{label}|{''.join(row)}" for label, row in zip(labels, rows)]
                     + [" " * 9 + "+" + "".join(axis),
                        f"{'':10}{rates[0]:<10.1e}{'lr':^{width - 20}}{rates[-1]:>10.1e}",
                        f"{'':10}{'  '.join(names)}"])


def draw(path: Path, rates, losses, picks: dict, title: str, log_x: bool) -> None:
    curve = smooth(losses)
    chart([{"title": title, "x": "learning rate", "y": "training loss", "log_x": log_x,
            "y_range": (0.95 * min(losses), 1.5 * curve[0]), "marks": picks,
            "lines": {"loss of each batch": (rates, losses), "smoothed": (rates, curve)}}],
          path, columns=1)


# ---- Trying rates out -------------------------------------------------------------------------


def sweep(config: dict, data, device, **options) -> tuple[list[float], list[float]]:
    """range_test for a configuration of train.py, on its own training batches; always in float32
    and without clipping, which would hide the explosion."""
    net, _, optimizer, _ = make_training(config | {"sched": "none"}, data, device)
    torch.manual_seed(config["seed"])

    def endless():
        while True:
            yield from batches(*data.train, config["batch_size"])
    stream = endless()

    def batch_loss():
        images, labels = next(stream)
        logits = net(normalize(augment(images, config["augment"]), data.mean, data.std))
        return LOSSES[config["loss"]](logits, labels, label_smoothing=config["label_smoothing"])
    return range_test(net, optimizer, batch_loss, **options)


def trial(config: dict, data, device) -> dict:
    """Train a fresh network for config["epochs"] epochs of OneCycle and look at held-out images.

    Every trial with the same seed starts from the same weights and sees the same batches. OneCycle
    even for one epoch: a constant rate leaves the accuracy of a short training noisy, the descent
    to zero takes the noise out. Returns {"accuracy": percent, "note": what to think of the start}.
    """
    means = []                           # the running mean of each epoch's loss, a value a step
    training = make_training(config | {"sched": "onecycle"}, data, device)
    try:
        for epoch in range(1, config["epochs"] + 1):
            row = run_epoch(epoch, config, data, *training, sets=("val",),
                            show=lambda seen, loss, *_: means.append(loss))
    except UserError:
        return {"accuracy": math.nan, "note": "NaN: the rate is too large"}
    first_epoch = means[:steps_per_epoch(config, data)]
    return {"accuracy": row["val_accuracy"], "note": judge_start(first_epoch)}


def judge_start(means: list[float]) -> str:
    """What the first steps say about the rate, from the running means of their losses."""
    if max(means) > 2 * means[0]:
        return "the loss exploded: too large"
    n = min(100, len(means))
    if n >= 20:                          # two running means give the mean of the steps in between
        late = (n * means[n - 1] - (n - 10) * means[n - 11]) / 10
        if late > 0.9 * means[9]:        # the last ten of 100 steps, beside the first ten
            return "flat start: too small"
    return ""


TRIED = ("opt", "lr", "weight_decay", "epochs", "seed")
SETTINGS = ("model", "options", "data", "val", "limit", "augment", "momentum", "batch_size", "loss",
            "label_smoothing", "dropout", "clip", "ema", "amp")


def cached_trial(config: dict, data, device, path: Path) -> dict:
    """trial, remembered in a CSV file: a row with the same settings is not trained again."""
    key = {name: str(config[name]) for name in TRIED}
    key["settings"] = json.dumps({name: config[name] for name in SETTINGS})
    columns, rows = [*key, "accuracy", "note"], []
    if path.exists():
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
        if reader.fieldnames != columns:
            raise UserError(f"{path} is not a table of this script: move it away")
    for row in rows:
        if all(row[name] == value for name, value in key.items()):
            return {"accuracy": float(row["accuracy"]), "note": row["note"]}
    result = trial(config, data, device)
    write_csv(path, [*rows, key | result])
    return result


def parse_grid(text: str) -> list[dict]:
    """"sgd:1e-1,5e-4 adam:1e-3,0" -> [{"opt", "lr", "weight_decay"}, ...]. Raises UserError."""
    cells = []
    for word in text.split():
        try:
            opt, numbers = word.split(":")
            lr, weight_decay = map(float, numbers.split(","))
        except ValueError:
            raise UserError(f"--grid {word!r}: write optimizer:lr,weight_decay, "
                            "for example sgd:1e-1,5e-4")
        if opt not in DEFAULT_LR or not 0 < lr < math.inf or not 0 <= weight_decay < math.inf:
            raise UserError(f"--grid {word!r}: the optimizer is one of {', '.join(DEFAULT_LR)}, "
                            "lr is above 0 and weight_decay not below")
        cells.append({"opt": opt, "lr": lr, "weight_decay": weight_decay})
    if not cells:
        raise UserError("--grid is empty: write for example --grid \"sgd:1e-1,5e-4 adam:1e-3,0\"")
    return cells


def best_first(cells: list[dict]) -> list[dict]:
    """By accuracy; NaN, which compares with nothing, goes last."""
    return sorted(cells, reverse=True,
                  key=lambda cell: -1 if math.isnan(cell["accuracy"]) else cell["accuracy"])


def print_ranking(title: str, cells: list[dict], data) -> None:
    print(f"\n{title}, ranked on {len(data.val[0]):,} held-out images")
    for cell in best_first(cells):
        print(f"  {cell['accuracy']:6.2f}% of {data.name}  {cell['opt']:<8} lr {cell['lr']:<9.3g} "
              f"weight decay {cell['weight_decay']:<9.3g} {cell['note']}".rstrip(), flush=True)


def grid(cells: list[dict], config: dict, data, device, path: Path) -> None:
    """The lecture's coarse grid: a fresh network for each cell, everything else the same."""
    for cell in cells:
        cell |= cached_trial(config | cell, data, device, path)
    print_ranking(f"grid, {config['epochs']} epoch(s) each", cells, data)


def search(count: int, config: dict, data, device, path: Path) -> None:
    """Successive halving (Jamieson and Talwalkar, 2016) over random pairs of lr and weight decay.

    Most random pairs are bad and show it early. So all train for a little, the better half for
    twice as long, and so on to the last one. A rung starts again from fresh weights: a schedule
    that ends with its rung makes short trainings comparable, for at most twice the work.
    Both are drawn log-uniform: the question is "how many zeros?", so each decade counts the same.
    """
    middle = DEFAULT_LR[config["opt"]][1]
    generator = torch.Generator().manual_seed(config["seed"])
    draws = torch.rand(count, 2, generator=generator, dtype=torch.float64)
    cells = [{"opt": config["opt"],
              "lr": float(f"{middle * 10 ** (3 * a - 1.5):.3g}"),     # 1.5 decades either way
              "weight_decay": float(f"{10 ** (4 * b - 5):.3g}")}      # 1e-5 to 1e-1
             for a, b in draws.tolist()]
    epochs = config["epochs"]
    while True:
        for cell in cells:
            cell |= cached_trial(config | cell | {"epochs": epochs}, data, device, path)
        print_ranking(f"rung of {epochs} epoch(s), {len(cells)} left", cells, data)
        if len(cells) == 1:
            break
        cells, epochs = best_first(cells)[:math.ceil(len(cells) / 2)], 2 * epochs


def check(seeds: int, config: dict, data, device, path: Path, options: dict) -> None:
    """Is each pick stable, and is the recommended one good? For each seed a sweep, then one epoch
    of OneCycle with the recommended rate as its maximum, and with nine rates from 0.1 to 10 times
    train.py's default, a quarter of a decade apart."""
    middle = DEFAULT_LR[config["opt"]][1]
    usual = [float(f"{middle * 10 ** (k / 4):.3g}") for k in range(-4, 5)]
    found, gaps = {}, []
    print(f"{config['opt']}: held-out accuracy after one epoch\n"
          f"seed  recommended          best of nine         difference  data")
    for seed in range(config["seed"], config["seed"] + seeds):
        config = config | {"seed": seed, "epochs": 1}
        picks = pick_rates(*sweep(config, data, device, **options))
        for name, rate in picks.items():
            found.setdefault(name, []).append(rate)
        if not picks:
            raise UserError(f"the loss never fell for seed {seed}: there is no rate to check")
        lr = float(f"{picks['recommended']:.3g}")
        ours = cached_trial(config | {"lr": lr}, data, device, path)
        best = best_first([{"lr": lr} | cached_trial(config | {"lr": lr}, data, device, path)
                           for lr in usual])[0]
        gaps.append(round(best["accuracy"] - ours["accuracy"], 2))
        print(f"{seed:4}  {picks['recommended']:<8.3g} {ours['accuracy']:6.2f}%     "
              f"{best['lr']:<8.3g} {best['accuracy']:6.2f}%     {-gaps[-1]:+.2f}       {data.name}",
              flush=True)
    print(f"within 0.2 points of the best: {sum(gap <= 0.2 for gap in gaps)} of {len(gaps)}; "
          f"largest gap {max(gaps):.2f}\n\n"
          f"pick             median lr   spread over {seeds} seeds, in decades")
    for name, values in found.items():
        spread = math.log10(max(values) / min(values))
        print(f"{name:<16} {statistics.median(values):<11.3g} {spread:.2f}"
              + (f"   (in {len(values)} sweeps only)" if len(values) < seeds else ""))


# ---- The command line -------------------------------------------------------------------------


def parse():
    parser = Parser(prog="lr_finder.py", description="Learning-rate range test, grid and search.")
    add_shared_flags(parser)
    add = parser.add_argument
    add("--start", type=number(float, 0, open_low=True), default=1e-6, help="first rate")
    add("--factor", type=number(float, 1, open_low=True), default=1.1, help="growth a step")
    add("--steps", type=number(int, 10, 100_000), default=200)
    add("--linear", type=number(float, 0, open_low=True), metavar="END",
        help="grow on a straight line from --start to END instead")
    only = parser.add_mutually_exclusive_group().add_argument
    only("--grid", nargs="?", const="sgd:1e-1,5e-4 sgd:1e-2,5e-4 adam:3e-4,5e-4 adam:1e-3,0",
         metavar="CELLS", help='train a coarse grid, for example "sgd:1e-1,5e-4 adam:1e-3,0"')
    only("--search", type=number(int, 1), metavar="N", help="halve N random pairs down to one")
    only("--check", type=number(int, 1), metavar="SEEDS", help="test the recommendation")
    add("--epochs", type=number(int, 1), default=1, help="of a trial of --grid or first --search")
    add("--out", type=Path, default=Path("lr_finder"), help="folder for lr_range.png and CSV files")
    return parser, parser.parse_args()


def main() -> None:
    parser, args = parse()
    config = make_config(args)
    config["lr"] = args.start
    if args.linear and args.linear <= args.start:
        raise UserError(f"--linear {args.linear:g} must be above --start {args.start:g}")
    cells = parse_grid(args.grid) if args.grid is not None else []
    choosing = cells or args.search or args.check
    if choosing and not config["val"]:                     # choices are made on held-out images
        config["val"] = 1000 if args.data == "synthetic" else 10_000
    data, device = load_for(config)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out} cannot be a folder: {error.strerror}")
    options = {"start": args.start, "factor": args.factor, "steps": args.steps, "end": args.linear}
    if cells:
        return grid(cells, config, data, device, args.out / "grid.csv")
    if args.search:
        return search(args.search, config, data, device, args.out / "search.csv")
    if args.check:
        return check(args.check, config, data, device, args.out / "check.csv", options)

    rates, losses = sweep(config, data, device, **options)
    picks = pick_rates(rates, losses)
    print(text_plot(rates, smooth(losses), picks))
    title = f"{args.model} on {data.name}, {args.opt}, batches of {args.batch_size}"
    draw(args.out / "lr_range.png", rates, losses, picks, title, args.linear is None)
    print(f"\n{title}: {len(rates)} steps, {args.out / 'lr_range.png'}")
    if not picks:
        raise UserError("the loss never fell in this sweep: try a lower --start or more --steps")
    for name, reason in REASONS.items():
        if name in picks:
            print(f"  {name:<15} {picks[name]:<9.2g} {reason}")
    flags = [word for name, value in vars(args).items() if value != parser.get_default(name)
             and name not in ("start", "factor", "steps", "linear", "epochs", "out")
             for word in (f"--{name.replace('_', '-')}", str(value)) if word != "True"]
    print("\nnext: python train.py", *map(shlex.quote, flags),
          f"--sched onecycle --lr {picks['recommended']:.2g}")


if __name__ == "__main__":
    run_command(main)
