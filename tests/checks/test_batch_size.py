import pytest

from nnsanity.checks.batch_size import (
    judge_noise,
    suggested_size,
    suspected,
    wrong_size,
)
from nnsanity.quantities.noise_estimate import NoiseScale


@pytest.mark.parametrize(
    ("batch_size", "num_examples", "expected"),
    [
        (32, 1000, False),
        (32, 32, False),
        (3, 1000, False),
        (33, 1000, False),
        (249, 1000, False),
        (250, 1000, True),
        (1000, 1000, True),
        (64, 100, True),
        (2, 1000, True),
        (1, 1000, True),
        (1, 32, False),
        (1, 1, False),
    ],
)
def test_suspected(batch_size, num_examples, expected):
    assert suspected(batch_size, num_examples) is expected


@pytest.mark.parametrize(
    ("batch_size", "rule"), [(1, "too-small"), (2, "too-small"), (512, "too-large")]
)
def test_wrong_size(batch_size, rule):
    found = wrong_size(batch_size, 1000)
    assert (found.rule, found.item) == (f"batch-size/{rule}", 5)
    assert (found.severity, found.where) == ("info", "batch_size")
    assert (found.measured, found.limit) == (batch_size, 32)
    assert str(batch_size) in found.message


@pytest.mark.parametrize(
    ("scale", "error", "batch_size", "rule", "size"),
    [
        (100.0, 10.0, 32, "suggested", 64),
        (100.0, 10.0, 480, "suggested", 64),
        (100.0, 10.0, 481, "too-large", 64),
        (128.0, 0.0, 512, "suggested", 128),
        (128.0, 0.0, 513, "too-large", 128),
        (2.0, 0.1, 32, "suggested", 8),
        (2.0, 0.1, 33, "too-large", 8),
        (0.0, 0.0, 64, "too-large", 8),
        (1e6, 1.0, 64, "suggested", 1000),
    ],
)
def test_noise(scale, error, batch_size, rule, size):
    noise = NoiseScale(scale, 1.0, scale, error)
    (found,) = judge_noise(
        noise, batch_size=batch_size, num_examples=1000, step=7, places=("w", 1.0)
    )
    assert (found.rule, found.item) == (f"batch-size/{rule}", 5)
    assert (found.severity, found.where) == ("info", "batch_size")
    assert found.measured == batch_size
    assert found.limit == max(4 * (scale + 2 * error), 32)
    assert suggested_size(found.limit, 1000) == size
    assert "After 7 steps" in found.message
    assert f"standard error {error:g}" in found.message
    assert f"p to {size} a" in found.advice or f"batches of {size} or" in found.advice
    assert "resolution" not in found.advice


@pytest.mark.parametrize(("uses", "is_told"), [(1024.0, True), (1.0, False)])
def test_what_a_step_averages(uses, is_told):
    noise = NoiseScale(100.0, 1.0, 100.0, 5.0)
    (found,) = judge_noise(
        noise, batch_size=32, num_examples=1000, step=7, places=("conv/kernel", uses)
    )
    words = "each example gives conv/kernel 1,020 gradient terms: at twice the"
    assert (words in found.advice) is is_told
