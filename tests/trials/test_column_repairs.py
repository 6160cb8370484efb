"""How a suspected column is encoded on a copy: as several columns, or as one number."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nnsanity.tracing.layers import inspect
from nnsanity.trials.data_repairs import (
    MAX_EXPANDED,
    column_suspicions,
    data_repairs,
)
from nnsanity.trials.problem import checked_problem
from nnsanity.trials.trial import prepare

RNG = np.random.default_rng(0)
SIZE = 600
CODES = 3 * RNG.integers(0, 20, SIZE)
HOURS = RNG.uniform(0, 240, SIZE)
OTHER = RNG.normal(size=SIZE)
MEANS = RNG.normal(size=60)


def dense(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def masked(params, x):
    return jnp.tanh(x @ (params["w"] * jnp.ones(8).at[0].set(0))) @ params["v"]


def problem_of(apply_fn, columns, targets, optimizer=None, loss_fn=None):
    inputs = np.stack(columns, axis=1).astype(np.float32)
    targets = targets if loss_fn else targets[:, None].astype(np.float32)
    width = int(targets.max()) + 1 if loss_fn else 1
    params = {
        "w": jnp.asarray(RNG.normal(size=(len(columns), 8)), jnp.float32),
        "v": jnp.asarray(RNG.normal(size=(8, width)), jnp.float32),
    }
    return checked_problem(
        apply_fn,
        loss_fn or (lambda p, b: jnp.mean((apply_fn(p, b[0]) - b[1]) ** 2)),
        params,
        (inputs, targets),
        key=jax.random.key(0),
        optimizer=optimizer,
        batch_size=32,
        num_steps=10,
    )


def names(problem):
    return [one.name for one in data_repairs(problem)]


@pytest.mark.parametrize(
    ("apply_fn", "code", "cycle"),
    [
        (
            dense,
            "feeding feature 0 one-hot",
            "feeding feature 0 as its sine and cosine",
        ),
        (
            masked,
            "putting the mean target of each value in the place of feature 0",
            "putting a sine of it in the place of feature 0",
        ),
    ],
)
def test_what_is_done_is_said(apply_fn, code, cycle):
    assert names(problem_of(apply_fn, [CODES, OTHER], MEANS[CODES])) == [code]
    daily = np.sin(2 * np.pi * HOURS / 24)
    assert names(problem_of(apply_fn, [HOURS, OTHER], daily)) == [cycle]
    assert names(problem_of(apply_fn, [OTHER, OTHER**2], OTHER)) == []


def test_a_few_columns_get_programs_of_their_own():
    columns = [RNG.integers(0, 20, SIZE) for _ in range(MAX_EXPANDED + 1)]
    found = names(problem_of(dense, columns, sum(MEANS[one] for one in columns)))
    is_one_hot = [name.endswith("one-hot") for name in found]
    assert is_one_hot == [True] * MAX_EXPANDED + [False]


def test_the_copy_starts_from_the_user_s_program_without_the_column():
    problem = problem_of(dense, [CODES, OTHER], MEANS[CODES], optax.sgd(0.1))
    (repair,) = data_repairs(problem)
    trial = prepare(
        repair.rewrite(problem), jax.random.key(1), num_steps=10, batch_size=32
    )
    copy = repair.change(trial.plain, jax.random.key(2))
    assert copy.params["w"].shape == (2 + 20, 8)
    outcome = trial.train(copy, jax.random.key(3))
    rows = trial.train.args[-1][1]
    inputs = problem.inputs.at[:, 0].set(0)[rows]
    start = problem.loss_fn(problem.params, (inputs, problem.targets[rows]))
    np.testing.assert_allclose(outcome.losses[0], start, rtol=1e-4)
    assert np.abs(outcome.params["w"][2:]).max() > 0
    np.testing.assert_array_equal(outcome.params["w"][0], problem.params["w"][0])


def class_problem(columns, classes):
    def loss_fn(params, batch):
        logits = dense(params, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    return problem_of(dense, columns, classes, loss_fn=loss_fn)


@pytest.mark.parametrize("num_classes", [3, 10])
def test_a_code_that_decides_one_of_many_classes(num_classes):
    """Of balanced classes each direction holds a small part of what they vary."""
    codes, number = RNG.integers(0, 40, (2, SIZE))
    class_of = RNG.permutation(np.arange(40) % num_classes)
    columns = [number, OTHER, codes]
    found = column_suspicions(class_problem(columns, class_of[codes]))
    assert [(one.rule, one.where) for one in found] == [
        ("preprocessing/categorical-code", "inputs, feature 2")
    ]


def test_a_number_that_decides_one_of_many_classes():
    number = RNG.integers(0, 40, SIZE)
    assert column_suspicions(class_problem([number, OTHER], number // 4)) == ()


def test_chance_among_many_directions_makes_no_code():
    for _ in range(10):
        number, few, classes = (RNG.integers(0, most, SIZE) for most in (70, 20, 12))
        assert column_suspicions(class_problem([number, few], classes)) == ()


def test_the_program_is_read_once_for_all_columns(monkeypatch):
    read = []

    def counted(function, *args):
        read.append(function)
        return inspect(function, *args)

    monkeypatch.setattr("nnsanity.trials.data_repairs.inspect", counted)
    columns = [RNG.integers(0, 20, SIZE) for _ in range(3)]
    problem = problem_of(dense, columns, sum(MEANS[one] for one in columns))
    assert len(data_repairs(problem)) == 3
    assert len(read) == 1
    assert data_repairs(problem_of(dense, [OTHER, OTHER**2], OTHER)) == ()
    assert len(read) == 1
