import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from nnsanity.checks.initialization import (
    Scale,
    judge_biases,
    judge_scale,
    judge_signal,
    judge_symmetry,
    worst_scale,
)
from nnsanity.quantities.drawing import (
    chance_interval,
    needed_gain,
    redrawn,
    without_biases,
)
from nnsanity.quantities.signal_gain import gain_of
from nnsanity.quantities.weight_sizes import weight_stats
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
    assert [leaf.shape for leaf in stats[:5]] == [(0,)] * 5
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


def test_weights_of_one_shape_are_drawn_apart():
    params = [jnp.ones((64, 64), jnp.bfloat16), jnp.ones((64, 64)), jnp.ones((64, 3))]
    network = inspect(lambda p, x: x @ p[0] @ p[1] @ p[2], params, jnp.ones((2, 64)))
    drawn = redrawn(network, params, KEY)
    assert [one.dtype for one in drawn] == [one.dtype for one in params]
    for leaf, one in enumerate(drawn):
        noise = jax.random.normal(jax.random.fold_in(KEY, leaf), one.shape)
        np.testing.assert_allclose(np.float32(one), noise / 8, rtol=1e-2, atol=1e-6)
    first, second = (np.float32(one).ravel() for one in drawn[:2])
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1


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


def test_chance_is_what_chi_square_says():
    for size in (4, 10, 100, 10_000):
        exact = [math.sqrt(chi2.ppf(q, size) / size) for q in (0.0005, 0.9995)]
        np.testing.assert_allclose(chance_interval(size), exact, rtol=0.02, atol=0.06)


def test_few_weights_may_be_off_by_chance():
    weight = jnp.full((2, 2), 0.3)  # 0.43 times what four weights need
    network = inspect(lambda p, x: x @ p, weight, INPUTS[:, :2])
    stats = weight_stats(lambda p, x: x @ p, weight, INPUTS[:, :2])
    assert judge_scale(worst_scale(stats, network), num_layers=1) == ()


def stack(params, x):
    def block(h, w):
        return jax.nn.relu(h @ w), None

    return jax.lax.scan(block, x, params["blocks"])[0] @ params["head"]


def stack_params(*gains):
    blocks = [RNG.normal(size=(20, 20)) * gain / math.sqrt(20) for gain in gains]
    head = RNG.normal(size=(20, 2)) / math.sqrt(20)
    return {"blocks": jnp.float32(np.stack(blocks)), "head": jnp.float32(head)}


def test_the_bad_block_of_a_stack_is_named():
    params = stack_params(1.41, 1.41, 40, 1.41)
    stats = weight_stats(stack, params, INPUTS)
    expected = [np.sqrt((np.asarray(w) ** 2).mean() * 20) for w in params["blocks"]]
    np.testing.assert_allclose(stats.gain[:4], expected, rtol=1e-5)
    worst = worst_scale(stats, inspect(stack, params, INPUTS))
    (found,) = judge_scale(worst, num_layers=5)
    assert found.where == "blocks[2]"
    equal = params | {"blocks": params["blocks"].at[1].set(0.1)}
    alike = weight_stats(stack, equal, INPUTS)
    (symmetric,) = judge_symmetry(alike, alike, inspect(stack, equal, INPUTS))
    assert symmetric.where == "blocks[1]"


def biased(bias):
    return PARAMS | {"b1": jnp.full(64, bias), "b2": jnp.full(5, 100.0)}


@pytest.mark.parametrize(("bias", "rules"), [(-50.0, ["large-bias"]), (0.1, [])])
def test_biases_that_drown_the_weights(bias, rules):
    stats = weight_stats(mlp, biased(bias), INPUTS)
    made = np.asarray(INPUTS) @ np.asarray(PARAMS["w1"])
    expected = abs(bias) / math.sqrt((made**2).mean())
    assert float(stats.bias[0]) == pytest.approx(expected, rel=1e-4)
    found = judge_biases(stats, NETWORK)
    assert [one.rule for one in found] == [f"initialization/{rule}" for rule in rules]
    assert all(one.where == "w1" and "zeros" in one.advice for one in found)


def test_biases_are_set_to_zero_and_nothing_else_is():
    params = without_biases(NETWORK, biased(-50.0))
    assert not params["b1"].any()
    assert not params["b2"].any()
    np.testing.assert_array_equal(params["w1"], PARAMS["w1"])


class Residual(nn.Module):
    """Two blocks; the last layer of each starts at ``gain``, behind a skip."""

    gain: float = 0.0
    norm: bool = False
    size: float = 1.0

    @nn.compact
    def __call__(self, x):
        first = nn.initializers.variance_scaling(2 * self.size**2, "fan_in", "normal")
        if self.gain:
            last = nn.initializers.variance_scaling(self.gain**2, "fan_in", "normal")
        else:
            last = nn.initializers.zeros
        for _ in range(2):
            h = nn.Dense(40, kernel_init=first)(x)
            h = nn.relu(nn.LayerNorm()(h) if self.norm else h)
            x = x + nn.Dense(20, kernel_init=last)(h)
        return x


@pytest.mark.parametrize(
    ("model", "is_healthy"),
    [
        (Residual(0.0), True),
        (Residual(0.1), True),
        (Residual(20.0), False),
        (Residual(0.0, norm=True, size=30), True),
        (Residual(0.0, norm=False, size=30), False),
    ],
)
def test_residual_and_normalized_networks_need_less(model, is_healthy):
    params = model.init(KEY, INPUTS)
    stats = weight_stats(model.apply, params, INPUTS)
    worst = worst_scale(stats, inspect(model.apply, params, INPUTS))
    ratio = worst.ratio
    assert (0.5 <= ratio <= 2) == is_healthy
    moved = worst._replace(change=99.0)  # so that the ratio alone decides
    assert bool(judge_scale(moved, num_layers=4)) != is_healthy


@pytest.mark.parametrize(
    ("signal", "rules", "where"),
    [
        ([1, 2, 4, 3], [], ""),
        ([1, 2, 60, 70], ["signal-grows"], "w3"),
        ([1, 0.001, 0.001, 0.002], ["signal-fades"], "w2"),
        ([1, 1, 1, math.nan], ["signal-grows"], "w4"),
        ([1, 1, 1, 0], ["signal-fades"], "w4"),
    ],
)
def test_judge_signal(signal, rules, where):
    weights = {f"w{i}": jnp.eye(4) for i in range(1, 5)}
    run = lambda p, x: x @ p["w1"] @ p["w2"] @ p["w3"] @ p["w4"]  # noqa: E731
    network = inspect(run, weights, INPUTS[:, :4])
    gain = gain_of(network, jnp.float32(signal), jnp.ones(4))
    found = judge_signal(gain, network)
    assert [one.rule for one in found] == [f"initialization/{rule}" for rule in rules]
    assert [one.where for one in found] == [where] * len(rules)
    assert all("kernel_init=jax.nn.initializers." in one.advice for one in found)


def test_units_behind_a_dead_layer_are_not_called_symmetric():
    def three(params, x):
        x = jax.nn.relu(x @ params["w1"] + params["b1"])
        return jnp.tanh(x @ params["w2"] - 50.3) @ jnp.ones((5, 2)) @ params["w3"]

    params = PARAMS | {"b1": jnp.full(64, -99.0), "w3": jnp.ones((2, 2))}
    stats = weight_stats(three, params, INPUTS)
    assert stats.signal[1] == 0
    assert judge_symmetry(stats, stats, inspect(three, params, INPUTS)) == ()
