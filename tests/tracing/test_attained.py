"""What is said to be taken on is taken on, for some parameters."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnsanity.tracing.ancestry import Ancestry
from nnsanity.tracing.attained import free_of, signs_of
from nnsanity.tracing.bounds import read

PARAMS = {"w": jnp.ones((3, 4)), "b": jnp.zeros(4), "scale": jnp.ones(4)}
INPUTS = jnp.linspace(-1.0, 2.0, 15).reshape(5, 3)


def layer(params, x):
    return x @ params["w"] + params["b"]


def follow(fn, params=PARAMS, inputs=INPUTS):
    reading = read(fn, params, inputs)
    ancestry = Ancestry(reading, [len(jax.tree.leaves(params)), 1])
    (value,) = reading.outputs
    return value, ancestry


FREE = {
    "layer": layer,
    "without a bias": lambda p, x: x @ p["w"],
    "a residual": lambda p, x: layer(p, x) + jnp.tanh(x.sum()),
    "flattened": lambda p, x: layer(p, x).reshape(-1)[3:9],
    "mean": lambda p, x: layer(p, x).mean(),
    "in other units": lambda p, x: 5 - layer(p, x) / 3,
    "a norm's scale and shift": lambda p, x: jnp.tanh(x @ p["w"]) * p["scale"] + p["b"],
    "cast": lambda p, x: layer(p, x).astype(jnp.bfloat16),
}
BOUND = {
    "tanh": lambda p, x: jnp.tanh(layer(p, x)),
    "itself less itself": lambda p, x: layer(p, x) - p["b"] - x @ p["w"],
    "times itself": lambda p, x: p["b"] * p["b"],
    "weights that are squared": lambda p, x: x @ p["w"] ** 2,
    "times nothing": lambda p, x: layer(p, x) * 0.0,
    "data": lambda p, x: x,
    "the largest of some": lambda p, x: (x @ p["w"]).max(0),
    "the larger of it and 5": lambda p, x: jnp.maximum(layer(p, x), 5.0),
    "centred": lambda p, x: p["b"] - p["b"].mean(),
}


@pytest.mark.parametrize("name", FREE)
def test_free(name):
    assert free_of(*follow(FREE[name]))


@pytest.mark.parametrize("name", BOUND)
def test_not_free(name):
    assert not free_of(*follow(BOUND[name]))


CHAIN = [
    *(jax.nn.relu, jnp.tanh, jax.nn.leaky_relu, jax.nn.sigmoid, jnp.abs, jnp.square),
    *(jax.nn.elu, jax.nn.softplus, jnp.sin, jnp.exp, jnp.negative, jnp.expm1, jnp.sign),
    *(jax.nn.log_softmax, jax.nn.softmax, lambda x: x + 1, lambda x: x - 0.5),
    *(lambda x: 2 - x, lambda x: -3 * x, lambda x: x / 4, lambda x: jnp.clip(x, -1, 2)),
    *(lambda x: jnp.clip(x, 0.1, 1), lambda x: jnp.maximum(x, 0.5), lambda x: x[:2]),
    *(lambda x: jnp.minimum(x, -0.5), lambda x: jnp.where(x > 0, x, 0), jnp.arcsinh),
    *(lambda x: jnp.where(x < 0, 2 * x, x), lambda x: x * (x > 1), lambda x: x.sum(0)),
    *(
        lambda x: jnp.where(x > 0, x, 1.0),
        lambda x: x * x.mean(),
        lambda x: x - x.max(),
        lambda x: jnp.concatenate([x, x**2 + 1]),
        lambda x: x.max(0, keepdims=True),
        lambda x: jnp.sort(x, 0),
        lambda x: jnp.pad(x, 1, constant_values=7),
        jnp.cumsum,
    ),
]


@hypothesis.settings(max_examples=80)
@hypothesis.given(steps=st.lists(st.sampled_from(CHAIN), max_size=4))
def test_signs_that_are_claimed_are_seen(steps):
    def fn(params, x):
        value = layer(params, x)
        for step in steps:
            value = step(value)
        return value

    with jax.disable_jit():
        signs = signs_of(*follow(fn))
        rng = np.random.default_rng(0)
        draws = []
        for scale in (0.1, 1, 1, 10, 10, 100):
            drawn = {"w": rng.normal(0, scale, (3, 4)), "b": rng.normal(0, scale, 4)}
            draws += [np.ravel(fn(jax.tree.map(jnp.float32, drawn), INPUTS))]
            shift = {"w": np.zeros((3, 4)), "b": np.full(4, scale * (-1) ** len(draws))}
            draws += [np.ravel(fn(jax.tree.map(jnp.float32, shift), INPUTS))]
    values = np.concatenate(draws)
    hypothesis.assume(not np.isnan(values).any())
    assert not signs.low or values.min() <= 0
    assert not signs.high or values.max() >= 0
