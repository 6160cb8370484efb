import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnsanity.quantities.example_gradients import (
    along,
    along_total,
    gradient_of,
    gradients_of,
    squares,
    totals,
)
from nnsanity.quantities.example_norms import example_gradient_norms, ways
from nnsanity.quantities.noise_scale import gradient_noise_scale

RNG = np.random.default_rng(0)


def normal(*shape, scale=1.0):
    return RNG.normal(size=shape) * scale


def conv(x, kernel, stride=1, padding="SAME", **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    strides = (stride, stride)
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=numbers, **options
    )


def standardized(x):
    return (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + 0.1)


def mlp(params, batch):
    """Losses [examples], as all of these."""
    hidden = jax.nn.gelu(batch["x"] @ params["w"] + params["b"])
    outputs = jax.jit(lambda h, v: h @ v)(hidden, params["v"])
    return jnp.sum(outputs**2, -1)


def cnn(params, batch):
    x = jax.nn.relu(conv(batch["x"], params["c"], 2) + params["b"])
    x = standardized(conv(x, params["d"], padding="VALID")) * params["scale"]
    logits = x.reshape(len(x), -1) @ params["w"]
    return -jax.nn.log_softmax(logits)[:, 1]


def attention(params, batch):
    x = params["table"][batch["tokens"]]
    query = jnp.einsum("btd,dhk->bthk", x, params["q"])
    scores = jnp.einsum("bthk,bshk->bhts", query, query)
    mixed = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores), query)
    x = standardized(x + jnp.einsum("bthk,hkd->btd", mixed, params["o"]))
    logits = x @ params["table"].T  # the same weights again
    return -jnp.sum(jax.nn.log_softmax(logits)[..., 0], -1)


def rnn(params, batch):
    def step(state, x):
        return jnp.tanh(state @ params["u"] + x @ params["v"] + params["b"]), None

    x = batch["x"].swapaxes(0, 1)
    state, _ = jax.lax.scan(step, jnp.zeros((x.shape[1], 12), x.dtype), x)
    return jnp.sum(state**2, -1)


MODELS = {
    "mlp": (
        mlp,
        {"w": normal(6, 20), "b": normal(20), "v": normal(20, 5)},
        {"x": normal(5, 6)},
        {"w": "factors", "b": "written", "v": "factors"},
    ),
    "cnn": (
        cnn,
        {
            "c": normal(3, 3, 2, 4, scale=0.3),
            "b": normal(4),
            "d": normal(2, 2, 4, 30, scale=0.3),
            "scale": normal(30),
            "w": normal(270, 3, scale=0.1),
        },
        {"x": normal(5, 7, 7, 2)},
        {"c": "written", "d": "factors", "w": "factors"},
    ),
    "attention": (
        attention,
        {
            "table": normal(50, 16),
            "q": normal(16, 2, 9, scale=0.2),
            "o": normal(2, 9, 16),
        },
        {"tokens": RNG.integers(0, 50, (5, 6))},
        {"table": "factors", "q": "factors", "o": "factors"},
    ),
    "rnn": (
        rnn,
        {"u": normal(12, 12, scale=0.3), "v": normal(9, 12), "b": normal(12)},
        {"x": normal(5, 4, 9)},
        {"u": "factors", "v": "factors", "b": "written"},
    ),
}

MASK = np.array([1.0, 2.0, 0.5, 1.0, 3.0])


def mean_of(losses, params, mask):
    return jnp.mean(losses)


def sum_of(losses, params, mask):
    return jnp.sum(losses)


def masked(losses, params, mask):
    return jnp.sum(losses * mask) / (1 + jnp.sum(mask))


def penalized(losses, params, mask):
    return jnp.mean(losses) + 0.1 * sum(
        jnp.sum(leaf**2) for leaf in jax.tree.leaves(params)
    )


def looped(loss_fn, params, batch):
    """Gradients of the examples one after another, by leaf [examples, ...]."""
    gradient_fn = jax.jit(jax.grad(loss_fn))
    count = len(jax.tree.leaves(batch)[0])
    rows = [
        gradient_fn(params, jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch))
        for i in range(count)
    ]
    rows = [jax.tree.leaves(row) for row in rows]
    return [np.stack(leaves).astype("f8") for leaves in zip(*rows, strict=True)]


