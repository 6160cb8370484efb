"""Outliers: a few rows that lie far from everything else."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnsanity._tree import in_float32, takes_numbers
from nnsanity._types import Array

FAR = 6.0
"""Deviations of the bulk from which on a value lies outside of it; a normal feature of
a billion rows has one."""
_ROUNDS = 12
_LEAST_TAIL, _MOST_TAIL = 10, 64


class Outliers(NamedTuple):
    """What a few values far from the rest do to a feature.

    Attributes:
        share: float32[features], of the squared deviation from the centre that the
            values beyond the widest gap bring; healthy is under 0.5.
        num_outside: int32[features], how many these are, at most one in a hundred.
        gap: float32[features], distance of the nearest of them from the centre, over
            that of the farthest of all others; healthy is under 3.
        surprise: float32[features], the logarithm of the gap in units of what the tail
            of the others makes likely; exceeds x by chance with probability exp(-x), in
            a heavy tail too.
        low: float32[features], smallest of the others: clip there.
        high: float32[features], their largest.
        farthest: int32[features], the example that lies farthest out.
    """

    share: Array
    num_outside: Array
    gap: Array
    surprise: Array
    low: Array
    high: Array
    farthest: Array


@takes_numbers
@jax.jit
def outliers(values: Array) -> Outliers:
    """Finds a few values that lie apart from all others of their feature.

    The widest gap among the largest distances from the centre sets them apart, where it
    is wide beside the tail that follows.  Worry where ``share`` is above 0.5, ``gap``
    above 3 and ``surprise`` above 7: then mean, deviation and gradient belong to a few
    rows.  Features that are constant but for rare events have none.  NaN and infinite
    values are left out.  Costs about 30 reads of the values.

    Args:
        values: [examples, ..., features] or [examples].

    Returns:
        ``Outliers``, each field of shape [features].

    Example:
        >>> values = jnp.append(jnp.linspace(-1.0, 1.0, 99), 1000.0)
        >>> found = outliers(values)
        >>> int(found.num_outside), float(found.high), int(found.farthest)
        (1, 1.0, 99)
        >>> bool(found.share > 0.99), round(float(found.gap)), bool(found.surprise > 7)
        (True, 1000, True)

    References:
        Renyi (1953), "On the theory of order statistics"; Hill (1975), "A simple
        general approach to inference about the tail of a distribution".
    """
    values = in_float32(jnp.asarray(values))
    if values.ndim == 1:
        return jax.tree.map(lambda leaf: leaf[0], outliers(values[:, None]))
    num_examples = values.shape[0]
    rows = values.reshape(-1, values.shape[-1])
    is_known = jnp.isfinite(rows)
    centre = _centre(rows, is_known)
    distance = jnp.where(is_known, jnp.abs(rows - centre), 0)
    farthest = jnp.argmax(distance, axis=0) // (len(rows) // num_examples)
    surprise, num_outside, gap, edge = jax.vmap(_widest_gap, in_axes=1)(distance)
    inside = is_known & (distance <= edge)
    total = jnp.sum(distance**2, axis=0)
    within = jnp.sum(jnp.where(inside, distance, 0) ** 2, axis=0)
    is_apart = num_outside > 0
    share = 1 - within / jnp.where(total > 0, total, 1)
    return Outliers(
        jnp.where(is_apart, share, 0),
        num_outside,
        gap,
        surprise,
        jnp.min(jnp.where(inside, rows, jnp.inf), axis=0),
        jnp.max(jnp.where(inside, rows, -jnp.inf), axis=0),
        farthest.astype(jnp.int32),
    )


def _centre(rows: Array, is_known: Array) -> Array:
    """Returns the mean of what lies within six of its own deviations."""

    def closer(_: int, limits: tuple[Array, Array]) -> tuple[Array, Array]:
        centre, reach = limits
        inside = is_known & (jnp.abs(rows - centre) <= reach)
        count = jnp.maximum(jnp.sum(inside, axis=0), 1).astype(rows.dtype)
        moved = jnp.sum(jnp.where(inside, rows - centre, 0), axis=0) / count
        squares = jnp.where(inside, (rows - centre) - moved, 0) ** 2
        return centre + moved, FAR * jnp.sqrt(jnp.sum(squares, axis=0) / count)

    first = jnp.mean(rows, axis=0, where=is_known)
    first = jnp.where(jnp.isfinite(first), first, 0)
    start = first, jnp.full_like(first, jnp.inf)
    return jax.lax.fori_loop(0, _ROUNDS, closer, start)[0]


def _widest_gap(distance: Array) -> tuple[Array, Array, Array, Array]:
    """Returns how surprising it is, how many lie beyond it, its ratio and its near end.

    For a tail that falls as a power the logarithms of its spacings, each times its
    rank, are exponential with one mean (Renyi); that mean is taken from the rest of the
    tail (Hill).
    """
    size = len(distance)
    num_tail = min(max(size // 10, _LEAST_TAIL), _MOST_TAIL)
    nothing = jnp.zeros((), distance.dtype)
    if size <= num_tail:
        return nothing, jnp.int32(0), nothing + 1, jnp.max(distance)
    tail = jax.lax.top_k(distance, num_tail + 1)[0]
    logs = jnp.log(jnp.where(tail > 0, tail, 1))
    ranks = np.arange(1, min(max(size // 100, 1), num_tail // 2) + 1)
    above = jnp.cumsum(logs[:-1][::-1])[::-1][ranks] / (num_tail - ranks) - logs[-1]
    gaps = logs[ranks - 1] - logs[ranks]
    surprise = ranks * gaps / jnp.maximum(above, 1e-3)
    best = jnp.argmax(surprise)
    is_apart = (tail[-1] > 0) & (gaps[best] > 0)
    return (
        jnp.where(is_apart, surprise[best], 0),
        jnp.where(is_apart, jnp.asarray(ranks, jnp.int32)[best], 0),
        jnp.where(is_apart, jnp.exp(gaps[best]), 1),
        jnp.where(is_apart, tail[jnp.asarray(ranks)[best]], tail[0]),
    )
