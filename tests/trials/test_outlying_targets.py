"""A few targets far from all others: named with their effect, and never by mistake."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnsanity.quantities.targets import quality
from nnsanity.trials.copies import OFF
from nnsanity.trials.data_repairs import data_repairs
from nnsanity.trials.outlying import inner_range
from nnsanity.trials.trial import with_data
from tests.trials.test_data import INPUTS, NUMBERS, checkup, loud, rules
from tests.trials.test_trial import KEY, problem_of, trial_of

BROKEN = [11, 222, 333]


def with_outliers(targets, rows=BROKEN, factor=1e3):
    targets = targets.copy()
    targets[rows] *= factor
    return targets


@pytest.mark.slow
def test_a_few_targets_in_another_unit():
    report = checkup(INPUTS, with_outliers(NUMBERS), num_steps=300)
    assert loud(report)[0] == "normalization/outliers"
    first = report.findings[0]
    assert first.where == "targets, feature 0"
    assert first.severity == "error"
    assert "Clipping the outliers and standardizing the targets takes" in first.message
    assert "huber_loss" in first.advice
    assert "400 examples (3 with outlying targets do not count)" in report.summary
    (clipped,) = (
        one.levels
        for one in report.measurements["repairs"]
        if one.repair.startswith("clipping")
    )
    assert np.median(clipped) > 0.8


HEAVY = np.exp(1.5 * INPUTS @ np.array([1, -0.5, 0.5, -1, 0.3, 0.2]))[:, None]


@pytest.mark.slow
@pytest.mark.parametrize(
    "targets",
    [HEAVY / HEAVY.std(), np.sinh(3 * NUMBERS), with_outliers(NUMBERS, factor=3)],
)
def test_heavy_tails_are_no_outliers(targets):
    report = checkup(INPUTS, targets.astype(np.float32), interventions=False)
    assert "normalization/outliers" not in rules(report)
    assert "do not count" not in report.summary


def test_log_normal_targets_have_outliers_once_in_a_hundred_draws_at_most():
    draws = jax.random.normal(jax.random.key(0), (2000, 400))
    for power in (0.5, 1.0, 2.0, 3.0):
        found = inner_range(jnp.exp(power * draws).T)
        assert found is None or np.isfinite(found.high).mean() < 0.01


DATA_INPUTS = np.random.default_rng(1).normal(size=(120, 3)).astype(np.float32)
DATA_TARGETS = np.tanh(DATA_INPUTS @ [1, -1, 0.5])[:, None].astype(np.float32)
DATA_TARGETS[[5]] = 1e4


def test_all_copies_are_compared_on_all_other_examples():
    data = DATA_INPUTS, DATA_TARGETS
    options = {"data": data, "train_loss_fn": None, "validation": data}
    problem = problem_of(**options)
    trial = trial_of(**options)
    left_out = problem.left_out(problem.targets)
    assert np.flatnonzero(left_out).tolist() == [5]
    seen, seen_evaluated, held_out = trial.train.args[-1]
    assert len(seen) + len(held_out) + (5 not in seen) == 120
    assert {*seen_evaluated, *held_out} == {*range(120)} - {5}
    assert len(trial.train.args[1][0]) == 119

    (repair,) = data_repairs(problem)
    clipped = np.asarray(repair.targets(problem.targets))
    others = np.delete(DATA_TARGETS, 5)
    assert clipped[5] == others.max()
    np.testing.assert_array_equal(np.delete(clipped, 5), others)

    # An untrained copy has the same quality whatever became of the outliers.
    copy = trial.plain._replace(update_scale=jnp.float32(0), noise=OFF)
    outcomes = [
        with_data(trial, (problem.inputs, jnp.asarray(targets))).train(copy, KEY)
        for targets in (DATA_TARGETS, clipped)
    ]
    plain, repaired = (np.asarray([one.seen_quality, one.quality]) for one in outcomes)
    np.testing.assert_array_equal(plain, repaired)
    outputs = problem.apply_fn(problem.params, DATA_INPUTS[held_out])
    expected = quality(outputs, DATA_TARGETS[held_out], "numbers")
    np.testing.assert_allclose(outcomes[0].quality[0], expected, rtol=1e-4)


def test_targets_without_outliers_all_count():
    targets = np.delete(DATA_TARGETS, 5, axis=0)
    problem = problem_of(data=(np.delete(DATA_INPUTS, 5, axis=0), targets))
    assert not problem.left_out(problem.targets).any()
    assert data_repairs(problem) == ()
    assert problem.size_in_words == "119 examples"


def test_rare_events_that_the_inputs_tell_of_count():
    rng = np.random.default_rng(3)
    inputs = rng.normal(size=(400, 3)).astype(np.float32)
    targets = np.tanh(inputs @ [1, -1, 0.5])[:, None].astype(np.float32)
    targets[BROKEN] += 100
    slips = problem_of(data=(inputs, targets))
    assert np.flatnonzero(slips.left_out(slips.targets)).tolist() == BROKEN
    inputs[:, 2] = 0
    inputs[BROKEN, 2] = 1
    events = problem_of(data=(inputs, targets))
    assert inner_range(events.targets) is not None
    assert events.slips is None
    assert events.size_in_words == "400 examples"
    assert data_repairs(events) == ()


def test_outliers_in_most_rows_are_no_exception():
    rng = np.random.default_rng(2)
    many = rng.normal(size=(400, 120)).astype(np.float32)
    many[np.arange(120), np.arange(120)] = 1e6
    apply_fn = lambda params, x: x @ params  # noqa: E731
    problem = problem_of(
        apply_fn=apply_fn,
        loss_fn=lambda p, b: jnp.mean((apply_fn(p, b[0]) - b[1]) ** 2),
        train_loss_fn=None,
        params=jnp.ones((3, 120)),
        data=(rng.normal(size=(400, 3)).astype(np.float32), many),
    )
    assert problem.kind == "numbers"
    assert inner_range(problem.targets) is not None
    assert not problem.left_out(problem.targets).any()
    assert data_repairs(problem) == ()


def test_larger_tables_are_not_looked_at(monkeypatch):
    monkeypatch.setattr("nnsanity.trials.outlying.MAX_NUMBERS", 100)
    monkeypatch.setattr("nnsanity.trials.data.MAX_NUMBERS", 100)
    assert inner_range(jnp.asarray(DATA_TARGETS)) is None
    report = checkup(INPUTS, with_outliers(NUMBERS), optimizer=None)
    assert report.skipped["outliers of targets"] == "more than 100 numbers"
    assert "normalization/outliers" not in rules(report)
