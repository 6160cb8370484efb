"""The table of operations without a derivative, with JAX itself as its oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from nnsanity.tracing.reach import FLAT, reach

FLAT_EXAMPLES = {
    "bitcast_convert_type": lambda x: lax.bitcast_convert_type(x, jnp.float32),
    "ceil": lax.ceil,
    "floor": lax.floor,
    "round": lax.round,
    "sign": lax.sign,
    "stop_gradient": lax.stop_gradient,
}
DISCRETE_EXAMPLES = [
    lambda x: x > 0.5,
    lambda x: x == 0.5,
    lax.is_finite,
    lambda x: lax.argmax(x, 0, jnp.int32),
    lambda x: lax.argmin(x, 0, jnp.int32),
    lambda x: x.astype(jnp.int32),
    lambda x: x.astype(bool),
    lambda x: lax.bitcast_convert_type(x, jnp.int32),
    lambda x: lax.top_k(x, 2)[1],
    jnp.argsort,
    lambda x: lax.population_count(x.astype(jnp.int32)),
    lambda x: lax.clz(x.astype(jnp.int32)),
    lambda x: x.astype(jnp.int32) << 1,
    lambda x: ~x.astype(jnp.int32) & 3 | 4 ^ 1,
]
SMOOTH_EXAMPLES = [
    *(jnp.abs, jnp.exp, jnp.log1p, jnp.tanh, jnp.sin, jnp.sqrt, jnp.square, jnp.cbrt),
    *(jax.nn.relu, jax.nn.silu, jax.nn.gelu, jax.nn.sigmoid, jax.nn.softmax, jnp.sort),
    *(jnp.max, jnp.min, jnp.sum, jnp.prod, jnp.cumsum, jnp.cumprod, lax.cummax),
    lambda x: jnp.clip(x, 0.0, 1.0),
    lambda x: jnp.maximum(x, 0.25),
    lambda x: jnp.minimum(x, 0.75),
    lambda x: lax.clamp(x, 9.0 * jnp.ones(3), x + 1),
    lambda x: jnp.where(x > 0.5, x, 2 * x),
    lambda x: lax.top_k(x, 2)[0],
    lambda x: x[jnp.array([1, 1])],
    lambda x: jnp.zeros(3).at[jnp.array([1, 1, 0])].add(x),
    lambda x: jnp.zeros(3).at[jnp.array([2, 1, 0])].max(x),
    lambda x: lax.rem(x, 0.4),
    lambda x: lax.reduce_precision(x, 8, 10),
    lambda x: x.astype(jnp.bfloat16),
    lambda x: jnp.fft.fft(x),
    lambda x: jnp.linalg.norm(x),
    lambda x: jnp.linalg.inv(jnp.eye(3) + jnp.diag(x)),
]
POINT = jnp.array([0.3, 0.6, 0.9])


def derivative(fn):
    _, tangent = jax.jvp(fn, (POINT,), (jnp.array([1.0, 1.3, 0.8]),))
    return np.asarray(tangent).astype(complex) if tangent.dtype != jax.float0 else 0.0


def differentiable(fn):
    def loss_fn(params, batch):
        return jnp.sum(jnp.abs(fn(params)).astype(jnp.float32)) + batch

    (answer,) = reach(loss_fn, POINT, 0.0).differentiable
    return answer


def test_the_table_has_an_example_of_each():
    assert set(FLAT_EXAMPLES) == FLAT


@pytest.mark.parametrize("fn", [*FLAT_EXAMPLES.values(), *DISCRETE_EXAMPLES])
def test_has_no_derivative_in_jax(fn):
    assert not np.any(derivative(fn))
    assert not differentiable(fn)


@pytest.mark.parametrize("fn", SMOOTH_EXAMPLES)
def test_has_a_derivative_in_jax(fn):
    assert np.any(derivative(fn))
    assert differentiable(fn)


def test_a_key_of_a_sort_does_not_move_what_it_orders():
    def beside(keys):
        return lax.sort((keys, jnp.arange(3.0)), num_keys=1)[1]

    assert not np.any(derivative(beside))
    assert not differentiable(beside)
    assert differentiable(lambda x: lax.sort((jnp.arange(3.0), x), num_keys=1)[1])
