import math

import pytest

from nnsanity.findings import (
    CONSEQUENCES,
    ITEMS,
    DiagnosisError,
    Effect,
    Finding,
    at_least,
    caused,
    listed,
    number,
)

FINDING = Finding(
    "gradients/exploding", 8, "info", "w", 90.0, 70.0, "It is 90.", "Rescale."
)
ALL = tuple(FINDING._replace(severity=one) for one in ("info", "error", "warning"))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "1"),
        (-0.5, "-0.5"),
        (0.123456, "0.123"),
        (999.0, "999"),
        (999.9, "1,000"),
        (-12_345.0, "-12,300"),
        (999_400.0, "999,000"),
        (1e6, "1e+06"),
        (1e-4, "0.0001"),
        (-9e-5, "-9e-05"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
    ],
)
def test_number(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], ""),
        (["a"], "a"),
        (list("abcd"), "a, b, c, d"),
        (list("abcdef"), "a, b, c, d and 2 more"),
        (iter("abcde"), "a, b, c, d and 1 more"),
    ],
)
def test_listed(names, text):
    assert listed(names) == text


@pytest.mark.parametrize(
    ("severity", "expected"), [("error", [1]), ("warning", [1, 2]), ("info", [0, 1, 2])]
)
def test_at_least(severity, expected):
    assert at_least(ALL, severity) == tuple(ALL[index] for index in expected)
    assert at_least((), severity) == ()


def test_unknown_severity():
    with pytest.raises(ValueError, match=r"severity must be one of .* got 'fatal'"):
        at_least(ALL, "fatal")


def test_the_items_are_the_eleven():
    assert list(ITEMS) == list(range(1, 12))
    slugs = {name.replace(" ", "-") for name in ITEMS.values()}
    assert {rule.split("/")[0] for rule in CONSEQUENCES} <= slugs


def effect_of(num_steps, num_steps_before, *, is_joint=False):
    ends = 0.1, 0.875, "accuracy"
    done = "rescaling the weights"
    return Effect(done, *ends, num_steps, 3, 0.8, 0.25, is_joint, num_steps_before)


@pytest.mark.parametrize(("measured", "limit"), [(90.0, 70.0), (math.nan, math.nan)])
@pytest.mark.parametrize("is_joint", [False, True])
def test_caused(measured, limit, is_joint):
    effect = effect_of(300, 300, is_joint=is_joint)
    suspicion = FINDING._replace(measured=measured, limit=limit)
    cause = caused(suspicion, effect, "error")
    assert cause.severity == "error"
    kept = (measured, limit) if measured == measured else (0.8, 0.25)
    assert (cause.measured, cause.limit) == kept
    start = "With the other repairs in place, rescaling" if is_joint else "Rescaling"
    assert cause.message.startswith(f"It is 90. {start} the weights takes the accuracy")
    assert "after 300 steps from 0.10 to 0.88 (3 seeds)." in cause.message
    assert cause.rule == suspicion.rule
    assert suspicion.severity == "info"


def test_a_copy_that_trains_for_longer_says_so():
    cause = caused(FINDING, effect_of(3000, 300), "error")
    expected = "accuracy from 0.10 after 300 steps to 0.88 after 3,000 (3 seeds)."
    assert expected in cause.message


def test_diagnosis_error_holds_the_findings():
    error = DiagnosisError(iter(ALL))
    assert error.findings == ALL
    assert str(error).splitlines() == ["gradients/exploding at w: It is 90."] * 3
