"""A few targets far from all others: named with their effect, and never by mistake."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnsanity.quantities.targets import quality
from nnsanity.trials.copies import OFF
from nnsanity.trials.data_repairs import data_repairs
from nnsanity.trials.measure import perfect_loss, some_examples
from nnsanity.trials.outlying import inner_range, range_of_targets
from nnsanity.trials.trial import prepare, with_data
from nnsanity.trials.verdicts import _errors, _wrong_loss
from tests.trials.test_data import INPUTS, NUMBERS, checkup, loud, rules
from tests.trials.test_trial import (
    KEY,
    PARAMS,
    apply_fn,
    problem_of,
    trial_of,
    without_head,
)

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


SIDES = {
    "right tail": lambda column: column,
    "left tail": lambda column: -column,
    "both tails": abs,
}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("num_columns", "num_events"), [(4, 16), (50, 3)])
def test_what_one_column_decides_is_no_slip(side, num_columns, num_events):
    """Tail points have no near neighbours, least of all among many columns."""
    rng = np.random.default_rng(num_columns)
    inputs = rng.normal(size=(2000, num_columns)).astype(np.float32)
    targets = inputs[:, :1] + 0.1 * rng.normal(size=(2000, 1)).astype(np.float32)
    events = np.argsort(SIDES[side](inputs[:, 1]))[-num_events:]
    found = range_of_targets(jnp.asarray(inputs), with_events(targets, events))
    assert found is None
    assert inner_range(with_events(targets, events)) is not None


def with_events(targets, rows):
    targets = targets.copy()
    targets[rows] = 500
    return jnp.asarray(targets)


def test_chance_among_many_columns_does_not_excuse_slips():
    for seed in range(9):
        rng = np.random.default_rng(seed)
        inputs = rng.normal(size=(300, 100)).astype(np.float32)
        inputs[:, 50:] = inputs[:, 50:] > 2  # columns of flags
        rows = rng.choice(300, 1 + seed % 3, replace=False)
        targets = with_events(rng.normal(size=(300, 1)).astype(np.float32), rows)
        found = range_of_targets(jnp.asarray(inputs), targets)
        assert np.flatnonzero(found.outside(targets)).tolist() == sorted(rows)


def test_complex_inputs_tell_by_their_parts():
    rng = np.random.default_rng(0)
    inputs = (rng.normal(size=(400, 4, 2)) @ [1, 1j]).astype(np.complex64)
    numbers = inputs.real[:, :1]
    slips = with_events(numbers, BROKEN)
    found = range_of_targets(jnp.asarray(inputs), slips)
    assert np.flatnonzero(found.outside(slips)).tolist() == BROKEN
    events = with_events(numbers, np.argsort(inputs.imag[:, 1])[-4:])
    assert range_of_targets(jnp.asarray(inputs), events) is None
    broken = inputs.copy()
    broken[7] = 1e6
    weights = jnp.ones((4, 1), jnp.complex64)
    problem = problem_of(
        apply_fn=lambda params, x: (x @ params).real,
        loss_fn=lambda params, b: jnp.mean(((b[0] @ params).real - b[1]) ** 2),
        train_loss_fn=None,
        params=weights,
        data=(broken, numbers),
    )
    assert data_repairs(problem) == ()


def test_clipping_keeps_integers_inside_as_they_are():
    values = 2**24 + np.arange(-200, 200, dtype=np.int32)[:, None]
    values[7] = 2**30
    found = inner_range(jnp.asarray(values))
    clipped = np.asarray(found.clipped(jnp.asarray(values)))
    assert clipped.dtype == np.int32
    np.testing.assert_array_equal(np.delete(clipped, 7), np.delete(values, 7))
    assert clipped[7, 0] == pytest.approx(2**24 + 200, abs=2)


SHIFTED = 100 * DATA_TARGETS[:50] + 3000


@pytest.mark.parametrize(
    ("validation", "num_left"), [(SHIFTED, 50), (DATA_TARGETS, 119)]
)
def test_a_validation_set_from_elsewhere_stays_whole(validation, num_left):
    """It is no set of slips: a split in another unit, which is to be found."""
    options = {
        "data": (DATA_INPUTS, DATA_TARGETS),
        "validation": (DATA_INPUTS[: len(validation)], validation),
        "train_loss_fn": None,
    }
    trial = trial_of(**options)
    assert len(trial.train.args[1][1]) == num_left
    outcome = trial.train(trial.plain, KEY)
    assert np.isfinite(outcome.validation_losses).all()


def test_the_range_is_found_once(monkeypatch):
    asked = []

    def counted(values):
        asked.append(values.shape)
        return inner_range(values)

    monkeypatch.setattr("nnsanity.trials.outlying.inner_range", counted)
    monkeypatch.setattr("nnsanity.trials.data_repairs.inner_range", lambda values: None)
    data = DATA_INPUTS, DATA_TARGETS
    problem = problem_of(data=data, validation=data)
    for rewritten in (problem, problem._replace(usual_loss=True)):
        prepare(rewritten, KEY, num_steps=10, batch_size=8)
        assert len(data_repairs(rewritten)) == 1
        assert "(1 with" in rewritten.size_in_words
    assert asked == [(120, 1)]


def test_targets_that_are_not_compared_all_count():
    problem = problem_of(data=(DATA_INPUTS, DATA_TARGETS))._replace(kind=None)
    assert not problem.left_out(problem.targets).any()
    assert data_repairs(problem) == ()


def test_errors_are_those_of_the_examples_that_count():
    problem = problem_of(data=(DATA_INPUTS, DATA_TARGETS), train_loss_fn=None)
    inputs, targets = (np.delete(one, 5, axis=0) for one in (DATA_INPUTS, DATA_TARGETS))
    found = _errors(problem, SimpleNamespace(params=PARAMS))["constant_baseline"]
    errors = apply_fn(PARAMS, inputs) - targets
    np.testing.assert_allclose(found.constant_error, targets.std(axis=0), rtol=1e-4)
    np.testing.assert_allclose(found.bias, errors.mean(axis=0), rtol=1e-4)


def test_slips_make_no_loss_wrong():
    """Outputs as large as a slip would be rated badly, by a loss that is right."""

    def loss_fn(params, batch):
        outputs = without_head(params, batch[0])
        errors = jnp.clip(outputs - batch[1], -1, 1)
        return jnp.mean(errors**2) + 1e-3 * jnp.mean(outputs**2)

    problem = problem_of(
        apply_fn=without_head,
        loss_fn=loss_fn,
        train_loss_fn=None,
        data=(DATA_INPUTS, DATA_TARGETS),
    )
    flat = jax.tree.map(jnp.zeros_like, PARAMS)
    start = problem._replace(params=flat | {"b": 3 * jnp.ones(1)})
    diagnosis = SimpleNamespace(outcomes=[SimpleNamespace(params=flat)], level=0.0)
    assert perfect_loss(problem, some_examples(problem)) > 100
    assert _wrong_loss(start, diagnosis) == ()


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
