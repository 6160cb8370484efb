import math

import numpy as np
import pytest

from nnsanity.checks.results import (
    judge_labels,
    judge_meeting,
    judge_start,
    judge_wrong_loss,
    no_better_than_constant,
)

NAN = math.nan


def test_judge_meeting():
    assert judge_meeting([]) == ()
    found = judge_meeting(["a.py:3 (loss_fn)", "a.py:5 (loss_fn)"])
    assert [one.where for one in found] == ["a.py:3 (loss_fn)", "a.py:5 (loss_fn)"]
    assert {(one.rule, one.severity) for one in found} == {
        ("results/broadcast-loss", "error")
    }


@pytest.mark.parametrize(
    ("loss", "constant", "rule"),
    [
        (2.9, 1.0, None),
        (3.1, 1.0, "start-loss"),
        (100.0, NAN, None),
        (0.0, 0.0, None),
        (NAN, 1.0, "nonfinite"),
        (math.inf, NAN, "nonfinite"),
    ],
)
def test_judge_start(loss, constant, rule):
    found = judge_start(loss, constant, 3.0)
    assert [one.rule for one in found] == ([f"results/{rule}"] if rule else [])
    if rule:
        assert found[0].severity == ("info" if rule == "start-loss" else "error")


@pytest.mark.parametrize(
    ("numbers", "rule"),
    [
        ((0.0, 0.2, 1.0, 0.8), None),
        ((0.5, 0.2, 1.0, 0.8), None),
        ((0.1, 0.2, 1.0, 0.0), None),
        ((0.5, 1.0, 1.0, 0.0), None),
        ((0.5, 0.2, 1.0, -0.5), "wrong-loss"),
        ((0.0, -90.0, -1.0, -1.0), "unbounded-loss"),
        ((NAN, 0.2, 1.0, 0.0), None),
    ],
)
def test_judge_wrong_loss(numbers, rule):
    perfect, reached, start, explained = numbers
    found = judge_wrong_loss(
        perfect=perfect, reached=reached, start=start, explained=explained, learned=0.1
    )
    assert [one.rule for one in found] == ([f"results/{rule}"] if rule else [])


def test_no_better_than_constant():
    found = no_better_than_constant(0.02, 300, ("another rate", "fresh weights"))
    assert (found.severity, found.measured) == ("error", 0.02)
    assert "Tried without effect: another rate, fresh weights." in found.message
    assert "Tried" not in no_better_than_constant(0.02, 300, ()).message


OUTPUTS = np.zeros((4, 3))


@pytest.mark.parametrize(
    ("outputs", "labels", "found"),
    [
        (OUTPUTS, [1, 2, 3, 1], True),  # counted from one
        (OUTPUTS, [0, 2, 3, 1], True),  # one class too many
        (OUTPUTS, [0, 1, 2, 1], False),
        (OUTPUTS, [0, 1, 2, 255], False),  # an example that is left out
        (OUTPUTS, [0, 1, 2, -1], False),
        (OUTPUTS, [0.0, 3.0, 1.0, 1.0], False),  # numbers
        (np.zeros((4, 5, 3)), [0, 3, 1, 1], False),  # of another shape
        (np.zeros(4), [1, 2, 3, 1], False),
    ],
)
def test_labels_out_of_range(outputs, labels, found):
    rules = [one.rule for one in judge_labels(outputs, np.array(labels))]
    assert rules == ["results/labels-out-of-range"] * found
