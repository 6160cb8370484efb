import numpy as np
import pytest

from nnsanity.checks.learning_rate import (
    is_falling,
    judge_losses,
    smoothed,
    wrong_rate,
)

STEPS = np.arange(100)
FALL = np.exp(-STEPS / 20)
NOISE = np.random.default_rng(0).normal(size=100)


def test_smoothed_is_a_weighted_mean_of_the_past():
    weights = 0.7 ** np.arange(100)
    expected = [
        np.average(NOISE[: step + 1], weights=weights[: step + 1][::-1])
        for step in STEPS
    ]
    np.testing.assert_allclose(smoothed(NOISE, weight=0.7), expected)


@pytest.mark.parametrize(
    "losses",
    [
        FALL,
        FALL + 0.05 * NOISE,
        FALL - 5,
        np.full(100, 0.7),
        np.zeros(100),
        0.7 + 0.001 * NOISE,
        [2.0],
        FALL.astype(np.float16),
    ],
)
def test_healthy_losses(losses):
    assert judge_losses(losses) == ()


@pytest.mark.parametrize(
    ("losses", "end"),
    [
        (np.where(STEPS == 40, np.nan, FALL), np.nan),
        (np.where(STEPS > 40, np.inf, FALL), np.inf),
        ([np.nan], np.nan),
        (np.exp(STEPS / 20), None),
        (np.where(STEPS < 50, 1 - STEPS / 100, 5.0), None),
        (-1 + np.exp(STEPS / 10), None),
    ],
)
def test_diverging_losses(losses, end):
    (found,) = judge_losses(losses)
    assert (found.rule, found.item) == ("learning-rate/diverges", 6)
    assert found.severity == "info"
    if end is None:
        assert found.measured == pytest.approx(smoothed(losses)[-1])
    else:
        np.testing.assert_equal(found.measured, end)


def test_the_step_of_the_first_nan_is_told():
    losses = np.where((STEPS == 7) | (STEPS > 30), np.nan, FALL)
    assert "in 7 steps" in judge_losses(losses)[0].message


@pytest.mark.parametrize(
    ("factor", "rule", "words"),
    [
        (0.1, "too-high", "10 times too high"),
        (0.01, "too-high", "100 times too high"),
        (10.0, "too-low", "10 times too low"),
        (100.0, "too-low", "100 times too low"),
    ],
)
def test_wrong_rate(factor, rule, words):
    found = wrong_rate(factor)
    assert found.rule == f"learning-rate/{rule}"
    assert words in found.message
    assert found.limit == factor


@pytest.mark.parametrize(
    ("losses", "alarms"),
    [
        (np.concatenate([FALL, 0.01 + STEPS / 40]), True),
        (np.where(STEPS > 90, np.nan, FALL), True),
        (np.exp(STEPS / 30), True),
        (FALL, False),
        (0.7 + 0.01 * STEPS / 100, False),
        (0.7 + 0.05 * NOISE, False),
        (np.concatenate([FALL, 0.01 + STEPS / 300]), False),
    ],
    ids=["rises again", "nan", "explodes", "falls", "creeps", "jitters", "half back"],
)
def test_losses_that_diverge(losses, alarms):
    found = judge_losses(losses)
    assert [one.rule for one in found] == ["learning-rate/diverges"] * alarms


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        (1 - STEPS / 100, True),
        (np.exp(-STEPS / 80), True),
        (np.exp(-STEPS / 5), False),
        (np.ones(100), False),
        (np.exp(STEPS / 50), False),
        (1 - STEPS[:3] / 100, False),
        (np.where(STEPS == 50, np.nan, 1 - STEPS / 100), False),
    ],
)
def test_is_falling(losses, expected):
    assert is_falling(losses) is expected
