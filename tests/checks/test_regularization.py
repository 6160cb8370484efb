import numpy as np
import pytest

from nnsanity.checks.regularization import judge_overfitting, too_strong

RISE = np.linspace(0, 1, 11)


@pytest.mark.parametrize(
    ("held_out", "gap"),
    [
        (np.minimum(RISE, 1.2 - 1.2 * RISE), 1.0 - 0.12),
        (np.where(RISE > 0.5, -0.5, RISE), 1.45 - 0.05),
    ],
)
def test_memorizing(held_out, gap):
    (found,) = judge_overfitting(RISE, held_out)
    assert (found.rule, found.severity) == ("regularization/overfitting", "warning")
    end = np.median(held_out[-3:])
    assert found.measured == pytest.approx(np.median(RISE[-3:]) - end)
    assert found.measured > found.limit


@pytest.mark.parametrize(
    "held_out",
    [
        RISE,
        0.6 * RISE,
        np.minimum(RISE, 0.5),
        np.where(RISE > 0.8, 0.75, RISE),
        np.full(11, -0.5),
        -RISE,
        np.full(11, np.nan),
    ],
)
def test_healthy_curves(held_out):
    assert judge_overfitting(RISE, held_out) == ()


def test_a_network_that_does_not_learn_is_not_called_memorizing():
    assert judge_overfitting(RISE * 0, np.minimum(RISE, 0.3) * (1 - RISE)) == ()


@pytest.mark.parametrize(
    ("kind", "where", "word"),
    [("noise", "train_loss_fn", "dropout"), ("penalty", "loss_fn", "penalty")],
)
def test_too_strong(kind, where, word):
    found = too_strong(kind)
    assert (found.rule, found.where) == ("regularization/too-strong", where)
    assert (found.item, found.severity) == (4, "info")
    assert word in found.advice