def assert_close(found, expected, tolerance):
    scale = max(np.max(np.abs(expected)), 1e-12)
    np.testing.assert_allclose(found, expected, atol=tolerance * scale)


def assert_right(loss_fn, params, batch, tolerance):
    """All that is had from factors against gradients that are written out."""
    gradients = looped(loss_fn, params, batch)
    count = len(gradients[0])

    @jax.jit
    def measure(params, batch):
        found = gradients_of(gradient_of("measure", loss_fn, params), batch)
        total = totals(found)
        products = along(found, total), along_total(found, total)
        norms = example_gradient_norms(loss_fn, params, batch)
        noise = gradient_noise_scale(loss_fn, params, batch)
        return squares(found), total, products, norms, noise

    square, total, products, norms, noise = measure(params, batch)
    rows = [one.reshape(count, -1) for one in gradients]
    assert_close(square, np.stack([np.sum(one**2, 1) for one in rows]), tolerance)
    for one, found in zip(gradients, total, strict=True):
        assert_close(found, np.sum(one, 0), tolerance)
    expected = np.stack([one @ np.sum(one, 0) for one in rows])
    assert_close(products[0], expected, tolerance)
    assert_close(products[1], expected, tolerance)
    flat = np.concatenate(rows, 1)
    # What is public comes out in float32.
    tolerance = max(tolerance, 1e-6)
    np.testing.assert_allclose(norms, np.linalg.norm(flat, axis=1), tolerance)
    mean_square = np.sum(np.mean(flat, 0) ** 2)
    trace = (np.sum(flat**2) - count * mean_square) / (count - 1)
    size = np.mean(np.sum(flat**2, 1))
    assert abs(noise.covariance_trace - trace) < tolerance * size
    square_norm = mean_square - trace / count
    assert abs(noise.gradient_square_norm - square_norm) < tolerance * size


@pytest.mark.parametrize("form", [mean_of, sum_of, masked, penalized])
@pytest.mark.parametrize("name", MODELS)
def test_models_in_float64_against_a_loop(name, form):
    losses_fn, params, batch, expected_ways = MODELS[name]

    def loss_fn(params, batch):
        return form(losses_fn(params, batch), params, batch["mask"])

    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, params)
        batch = jax.tree.map(jnp.asarray, batch | {"mask": MASK})
        found = ways(loss_fn, params, batch)
        assert {leaf: found[leaf] for leaf in expected_ways} == expected_ways
        assert_right(loss_fn, params, batch, 1e-10)


def deep(params, x):
    @jax.checkpoint
    def layer(x, weights):
        return x + jax.nn.relu(x @ weights["w"] + weights["b"]), None

    x, _ = jax.lax.scan(layer, x, params)
    return jnp.mean(x**2)


def unrolled(params, x):
    state = x
    for _ in range(4):
        state = jnp.tanh(state @ params["w"] - state @ params["w"].T)
    return jnp.mean(state**2)


def nested(params, x):
    """Time steps inside of layers: weights of a scan over weights of a scan."""

    def layer(x, weights):
        def step(state, x):
            state = jnp.tanh(x @ weights + state @ params["u"])
            return state, state * 2

        _, x = jax.lax.scan(step, jnp.zeros((x.shape[1], 8)), x)
        return x, None

    x, _ = jax.lax.scan(jax.checkpoint(layer), x.swapaxes(0, 1), params["w"])
    return jnp.mean(x**2)


def grouped(params, x):
    x = conv(x, params["g"], 2, feature_group_count=2, rhs_dilation=(2, 1))
    return jnp.mean(jnp.sin(x))


def transposed_conv(params, x):
    x = jax.lax.conv_general_dilated(
        x,
        params["w"],
        (2,),
        [(1, -1)],
        lhs_dilation=(3,),
        dimension_numbers=("NCW", "OIW", "NCW"),
    )
    return jnp.sum(jnp.tanh(x) ** 2)


