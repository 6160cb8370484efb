"""Planted faults of items 8 to 11 and healthy twins, each a whole checkup."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnsanity as ns

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(400, 8)).astype(np.float32)
SLOPES = np.linspace(-0.5, 0.5, 8, dtype=np.float32)
TARGETS = np.tanh(INPUTS @ SLOPES)[:, None]
INITIALIZERS = jax.nn.initializers
HE, LECUN = INITIALIZERS.he_normal(), INITIALIZERS.lecun_normal()
GAIN3 = INITIALIZERS.variance_scaling(9.0, "fan_in", "normal")


def drawn(*widths, init=HE, seed=0):
    sizes = (8, *widths, 1)
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    return [
        {"w": init(key, shape), "b": jnp.zeros(shape[1])}
        for key, shape in zip(keys, itertools.pairwise(sizes), strict=True)
    ]


def mlp(hidden=jax.nn.relu, *, skip=False):
    def apply_fn(params, x):
        first, *layers, last = params
        x = hidden(x @ first["w"] + first["b"])
        for layer in layers:
            h = hidden(x @ layer["w"] + layer["b"])
            x = x + h / len(params) if skip else h
        return x @ last["w"] + last["b"]

    return apply_fn


def squared_error(apply_fn):
    return lambda params, batch: jnp.mean((apply_fn(params, batch[0]) - batch[1]) ** 2)


def checkup(apply_fn, params, *, data=(INPUTS, TARGETS), loss_fn=None, **options):
    options = {"optimizer": optax.adam(0.01), "num_steps": 200} | options
    loss_fn = loss_fn or squared_error(apply_fn)
    return ns.checkup(apply_fn, loss_fn, params, data, key=jax.random.key(1), **options)


def with_biases(params, layer, value):
    params[layer]["b"] = jnp.full_like(params[layer]["b"], value)
    return params


def twice_the_same(params):
    """The second half of the units of the hidden layer are those of the first."""
    hidden, last = params
    half = hidden["w"].shape[1] // 2
    hidden["w"] = jnp.concatenate([hidden["w"][:, :half]] * 2, axis=1)
    last["w"] = jnp.concatenate([last["w"][:half]] * 2)
    return params


def bounded(params, x):
    """A clip between two layers that passes next to nothing."""
    first, second, last = params
    x = jax.nn.relu(x @ first["w"] + first["b"])
    x = jnp.clip(x + x.mean(axis=1, keepdims=True), 5.0, 6.0)
    return jax.nn.relu(x @ second["w"] + second["b"]) @ last["w"] + last["b"]


BIAS, SCALE = "initialization/large-bias", "initialization/off-scale"
FAULTS = {
    "dead layer": (mlp(), with_biases(drawn(16, 16), 1, -30.0), BIAS),
    "dying ReLU": (mlp(), with_biases(drawn(16), 0, -6.0), BIAS),
    "sigmoid stack": (
        mlp(jax.nn.sigmoid),
        drawn(*[16] * 9, init=LECUN),
        ("gradients/vanishing", "depth/too-deep"),
    ),
    "gain 3": (mlp(jnp.tanh), drawn(*[16] * 6, init=GAIN3), SCALE),
    "zeros": (mlp(), drawn(16, init=INITIALIZERS.zeros), "initialization/zero"),
    "constant": (
        mlp(),
        drawn(16, init=INITIALIZERS.constant(0.3)),
        "initialization/symmetric",
    ),
    "N(0, 1)": (
        mlp(),
        drawn(500, 500, 500, init=INITIALIZERS.normal(1.0)),
        SCALE,
    ),
    "40 layers": (mlp(), drawn(*[8] * 39), "depth/too-deep"),
    "duplicates": (mlp(), twice_the_same(drawn(6)), "width/redundant"),
    "a bound": (bounded, drawn(16, 16), "gradients/blocked-share"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_planted_is_named_first_with_what_its_repair_changes(name):
    apply_fn, params, rule = FAULTS[name]
    report = checkup(apply_fn, params)
    first = report.findings[0]
    assert first.rule.startswith(rule)
    assert first.severity in ("error", "warning")
    is_proof = first.rule in ("initialization/zero", "initialization/symmetric")
    told = report.findings[is_proof]  # the repair of a proof comes second
    assert "takes the explained share of the variance after 200 steps" in told.message


class ResNet(nn.Module):
    """Two blocks with batch normalization that runs on the statistics of the batch."""

    @nn.compact
    def __call__(self, x):
        norm = lambda: nn.BatchNorm(use_running_average=False)  # noqa: E731
        x = nn.relu(norm()(nn.Conv(6, (3, 3), use_bias=False)(x)))
        for _ in range(2):
            h = nn.relu(norm()(nn.Conv(6, (3, 3), use_bias=False)(x)))
            h = nn.BatchNorm(use_running_average=False, scale_init=INITIALIZERS.zeros)(
                nn.Conv(6, (3, 3), use_bias=False)(h)
            )
            x = nn.relu(x + h)
        return nn.Dense(3)(x.mean(axis=(1, 2)))


class Transformer(nn.Module):
    """One block of attention and of an MLP, each ending in weights of zero."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(12, 16)(tokens) + self.param(
            "positions", INITIALIZERS.normal(0.5), (6, 16)
        )
        x = x + nn.MultiHeadDotProductAttention(
            2, out_kernel_init=INITIALIZERS.zeros, deterministic=True
        )(nn.LayerNorm()(x))
        h = nn.gelu(nn.Dense(32)(nn.LayerNorm()(x)))
        x = x + nn.Dense(16, kernel_init=INITIALIZERS.zeros)(h)
        return nn.Dense(3)(nn.LayerNorm()(x).mean(axis=1))


