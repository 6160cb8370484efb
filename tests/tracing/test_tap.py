"""Values handed out and put in: NumPy and the untouched function are the oracles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnsanity as ns
from nnsanity.tracing.layers import inspect
from nnsanity.tracing.tap import Taps, evaluate
from tests.tracing.programs import (
    DEAD,
    IMAGES,
    INPUTS,
    KERNEL,
    STYLES,
    WEIGHTS,
    WRAPPED,
    convolution,
    numpy_activations,
    numpy_convolution,
)

FIRST_TWO = {
    f"{kind}{index}": jnp.asarray(leaf)
    for index, pair in enumerate(WEIGHTS[:2], 1)
    for kind, leaf in zip("wb", pair, strict=True)
}


def never_positive(outputs):
    return (outputs <= 0).reshape(-1, outputs.shape[-1]).all(0)


def one_hot(unit, units):
    return np.arange(units) == unit


@pytest.mark.parametrize("style", STYLES)
def test_activations_are_those_of_numpy(style):
    apply_fn, params, names = style()
    found = ns.activations(apply_fn, params, INPUTS)
    assert set(found) == set(names)
    for name, expected in zip(names, numpy_activations(), strict=True):
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("style", STYLES)
def test_the_unit_killed_by_hand_is_dead_and_no_other(style):
    apply_fn, params, names = style()
    found = ns.dead_units(apply_fn, params, INPUTS)
    assert set(found.dead) == set(names[:2])
    for name, outputs, unit in zip(names, numpy_activations(), DEAD, strict=False):
        expected = never_positive(outputs)
        np.testing.assert_array_equal(expected, one_hot(unit, outputs.shape[-1]))
        np.testing.assert_array_equal(found.dead[name], expected)
        assert float(found.fraction[name]) == pytest.approx(expected.mean())


@pytest.mark.parametrize("name", WRAPPED)
def test_through_calls(name):
    found = ns.dead_units(WRAPPED[name], FIRST_TWO, INPUTS)
    assert list(found.dead) == ["w1"]
    np.testing.assert_array_equal(found.dead["w1"], one_hot(DEAD[0], 4))
    values = ns.activations(WRAPPED[name], FIRST_TWO, INPUTS)["w1"]
    np.testing.assert_allclose(values, numpy_activations()[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["channels last", "channels first"])
def test_dead_channels_of_a_convolution(layout):
    bias = np.where(one_hot(3, 4), -100, 0).astype(np.float32)

    def apply_fn(params, x):
        outputs = convolution(x, params["kernel"])
        if layout == "channels first":
            outputs = jnp.transpose(outputs, (0, 3, 1, 2))
            return jax.nn.relu(outputs + params["bias"][:, None, None])
        return jax.nn.relu(outputs + params["bias"])

    params = {"kernel": jnp.asarray(KERNEL), "bias": jnp.asarray(bias)}
    expected = np.maximum(numpy_convolution() + bias, 0)
    found = ns.dead_units(apply_fn, {"conv": params}["conv"], jnp.asarray(IMAGES))
    np.testing.assert_array_equal(never_positive(expected), one_hot(3, 4))
    np.testing.assert_array_equal(found.dead["kernel"], never_positive(expected))
    values = ns.activations(apply_fn, params, jnp.asarray(IMAGES))["kernel"]
    if layout == "channels first":
        values = jnp.transpose(values, (0, 2, 3, 1))
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4)


def test_both_flat_ends_are_dead_and_smooth_layers_are_left_out():
    def apply_fn(params, x):
        hidden = jax.nn.relu6(x @ params["w1"] + params["b1"])
        return jnp.tanh(hidden @ params["w2"]), jax.nn.gelu(x @ params["w3"])

    params = {"w1": jnp.eye(3), "b1": jnp.array([-100.0, 100.0, 0.0])}
    params |= {"w2": jnp.full((3, 2), -100.0), "w3": jnp.full((3, 2), -100.0)}
    found = ns.dead_units(apply_fn, params, INPUTS)
    np.testing.assert_array_equal(found.dead["w1"], [True, True, False])
    assert list(found.dead) == ["w1"]


# The tapped function equals the plain one.


def sites_of(fn):
    network = inspect(fn, FIRST_TWO, INPUTS)
    inner = [network.site(one.before) for one in network.layers]
    return network, [*inner, *(network.site(one.after) for one in network.layers)]


def run_again(fn, taps):
    network, _ = sites_of(fn)

    def tapped(params, inputs):
        leaves = jax.tree.leaves((params, inputs))
        outputs, _ = evaluate(network.program, leaves, taps)
        return outputs[0]

    return tapped


def value_and_gradients(fn):
    def loss(params, inputs):
        return jnp.sum(jnp.sin(fn(params, inputs)))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(FIRST_TWO, INPUTS)


@pytest.mark.parametrize("taps", ["none", "read", "write"])
@pytest.mark.parametrize("name", WRAPPED)
def test_value_and_gradient_stay(name, taps):
    fn = WRAPPED[name]
    _, sites = sites_of(fn)
    same = dict.fromkeys(sites, lambda value: value)
    chosen = {"none": Taps(), "read": Taps(read=same), "write": Taps(write=same)}
    again = value_and_gradients(run_again(fn, chosen[taps]))
    for left, right in zip(
        jax.tree.leaves(again), jax.tree.leaves(value_and_gradients(fn)), strict=True
    ):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["custom_jvp", "custom_vjp"])
def test_own_derivatives_differ_from_the_usual_ones(name):
    own = value_and_gradients(WRAPPED[name])[1][0]["w1"]
    usual = value_and_gradients(WRAPPED["plain"])[1][0]["w1"]
    np.testing.assert_allclose(own, 7 * usual, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", WRAPPED)
def test_write_puts_another_value_in_place_and_read_sees_it(name):
    fn = WRAPPED[name]
    network, _ = sites_of(fn)
    site = network.site(network.layers[0].after)
    taps = Taps(read={site: jnp.max}, write={site: lambda value: 0 * value + 2})
    leaves = jax.tree.leaves((FIRST_TWO, INPUTS))
    (outputs,), readings = evaluate(network.program, leaves, taps)
    expected = np.full((64, 4), 2.0) @ WEIGHTS[1][0] + WEIGHTS[1][1]
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-4)
    assert {site: float(one.value) for site, one in readings.items()} == {site: 2.0}


def test_remat_is_still_remat():
    network, sites = sites_of(WRAPPED["remat_policy"])
    fn = run_again(WRAPPED["remat_policy"], Taps(write=dict.fromkeys(sites, jnp.sin)))
    equations = jax.make_jaxpr(fn)(FIRST_TWO, INPUTS).eqns
    names = {eqn.primitive.name: eqn.params for eqn in equations}
    (name,) = {"remat", "remat2", "checkpoint"} & set(names)
    assert names[name]["policy"] is jax.checkpoint_policies.dots_saveable
    assert len(network.layers) == 2
