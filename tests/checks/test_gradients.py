import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnsanity.checks.gradients import (
    harmful_activation,
    judge_blocked_share,
    judge_dead_units,
    judge_gradients,
    judge_reach,
    judge_saturated_units,
    judge_unchanged,
)
from nnsanity.quantities.clipped import BlockedShare
from nnsanity.quantities.dead import DeadUnits, dead_units
from nnsanity.quantities.gradient_sizes import GradientStats, gradient_stats
from nnsanity.quantities.saturated import saturated_units
from nnsanity.tracing.layers import Uninspected, inspect
from nnsanity.tracing.reach import reach

RNG = np.random.default_rng(0)
NAN, INF = math.nan, math.inf


def column(stats, name):
    return getattr(stats, name).tolist()


def test_gradient_stats_against_numpy():
    grads = {"a": RNG.normal(size=(30, 7)), "b": RNG.normal(size=9) * 1e-3}
    grads["b"][:3] = 0
    stats = gradient_stats(jax.tree.map(jnp.float32, grads))
    leaves = [grads["a"], grads["b"]]
    norms = [np.linalg.norm(leaf) for leaf in leaves]
    np.testing.assert_allclose(stats.norm, norms, rtol=1e-5)
    np.testing.assert_allclose(stats.largest, [np.abs(leaf).max() for leaf in leaves])
    assert column(stats, "zero_fraction") == pytest.approx([0, 3 / 9])
    assert column(stats, "nonfinite_fraction") == [0, 0]
    assert column(stats, "underflow_fraction") == [0, 0]


WIDE = [(dtype, size) for dtype in ("f4", jnp.bfloat16) for size in (1e30, 1e-30)]


@pytest.mark.parametrize(
    ("dtype", "value"), [*WIDE, (jnp.float16, 6e4), (jnp.complex64, 1e30)]
)
@pytest.mark.parametrize("compiled", [False, True])
def test_norm_neither_overflows_nor_vanishes(dtype, value, compiled):
    leaf = jnp.full(100, value, dtype)
    measure = jax.jit(gradient_stats) if compiled else gradient_stats
    stats = measure([leaf])
    exact = abs(complex(leaf[0]))
    assert stats.norm.dtype == jnp.float32
    assert column(stats, "norm") == pytest.approx([10 * exact], rel=1e-5)
    assert column(stats, "largest") == pytest.approx([exact], rel=1e-6)
    assert column(stats, "nonfinite_fraction") == [0]


@pytest.mark.parametrize(
    ("dtype", "tiny"), [(jnp.float16, 1e-6), (jnp.bfloat16, 1e-39), ("f4", 1e-39)]
)
@pytest.mark.parametrize("compiled", [False, True])
def test_underflow(dtype, tiny, compiled):
    leaf = jnp.asarray(np.array([tiny, -tiny, 1.0, 0.5, 0.0], dtype))
    measure = jax.jit(gradient_stats) if compiled else gradient_stats
    stats = measure([leaf])
    assert column(stats, "underflow_fraction") == [0.5]
    assert column(stats, "zero_fraction") == pytest.approx([0.2])


def test_one_nan_among_many_shows_in_the_largest():
    stats = gradient_stats([jnp.ones(100_000).at[33_333].set(NAN)])
    assert np.isnan([stats.norm, stats.largest]).all()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_nonfinite_gradients(value):
    stats = gradient_stats([jnp.array([1.0, value, 0.0, 2.0]), jnp.ones(4)])
    assert column(stats, "nonfinite_fraction") == [0.25, 0]
    np.testing.assert_equal(column(stats, "norm"), [abs(value), 2])
    np.testing.assert_equal(column(stats, "largest"), [abs(value), 1])


def test_what_is_not_a_float_is_passed_over():
    params = {"count": jnp.arange(3), "none": None, "w": jnp.array([3.0, 4.0])}
    assert column(gradient_stats(params), "norm") == [5]
    grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2), allow_int=True)(params)
    assert column(gradient_stats(grads), "norm") == [10]


@pytest.mark.parametrize("tree", [{}, None, [jnp.arange(3)]])
def test_empty_tree(tree):
    assert [leaf.shape for leaf in gradient_stats(tree)] == [(0,)] * 5


@pytest.mark.parametrize("shape", [(0,), (3, 0), (4,), ()])
def test_zero_gradient(shape):
    norm, largest, _, *shares = gradient_stats([jnp.zeros(shape)])
    assert [norm[0], largest[0], *shares] == [0, 0, 0, 0]


