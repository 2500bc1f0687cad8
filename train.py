"""Train a network of fewer than 20,000 parameters to read digits, in a loop that fits on a screen.

What it teaches: what happens at each step of training and in which order, in what the optimizers
and the schedules differ, and how a result is reported: the last epoch, several seeds, mean, spread.

    python train.py                                           the project's own recipe
    python train.py --opt sgd --sched onecycle --device cuda  the same recipe, on a GPU
    python train.py --opt adam                                another optimizer, its own defaults
    python train.py --runs 5                                  five seeds: a claim is a distribution
    python train.py --val 10000                               hold out images to choose things on
    python train.py --data synthetic --epochs 2               a first try without a download
    python train.py --resume runs/001                         go on after Ctrl-C

It prints two lines an epoch, then a summary, and saves in a folder of its own (runs/001, runs/002,
...): config.json, log.csv, curves.png, checkpoint.pt (to go on from) and weights.pt (the result).
"""
import argparse
import copy
import functools
import json
import math
import os
import shlex
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler

from analyze import curves, evaluate
from data import (NAMES, PRESETS, Parser, UserError, augment, batches, load, normalize, one_line,
                  run_command, write_aside, write_csv)
from model import INPUT_SHAPES, NETWORKS, build, count_parameters, set_dropout

# ---- The loss ---------------------------------------------------------------------------------


def nll_loss(logits: Tensor, labels: Tensor, label_smoothing=0.0) -> Tensor:
    """The notes' form: log-softmax, then the negative log-likelihood of the label.

    Equal to F.cross_entropy, which does both at once. Label smoothing (Szegedy et al., 2016) mixes
    the label with a uniform distribution, so that the logits need not grow without end.
    """
    log_probabilities = F.log_softmax(logits, dim=1)
    return ((1 - label_smoothing) * F.nll_loss(log_probabilities, labels)
            - label_smoothing * log_probabilities.mean())


LOSSES = {"cross-entropy": F.cross_entropy, "nll": nll_loss}

# ---- Optimizers and schedules -----------------------------------------------------------------
# Two default rates an optimizer. The first is for schedules that start with it, and lies in the
# usual range (sgd 1e-3 to 1e-1, the Adams 3e-4 to 1e-3). The second is OneCycle's maximum: it is
# reached for a moment only, so it may be a good deal larger, and should be. `lr_finder.py` measures
# where it lies; the README says how well.

DEFAULT_LR = {"sgd": (0.05, 0.2), "adam": (1e-3, 1e-2), "adamw": (1e-3, 1e-2),
              "rmsprop": (1e-3, 3e-3)}
DEFAULT_WEIGHT_DECAY = {"sgd": 5e-4, "adam": 0.0, "adamw": 1e-2, "rmsprop": 0.0}
SCHEDULES = ("none", "step", "cosine", "onecycle", "plateau")


def make_optimizer(name: str, net: nn.Module, lr: float, weight_decay: float, momentum=0.9):
    """sgd (Nesterov momentum), adam, adamw or rmsprop over the parameters of `net`.

    Weight decay is left off everything with one dimension: batch norm's scales and shifts, and
    biases. In front of batch norm the size of a convolution's weights changes nothing: decay keeps
    them small, and so keeps the steps large beside them (van Laarhoven, 2017). A channel's scale
    and offset do change the function; pulled towards 0, they would only switch the channel off.
    """
    parameters = list(net.parameters())
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
              {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)
    if name == "adam":
        return torch.optim.Adam(groups, lr=lr, betas=(momentum, 0.999))
    if name == "adamw":       # decays the weights themselves; adam adds the decay to the gradient
        return torch.optim.AdamW(groups, lr=lr, betas=(momentum, 0.999))
    if name == "rmsprop":
        return torch.optim.RMSprop(groups, lr=lr, alpha=0.99)
    raise ValueError(f"no optimizer is called {name!r}")


