"""Which units of a layer stand still, told by the values that leave it."""

import functools

import jax.numpy as jnp

from nnsanity._types import Array
from nnsanity.tracing.layers import Located
from nnsanity.tracing.tap import Reading


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
