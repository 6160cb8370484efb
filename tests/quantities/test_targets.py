import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.metrics import accuracy_score, r2_score

from nnsanity.quantities.targets import (
    constant_outputs,
    kind_of_targets,
    perfect_outputs,
    quality,
)

RNG = np.random.default_rng(0)
LABELS = np.array([0, 2, 1, 2, 2, 0, 1, 2])
ONE_HOT = np.eye(3)[LABELS]
SCORES = RNG.normal(size=(8, 3)) + ONE_HOT
HALVES = np.array([1, 0, 0, 1, 0, 0, 0, 1.0])
TWO_ONES = np.array([[1, 1, 0], [0, 0, 0]] * 4)
NAN = math.nan


def shaped(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize(
    ("outputs", "targets", "kind"),
    [
        (shaped(8, 3), LABELS, "classes"),
        (shaped(8, 3), LABELS[:, None], "classes"),
        (shaped(8, 3), LABELS.astype(np.uint8), "classes"),
        (shaped(4, 2, 3), LABELS.reshape(4, 2), "classes"),
        (shaped(8, 10), np.zeros(8, int), "classes"),
        (shaped(8, 2), LABELS, None),
        (shaped(8, 3), ONE_HOT, "one-hot"),
        (shaped(8, 3), ONE_HOT.astype(bool), "one-hot"),
        (shaped(8, 3), ONE_HOT.astype(int), "one-hot"),
        (shaped(8, 3), TWO_ONES, "binary"),
        (shaped(8, 1), HALVES, "binary"),
        (shaped(8), HALVES[:, None], "binary"),
        (shaped(8), HALVES > 0, "binary"),
        (shaped(8, 1), 2 * HALVES - 1, "binary"),
        (shaped(8, 1), HALVES.astype(int), "binary"),
        (shaped(8, 1), LABELS, "numbers"),
        (shaped(8), LABELS + 0.5, "numbers"),
        (shaped(8, 3), SCORES, "numbers"),
        (shaped(8, 2, 3), RNG.normal(size=(8, 6)), "numbers"),
        (shaped(8), np.full(8, NAN), "numbers"),
        (shaped(8, 2), SCORES, None),
        (shaped(8, 3), None, None),
        ((shaped(8, 3), shaped(8, 3)), ONE_HOT, None),
        (shaped(8, 3), {"a": LABELS}, None),
        (shaped(8), np.array(list("abcdefgh")), None),
    ],
)
def test_kind_of_targets(outputs, targets, kind):
    assert kind_of_targets(outputs, targets) == kind


def test_kind_of_bfloat16_targets():
    targets = jnp.arange(8, dtype=jnp.bfloat16) / 4
    assert kind_of_targets(shaped(8), targets) == "numbers"


def test_quality_of_classes():
    correct = accuracy_score(LABELS, SCORES.argmax(axis=1))
    expected = (correct - 4 / 8) / (1 - 4 / 8)  # class 2 stands in four rows of eight
    assert 0 < expected < 1
    assert quality(SCORES, LABELS, "classes") == pytest.approx(expected)
    assert quality(SCORES, LABELS[:, None], "classes") == pytest.approx(expected)
    assert quality(SCORES, ONE_HOT, "one-hot") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        (HALVES, 1.0),
        (20 * HALVES - 10, 1.0),
        (np.zeros(8), 0.0),
        (np.full(8, 0.3), 0.0),
        (np.where(np.arange(8) == 0, 0.0, HALVES), (7 / 8 - 5 / 8) / (3 / 8)),
        (1 - HALVES, (0 - 5 / 8) / (3 / 8)),
    ],
)
@pytest.mark.parametrize("targets", [HALVES, 2 * HALVES - 1, HALVES[:, None]])
def test_quality_of_binary_targets(outputs, targets, expected):
    value = quality(outputs, targets, "binary")
    assert value == pytest.approx(max(expected, -1), abs=1e-6)


def test_quality_of_numbers():
    targets = RNG.normal(size=(50, 2)) * [1, 100] + [0, 500]
    outputs = targets + RNG.normal(size=(50, 2)) * [0.5, 20]
    expected = r2_score(targets, outputs)
    assert 0 < expected < 1
    assert quality(outputs, targets, "numbers") == pytest.approx(expected, abs=1e-4)
    column = quality(outputs[:, :1], targets[:, 0], "numbers")
    assert column == pytest.approx(r2_score(targets[:, 0], outputs[:, 0]), abs=1e-4)


def test_quality_ignores_an_affine_change():
    targets = RNG.normal(size=50)
    outputs = targets + 0.5 * RNG.normal(size=50)
    plain = quality(outputs, targets, "numbers")
    assert quality(9 * outputs + 4, 9 * targets + 4, "numbers") == pytest.approx(
        float(plain), abs=1e-4
    )


@pytest.mark.parametrize("value", [NAN, math.inf])
@pytest.mark.parametrize(
    ("kind", "targets"),
    [("classes", LABELS), ("one-hot", ONE_HOT), ("numbers", SCORES)],
)
def test_outputs_that_are_not_finite_are_the_worst(value, kind, targets):
    outputs = SCORES.copy()
    outputs[0, 0] = value
    assert quality(outputs, targets, kind) == -1


@pytest.mark.parametrize(
    ("outputs", "targets", "kind", "expected"),
    [
        (SCORES[:1], SCORES[:1], "numbers", 0),
        (np.ones(8), np.ones(8), "numbers", 0),
        (SCORES - 1e4, SCORES, "numbers", -1),
        (ONE_HOT[:1], LABELS[:1], "classes", 1),
        (SCORES.astype(jnp.bfloat16), LABELS, "classes", 0.5),
    ],
)
def test_quality_at_the_edge(outputs, targets, kind, expected):
    value = quality(jnp.asarray(outputs), jnp.asarray(targets), kind)
    assert value.dtype == jnp.float32
    if expected == 0.5:
        correct = (outputs.argmax(axis=1) == LABELS).mean()
        expected = 2 * correct - 1
    assert value == pytest.approx(expected)


def least(losses):
    losses = np.asarray(losses)
    return losses[np.isfinite(losses)].min()


def entropy(shares):
    return -sum(share * math.log(share) for share in shares if share > 0)


SQUARES = RNG.normal(size=(40, 2)) + 3
CASES = {
    "absolute error": (
        lambda out: jnp.mean(jnp.abs(out - SQUARES)),
        (2,),
        SQUARES,
        "numbers",
        np.abs(SQUARES - np.median(SQUARES, axis=0)).mean(),
    ),
    "cross entropy of one-hot": (
        lambda out: optax.softmax_cross_entropy(out, ONE_HOT).mean(),
        (3,),
        ONE_HOT,
        "one-hot",
        entropy([2 / 8, 2 / 8, 4 / 8]),
    ),
    "signs, squared error": (
        lambda out: jnp.mean((out - (2 * HALVES - 1)) ** 2),
        (),
        2 * HALVES - 1,
        "binary",
        (2 * HALVES - 1).var(),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_least_losses(name):
    loss_of, shape, targets, kind, expected = CASES[name]
    constants = constant_outputs(shape, targets, kind)
    assert constants.shape[1:] == shape
    assert least([loss_of(one) for one in constants]) == pytest.approx(expected, 1e-4)
    perfect = perfect_outputs(shape, targets, kind)
    assert perfect.shape[1:] == (len(targets), *shape)
    assert least([loss_of(one) for one in perfect]) == pytest.approx(0, abs=1e-5)
