import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nnsanity.checks.learning_rate import (
    judge_outliers,
    outlier_examples,
    update_ratios,
)
from nnsanity.checks.regularization import (
    generalization_gap,
    penalty_pull,
    weight_decay,
)
from nnsanity.quantities.training_noise import noise

RNG = np.random.default_rng(0)
PARAMS = {"w": jnp.array([3.0, -4.0]), "b": jnp.zeros(2), "n": jnp.array(3)}


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (optax.adamw(0.01, weight_decay=0.1), 1e-3),
        (optax.chain(optax.add_decayed_weights(0.2), optax.sgd(0.1)), 0.02),
        (optax.MultiSteps(optax.adamw(0.01, weight_decay=0.1), 4), 2.5e-4),
        (optax.adam(0.01), 0),
        (optax.sgd(0.1, momentum=0.9), 0),
        (optax.chain(optax.clip(1.0), optax.lion(0.1, weight_decay=0.3)), 0.03),
        # L2 in front of Adam: a step of 0.1 against every weight, times 16 / 16.
        (optax.chain(optax.add_decayed_weights(0.2), optax.adam(0.1)), 0.1 * 7 / 25),
    ],
)
def test_decay_of_any_optimizer(optimizer, expected):
    found = weight_decay(optimizer, PARAMS)
    assert found.shape == (2,)
    np.testing.assert_allclose(found, [0, expected], rtol=1e-4)


def test_decay_of_some_parameters():
    masked = optax.adamw(0.1, weight_decay=0.1, mask={"w": True, "b": False, "n": None})
    params = {"w": jnp.ones(3), "b": jnp.ones(3), "n": None}
    np.testing.assert_allclose(weight_decay(masked, params), [0, 0.01], rtol=1e-5)


def test_noise_of_a_known_law():
    """The loss is w . e with e normal: gradients are the noise itself."""
    weights = jnp.array([3.0, 4.0])

    def train_loss_fn(params, batch, key):
        return params @ (batch + jax.random.normal(key, (2,)))

    keys = jax.random.split(jax.random.key(0), 200)
    measure = jax.vmap(lambda key: noise(train_loss_fn, weights, jnp.ones(2), key=key))
    found = jax.jit(measure)(keys)
    for values, truth in (
        (found.loss, 7),
        (found.loss_deviation**2, 25),
        (found.gradient_square_norm, 2),
        (found.gradient_variance, 2),
    ):
        error = np.std(values) / np.sqrt(200)
        assert abs(np.mean(values) - truth) < 4 * error


def test_no_noise():
    loss_fn = lambda p, x, key: jnp.mean((x @ p["w"]) ** 2)  # noqa: E731
    found = noise(loss_fn, PARAMS, jnp.ones((4, 2)), key=jax.random.key(0))
    assert found.loss_deviation == 0
    assert abs(found.gradient_variance) < 1e-10
    np.testing.assert_allclose(found.gradient_square_norm, 8, 1e-5)
    with pytest.raises(ValueError, match=r"^noise: loss_fn must return a scalar"):
        noise(lambda p, x, key: x, PARAMS, jnp.ones(3), key=jax.random.key(0))


@pytest.mark.parametrize("scale", [0.0, 0.1, 10.0])
def test_pull_of_a_penalty(scale):
    inputs = jnp.asarray(RNG.normal(size=(6, 2)), jnp.float32)

    def data(params, x):
        return jnp.mean((x @ params["w"] - 1) ** 2)

    def loss_fn(params, x):
        return data(params, x) + scale * (jnp.sum(params["w"] ** 2) if scale else 0.0)

    gradient = np.asarray(jax.grad(lambda w: data({"w": w}, inputs))(PARAMS["w"]))
    expected = 2 * scale * 5 / np.linalg.norm(gradient)
    found = penalty_pull(loss_fn, PARAMS, inputs)
    np.testing.assert_allclose(found, expected, 1e-4, 1e-6)


def test_only_the_penalty_pulls():
    loss_fn = lambda p, x: jnp.mean(x) + jnp.sum(p["w"] ** 2)  # noqa: E731
    assert penalty_pull(loss_fn, PARAMS, jnp.ones(3)) == jnp.inf


def test_gap_within_its_own_error_bar():
    """Losses of training and validation differ by 0.5 in the mean."""
    loss_fn = lambda p, x: jnp.mean(p * x)  # noqa: E731

    def draw(key):
        one, two = jax.random.normal(key, (2, 40))
        return generalization_gap(loss_fn, 1.0, one, 2 * two[:20] + 0.5)

    found = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(1), 500))
    distance = np.abs(found.gap - 0.5) / found.standard_error
    assert 0.9 < np.mean(distance < 2) < 0.98
    error = np.sqrt(1 / 40 + 4 / 20)
    np.testing.assert_allclose(np.sqrt(np.mean(found.standard_error**2)), error, 0.03)


def test_gap_refuses_what_it_can_not_measure():
    loss_fn = lambda p, x: jnp.mean(p * x)  # noqa: E731
    with pytest.raises(ValueError, match=r"^generalization_gap: validation has one"):
        generalization_gap(loss_fn, 1.0, jnp.ones(3), jnp.ones(1))
    coupled = lambda p, x: jnp.mean((p * x - jnp.mean(p * x)) ** 2)  # noqa: E731
    with pytest.raises(ValueError, match=r"^generalization_gap: the examples"):
        generalization_gap(coupled, 1.0, jnp.ones(3), jnp.ones(3))


def test_update_ratios():
    updates = {"w": jnp.array([0.3, 0.4]), "b": jnp.ones(2), "n": jnp.array(0)}
    np.testing.assert_allclose(update_ratios(updates, PARAMS), [np.inf, 0.1], 1e-6)
    still = jax.tree.map(jnp.zeros_like, PARAMS)
    np.testing.assert_array_equal(update_ratios(still, PARAMS), [0, 0])
    broken = updates | {"b": jnp.array([jnp.nan, 1])}
    assert np.isnan(update_ratios(broken, PARAMS)[0])
    with pytest.raises(ValueError, match=r"^update_ratios: .*\(3,\)"):
        update_ratios({"w": jnp.ones(3)}, {"w": jnp.ones(2)})


def test_outliers():
    norms = np.ones(300)
    norms[[7, 200, 31]] = [50, 90, 40]
    found = outlier_examples(jnp.asarray(norms))
    assert found.indices.tolist() == [200, 7, 31]
    squares = 2500 + 8100 + 1600
    np.testing.assert_allclose(found.share, squares / (squares + 297), 1e-5)
    (finding,) = judge_outliers(found, 300)
    assert finding.where == "examples 200, 7, 31"
    assert judge_outliers(found, 99) == ()


@pytest.mark.parametrize(
    "norms", [np.ones(300), np.zeros(300), RNG.lognormal(size=300)]
)
def test_healthy_norms_stay_silent(norms):
    assert judge_outliers(outlier_examples(jnp.asarray(norms)), 300) == ()


def test_a_gradient_that_is_nan_alarms():
    found = outlier_examples(jnp.ones(300).at[5].set(jnp.nan))
    assert found.indices[0] == 5
    assert judge_outliers(found, 300)
