"""Train a network of fewer than 20,000 parameters to read digits, all of it in one function.

What it teaches: what happens at each step of training and in which order, in what the optimizers
and the schedules differ, and how a result is reported: the last epoch, several seeds, mean, spread.

    python train.py                                           the project's own recipe
    python train.py --opt sgd --sched onecycle --device cuda  the same recipe, on a GPU
    python train.py --epochs 3                                99.5% in a minute or two
    python train.py --runs 5                                  five seeds: a claim is a distribution
    python train.py --val 10000                               hold out images to choose things on
    python train.py --sanity --model tiny                     before any tuning: is the setup sound?
    python train.py --data synthetic --epochs 2               a first try without a download
    python train.py --resume runs/001                         go on after Ctrl-C

It prints two lines an epoch, then a summary, and saves in a folder of its own (runs/001, runs/002,
...): checkpoint.pt (to go on from), log.csv, curves.png, config.json, at the end weights.pt.
"""
import argparse, contextlib, copy, io, itertools, json, math, statistics, sys, time
from pathlib import Path

from data import (NAMES, PRESETS, Data, Parser, UserError, augment, batches, load, normalize,
                  run_command, save, to_csv, user_path)      # before torch: see data.py

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from analyze import curves, evaluate, read_pt
from model import NETWORKS, build, count_parameters
from rf import check_network

# ---- All of training --------------------------------------------------------------------------

def train(config: dict, data: Data, folder: Path | None = None, state: dict | None = None,
          show=lambda *_: None) -> tuple[nn.Module, list[dict]]:
    """Train to the last epoch; return (the averaged network, one row of the log for each epoch).

    `config` holds the flags by name. With a `folder`, everything is saved there after each epoch;
    `state` is such a checkpoint to go on from. `show` is called every 50 steps and after each
    epoch. Raises UserError if network, images, schedule or state do not fit, or the loss explodes.
    """
    net = make_network(config, data)                 # random weights, but the same for a seed
    average = copy.deepcopy(net)                     # will trail behind the network, see below
    pairs = [*zip(average.state_dict().values(), net.state_dict().values())]
    size = len(data.train[0])
    steps = math.ceil(size / config["batch_size"])   # of an epoch: 60,000 / 128 -> 469
    window = max(1.0, config["ema"] * steps * config["epochs"])          # of the average, in steps
    optimizer = make_optimizer(config, net)
    scheduler = make_scheduler(config, optimizer, steps)
    parts = {"net": net, "average": average, "optimizer": optimizer, "scheduler": scheduler}
    rows = restore(parts, state) if state else []    # one for each epoch that is done
    save_run(folder, config, rows, parts)            # so it can be resumed from its first moment on

    for epoch in range(len(rows) + 1, config["epochs"] + 1):
        # Each epoch starts its own random numbers, from seed and epoch: a resumed run draws the
        # same order, warps and dropout as one never interrupted, and no generator has to be saved.
        torch.manual_seed(10_000 * config["seed"] + epoch)
        started = time.perf_counter()
        net.train()                                  # dropout on; batch norm uses the batch's mean
        loss_sum = correct = seen = 0
        # The loss to lower is that of all images. A batch of 128 gives a noisy estimate of its
        # gradient for 1/469 of the price, so there are 469 steps an epoch in place of a single one,
        # and the noise averages out over them.
        for batch_id, (images, labels) in enumerate(batches(*data.train, config["batch_size"])):
            # Forward: uint8 B×1×28×28 -> varied, mean 0, size 1 -> ten scores an image, B×10.
            x = normalize(augment(images, config["augment"]), data.mean, data.std)
            logits = net(x)
            # Cross-entropy takes scores, not probabilities: it applies log-softmax itself, and is
            # then the mean of -log(probability of the label). Label smoothing (Szegedy et al.,
            # 2016) asks for 91% and nine times 1%, say, not for 100%, so that scores need not grow
            # without end. The loss cannot fall below 0.50 then, the entropy of that target.
            loss = F.cross_entropy(logits, labels, label_smoothing=config["label_smoothing"])
            # Backward: fills p.grad of each parameter with ∂loss/∂p, by the chain rule, from the
            # last layer to the first. backward() adds to what is there, so the gradients of the
            # step before have to go first; without zero_grad each step would repeat all old ones.
            optimizer.zero_grad()
            loss.backward()
            if config["clip"]:                       # a gradient longer than that is shrunk to it
                nn.utils.clip_grad_norm_(net.parameters(), config["clip"])
            optimizer.step()                         # moves each parameter: see make_optimizer
            if config["sched"] != "plateau":
                scheduler.step()                     # sets the rate of the next step
            # The weights of one step are noisy; a moving average of them is less so, and costs no
            # training (Polyak and Juditsky, 1992). It looks back over a share of all steps, early
            # on over a ninth of those so far: otherwise it would be full of the random start.
            step = (epoch - 1) * steps + batch_id
            keep = min(1 - 1 / window, (1 + step) / (10 + step))
            with torch.no_grad():
                for slow, fast in pairs:             # (an integer, batch norm's counter, is copied)
                    slow.lerp_(fast, 1 - keep) if slow.is_floating_point() else slow.copy_(fast)
            # Sums stay on the device. Looking at one makes a GPU finish all its work first, so it
            # is done every 50 steps only. The loss is a mean over the batch, and the last batch is
            # smaller: times its size it is a sum, and those few images do not count for more.
            loss_sum += loss.detach() * len(labels)
            correct += (logits.argmax(1) == labels).sum()
            seen += len(labels)
            if batch_id % 50 == 49 or seen == size:
                row = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"], "batch_id": batch_id,
                       "train_loss": float(loss_sum) / seen,
                       "train_accuracy": 100 * float(correct) / seen}
                show(row, seen, started)
                require_finite(row["train_loss"], row)
        # Look at images that nothing was learned from, through the averaged weights. Accuracy is
        # what counts, but it moves in steps of one image; the loss also tells how sure it is.
        for name in ("val", "test"):
            if len(getattr(data, name)[0]):
                found = evaluate(average, *getattr(data, name), data.mean, data.std)
                require_finite(found["loss"], row)
                row |= {f"{name}_loss": found["loss"], f"{name}_accuracy": 100 * found["accuracy"]}
        if config["sched"] == "plateau":
            scheduler.step(row["val_loss"])
        rows.append(row | {"seconds": time.perf_counter() - started})
        save_run(folder, config, rows, parts)
        show(rows[-1])
    # The last epoch is the result, not the best one: to pick the epoch with the best test accuracy,
    # as the notes do, is to learn from the test set, and the best of 18 noisy numbers flatters.
    return average, rows

