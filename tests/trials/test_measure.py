import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nnsanity.trials.inside import measure_network
from nnsanity.trials.measure import (
    constant_loss,
    output_size,
    perfect_loss,
    some_examples,
    wants_other_units,
)
from nnsanity.trials.problem import checked_problem

RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(60, 3)).astype(np.float32)
LABELS = (RNG.uniform(size=60) * 2.99).astype(np.int32)
HALVES = (RNG.uniform(size=60) < 0.3).astype(np.float32)
NUMBERS = RNG.normal(size=(60, 2)).astype(np.float32) * 3 + 4
KEY = jax.random.key(0)


def params_for(units):
    shape = (3, units)
    return {"w": jnp.asarray(RNG.normal(size=shape), jnp.float32), "b": jnp.ones(units)}


def network(activation):
    return lambda params, x: activation(x @ params["w"] + params["b"])


def problem_of(apply_fn, loss_of, params, targets, inputs=INPUTS):
    return checked_problem(
        apply_fn,
        lambda params, batch: loss_of(apply_fn(params, batch[0]), batch[1]),
        params,
        (inputs, targets),
        key=KEY,
        optimizer=None,
        batch_size=4,
        num_steps=5,
    )


def squared(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def clipped_log_loss(outputs, targets):
    p = jnp.clip(outputs[:, 0], 1e-6, 1 - 1e-6)
    return -jnp.mean(targets * jnp.log(p) + (1 - targets) * jnp.log1p(-p))


def logit_log_loss(outputs, targets):
    return optax.sigmoid_binary_cross_entropy(outputs[:, 0], targets).mean()


def entropy(values):
    shares = np.unique(values, return_counts=True)[1] / len(values)
    return -(shares * np.log(shares)).sum()


def identity(x):
    return x


def two_steps(x):
    return jnp.squeeze(x[:, None], 1)


CASES = {
    "squared error": (identity, squared, 2, NUMBERS, NUMBERS.var(axis=0).mean()),
    "reshaped head": (two_steps, squared, 2, NUMBERS, NUMBERS.var(axis=0).mean()),
    "squared error of tanh": (
        jnp.tanh,
        squared,
        2,
        NUMBERS,
        NUMBERS.var(axis=0).mean(),
    ),
    "cross entropy of labels": (identity, cross_entropy, 3, LABELS, entropy(LABELS)),
    "log loss of a sigmoid": (
        jax.nn.sigmoid,
        clipped_log_loss,
        1,
        HALVES,
        entropy(HALVES),
    ),
    "log loss of a logit": (identity, logit_log_loss, 1, HALVES, entropy(HALVES)),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    activation, loss_of, units, targets, expected = CASES[request.param]
    problem = problem_of(network(activation), loss_of, params_for(units), targets)
    return problem, expected


def test_constant_loss(case):
    problem, expected = case
    value = constant_loss(problem, some_examples(problem))
    assert value == pytest.approx(expected, rel=1e-4)


def test_perfect_loss(case):
    problem, _ = case
    assert perfect_loss(problem, some_examples(problem)) == pytest.approx(0, abs=1e-5)


def test_a_loss_of_the_wrong_sign_rates_the_flattest_truth_best():
    def loss_of(outputs, targets):
        return -cross_entropy(outputs, targets)

    problem = problem_of(network(identity), loss_of, params_for(3), LABELS)
    share = math.exp(1) / (math.exp(1) + 2)  # of the truth, for logits of 1 and 0
    value = perfect_loss(problem, some_examples(problem))
    assert value == pytest.approx(math.log(share), rel=1e-5)


@pytest.mark.parametrize("measure", [constant_loss, perfect_loss])
def test_unknown_where_outputs_and_targets_do_not_meet(measure):
    def loss_of(outputs, targets):
        return jnp.mean(outputs) - jnp.mean(targets)

    problem = problem_of(network(identity), loss_of, params_for(3), NUMBERS)
    assert problem.kind is None
    assert math.isnan(measure(problem, some_examples(problem)))


def test_unknown_where_the_head_is_no_layer():
    problem = problem_of(
        lambda params, x: x * params, squared, jnp.ones(3), INPUTS * 2 + 1
    )
    assert problem.head is None
    assert math.isnan(constant_loss(problem, some_examples(problem)))


def test_measure_network_against_a_gradient_by_hand():
    params = params_for(2) | {"step": jnp.int32(7)}
    params["b"] = jnp.array([1.0, -99.0])
    problem = problem_of(network(jax.nn.relu), squared, params, NUMBERS)
    measured = measure_network(problem, some_examples(problem))
    x, w, y = (np.asarray(one, np.float64) for one in (INPUTS, params["w"], NUMBERS))
    before = x @ w + np.array([1.0, -99.0])
    residual = np.maximum(before, 0) - y
    assert measured.loss == pytest.approx((residual**2).mean(), rel=1e-5)
    passed = 2 / residual.size * residual * (before > 0)
    norms = [np.linalg.norm(passed.sum(axis=0)), np.linalg.norm(x.T @ passed)]
    np.testing.assert_allclose(measured.gradients.norm, norms, rtol=1e-4)
    (dead,) = measured.dead_units.dead.values()
    assert dead.tolist() == [False, True]
    gain = math.sqrt((w**2).mean() * 3)
    np.testing.assert_allclose(measured.weights.gain, [gain], rtol=1e-5)


def test_output_size():
    problem = problem_of(network(jnp.tanh), squared, params_for(2), NUMBERS)
    weights = np.asarray(problem.params["w"], np.float64)
    outputs = np.tanh(INPUTS.astype(np.float64) @ weights + 1)
    expected = math.sqrt((outputs**2).mean())
    assert output_size(problem, INPUTS) == pytest.approx(expected, rel=1e-5)


def test_a_thousand_examples_at_most():
    inputs = np.arange(3000, dtype=np.float32).reshape(1500, 2)
    problem = problem_of(
        lambda params, x: x @ params, squared, jnp.ones((2, 1)), inputs[:, :1], inputs
    )
    batch = some_examples(problem)
    assert [leaf.shape for leaf in batch] == [(1000, 2), (1000, 1)]
    np.testing.assert_array_equal(batch[0], inputs[:1000])


POSITIVE = NUMBERS - NUMBERS.min() + 1
OTHER_UNITS = {
    "times 255": lambda outputs, targets: squared(255 * outputs, targets),
    "standardized inside": lambda outputs, targets: squared(
        outputs, (targets - POSITIVE.mean(axis=0)) / POSITIVE.std(axis=0)
    ),
    "logarithms": lambda outputs, targets: squared(jnp.exp(outputs), targets),
}
SAME_UNITS = {
    "squares": squared,
    "absolute": lambda outputs, targets: jnp.mean(jnp.abs(outputs - targets)),
    "flipped sign": lambda outputs, targets: -squared(outputs, targets),
    "one-sided": lambda outputs, targets: (
        -jnp.mean(targets * jnp.log(jnp.clip(outputs, 1e-10, 1)))
    ),
    "blind": lambda outputs, targets: 0.0 * squared(outputs, targets),
}


@pytest.mark.parametrize("name", [*OTHER_UNITS, *SAME_UNITS])
def test_units_of_the_outputs(name):
    loss_of = OTHER_UNITS.get(name) or SAME_UNITS[name]
    apply_fn = network(lambda x: x)
    problem = problem_of(apply_fn, loss_of, params_for(2), POSITIVE)
    found = wants_other_units(problem, some_examples(problem))
    assert found == (name in OTHER_UNITS)
