"""When a longer training is tried, and how long it is."""

from types import SimpleNamespace

import numpy as np
import pytest

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