def make_network(config: dict, data: Data) -> nn.Module:
    """A fresh network of the configuration, on the device of the data. Raises UserError if it
    cannot take the images, or does not return ten scores for each."""
    torch.manual_seed(config["seed"])                # drawn on the CPU: the same on any device
    try:
        net = build(config["model"], **config["options"])
    except TypeError as error:                       # such as a flag that it has no option for
        raise UserError(f"the network {config['model']} cannot be built: {error}")
    net = net.to(data.mean.device)                   # parameters have to be where the images are
    # A wrong number in a layer is found here, by two images, before anything is saved. A second
    # softmax would not be found by any error at all: the network would only learn badly.
    check_network(net, normalize(data.train[0][:2], data.mean, data.std))
    return net.to(memory_format=torch.channels_last)             # as normalize() does: see there

def restore(parts: dict, state: dict) -> list[dict]:
    """Put a checkpoint's states into network, average, optimizer and scheduler; return its rows of
    the log. Raises UserError."""
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return state["rows"]
    except Exception as error:           # shapes or names that are not those of the checkpoint
        raise UserError("--resume: the checkpoint does not fit its network. Has model.py changed "
                        f"since? ({type(error).__name__})")

def require_finite(loss: float, row: dict) -> None:
    """Raise UserError if the loss is infinite or NaN. Every gradient is then NaN, and after the
    next step every weight: nothing that follows could mend it."""
    if not math.isfinite(loss):
        raise UserError(f"epoch {row['epoch']}: the loss is {loss} at batch {row['batch_id']}. Try "
                        "a lower --lr or --clip 1")

# ---- Optimizers: from a gradient to a step ----------------------------------------------------
# g is the gradient, w a weight, η the learning rate. Two default rates each: the first for
# schedules that start with it, in the usual range (sgd 1e-3 to 1e-1, the Adams 3e-4 to 1e-3,
# rmsprop 1e-4 to 1e-3); the second is OneCycle's maximum, which is touched for a moment only, so it
# may be a good deal larger, and should be (half of it from 10 epochs on: make_config). lr_finder.py
# measures where it lies. (Adam divides by the size of the gradient and sgd does not: a rate of one
# says nothing about that of the other.)

