import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import datasets
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.metrics import accuracy_score, mean_absolute_error, r2_score
from sklearn.metrics import root_mean_squared_error as rmse

from nnsanity.checks.results import errors_in_words
from nnsanity.quantities.errors import constant_baseline, linear_share, worst_examples
from nnsanity.quantities.moments import feature_moments, normalize

RNG = np.random.default_rng(0)


def table(name):
    return getattr(datasets, f"load_{name}")(return_X_y=True)


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e4])
def test_numbers_against_scikit_learn(unit):
    inputs, targets = table("diabetes")
    targets = unit * targets
    outputs = targets + unit * (RNG.normal(size=len(targets)) * 20 + 3)
    found = constant_baseline(jnp.asarray(outputs), jnp.asarray(targets))
    constant = DummyRegressor().fit(inputs, targets).predict(inputs)
    expected = (
        rmse(targets, outputs),
        rmse(targets, constant),
        r2_score(targets, outputs),
        mean_absolute_error(targets, outputs),
        np.mean(outputs - targets),
        constant[0],
    )
    np.testing.assert_allclose(
        np.stack(found)[:, 0], expected, rtol=1e-4, atol=1e-5 * unit
    )


@pytest.mark.parametrize("name", ["wine", "breast_cancer", "digits", "iris"])
def test_classes_against_scikit_learn(name):
    inputs, labels = table(name)
    scores = (
        RNG.normal(size=(len(labels), labels.max() + 1))
        + 2 * np.eye(labels.max() + 1)[labels]
    )
    found = constant_baseline(jnp.asarray(scores), jnp.asarray(labels))
    constant = DummyClassifier().fit(inputs, labels)
    wrong = 1 - accuracy_score(labels, scores.argmax(axis=1))
    baseline = 1 - constant.score(inputs, labels)
    assert found.error == pytest.approx(wrong)
    assert found.constant_error == pytest.approx(baseline)
    assert found.explained == pytest.approx(1 - wrong / baseline, rel=1e-4)
    assert found.constant == np.bincount(labels).argmax()


def test_several_columns_in_their_own_units():
    targets = RNG.normal(size=(50, 2)) * [1, 100] + [0, 500]
    outputs = targets + RNG.normal(size=(50, 2)) * [0.5, 20]
    plain = constant_baseline(jnp.asarray(outputs), jnp.asarray(targets))
    expected = r2_score(targets, outputs, multioutput="raw_values")
    np.testing.assert_allclose(plain.explained, expected, atol=1e-4)
    moments = feature_moments(jnp.asarray(targets))
    both = (normalize(jnp.asarray(one), moments) for one in (outputs, targets))
    back = constant_baseline(*both, moments=moments)
    np.testing.assert_allclose(np.stack(back), np.stack(plain), rtol=1e-3, atol=2e-3)
    words = errors_in_words(plain)
    assert f"{float(plain.error[1]):.3g} where the best constant" in words


@pytest.mark.parametrize(
    ("outputs", "targets", "explained"),
    [
        ([1.0, 1.0], [1.0, 1.0], 1.0),
        ([1.0, 2.0], [1.0, 1.0], -np.inf),
        ([np.nan, 2.0], [1.0, 2.0], np.nan),
        ([np.nan, 2.0], [1.0, 1.0], np.nan),
    ],
)
def test_explained_at_the_edge(outputs, targets, explained):
    found = constant_baseline(jnp.array(outputs), jnp.array(targets))
    np.testing.assert_equal(float(found.explained[0]), explained)


def test_an_output_that_is_not_finite_is_wrong():
    outputs = jnp.array([[1.0, 0.0], [jnp.nan, 0.0], [jnp.inf, 0.0], [0.0, 1.0]])
    assert constant_baseline(outputs, jnp.array([0, 0, 0, 1])).error == 0.5


@pytest.mark.parametrize("shape", [(3,), (4, 2), ()])
def test_outputs_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"equally many numbers.*float32"):
        constant_baseline(jnp.zeros(shape), jnp.zeros(4))


def loss_fn(params, batch):
    return jnp.mean((batch["x"] * params - batch["y"]) ** 2)


def test_worst_examples():
    batch = {"x": RNG.normal(size=150), "y": RNG.normal(size=150)}
    batch = jax.tree.map(lambda leaf: leaf.astype(np.float32), batch)
    losses = (2 * batch["x"] - batch["y"]) ** 2
    order = np.argsort(-losses)
    found = worst_examples(loss_fn, jnp.float32(2), batch, num_worst=7)
    assert found.indices.tolist() == order[:7].tolist()
    np.testing.assert_allclose(found.losses, losses[order[:7]], rtol=1e-5)
    share = losses[order[:7]].sum() / losses.sum()
    assert found.share == pytest.approx(share, rel=1e-5)
    every = worst_examples(loss_fn, jnp.float32(2), batch, num_worst=999)
    assert every.indices.shape == (150,)


def test_nan_is_the_worst():
    batch = {"x": jnp.array([1.0, jnp.nan, 100.0]), "y": jnp.zeros(3)}
    found = worst_examples(loss_fn, jnp.float32(1), batch, num_worst=2)
    assert found.indices.tolist() == [1, 2]
    assert jnp.isnan(found.losses[0])
    assert jnp.isnan(found.share)


def left_out_by_hand(inputs, targets):
    errors, by_mean = [], []
    for index in range(len(inputs)):
        kept = np.arange(len(inputs)) != index
        rows = np.column_stack([inputs, np.ones(len(inputs))])
        weights = np.linalg.lstsq(rows[kept], targets[kept], rcond=None)[0]
        errors.append(targets[index] - rows[index] @ weights)
        by_mean.append(targets[index] - targets[kept].mean(0))
    return 1 - np.sum(np.square(errors)) / np.sum(np.square(by_mean))


@pytest.mark.parametrize("noise", [0.0, 1.0, 30.0])
def test_linear_share_against_refits(noise):
    random = np.random.default_rng(0)
    inputs = random.normal(size=(60, 5)) * [1, 10, 0.1, 1, 0] + 3  # one constant
    targets = inputs[:, :2] @ [[1, 2], [0.1, 0]] + noise * random.normal(size=(60, 2))
    found = float(linear_share(jnp.asarray(inputs), jnp.asarray(targets)))
    assert found == pytest.approx(left_out_by_hand(inputs, targets), abs=1e-3)
    assert (found > 0) == (noise < 30)
