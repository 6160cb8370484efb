import pytest

from nnsanity.checks.batch_size import suspected, wrong_size


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
