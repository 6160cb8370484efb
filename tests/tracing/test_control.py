"""Other values inside of loops and branches: the same program by hand is the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import nnsanity as ns
from nnsanity.tracing.compat import trace
from nnsanity.tracing.control import bodies
from nnsanity.tracing.layers import inspect
from nnsanity.tracing.replace import Replacement, replaced
from nnsanity.tracing.tap import Taps, evaluate

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (8, 3))
PARAMS = {
    "stack": jax.random.normal(jax.random.key(1), (4, 3, 3)),
    "w": jax.random.normal(jax.random.key(2), (3, 3)),
}
KEEP = Replacement(lambda values: values.after)
SKIP = Replacement(lambda values: values.after + values.entering)
LEAVE_OUT = Replacement(lambda values: values.before, jnp.zeros_like)
TANH = Replacement(lambda values: jnp.tanh(values.before), jnp.zeros_like)
REPLACEMENTS = {
    "keep": (KEEP, lambda x, before: jax.nn.relu(before)),
    "skip": (SKIP, lambda x, before: x + jax.nn.relu(before)),
    "leave out": (LEAVE_OUT, lambda x, before: before),
    "tanh": (TANH, lambda x, before: jnp.tanh(before)),
}


def relu_of(x, before):
    del x
    return jax.nn.relu(before)


def over_layers(unit, **options):
    def apply_fn(params, x):
        def turn(carry, own):
            return unit(carry, carry @ own), None

        return jax.lax.scan(turn, x, params["stack"], **options)[0]

    return apply_fn


def over_time(unit):
    def apply_fn(params, x):
        return jax.lax.scan(
            lambda carry, _: (unit(carry, carry @ params["w"]), carry), x, None, 3
        )

    return apply_fn


def rematerialized(unit):
    def apply_fn(params, x):
        dense = jax.checkpoint(lambda own, x: x @ own)
        for own in params["stack"]:
            x = unit(x, dense(own, x))
        return x

    return apply_fn


def rematerialized_whole(unit):
    def apply_fn(params, x):
        block = jax.checkpoint(lambda own, x: unit(x, x @ own))
        for own in params["stack"]:
            x = block(own, x)
        return x

    return apply_fn


def nested(unit):
    inner = over_layers(unit)

    def apply_fn(params, x):
        turn = jax.checkpoint(lambda carry, _: (inner(params, carry), None))
        return jax.lax.scan(turn, x, None, 2)[0]

    return apply_fn


def branched(unit):
    def apply_fn(params, x):
        def taken(x):
            return unit(x, x @ params["w"])

        return jax.lax.cond(x[0, 0] > -9, taken, lambda x: x, x) + jax.lax.switch(
            2, [jnp.sin, jnp.cos, taken], x
        )

    return apply_fn


def counted(unit):
    def apply_fn(params, x):
        return jax.lax.fori_loop(
            0, 4, lambda i, carry: unit(carry, carry @ params["stack"][i]), x
        )

    return apply_fn


def mapped(unit):
    def apply_fn(params, x):
        return jax.lax.map(lambda row: unit(row, row @ params["w"]), x)

    return apply_fn


def on_devices(unit):
    def apply_fn(params, x):
        mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        rows = PartitionSpec("data")
        return jax.shard_map(
            lambda w, x: unit(x, x @ w),
            mesh=mesh,
            in_specs=(PartitionSpec(), rows),
            out_specs=rows,
        )(params["w"], x)

    return apply_fn


PROGRAMS = {
    "scan": over_layers,
    "reversed scan": lambda unit: over_layers(unit, reverse=True),
    "unrolled scan": lambda unit: over_layers(unit, unroll=2),
    "scan over time": over_time,
    "remat of the product alone": rematerialized,
    "remat": rematerialized_whole,
    "nested": nested,
    "branches": branched,
    "fori_loop": counted,
    "map": mapped,
    "shard_map": on_devices,
}


def value_and_gradient(apply_fn):
    def loss_fn(params):
        outputs = jax.tree.leaves(apply_fn(params, X))
        return sum(jnp.sum(jnp.sin(one)) for one in outputs)

    return jax.jit(jax.value_and_grad(loss_fn))(PARAMS)


@pytest.mark.parametrize("change", REPLACEMENTS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_replacement_is_the_program_by_hand(name, change):
    replacement, unit = REPLACEMENTS[change]
    plain, by_hand = PROGRAMS[name](relu_of), PROGRAMS[name](unit)
    blueprint = inspect(plain, PARAMS, X)
    chosen = {one.layer.name: replacement for one in blueprint.layers}
    assert chosen
    changed = value_and_gradient(replaced(plain, blueprint, chosen))
    for one, other in zip(
        jax.tree.leaves(changed),
        jax.tree.leaves(value_and_gradient(by_hand)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-5)


def test_a_while_loop_hands_out_its_last_turn_and_takes_replacements():
    def apply_fn(params, x):
        return jax.lax.while_loop(
            lambda state: state[0] < 3,
            lambda state: (state[0] + 1, jax.nn.relu(state[1] @ params["w"])),
            (0, x),
        )[1]

    expected = X
    for _ in range(3):
        before_last, expected = expected, jax.nn.relu(expected @ PARAMS["w"])
    found = ns.activations(apply_fn, PARAMS, X)["w"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert not np.allclose(found, before_last)
    left_out = replaced(apply_fn, inspect(apply_fn, PARAMS, X), {"w": LEAVE_OUT})
    by_hand = X @ np.linalg.matrix_power(np.asarray(PARAMS["w"], np.float64), 3)
    np.testing.assert_allclose(left_out(PARAMS, X), by_hand, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_turns", [0, 1, 3])
def test_dead_in_a_while_loop_is_dead_in_every_turn(num_turns):
    def apply_fn(params, x):
        def turn(state):
            index, x = state
            alive = jnp.arange(3) != index  # unit 0 in turn 0, unit 1 in turn 1
            shift = jnp.where(alive, -100.0, 100.0).at[2].set(-100.0)
            return index + 1, jax.nn.relu(x @ params["w"] + shift)

        return jax.lax.while_loop(lambda state: state[0] < num_turns, turn, (0, x))[1]

    alive = np.arange(3) < min(num_turns, 2)
    dead = ns.dead_units(apply_fn, PARAMS, X).dead["w"]
    np.testing.assert_array_equal(dead, ~alive & (num_turns > 0))


def test_a_branch_that_is_not_taken_has_no_values_and_no_dead_units():
    def apply_fn(params, x):
        def dead(x):
            return jax.nn.relu(x @ params["w"] - 100)

        return jax.lax.cond(x[0, 0] > 1e6, dead, lambda x: x, x)

    assert not ns.dead_units(apply_fn, PARAMS, X).dead["w"].any()
    assert np.isnan(ns.activations(apply_fn, PARAMS, X)["w"]).all()


def test_a_layer_that_drops_out_in_some_turns():
    def apply_fn(params, x):
        def turn(carry, scanned):
            own, on = scanned
            return jax.lax.cond(on, lambda: jax.nn.relu(carry @ own), lambda: carry), 0

        on = jnp.array([True, False, True, False])
        return jax.lax.scan(turn, x, (params["stack"], on))[0]

    found = ns.activations(apply_fn, PARAMS, X)["stack"]
    assert found.shape == (4, 8, 3)
    assert np.isnan(found).all((1, 2)).tolist() == [False, True, False, True]

    def loss_fn(params, x):
        return jnp.mean(apply_fn(params, x))

    (_, signals), _ = ns.value_and_grad(loss_fn)(PARAMS, X)
    assert signals.ran["stack"].tolist() == [True, False, True, False]
    back = np.asarray(signals.activation_gradient_rms["stack"])
    assert (back > 0).tolist() == [True, False, True, False]


def test_a_loop_keeps_its_options_and_its_size():
    def apply_fn(params, x):
        return over_layers(relu_of, reverse=True, unroll=2)(params, x)

    network = inspect(apply_fn, PARAMS, X)
    (one,) = network.layers
    taps = Taps(read={network.site(one.after): jnp.mean})

    def again(*leaves):
        return evaluate(network.program, leaves, taps)

    leaves = jax.tree.leaves((PARAMS, X))
    (loop,) = [
        eqn for eqn in trace(again, *leaves).jaxpr.eqns if eqn.primitive.name == "scan"
    ]
    assert loop.params["reverse"] is True
    assert loop.params["unroll"] == 2
    (body,) = bodies(loop, (0,))
    stacked = [var.aval.shape for var in loop.outvars]
    assert stacked == [(8, 3), (4,)]  # the carry and one number for each turn
    assert body.axes[0].size == 4


def test_a_stack_is_read_in_one_piece():
    def num_steps(length):
        params = {"stack": jax.ShapeDtypeStruct((length, 3, 3), jnp.float32)}
        return len(inspect(over_layers(relu_of), params, X).steps.steps)

    assert num_steps(1000) == num_steps(2)


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
def test_a_branch_on_an_explicit_mesh():
    types = (jax.sharding.AxisType.Explicit,)
    mesh = jax.make_mesh((4,), ("units",), axis_types=types)
    columns = jax.sharding.NamedSharding(mesh, PartitionSpec(None, "units"))

    def apply_fn(w, x):
        return jax.lax.cond(
            x[0, 0] < 9, lambda: jax.nn.relu(x @ w), lambda: 0 * (x @ w)
        )

    w = jax.random.normal(KEY, (3, 4))
    expected = ns.dead_units(apply_fn, w, X)
    with jax.set_mesh(mesh):
        found = ns.dead_units(apply_fn, jax.device_put(w, columns), X)
    np.testing.assert_array_equal(found.dead["params#2"], expected.dead["params#2"])
