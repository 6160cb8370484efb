import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnsanity.quantities import example_norms
from nnsanity.quantities.example_norms import example_gradient_norms
from nnsanity.quantities.noise_scale import gradient_noise_scale

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def linear_loss(params, x):
    """Its example gradients are the examples."""
    return jnp.mean(jnp.sum(x * params, -1))


def estimates(gradients, size=1):
    """Square norm and trace in float64, as in the docstring, from [parts, features]."""
    count = len(gradients)
    mean_square = np.sum(np.mean(gradients, 0) ** 2)
    variance = (np.sum(gradients**2) - count * mean_square) / (count - 1)
    return np.array([mean_square - variance / count, size * variance])


def jackknife_error(gradients, size=1):
    """Leaves out each part in turn; the delta method with the full covariance."""
    count = len(gradients)
    square_norm, trace = estimates(gradients, size)
    without = [estimates(np.delete(gradients, i, 0), size) for i in range(count)]
    covariance = (count - 1) ** 2 / count * np.cov(np.array(without).T)
    slope = np.array([-trace / square_norm**2, 1 / square_norm])
    return np.sqrt(slope @ covariance @ slope)


def assert_estimates(found, gradients, size=1, rtol=1e-4):
    square_norm, trace = estimates(gradients, size)
    np.testing.assert_allclose(found.gradient_square_norm, square_norm, rtol)
    np.testing.assert_allclose(found.covariance_trace, trace, rtol)
    np.testing.assert_allclose(found.noise_scale, trace / square_norm, rtol)
    error = jackknife_error(gradients, size)
    np.testing.assert_allclose(found.standard_error, error, 10 * rtol)


def regression():
    inputs, targets = normal(24, 5) + 1, normal(24, 2)
    params = {"w": normal(5, 2), "b": jnp.array([0.5, -0.5])}

    def loss_fn(params, batch):
        outputs = batch[0] @ params["w"] + params["b"]
        return jnp.mean(jnp.sum((outputs - batch[1]) ** 2, -1))

    x, y, w, b = (
        np.asarray(v, np.float64) for v in (inputs, targets, params["w"], params["b"])
    )
    delta = 2 * (x @ w + b - y)
    weights = np.einsum("ni,nj->nij", x, delta).reshape(24, -1)
    return loss_fn, params, (inputs, targets), np.concatenate([weights, delta], 1)


def test_regression_by_hand():
    loss_fn, params, batch, gradients = regression()
    norms = example_gradient_norms(loss_fn, params, batch)
    assert norms.dtype == jnp.float32
    np.testing.assert_allclose(norms, np.linalg.norm(gradients, axis=1), 1e-5)
    found = gradient_noise_scale(loss_fn, params, batch)
    assert all(field.dtype == jnp.float32 and field.shape == () for field in found)
    assert_estimates(found, gradients)


@pytest.mark.parametrize("count", [3, 12])
def test_microbatches_by_hand(count):
    loss_fn, params, batch, gradients = regression()
    size = 24 // count
    parts = gradients.reshape(count, size, -1).mean(1)
    found = gradient_noise_scale(loss_fn, params, batch, num_microbatches=count)
    assert_estimates(found, parts, size)
    # McCandlish et al. in their own words, appendix A.1.
    small, big = np.mean(np.sum(parts**2, 1)), np.sum(np.mean(parts, 0) ** 2)
    square_norm = (24 * big - size * small) / (24 - size)
    trace = (small - big) / (1 / size - 1 / 24)
    np.testing.assert_allclose(found.gradient_square_norm, square_norm, 1e-4)
    np.testing.assert_allclose(found.covariance_trace, trace, 1e-4)


def test_as_many_microbatches_as_examples_are_the_examples():
    loss_fn, params, batch, _ = regression()
    whole = gradient_noise_scale(loss_fn, params, batch)
    parts = gradient_noise_scale(loss_fn, params, batch, num_microbatches=24)
    np.testing.assert_array_equal(parts, whole)


