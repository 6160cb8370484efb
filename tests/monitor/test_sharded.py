"""A monitor on eight devices says what it says on one."""

import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnsanity as ns

NUM_DEVICES = 8
HAS_DEVICES = jax.device_count() >= NUM_DEVICES
NEEDS_DEVICES = pytest.mark.skipif(not HAS_DEVICES, reason="needs eight devices")
P = jax.sharding.PartitionSpec
X = jax.random.normal(jax.random.key(0), (32, 8))
BATCH = X, jnp.sin(2 * X[:, :1])
KEYS = jax.random.split(jax.random.key(1))
PARAMS = {
    "b1": jnp.zeros(16).at[3].set(-100.0),
    "w1": jax.random.normal(KEYS[0], (8, 16)) / 2,
    "w2": jax.random.normal(KEYS[1], (16, 1)) / 4,
}
LAYOUTS = {
    "data": ({"b1": P(), "w1": P(), "w2": P()}, P("data")),
    "fsdp": ({"b1": P("data"), "w1": P("data"), "w2": P("data")}, P("data")),
    "tensor": ({"b1": P("model"), "w1": P(None, "model"), "w2": P("model")}, P("data")),
}
OPTIMIZER = optax.adam(1e-2)
EVERY = 2


@pytest.mark.slow
@pytest.mark.skipif(HAS_DEVICES, reason="there are eight devices")
def test_on_eight_devices():
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": str(NUM_DEVICES)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert re.search(r"\d\d passed, 1 skipped", found.stdout)


def loss_fn(params, batch, layout="data", kind="Auto"):
    if (layout, kind) == ("fsdp", "Explicit"):
        params = jax.sharding.reshard(params, P())
    hidden = jax.nn.relu(batch[0] @ params["w1"] + params["b1"])
    if (layout, kind) == ("tensor", "Explicit"):
        outputs = jnp.matmul(hidden, params["w2"], out_sharding=P("data"))
    else:
        outputs = hidden @ params["w2"]
    return jnp.mean((outputs - batch[1]) ** 2)


def plain_step(loss, carry, batch):
    params, opt_state = carry
    _, grads = jax.value_and_grad(loss)(params, batch)
    updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def watched_step(watch, loss, carry, batch):
    params, opt_state, state = carry
    watched = ns.value_and_grad(loss, when=watch.due(state))
    (value, signals), grads = watched(params, batch)
    updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
    state = watch.update(
        state, loss=value, signals=signals, grads=grads, updates=updates, params=params
    )
    return optax.apply_updates(params, updates), opt_state, state


def wrapped_step(watch, tx, loss, carry, batch):
    params, opt_state = carry
    watched = ns.value_and_grad(loss, when=watch.due(opt_state.monitor))
    (value, signals), grads = watched(params, batch)
    updates, opt_state = tx.update(
        grads, opt_state, params, value=value, signals=signals
    )
    return optax.apply_updates(params, updates), opt_state


def assert_alike(found, expected, rtol=1e-4):
    for left, right in zip(
        *map(jax.tree.leaves_with_path, (found, expected)), strict=True
    ):
        where = jax.tree_util.keystr(left[0])
        np.testing.assert_allclose(
            left[1], right[1], rtol=rtol, atol=1e-6, err_msg=where
        )


@functools.cache
def unsharded():
    watch = ns.monitor(every=EVERY)
    step = jax.jit(functools.partial(watched_step, watch, loss_fn))
    carry = PARAMS, OPTIMIZER.init(PARAMS), watch.init(loss_fn, PARAMS, BATCH)
    return after_three(step, carry, BATCH)


def compiled(step, carry, batch):
    """Compiles a step that leaves everything where it was, and counts its gathers.

    Which units were active may be gathered; numbers may not.
    """
    placed = jax.tree.map(lambda one: one.sharding, carry)
    run = jax.jit(step, out_shardings=placed).lower(carry, batch).compile()
    found = re.findall(r"= \(?(\w+)\[[^=]* all-gather(?:-start)?\(", run.as_text())
    return run, len([dtype for dtype in found if dtype not in ("pred", "s32")])


