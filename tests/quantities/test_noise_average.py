import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnsanity.quantities.noise_average import add_noise, averaged_noise, noise_average
from nnsanity.quantities.noise_scale import (
    NoiseScale,
    gradient_noise_scale,
    leaf_noise_scales,
    value_and_grad_with_noise,
)

RNG = np.random.default_rng(0)
PARAMS = {
    "w": jnp.asarray(RNG.normal(size=(3, 5)), jnp.float32),
    "v": jnp.asarray(RNG.normal(size=(5, 2)), jnp.float32),
    "steps": jnp.array(3),
}
INPUTS = jnp.asarray(RNG.normal(size=(12, 3)) + 1, jnp.float32)


def loss_fn(params, x):
    outputs = jnp.tanh(x @ params["w"]) @ params["v"]
    return jnp.mean(jnp.sum(outputs**2, -1)) + 0.1 * jnp.sum(params["v"] ** 2)


def estimate(square_norm, trace):
    return NoiseScale(jnp.nan, jnp.float32(square_norm), jnp.float32(trace), jnp.nan)


@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_numerator_and_denominator_are_averaged_apart(decay):
    norms, traces = RNG.normal(2, 1, 40), RNG.normal(9, 2, 40)
    weights = decay ** np.arange(39, -1, -1.0)
    average = noise_average(estimate(0, 0))
    for pair in zip(norms, traces, strict=True):
        average = add_noise(average, estimate(*pair), decay=decay)
    found = averaged_noise(average)
    norm, trace = (np.average(one, weights=weights) for one in (norms, traces))
    np.testing.assert_allclose(found.gradient_square_norm, norm, 1e-5)
    np.testing.assert_allclose(found.covariance_trace, trace, 1e-5)
    np.testing.assert_allclose(found.noise_scale, trace / norm, 1e-5)
    # The delta method with the covariance of weighted means, as NumPy has it.
    covariance = np.cov(traces, norms, aweights=weights)
    slope = np.array([1 / norm, -trace / norm**2])
    share = np.sum(weights**2) / np.sum(weights) ** 2
    error = np.sqrt(share * slope @ covariance @ slope)
    np.testing.assert_allclose(found.standard_error, error, 1e-4)


def test_the_ratio_of_means_is_right_where_the_mean_of_ratios_is_not():
    """200 trainings of 50 steps whose single estimates are hopeless."""
    keys = jax.random.split(jax.random.key(0), 200)

    def training(key):
        pairs = jnp.array([1.0, 32.0]) + jax.random.normal(key, (50, 2)) * jnp.array(
            [2.0, 8.0]
        )

        def step(average, pair):
            return add_noise(average, estimate(*pair)), None

        average, _ = jax.lax.scan(step, noise_average(estimate(0, 0)), pairs)
        return averaged_noise(average), jnp.mean(pairs[:, 1] / pairs[:, 0])

    found, of_ratios = jax.jit(jax.vmap(training))(keys)
    excess = 4 / 50 * 32  # of a ratio of unbiased numbers: its relative variance
    error = np.std(found.noise_scale) / np.sqrt(200)
    assert abs(np.mean(found.noise_scale) - 32 - excess) < 4 * error + 1
    assert np.median(np.abs(of_ratios - 32)) > np.median(np.abs(found.noise_scale - 32))
    inside = np.abs(found.noise_scale - 32) < 2 * found.standard_error
    assert np.mean(inside) > 0.9


def test_ends():
    empty = noise_average(estimate(0, 0))
    assert np.isnan(averaged_noise(empty)).all()
    one = averaged_noise(add_noise(empty, estimate(2, 6)))
    np.testing.assert_array_equal(one, (3, 2, 6, np.inf))
    lost = averaged_noise(add_noise(add_noise(empty, estimate(-2, 6)), estimate(1, 6)))
    np.testing.assert_array_equal(lost, (np.inf, -0.5, 6, np.inf))
    broken = averaged_noise(add_noise(empty, estimate(np.nan, 6)))
    assert np.isnan(broken.noise_scale)


def test_leaf_by_leaf():
    found = leaf_noise_scales(loss_fn, PARAMS, INPUTS)
    whole = gradient_noise_scale(loss_fn, PARAMS, INPUTS)
    assert found.noise_scale.shape == (2,)  # "steps" has no gradient
    np.testing.assert_allclose(
        sum(found.covariance_trace), whole.covariance_trace, 1e-5
    )
    norms = sum(found.gradient_square_norm)
    np.testing.assert_allclose(norms, whole.gradient_square_norm, 1e-5)
    for index, name in enumerate(["v", "w"]):

        def of_leaf(leaf, x, name=name):
            return loss_fn(PARAMS | {name: leaf}, x)

        alone = gradient_noise_scale(of_leaf, PARAMS[name], INPUTS)
        np.testing.assert_allclose([one[index] for one in found], alone, 1e-4)
    parts = leaf_noise_scales(loss_fn, PARAMS, INPUTS, num_microbatches=4)
    whole = gradient_noise_scale(loss_fn, PARAMS, INPUTS, num_microbatches=4)
    np.testing.assert_allclose(
        sum(parts.covariance_trace), whole.covariance_trace, 1e-5
    )


def test_gradient_and_noise_from_one_pass():
    step = jax.jit(value_and_grad_with_noise(loss_fn))
    (loss, noise), grads = step(PARAMS, INPUTS)
    expected = jax.value_and_grad(loss_fn, allow_int=True)(PARAMS, INPUTS)
    np.testing.assert_allclose(loss, expected[0], 1e-6)
    for name in ("v", "w"):
        assert grads[name].dtype == PARAMS[name].dtype
        np.testing.assert_allclose(grads[name], expected[1][name], 1e-5)
    assert grads["steps"].dtype == jax.dtypes.float0
    whole = gradient_noise_scale(loss_fn, PARAMS, INPUTS)
    np.testing.assert_allclose(noise, whole, 1e-4)


def test_one_backward_pass_and_no_more():
    """As many products as the gradient has, beside those of the norms."""
    text = jax.jit(value_and_grad_with_noise(loss_fn)).lower(PARAMS, INPUTS).compile()
    flops = text.cost_analysis()["flops"]
    plain = jax.jit(jax.value_and_grad(loss_fn, allow_int=True)).lower(PARAMS, INPUTS)
    assert flops < 3 * plain.compile().cost_analysis()["flops"]


def test_average_in_a_jitted_training():
    step = value_and_grad_with_noise(loss_fn)

    @jax.jit
    def train(floats, x):
        def one(state, _):
            floats, average = state
            (loss, noise), grads = step(floats | {"steps": 3}, x)
            grads = {name: grads[name] for name in floats}
            floats = jax.tree.map(lambda p, g: p - 0.01 * g, floats, grads)
            return (floats, add_noise(average, noise, decay=0.9)), loss

        start = noise_average(NoiseScale(*jnp.zeros(4)))
        return jax.lax.scan(one, (floats, start), None, length=8)

    floats = {name: PARAMS[name] for name in ("v", "w")}
    (_, average), losses = train(floats, INPUTS)
    found = averaged_noise(average)
    assert np.all(np.diff(losses) < 0)
    assert 0 < found.noise_scale < np.inf
    assert found.standard_error > 0
