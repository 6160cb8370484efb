"""When a copy counts as better, on levels written by hand."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from nnsanity.trials import interventions
from nnsanity.trials.arms import Arm, helps


def arm(*levels):
    values = np.array(levels)
    return Arm((), values, values, values)


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


@pytest.mark.parametrize(
    ("end_losses", "order"),
    [
        ((0.1, 0.5, 0.6), [1, 2, 0]),
        ((0.5, 0.6, 0.1), [0, 1, 2]),
        ((0.3,) * 3, [0, 1, 2]),
    ],
)
def test_the_most_typical_seed_comes_first(monkeypatch, end_losses, order):
    losses = iter(end_losses)

    def train_copies(trial, copies):
        del trial, copies
        return [SimpleNamespace(losses=np.array([1.0] + [next(losses)] * 3))]

    monkeypatch.setattr(interventions, "train_copies", train_copies)
    key, problem = jax.random.key(0), SimpleNamespace(kind=None)
    trial = SimpleNamespace(plain=None)
    outcomes, keys = interventions.train_original(problem, trial, key)
    assert [one.losses[-1] for one in outcomes] == [end_losses[i] for i in order]
    expected = [jax.random.fold_in(key, seed) for seed in order]
    for one, other in zip(keys, expected, strict=True):
        assert (jax.random.key_data(one) == jax.random.key_data(other)).all()
