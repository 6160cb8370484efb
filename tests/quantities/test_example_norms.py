import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from nnsanity.quantities import example_norms
from nnsanity.quantities.example_gradients import gradient_of
from nnsanity.quantities.example_norms import example_gradient_norms, ways
from nnsanity.quantities.noise_scale import gradient_noise_scale
from tests.devices import printed_with_devices

PARAMS = {"w": jnp.array([[1.0, -2.0], [0.5, 1.0]]), "b": jnp.array([0.5, -0.5])}
INPUTS = jnp.asarray(np.random.default_rng(0).normal(1, 1, (14, 2)), jnp.float32)


def mean_loss(params, x):
    return jnp.mean(jnp.sum((x @ params["w"] + params["b"]) ** 2, -1))


MEASURES = {
    "norms": example_gradient_norms,
    "exact": gradient_noise_scale,
    "microbatches": lambda *a: gradient_noise_scale(*a, num_microbatches=7),
}


@pytest.mark.parametrize("name", MEASURES)
def test_jit_vmap_and_no_callback(name):
    def measure(params):
        return MEASURES[name](mean_loss, params, INPUTS)

    eager, compiled = measure(PARAMS), jax.jit(measure)
    np.testing.assert_allclose(compiled(PARAMS), eager, 1e-5)
    other = jax.tree.map(lambda leaf: leaf * jnp.array([0.5, 1.0]), PARAMS)
    stacked = jax.tree.map(lambda *v: jnp.stack(v), PARAMS, other)
    found = np.asarray(jax.vmap(measure)(stacked))
    first, second = found if name == "norms" else found.T
    np.testing.assert_allclose(first, eager, 1e-4)
    np.testing.assert_allclose(second, compiled(other), 1e-4)
    assert np.all(first != second)
    assert "callback" not in str(jax.make_jaxpr(measure)(PARAMS))


@pytest.mark.parametrize("name", MEASURES)
def test_one_trace_of_the_loss_for_repeated_calls(name, monkeypatch):
    monkeypatch.setattr(example_norms, "MAX_EXAMPLES", 5)
    traces = []

    def loss_fn(params, x):
        traces.append(x.shape)
        return mean_loss(params, x)

    MEASURES[name](loss_fn, PARAMS, INPUTS)
    # Once for the gradients, and once to see whether the examples are coupled.
    assert sorted(traces) == ([(2, 2)] if name == "microbatches" else [(1, 2), (14, 2)])
    MEASURES[name](loss_fn, PARAMS, 2 * INPUTS)
    assert len(traces) < 3


def test_the_error_bar_costs_nothing_where_it_is_not_used():
    def square_norm(params, x):
        return gradient_noise_scale(mean_loss, params, x).gradient_square_norm

    def compiled(measure):
        return jax.jit(measure).lower(PARAMS, jnp.ones((3000, 2))).compile().as_text()

    whole = compiled(lambda p, x: gradient_noise_scale(mean_loss, p, x))
    assert compiled(square_norm).count(" while(") == 1
    assert whole.count(" while(") == 2


def unequal(params, x):
    return jnp.sum(x, -1) * params["b"][0]


@pytest.mark.parametrize(
    ("loss_fn", "params", "batch", "error", "words"),
    [
        (unequal, PARAMS, INPUTS, ValueError, r"float32\[1\]; did you forget a mean"),
        (
            lambda p, x: (mean_loss(p, x), x),
            PARAMS,
            INPUTS,
            ValueError,
            "got tuple; .*aux",
        ),
        (lambda p, x: jnp.argmax(x), PARAMS, INPUTS, ValueError, r"got int32\[\]"),
        (lambda p, x: None, PARAMS, INPUTS, ValueError, "got NoneType"),
        (mean_loss, {"n": np.arange(3), "o": None}, INPUTS, ValueError, "got none"),
        (
            mean_loss,
            PARAMS,
            {"x": INPUTS, "rate": 0.5},
            ValueError,
            "batch/rate.*scalar",
        ),
        (mean_loss, PARAMS, [1.0, 2.0], ValueError, "leading axis.*a scalar"),
        (mean_loss, PARAMS, (INPUTS, INPUTS[1:]), ValueError, r"\(14, 2\).*\(13, 2\)"),
        (mean_loss, PARAMS, INPUTS[:0], ValueError, r"at least 1.*\(0, 2\)"),
        (mean_loss, PARAMS, None, ValueError, r"got \{\}"),
        (mean_loss, PARAMS, {"x": "text"}, TypeError, "got str at batch/x"),
        (mean_loss, PARAMS, np.array(["a", "b"]), TypeError, "got ndarray at batch;"),
    ],
)
def test_mistakes_are_named(loss_fn, params, batch, error, words):
    for measure in (example_gradient_norms, gradient_noise_scale):
        with pytest.raises(error, match=f"^{measure.__name__}: .*{words}"):
            measure(loss_fn, params, batch)