THRESHOLDS = {
    "relu": (jax.nn.relu, lambda x: x <= 0),
    "clip": (lambda x: jnp.clip(x, -1, 1), lambda x: (x <= -1) | (x >= 1)),
    "relu6": (jax.nn.relu6, lambda x: (x <= 0) | (x >= 6)),
    "hard_sigmoid": (jax.nn.hard_sigmoid, lambda x: (x <= -3) | (x >= 3)),
}
SMOOTH = {"gelu": jax.nn.gelu, "tanh": jnp.tanh, "leaky_relu": jax.nn.leaky_relu}
PARAMS = {
    "w1": jnp.asarray(RNG.normal(size=(3, 6)), jnp.float32),
    "b1": jnp.array([0, 0, -50, 0, 50, -50.0]),
    "w2": jnp.ones((6, 1)),
}
INPUTS = jnp.asarray(RNG.normal(size=(300, 3)), jnp.float32)


def two_layers(activation):
    return lambda p, x: activation(x @ p["w1"] + p["b1"]) @ p["w2"]


@pytest.mark.parametrize("name", THRESHOLDS)
def test_dead_units_against_numpy(name):
    activation, is_flat = THRESHOLDS[name]
    found = dead_units(two_layers(activation), PARAMS, INPUTS)
    entering = np.asarray(INPUTS @ PARAMS["w1"] + PARAMS["b1"], np.float64)
    expected = is_flat(entering).all(axis=0)
    assert 0 < expected.mean() < 1
    assert found.dead["w1"].tolist() == expected.tolist()
    assert found.fraction["w1"] == pytest.approx(expected.mean())
    assert list(found.dead) == ["w1"]


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_layers_have_no_dead_units(name):
    assert dead_units(two_layers(SMOOTH[name]), PARAMS, INPUTS).dead == {}


def test_dead_channels_of_a_convolution():
    model = nn.Sequential([nn.Conv(4, (3, 3)), nn.relu, lambda x: x.mean((1, 2))])
    images = jnp.asarray(RNG.uniform(size=(2, 5, 5, 1)), jnp.float32)
    params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0), images))
    params["params"]["layers_0"]["bias"] = jnp.array([1.0, -1, 1, -1])
    found = dead_units(model.apply, params, images)
    assert found.dead["layers_0"].tolist() == [False, True, False, True]


def test_one_row_in_bfloat16():
    params, row = jax.tree.map(jnp.bfloat16, (PARAMS, INPUTS[:1]))
    found = dead_units(two_layers(jax.nn.relu), params, row)
    entering = row.astype(jnp.float32) @ PARAMS["w1"] + PARAMS["b1"]
    assert found.dead["w1"].tolist() == (entering[0] <= 0).tolist()


@pytest.mark.parametrize(
    ("num_dead", "num_examples", "alarms"),
    [(1, 300, False), (2, 300, True), (2, 255, False), (10, 3, True), (0, 300, False)],
)
def test_judge_dead_units(num_dead, num_examples, alarms):
    mask = jnp.arange(10) < num_dead
    found = judge_dead_units(DeadUnits({"w": mask}, {"w": mask.mean()}), num_examples)
    assert [one.rule for one in found] == ["gradients/dead-units"] * alarms
    if alarms:
        assert found[0].measured == pytest.approx(num_dead / 10)
        assert f"{num_dead} of 10 units of w" in found[0].message


@pytest.mark.parametrize(
    ("num_awake", "words"),
    [(0, "they stay dead"), (1, "What enters 1 of them"), (3, "What enters them all")],
)
def test_what_may_come_back_is_told(num_awake, words):
    mask = jnp.arange(10) < 3
    measured = DeadUnits({"w": mask}, {"w": mask.mean()})
    awake = {"w": jnp.arange(10) < num_awake}
    (found,) = judge_dead_units(measured, 300, recoverable=awake)
    assert words in found.message


def blocked(share):
    return BlockedShare({"net.py:3 (f): clamp": jnp.float32(share)}, Uninspected())


@pytest.mark.parametrize(
    ("share", "alarms"), [(0.95, True), (0.85, False), (0.0, False), (NAN, False)]
)
def test_judge_blocked_share(share, alarms):
    found = judge_blocked_share(blocked(share))
    assert [one.rule for one in found] == ["gradients/blocked-share"] * alarms
    assert [one.where for one in found] == ["net.py:3 (f): clamp"] * alarms


def stats_of(*sizes, **changes):
    ones = jnp.ones(len(sizes))
    values = jnp.array(sizes)
    return GradientStats(values, values, 0 * ones, 0 * ones, 0 * ones)._replace(
        **changes
    )


SCALARS = {"a": jnp.ones(1), "count": jnp.arange(1), "w": jnp.ones(1)}
LAYERS = {"a": 0, "w": 2}
BAD = jnp.array([0, 0.5])


@pytest.mark.parametrize(
    ("stats", "rules"),
    [
        (stats_of(1.0, 1.0), []),
        (stats_of(1.0, 1e-9), []),
        (stats_of(69.0, 60.0), []),
        (stats_of(1.0, 0.0), []),
        (stats_of(1.0, 71.0), ["exploding"]),
        (stats_of(1e-4, 1.0), ["vanishing"]),
        (stats_of(0.0, 0.0), ["vanishing"]),
        (stats_of(0.0, 1.0), ["vanishing"]),
        (stats_of(1.0, NAN, nonfinite_fraction=BAD), ["nonfinite", "exploding"]),
        (stats_of(NAN, 1.0), ["exploding", "vanishing"]),
    ],
)
def test_judge_gradients(stats, rules):
    found = judge_gradients(stats, SCALARS, LAYERS)
    assert [one.rule for one in found] == [f"gradients/{rule}" for rule in rules]


