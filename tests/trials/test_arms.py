"""When a copy counts as better, on levels written by hand."""

from typing import NamedTuple

import numpy as np
import pytest

from nnsanity.trials.arms import MIN_GAIN_BY_CHANCE, Arm, helps, needed_gain
from nnsanity.trials.ranking import best_of_groups


def arm(*levels):
    values = np.array(levels)
    return Arm((), values, values, values, 100)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((0.1, 0.1, 0.1), (0.7, 0.7, 0.7), True),
        ((0.4, 0.2, 0.9), (0.7, 0.7, 0.7), True),  # one seed learned by luck
        ((0.4, 0.2, 0.9), (0.8, 0.7, 0.4), False),  # and so may the copy
        ((0.4, 0.2, 0.9), (0.5, 0.5, 0.5), False),  # no clear gain on the median
        ((0.4, 0.9, 0.9), (0.8, 0.8, 0.8), False),  # it learns from most seeds
        ((0.5, 0.5, 0.5), (0.7, 0.7, 0.49), False),
        ((0.5, 0.5, 0.5), (0.55, 0.55, 0.55), False),
        ((-1.0, -1.0, -1.0), (-0.1, -0.2, -0.1), False),  # both no better than nothing
        ((0.4, 0.4, 0.4), (0.9, np.nan, 0.9), False),
    ],
)
def test_helps(before, after, expected):
    assert helps(arm(*before), arm(*after)) is expected


def test_what_is_memorized_does_not_count():
    after = arm(0.9, 0.9, 0.9)._replace(held_out=np.full(3, 0.4))
    assert not helps(arm(0.4, 0.4, 0.4), after)


class Made(NamedTuple):
    is_free: bool
    group: str = ""
    follows: str | None = None


CHOSEN, NEEDED = (Made(is_free=True),), (Made(is_free=False),)


def test_what_nearly_every_program_gains_from_has_to_bring_more():
    before, after = arm(0.85), arm(1.0)._replace(repairs=CHOSEN)
    assert needed_gain(before, after) == MIN_GAIN_BY_CHANCE
    assert not helps(before, after)
    assert helps(before, after._replace(repairs=NEEDED))
    assert not helps(before, arm(0.9)._replace(repairs=NEEDED))


def test_what_counts_is_a_share_of_the_best_that_data_allow():
    before, after = arm(0.21), arm(0.33)
    assert not helps(before, after)
    assert helps(before, after, best=0.34)
    # Under a tenth nothing is sure, however noisy the data are.
    assert not helps(before, arm(0.3), best=0.3)
    by_chance = arm(0.36)._replace(repairs=CHOSEN)
    assert not helps(before, by_chance)
    assert helps(before, by_chance, best=0.36)
    assert not helps(before, after._replace(repairs=CHOSEN), best=0.34)


@pytest.mark.parametrize("repairs", [CHOSEN, NEEDED])
def test_less_is_enough_where_nothing_is_learned(repairs):
    before = arm(0.0, 0.01, -0.3)._replace(is_lost=True)
    after = arm(0.09, 0.1, 0.1)._replace(repairs=repairs)
    assert helps(before, after, best=0.34)
    assert not helps(before, after, best=0.9)
    assert not helps(before, arm(0.04)._replace(repairs=repairs), best=0.1)
    if repairs is CHOSEN:  # a healthy program on its way could gain as much
        assert not helps(before._replace(is_lost=False), after, best=0.34)


@pytest.mark.parametrize("repairs", [CHOSEN, NEEDED])
@pytest.mark.parametrize("before", [arm(0.0)._replace(is_lost=True), arm(0.3)])
def test_what_a_few_held_out_examples_are_worth_is_chance(before, repairs):
    before = before._replace(grain=0.04)
    after = arm(before.level + 0.13)._replace(repairs=repairs)
    best = after.level
    most = needed_gain(before, after)
    assert needed_gain(before, after, best=best) == pytest.approx(min(0.16, most))
    assert not helps(before, after, best=best)
    # Never more than of what may become perfect.
    before = before._replace(grain=1.0)
    assert needed_gain(before, after, best=best) == most


def told(**levels):
    """Which of the repairs of these groups are told, by the levels that they reach."""
    found = [
        arm(level, level, level)._replace(repairs=(Made(is_free=True, group=group),))
        for group, level in levels.items()
    ]
    chosen = best_of_groups(arm(0.1, 0.1, 0.1), found, max(levels.values()))
    return [one.repairs[0].group for one in chosen]


@pytest.mark.parametrize(
    ("levels", "groups"),
    [
        ({"rate": 0.8, "length": 0.85}, ["rate"]),  # the cheaper of the two
        ({"rate": 0.8, "length": 0.95}, ["length"]),
        ({"length": 0.8}, ["length"]),
        ({"rate": 0.3, "depth": 1.0}, ["depth"]),
        ({"rate": 0.9, "depth": 0.95}, ["rate"]),  # a linear function does as well
        ({"inputs": 0.95, "depth": 1.0}, ["inputs"]),
        ({"depth": 1.0}, ["depth"]),
        ({"loss": 0.8, "head": 0.9}, ["head"]),
    ],
)
def test_repairs_of_one_fault(levels, groups):
    assert told(**levels) == groups
