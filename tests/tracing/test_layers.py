"""Layers: their names, fans and units, what follows them, and what is not seen."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

import nnsanity as ns
from nnsanity.tracing.layers import inspect
from tests.tracing.programs import INPUTS, STYLES, WRAPPED, convolution

X = jnp.ones((5, 3))
KEY = jax.random.key(0)


def summary(apply_fn, params, inputs=X):
    return [(one.name, one.activation) for one in ns.layers(apply_fn, params, inputs)]


@pytest.mark.parametrize("style", STYLES)
def test_named_after_their_parameters_in_the_order_of_execution(style):
    apply_fn, params, names = style()
    found = ns.layers(apply_fn, params, INPUTS)
    assert tuple(one.name for one in found) == names
    assert [one.activation for one in found] == ["relu", "relu", None]
    assert [one[1:5] for one in found] == [
        *(("dense", 3, 4, 4), ("dense", 4, 5, 5), ("dense", 5, 2, 2))
    ]
    shapes = jax.eval_shape(lambda *args: args, params, INPUTS)
    assert ns.layers(jax.jit(apply_fn), *shapes) == found
    assert inspect(apply_fn, params, INPUTS).uninspected == {}


@pytest.mark.parametrize("name", WRAPPED)
def test_found_through_calls(name):
    params = {"w1": jnp.ones((3, 4)), "b1": jnp.ones(4)}
    params |= {"w2": jnp.ones((4, 2)), "b2": jnp.ones(2)}
    assert summary(WRAPPED[name], params) == [("w1", "relu"), ("w2", None)]


W = jnp.ones((3, 3))
NAMES = {
    "one bare array": (lambda p, x: x @ p, W, ["params"]),
    "used again": (lambda p, x: x @ p["w"] @ p["w"] @ p["w"], {"w": W}, "w w#2 w#3"),
    "leaf of a shared parent": (
        lambda p, x: x @ p["a"]["w1"] @ p["a"]["w2"],
        {"a": {"w1": W, "w2": W}},
        "a/w1 a/w2",
    ),
    "leaf of a parent with children": (
        lambda p, x: x @ p["a"]["w"] @ p["a"]["b"]["w"],
        {"a": {"w": W, "b": {"w": W}}},
        "a/w a/b",
    ),
    "a parent that begins like another": (
        lambda p, x: x @ p["a"]["w"] @ p["ab"]["w"],
        {"a": {"w": W}, "ab": {"w": W}},
        "a ab",
    ),
    "execution, not alphabet": (
        lambda p, x: x @ p["z"] @ p["a"],
        {"a": W, "z": W},
        "z a",
    ),
    "transposed, masked and cast": (
        lambda p, x: x @ (p["w"].T * jnp.tri(3)).astype(jnp.bfloat16),
        {"w": W},
        "w",
    ),
    "product of two": (
        lambda p, x: x @ (p["a"]["down"] @ p["a"]["up"]),
        {"a": {"down": jnp.ones((3, 1)), "up": jnp.ones((1, 3))}},
        "a",
    ),
}


@pytest.mark.parametrize("case", NAMES)
def test_names(case):
    apply_fn, params, expected = NAMES[case]
    expected = expected.split() if isinstance(expected, str) else expected
    assert [one.name for one in ns.layers(apply_fn, params, X)] == expected
    assert [one.name for one in ns.layers(jax.jit(apply_fn), params, X)] == expected


def implicit_filter(p, x):
    """Weights that a network makes of positions."""
    positions = jnp.linspace(0, 1, 3)[:, None]
    return x @ (jax.nn.relu(positions @ p["w1"] - 100) @ p["w2"])


def learned_queries(p, x):
    queries = p["q"] + jax.nn.relu(p["q"] @ p["up"] - 100) @ p["down"]
    return jax.nn.softmax(queries @ p["wq"] @ (x @ p["wk"]).T) @ x


def hypernetwork(p, x):
    return x @ (jax.nn.relu(p["z"] @ p["w1"] - 100) @ p["w2"])


def merged_pair(p, x):
    return jax.nn.relu(x @ (p["w"] + p["down"] @ p["up"]) - 100)


def weight_norm(p, x):
    norms = jnp.sqrt(jnp.einsum("ij,ij->j", p["w"], p["w"]))
    return jax.nn.relu(x @ (p["w"] / norms) - 100)


@pytest.mark.parametrize(
    ("apply_fn", "leaves", "names", "dead", "alone"),
    [
        (implicit_filter, "w1:1,5 w2:5,3", "w1 w2", "w1", ""),
        (learned_queries, "q up down wq wk", "up down wk wq", "up", ""),
        (hypernetwork, "z w1:3,5 w2:5,3", "w1 w2", "w1", "z"),
        (merged_pair, "w down:3,1 up:1,3", "w", "w", ""),
        (weight_norm, "w", "w", "w", ""),
    ],
)
def test_networks_that_make_weights(apply_fn, leaves, names, dead, alone):
    shapes = dict(f"{leaf}:3,3".split(":")[:2] for leaf in leaves.split())
    params = {
        name: jax.random.normal(KEY, tuple(map(int, shape.split(","))))
        for name, shape in shapes.items()
    }
    network = inspect(apply_fn, params, X)
    assert {one.layer.name for one in network.layers} == set(names.split())
    found = ns.dead_units(apply_fn, params, X)
    assert list(found.dead) == [dead]
    assert bool(found.dead[dead].all())
    assert list(network.uninspected) == alone.split()


def test_a_parameter_that_is_called_like_a_second_use():
    params = {"w": W, "w#2": W}
    found = ns.layers(lambda p, x: x @ p["w#2"] @ p["w"] @ p["w"], params, X)
    assert [one.name for one in found] == ["w#2", "w", "w#3"]


SEQUENCE = jnp.ones((2, 5, 4))
PICTURES = jnp.ones((2, 8, 8, 4))
GEOMETRY = [  # kind, fan_in, fan_out, units, by hand
    (lambda w, x: x @ w, (4, 7), SEQUENCE, ("dense", 4, 7, 7)),
    (lambda w, x: w @ x.reshape(-1, 4).T, (7, 4), SEQUENCE, ("dense", 4, 7, 7)),
    (lambda w, x: x @ w, (4,), SEQUENCE, ("dense", 4, 1, 1)),
    (convolution, (3, 3, 4, 6), PICTURES, ("conv", 36, 54, 6)),
    (
        lambda w, x: convolution(x, w, strides=(2, 2)),
        (3, 3, 4, 6),
        PICTURES,
        ("conv", 36, 54, 6),
    ),
    (
        lambda w, x: convolution(x, w, feature_group_count=2),
        (3, 3, 2, 6),
        PICTURES,
        ("conv", 18, 27, 6),
    ),
    (
        lambda w, x: convolution(x, w, feature_group_count=4),
        (3, 3, 1, 4),
        PICTURES,
        ("conv", 9, 9, 4),
    ),
    (
        lambda w, x: jnp.einsum("btd,dhk->bthk", x, w),
        (4, 2, 3),
        SEQUENCE,
        ("dense", 4, 6, 6),
    ),
    (
        lambda w, x: jnp.einsum("bthk,hkd->btd", x.reshape(2, 5, 2, 2), w),
        (2, 2, 7),
        SEQUENCE,
        ("dense", 4, 7, 7),
    ),
    (
        lambda w, x: jnp.einsum("bed,edk->bek", x, w),
        (5, 4, 3),
        SEQUENCE,
        ("dense", 4, 3, 15),
    ),
    (lambda w, x: w[x], (9, 6), jnp.ones((2, 5), int), ("embedding", 1, 6, 6)),
    (
        lambda w, x: jnp.take(w, x, axis=0),
        (9, 6),
        jnp.ones(5, int),
        ("embedding", 1, 6, 6),
    ),
]


@pytest.mark.parametrize(("fn", "shape", "inputs", "expected"), GEOMETRY)
def test_geometry(fn, shape, inputs, expected):
    swapped = fn is convolution
    apply_fn = (lambda w, x: fn(x, w)) if swapped else fn
    (one,) = ns.layers(apply_fn, jnp.ones(shape), inputs)
    assert one[1:5] == expected


class Normalized(linen.Module):
    training: bool

    @linen.compact
    def __call__(self, x):
        x = linen.Conv(4, (3, 3))(x)
        x = linen.relu(linen.BatchNorm(use_running_average=not self.training)(x))
        x = linen.relu(linen.max_pool(linen.Conv(4, (3, 3))(x), (2, 2), (2, 2)))
        x = linen.tanh(linen.LayerNorm()(linen.Dense(4)(x.reshape(len(x), -1))))
        x = linen.Dropout(0.5, deterministic=not self.training)(x)
        return linen.softmax(linen.Dense(3)(x))


@pytest.mark.parametrize("training", [False, True])
def test_chains_lead_through_bias_normalization_pooling_and_dropout(training):
    model = Normalized(training)
    variables = model.init({"params": KEY, "dropout": KEY}, PICTURES)
    rest = {"batch_stats": variables["batch_stats"]}

    def apply_fn(params, x):
        rngs = {"dropout": KEY}
        return model.apply(
            {"params": params, **rest}, x, rngs=rngs, mutable=["batch_stats"]
        )[0]

    params = variables["params"]
    assert summary(apply_fn, params, PICTURES) == [
        *(("Conv_0", "relu"), ("Conv_1", "relu")),
        *(("Dense_0", "tanh"), ("Dense_1", "softmax")),
    ]
    names = ns.leaf_names(params)
    owners = {
        one.layer.name: {names[leaf] for leaf in one.leaves}
        for one in inspect(apply_fn, params, PICTURES).layers
    }
    norm = {"BatchNorm_0/scale", "BatchNorm_0/bias"}
    assert owners["Conv_0"] == {"Conv_0/kernel", "Conv_0/bias"} | norm
    assert owners["Conv_1"] == {"Conv_1/kernel", "Conv_1/bias"}


def test_nnx_batch_norm_with_running_statistics():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(3, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)

        def __call__(self, x):
            return nnx.relu(self.norm(self.dense(x)))

    graphdef, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)

    def apply_fn(params, x):
        return nnx.merge(graphdef, params, rest, copy=True)(x)

    assert summary(apply_fn, params) == [("dense", "relu")]


def test_residual_networks():
    def block(params, x):
        return x + jax.nn.relu(x @ params["up"]) @ params["down"]

    def apply_fn(params, x):
        x = jax.nn.relu(x @ params["stem"])
        x = x + jnp.tanh(x @ params["skip"])
        return block(params, block(params, x))

    params = dict.fromkeys(("stem", "skip", "up", "down"), W)
    assert summary(apply_fn, params) == [
        *(("stem", "relu"), ("skip", "tanh")),
        *(("up", "relu"), ("down", None), ("up#2", "relu"), ("down#2", None)),
    ]


def looping(p, x):
    return jax.lax.while_loop(lambda c: jnp.sum(c @ p["w"]) < 9, lambda c: c + 1, x)


def looked_up(p, x):
    return jax.lax.scan(lambda c, t: (c + p["w"][t], None), x[0], jnp.arange(3))[0]


@pytest.mark.parametrize(
    ("hidden_layer", "reason"),
    [
        (looping, "inside of while"),
        (looked_up, "look-up"),
        (lambda p, x: x + jnp.sum(x[:, :, None] * p["w"], 1), "used by mul"),
        (lambda p, x: x * jax.lax.rsqrt(p["w"][0, 0]), "used by"),
        (lambda p, x: x, "not used"),
    ],
)
def test_what_is_not_inspected_is_listed(hidden_layer, reason):
    def apply_fn(params, x):
        return jax.nn.relu(hidden_layer(params, x) @ params["seen"])

    network = inspect(apply_fn, {"w": W, "seen": W}, X)
    assert [one.layer.name for one in network.layers] == ["seen"]
    assert list(network.uninspected) == ["w"]
    assert reason in network.uninspected["w"]


def test_a_learned_temperature_is_listed():
    def apply_fn(params, x):
        return jax.nn.relu(x @ params["w"]) @ params["w"] / params["temperature"]

    found = inspect(apply_fn, {"temperature": jnp.float32(2), "w": W}, X)
    assert [one.layer.name for one in found.layers] == ["w", "w#2"]
    assert found.layers[1].leaves == {0, 1}  # it scales the output of the last layer
    assert found.uninspected == {}


def test_sixty_four_layers():
    def apply_fn(params, x):
        for w in params:
            x = jax.nn.relu(x @ w)
        return x

    network = inspect(apply_fn, [W] * 64, X)
    assert [one.layer.name for one in network.layers] == [str(i) for i in range(64)]
    assert {one.layer.activation for one in network.layers} == {"relu"}
    assert sum(len(stage.steps) for one in network.layers for stage in one.stages) == 64
