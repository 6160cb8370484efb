"""Repairs of the data: columns encoded otherwise, outliers clipped."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnsanity._types import Array
from nnsanity.checks import normalization, preprocessing
from nnsanity.findings import Finding
from nnsanity.quantities.columns import (
    MAX_COLUMNS as MAX_FEATURES,
)
from nnsanity.quantities.columns import (
    column_codes,
    column_cycle,
    is_code,
    one_hot_columns,
    wave,
    wave_columns,
    wraparound,
)
from nnsanity.quantities.moments import feature_moments
from nnsanity.quantities.targets import target_columns
from nnsanity.tracing.expand import Expansion, expandable, reads_inputs
from nnsanity.tracing.layers import inspect
from nnsanity.tracing.replace import matched
from nnsanity.tracing.widen import Part
from nnsanity.trials.outlying import inner_range
from nnsanity.trials.problem import Problem
from nnsanity.trials.repairs import Repair, standardizing

MAX_COLUMNS = 64
"""Columns of targets, or classes, up to which columns of inputs are looked at."""
MAX_EXPANDED = 4
"""Columns that are fed as several, each by a program of its own; what is suspected of
more of them is tried by one number in their place."""
MIN_SHARE = 0.3
"""How much the targets vary in the direction looked at, in units of that in which they
vary most."""
MIN_CODED = 2.0
"""What the values of a column explain of the direction in which they differ most, in
units of what they do of the targets of other examples."""


def data_repairs(problem: Problem) -> tuple[Repair, ...]:
    """Lists what can be repaired in a problem's data, besides their scale."""
    return (
        *_clipping(problem),
        *_target_clipping(problem),
        *_column_repairs(problem),
    )


def _clipping(problem: Problem) -> tuple[Repair, ...]:
    """Clips the features that a few rows have a hold on, and standardizes the rest."""
    inputs = problem.inputs
    if problem.tokens or not isinstance(inputs, jax.Array) or inputs.ndim != 2:
        return ()
    found = inner_range(inputs)
    if found is None:
        return ()
    shift, scale = standardizing(problem, found.clipped(inputs))
    (finding,) = normalization.judge_outliers(found.measured)
    return (
        Repair(
            "clipping the outliers and standardizing the inputs",
            "inputs",
            lambda copy, key: copy._replace(input_shift=shift, input_scale=scale),
            ("normalization/outliers",),
            finding,
            is_suspected=True,
            inputs=found.clipped,
        ),
    )


def _target_clipping(problem: Problem) -> tuple[Repair, ...]:
    """Clips the targets that a few rows have a hold on, and standardizes them.

    What it changes is told by all other examples: those with outlying targets do not
    count, neither in the original nor in any copy.
    """
    found = problem.slips
    if found is None:
        return ()
    moments = feature_moments(found.clipped(problem.targets))
    (finding,) = normalization.judge_outliers(found.measured, name="targets")
    return (
        Repair(
            "clipping the outliers and standardizing the targets",
            "targets",
            lambda copy, key: copy._replace(
                target_shift=moments.mean, target_scale=moments.scale
            ),
            (),
            finding,
            is_suspected=True,
            targets=found.clipped,
        ),
    )


def column_suspicions(problem: Problem) -> tuple[Finding, ...]:
    """Says which columns look like names, angles or hours; cheap to ask."""
    found = (_suspected(*column) for column in _columns(problem))
    return tuple(one.finding for one in found if one is not None)


