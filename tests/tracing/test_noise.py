"""Random numbers in a program: how much they drop, and whether they are noise."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import nnsanity as ns
from nnsanity.tracing.bounds import read
from nnsanity.tracing.noise import noise_at_evaluation

KEY = jax.random.key(0)
BATCH = jnp.ones((200, 30))


def by_uniform(x, key):
    return x * (jax.random.uniform(key, x.shape) > 0.2) / 0.8


def by_its_opposite(x, key):
    return x * (1 - jax.random.bernoulli(key, 0.35, x.shape).astype(x.dtype))


def by_where(x, key):
    return jnp.where(~jax.random.bernoulli(key, 0.9, x.shape), 0.0, x / 0.9)


def another_range(x, key):
    return jnp.where(jax.random.uniform(key, x.shape, minval=-1, maxval=3) < 2, x, 0)


def whole_channels(x, key):
    return x * jax.random.bernoulli(key, 0.5, (1, x.shape[1]))


def within_jit(x, key):
    return jax.jit(by_uniform)(x, key)


def within_a_scan(x, key):
    step = lambda h, key: (h * jax.random.bernoulli(key, 0.75, h.shape), None)  # noqa: E731
    return jax.lax.scan(step, x, key[None])[0]


def by_linen(x, key):
    return linen.Dropout(0.3, deterministic=False).apply({}, x, rngs={"dropout": key})


def by_nnx(x, key):
    return nnx.Dropout(0.15, deterministic=False)(x, rngs=nnx.Rngs(dropout=key))


def by_equinox(x, key):
    import equinox as eqx

    keys = jax.random.split(key, len(x))
    return jax.vmap(lambda row, key: eqx.nn.Dropout(0.4)(row, key=key))(x, keys)


RATES = {
    by_uniform: 0.2,
    by_its_opposite: 0.35,
    by_where: 0.1,
    another_range: 0.25,
    whole_channels: 0.5,
    within_jit: 0.2,
    within_a_scan: 0.25,
    by_linen: 0.3,
    by_nnx: 0.15,
    by_equinox: 0.4,
}


def rates_of(drop, key=KEY):
    loss_fn = lambda params, batch, key: jnp.sum(drop(batch, key) * params)  # noqa: E731
    return ns.dropout_rates(loss_fn, 1.0, BATCH, key=key)


@pytest.mark.parametrize("drop", RATES, ids=lambda one: one.__name__)
def test_the_rate_and_its_place(drop):
    (found,) = rates_of(drop)
    assert found.rate == RATES[drop]
    assert found.where.startswith("test_noise.py:")


@pytest.mark.parametrize("drop", RATES, ids=lambda one: one.__name__)
def test_the_rate_is_the_share_of_zeros(drop):
    (found,) = rates_of(drop)
    keys = jax.random.split(KEY, 20)
    zeros = np.mean([np.mean(drop(BATCH, key) == 0) for key in keys])
    count = len(keys) * math.prod(found.shape)
    deviation = math.sqrt(found.rate * (1 - found.rate) / count)
    assert abs(zeros - found.rate) < 4 * deviation


def test_keys_of_both_kinds_and_their_shapes():
    for key in (jax.random.key(1), jax.random.PRNGKey(1)):
        shape = jax.eval_shape(lambda key: key, key)
        assert (
            rates_of(by_where, key) == rates_of(by_where, shape) == rates_of(by_where)
        )


def test_several_in_their_order():
    def loss_fn(params, batch, key):
        first, second = jax.random.split(key)
        return jnp.sum(by_where(jnp.tanh(by_uniform(batch, first) * params), second))

    found = ns.dropout_rates(loss_fn, 1.0, BATCH, key=KEY)
    assert [one.rate for one in found] == [0.2, 0.1]


def test_a_rate_that_is_given_later_is_not_known():
    def loss_fn(params, batch, key):
        rate = batch[0, 0] / 10
        kept = jax.random.bernoulli(key, 1 - rate, batch.shape)
        return jnp.sum(jnp.where(kept, batch, 0) * params)

    (found,) = ns.dropout_rates(loss_fn, 1.0, BATCH, key=KEY)
    assert math.isnan(found.rate)


@pytest.mark.parametrize(
    "noise",
    [
        lambda x, key: x + jax.random.normal(key, x.shape),
        lambda x, key: jnp.where(jax.random.normal(key, x.shape) < 1, x, 0),
        lambda x, key: jnp.where(x < 0.5, x, 0),
        lambda x, key: jax.random.permutation(key, x),
        lambda x, key: x * jax.random.uniform(key, x.shape),
    ],
)
def test_other_noise_drops_nothing_that_is_known(noise):
    assert rates_of(noise) == ()


def noisy_lines(apply_fn, inputs=BATCH, params=1.0):
    reading = read(apply_fn, params, inputs)
    return noise_at_evaluation(apply_fn, params, inputs, reading=reading)


@pytest.mark.parametrize("drop", RATES, ids=lambda one: one.__name__)
def test_dropout_is_noise_at_evaluation(drop):
    if drop is whole_channels:  # the same for all examples
        assert noisy_lines(lambda params, x: drop(x, KEY)) == ()
        assert noisy_lines(lambda params, x: drop(*x), (BATCH, KEY))
    else:
        (place,) = noisy_lines(lambda params, x: drop(x, KEY))
        assert place.startswith("test_noise.py:")


def test_a_network_that_wants_so_many_examples():
    def apply_fn(params, x):
        return (x + jax.random.normal(KEY, (200, 30))).reshape(200, 30)

    assert len(noisy_lines(apply_fn)) == 1


@pytest.mark.parametrize(
    "apply_fn",
    [
        lambda params, x: x @ jax.random.normal(KEY, (30, 200)),
        lambda params, x: jnp.tanh(x),
        lambda params, x: (jax.random.normal(KEY, x.shape), x)[1],
    ],
)
def test_random_features_and_what_is_not_used_are_no_noise(apply_fn):
    assert noisy_lines(apply_fn) == ()