DEFAULT_LR = {"sgd": (0.05, 0.4), "adam": (1e-3, 2e-2), "adamw": (1e-3, 2e-2),
              "rmsprop": (1e-3, 6e-3)}
DEFAULT_WEIGHT_DECAY = {"sgd": 5e-4, "adam": 0.0, "adamw": 1e-2, "rmsprop": 0.0}

def make_optimizer(config: dict, net: nn.Module) -> torch.optim.Optimizer:
    """sgd, adam, adamw or rmsprop, as the flags say, over the parameters of `net`.

    Weight decay λ pulls weights towards 0: g += λ·w. In front of batch norm the size of a
    convolution's weights changes nothing: decay keeps them small, and so keeps the steps large
    beside them (van Laarhoven, 2017). Batch norm's scales and shifts, and biases, all of one
    dimension, do change the function: pulled towards 0, they would only switch channels off. So
    they are spared, unless decay_all.
    """
    lr, momentum = config["lr"], config["momentum"]
    # A group is a list of parameters with settings of its own; all else follows, for both, below.
    spared = [p for p in net.parameters() if p.ndim <= 1 and not config["decay_all"]]
    decayed = [p for p in net.parameters() if p.ndim > 1 or config["decay_all"]]
    groups = [{"params": decayed, "weight_decay": config["weight_decay"]},
              {"params": spared, "weight_decay": 0.0}]
    if config["opt"] == "sgd":
        # v = μ·v + g: steady gradients add up to 1/(1 − μ) = ten times their size, those that turn
        # back and forth cancel. Then w −= η·v, or η·(g + μ·v): where v is about to carry it
        # (Nesterov, 1983; Sutskever et al., 2013).
        return torch.optim.SGD(groups, lr, momentum, nesterov=config["nesterov"] and momentum > 0)
    if config["opt"] == "rmsprop":
        # v is a running mean of g², and each weight is moved by about η, whether its gradients are
        # large or small: w −= η·g/(√v + ε) (Hinton's lecture, 2012). The first steps are large,
        # since v starts at 0: with α = 0.99 ten times η.
        return torch.optim.RMSprop(groups, lr, alpha=0.99)
    # The same with momentum: m and v are running means of g and g², w −= η·m̂/(√v̂ + ε) (Kingma and
    # Ba, 2015). The hats undo that m and v start at 0: m̂ = m/(1 − β₁ᵗ). In Adam the decay is added
    # to g, and so divided by √v̂, too; in AdamW it goes to the weight itself: w −= η·λ·w
    # (Loshchilov and Hutter, 2019).
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config["opt"]]
    return kind(groups, lr, betas=(momentum, 0.999))

# ---- Schedules: the rate over time ------------------------------------------------------------

SCHEDULES = ("none", "step", "cosine", "onecycle", "plateau")

def make_scheduler(config: dict, optimizer, steps: int):
    """How the rate η changes from step to step, `steps` to an epoch. Raises UserError.

    Large steps get far and bounce: near a minimum the noise of the batches throws them out of it
    again, and the larger the rate, the farther. Small steps settle, but get nowhere in a short
    time. So: first large, then small, along a cosine (Loshchilov and Hutter, 2016) or up and down
    (Smith, 2018), say. All but "plateau" are stepped after each batch; plateau is stepped after
    each epoch, with the loss of held-out images.
    """
    name, total = config["sched"], config["epochs"] * steps
    if name == "none":                               # η                                  ‾‾‾‾‾‾‾‾
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    if name == "step":                               # η·½ᵏ after k fifths of the time    ‾‾-.__..
        every = config["step_every"] and config["step_every"] * steps        # or as asked for
        return torch.optim.lr_scheduler.StepLR(optimizer, every or math.ceil(total / 5), gamma=0.5)
    if name == "cosine":                             # η·(1 + cos(π·t/total))/2           ‾‾‾\___
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    if name == "plateau":                            # η·½ when the loss has not fallen for 3 epochs
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=2)
    if total < 6:                                    # a fifth of the steps has to be more than one
        raise UserError("onecycle needs 6 steps or more: raise --epochs or lower --batch-size")
    # From η/25 up to η in the first fifth, then down to almost 0: __/‾‾\__. Small at first, since
    # the random start has steep walls around it; momentum stays as it is.
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, config["lr"], total, pct_start=0.2,
                                               cycle_momentum=False)

# ---- Before any tuning: is the setup sound? ---------------------------------------------------