def _columns(problem: Problem) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Lists the columns of a table, each with the targets as one column of numbers.

    Where targets have several columns, the one direction in which the column's values
    differ most, if that is a good part of what the targets vary in any direction.
    """
    inputs = problem.inputs
    is_table = isinstance(inputs, jax.Array) and inputs.ndim == 2 and not problem.tokens
    if not is_table or jnp.iscomplexobj(inputs):
        return []
    if problem.kind is None or _num_columns(problem) > MAX_COLUMNS:
        return []
    table = np.asarray(inputs[:, :MAX_FEATURES], np.float64)
    targets = np.asarray(target_columns(problem.targets, problem.kind), np.float64)
    if len(targets) != len(table) or not np.isfinite(targets).all():
        return []
    centred = targets - targets.mean(axis=0)
    # Of balanced classes a direction holds as little as one part in all but one.
    least = MIN_SHARE * np.linalg.norm(centred, 2) ** 2 / len(targets)
    found: list[tuple[int, np.ndarray, np.ndarray]] = []
    for feature, column in enumerate(table.T):
        if np.isfinite(column).all():
            along = _one_column(column, centred)
            if along is not None and along.var() > least:
                found.append((feature, column, along))
    return found


def _num_columns(problem: Problem) -> int:
    """Returns how many columns of numbers the targets make."""
    per_example = problem.targets.size // problem.size
    if problem.kind != "classes":
        return per_example
    return per_example * (int(problem.targets.max()) + 1)


def _one_column(column: np.ndarray, targets: np.ndarray) -> np.ndarray | None:
    """Returns the one direction of the targets in which the column's values differ.

    None where chance does: among many directions there is one that the values of any
    column explain.

    Args:
        column: [examples].
        targets: [examples, columns], about their mean.
    """
    if targets.shape[1] == 1:
        return targets[:, 0]
    values, group = np.unique(column, return_inverse=True)
    is_coded = len(values) <= len(column) // 8
    if not is_coded:
        values = np.arange(12)
        group = np.argsort(np.argsort(column)) * 12 // len(column)
    scale = np.sqrt(np.bincount(group, minlength=len(values)).clip(1))[:, None]

    def directions(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sums = [np.bincount(group, one, minlength=len(values)) for one in rows.T]
        return np.linalg.svd(np.stack(sums, axis=1) / scale, full_matrices=False)[1:]

    sizes, found = directions(targets)
    strangers = np.random.default_rng(0).permutation(targets)
    if is_coded and sizes[0] ** 2 < MIN_CODED * directions(strangers)[0][0] ** 2:
        return None
    return targets @ found[0]


class _Column(NamedTuple):
    """A column that is suspected to be no plain number.

    Attributes:
        feature: which one.
        finding: the suspicion.
        encoded: [examples], what one number can say of it instead.
        period: of a cycle; None for a code.
    """

    feature: int
    finding: Finding
    encoded: np.ndarray
    period: float | None


def _suspected(feature: int, column: np.ndarray, targets: np.ndarray) -> _Column | None:
    """Returns the suspicion against a column, if there is one."""
    codes = column_codes(column, targets)
    cyclic = wraparound(jnp.asarray(column), others=jnp.asarray(targets))
    if np.isfinite(cyclic.period) and bool(cyclic.wraps):
        period = float(cyclic.period)
        cycle = wave(column, targets, period=period)
        if cycle.explained > preprocessing.PERIOD_SHARE:
            finding = preprocessing.wrapping_column(feature, cyclic)
            return _Column(feature, finding, cycle.encoded, period)
    if codes is not None and is_code(codes):
        finding = preprocessing.categorical_code(feature, codes)
        return _Column(feature, finding, codes.encoded, None)
    return None


def _column_repairs(problem: Problem) -> tuple[Repair, ...]:
    """Encodes a column otherwise that says more than its numbers do."""
    columns = [
        (column, found)
        for feature, column, targets in _columns(problem)
        if (found := _found(feature, column, targets)) is not None
    ]
    if not columns:
        return ()
    part = _first_weight(problem)
    return tuple(
        _in_one_number(problem.inputs, found)
        if part is None or position >= MAX_EXPANDED
        else _expanded(problem, column, found, part)
        for position, (column, found) in enumerate(columns)
    )


def _found(feature: int, column: np.ndarray, targets: np.ndarray) -> _Column | None:
    """Returns what a column is besides its numbers, asked more thoroughly."""
    suspected = _suspected(feature, column, targets)
    if suspected is not None:
        return suspected
    cycle = column_cycle(column, targets)
    if not cycle.explained > preprocessing.PERIOD_SHARE:
        return None
    finding = preprocessing.repeating_column(feature, cycle)
    return _Column(feature, finding, cycle.encoded, cycle.period)


def _first_weight(problem: Problem) -> Part | None:
    """Finds the weight that new columns meet, in the network and in its loss."""
    part = expandable(problem.network)
    batch = problem.batch(slice(problem.batch_size))
    network = inspect(problem.loss_fn, problem.params, batch)
    names = {one.layer.name for one, _ in matched(network, problem.network)}
    return part if part is not None and part.layer in names else None


def _expanded(
    problem: Problem, column: np.ndarray, found: _Column, part: Part
) -> Repair:
    """Feeds a code one-hot, or a cycle as its sine and cosine, in its place."""
    if found.period is None:
        values = np.unique(column)
        more, columns = len(values), one_hot_columns(values)
        name = f"feeding feature {found.feature} one-hot"
    else:
        more, columns = 2, wave_columns(found.period, start=column.min())
        name = f"feeding feature {found.feature} as its sine and cosine"
    mean = None if reads_inputs(problem.network) else float(column.mean())
    plan = Expansion(part, found.feature, more, mean, columns)
    return Repair(
        name,
        "columns",
        lambda copy, key: copy._replace(params=plan.padded(copy.params)),
        (),
        found.finding,
        is_suspected=True,
        rewrite=lambda one: one._replace(expanded=plan),
    )


def _in_one_number(inputs: Array, found: _Column) -> Repair:
    """Puts what one number can say of a column in its place.

    The mean target of a code, or a sine with the phase that explains the targets best.
    """
    column = np.asarray(inputs[:, found.feature], np.float64)
    # In the column's own scale, so that the encoding is all that changes.
    encoded = found.encoded - found.encoded.mean()
    scaled = encoded / max(encoded.std(), 1e-30) * column.std() + column.mean()
    words = "the mean target of each value" if found.period is None else "a sine of it"
    return Repair(
        f"putting {words} in the place of feature {found.feature}",
        "columns",
        lambda copy, key: copy,
        (),
        found.finding,
        is_suspected=True,
        inputs=lambda table: table.at[:, found.feature].set(scaled.astype(table.dtype)),
    )
