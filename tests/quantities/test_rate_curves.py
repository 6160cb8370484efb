import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nnsanity.quantities.rate_curves import lr_range, lr_sweep

RNG = np.random.default_rng(0)
STEPS = 40
INPUTS = jnp.asarray(RNG.normal(size=(STEPS, 16, 3)), jnp.float32)
BATCHES = (INPUTS, INPUTS @ jnp.array([[1.0], [-2.0], [0.5]]))
PARAMS = {"w": jnp.ones((3, 1)), "b": jnp.ones(1)}
SCALES = jnp.array([1e-3, 1e-2, 0.1, 10.0])
OPTIMIZERS = {
    "sgd": optax.sgd(1.0),
    "momentum": optax.sgd(1.0, momentum=0.9),
    "adam": optax.adam(1.0),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1.0)),
    "multi steps": optax.MultiSteps(optax.sgd(1.0), 2),
    "multi transform": optax.multi_transform(
        {"w": optax.sgd(1.0), "b": optax.adam(0.5)}, {"w": "w", "b": "b"}
    ),
    "injected": optax.inject_hyperparams(optax.sgd)(learning_rate=1.0),
    "schedule": optax.sgd(optax.linear_schedule(0.1, 1.0, 10)),
}


def loss_fn(params, batch):
    inputs, targets = batch
    return jnp.mean((inputs @ params["w"] + params["b"] - targets) ** 2)


def parabola(x, curvature):
    return 0.5 * jnp.sum(curvature * x**2)


def ramp(loss_fn=loss_fn, params=PARAMS, batches=BATCHES, optimizer=None, **options):
    options = {"min_scale": 1e-4, "max_scale": 100.0} | options
    return lr_range(loss_fn, params, batches, optimizer or optax.sgd(1.0), **options)


def trained(optimizer, scales):
    """Losses before each step and after the last, from a loop written by hand."""
    params, state, losses = PARAMS, optimizer.init(PARAMS), []
    gradient = jax.jit(jax.value_and_grad(loss_fn))
    batches = list(zip(*BATCHES, strict=True))
    for batch, scale in zip(batches, scales, strict=True):
        loss, grads = gradient(params, batch)
        losses.append(float(loss))
        updates, state = optimizer.update(grads, state, params)
        params = {name: params[name] + updates[name] * scale for name in params}
    return [*losses, float(loss_fn(params, batches[-1]))]


