import numpy as np
import pytest

from nnsanity.checks.regularization import judge_overfitting, too_strong

TIME = np.linspace(0, 1, 11)
FALLS, LEARNS = 1 - TIME, TIME
DIPS = 0.5 + np.abs(TIME - 0.3)
MEMORIZING = {
    "losses": FALLS,
    "quality": LEARNS,
    "validation_losses": DIPS,
    "validation_quality": 0.4 * LEARNS,
}


def test_memorizing():
    (found,) = judge_overfitting(**MEMORIZING)
    assert (found.rule, found.severity) == ("regularization/overfitting", "warning")
    assert found.measured == pytest.approx(DIPS[-1] / DIPS.min())
    assert found.measured > found.limit
    assert "0.5 and rose again to 1.2" in found.message


@pytest.mark.parametrize(
    "changes",
    [
        {"validation_losses": FALLS},
        {"validation_losses": 0.5 + 0.1 * DIPS},
        {"validation_losses": 0.1 + TIME},
        {"validation_quality": 0.9 * LEARNS},
        {"losses": DIPS},
        {"validation_losses": np.full(11, np.nan)},
    ],
    ids=["still falls", "hardly rises", "never fell", "no gap", "both rise", "none"],
)
def test_healthy_curves(changes):
    assert judge_overfitting(**MEMORIZING | changes) == ()


@pytest.mark.parametrize(
    ("kind", "where", "word"),
    [("noise", "train_loss_fn", "dropout"), ("penalty", "loss_fn", "penalty")],
)
def test_too_strong(kind, where, word):
    found = too_strong(kind)
    assert (found.rule, found.where) == ("regularization/too-strong", where)
    assert (found.item, found.severity) == (4, "info")
    assert word in found.advice
