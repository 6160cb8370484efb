"""The list of steps of a program, with the calls opened up."""

import jax
import jax.numpy as jnp
import pytest

from nnsanity.tracing.compat import trace
from nnsanity.tracing.steps import Site, open_up, operations
from tests.tracing.programs import WRAPPED, relu_with_own_gradient

PARAMS = {"b": jnp.ones(4), "w": jnp.ones((3, 4))}
INPUTS = jnp.ones((5, 3))


def opened(fn, params=PARAMS, inputs=INPUTS):
    return open_up(trace(fn, params, inputs), len(jax.tree.leaves(params)))


def names(steps):
    return [step.eqn.primitive.name for step in steps.steps]


def test_opens_calls_in_place():
    inner = jax.jit(lambda x: jnp.sin(jnp.cos(x)))
    steps = opened(jax.jit(lambda p, x: jnp.tanh(inner(x)) + jnp.exp(inner(x))))
    assert names(steps) == ["cos", "sin", "tanh", "cos", "sin", "exp", "add"]
    assert [step.path for step in steps.steps] == [
        *((0, 0, 0), (0, 0, 1), (0, 1), (0, 2, 0), (0, 2, 1), (0, 3), (0, 4))
    ]


def test_values_lead_from_step_to_step():
    steps = opened(jax.jit(lambda p, x: jnp.tanh(x @ p["w"]) + p["b"]))
    bias, weight, inputs = steps.inputs
    dot, tanh = steps.steps[:2]
    assert dot.inputs == (inputs, weight)
    assert tanh.inputs == dot.outputs
    assert bias in [value for step in steps.steps[2:] for value in step.inputs]
    assert steps.outputs == steps.steps[-1].outputs
    assert steps.sites[weight] is None
    assert steps.sites[dot.outputs[0]] == Site(dot.path, 0)
    assert steps.avals[dot.outputs[0]].shape == (5, 4)


def test_says_what_each_value_is_made_from():
    def apply_fn(params, x):
        weight = params["w"] * params["b"]
        return x @ weight, jnp.sin(x), jnp.sin(3.0)

    steps = opened(apply_fn)
    product, of_inputs, _ = steps.outputs
    (dot,) = [s for s in steps.steps if s.eqn.primitive.name == "dot_general"]
    (weight,) = steps.weights(dot)
    assert steps.parameters[weight] == {0, 1}
    assert not steps.data[weight]
    assert steps.is_weight(weight)
    assert steps.parameters[product] == {0, 1}
    assert steps.data[product]
    assert not steps.is_weight(product)
    assert steps.parameters[of_inputs] == set()
    assert not steps.is_weight(of_inputs)
    assert not steps.is_weight(None)


def test_own_derivatives_stay_closed():
    steps = opened(lambda p, x: relu_with_own_gradient(jax.nn.relu(x)))
    assert len(steps.steps) == 2
    assert all(name.startswith("custom_") for name in names(steps))


def test_own_derivatives_that_hold_a_layer_are_opened():
    @jax.custom_jvp
    def dense(w, x):
        return x @ w

    dense.defjvp(lambda primals, tangents: (dense(*primals), tangents[1] @ primals[0]))
    assert names(opened(lambda p, x: dense(p["w"], x))) == ["dot_general"]


@pytest.mark.parametrize(
    "loop",
    [
        lambda w, x: jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=2)[0],
        lambda w, x: jax.lax.while_loop(
            lambda c: jnp.sum(c) < 9, lambda c: jax.jit(jnp.matmul)(c, w), x
        ),
        lambda w, x: jax.lax.cond(jnp.sum(x) > 0, lambda: x @ w, lambda: x),
    ],
)
def test_control_flow_is_one_step_that_tells_what_it_holds(loop):
    steps = opened(lambda p, x: loop(p["w"], x), {"w": jnp.ones((3, 3))})
    (last,) = [s for s in steps.steps if "dot_general" in operations(s.eqn)]
    assert last.eqn.primitive.name in ("scan", "while", "cond")
    assert steps.weights(last) == [steps.inputs[0]]
    assert last.eqn.primitive.name not in operations(last.eqn)


@pytest.mark.parametrize("name", WRAPPED)
def test_sees_both_products_through_every_call(name):
    params = {"w1": jnp.ones((3, 4)), "b1": jnp.ones(4)}
    params |= {"w2": jnp.ones((4, 2)), "b2": jnp.ones(2)}
    steps = opened(WRAPPED[name], params)
    assert names(steps).count("dot_general") == 2
    assert not {"jit", "pjit", "remat", "remat2", "checkpoint"} & set(names(steps))


def test_as_many_steps_as_equations():
    def deep(num_layers):
        def apply_fn(params, x):
            for w in params:
                x = jnp.tanh(x @ w)
            return x

        return opened(apply_fn, [jnp.ones((3, 3))] * num_layers)

    assert len(deep(64).steps) == 2 * 64
    assert len(deep(64).avals) == 64 + 1 + 2 * 64
