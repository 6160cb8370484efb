import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnsanity.checks.initialization import (
    Scale,
    judge_scale,
    judge_symmetry,
    needed_gain,
    redrawn,
    weight_stats,
    worst_scale,
)
from nnsanity.tracing.layers import inspect

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
INPUTS = jnp.asarray(RNG.normal(size=(64, 20)), jnp.float32)


class Text(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8)(tokens).mean(axis=1)
        x = nn.relu(nn.LayerNorm()(nn.Dense(40)(x)))
        return nn.Dense(3)(nn.tanh(nn.Dense(30)(x)))


TOKENS = jnp.asarray(RNG.integers(0, 11, (5, 7)))


def mlp(params, x):
    x = jax.nn.relu(x @ params["w1"] + params["b1"])
    return x @ params["w2"] + params["b2"]


def mlp_params(gain1=1.414, gain2=1.0, units=64):
    w1, w2 = (RNG.normal(size=shape) for shape in ((20, units), (units, 5)))
    return jax.tree.map(
        jnp.float32,
        {
            "w1": w1 * gain1 / math.sqrt(20),
            "b1": np.zeros(units),
            "w2": w2 * gain2 / math.sqrt(units),
            "b2": np.zeros(5),
        },
    )


PARAMS = mlp_params()
NETWORK = inspect(mlp, PARAMS, INPUTS)


def test_weight_stats_against_numpy():
    stats = weight_stats(mlp, PARAMS, INPUTS)
    w1, b1, w2, b2 = (
        np.asarray(PARAMS[name], np.float64) for name in ("w1", "b1", "w2", "b2")
    )
    first = np.asarray(INPUTS, np.float64) @ w1 + b1
    signals = [first, np.maximum(first, 0) @ w2 + b2]
    deviation = [math.sqrt((w**2).mean()) for w in (w1, w2)]
    np.testing.assert_allclose(stats.deviation, deviation, rtol=1e-5)
    gains = np.array(deviation) * np.sqrt([20, 64])
    np.testing.assert_allclose(stats.gain, gains, rtol=1e-5)
    np.testing.assert_allclose(stats.signal, [s.std() for s in signals], rtol=1e-5)
    spread = [
        np.abs(s - s.mean(axis=1, keepdims=True)).max() / np.sqrt((s**2).mean())
        for s in signals
    ]
    np.testing.assert_allclose(stats.unit_spread, spread, rtol=1e-4)


def test_fan_in_of_a_convolution():
    model, images = nn.Conv(6, (3, 3)), jnp.ones((1, 8, 8, 4))
    params = model.init(KEY, images)
    deviation = np.sqrt(np.mean(np.asarray(params["params"]["kernel"]) ** 2))
    stats = weight_stats(model.apply, params, images)
    np.testing.assert_allclose(stats.gain, [deviation * 6.0], rtol=1e-5)  # 3 * 3 * 4


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_one_row_in_half_precision(dtype):
    params, row = jax.tree.map(lambda leaf: leaf.astype(dtype), (PARAMS, INPUTS[:1]))
    stats, exact = weight_stats(mlp, params, row), weight_stats(mlp, PARAMS, INPUTS)
    assert stats.gain.dtype == jnp.float32
    np.testing.assert_allclose(stats.gain, exact.gain, rtol=0.01)
    assert np.isfinite(stats.signal).all()


def test_no_layers():
    stats = weight_stats(lambda p, x: x * p, jnp.ones(20), INPUTS)
    assert [leaf.shape for leaf in stats] == [(0,)] * 4
    assert worst_scale(stats, inspect(lambda p, x: x * p, jnp.ones(20), INPUTS)) is None
    assert judge_scale(None, num_layers=0) == ()


@pytest.mark.parametrize(
    ("activation", "gain"),
    [
        (jax.nn.relu, math.sqrt(2)),
        (jax.nn.gelu, math.sqrt(2)),
        (jax.nn.leaky_relu, math.sqrt(2)),
        (jnp.tanh, 1),
        (jax.nn.sigmoid, 1),
        (lambda x: x, 1),
    ],
)
def test_needed_gain(activation, gain):
    network = inspect(lambda w, x: activation(x @ w), jnp.ones((20, 2)), INPUTS)
    assert needed_gain(network.layers[0]) == pytest.approx(gain)


def test_redrawn_weights_have_the_gain_of_theory():
    bad = jax.tree.map(lambda leaf: leaf * 0 + 9, mlp_params(units=300))
    drawn = redrawn(inspect(mlp, bad, INPUTS), bad, KEY)
    for name, expected in (("w1", math.sqrt(2)), ("w2", 1.0)):
        weight = np.asarray(drawn[name], np.float64)
        gain = weight.std() * math.sqrt(len(weight))
        # The relative error of a deviation from n normal numbers is sqrt(1 / (2 n)).
        assert abs(gain / expected - 1) < 4 * math.sqrt(0.5 / weight.size)
        assert abs(weight.mean()) < 4 * weight.std() / math.sqrt(weight.size)
    assert not drawn["b1"].any()
    assert not drawn["b2"].any()