def mixture(params, x):
    """Experts, one product with a batch axis among the weights'."""
    hidden = jax.nn.relu(jnp.einsum("nd,edf->nef", x, params["w"]))
    return jnp.mean(jnp.einsum("nef,efd->nd", hidden, params["v"]) ** 2)


def half(params, x):
    hidden = x.astype(jnp.bfloat16) @ params["w"].astype(jnp.bfloat16)
    return jnp.mean(jax.nn.relu(hidden).astype(jnp.float32) ** 2)


def branched(params, x):
    hidden = jax.lax.cond(
        params["w"][0, 0] > 0, lambda: x @ params["w"], lambda: -(x @ params["w"])
    )
    return jnp.mean(hidden**2) + jnp.sum(jnp.sin(params["v"]))


def sliced(params, x):
    hidden = x @ (params["w"] * (params["w"] > 0))
    return jnp.mean((hidden @ params["v"][0] + hidden @ params["v"][1]) ** 2)


def out_of_range(params, tokens):
    rows = jnp.take(params["table"], tokens, axis=0, mode="fill", fill_value=1.0)
    clipped = jnp.take(params["clipped"], tokens, axis=0, mode="clip")
    return jnp.mean(jnp.sum((rows + clipped) ** 2, -1))


def unused(params, x):
    return jnp.mean(x @ params["w"])


def vmapped(params, x):
    return jnp.mean(jax.vmap(lambda row: jnp.sum(jnp.tanh(row @ params["w"])))(x))


FACTORS, WRITTEN, CONSTANT = "factors", "written", "constant"
TOKENS = np.array([[3, 3, 49, -1], [50, 77, -51, 0], [1, 2, 3, 1]])
STRUCTURES = {
    "deep": (
        deep,
        {"w": normal(4, 9, 9, scale=0.3), "b": normal(4, 9)},
        normal(5, 9),
        {"w": FACTORS, "b": WRITTEN},
    ),
    "unrolled": (unrolled, {"w": normal(30, 30, scale=0.2)}, normal(5, 30), FACTORS),
    "nested": (
        nested,
        {"w": normal(3, 8, 8), "u": normal(8, 8)},
        normal(5, 2, 8),
        {"w": FACTORS, "u": WRITTEN},
    ),
    "grouped": (grouped, {"g": normal(3, 2, 2, 6)}, normal(4, 8, 7, 4), WRITTEN),
    "transposed": (
        transposed_conv,
        {"w": normal(30, 20, 4, scale=0.1)},
        normal(4, 20, 5),
        FACTORS,
    ),
    "mixture": (
        mixture,
        {"w": normal(3, 6, 7), "v": normal(3, 7, 6)},
        normal(5, 6),
        FACTORS,
    ),
    "half": (half, {"w": normal(6, 7)}, normal(5, 6), FACTORS),
    "branched": (
        branched,
        {"w": normal(6, 7), "v": normal(3)},
        normal(5, 6),
        {"w": WRITTEN, "v": CONSTANT},
    ),
    "sliced": (
        sliced,
        {"w": normal(6, 7), "v": normal(2, 7, 5)},
        normal(5, 6),
        WRITTEN,
    ),
    "out of range": (
        out_of_range,
        {"table": normal(50, 3), "clipped": normal(50, 3)},
        TOKENS,
        FACTORS,
    ),
    "unused": (
        unused,
        {"w": normal(6), "v": normal(3, 3)},
        normal(5, 6),
        {"w": FACTORS, "v": CONSTANT},
    ),
    "vmapped": (vmapped, {"w": normal(6, 7)}, normal(5, 6), FACTORS),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_against_a_loop(name):
    loss_fn, params, batch, expected = STRUCTURES[name]
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    kind = jnp.int32 if name == "out of range" else jnp.float32
    batch = jnp.asarray(batch, kind)
    if isinstance(expected, str):
        expected = dict.fromkeys(sorted(params), expected)
    assert ways(loss_fn, params, batch) == expected
    assert_right(loss_fn, params, batch, 1e-2 if name == "half" else 1e-5)
