import jax.numpy as jnp
import numpy as np
import pytest

from nnsanity.checks.preprocessing import duplicates, judge_duplicates

RNG = np.random.default_rng(0)


def duplicates_by_hand(inputs, targets):
    targets = targets.reshape(len(targets), -1).astype(np.float64)
    rows = inputs.reshape(len(inputs), -1)
    _, group, counts = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    group = group.reshape(-1)
    within = sum(
        ((targets[group == one] - targets[group == one].mean(axis=0)) ** 2).sum()
        for one in range(len(counts))
    )
    overall = ((targets - targets.mean(axis=0)) ** 2).sum()
    repeated = counts[counts > 1]
    copies = repeated.mean() if len(repeated) else 0
    return within / overall if overall else 0, repeated.sum(), copies


def rows_of(num_values, columns=2, size=60):
    return RNG.integers(0, num_values, (size, columns)).astype(np.float32)


@pytest.mark.parametrize(
    ("inputs", "targets"),
    [
        (rows_of(4), RNG.normal(size=60)),
        (rows_of(4) * 1e-3 - 7, RNG.normal(size=(60, 3))),
        (rows_of(2, 12).reshape(60, 3, 4), RNG.normal(size=60)),
        (rows_of(3).astype(np.int32), RNG.integers(0, 2, 60)),
        (RNG.normal(size=(60, 2)).astype(np.float32), RNG.normal(size=60)),
        (np.zeros((60, 2), np.float32), RNG.normal(size=60)),
        (rows_of(4), np.ones(60)),
    ],
)
def test_duplicates_against_numpy(inputs, targets):
    found = duplicates(jnp.asarray(inputs), jnp.asarray(targets, jnp.float32))
    expected = duplicates_by_hand(inputs, targets)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert found.num_repeated.dtype == jnp.int32


def test_both_zeros_are_one_number():
    inputs = jnp.array([[0.0], [-0.0], [1.0]])
    assert duplicates(inputs, jnp.arange(3.0)).num_repeated == 2


def test_rows_of_equal_values_in_another_order_differ():
    inputs = jnp.array([[1.0, 2.0], [2.0, 1.0], [1.0, 1.0], [2.0, 2.0]])
    assert duplicates(inputs, jnp.arange(4.0)).num_repeated == 0


UNIQUE = RNG.normal(size=(50, 3)).astype(np.float32)
TWICE = np.concatenate([UNIQUE, UNIQUE])
NOISE = RNG.normal(size=100).astype(np.float32)


@pytest.mark.parametrize(
    ("inputs", "targets", "alarms"),
    [
        (TWICE, NOISE, True),
        (TWICE, np.tile(NOISE[:50], 2), False),
        (TWICE, np.tile(NOISE[:50], 2) + 0.1 * NOISE, False),
        (np.concatenate([UNIQUE, UNIQUE + 1]), NOISE, False),
        (np.tile(UNIQUE[:10], (10, 1)), NOISE, False),
    ],
    ids=["unequal", "equal", "nearly", "other inputs", "a table of ten rows"],
)
def test_contradictory_duplicates(inputs, targets, alarms):
    measured = duplicates(jnp.asarray(inputs), jnp.asarray(targets))
    found = judge_duplicates(measured)
    rule = "preprocessing/contradictory-duplicates"
    assert [(one.rule, one.severity) for one in found] == [(rule, "warning")] * alarms
    if alarms:
        share = duplicates_by_hand(inputs, targets)[0]
        assert found[0].measured == pytest.approx(share, rel=1e-4)
        assert found[0].message.startswith("100 examples")
