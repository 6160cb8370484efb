"""Item 6: is the learning rate one at which this network learns?

"Defaults are nearly always wrong.  Find the largest rate that does not make the error
explode, and go a little below" (D. Holden).
"""

import numpy as np
import numpy.typing as npt

from nnsanity.findings import Finding, number

RATE_FACTORS = (0.1, 10.0, 0.01, 100.0)
"""Factors of the user's rate that the trial tries, the near ones first."""
JITTER_LIMIT = 1.0
"""Healthy rise of the smoothed loss above its minimum, as a share of its fall."""


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
