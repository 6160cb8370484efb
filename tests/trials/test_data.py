"""Planted faults of the data, each named by the checkup, and their healthy twins."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn import datasets
from sklearn.preprocessing import StandardScaler

import nnsanity as ns

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
INPUTS = RNG.normal(size=(400, 6)).astype(np.float32)
SLOPES = np.array([1, -0.5, 0.5, -1, 0.3, 0.2])
NUMBERS = np.tanh(INPUTS @ SLOPES) + 0.05 * RNG.normal(size=400)
NUMBERS = NUMBERS[:, None].astype(np.float32)
ADAM = optax.adam(1e-2)
UNREACHABLE = "final-activation/unreachable-targets"


def drawn(*widths):
    keys = jax.random.split(jax.random.key(1), len(widths) - 1)
    normal = jax.nn.initializers.glorot_normal()
    return [
        {"w": normal(key, shape), "b": jnp.zeros(shape[1])}
        for key, *shape in zip(keys, widths[:-1], widths[1:], strict=True)
    ]


def network(params, x):
    *layers, last = params
    for layer in layers:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ last["w"] + last["b"]


def squared(params, batch):
    return jnp.mean((network(params, batch[0]) - batch[1]) ** 2)


def entropy(params, batch):
    logits = network(params, batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


TABLES = ("wine", "breast_cancer", "diabetes", "digits", "iris")


def checkup(inputs, targets, **options):
    is_class = targets.dtype.kind in "iu"
    width = int(targets.max()) + 1 if is_class else targets.shape[1]
    given = {"key": KEY, "optimizer": ADAM, "num_steps": 200} | options
    return ns.checkup(
        network,
        entropy if is_class else squared,
        drawn(inputs.shape[1], 32, width),
        (inputs, targets),
        **given,
    )


def loud(report):
    return [one.rule for one in report.findings if one.severity != "info"]


def rules(report):
    return [one.rule for one in report.findings]


def scaled(values):
    return StandardScaler().fit_transform(values).astype(np.float32)


def table(name):
    options = {"scaled": False} if name == "diabetes" else {}
    inputs, targets = getattr(datasets, f"load_{name}")(return_X_y=True, **options)
    if name == "diabetes":
        return inputs.astype(np.float32), targets[:, None].astype(np.float32)
    return inputs.astype(np.float32), targets.astype(np.int32)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wine", "diabetes"])
def test_raw_tables_that_hurt(name):
    report = checkup(*table(name), num_steps=300)
    assert loud(report)[0] in (
        "normalization/unnormalized-inputs",
        "normalization/unnormalized-targets",
    )
    assert all(one.startswith("normalization/") for one in loud(report))


@pytest.mark.parametrize(
    "name", ["wine", "breast_cancer", "diabetes", "digits", "iris"]
)
def test_standardized_tables_are_silent(name):
    inputs, targets = table(name)
    targets = scaled(targets) if name == "diabetes" else targets
    report = checkup(scaled(inputs), targets, interventions=name != "diabetes")
    assert loud(report) == []


@pytest.fixture(scope="module")
def healthy():
    return checkup(INPUTS, NUMBERS, validation=(INPUTS[:90], NUMBERS[:90]))


def test_healthy_data_are_silent(healthy):
    assert loud(healthy) == []
    assert not [one for one in rules(healthy) if one.startswith("preprocessing/")]
    assert "preprocessing" not in healthy.skipped
    assert "overfit_batch" not in healthy.measurements


@pytest.mark.slow
def test_a_column_in_other_units():
    inputs = INPUTS.copy()
    inputs[:, 3] *= 1000
    report = checkup(inputs, NUMBERS)
    assert loud(report)[0].startswith("normalization/")
    assert "normalization/scale-disparity" in rules(report)


@pytest.mark.slow
def test_one_broken_row():
    inputs = INPUTS.copy()
    inputs[7, 2] = 1e4
    report = checkup(scaled(inputs), NUMBERS)
    assert loud(report) == ["normalization/outliers"]
    assert report.findings[0].where == "inputs, feature 2"
    assert "example 7" in report.findings[0].message
    assert "Clipping the outliers" in report.findings[0].message


@pytest.mark.slow
def test_shuffled_targets():
    report = checkup(INPUTS, RNG.permutation(NUMBERS))
    assert loud(report) == ["results/uninformative-targets"]


@pytest.mark.slow
def test_labels_that_are_learned_by_heart_alone():
    few, labels = INPUTS[:150], np.digitize(NUMBERS[:150, 0], [-0.5, 0.5])
    report = checkup(few, RNG.permutation(labels).astype(np.int32), num_steps=1000)
    (found,) = (one for one in report.findings if one.severity != "info")
    assert found.rule == "results/uninformative-targets"
    assert found.severity == "warning"  # something was learned
    assert loud(checkup(few, labels.astype(np.int32), num_steps=1000)) == []


@pytest.mark.slow
def test_too_few_examples_for_their_features_are_no_shuffled_targets():
    many = RNG.normal(size=(200, 200)).astype(np.float32)
    for seed in range(3):
        report = checkup(
            many, (many[:, 0] > 0).astype(np.int32), key=jax.random.key(seed)
        )
        assert "results/uninformative-targets" not in rules(report)


def clipped_probability(params, x):
    return jnp.clip(jax.nn.sigmoid(network(params, x)), 1e-6, 1 - 1e-6)


def cross_entropy_of(share):
    def loss_fn(params, batch):
        chance, targets = clipped_probability(params, batch[0]), share(batch[1])
        good, bad = jnp.log(chance), jnp.log(1 - chance)
        return -jnp.mean(targets * good + (1 - targets) * bad)

    return loss_fn


@pytest.mark.slow
@pytest.mark.parametrize(
    ("share", "severity"), [(lambda t: t, "warning"), (lambda t: (t + 1) / 2, "info")]
)
def test_a_class_that_the_outputs_can_not_be(share, severity):
    # Only a half of the labels can be told from the inputs.
    labels = np.where(RNG.random(400) < 0.5, NUMBERS[:, 0] > 0, RNG.random(400) < 0.5)
    report = ns.checkup(
        clipped_probability,
        cross_entropy_of(share),
        drawn(6, 32, 1),
        (INPUTS, np.where(labels, 1.0, -1.0)[:, None].astype(np.float32)),
        key=KEY,
        optimizer=ADAM,
        num_steps=200,
    )
    (found,) = (one for one in report.findings if one.rule == UNREACHABLE)
    assert found.severity == severity


ANGLES = RNG.uniform(0, 2 * np.pi, 500)
AHEAD = np.stack([np.cos(ANGLES), np.sin(ANGLES), RNG.normal(size=500)], axis=1)
AHEAD = AHEAD.astype(np.float32)


@pytest.mark.slow
def test_an_angle_as_target():
    report = checkup(AHEAD, ANGLES[:, None].astype(np.float32))
    assert loud(report)[:2] == [
        "preprocessing/wraparound",
        "preprocessing/discontinuous",
    ]
    first = report.findings[0]
    assert first.where == "targets"
    assert "sine and the cosine of the targets" in first.message
    assert rules(report).count("preprocessing/wraparound") == 1
    assert loud(checkup(AHEAD, np.sin(ANGLES)[:, None].astype(np.float32))) == []


@pytest.mark.slow
def test_an_hour_of_the_day():
    hours = RNG.integers(0, 24, 600)
    inputs = np.column_stack([hours, RNG.normal(size=(600, 2))]).astype(np.float32)
    targets = np.cos(2 * np.pi * (hours - 15) / 24) + 0.3 * inputs[:, 1]
    report = checkup(inputs, targets[:, None].astype(np.float32))
    (found,) = (one for one in report.findings if one.rule.endswith("/wraparound"))
    assert found.where == "inputs, feature 0"
    assert found.severity == "warning"


@pytest.mark.slow
def test_a_column_of_codes():
    codes = RNG.integers(0, 30, 800)
    inputs = scaled(np.column_stack([RNG.normal(size=(800, 2)), codes]))
    effects = RNG.normal(size=30)[codes] + 0.2 * inputs[:, 0]
    targets = np.digitize(effects, np.quantile(effects, [1 / 3, 2 / 3]))
    report = checkup(inputs, targets)
    assert loud(report)[0] == "preprocessing/categorical-code"
    assert report.findings[0].where == "inputs, feature 2"


@pytest.mark.slow
def test_a_code_that_changes_what_another_column_means():
    codes = RNG.integers(0, 20, 1000)
    inputs = np.column_stack([RNG.normal(size=(1000, 2)), 7.0 * codes])
    slopes, means = RNG.normal(size=20), RNG.normal(size=20)
    targets = means[codes] + slopes[codes] * inputs[:, 0]
    inputs, targets = (one.astype(np.float32) for one in (inputs, targets[:, None]))
    report = checkup(inputs, targets, num_steps=300, batch_size=64)
    first = report.findings[0]
    assert first.rule == "preprocessing/categorical-code"
    assert first.severity in ("error", "warning")
    assert "eeding feature 2 one-hot" in first.message
    # What one number for each code could say at most is its mean.
    share = np.var(means[codes]) / np.var(targets)
    repaired = {one.repair: one for one in report.measurements["repairs"]}
    assert np.median(repaired["feeding feature 2 one-hot"].levels) > share + 0.1


def test_a_split_with_another_scaling():
    other = INPUTS[:90] * np.array([1, 1, 100, 1, 1, 1], np.float32)
    report = checkup(INPUTS, NUMBERS, validation=(other, NUMBERS[:90]))
    assert loud(report) == ["normalization/split-mismatch"]
    assert "feature 2" in report.findings[0].message
    report = checkup(INPUTS, NUMBERS, validation=(INPUTS[:90], 50 * NUMBERS[:90]))
    assert loud(report) == ["normalization/split-mismatch"]
    assert report.findings[0].where.startswith("validation targets")


@pytest.mark.slow
def test_examples_mixed_up_inside():
    def mixed(params, x):
        return network(params, jnp.roll(x, 1, axis=0))

    report = ns.checkup(
        mixed,
        lambda p, b: jnp.mean((mixed(p, b[0]) - b[1]) ** 2),
        drawn(6, 32, 1),
        (INPUTS, NUMBERS),
        key=KEY,
        optimizer=ADAM,
        num_steps=200,
        interventions=False,
    )
    assert "results/cannot-overfit-batch" in loud(report)
    assert "results/ignores-inputs" in rules(report)
    assert not report.measurements["overfit_batch"].fits


def test_transforms_that_keep_the_meaning():
    options = {"interventions": False}
    flips = [("turned over", lambda x: -x), ("kept", lambda x: x + 0)]
    report = checkup(INPUTS, NUMBERS, invariances=flips, **options)
    assert loud(report) == ["preprocessing/not-invariant"]
    assert report.findings[0].where == "turned over"
    assert "invariance of the outputs, kept" in report.measurements
    untrained = checkup(INPUTS, NUMBERS, invariances=flips, optimizer=None)
    assert loud(untrained) == []
    assert "preprocessing/not-invariant" in rules(untrained)


@pytest.mark.parametrize(
    ("transforms", "error", "words"),
    [
        ([3], TypeError, "invariances.*got 3"),
        ([("a", 3)], TypeError, "invariances"),
        ([np.negative, np.negative], ValueError, "two transforms called 'negative'"),
        ([("a", lambda x: x[:1])], ValueError, r"a of invariances.*\(1, 6\)"),
    ],
)
def test_what_is_no_transform(transforms, error, words):
    with pytest.raises(error, match=words):
        checkup(INPUTS, NUMBERS, invariances=transforms, optimizer=None)


def untrained(inputs, targets, **options):
    return checkup(inputs, targets, optimizer=None, **options)


def test_nan_in_the_targets_alone():
    targets = NUMBERS.copy()
    targets[5] = np.nan
    report = untrained(INPUTS, targets)
    assert loud(report)[0] == "normalization/nonfinite-target"
    spoiled = next(one for one in report.findings if one.rule == "results/nonfinite")
    assert "what was given: targets" in spoiled.message


def test_images_of_bytes_are_integers_that_are_numbers():
    images = RNG.integers(0, 256, (200, 6)).astype(np.uint8)
    labels = (images[:, 0] > 128).astype(np.int32)
    report = untrained(images, labels)
    assert "preprocessing/integer-input" in rules(report)
    assert "normalization/unnormalized-inputs" in rules(report)
    assert loud(report) == []


def test_float64_is_rounded_and_said_where_it_matters():
    times = INPUTS.astype(np.float64)
    times[:, 1] = 1.7e9 + 60 * times[:, 1]
    report = untrained(times, NUMBERS.astype(np.float64))
    (found,) = (one for one in report.findings if one.rule == "normalization/rounded")
    assert (found.severity, found.where) == ("info", "inputs, feature 1")
    fine = untrained(INPUTS.astype(np.float64), NUMBERS.astype(np.float64))
    assert "normalization/rounded" not in rules(fine)


def test_integers_that_do_not_fit_are_refused():
    numbers = np.arange(400)[:, None] + 2**40
    with pytest.raises(ValueError, match=r"do not fit int32, up to 1099511628175"):
        untrained(np.tile(numbers, 6), NUMBERS)
    small = np.tile(np.arange(400)[:, None] % 50, 6)
    assert "preprocessing/integer-input" in rules(untrained(small, NUMBERS))


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ((INPUTS, np.array(["a", "b"] * 200)), TypeError, "must hold numbers"),
        ((INPUTS, np.array([[1], [1, 2]] * 200, object)), TypeError, "ragged"),
        ((INPUTS[:0], NUMBERS[:0]), ValueError, "no examples"),
        (([[1.0], [1.0, 2.0]], NUMBERS[:2]), ValueError, "lists of unequal length"),
    ],
)
def test_data_that_are_no_arrays_of_numbers(data, error, words):
    with pytest.raises(error, match=words):
        ns.checkup(network, squared, drawn(6, 4, 1), data, key=KEY)


def test_one_row():
    report = checkup(INPUTS[:1], NUMBERS[:1], batch_size=1, num_steps=60)
    assert np.isfinite(report.measurements["trial"][0].losses).all()
    assert "normalization/constant-feature" in rules(report)
    str(report)
