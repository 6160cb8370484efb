"""What differs between versions of JAX."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnsanity.tracing import compat
from tests.tracing.programs import relu_with_own_gradient, relu_with_own_tangent

X = jnp.array([-1.0, 2.0])


def only_equation(fn, *args):
    (eqn,) = compat.trace(fn, *args).jaxpr.eqns
    return eqn


CALLS = {
    "jit": jax.jit(jnp.sin),
    "custom_jvp": relu_with_own_tangent,
    "custom_vjp": relu_with_own_gradient,
    "remat": jax.checkpoint(jnp.sin),
}
CONTROL_FLOW = {
    "scan": lambda x: jax.lax.scan(lambda c, _: (c * 2, None), x, None, length=2)[0],
    "while": lambda x: jax.lax.while_loop(lambda c: c[0] < 9, lambda c: c * 2, x),
    "cond": lambda x: jax.lax.cond(True, jnp.sin, jnp.cos, x),
}
PLAIN = {
    "sin": jnp.sin,
    "sort": lambda x: jax.lax.sort((x, x), num_keys=1),
    "top_k": lambda x: jax.lax.top_k(x, 2),
}


@pytest.mark.parametrize("name", CALLS)
def test_opens_calls(name):
    eqn = only_equation(CALLS[name], X)
    jaxpr, consts = compat.called_jaxpr(eqn)
    assert consts == ()
    assert len(jaxpr.eqns) > 0
    assert len(list(compat.sub_jaxprs(eqn))) == 1


@pytest.mark.parametrize("name", [*CONTROL_FLOW, *PLAIN])
def test_leaves_the_rest_closed(name):
    eqn = only_equation({**CONTROL_FLOW, **PLAIN}[name], X)
    assert compat.called_jaxpr(eqn) is None
    assert bool(list(compat.sub_jaxprs(eqn))) == (name in CONTROL_FLOW)


@pytest.mark.parametrize("name", [*CALLS, *CONTROL_FLOW, *PLAIN])
def test_bind_evaluates_on_other_operands(name):
    fn = {**CALLS, **CONTROL_FLOW, **PLAIN}[name]
    eqn, other = only_equation(fn, X), jnp.array([3.0, 0.5])
    operands = [atom.val if compat.is_literal(atom) else other for atom in eqn.invars]
    for result, expected in zip(
        compat.bind(eqn, operands), jax.tree.leaves(fn(other)), strict=True
    ):
        np.testing.assert_allclose(result, expected)


def test_trace_keeps_the_tree_and_the_constants():
    table = np.arange(3.0, dtype=np.float32)
    program = compat.trace(lambda x: {"sum": x + jnp.asarray(table)}, jnp.ones(3))
    assert program.out_shape["sum"].shape == (3,)
    (const,) = program.consts
    np.testing.assert_array_equal(const, table)


def test_source_line_is_the_users_own():
    def applied(x):
        return jax.nn.gelu(x)  # here

    lines, start = inspect.getsourcelines(applied)
    (at,) = [index for index, line in enumerate(lines) if "# here" in line]
    for eqn in compat.trace(applied, X).jaxpr.eqns:
        where = compat.source_line(eqn)
        assert where.startswith(f"test_compat.py:{start + at} (")
        assert where.endswith("applied)")
