"""What optimizers are fed to find out what they do, whatever they are made of."""

import functools

import jax
import jax.numpy as jnp

from nnsanity._tree import in_float32
from nnsanity._types import Array, PyTree

SIDE = 2
"""Parameters are cut to so much along each axis: optimizers do not look at sizes."""


def corner(leaf: Array) -> Array:
    """Cuts a parameter to what is enough for an optimizer's answer."""
    return leaf[tuple(slice(SIDE) for _ in leaf.shape)]


def linear(start: PyTree, grads: PyTree, params: PyTree) -> Array:
    """A loss of 1 with these gradients, for optimizers that ask for its value."""
    leaves = (jax.tree.leaves(tree) for tree in (start, grads, params))
    return functools.reduce(
        jnp.add,
        (jnp.sum(in_float32(g) * (p - p0)) for p0, g, p in zip(*leaves, strict=True)),
        jnp.float32(1),
    )
