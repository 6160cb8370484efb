"""What the columns of a table are besides numbers: names, and places on a circle."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnsanity._tree import in_float32, takes_numbers
from nnsanity._types import Array
from nnsanity.quantities.moments import feature_moments, z_scores

CODE_RANGE = (5, 1000)
"""How many values a column of codes has."""
CODE_SHARE = 0.1
"""Share of the targets' variance from which on it matters what a code stands for."""
CODE_ORDER = 0.6
"""Difference of neighbouring codes' targets, in units of that of any two codes, from
which on the order of the codes says nothing (1 for unordered ones)."""
MAX_COLUMNS = 32
"""Columns of a table that are looked at one by one."""
MIN_CYCLES = 3.0
"""Cycles over a column's range from which on a network can't be asked to follow."""
PERIODS = (2 * math.pi, 360.0, 24.0)
"""Periods of angles and hours, which may have any value."""
COUNTED_PERIODS = (7.0, 12.0, 24.0, 60.0, 365.0, 366.0)
"""Periods of the calendar and the clock, in whole numbers."""
_MAX_CYCLES = 1000
_CYCLES_AT_ONCE = 64
_MAX_ROWS = 4000
_NUM_PARTS = 12


class Codes(NamedTuple):
    """What one column says if its values are names.

    Attributes:
        num_values: int, distinct values.
        explained: share of the targets' variance that lies between the values, less
            what chance gives.
        order: difference of neighbouring values' mean targets in units of that of any
            two; near 0 where the order of the values orders the targets, 1 for names.
        encoded: [examples], for each example the mean target of its value, from four
            fifths of the examples that it is not among.
    """

    num_values: int
    explained: float
    order: float
    encoded: np.ndarray