def make_scheduler(name: str, optimizer, epochs: int, steps_per_epoch: int):
    """How the learning rate changes. Only onecycle is stepped after each batch, the rest after each
    epoch; plateau is stepped with the validation loss.

    onecycle (Smith, 2018) climbs from lr/25 to lr in the first 20% of all steps and comes down to
    almost nothing along a cosine: large steps find a wide valley, small ones settle in it. Momentum
    stays as given.
    """
    if name == "none":
        return lr_scheduler.ConstantLR(optimizer, factor=1.0)
    if name == "step":
        return lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.5)
    if name == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    if name == "plateau":
        return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=2)
    if name == "onecycle":
        if epochs * steps_per_epoch < 6:     # a fifth of the steps has to be more than one
            raise UserError("onecycle needs 6 steps or more: raise --epochs or lower --batch-size")
        return lr_scheduler.OneCycleLR(optimizer, max_lr=optimizer.param_groups[0]["lr"],
                                       total_steps=epochs * steps_per_epoch, pct_start=0.2,
                                       cycle_momentum=False)
    raise ValueError(f"no schedule is called {name!r}")


# ---- The loop ---------------------------------------------------------------------------------


def train_epoch(net, average, data, optimizer, scheduler, batch_size, loss_function=F.cross_entropy,
                preset="default", clip=0.0, ema=0.999, step=0, amp=False, show=lambda *_: None):
    """One pass over the training images. Returns (mean loss, accuracy in percent, last batch_id).

    Both are measured while the network learns, on augmented images and with dropout on: they lag
    behind the test figures, and that is no mistake. With label smoothing 0.1 the loss cannot fall
    below 0.50 either, the entropy of a target of 91% and nine times 1%; the test loss is without.
    `step` counts the batches of earlier epochs. Raises UserError when the loss is not finite.
    """
    net.train()
    loss_sum = correct = seen = 0
    for batch_id, (images, labels) in enumerate(batches(*data.train, batch_size)):
        x = normalize(augment(images, preset), data.mean, data.std)
        optimizer.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            logits = net(x)                  # bfloat16 has float32's range: no loss scaling needed
        loss = loss_function(logits.float(), labels)
        if not math.isfinite(loss.item()):
            raise UserError(f"the loss is {loss.item()} at batch {batch_id}, "
                            f"lr {optimizer.param_groups[0]['lr']:.6g}")
        loss.backward()
        if clip:                             # shrink all gradients together if their norm is larger
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        if isinstance(scheduler, lr_scheduler.OneCycleLR):
            scheduler.step()
        update_average(average, net, ema, step + batch_id)
        loss_sum += loss.item() * len(labels)
        correct += (logits.argmax(1) == labels).sum().item()
        seen += len(labels)
        show(seen, loss_sum / seen, 100 * correct / seen, optimizer.param_groups[0]["lr"])
    return loss_sum / seen, 100 * correct / seen, batch_id


@torch.no_grad()
def update_average(average: nn.Module, net: nn.Module, ema: float, step: int) -> None:
    """Move `average` a little towards `net`: a moving average of the weights (Polyak and Juditsky,
    1992). The weights of one step are noisy, their average is less so, and it costs no training.

    It keeps (1 + step)/(10 + step) of itself, `ema` at most: early on it looks back over a ninth of
    the steps so far, later over 1/(1 - ema) steps. With ema = 0 it is a copy of `net`.
    """
    keep = min(ema, (1 + step) / (10 + step))
    for slow, fast in zip(average.state_dict().values(), net.state_dict().values()):
        slow.lerp_(fast, 1 - keep) if slow.is_floating_point() else slow.copy_(fast)


def steps_per_epoch(config: dict, data) -> int:
    return math.ceil(len(data.train[0]) / config["batch_size"])


