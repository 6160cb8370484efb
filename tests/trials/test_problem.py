from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnsanity as ns

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
INPUTS = RNG.normal(size=(40, 3)).astype(np.float32)
TARGETS = (INPUTS @ [1, 2, -1.0])[:, None].astype(np.float32)
PARAMS = {"w": jnp.asarray(RNG.normal(size=(3, 1)), jnp.float32), "b": jnp.zeros(1)}
LABELS = np.arange(40) % 3
WORDS = np.array(["cat", "dog"] * 20)


def apply_fn(params, x):
    return x @ params["w"] + params["b"]


def squared(fn):
    return lambda params, batch: jnp.mean((fn(params, batch[0]) - batch[1]) ** 2)


def cross_entropy(fn):
    def loss_fn(params, batch):
        logits = fn(params, batch[0])
        labels = jnp.maximum(batch[1], 0)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss_fn


LOSS_FN = squared(apply_fn)


def checkup(
    apply_fn=apply_fn,
    loss_fn=LOSS_FN,
    params=PARAMS,
    data=(INPUTS, TARGETS),
    **options,
):
    options = {"key": KEY, "batch_size": 8, "num_steps": 5} | options
    return ns.checkup(apply_fn, loss_fn, params, data, **options)


def trained(*args, **options):
    """A checkup that trains, and repairs nothing."""
    options = {"optimizer": optax.sgd(0.01), "interventions": False} | options
    return checkup(*args, **options)


def rules(report):
    return [one.rule for one in report.findings]


def per_example(params, batch):
    return ((apply_fn(params, batch[0]) - batch[1]) ** 2)[:, 0]


NOISY = nn.Sequential([nn.Dense(1), nn.Dropout(0.5, deterministic=False)])
NOISY_PARAMS = NOISY.init({"params": KEY, "dropout": KEY}, INPUTS)
NOISY_APPLY = {"apply_fn": NOISY.apply, "params": NOISY_PARAMS}
NOISY_LOSS = NOISY_APPLY | {
    "apply_fn": lambda p, x: NOISY.apply(p, x, rngs={"dropout": KEY}),
    "loss_fn": squared(NOISY.apply),
}
INTEGERS = {"w": jnp.ones((3, 1), int)}

UNEQUAL = INPUTS, TARGETS[:-1]
RAGGED = [[1], [2, 3]] * 20
BAD_VALUES = {
    "loss by example": ({"loss_fn": per_example}, "loss_fn float32[8] mean"),
    "loss with aux": ({"loss_fn": lambda p, b: (LOSS_FN(p, b), 1)}, "loss_fn scalar"),
    "integer loss": ({"loss_fn": lambda p, b: 1}, "loss_fn float int32"),
    "noisy loss": (
        {"train_loss_fn": lambda p, b, key: b[1]},
        "train_loss_fn scalar float32[8",
    ),
    "no examples": ({"apply_fn": lambda p, x: x.sum()}, "apply_fn leading axis 8 ()"),
    "transposed": ({"apply_fn": lambda p, x: x.T}, "apply_fn leading axis (3, 8)"),
    "unequal": ({"data": UNEQUAL}, "inputs targets data (40, 3) (39, 1)"),
    "held out": ({"validation": UNEQUAL}, "inputs targets validation"),
    "empty": ({"data": (INPUTS[:0], TARGETS[:0])}, "data no examples"),
    "large batch": ({"batch_size": 41}, "batch_size 41 40 examples"),
    "batch of zero": ({"batch_size": 0}, "batch_size 1 got 0"),
    "no steps": ({"num_steps": 0}, "num_steps at least 1 got 0"),
    "integer params": ({"params": INTEGERS}, "params floating-point"),
    "no params": ({"params": {}}, "params floating-point"),
    "no rng": (NOISY_APPLY, "apply_fn random key Close over it deterministic=True"),
    "no rng in the loss": (NOISY_LOSS, "loss_fn random key Close over it"),
    "ragged lists": ({"data": (INPUTS, RAGGED)}, "data list"),
}
OBJECTS = np.array(RAGGED, object)
BAD_TYPES = {
    "not called": ({"optimizer": optax.adam}, "optimizer optax.adam(1e-3)"),
    "a rate": ({"optimizer": 0.1}, "optimizer optax got 0.1"),
    "integer key": ({"key": 0}, "key jax.random.key(0) got 0"),
    "keys": ({"key": jax.random.split(KEY, 3)}, "key jax.random.key(0) [3]"),
    "old keys": ({"key": jnp.zeros((3, 2), jnp.uint32)}, "key PRNG uint32"),
    "no pair": ({"data": INPUTS}, "data (inputs, targets) ndarray"),
    "a dict": ({"data": {"x": INPUTS}}, "data (inputs, targets) dict"),
    "words": ({"data": (INPUTS, WORDS)}, "data numbers <U3 words"),
    "list of words": ({"data": (INPUTS, list(WORDS))}, "data numbers words"),
    "objects": ({"data": (INPUTS, OBJECTS)}, "data numbers object ragged lists"),
    "no apply_fn": ({"apply_fn": None}, "apply_fn callable None"),
    "no loss_fn": ({"loss_fn": "mse"}, "loss_fn callable 'mse'"),
    "no train_loss_fn": ({"train_loss_fn": 3}, "train_loss_fn callable 3"),
    "part of a batch": ({"batch_size": 2.5}, "batch_size 2.5"),
    "part of a step": ({"num_steps": 2.5}, "num_steps 2.5"),
}