def test_the_leaf_is_named():
    stats = stats_of(1.0, 99.0, nonfinite_fraction=BAD)
    found = judge_gradients(stats, SCALARS, {})
    assert [(one.where, one.severity[0]) for one in found] == [("w", "e"), ("w", "i")]
    assert judge_gradients(stats_of(), {}, {}) == ()


def reach_findings(cut):
    def loss_fn(params, x):
        return jnp.mean(cut(x @ params["w"]) + params["b"])

    return judge_reach(reach(loss_fn, {"w": jnp.ones(3), "b": 0.0}, jnp.ones((4, 3))))


@pytest.mark.parametrize(
    ("cut", "severity"),
    [
        (jnp.round, "error"),
        (lambda y: (y > 0).astype(jnp.float32), "error"),
        (jax.lax.stop_gradient, "info"),
    ],
)
def test_blocked(cut, severity):
    (found,) = reach_findings(cut)
    assert (found.rule, found.severity) == ("gradients/blocked", severity)
    assert "test_gradients.py" in found.where
    assert "1 of 2 parameters" in found.message


@pytest.mark.parametrize(
    "cut",
    [
        jnp.tanh,
        lambda y: y + jax.lax.stop_gradient(jnp.round(y) - y),
        lambda y: y * jnp.sign(y),
    ],
)
def test_not_blocked(cut):
    assert reach_findings(cut) == ()


def test_disconnected():
    (found,) = reach_findings(lambda y: jnp.ones(4))
    assert (found.rule, found.severity) == ("gradients/disconnected-parameter", "info")
    assert found.where == "w"


@pytest.mark.parametrize(
    ("activation", "rule"), [(jnp.tanh, "vanishing"), (jax.nn.relu, "dead-units")]
)
def test_harmful_activation(activation, rule):
    first = inspect(two_layers(activation), PARAMS, INPUTS).layers[0]
    found = harmful_activation(first, ["relu"])
    assert (found.rule, found.where) == (f"gradients/{rule}", "w1")


@pytest.mark.parametrize(("share", "alarms"), [(0.0, 0), (0.05, 0), (0.5, 1), (NAN, 1)])
def test_gradients_that_lose_digits(share, alarms):
    stats = GradientStats(*np.ones((4, 1)), np.array([share]))._replace(
        nonfinite_fraction=np.zeros(1), zero_fraction=np.zeros(1)
    )
    found = judge_gradients(stats, {"w": jnp.ones(3)}, {})
    assert [one.rule for one in found] == ["gradients/underflow"] * alarms


def test_subnormal_gradients_are_seen():
    grads = {"w": jnp.array([1e-6, 3e-8, 1.0, 0.0], jnp.float16)}
    found = judge_gradients(gradient_stats(grads), grads, {})
    assert [one.rule for one in found] == ["gradients/underflow"]
    assert found[0].measured == pytest.approx(2 / 3, rel=1e-5)


def test_parameters_that_stay():
    start = {"a": np.ones(3), "b": np.ones(2), "c": np.ones(2), "n": np.int32(3)}
    end = start | {"a": np.array([1, 1, 1 + 1e-9]), "c": np.full(2, NAN)}
    (found,) = judge_unchanged(start, end)
    assert (found.rule, found.where) == ("gradients/unchanged-parameter", "b")
    assert judge_unchanged(start, end, known={"b"}) == ()


def deep(activation, scale):
    weights = [jnp.asarray(RNG.normal(size=(20, 20)) * scale, jnp.float32)] * 3

    def apply_fn(params, x):
        for w in params:
            x = activation(x @ w)
        return x @ jnp.ones((20, 1))

    return apply_fn, weights


@pytest.mark.parametrize(
    ("activation", "scale", "alarms"),
    [
        (jnp.tanh, 0.2, False),
        (jnp.tanh, 3.0, True),
        (jax.nn.sigmoid, 9.0, True),
        (jax.nn.relu, 3.0, False),  # of which dead units tell
        (jax.nn.gelu, 3.0, False),
    ],
)
def test_judge_saturated_units(activation, scale, alarms):
    apply_fn, weights = deep(activation, scale)
    inputs = jnp.asarray(RNG.normal(size=(100, 20)), jnp.float32)
    measured = saturated_units(apply_fn, weights, inputs)
    found = judge_saturated_units(measured, inspect(apply_fn, weights, inputs))
    assert bool(found) == alarms
    assert {one.rule for one in found} <= {"gradients/saturated-units"}