def averaged(losses):
    weight = 0.5 ** np.arange(len(losses))  # 40 steps: half of the past
    rows = range(1, len(losses) + 1)
    return np.array(
        [np.average(losses[:n], weights=weight[:n][::-1]) for n in rows], np.float64
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_range_is_a_loop_with_a_rising_scale(name):
    found = ramp(optimizer=OPTIMIZERS[name], max_scale=1e-1)
    scales = np.geomspace(1e-4, 1e-1, STEPS)
    np.testing.assert_allclose(found.scales, scales, rtol=1e-5)
    losses = trained(OPTIMIZERS[name], scales)
    np.testing.assert_allclose(found.losses, losses[:-1], rtol=1e-3, atol=1e-5)
    smoothed = averaged(losses)
    np.testing.assert_allclose(found.smoothed, smoothed[:-1], rtol=1e-3, atol=1e-5)
    assert np.ptp(found.losses) > 0.1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sweep_is_a_loop_for_each_scale(name):
    optimizer, scales = OPTIMIZERS[name], [1e-3, 3e-2]
    found = lr_sweep(loss_fn, PARAMS, BATCHES, optimizer, scales=scales)
    expected = [averaged(trained(optimizer, [one] * STEPS))[-1] for one in scales]
    np.testing.assert_allclose(found.losses, expected, rtol=1e-3, atol=1e-5)
    assert float(found.best) == pytest.approx(scales[np.argmin(expected)])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sweep_finds_the_limit_of_stability(momentum):
    curvatures = np.array([10.0, 1.0])
    limit = 2 * (1 + momentum) / 10
    scales = limit * np.array([0.5, 0.9, 0.97, 1.03, 1.1, 2.0, 100.0])
    found = lr_sweep(
        parabola,
        jnp.ones(2),
        jnp.tile(jnp.float32(curvatures), (200, 1)),
        optax.sgd(1.0, momentum=momentum),
        scales=scales,
    )
    np.testing.assert_array_equal(found.diverged, scales > limit)
    for scale, loss in zip(scales[:3], found.losses[:3], strict=True):
        x, v, losses = np.ones(2), np.zeros(2), []
        for _ in range(201):
            losses.append(0.5 * np.sum(curvatures * x**2))
            v = momentum * v + curvatures * x
            x = x - scale * v
        weights = 0.9 ** np.arange(201)[::-1]
        expected = np.average(losses, weights=weights)
        assert float(loss) == pytest.approx(expected, rel=1e-3, abs=1e-8)
    assert found.losses[-1] == np.inf
    assert float(found.best) == pytest.approx(scales[np.argmin(found.losses)])


@pytest.mark.parametrize("num_steps", [20, 100])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_suggestion_is_stable_on_quadratics(num_steps, momentum):
    curvatures = np.float32(10 ** RNG.uniform(-3, 2, size=(20, 8)))
    start = np.float32(1 + RNG.normal(size=(20, 8)) * 10 ** RNG.uniform(-3, 0, (20, 8)))
    limits = 2 * (1 + momentum) / curvatures.max(axis=1)

    def measure(start, curvature, limit):
        return lr_range(
            lambda x, c: parabola(x - 1, c),
            start,
            jnp.broadcast_to(curvature, (num_steps, 8)),
            optax.sgd(1.0, momentum=momentum),
            min_scale=1e-5 * limit,
            max_scale=100 * limit,
        )

    found = jax.vmap(measure)(start, curvatures, limits)
    assert np.all(found.suggestion > 0)
    assert np.all(found.suggestion < limits)
    if momentum == 0:
        assert np.any(found.largest_stable > 2 * limits)
        assert np.median(found.suggestion / limits) > 0.05


@hypothesis.given(
    low=st.floats(1e-8, 1e3),
    ratio=st.floats(1.01, 1e9),
    curvature=st.floats(-10, 100, width=32),
    noise=st.floats(0, 10, width=32),
)
@hypothesis.settings(max_examples=100)
def test_suggestion_is_below_the_largest_stable(low, ratio, curvature, noise):
    targets = jnp.float32(noise * RNG.normal(size=12))
    found = lr_range(
        tilted,
        jnp.ones(2),
        (jnp.full(12, curvature, jnp.float32), targets),
        SGD,
        min_scale=low,
        max_scale=low * ratio,
    )
    if np.all(found.diverged):
        assert np.isnan(found.suggestion)
        assert np.isnan(found.largest_stable)
    else:
        assert 0 < found.suggestion < found.largest_stable
        last = np.flatnonzero(~np.asarray(found.diverged))[-1]
        assert found.largest_stable == found.scales[last]
    assert np.all(np.diff(np.asarray(found.diverged, int)) >= 0)


SGD = optax.sgd(1.0)


def tilted(x, batch):
    curvature, target = batch
    return 0.5 * curvature * jnp.sum((x - target) ** 2)


def test_steepest_is_by_the_logarithm():
    """A slope of -rate by the scale itself is steepest by its logarithm at the end."""
    found = lr_range(
        lambda x, _: -x,
        jnp.float32(0),
        jnp.zeros(20),
        optax.sgd(1.0),
        min_scale=1e-3,
        max_scale=1.0,
    )
    assert float(found.steepest) == pytest.approx(1.0)
    assert not np.any(found.diverged)
    # A bowl: x(t) = prod(1 - s) falls fastest where the float64 loop says.
    scales = np.geomspace(1e-3, 1.0, 20)
    x = np.cumprod(np.concatenate([[1], 1 - scales]))
    expected = scales[np.argmin(np.diff(0.5 * x**2))]
    found = lr_range(
        parabola,
        jnp.ones(1),
        jnp.ones(20),
        optax.sgd(1.0),
        min_scale=1e-3,
        max_scale=1.0,
    )
    assert float(found.steepest) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("level", [1.0, 0.1, -0.7, 2.3e-5, 1e6, 0.0])
def test_a_loss_that_does_not_fall_is_nowhere_steepest(level):
    found = ramp(lambda p, b: level + 0 * jnp.sum(p["w"]))
    assert np.isnan(found.steepest)
    assert not np.any(found.diverged)
    assert found.largest_stable == found.scales[-1]


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_what_is_not_finite_has_diverged_for_good(bad):
    def breaks(params, batch):
        # Not finite once the parameter has moved by 1, finite again beyond 2.
        return -params + jnp.where((params > 1) & (params < 2), bad, 0.0)

    found = lr_range(
        breaks,
        jnp.float32(0),
        jnp.zeros(30),
        optax.sgd(1.0),
        min_scale=1e-2,
        max_scale=10.0,
    )
    moved = np.cumsum(np.geomspace(1e-2, 10, 30))
    np.testing.assert_array_equal(found.diverged, moved > 1)
    assert found.largest_stable == found.scales[np.sum(moved <= 1) - 1]
    sweep = lr_sweep(
        breaks,
        jnp.float32(0),
        jnp.zeros(10),
        optax.sgd(1.0),
        scales=[0.01, 0.09, 0.3, 1.5],
    )
    np.testing.assert_array_equal(sweep.diverged, [False, False, True, True])
    np.testing.assert_array_equal(np.isinf(sweep.losses), sweep.diverged)
    assert float(sweep.best) == pytest.approx(0.09)


def test_everything_diverges():
    found = ramp(min_scale=1e6, max_scale=1e9)
    assert np.all(found.diverged)
    marks = [found.steepest, found.largest_stable, found.suggestion, found.lowest]
    assert np.all(np.isnan(marks))
    sweep = lr_sweep(loss_fn, PARAMS, BATCHES, SGD, scales=[1e6, 1e9])
    assert np.all(sweep.diverged)
    assert np.isnan(sweep.best)


def test_a_loss_that_climbs_back_has_diverged():
    def there_and_back(x, _):
        return jnp.abs(x - 1)

    found = lr_range(
        there_and_back,
        jnp.float32(0),
        jnp.zeros(20),
        SGD,
        min_scale=0.05,
        max_scale=5.0,
    )
    assert not found.diverged[5]
    assert found.diverged[-1]
    assert found.suggestion < 0.5


def test_noise_is_not_divergence():
    noise = jnp.asarray(RNG.exponential(size=(20, 100)), jnp.float32)

    def measure(batches):
        return ramp(
            lambda p, b: b * (1 + jnp.sum(p["w"] ** 2)),
            batches=batches,
            min_scale=1e-8,
            max_scale=1e-5,
        )

    found = jax.vmap(measure)(noise)
    assert np.mean(found.diverged[:, -1]) <= 0.1


def test_half_precision():
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (PARAMS, BATCHES))
    found = ramp(params=half[0], batches=half[1])
    assert {leaf.dtype for leaf in found} == {np.dtype("f4"), np.dtype(bool)}
    exact = ramp()
    rows = slice(0, 20)
    np.testing.assert_allclose(found.losses[rows], exact.losses[rows], rtol=0.05)
    assert 0 < found.suggestion < found.largest_stable
    sweep = lr_sweep(loss_fn, *half, SGD, scales=SCALES)
    exact = lr_sweep(loss_fn, PARAMS, BATCHES, SGD, scales=SCALES)
    np.testing.assert_array_equal(sweep.diverged, exact.diverged)
    assert sweep.best == exact.best == SCALES[2]