def mlp(params, batch):
    hidden = jax.nn.gelu(batch["x"] @ params["in"])
    return jnp.mean(jax.checkpoint(jnp.matmul)(hidden, params["out"]) ** 2)


def cnn(params, batch):
    kernel = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(
        batch["x"], params["conv"], (1, 1), "SAME", dimension_numbers=kernel
    )
    x = jnp.mean(jax.nn.relu(x), (1, 2))
    x = (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + 0.1)
    logits = x * params["scale"]
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(x)), batch["label"]])


def embedding(params, batch):
    x = params["table"][batch["tokens"]]
    weights = jax.nn.softmax(jnp.einsum("nik,njk->nij", x @ params["q"], x))
    penalty = 0.01 * jnp.sum(params["q"] ** 2)
    return jnp.sum((weights @ x) ** 2) + penalty


def rnn(params, batch):
    def step(state, x):
        return jnp.tanh(state @ params["u"] + x @ params["v"]), None

    state, _ = jax.lax.scan(
        step, jnp.zeros((len(batch["x"]), 4)), batch["x"].swapaxes(0, 1)
    )
    return jnp.mean(state**2)


MODELS = {
    "mlp": (mlp, {"in": normal(3, 8), "out": normal(8, 2)}, {"x": normal(7, 3)}),
    "cnn": (
        cnn,
        {"conv": normal(3, 3, 2, 4), "scale": normal(4)},
        {"x": normal(7, 5, 5, 2), "label": jnp.arange(7) % 4},
    ),
    "embedding": (
        embedding,
        {"table": normal(9, 4), "q": normal(4, 4)},
        {"tokens": jnp.asarray(RNG.integers(0, 9, (7, 6)))},
    ),
    "rnn": (
        rnn,
        {"u": normal(4, 4), "v": normal(3, 4)},
        {"x": normal(7, 5, 3)},
    ),
}


def looped(loss_fn, params, batch):
    """Gradients of the examples one after another, float64[examples, parameters]."""
    count = len(jax.tree.leaves(batch)[0])
    ones = [jax.tree.map(lambda x, i=i: x[i : i + 1], batch) for i in range(count)]
    gradient_fn = jax.jit(jax.grad(loss_fn))
    rows = [jax.tree.leaves(gradient_fn(params, one)) for one in ones]
    return np.array([np.concatenate([np.ravel(g) for g in row]) for row in rows], "f8")


@pytest.mark.parametrize(
    ("name", "most"), [*((name, 3) for name in MODELS), ("mlp", 1), ("mlp", 128)]
)
def test_models_against_a_loop(name, most, monkeypatch):
    monkeypatch.setattr(example_norms, "MAX_EXAMPLES", most)
    plain_loss_fn, params, batch = MODELS[name]

    def loss_fn(params, batch):  # a new one: compiled programs are kept by the loss
        return plain_loss_fn(params, batch)

    gradients = looped(loss_fn, params, batch)
    norms = example_gradient_norms(loss_fn, params, batch)
    np.testing.assert_allclose(norms, np.linalg.norm(gradients, axis=1), 1e-4)
    found = gradient_noise_scale(loss_fn, params, batch)
    square_norm, trace = estimates(gradients)
    np.testing.assert_allclose(found.covariance_trace, trace, 1e-4)
    tolerance = 1e-5 * np.mean(np.sum(gradients**2, 1))
    np.testing.assert_allclose(
        found.gradient_square_norm, square_norm, rtol=1e-4, atol=tolerance
    )


def test_example_gradients_are_never_kept():
    params, x = {"w": jnp.ones((64, 64))}, jnp.ones((4096, 64))

    def loss_fn(params, x):
        return jnp.mean((x @ params["w"]) ** 2)

    compiled = jax.jit(lambda p, x: gradient_noise_scale(loss_fn, p, x))
    memory = compiled.lower(params, x).compile().memory_analysis()
    gradient = 4 * 64 * 64
    assert memory.temp_size_in_bytes < 3 * 128 * gradient < 4096 * gradient


