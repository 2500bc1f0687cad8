"""Train a network of fewer than 20,000 parameters to read handwritten digits.

What it teaches: what happens in each step of a training and in which order, how optimizers and
schedules differ, and how to report a result: the last epoch, several random seeds, mean and spread.

    python train.py                                           the project's own recipe, 18 epochs
    python train.py --opt sgd --sched onecycle --device cuda  the same, on a GPU if there is one
    python train.py --epochs 3                                99.5% in a minute or two
    python train.py --runs 5                                  five random seeds, mean and spread
    python train.py --val 10000                               hold out images to choose things on
    python train.py --sanity --model tiny                     before any tuning: is the setup sound?
    python train.py --data synthetic --epochs 2               a first try without a download
    python train.py --resume runs/001                         go on after Ctrl-C

It prints two lines per epoch and a summary. Each run has a folder of its own (runs/001, runs/002,
...): log.csv with a row per epoch, checkpoint.pt to go on from, and at the end weights.pt.
"""
import argparse
import copy
import io
import math
import os
import shlex
import statistics
import sys
import time
import zipfile
from pathlib import Path

import data as digits           # before torch: data.py says why
from data import UserError, number, reason, run_command, save

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import model as networks


# ---- One step ---------------------------------------------------------------------------------
#
#   forward    The network turns a batch of B images into B×10 scores, called logits. Cross-entropy
#              compares them with the labels: it is the mean of -log(probability of the label), and
#              about ln 10 = 2.3 for a network that guesses. It applies softmax itself. Label
#              smoothing (Szegedy et al., 2016; here 0.05) asks for a probability of 95.5% instead
#              of 100%, so that the logits need not grow without end.
#   backward   The chain rule, from the loss back to the first layer, gives d loss / d weight for
#              every weight. PyTorch adds it to weight.grad, so the gradients of the previous step
#              are cleared first.
#   clip       If it is asked for, a gradient longer than `clip` is shortened to this length.
#   step       The optimizer moves every weight a little against its gradient.

def training_step(network, optimizer, inputs, labels, args):
    """Learn from one batch. Return its mean loss and the number of images that were right."""
    logits = network(inputs)                                                            # B×10
    loss = F.cross_entropy(logits, labels, label_smoothing=args.label_smoothing)

    optimizer.zero_grad()
    loss.backward()
    if args.clip:
        nn.utils.clip_grad_norm_(network.parameters(), args.clip)
    optimizer.step()

    correct = (logits.argmax(1) == labels).sum()
    return loss.detach(), correct


# ---- All of training --------------------------------------------------------------------------
#
# Why batches? The gradient over all 60,000 images is exact and slow. A batch of 64 gives a noisy
# estimate of it for a thousandth of the price: 938 steps per epoch instead of one.
#
# Why a seed per epoch? A run that was interrupted then draws the same batches, variations and
# dropout as one that was not, and no generator has to be saved.
#
# Why look at the loss only every 50 steps? To read a number, the CPU has to wait until the GPU has
# finished, so the sums stay on the device. A loss that is not finite ends the training: then every
# gradient is NaN, and after the next step every weight.
#
# Why is the training accuracy below the test accuracy? It counts images that are varied, with
# dropout on, while the network is still learning. The training loss is higher for one more reason:
# it includes label smoothing, which keeps it above 0.28. The other losses do not.
#
# Why the last epoch and not the best one? To pick the epoch with the best test accuracy is to learn
# from the test set, and the best of 18 noisy numbers is too high.