@pytest.mark.parametrize(
    ("count", "error", "words"),
    [
        (4, ValueError, "=4, .*at least 2 and divide the 14 examples"),
        (28, ValueError, "=28, .*divide the 14 examples"),
        (1, ValueError, "=1, .*at least 2"),
        (0, ValueError, "=0, .*at least 2"),
        (-2, ValueError, "=-2, .*at least 2"),
        (2.0, TypeError, "=2.0, .*must be None or an int"),
        (True, TypeError, "=True, .*must be None or an int"),
        (jnp.array(2), TypeError, "is it an array"),
    ],
)
def test_number_of_microbatches(count, error, words):
    with pytest.raises(error, match=f"^gradient_noise_scale: .*{words}"):
        gradient_noise_scale(mean_loss, PARAMS, INPUTS, num_microbatches=count)


@pytest.mark.parametrize("count", [None, 1, 2])
def test_one_example_has_no_noise_scale(count):
    with pytest.raises(ValueError, match=r"^gradient_noise_scale: .*one example"):
        gradient_noise_scale(mean_loss, PARAMS, INPUTS[:1], num_microbatches=count)


def test_weights_are_never_written_out_for_every_example():
    """A table and two products whose gradients of one example take 4 MB each."""
    shape = {"table": (1000, 1000), "w": (1000, 1000), "v": (1000, 1000)}
    params = {
        name: jax.ShapeDtypeStruct(one, jnp.float32) for name, one in shape.items()
    }

    def loss_fn(params, tokens):
        x = params["table"][tokens]
        return jnp.mean(jax.nn.relu(x @ params["w"]) @ params["v"])

    tokens = jax.ShapeDtypeStruct((64, 4), jnp.int32)
    compiled = jax.jit(lambda p, x: example_gradient_norms(loss_fn, p, x))
    memory = compiled.lower(params, tokens).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 20 * 64 * 4 * 1000 * 4 < 64 * 4e6


@pytest.mark.parametrize(("most", "num_bytes"), [(2, 2**28), (7, 2**28), (7, 500)])
def test_chunks_change_nothing(most, num_bytes, monkeypatch):
    def scaled_loss(params, x):
        return jnp.mean(jnp.tanh(x @ (params["w"] * params["b"]) + params["b"]) ** 2)

    def loss_fn(params, x):  # a new one: compiled programs are kept by the loss
        return scaled_loss(params, x)

    whole = [measure(scaled_loss, PARAMS, INPUTS) for measure in MEASURES.values()]
    monkeypatch.setattr(example_norms, "MAX_EXAMPLES", most)
    monkeypatch.setattr(example_norms, "MAX_BYTES", num_bytes)
    parts = [measure(loss_fn, PARAMS, INPUTS) for measure in MEASURES.values()]
    for one, other in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(one, other, 1e-4)


@pytest.mark.parametrize(
    ("count", "size", "expected"),
    [(100, 1, 100), (1024, 1, 1024), (2048, 1, 1024), (1500, 1, 750), (1601, 1, 1024)],
)
def test_chunks_by_number(count, size, expected):
    params = {"w": jnp.ones(size)}
    gradient_fn = gradient_of("test", lambda p, x: jnp.mean(p["w"] * x), params)
    found = example_norms.chunk_size(gradient_fn, jnp.ones((count, 1)))
    assert found == expected