DEVIATIONS = np.linspace(0.5, 1.5, 5)


def draws(mean, *, count, examples, num_microbatches=None):
    """Noise scales of Gaussian gradients, and their true square norm and trace."""
    mean = np.full(5, mean)

    def draw(key):
        x = mean + DEVIATIONS * jax.random.normal(key, (examples, 5))
        return gradient_noise_scale(
            linear_loss, jnp.zeros(5), x, num_microbatches=num_microbatches
        )

    keys = jax.random.split(jax.random.key(0), count)
    found = jax.jit(jax.vmap(draw))(keys)
    found = jax.tree.map(np.asarray, found)
    return found, np.sum(mean**2), np.sum(DEVIATIONS**2)


@pytest.mark.parametrize("mean", [0.1, 1.0])
@pytest.mark.parametrize("num_microbatches", [None, 2])
def test_both_estimates_are_unbiased(mean, num_microbatches):
    found, square_norm, trace = draws(
        mean, count=1000, examples=32, num_microbatches=num_microbatches
    )
    errors = [np.std(values) / np.sqrt(1000) for values in found[1:3]]
    assert abs(np.mean(found.gradient_square_norm) - square_norm) < 4 * errors[0]
    assert abs(np.mean(found.covariance_trace) - trace) < 4 * errors[1]
    # What is not corrected for the noise is far outside of the bar.
    assert trace / 32 > 4 * errors[0]


@pytest.mark.parametrize(
    ("mean", "examples", "num_microbatches"),
    [(0.5, 128, None), (1.0, 32, None), (0.5, 128, 64)],
)
def test_error_bar_covers_at_its_nominal_rate(mean, examples, num_microbatches):
    found, square_norm, trace = draws(
        mean, count=500, examples=examples, num_microbatches=num_microbatches
    )
    truth = trace / square_norm
    distance = np.abs(found.noise_scale - truth) / found.standard_error
    assert 0.64 < np.mean(distance < 1) < 0.74
    assert 0.91 < np.mean(distance < 1.96) < 0.97
    mean_error = np.std(found.noise_scale) / np.sqrt(500)
    # The ratio of unbiased numbers errs up by its own relative variance.
    excess = np.var(found.gradient_square_norm) / square_norm**2 * truth
    assert abs(np.mean(found.noise_scale) - truth - excess) < 4 * mean_error
    spread = np.std(found.noise_scale)
    assert np.median(found.standard_error) == pytest.approx(spread, rel=0.15)