def make_training(config: dict, data, device):
    """Fresh (net, average, optimizer, scheduler) of a configuration; the seed fixes the weights."""
    torch.manual_seed(config["seed"])
    net = build(config["model"], **config["options"])
    if config["dropout"] is not None and not set_dropout(net, config["dropout"]):
        raise UserError(f"--dropout: the network {config['model']!r} has no dropout layer")
    net = net.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(config["opt"], net, config["lr"], config["weight_decay"],
                               config["momentum"])
    scheduler = make_scheduler(config["sched"], optimizer, config["epochs"],
                               steps_per_epoch(config, data))
    return net, copy.deepcopy(net), optimizer, scheduler


def run_epoch(epoch: int, config: dict, data, net, average, optimizer, scheduler,
              sets=("val", "test"), show=lambda *_: None) -> dict:
    """Train one epoch (counted from 1), evaluate the averaged weights, return one row of the log.
    Its "lr" is the rate after the epoch's last batch, as in the notes.

    Every epoch starts its own random numbers from (seed, epoch): a resumed run draws the same
    order, warps and dropout as one never interrupted, and no generator has to be saved.
    """
    started = time.perf_counter()
    torch.manual_seed(10_000 * config["seed"] + epoch)
    steps = steps_per_epoch(config, data) * (epoch - 1)
    loss_function = functools.partial(LOSSES[config["loss"]],
                                      label_smoothing=config["label_smoothing"])
    loss, accuracy, batch_id = train_epoch(
        net, average, data, optimizer, scheduler, config["batch_size"], loss_function,
        config["augment"], config["clip"], config["ema"], steps, config["amp"], show)
    row = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"], "batch_id": batch_id,
           "train_loss": loss, "train_accuracy": accuracy}
    for name in sets:
        images, labels = getattr(data, name)
        if len(images):
            result = evaluate(average, images, labels, data.mean, data.std)
            if not math.isfinite(result["loss"]):
                raise UserError(f"the {name} loss is {result['loss']} after the last step")
            row |= {f"{name}_loss": result["loss"], f"{name}_accuracy": 100 * result["accuracy"]}
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(row["val_loss"])
    elif not isinstance(scheduler, lr_scheduler.OneCycleLR):
        scheduler.step()
    return row | {"seconds": time.perf_counter() - started}


# ---- One run, and what it leaves behind -------------------------------------------------------


