"""Item 3: do things that are alike have numbers that are alike?

"Networks assume a continuous space; large jumps, or one thing with many
representations, make learning hard and redundant" (D. Holden).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnsanity._tree import in_float32
from nnsanity._types import Array
from nnsanity.findings import Finding, number

FORCED_LIMIT = 0.1
"""Healthy share of the targets' variance between examples with equal inputs."""
COPIES_LIMIT = 2.5
"""Copies of a row from which on equal inputs are the nature of the data: a table of a
few categories, where targets differ by chance."""
CODE_RANGE = (5, 1000)
"""How many values a column of codes has."""
CODE_SHARE = 0.1
"""Share of the targets' variance from which on it matters what a code stands for."""
CODE_ORDER = 0.6
"""Difference of neighbouring codes' targets, in units of that of any two codes, from
which on the order of the codes says nothing (1 for unordered ones)."""
PERIOD_SHARE = 0.2
"""Share of the targets' variance that a sine of one column must explain."""
MIN_CYCLES = 3.0
"""Cycles over a column's range from which on a network can't be asked to follow."""
CHANCE_LIMIT = 4.0
"""Deviations from chance up to which neighbours count as strangers."""
MAX_FEATURES = 32
"""Columns of a table that are looked at one by one."""
_MAX_CYCLES = 1000
_MAX_ROWS = 4000


class Contradictions(NamedTuple):
    """Equal inputs with unequal targets.

    Attributes:
        forced_share: float32[], share of the targets' variance that no function of the
            inputs can explain; healthy is 0.
        num_repeated: int32[], examples whose inputs occur more than once.
        mean_copies: float32[], how often these occur.
    """

    forced_share: Array
    num_repeated: Array
    mean_copies: Array


@jax.jit
def contradictions(inputs: Array, targets: Array) -> Contradictions:
    """Measures how much the targets of equal inputs differ.

    Rows are compared by two 32-bit hashes of their bits.  Costs one sort.

    Args:
        inputs: [examples, ...].
        targets: [examples, ...], numbers; classes as one-hot rows.

    Example:
        >>> inputs = jnp.array([[1.0], [1.0], [2.0], [3.0]])
        >>> measured = contradictions(inputs, jnp.array([0.0, 1.0, 0.0, 1.0]))
        >>> float(measured.forced_share), int(measured.num_repeated)
        (0.5, 2)
    """
    size = inputs.shape[0]
    targets = in_float32(targets).reshape(size, -1)
    order = jnp.lexsort(_row_hashes(inputs))
    hashes = jnp.stack(_row_hashes(inputs))[:, order]
    is_new = jnp.any(hashes[:, 1:] != hashes[:, :-1], axis=0)
    group = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(is_new)])
    count = jax.ops.segment_sum(jnp.ones(size), group, size)
    total = jax.ops.segment_sum(targets[order], group, size)
    mean = total / jnp.maximum(count, 1)[:, None]
    within = jnp.sum((targets[order] - mean[group]) ** 2)
    overall = jnp.sum((targets - jnp.mean(targets, axis=0)) ** 2)
    is_repeated = count > 1
    num_repeated = jnp.sum(jnp.where(is_repeated, count, 0))
    return Contradictions(
        within / jnp.where(overall > 0, overall, 1),
        num_repeated.astype(jnp.int32),
        num_repeated / jnp.maximum(jnp.sum(is_repeated), 1),
    )


def _row_hashes(inputs: Array) -> list[Array]:
    rows = inputs.reshape(inputs.shape[0], -1).astype(jnp.float32)
    rows = jnp.where(rows == 0, 0, rows)  # -0.0 and 0.0 are one number
    bits = jax.lax.bitcast_convert_type(rows, jnp.uint32)
    column = jnp.arange(bits.shape[1], dtype=jnp.uint32)
    hashes = []
    for seed in (0x9E3779B1, 0x85EBCA77):
        factor = (column * jnp.uint32(2) + jnp.uint32(1)) * jnp.uint32(seed)
        mixed = (bits ^ (bits >> 15)) * (factor ^ (factor >> 13))
        hashes.append(jnp.sum((mixed ^ (mixed >> 16)) * factor, 1, dtype=jnp.uint32))
    return hashes


def judge_contradictions(measured: Contradictions) -> tuple[Finding, ...]:
    """Says whether equal inputs come with unequal targets."""
    forced, repeated, copies = (float(one) for one in jax.device_get(measured))
    if forced <= FORCED_LIMIT or copies > COPIES_LIMIT:
        return ()
    return (
        Finding(
            "preprocessing/contradictory-duplicates",
            3,
            "warning",
            "data",
            forced,
            FORCED_LIMIT,
            f"{number(repeated)} examples have inputs that occur more than once, with"
            f" other targets: {number(100 * forced)}% of what the targets vary can't be"
            " told from the inputs.",
            "Look at a few of these rows. Remove wrong labels and double rows, or add"
            " the input that tells them apart.",
        ),
    )


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
    spread = np.average((means - targets.mean()) ** 2, weights=counts)
    steps = np.mean(np.diff(means) ** 2) / max(2 * spread, 1e-30)
    encoded = _out_of_fold_means(group, targets)
    return Codes(len(values), float(explained), float(steps), encoded)


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