def train(args, data, folder=None, checkpoint=None, quiet=False):
    """Train args.model on data.train. Return the network and its history, a dict per epoch.

    With a folder, a checkpoint is saved there before the first epoch and after each one, and the
    weights at the end. With a checkpoint, the training goes on from it.
    Raises UserError if network and data do not fit or the loss is no longer finite.
    """
    if args.sched == "plateau" and len(data.val[0]) == 0:
        raise UserError("--sched plateau watches held-out images, and there are none")
    network = make_network(args, data)
    optimizer = make_optimizer(args, network)
    history = []
    if checkpoint:
        network.load_state_dict(checkpoint.network.state_dict())
        optimizer.load_state_dict(checkpoint.optimizer)
        history = checkpoint.history
    save_run(folder, args, data, network, optimizer, history)

    image_count = len(data.train[0])
    steps_per_epoch = math.ceil(image_count / args.batch_size)
    total_steps = steps_per_epoch * args.epochs

    for epoch in range(len(history) + 1, args.epochs + 1):
        torch.manual_seed(10_000 * args.seed + epoch)
        started = time.perf_counter()
        network.train()                     # dropout is on, batch norm uses the batch's statistics
        step = (epoch - 1) * steps_per_epoch
        total_loss = 0.0
        total_correct = 0
        seen = 0

        for images, labels in digits.batches(*data.train, args.batch_size):
            rate = learning_rate(args, step, total_steps, history)
            for group in optimizer.param_groups:
                group["lr"] = rate
            strength = augmentation_strength(args, step / total_steps)
            images = digits.augment(images, args.augment, strength)
            inputs = digits.normalize(images, data.mean, data.std)
            loss, correct = training_step(network, optimizer, inputs, labels, args)

            total_loss += loss * len(labels)                 # a mean times its count is a sum
            total_correct += correct
            seen += len(labels)
            step += 1
            if step % 50 == 0:
                mean_loss = float(total_loss) / seen
                require_finite(mean_loss, epoch)
                if not quiet:
                    print_progress(args, epoch, mean_loss, seen, image_count, started)

        row = {                             # its keys are the columns of log.csv
            "epoch": epoch,
            "lr": rate,                     # of the last step
            "train_loss": float(total_loss) / image_count,
            "train_accuracy": 100 * float(total_correct) / image_count,
        }
        require_finite(row["train_loss"], epoch)

        for name, part in (("val", data.val), ("test", data.test)):
            if len(part[0]):
                loss, accuracy = evaluate(network, *part, data.mean, data.std)
                require_finite(loss, epoch)
                row[f"{name}_loss"] = loss
                row[f"{name}_accuracy"] = accuracy
        row["seconds"] = time.perf_counter() - started
        history.append(row)
        save_run(folder, args, data, network, optimizer, history)
        if not quiet:
            print_epoch(row, steps_per_epoch, data)

    return network, history


def augmentation_strength(args, progress):
    """How much of the augmentation is used: all of it up to the share args.fade_from of the
    training, then linearly less, down to none at the end."""
    if progress < args.fade_from:
        return 1.0
    return (1 - progress) / (1 - args.fade_from)


# ---- Looking at images that nothing was learned from ------------------------------------------

@torch.no_grad()                            # no gradients needed: saves time and memory
def predict(network, images: Tensor, mean: Tensor, std: Tensor, batch_size=1000):
    """Return the logits N×10 of images uint8 N×C×H×W."""
    network.eval()                          # dropout is off, batch norm uses its running averages
    parts = []
    for batch in images.split(batch_size):
        parts.append(network(digits.normalize(batch, mean, std)))
    return torch.cat(parts)


def evaluate(network, images, labels, mean, std):
    """Return the mean loss over the images and the accuracy in percent.

    It is one mean over all images. A mean of the batches' means would give the images of a smaller
    last batch more weight.
    """
    logits = predict(network, images, mean, std)
    loss = F.cross_entropy(logits, labels)
    correct = (logits.argmax(1) == labels).sum()
    return loss.item(), 100 * correct.item() / len(labels)


# ---- Optimizers: from a gradient to a step ----------------------------------------------------
#
# Weight decay pulls weights towards zero (decay · weight is added to the gradient). In a layer
# before batch norm the size of the weights does not change what the network computes, but if they
# are small, steps of the same length count for more (van Laarhoven, 2017). The scales and shifts of
# batch norm, and biases, are spared: a scale that is pulled to zero would switch its channel off.
#
# Adam divides by the size of the gradient and SGD does not, so a rate that suits one of them
# tells nothing about the other. lr_finder.py finds a rate for either.