def new_folder(out: Path) -> Path:
    """Create out/001, out/002, ...: the first number after all that are there. Never an old one."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        number = max([int(p.name) for p in out.iterdir() if p.name.isdecimal()], default=0) + 1
        folder = out / f"{number:03d}"
        folder.mkdir()
        return folder
    except FileExistsError:
        if out.is_dir():                     # another run took the number a moment ago
            return new_folder(out)
        raise UserError(f"--out {out} is a file, not a folder")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}")


def save(folder: Path, config: dict, epoch: int, rows: list, net, average, optimizer,
         scheduler) -> None:
    """The checkpoint and what is derived from it. Interrupted at any point, each file is whole, and
    the checkpoint, written first, has everything that --resume needs."""
    state = {"config": config, "epoch": epoch, "rows": rows, "net": net.state_dict(),
             "average": average.state_dict(), "optimizer": optimizer.state_dict(),
             "scheduler": scheduler.state_dict()}
    with write_aside(folder / "checkpoint.pt") as path, open(path, "wb") as file:
        torch.save(state, file)
    with write_aside(folder / "config.json") as path:
        path.write_text(json.dumps(config, indent=1))
    if rows:
        write_csv(folder / "log.csv", rows)
        curves(rows, folder / "curves.png")


def load_checkpoint(folder: Path) -> dict:
    """What save() left in a run folder. Raises UserError."""
    path, text = folder / "checkpoint.pt", folder / "config.json"
    here = {"data_dir": None, "device": None}            # may change from one machine to the next
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        config = state["config"] | here
        if text.exists() and json.loads(text.read_text()) | here != config:
            raise ValueError("it began with other settings than config.json has, and a run keeps "
                             "its settings")
    except FileNotFoundError:
        raise UserError(f"--resume {folder}: no run folder (it has no checkpoint.pt)")
    except Exception as error:       # whatever a damaged file can do to json, zip, pickle and torch
        raise UserError(f"--resume {folder}: cannot go on from {path}: {one_line(error)}")
    return state


def train(config: dict, data, training, folder: Path, state=None) -> list[dict]:
    """Train to the last epoch, saving after each; return the rows of the log. `training` is what
    make_training returns, `state` a checkpoint to go on from.

    The last epoch is the result, not the best one: picking the best epoch by its test accuracy, as
    the notes do, makes a choice on the test set, and the maximum of 18 noisy numbers flatters.
    """
    epoch, rows = 0, []
    if state:
        for part, name in zip(training, ("net", "average", "optimizer", "scheduler")):
            part.load_state_dict(state[name])
        epoch, rows = state["epoch"], state["rows"]
        print(f"{folder}: going on after epoch {epoch} of {config['epochs']}")
    save(folder, config, epoch, rows, *training)     # it can be resumed from its first moment on
    for epoch in range(epoch + 1, config["epochs"] + 1):
        try:
            rows.append(run_epoch(epoch, config, data, *training,
                                  show=progress_line(epoch, config, data)))
        except UserError as error:
            raise UserError(f"epoch {epoch}: {error}. Try a lower --lr (now {config['lr']:g}) or "
                            f"--clip 1; {folder}/checkpoint.pt holds epoch {epoch - 1}")
        save(folder, config, epoch, rows, *training)
        print_epoch(rows[-1], data)
    with write_aside(folder / "weights.pt") as path, open(path, "wb") as file:
        torch.save(training[1].state_dict(), file)       # of the averaged network
    return rows


# ---- What is printed --------------------------------------------------------------------------


def progress_line(epoch: int, config: dict, data):
    """A function that redraws one line while an epoch runs; silent where there is no terminal."""
    started, total, drawn = time.perf_counter(), len(data.train[0]), 0.0

    def show(seen, loss, accuracy, lr):
        nonlocal drawn
        now = time.perf_counter()
        if not sys.stdout.isatty() or (now - drawn < 0.1 and seen < total):
            return
        drawn = now
        speed = seen / (now - started)
        left = int((total * (config["epochs"] - epoch + 1) - seen) / speed)
        bar = "#" * (10 * seen // total)
        line = (f"epoch {epoch}/{config['epochs']} [{bar:.<10}] loss {loss:.3f} accuracy "
                f"{accuracy:.2f}% ({data.name}) lr {lr:.4f} {speed:,.0f} images/s "
                f"{left // 60}:{left % 60:02d} left")
        line = line[:shutil.get_terminal_size().columns - 1]     # a wrapped line cannot be redrawn
        print(f"\r{line}\x1b[K", end="\r\x1b[K" if seen == total else "", flush=True)
    return show


def print_epoch(row: dict, data) -> None:
    """The two lines of the notes; a third one for held-out images."""
    print(f"Train: Loss={row['train_loss']:.4f} Batch_id={row['batch_id']} LR={row['lr']:.6f} "
          f"Accuracy={row['train_accuracy']:.2f} ({data.name})")
    for name, title in (("val", "Validation set"), ("test", "Test set")):
        if f"{name}_loss" in row:
            count, accuracy = len(getattr(data, name)[0]), row[f"{name}_accuracy"]
            print(f"{title}: Average loss: {row[f'{name}_loss']:.4f}, Accuracy: "
                  f"{round(accuracy * count / 100)}/{count} ({accuracy:.2f}%) ({data.name})",
                  flush=True)


def print_summary(rows: list[dict], config: dict, data, net: nn.Module, folder: Path) -> None:
    row, count, seconds = rows[-1], len(data.test[0]), sum(row["seconds"] for row in rows)
    errors = count - round(row["test_accuracy"] * count / 100)
    print(f"""
{data.name}: {row['test_accuracy']:.2f}% of {count:,} test images right after the last epoch
errors     {errors}
network    {config['model']}, {count_parameters(net):,} parameters
training   {config['epochs']} epochs in {seconds:.0f} s on {data.mean.device}, seed {config['seed']}
saved in   {folder}: weights.pt, log.csv, curves.png, config.json, checkpoint.pt
next       python analyze.py --run {shlex.quote(str(folder))}""")


def print_distribution(accuracies: list[float], data) -> None:
    print(f"\n{data.name} test accuracy of the last epoch, {len(accuracies)} seeds: "
          f"{' '.join(f'{a:.2f}' for a in accuracies)}\n"
          f"{data.name} mean {statistics.mean(accuracies):.3f}%  standard deviation "
          f"{statistics.stdev(accuracies):.3f}  minimum {min(accuracies):.2f}  "
          f"maximum {max(accuracies):.2f}")


# ---- The command line -------------------------------------------------------------------------


def number(kind, low, high=10 ** 9, open_low=False):
    """An argparse type: a number of `kind` from low to high (above low, if open_low)."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or (open_low and value == low):
            limits = f"above {low}" if open_low else f"at least {low}"
            raise argparse.ArgumentTypeError(f"{text} must be {limits} and at most {high}")
        return value
    parse.__name__ = kind.__name__           # argparse says "invalid float value" by this name
    return parse


