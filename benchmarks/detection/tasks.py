"""Data of the benchmark, from scikit-learn's tables or drawn, and healthy programs."""

import functools
from typing import NamedTuple

import jax
import numpy as np
import optax
from programs import (
    Program,
    binary_cross_entropy,
    cnn,
    cross_entropy,
    glorot,
    mlp,
    nnx_mlp,
    relu,
    rnn,
    sigmoid,
    squared_error,
    tanh,
    transformer,
    weight_squares,
)
from sklearn import datasets


def standardized(values):
    """Every column to mean 0 and deviation 1."""
    spread = values.std(axis=0)
    return (values - values.mean(axis=0)) / np.where(spread > 0, spread, 1)


@functools.cache
def raw_table(name):
    """One of scikit-learn's tables as it is."""
    return getattr(datasets, f"load_{name}")(return_X_y=True)


@functools.cache
def table(name):
    """The same with standardized inputs; numbers to predict are standardized too."""
    inputs, targets = raw_table(name)
    if name == "diabetes":
        return standardized(inputs), standardized(targets)[:, None]
    if name == "breast_cancer":
        return standardized(inputs), targets[:, None].astype(float)
    return standardized(inputs), targets


@functools.cache
def digit_images():
    """Images of 8 by 8, mean 0 and deviation 1 over all pixels."""
    pixels, labels = raw_table("digits")
    return ((pixels - pixels.mean()) / pixels.std()).reshape(-1, 8, 8), labels


@functools.cache
def digits():
    """The same as rows of 64."""
    images, labels = digit_images()
    return images.reshape(len(images), -1), labels


@functools.cache
def surface(num_examples=1500):
    """A smooth function of three numbers between -1 and 1."""
    random = np.random.RandomState(0)
    x = random.uniform(-1, 1, (num_examples, 3))
    y = np.sin(3 * x[:, 0]) * x[:, 1] + 0.5 * x[:, 2] ** 2
    return x * 1.7, standardized(y + 0.02 * random.randn(num_examples))[:, None]


def flipped(inputs, labels):
    """Every seventh label is the other one."""
    is_flipped = np.arange(len(labels))[:, None] % 7 == 3
    return inputs, np.where(is_flipped, 1 - labels, labels).astype(labels.dtype)


@functools.cache
def wave(num_examples=400):
    """A sine of one number, two periods."""
    x = np.linspace(-2, 2, num_examples)[:, None]
    return x, np.sin(np.pi * x)


@functools.cache
def spirals(num_examples=1000):
    """Two spirals, one turn each."""
    random = np.random.RandomState(1)
    label = random.randint(0, 2, num_examples)
    radius = random.uniform(0.3, 2.0, num_examples)
    angle = 3 * radius + np.pi * label
    points = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return points + 0.03 * random.randn(num_examples, 2), label[:, None].astype(float)


DIGITS = Program(digits, mlp(64, 32, 10), cross_entropy, optax.adam(3e-3))
IMAGES = Program(digit_images, cnn(), cross_entropy, optax.adam(3e-3), num_steps=300)
ROWS = Program(digit_images, rnn(), cross_entropy, optax.adam(5e-3), num_steps=500)
TOKENS = Program(
    digit_images, transformer(), cross_entropy, optax.adam(3e-3), num_steps=300
)
NNX_DIGITS = Program(digits, nnx_mlp(64, 10), cross_entropy, optax.sgd(0.1, 0.9))
SURFACE = Program(
    surface, mlp(64, 64, 1, hidden=tanh, init=glorot), squared_error, optax.adam(5e-3)
).but(num_steps=800)
WAVE = Program(
    wave, mlp(64, 32, 1, hidden=tanh, init=glorot), squared_error, optax.adam(1e-2)
).but(num_steps=1500)
SPIRALS = Program(
    spirals,
    mlp(32, 32, 1, hidden=tanh, init=glorot),
    binary_cross_entropy,
    optax.adam(1e-2),
    num_steps=800,
)
WINE = Program(lambda: table("wine"), nnx_mlp(32, 3), cross_entropy, optax.sgd(0.1), 16)
CANCER = Program(
    lambda: table("breast_cancer"), mlp(32, 1), binary_cross_entropy, optax.sgd(0.1)
)
DIABETES = Program(
    lambda: table("diabetes"), mlp(16, 1), squared_error, optax.sgd(0.03)
)
FLIPPED = CANCER.but(data=lambda: flipped(*table("breast_cancer")))


