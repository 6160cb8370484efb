import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnsanity as ns
from nnsanity.checks.depth import (
    DepthProfile,
    depth_profile,
    judge_depth,
    judge_merging,
)
from nnsanity.tracing.layers import Uninspected, inspect

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(20, 8)), jnp.float32)
INITIALIZERS = jax.nn.initializers


def stack(depth, init=INITIALIZERS.he_normal(), width=8, last=1):  # noqa: B008
    sizes = [8, *[width] * (depth - 1), last]
    keys = jax.random.split(jax.random.key(0), depth)
    return [
        init(key, shape)
        for key, shape in zip(keys, itertools.pairwise(sizes), strict=True)
    ]


def network(activation, *, skip=False):
    def apply_fn(params, x):
        first, *hidden, last = params
        x = activation(x @ first)
        for w in hidden:
            h = activation(x @ w)
            x = x + h / len(params) ** 0.5 if skip else h
        return x @ last

    return apply_fn


def squared_error(apply_fn):
    return lambda p, batch: jnp.mean((apply_fn(p, batch[0]) - batch[1]) ** 2)


def judged(params, activation, *, skip=False):
    apply_fn = network(activation, skip=skip)
    batch = (X, jnp.sin(X[:, :1]))
    profile = depth_profile(apply_fn, squared_error(apply_fn), params, batch)
    return [one.rule for one in judge_depth(profile, inspect(apply_fn, params, X))]


GAIN3 = INITIALIZERS.variance_scaling(9.0, "fan_in", "normal")
LECUN, WIDE = INITIALIZERS.lecun_normal(), {"width": 64}
CASES = {
    "sigmoid of 12": (
        stack(12, LECUN),
        jax.nn.sigmoid,
        False,
        {"too-deep", "collapsed"},
    ),
    "linear of 20, gain 3": (stack(20, GAIN3), lambda x: x, False, {"too-deep"}),
    "relu of 40": (stack(40, **WIDE), jax.nn.relu, False, {"too-deep", "collapsed"}),
    "relu of 40 with skips": (stack(40, **WIDE), jax.nn.relu, True, set()),
    "tanh of 17": (stack(17, LECUN, **WIDE), jnp.tanh, False, set()),
    "relu of 3": (stack(3), jax.nn.relu, False, set()),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_suspected(name):
    params, activation, skip, expected = CASES[name]
    found = judged(params, activation, skip=skip)
    assert {one.removeprefix("depth/").removesuffix("-inputs") for one in found} == (
        expected
    )


def test_one_example_has_no_cosine_and_neither_has_one_unit():
    apply_fn = network(jnp.tanh)
    loss_fn = squared_error(apply_fn)
    batch = (X[:1], jnp.zeros((1, 1)))
    alone = depth_profile(apply_fn, loss_fn, stack(3), batch)
    assert np.isnan(alone.cosine).all()
    several = depth_profile(apply_fn, loss_fn, stack(3), (X, jnp.zeros((20, 1))))
    assert np.isnan(several.cosine).tolist() == [False, False, True]


def test_equal_examples_have_a_cosine_of_one():
    apply_fn = network(jnp.tanh)
    same = jnp.broadcast_to(X[:1], X.shape)
    batch = (same, jnp.zeros((20, 1)))
    found = depth_profile(apply_fn, squared_error(apply_fn), stack(3), batch)
    np.testing.assert_allclose(found.cosine[:2], 1, rtol=1e-5)


def profile(gradient, cosine, depth=12):
    numbers = (jnp.int32(depth), jnp.int32(depth))
    arrays = (jnp.asarray(gradient, jnp.float32), jnp.asarray(cosine, jnp.float32))
    return DepthProfile(*numbers, *arrays, Uninspected())


FLAT, LOW = np.ones(12), np.full(12, 0.1)
NETWORK = inspect(network(jnp.tanh), stack(12), X)


@pytest.mark.parametrize(
    ("gradient", "cosine", "depth", "rules"),
    [
        (FLAT, LOW, 12, []),
        (np.logspace(-6, 0, 12), LOW, 12, ["too-deep"]),
        (np.logspace(-6, 0, 12), LOW, 8, []),
        (np.logspace(6, 0, 12), LOW, 12, ["too-deep"]),
        (np.r_[1e-6, np.ones(11)], LOW, 12, []),  # one layer, not depth
        (np.r_[0, np.ones(11)], LOW, 12, ["too-deep"]),
        (FLAT, np.linspace(0.1, 0.9999, 12), 12, []),  # at the last hidden 0.92
        (FLAT, np.r_[np.linspace(0.1, 0.9999, 11), 1], 12, ["collapsed", "too-deep"]),
        (FLAT, np.r_[np.linspace(0.1, 0.9999, 11), 1], 5, ["collapsed"]),
        (FLAT, np.full(12, 0.999), 12, []),  # the inputs were alike
        (FLAT, np.full(12, math.nan), 12, []),
    ],
)
def test_judge_depth(gradient, cosine, depth, rules):
    found = judge_depth(profile(gradient, cosine, depth), NETWORK)
    expected = [f"depth/{rule}" for rule in rules]
    assert [one.rule.removesuffix("-inputs") for one in found] == expected
    assert {one.severity for one in found} <= {"info"}


@pytest.mark.slow
@pytest.mark.parametrize("skip", [False, True])
def test_a_dozen_sigmoid_layers_with_and_without_skips(skip):
    rng = np.random.default_rng(1)
    apply_fn = network(jax.nn.sigmoid, skip=skip)
    inputs = rng.normal(size=(200, 8)).astype(np.float32)
    targets = np.tanh(inputs @ np.linspace(-1, 1, 8))[:, None].astype(np.float32)
    report = ns.checkup(
        apply_fn,
        squared_error(apply_fn),
        stack(12, width=16),
        (inputs, targets),
        key=jax.random.key(1),
        optimizer=optax.adam(0.01),
        num_steps=200,
    )
    found = [one for one in report.findings if one.severity != "info"]
    assert [one.rule.partition("/")[0] for one in found][:1] == ["depth"] * (not skip)
    for one in found[:1]:
        assert "skip connections takes the explained share" in one.message


@pytest.mark.parametrize(
    ("activation", "rules"), [(jnp.tanh, []), (lambda x: x, ["depth/merged-layers"])]
)
def test_layers_that_make_up_one(activation, rules):
    def apply_fn(params, x):
        return activation(x @ params["a"]) @ params["b"]

    params = {"a": jnp.ones((3, 8)), "b": jnp.ones((8, 2))}
    found = judge_merging(inspect(apply_fn, params, jnp.ones((5, 3))))
    assert [one.rule for one in found] == rules
    assert all(one.where == "a" and "between a and the" in one.message for one in found)
