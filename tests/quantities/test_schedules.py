import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nnsanity.checks.learning_rate import decays_early
from nnsanity.quantities.schedules import held, schedule_of

PARAMS = {"w": jnp.full((3, 5), 0.5), "b": jnp.zeros(5), "n": jnp.int32(3)}
FLOATS = {"w": jnp.full((3, 5), 0.5), "b": jnp.zeros(5)}
STEPS = 40
HALVED = optax.exponential_decay(0.1, 5, 0.5)
WARM = optax.warmup_cosine_decay_schedule(0.0, 0.1, 8, STEPS)


def rate_of(schedule):
    return np.array([float(schedule(step)) for step in range(STEPS)])


SCHEDULED = {
    "sgd": (optax.sgd(HALVED), rate_of(HALVED)),
    "adam": (optax.adam(HALVED), rate_of(HALVED)),
    "adamw, warm-up": (optax.adamw(WARM, weight_decay=0.0), rate_of(WARM)),
    "clipped": (optax.chain(optax.clip(0.1), optax.sgd(WARM)), rate_of(WARM)),
    "hyperparameters": (
        optax.inject_hyperparams(optax.sgd)(learning_rate=HALVED),
        rate_of(HALVED),
    ),
    "by parameter": (
        optax.partition(
            {"w": optax.sgd(HALVED), "b": optax.sgd(HALVED)}, {"w": "w", "b": "b"}
        ),
        rate_of(HALVED),
    ),
    "accumulated": (
        optax.MultiSteps(optax.sgd(HALVED), 4).gradient_transformation(),
        np.where(np.arange(STEPS) % 4 == 3, rate_of(HALVED)[np.arange(STEPS) // 4], 0),
    ),
}


def shares_of(optimizer, num_steps=STEPS):
    return np.asarray(schedule_of(optimizer, FLOATS, num_steps=num_steps).shares)


@pytest.mark.parametrize("name", SCHEDULED)
def test_shares_are_those_of_the_schedule(name):
    optimizer, rates = SCHEDULED[name]
    found = shares_of(optimizer)
    np.testing.assert_array_equal(np.isfinite(found), rates > 0)
    expected = np.where(rates > 0, rates / rates.max(), np.nan)
    expected[: np.argmax(rates)][rates[: np.argmax(rates)] > 0] = 1  # not held yet
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.1, momentum=0.9),
        optax.adamw(1e-3),
        optax.chain(optax.clip_by_global_norm(1.0), optax.lamb(1e-3)),
        optax.MultiSteps(optax.adam(1e-3), 4).gradient_transformation(),
        optax.adagrad(0.1),
    ],
)
def test_without_a_schedule_nothing_is_run(optimizer):
    assert schedule_of(optimizer, PARAMS, num_steps=STEPS) is None


@pytest.mark.parametrize("name", SCHEDULED)
def test_held_schedules_stay_where_they_are_largest(name):
    optimizer, rates = SCHEDULED[name]
    stops = schedule_of(optimizer, FLOATS, num_steps=STEPS).counts
    after = shares_of(held(optimizer, stops))
    peak = int(np.argmax(rates))
    later = after[peak:]
    assert np.isfinite(later).sum() >= len(later) // 4
    np.testing.assert_allclose(later[np.isfinite(later)], 1, rtol=1e-3)


def test_held_adam_keeps_its_own_count():
    """Its correction of the moments' start at zero would be wrong otherwise."""
    optimizer = optax.adam(HALVED)
    stopped = held(optimizer, schedule_of(optimizer, FLOATS, num_steps=STEPS).counts)
    plain, grads = optax.adam(0.1), jax.tree.map(jnp.ones_like, FLOATS)
    states = stopped.init(FLOATS), plain.init(FLOATS)
    for step in range(10):
        grads = jax.tree.map(lambda one: -0.7 * one, grads)
        (ours, mine), (theirs, other) = (
            one.update(grads, state, FLOATS)
            for one, state in zip((stopped, plain), states, strict=True)
        )
        states = mine, other
        np.testing.assert_allclose(ours["w"], theirs["w"], rtol=1e-6, err_msg=step)


WHOLE, SHORT = (optax.cosine_decay_schedule(0.1, steps) for steps in (300, 8))
HEALTHY = {
    "constant": optax.sgd(optax.constant_schedule(0.1), 0.9),
    "cosine": optax.adam(WHOLE),
    "linear": optax.sgd(optax.linear_schedule(1.0, 0.0, 300)),
    "to a hundredth": optax.adamw(optax.exponential_decay(1.0, 300, 0.01)),
    "in three stairs": optax.sgd(
        optax.piecewise_constant_schedule(1.0, {100: 0.1, 200: 0.1}), 0.9
    ),
    "a long warm-up": optax.adam(optax.linear_schedule(0.0, 1.0, 300)),
    "a warm-up that ends after the training": optax.adam(
        optax.linear_schedule(0.0, 1.0, 20_000)
    ),
    "every 16th step": optax.MultiSteps(
        optax.adam(WHOLE), 16
    ).gradient_transformation(),
    "no step at all": optax.MultiSteps(
        optax.adam(WHOLE), 400
    ).gradient_transformation(),
    "a rate of nothing": optax.sgd(optax.constant_schedule(0.0)),
    # Their updates by one gradient shrink by themselves.
    "adagrad": optax.adagrad(optax.constant_schedule(0.1)),
    "adagrad, cosine": optax.adagrad(WHOLE),
    "rmsprop, cosine": optax.rmsprop(WHOLE, decay=0.99),
    "plateau": optax.chain(
        optax.adam(optax.linear_schedule(0.0, 1e-2, 10)),
        optax.contrib.reduce_on_plateau(patience=5, factor=0.5),
    ),
}
FAULTY = {
    "halved every other step": optax.sgd(optax.exponential_decay(1.0, 2, 0.5)),
    "steps taken for epochs": optax.adam(SHORT),
    "the same behind a clip": optax.chain(optax.clip(0.1), optax.adamw(SHORT)),
    "the same in rmsprop": optax.rmsprop(SHORT, decay=0.99),
    "the same as a hyperparameter": optax.inject_hyperparams(optax.adam)(SHORT),
}


@pytest.mark.parametrize("name", [*HEALTHY, *FAULTY])
def test_what_ends_early_is_suspected(name):
    finding = decays_early(shares_of((HEALTHY | FAULTY)[name], 300))
    assert (finding is not None) == (name in FAULTY)


def test_the_numbers_of_the_finding():
    # 0.5 ** (step / 2): under a tenth from step 7 on, and 1 / (1 - 0.5 ** 0.5) in sum.
    finding = decays_early(shares_of(FAULTY["halved every other step"], 300))
    assert "from step 7 of 300 on" in finding.message
    assert finding.measured == pytest.approx(1 / (1 - 0.5**0.5) / 300, rel=1e-3)
    assert "1.14% of their largest on average" in finding.message


def test_parameters_that_are_no_numbers():
    found = schedule_of(optax.adam(SHORT), PARAMS, num_steps=STEPS)
    assert found.shares[0] == 1
