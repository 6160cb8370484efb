import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import pdist
from sklearn.preprocessing import PowerTransformer, StandardScaler

from nnsanity.checks.preprocessing import judge_invariance
from nnsanity.quantities.moments import denormalize, feature_moments, normalize
from nnsanity.quantities.representation import invariance, roundtrip_error

RNG = np.random.default_rng(0)
VALUES = RNG.normal(size=(200, 3)) * [1, 50, 1e-3] + [0, 300, 2]
MOMENTS = feature_moments(jnp.asarray(VALUES))


def test_normalize_comes_back():
    found = roundtrip_error(
        lambda x: normalize(x, MOMENTS),
        lambda x: denormalize(x, MOMENTS),
        jnp.asarray(VALUES, jnp.float32),
    )
    assert found.relative < 1e-3
    assert found.nonfinite == 0


def test_the_wrong_inverse_is_measured():
    scaler = StandardScaler().fit(VALUES)
    other = StandardScaler().fit(2 * VALUES)
    found = roundtrip_error(scaler.transform, other.inverse_transform, VALUES)
    error = other.inverse_transform(scaler.transform(VALUES)) - VALUES
    assert found.root_mean_square == pytest.approx(np.sqrt((error**2).mean()), rel=1e-4)
    relative = np.sqrt(((error / VALUES.std(axis=0)) ** 2).mean())
    assert found.relative == pytest.approx(relative, rel=1e-3)
    assert found.largest == pytest.approx(np.abs(error).max(), rel=1e-5)


def test_values_that_do_not_come_back():
    power = PowerTransformer("box-cox").fit(np.exp(VALUES[:, :1]))
    good = roundtrip_error(
        power.transform, power.inverse_transform, np.exp(VALUES[:, :1])
    )
    assert good.relative < 1e-4
    values = jnp.array([-1.0, 4.0, jnp.nan])
    found = roundtrip_error(
        lambda tree: [jnp.sqrt(one) for one in tree],
        lambda tree: [jnp.square(one) for one in tree],
        [values, values],
    )
    assert found.nonfinite == 2
    assert found.largest == 0


def test_what_comes_back_must_have_the_shape():
    with pytest.raises(ValueError, match=r"\(200, 3\).*\(200,\)"):
        roundtrip_error(lambda x: x, lambda x: x[:, 0], VALUES)


def test_ratio_against_all_pairs():
    rows = RNG.normal(size=(60, 4)).astype(np.float32)
    found = invariance(lambda x: x, lambda x: -x, jnp.asarray(rows))
    strangers = np.sqrt((pdist(rows) ** 2).mean())
    moved = 2 * np.linalg.norm(rows, axis=1)
    assert found.strangers == pytest.approx(strangers, rel=1e-5)
    np.testing.assert_allclose(found.moved, moved, rtol=1e-5)
    assert found.ratio == pytest.approx(np.sqrt((moved**2).mean()) / strangers)


POINTS = jnp.asarray(RNG.normal(size=(100, 5, 2)), jnp.float32)
TRANSFORMS = {
    "shift": lambda x: x + 100.0,
    "turn": lambda x: jnp.stack([-x[..., 1], x[..., 0]], axis=-1),
    "reorder": lambda x: x[:, ::-1],
}


def pairwise(x):
    """Sorted distances of the points: the same after each of the transforms."""
    away = jnp.sum((x[:, :, None] - x[:, None]) ** 2, axis=-1)
    return jnp.sort(away.reshape(len(x), -1), axis=1)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_representation_that_is_invariant_and_one_that_is_not(name):
    transform = TRANSFORMS[name]
    plain = invariance(lambda x: x, transform, POINTS)
    local = invariance(pairwise, transform, POINTS)
    assert local.ratio < 0.01
    assert judge_invariance(name, local, of="it", severity="warning") == ()
    (found,) = judge_invariance(name, plain, of="the inputs", severity="warning")
    assert (found.rule, found.where) == ("preprocessing/not-invariant", name)
    assert found.measured == pytest.approx(float(plain.ratio))


def test_edges_of_invariance():
    same = jnp.ones((4, 2))
    assert invariance(lambda x: x, lambda x: x, same).ratio == 0
    assert invariance(lambda x: x, lambda x: 2 * x, same).ratio == jnp.inf
    spoiled = invariance(lambda x: x, lambda x: x * jnp.nan, same)
    assert judge_invariance("it", spoiled, of="it", severity="info")
    with pytest.raises(ValueError, match="leading"):
        invariance(lambda x: x, lambda x: x[:2], same)
