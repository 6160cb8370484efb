import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnsanity.checks.results import judge_dependence
from nnsanity.quantities.dependence import example_independence, input_dependence

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
INPUTS = jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32)
WEIGHTS = jnp.asarray(RNG.normal(size=(3, 2)), jnp.float32)


def plain(w, x):
    return jnp.tanh(x @ w)


MIXING = {
    "rolled": lambda w, x: jnp.roll(plain(w, x), 1, axis=0),
    "softmax over the batch": lambda w, x: jax.nn.softmax(x @ w, axis=0),
    "normalized": lambda w, x: x @ w - jnp.mean(x @ w, axis=0),
    "reshaped": lambda w, x: plain(w, x.T.reshape(6, 3)),
    "attention over the batch": lambda w, x: jax.nn.softmax(x @ x.T) @ x @ w,
}


def by_jacobian(apply_fn, w, x):
    jacobian = jax.jacobian(apply_fn, argnums=1)(w, x)
    return np.sqrt(np.sum(np.asarray(jacobian, np.float64) ** 2, axis=(1, 3)))


@pytest.mark.parametrize("name", MIXING)
def test_mixing_against_the_jacobian(name):
    apply_fn = MIXING[name]
    found = example_independence(apply_fn, WEIGHTS, INPUTS)
    expected = by_jacobian(apply_fn, WEIGHTS, INPUTS)
    np.testing.assert_allclose(found.influence, expected, rtol=1e-4, atol=1e-6)
    assert found.mixing > 0.01


def test_independent_examples_do_not_mix():
    found = example_independence(plain, WEIGHTS, INPUTS)
    expected = by_jacobian(plain, WEIGHTS, INPUTS)
    np.testing.assert_allclose(found.influence, expected, rtol=1e-4, atol=1e-6)
    assert found.mixing == 0
    softmax = lambda w, x: jax.nn.softmax(x @ w)  # noqa: E731
    assert example_independence(softmax, WEIGHTS, INPUTS).mixing == 0


def test_trees_of_inputs_and_outputs():
    def apply_fn(w, x):
        return {"a": plain(w, x["x"]), "b": x["x"][x["next"], 0]}

    inputs = {"x": INPUTS, "next": jnp.array([0, 1, 3, 3, 4, 5])}
    found = example_independence(apply_fn, WEIGHTS, inputs)
    assert np.argwhere(np.asarray(found.influence) > 0).tolist() == sorted(
        [[one, one] for one in range(6)] + [[2, 3]]
    )


def test_nan_mixes():
    apply_fn = lambda w, x: x / jnp.sqrt(jnp.sum(0 * x))  # noqa: E731
    assert not example_independence(apply_fn, WEIGHTS, INPUTS).mixing <= 0


@pytest.mark.parametrize(
    ("apply_fn", "inputs", "words"),
    [
        (lambda w, x: w[x], jnp.array([0, 1]), "floating-point.*int32.*embedding"),
        (lambda w, x: jnp.sum(x, axis=0), INPUTS, r"leading axis: 6 .*\(3,\)"),
    ],
)
def test_what_can_not_be_asked(apply_fn, inputs, words):
    with pytest.raises(ValueError, match=words):
        example_independence(apply_fn, WEIGHTS, inputs)


def loss_fn(w, batch):
    return jnp.mean((batch[0] * w - batch[1]) ** 2)


@pytest.mark.parametrize(("w", "uses"), [(1.0, True), (0.0, False)])
def test_what_a_network_makes_of_its_inputs(w, uses):
    x = jnp.asarray(RNG.normal(size=200), jnp.float32)
    found = input_dependence(loss_fn, jnp.float32(w), (x, x), key=KEY)
    assert found.loss == pytest.approx((1 - w) ** 2 * float(jnp.mean(x**2)), abs=1e-6)
    # With permuted inputs the two are independent: E (w x - y)^2 for centred x, y.
    expected = float((1 + w**2) * jnp.mean(x**2) - 2 * w * jnp.mean(x) ** 2)
    error = 4 * float(found.permuted_deviation) / 4 + 1e-6
    assert abs(float(found.permuted_loss) - expected) < error
    assert (found.z_score > 4) == uses
    assert bool(judge_dependence(float(found.z_score))) != uses


def test_shuffled_inputs_and_nan_alarm():
    x = jnp.asarray(RNG.normal(size=200), jnp.float32)
    shuffled = jax.random.permutation(KEY, x)
    found = input_dependence(loss_fn, jnp.float32(1), (x, shuffled), key=KEY)
    assert abs(found.z_score) < 4
    spoiled = input_dependence(loss_fn, jnp.float32(jnp.nan), (x, x), key=KEY)
    assert judge_dependence(float(spoiled.z_score))


def test_one_example_has_no_other():
    with pytest.raises(ValueError, match="at least 2 examples"):
        input_dependence(loss_fn, jnp.float32(1), (INPUTS[:1], INPUTS[:1]), key=KEY)
