import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnsanity.quantities.curvature import sharpness

RNG = np.random.default_rng(0)
KEY = jax.random.key(1)
BATCH = (
    jnp.asarray(RNG.normal(size=(32, 3)), jnp.float32),
    jnp.asarray(RNG.normal(size=(32, 2)), jnp.float32),
)
PARAMS = {
    "w1": jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32),
    "b1": jnp.zeros(4),
    "w2": jnp.asarray(RNG.normal(size=(4, 2)), jnp.float32),
}


def loss_fn(params, batch):
    inputs, targets = batch
    outputs = jnp.tanh(inputs @ params["w1"] + params["b1"]) @ params["w2"]
    return jnp.mean((outputs - targets) ** 2)


def quadratic(x, matrix):
    return 0.5 * x @ matrix @ x


def with_spectrum(spectrum):
    rotation, _ = np.linalg.qr(RNG.normal(size=(len(spectrum), len(spectrum))))
    return rotation @ np.diag(spectrum) @ rotation.T


def dense_hessian(params, batch=BATCH):
    flat, back = jax.flatten_util.ravel_pytree(params)
    hessian = jax.hessian(lambda flat: loss_fn(back(flat), batch))(flat)
    return np.asarray(hessian, np.float64)


@pytest.mark.parametrize(
    "spectrum",
    [
        [5.0, 1.0, 0.5, 0.1, 0.01, 0.0],
        [5.0, 1.0, -20.0, 0.1, 0.01, 0.0],
        [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0],
        [2.0] * 6,
        [-2.0] * 6,
        [3.0, 3.0, 3.0, -7.0, -7.0, -7.0],
        [1e-8, 2e-8, 3e-8, 4e-8, 5e-8, -9e-8],
        [1e8, 2e8, 3e8, 4e8, 5e8, -9e8],
    ],
)
@pytest.mark.parametrize("num_iterations", [6, 30])
def test_quadratics_of_known_spectrum(spectrum, num_iterations):
    matrix = jnp.asarray(with_spectrum(spectrum), jnp.float32)
    x = jnp.asarray(RNG.normal(size=6), jnp.float32)
    found = sharpness(quadratic, x, matrix, key=KEY, num_iterations=num_iterations)
    size = np.max(np.abs(spectrum))
    assert float(found.eigenvalue) == pytest.approx(max(spectrum), abs=1e-5 * size)
    assert 0 <= found.residual < 1e-4 * size


@pytest.mark.parametrize("num_iterations", [6, 30])
def test_a_quadratic_without_curvature(num_iterations):
    x, matrix = jnp.asarray(RNG.normal(size=6), jnp.float32), jnp.zeros((6, 6))
    found = sharpness(quadratic, x, matrix, key=KEY, num_iterations=num_iterations)
    assert (float(found.eigenvalue), float(found.residual)) == (0.0, 0.0)


@pytest.mark.parametrize("outside", [[], [30.0], [30.0, 29.0, 28.0], [-100.0] * 3])
def test_far_eigenvalues_do_not_come_back(outside):
    """They converge at once, and rounding would let them in again (Paige 1971)."""
    rng = np.random.default_rng(1)
    spectrum = np.concatenate([outside, np.linspace(-1, 1, 300 - len(outside))])
    rotation, _ = np.linalg.qr(rng.normal(size=(300, 300)))
    matrix = jnp.asarray(rotation @ np.diag(spectrum) @ rotation.T, jnp.float32)
    x = jnp.asarray(rng.normal(size=300), jnp.float32)
    found = sharpness(quadratic, x, matrix, key=KEY, num_iterations=120)
    size = np.abs(spectrum).max()
    assert float(found.eigenvalue) == pytest.approx(spectrum.max(), abs=1e-6 * size)
    assert found.residual < 2e-6 * size


