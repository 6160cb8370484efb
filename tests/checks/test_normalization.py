import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.preprocessing import StandardScaler

from nnsanity.checks.normalization import (
    is_usual,
    judge_finite_targets,
    judge_inputs,
    judge_outliers,
    judge_split,
    judge_targets,
    unstandardized,
)
from nnsanity.quantities.moments import feature_moments, merge_moments, z_scores
from nnsanity.quantities.outliers import outliers
from nnsanity.quantities.scales import normalization, target_scale
from nnsanity.trials.data import judge_rounding

RNG = np.random.default_rng(0)
NORMAL = RNG.normal(size=(400, 4))
SCALES = np.array([1.0, 1e-3, 50.0, 7.0])
SHIFTS = np.array([0.0, 2.0, -9.0, 300.0])
NAN, INF = np.nan, np.inf


def normal(size=1.0, mean=0.0):
    return (NORMAL * size + mean).astype(np.float32)


def with_value(value):
    values = normal()
    values[3, 1] = value
    return values


def rules(findings):
    return [finding.rule.removeprefix("normalization/") for finding in findings]


@pytest.mark.parametrize("merged", [False, True])
def test_moments_are_those_of_scikit_learn(merged):
    values = (NORMAL * SCALES + SHIFTS).astype(np.float32)
    oracle = StandardScaler().fit(values.astype(np.float64))
    moments = feature_moments(values)
    if merged:
        moments = merge_moments(
            feature_moments(values[:3]), feature_moments(values[3:])
        )
    np.testing.assert_allclose(moments.mean, oracle.mean_, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(moments.deviation, oracle.scale_, rtol=1e-5)
    np.testing.assert_allclose(moments.minimum, values.min(axis=0))
    np.testing.assert_allclose(moments.maximum, values.max(axis=0))
    assert moments.count.tolist() == [400] * 4
    scores = oracle.transform(values.astype(np.float64))
    np.testing.assert_allclose(z_scores(values, moments), scores, atol=0.02)


def test_moments_merge_over_a_mapped_axis():
    parts = NORMAL.reshape(4, 100, 4).astype(np.float32)
    mapped = jax.vmap(lambda one: feature_moments(one, axis_name="i"), axis_name="i")
    merged = jax.tree.map(lambda leaf: leaf[0], mapped(parts))
    np.testing.assert_allclose(merged.mean, NORMAL.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(merged.deviation, NORMAL.std(axis=0), rtol=1e-5)
    assert merged.count.tolist() == [400] * 4


def test_deviation_survives_a_large_mean():
    values = (NORMAL[:, :1] + 1e4).astype(np.float32)
    exact = values.astype(np.float64).std(axis=0)
    np.testing.assert_allclose(feature_moments(values).deviation, exact, rtol=1e-5)


def test_nonfinite_values_are_counted_and_left_out():
    moments = feature_moments(jnp.array([[1.0, NAN], [3.0, NAN], [INF, NAN]]))
    assert moments.count.tolist() == [2, 0]
    assert moments.nonfinite.tolist() == [1, 3]
    assert moments.mean.tolist() == [2.0, 0.0]
    assert moments.deviation.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("values", "error"), [(jnp.zeros((0, 3)), ValueError), (np.array(["a"]), TypeError)]
)
def test_moments_of_nothing(values, error):
    with pytest.raises(error, match="feature_moments: values must"):
        feature_moments(values)


@pytest.mark.parametrize("dtype", [np.uint8, np.bool_, np.float16, jnp.bfloat16])
def test_moments_of_other_dtypes(dtype):
    values = (np.arange(12).reshape(6, 2) % 5).astype(dtype)
    moments, exact = feature_moments(values), values.astype(np.float64)
    assert moments.mean.dtype == jnp.float32
    np.testing.assert_allclose(moments.mean, exact.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(moments.deviation, exact.std(axis=0), rtol=1e-6)


def test_images_are_measured_by_channel():
    images = RNG.normal(size=(5, 4, 4, 3)).astype(np.float32)
    measured = normalization(images).root_mean_square
    exact = np.sqrt((images.astype(np.float64) ** 2).mean(axis=(0, 1, 2)))
    np.testing.assert_allclose(measured, exact, rtol=1e-5)


def test_normalization_against_numpy():
    values = (NORMAL * SCALES + SHIFTS).astype(np.float32)
    measured, exact = normalization(values), values.astype(np.float64)
    size = np.sqrt((exact**2).mean(axis=0))
    deviation = exact.std(axis=0)
    np.testing.assert_allclose(measured.root_mean_square, size, rtol=1e-5)
    disparity = deviation.max() / deviation.min()
    np.testing.assert_allclose(measured.scale_disparity, disparity, rtol=1e-3)
    assert not measured.constant.any()


def test_groups_share_their_moments():
    measured = normalization(normal(SCALES, SHIFTS), groups=[0, 1, 0, 1])
    exact = normal(SCALES, SHIFTS).astype(np.float64)
    for group in (0, 1):
        pooled = exact[:, group::2]
        np.testing.assert_allclose(
            measured.moments.mean[group], pooled.mean(), rtol=1e-5
        )
        np.testing.assert_allclose(
            measured.moments.deviation[group], pooled.std(), rtol=1e-5
        )
    with pytest.raises(
        ValueError, match="groups must hold one number for each of the 4"
    ):
        normalization(normal(), groups=[0, 1])


def test_rare_events_are_of_no_other_scale():
    pixels = normal()
    pixels[:, 2] = 0
    pixels[5, 2] = 1e-4
    assert normalization(pixels).scale_disparity < 2


HEALTHY = {
    "standardized": normal(),
    "pixels in 0 to 1": RNG.uniform(size=(200, 5)),
    "twice as large": normal(2.0),
    "one feature": normal()[:, 0],
    "bfloat16": normal().astype(jnp.bfloat16),
    "one feature of four off": normal(1.0, np.array([0, 0, 0, 7.0])),
}
FAULTY = {
    "bytes": (RNG.integers(0, 256, (200, 5)).astype(np.uint8), "unnormalized-inputs"),
    "tiny": (normal(0.09), "unnormalized-inputs"),
    "far away": (normal(0.5, 4.0), "unnormalized-inputs"),
    "huge": (normal(1e30), "unnormalized-inputs"),
    "scaled down twice": (normal(1 / 255), "double-normalized"),
    "units that differ": (normal(np.array([1, 1, 1, 150.0])), "scale-disparity"),
    "constant": (normal(np.array([1, 1, 0, 1.0])), "constant-feature"),
    "nan": (with_value(NAN), "nonfinite-input"),
    "infinite": (with_value(-INF), "nonfinite-input"),
    "all nan": (np.full((8, 2), NAN, np.float32), "nonfinite-input"),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_inputs(name):
    assert judge_inputs(normalization(HEALTHY[name])) == ()


@pytest.mark.parametrize("name", FAULTY)
def test_faulty_inputs(name):
    values, rule = FAULTY[name]
    findings = judge_inputs(normalization(values), name="pixels")
    assert rule in rules(findings)
    found = findings[rules(findings).index(rule)]
    assert found.item == 1
    assert found.where.startswith("pixels")
    assert found.severity == ("error" if rule == "nonfinite-input" else "info")


def test_features_are_named():
    nonfinite, *_ = judge_inputs(normalization(with_value(NAN)))
    assert (nonfinite.where, nonfinite.measured) == ("inputs, feature 1", 1.0)
    sizes = np.array([1, 0.5, 150.0, 1])
    findings = judge_inputs(normalization(normal(sizes)))
    disparity = findings[rules(findings).index("scale-disparity")]
    assert disparity.where == "inputs, features 2 and 1"
    ratio = (NORMAL * sizes).std(axis=0)
    assert disparity.measured == pytest.approx(ratio[2] / ratio[1], rel=1e-3)


def test_advice_names_what_to_subtract():
    (found,) = judge_inputs(normalization(normal(2.0, 100.0)))
    mean, deviation = NORMAL[:, 0].mean() * 2 + 100, NORMAL[:, 0].std() * 2
    assert f"feature 0: subtract {mean:.3g}, divide by {deviation:.3g}" in found.advice


def test_one_row_is_constant():
    measured = normalization(np.ones((1, 3), np.float32))
    assert measured.constant.all()
    assert measured.scale_disparity == 1
    assert rules(judge_inputs(measured)) == ["constant-feature"]


def test_unstandardized_is_named_after_what_it_is_about():
    found = unstandardized(normalization(normal(3.0)), "targets")
    assert found.rule == "normalization/unnormalized-targets"
    assert found.measured == pytest.approx(np.sqrt((9 * NORMAL**2).mean()), rel=1e-4)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (normal(), True),
        (np.abs(normal()), True),
        (RNG.random((400, 3)).astype(np.float32), True),
        (normal(0.1), False),
        (normal(5.0), False),
        (normal(0.1, 1.0), False),  # far from its deviation
        (normal(np.array([1, 1, 1, 8.0])), False),
        (normal(np.array([1, 1, 1, 0.0])), True),  # one is constant
    ],
)
def test_what_is_standardized_by_choice(values, expected):
    assert is_usual(normalization(values)) is expected


@pytest.mark.parametrize(
    ("targets", "output_size", "expected"),
    [
        (normal()[:, 0], 1.0, []),
        (normal(9.0), 0.01, []),
        (normal(100.0), 50.0, []),
        (normal(100.0), 1.0, ["unnormalized-targets"]),
        (normal(1.0, 200.0)[:, 0], 0.5, ["unnormalized-targets"]),
        (normal(1e30), 1.0, ["unnormalized-targets"]),
        (with_value(NAN), 1.0, ["nonfinite-target"]),
    ],
)
def test_judge_targets(targets, output_size, expected):
    outputs = np.array([output_size, -output_size], np.float32)
    assert rules(judge_targets(target_scale(outputs, targets))) == expected


@pytest.mark.parametrize(("value", "expected"), [(0, []), (NAN, ["nonfinite-target"])])
def test_judge_finite_targets(value, expected):
    findings = judge_finite_targets(feature_moments(with_value(value)))
    assert rules(findings) == expected


@pytest.mark.parametrize(
    ("held_out", "expected"),
    [
        (normal()[200:], []),
        (normal()[:1], []),
        (normal(1.0, np.array([1.0, 0, 0, 0])), []),
        (normal(np.array([3.0, 1, 1, 1])), []),
        (normal(np.array([30.0, 1, 1, 1])), ["split-mismatch"]),
        (normal(np.array([0.03, 1, 1, 1])), ["split-mismatch"]),
        (normal(1.0, 2.0), ["split-mismatch"]),
        (normal(255.0), ["split-mismatch"]),
        (normal(0.1), ["split-mismatch"]),
    ],
)
def test_judge_split(held_out, expected):
    findings = judge_split(feature_moments(normal()), feature_moments(held_out))
    assert rules(findings) == expected
    assert all(finding.severity == "warning" for finding in findings)


def test_another_mean_of_one_feature_is_worth_knowing():
    later = normal(1.0, np.array([9.0, 0, 0, 0]))
    (found,) = judge_split(feature_moments(normal()), feature_moments(later))
    assert (found.rule, found.severity) == ("normalization/split-mismatch", "info")
    assert "feature 0 has mean" in found.message


def test_split_of_targets_is_told_by_name():
    both = feature_moments(normal()[:, 0]), feature_moments(50 + 20 * normal()[:, 0])
    for pair in (both, both[::-1]):
        (found,) = judge_split(*pair, name="targets")
        assert (found.severity, found.where) == (
            "warning",
            "validation targets, 1 of 1 columns",
        )


HEAVY = {
    "normal": RNG.normal(size=(1000, 3)),
    "uniform": RNG.uniform(size=(1000, 3)),
    "lognormal": np.exp(RNG.normal(size=(1000, 3))),
    "wide lognormal": np.exp(2 * RNG.normal(size=(1000, 3))),
    "t, 2 degrees of freedom": RNG.standard_t(2, size=(1000, 3)),
    "exponential": RNG.exponential(size=(1000, 3)),
    "rare events": (RNG.uniform(size=(1000, 3)) < 0.002).astype(float),
    "counts": RNG.poisson(0.05, size=(1000, 3)).astype(float),
    "constant": np.ones((1000, 3)),
    "two heaps": np.where(RNG.uniform(size=(1000, 3)) < 0.4, 50, 0)
    + RNG.normal(size=(1000, 3)),
}


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e6])
@pytest.mark.parametrize("name", HEAVY)
def test_no_outliers(name, scale):
    values = (scale * HEAVY[name]).astype(np.float32)
    assert judge_outliers(outliers(values)) == ()