def test_a_gradient_lost_in_noise_is_infinite():
    x = jnp.array([[3.0, 0.0], [-3.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    found = gradient_noise_scale(linear_loss, jnp.ones(2), x)
    assert found.gradient_square_norm < 0
    np.testing.assert_allclose(found.covariance_trace, 26 / 3, 1e-6)
    assert found.noise_scale == found.standard_error == jnp.inf


@pytest.mark.parametrize("num_microbatches", [None, 2])
def test_a_gradient_of_zero_is_infinite_without_a_trace(num_microbatches):
    x = jnp.zeros((4, 2))
    found = gradient_noise_scale(
        linear_loss, jnp.ones(2), x, num_microbatches=num_microbatches
    )
    np.testing.assert_array_equal(found, (np.inf, 0, 0, np.inf))
    np.testing.assert_array_equal(
        example_gradient_norms(linear_loss, jnp.ones(2), x), 0
    )


def test_equal_gradients_have_no_noise():
    found = gradient_noise_scale(linear_loss, jnp.ones(2), jnp.full((8, 2), 3.0))
    np.testing.assert_array_equal(found, (0, 18, 0, 0))


def test_two_gradients_have_no_error_bar():
    x = jnp.array([[2.0], [4.0]])
    found = gradient_noise_scale(linear_loss, jnp.ones(1), x)
    np.testing.assert_allclose(found, (0.25, 8, 2, np.inf), 1e-6)
    found = gradient_noise_scale(linear_loss, jnp.ones(1), jnp.full((2, 1), 3.0))
    np.testing.assert_allclose(found, (0, 9, 0, np.inf), 1e-6)


@pytest.mark.parametrize(
    ("value", "num_microbatches"), [(np.nan, None), (np.nan, 2), (np.inf, 3)]
)
def test_nonfinite_gradients_alarm(value, num_microbatches):
    x = jnp.ones((6, 2)).at[4, 1].set(value)
    found = gradient_noise_scale(
        linear_loss, jnp.ones(2), x, num_microbatches=num_microbatches
    )
    assert np.isnan(found).all()
    norms = example_gradient_norms(linear_loss, jnp.ones(2), x)
    assert np.flatnonzero(~np.isfinite(norms)).tolist() == [4]


def test_nonfinite_parameters_alarm_only_where_they_count():
    params = jnp.array([np.nan, np.inf])
    assert np.isfinite(gradient_noise_scale(linear_loss, params, normal(6, 2))[2])
    norms = example_gradient_norms(
        lambda p, x: jnp.mean(p * x**2), params, normal(6, 2)
    )
    assert np.isfinite(norms).all()


def test_a_single_example_has_a_norm():
    norms = example_gradient_norms(linear_loss, jnp.ones(2), jnp.array([[3.0, 4.0]]))
    np.testing.assert_allclose(norms, [5])


def test_other_leaves_are_passed_over_and_reach_the_loss():
    params = {
        "w": jnp.ones(2),
        "shift": jnp.array(3),
        "key": jax.random.key(0),
        "none": None,
        "c": jnp.array(1 + 1j, jnp.complex64),
    }

    def loss_fn(params, x):
        noise = jax.random.normal(params["key"], ())
        real = jnp.mean(x @ params["w"]) * params["shift"].astype(jnp.float32)
        return real + 0 * noise + 4 * jnp.imag(params["c"])

    x = jnp.array([[1.0, 0.0], [0.0, -1.0], [0.0, 0.0]])
    norms = example_gradient_norms(loss_fn, params, x)
    np.testing.assert_allclose(norms, [5, 5, 4], 1e-6)
    found = gradient_noise_scale(loss_fn, params, x)
    rows = np.array([[3, 0, 4], [0, -3, 4], [0, 0, 4.0]])
    assert_estimates(found, rows)


def test_keys_in_the_batch_belong_to_their_examples():
    keys = jax.random.split(jax.random.key(0), 6)

    def loss_fn(params, keys):
        return jnp.mean(jax.vmap(jax.random.normal)(keys) * params)

    norms = example_gradient_norms(loss_fn, jnp.ones(()), keys)
    np.testing.assert_allclose(norms, np.abs(jax.vmap(jax.random.normal)(keys)), 1e-6)


def test_half_precision_is_summed_in_float32():
    x = (1 + 0.1 * normal(300, 4)).astype(jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        found = gradient_noise_scale(linear_loss, jnp.ones(4, jnp.bfloat16), x)
        norms = example_gradient_norms(linear_loss, jnp.ones(4, jnp.bfloat16), x)
    assert norms.dtype == found.noise_scale.dtype == jnp.float32
    assert_estimates(found, np.asarray(x, np.float64), rtol=1e-3)
    np.testing.assert_allclose(norms, np.linalg.norm(np.asarray(x, "f8"), axis=1), 1e-5)


def test_mixed_leaves_with_float64():
    with jax.enable_x64(True):
        params = {"a": jnp.zeros(2, jnp.bfloat16), "b": jnp.zeros(2, jnp.float64)}
        x = jnp.asarray(RNG.normal(size=(9, 2)) + 1)

        def loss_fn(params, x):
            return jnp.mean(x @ (params["a"].astype("f8") * 2 + params["b"]))

        found = gradient_noise_scale(loss_fn, params, x)
        assert found.noise_scale.dtype == jnp.float32
        doubled = np.asarray(x.astype(jnp.bfloat16) * 2, "f8")
        assert_estimates(found, np.concatenate([doubled, x], 1), rtol=2e-2)