def sanity(config: dict, data: Data) -> bool:
    """The lecture's checks of any network, data and recipe, in a few seconds: print what is seen
    and, where it is wrong, why. Returns whether all is well. UserError if the loss explodes."""
    def trial(count, **changes):                     # by the one training loop there is
        part, none = tuple(x[:count] for x in data.train), tuple(x[:0] for x in data.test)
        return train(config | {"label_smoothing": 0.0} | changes,
                     data._replace(train=part, val=part, test=none))[1]

    # Ten images cannot be hard: 100 steps of Adam on all of them at once know them by heart. An
    # epoch is one step here, so the first row's loss is that of the fresh network: about ln 10, if
    # each of ten digits gets the probability 1/10, for -log(1/10) = ln 10.
    first, *_, last = trial(10, augment="none", opt="adam", lr=1e-3, weight_decay=0.0, ema=0.0,
                            sched="none", epochs=100, batch_size=10)
    # In a first epoch every image is new, so its accuracy is honest. Where labels do not belong to
    # their images it is that of guessing, 10%, although ten of them can be learned by heart.
    new = trial(50 * config["batch_size"], epochs=1)[0]["train_accuracy"]
    checks = [                                       # (all is well, seen, expected, likely wrong)
        (abs(first["train_loss"] - math.log(10)) < 0.7,
         f"loss of the fresh network: {first['train_loss']:.2f}", "ln 10 = 2.30",
         "a last layer that is too large, or pixels that are not normalized"),
        (last["val_accuracy"] == 100 and last["val_loss"] < 0.5,
         f"ten images, 100 steps: {last['val_accuracy']:.0f}%, loss {last['val_loss']:.2f}",
         "100%, near 0", "no gradient: a softmax before the loss, a detach(), dead ReLUs"),
        (new > 25, f"new images in 50 steps of your recipe: {new:.0f}%", "more than 25%",
         "labels that are not their images', or a rate far too small or too large")]
    for fine, seen, expected, likely in checks:
        print(f"ok    {seen}" if fine else f"LOOK  {seen}, expected {expected}. Likely: {likely}")
    return all(fine for fine, *_ in checks)

# ---- What a run leaves behind -----------------------------------------------------------------

def save_run(folder: Path | None, config: dict, rows: list[dict], parts: dict) -> None:
    """The checkpoint and what is derived from it. Interrupted at any point, each file is whole, and
    the checkpoint, written first, has everything that --resume needs."""
    if not folder:                                   # a trial of lr_finder.py leaves nothing behind
        return
    # Weights are not enough to go on from. The optimizer holds the momentum of each weight, the
    # scheduler knows how far it got, and the average is not the network: without any of the three
    # the run would end elsewhere than if nothing had happened.
    states = {name: part.state_dict() for name, part in parts.items()}
    contents = {"checkpoint.pt": {"config": config, "rows": rows, **states}}
    if len(rows) == config["epochs"]:                # the end: what analyze.py and others load
        contents["weights.pt"] = {"config": config, "weights": states["average"]}
    for name, content in contents.items():
        torch.save(content, file := io.BytesIO())    # into memory: save() alone writes files
        save(folder / name, file.getvalue())
    save(folder / "config.json", json.dumps(config, indent=1))           # for people to read
    if rows:
        save(folder / "log.csv", to_csv(rows))
        curves(rows, folder / "curves.png")

def new_folder(out: Path) -> Path:
    """Create out/001, or 002, ...: the first that is not there. Another run may take the same
    number in the same moment: mkdir gives it to one of them only."""
    out.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        with contextlib.suppress(FileExistsError):   # it is there: the next number, then
            (folder := out / f"{number:03d}").mkdir()
            return folder

# ---- What is printed --------------------------------------------------------------------------

