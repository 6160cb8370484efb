"""Repairs of the data: columns encoded otherwise, outliers clipped."""

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
    wave,
    wraparound,
)
from nnsanity.quantities.outliers import outliers
from nnsanity.quantities.targets import target_columns
from nnsanity.trials.problem import Problem
from nnsanity.trials.repairs import Repair, standardizing

MAX_COLUMNS = 64
"""Columns of targets, or classes, up to which columns of inputs are looked at."""
MIN_SHARE = 0.3
"""Share of what several columns of targets vary that lies in the one looked at."""


def data_repairs(problem: Problem) -> tuple[Repair, ...]:
    """Lists what can be repaired in a problem's data, besides their scale."""
    return (*_clipping(problem), *_column_repairs(problem))


def _clipping(problem: Problem) -> tuple[Repair, ...]:
    """Clips the features that a few rows have a hold on, and standardizes the rest."""
    inputs = problem.inputs
    if problem.tokens or not isinstance(inputs, jax.Array) or inputs.ndim != 2:
        return ()
    measured = outliers(inputs)
    apart = normalization.lies_apart(measured)
    if not apart.any():
        return ()
    low, high = (
        jnp.where(apart, bound, limit)
        for bound, limit in ((measured.low, -jnp.inf), (measured.high, jnp.inf))
    )

    def clip(inputs: Array) -> Array:
        return jnp.clip(inputs, low, high).astype(inputs.dtype)

    shift, scale = standardizing(problem, clip(inputs))
    (finding,) = normalization.judge_outliers(measured)
    return (
        Repair(
            "clipping the outliers and standardizing the inputs",
            "inputs",
            lambda copy, key: copy._replace(input_shift=shift, input_scale=scale),
            ("normalization/outliers",),
            finding,
            is_suspected=True,
            inputs=clip,
        ),
    )


def column_suspicions(problem: Problem) -> tuple[Finding, ...]:
    """Says which columns look like names, angles or hours; cheap to ask."""
    found = (_suspected(*column) for column in _columns(problem))
    return tuple(one[0] for one in found if one is not None)


def _columns(problem: Problem) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Lists the columns of a table, each with the targets as one column of numbers.

    Where targets have several columns, the one direction in which the column's values
    differ most, if that is a good part of what the targets vary.
    """
    inputs = problem.inputs
    is_table = isinstance(inputs, jax.Array) and inputs.ndim == 2 and not problem.tokens
    if not is_table or problem.kind is None or _num_columns(problem) > MAX_COLUMNS:
        return []
    table = np.asarray(inputs, np.float64)
    targets = np.asarray(target_columns(problem.targets, problem.kind), np.float64)
    if len(targets) != len(table) or not np.isfinite(targets).all():
        return []
    features = range(min(table.shape[1], MAX_FEATURES))
    columns = [
        (feature, table[:, feature], _one_column(table[:, feature], targets))
        for feature in features
        if np.isfinite(table[:, feature]).all()
    ]
    least = MIN_SHARE * targets.var(axis=0).sum()
    return [one for one in columns if one[2].var() > least]


def _num_columns(problem: Problem) -> int:
    """Returns how many columns of numbers the targets make."""
    per_example = problem.targets.size // problem.size
    if problem.kind != "classes":
        return per_example
    return per_example * (int(problem.targets.max()) + 1)


def _one_column(column: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Returns the one direction of the targets in which the column's values differ."""
    if targets.shape[1] == 1:
        return targets[:, 0]
    centred = targets - targets.mean(axis=0)
    values, group = np.unique(column, return_inverse=True)
    if len(values) > len(column) // 8:
        values, group = (
            np.arange(12),
            np.argsort(np.argsort(column)) * 12 // len(column),
        )
    group = group.reshape(-1)
    sums = np.zeros((len(values), targets.shape[1]))
    np.add.at(sums, group, centred)
    counts = np.bincount(group, minlength=len(values)).clip(1)
    direction = np.linalg.svd(sums / np.sqrt(counts)[:, None])[2][0]
    return centred @ direction


def _suspected(
    feature: int, column: np.ndarray, targets: np.ndarray
) -> tuple[Finding, np.ndarray, str] | None:
    """Returns the suspicion, the column encoded otherwise, and what it is taken for."""
    codes = column_codes(column, targets)
    cyclic = wraparound(jnp.asarray(column), others=jnp.asarray(targets))
    if np.isfinite(cyclic.period) and bool(cyclic.wraps):
        cycle = wave(column, targets, period=float(cyclic.period))
        if cycle.explained > preprocessing.PERIOD_SHARE:
            finding = preprocessing.wrapping_column(feature, cyclic)
            return finding, cycle.encoded, "a cycle"
    if codes is not None and is_code(codes):
        return preprocessing.categorical_code(feature, codes), codes.encoded, "a code"
    return None


def _column_repairs(problem: Problem) -> tuple[Repair, ...]:
    """Encodes a column otherwise that says more than its numbers do."""
    repairs = []
    for feature, column, targets in _columns(problem):
        suspected = _suspected(feature, column, targets)
        if suspected is None:
            cycle = column_cycle(column, targets)
            if not cycle.explained > preprocessing.PERIOD_SHARE:
                continue
            finding = preprocessing.repeating_column(feature, cycle)
            suspected = finding, cycle.encoded, "a cycle"
        finding, encoded, name = suspected
        repairs.append(_encoded(problem.inputs, feature, encoded, finding, name))
    return tuple(repairs)


def _encoded(
    inputs: Array, feature: int, encoded: np.ndarray, finding: Finding, name: str
) -> Repair:
    column = np.asarray(inputs[:, feature], np.float64)
    # In the column's own scale, so that the encoding is all that changes.
    scaled = (encoded - encoded.mean()) / max(encoded.std(), 1e-30)
    scaled = scaled * column.std() + column.mean()
    return Repair(
        f"encoding feature {feature} as {name}",
        "columns",
        lambda copy, key: copy,
        (),
        finding,
        is_suspected=True,
        inputs=lambda table: table.at[:, feature].set(scaled.astype(table.dtype)),
    )