@pytest.fixture(scope="module")
def text():
    model = Text()
    params = model.init(KEY, TOKENS)
    params = jax.tree.map(lambda leaf: leaf + 0.5, params)
    network = inspect(model.apply, params, TOKENS)
    return params["params"], redrawn(network, params, jax.random.key(1))["params"]


@pytest.mark.parametrize(
    ("layer", "name"), [("Embed_0", "embedding"), ("LayerNorm_0", "scale")]
)
def test_redrawn_leaves_alone(text, layer, name):
    before, after = text
    np.testing.assert_array_equal(after[layer][name], before[layer][name])


@pytest.mark.parametrize("layer", ["Dense_0", "Dense_1", "Dense_2"])
def test_redrawn_dense_layers(text, layer):
    before, after = text
    assert not after[layer]["bias"].any()
    assert (after[layer]["kernel"] != before[layer]["kernel"]).all()
    # A constant added to a kernel shows in its mean.
    assert abs(float(after[layer]["kernel"].mean())) < 0.2


def test_redrawn_keeps_dtypes_and_depends_on_the_key():
    params = jax.tree.map(jnp.bfloat16, PARAMS)
    network = inspect(mlp, params, INPUTS)
    first, second = (redrawn(network, params, jax.random.key(seed)) for seed in (1, 2))
    assert {leaf.dtype for leaf in jax.tree.leaves(first)} == {jnp.dtype(jnp.bfloat16)}
    assert (first["w1"] != second["w1"]).mean() > 0.9
    again = redrawn(network, params, jax.random.key(1))
    np.testing.assert_array_equal(first["w1"], again["w1"])


@pytest.mark.parametrize(
    ("gains", "name", "ratio", "alarms"),
    [
        ((30, 1), "w1", 30 / math.sqrt(2), False),  # from first to last nothing changes
        ((1.4, 0.01), "w2", 0.01, True),
        ((1.4, 60), "w2", 60, True),
        ((1.4, 3), "w2", 3, False),
    ],
)
def test_worst_scale(gains, name, ratio, alarms):
    worst = worst_scale(weight_stats(mlp, mlp_params(*gains), INPUTS), NETWORK)
    assert worst.layer.layer.name == name
    assert worst.ratio == pytest.approx(ratio, rel=0.15)
    found = judge_scale(worst, num_layers=2)
    assert [one.rule for one in found] == ["initialization/off-scale"] * alarms
    assert all("jax.nn.initializers.lecun_normal()" in one.advice for one in found)


def test_healthy_scale():
    assert (
        judge_scale(
            worst_scale(weight_stats(mlp, PARAMS, INPUTS), NETWORK), num_layers=2
        )
        == ()
    )


@pytest.mark.parametrize(
    ("ratio", "change", "num_layers", "alarms"),
    [
        (1.0, 1.0, 1, False),
        (1.9, 99.0, 5, False),
        (9.0, 1.0, 5, False),
        (9.0, 11.0, 5, True),
        (0.4, 0.05, 5, True),
        (9.0, 1.0, 1, True),
        (math.nan, math.nan, 5, True),
        (0.0, 0.0, 5, True),
    ],
)
def test_judge_scale(ratio, change, num_layers, alarms):
    found = judge_scale(Scale(NETWORK.layers[0], ratio, change), num_layers=num_layers)
    assert len(found) == alarms


@pytest.mark.parametrize("name", ["w1", "w2"])
def test_a_nan_weight_is_the_worst(name):
    params = PARAMS | {name: PARAMS[name].at[0, 0].set(math.nan)}
    worst = worst_scale(weight_stats(mlp, params, INPUTS), NETWORK)
    assert worst.layer.layer.name == name
    assert judge_scale(worst, num_layers=2)


def symmetric(start, end=None):
    stats = [None if p is None else weight_stats(mlp, p, INPUTS) for p in (start, end)]
    return judge_symmetry(*stats, NETWORK)


@pytest.mark.parametrize(("value", "rule"), [(0.3, "symmetric"), (0.0, "zero")])
def test_units_that_are_one(value, rule):
    alike = PARAMS | {"w1": jnp.full((20, 64), value)}
    (suspicion,) = symmetric(alike)
    (proof,) = symmetric(alike, alike)
    assert suspicion.rule == proof.rule == f"initialization/{rule}"
    assert (suspicion.severity, proof.severity) == ("info", "error")
    assert proof.where == "w1"
    assert symmetric(alike, PARAMS) == ()


def test_units_that_differ():
    assert symmetric(PARAMS, PARAMS) == ()
    alike_outputs = PARAMS | {"w2": jnp.zeros((64, 5))}
    assert symmetric(alike_outputs, alike_outputs) == ()
