import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnsanity as ns
from nnsanity.checks.batch_size import suggested_size
from nnsanity.trials.batch_noise import _reason, measure_batch_noise
from nnsanity.trials.interventions import train_original
from nnsanity.trials.problem import checked_problem
from nnsanity.trials.trial import mid_descent, prepare

RNG = np.random.default_rng(0)
INPUTS = np.float32(RNG.normal(size=(2000, 5)))
TARGETS = np.float32(INPUTS @ [[1.0], [-2], [0.5], [1], [2]])
TARGETS += np.float32(0.5 * RNG.normal(size=TARGETS.shape))
PARAMS = {"w": jnp.zeros((5, 1)), "b": jnp.zeros(1)}


def apply_fn(params, x):
    return x @ params["w"] + params["b"]


def loss_fn(params, batch):
    return jnp.mean((apply_fn(params, batch[0]) - batch[1]) ** 2)


def normalized(params, batch):
    outputs = apply_fn(params, batch[0])
    outputs = (outputs - outputs.mean()) / jnp.sqrt(outputs.var() + 0.1)
    return jnp.mean((outputs - batch[1]) ** 2)


def measured(loss_fn=loss_fn, data=(INPUTS, TARGETS), rate=0.05, num_seeds=2):
    problem = checked_problem(
        apply_fn,
        loss_fn,
        PARAMS,
        data,
        key=jax.random.key(0),
        optimizer=optax.sgd(rate),
        batch_size=20,
        num_steps=40,
    )
    trial = prepare(problem, jax.random.key(1), num_steps=40, batch_size=20)
    outcomes = train_original(problem, trial, jax.random.key(2))[:num_seeds]
    return measure_batch_noise(problem, trial, outcomes), outcomes


def test_noise_in_mid_descent_against_float64():
    x = INPUTS[:900].astype("f8")
    y = TARGETS[:900] + 4 * RNG.normal(size=(900, 1))
    found, outcomes = measured(data=(INPUTS[:900], np.float32(y)))
    mark = mid_descent(outcomes[0].losses)
    share = outcomes[0].losses[mark] / outcomes[0].losses[0]
    assert 0.2 < share < 0.9
    weights, bias = (np.asarray(outcomes[1].kept[name], "f8") for name in "wb")
    assert not np.allclose(weights, outcomes[1].params["w"])
    slopes = 2 * (x @ weights + bias - y)
    rows = np.concatenate([slopes * x, slopes], 1)
    trace = rows.var(0, ddof=1).sum()
    scale = trace / (np.sum(rows.mean(0) ** 2) - trace / 900)
    noise = found.measurements["noise_scale"]
    assert float(noise.noise_scale) == pytest.approx(scale, rel=1e-3)
    (suggested,) = found.findings
    assert suggested.rule == "batch-size/suggested"
    error = float(noise.standard_error)
    assert suggested.limit == pytest.approx(4 * (scale + 2 * error), rel=1e-3)
    assert f"After {4 * mark} steps" in suggested.message
    assert found.skipped == {}


@pytest.mark.parametrize(
    ("options", "name", "reason"),
    [
        ({"rate": 0.0}, "noise_scale", "the loss does not fall"),
        ({"rate": 1e9}, "noise_scale", "the loss does not fall"),
        ({"num_seeds": 1}, "noise_scale", "takes too long"),
        ({"rate": 0.2}, "noise_scale", "too fast"),
        ({"loss_fn": normalized, "rate": 0.001}, "noise_scale", "ValueError"),
    ],
)
def test_what_is_not_told_has_a_reason(options, name, reason):
    found, _ = measured(**options)
    assert found.findings == ()
    assert reason in found.skipped[name]


def test_a_gradient_lost_in_noise():
    """Few examples with equal and opposite gradients around the mean of the data."""
    targets = np.tile(np.float32([[100.0], [-100.0]]), (100, 1)) + 1
    found, _ = measured(data=(0 * INPUTS[:200], targets), rate=1e-3)
    reasons = {"the loss does not fall", "is lost in its noise"}
    assert any(one in found.skipped["noise_scale"] for one in reasons)
    assert found.findings == ()


@pytest.mark.parametrize(
    ("scale", "error", "words"),
    [
        (np.nan, np.nan, "not finite after 4 steps"),
        (np.inf, np.inf, "of 9 examples is lost in its noise"),
        (3.0, np.inf, "9 examples leave no error bar"),
    ],
)
def test_why_there_is_no_number(scale, error, words):
    assert words in _reason(ns.NoiseScale(scale, 1.0, 1.0, error), 9, 4)


def checkup(batch_size, num_steps, **options):
    return ns.checkup(
        apply_fn,
        loss_fn,
        PARAMS,
        (INPUTS, TARGETS),
        key=jax.random.key(0),
        optimizer=optax.sgd(0.02),
        batch_size=batch_size,
        num_steps=num_steps,
        **options,
    )


def of_batch_size(report):
    return {one.rule: one for one in report.findings if one.item == 5}


@pytest.mark.slow
def test_a_batch_far_beyond_the_noise_is_a_cause():
    """16 % of the data, which by itself is no suspicion."""
    found = of_batch_size(checkup(320, 20))["batch-size/too-large"]
    assert found.severity in ("error", "warning")
    assert (found.measured, "standard error" in found.message) == (320, True)
    size = suggested_size(found.limit, 2000)
    assert f"Training in batches of {size} takes the explained" in found.message


@pytest.mark.slow
def test_as_many_examples_in_small_batches_are_clean():
    report = checkup(16, 400)
    assert [one for one in report.findings if one.severity != "info"] == []
    assert "too fast" in report.skipped["noise_scale"]