OPTIMIZERS = {                              # learning rate, OneCycle's peak rate, weight decay
    "sgd": (0.05, 0.4, 5e-4),
    "adam": (1e-3, 2e-2, 0.0),
    "adamw": (1e-3, 2e-2, 1e-2),
    "rmsprop": (1e-3, 6e-3, 0.0),
}


def make_optimizer(args, network):
    """sgd, adam, adamw or rmsprop over all parameters. `fused` computes a step in one go."""
    decayed = [p for p in network.parameters() if p.ndim > 1]
    spared = [p for p in network.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": args.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    beta = args.momentum

    if args.opt == "sgd":
        # velocity = momentum * velocity + gradient
        # weight  -= lr * velocity                              without nesterov
        # weight  -= lr * (gradient + momentum * velocity)      with nesterov (Sutskever, 2013)
        nesterov = args.nesterov and beta > 0
        return torch.optim.SGD(groups, args.lr, beta, nesterov=nesterov, fused=True)

    if args.opt == "rmsprop":
        # square  = 0.99 * square + 0.01 * gradient ** 2        (Hinton's lecture, 2012)
        # weight -= lr * gradient / (sqrt(square) + eps)
        return torch.optim.RMSprop(groups, args.lr, alpha=0.99)

    # Adam (Kingma and Ba, 2015), with two running averages that start at 0:
    # mean    = 0.9   * mean   + 0.1   * gradient
    # square  = 0.999 * square + 0.001 * gradient ** 2
    # At step t they are still too close to 0, so they are corrected:
    # mean_   = mean   / (1 - 0.9 ** t)
    # square_ = square / (1 - 0.999 ** t)
    # weight -= lr * mean_ / (sqrt(square_) + eps)
    if args.opt == "adam":
        return torch.optim.Adam(groups, args.lr, betas=(beta, 0.999), fused=True)

    # AdamW: the decay is not added to the gradient (Loshchilov and Hutter, 2019), but first
    # weight -= lr * decay * weight
    return torch.optim.AdamW(groups, args.lr, betas=(beta, 0.999), fused=True)


# ---- Schedules: the learning rate over time ---------------------------------------------------
#
# Large steps get far, but near a minimum the noise of the batches throws the weights out of it
# again. Small steps settle, but get nowhere in a short time. So the rate is large first and small
# at the end.

SCHEDULES = ("none", "step", "cosine", "onecycle", "plateau")


def learning_rate(args, step, total_steps, history):
    """The learning rate of a step, counted from 0.

    none       the same all the time
    step       halved after every `step_every` epochs
    cosine     from the full rate down to 0 along half a cosine (Loshchilov and Hutter, 2016)
    onecycle   from 1/25 of the rate up to it in the first fifth of the steps, then down to 0, both
               along half a cosine (Smith, 2018; the form is fastai's)
    plateau    halved when the loss of the held-out images has not fallen for three epochs
    """
    if args.sched == "none":
        return args.lr

    if args.sched == "step":
        epoch = step * args.epochs // total_steps                # finished epochs
        return args.lr * 0.5 ** (epoch // args.step_every)

    if args.sched == "cosine":
        return args.lr * half_cosine(step / total_steps)

    if args.sched == "plateau":
        return args.lr * 0.5 ** count_plateaus(history)

    # onecycle: first up, then down
    lowest = args.lr / 25
    warmup_steps = 0.2 * total_steps
    if step < warmup_steps:
        return lowest + (args.lr - lowest) * (1 - half_cosine(step / warmup_steps))
    return args.lr * half_cosine((step - warmup_steps) / (total_steps - warmup_steps))


def half_cosine(progress):
    """From 1 at progress 0 down to 0 at progress 1, flat at both ends."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def count_plateaus(history, patience=2):
    """How many times the held-out loss went more than `patience` epochs without a new minimum."""
    lowest = math.inf
    waiting = 0
    plateaus = 0
    for row in history:
        if row["val_loss"] < lowest * (1 - 1e-4):    # lower by at least 0.01%, as in PyTorch
            lowest = row["val_loss"]
            waiting = 0
        else:
            waiting += 1
        if waiting > patience:
            plateaus += 1
            waiting = 0
    return plateaus


# ---- The network and its first check ----------------------------------------------------------

def make_network(args, data):
    """A fresh network on the device of the data. Raises UserError if it cannot learn from it."""
    torch.manual_seed(args.seed)            # drawn on the CPU: the same weights on any device
    network = build_from(args).to(data.mean.device)
    problem = find_problem(args, network, data)
    if problem:
        raise UserError(f"the network {args.model!r} cannot be trained: {problem} "
                        f"(see python rf.py --model {args.model})")
    return network


def build_from(args):
    """The network of model.py that the flags ask for."""
    options = {}
    for name in ("head", "down", "activation", "dropout"):
        value = getattr(args, name)
        if value is not None:
            options[name] = value
    try:
        network = networks.build(args.model, **options)
        if network is None:
            raise ValueError("its function returns nothing")
        return network
    except Exception as error:              # such as a flag that this network has no option for
        raise UserError(f"the network {args.model!r} cannot be built: {error}")


def find_problem(args, network, data):
    """Try one real step on a copy of the network. Return what is wrong, or an empty text."""
    # Two images, or a single one if that is what is left for the last batch of an epoch.
    alone = len(data.train[0]) % args.batch_size == 1 or args.batch_size == 1
    count = 1 if alone else 2
    inputs = digits.normalize(data.train[0][:count], data.mean, data.std)
    labels = data.train[1][:count]
    if not list(network.parameters()):
        return "it has no parameters: a list of layers has to be an nn.ModuleList"
    try:
        with torch.no_grad():
            network.eval()(inputs)          # lazy layers learn their sizes here
        trial = copy.deepcopy(network).train()
        logits = trial(inputs)
        if not isinstance(logits, Tensor):
            return f"in training it returns a {type(logits).__name__}, not the logits alone"
        if logits.shape != (count, data.classes):
            return (f"for {count} images it returns {tuple(logits.shape)}, not "
                    f"{(count, data.classes)}: one logit for each of {data.classes} classes")
        sums = logits.sum(1)
        if (logits >= 0).all() and (sums - 1).abs().max() < 1e-3:
            return "it ends in softmax, and cross-entropy applies softmax itself"
        training_step(trial, make_optimizer(args, trial), inputs, labels, args)
    except Exception as error:              # PyTorch refuses with many kinds of errors
        if count == 1:
            return f"a batch of one image (choose another --batch-size): {reason(error)}"
        return reason(error)
    return ""


# ---- Before any tuning: is the setup sound? ---------------------------------------------------

def sanity(args, data):
    """Check network, data and recipe in a few seconds. Print what is seen.

    A fresh network guesses, so its loss is about ln K for K classes. Ten images are few enough to
    be learned by heart. After 50 steps on new images the network has to be better than guessing; if
    it is not, images and labels may be in different orders. (The checks of the lecture, N4.)
    """
    ten = (data.train[0][:10], data.train[1][:10])
    by_heart = changed(args, opt="adam", lr=1e-3, sched="none", weight_decay=0.0, augment="none",
                       label_smoothing=0.0, epochs=100, batch_size=10)
    network, history = train(by_heart, data._replace(train=ten, val=ten, test=ten), quiet=True)
    first_loss = history[0]["train_loss"]            # before any learning: an epoch is one step
    last_loss = history[-1]["test_loss"]
    last_accuracy = history[-1]["test_accuracy"]
    unreached = [name for name, weight in network.named_parameters() if weight.grad is None]

    count = 50 * args.batch_size
    new = (data.train[0][:count], data.train[1][:count])
    steps = math.ceil(len(new[0]) / args.batch_size)
    _, history = train(changed(args, epochs=1), without_test(data)._replace(train=new), quiet=True)
    new_accuracy = history[0]["train_accuracy"]      # each image was new when it was counted

    guess = math.log(data.classes)
    wanted = 100 / data.classes + 15                 # percent: clearly better than guessing
    check(abs(first_loss - guess) < 0.7,
          f"loss of the fresh network: {first_loss:.2f}",
          f"ln {data.classes} = {guess:.2f}",
          "a last layer that is too large, or pixels that are not normalized")
    check(not unreached,
          f"parameters without a gradient: {', '.join(unreached) or 'none'}",
          "none", "a detach(), a frozen layer, or a layer that is never called")
    check(last_accuracy == 100,
          f"ten images, 100 steps: {last_accuracy:.0f}%, loss {last_loss:.2f}",
          "100%", "ReLUs that are always 0, or a network that mixes the images of a batch")
    check(new_accuracy > wanted,
          f"new images, {steps} steps of your recipe: {new_accuracy:.0f}%",
          f"more than {wanted:.0f}%",
          "labels of other images, too few images, a rate far too small or too large")


def check(passed, found, expected, likely):
    """Print a line about one check of `sanity`."""
    if passed:
        print(f"ok    {found}")
    else:
        print(f"LOOK  {found}, expected {expected}. Likely: {likely}")


def changed(args, **changes):
    """A copy of the flags with some of them changed."""
    return argparse.Namespace(**(vars(args) | changes))


def without_test(data):
    """The same data without test images, for trainings that only choose or check something."""
    images, labels = data.test
    return data._replace(test=(images[:0], labels[:0]))


# ---- What is printed --------------------------------------------------------------------------

def print_progress(args, epoch, loss, seen, image_count, started):
    """In a terminal or a notebook: one line that is drawn over while an epoch runs."""
    if not can_redraw():
        return
    seconds_per_image = (time.perf_counter() - started) / seen
    images_left = image_count * (args.epochs - epoch + 1) - seen
    minutes, seconds = divmod(round(seconds_per_image * images_left), 60)
    line = (f"epoch {epoch} of {args.epochs}: {seen:,} images, loss {loss:.4f}, "
            f"{minutes}:{seconds:02d} until the end")
    print(line.ljust(79), end="\r", flush=True)     # \r: back to the start of the line


def can_redraw():
    """Whether the output is a terminal or a notebook."""
    if sys.stdout is None:
        return False
    return sys.stdout.isatty() or "ipykernel" in sys.modules


def print_epoch(row, steps, data):
    """The two lines per epoch of the course notes, a third one for held-out images."""
    line = (f"Train: Loss={row['train_loss']:.4f} Batch_id={steps - 1} LR={row['lr']:.6f} "
            f"Accuracy={row['train_accuracy']:.2f}")
    if can_redraw():
        line = line.ljust(79)               # over the line of print_progress
    print(line)
    for name, title, part in (("val", "Validation set", data.val), ("test", "Test set", data.test)):
        count = len(part[0])
        if count:
            accuracy = row[f"{name}_accuracy"]
            correct = round(accuracy * count / 100)
            print(f"{title}: Average loss: {row[f'{name}_loss']:.4f}, Accuracy: "
                  f"{correct}/{count} ({accuracy:.2f}%)", flush=True)


def print_summary(args, data, network, history, folder):
    count = len(data.test[0])
    seconds = sum(row["seconds"] for row in history)
    print(f"\n{history[-1]['test_accuracy']:.2f}% of {count:,} test images of {data.name} right "
          f"after the last epoch, seed {args.seed}")
    print(f"{args.model}: {networks.count_parameters(network):,} parameters, {args.epochs} epochs "
          f"in {seconds:.0f} s")
    print(f"next: python analyze.py --run {shlex.quote(str(folder))}")


def print_spread(accuracies):
    mean = statistics.mean(accuracies)
    std = statistics.stdev(accuracies)
    print(f"\ntest accuracy of the last epoch, {len(accuracies)} seeds: mean {mean:.3f}%, standard "
          f"deviation {std:.3f}, from {min(accuracies):.2f} to {max(accuracies):.2f}")


# ---- What a run leaves behind -----------------------------------------------------------------

class LossNotFinite(UserError):
    """The training broke: its loss is infinite or NaN."""


def require_finite(loss, epoch):
    if not math.isfinite(loss):
        raise LossNotFinite(f"epoch {epoch}: the loss is {loss}. Try a lower --lr, or --clip 1")


def save_run(folder, args, data, network, optimizer, history):
    """Save the checkpoint and the log, at the end the weights. Without a folder nothing is saved.

    Weights alone are not enough to go on from: the optimizer holds a velocity for each weight.
    """
    if folder is None:
        return
    saved_args = vars(args) | {"data": data.name}
    save_pt(Path(folder, "checkpoint.pt"), {
        "args": saved_args,
        "epoch": len(history),
        "history": history,
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
    })
    if history:
        save(Path(folder, "log.csv"), digits.to_csv(history))
    if len(history) == args.epochs:
        # All that is needed to use the network without this script: README, "Your own network".
        save_pt(Path(folder, "weights.pt"), {
            "args": saved_args,
            "mean": data.mean,
            "std": data.std,
            "network": network.state_dict(),
        })


def save_pt(path, contents):
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    save(path, buffer.getvalue())           # whole or not at all: see data.py


def read_pt(path, *keys):
    """The contents of a .pt file of this script as attributes: args, network (a module, on the CPU)
    and these keys. Raises UserError for any other file."""
    try:
        # A .pt file is a ZIP archive with a checksum for each part, at which torch.load does not
        # look. weights_only: to load a stranger's file must not run a stranger's code.
        if zipfile.ZipFile(path).testzip() is not None:
            raise ValueError("a checksum is wrong")
        contents = torch.load(path, map_location="cpu", weights_only=True)
        missing = set(keys) - set(contents)
        if missing:
            raise ValueError(f"it lacks {missing}")
        # Flags that an older run did not have get their defaults.
        contents["args"] = argparse.Namespace(**(vars(parse_args([])) | contents["args"]))
        network = build_from(contents["args"])
        network.load_state_dict(contents["network"])
        contents["network"] = network
        return argparse.Namespace(**contents)
    except Exception as error:              # whatever a missing, damaged or foreign file can do
        raise UserError(f"{path} is missing, damaged, or not made by this train.py and model.py "
                        f"({reason(error)})")


def load_run(folder):
    """A finished run, such as runs/001: its network, in evaluation mode on the CPU, its args, and
    mean and std of the images that it was trained on, 1×C×1×1 each. Raises UserError."""
    run = read_pt(Path(folder, "weights.pt"), "mean", "std")
    run.network.eval()
    return run


def new_folder(out):
    """Make and return out/001, or out/002, ...: the first that is not there. If two runs start in
    the same moment, mkdir gives each folder to one of them only."""
    Path(out).mkdir(parents=True, exist_ok=True)
    count = 1
    while True:
        folder = Path(out, f"{count:03d}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            count += 1


# ---- The command line -------------------------------------------------------------------------

def make_parser():
    """The flags. The ranges after "usual" are the lecture's."""
    parser = digits.Parser(prog="train.py", description="Train a network on MNIST.")
    add = parser.add_argument
    add("--model", choices=networks.NETWORKS, default="default", help="a network of model.py")
    add("--head", choices=("conv", "linear", "place"),
        help="last layers of default, tiny, micro, residual")
    add("--down", choices=("overlap", "pool", "stride"), help="how `default` halves its maps")
    add("--activation", choices=networks.ACTIVATIONS, help="of the network `default`")
    add("--dropout", type=number(float, 0, 0.9), help="of `default`; usual: 0.05 to 0.2")
    add("--data", choices=digits.DATASETS, default="mnist", help="which data set")
    add("--data-dir", help="where it is or will be put; not given: data")
    add("--augment", choices=digits.AUGMENTATIONS, default="default", help="how images are varied")
    add("--limit", type=number(int, 1), help="train on the first LIMIT images; not given: on all")
    add("--val", type=number(int, 0), default=0, help="hold out the last VAL training images")
    add("--epochs", type=number(int, 1, 9999), default=18, help="passes over the images")
    add("--opt", choices=OPTIMIZERS, default="sgd", help="optimizer")
    add("--momentum", type=number(float, 0, 0.9999), default=0.9, help="of sgd; beta1 of adam")
    add("--nesterov", action=argparse.BooleanOptionalAction, default=True, help="sgd's momentum")
    add("--weight-decay", type=number(float, 0), help="not given: suits --opt; usual: 1e-4 to 5e-4")
    add("--batch-size", type=number(int, 1), default=64, help="images per step; usual: 32 to 256")
    add("--label-smoothing", type=number(float, 0, 0.9), default=0.05, help="0 is off")
    add("--sched", choices=SCHEDULES, default="onecycle", help="how the learning rate changes")
    add("--lr", type=number(float, 1e-12),
        help="learning rate, of onecycle the maximum; not given: suits --opt")
    add("--step-every", type=number(int, 1),
        help="epochs between the halvings of --sched step; not given: a fifth of all")
    add("--fade-from", type=number(float, 0, 1), default=0.7,
        help="share of the training after which augmentation fades; 1: never")
    add("--clip", type=number(float, 0), default=0.0,
        help="longest gradient; 0: any length; usual: 0.5 to 5")
    add("--seed", type=number(int, 0), default=0, help="of all random numbers")
    add("--runs", type=number(int, 1), default=1, help="how many seeds to train")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto: fastest")
    add("--deterministic", action="store_true", help="the same bits each time on a GPU, too")
    add("--out", default="runs", help="where the folders of runs are made")
    add("--resume", metavar="RUN", help="go on with the run in this folder")
    add("--sanity", action="store_true", help="check the setup in a few seconds; train nothing")
    return parser


def parse_args(words=None):
    """The flags. One that was not given and depends on another one is filled in."""
    args = make_parser().parse_args(words)
    rate, peak_rate, weight_decay = OPTIMIZERS[args.opt]
    if args.lr is None:
        args.lr = peak_rate if args.sched == "onecycle" else rate
    if args.weight_decay is None:
        args.weight_decay = weight_decay
    if args.step_every is None:
        args.step_every = math.ceil(args.epochs / 5)
    if args.sched == "plateau" and args.val == 0:
        args.val = 5000                     # it watches the loss of held-out images
    return args


def resume(args):
    """(flags, checkpoint) of the run to go on with. --data-dir and --device may be new ones."""
    allowed = ("--resume", "--data-dir", "--device")
    for word in sys.argv[1:]:
        if word.startswith("--") and word.split("=")[0] not in allowed:
            raise UserError(f"--resume keeps the settings of the run: leave out {word}")
    checkpoint = read_pt(Path(args.resume, "checkpoint.pt"), "history", "optimizer")
    args = changed(checkpoint.args, resume=args.resume, runs=1, device=args.device,
                   data_dir=args.data_dir or checkpoint.args.data_dir)
    return args, checkpoint


def load_data(args):
    """The data set of the flags, on its device."""
    device = digits.pick_device(args.device)
    return digits.load(args.data, args.data_dir, device, args.val, args.limit)


def main():
    args = parse_args()
    checkpoint = None
    if args.resume is not None:
        args, checkpoint = resume(args)
    if args.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"        # CUDA needs it
        torch.use_deterministic_algorithms(True, warn_only=True)

    data = load_data(args)
    print(f"{data.name}: {len(data.train[0]):,} training, {len(data.val[0]):,} held-out, "
          f"{len(data.test[0]):,} test images; network {args.model!r} on {data.mean.device}; "
          f"{args.opt}, {args.sched}, lr {args.lr:g}")
    if args.sanity:
        sanity(args, data)
        return
    make_network(args, data)                # if it does not fit, say so before a folder is made

    accuracies = []
    for seed in range(args.seed, args.seed + args.runs):
        args = changed(args, seed=seed)     # all else stays equal
        folder = args.resume or new_folder(args.out)
        try:
            network, history = train(args, data, folder, checkpoint)
        except KeyboardInterrupt:           # the epochs that are finished are saved
            print(f"\nstopped. To go on: python train.py --resume {shlex.quote(str(folder))}")
            raise
        accuracies.append(history[-1]["test_accuracy"])
        print_summary(args, data, network, history, folder)
    if args.runs > 1:
        print_spread(accuracies)


if __name__ == "__main__":
    run_command(main)