@pytest.mark.parametrize(("is_masked", "expected"), [(False, 1000), (True, 50)])
def test_chunks_by_what_is_written(is_masked, expected):
    """A weight of 4 MB; 67 such gradients fit into 256 MiB, 50 divide 1,000."""
    params = {"w": jax.ShapeDtypeStruct((1000, 1000), jnp.float32)}

    def loss_fn(params, x):
        weight = params["w"] * (params["w"] > 0) if is_masked else params["w"]
        return jnp.mean(x @ weight)

    def look(params, x):
        gradient_fn = gradient_of("test", loss_fn, params)
        sizes.append(example_norms.chunk_size(gradient_fn, x))

    sizes = []
    jax.eval_shape(look, params, jax.ShapeDtypeStruct((1000, 1000), jnp.float32))
    assert sizes == [expected]


SHARDED = """
    import json
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
    from nnsanity.quantities.example_norms import example_gradient_norms
    from nnsanity.quantities.noise_scale import gradient_noise_scale

    random = np.random.default_rng(0)
    params = {"w": random.normal(size=(8, 16)), "v": random.normal(size=(16, 4))}
    params = {name: leaf.astype("f4") for name, leaf in params.items()}
    inputs = random.normal(size=(64, 8)).astype("f4")
    mesh = Mesh(np.array(jax.devices()), "d", axis_types=(AxisType.Auto,))

    def loss_fn(params, x):
        return jnp.mean(jnp.sum((jax.nn.gelu(x @ params["w"]) @ params["v"]) ** 2, -1))

    def measure(params, x):
        exact = gradient_noise_scale(loss_fn, params, x)
        parts = gradient_noise_scale(loss_fn, params, x, num_microbatches=8)
        return example_gradient_norms(loss_fn, params, x), exact, parts

    def run(of_params, of_inputs):
        put = lambda tree, spec: jax.device_put(
            tree, NamedSharding(mesh, PartitionSpec(*spec))
        )
        found = jax.jit(measure)(put(params, of_params), put(inputs, of_inputs))
        leaves = [np.ravel(leaf) for leaf in jax.tree.leaves(found)]
        return np.concatenate(leaves).tolist()

    specs = [([], []), ([], ["d"]), (["d"], [])]
    print(json.dumps([len(jax.devices()), *(run(*spec) for spec in specs)]))
"""


def test_sharded_equals_unsharded():
    num_devices, whole, *sharded = printed_with_devices(SHARDED, 4)
    assert (num_devices, len(whole), len(sharded)) == (4, 64 + 4 + 4, 2)
    for one in sharded:
        np.testing.assert_allclose(one, whole, 1e-3)


class Block(nn.Module):
    """Attention and a dense network, as a transformer stacks them."""

    @nn.compact
    def __call__(self, x, _):
        """Returns the next state and nothing beside it."""
        hidden = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2)(hidden, hidden)
        hidden = nn.gelu(nn.Dense(32)(nn.LayerNorm()(x)))
        return x + nn.Dense(16)(hidden), None


class Transformer(nn.Module):
    """Scanned, rematerialized blocks between tied embeddings."""

    @nn.compact
    def __call__(self, tokens):
        """Returns logits."""
        embed = nn.Embed(60, 16)
        blocks = nn.scan(
            nn.remat(Block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = blocks()(embed(tokens), None)
        return embed.attend(x)


@pytest.mark.slow
def test_a_scanned_transformer_is_never_written_out():
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 60, (6, 5)))
    params = Transformer().init(jax.random.key(0), tokens)["params"]

    def loss_fn(params, tokens):
        logits = Transformer().apply({"params": params}, tokens)
        labels = jnp.roll(tokens, -1, 1)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    found = ways(loss_fn, params, tokens)
    assert {way for name, way in found.items() if "kernel" in name} == {"factors"}
    assert found["Embed_0/embedding"] == "factors"
    gradient_fn = jax.jit(jax.grad(loss_fn))
    expected = [
        np.linalg.norm(ravel_pytree(gradient_fn(params, tokens[i : i + 1]))[0])
        for i in range(6)
    ]
    norms = example_gradient_norms(loss_fn, params, tokens)
    np.testing.assert_allclose(norms, expected, 1e-5)
