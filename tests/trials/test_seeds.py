"""Which seed stands for a program, on losses written by hand."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from nnsanity.trials.seeds import keys_of, typical_first


@pytest.mark.parametrize(
    ("end_losses", "order"),
    [
        ((0.1, 0.5, 0.6), [1, 2, 0]),
        ((0.5, 0.6, 0.1), [0, 1, 2]),
        ((0.3, 0.3, 0.3), [0, 1, 2]),
        ((0.5,), [0, 1, 2]),
    ],
)
def test_the_most_typical_seed_comes_first(end_losses, order):
    ran = [SimpleNamespace(losses=np.array([1.0] + [one] * 3)) for one in end_losses]
    key, problem = jax.random.key(0), SimpleNamespace(kind=None)
    outcomes, keys = typical_first(problem, ran, key)
    expected = [end_losses[seed] for seed in order if seed < len(ran)]
    assert [one.losses[-1] for one in outcomes] == expected
    for one, seed in zip(keys, order, strict=True):
        assert one == keys_of(key)[seed]
