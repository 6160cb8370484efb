"""What seeds and batches make of learning-rate curves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nnsanity.quantities.rate_curves import lr_range, lr_sweep

RNG = np.random.default_rng(0)
STEPS = 40
INPUTS = RNG.normal(size=(STEPS, 8, 3))
TARGETS = INPUTS @ [1.0, -2.0, 0.5] + RNG.normal(size=(STEPS, 8))
BATCHES = np.float32(INPUTS), np.float32(TARGETS)
PARAMS = {"w": jnp.ones(3), "steps": jnp.array(3)}
KEYS = jax.random.split(jax.random.key(1), 3)
SCALES = np.array([1e-3, 0.03, 0.1])


def loss_fn(params, batch):
    return jnp.mean((batch[0] @ params["w"] - batch[1]) ** 2)


def averaged(values):
    """Their running mean over about two steps, as of 40 steps, at the last one."""
    return np.average(values, weights=0.5 ** np.arange(len(values))[::-1])


def trained(scale, order, momentum=0.9):
    """The end of a training in float64, by hand."""
    weights, velocity, losses = np.ones(3), np.zeros(3), []
    for x, y in zip(INPUTS[order], TARGETS[order], strict=True):
        errors = x @ weights - y
        losses.append(np.mean(errors**2))
        velocity = momentum * velocity + 2 * errors @ x / 8
        weights = weights - scale * velocity
    return averaged([*losses, np.mean((x @ weights - y) ** 2)])


@pytest.mark.parametrize("num_parallel", [None, 2, 9, 100])
def test_each_seed_is_a_training_on_shuffled_batches(num_parallel):
    found = lr_sweep(
        loss_fn,
        PARAMS,
        BATCHES,
        optax.sgd(1.0, momentum=0.9),
        scales=SCALES,
        keys=KEYS,
        num_parallel=num_parallel,
    )
    orders = [np.asarray(jax.random.permutation(key, STEPS)) for key in KEYS]
    expected = np.array([[trained(one, order) for one in SCALES] for order in orders])
    np.testing.assert_allclose(found.seed_losses, expected, rtol=1e-3)
    np.testing.assert_allclose(found.losses, expected.mean(0), rtol=1e-3)
    np.testing.assert_allclose(found.spread, expected.std(0, ddof=1), rtol=2e-3)
    assert float(found.best) == pytest.approx(SCALES[expected.mean(0).argmin()])
    assert np.all(np.asarray(found.spread) > 0.05)


@pytest.mark.parametrize("num_parallel", [1, 2, 3])
def test_one_seed_takes_the_batches_as_they_come(num_parallel):
    found = lr_sweep(
        loss_fn,
        PARAMS,
        BATCHES,
        optax.sgd(1.0, momentum=0.9),
        scales=SCALES,
        num_parallel=num_parallel,
    )
    expected = [trained(one, np.arange(STEPS)) for one in SCALES]
    np.testing.assert_allclose(found.losses, expected, rtol=1e-3)
    np.testing.assert_array_equal(found.seed_losses, found.losses[None])
    assert np.isnan(found.spread).all()


def test_one_seed_that_breaks_is_enough():
    """The loss is NaN once the bad batch is met after four good ones."""
    keys = jax.random.split(jax.random.key(0), 8)
    orders = [np.asarray(jax.random.permutation(key, 5)) for key in keys]
    is_bad = np.array([order[-1] == 4 for order in orders])
    assert 0 < is_bad.sum() < 8

    def breaks(seen, is_last):
        return seen + jnp.where(is_last & (seen < -3.5), jnp.nan, 0.0)

    batches, scales = jnp.arange(5) == 4, jnp.array([1.0, 0.1])
    found = lr_sweep(
        breaks, jnp.float32(0), batches, optax.sgd(1.0), scales=scales, keys=keys
    )
    np.testing.assert_array_equal(np.isinf(found.seed_losses[:, 0]), is_bad)
    np.testing.assert_array_equal(found.diverged, [True, False])
    assert np.isinf(found.losses[0])
    assert np.isnan(found.spread[0])
    assert float(found.spread[1]) == pytest.approx(0, abs=1e-6)
    assert float(found.best) == pytest.approx(0.1)


def test_seeds_in_a_compiled_program():
    def measure(params):
        return lr_sweep(
            loss_fn,
            params,
            BATCHES,
            optax.MultiSteps(optax.adam(1.0), 2),
            scales=SCALES,
            keys=jax.random.split(jax.random.PRNGKey(1), 2),
            num_parallel=4,
        )

    found, expected = jax.jit(measure)(PARAMS), measure(PARAMS)
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4)
    assert "callback" not in str(jax.make_jaxpr(measure)(PARAMS))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"keys": 3}, TypeError, "keys must be PRNG keys .*, got 3"),
        ({"keys": jax.random.key(0)}, TypeError, "keys must be .*leading axis"),
        ({"keys": jax.random.PRNGKey(0)}, TypeError, r"keys must be .*uint32\[2\]"),
        ({"keys": KEYS[:0]}, TypeError, r"keys must be .*\[0\]"),
        ({"num_parallel": 0}, ValueError, "num_parallel must be at least 1, got 0"),
        ({"num_parallel": 2.0}, TypeError, "num_parallel must be an int, got 2.0"),
        ({"num_parallel": True}, TypeError, "num_parallel must be an int, got True"),
    ],
)
def test_mistakes(change, error, words):
    with pytest.raises(error, match=f"^lr_sweep: .*{words}"):
        lr_sweep(loss_fn, PARAMS, BATCHES, optax.sgd(1.0), scales=SCALES, **change)


def ramp(losses, slope=0.0):
    """The curve of losses that are given, along a slope."""
    return lr_range(
        lambda params, loss: loss - slope * params,
        jnp.float32(0),
        jnp.asarray(losses, jnp.float32),
        optax.identity(),
        min_scale=1e-8,
        max_scale=1e-7,
    )


def test_spread_of_batches_that_jump_to_and_fro():
    found = ramp(5 + 3 * (-1.0) ** np.arange(STEPS))
    np.testing.assert_allclose(found.spread, 3 * np.sqrt(2), rtol=1e-6)
    # Against averages written out: jumps of 1 and, from step 20 on, of 4.
    losses = np.concatenate([np.arange(20) % 2, 4 * (np.arange(20) % 2)])
    jumps = np.diff(losses, prepend=losses[1]) ** 2 / 2
    expected = [np.sqrt(averaged(jumps[: n + 1])) for n in range(STEPS)]
    np.testing.assert_allclose(ramp(losses).spread, expected, rtol=1e-5)


def test_spread_of_noise_is_its_deviation():
    noise = 100 + 2 * jnp.asarray(RNG.normal(size=(50, 100)), jnp.float32)
    found = jax.vmap(ramp)(noise).spread[:, -1]
    variances = np.asarray(found, np.float64) ** 2
    assert abs(variances.mean() - 4) < 4 * variances.std() / np.sqrt(50)


def test_spread_is_not_finite_where_the_loss_is_not():
    found = ramp(np.where(np.arange(STEPS) < 30, 1.0, np.nan))
    assert np.isfinite(found.spread[:30]).all()
    assert not np.isfinite(found.spread[30:]).any()


def test_a_small_fall_shows_on_a_long_ramp_of_large_losses():
    loss_fn, start = lambda p, b: 30.0 + (p - 1) ** 2, jnp.float32(0)
    limits = {"min_scale": 1e-5, "max_scale": 1e-2}
    found = lr_range(loss_fn, start, jnp.zeros(3000), optax.sgd(1.0), **limits)
    assert not np.any(found.diverged)
    assert 1e-5 < found.steepest < 1e-2
