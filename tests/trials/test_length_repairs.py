"""When a longer training is tried, and how long it is."""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

from nnsanity.trials import interventions
from nnsanity.trials.arms import Arm
from nnsanity.trials.length_repairs import length_repairs

FALLING, LEVEL = np.linspace(1, 0, 11), np.full(11, 0.7)


class Problem(SimpleNamespace):
    def _replace(self, **changes):
        return Problem(**{**vars(self), **changes})


@pytest.mark.parametrize(
    ("num_steps", "level", "losses", "longer"),
    [
        (30, 0.2, LEVEL, 1000),
        (200, 0.2, LEVEL, 2000),
        (201, 0.2, LEVEL, None),  # it stands still
        (400, 0.2, FALLING, 4000),
        (2000, 0.2, FALLING, 5000),
        (2501, 0.2, FALLING, None),  # hardly longer
        (30, 0.5, FALLING, None),  # it has learned
    ],
)
def test_a_longer_training(num_steps, level, losses, longer):
    outcome = SimpleNamespace(batch_losses=np.zeros(num_steps), losses=losses)
    problem = Problem(num_steps=num_steps)
    found = length_repairs(problem, level, outcome)
    assert [one.rewrite(problem).num_steps for one in found] == [longer] * bool(longer)
    for one in found:
        assert one.name == f"training for {longer:,} steps"
        assert one.is_free
        assert one.finding.rule == "learning-rate/stops-early"


class Made(NamedTuple):
    name: str
    num_steps: int
    is_free: bool = True
    follows: str | None = None


@pytest.mark.parametrize(("deadline", "is_tried"), [(20.0, False), (40.0, True)])
def test_a_longer_training_has_to_fit_the_budget_from_all_seeds(
    monkeypatch, deadline, is_tried
):
    now = [0.0]
    levels = np.zeros(3)
    original = Arm((), levels, levels, levels, 100)

    def train(lab, repairs, seeds):
        del lab, seeds
        now[0] += repairs[0].num_steps / 100
        return original._replace(repairs=repairs, num_steps=repairs[0].num_steps)

    monkeypatch.setattr(interventions, "_train", train)
    monkeypatch.setattr(interventions, "_trial_of", lambda lab, repairs: repairs[0])
    monkeypatch.setattr(interventions.time, "monotonic", lambda: now[0])
    lab = SimpleNamespace(deadline=deadline, keys=(0, 1, 2), progress=lambda text: None)
    repairs = [Made("another rate", 100), Made("longer", 1000)]
    tried, left_out = interventions._try_singles(lab, original, repairs)
    names = [one.repairs[0].name for one in tried]
    assert names == ["another rate", "longer"][: 1 + is_tried]
    assert [one.name for one in left_out] == ["longer"][is_tried:]
