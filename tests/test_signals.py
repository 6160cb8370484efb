"""Signals of a step: a program with zeros added by hand is the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnsanity as ns
from nnsanity.tracing.compat import sub_jaxprs, trace

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (16, 3))
TARGETS = jnp.linspace(-1.0, 1.0, 16)[:, None]
BATCH = X, TARGETS
PARAMS = {
    "b1": jnp.array([0.1, -100.0, 0.0, 0.2]),
    "w1": jax.random.normal(jax.random.key(1), (3, 4)),
    "w2": jax.random.normal(jax.random.key(2), (4, 1)),
}


def network(params, x, taps=(0.0, 0.0, 0.0)):
    """Two layers, with a zero to differentiate by at each place that is watched."""
    before = x @ params["w1"] + params["b1"] + taps[0]
    after = jax.nn.relu(before) + taps[1]
    return after @ params["w2"] + taps[2], (before, after)


def loss_fn(params, batch):
    return jnp.mean((network(params, batch[0])[0] - batch[1]) ** 2)


def rms(values):
    return np.sqrt(np.mean(np.square(np.asarray(values, np.float64))))


def watched_by_hand(params=PARAMS):
    """Root mean squares of values and gradients, by place."""
    taps = jnp.zeros((16, 4)), jnp.zeros((16, 4)), jnp.zeros((16, 1))

    def loss(taps):
        return jnp.mean((network(params, X, taps)[0] - TARGETS) ** 2)

    outputs, (before, after) = network(params, X)
    return map(rms, (before, after, outputs)), map(rms, jax.grad(loss)(taps))


def assert_equal(left, right, rtol=1e-5):
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=1e-6)


def test_numbers_are_those_of_taps_by_hand():
    (loss, signals), grads = ns.value_and_grad(loss_fn)(PARAMS, BATCH)
    (before, after, outputs), gradients = watched_by_hand()
    before_back, after_back, outputs_back = gradients
    assert_equal((loss, grads), jax.value_and_grad(loss_fn)(PARAMS, BATCH))
    assert_equal(signals.preactivation_rms, {"w1": before, "w2": outputs})
    assert_equal(signals.activation_rms, {"w1": after, "w2": outputs})
    back = signals.preactivation_gradient_rms
    assert_equal(back, {"w1": before_back, "w2": outputs_back})
    assert_equal(
        signals.activation_gradient_rms, {"w1": after_back, "w2": outputs_back}
    )
    assert signals.dead.keys() == {"w1"}
    np.testing.assert_array_equal(signals.dead["w1"], [False, True, False, False])
    assert bool(signals.watched)
    assert signals.uninspected == ns.Uninspected()
    assert signals.ran == {}


@pytest.mark.parametrize("when", [True, False])
def test_when(when):
    plain = jax.value_and_grad(loss_fn)(PARAMS, BATCH)
    (_, expected), _ = ns.value_and_grad(loss_fn)(PARAMS, BATCH)

    @jax.jit
    def asked(when):
        return ns.value_and_grad(loss_fn, when=when)(PARAMS, BATCH)

    for (loss, signals), grads in (
        asked(jnp.asarray(when)),
        ns.value_and_grad(loss_fn, when=when)(PARAMS, BATCH),
        ns.value_and_grad(loss_fn, when=np.bool_(when))(PARAMS, BATCH),
    ):
        assert_equal((loss, grads), plain)
        assert jax.tree.structure(signals) == jax.tree.structure(expected)
        blank = jax.tree.map(jnp.zeros_like, expected)
        assert_equal(signals, expected if when else blank)


def test_aux_more_arguments_and_leaves_that_are_no_numbers():
    def noisy(params, batch, key, scale):
        loss = loss_fn(params["net"], batch) * scale
        return loss, {"noise": jax.random.normal(key), "step": params["step"] + 1}

    params = {"net": PARAMS, "step": jnp.int32(3), "none": None}
    watch = jax.jit(ns.value_and_grad(noisy, has_aux=True))
    ((loss, aux), signals), grads = watch(params, BATCH, KEY, 2.0)
    expected, gradients = jax.value_and_grad(loss_fn)(PARAMS, BATCH)
    assert_equal(loss, 2 * expected)
    assert_equal(aux, {"noise": jax.random.normal(KEY), "step": 4})
    assert_equal(grads["net"], jax.tree.map(lambda one: 2 * one, gradients))
    assert grads["step"].dtype == jax.dtypes.float0
    assert signals.dead.keys() == {"net/w1"}


def test_flags_functions_and_names_are_passed_on_as_they_are():
    def flagged(params, batch, is_halved, reduce, *, power=1):
        outputs = network(params, batch[0])[0] - batch[1]
        loss = reduce(outputs**power)
        return loss / 2 if is_halved else loss

    watch = ns.value_and_grad(flagged)
    (loss, _), grads = watch(PARAMS, BATCH, True, jnp.mean, power=2)
    expected, plain = jax.value_and_grad(loss_fn)(PARAMS, BATCH)
    assert_equal(loss, expected / 2)
    assert_equal(grads, jax.tree.map(lambda one: one / 2, plain))


def test_a_loss_that_closes_over_its_batch_and_key():
    @jax.jit
    def step(params, batch, key):
        def closed(params):
            kept = jax.random.bernoulli(key, 0.5, (16, 4))
            _, (_, after) = network(params, batch[0])
            return jnp.mean((kept * after @ params["w2"] - batch[1]) ** 2)

        return ns.value_and_grad(closed)(params), jax.value_and_grad(closed)(params)

    ((loss, signals), grads), plain = step(PARAMS, BATCH, KEY)
    assert_equal((loss, grads), plain)
    np.testing.assert_array_equal(signals.dead["w1"], [False, True, False, False])


def all_operations(jaxpr):
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn.primitive.name
        for inner in sub_jaxprs(eqn):
            yield from all_operations(inner)


def test_no_second_pass_no_second_trace_and_no_callback():
    traced = []

    def counted(params, batch):
        traced.append(1)
        return loss_fn(params, batch)

    names = list(all_operations(trace(ns.value_and_grad(counted), PARAMS, BATCH).jaxpr))
    assert len(traced) == 1
    plain = list(
        all_operations(trace(jax.value_and_grad(loss_fn), PARAMS, BATCH).jaxpr)
    )
    assert names.count("dot_general") == plain.count("dot_general")
    assert not [name for name in names if "callback" in name]


def test_a_step_that_is_not_watched_measures_behind_a_branch():
    def watch(params, batch, when):
        return ns.value_and_grad(loss_fn, when=when)(params, batch)

    program = trace(watch, PARAMS, BATCH, jnp.asarray(True)).jaxpr
    outside = [eqn.primitive.name for eqn in program.eqns]
    assert outside.count("cond") == 6  # two layers, forward and back
    assert "reduce_max" not in outside


def test_nan_arrives_and_a_gradient_that_does_not_come_back_is_zero():
    broken = {**PARAMS, "w1": PARAMS["w1"].at[0, 0].set(jnp.nan)}
    (_, signals), _ = ns.value_and_grad(loss_fn)(broken, BATCH)
    assert np.isnan(signals.preactivation_rms["w1"])
    assert not signals.dead["w1"][0]

    def stopped(params, batch):
        outputs, (_, after) = network(params, batch[0])
        return jnp.mean(jax.lax.stop_gradient(after) @ params["w2"] + 0 * outputs)

    (_, signals), _ = ns.value_and_grad(stopped)(PARAMS, BATCH)
    assert float(signals.activation_gradient_rms["w1"]) == 0


def test_bfloat16_is_summed_in_float32():
    params, batch = jax.tree.map(lambda one: one.astype(jnp.bfloat16), (PARAMS, BATCH))
    (loss, signals), grads = ns.value_and_grad(loss_fn)(params, batch)
    assert loss.dtype == grads["w1"].dtype == jnp.bfloat16
    assert signals.activation_rms["w1"].dtype == jnp.float32
    many = jnp.ones((4096, 3), jnp.bfloat16), jnp.ones((4096, 1), jnp.bfloat16)
    (_, signals), _ = ns.value_and_grad(loss_fn)(params, many)
    entering = np.asarray(many[0] @ params["w1"] + params["b1"], np.float64)
    np.testing.assert_allclose(
        signals.preactivation_rms["w1"], rms(entering[:1]), rtol=1e-3
    )


def test_composes_with_vmap_scan_and_grad():
    stacked = jax.tree.map(lambda one: jnp.stack([one, 2 * one]), PARAMS)
    (_, signals), _ = jax.vmap(ns.value_and_grad(loss_fn), (0, None))(stacked, BATCH)
    (_, second), _ = ns.value_and_grad(loss_fn)(
        jax.tree.map(lambda one: one[1], stacked), BATCH
    )
    assert_equal(jax.tree.map(lambda one: one[1], signals), second)

    def step(params, _):
        (_, signals), grads = ns.value_and_grad(loss_fn)(params, BATCH)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), signals

    _, history = jax.lax.scan(step, PARAMS, None, length=3)
    (_, first), _ = ns.value_and_grad(loss_fn)(PARAMS, BATCH)
    assert_equal(jax.tree.map(lambda one: one[0], history), first)

    def penalty(params):
        return ns.value_and_grad(loss_fn)(params, BATCH)[1]["w2"].sum()

    def plain(params):
        return jax.grad(loss_fn)(params, BATCH)["w2"].sum()

    assert_equal(jax.grad(penalty)(PARAMS), jax.grad(plain)(PARAMS))


def test_what_has_no_gradient_is_said():
    def loss(params, batch):
        def turn(state):
            return state[0] + 1, jax.nn.relu(state[1] @ params["square"])

        looped = jax.lax.while_loop(lambda state: state[0] < 2, turn, (0, batch[0]))[1]
        return loss_fn(params["net"], (jax.lax.stop_gradient(looped), batch[1]))

    params = {"net": PARAMS, "square": jnp.eye(3), "unused": jnp.ones(2)}
    (_, signals), _ = ns.value_and_grad(loss)(params, BATCH)
    assert "square" in signals.dead
    assert "square" not in signals.preactivation_gradient_rms
    ((name, reason),) = signals.uninspected.gradients
    assert name == "square"
    assert "while" in reason
    assert signals.uninspected.parameters == (("unused", "not used"),)
    assert bool(signals.ran["square"])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda: ns.value_and_grad(loss_fn, when=3), TypeError, "when must be a bool"),
        (
            lambda: ns.value_and_grad(loss_fn, when=jnp.ones(2, bool)),
            TypeError,
            "boolean scalar",
        ),
        (
            lambda: ns.value_and_grad(lambda p, b: b[0] @ p["w1"])(PARAMS, BATCH),
            ValueError,
            "forget a mean",
        ),
        (
            lambda: ns.value_and_grad(lambda p, b: (loss_fn(p, b), 1))(PARAMS, BATCH),
            ValueError,
            "has_aux=True",
        ),
        (
            lambda: ns.value_and_grad(loss_fn, has_aux=True)(PARAMS, BATCH),
            ValueError,
            "must return .loss, aux.",
        ),
    ],
)
def test_mistakes_are_named(change, error, words):
    with pytest.raises(error, match=words):
        change()


NEEDS_DEVICES = pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
P = jax.sharding.PartitionSpec


def mesh_of(kind, *names, shape=(4,)):
    types = (getattr(jax.sharding.AxisType, kind),) * len(names)
    return jax.make_mesh(shape, names, axis_types=types)


@NEEDS_DEVICES
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("split", ["batch", "units"])
@pytest.mark.parametrize("asked", [False, True])
def test_the_same_sharded(kind, split, asked):
    mesh = mesh_of(kind, "axis")
    specs = {"b1": P("axis"), "w1": P(None, "axis"), "w2": P("axis", None)}
    specs = {name: P() for name in specs} if split == "batch" else specs
    rows = P("axis") if split == "batch" else P()

    def put(tree, spec):
        return jax.device_put(tree, jax.sharding.NamedSharding(mesh, spec))

    params = {name: put(leaf, specs[name]) for name, leaf in PARAMS.items()}
    batch = put(BATCH, rows)

    def hidden_loss(params, batch):
        return jnp.mean(jax.nn.relu(batch[0] @ params["w1"] + params["b1"]) ** 2)

    @jax.jit
    def watch(params, batch, when):
        fn = loss_fn if split == "batch" else hidden_loss
        return ns.value_and_grad(fn, when=when if asked else True)(params, batch)

    yes = jnp.ones((), bool)
    with jax.set_mesh(mesh):
        assert_equal(watch(params, batch, yes), watch(PARAMS, BATCH, yes), rtol=1e-4)
        text = watch.lower(params, batch, yes).compile().as_text()
    assert "all-gather" not in text


@NEEDS_DEVICES
@pytest.mark.parametrize("asked", [False, True])
def test_as_a_part_of_a_data_parallel_step(asked):
    mesh = mesh_of("Auto", "data")
    rows = P("data")

    def step(params, batch, when):
        watch = ns.value_and_grad(loss_fn, when=when if asked else True)
        (loss, signals), grads = watch(params, batch)
        plain = jax.value_and_grad(loss_fn)(params, batch)
        both = jax.tree.map(
            lambda one: jax.lax.pmean(one, "data"), ((loss, grads), plain)
        )
        return both, jax.tree.map(lambda one: one[None], signals)

    on_devices = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=(P(), rows, P()), out_specs=(P(), rows))
    )
    (found, plain), signals = on_devices(PARAMS, BATCH, jnp.ones((), bool))
    assert_equal(found, plain)
    second = jax.tree.map(lambda one: one[4:8], BATCH)
    (_, expected), _ = ns.value_and_grad(loss_fn)(PARAMS, second)
    own = jax.tree.map(lambda one: one[1], signals)
    assert_equal(own.activation_rms, expected.activation_rms)
    back = own.preactivation_gradient_rms
    assert_equal(back, expected.preactivation_gradient_rms)


def test_shapes_of_signals_can_be_asked():
    shapes = jax.eval_shape(ns.value_and_grad(loss_fn), PARAMS, BATCH)[0][1]
    expected = jax.ShapeDtypeStruct((), jnp.float32)
    assert set(shapes.activation_rms.values()) == {expected}