@pytest.mark.parametrize("name", ["clipped", "multi steps"])
def test_other_leaves_stay(name):
    mixed = PARAMS | {"step": jnp.int32(3), "none": None, "mask": jnp.array([True])}
    found, expected = (
        ramp(params=params, optimizer=OPTIMIZERS[name]) for params in (mixed, PARAMS)
    )
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-4)
    found, expected = (
        lr_sweep(loss_fn, params, BATCHES, OPTIMIZERS[name], scales=SCALES)
        for params in (mixed, PARAMS)
    )
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-4)


def test_python_numbers_are_parameters():
    found = lr_sweep(parabola, 1.0, jnp.full(10, 10.0), SGD, scales=[0.1, 0.3])
    np.testing.assert_array_equal(found.diverged, [False, True])


def test_jit_vmap_and_no_callback():
    def measure(params, low):
        found = ramp(params=params, min_scale=low, max_scale=1e3 * low)
        return found, lr_sweep(loss_fn, params, BATCHES, SGD, scales=low * SCALES)

    alone = [measure(PARAMS, low) for low in (1e-3, 1e-2)]
    found = jax.jit(jax.vmap(measure, (None, 0)))(PARAMS, jnp.array([1e-3, 1e-2]))
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    for one, two in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert one.shape == two.shape
        assert one.dtype == two.dtype
    for row in range(2):
        stable = ~np.asarray(expected[0].diverged[row])
        np.testing.assert_array_equal(found[0].diverged[row], ~stable)
        np.testing.assert_allclose(
            found[0].losses[row][stable], expected[0].losses[row][stable], rtol=1e-2
        )
    np.testing.assert_allclose(found[0].suggestion, expected[0].suggestion, rtol=1e-4)
    np.testing.assert_allclose(found[1].best, expected[1].best)
    assert "callback" not in str(jax.make_jaxpr(measure)(PARAMS, 1e-3))


