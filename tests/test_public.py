"""What all public measurements have in common, one table over them."""

import chex
import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnsanity as ns
from tests.devices import printed_with_devices

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
PARAMS = {
    "w1": jnp.asarray(RNG.normal(size=(3, 6)), jnp.float32),
    "b1": jnp.array([0, 0, -50, 0, 50, -50.0]),
    "w2": jnp.asarray(RNG.normal(size=(6, 2)), jnp.float32),
}
INPUTS = jnp.asarray(RNG.normal(size=(40, 3)), jnp.float32)
MOMENTS = ns.feature_moments(INPUTS)


def apply_fn(params, x):
    return jax.nn.relu(x @ params["w1"] + params["b1"]) @ params["w2"]


def loss_fn(params, x):
    return jnp.mean(jnp.sin(apply_fn(params, x) / 50))


def pair_loss_fn(params, batch):
    return jnp.mean((jnp.sin(apply_fn(params, batch[0])[:, 0] / 50) - 1) ** 2)


PUBLIC = {
    "value_and_grad": (ns.value_and_grad(loss_fn), (PARAMS, INPUTS)),
    "example_gradient_norms": (
        lambda p, x: ns.example_gradient_norms(loss_fn, p, x),
        (PARAMS, INPUTS),
    ),
    "gradient_noise_scale": (
        lambda p, x: ns.gradient_noise_scale(loss_fn, p, x, num_microbatches=8),
        (PARAMS, INPUTS),
    ),
    "microbatch_noise_scale": (
        lambda x: ns.microbatch_noise_scale(x, microbatch_size=4),
        (INPUTS,),
    ),
    "activations": (lambda p, x: ns.activations(apply_fn, p, x), (PARAMS, INPUTS)),
    "dead_units": (lambda p, x: ns.dead_units(apply_fn, p, x), (PARAMS, INPUTS)),
    "weight_stats": (lambda p, x: ns.weight_stats(apply_fn, p, x), (PARAMS, INPUTS)),
    "width_profile": (lambda p, x: ns.width_profile(apply_fn, p, x), (PARAMS, INPUTS)),
    "depth_profile": (
        lambda p, x: ns.depth_profile(apply_fn, pair_loss_fn, p, (x, x)),
        (PARAMS, INPUTS),
    ),
    "gradient_stats": (ns.gradient_stats, (PARAMS,)),
    "feature_moments": (ns.feature_moments, (INPUTS,)),
    "merge_moments": (ns.merge_moments, (MOMENTS, MOMENTS)),
    "z_scores": (ns.z_scores, (INPUTS, MOMENTS)),
    "normalization": (ns.normalization, (INPUTS,)),
    "normalize": (ns.normalize, (INPUTS, MOMENTS)),
    "denormalize": (ns.denormalize, (INPUTS, MOMENTS)),
    "group_moments": (lambda m: ns.group_moments(m, groups=[0, 1, 0]), (MOMENTS,)),
    "outliers": (ns.outliers, (INPUTS,)),
    "target_scale": (ns.target_scale, (INPUTS, INPUTS)),
    "continuity": (lambda x: ns.continuity(x, x[:, 0], key=KEY), (INPUTS,)),
    "wraparound": (lambda x: ns.wraparound(x, others=x), (INPUTS,)),
    "duplicates": (ns.duplicates, (INPUTS, INPUTS)),
    "invariance": (lambda x: ns.invariance(jnp.sin, jnp.cos, x), (INPUTS,)),
    "roundtrip_error": (lambda x: ns.roundtrip_error(jnp.sin, jnp.sin, x), (INPUTS,)),
    "constant_baseline": (ns.constant_baseline, (INPUTS, -INPUTS)),
    "worst_examples": (
        lambda p, x: ns.worst_examples(loss_fn, p, x, num_worst=3),
        (PARAMS, INPUTS),
    ),
    "input_dependence": (
        lambda p, x: ns.input_dependence(pair_loss_fn, p, (x, x), key=KEY),
        (PARAMS, INPUTS),
    ),
    "example_independence": (
        lambda p, x: ns.example_independence(apply_fn, p, x[:5]),
        (PARAMS, INPUTS),
    ),
    "overfit_batch": (
        lambda p, x: ns.overfit_batch(
            pair_loss_fn,
            p,
            (x[:4], x[:4, 0]),
            optax.sgd(1e-3),
            key=KEY,
            num_steps=3,
            scales=jnp.array([0.1, 1.0]),
        ),
        (PARAMS, INPUTS),
    ),
    "first_nonfinite": (
        lambda p, x: ns.first_nonfinite(loss_fn, p, jnp.sqrt(x)),
        (PARAMS, INPUTS),
    ),
}
SAME_FOR_TWICE_AS_MUCH = {
    "width_profile",
    *("dead_units", "duplicates", "normalize", "denormalize", "first_nonfinite"),
    *("continuity", "wraparound", "constant_baseline", "target_scale"),
}


