"""How weights are drawn: the size that each layer needs, and biases of zero."""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from nnsanity._types import Array, Params
from nnsanity.tracing.biases import is_bias
from nnsanity.tracing.layers import Located, Network

RECTIFIERS = ("relu", "relu6", "leaky_relu", "elu", "selu", "gelu", "silu", "softplus")
CHANCE = 3.29
"""Deviations of a normal number that one in a thousand exceeds, either way."""


def needed_gain(one: Located) -> float:
    """Returns the gain that keeps the signal's size, for a layer."""
    return gain_before(one.layer.activation)


def gain_before(activation: str | None) -> float:
    """Returns the gain that keeps the signal's size: sqrt(2) before a rectifier."""
    return math.sqrt(2.0) if activation in RECTIFIERS else 1.0


def redrawn(network: Network, params: Params, key: Array) -> Params:
    """Draws fresh weights: He normal before rectifiers, LeCun normal elsewhere.

    Parameters of two or more axes that belong to no layer stay, and so do scales of
    normalizations; biases become zero.

    Args:
        network: of ``apply_fn(params, inputs)``.
        params: the parameters.
        key: consumed.
    """
    leaves, structure = jax.tree.flatten(params)
    drawn = list(leaves)
    layers = [one for one in network.layers if one.layer.kind != "embedding"]
    noise = _noise({one.weight: leaves[one.weight].shape for one in layers}, key)
    for one in layers:
        for leaf in one.leaves - {one.weight}:
            if is_bias(network, one, leaf):
                drawn[leaf] = jnp.zeros_like(leaves[leaf])
        scale = needed_gain(one) / math.sqrt(max(one.layer.fan_in, 1))
        dtype = leaves[one.weight].dtype
        drawn[one.weight] = (scale * noise[one.weight]).astype(dtype)
    return jax.tree.unflatten(structure, drawn)


def _noise(shapes: Mapping[int, tuple[int, ...]], key: Array) -> dict[int, Array]:
    """Draws normal numbers for each leaf; those of one shape in one compiled draw."""
    noise: dict[int, Array] = {}
    for shape in dict.fromkeys(shapes.values()):
        alike = [leaf for leaf, one in shapes.items() if one == shape]
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.array(alike))
        draw = functools.partial(jax.random.normal, shape=shape, dtype=jnp.float32)
        drawn = jax.vmap(draw)(keys)
        noise |= zip(alike, drawn, strict=True)
    return noise


def without_biases(network: Network, params: Params) -> Params:
    """Sets the biases of all layers to zero."""
    leaves, structure = jax.tree.flatten(params)
    for one in network.layers:
        for leaf in one.leaves - {one.weight}:
            if is_bias(network, one, leaf):
                leaves[leaf] = jnp.zeros_like(leaves[leaf])
    return jax.tree.unflatten(structure, leaves)


def initializer(one: Located) -> str:
    """Says by name how the weights of a layer are drawn, with Flax's argument."""
    if one.layer.kind == "embedding":
        return "embedding_init=jax.nn.initializers.normal(1.0)"
    name = "he_normal" if needed_gain(one) > 1 else "lecun_normal"
    return f"kernel_init=jax.nn.initializers.{name}()"


def chance_interval(num_weights: int) -> tuple[float, float]:
    """Returns how far the deviation of normal weights lies off by chance, as a factor.

    The interval that holds it in 999 of 1,000 draws: the sum of squares follows a
    chi-square distribution, whose quantiles are those of the cube of a normal number.

    Args:
        num_weights: how many weights were drawn.

    Example:
        >>> low, high = chance_interval(10_000)
        >>> print(f"{low:.3f} {high:.3f}")
        0.977 1.023

    References:
        Wilson and Hilferty (1931), "The distribution of chi-square".
    """
    width = 2 / (9 * max(num_weights, 1))
    ends = (1 - width + sign * CHANCE * math.sqrt(width) for sign in (-1, 1))
    low, high = (math.sqrt(max(end, 0.0) ** 3) for end in ends)
    return low, high