def blank_moments(params, everywhere):
    """State of the optimizer, placed as the parameters are."""
    adam, *rest = OPTIMIZER.init(jax.tree.map(np.asarray, params))
    zeros = [jax.tree.map(lambda one: 0 * one, params) for _ in range(2)]
    return optax.ScaleByAdamState(jax.device_put(adam.count, everywhere), *zeros), *rest


def after_three(step, carry, batch):
    for _ in range(3):
        carry = step(carry, batch)
    return carry


@NEEDS_DEVICES
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_the_same_sharded(kind, layout):
    types = (getattr(jax.sharding.AxisType, kind),) * 2
    shape = (2, 4) if layout == "tensor" else (8, 1)
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=types)
    specs, rows = LAYOUTS[layout]

    def put(tree, spec):
        return jax.device_put(tree, jax.sharding.NamedSharding(mesh, spec))

    watch = ns.monitor(every=EVERY)
    loss = functools.partial(loss_fn, layout=layout, kind=kind)
    with jax.set_mesh(mesh):
        params = {name: put(leaf, specs[name]) for name, leaf in PARAMS.items()}
        batch = put(BATCH, rows)
        everywhere = jax.sharding.NamedSharding(mesh, P())
        opt_state = blank_moments(params, everywhere)
        state = put(watch.init(loss, params, batch), P())
        num_plain = 0
        if layout == "fsdp":  # the plain step gathers its parameters
            plain = functools.partial(plain_step, loss)
            _, num_plain = compiled(plain, (params, opt_state), batch)
            tx = watch.around(OPTIMIZER, loss, batch)
            wrapped = functools.partial(wrapped_step, watch, tx, loss)
            carry = params, ns.MonitoredState(opt_state, state)
            step, number = compiled(wrapped, carry, batch)
            assert number <= num_plain
            carry = after_three(step, carry, batch)
            assert_alike(carry[1].monitor, unsharded()[2])
        carry = params, opt_state, state
        step, number = compiled(
            functools.partial(watched_step, watch, loss), carry, batch
        )
        assert number <= num_plain
        carry = after_three(step, carry, batch)
        metrics = watch.metrics(carry[2])
    assert_alike(carry[2], unsharded()[2])
    assert metrics["activations/w1/dead"] == 0  # not yet
    if kind == "Explicit":
        for left, right in zip(*map(jax.tree.leaves, (carry[2], state)), strict=True):
            assert left.sharding.is_equivalent_to(right.sharding, left.ndim)


def scanned_loss(params, batch):
    def block(x, weights):
        hidden = jax.nn.relu(x @ weights["up"])
        return x + 0.1 * hidden @ weights["down"], None

    outputs, _ = jax.lax.scan(block, batch[0], params["block"])
    return jnp.mean((outputs @ params["head"] - batch[1]) ** 2)