class Bag(nn.Module):
    """Looks up a few of many rows for each example."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(200, 8, embedding_init=INITIALIZERS.normal(1.0))(tokens)
        return nn.Dense(3)(nn.relu(nn.Dense(16)(x.mean(axis=1))))


def images():
    """Stripes of three directions under noise."""
    labels = RNG.integers(0, 3, 200)
    rows, columns = np.meshgrid(np.arange(8), np.arange(8), indexing="ij")
    phases = RNG.uniform(0, 6, 200)[:, None, None]
    stripes = np.stack([rows, columns, rows + columns])[labels] * 1.6 + phases
    noise = 0.3 * RNG.normal(size=(200, 8, 8))
    return (np.sin(stripes) + noise)[..., None].astype(np.float32), labels


def tokens(size, length):
    """Sequences of tokens that say by their kinds which class is meant."""
    labels = RNG.integers(0, 3, 300)
    kinds = np.where(RNG.random((300, length)) < 0.8, labels[:, None], RNG.integers(3))
    return 3 * RNG.integers(0, size // 3, (300, length)) + kinds, labels


def of_module(module, data, **options):
    data = tuple(np.asarray(one) for one in data)
    params = module.init(jax.random.key(0), data[0][:2])["params"]
    statistics = module.init(jax.random.key(0), data[0][:2]).get("batch_stats")

    def apply_fn(params, x):
        if statistics is None:
            return module.apply({"params": params}, x)
        variables = {"params": params, "batch_stats": statistics}
        return module.apply(variables, x, mutable=["batch_stats"])[0]

    def loss_fn(params, batch):
        logits = apply_fn(params, batch[0])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
        return losses.mean()

    return (apply_fn, params), {"data": data, "loss_fn": loss_fn} | options


DEEP_TANH = {"optimizer": optax.adam(0.003)}
TWINS = {
    "He ReLU": lambda: ((mlp(), drawn(32, 32)), {}),
    "tanh of 17": lambda: ((mlp(jnp.tanh), drawn(*[32] * 16, init=LECUN)), DEEP_TANH),
    "40 layers with skips": lambda: (
        (mlp(skip=True), drawn(*[16] * 39)),
        {"num_steps": 300},
    ),
    "ResNet": lambda: of_module(ResNet(), images()),
    "transformer": lambda: of_module(Transformer(), tokens(12, 6)),
    "embeddings": lambda: of_module(Bag(), tokens(200, 5)),
    "over-wide": lambda: (
        (mlp(), drawn(1024)),
        {"optimizer": optax.adam(0.002), "num_steps": 300},
    ),
    "45% zeros": lambda: ((mlp(), with_biases(drawn(64), 0, 0.2)), {}),
    "a bound seldom met": lambda: (
        (lambda params, x: jnp.clip(mlp()(params, x) + x[:, :1], -9, 9), drawn(32)),
        {},
    ),
}


@pytest.mark.parametrize("name", TWINS)
def test_healthy_twins_are_silent(name):
    arguments, options = TWINS[name]()
    report = checkup(*arguments, **options)
    assert [one for one in report.findings if one.severity != "info"] == []


def test_layers_that_make_up_one_do_no_harm_where_the_task_is_linear():
    noise = RNG.normal(size=(400, 1)).astype(np.float32)
    data = INPUTS, INPUTS @ SLOPES[:, None] + noise
    report = checkup(mlp(lambda x: x), drawn(16, 16), data=data, num_steps=600)
    found = {one.rule: one.severity for one in report.findings}
    assert found["depth/merged-layers"] == "info"
    assert set(found.values()) == {"info"}


def test_layers_that_make_up_one_are_named_where_a_nonlinearity_helps():
    params, data = drawn(16, 16), (INPUTS, INPUTS[:, :1] * INPUTS[:, 1:2])
    for hidden, leading in ((jax.nn.relu, []), (lambda x: x, ["depth/merged-layers"])):
        report = checkup(mlp(hidden), params, data=data, num_steps=600)
        found = [one for one in report.findings if one.severity != "info"]
        assert [one.rule for one in found][:1] == leading
        for one in found[:1]:
            assert "A leaky ReLU behind 0, 1 takes the explained share" in one.message
