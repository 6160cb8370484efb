import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnsanity as ns
from nnsanity import plot
from nnsanity.trials.arms import Attempt
from nnsanity.trials.trial import Outcome

NONE = np.zeros(3)
CURVE = np.array([0.0, 0.1, 0.2])
LONGER = np.append(CURVE, 0.3) * 3  # more marks, and twice as long
HELPFUL = Attempt("a & b", "inputs", np.array([0.8, 0.9, 1.0]), LONGER, True, 120)
USELESS = Attempt("nothing", "rate", np.array([0.2]), CURVE, False, 60)
TRIAL = (Outcome(np.zeros(60), *[NONE] * 5, None, None),)


def report(**measurements):
    return ns.Report((), {"trial": TRIAL, **measurements}, {})


FULL = report(
    quality_curve=CURVE,
    repairs=(HELPFUL, USELESS),
    inputs=ns.normalization(jnp.array([[0.0, 100.0], [2.0, 300.0]])),
)


def lines(figure):
    (axes,) = figure.axes
    return [line.get_xydata() for line in axes.lines]


def words(figure):
    (axes,) = figure.axes
    return {text.get_text() for text in [*axes.texts, *axes.get_yticklabels()]}


def test_curves_are_those_that_were_measured():
    figure = plot.learning(FULL)
    useless, helpful, original = lines(figure)
    np.testing.assert_array_equal(original.T, [[0, 30, 60], CURVE])
    np.testing.assert_array_equal(helpful.T, [[0, 40, 80, 120], LONGER])
    np.testing.assert_array_equal(useless[:, 1], CURVE)
    assert {"as it is", "a & b"} <= words(figure)


def test_each_repair_has_a_row_from_before_to_after():
    figure = plot.repairs(FULL)
    useless, _, helpful, point, original = lines(figure)
    np.testing.assert_allclose(helpful, [[0.1, 1], [0.9, 1]])
    np.testing.assert_allclose(useless, [[0.1, 0], [0.2, 0]])
    np.testing.assert_allclose(point, [[0.9, 1]])
    np.testing.assert_allclose(original[:, 0], 0.1)
    assert {"a & b", "nothing"} <= words(figure)


def test_ranges_with_the_farthest_feature_on_top():
    figure = plot.features(FULL.measurements["inputs"].moments)
    near, far = lines(figure)[1:6:3], lines(figure)[3:6:1]
    np.testing.assert_allclose(near[0][:, 0], [0, 2])  # mean 1, one deviation
    np.testing.assert_allclose(far[0][:, 0], [100, 300])
    named = plot.features(FULL.measurements["inputs"].moments, names=["x", "y"])
    assert {"x", "y"} <= words(named)


def test_rates_and_their_marks():
    scales, losses = np.array([0.1, 1.0, 10.0]), np.array([2.0, 1.0, np.inf])
    diverged, unknown = np.array([False, False, True]), np.full(3, np.nan)
    sweep = ns.LRSweep(scales, losses, diverged, 1, unknown, losses[None])
    figure = plot.rate_grid(sweep)
    assert not figure.axes[0].collections
    seen, crosses, best = lines(figure)
    np.testing.assert_allclose(seen, [[0.1, 2], [1, 1]], rtol=1e-6)
    figure = plot.rate_grid(sweep._replace(spread=np.array([0.5, 0.25, np.nan])))
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    assert {(0.1, 1.5), (0.1, 2.5), (1.0, 0.75), (1.0, 1.25)} <= set(map(tuple, band))
    np.testing.assert_allclose(crosses[:, 0], 10)
    np.testing.assert_allclose(best[:, 0], 1)


def test_range_test_of_a_quadratic():
    batches = jnp.zeros((40, 1))
    curve = ns.lr_range(
        lambda params, _: 0.5 * jnp.sum(params**2),
        jnp.ones(2),
        batches,
        optax.sgd(1.0),
        min_scale=1e-3,
        max_scale=10.0,
    )
    figure = plot.rate_range(curve)
    assert {"suggestion", "largest stable"} <= words(figure)
    assert float(curve.suggestion) in [line[0, 0] for line in lines(figure)[2:]]


@pytest.mark.parametrize("draw", [plot.learning, plot.repairs])
def test_says_why_there_is_nothing_to_draw(draw):
    untrained = ns.Report((), {}, {"trial": "no optimizer was given"})
    with pytest.raises(ValueError, match="no optimizer was given"):
        draw(untrained)


def test_nothing_was_tried():
    with pytest.raises(ValueError, match="tried none"):
        plot.repairs(report(quality_curve=CURVE, repairs=()))


def test_wrong_number_of_names():
    with pytest.raises(ValueError, match="each of the 2 features, got 1"):
        plot.features(FULL.measurements["inputs"].moments, names=["x"])


def test_page_shows_the_figures():
    page = FULL.to_html()
    assert page.count("<svg") == 3
    assert "a &amp; b" in page
    assert "http" not in page
    assert "<svg" not in ns.Report((), {}, {}).to_html()
    assert FULL.to_html() == page  # the same report, the same page