@NEEDS_DEVICES
@pytest.mark.parametrize("split", ["layers", "units"])
def test_layers_of_a_scan_that_are_split(split):
    keys = jax.random.split(jax.random.key(2), 3)
    up = jax.random.normal(keys[0], (4, 8, 16)).at[1, :, :3].set(0)
    down = jax.random.normal(keys[1], (4, 16, 8))
    head = jax.random.normal(keys[2], (8, 1))
    params = {"block": {"down": down, "up": up}, "head": head}
    mesh = jax.make_mesh(
        (2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    by_layer = {"down": P("model"), "up": P("model")}
    by_unit = {"down": P(None, "model"), "up": P(None, None, "model")}
    specs = {"block": by_layer if split == "layers" else by_unit, "head": P()}
    place = jax.tree.map(lambda spec: jax.sharding.NamedSharding(mesh, spec), specs)
    rows = jax.sharding.NamedSharding(mesh, P("data"))
    watch = ns.monitor(every=EVERY)
    step = functools.partial(watched_step, watch, scanned_loss)
    state = watch.init(scanned_loss, params, BATCH)
    expected = params, OPTIMIZER.init(params), state
    expected = after_three(jax.jit(step), expected, BATCH)
    with jax.set_mesh(mesh):
        params, batch = jax.device_put(params, place), jax.device_put(BATCH, rows)
        everywhere = jax.sharding.NamedSharding(mesh, P())
        opt_state = blank_moments(params, everywhere)
        carry = params, opt_state, jax.device_put(state, everywhere)
        plain = functools.partial(plain_step, scanned_loss)
        _, num_plain = compiled(plain, carry[:2], batch)
        run, number = compiled(step, carry, batch)
        assert number <= num_plain
        found = after_three(run, carry, batch)
    assert_alike(found[2], expected[2])
    never = np.asarray(found[2].last_active["block/up"]) < 0
    np.testing.assert_array_equal(never[1, :4], [True, True, True, False])


def own_copy(params):
    """Parameters that differ from device to device, as far as types can tell."""
    nothing = 0.0 * jax.lax.axis_index("data")
    return jax.tree.map(lambda one: one + nothing, params)


def on_every_device(mesh, specs, watch, loss, *, is_averaged, check_vma):
    """A step whose devices each see a part of the batch."""

    def step(params, opt_state, state, batch):
        watched = ns.value_and_grad(loss, when=watch.due(state))
        own = params
        if is_averaged and check_vma:
            own = own_copy(params)
        (value, signals), grads = watched(own, batch)
        if is_averaged:
            grads = jax.lax.pmean(grads, "data")
        updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
        state = watch.update(
            state,
            loss=value,
            signals=signals,
            grads=grads,
            updates=updates,
            params=params,
            axis_name="data",
        )
        return optax.apply_updates(params, updates), opt_state, state

    adam = (optax.ScaleByAdamState(P(), specs, specs), P())
    return jax.jit(
        jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(specs, adam, P(), P("data")),
            out_specs=(specs, adam, P()),
            check_vma=check_vma,
        )
    )


def gathered_loss(params, batch):
    """Each device has a part of the parameters, and gets the others'."""
    whole = {
        name: jax.lax.all_gather(leaf, "data", tiled=True)
        for name, leaf in params.items()
    }
    return jax.lax.pmean(loss_fn(whole, batch), "data")


def averaged_loss(params, batch):
    return jax.lax.pmean(loss_fn(params, batch), "data")


SHARD_MAPS = {
    "own loss, varying": (loss_fn, P(), True, True),
    "own loss, without types": (loss_fn, P(), True, False),
    "mean loss": (averaged_loss, P(), False, True),
    "fsdp": (gathered_loss, P("data"), False, True),
}


@NEEDS_DEVICES
@pytest.mark.parametrize("case", SHARD_MAPS)
def test_the_same_as_a_part_of_a_shard_map(case):
    loss, spec, is_averaged, check_vma = SHARD_MAPS[case]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    watch = ns.monitor(every=EVERY)
    state = watch.init(loss_fn, PARAMS, BATCH)
    specs = dict.fromkeys(PARAMS, spec)

    step = on_every_device(
        mesh, specs, watch, loss, is_averaged=is_averaged, check_vma=check_vma
    )
    carry = PARAMS, OPTIMIZER.init(PARAMS), state
    for _ in range(3):
        carry = step(*carry, BATCH)
    assert_alike(carry, unsharded())


@NEEDS_DEVICES
def test_gradients_that_were_not_averaged_are_refused():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    watch = ns.monitor()
    state = watch.init(loss_fn, PARAMS, BATCH)

    def step(params, batch):
        own = own_copy(params)
        (value, signals), grads = ns.value_and_grad(loss_fn)(own, batch)
        return watch.update(
            state,
            loss=value,
            signals=signals,
            grads=grads,
            updates=grads,
            params=params,
            axis_name="data",
        )

    split = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    with pytest.raises(ValueError, match="average them first"):
        jax.jit(split)(PARAMS, BATCH)
