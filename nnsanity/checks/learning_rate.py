"""Item 6: is the learning rate one at which this network learns?

"Defaults are nearly always wrong.  Find the largest rate that does not make the error
explode, and go a little below" (D. Holden).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from nnsanity._tree import in_float32, inexact_leaves
from nnsanity._types import Array, Params, PyTree
from nnsanity.findings import Finding, listed, number

RATE_FACTORS = (0.1, 10.0, 0.01, 100.0)
"""Factors of the user's rate that the trial tries, the near ones first."""
FAR_RATE_FACTOR = 1e4
"""Factor that is tried where the largest of them did no harm and was not enough.  No
factor goes as far down: some such rate learns from inputs of any size, and would hide
that they are not normalized."""
JITTER_LIMIT = 1.0
"""Healthy rise of the smoothed loss above its minimum, as a share of its fall."""
CLIPPED_LIMIT = 0.1
"""Healthy share of steps whose gradient is clipped."""
HELD_BACK = 0.01
"""Share of a squared gradient that has to be clipped for its step to count."""
EARLY_SHARE = 0.1
"""Healthy size, on average, that a schedule leaves the updates, as a share of the
largest.  A cosine and a straight line leave a half, a fall to a hundredth a fifth."""
OUTLIER_SHARE = 0.01
"""Part of the examples that may be outliers."""
OUTLIER_LIMIT = 0.5
"""Healthy share of the squared gradient norms that this part brings at the start."""


@jax.jit
def update_ratios(updates: PyTree, params: Params) -> Array:
    """Compares the size of updates with the size of what they change.

    Healthy is about 1e-3 (A. Karpathy); worry above 1e-1, and under 1e-5 throughout.

    Costs one reading of both.

    Args:
        updates: of an optimizer, a tree like the parameters.
        params: any pytree of arrays.

    Returns:
        float32[leaves], the floating-point leaves in leaf order: ``|update| /
        |weights|``; 0 where nothing is changed, inf where zeros are.

    Raises:
        ValueError: if the trees differ in their floating-point leaves.

    Example:
        >>> params = {"w": jnp.array([3.0, 4.0]), "b": jnp.zeros(2)}
        >>> update_ratios({"w": jnp.array([0.0, 0.5]), "b": jnp.ones(2)}, params)
        Array([inf, 0.1], dtype=float32)
    """
    pairs = [inexact_leaves(tree) for tree in (updates, params)]
    shapes = [[jnp.shape(leaf) for leaf in leaves] for leaves in pairs]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"update_ratios: updates and params must have the same leaves, got shapes"
            f" {shapes[0]} and {shapes[1]}"
        )

    def ratio(update: Array, weights: Array) -> Array:
        norms = [jnp.linalg.norm(in_float32(x).ravel()) for x in (update, weights)]
        moved = jnp.where(norms[0] == 0, 0, jnp.inf)
        moved = jnp.where(jnp.isnan(norms[0]), jnp.nan, moved)
        is_zero = norms[1] == 0
        found = norms[0] / jnp.where(is_zero, 1, norms[1])
        return jnp.where(is_zero, moved, found).astype(jnp.float32)

    return jnp.stack([ratio(*pair) for pair in zip(*pairs, strict=True)])


class OutlierExamples(NamedTuple):
    """The examples that pull hardest, 1 % of them and at least one.

    Attributes:
        indices: int32[outliers], the hardest first.
        norms: float32[outliers], of their gradients.
        share: float32[], of the sum of all squared norms.
    """

    indices: Array
    norms: Array
    share: Array


@jax.jit
def outlier_examples(norms: Array) -> OutlierExamples:
    """Picks the examples that drive the step.

    Need for gradient clipping points to outliers (D. Holden): worry where 1 % of the
    examples bring half of the squared norm, and look at them.

    Args:
        norms: [examples], from ``example_gradient_norms``.

    Returns:
        ``OutlierExamples``; examples whose gradient is not finite come first.

    Example:
        >>> outlier_examples(jnp.array([1.0, 1.0, 7.0, 1.0])).indices
        Array([2], dtype=int32)
    """
    norms = in_float32(norms)
    count = max(1, int(OUTLIER_SHARE * norms.size))
    keys = jnp.where(jnp.isnan(norms), jnp.inf, norms)
    order = jnp.argsort(-keys)[:count].astype(jnp.int32)
    squares = (norms / jnp.max(jnp.where(jnp.isfinite(norms), norms, 0))) ** 2
    share = jnp.sum(squares[order]) / jnp.sum(squares)
    share = jnp.where(jnp.any(norms > 0) | jnp.any(jnp.isnan(norms)), share, 0)
    return OutlierExamples(order, norms[order], share.astype(jnp.float32))


def judge_outliers(found: OutlierExamples, num_examples: int) -> tuple[Finding, ...]:
    """Names the examples that outweigh all others; silent for fewer than 100.

    Args:
        found: of an untrained network, on many examples.
        num_examples: how many they were.
    """
    share = float(found.share)
    if share <= OUTLIER_LIMIT or num_examples < 1 / OUTLIER_SHARE:
        return ()
    names = [str(int(index)) for index in np.asarray(found.indices)]
    return (
        Finding(
            "learning-rate/outlier-examples",
            6,
            "warning",
            f"examples {listed(names)}",
            share,
            OUTLIER_LIMIT,
            f"{len(names)} of {num_examples} examples bring {number(100 * share)}% of"
            " the squared gradients: they drive the steps.",
            "Look at them: they are wrong, mislabelled or of another unit. Repair or"
            " remove them before you clip gradients or lower the rate.",
        ),
    )


