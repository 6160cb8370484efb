import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnsanity.checks.preprocessing import (
    CODE_RANGE,
    MIN_CYCLES,
    PERIOD_SHARE,
    categorical_code,
    column_codes,
    column_cycle,
    contradictions,
    is_code,
    judge_contradictions,
    judge_neighbors,
    neighbors,
    wraparound,
)

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)


def contradictions_by_hand(inputs, targets):
    targets = targets.reshape(len(targets), -1).astype(np.float64)
    rows = inputs.reshape(len(inputs), -1)
    _, group, counts = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    group = group.reshape(-1)
    within = sum(
        ((targets[group == one] - targets[group == one].mean(axis=0)) ** 2).sum()
        for one in range(len(counts))
    )
    overall = ((targets - targets.mean(axis=0)) ** 2).sum()
    repeated = counts[counts > 1]
    copies = repeated.mean() if len(repeated) else 0
    return within / overall if overall else 0, repeated.sum(), copies


def rows_of(num_values, columns=2, size=60):
    return RNG.integers(0, num_values, (size, columns)).astype(np.float32)


@pytest.mark.parametrize(
    ("inputs", "targets"),
    [
        (rows_of(4), RNG.normal(size=60)),
        (rows_of(4) * 1e-3 - 7, RNG.normal(size=(60, 3))),
        (rows_of(2, 12).reshape(60, 3, 4), RNG.normal(size=60)),
        (rows_of(3).astype(np.int32), RNG.integers(0, 2, 60)),
        (RNG.normal(size=(60, 2)).astype(np.float32), RNG.normal(size=60)),
        (np.zeros((60, 2), np.float32), RNG.normal(size=60)),
        (rows_of(4), np.ones(60)),
    ],
)
def test_contradictions_against_numpy(inputs, targets):
    found = contradictions(jnp.asarray(inputs), jnp.asarray(targets, jnp.float32))
    expected = contradictions_by_hand(inputs, targets)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert found.num_repeated.dtype == jnp.int32


def test_both_zeros_are_one_number():
    inputs = jnp.array([[0.0], [-0.0], [1.0]])
    assert contradictions(inputs, jnp.arange(3.0)).num_repeated == 2


def test_rows_of_equal_values_in_another_order_differ():
    inputs = jnp.array([[1.0, 2.0], [2.0, 1.0], [1.0, 1.0], [2.0, 2.0]])
    assert contradictions(inputs, jnp.arange(4.0)).num_repeated == 0


UNIQUE = RNG.normal(size=(50, 3)).astype(np.float32)
TWICE = np.concatenate([UNIQUE, UNIQUE])
NOISE = RNG.normal(size=100).astype(np.float32)


@pytest.mark.parametrize(
    ("inputs", "targets", "alarms"),
    [
        (TWICE, NOISE, True),
        (TWICE, np.tile(NOISE[:50], 2), False),
        (TWICE, np.tile(NOISE[:50], 2) + 0.1 * NOISE, False),
        (np.concatenate([UNIQUE, UNIQUE + 1]), NOISE, False),
        (np.tile(UNIQUE[:10], (10, 1)), NOISE, False),
    ],
    ids=["unequal", "equal", "nearly", "other inputs", "a table of ten rows"],
)
def test_contradictory_duplicates(inputs, targets, alarms):
    measured = contradictions(jnp.asarray(inputs), jnp.asarray(targets))
    found = judge_contradictions(measured)
    rule = "preprocessing/contradictory-duplicates"
    assert [(one.rule, one.severity) for one in found] == [(rule, "warning")] * alarms
    if alarms:
        share = contradictions_by_hand(inputs, targets)[0]
        assert found[0].measured == pytest.approx(share, rel=1e-4)
        assert found[0].message.startswith("100 examples")


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
    spread = counts @ (means - targets.mean()) ** 2 / 400
    steps = np.mean((means[1:] - means[:-1]) ** 2)
    assert found.order == pytest.approx(steps / (2 * spread))


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
    finding = wraparound(1, found)
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


PLACES = RNG.normal(size=(120, 3)) * [1, 1000, 1e-3] + [0, 5, 1]
ANSWERS = np.stack([PLACES[:, 0], 50 * PLACES[:, 0] ** 2], axis=1)
SHUFFLED = RNG.permutation(ANSWERS)


def neighbors_by_hand(inputs, targets, num_neighbors):
    rows = (inputs - inputs.mean(axis=0)) / inputs.std(axis=0)
    targets = targets / targets.std(axis=0)
    near, every = [], []
    for one in range(len(rows)):
        order = np.argsort(((rows - rows[one]) ** 2).sum(axis=1), kind="stable")
        difference = ((targets - targets[one]) ** 2).mean(axis=1)
        near.append(difference[order[order != one][:num_neighbors]])
        every.append(np.delete(difference, one))
    return np.mean(near) / np.mean(every)


def measured_neighbors(inputs, targets, **options):
    inputs, targets = jnp.asarray(inputs), jnp.asarray(targets)
    return neighbors(inputs, targets, key=KEY, **options)


@pytest.mark.parametrize("targets", [ANSWERS, SHUFFLED])
@pytest.mark.parametrize("num_neighbors", [1, 5])
def test_neighbors_against_numpy(targets, num_neighbors):
    found = measured_neighbors(PLACES, targets, num_neighbors=num_neighbors)
    expected = neighbors_by_hand(PLACES, targets, num_neighbors)
    # Chance is an average over 64 shuffles, whose error the z score tells.
    error = abs((1 - found.distance) / found.z_score) / 8
    assert abs(found.distance - expected) < 4 * error * max(expected, 1)


@pytest.mark.parametrize(
    ("targets", "alarms"), [(ANSWERS, False), (SHUFFLED, True), (ANSWERS[:, 0], False)]
)
def test_uninformative_targets(targets, alarms):
    measured = measured_neighbors(PLACES, targets)
    found = judge_neighbors(measured)
    rule = "results/uninformative-targets"
    assert [(one.rule, one.severity) for one in found] == [(rule, "error")] * alarms
    if alarms:
        assert found[0].measured == pytest.approx(float(measured.z_score))


def test_a_constant_feature_is_no_neighbour():
    with_constant = np.concatenate([PLACES, np.full((120, 1), 3.0)], axis=1)
    found = measured_neighbors(with_constant, ANSWERS)
    np.testing.assert_allclose(found, measured_neighbors(PLACES, ANSWERS), rtol=1e-3)
