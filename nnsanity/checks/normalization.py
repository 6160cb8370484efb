"""Item 1: are inputs and targets of the size that networks are built for?

"Subtract the mean and divide by the deviation, inputs and outputs alike" (D. Holden).
Everything downstream, from initialization to optimizer, assumes mean 0 and deviation 1.
"""

from collections.abc import Sequence

import jax
import numpy as np

from nnsanity.findings import NO_LIMITS, Finding, Limits, listed, number
from nnsanity.quantities.moments import Moments
from nnsanity.quantities.outliers import Outliers
from nnsanity.quantities.scales import Normalization, TargetScale, vary_throughout

RMS_RANGE = (0.1, 10.0)
"""Healthy root mean square of a feature; initializers assume about 1."""
MEAN_LIMIT = 5.0
"""Healthy |mean| in deviations; beyond it a feature looks constant to the network."""
USUAL_RANGE = (0.25, 4.0)
"""Root mean square within which it is a matter of choice to standardize: numbers
between 0 and 1, or -1 and 1, are as healthy."""
DISPARITY_LIMIT = 100.0
"""Healthy ratio of the largest deviation of a feature to the smallest."""
DOUBLE_LIMIT = 0.05
"""Root mean square under which inputs look as if they had been scaled down twice."""
TARGET_LIMIT = 10.0
"""Healthy size of targets in units of what an untrained network puts out."""
SPLIT_SHIFT, SPLIT_RATIO = 0.5, 2.0
"""How far moments of validation data may lie off, in deviations and as a ratio."""
GROSS_SHIFT, GROSS_RATIO = 3.0, 10.0
"""The same for a single feature among many that fit; another mean alone is worth
knowing, since the years of later data are higher."""
ROUNDING_LIMIT = 0.01
"""Healthy rounding of a feature in units of its deviation."""
OUTLIER_SHARE = 0.5
"""Healthy share of the squared deviation of a feature that a few rows bring."""
OUTLIER_GAP = 3.0
"""Distance of the nearest outlier over that of the farthest other value, from which on
they lie apart; a heavy tail has no such gap."""
OUTLIER_SURPRISE = 7.0
"""By which the gap has to surprise; a heavy tail alone does once in a thousand."""


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


def is_usual(measured: Normalization) -> bool:
    """Tells whether every feature is of a size that most networks learn from."""
    host = jax.tree.map(np.atleast_1d, jax.device_get(measured))
    varying = ~host.constant
    rms, mean = host.root_mean_square[varying], host.moments.mean[varying]
    deviation = _deviation(host.moments)[varying]
    is_near = (rms >= USUAL_RANGE[0]) & (rms <= USUAL_RANGE[1])
    return bool((is_near & (np.abs(mean) <= MEAN_LIMIT * deviation)).all())


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
    varying = np.flatnonzero(vary_throughout(host.moments))
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
    measured: TargetScale, *, limits: Limits = NO_LIMITS
) -> tuple[Finding, ...]:
    """Says what is unusual about targets that are numbers."""
    host = jax.device_get(measured)
    findings = [*_nonfinite(host.targets, "nonfinite-target", "targets")]
    ratio = float(np.sqrt(np.mean(host.ratio**2)))
    limit = limits.get("normalization/unnormalized-targets", TARGET_LIMIT)
    if not ratio <= limit:
        sizes = [_size(one) for one in (host.targets, host.outputs)]
        findings.append(
            Finding(
                "normalization/unnormalized-targets",
                1,
                "info",
                "targets",
                ratio,
                limit,
                f"The targets have root mean square {number(sizes[0])}, the untrained"
                f" network puts out {number(sizes[1])}: the first gradients are as"
                " large as the difference.",
                _target_advice(host.targets),
            )
        )
    return tuple(findings)


def _size(moments: Moments) -> float:
    """Returns the root mean square over all features."""
    parts = np.stack([moments.mean, _deviation(moments)]).astype(np.float64)
    return float(np.sqrt(np.mean(np.sum(parts**2, axis=0))))


def _target_advice(moments: Moments) -> str:
    deviation = _deviation(moments)
    numbers = [
        f"(targets - {number(mean)}) / {number(size if size > 0 else 1.0)}"
        for mean, size in zip(moments.mean[:3], deviation[:3], strict=True)
    ]
    if len(numbers) == 1:
        return f"Train on {numbers[0]} and undo it on the outputs."
    columns = [f"column {index}: {one}" for index, one in enumerate(numbers)]
    more = "; ..." if len(deviation) > 3 else ""
    return (
        "Train on targets less their mean over their deviation, and undo it on the"
        f" outputs ({'; '.join(columns)}{more})."
    )


