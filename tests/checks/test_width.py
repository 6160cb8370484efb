import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnsanity as ns
from nnsanity.checks.width import (
    Need,
    bottleneck,
    judge_width,
    needed_units,
    width_profile,
)
from nnsanity.trials.inner_repairs import inner_repairs, not_widened
from nnsanity.trials.problem import checked_problem

RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(300, 12)).astype(np.float32)


def tanh_layer(params, x):
    return jnp.tanh(x @ params["w"])


def by_numpy(values):
    """Rank, redundant and constant units, from correlations in float64."""
    values = np.asarray(values, np.float64).reshape(-1, values.shape[-1])
    covariance = np.cov(values.T, bias=True).reshape(values.shape[-1], -1)
    rank = np.trace(covariance) ** 2 / np.sum(covariance**2)
    constant = values.std(axis=0) == 0
    with np.errstate(invalid="ignore"):
        correlation = np.atleast_2d(np.abs(np.corrcoef(values.T)))
    twins = np.triu(np.nan_to_num(correlation) > 0.999, 1)
    return rank, twins.any(axis=0), constant


def weights(num_units, twins=(), dead=()):
    w = RNG.normal(size=(12, num_units)) / 4
    for one, other, sign in twins:
        w[:, other] = sign * w[:, one]
    w[:, list(dead)] = 0
    return {"w": jnp.asarray(w, jnp.float32)}


CASES = {
    "all of their own": ((10,), {}),
    "one unit": ((1,), {}),
    "two doubled": ((10,), {"twins": [(0, 3, 1), (2, 5, 1)]}),
    "a negative": ((10,), {"twins": [(0, 3, -1)]}),
    "thrice": ((6,), {"twins": [(1, 2, 1), (1, 4, 1)]}),
    "dead": ((10,), {"dead": [1, 2]}),
    "all dead": ((4,), {"dead": [0, 1, 2, 3]}),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_width_against_numpy(name, dtype):
    sizes, options = CASES[name]
    params = jax.tree.map(lambda one: one.astype(dtype), weights(*sizes, **options))
    inputs = jnp.asarray(INPUTS, dtype)
    profile = width_profile(tanh_layer, params, inputs)
    values = np.asarray(jax.jit(tanh_layer)(params, inputs).astype(jnp.float32))
    with np.errstate(invalid="ignore"):
        rank, redundant, constant = by_numpy(values)
    np.testing.assert_allclose(
        profile.effective_rank["w"],
        np.nan_to_num(rank),
        rtol=1e-4 if dtype == jnp.float32 else 2e-3,  # which XLA rounds otherwise
    )
    assert profile.effective_rank["w"].dtype == jnp.float32
    assert profile.redundant["w"].tolist() == redundant.tolist()
    assert profile.constant["w"].tolist() == constant.tolist()
    assert int(profile.units["w"]) == sizes[0]


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_rank_does_not_depend_on_the_scale(scale):
    def scaled(params, x):
        return (x @ params["w"]) * scale

    params = weights(7)
    found = width_profile(scaled, params, INPUTS).effective_rank["w"]
    expected = by_numpy(INPUTS @ np.asarray(params["w"]))[0]
    assert float(found) == pytest.approx(expected, rel=1e-3)


def test_channels_count_positions_as_examples():
    model = nn.Conv(5, (3, 3))
    images = jnp.asarray(RNG.normal(size=(4, 8, 8, 3)), jnp.float32)
    params = model.init(jax.random.key(0), images)
    profile = width_profile(model.apply, params, images)
    rank, redundant, _ = by_numpy(model.apply(params, images))
    (found,) = profile.effective_rank.values()
    assert float(found) == pytest.approx(rank, rel=1e-4)
    assert next(iter(profile.redundant.values())).tolist() == redundant.tolist()


def stack(params, x):
    def block(h, w):
        return jnp.tanh(h @ w), None

    return jax.lax.scan(block, x, params["w"])[0]


def test_blocks_of_a_stack_one_by_one():
    params = {"w": jnp.asarray(RNG.normal(size=(3, 12, 12)) / 4, jnp.float32)}
    params["w"] = params["w"].at[1, :, 4].set(params["w"][1, :, 2])
    profile = width_profile(stack, params, INPUTS)
    hidden = np.asarray(INPUTS, np.float64)
    for index in range(3):
        hidden = np.tanh(hidden @ np.asarray(params["w"][index], np.float64))
        rank, redundant, _ = by_numpy(hidden)
        assert float(profile.effective_rank["w"][index]) == pytest.approx(rank, 1e-3)
        assert profile.redundant["w"][index].tolist() == redundant.tolist()


def test_a_nan_shows():
    inputs = jnp.asarray(INPUTS).at[3, 3].set(jnp.nan)
    profile = width_profile(tanh_layer, weights(4), inputs)
    assert np.isnan(profile.effective_rank["w"])
    assert not profile.constant["w"].any()


def test_too_many_units_are_told():
    params = {"w": jax.ShapeDtypeStruct((2, 9000), jnp.float32)}
    inputs = jax.ShapeDtypeStruct((3, 2), jnp.float32)
    shapes = jax.eval_shape(
        lambda p, x: width_profile(tanh_layer, p, x), params, inputs
    )
    assert dict(shapes.uninspected.parameters)["w"].startswith("more than 8192")
    assert shapes.units == {}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_inputs": 64, "num_outputs": 10, "is_classification": True}, (9, 50)),
        ({"num_inputs": 2, "num_outputs": 1, "is_classification": True}, (1, 10)),
        ({"num_inputs": 8, "num_outputs": 3, "is_classification": False}, (3, 16)),
        ({"num_inputs": 999, "num_outputs": 1, "is_classification": False}, (1, 256)),
    ],
)
def test_guideline(options, expected):
    assert needed_units(**options) == expected


