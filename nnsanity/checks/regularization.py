"""Item 4: is there some noise in training, and not too much of it?

"Dropout, small noise or another random process belongs in the network even where
nothing overfits.  Start at 0.25 or 0.1" (D. Holden).
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nnsanity.findings import Finding, number

GAP_LIMIT = 0.3
"""Healthy distance between the quality on training and on validation data."""
RISE_LIMIT = 1.25
"""Healthy validation loss in units of its own minimum."""


def judge_overfitting(
    *,
    losses: npt.ArrayLike,
    quality: npt.ArrayLike,
    validation_losses: npt.ArrayLike,
    validation_quality: npt.ArrayLike,
) -> tuple[Finding, ...]:
    """Says whether a network forgets the task while it learns examples by heart.

    Args:
        losses: [marks], on examples that are trained on.
        quality: [marks], on the same.
        validation_losses: [marks], on validation data, at the same times.
        validation_quality: [marks], on the same.
    """
    names = (losses, quality, validation_losses, validation_quality)
    curves = np.stack([np.asarray(curve, np.float64) for curve in names])
    if not np.isfinite(curves).all():
        return ()
    best = int(np.argmin(curves[2]))
    rise = curves[2, -1] / max(curves[2, best], 1e-12)
    gap = float(np.median(curves[1, -3:]) - np.median(curves[3, -3:]))
    still_falls = curves[0, -1] < curves[0, best]
    if not (rise > RISE_LIMIT and gap > GAP_LIMIT and still_falls and best > 0):
        return ()
    return (
        Finding(
            "regularization/overfitting",
            4,
            "warning",
            "network",
            float(rise),
            RISE_LIMIT,
            f"The validation loss fell to {number(curves[2, best])} and rose again to"
            f" {number(curves[2, -1])}, while the training loss went on to"
            f" {number(curves[0, -1])}: the network learns examples by heart.",
            "Get more data, or make more by augmentation; add dropout of 0.1 to 0.25 or"
            " weight decay; stop at the lowest point of the validation loss.",
        ),
    )


def judge_noise(places: Sequence[str]) -> tuple[Finding, ...]:
    """Says where a network is noisy though it is evaluated."""
    return tuple(
        Finding(
            "regularization/noise-at-evaluation",
            4,
            "warning",
            place,
            1.0,
            0.0,
            "apply_fn draws random numbers for every example: what it returns is not"
            " the prediction of the network, but that of a part of it.",
            "Switch dropout off where you evaluate: deterministic=True in Linen,"
            " model.eval() in NNX, eqx.nn.inference_mode in Equinox. A model that"
            " samples by design says so by ignore=.",
        )
        for place in places
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