@pytest.mark.parametrize("name", ["normal", "uniform", "lognormal", "exponential"])
@pytest.mark.parametrize(
    "rows", [[7], [7, 9, 500], [999, 0]], ids=["one", "three", "ends"]
)
def test_outliers_are_found(name, rows):
    values = HEAVY[name].copy()
    values[rows, 1] = -9999.0
    values = values.astype(np.float32)
    measured = outliers(values)
    (found,) = judge_outliers(measured)
    assert found.rule == "normalization/outliers"
    assert found.where == "inputs, feature 1"
    others = np.delete(values[:, 1], rows)
    assert measured.num_outside[1] == len(rows)
    assert measured.low[1] == others.min()
    assert measured.high[1] == others.max()
    assert int(measured.farthest[1]) in rows
    centre = others.mean(dtype=np.float64)
    squares = (values[:, 1].astype(np.float64) - centre) ** 2
    assert found.measured == pytest.approx(
        squares[rows].sum() / squares.sum(), abs=0.01
    )


def test_outliers_of_values_that_are_not_finite():
    values = HEAVY["normal"].astype(np.float32).copy()
    values[3, 0], values[4, 0], values[5, 0] = NAN, INF, 1e4
    measured = outliers(values)
    (found,) = judge_outliers(measured)
    assert (found.where, measured.num_outside[0]) == ("inputs, feature 0", 1)
    assert measured.farthest[0] == 5