def printer(config: dict, data: Data):
    """A function for train() to call: it draws one line while an epoch runs, where somebody can
    see it, and prints the notes' two lines after it (a third one for held-out images)."""
    # A file or a pipe gets whole lines only; a terminal or a notebook one that is drawn over.
    live = sys.stdout and (sys.stdout.isatty() or "ipykernel" in sys.modules)

    def show(row, seen=0, started=0.0):
        # Measured while the network learns, on augmented images and with dropout on, "Train" lags
        # behind "Test" until the last epochs, and that is no mistake.
        line = (f"Train: Loss={row['train_loss']:.4f} Batch_id={row['batch_id']} "
                f"LR={row['lr']:.6f} Accuracy={row['train_accuracy']:.2f}")
        if seen and live:                            # within an epoch; "\r" goes back to its start
            still = len(data.train[0]) * (config["epochs"] - row["epoch"] + 1) - seen       # images
            left = round(still / seen * (time.perf_counter() - started))                 # seconds
            print(f"{line} {left // 60}:{left % 60:02d} left".ljust(79), end="\r", flush=True)
        if seen:
            return
        print(f"{line} ({data.name})".ljust(79 * bool(live)))        # over what was drawn
        for name, title in (("val", "Validation set"), ("test", "Test set")):
            if count := len(getattr(data, name)[0]):
                loss, accuracy = row[f"{name}_loss"], row[f"{name}_accuracy"]
                print(f"{title}: Average loss: {loss:.4f}, Accuracy: {accuracy * count / 100:.0f}/"
                      f"{count} ({accuracy:.2f}%) ({data.name})", flush=True)
    return show

# ---- The command line -------------------------------------------------------------------------

def number(kind, low, high=10 ** 9):
    """An argparse type: a number of `kind` from low to high."""
    def parse(text):
        if not low <= kind(text) <= high:            # NaN is not <= anything; int("1.5") raises
            raise argparse.ArgumentTypeError(f"{text} must be at least {low} and at most {high}")
        return kind(text)
    parse.__name__ = kind.__name__                   # argparse says "invalid float value" by it
    return parse

LR, DECAY = number(float, 1e-12), number(float, 0)

def make_parser() -> Parser:
    """All flags; lr_finder.py passes those that are not its own on to this parser."""
    parser = Parser(prog="train.py", description="Train a network on MNIST.")
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    # What is trained. Dropout: 0.05 to 0.2 is usual (all ranges here are the lecture's).
    add("--model", choices=NETWORKS, default="default", help="a network of model.py")
    add("--head", choices=("place", "conv", "linear"), help="last layers of our own networks")
    add("--down", choices=("pool", "late", "overlap", "stride"), help="how the default halves maps")
    add("--activation", choices=("silu", "relu"), help="what follows its batch norms")
    add("--dropout", type=number(float, 0, 0.9), help="probability, before its head")
    # On which images. Choices are made on --val, results reported on the test set.
    add("--data", choices=NAMES, default="mnist", help="which data set")
    add("--data-dir", type=user_path, default="data", help="where the data set is or will be put")
    add("--augment", choices=PRESETS, default="default", help="how images are varied")
    add("--val", type=number(int, 0), default=0, help="hold out the last VAL training images")
    add("--limit", type=number(int, 1), help="train on the first LIMIT images only")
    # By which steps. sgd: rates of 1e-3 to 1e-1, decay 1e-4 to 5e-4. adam: 3e-4 to 1e-3, decay 0 to
    # 5e-4; adamw: decay 1e-2 to 1e-1. rmsprop: 1e-4 to 1e-3. Clipping at a norm of 0.5 to 5.
    add("--opt", choices=DEFAULT_LR, default="sgd", help="optimizer")
    add("--lr", type=LR, help="with onecycle the maximum; None: by --opt, --sched and --epochs")
    add("--sched", choices=SCHEDULES, default="onecycle", help="how the rate changes")
    add("--step-every", type=number(int, 1), help="epochs between halvings of --sched step")
    add("--momentum", type=number(float, 0, 0.9999), default=0.9, help="of sgd; beta1 of the Adams")
    add("--nesterov", action=switch, default=True, help="look ahead, with sgd's momentum")
    add("--weight-decay", type=DECAY, help="None: by optimizer")
    add("--decay-all", action=switch, default=False, help="also of batch norm and biases")
    add("--clip", type=number(float, 0), default=0.0, help="largest gradient norm; 0 is off")
    # For how long, and against learning by heart. Batches of 32 to 256, label smoothing 0.05.
    add("--epochs", type=number(int, 1, 9999), default=18, help="passes over the images")
    add("--batch-size", type=number(int, 1), help="images a step; None: by --epochs")
    add("--label-smoothing", type=number(float, 0, 0.9), help="spread evenly; None: by --epochs")
    add("--ema", type=number(float, 0, 1), default=0.07,
        help="window of the moving average of the weights, a share of all steps; 0 is off")
    # Which run, and where.
    add("--seed", type=number(int, 0), default=0, help="of all random numbers")
    add("--runs", type=number(int, 1), default=1, help="how many seeds to train, from --seed on")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto: fastest")
    add("--out", type=user_path, default="runs", help="where run folders are made")
    add("--resume", type=user_path, metavar="RUN", help="go on with this run folder")
    add("--sanity", action="store_true", help="check the setup in a few seconds; train nothing")
    return parser

