import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnsanity as ns
from nnsanity.trials.measure import training_noise
from nnsanity.trials.problem import checked_problem
from nnsanity.trials.repairs import available_repairs

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(200, 4)).astype(np.float32)
SLOPES = np.array([1, -0.5, 0.5, -1])
NUMBERS = (np.tanh(INPUTS @ SLOPES) + 0.05 * RNG.normal(size=200))[:, None]
CODES = RNG.integers(0, 20, 200)
EFFECTS = RNG.permutation(np.linspace(-1, 1, 20))
CODED = np.concatenate([INPUTS, (CODES[:, None] - 9.5) / 6], axis=1)
OF_CODES = EFFECTS[CODES][:, None]
ORDERED = np.sort(EFFECTS)[CODES][:, None]
# Nothing explains more than a good third of these.
MANY = RNG.normal(size=(800, 4)).astype(np.float32)
NOISY = (np.tanh(MANY @ SLOPES) + RNG.normal(size=800))[:, None]
RING = ((MANY[:, :2] ** 2).sum(axis=1) > 1.4)[:, None]
RARE = (MANY @ SLOPES + RNG.normal(size=800) > 3)[:, None]  # a twentieth


def drawn(*widths, init=jax.nn.initializers.he_normal()):  # noqa: B008
    keys = jax.random.split(jax.random.key(0), len(widths) - 1)
    return [
        {"w": init(key, shape), "b": jnp.zeros(shape[1])}
        for key, *shape in zip(keys, widths[:-1], widths[1:], strict=True)
    ]


def network(hidden=jax.nn.relu, head=lambda x: x):
    def apply_fn(params, x):
        *layers, last = params
        for layer in layers:
            x = hidden(x @ layer["w"] + layer["b"])
        return head(x @ last["w"] + last["b"])

    return apply_fn


def squared_error(apply_fn, penalty=0.0):
    def loss_fn(params, batch):
        error = jnp.mean((apply_fn(params, batch[0]) - batch[1]) ** 2)
        return error + penalty * sum(jnp.sum(one["w"] ** 2) for one in params)

    return loss_fn


def with_dropout(rate):
    def train_loss_fn(params, batch, key):
        hidden, last = params
        x = jax.nn.relu(batch[0] @ hidden["w"] + hidden["b"])
        kept = jax.random.bernoulli(key, 1 - rate, x.shape)
        outputs = jnp.where(kept, x / (1 - rate), 0) @ last["w"] + last["b"]
        return jnp.mean((outputs - batch[1]) ** 2)

    return train_loss_fn


MLP = network()
PARAMS = drawn(4, 16, 1)
RELU_HEAD, SIGMOID_HEAD = network(head=jax.nn.relu), network(head=jax.nn.sigmoid)
SIGMOIDS = network(jax.nn.sigmoid)
DEEP = drawn(4, *[16] * 8, 1, init=jax.nn.initializers.glorot_normal())
BURIED = [{**PARAMS[0], "b": PARAMS[0]["b"] - 100}, PARAMS[1]]


def checkup(apply_fn=MLP, params=PARAMS, data=(INPUTS, NUMBERS), **options):
    options = {
        "loss_fn": squared_error(apply_fn),
        "key": jax.random.key(1),
        "optimizer": optax.adam(0.05),
        "num_steps": 200,
    } | options
    data = tuple(np.asarray(one, np.float32) for one in data)
    return ns.checkup(apply_fn, options.pop("loss_fn"), params, data, **options)


def constant(value):
    return drawn(4, 16, 1, init=jax.nn.initializers.constant(value))


