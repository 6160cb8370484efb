"""How large the gradient of each parameter is, and whether its dtype can hold it."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nnsanity._tree import in_float32, inexact_leaves, is_inexact
from nnsanity._types import Array, Params, PyTree


class GradientStats(NamedTuple):
    """Statistics of the gradient of each parameter, in the order of ``leaf_names``.

    Attributes:
        norm: float32[leaves].
        largest: float32[leaves], largest absolute value.
        zero_fraction: float32[leaves], share of exact zeros; 1 learns nothing.
        nonfinite_fraction: float32[leaves]; healthy is 0.
        underflow_fraction: float32[leaves], share of the non-zero values that are
            subnormal in the leaf's dtype; healthy is near 0.
    """

    norm: Array
    largest: Array
    zero_fraction: Array
    nonfinite_fraction: Array
    underflow_fraction: Array


def gradient_stats(grads: PyTree) -> GradientStats:
    """Measures the gradient of every floating-point parameter.

    Costs one read of the gradients.  Sums are in float32 whatever the dtype; a NaN
    makes norm and largest NaN.  Leaves without elements count as zero.

    Args:
        grads: any pytree; leaves that are not floating-point are passed over.

    Returns:
        ``GradientStats``, float32[leaves] each.

    Example:
        >>> stats = gradient_stats({"w": jnp.array([3.0, 0.0, -4.0, 0.0])})
        >>> stats.norm, stats.zero_fraction
        (Array([5.], dtype=float32), Array([0.5], dtype=float32))
    """
    leaves = [_leaf_stats(leaf) for leaf in inexact_leaves(grads)]
    if not leaves:
        return GradientStats(*(jnp.zeros(0, jnp.float32) for _ in range(5)))
    return GradientStats(*(jnp.stack(column) for column in zip(*leaves, strict=True)))


def _leaf_stats(leaf: Array) -> tuple[Array, ...]:
    leaf = jnp.asarray(leaf)
    size = max(math.prod(leaf.shape), 1)
    magnitude = jnp.abs(in_float32(leaf) if jnp.isrealobj(leaf) else leaf)
    largest = jnp.max(magnitude, initial=0.0)
    # Scaled by the largest, the squares neither overflow nor vanish.
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    norm = scale * jnp.sqrt(jnp.sum((magnitude / scale) ** 2))
    # XLA on CPU drops NaN from the maximum of a large array (JAX 0.10, 0.12).
    largest = jnp.where(jnp.isnan(norm), jnp.nan, largest)
    is_subnormal = _is_subnormal(leaf)
    num_zero = jnp.sum((magnitude == 0) & ~is_subnormal)
    nonfinite = jnp.sum(~jnp.isfinite(magnitude)) / size
    underflow = jnp.sum(is_subnormal) / jnp.maximum(size - num_zero, 1)
    columns = (norm, largest, num_zero / size, nonfinite, underflow)
    return tuple(column.astype(jnp.float32) for column in columns)


def _is_subnormal(leaf: Array) -> Array:
    """Reads the bits: processors may take subnormal numbers for zero."""
    if not jnp.isrealobj(leaf):
        return _is_subnormal(leaf.real) | _is_subnormal(leaf.imag)
    info = jnp.finfo(leaf.dtype)
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{info.bits}"))
    fraction = bits & ((1 << info.nmant) - 1)
    exponent = (bits >> info.nmant) & ((1 << info.nexp) - 1)
    return (exponent == 0) & (fraction != 0)


def arriving_at(stats: GradientStats, params: Params) -> dict[int, Array]:
    """Says which parameters get a gradient that is not 0, bool[] by leaf index."""
    inexact = [i for i, one in enumerate(jax.tree.leaves(params)) if is_inexact(one)]
    return {leaf: stats.largest[rank] != 0 for rank, leaf in enumerate(inexact)}
