"""The networks that costs are measured on, written plainly, with their batches."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

MLP_SIZES = (784, 1000, 500, 100, 10)
CHANNELS = (3, 64, 96, 128)
DENSE_SIZES = (4 * 4 * 128, 512, 256, 10)
NUM_BLOCKS, WIDTH, NUM_HEADS, VOCABULARY, LENGTH = 4, 128, 4, 256, 64


class Case(NamedTuple):
    """A network with its parameters and one batch.

    Attributes:
        apply_fn: ``apply_fn(params, inputs) -> logits``.
        params: nested dictionaries.
        batch: (inputs, labels).
    """

    apply_fn: Callable
    params: Any
    batch: tuple

    def loss_fn(self, params, batch):
        """Softmax cross entropy."""
        inputs, labels = batch
        logits = self.apply_fn(params, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def he(key, *shape):
    """He-normal weights; the last axis are the units."""
    fan_in = shape[0] if len(shape) == 2 else shape[0] * shape[1] * shape[2]
    return jax.random.normal(key, shape) * (2 / fan_in) ** 0.5


def dense_layers(key, sizes):
    """Weights and biases of dense layers."""
    keys = jax.random.split(key, len(sizes) - 1)
    return {
        f"layer_{index}": {"w": he(one, *shape), "b": jnp.zeros(shape[1])}
        for index, (one, shape) in enumerate(
            zip(keys, itertools.pairwise(sizes), strict=True)
        )
    }


def dense_network(params, hidden):
    """ReLU between the layers."""
    for index in range(len(params)):
        layer = params[f"layer_{index}"]
        hidden = hidden @ layer["w"] + layer["b"]
        hidden = jax.nn.relu(hidden) if index < len(params) - 1 else hidden
    return hidden


def mlp(batch_size=128):
    """An MLP for MNIST, 1.3 million parameters."""
    key = jax.random.key(0)
    inputs = jax.random.normal(key, (batch_size, MLP_SIZES[0]))
    labels = jnp.arange(batch_size) % 10
    return Case(dense_network, dense_layers(key, MLP_SIZES), (inputs, labels))


def cnn(batch_size=32):
    """A CNN for CIFAR: three convolutions with pooling, three dense layers."""
    key = jax.random.key(0)
    params = {
        f"conv_{index}": {"w": he(key, 3, 3, *shape), "b": jnp.zeros(shape[1])}
        for index, shape in enumerate(itertools.pairwise(CHANNELS))
    }
    params["dense"] = dense_layers(key, DENSE_SIZES)

    def apply_fn(params, images):
        for index in range(len(CHANNELS) - 1):
            layer = params[f"conv_{index}"]
            images = jax.lax.conv_general_dilated(
                images, layer["w"], (1, 1), "SAME", dimension_numbers=_IMAGES
            )
            images = jax.nn.relu(images + layer["b"])
            images = jax.lax.reduce_window(
                images, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
            )
        return dense_network(params["dense"], images.reshape(len(images), -1))

    images = jax.random.normal(key, (batch_size, 32, 32, 3))
    return Case(apply_fn, params, (images, jnp.arange(batch_size) % 10))


_IMAGES = ("NHWC", "HWIO", "NHWC")


def transformer(batch_size=16):
    """A causal transformer of four blocks, unrolled, 0.8 million parameters."""
    keys = iter(jax.random.split(jax.random.key(0), 6 * NUM_BLOCKS + 1))
    size = WIDTH // NUM_HEADS
    params = {"embedding": 0.02 * jax.random.normal(next(keys), (VOCABULARY, WIDTH))}
    for index in range(NUM_BLOCKS):
        params[f"block_{index}"] = {
            "qkv": he(next(keys), WIDTH, 3 * WIDTH) / 2**0.5,
            "out": he(next(keys), WIDTH, WIDTH) / 2**0.5,
            "up": he(next(keys), WIDTH, 4 * WIDTH),
            "down": he(next(keys), 4 * WIDTH, WIDTH) / 2**0.5,
            "scales": jnp.ones((2, WIDTH)),
        }

    def norm(x, scale):
        return scale * jax.nn.standardize(x)

    def attention(block, x):
        query, key, value = jnp.split(x @ block["qkv"], 3, axis=-1)
        query, key, value = (
            one.reshape(*x.shape[:2], NUM_HEADS, size) for one in (query, key, value)
        )
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return mixed.reshape(x.shape) @ block["out"]

    def apply_fn(params, tokens):
        x = params["embedding"][tokens]
        for index in range(NUM_BLOCKS):
            block = params[f"block_{index}"]
            x = x + attention(block, norm(x, block["scales"][0]))
            hidden = jax.nn.gelu(norm(x, block["scales"][1]) @ block["up"])
            x = x + hidden @ block["down"]
        return x @ params["embedding"].T

    tokens = jnp.arange(batch_size * LENGTH).reshape(batch_size, LENGTH) ** 2 % 251
    return Case(apply_fn, params, (tokens, jnp.roll(tokens, -1, axis=1)))


CASES = {
    "MLP, batch 128": mlp,
    "MLP, batch 512": functools.partial(mlp, 512),
    "CNN, batch 32": cnn,
    "transformer, batch 16": transformer,
}
