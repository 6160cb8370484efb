"""How far training varies from key to key."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nnsanity._tree import in_float32
from nnsanity._types import Array, Params, PyTree, TrainLossFn
from nnsanity.quantities.descent import check_loss, floats_of, with_floats
from nnsanity.tracing.convolutions import channels_last

NUM_KEYS = 16
"""How many keys tell how far a loss varies: its deviation to a fifth."""


class LossNoise(NamedTuple):
    """How far training varies from key to key, on one batch.

    Attributes:
        loss: float32[], mean over keys.
        loss_deviation: float32[], between keys; 0 where there is no noise.
        gradient_square_norm: float32[], of the mean gradient; unbiased, so that it may
            be negative where noise covers it.
        gradient_variance: float32[], mean squared distance of a key's gradient from the
            mean.  Healthy is the size of the square norm or less at the start.
    """

    loss: Array
    loss_deviation: Array
    gradient_square_norm: Array
    gradient_variance: Array


def noise(
    train_loss_fn: TrainLossFn, params: Params, batch: PyTree, *, key: Array
) -> LossNoise:
    """Measures how far loss and gradient vary from key to key.

    "Dropout, small noise or another random process belongs in the network" (D. Holden):
    worry where there is none, and where it drowns the gradient.

    Costs 16 gradients of the batch, and the memory of two.

    Args:
        train_loss_fn: ``train_loss_fn(params, batch, key) -> scalar``.
        params: any pytree of arrays; of its leaves the floating-point ones count.
        batch: any pytree.
        key: consumed.

    Returns:
        ``LossNoise``.

    Raises:
        ValueError: if the loss is not a scalar, or there are no parameters.

    Example:
        >>> def train_loss_fn(w, x, key):
        ...     return jnp.mean(w * x * jax.random.bernoulli(key, 0.5, x.shape))
        >>> found = noise(
        ...     train_loss_fn, jnp.float32(3), jnp.ones(100), key=jax.random.key(0)
        ... )
        >>> bool(0.1 < found.loss_deviation < 0.25)  # 3 * 0.5 / 10
        True
    """
    check_loss("noise", functools.partial(_with_key, train_loss_fn, key), params, batch)
    return _noise(train_loss_fn, params, batch, key)


def _with_key(
    train_loss_fn: TrainLossFn, key: Array, params: Params, batch: PyTree
) -> Array:
    return train_loss_fn(params, batch, key)


@functools.partial(jax.jit, static_argnums=0)
def _noise(
    train_loss_fn: TrainLossFn, params: Params, batch: PyTree, key: Array
) -> LossNoise:
    floats = floats_of(params)

    def loss_of(moved: PyTree, key: Array) -> Array:
        return train_loss_fn(with_floats(params, moved), batch, key)

    def step(state: tuple, key: Array) -> tuple[tuple, Array]:
        count, mean, square = state
        loss, grads = jax.value_and_grad(loss_of)(floats, key)
        leaves = [in_float32(leaf) for leaf in jax.tree.leaves(grads)]
        change = [one - old for one, old in zip(leaves, mean, strict=True)]
        mean = [old + one / (count + 1) for old, one in zip(mean, change, strict=True)]
        square = square + _square(change) * count / (count + 1)
        return (count + 1, mean, square), loss.astype(jnp.float32)

    zeros = [0 * in_float32(leaf) for leaf in jax.tree.leaves(floats)]
    start = jnp.float32(0), zeros, 0 * _square(zeros)
    keys = jax.random.split(key, NUM_KEYS)
    (_, mean, square), losses = jax.lax.scan(channels_last(step), start, keys)
    variance = square / (NUM_KEYS - 1)
    signal = _square(mean) - variance / NUM_KEYS
    found = jnp.mean(losses), jnp.std(losses, ddof=1), signal, variance
    return LossNoise(*(one.astype(jnp.float32) for one in found))


def _square(leaves: list[Array]) -> Array:
    return functools.reduce(jnp.add, [jnp.sum(jnp.abs(one) ** 2) for one in leaves])
