"""Item 1: are inputs and targets of the size that networks are built for?

"Subtract the mean and divide by the deviation, inputs and outputs alike" (D. Holden).
Everything downstream, from initialization to optimizer, assumes mean 0 and deviation 1.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnsanity._types import Array
from nnsanity.findings import NO_LIMITS, Finding, Limits, listed, number
from nnsanity.moments import Moments, feature_moments, pooled_moments

RMS_RANGE = (0.1, 10.0)
"""Healthy root mean square of a feature; initializers assume about 1."""
MEAN_LIMIT = 5.0
"""Healthy |mean| in deviations; beyond it a feature looks constant to the network."""
DISPARITY_LIMIT = 100.0
"""Healthy ratio of the largest deviation of a feature to the smallest."""
DOUBLE_LIMIT = 0.05
"""Root mean square under which inputs look as if they had been scaled down twice."""
TARGET_LIMIT = 10.0
"""Healthy size of targets in units of what an untrained network puts out."""
SPLIT_SHIFT, SPLIT_RATIO = 0.5, 2.0
"""How far moments of validation data may lie off, in deviations and as a ratio."""
_RARE = 20.0  # range in deviations; a normal feature of a million rows has ten


class Normalization(NamedTuple):
    """How far data are from mean 0 and deviation 1.

    Attributes:
        moments: of each feature.
        root_mean_square: float32[features]; healthy is within [0.1, 10].
        constant: bool[features].
        scale_disparity: float32[], largest deviation of a feature over the smallest,
            of those that vary throughout; healthy is under 100.  A pixel at the edge
            that a few images light up is rare, not of another unit.
    """

    moments: Moments
    root_mean_square: Array
    constant: Array
    scale_disparity: Array


def normalization(
    inputs: Array, *, groups: Sequence[int] | None = None
) -> Normalization:
    """Measures how far the features of a data set are from mean 0 and deviation 1.

    Costs about two reads of the values.

    Args:
        inputs: [..., features] or [examples].
        groups: the number of each feature's group; features of one group share a mean
            and a deviation, and results are by group.

    Returns:
        ``Normalization``.

    Raises:
        ValueError: if there is not one group number for each feature.

    Example:
        >>> measured = normalization(jnp.array([[3.0, 0.0], [-3.0, 300.0]]))
        >>> measured.root_mean_square[0], measured.scale_disparity
        (Array(3., dtype=float32), Array(50., dtype=float32))
    """
    static = None if groups is None else tuple(int(group) for group in groups)
    return _normalization(inputs, static)


@functools.partial(jax.jit, static_argnums=1)
def _normalization(inputs: Array, groups: tuple[int, ...] | None) -> Normalization:
    moments = feature_moments(inputs)
    if groups is not None:
        moments = pooled_moments(moments, groups=groups)
    deviation, constant = moments.deviation, moments.is_constant
    comparable = _vary_throughout(moments)
    smallest = jnp.min(jnp.where(comparable, deviation, jnp.inf))
    largest = jnp.max(jnp.where(comparable, deviation, 0))
    disparity = jnp.where(largest > 0, largest / smallest, 1.0)
    rms = jnp.sqrt(moments.mean**2 + deviation**2)
    return Normalization(moments, rms, constant, disparity)


def _vary_throughout(moments: Moments) -> Array:
    """Tells which features are neither constant nor made of a few rare events."""
    spread = moments.maximum - moments.minimum
    return ~moments.is_constant & (spread <= _RARE * moments.deviation)


def judge_inputs(
    measured: Normalization, *, name: str = "inputs", limits: Limits = NO_LIMITS
) -> tuple[Finding, ...]:
    """Says what is unusual about the inputs; suspicions, until a repair helps."""
    host = jax.tree.map(np.atleast_1d, jax.device_get(measured))
    findings = [*_nonfinite(host.moments, "nonfinite-input", name)]
    varying = ~host.constant
    rms, mean = host.root_mean_square[varying], host.moments.mean[varying]
    deviation = _deviation(host.moments)
    deviation = deviation[varying]
    if varying.any():
        size = float(np.sqrt(np.mean(rms**2)))
        most = limits.get("normalization/unnormalized-inputs", RMS_RANGE[1])
        off = (rms < RMS_RANGE[0]) | (rms > most)
        off |= np.abs(mean) > MEAN_LIMIT * deviation
        if rms.max() < DOUBLE_LIMIT:
            findings.append(_double_normalized(name, rms))
        elif off.mean() > 0.5 or not RMS_RANGE[0] <= size <= most:
            findings.append(_unnormalized(name, host, size, most))
    disparity = float(host.scale_disparity[0])
    limit = limits.get("normalization/scale-disparity", DISPARITY_LIMIT)
    if not disparity <= limit and varying.any():
        findings.append(_disparity(name, host, disparity, limit))
    if host.constant.any():
        findings.append(_constant_features(name, host.constant))
    return tuple(findings)


def unstandardized(measured: Normalization, name: str) -> Finding:
    """The finding that standardizing helps, though no single number looked bad."""
    host = jax.tree.map(np.atleast_1d, jax.device_get(measured))
    size = float(np.sqrt(np.mean(host.root_mean_square**2)))
    return _unnormalized(name, host, size)._replace(
        rule=f"normalization/unnormalized-{name}"
    )


def _nonfinite(moments: Moments, rule: str, name: str) -> Sequence[Finding]:
    bad = np.atleast_1d(moments.nonfinite)
    if not bad.any():
        return ()
    features = [str(index) for index in np.flatnonzero(bad)]
    return (
        Finding(
            f"normalization/{rule}",
            1,
            "error",
            f"{name}, feature {listed(features)}",
            float(bad.sum()),
            0.0,
            f"{number(float(bad.sum()))} values of the {name} are NaN or infinite; one"
            " of them turns the loss and every parameter into NaN.",
            "Drop these rows, or fill them in and add a column that says so. Look first"
            " where they come from: a division or a log of zero, a missing value.",
        ),
    )


def _unnormalized(
    name: str, host: Normalization, size: float, most: float = RMS_RANGE[1]
) -> Finding:
    mean = float(np.mean(host.moments.mean))
    return Finding(
        "normalization/unnormalized-inputs",
        1,
        "info",
        name,
        size,
        most if size > 1 else RMS_RANGE[0],
        f"The {name} have root mean square {number(size)} and mean {number(mean)};"
        " initializers and optimizers assume about 1 and 0.",
        _standardize_advice(host.moments),
    )


def _double_normalized(name: str, rms: np.ndarray) -> Finding:
    return Finding(
        "normalization/double-normalized",
        1,
        "info",
        name,
        float(rms.max()),
        DOUBLE_LIMIT,
        f"No feature of the {name} has a root mean square over {number(rms.max())}, as"
        " if they had been scaled down twice.",
        "Look for a second division by 255 or by the deviation; then standardize once.",
    )


def _disparity(
    name: str, host: Normalization, disparity: float, limit: float
) -> Finding:
    deviation = _deviation(host.moments)
    varying = np.flatnonzero(_vary_throughout(host.moments))
    order = varying[np.argsort(deviation[varying])]
    small, large = order[0], order[-1]
    return Finding(
        "normalization/scale-disparity",
        1,
        "info",
        f"{name}, features {large} and {small}",
        disparity,
        limit,
        f"Feature {large} has deviation {number(deviation[large])} and feature {small}"
        f" has {number(deviation[small])}: the first drowns the second.",
        "Standardize each feature by itself. If a feature is small because it matters"
        " less, and not because of its unit, scale its group as one.",
    )


def _constant_features(name: str, constant: np.ndarray) -> Finding:
    features = [str(index) for index in np.flatnonzero(constant)]
    return Finding(
        "normalization/constant-feature",
        1,
        "info",
        f"{name}, feature {listed(features)}",
        float(constant.sum()),
        0.0,
        f"{len(features)} features of the {name} never change; dividing by their"
        " deviation would give NaN.",
        "Leave them out, or divide by 1 there.",
    )


def _standardize_advice(moments: Moments) -> str:
    """Names the numbers to subtract and divide by, for at most three features."""
    mean = np.atleast_1d(moments.mean)
    deviation = _deviation(moments)
    pairs = [
        f"feature {index}: subtract {number(mean[index])}, divide by"
        f" {number(deviation[index])}"
        for index in np.argsort(-np.abs(mean) * (deviation > 0))[:3]
        if deviation[index] > 0
    ]
    return (
        "Subtract the mean and divide by the deviation, the same numbers for training"
        f" and validation ({'; '.join(pairs)}"
        f"{'; ...' if len(mean) > 3 else ''}). Do not rescale a feature that is small"
        " because it matters less."
    )


def _deviation(moments: Moments) -> np.ndarray:
    """Returns the deviation of each feature; ``moments`` are on the host already."""
    return np.atleast_1d(moments.deviation)


def judge_targets(
    measured: Normalization, output_size: float, *, limits: Limits = NO_LIMITS
) -> tuple[Finding, ...]:
    """Says what is unusual about targets that are numbers.

    Args:
        measured: of the targets.
        output_size: root mean square of what the untrained network puts out.
        limits: the user's own, by rule.
    """
    host = jax.tree.map(np.atleast_1d, jax.device_get(measured))
    findings = [*_nonfinite(host.moments, "nonfinite-target", "targets")]
    size = float(np.sqrt(np.mean(host.root_mean_square**2)))
    reference = max(output_size, 1.0) if math.isfinite(output_size) else 1.0
    limit = limits.get("normalization/unnormalized-targets", TARGET_LIMIT)
    if not size <= limit * reference:
        deviation = _deviation(host.moments)
        findings.append(
            Finding(
                "normalization/unnormalized-targets",
                1,
                "info",
                "targets",
                size / reference,
                limit,
                f"The targets have root mean square {number(size)}, the untrained"
                f" network puts out {number(output_size)}: the first gradients are as"
                " large as the difference.",
                f"Train on (targets - {number(host.moments.mean[0])}) /"
                f" {number(deviation[0])} and undo it on the outputs.",
            )
        )
    return tuple(findings)


def judge_finite_targets(moments: Moments) -> tuple[Finding, ...]:
    """Says whether targets that are not plain numbers hold a NaN."""
    return tuple(_nonfinite(jax.device_get(moments), "nonfinite-target", "targets"))


def judge_split(training: Moments, held_out: Moments) -> tuple[Finding, ...]:
    """Compares the moments of two sets that should come from one pipeline."""
    train, other = jax.tree.map(np.atleast_1d, jax.device_get((training, held_out)))
    if other.nonfinite.any():
        return tuple(_nonfinite(other, "nonfinite-input", "validation inputs"))
    train_deviation, other_deviation = (_deviation(one) for one in (train, other))
    scale = np.maximum(train_deviation, other_deviation)
    scale = np.where(scale > 0, scale, 1.0)
    chance = 4 / np.sqrt(np.maximum(np.minimum(train.count, other.count), 1))
    shift = np.abs(train.mean - other.mean) / scale
    ratio = np.maximum(train_deviation, 1e-12) / np.maximum(other_deviation, 1e-12)
    stretch = np.abs(np.log(ratio))
    varies = (train_deviation > 0) & (other_deviation > 0)
    off = shift > np.maximum(SPLIT_SHIFT, chance)
    off |= varies & (stretch > np.maximum(np.log(SPLIT_RATIO), 2 * chance))
    if not off.mean() > 0.25:
        return ()
    worst = int(np.argmax(np.where(off, shift + stretch, -1)))
    return (
        Finding(
            "normalization/split-mismatch",
            1,
            "warning",
            f"validation, {int(off.sum())} of {off.size} features",
            float(shift[worst]),
            SPLIT_SHIFT,
            "Training and validation inputs were not prepared alike, or come from"
            f" another period or population: feature {worst} has mean"
            f" {number(train.mean[worst])} and deviation"
            f" {number(train_deviation[worst])} in one, {number(other.mean[worst])} and"
            f" {number(other_deviation[worst])} in the other.",
            "Take mean and deviation from the training data alone and apply the same"
            " two numbers to both.",
        ),
    )
