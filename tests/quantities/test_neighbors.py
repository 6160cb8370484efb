import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import datasets
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

from nnsanity.checks.preprocessing import judge_continuity
from nnsanity.checks.results import judge_neighbors
from nnsanity.quantities import neighbors
from nnsanity.quantities.neighbors import continuity, nearest_neighbors

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
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
    return continuity(inputs, targets, key=KEY, **options)


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
    found = judge_neighbors(measured, severity="error")
    rule = "results/uninformative-targets"
    assert [(one.rule, one.severity) for one in found] == [(rule, "error")] * alarms
    if alarms:
        assert found[0].measured == pytest.approx(float(measured.z_score))


def test_a_constant_feature_is_no_neighbour():
    with_constant = np.concatenate([PLACES, np.full((120, 1), 3.0)], axis=1)
    found = measured_neighbors(with_constant, ANSWERS)
    expected = measured_neighbors(PLACES, ANSWERS)
    assert found.distance == pytest.approx(float(expected.distance), rel=1e-3)
    assert found.jumps.tolist() == expected.jumps.tolist()


TABLES = ("wine", "breast_cancer", "diabetes", "digits", "iris")


def table(name):
    return getattr(datasets, f"load_{name}")(return_X_y=True)


def by_scikit(rows, asked, num_neighbors):
    """Distances to the nearest rows, without the row itself."""
    model = NearestNeighbors(n_neighbors=num_neighbors + 1).fit(rows)
    distances, found = model.kneighbors(rows[asked])
    return distances[:, 1:], found[:, 1:]


@pytest.mark.parametrize("name", TABLES)
def test_neighbors_are_those_of_scikit_learn(name):
    rows = StandardScaler().fit_transform(table(name)[0])
    asked = np.arange(0, len(rows), 3)
    found = nearest_neighbors(
        jnp.asarray(rows, jnp.float32), jnp.asarray(asked), num_neighbors=5
    )
    expected, _ = by_scikit(rows, asked, 5)
    distances = np.linalg.norm(rows[np.asarray(found)] - rows[asked][:, None], axis=-1)
    np.testing.assert_allclose(distances, expected, rtol=1e-4, atol=1e-4)
    assert not (np.asarray(found) == asked[:, None]).any()


def test_nearest_of_rows_far_from_zero():
    rows = RNG.normal(size=(300, 4))
    found = nearest_neighbors(
        jnp.asarray(rows + 1e3, jnp.float32), jnp.arange(300), num_neighbors=3
    )
    _, expected = by_scikit(rows, np.arange(300), 3)
    assert np.mean(np.asarray(found) == expected) > 0.99


def test_many_examples_are_sampled_and_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(neighbors, "MAX_ASKED", 128)
    monkeypatch.setattr(neighbors, "_CHUNK", 2**12)
    inputs = jnp.asarray(RNG.normal(size=(1024, 3)), jnp.float32)
    measure = jax.jit(lambda inputs: continuity(inputs, jnp.sin(inputs[:, 0]), key=KEY))
    found = measure(inputs)
    assert found.num_asked == 128
    assert found.z_score > 10
    memory = measure.lower(inputs).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1024 * 1024  # all distances are 4 MiB


@pytest.mark.parametrize(
    ("inputs", "targets", "options", "words"),
    [
        (PLACES, ANSWERS[:-1], {}, "equally many examples.*120.*119"),
        (PLACES, ANSWERS, {"num_neighbors": 120}, "from 1 to 119.*got 120"),
        (PLACES[:1], ANSWERS[:1], {}, "num_neighbors"),
    ],
)
def test_continuity_needs_neighbours(inputs, targets, options, words):
    with pytest.raises(ValueError, match=words):
        continuity(inputs, targets, key=KEY, **options)


ANGLES = RNG.uniform(0, 2 * np.pi, 400)
CIRCLE = np.stack([np.cos(ANGLES), np.sin(ANGLES), RNG.normal(size=400)], axis=1)
NOISE = RNG.normal(size=400)
SMOOTH = {
    "a wave": np.sin(ANGLES),
    "a wave with noise": np.sin(ANGLES) + 0.3 * NOISE,
    "noise": NOISE,
    "two heaps": np.sign(CIRCLE[:, 0]) * 5 + 0.1 * NOISE,
    "two heaps, mislabelled": np.sign(CIRCLE[:, 0] + 0.5 * NOISE) * 5,
    "uniform noise": RNG.uniform(size=400),
    "a heavy tail": np.exp(2 * NOISE),
    "a constant": np.ones(400),
    "half an angle": np.abs(ANGLES - np.pi),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_no_seam(name):
    measured = measured_neighbors(CIRCLE, SMOOTH[name])
    assert judge_continuity(measured, severity="warning") == ()


@pytest.mark.parametrize("turn", [0.0, 2.0])
@pytest.mark.parametrize("unit", [1.0, 180 / np.pi])
def test_a_seam_is_found_and_located(turn, unit):
    targets = unit * ((ANGLES + turn) % (2 * np.pi))
    measured = measured_neighbors(CIRCLE, targets)
    (found,) = judge_continuity(measured, severity="warning")
    assert found.rule == "preprocessing/discontinuous"
    one, other = np.asarray(measured.jumps[0])
    assert abs(targets[one] - targets[other]) > 0.9 * np.ptp(targets)
    seam = (-turn) % (2 * np.pi)
    away = np.abs((ANGLES[[one, other]] - seam + np.pi) % (2 * np.pi) - np.pi)
    assert (away < 0.5).all()
    rest = _share_by_hand(CIRCLE, targets)
    np.testing.assert_allclose(
        [measured.jump_share, measured.middle_share], rest, atol=1e-6
    )


def _share_by_hand(inputs, targets):
    rows = StandardScaler().fit_transform(inputs)
    near = by_scikit(rows, np.arange(len(rows)), 5)[1]
    part = np.abs(targets[:, None] - targets[near]) / np.ptp(targets)
    return np.mean(part > 0.9), np.mean((part > 0.4) & (part < 0.6))


def test_a_seam_in_high_dimension_and_among_few_examples():
    few = measured_neighbors(CIRCLE[:40], ANGLES[:40])
    wide = np.concatenate([CIRCLE, RNG.normal(size=(400, 60))], axis=1)
    blurred = measured_neighbors(wide, ANGLES)
    assert few.z_score > 4
    assert blurred.distance > 0.7  # neighbours say little there
    assert blurred.z_score > 4  # and more than chance all the same