def test_network_against_the_dense_hessian():
    spectrum = np.linalg.eigvalsh(dense_hessian(PARAMS))
    found = sharpness(loss_fn, PARAMS, BATCH, key=KEY, num_iterations=15)
    assert float(found.eigenvalue) == pytest.approx(spectrum[-1], rel=1e-4)
    assert found.residual < 1e-2 * spectrum[-1]


@pytest.mark.parametrize("num_iterations", [1, 4, 12])
def test_an_eigenvalue_lies_within_the_residual(num_iterations):
    spectrum = np.linalg.eigvalsh(dense_hessian(PARAMS))
    measure = jax.vmap(
        lambda key: sharpness(
            loss_fn, PARAMS, BATCH, key=key, num_iterations=num_iterations
        )
    )
    found = measure(jax.random.split(KEY, 20))
    eigenvalues = np.asarray(found.eigenvalue)
    distances = np.min(np.abs(eigenvalues[:, None] - spectrum), axis=1)
    assert np.all(distances <= np.asarray(found.residual) + 1e-5)
    assert np.all(eigenvalues <= spectrum[-1] + 1e-5)
    if num_iterations == 1:
        assert np.median(found.residual) > 0.1


def test_residual_after_one_iteration_by_hand():
    """With one iteration the vector is the first one, whatever it is."""
    curvatures = jnp.array([4.0, -1.0])
    found = sharpness(
        lambda x, c: 0.5 * jnp.sum(c * x**2),
        jnp.ones(2),
        curvatures,
        key=KEY,
        num_iterations=1,
    )
    # A unit vector (cos, sin) has Rayleigh quotient 5 cos^2 - 1 and residual 5 cos sin.
    square = (float(found.eigenvalue) + 1) / 5
    assert 0 < square < 1
    expected = 5 * np.sqrt(square * (1 - square))
    assert float(found.residual) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("curvature", "params"),
    [
        (0.0, {"a": jnp.ones((2, 2)), "b": jnp.ones(3)}),
        (-3.0, {"a": jnp.ones((2, 2)), "b": jnp.ones(3)}),
        (7.0, jnp.float32(2.0)),
        (-7.0, jnp.ones((1, 1))),
        (7.0, 2.0),
        (7.0, {"a": jnp.ones(3), "empty": jnp.zeros((0, 4))}),
    ],
)
def test_breakdown(curvature, params):
    def loss_fn(params, curvature):
        return sum(
            0.5 * curvature * jnp.sum(leaf**2) for leaf in jax.tree.leaves(params)
        )

    found = sharpness(
        loss_fn,
        params,
        jnp.float32(curvature),
        key=KEY,
        num_iterations=5,
    )
    assert float(found.eigenvalue) == pytest.approx(curvature, abs=1e-5)
    assert float(found.residual) == pytest.approx(0, abs=1e-5)


def test_nan_is_told():
    found = sharpness(
        loss_fn,
        PARAMS | {"b1": PARAMS["b1"] + jnp.nan},
        BATCH,
        key=KEY,
        num_iterations=4,
    )
    assert np.isnan(found.eigenvalue)
    assert np.isnan(found.residual)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    largest = np.linalg.eigvalsh(dense_hessian(exact))[-1]
    found = sharpness(loss_fn, params, BATCH, key=KEY, num_iterations=10)
    assert found.eigenvalue.dtype == found.residual.dtype == jnp.float32
    assert float(found.eigenvalue) == pytest.approx(largest, rel=0.03)
    assert 0 < found.residual < 0.2 * largest


def test_complex_parameters_are_pairs():
    def loss_fn(z, batch):
        return jnp.sum(2.0 * z.real**2 - 5.0 * z.imag**2 + 3.0 * z.real * z.imag)

    largest = np.linalg.eigvalsh([[4.0, 3.0], [3.0, -10.0]])[-1]
    params = jnp.array([1.0 + 2.0j, -1.0j])
    found = sharpness(loss_fn, params, (), key=KEY, num_iterations=4)
    assert float(found.eigenvalue) == pytest.approx(largest, rel=1e-4)


