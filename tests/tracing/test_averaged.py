"""How often parameters meet data, against numbers known on paper."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import linen

import nnsanity as ns

N, T, D, H = 4, 7, 3, 5
KEY = jax.random.key(0)
TABLE, SEQUENCES = jnp.ones((N, D)), jnp.ones((N, T, D))
IMAGES, TOKENS = jnp.ones((N, 8, 8, 3)), jnp.ones((N, T), int)


def of_linen(model, inputs):
    variables = model.init(KEY, inputs)
    loss_fn = lambda params, x: model.apply(params, x).sum()  # noqa: E731
    return ns.averaged_terms(loss_fn, variables, inputs)


def counts(fn, params, batch=TABLE):
    return ns.averaged_terms(lambda p, x: jnp.sum(fn(p, x)), params, batch)


@pytest.mark.parametrize(
    ("model", "inputs", "expected"),
    [
        (linen.Dense(H), TABLE, N),
        (linen.Dense(H), SEQUENCES, N * T),
        (linen.Conv(H, (3, 3)), IMAGES, N * 64),
        (linen.Conv(H, (3, 3), strides=2), IMAGES, N * 16),
        (linen.Conv(6, (3, 3), feature_group_count=3), IMAGES, N * 64),
        (linen.ConvTranspose(H, (2, 2), strides=(2, 2)), IMAGES, N * 256),
        (linen.RNN(linen.SimpleCell(H)), SEQUENCES, N * T),
        (linen.RNN(linen.OptimizedLSTMCell(H)), SEQUENCES, N * T),
        (linen.Embed(11, H), TOKENS, N * T),
        (linen.LayerNorm(), SEQUENCES, N * T),
        (linen.BatchNorm(use_running_average=True), IMAGES, N * 64),
        (linen.MultiHeadDotProductAttention(1), SEQUENCES, N * T),
    ],
)
def test_of_layers(model, inputs, expected):
    assert set(of_linen(model, inputs).values()) == {expected}


W, B = jnp.ones((D, H)), jnp.zeros(H)


@pytest.mark.parametrize(
    ("fn", "params", "expected"),
    [
        (lambda p, x: x @ p["w"] + p["b"], {"w": W, "b": B}, {"w": N, "b": N}),
        (lambda p, x: x @ (p["w"] * p["b"]), {"w": W, "b": W}, {"w": N, "b": N}),
        (lambda p, x: jax.vmap(lambda r: r @ p)(x), W, {"params": N}),
        (lambda p, x: x * jnp.exp(p), jnp.zeros(()), {"params": N * D}),
        (lambda p, x: (x @ p) @ p.T, W, {"params": 2 * N}),
        (lambda p, x: x @ (p["u"] @ p["v"]), {"u": W, "v": W.T @ W}, {"u": N, "v": N}),
        (lambda p, x: jnp.concatenate([x, p]), TABLE[:1], {"params": 1}),
        (lambda p, x: x.sum() + jnp.sum(p**2), W, {"params": 0}),
        (
            lambda p, x: jax.lax.ragged_dot(x, p, jnp.array([1, 3], jnp.int32)),
            jnp.ones((2, D, H)),
            {"params": N / 2},
        ),
        (lambda p, x: jnp.tanh(x), W, {"params": 0}),
        (lambda p, x: jax.checkpoint(lambda w: jnp.tanh(x @ w))(p), W, {"params": N}),
        (
            lambda p, x: jax.lax.cond(x[0, 0] > 0, lambda: x @ p, lambda: x @ (2 * p)),
            W,
            {"params": N},
        ),
    ],
)  # fmt: skip
def test_by_hand(fn, params, expected):
    assert counts(fn, params) == expected


def test_layers_of_a_scan_count_for_themselves():
    def stack(params, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params)[0]

    assert counts(stack, jnp.ones((9, D, D))) == {"params": N}
    once = lambda p, x: stack(jnp.broadcast_to(p, (9, D, D)), x)  # noqa: E731
    assert counts(once, jnp.ones((D, D))) == {"params": 9 * N}


def test_turns_that_are_not_known_are_told():
    def loop(params, x):
        return jax.lax.while_loop(lambda h: h.sum() < 9, lambda h: h @ params, x)

    (count,) = counts(loop, jnp.ones((D, D))).values()
    assert math.isnan(count)


def test_shapes_suffice_and_whole_numbers_are_left_out():
    params = {"w": W, "step": jnp.zeros((), int)}
    loss_fn = lambda p, x: jnp.mean(x @ p["w"])  # noqa: E731
    shapes = jax.eval_shape(lambda tree: tree, (params, TABLE))
    assert ns.averaged_terms(loss_fn, *shapes) == {"w": N}