def column_codes(column: np.ndarray, targets: np.ndarray) -> Codes | None:
    """Measures a column that has few values; None for any other.

    Runs on the host, in one sort.

    Args:
        column: [examples].
        targets: [examples].

    References:
        Von Neumann (1941), "Distribution of the ratio of the mean square successive
        difference to the variance".
    """
    values, group, counts = np.unique(column, return_inverse=True, return_counts=True)
    size = len(column)
    if not CODE_RANGE[0] <= len(values) <= min(CODE_RANGE[1], size // 8):
        return None
    means = np.bincount(group, targets) / counts
    within = np.mean((targets - means[group]) ** 2) * (size - 1) / (size - len(values))
    explained = 1 - within / max(targets.var(), 1e-30)
    order = _order(means, counts)
    encoded = _out_of_fold_means(group, targets)
    return Codes(len(values), float(explained), order, encoded)


def _order(means: np.ndarray, counts: np.ndarray) -> float:
    """Returns how much neighbours differ, in units of any two.

    The mean of few examples is mostly noise: two count as what is known of both.
    """
    known = 1 / (1 / counts[:, None] + 1 / counts) * (1 - np.eye(len(counts)))
    any_two = np.average((means[:, None] - means) ** 2, weights=known)
    near = np.average(np.diff(means) ** 2, weights=known.diagonal(1))
    return float(near / max(any_two, 1e-30))


def _out_of_fold_means(group: np.ndarray, targets: np.ndarray) -> np.ndarray:
    fold = np.random.default_rng(0).permutation(len(group)) % 5
    encoded = np.full(len(group), targets.mean())
    for one in range(5):
        others = fold != one
        counts = np.bincount(group[others], minlength=group.max() + 1)
        totals = np.bincount(group[others], targets[others], minlength=len(counts))
        means = np.where(counts > 0, totals / counts.clip(1), targets[others].mean())
        encoded[~others] = means[group[~others]]
    return encoded


def is_code(codes: Codes | None) -> bool:
    """Tells whether a column's values are names whose order says nothing."""
    if codes is None:
        return False
    return codes.explained > CODE_SHARE and codes.order > CODE_ORDER


class Cycle(NamedTuple):
    """The sine of one column that explains the targets best.

    Attributes:
        period: in units of the column; NaN where nothing repeats.
        explained: share of the targets' variance that the sine explains.
        encoded: [examples], the sine, with the best phase.
    """

    period: float
    explained: float
    encoded: np.ndarray


def column_cycle(column: np.ndarray, targets: np.ndarray) -> Cycle:
    """Finds the period with which targets repeat along a column.

    A periodogram of at most 4,000 examples, by least squares; frequencies from three
    cycles over the range up to what the examples can resolve.

    Args:
        column: [examples].
        targets: [examples].

    References:
        Lomb (1976), "Least-squares frequency analysis of unequally spaced data".
    """
    low, span = float(column.min()), float(np.ptp(column))
    most = min(len(np.unique(column[:_MAX_ROWS])) / 4, _MAX_CYCLES)
    nothing = Cycle(math.nan, 0.0, np.zeros_like(column))
    if not span > 0 or most <= MIN_CYCLES:
        return nothing
    position = (column - low) / span
    cycles = np.arange(MIN_CYCLES, most, 0.125)
    powers = _periodogram(
        position[:_MAX_ROWS], (targets - targets.mean())[:_MAX_ROWS], cycles
    )
    best = int(np.argmax(powers))
    found = wave(column, targets, period=float(span / cycles[best]))
    # What a few steps explain as well does not repeat; and the best of many waves
    # explains something of any noise.
    chance = 2 * math.log(len(cycles) * MAX_COLUMNS) / len(column)
    least = max(_explained_by_steps(column, targets), chance)
    return found if found.explained > least else nothing


def _explained_by_steps(column: np.ndarray, targets: np.ndarray) -> float:
    """Returns what the means of eight parts with equally many examples explain."""
    part = np.argsort(np.argsort(column, kind="stable")) * 8 // len(column)
    counts = np.bincount(part, minlength=8).clip(1)
    means = np.bincount(part, targets, minlength=8) / counts
    return float(1 - np.mean((targets - means[part]) ** 2) / max(targets.var(), 1e-30))


def _periodogram(
    position: np.ndarray, targets: np.ndarray, cycles: np.ndarray
) -> np.ndarray:
    """Computed in parts of one size, so that columns share a compiled program."""
    size = -(-len(cycles) // _CYCLES_AT_ONCE) * _CYCLES_AT_ONCE
    parts = np.resize(cycles, size).reshape(-1, _CYCLES_AT_ONCE)
    rows = position.astype(np.float32), targets.astype(np.float32)
    powers = [np.asarray(_powers(*rows, part)) for part in parts.astype(np.float32)]
    return np.concatenate(powers)[: len(cycles)]


@jax.jit
def _powers(position: Array, targets: Array, cycles: Array) -> Array:
    angles = 2 * jnp.pi * cycles[:, None] * position
    return jnp.hypot(jnp.cos(angles) @ targets, jnp.sin(angles) @ targets)


class Wraparound(NamedTuple):
    """Whether the two ends of a range are one place.

    Fields of values without a feature axis are scalars.

    Attributes:
        period: float32[features], 2 pi, 360, 24 or a count of the clock or the calendar
            that the range fills from its start; NaN for any other range.
        filled: float32[features], examples in the emptier of the first and the last
            twelfth of the range, in units of an even distribution; a bell has few.
        end_distance: float32[features], how far the other values of examples at one end
            lie from those at the other end, in units of any two twelfths of the range;
            under 0.6 where the ends are one place, NaN without other values.
        inner_distance: float32[features], the same for neighbouring twelfths.
        signal: float32[features], squared distance of any two twelfths in units of what
            chance gives; under 2 the two distances mean nothing.
    """

    period: Array
    filled: Array
    end_distance: Array
    inner_distance: Array
    signal: Array

    @property
    def wraps(self) -> Array:
        """Where the range is filled, and the other values at its ends are alike."""
        is_one_place = (self.end_distance < 0.6) & (self.signal > 2)
        return is_one_place & (self.filled > 0.25)


@takes_numbers
@jax.jit
def wraparound(values: Array, *, others: Array | None = None) -> Wraparound:
    """Asks whether both ends of a bounded range are one place, as of angles and hours.

    A network sees 359 and 1 degrees as far apart.  From the values alone only a range
    that a clock, a calendar or a compass has can be told, by ``period``; with other
    values of the same examples (the targets of a feature, the inputs of a target)
    ``wraps`` says whether these are alike at both ends.  Feed the sine and the cosine
    of 2 pi value / period instead, or predict both.

    Args:
        values: [examples, features] or [examples], finite numbers.
        others: [examples, ...], what else is known of the examples.

    Returns:
        ``Wraparound``.

    Example:
        >>> hours = jnp.arange(240.0) % 24
        >>> warmth = jnp.cos(2 * jnp.pi * (hours - 15) / 24)
        >>> found = wraparound(hours, others=warmth)
        >>> float(found.period), bool(found.wraps)
        (24.0, True)
        >>> bool(wraparound(hours, others=hours**2).wraps)
        False

    References:
        Mardia and Jupp (2000), "Directional statistics", chapter 1.
    """
    values = in_float32(jnp.asarray(values))
    if others is not None:
        others = in_float32(jnp.asarray(others)).reshape(values.shape[0], -1)
        others = z_scores(others, feature_moments(others))
    measure = functools.partial(_wraparound, others=others)
    if values.ndim == 1:
        return measure(values)
    columns = values.reshape(values.shape[0], -1).T
    return jax.lax.map(measure, columns)


def _wraparound(values: Array, others: Array | None) -> Wraparound:
    low, high = jnp.min(values), jnp.max(values)
    span = jnp.where(high > low, high - low, 1)
    part = jnp.minimum((values - low) / span * _NUM_PARTS, _NUM_PARTS - 1).astype(int)
    member = jax.nn.one_hot(part, _NUM_PARTS, dtype=values.dtype)
    count = jnp.sum(member, axis=0)
    filled = jnp.minimum(count[0], count[-1]) * _NUM_PARTS / len(values)
    period = _known_period(values, low, high)
    unknown = jnp.full_like(period, jnp.nan)
    if others is None:
        return Wraparound(period, filled, unknown, unknown, unknown)
    mean = (member.T @ others) / jnp.maximum(count, 1)[:, None]
    within = jnp.sum((others - mean[part]) ** 2, axis=1) @ member
    error = within / jnp.maximum(count * (count - 1), 1)
    chance = error[:, None] + error
    squares = jnp.sum((mean[:, None] - mean) ** 2, axis=-1) - chance
    known = (count > 1)[:, None] & (count > 1) & ~jnp.eye(_NUM_PARTS, dtype=bool)
    any_two = jnp.mean(squares, where=known)
    steps = jnp.mean(jnp.diagonal(squares, 1), where=jnp.diagonal(known, 1))
    scale = jnp.where(any_two > 0, any_two, jnp.nan)
    least = jnp.finfo(values.dtype).eps
    return Wraparound(
        period,
        filled,
        jnp.sqrt(jnp.maximum(squares[0, -1], 0) / scale),
        jnp.sqrt(jnp.maximum(steps, 0) / scale),
        any_two / jnp.maximum(jnp.mean(chance, where=known), least),
    )


def _known_period(values: Array, low: Array, high: Array) -> Array:
    """Returns the period whose range the values fill, or NaN."""
    counted = jnp.array(COUNTED_PERIODS, values.dtype)
    is_whole = jnp.all(values == jnp.round(values))
    is_counted = is_whole & ((low == 0) | (low == 1))
    fits_counted = is_counted & (high - low == counted - 1)
    periods = jnp.array(PERIODS, values.dtype)
    starts = (jnp.abs(low) < 0.05 * periods) | (
        jnp.abs(low + periods / 2) < 0.05 * periods
    )
    span = high - low
    fits = starts & (span > 0.95 * periods) & (span <= 1.0001 * periods)
    fits &= ~is_whole | (periods == 360)
    found = jnp.where(
        jnp.concatenate([fits_counted, fits]),
        jnp.concatenate([counted, periods]),
        jnp.nan,
    )
    return jnp.nanmin(found)


def wave(column: np.ndarray, targets: np.ndarray, *, period: float) -> Cycle:
    """Returns the sine of a column with the phase that explains the targets best.

    Args:
        column: [examples].
        targets: [examples].
        period: in units of the column.
    """
    angle = 2 * np.pi * (column - column.min()) / period
    waves = np.stack([np.cos(angle), np.sin(angle), np.ones_like(angle)], axis=1)
    weights = np.linalg.lstsq(waves, targets, rcond=None)[0]
    encoded = waves @ weights
    explained = 1 - np.mean((targets - encoded) ** 2) / max(targets.var(), 1e-30)
    return Cycle(period, float(explained), encoded)


def wave_columns(period: float, *, start: float) -> Callable[[Array], Array]:
    """Returns what makes a sine and a cosine of a column, of deviation 1.

    Args:
        period: in units of the column.
        start: where the angle is 0; near the values, so that it keeps its digits.

    Example:
        >>> columns = wave_columns(24.0, start=0.0)(jnp.array([0.0, 6.0, 12.0]))
        >>> print(columns.round(2) + 0.0)
        [[ 0.    1.41]
         [ 1.41  0.  ]
         [ 0.   -1.41]]
    """

    def columns(column: Array) -> Array:
        angle = 2 * math.pi * (column - start) / period
        both = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=1)
        return math.sqrt(2) * both

    return columns


def one_hot_columns(values: np.ndarray) -> Callable[[Array], Array]:
    """Returns what makes a one-hot row of each number of a column: the nearest value.

    Args:
        values: [values], sorted.

    Example:
        >>> one_hot_columns(np.array([1.0, 5.0, 7.0]))(jnp.array([5.0, 1.1, 90.0]))
        Array([[0., 1., 0.],
               [1., 0., 0.],
               [0., 0., 1.]], dtype=float32)
    """
    middles = (values[1:] + values[:-1]) / 2

    def columns(column: Array) -> Array:
        index = jnp.searchsorted(jnp.asarray(middles, column.dtype), column)
        return jax.nn.one_hot(index, len(values), dtype=column.dtype)

    return columns
