"""Programs with some of their clips left out: the same programs without them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nnsanity.tracing.clips import between_layers, clips, without_clips
from nnsanity.tracing.layers import inspect

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32)
W = jnp.asarray(RNG.normal(size=(4, 4)), jnp.float32)


def between(clip):
    return lambda w, x: jnp.sum(jnp.sin(clip(x @ w) @ w + clip(x)))


def in_a_loop(clip):
    turn = lambda w: lambda h, _: (jnp.tanh(clip(h @ w)), None)  # noqa: E731
    return lambda w, x: jnp.sum(jax.lax.scan(turn(w), x, None, length=3)[0])


def behind_a_checkpoint(clip):
    return lambda w, x: jnp.sum(clip(jax.checkpoint(lambda x: jnp.sin(x @ w))(x)))


def in_a_row(clip):
    return lambda w, x: jnp.sum(clip(clip(x @ w)) * x)


def in_a_branch(clip):
    def run(w, x):
        made = x @ w
        return jax.lax.cond(
            x[0, 0] > 0, lambda: jnp.sum(clip(made) @ w), lambda: jnp.sum(made @ w)
        )

    return run


STYLES = [between, in_a_loop, behind_a_checkpoint, in_a_row, in_a_branch]
CLIPS = {
    "clip": lambda x: jax.lax.clamp(jnp.float32(-0.2), x, jnp.float32(0.1)),
    "maximum": lambda x: jnp.maximum(0.3, x),
}


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("style", STYLES, ids=lambda one: one.__name__)
def test_without_clips(style, clip):
    fn, plain = style(clip), style(lambda x: x)
    names = clips(inspect(fn, W, X))
    assert names
    both = (
        jax.jit(jax.value_and_grad(one)) for one in (without_clips(fn, names), plain)
    )
    (value, grad), (expected, expected_grad) = (one(W, X) for one in both)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-4, atol=1e-5)
    assert not np.allclose(fn(W, X), value)


def test_only_those_that_are_named():
    fn = lambda w, x: jnp.minimum(x @ w, 0.1) + jnp.maximum(x @ w, 0.2)  # noqa: E731
    first, _ = clips(inspect(fn, W, X))
    assert first.endswith("min")
    made = X @ W
    np.testing.assert_allclose(
        without_clips(fn, {first})(W, X), made + jnp.maximum(made, 0.2), rtol=1e-5
    )
    np.testing.assert_array_equal(without_clips(fn, {"elsewhere"})(W, X), fn(W, X))


@pytest.mark.parametrize("bound", [optax.huber_loss, lambda e: jnp.minimum(e, 0.1)])
def test_a_value_that_is_used_beside_its_bound_is_not_blocked(bound):
    network = inspect(lambda w, x: jnp.sum(bound(jnp.abs(x @ w - x))), W, X)
    assert clips(network)
    found = between_layers(network, network.layers)
    assert bool(found) is (bound is not optax.huber_loss)


def test_a_derivative_of_the_users_own_is_kept():
    @jax.custom_vjp
    def straight_through(x, w):
        return jnp.minimum(x @ w, 0.1)

    straight_through.defvjp(
        lambda x, w: (straight_through(x, w), (x, w)),
        lambda res, g: (g @ res[1].T, res[0].T @ g),
    )
    fn = lambda w, x: jnp.sum(straight_through(x, w))  # noqa: E731
    names = clips(inspect(fn, W, X))
    grad = jax.grad(without_clips(fn, names))(W, X)
    np.testing.assert_allclose(grad, X.T @ jnp.ones((5, 4)), rtol=1e-5)
