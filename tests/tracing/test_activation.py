"""Nonlinearities are recognised by what they do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnsanity.tracing.layers import inspect
from tests.tracing.programs import relu_with_own_gradient, relu_with_own_tangent

PARAMS = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}
INPUTS = jnp.ones((5, 3))


def recognised(nonlinearity):
    def apply_fn(params, x):
        return nonlinearity(x @ params["w"] + params["b"])

    (one,) = inspect(apply_fn, PARAMS, INPUTS).layers
    return one.activation


def inlined_gelu(x):
    return 0.5 * x * (1 + jnp.tanh(0.7978845608 * (x + 0.044715 * x**3)))


def inlined_elu(x):
    return jnp.where(x > 0, x, jnp.exp(jnp.minimum(x, 0)) - 1)


def inlined_selu(x):
    return jnp.where(x > 0, 1.05070099 * x, 1.75809934 * (jnp.exp(x) - 1))


NAMES = [
    ("relu", jax.nn.relu),
    ("relu", lambda x: jnp.where(x > 0, x, 0)),
    ("relu", lambda x: jnp.maximum(x, 0)),
    ("relu", lambda x: x * (x > 0)),
    ("relu", lambda x: (x + jnp.abs(x)) / 2),
    ("relu", jax.jit(lambda x: jax.jit(jax.nn.relu)(x))),
    ("relu", relu_with_own_gradient),
    ("relu", relu_with_own_tangent),
    ("relu", jax.checkpoint(jax.nn.relu)),
    ("sigmoid", jax.nn.sigmoid),
    ("tanh", jnp.tanh),
    ("gelu", jax.nn.gelu),
    ("gelu", inlined_gelu),
    ("gelu", lambda x: jax.nn.gelu(x, approximate=False)),
    ("silu", jax.nn.silu),
    ("silu", lambda x: x * jax.nn.sigmoid(x)),
    ("leaky_relu", jax.nn.leaky_relu),
    ("leaky_relu", lambda x: jnp.maximum(x, 0.01 * x)),
    ("elu", jax.nn.celu),
    ("elu", jax.nn.elu),
    ("selu", jax.nn.selu),
    ("hard_tanh", jax.nn.hard_tanh),
    ("hard_tanh", lambda x: jnp.clip(x, -1, 1)),
    ("elu", inlined_elu),
    ("selu", inlined_selu),
    ("softplus", jax.nn.softplus),
    ("softplus", lambda x: jnp.log1p(jnp.exp(x))),
    ("relu6", jax.nn.relu6),
    ("hard_tanh", lambda x: jnp.maximum(jnp.minimum(x, 1), -1)),
    ("hard_swish", jax.nn.hard_swish),
    ("soft_sign", jax.nn.soft_sign),
    ("mish", jax.nn.mish),
    ("exp", jnp.exp),
    ("square", jnp.square),
    ("square", lambda x: x * x),
    ("abs", jnp.abs),
    ("sin", jnp.sin),
    ("cos", jnp.cos),
]


@pytest.mark.parametrize(("name", "nonlinearity"), NAMES)
def test_names(name, nonlinearity):
    assert recognised(nonlinearity).name == name


@pytest.mark.parametrize(
    ("nonlinearity", "flat_values"),
    [
        (jax.nn.relu, (0,)),
        (lambda x: jnp.maximum(x, -1), (-1,)),
        (lambda x: jnp.minimum(x, 2), (2,)),
        (jax.nn.relu6, (0, 6)),
        (jax.nn.hard_swish, (0,)),
        (lambda x: jnp.maximum(jnp.minimum(x, 1), -1), (-1, 1)),
        (lambda x: (x > 0).astype(x.dtype), (0, 1)),
        (jnp.sign, (-1, 1)),
        (jax.nn.gelu, ()),
        (jax.nn.silu, ()),
        (jax.nn.leaky_relu, ()),
        (jax.nn.sigmoid, ()),
        (jnp.tanh, ()),
        (jax.nn.softplus, ()),
        (inlined_elu, ()),
        (jnp.exp, ()),
        (jnp.sin, ()),
    ],
)
def test_values_at_the_flat_ends(nonlinearity, flat_values):
    assert recognised(nonlinearity).flat_values == flat_values


@pytest.mark.parametrize(
    ("nonlinearity", "slope", "saturates"),
    [
        (jax.nn.relu, 1.0, False),
        (jax.nn.sigmoid, 0.25, True),
        (jnp.tanh, 1.0, True),
        (lambda x: jnp.tanh(3 * jnp.abs(x)), 3.0, True),
        (jnp.sin, 1.0, False),
        (jax.nn.softplus, 1.0, False),
    ],
)
def test_slope_and_ends(nonlinearity, slope, saturates):
    found = recognised(nonlinearity)
    assert found.slope == pytest.approx(slope, rel=0.02)
    assert found.saturates == saturates
    ends = [float(nonlinearity(jnp.float32(x))) for x in (-10, 10)]
    np.testing.assert_allclose(found.limits, ends, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "nonlinearity"),
    [
        ("softmax", jax.nn.softmax),
        ("softmax", lambda x: jnp.exp(x) / jnp.sum(jnp.exp(x), -1, keepdims=True)),
        (
            "softmax",
            lambda x: jax.nn.softmax(x - jnp.max(x, -1, keepdims=True) * 0 + 1),
        ),
        ("softmax", jax.jit(lambda x: jax.nn.softmax(x / 2))),
        ("log_softmax", jax.nn.log_softmax),
        (
            "log_softmax",
            lambda x: x - jax.scipy.special.logsumexp(x, -1, keepdims=True),
        ),
    ],
)
def test_softmax(name, nonlinearity):
    found = recognised(nonlinearity)
    assert found.name == name
    assert found.flat_values == ()


@pytest.mark.parametrize(
    "nonlinearity",
    [
        lambda x: 2 * x + 1,
        lambda x: x / 3 - x,
        lambda x: x.astype(jnp.bfloat16),
        lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True),
        jax.nn.standardize,
    ],
)
def test_what_is_no_nonlinearity(nonlinearity):
    assert recognised(nonlinearity) is None


def test_one_that_nobody_knows_goes_by_its_last_operation():
    found = recognised(lambda x: jnp.tanh(x) * jnp.abs(x))
    assert found.name == "mul"
    assert found.limits == pytest.approx((-10, 10))


def test_one_with_its_own_parameter_has_only_a_name():
    def apply_fn(params, x):
        hidden = x @ params["w"]
        return jnp.where(hidden > 0, hidden, params["slope"] * hidden)

    params = {"w": jnp.ones((3, 4)), "slope": jnp.ones(4)}
    (one,) = inspect(apply_fn, params, INPUTS).layers
    assert one.layer.activation == "select_n"
    assert one.activation.flat_values == ()
    assert np.isnan(one.activation.slope)


def test_a_loop_of_elementwise_operations_is_not_run():
    def apply_fn(w, x):
        turn = lambda h, _: (jnp.minimum(h, 0.7) + 1, None)  # noqa: E731
        return jax.lax.scan(turn, x @ w, None, length=3)[0]

    (found,) = inspect(apply_fn, jnp.ones((4, 4)), jnp.ones((5, 4))).layers
    assert found.activation.name == "scan"
    assert not found.activation.is_known
