"""How far a program came with some repairs, and whether that is clearly better."""

from typing import NamedTuple

import numpy as np

from nnsanity.trials.repairs import Repair

MIN_GAIN = 0.1
"""Gain in quality that a repair must bring; a difference of this size between a faulty
program and its repaired twin is worth a finding."""
MIN_GAIN_OF_LOST = MIN_GAIN / 2
"""The same where nothing is learned and nothing will be, which is a finding anyway."""
MIN_GRAINS = 4
"""Held-out examples that a gain has to be worth where a share of a quality under 1 is
asked; half a gain on these counts, so that it takes two of them."""
MIN_GAIN_BY_CHANCE = 0.2
"""The same for another rate, schedule or loss, other weights, or a batch that nothing
was measured against: nearly every healthy program could learn more from some of them.
"""
MIN_SHARE = 0.2
"""Share of what is missing to the best quality that a repair must bring."""


class Attempt(NamedTuple):
    """One repair that was tried, or several together.

    Attributes:
        repair: what was done, as the subject of a sentence.
        group: repairs of one group exclude each other; ``"together"`` for several.
        levels: float[seeds], quality that it reached; 1 is perfect, 0 a constant.
        curve: float[marks + 1], quality of the first seed on its way.
        helped: whether it learned clearly better than the original, from every seed.
        num_steps: how long it was trained.
    """

    repair: str
    group: str
    levels: np.ndarray
    curve: np.ndarray
    helped: bool
    num_steps: int


class Arm(NamedTuple):
    """A set of repairs and how far it came.

    Attributes:
        repairs: what was done to the copy; empty for the original.
        levels: float[seeds], quality.
        held_out: float[seeds], quality on held-out examples alone.
        curve: float[marks + 1], quality of the first seed on its way.
        num_steps: how long it was trained.
        is_lost: whether it learns nothing and is not on its way, either.
        grain: quality that one held-out example is worth.
    """

    repairs: tuple[Repair, ...]
    levels: np.ndarray
    held_out: np.ndarray
    curve: np.ndarray
    num_steps: int
    is_lost: bool = False
    grain: float = 0.0

    @property
    def level(self) -> float:
        """Median over the seeds."""
        return float(np.median(self.levels))


def joined(first: Arm, rest: Arm) -> Arm:
    """Joins what the same repairs reached from other seeds."""
    return first._replace(
        levels=np.concatenate([first.levels, rest.levels]),
        held_out=np.concatenate([first.held_out, rest.held_out]),
    )


def attempt_of(arm: Arm, *, helped: bool) -> Attempt:
    """Returns what is shown of an arm with a single repair."""
    (repair,) = arm.repairs
    return Attempt(
        repair.name, repair.group, arm.levels, arm.curve, helped, arm.num_steps
    )


def gain_of(before: Arm, after: Arm) -> float:
    """How much better a copy learned; memorizing alone does not count."""
    held_out = _differences(before.held_out, after.held_out)
    gains = _differences(before.levels, after.levels)
    return float(min(np.median(gains), 2 * np.median(held_out)))


def _differences(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Compares seed by seed; below a constant output all are equally bad."""
    seeds = min(len(before), len(after))
    return np.maximum(after[:seeds], 0) - np.maximum(before[:seeds], 0)


def needed_gain(before: Arm, after: Arm | None = None, *, best: float = 1.0) -> float:
    """The gain that counts, of what was repaired last.

    On noisy data the best quality is far from perfect, and so is what a repair can
    bring; but a few held-out examples more or less are chance.

    Args:
        before: without the repair.
        after: with it; any repair if None.
        best: quality that can be reached, as far as it is known.
    """
    repairs = () if after is None else after.repairs
    is_choice = len(repairs) == 1 and repairs[0].is_free
    missing = 1.0 - max(before.level, 0.0)
    most = max(MIN_GAIN_BY_CHANCE if is_choice else MIN_GAIN, MIN_SHARE * missing)
    if before.is_lost:
        least, by_chance = MIN_GAIN_OF_LOST, MIN_GAIN_BY_CHANCE * best
    else:
        least, by_chance = MIN_GAIN, MIN_GAIN_BY_CHANCE * (1 + best) / 2
    least = max(least, by_chance) if is_choice else least
    share = MIN_SHARE * (best - max(before.level, 0.0))
    return min(most, max(least, share, MIN_GRAINS * before.grain))


def helps(before: Arm, after: Arm, *, best: float = 1.0) -> bool:
    """Tells whether a copy learned clearly better, and from every seed.

    Better than the original from the same seed, or clearly better than the original
    from its median one: that may have learned by luck from some seed, and says nothing
    against a copy that needs none.

    Args:
        before: without the repair.
        after: with it.
        best: quality that can be reached, as far as it is known.
    """
    least = needed_gain(before, after, best=best)
    is_better = (_differences(before.levels, after.levels) > 0).all()
    needs_no_luck = (after.levels - max(before.level, 0) >= least).all()
    return gain_of(before, after) >= least and bool(is_better or needs_no_luck)
