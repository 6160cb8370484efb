"""A hidden layer beside the only one: the network written by hand is the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnsanity.tracing.deepen import deepening
from nnsanity.tracing.layers import inspect
from nnsanity.tracing.replace import replaced

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(6, 6)), jnp.float32)
PARAMS = {
    "b": jnp.asarray(RNG.normal(size=3), jnp.float32),
    "w": jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32),
}


def plain(p, x):
    return jax.nn.sigmoid(x @ p["w"] + p["b"])


def transposed(p, x):
    return jax.nn.sigmoid(x @ p["w"].T + p["b"])


def columns(p, x):
    return jax.nn.sigmoid(p["w"].T @ x.T + p["b"][:, None]).T


def vector(p, x):
    return jax.nn.sigmoid(jax.vmap(lambda one: p["w"].T @ one)(x) + p["b"])


def in_calls(p, x):
    return jax.jit(jax.checkpoint(plain))(p, x)


PROGRAMS = {
    "plain": (plain, PARAMS),
    "transposed": (transposed, PARAMS | {"w": PARAMS["w"].T}),
    "columns": (columns, PARAMS),
    "vmap": (vector, PARAMS),
    "in calls": (in_calls, PARAMS),
}


def by_hand(wide, hidden):
    """Six inputs, ``hidden`` units and three outputs, with the long weight's blocks."""
    weight = wide["w"] if wide["w"].shape == (6 + hidden, 3 + hidden) else wide["w"].T
    units = jax.nn.relu(X @ weight[:6, 3:] + weight[6, 3:])
    return jax.nn.sigmoid(X @ weight[:6, :3] + units @ weight[6:, :3] + wide["b"])


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_hidden_layer_beside_the_only_one(name):
    apply_fn, params = PROGRAMS[name]
    network = inspect(apply_fn, params, X)
    plan = deepening(network, more=4)
    wide = plan.padded(params, lambda part, shape: jnp.full(shape, 0.1))
    given, _ = plan.split(wide)
    jax.tree.map(np.testing.assert_array_equal, given, params)
    drawn = jax.random.normal(jax.random.key(0), wide["w"].shape)
    wide |= {"w": wide["w"] + drawn}

    def squares(function, params):
        return jnp.mean(function(params) ** 2)

    run = replaced(apply_fn, network, {}, wider=plan)
    found = jax.jit(jax.value_and_grad(lambda p: squares(lambda p: run(p, X), p)))(wide)
    oracle = lambda p: squares(lambda p: by_hand(p, 4), p)  # noqa: E731
    expected = jax.value_and_grad(oracle)(wide)
    assert np.abs(expected[1]["w"]).min() == 0  # the corner but for its first row
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        found,
        expected,
    )


def two_layers(p, x):
    return jnp.tanh(x @ p["v"]) @ p["w"]


def masked(p, x):
    return x @ (p["w"] * jnp.ones((6, 3)))


def sequence(p, x):
    return x.reshape(2, 3, 6) @ p["w"]


@pytest.mark.parametrize(
    ("apply_fn", "params"),
    [
        (two_layers, PARAMS | {"v": jnp.ones((6, 6))}),
        (masked, PARAMS),
        (sequence, PARAMS),
        (lambda p, x: x * p["b"][0], PARAMS),
    ],
)
def test_programs_that_get_none(apply_fn, params):
    assert deepening(inspect(apply_fn, params, X), more=4) is None
