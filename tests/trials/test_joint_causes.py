"""Which of the repairs that were made together are needed, told on written levels."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from nnsanity.findings import Finding
from nnsanity.trials import interventions
from nnsanity.trials.arms import Arm
from nnsanity.trials.repairs import Repair

BAD, GOOD = (-1.0, -1.0, -1.0), (0.9, 0.9, 0.9)


def repair(group):
    finding = Finding(f"normalization/{group}", 1, "info", "", 1.0, 0.0, "", "")
    return Repair(group, group, lambda copy, key: copy, (), finding)


def arm(levels, repairs=()):
    levels = np.array(levels)
    return Arm(tuple(repairs), levels, levels, levels, 100)


def needed(monkeypatch, levels, *, single=-1.0, original=BAD):
    """Names what is needed, and what each reaches without it.

    Args:
        monkeypatch: fixture.
        levels: of the seeds by the names of what is repaired.
        single: quality with the best single repair that helps.
        original: levels of the original.
    """
    repairs = [repair(name) for name in ("inputs", "targets", "weights")]

    def train(lab, chosen, seeds):
        del lab
        reached = levels.get(frozenset(one.group for one in chosen), BAD)
        return arm(reached[seeds], chosen)

    monkeypatch.setattr(interventions, "_train", train)
    lab = SimpleNamespace(deadline=math.inf, progress=lambda text: None)
    pairs, _ = interventions._joint_causes(
        lab, arm(original), repairs, max(single, original[0]), max(single, 0.0)
    )
    return {after.repairs[0].name: before.level for before, after in pairs}


def together(*names):
    return frozenset(names)


ALL = together("inputs", "targets", "weights")
BOTH = together("inputs", "targets")


def test_what_the_copy_can_do_without_is_no_cause(monkeypatch):
    levels = {ALL: GOOD, BOTH: GOOD, together("inputs", "weights"): (0.2,) * 3}
    assert needed(monkeypatch, levels) == {"inputs": -1, "targets": -1}


def test_one_that_is_enough_is_compared_with_the_original(monkeypatch):
    levels = {ALL: GOOD, BOTH: GOOD, together("inputs"): GOOD}
    assert needed(monkeypatch, levels) == {"inputs": -1}


def test_what_only_the_first_seed_can_do_without_is_kept(monkeypatch):
    lucky = (0.9, -1.0, -1.0)
    levels = {ALL: GOOD, BOTH: GOOD, together("inputs"): lucky}
    assert needed(monkeypatch, levels) == {"inputs": -1, "targets": -1}


def test_repairs_that_help_from_one_seed_alone_are_no_cause(monkeypatch):
    lucky = (0.9, -1.0, -1.0)
    levels = dict.fromkeys((ALL, BOTH, together("inputs")), lucky)
    assert needed(monkeypatch, levels) == {}


@pytest.mark.parametrize(
    ("single", "joint", "names"),
    [(0.3, 1.0, ["inputs", "targets"]), (0.75, 0.9, []), (0.85, 1.0, [])],
)
def test_a_single_repair_that_helps_is_told_unless_all_go_far_beyond(
    monkeypatch, single, joint, names
):
    levels = dict.fromkeys((ALL, BOTH), (joint,) * 3)
    found = needed(monkeypatch, levels, single=single, original=(0.1, 0.1, 0.1))
    assert sorted(found) == names
