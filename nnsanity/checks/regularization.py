"""Item 4: is there some noise in training, and not too much of it?

"Dropout, small noise or another random process belongs in the network even where
nothing overfits.  Start at 0.25 or 0.1" (D. Holden).
"""

import math

import numpy as np

from nnsanity._types import Array
from nnsanity.findings import Finding, number

GAP_LIMIT = 0.3
"""Healthy distance between the quality on examples seen and on others."""
FALL_LIMIT = 0.1
"""Healthy fall of the quality on other examples from its own best."""


def judge_overfitting(seen: Array, held_out: Array) -> tuple[Finding, ...]:
    """Says whether a network forgets the task while it learns examples by heart.

    Args:
        seen: [marks], quality on examples that were trained on.
        held_out: [marks], quality on others, at the same times.
    """
    curves = np.stack([seen, held_out])
    if not np.isfinite(curves).all():
        return ()
    seen_end, end = (float(np.median(curve[-3:])) for curve in curves)
    best, gap = float(curves[1].max()), seen_end - end
    if not (gap > GAP_LIMIT and best - end > FALL_LIMIT and best > FALL_LIMIT):
        return ()
    return (
        Finding(
            "regularization/overfitting",
            4,
            "warning",
            "network",
            gap,
            GAP_LIMIT,
            f"On examples that were held out the quality rose to {number(best)} and"
            f" fell back to {number(end)}, while it went on to {number(gap + end)} on"
            " those that were trained on: the network learns examples by heart.",
            "Get more data, or make more by augmentation; add dropout of 0.1 to 0.25 or"
            " weight decay; stop at the best point.",
        ),
    )


def too_strong(kind: str) -> Finding:
    """The finding that training without some regularization works better.

    Args:
        kind: ``"noise"`` for dropout, ``"penalty"`` for a term of the loss.
    """
    message, advice = _WORDS[kind]
    return Finding(
        "regularization/too-strong",
        4,
        "info",
        "train_loss_fn" if kind == "noise" else "loss_fn",
        math.nan,
        math.nan,
        message,
        advice,
    )


_WORDS = {
    "noise": (
        "The noise of training drowns what there is to learn.",
        "Lower the dropout rate: start at 0.25 or 0.1.",
    ),
    "penalty": (
        "The penalty on the parameters pulls harder than the data.",
        "Divide the weight of the penalty by 100, then raise it until validation tells"
        " you to stop.",
    ),
}
