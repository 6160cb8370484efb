"""Moments against NumPy in float64, merged in every way."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import datasets
from sklearn.preprocessing import StandardScaler

from nnsanity.quantities.moments import (
    Moments,
    denormalize,
    feature_moments,
    group_moments,
    merge_moments,
    normalize,
    z_scores,
)

RNG = np.random.default_rng(0)
NAN, INF = np.nan, np.inf
FAR = (1e4 + 0.1 * RNG.normal(size=(100_000, 3))).astype(np.float32)
VALUES = (RNG.normal(size=(300, 4)) * [1, 10, 100, 1e-3] + [0, 5, -50, 1]).astype(
    np.float32
)


def oracle(values):
    """The six fields in float64, feature by feature."""
    rows = np.asarray(values, np.float64)
    if rows.ndim == 1:
        return tuple(field[0] for field in oracle(rows[:, None]))
    rows = rows.reshape(-1, rows.shape[-1])
    columns = [column[np.isfinite(column)] for column in rows.T]
    mean = [column.mean() if column.size else 0 for column in columns]
    return (
        [column.size for column in columns],
        mean,
        [((c - m) ** 2).sum() for c, m in zip(columns, mean, strict=True)],
        [column.min(initial=INF) for column in columns],
        [column.max(initial=-INF) for column in columns],
        list((~np.isfinite(rows)).sum(0)),
    )


def assert_moments(moments, expected, rtol=1e-5):
    for name, found, value in zip(Moments._fields, moments, expected, strict=True):
        exact = name in ("count", "nonfinite", "minimum", "maximum")
        value = np.asarray(value)
        error = 0 if exact else rtol * np.maximum(np.abs(value), 1e-6)
        assert found.shape == value.shape
        np.testing.assert_array_less(
            np.abs(np.where(np.isfinite(value), found - value, 0)), error + 1e-30, name
        )
        np.testing.assert_array_equal(np.isfinite(found), np.isfinite(value), name)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_mean_far_above_the_deviation(compiled):
    measure = jax.jit(feature_moments) if compiled else feature_moments
    moments = measure(jnp.asarray(FAR))
    np.testing.assert_allclose(moments.mean, FAR.mean(0, np.float64), rtol=1e-7)
    np.testing.assert_allclose(moments.deviation, FAR.std(0, dtype="f8"), rtol=1e-4)
    assert not moments.is_constant.any()


@pytest.mark.parametrize(
    "values",
    [
        VALUES,
        VALUES[:, 0],
        VALUES[:1],
        VALUES.reshape(3, 10, 10, 4),
        RNG.integers(0, 256, (5, 8, 8, 3), np.uint8),
        RNG.integers(-9, 9, 20),
        RNG.normal(size=30) > 0,
        np.array([[1, 2, NAN, NAN], [3, NAN, NAN, INF], [8, -INF, NAN, 2]], "f4"),
    ],
    ids=lambda values: f"{values.dtype}{values.shape}",
)
def test_against_numpy(values):
    moments = feature_moments(values)
    assert_moments(moments, oracle(values))
    assert moments.count.dtype == moments.nonfinite.dtype == jnp.int32
    assert {moments[index].dtype for index in (1, 2, 3, 4)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_summed_in_float32(dtype):
    values = jnp.asarray(VALUES[:, :2], dtype)
    values = jnp.concatenate([values] * 20)
    assert_moments(jax.jit(feature_moments)(values), oracle(values.astype(jnp.float32)))


def test_float64_stays():
    with jax.enable_x64(True):
        values = 1e8 + RNG.normal(size=(1000, 2))
        moments = feature_moments(jnp.asarray(values))
        assert moments.mean.dtype == jnp.float64
        np.testing.assert_allclose(moments.deviation, values.std(0), rtol=1e-7)


def test_values_too_large_for_their_squares():
    moments = feature_moments(jnp.array([[1e30], [-1e30], [2e30]]))
    assert moments.count.tolist() == [3]
    np.testing.assert_allclose(moments.mean, 2e30 / 3, rtol=1e-6)
    assert moments.square_deviations.tolist() == [INF]
    assert not moments.is_constant.any()


@pytest.mark.parametrize("sizes", [(150, 150), (1, 299), (7, 200, 93), (100,) * 3])
def test_merged_as_if_all_at_once(sizes):
    parts = np.split(VALUES, np.cumsum(sizes)[:-1])
    merge = jax.jit(merge_moments)
    merged = functools.reduce(merge, map(jax.jit(feature_moments), parts))
    assert_moments(merged, oracle(VALUES))


def test_batches_far_from_zero_and_with_other_means():
    parts = [FAR[:50_000], FAR[50_000:] + np.float32(0.5)]
    merged = merge_moments(*map(feature_moments, parts))
    expected = np.concatenate(parts).std(0, dtype=np.float64)
    np.testing.assert_allclose(merged.deviation, expected, rtol=1e-3)


def test_merging_is_associative_and_symmetric():
    a, b, c = map(jax.jit(feature_moments), np.split(VALUES, [20, 130]))
    left, right = (
        merge_moments(merge_moments(a, b), c),
        merge_moments(a, merge_moments(b, c)),
    )
    for other in (right, merge_moments(c, merge_moments(b, a))):
        for found, expected in zip(left, other, strict=True):
            np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_moments_of_no_values_are_neutral(value):
    nothing = feature_moments(jnp.full((2, 4), value))
    assert_moments(nothing, ([0] * 4, [0] * 4, [0] * 4, [INF] * 4, [-INF] * 4, [2] * 4))
    assert nothing.deviation.tolist() == [0] * 4
    some = feature_moments(VALUES)
    for merged in (merge_moments(some, nothing), merge_moments(nothing, some)):
        assert merged.nonfinite.tolist() == [2] * 4
        for found, expected in zip(merged[:5], some[:5], strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e-30, 1e15, 16_777_217.0])
def test_constant_features(value):
    values = jnp.stack([jnp.full(1000, value), jnp.arange(1000.0)], 1)
    moments = feature_moments(values)
    assert moments.is_constant.tolist() == [True, False]
    scores = z_scores(values, moments)
    np.testing.assert_allclose(scores[:, 0], 0, atol=1e-5 * max(abs(value), 1e-30))


@pytest.mark.parametrize("layout", ["vmap", "shard_map"])
def test_merged_over_an_axis(layout):
    rows = VALUES.copy()
    rows[7, 2] = NAN
    measure = functools.partial(feature_moments, axis_name="batch")
    if layout == "vmap":
        found = jax.jit(jax.vmap(measure, axis_name="batch"))(rows.reshape(6, 50, 4))
        copies = [jax.tree.map(lambda leaf, i=i: leaf[i], found) for i in range(6)]
    else:
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), "batch")
        over, whole = (jax.sharding.PartitionSpec(*axes) for axes in (["batch"], []))
        sharded = jax.shard_map(measure, mesh=mesh, in_specs=over, out_specs=whole)
        sharding = jax.sharding.NamedSharding(mesh, over)
        copies = [jax.jit(sharded)(jax.device_put(rows, sharding))]
    for moments in copies:
        assert_moments(moments, oracle(rows))


def test_z_scores_against_numpy():
    scores = z_scores(VALUES, feature_moments(VALUES))
    exact = VALUES.astype(np.float64)
    exact = (exact - exact.mean(0)) / exact.std(0)
    np.testing.assert_allclose(scores, exact, atol=2e-3)
    np.testing.assert_allclose(scores[:, :3], exact[:, :3], atol=1e-5)
    again = feature_moments(scores)
    np.testing.assert_allclose(again.mean, 0, atol=1e-4)
    np.testing.assert_allclose(again.deviation, 1, rtol=1e-4)


def test_z_scores_of_other_rows_images_and_bytes():
    moments = feature_moments(jnp.array([[0.0], [10.0]]))
    assert z_scores(jnp.array([[20.0]]), moments).tolist() == [[3]]
    images = RNG.integers(0, 256, (4, 5, 5, 3), np.uint8)
    scores = z_scores(images, feature_moments(images))
    assert scores.shape == images.shape
    assert scores.dtype == jnp.float32
    exact = images.astype(np.float64)
    exact = (exact - exact.mean((0, 1, 2))) / exact.std((0, 1, 2))
    np.testing.assert_allclose(scores, exact, atol=1e-5)


def test_z_scores_only_shift_what_was_constant():
    moments = feature_moments(jnp.array([[5.0], [5.0]]))
    assert z_scores(jnp.array([[5.0], [7.0]]), moments).tolist() == [[0], [2]]


def test_updated_in_a_scan():
    batches = jnp.asarray(VALUES.reshape(6, 50, 4))

    def step(moments, batch):
        return merge_moments(moments, feature_moments(batch)), None

    first = feature_moments(batches[0])
    merged, _ = jax.lax.scan(step, first, batches[1:])
    assert_moments(merged, oracle(VALUES))


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        (np.array(["a", "b"]), TypeError, "must hold numbers"),
        (np.array([None, 1.0]), TypeError, "must hold numbers"),
        (jnp.float32(3), ValueError, r"got shape \(\)"),
        (jnp.zeros((0, 3)), ValueError, r"got shape \(0, 3\)"),
        (jnp.zeros((3, 0)), ValueError, r"got shape \(3, 0\)"),
        (jnp.zeros(0), ValueError, r"got shape \(0,\)"),
    ],
)
def test_what_holds_no_numbers_is_refused(values, error, words):
    with pytest.raises(error, match=rf"feature_moments: .*{words}"):
        feature_moments(values)


TABLES = ("wine", "breast_cancer", "diabetes", "digits", "iris")


@pytest.mark.parametrize("name", TABLES)
def test_real_tables_against_scikit_learn(name):
    values = getattr(datasets, f"load_{name}")().data
    moments = feature_moments(jnp.asarray(values, jnp.float32))
    scaler = StandardScaler().fit(values)
    np.testing.assert_allclose(moments.mean, scaler.mean_, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(moments.scale, scaler.scale_, rtol=1e-4)
    np.testing.assert_allclose(
        normalize(jnp.asarray(values, jnp.float32), moments),
        scaler.transform(values),
        atol=1e-3,
    )


def test_a_million_rows_far_from_zero():
    values = (1e4 + 0.1 * RNG.normal(size=(1_000_000, 1))).astype(np.float32)
    expected = values.astype(np.float64)
    moments = jax.jit(feature_moments)(values)
    assert moments.mean[0] == pytest.approx(expected.mean(), abs=1e-3)
    assert moments.deviation[0] == pytest.approx(expected.std(), rel=1e-3)
    spoiled = values.copy()
    spoiled[7] = NAN
    slow = jax.jit(feature_moments)(spoiled)
    assert slow.deviation[0] == pytest.approx(float(moments.deviation[0]), rel=1e-3)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.uint8, np.int32])
def test_normalize_and_back(dtype):
    values = jnp.asarray(RNG.integers(0, 200, (50, 3)), dtype).at[:, 1].set(7)
    moments = feature_moments(values)
    normal = normalize(values, moments)
    is_float = jnp.issubdtype(dtype, jnp.floating)
    assert normal.dtype == (dtype if is_float else jnp.float32)
    assert jnp.isfinite(normal).all()
    assert (normal[:, 1] == 0).all()
    back = denormalize(normal, moments).astype(jnp.float32)
    error = jnp.max(jnp.abs(back - values.astype(jnp.float32)))
    assert error < (2 if dtype == jnp.bfloat16 else 1e-3)


@pytest.mark.parametrize("groups", [[0, 0, 1, 1], [5, 2, 5, 2], [0, 1, 2, 3]])
def test_groups_against_numpy(groups):
    groups = np.asarray(groups)
    shared = group_moments(feature_moments(VALUES), groups=groups)
    for feature, group in enumerate(groups):
        members = VALUES[:, groups == group].astype(np.float64)
        assert shared.mean[feature] == pytest.approx(members.mean(), rel=1e-5)
        assert shared.deviation[feature] == pytest.approx(members.std(), rel=1e-5)
        assert shared.minimum[feature] == members.min()
        assert shared.count[feature] == members.size
    normal = normalize(jnp.asarray(VALUES), shared)
    ratio = normal[:, 0].std() / VALUES[:, 0].std()
    for feature in np.flatnonzero(groups == groups[0]):
        other = normal[:, feature].std() / VALUES[:, feature].std()
        assert other == pytest.approx(float(ratio), rel=1e-4)


def test_groups_must_be_as_many_as_features():
    with pytest.raises(ValueError, match="each of the 4 features, got 2"):
        group_moments(feature_moments(VALUES), groups=[0, 1])