def make_config(args) -> dict:
    """The flags as a plain dict, each None filled in: what train() takes and a run's files hold."""
    config = {name: value for name, value in vars(args).items()
              if name not in ("out", "resume", "runs", "sanity")}
    options = {name: value for name in ("head", "down", "activation", "dropout")
               if (value := config.pop(name)) is not None}
    # A short training needs many steps and large ones: small batches, the full rate. A long one can
    # afford quieter steps, and a little more smoothing against learning by heart.
    short, onecycle = args.epochs < 10, args.sched == "onecycle"
    filled = {"batch_size": 64 if short else 128, "label_smoothing": 0.05 if short else 0.1,
              "weight_decay": DEFAULT_WEIGHT_DECAY[args.opt],
              "lr": DEFAULT_LR[args.opt][onecycle] / (2 if onecycle and not short else 1)}
    config |= {name: value for name, value in filled.items() if config[name] is None}
    # plateau watches the loss of held-out images. A path is no plain data: as text it is.
    val = args.val or (5000 if args.sched == "plateau" else 0)
    return config | {"options": options, "data_dir": str(args.data_dir), "val": val}

def open_run(args) -> tuple[dict, dict | None]:
    """(config, state): of the flags and nothing, or of the run to resume and its checkpoint."""
    config = make_config(args)
    if args.resume is None:
        return config, None
    # A run keeps its settings, but for where it finds things: with others it would be two runs.
    given = {word.split("=")[0] for word in sys.argv[1:] if word.startswith("--")} - {"--resume"}
    if wrong := given - {"--data-dir", "--device"}:  # anything else would make another training
        raise UserError(f"--resume keeps the run's own settings: leave out {' '.join(wrong)}")
    state = read_pt(args.resume / "checkpoint.pt")   # checked: whole, finite, and ours
    here = {name: config[name] for name in (flag[2:].replace("-", "_") for flag in given)}
    return config | state["config"] | here, state

def main() -> None:
    args = make_parser().parse_args()
    config, state = open_run(args)
    data = load(*(config[name] for name in ("data", "data_dir", "device", "val", "limit")))
    config |= {"mean": data.mean.flatten().tolist(), "std": data.std.flatten().tolist()}
    print(f"{data.name}: {len(data.train[0]):,} training, {len(data.val[0]):,} held-out, "
          f"{len(data.test[0]):,} test images; network {config['model']!r} on {data.mean.device}; "
          f"{config['opt']}, {config['sched']}, lr {config['lr']:g}")
    if args.sanity:
        raise SystemExit(0 if sanity(config, data) else 1)
    accuracies = []                                  # of the last epoch, one for each seed
    for seed in range(config["seed"], config["seed"] + args.runs):
        config["seed"] = seed                        # all else is equal
        folder = args.resume or new_folder(args.out)
        try:
            net, rows = train(config, data, folder, state, printer(config, data))
        except KeyboardInterrupt:                    # Ctrl-C: the epochs that are done are saved
            print(f"\nstopped. Go on with: python train.py --resume {folder.as_posix()}" if
                  (folder / "checkpoint.pt").exists() else "\nstopped; nothing is trained yet")
            raise
        finally:
            with contextlib.suppress(OSError):
                folder.rmdir()                       # works only if it is empty: nothing was begun
        accuracies.append(rows[-1]["test_accuracy"])
        print(f"\n{data.name}: {accuracies[-1]:.2f}% of {len(data.test[0]):,} test images right "
              f"after the last epoch, seed {seed}\n{config['model']}, "
              f"{count_parameters(net):,} parameters, {config['epochs']} epochs in "
              f"{sum(row['seconds'] for row in rows):.0f} s\n"
              f"next: python analyze.py --run {folder.as_posix()}")
    if args.runs > 1:                                # a claim is a distribution
        print(f"\n{data.name} test accuracy of the last epoch, {args.runs} seeds: mean "
              f"{statistics.mean(accuracies):.3f}%  standard deviation "
              f"{statistics.stdev(accuracies):.3f}  minimum {min(accuracies):.2f}  maximum "
              f"{max(accuracies):.2f}")

if __name__ == "__main__":
    run_command(main)