def judge_outliers(measured: Outliers, *, name: str = "inputs") -> tuple[Finding, ...]:
    """Says which features a few rows far from the rest have a hold on.

    Args:
        measured: as ``outliers`` returns.
        name: what they are.
    """
    host = jax.tree.map(np.atleast_1d, jax.device_get(measured))
    features = np.flatnonzero(lies_apart(host))
    if not features.size:
        return ()
    worst = int(features[np.argmax(host.share[features])])
    honest = (
        " Where they are right, take a loss that grows more slowly (optax.huber_loss)"
        " or the logarithm of the targets."
        if name == "targets"
        else ""
    )
    return (
        Finding(
            "normalization/outliers",
            1,
            "info",
            f"{name}, feature {listed(str(index) for index in features)}",
            float(host.share[worst]),
            OUTLIER_SHARE,
            f"{int(host.num_outside[worst])} values of feature {worst} of the {name}"
            f" bring {number(100 * host.share[worst])}% of its squared deviation: they"
            f" lie {number(host.gap[worst])} times as far out as any other (example"
            f" {int(host.farthest[worst])} the farthest).",
            "Look at these rows: a wrong unit, a missing value written as 9999, a slip"
            f" of the comma. Clip the feature to {number(host.low[worst])} ..."
            f" {number(host.high[worst])}, the range of all others, and take mean and"
            f" deviation after that.{honest}",
        ),
    )


def lies_apart(measured: Outliers) -> np.ndarray:
    """Tells which features have a few outliers that decide their deviation."""
    host = jax.tree.map(np.atleast_1d, jax.device_get(measured))
    is_gap = (host.gap > OUTLIER_GAP) & (host.surprise > OUTLIER_SURPRISE)
    return is_gap & (host.share > OUTLIER_SHARE)


def judge_finite_targets(moments: Moments) -> tuple[Finding, ...]:
    """Says whether targets that are not plain numbers hold a NaN."""
    return tuple(_nonfinite(jax.device_get(moments), "nonfinite-target", "targets"))


def judge_rounding(
    lost: np.ndarray, *, name: str, limit: float = ROUNDING_LIMIT
) -> tuple[Finding, ...]:
    """Says which features lose what varies in them when they become float32.

    Args:
        lost: [features], their rounding in units of their deviation.
        name: what they are.
        limit: from which on it matters.
    """
    features = np.flatnonzero(~(lost <= limit))
    if not features.size:
        return ()
    worst = int(np.argmax(lost))
    return (
        Finding(
            "normalization/rounded",
            1,
            "info",
            f"{name}, feature {listed(str(index) for index in features)}",
            float(lost[worst]),
            limit,
            f"The {name} are float64 and were rounded to float32, which has seven"
            f" digits: feature {worst} is off by {number(lost[worst])} of its"
            " deviation, since it is large beside what it varies.",
            "Subtract the mean in float64, before the data reaches JAX, or set"
            " jax_enable_x64.",
        ),
    )


def judge_split(
    training: Moments, held_out: Moments, *, name: str = "inputs"
) -> tuple[Finding, ...]:
    """Compares the moments of two sets that should come from one pipeline."""
    train, other = jax.tree.map(np.atleast_1d, jax.device_get((training, held_out)))
    if other.nonfinite.any():
        rule = "nonfinite-target" if name == "targets" else "nonfinite-input"
        return tuple(_nonfinite(other, rule, f"validation {name}"))
    train_deviation, other_deviation = (_deviation(one) for one in (train, other))
    scale = np.maximum(train_deviation, other_deviation)
    scale = np.where(scale > 0, scale, 1.0)
    chance = 4 / np.sqrt(np.maximum(np.minimum(train.count, other.count), 1))
    shift = np.abs(train.mean - other.mean) / scale
    ratio = np.maximum(train_deviation, 1e-12) / np.maximum(other_deviation, 1e-12)
    stretch = np.abs(np.log(ratio))
    varies = (train_deviation > 0) & (other_deviation > 0)

    def is_off(most_shift: float, most_ratio: float) -> np.ndarray:
        is_stretched = stretch > np.maximum(np.log(most_ratio), 2 * chance)
        return (shift > np.maximum(most_shift, chance)) | (varies & is_stretched)

    off = is_off(SPLIT_SHIFT, SPLIT_RATIO)
    # Moments of rare events differ by chance.
    throughout = np.asarray(vary_throughout(train) & vary_throughout(other))
    gross = is_off(GROSS_SHIFT, GROSS_RATIO) & throughout
    if not off.mean() > 0.25 and not gross.any():
        return ()
    chosen = off if off.mean() > 0.25 else gross
    is_scaled = off.mean() > 0.25 or bool((gross & (stretch > np.log(2))).any())
    worst = int(np.argmax(np.where(chosen, shift + stretch, -1)))
    what = "features" if name == "inputs" else "columns"
    return (
        Finding(
            "normalization/split-mismatch",
            1,
            "warning" if is_scaled else "info",
            f"validation {name}, {int(off.sum())} of {off.size} {what}",
            float(shift[worst]),
            SPLIT_SHIFT,
            f"Training and validation {name} were not prepared alike, or come from"
            f" another period or population: {what[:-1]} {worst} has mean"
            f" {number(train.mean[worst])} and deviation"
            f" {number(train_deviation[worst])} in one, {number(other.mean[worst])} and"
            f" {number(other_deviation[worst])} in the other.",
            "Take mean and deviation from the training data alone and apply the same"
            " two numbers to both.",
        ),
    )