def add_shared_flags(parser) -> None:
    """The flags that lr_finder.py understands too."""
    add = parser.add_argument
    add("--model", choices=NETWORKS, default="default")
    add("--head", choices=("conv", "linear"), help="the default network's last layers (conv)")
    add("--down", choices=("pool", "stride"), help="how it halves height and width (pool)")
    add("--activation", choices=("silu", "relu"), help="what follows its batch norms (silu)")
    add("--data", choices=NAMES, default="mnist")
    add("--data-dir", default="data", help="where the data set is or will be put")
    add("--augment", choices=PRESETS, default="default")
    add("--opt", choices=DEFAULT_LR, default="sgd")
    add("--momentum", type=number(float, 0, 0.9999), default=0.9,
        help="sgd's; beta1 of the Adams; rmsprop has none")
    add("--weight-decay", type=number(float, 0), help="default: by optimizer")
    add("--batch-size", type=number(int, 1), default=128)
    add("--loss", choices=LOSSES, default="cross-entropy")
    add("--label-smoothing", type=number(float, 0, 0.9), default=0.1)
    add("--dropout", type=number(float, 0, 0.9), help="default: the network's own")
    add("--clip", type=number(float, 0), default=0.0, help="largest gradient norm; 0 is off")
    add("--ema", type=number(float, 0, 0.99999), default=0.999,
        help="moving average of the weights; 0 is off")
    add("--val", type=number(int, 0), default=0, help="hold out the last VAL training images")
    add("--limit", type=number(int, 1), help="train on the first LIMIT images only")
    add("--seed", type=number(int, 0), default=0)
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    add("--amp", action="store_true", help="compute in bfloat16 where it is safe")
    add("--deterministic", action="store_true", help="same bits in every run on a GPU too; slower")


def make_parser() -> Parser:
    parser = Parser(prog="train.py", description="Train a network on MNIST.", allow_abbrev=False)
    add_shared_flags(parser)
    add = parser.add_argument
    add("--sched", choices=SCHEDULES, default="onecycle")
    add("--lr", type=number(float, 0, open_low=True),
        help="with onecycle the maximum; default: by optimizer")
    add("--epochs", type=number(int, 1, 9999), default=18)
    add("--runs", type=number(int, 1), default=1, help="how many seeds to train, from --seed on")
    add("--out", type=Path, default=Path("runs"), help="where run folders are made")
    add("--resume", type=Path, metavar="RUN", help="go on with this run folder")
    return parser


NOT_IN_CONFIG = ("out", "resume", "runs", "head", "down", "activation")