def test_heavy_tails_surprise_as_seldom_as_said():
    tails = np.random.default_rng(1).pareto(1.0, size=(1000, 400)) + 1
    surprise = np.asarray(outliers(jnp.asarray(tails, jnp.float32)).surprise)
    # The largest of ten spacings; alpha itself is an estimate.
    assert np.mean(surprise > 7) < 0.03


def test_target_scale_against_numpy():
    targets = NORMAL * SCALES + SHIFTS
    found = target_scale(normal(3.0), targets.astype(np.float32))
    reference = np.sqrt((9 * NORMAL**2).mean())
    rms = np.sqrt((targets**2).mean(axis=0))
    np.testing.assert_allclose(found.ratio, rms / reference, rtol=1e-4)


def test_rounding_matters_for_times_and_not_for_sizes():
    times = 1.7e9 + 60 * NORMAL
    for data, expected in ((times, ["rounded"]), (NORMAL * SCALES + SHIFTS, [])):
        assert rules(judge_rounding((data, NORMAL))) == expected
    (found,) = judge_rounding(({"a": NORMAL, "b": times}, NORMAL))
    error = times - times.astype(np.float32)
    expected = (np.sqrt((error**2).mean(axis=0)) / times.std(axis=0)).max()
    assert found.measured == pytest.approx(expected)
    assert found.where.startswith("inputs['b']")
    assert judge_rounding((times.astype(np.float32), NORMAL)) == ()