class Fault(NamedTuple):
    """A faulty program and its healthy twin.

    Attributes:
        name: what was done.
        items: acceptable diagnoses, the planted one first.
        faulty: the program with the fault.
        healthy: the program without it.
    """

    name: str
    items: tuple[int, ...]
    faulty: Program
    healthy: Program


def changed(name, items, healthy, **changes):
    """A fault that changes some attributes of a healthy program."""
    return Fault(name, items, healthy.but(**changes), healthy)


def on(data, change):
    """Changes the inputs of a data set."""
    return lambda: (change(data()[0]), data()[1])


def to(data, change):
    """Changes the targets of a data set."""
    return lambda: (data()[0], change(data()[1]))


HEALTHY = {
    "digits": DIGITS,
    "digits, convolutions": IMAGES,
    "digits, recurrent": ROWS,
    "digits, attention": TOKENS,
    "digits, NNX": NNX_DIGITS,
    "surface": SURFACE,
    "wave": WAVE,
    "spirals": SPIRALS,
    "wine": WINE,
    "breast cancer": CANCER,
    "diabetes": DIABETES,
    # What looks risky and does no harm.
    "inputs between 0 and 1": DIGITS.but(
        data=lambda: (raw_table("digits")[0] / 16, raw_table("digits")[1])
    ),
    "many epochs of a small table": WINE.but(num_steps=1500),
    "17 layers of tanh": DIGITS.but(
        network=mlp(
            *[48] * 16, 10, hidden=tanh, init=jax.nn.initializers.lecun_normal()
        ),
        optimizer=optax.adam(1e-3),
        num_steps=600,
    ),
    "20 layers with skips": DIGITS.but(
        network=mlp(*[48] * 19, 10, init=glorot, skips=True), optimizer=optax.adam(1e-3)
    ),
    "sigmoid, one hidden layer": DIGITS.but(
        network=mlp(64, 10, hidden=sigmoid, init=glorot), optimizer=optax.adam(1e-2)
    ),
    "dropout of a quarter": DIGITS.but(network=mlp(128, 64, 10, dropout=0.25)),
    "weak penalty": SURFACE.but(penalty=weight_squares(1e-5)),
    "clipped gradients": TOKENS.but(
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-3))
    ),
    "warm-up and decay": IMAGES.but(
        optimizer=optax.adamw(
            optax.warmup_cosine_decay_schedule(0.0, 3e-3, 30, 300), weight_decay=1e-2
        )
    ),
    "far too wide": CANCER.but(
        network=mlp(1024, 1), optimizer=optax.adam(1e-3), num_steps=300
    ),
    "batches of 256": DIGITS.but(batch_size=256, optimizer=optax.adam(5e-3)),
    "sigmoid on the output": SURFACE.but(
        data=lambda: (surface()[0], _between_0_and_1(surface()[1])),
        network=mlp(64, 64, 1, head=sigmoid, init=glorot),
    ),
    "binary classes as one-hot": CANCER.but(
        data=lambda: (
            table("breast_cancer")[0],
            np.eye(2)[raw_table("breast_cancer")[1]],
        ),
        network=mlp(32, 2, hidden=relu),
        loss=lambda logits, rows: optax.softmax_cross_entropy(logits, rows).mean(),
    ),
    "one layer is enough": CANCER.but(network=mlp(1)),
    "three hidden units": WINE.but(network=mlp(3, 3)),
    "every seventh label flipped": FLIPPED,
    "two hidden layers on diabetes": DIABETES.but(
        network=mlp(64, 32, 1), optimizer=optax.adam(1e-3)
    ),
}


def _between_0_and_1(values):
    return 0.1 + 0.8 * (values - values.min()) / np.ptp(values)