def test_other_leaves_are_constants():
    mixed = PARAMS | {"step": jnp.int32(3), "mask": jnp.array([True]), "none": None}
    expected = sharpness(loss_fn, PARAMS, BATCH, key=KEY, num_iterations=15)
    found = sharpness(loss_fn, mixed, BATCH, key=KEY, num_iterations=15)
    assert float(found.eigenvalue) == pytest.approx(float(expected.eigenvalue))


def test_jit_vmap_and_no_callback():
    def measure(params, key):
        return sharpness(loss_fn, params, BATCH, key=key, num_iterations=15)

    expected = measure(PARAMS, KEY)
    chosen = jax.jit(measure)(PARAMS, KEY)
    np.testing.assert_allclose(chosen, expected, rtol=1e-3, atol=1e-3)
    twice = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), PARAMS)
    found = jax.vmap(measure, (0, None))(twice, KEY)
    for row, factor in enumerate([1, 2]):
        params = jax.tree.map(lambda leaf, factor=factor: factor * leaf, PARAMS)
        largest = np.linalg.eigvalsh(dense_hessian(params))[-1]
        assert float(found.eigenvalue[row]) == pytest.approx(largest, rel=1e-3)
    program = str(jax.make_jaxpr(measure)(PARAMS, KEY))
    assert "callback" not in program


def test_one_trace_for_repeated_calls():
    traces = []

    def counted(params, batch):
        traces.append(1)
        return loss_fn(params, batch)

    def measure(factor):
        params = jax.tree.map(lambda leaf: leaf * factor, PARAMS)
        return sharpness(counted, params, BATCH, key=KEY, num_iterations=3)

    first = measure(1.0)
    count = len(traces)
    assert count > 0
    assert measure(2.0).eigenvalue != first.eigenvalue
    assert len(traces) == count


def test_strict_settings(strict_jax):
    found = sharpness(
        lambda x, c: jnp.sum(c * x * x),
        jnp.ones(3),
        jnp.array([1.0, 2.0, 3.0]),
        key=KEY,
        num_iterations=3,
    )
    assert float(found.eigenvalue) == pytest.approx(6)


def test_keys_of_both_kinds():
    raw = jax.random.PRNGKey(1)
    expected = sharpness(loss_fn, PARAMS, BATCH, key=KEY, num_iterations=2)
    found = sharpness(loss_fn, PARAMS, BATCH, key=raw, num_iterations=2)
    np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"num_iterations": 0}, ValueError, "num_iterations must be at least 1, got 0"),
        ({"num_iterations": 2.5}, TypeError, "num_iterations must be an int, got 2.5"),
        ({"key": 0}, TypeError, "key must be a PRNG key .*, got 0"),
        ({"key": jnp.zeros(2)}, TypeError, r"key must be .*got float32\[2\]"),
        ({"key": jax.random.split(KEY)}, TypeError, "key must be a PRNG key"),
        ({"params": {"n": jnp.arange(3)}}, ValueError, "params must .*int32"),
        ({"params": {}}, ValueError, "no leaves"),
    ],
)
def test_mistakes(change, error, words):
    given = {"params": PARAMS, "key": KEY, "num_iterations": 3} | change
    params = given.pop("params")
    with pytest.raises(error, match=f"sharpness: .*{words}"):
        sharpness(loss_fn, params, BATCH, **given)


@pytest.mark.parametrize(
    ("mistaken", "words"),
    [
        (lambda p, b: b[1] @ p["w2"].T, r"float32\[32,4\]; did you forget a mean"),
        (lambda p, b: (loss_fn(p, b), 1.0), "leave out what comes with the loss"),
        (lambda p, b: jnp.int32(0), "not floating-point"),
    ],
)
def test_mistaken_losses(mistaken, words):
    with pytest.raises(ValueError, match=f"loss_fn must return a scalar.*{words}"):
        sharpness(mistaken, PARAMS, BATCH, key=KEY, num_iterations=3)
