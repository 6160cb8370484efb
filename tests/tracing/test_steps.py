"""The list of steps of a program, with the calls opened up."""

import jax
import jax.numpy as jnp
import pytest

from nnsanity.tracing.compat import trace
from nnsanity.tracing.opening import open_up
from nnsanity.tracing.steps import ARGUMENTS, Origin, Site
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
    assert steps.sites[weight] == Site((ARGUMENTS,), 1)
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
    assert steps.origins[weight] == Origin(frozenset({0, 1}))
    assert steps.is_weight(weight)
    assert steps.origins[product] == Origin(frozenset({0, 1}), data=True)
    assert not steps.is_weight(product)
    assert steps.origins[of_inputs] == Origin(data=True)
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


LOOPS = {
    "scan": lambda w, x: jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=2)[0],
    "while": lambda w, x: jax.lax.while_loop(
        lambda c: jnp.sum(c) < 9, lambda c: jax.jit(jnp.matmul)(c, w), x
    ),
    "cond": lambda w, x: jax.lax.cond(jnp.sum(x) > 0, lambda: x @ w, lambda: x),
}


@pytest.mark.parametrize("name", LOOPS)
def test_control_flow_follows_the_steps_of_its_bodies(name):
    steps = opened(lambda p, x: LOOPS[name](p["w"], x), {"w": jnp.ones((3, 3))})
    (dot,) = [s for s in steps.steps if s.eqn.primitive.name == "dot_general"]
    (control,) = [s for s in steps.steps if s.is_opened]
    assert control.eqn.primitive.name == name
    assert steps.steps.index(dot) < steps.steps.index(control)
    assert dot.path[: len(control.path)] == control.path
    (weight,) = steps.weights(dot)
    assert weight != steps.inputs[0]
    assert steps.origins[weight] == Origin(frozenset({0}))
    assert steps.origins[control.outputs[0]] == Origin(frozenset({0}), data=True)
    assert steps.outputs == control.outputs


def test_what_a_loop_returns_depends_on_what_went_around():
    def apply_fn(params, x):
        def turn(carry, _):
            _, second, third = carry
            return (second, third, third), None

        start = jnp.zeros(3), jnp.zeros(3), params["w"][0] + x[0, 0]
        looped = jax.lax.scan(turn, start, None, length=2)[0]
        return looped[0] @ params["w"]

    steps = opened(apply_fn, {"w": jnp.ones((3, 3))})
    (dot,) = [s for s in steps.steps if s.eqn.primitive.name == "dot_general"]
    assert steps.origins[dot.inputs[0]] == Origin(frozenset({0}), data=True)


def test_weights_of_a_stack_vary_and_shared_ones_do_not():
    def apply_fn(params, x):
        def turn(carry, own):
            return carry @ own @ params["w"], None

        return jax.lax.scan(turn, x, params["stack"])[0]

    params = {"stack": jnp.ones((4, 3, 3)), "w": jnp.ones((3, 3))}
    steps = opened(apply_fn, params)
    dots = [s for s in steps.steps if s.eqn.primitive.name == "dot_general"]
    (axis,) = steps.axes(dots[0].path)
    assert (axis.name, axis.size) == (None, 4)
    varies = [steps.origins[steps.weights(dot)[0]].varies for dot in dots]
    assert varies == [{axis}, set()]


def test_keys_and_closed_over_arrays_may_be_data_or_a_part_of_a_weight():
    mask, rows = jnp.eye(3), jnp.ones((5, 3))

    def masked(params, x):
        return x @ (params["w"] * mask)

    def without_inputs(params, key):
        noise = jax.random.normal(key, (5, 3))
        return (rows + noise) @ params["w"] @ params["w"]

    params = {"w": jnp.ones((3, 3))}
    for fn, inputs in ((masked, INPUTS), (without_inputs, jax.random.key(0))):
        steps = opened(fn, params, inputs)
        dots = [s for s in steps.steps if s.eqn.primitive.name == "dot_general"]
        assert all(len(steps.weights(dot)) == 1 for dot in dots)
        assert steps.origins[dots[-1].outputs[0]].data


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
