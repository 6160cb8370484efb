import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from nnsanity.checks.preprocessing import (
    PERIOD_SHARE,
    categorical_code,
    repeating_column,
)
from nnsanity.quantities.columns import (
    CODE_RANGE,
    CODE_SHARE,
    MIN_CYCLES,
    column_codes,
    column_cycle,
    is_code,
    wraparound,
)

RNG = np.random.default_rng(0)
CODES = RNG.integers(0, 12, 400).astype(np.float64)
EFFECTS = RNG.permutation(12).astype(np.float64)
HEALTHY_COLUMNS = {
    "ordered": (CODES, CODES + RNG.normal(size=400)),
    "ordered downwards": (CODES, -(CODES**2)),
    "unimportant": (CODES, RNG.normal(size=400)),
    "continuous": (RNG.normal(size=400), RNG.normal(size=400)),
    "two values": (CODES % 2, CODES % 2),
    "too few": (CODES % (CODE_RANGE[0] - 1), EFFECTS[CODES.astype(int)]),
    "constant": (np.ones(400), RNG.normal(size=400)),
}


def test_codes_against_numpy():
    targets = EFFECTS[CODES.astype(int)] + RNG.normal(size=400)
    found = column_codes(CODES, targets)
    means = np.array([targets[one == CODES].mean() for one in range(12)])
    counts = np.array([(one == CODES).sum() for one in range(12)])
    np.testing.assert_allclose(found.encoded, means[CODES.astype(int)], atol=0.5)
    own = np.corrcoef(found.encoded - means[CODES.astype(int)], targets)[0, 1]
    assert own < 0  # the mean of others leans away from an example's own target
    assert found.num_values == 12
    residual = targets - found.encoded
    within = residual @ residual / (400 - 12)
    assert found.explained == pytest.approx(1 - within / targets.var(ddof=1), rel=0.01)
    pairs = list(itertools.combinations(range(12), 2))
    known = {(i, j): counts[i] * counts[j] / (counts[i] + counts[j]) for i, j in pairs}

    def difference(some):
        total = sum(known[i, j] * (means[i] - means[j]) ** 2 for i, j in some)
        return total / sum(known[one] for one in some)

    steps = [(i, i + 1) for i in range(11)]
    assert found.order == pytest.approx(difference(steps) / difference(pairs))


def test_rare_values_do_not_make_a_code():
    column = np.append(np.repeat(np.arange(8.0), 100), np.arange(8.0, 24.0))
    noise = np.random.default_rng(5).normal(size=len(column))
    codes = column_codes(column, np.minimum(column, 8) + 3 * noise)
    assert codes.explained > CODE_SHARE
    assert codes.order < 0.3


@pytest.mark.parametrize("scale", [1e-3, 1, 1000])
def test_names_as_numbers(scale):
    targets = scale * (EFFECTS[CODES.astype(int)] + RNG.normal(size=400))
    for column in (CODES, 7 * CODES - 100):
        codes = column_codes(column, targets)
        assert is_code(codes)
    finding = categorical_code(3, codes)
    assert finding.rule == "preprocessing/categorical-code"
    assert (finding.where, finding.measured) == ("inputs, feature 3", codes.order)
    assert "12 values" in finding.message


@pytest.mark.parametrize("name", HEALTHY_COLUMNS)
def test_healthy_columns_are_no_codes(name):
    assert not is_code(column_codes(*HEALTHY_COLUMNS[name]))


@pytest.mark.parametrize("name", ["continuous", "two values", "too few", "constant"])
def test_only_columns_of_few_values_are_measured(name):
    assert column_codes(*HEALTHY_COLUMNS[name]) is None


def test_codes_explain_nothing_by_chance():
    found = [column_codes(CODES, RNG.normal(size=400)).explained for _ in range(200)]
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found)) < 4 * error


POSITIONS = RNG.uniform(-3, 40, 500)


@pytest.mark.parametrize("period", [0.5, 2, 7])
@pytest.mark.parametrize("phase", [0.0, 1.0])
def test_period_is_recovered(period, phase):
    wave = np.sin(2 * np.pi * POSITIONS / period + phase)
    targets = 10 + 3 * wave + RNG.normal(size=500)
    found = column_cycle(POSITIONS, targets)
    # Frequencies lie an eighth of a cycle apart.
    cycles = np.ptp(POSITIONS) / np.array([found.period, period])
    assert abs(cycles[0] - cycles[1]) < 0.2
    assert found.explained == pytest.approx(4.5 / targets.var(), abs=0.15)
    assert found.explained > PERIOD_SHARE
    residual = targets - found.encoded
    assert found.explained == pytest.approx(1 - (residual**2).mean() / targets.var())
    assert np.corrcoef(found.encoded, wave)[0, 1] > 0.95


