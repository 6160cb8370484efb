"""Training programs as data: what a user has in hand, built from a key.

Written for the benchmark in several styles: plain functions, Flax Linen and NNX.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import nnsanity as ns
import nnsanity.nnx

relu, tanh, sigmoid = jax.nn.relu, jnp.tanh, jax.nn.sigmoid
he, glorot = jax.nn.initializers.he_normal(), jax.nn.initializers.glorot_normal()
constant, normal = jax.nn.initializers.constant, jax.nn.initializers.normal
zeros = jax.nn.initializers.zeros


def same(values):
    """No activation."""
    return values


class Network(NamedTuple):
    """A network as functions; ``train_apply_fn`` takes a key, None without noise."""

    apply_fn: Callable
    params: Any
    train_apply_fn: Callable | None = None


class Problem(NamedTuple):
    """What ``checkup`` and a training loop need."""

    apply_fn: Callable
    loss_fn: Callable
    train_loss_fn: Callable | None
    params: Any
    data: tuple[np.ndarray, np.ndarray]
    optimizer: optax.GradientTransformation
    batch_size: int
    num_steps: int
    validation: tuple[np.ndarray, np.ndarray] | None


@dataclasses.dataclass(frozen=True)
class Program:
    """A training program.

    Attributes:
        data: ``data() -> (inputs, targets)``.
        network: ``network(key, inputs) -> Network``.
        loss: ``loss(outputs, targets) -> scalar``.
        optimizer: the user's own.
        batch_size: examples in one step.
        num_steps: steps of the user's training.
        penalty: ``penalty(params) -> scalar``, added to the loss, or None.
        validation: ``validation() -> (inputs, targets)``, or None.
    """

    data: Callable
    network: Callable
    loss: Callable
    optimizer: optax.GradientTransformation
    batch_size: int = 32
    num_steps: int = 400
    penalty: Callable | None = None
    validation: Callable | None = None

    def but(self, **changes):
        """Returns a copy with some attributes replaced."""
        return dataclasses.replace(self, **changes)

    def __call__(self, key):
        """Builds the problem with parameters drawn from the key."""
        data = as_float32(self.data())
        network = self.network(key, data[0])
        penalty = self.penalty or (lambda params: 0.0)

        def loss_fn(params, batch):
            return self.loss(network.apply_fn(params, batch[0]), batch[1]) + penalty(
                params
            )

        def train_loss_fn(params, batch, key):
            outputs = network.train_apply_fn(params, batch[0], key)
            return self.loss(outputs, batch[1]) + penalty(params)

        return Problem(
            network.apply_fn,
            loss_fn,
            train_loss_fn if network.train_apply_fn else None,
            network.params,
            data,
            self.optimizer,
            min(self.batch_size, len(data[0])),
            self.num_steps,
            None if self.validation is None else as_float32(self.validation()),
        )


def as_float32(data):
    """Casts numbers to float32 and leaves integers alone."""
    return tuple(
        one.astype(np.float32) if one.dtype.kind == "f" else one.astype(np.int32)
        for one in map(np.asarray, data)
    )


# Networks.


def mlp(
    *widths, hidden=relu, head=same, init=he, bias=zeros, dropout=0.0, skips=False
) -> Callable:
    """Dense layers as plain functions; the last width is that of the outputs."""

    def build(key, inputs):
        sizes = (int(np.prod(inputs.shape[1:])), *widths)
        keys = jax.random.split(key, 2 * len(widths))
        params = [
            {"w": init(keys[2 * i], shape), "b": bias(keys[2 * i + 1], shape[1:])}
            for i, shape in enumerate(itertools.pairwise(sizes))
        ]

        def run(params, inputs, key=None):
            values = inputs.reshape(len(inputs), -1)
            for index, layer in enumerate(params[:-1]):
                after = hidden(values @ layer["w"] + layer["b"])
                is_even = after.shape == values.shape
                values = values + after if skips and is_even else after
                if key is not None:
                    values = dropped(jax.random.fold_in(key, index), values, dropout)
            return head(values @ params[-1]["w"] + params[-1]["b"])

        noisy = (
            (lambda params, inputs, key: run(params, inputs, key)) if dropout else None
        )
        return Network(lambda params, inputs: run(params, inputs), params, noisy)

    return build


def dropped(key, values, rate):
    """Dropout."""
    keep = jax.random.bernoulli(key, 1 - rate, values.shape)
    return jnp.where(keep, values / (1 - rate), 0)


class _CNN(nn.Module):
    """Two convolutions, a pooling, two dense layers."""

    channels: int
    width: int
    dropout: float
    hidden: Callable
    head: Callable
    kernel_init: Callable
    bias_init: Callable

    @nn.compact
    def __call__(self, images, *, train=False):
        options = {"kernel_init": self.kernel_init, "bias_init": self.bias_init}
        values = images.reshape(*images.shape[:3], -1)
        for features in (self.channels, 2 * self.channels):
            values = self.hidden(nn.Conv(features, (3, 3), **options)(values))
        values = nn.avg_pool(values, (2, 2), (2, 2)).reshape(len(images), -1)
        values = self.hidden(nn.Dense(self.width, **options)(values))
        values = nn.Dropout(self.dropout, deterministic=not train)(values)
        return self.head(nn.Dense(10, **options)(values))


def cnn(
    channels=8, width=32, *, dropout=0.0, hidden=relu, head=same, init=he, bias=zeros
) -> Callable:
    """A small convolutional classifier, in Flax Linen."""
    model = _CNN(channels, width, dropout, hidden, head, init, bias)

    def build(key, inputs):
        params = model.init(key, inputs[:1])["params"]

        def noisy(params, inputs, key):
            rngs = {"dropout": key}
            return model.apply({"params": params}, inputs, train=True, rngs=rngs)

        return Network(
            lambda params, inputs: model.apply({"params": params}, inputs),
            params,
            noisy if dropout else None,
        )

    return build


class _NNXClassifier(nnx.Module):
    def __init__(self, sizes, hidden, head, init, rngs):
        self.layers = nnx.List(
            nnx.Linear(a, b, kernel_init=init, rngs=rngs)
            for a, b in itertools.pairwise(sizes)
        )
        self.hidden, self.head = hidden, head

    def __call__(self, values):
        *layers, last = self.layers
        for layer in layers:
            values = self.hidden(layer(values))
        return self.head(last(values))


def nnx_mlp(*widths, hidden=relu, head=same, init=he) -> Callable:
    """Dense layers in Flax NNX."""

    def build(key, inputs):
        sizes = (inputs.shape[-1], *widths)
        model = _NNXClassifier(sizes, hidden, head, init, nnx.Rngs(key))
        functional = ns.nnx.functional(model)
        return Network(functional.apply_fn, functional.params)

    return build


def rnn(width=32, *, outputs=10, hidden=tanh, head=same, init=glorot, scale=1.0):
    """A plain recurrent cell scanned over the rows of an image."""

    def build(key, inputs):
        keys = jax.random.split(key, 3)
        params = {
            "enter": init(keys[0], (inputs.shape[-1], width)),
            "recur": scale * jax.nn.initializers.orthogonal()(keys[1], (width, width)),
            "bias": jnp.zeros(width),
            "leave": init(keys[2], (width, outputs)),
        }

        def apply_fn(params, inputs):
            def step(state, row):
                new = row @ params["enter"] + state @ params["recur"] + params["bias"]
                return hidden(new), None

            start = jnp.zeros((len(inputs), width))
            last, _ = jax.lax.scan(step, start, inputs.swapaxes(0, 1))
            return head(last @ params["leave"])

        return Network(apply_fn, params)

    return build


def transformer(
    width=32, *, depth=2, outputs=10, head=same, init=glorot, mlp_init=he, normed=True
) -> Callable:
    """A pre-norm encoder over the rows of an image, as plain functions."""

    def build(key, inputs):
        _, length, size = inputs.shape
        keys = iter(jax.random.split(key, 3 + 4 * depth))
        params = {
            "embed": init(next(keys), (size, width)),
            "position": normal(0.02)(next(keys), (length, width)),
            "blocks": [
                {
                    "qkv": init(next(keys), (width, 3 * width)),
                    "out": init(next(keys), (width, width)),
                    "up": mlp_init(next(keys), (width, 2 * width)),
                    "down": init(next(keys), (2 * width, width)),
                }
                for _ in range(depth)
            ],
            "head": init(next(keys), (width, outputs)),
        }

        def apply_fn(params, inputs):
            values = inputs @ params["embed"] + params["position"]
            for block in params["blocks"]:
                values = values + attention(block, standard(values, is_on=normed))
                up = jax.nn.gelu(standard(values, is_on=normed) @ block["up"])
                values = values + up @ block["down"]
            return head(standard(values, is_on=normed).mean(axis=1) @ params["head"])

        return Network(apply_fn, params)

    return build


def standard(values, *, is_on=True):
    """Layer normalization without parameters."""
    if not is_on:
        return values
    centred = values - values.mean(axis=-1, keepdims=True)
    return centred / jnp.sqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 1e-5)


def attention(block, values):
    """One head over all positions."""
    query, key, value = jnp.split(values @ block["qkv"], 3, axis=-1)
    scores = jnp.einsum("bqd,bkd->bqk", query, key) / np.sqrt(query.shape[-1])
    mixed = jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(scores), value)
    return mixed @ block["out"]


# Losses.


def cross_entropy(logits, labels):
    """Of logits and integer labels."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def squared_error(outputs, targets):
    """Mean over everything."""
    return jnp.mean((outputs - targets) ** 2)


def binary_cross_entropy(logits, targets):
    """Of one logit for each example."""
    return optax.sigmoid_binary_cross_entropy(logits, targets).mean()


def weight_squares(weight):
    """A penalty on the squares of all parameters."""
    return lambda params: weight * optax.tree.norm(params, squared=True)