def other(arguments):
    """Arguments of the same shapes with other numbers."""
    return jax.tree.map(lambda leaf: (leaf * 2).astype(leaf.dtype), arguments)


def assert_equal(found, expected):
    chex.assert_trees_all_equal_structs(found, expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PUBLIC)
def test_eager_equals_jit(name):
    measure, arguments = PUBLIC[name]
    compiled = jax.jit(measure)
    for one in (arguments, other(arguments)):
        assert_equal(compiled(*one), measure(*one))
    first, second = measure(*arguments), measure(*other(arguments))
    if name not in SAME_FOR_TWICE_AS_MUCH:
        with pytest.raises(AssertionError):
            chex.assert_trees_all_close(first, second)


@pytest.mark.parametrize("name", PUBLIC)
def test_results_are_arrays_of_known_shapes(name):
    measure, arguments = PUBLIC[name]
    found = jax.jit(measure)(*arguments)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))
    shapes = jax.eval_shape(measure, *arguments)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, shapes)


@pytest.mark.parametrize("name", PUBLIC)
def test_no_callback_and_no_transfer(name):
    measure, arguments = PUBLIC[name]
    program = str(jax.make_jaxpr(measure)(*arguments))
    assert "callback" not in program
    assert "device_put" not in program


@pytest.mark.parametrize("name", PUBLIC)
def test_vmap_is_a_loop(name):
    measure, arguments = PUBLIC[name]
    runs = (arguments, other(arguments))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *runs)
    expected = [jax.jit(measure)(*one) for one in runs]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *expected)
    assert_equal(jax.jit(jax.vmap(measure))(*stacked), expected)


@pytest.mark.parametrize("name", PUBLIC)
def test_as_the_state_of_a_scan(name):
    measure, arguments = PUBLIC[name]
    expected = jax.jit(measure)(*arguments)

    def step(state, _):
        return measure(*arguments), jax.tree.map(jnp.copy, state)

    assert_equal(jax.lax.scan(step, expected, None, length=2)[0], expected)


@pytest.mark.parametrize("name", ["activations", "dead_units", "weight_stats"])
def test_one_trace_of_the_network_for_repeated_calls(name):
    traces = []

    def counted(params, x):
        traces.append(name)
        return apply_fn(params, x)

    measure = getattr(ns, name)
    for scale in (1, 2, 3):
        measure(counted, PARAMS, INPUTS * scale)
    assert traces == [name]
    measure(counted, PARAMS, INPUTS[:7])
    assert traces == [name, name]


@pytest.mark.parametrize("name", PUBLIC)
def test_one_trace_of_the_measurement_within_jit(name):
    measure, arguments = PUBLIC[name]
    traces = []

    def counted(*arguments):
        traces.append(name)
        return measure(*arguments)

    compiled = jax.jit(counted)
    for one in (arguments, other(arguments), other(other(arguments))):
        compiled(*one)
    assert traces == [name]


@pytest.mark.parametrize("name", PUBLIC)
def test_arguments_are_left_alone(name):
    measure, arguments = PUBLIC[name]
    before = jax.tree.map(np.array, arguments)
    measure(*arguments)
    chex.assert_trees_all_equal(before, jax.tree.map(np.asarray, arguments))