def test_words_of_a_cycle():
    found = column_cycle(POSITIONS, np.sin(2 * np.pi * POSITIONS / 2.5))
    finding = repeating_column(1, found)
    assert finding.rule == "preprocessing/wraparound"
    assert finding.where == "inputs, feature 1"
    assert finding.measured == found.explained
    assert f"period {found.period:.3g}" in finding.message


@pytest.mark.parametrize(
    ("column", "targets"),
    [
        (POSITIONS, POSITIONS),
        (POSITIONS, np.exp(-((POSITIONS - 20) ** 2) / 100)),
        (POSITIONS, np.tanh(POSITIONS - 20)),
        (POSITIONS, RNG.normal(size=500)),
        (POSITIONS, np.sin(2 * np.pi * POSITIONS / 30)),
        (CODES % 2, CODES % 2),
        (np.ones(50), RNG.normal(size=50)),
    ],
    ids=["linear", "bump", "step", "noise", "one cycle", "two values", "constant"],
)
def test_no_cycle(column, targets):
    assert not column_cycle(column, targets).explained > PERIOD_SHARE


def test_few_values_have_no_period():
    values = np.arange(4 * MIN_CYCLES)
    found = column_cycle(np.tile(values, 20), np.tile(np.sin(values), 20))
    assert np.isnan(found.period)
    assert found.explained == 0
    assert found.encoded.shape == (240,)


HOURS = np.tile(np.arange(24.0), 20)
WARMTH = np.cos(2 * np.pi * (HOURS - 15) / 24)
COMPASS = RNG.uniform(0, 360, 500)
AHEAD = np.stack([np.cos(np.deg2rad(COMPASS)), np.sin(np.deg2rad(COMPASS))], axis=1)
RADIANS = np.deg2rad(COMPASS)


@pytest.mark.parametrize(
    ("values", "others", "period"),
    [
        (HOURS, WARMTH, 24),
        (HOURS + 1, WARMTH, 24),
        (np.tile(np.arange(7.0), 30), np.cos(2 * np.pi * np.arange(210) / 7), 7),
        (COMPASS, AHEAD, 360),
        (COMPASS - 180, AHEAD, 360),
        (RADIANS, AHEAD, 2 * np.pi),
        (RADIANS - np.pi, AHEAD + RNG.normal(size=(500, 2)), 2 * np.pi),
        (COMPASS / 360, AHEAD, np.nan),
    ],
)
def test_what_wraps_around(values, others, period):
    found = wraparound(jnp.asarray(values), others=jnp.asarray(others))
    np.testing.assert_allclose(found.period, period, rtol=1e-6)
    assert found.wraps
    both = wraparound(jnp.stack([values, others.reshape(len(values), -1)[:, 0]], 1))
    assert both.period.shape == (2,)
    assert not both.wraps.any()  # which the values alone do not say


@pytest.mark.parametrize(
    ("values", "others"),
    [
        (HOURS, HOURS),
        (COMPASS, COMPASS**2),
        (COMPASS, RNG.normal(size=500)),
        (COMPASS, np.tanh(COMPASS - 180)),
        (RNG.normal(size=500), RNG.normal(size=500)),
        (np.ones(500), RNG.normal(size=500)),
        (np.sort(RNG.normal(size=500)), np.sin(np.arange(500) / 500 * 2 * np.pi)),
    ],
    ids=["line", "square", "noise", "step", "unrelated", "constant", "bell"],
)
def test_what_does_not_wrap_around(values, others):
    assert not wraparound(jnp.asarray(values), others=jnp.asarray(others)).wraps


def test_distances_of_a_circle_are_known():
    found = wraparound(jnp.asarray(RADIANS), others=jnp.asarray(AHEAD))
    chord = 2 * np.sin(np.pi / 12)
    steps = np.abs(np.subtract.outer(np.arange(12), np.arange(12)))
    chords = 2 * np.sin(np.pi * steps / 12)
    any_two = np.sqrt((chords**2)[steps > 0].mean())
    assert found.end_distance == pytest.approx(chord / any_two, abs=0.1)
    assert found.inner_distance == pytest.approx(chord / any_two, abs=0.05)


def test_a_long_tail_is_no_cycle():
    column = np.exp(2 * RNG.normal(size=600))
    assert not column_cycle(column, (column > 1.5) * 1.0).explained > PERIOD_SHARE