def make_config(args) -> dict:
    """The flags as a plain dict, defaults filled in: what config.json holds and functions read."""
    config = {k: v for k, v in vars(args).items() if k not in NOT_IN_CONFIG}
    config["options"] = {k: v for k, v in (("head_kind", args.head), ("down", args.down),
                                           ("activation", args.activation)) if v}
    if config["options"] and args.model != "default":
        raise UserError("--head, --down and --activation belong to the default network")
    if args.weight_decay is None:
        config["weight_decay"] = DEFAULT_WEIGHT_DECAY[args.opt]
    return config


def pick_device(name: str) -> torch.device:
    """ "auto" takes the fastest there is. Raises UserError for one that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    if name != "auto" and not there[name]:
        working = " and ".join(f"--device {d}" for d, yes in there.items() if yes)
        raise UserError(f"--device {name}: this machine has none; {working} would work")
    return torch.device(name if name != "auto" else next(d for d, yes in there.items() if yes))


def load_for(config: dict) -> tuple:
    """(data, device) for a configuration, checked against the network and the batch size."""
    device = pick_device(config["device"])
    if config["deterministic"]:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        # Warnings only: torch suspects max pooling's backward, whose sums may come in any order.
        # Our windows do not overlap, so there are no sums.
        torch.use_deterministic_algorithms(True, warn_only=True)
    data = load(config["data"], config["data_dir"], device, config["val"], config["limit"])
    shape, wanted = tuple(data.train[0].shape[1:]), INPUT_SHAPES[config["model"]]
    if shape != wanted:
        wanted, shape = ("x".join(map(str, sizes)) for sizes in (wanted, shape))
        raise UserError(f"the network {config['model']!r} takes {wanted} images, "
                        f"{config['data']} has {shape}: try another --model")
    if config["batch_size"] > len(data.train[0]):
        raise UserError(f"--batch-size {config['batch_size']} is larger than the training set "
                        f"({len(data.train[0])} images)")
    return data, device


def open_run(args) -> tuple[dict, dict | None]:
    """(config, state): of the flags and nothing, or of the run to resume and its checkpoint."""
    config = make_config(args)
    if args.resume is None:
        if config["lr"] is None:
            config["lr"] = DEFAULT_LR[args.opt][args.sched == "onecycle"]
        if args.sched == "plateau" and not config["val"]:
            config["val"] = 5000
            print("--sched plateau watches the loss of held-out images: --val 5000")
        return config, None
    given = {word.split("=")[0] for word in sys.argv[1:] if word.startswith("--")}
    if wrong := given - {"--resume", "--data-dir", "--device"}:
        raise UserError("--resume goes on with the run's own settings: leave out "
                        + " ".join(sorted(wrong)))
    state = load_checkpoint(args.resume)
    here = {name: config[name] for name in ("data_dir", "device")
            if f"--{name.replace('_', '-')}" in given}
    return config | state["config"] | here, state


def main() -> None:
    args = make_parser().parse_args()
    config, state = open_run(args)
    data, device = load_for(config)
    print(f"{data.name}: {len(data.train[0]):,} training, {len(data.val[0]):,} held-out, "
          f"{len(data.test[0]):,} test images; network {config['model']!r} on {device}; "
          f"{config['opt']}, {config['sched']}, lr {config['lr']:g}")
    accuracies, first_seed = [], config["seed"]
    for seed in range(first_seed, first_seed + args.runs):
        config |= {"seed": seed, "mean": data.mean.flatten().tolist(),
                   "std": data.std.flatten().tolist()}
        training = make_training(config, data, device)   # first: it may find fault with the flags
        folder = args.resume or new_folder(args.out)
        try:
            rows = train(config, data, training, folder, state)
        except KeyboardInterrupt:
            rest = first_seed + args.runs - seed - 1
            print(f"\nstopped. Go on with: python train.py --resume {shlex.quote(str(folder))}" + (
                f"\nand then the other seeds, with your flags: --seed {seed + 1} --runs {rest}"
                if rest else ""))
            raise
        print_summary(rows, config, data, training[0], folder)
        accuracies.append(rows[-1]["test_accuracy"])
    if len(accuracies) > 1:
        print_distribution(accuracies, data)


if __name__ == "__main__":
    run_command(main)
