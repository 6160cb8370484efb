"""Outliers: a few rows that lie far from everything else."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nnsanity._tree import in_float32
from nnsanity._types import Array

FAR = 6.0
"""Deviations of the bulk from which on a value lies outside of it; a normal feature of
a billion rows has one."""
_ROUNDS = 12


class Outliers(NamedTuple):
    """What a few values far from the rest do to a feature.

    Attributes:
        share: float32[features], of the squared deviation from the mean of the bulk
            that the values outside of it bring; healthy is under 0.5.
        num_outside: int32[features], values outside of the bulk.
        gap: float32[features], distance of the nearest of them from that mean, over
            that of the farthest value of the bulk; about 1 in a feature that is
            heavy-tailed throughout.  1 where there are none.
        low: float32[features], smallest value of the bulk: clip there.
        high: float32[features], its largest.
        farthest: int32[features], the example that lies farthest out.
    """

    share: Array
    num_outside: Array
    gap: Array
    low: Array
    high: Array
    farthest: Array


@jax.jit
def outliers(values: Array) -> Outliers:
    """Finds values that lie apart from the bulk of their feature.

    The bulk is what lies within six of its own deviations, found by clipping again and
    again.  Worry where ``share`` is above 0.5 and ``gap`` above 3: then mean and
    deviation, and the gradient, belong to a few rows.  Features whose bulk is constant,
    such as rare events, have none.  NaN and infinite values are left out.  Costs about
    25 reads of the values.

    Args:
        values: [examples, ..., features] or [examples].

    Returns:
        ``Outliers``, each field of shape [features].

    Example:
        >>> values = jnp.append(jnp.linspace(-1.0, 1.0, 99), 1000.0)
        >>> found = outliers(values)
        >>> int(found.num_outside), float(found.high), int(found.farthest)
        (1, 1.0, 99)
        >>> bool(found.share > 0.99), float(found.gap)
        (True, 1000.0)

    References:
        Beers, Flynn and Gebhardt (1990), "Measures of location and scale", on clipping.
    """
    values = in_float32(jnp.asarray(values))
    if values.ndim == 1:
        return jax.tree.map(lambda leaf: leaf[0], outliers(values[:, None]))
    axes = tuple(range(values.ndim - 1))
    is_known = jnp.isfinite(values)

    def bulk(limits: tuple[Array, Array]) -> tuple[Array, Array]:
        centre, reach = limits
        inside = is_known & (jnp.abs(values - centre) <= reach)
        count = jnp.maximum(jnp.sum(inside, axes), 1).astype(values.dtype)
        moved = jnp.sum(jnp.where(inside, values - centre, 0), axes) / count
        squares = jnp.where(inside, (values - centre) - moved, 0) ** 2
        return centre + moved, FAR * jnp.sqrt(jnp.sum(squares, axes) / count)

    first = jnp.mean(values, axes, where=is_known)
    first = jnp.where(jnp.isfinite(first), first, 0)
    start = first, jnp.full_like(first, jnp.inf)
    centre, reach = jax.lax.fori_loop(0, _ROUNDS, lambda _, now: bulk(now), start)
    distance = jnp.where(is_known, jnp.abs(values - centre), 0)
    inside = is_known & (distance <= reach)
    outside = is_known & ~inside
    low = jnp.min(jnp.where(inside, values, jnp.inf), axes)
    high = jnp.max(jnp.where(inside, values, -jnp.inf), axes)
    is_apart = (high > low) & jnp.any(outside, axes)
    squares = jnp.sum(jnp.where(outside, distance, 0) ** 2, axes)
    total = jnp.sum(distance**2, axes)
    nearest = jnp.min(jnp.where(outside, distance, jnp.inf), axes)
    edge = jnp.max(jnp.where(inside, distance, 0), axes)
    by_example = jnp.max(distance, axes[1:])
    return Outliers(
        jnp.where(is_apart, squares / jnp.where(total > 0, total, 1), 0),
        jnp.where(is_apart, jnp.sum(outside, axes, dtype=jnp.int32), 0),
        jnp.where(is_apart, nearest / jnp.where(edge > 0, edge, 1), 1),
        low,
        high,
        jnp.argmax(by_example, axis=0).astype(jnp.int32),
    )