NEED = Need(9, 50)


@pytest.mark.parametrize(
    ("num_units", "options", "need", "rules"),
    [
        (1, {}, NEED, ["bottleneck"]),
        (2, {}, NEED, ["bottleneck"]),
        (9, {}, NEED, ["bottleneck"]),
        (13, {}, NEED, ["guideline"]),
        (50, {}, NEED, []),
        (2, {}, Need(1, 10), ["bottleneck"]),
        (4, {}, Need(1, 2), ["bottleneck"]),  # few for any task
        (5, {}, Need(1, 10), ["guideline"]),
        (5, {}, Need(1, 2), []),
        (1, {}, None, []),
        (1, {"dead": [0]}, NEED, ["guideline"]),
        (50, {"twins": [(i, i + 25, 1) for i in range(25)]}, NEED, ["redundant"]),
        (50, {"twins": [(0, 1, 1)]}, NEED, []),
    ],
)
def test_judge_width(num_units, options, need, rules):
    profile = width_profile(tanh_layer, weights(num_units, **options), INPUTS)
    found = judge_width(profile, need, {"w": num_units})
    assert [one.rule for one in found] == [f"width/{rule}" for rule in rules]
    assert {one.severity for one in found} <= {"info"}
    assert all(one.where == "w" and one.item == 11 for one in found)


def test_few_units_are_not_measured_by_a_guideline_below_them():
    (found,) = judge_width(
        width_profile(tanh_layer, weights(2), INPUTS), Need(1, 2), {"w": 2}
    )
    assert "few for any task" in found.message
    assert (found.measured, found.limit) == (2, 5)
    assert "such as 64" in found.advice
    by_guideline = bottleneck("w", 2, NEED, math.nan)
    assert "of w; the checklist starts from 50" in by_guideline.message
    assert by_guideline.limit == 50


DATA = RNG.normal(size=(300, 6)).astype(np.float32)
LABELS = np.argmax(DATA @ RNG.normal(size=(6, 6)), axis=1)


def mlp(params, x):
    x = jnp.tanh(x @ params["w1"] + params["b1"])
    x = jnp.tanh(x @ params["w2"] + params["b2"])
    return x @ params["w3"] + params["b3"]


def cross_entropy(params, batch):
    logits = mlp(params, batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def mlp_params(*sizes):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {}
    for index, (one, fan_in, units) in enumerate(
        zip(keys, sizes[:-1], sizes[1:], strict=True), 1
    ):
        params[f"w{index}"] = jax.random.normal(one, (fan_in, units)) / fan_in**0.5
        params[f"b{index}"] = jnp.zeros(units)
    return params


@pytest.mark.slow
@pytest.mark.parametrize(("width", "rules"), [(1, ["width/bottleneck"]), (16, [])])
def test_a_waist_of_one_unit_leads_and_a_wider_one_is_silent(width, rules):
    report = ns.checkup(
        mlp,
        cross_entropy,
        mlp_params(6, 32, width, 6),
        (DATA, LABELS),
        key=jax.random.key(1),
        optimizer=optax.adam(0.01),
        num_steps=300,
    )
    found = [one for one in report.findings if one.severity != "info"]
    assert [one.rule for one in found][:1] == rules
    assert bool(found) == bool(rules)
    for one in found[:1]:
        assert one.where == "w2"
        assert "more units takes the accuracy after" in one.message


@pytest.mark.slow
def test_narrow_layers_in_a_row_are_widened_together():
    report = ns.checkup(
        mlp,
        cross_entropy,
        mlp_params(6, 1, 1, 6),
        (DATA, LABELS),
        key=jax.random.key(1),
        optimizer=optax.adam(0.01),
        num_steps=300,
    )
    first = report.findings[0]
    assert first.rule == "width/bottleneck"
    assert "A layer of 64 units beside w1, w2 takes the accuracy" in first.message
    assert not any(name.startswith("more units") for name in report.skipped)


def test_narrow_layers_without_a_wider_copy_are_told():
    def looped(params, x):
        x = jnp.tanh(x @ params["w1"])
        turn = lambda h, w: (jnp.tanh(h @ w), None)  # noqa: E731
        x, _ = jax.lax.scan(turn, x, params["w2"])
        return jnp.tanh(x @ params["w3"]) @ params["w4"]

    shapes = {"w1": (6, 1), "w2": (2, 1, 1), "w3": (1, 2), "w4": (2, 6)}
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        name: jax.random.normal(one, shape)
        for one, (name, shape) in zip(keys, shapes.items(), strict=True)
    }

    def loss_fn(params, batch):
        logits = looped(params, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    problem = checked_problem(
        looped,
        loss_fn,
        params,
        (DATA, LABELS),
        key=jax.random.key(1),
        optimizer=optax.adam(0.01),
        batch_size=32,
        num_steps=10,
    )
    told = not_widened(problem)
    assert told.keys() == {"more units for w1", "more units for w2"}
    assert all("inside of a loop" in reason for reason in told.values())
    (wider,) = (one for one in inner_repairs(problem) if one.group == "hidden")
    assert wider.name == "giving w3 62 more units"