def categorical_code(feature: int, codes: Codes) -> Finding:
    """The suspicion that a column of names is fed as a number."""
    return Finding(
        "preprocessing/categorical-code",
        3,
        "info",
        f"inputs, feature {feature}",
        codes.order,
        CODE_ORDER,
        f"Feature {feature} has {codes.num_values} values, and neighbouring values have"
        " targets as different as any two: they are names, and as a number they have"
        " an order that means nothing.",
        "Feed it one-hot, or through an embedding.",
    )


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
    if not span > 0 or most <= MIN_CYCLES:
        return Cycle(math.nan, 0.0, np.zeros_like(column))
    position = (column - low) / span
    cycles = np.arange(MIN_CYCLES, most, 0.125)
    powers = _periodogram(
        jnp.asarray(position[:_MAX_ROWS], jnp.float32),
        jnp.asarray((targets - targets.mean())[:_MAX_ROWS], jnp.float32),
        jnp.asarray(cycles, jnp.float32),
    )
    best = int(np.argmax(powers))
    angle = 2 * np.pi * cycles[best] * position
    waves = np.stack([np.cos(angle), np.sin(angle), np.ones_like(angle)], axis=1)
    weights = np.linalg.lstsq(waves, targets, rcond=None)[0]
    encoded = waves @ weights
    explained = 1 - np.mean((targets - encoded) ** 2) / max(targets.var(), 1e-30)
    return Cycle(span / cycles[best], float(explained), encoded)


@jax.jit
def _periodogram(position: Array, targets: Array, cycles: Array) -> Array:
    def power(one: Array) -> Array:
        angle = 2 * jnp.pi * one * position
        return jnp.hypot(targets @ jnp.cos(angle), targets @ jnp.sin(angle))

    return jax.lax.map(power, cycles, batch_size=64)


def wraparound(feature: int, cycle: Cycle) -> Finding:
    """The suspicion that targets repeat along a column."""
    return Finding(
        "preprocessing/wraparound",
        3,
        "info",
        f"inputs, feature {feature}",
        cycle.explained,
        PERIOD_SHARE,
        f"The targets repeat along feature {feature} with period"
        f" {number(cycle.period)}: a sine of it explains"
        f" {number(100 * cycle.explained)}% of what they vary, and the network would"
        " have to count the cycles.",
        "Feed the sine and the cosine of 2 pi value / period in its place.",
    )


class Neighbors(NamedTuple):
    """How alike the targets of neighbours are.

    Attributes:
        distance: float32[], mean squared difference of the targets of the five nearest
            neighbours, in units of that of any two; 1 where inputs say nothing.
        z_score: float32[], by how many deviations it lies below what shuffled targets
            give; healthy is above 4.
    """

    distance: Array
    z_score: Array


@functools.partial(jax.jit, static_argnames=("num_neighbors", "num_shuffles"))
def neighbors(
    inputs: Array,
    targets: Array,
    *,
    key: Array,
    num_neighbors: int = 5,
    num_shuffles: int = 64,
) -> Neighbors:
    """Compares the targets of near examples with those of any two.

    Inputs are standardized feature by feature first.  Costs all distances between the
    examples, so give at most a few thousand.

    Args:
        inputs: [examples, ...].
        targets: [examples, ...], numbers; classes as one-hot rows.
        key: consumed; the shuffles.
        num_neighbors: nearest neighbours of each example.
        num_shuffles: of the targets, for what chance gives.
    """
    size = inputs.shape[0]
    rows = in_float32(inputs).reshape(size, -1)
    deviation = jnp.std(rows, axis=0)
    rows = (rows - rows.mean(axis=0)) / jnp.where(deviation > 0, deviation, 1)
    targets = in_float32(targets).reshape(size, -1)
    spread = jnp.std(targets, axis=0)
    targets = targets / jnp.where(spread > 0, spread, 1)
    squares = jnp.sum(rows**2, axis=1)
    far = squares[:, None] + squares - 2 * rows @ rows.T
    far = jnp.where(jnp.eye(size, dtype=bool), jnp.inf, far)
    nearest = jax.lax.top_k(-far, num_neighbors)[1]

    def distance(values: Array) -> Array:
        return jnp.mean((values[:, None] - values[nearest]) ** 2)

    orders = jax.vmap(lambda one: jax.random.permutation(one, size))(
        jax.random.split(key, num_shuffles)
    )
    by_chance = jax.lax.map(lambda order: distance(targets[order]), orders)
    seen = distance(targets)
    return Neighbors(
        seen / by_chance.mean(),
        (by_chance.mean() - seen) / jnp.maximum(by_chance.std(), 1e-9),
    )


def judge_neighbors(measured: Neighbors) -> tuple[Finding, ...]:
    """Says whether inputs tell anything about the targets.

    For a network that does not learn: one that does is the better witness.
    """
    distance, z_score = (float(one) for one in jax.device_get(measured))
    if abs(z_score) > CHANCE_LIMIT:
        return ()  # neighbours that always differ tell as much as those that agree
    return (
        Finding(
            "results/uninformative-targets",
            2,
            "error",
            "data",
            z_score,
            CHANCE_LIMIT,
            f"Examples with near inputs have targets as different as any two (their"
            f" distance is {number(distance)} of that of strangers,"
            f" {number(z_score)} deviations from chance).",
            "Check that inputs and targets belong together: one may be shuffled, sorted"
            " or shifted against the other. Print a few pairs.",
        ),
    )
