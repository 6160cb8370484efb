"""What the units of a layer do, told by the values that enter and leave it."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nnsanity._tree import in_float32
from nnsanity._types import Array
from nnsanity.tracing.layers import Located
from nnsanity.tracing.tap import Reading

CORRELATED = 0.999
"""Correlation above which one unit doubles another."""
CONSTANT_LIMIT = 1e-6
"""Deviation of a unit, in units of its size, that is rounding and no variation."""


def is_thresholded(one: Located) -> bool:
    """Tells whether a layer's nonlinearity has an end that passes nothing back."""
    return one.activation is not None and bool(one.activation.flat_values)


def never_active(values: Array, *, one: Located) -> Array:
    """Says which units of a layer stand at a flat end everywhere.

    Args:
        values: what leaves its nonlinearity.
        one: the layer.

    Returns:
        bool[units].
    """
    flat_values = () if one.activation is None else one.activation.flat_values
    # A maximum over numbers: several times as fast on CPU as one over booleans.
    distances = [jnp.abs(values - jnp.asarray(f, values.dtype)) for f in flat_values]
    distance = functools.reduce(jnp.minimum, distances)
    others = tuple(axis for axis in range(values.ndim) if axis not in one.unit_axes)
    seen = 0 if values.size else 1  # without examples no unit is dead
    furthest = jnp.max(distance, axis=others, initial=seen)
    # A flattened image has each channel once for every position.
    return jnp.all((furthest == 0).reshape(-1, one.layer.units), axis=0)


def dead_of(reading: Reading, one: Located) -> Array:
    """Joins the turns of loops with the same weights; what did not run is not dead.

    Returns:
        bool[*stack, units].
    """
    return reading.merged(one.shared, jnp.all).where_it_ran()


def dead_fraction(dead: Array) -> Array:
    """Returns the share of dead units, float32[*stack]."""
    return jnp.mean(dead, axis=-1, dtype=jnp.float32)


def num_rows(values: Array, one: Located) -> Array:
    """Counts the examples and positions at which each unit of a layer is seen."""
    return jnp.int32(values.size // max(one.layer.units, 1))


def activity(values: Array, *, one: Located) -> Array:
    """Returns the mean absolute output of each unit, float32[units].

    Args:
        values: what leaves its nonlinearity.
        one: the layer.
    """
    rows = in_float32(by_unit(jnp.abs(values), one.unit_axes, one.layer.units))
    return jnp.mean(rows, axis=0).astype(jnp.float32)


def has_flat_end(one: Located) -> bool:
    """Tells whether a layer's nonlinearity is known and levels off somewhere."""
    kind = one.activation
    ends = () if kind is None else (kind.level_below, kind.level_above)
    return any(end == end for end in ends)


def saturated(values: Array, *, one: Located) -> Array:
    """Says where a layer's nonlinearity is level, bool[rows, units].

    Args:
        values: what enters its nonlinearity, at ``Located.entry``.
        one: the layer.
    """
    _, axes = one.entry
    rows = in_float32(by_unit(values, axes, one.layer.units))
    if one.activation is None:
        return jnp.zeros(rows.shape, bool)
    return (rows < one.activation.level_below) | (rows > one.activation.level_above)


def by_unit(values: Array, axes: tuple[int, ...], num_units: int) -> Array:
    """Lays values out as [rows, units], the rows being examples and positions."""
    ndim = values.ndim
    axes = tuple(axis % ndim for axis in axes)
    others = [axis for axis in range(ndim) if axis not in axes]
    if [*others, *axes] != [*range(ndim)]:
        values = jnp.transpose(values, (*others, *axes))
    # A flattened image has each channel once for every position.
    return values.reshape(-1, num_units)


class Spread(NamedTuple):
    """How the units of a layer vary together over the examples.

    Attributes:
        effective_rank: float32[], tr(C)^2 / tr(C^2) of their covariance C.
        redundant: bool[units], correlated with a unit before them.
        constant: bool[units].
    """

    effective_rank: Array
    redundant: Array
    constant: Array


def spread_of_units(values: Array, *, one: Located) -> Spread:
    """Compares the units of a layer with each other, by one product over the examples.

    No decomposition, and no gathering where the examples are split over devices: the
    product sums over them.

    Args:
        values: what leaves its nonlinearity.
        one: the layer.
    """
    rows = in_float32(by_unit(values, one.unit_axes, one.layer.units))
    # In units of a unit's own largest number, squares neither overflow nor vanish.
    largest = jnp.max(jnp.abs(rows), axis=0, initial=0)
    rows = rows / jnp.where(largest > 0, largest, 1)
    centred = rows - jnp.mean(rows, axis=0)
    deviation = jnp.sqrt(jnp.mean(centred**2, axis=0))
    constant = ~(deviation > CONSTANT_LIMIT) & ~jnp.isnan(deviation)
    standard = jnp.where(constant, 0, centred / jnp.where(constant, 1, deviation))
    correlation = jnp.matmul(standard.T, standard, precision=jax.lax.Precision.HIGHEST)
    correlation = correlation / max(len(rows), 1)
    sizes = jnp.where(constant, 0, deviation * largest)
    sizes = sizes / jnp.maximum(jnp.max(sizes, initial=0), jnp.finfo(sizes.dtype).tiny)
    squares = jnp.sum(correlation**2 * (sizes**2)[:, None] * sizes**2)
    trace = jnp.sum(sizes**2)
    rank = jnp.where(squares == 0, 0, trace**2 / jnp.where(squares == 0, 1, squares))
    numbers = jnp.arange(one.layer.units)
    # A maximum over numbers: several times as fast on CPU as one over booleans.
    earlier = jnp.where(numbers[:, None] < numbers, jnp.abs(correlation), 0)
    redundant = jnp.max(earlier, axis=0, initial=0) > CORRELATED
    return Spread(rank.astype(jnp.float32), redundant, constant)