HALVES = {
    "gradient_stats": (PARAMS,),
    "feature_moments": (INPUTS,),
    "z_scores": (INPUTS, MOMENTS),
    "normalization": (INPUTS,),
}


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("name", HALVES)
def test_half_precision_in_float32_out(name, dtype):
    first, *rest = HALVES[name]
    measure = PUBLIC[name][0]
    half = jax.tree.map(lambda leaf: leaf.astype(dtype), first)
    found = jax.jit(measure)(half, *rest)
    expected = jax.jit(measure)(
        jax.tree.map(lambda leaf: leaf.astype("f4"), half), *rest
    )
    assert_equal(found, expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", [*HALVES, "merge_moments"])
def test_users_may_forbid_promotion(name, dtype):
    measure, (first, *rest) = PUBLIC[name]
    if name != "merge_moments":
        first = jax.tree.map(lambda leaf: leaf.astype(dtype), first)
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(measure, first, *rest)


SHARDED = """
    import json
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
    import nnsanity as ns

    assert len(jax.devices()) == 4
    random = np.random.default_rng(0)
    inputs = (100 + random.normal(size=(64, 3))).astype(np.float32)
    params = {"w": random.normal(size=(3, 5)).astype(np.float32)}
    params["b"] = np.float32([-1e4, 0, 1e4, 0, 0])
    params["b"][3] = 0.5 - np.max(inputs @ params["w"], axis=0)[3]
    mesh = Mesh(np.array(jax.devices()), "batch", axis_types=(AxisType.Auto,))

    def apply_fn(params, x):
        return jax.nn.relu(x @ params["w"] + params["b"])

    def measure(params, x):
        dead = ns.dead_units(apply_fn, params, x)
        width = ns.width_profile(apply_fn, params, x).effective_rank
        loss_fn = lambda params, batch: jnp.mean(apply_fn(params, batch[0]))
        depth = ns.depth_profile(apply_fn, loss_fn, params, (x, x)).cosine
        return ns.feature_moments(x), ns.gradient_stats({"x": x}), dead, width, depth

    def run(spec):
        x = jax.device_put(inputs, NamedSharding(mesh, PartitionSpec(*spec)))
        compiled = jax.jit(measure).lower(params, x).compile()
        leaves = jax.tree.leaves(compiled(params, x))
        return [np.asarray(leaf).tolist() for leaf in leaves], compiled.as_text()

    sharded, text = run(["batch"])
    whole, _ = run([])
    entering = inputs @ params["w"] + params["b"]
    assert 0 < np.sum(entering[:, 3] > 0) < 16  # alive on one device, if at all
    dead = np.all(entering <= 0, axis=0).tolist()
    collectives = ["all-gather" in text, "all-reduce" in text]
    print(json.dumps([dead, whole, sharded, collectives]))
"""


def test_sharded_over_the_batch_equals_unsharded():
    dead, whole, sharded, (gathers, reduces) = printed_with_devices(SHARDED, 4)
    assert len(whole) == len(sharded) == 6 + 5 + 3 + 2
    for one, two in zip(whole, sharded, strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-4)
    sharded, whole = sharded[11:14], whole[11:14]
    assert sharded[0] == whole[0] == dead
    assert dead[0]
    assert not all(dead)
    assert sharded[1] == pytest.approx(np.mean(dead))
    assert sharded[2] == 64
    assert reduces
    assert not gathers


WORDS = np.array(["cat", "dog"] * 20)
RAGGED = np.array([[1], [1, 2]] * 20, object)
ADAM = optax.adam(1e-3)
ASKED_FOR_NUMBERS = {
    "feature_moments: values": ns.feature_moments,
    "z_scores: values": lambda given: ns.z_scores(given, MOMENTS),
    "normalize: values": lambda given: ns.normalize(given, MOMENTS),
    "denormalize: values": lambda given: ns.denormalize(given, MOMENTS),
    "normalization: inputs": ns.normalization,
    "target_scale: targets": lambda given: ns.target_scale(INPUTS, given),
    "outliers: values": ns.outliers,
    "constant_baseline: targets": lambda given: ns.constant_baseline(INPUTS, given),
    "worst_examples: batch": lambda given: ns.worst_examples(
        pair_loss_fn, PARAMS, (INPUTS, given)
    ),
    "input_dependence: batch": lambda given: ns.input_dependence(
        pair_loss_fn, PARAMS, (INPUTS, given), key=KEY
    ),
    "example_independence: inputs": lambda given: ns.example_independence(
        apply_fn, PARAMS, given
    ),
    "overfit_batch: batch": lambda given: ns.overfit_batch(
        pair_loss_fn, PARAMS, (INPUTS, given), ADAM, key=KEY
    ),
    "first_nonfinite: batch": lambda given: ns.first_nonfinite(
        pair_loss_fn, PARAMS, (INPUTS, given)
    ),
    "roundtrip_error: values": lambda given: ns.roundtrip_error(abs, abs, given),
    "continuity: targets": lambda given: ns.continuity(INPUTS, given, key=KEY),
    "wraparound: others": lambda given: ns.wraparound(INPUTS, others=given),
    "duplicates: targets": lambda given: ns.duplicates(INPUTS, given),
    "invariance: inputs": lambda given: ns.invariance(abs, abs, given),
}


@pytest.mark.parametrize("name", ASKED_FOR_NUMBERS)
def test_words_and_ragged_lists_are_refused_by_name(name):
    for given, dtype in ((WORDS, "<U3"), (RAGGED, "object")):
        with pytest.raises(TypeError, match=f"^{name} must hold .* dtype {dtype}"):
            ASKED_FOR_NUMBERS[name](given)


def test_keys_of_several_types_are_refused_by_name():
    network = lambda p, x: x @ p[0] + p["bias"]  # noqa: E731
    loss_fn = lambda p, batch: jnp.mean((network(p, batch[0]) - batch[1]) ** 2)  # noqa: E731
    mixed, batch = {0: jnp.ones((3, 1)), "bias": 0.0}, (INPUTS, INPUTS[:, :1])
    for name, function in {
        "overfit_batch": lambda: ns.overfit_batch(loss_fn, mixed, batch, ADAM, key=KEY),
        "worst_examples": lambda: ns.worst_examples(loss_fn, mixed, batch),
        "example_independence": lambda: ns.example_independence(network, mixed, INPUTS),
    }.items():
        with pytest.raises(TypeError, match=f"^{name}: params holds .* several types"):
            function()


def test_a_function_may_be_a_tree_with_words_in_it():
    loss_fn = equinox.filter_jit(pair_loss_fn)
    assert jax.tree.leaves(loss_fn) == ["pair_loss_fn"]
    found = ns.worst_examples(loss_fn, PARAMS, (INPUTS, INPUTS[:, 0]))
    expected = ns.worst_examples(pair_loss_fn, PARAMS, (INPUTS, INPUTS[:, 0]))
    assert_equal(found, expected)


def test_a_number_is_no_key():
    for function in (
        lambda key: ns.continuity(INPUTS, INPUTS, key=key),
        lambda key: ns.overfit_batch(
            pair_loss_fn, PARAMS, (INPUTS, INPUTS), ADAM, key=key
        ),
        lambda key: ns.input_dependence(
            pair_loss_fn, PARAMS, (INPUTS, INPUTS), key=key
        ),
    ):
        with pytest.raises(TypeError, match=r"key must be a PRNG key .*, got 0"):
            function(0)
        jax.eval_shape(function, jax.random.PRNGKey(0))


def test_keys_that_are_numbers_are_fine():
    network = lambda p, x: x @ p[0] + p[1]  # noqa: E731
    params = {0: jnp.ones((3, 1)), 1: jnp.zeros(1)}
    assert ns.leaf_names(params) == ("0", "1")
    (layer,) = ns.layers(network, params, INPUTS)
    assert layer.units == 1