LARGE = jax.tree.map(lambda x: 30 * x, drawn(4, 16, 16, 1))
FAULTS = {
    "large inputs": (
        {"data": (1000 * INPUTS, NUMBERS), "optimizer": optax.sgd(0.05)},
        "normalization/unnormalized-inputs",
    ),
    "raw targets": (
        {"data": (INPUTS, 100 + 20 * NUMBERS), "optimizer": optax.sgd(0.05)},
        "normalization/unnormalized-targets",
    ),
    "high rate": ({"optimizer": optax.adam(5.0)}, "learning-rate/"),
    "low rate": ({"optimizer": optax.adam(5e-4)}, "learning-rate/too-low"),
    "low rate, noisy targets": (
        {"data": (MANY, NOISY), "optimizer": optax.adam(3e-6)},
        "learning-rate/too-low",
    ),
    "large inputs, noisy targets": (
        {"data": (1000 * MANY, NOISY), "optimizer": optax.sgd(0.05)},
        "normalization/unnormalized-inputs",
    ),
    "ReLU head": (
        {"apply_fn": RELU_HEAD, "data": (INPUTS, NUMBERS - 3)},
        "final-activation/unreachable-targets",
    ),
    "sigmoid head": (
        {"apply_fn": SIGMOID_HEAD, "data": (INPUTS, 3 * NUMBERS)},
        "final-activation/unreachable-targets",
    ),
    "sigmoid stack": (
        {"apply_fn": SIGMOIDS, "params": DEEP, "optimizer": optax.adam(0.02)},
        "gradients/vanishing",
    ),
    "zeros": ({"params": constant(0.0)}, "initialization/zero"),
    "constant": (
        {"params": constant(0.5)},
        "initialization/symmetric",
    ),
    "large weights": ({"params": LARGE}, "initialization/off-scale"),
    "dead units": (
        {"params": BURIED, "optimizer": optax.sgd(0.05)},
        "initialization/",  # fresh weights come with fresh biases
    ),
    "penalty": ({"loss_fn": squared_error(MLP, 10.0)}, "regularization/"),
    "dropout": ({"train_loss_fn": with_dropout(0.97)}, "regularization/"),
    "one layer": (
        {"params": drawn(4, 1), "data": (MANY, RING - 0.5)},
        "depth/too-shallow",
    ),
    "ten steps": (
        {"num_steps": 10, "optimizer": optax.sgd(0.02)},
        "learning-rate/stops-early",
    ),
    "two units": (
        {
            "params": drawn(4, 2, 1),
            "data": (MANY, RING - 0.5),
            "optimizer": optax.adam(0.01),
            "num_steps": 1000,
        },
        "width/bottleneck",
    ),
    "a code": (
        {"data": (CODED, OF_CODES), "params": drawn(5, 16, 1)},
        "preprocessing/categorical-code",
    ),
}
TWINS = {
    "noisy targets": {"data": (MANY, NOISY), "optimizer": optax.adam(0.01)},
    "rare classes": {
        "apply_fn": SIGMOID_HEAD,
        "data": (MANY, RARE),
        "optimizer": optax.adam(0.02),
    },
    "one layer, linear targets": {
        "params": drawn(4, 1),
        "data": (INPUTS, INPUTS @ SLOPES[:, None]),
    },
    "half a training": {"num_steps": 40},
    "small inputs": {"optimizer": optax.sgd(0.05)},
    "sigmoid head": {"apply_fn": SIGMOID_HEAD, "data": (INPUTS, (NUMBERS + 2) / 4)},
    "tanh stack": {
        "apply_fn": network(jnp.tanh),
        "params": DEEP,
        "optimizer": optax.adam(0.005),
    },
    "small penalty": {"loss_fn": squared_error(MLP, 1e-5)},
    "little dropout": {"train_loss_fn": with_dropout(0.05)},
    "an ordered code": {"data": (CODED, ORDERED), "params": drawn(5, 16, 1)},
    "small targets": {"data": (INPUTS, NUMBERS * 1.2 + 0.1)},
}
QUICK = {"large inputs", "ReLU head", "dead units"}
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=() if one in QUICK else SLOW) for one in FAULTS]
)
def test_the_cause_leads_with_its_effect(name):
    options, rule = FAULTS[name]
    report = checkup(**options)
    first = report.findings[0]
    assert first.rule.startswith(rule)
    assert first.severity in ("error", "warning")
    if rule not in (
        "initialization/zero",
        "initialization/symmetric",
    ):  # symmetry is a proof
        assert "takes the explained share of the variance" in first.message
    assert first.where
    assert first.advice


@pytest.mark.parametrize("name", [pytest.param(one, marks=SLOW) for one in TWINS])
def test_healthy_twins_are_clean(name):
    report = checkup(**TWINS[name])
    found = [one for one in report.findings if one.severity != "info"]
    assert found == []


@pytest.mark.slow
def test_three_mistakes_at_once():
    report = checkup(
        RELU_HEAD,
        data=(1000 * INPUTS, NUMBERS - 3),
        optimizer=optax.adam(5.0),
    )
    found = [one for one in report.findings if one.severity != "info"]
    rules = {one.rule for one in found}
    assert "final-activation/unreachable-targets" in rules
    assert any(one.rule.startswith("learning-rate/") for one in found)
    assert any("With the other repairs in place" in one.message for one in found)


def with_batch_statistics(params, batch, key):
    del key
    hidden, last = params
    x = batch[0] @ hidden["w"] + hidden["b"]
    x = jax.nn.relu((x - x.mean(0)) / x.std(0))
    return jnp.mean((x @ last["w"] + last["b"] - batch[1]) ** 2)


@pytest.mark.parametrize(
    ("train_loss_fn", "varies", "differs"),
    [
        (with_dropout(0.5), True, False),
        (with_dropout(0.0), False, False),
        (with_batch_statistics, False, True),
        (None, False, False),
    ],
)
def test_no_noise_is_left_out_where_there_is_none(train_loss_fn, varies, differs):
    apply_fn = network()
    problem = checked_problem(
        apply_fn,
        squared_error(apply_fn),
        PARAMS,
        (INPUTS, NUMBERS.astype(np.float32)),
        key=jax.random.key(0),
        optimizer=optax.adam(1e-3),
        batch_size=32,
        num_steps=10,
        train_loss_fn=train_loss_fn,
        validation=None,
        groups=None,
    )
    groups = [one.group for one in available_repairs(problem)]
    assert groups.count("noise") == varies
    assert training_noise(problem) == (varies, differs)
