"""How much a training learned, on a scale from a constant output to perfect."""

from collections.abc import Callable

import numpy as np

from nnsanity._types import Array
from nnsanity.checks.learning_rate import is_falling
from nnsanity.trials.problem import Problem
from nnsanity.trials.trial import Outcome

LEARNED = 0.9
"""Quality from which on a network counts as learning well: nothing is repaired."""
FAILED = 0.1
"""Quality up to which a network counts as not learning."""
MIN_STEPS_TO_FAIL = 50
"""Steps before which a network is only on its way."""


def level_of(problem: Problem, outcome: Outcome, start_loss: float) -> float:
    """Returns how much was learned: 0 is a constant output, 1 is perfect.

    The mean of the qualities on examples that were trained on and on others, each the
    median of the last three marks.  Where outputs can't be compared with targets, the
    share by which the loss fell.
    """
    if problem.kind is not None:
        seen, held_out = last(outcome.seen_quality), last(outcome.quality)
        return (seen + held_out) / 2
    end = last(outcome.losses)
    if not np.isfinite(end) or not np.isfinite(start_loss):
        return -1.0
    return float(np.clip((start_loss - end) / max(abs(start_loss), 1e-6), -1, 1))


def curve_of(problem: Problem, outcome: Outcome, start_loss: float) -> np.ndarray:
    """Returns how much was learned at each mark, as ``level_of`` measures it."""
    if problem.kind is not None:
        return (np.asarray(outcome.seen_quality) + np.asarray(outcome.quality)) / 2
    fallen = (start_loss - np.asarray(outcome.losses)) / max(abs(start_loss), 1e-6)
    return np.where(np.isfinite(fallen), np.clip(fallen, -1, 1), -1)


def last(curve: Array) -> float:
    """Returns the median of the last three marks of a curve."""
    return float(np.median(np.asarray(curve)[-3:]))


def unit_of(problem: Problem) -> tuple[str, Callable[[float], float]]:
    """Returns what quality is called for a problem, and how to write it."""
    if problem.kind is None:
        return "share by which the loss fell", lambda level: level
    if problem.kind == "numbers":
        return "explained share of the variance", lambda level: max(level, 0.0)
    chance = _chance(problem)
    return "accuracy", lambda level: max(chance + level * (1 - chance), 0.0)


def grain_of(problem: Problem, num_held_out: int) -> float:
    """Returns the quality that one held-out example is worth; 0 for numbers."""
    if problem.kind in (None, "numbers"):
        return 0.0
    return 1 / max((1 - _chance(problem)) * num_held_out, 1.0)


def _chance(problem: Problem) -> float:
    """Returns the share of the commonest class."""
    targets = np.asarray(problem.targets)
    if problem.kind == "one-hot":
        targets = targets.argmax(axis=-1)
    _, counts = np.unique(targets, return_counts=True)
    return float(counts.max() / counts.sum())


def is_on_its_way(outcome: Outcome) -> bool:
    """Tells whether a training is too short, or its loss still falls, to be judged."""
    is_short = len(outcome.batch_losses) < MIN_STEPS_TO_FAIL
    return is_short or is_falling(outcome.losses)


def is_lost(problem: Problem, outcome: Outcome, level: float) -> bool:
    """Tells whether a network learns nothing and is not on its way, either."""
    has_failed = problem.kind is not None and level <= FAILED
    return has_failed and not is_on_its_way(outcome)
