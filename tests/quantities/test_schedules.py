import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nnsanity.checks.learning_rate import decays_early
from nnsanity.quantities.schedules import held_at_its_peak, schedule_of

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


@pytest.mark.parametrize("name", SCHEDULED)
def test_sizes_are_those_of_the_schedule(name):
    optimizer, rates = SCHEDULED[name]
    found = schedule_of(optimizer, FLOATS, num_steps=STEPS)
    np.testing.assert_allclose(found.sizes, rates / rates.max(), rtol=1e-3, atol=1e-6)


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
def test_held_updates_stay_at_their_largest(name):
    optimizer, rates = SCHEDULED[name]
    found = schedule_of(optimizer, FLOATS, num_steps=STEPS)
    held = held_at_its_peak(optimizer, found)
    after = np.asarray(schedule_of(held, FLOATS, num_steps=STEPS).sizes)
    peak = int(np.argmax(rates))
    np.testing.assert_allclose(after[:peak], rates[:peak] / rates.max(), rtol=1e-3)
    later = after[peak:]
    np.testing.assert_allclose(later[later > 0], 1, rtol=1e-3)
    assert (later > 0).sum() >= len(later) // 4


def test_held_adam_keeps_its_own_count():
    """Its correction of the moments' start at zero would be wrong otherwise."""
    optimizer = optax.adam(HALVED)
    held = held_at_its_peak(optimizer, schedule_of(optimizer, FLOATS, num_steps=STEPS))
    plain, grads = optax.adam(0.1), jax.tree.map(jnp.ones_like, FLOATS)
    states = held.init(FLOATS), plain.init(FLOATS)
    for step in range(10):
        grads = jax.tree.map(lambda one: -0.7 * one, grads)
        (ours, mine), (theirs, other) = (
            one.update(grads, state, FLOATS)
            for one, state in zip((held, plain), states, strict=True)
        )
        states = mine, other
        np.testing.assert_allclose(ours["w"], theirs["w"], rtol=1e-6, err_msg=step)


HEALTHY = {
    "constant": np.ones(STEPS),
    "cosine": rate_of(optax.cosine_decay_schedule(1.0, STEPS)),
    "linear": rate_of(optax.linear_schedule(1.0, 0.0, STEPS)),
    "to a hundredth": rate_of(optax.exponential_decay(1.0, STEPS, 0.01)),
    "in three stairs": rate_of(
        optax.piecewise_constant_schedule(1.0, {STEPS // 3: 0.1, 2 * STEPS // 3: 0.1})
    ),
    "a long warm-up": rate_of(optax.linear_schedule(0.0, 1.0, STEPS)),
    "every 16th step": np.arange(STEPS) % 16 == 15,
}
FAULTY = {
    "halved every other step": rate_of(optax.exponential_decay(1.0, 2, 0.5)),
    "steps taken for epochs": rate_of(optax.cosine_decay_schedule(1.0, 3)),
}


@pytest.mark.parametrize("name", [*HEALTHY, *FAULTY])
def test_what_ends_early_is_suspected(name):
    sizes = (HEALTHY | FAULTY)[name]
    finding = decays_early(sizes)
    assert (finding is not None) == (name in FAULTY)


def test_the_step_from_which_on_updates_are_small():
    # 0.5 ** (step / 2): under a tenth from step 7 on, and 1 / (1 - 0.5 ** 0.5) in sum.
    finding = decays_early(FAULTY["halved every other step"])
    assert "After 7 of 40 steps" in finding.message
    assert finding.measured == pytest.approx(1 / (1 - 0.5**0.5) / 40, rel=1e-5)
