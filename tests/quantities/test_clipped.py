"""What stands at a bound, counted by NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnsanity as ns

X = jnp.asarray(np.random.default_rng(0).normal(size=(50, 4)), jnp.float32)
W = jnp.asarray(np.random.default_rng(1).normal(size=(4, 4)), jnp.float32)
MADE = np.asarray(X) @ np.asarray(W)


def clamped(w, x):
    return jax.lax.clamp(jnp.float32(-0.5), x @ w, jnp.float32(1.0)) ** 2 + x


def floored(w, x):
    return jnp.log(jnp.maximum(jnp.exp(x @ w), 0.9)) + x.sum()


def in_a_loop(w, x):
    turn = lambda h, _: (jnp.minimum(h, 0.7) @ w, None)  # noqa: E731
    return jax.lax.scan(turn, x @ w, None, length=3)[0]


def by_numpy_name(w, x):
    return jnp.clip(x @ w, None, 0.7)


def behind_a_checkpoint(w, x):
    return jnp.minimum(jax.checkpoint(lambda x: x @ w)(x), 0.7)


def turns():
    h, shares = MADE, []
    for _ in range(3):
        shares.append((h > 0.7).mean())
        h = np.minimum(h, 0.7) @ np.asarray(W)
    return np.mean(shares)


CASES = {
    clamped: ((MADE < -0.5) | (MADE > 1.0)).mean(),
    floored: (np.exp(MADE) < 0.9).mean(),
    in_a_loop: turns(),
    by_numpy_name: (MADE > 0.7).mean(),
    behind_a_checkpoint: (MADE > 0.7).mean(),
}


@pytest.mark.parametrize("apply_fn", CASES, ids=lambda one: one.__name__)
def test_blocked_share(apply_fn):
    found = ns.blocked_share(apply_fn, W, X).share
    ((name, share),) = found.items()
    assert float(share) == pytest.approx(CASES[apply_fn], abs=0.006)
    assert name.startswith("test_clipped.py:")
    assert f"({apply_fn.__name__}" in name


@pytest.mark.parametrize(
    "apply_fn",
    [
        lambda w, x: jax.nn.relu(x @ w),
        lambda w, x: jnp.maximum(x @ w, x) + x,
        lambda w, x: jax.nn.softmax(x @ w),
        lambda w, x: x @ jnp.maximum(w, 0),
    ],
)
def test_what_is_no_bound(apply_fn):
    assert ns.blocked_share(apply_fn, W, X).share == {}


def test_one_name_for_each():
    twice = lambda w, x: jnp.minimum(x, 0) + jnp.minimum(x, 1) + x @ w  # noqa: E731
    found = ns.blocked_share(twice, W, X).share
    (first, second), shares = found, list(found.values())
    assert second == f"{first}#2"
    x = np.asarray(X)
    np.testing.assert_allclose(shares, [(x > 0).mean(), (x > 1).mean()], atol=1e-6)


def test_a_loop_without_layers_is_told():
    def apply_fn(w, x):
        turn = lambda h, _: (jnp.minimum(h, 0.7) + 1, None)  # noqa: E731
        return jax.lax.scan(turn, x @ w, None, length=3)[0]

    ((where, reason),) = ns.blocked_share(apply_fn, W, X).uninspected.parameters
    assert "(test_a_loop_without_layers_is_told" in where
    assert "not looked at" in reason
