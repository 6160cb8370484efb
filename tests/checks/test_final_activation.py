import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnsanity.checks.final_activation import (
    constant_output,
    harmful_head,
    judge_reach,
    reachable,
    unsquashed_head,
)
from nnsanity.tracing.bounds import Bounds, output_bounds
from nnsanity.tracing.layers import inspect

INPUTS = jnp.ones((4, 3))
HEADS = {
    "linear": lambda x: x,
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "softmax": jax.nn.softmax,
    "log_softmax": jax.nn.log_softmax,
    "clip": lambda x: jnp.clip(x, 0, 5),
    "doubled": lambda x: 2 * jnp.tanh(x),
}
INF = math.inf


def network(head, units=1):
    params = {"w": jnp.ones((3, units)), "b": jnp.zeros(units)}

    def apply_fn(params, x):
        return HEADS[head](x @ params["w"] + params["b"])

    return apply_fn, params


def measured(head, targets, units=1):
    bounds = output_bounds(*network(head, units), INPUTS)
    return reachable(bounds, jnp.asarray(targets))


def last_layer(head, units=2):
    return inspect(*network(head, units), INPUTS).layers[-1]


@pytest.mark.parametrize(
    ("head", "targets", "fraction"),
    [
        ("sigmoid", [0.0, 0.5, 1.5, 2.0], 0.5),
        ("relu", [-1.0, 2.0, 3.0, 9.0], 0.25),
        ("tanh", [-3.0, 3.0, 1.5, -2.0], 1.0),
        ("clip", [-1.0, 6.0, 2.0, 3.0, 5.0], 0.4),
        ("log_softmax", [[-1.0, 1.0]], 0.5),
        ("softmax", [[2, 0], [1, 0]], 0.25),
        ("doubled", [-2.0, 2.0, 2.1, 0.0], 0.25),
    ],
)
def test_targets_out_of_reach(head, targets, fraction):
    units = np.asarray(targets).reshape(len(targets), -1).shape[1]
    found = measured(head, targets, units)
    assert found.fraction == pytest.approx(fraction)
    (finding,) = judge_reach(found, "w")
    assert finding.rule == "final-activation/unreachable-targets"
    assert (finding.item, finding.severity, finding.where) == (7, "error", "w")
    assert finding.measured == pytest.approx(fraction)


@pytest.mark.parametrize(
    ("head", "targets"),
    [
        ("linear", [-1e6, 1e6]),
        ("relu", [0.0, 7.0]),
        ("tanh", [-1.0, 1.0]),
        ("sigmoid", [0, 1]),
        ("sigmoid", [False, True]),
        ("sigmoid", [0.3]),
        ("softmax", [[1.0, 0.0], [0.5, 0.5]]),
        ("log_softmax", [[-1.0, 0.0]]),
        ("doubled", [-2.0, 2.0]),
    ],
)
def test_targets_within_reach(head, targets):
    units = np.asarray(targets).reshape(len(targets), -1).shape[1]
    found = measured(head, targets, units)
    assert found.fraction == 0
    assert judge_reach(found, "w") == ()


def test_the_range_is_reported():
    found = measured("sigmoid", [-0.5, 3.0])
    assert [float(one) for one in found[1:5]] == [-0.5, 3.0, 0.0, 1.0]
    assert measured("relu", [1.0]).high == INF
    assert not found.constant


def test_a_few_targets_out_of_reach_are_a_note():
    targets = jnp.where(jnp.arange(1000) < 5, -1.0, 1.0)
    (finding,) = judge_reach(measured("relu", targets), "w")
    assert finding.severity == "info"
    assert finding.measured == pytest.approx(0.005)


def test_softmax_over_one_unit_is_constant():
    found = measured("softmax", [0.0, 1.0])
    assert found.constant
    (finding,) = judge_reach(found, "w")
    assert finding == constant_output("w", 1.0)
    assert (finding.rule, finding.severity) == (
        "final-activation/constant-output",
        "error",
    )


def test_each_column_has_its_own_bounds():
    bounds = Bounds(np.array([[0.0, -INF]]), np.array([[1.0, INF]]))
    assert reachable(bounds, jnp.array([[0.5, -9.0], [1.0, 9.0]])).fraction == 0
    assert reachable(bounds, jnp.array([[-9.0, 0.5], [9.0, 1.0]])).fraction == 0.5


def test_rounding_is_no_fault():
    bounds = Bounds(np.zeros((4, 1)), np.ones((4, 1)))
    targets = jnp.array([1.0 + 1e-6, -1e-6], jnp.float32)
    assert reachable(bounds, targets).fraction == 0
    assert reachable(bounds, targets.astype(jnp.bfloat16)).fraction == 0


@pytest.mark.parametrize("value", [math.nan, INF])
def test_one_bad_target_does_not_hide_the_others(value):
    found = measured("sigmoid", [value, 2.0, 3.0, 0.5])
    assert found.fraction >= 0.5


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"reachable: outputs of shape \(4, 2\)"):
        measured("linear", jnp.ones((4, 3)), units=2)


@pytest.mark.parametrize(
    ("head", "kind", "slug"),
    [
        ("relu", "numbers", "relu-head"),
        ("relu", "classes", "relu-head"),
        ("tanh", "numbers", "saturated"),
        ("sigmoid", "numbers", "saturated"),
        ("sigmoid", None, "saturated"),
        ("sigmoid", "binary", "logits-expected"),
        ("softmax", "classes", "logits-expected"),
        ("log_softmax", "one-hot", "logits-expected"),
        ("clip", "numbers", "clipped-output"),
    ],
)
def test_harmful_head(head, kind, slug):
    finding = harmful_head(last_layer(head), kind)
    assert finding.rule == f"final-activation/{slug}"
    assert (finding.severity, finding.item) == ("info", 7)


def test_unsquashed_head():
    finding = unsquashed_head(last_layer("linear"), "a softmax")
    assert finding.rule == "final-activation/probabilities-expected"
    assert "no activation" in finding.message
    assert "a softmax" in finding.advice