def test_one_trace_for_another_range():
    traces = []

    def counted(params, batch):
        traces.append(1)
        return loss_fn(params, batch)

    ends = []
    for factor in (1.0, 3.0):
        found = ramp(counted, optimizer=SGD, min_scale=1e-4 * factor)
        sweep = lr_sweep(counted, PARAMS, BATCHES, SGD, scales=SCALES * factor)
        ends.append((len(traces), float(found.scales[0]), float(sweep.scales[0])))
    assert ends[0][0] == ends[1][0] > 0
    assert ends[0][1:] != ends[1][1:]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"min_scale": 1.0, "max_scale": 0.1}, ValueError, "min_scale=1.0, max_scale="),
        ({"min_scale": 0.0}, ValueError, "min_scale=0.0.*swapped"),
        ({"min_scale": np.nan}, ValueError, "min_scale=nan"),
        (
            {"max_scale": jnp.ones(2)},
            ValueError,
            r"max_scale must be a number, .*\[2\]",
        ),
        ({"optimizer": 0.1}, TypeError, "optimizer must have init and update.*0.1"),
        ({"batches": jnp.float32(1)}, ValueError, "leading step axis.*float32"),
        ({"batches": ()}, ValueError, "leading step axis.*nothing"),
        (
            {"batches": (jnp.ones((9, 2)), jnp.ones(8))},
            ValueError,
            r"as many steps in every leaf, got \[8, 9\]",
        ),
        ({"batches": jnp.ones((4, 2))}, ValueError, "at least 5 steps, got 4"),
        ({"params": {"n": jnp.arange(3)}}, ValueError, "params must have floating"),
        (
            {"loss_fn": lambda p, b: b[0] @ p["w"]},
            ValueError,
            r"loss_fn must return a scalar, got float32\[16,1\]; did you forget a mean",
        ),
        ({"loss_fn": lambda p, b: (1.0, b)}, ValueError, "what comes with the loss"),
    ],
)
def test_mistakes_in_a_range(change, error, words):
    with pytest.raises(error, match=f"lr_range: .*{words}"):
        ramp(**change)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"scales": 1.0}, ValueError, r"scales must be a list.*\(\)"),
        ({"scales": jnp.ones((2, 2))}, ValueError, r"scales must be .*\(2, 2\)"),
        ({"scales": []}, ValueError, r"scales must be a list.*\(0,\)"),
        ({"optimizer": None}, TypeError, "optimizer must have init and update.*None"),
        ({"batches": jnp.ones((1, 2))}, ValueError, "at least 2 steps, got 1"),
        ({"loss_fn": lambda p, b: b[0]}, ValueError, "did you forget a mean"),
    ],
)
def test_mistakes_in_a_sweep(change, error, words):
    given = {"loss_fn": loss_fn, "batches": BATCHES, "optimizer": SGD} | change
    scales = given.get("scales", SCALES)
    arguments = (given["loss_fn"], PARAMS, given["batches"], given["optimizer"])
    with pytest.raises(error, match=f"lr_sweep: .*{words}"):
        lr_sweep(*arguments, scales=scales)
