import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nnsanity.checks.results import judge_overfit
from nnsanity.quantities.overfit import overfit_batch

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
INPUTS = jnp.asarray(RNG.normal(size=(16, 5)), jnp.float32)
NUMBERS = jnp.asarray(RNG.normal(size=(16, 1)), jnp.float32)
LABELS = jnp.asarray(RNG.integers(0, 3, 16))
SIGNS = jnp.asarray(RNG.integers(0, 2, (16, 1)), jnp.float32)
ORDER = jnp.asarray(RNG.permutation(16))
IMAGES = INPUTS @ jnp.asarray(RNG.normal(size=(5, 64)), jnp.float32)


def drawn(*widths):
    keys = jax.random.split(KEY, len(widths) - 1)
    normal = jax.nn.initializers.lecun_normal()
    return [
        {"w": normal(key, shape), "b": jnp.zeros(shape[1])}
        for key, *shape in zip(keys, widths[:-1], widths[1:], strict=True)
    ]


def network(params, x, hidden=jax.nn.relu):
    *layers, last = params
    for layer in layers:
        x = hidden(x @ layer["w"] + layer["b"])
    return x @ last["w"] + last["b"]


def convolutional(params, x):
    x = jax.lax.conv_general_dilated(
        x.reshape(-1, 8, 8, 1),
        params["kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return network(params["head"], jax.nn.relu(x).reshape(len(x), -1))


def normalized(params, x):
    x = x @ params[0]["w"] + params[0]["b"]
    x = (x - jnp.mean(x, -1, keepdims=True)) / jnp.std(x, -1, keepdims=True)
    return network(params[1:], jax.nn.gelu(x))


def embedded(params, tokens):
    return network(params["rest"], params["table"][tokens].reshape(len(tokens), -1))


def squared(apply_fn):
    return lambda params, batch: jnp.mean((apply_fn(params, batch[0]) - batch[1]) ** 2)


def cross_entropy(params, batch):
    logits = network(params, batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def binary(params, batch):
    logits = network(params, batch[0])
    return optax.sigmoid_binary_cross_entropy(logits, batch[1]).mean()


def blocked(params, x):
    return jax.lax.stop_gradient(network(params, x))


def frozen(params, x):
    first, *rest = params
    return network([jax.tree.map(jax.lax.stop_gradient, first), *rest], x)


MLP = drawn(5, 32, 32, 1)
TOKENS = jnp.asarray(RNG.permutation(16 * 4).reshape(16, 4))
HEALTHY = {
    "relu": (squared(network), MLP, INPUTS, NUMBERS),
    "tanh": (
        squared(functools.partial(network, hidden=jnp.tanh)),
        MLP,
        INPUTS,
        NUMBERS,
    ),
    "classes": (cross_entropy, drawn(5, 32, 3), INPUTS, LABELS),
    "binary": (binary, drawn(5, 32, 1), INPUTS, SIGNS),
    "raw inputs": (squared(network), MLP, 255 * INPUTS, NUMBERS),
    "raw targets": (squared(network), MLP, INPUTS, 1000 * NUMBERS),
    "layer norm": (squared(normalized), MLP, INPUTS, NUMBERS),
    "embedding": (
        squared(embedded),
        {"table": jax.random.normal(KEY, (64, 8)), "rest": drawn(32, 16, 1)},
        TOKENS,
        NUMBERS,
    ),
    "convolution": (
        squared(convolutional),
        {"kernel": jax.random.normal(KEY, (3, 3, 1, 4)) / 3, "head": drawn(256, 1)},
        IMAGES,
        NUMBERS,
    ),
    "frozen trunk, wide head": (squared(frozen), drawn(5, 64, 1), INPUTS, NUMBERS),
}
FAULTY = {
    "inputs shuffled": (
        squared(lambda p, x: network(p, x[ORDER])),
        MLP,
        INPUTS,
        NUMBERS,
    ),
    "targets shuffled": (
        lambda p, b: jnp.mean((network(p, b[0]) - b[1][ORDER]) ** 2),
        MLP,
        INPUTS,
        NUMBERS,
    ),
    "labels reversed": (
        lambda p, b: cross_entropy(p, (b[0], b[1][::-1])),
        drawn(5, 32, 3),
        INPUTS,
        LABELS,
    ),
    "broadcast": (
        lambda p, b: jnp.mean((network(p, b[0])[:, 0] - b[1]) ** 2),
        MLP,
        INPUTS,
        NUMBERS,
    ),
    "blocked": (squared(blocked), MLP, INPUTS, NUMBERS),
    "rounded": (
        squared(lambda p, x: jnp.round(network(p, x))),
        MLP,
        INPUTS,
        NUMBERS,
    ),
    "frozen trunk, small head": (squared(frozen), drawn(5, 4, 1), INPUTS, NUMBERS),
    "inputs dropped": (
        squared(lambda p, x: network(p, 0 * x)),
        MLP,
        INPUTS,
        NUMBERS,
    ),
    "wrong sign": (
        lambda p, b: -squared(network)(p, b),
        MLP,
        INPUTS,
        NUMBERS,
    ),
    "wrong sign of classes": (
        lambda p, b: -cross_entropy(p, b),
        drawn(5, 32, 3),
        INPUTS,
        LABELS,
    ),
    "never finite": (
        squared(lambda p, x: jnp.log(-jnp.abs(network(p, x)) - 1)),
        MLP,
        INPUTS,
        NUMBERS,
    ),
}


def overfit(case, optimizer=None, **options):
    loss_fn, params, inputs, targets = case
    optimizer = optimizer or optax.adam(1e-3)
    return overfit_batch(
        loss_fn, params, (inputs, targets), optimizer, key=KEY, **options
    )


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_networks_fit(name):
    found = overfit(HEALTHY[name])
    assert found.fits
    assert 0 <= found.left < 0.1
    assert found.loss < found.blind_loss
    assert judge_overfit(found, 16, ()) == ()


@pytest.mark.parametrize("name", FAULTY)
def test_faulty_programs_do_not_fit(name):
    found = overfit(FAULTY[name])
    assert not found.fits
    (finding,) = judge_overfit(found, 16, ["another rate"])
    assert finding.rule == "results/cannot-overfit-batch"
    assert finding.severity == "error"
    assert "nor with another rate" in finding.message


@pytest.mark.parametrize("rate", [1e-4, 1e-2, 1.0])
def test_a_bad_rate_is_not_blamed_on_the_network(rate):
    found = overfit(HEALTHY["relu"], optax.sgd(rate))
    assert found.fits
    assert 1e-3 < rate * found.scale < 1
    assert found.scales.shape == (6,)
    assert found.losses.shape == (6, 501)


def test_the_best_constant_is_what_blind_training_reaches():
    found = overfit(HEALTHY["relu"])
    assert found.blind_loss == pytest.approx(float(jnp.var(NUMBERS)), rel=1e-2)
    assert found.start_loss == pytest.approx(float(found.losses[0, 0]))


def test_a_loss_with_another_floor():
    loss_fn, *rest = HEALTHY["relu"]
    shifted = (lambda p, b: loss_fn(p, b) - 3.0, *rest)
    assert not overfit(shifted).fits
    assert overfit(shifted, best_loss=-3.0).fits


def density(apply_fn):
    def loss_fn(params, batch):
        mean, log_deviation = jnp.split(apply_fn(params, batch[0]), 2, axis=-1)
        scaled = (batch[1] - mean) * jnp.exp(-log_deviation)
        return jnp.mean(0.5 * scaled**2 + log_deviation)

    return loss_fn


@pytest.mark.slow
def test_a_density_has_no_floor():
    case = (density(network), drawn(5, 32, 32, 2), INPUTS, NUMBERS)
    assert not overfit(case).fits  # which looks like a wrong sign
    assert overfit(case, best_loss=None).fits
    mixed_up = density(lambda params, x: network(params, x[ORDER]))
    found = overfit((mixed_up, *case[1:]), best_loss=None)
    assert not found.fits
    # The best normal density of all targets: half of the log of their variance + 1.
    best = 0.5 * np.log(np.var(np.asarray(NUMBERS))) + 0.5
    assert found.blind_loss == pytest.approx(best, abs=1e-2)
    assert found.left == pytest.approx(np.exp(2 * (found.loss - best)), rel=0.05)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"optimizer": 0.1}, TypeError, "optimizer.*init and update.*0.1"),
        ({"scales": 1.0}, ValueError, r"scales.*shape \(\)"),
        ({"num_steps": 0}, ValueError, "1 step.*0"),
    ],
)
def test_bad_arguments(changes, error, words):
    with pytest.raises(error, match=words):
        overfit(HEALTHY["relu"], **changes)


def test_one_example_can_not_be_told_apart():
    loss_fn, params, inputs, targets = HEALTHY["relu"]
    with pytest.raises(ValueError, match="at least 2 examples"):
        overfit((loss_fn, params, inputs[:1], targets[:1]))
    with pytest.raises(ValueError, match=r"scalar.*mean"):
        overfit((lambda p, b: network(p, b[0])[:, 0], params, inputs, targets))