@pytest.mark.parametrize("name", [*BAD_VALUES, *BAD_TYPES])
def test_bad_arguments(name):
    table, error = (
        (BAD_VALUES, ValueError) if name in BAD_VALUES else (BAD_TYPES, TypeError)
    )
    options, words = table[name]
    with pytest.raises(error, match=r"^checkup: ") as caught:
        checkup(**options)
    text = str(caught.value)
    assert [word for word in words.split(" ") if word not in text] == []


class Tokens(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(3)(nn.Embed(7, 4)(tokens).mean(axis=1))


def test_tokens_are_not_numbers():
    model, tokens = Tokens(), RNG.integers(0, 7, (40, 5))
    params = model.init(KEY, tokens)
    report = trained(
        model.apply, cross_entropy(model.apply), params, (tokens, LABELS), batch_size=4
    )
    assert "indices" in report.skipped["normalization of the inputs"]
    assert "trial" in report.measurements
    assert not any(one.item == 1 for one in report.findings)


def test_outputs_that_are_a_tuple():
    def two(params, x):
        return apply_fn(params, x), x

    loss_fn = squared(lambda params, x: two(params, x)[0])
    report = trained(two, loss_fn)
    assert "not single arrays" in report.skipped["final-activation"]
    assert "trial" in report.measurements


def test_inputs_that_are_a_dict():
    def fn(params, inputs):
        return apply_fn(params, inputs["x"]) * inputs["scale"][:, None]

    data = {"x": INPUTS, "scale": np.full(40, 900, np.float32)}, 900 * TARGETS
    report = trained(fn, squared(fn), data=data)
    places = {one.where for one in report.findings if one.item == 1}
    assert "inputs['scale'], feature 0" in places
    assert "trial" in report.measurements


def test_images_of_bytes():
    model = nn.Sequential([nn.Conv(3, (3, 3)), lambda x: x.mean((1, 2))])
    images = RNG.integers(0, 256, (40, 5, 5, 1)).astype(np.uint8)
    params = model.init(KEY, images)
    data = (images, LABELS)
    report = trained(model.apply, cross_entropy(model.apply), params, data)
    assert "normalization/unnormalized-inputs" in rules(report)
    assert "trial" in report.measurements


@pytest.mark.parametrize("labels", [LABELS - 1, LABELS.astype(np.uint8)])
def test_integer_labels(labels):
    params = {"w": jnp.ones((3, 3)), "b": jnp.zeros(3)}
    report = checkup(
        loss_fn=cross_entropy(apply_fn), params=params, data=(INPUTS, labels)
    )
    assert not any(one.severity == "error" for one in report.findings)


def test_without_targets():
    def loss_fn(params, batch):
        return jnp.mean((apply_fn(params, batch[0]) - batch[0]) ** 2)

    report = trained(loss_fn=loss_fn, data=(INPUTS, None))
    assert "final-activation" in report.skipped
    assert "trial" in report.measurements


@pytest.mark.parametrize(
    ("params", "data", "rule"),
    [
        (PARAMS, (np.where(INPUTS > 1, np.nan, INPUTS), TARGETS), "nonfinite-input"),
        (PARAMS, (INPUTS, np.where(TARGETS > 1, np.inf, TARGETS)), "nonfinite-target"),
        (PARAMS | {"b": jnp.array([np.nan])}, (INPUTS, TARGETS), "results/nonfinite"),
    ],
)
def test_nan_is_a_finding(params, data, rule):
    report = trained(params=params, data=data)
    errors = [one.rule for one in report.findings if one.severity == "error"]
    assert any(one.endswith(rule) for one in errors)
    assert "NaN" in report.skipped["trial"]
    assert "nan" not in report.summary


def test_without_an_optimizer():
    report = checkup()
    assert "no optimizer" in report.skipped["trial"]
    assert "trial" not in report.measurements


def test_a_repairing_checkup_leaves_its_arguments_alone():
    params = {"w": np.ones((3, 1), np.float32), "b": jnp.zeros(1), "n": None}
    data = INPUTS.astype(np.float64) * 900, jnp.asarray(TARGETS)
    before = jax.tree.map(np.array, (params, data))
    report = checkup(params=params, data=data, optimizer=optax.adam(0.01))
    assert "interventions" not in report.skipped
    jax.tree.map(np.testing.assert_array_equal, (params, data), before)
    assert data[0].dtype == np.float64
    np.testing.assert_array_equal(jax.random.key_data(KEY), [0, 0])


def test_integer_leaves_are_passed_over():
    params = PARAMS | {"num_steps": jnp.int32(3)}
    assert "trial" in trained(params=params, optimizer=optax.adam(0.01)).measurements


def test_interventions_switched_off():
    report = trained()
    assert report.skipped["interventions"] == "switched off"
    assert report.ruled_out == ()


def test_keys_of_the_old_kind():
    assert "trial" in trained(key=jax.random.PRNGKey(0)).measurements


def test_one_example():
    report = trained(data=(INPUTS[:1], TARGETS[:1]), batch_size=1)
    assert "trial" in report.measurements


def test_fewer_examples_than_the_usual_batch():
    report = ns.checkup(
        apply_fn, LOSS_FN, PARAMS, (INPUTS[:4], TARGETS[:4]), key=KEY, num_steps=5
    )
    assert report.skipped["trial"].startswith("no optimizer")
    with pytest.raises(ValueError, match="batch_size must be from 1 to the 4 examples"):
        checkup(data=(INPUTS[:4], TARGETS[:4]), batch_size=33)


def test_all_of_more_examples_than_are_looked_at(monkeypatch):
    monkeypatch.setattr("nnsanity.trials.problem.MAX_EXAMPLES", 20)
    report = checkup(batch_size=40)
    assert "trial" in report.skipped


def test_what_is_said_of_the_data_is_said_of_all_of_them(monkeypatch):
    monkeypatch.setattr("nnsanity.trials.problem.MAX_EXAMPLES", 20)
    report = trained(batch_size=16)
    assert "on 20 of the 40 examples," in report.summary
    (rest,) = (one for one in report.findings if one.rule == "batch-size/not-divisible")
    assert rest.message == "The 40 examples leave a last batch of 8."
    whole = trained(batch_size=40)
    assert "batch-size/not-divisible" not in rules(whole)


class Pair(NamedTuple):
    inputs: np.ndarray
    targets: np.ndarray


def test_data_with_names():
    data = Pair(INPUTS.astype(np.float64) + 1e8, TARGETS)
    assert "normalization/rounded" in rules(checkup(data=data))


def test_progress_is_a_function():
    with pytest.raises(TypeError, match="progress must be like print, got True"):
        checkup(progress=True)


def test_ignored_rules_are_a_list():
    with pytest.raises(TypeError, match="ignore must be a list of rules, got 'width"):
        checkup(ignore="width/redundant")


@pytest.mark.slow
def test_no_targets_and_nothing_learned():
    report = checkup(
        loss_fn=lambda params, batch: 1 + 0 * jnp.sum(apply_fn(params, batch[0])),
        data=(INPUTS, None),
        optimizer=optax.sgd(0.01),
        num_steps=60,
    )
    assert "share by which the loss fell" in report.summary