def clipping_active(share: float) -> Finding:
    """The finding that gradients are clipped in many steps; a suspicion.

    Args:
        share: of the gradients that were looked at.
    """
    return Finding(
        "learning-rate/clipping-active",
        6,
        "info",
        "optimizer",
        share,
        CLIPPED_LIMIT,
        f"The optimizer clips {number(100 * share)}% of the gradients.",
        "Leave the clipping out and lower the learning rate until the loss falls; if"
        " that does not work, look for outliers among the examples.",
    )


def decays_early(shares: npt.ArrayLike) -> Finding | None:
    """Says where a schedule ends long before the training; a suspicion.

    Args:
        shares: [steps], size of updates by the same gradient, as a share of what it is
            with the rate at its peak; NaN in steps without an update.
    """
    values = np.asarray(shares, np.float64)
    steps = np.flatnonzero(np.isfinite(values))
    if not steps.size:
        return None
    to_come = np.maximum.accumulate(values[steps][::-1])[::-1]
    share = float(to_come.mean())
    if not share < EARLY_SHARE:
        return None
    step = int(steps[np.argmax(to_come < EARLY_SHARE)])
    return Finding(
        "learning-rate/decays-early",
        6,
        "info",
        "optimizer",
        share,
        EARLY_SHARE,
        f"The schedule leaves the updates {number(100 * share)}% of their largest on"
        f" average, and less than {number(100 * EARLY_SHARE)}% from step {step} of"
        f" {len(values)} on.",
        "Stretch the schedule over the whole training: optax counts optimizer steps,"
        " not epochs.",
    )


def smoothed(losses: npt.ArrayLike, weight: float = 0.9) -> np.ndarray:
    """Returns the running mean of losses, corrected for its start at zero.

    Args:
        losses: [steps].
        weight: of the past; 0.9 averages about ten steps.

    Example:
        >>> smoothed([1.0, 1.0, 1.0]).round(6)
        array([1., 1., 1.])

    References:
        Kingma and Ba (2015), section 3, for the correction.
    """
    mean, result = 0.0, []
    for step, loss in enumerate(np.asarray(losses), start=1):
        mean = weight * mean + (1 - weight) * float(loss)
        result.append(mean / (1 - weight**step))
    return np.array(result)


def judge_losses(losses: npt.ArrayLike) -> tuple[Finding, ...]:
    """Says what the losses of a trial tell about its rate; suspects.

    Args:
        losses: [steps], of the batches of one training.
    """
    values = np.asarray(losses, np.float64)
    start = float(values[0])
    if not np.isfinite(values).all():
        step = int(np.argmin(np.isfinite(values)))
        return (_diverges(start, float(values[step]), step),)
    if len(values) < 2:
        return ()
    curve = smoothed(values)
    end, lowest = float(curve[-1]), float(curve.min())
    rises = end - lowest > JITTER_LIMIT * (start - lowest)
    if rises and end > start + 0.1 * abs(start):
        return (_diverges(start, end, len(values)),)
    return ()


def _diverges(start: float, end: float, step: int) -> Finding:
    return Finding(
        "learning-rate/diverges",
        6,
        "info",
        "optimizer",
        end,
        start,
        f"The training loss goes from {number(start)} to {number(end)} in {step}"
        " steps.",
        "Lower the learning rate until the loss falls, then use the largest such rate.",
    )


def wrong_rate(factor: float) -> Finding:
    """The finding that another rate learns, as the grid of rates shows it.

    Args:
        factor: what the rate has to be multiplied with.
    """
    is_high = factor < 1
    times = number(1 / factor if is_high else factor)
    return Finding(
        f"learning-rate/{'too-high' if is_high else 'too-low'}",
        6,
        "info",
        "optimizer",
        1.0,
        factor,
        f"The learning rate is about {times} times too {'high' if is_high else 'low'}.",
        f"Multiply the learning rate by {number(factor)}; from there, take the largest"
        " one that does not make the loss rise.",
    )


def stops_early(num_steps: int) -> Finding:
    """The finding that a training ends before much is learned.

    Args:
        num_steps: how long it is.
    """
    return Finding(
        "learning-rate/stops-early",
        6,
        "info",
        "training",
        float(num_steps),
        math.nan,
        f"The training ends after {num_steps:,} steps, before much is learned.",
        "Train for longer, until the loss is level; where you do, say so by num_steps."
        " Count optimizer steps, not epochs: few examples or large batches make few.",
    )


def is_falling(losses: npt.ArrayLike) -> bool:
    """Tells whether a loss was still clearly falling at the end of a trial.

    Args:
        losses: [marks], on the same examples, at even distances.
    """
    values = np.asarray(losses, np.float64)
    if len(values) < 4 or not np.isfinite(values).all():
        return False
    quarter = len(values) // 4
    before, last = values[-2 * quarter : -quarter].mean(), values[-quarter:].mean()
    total = values[:quarter].mean() - last
    return bool(before - last > max(0.1 * total, 0.01 * abs(last), 1e-12))
