import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnsanity as ns
from nnsanity.trials.loss_repairs import loss_repairs
from nnsanity.trials.problem import checked_problem

RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(200, 4)).astype(np.float32)
SLOPES = np.array([1, -0.5, 0.5, -1])
NUMBERS = np.tanh(INPUTS @ SLOPES)[:, None].astype(np.float32)
LABELS = np.argmax(INPUTS[:, :3], axis=1)
ONE_HOT = np.eye(3, dtype=np.float32)[LABELS]
YES = (NUMBERS > 0).astype(np.float32)


def network(head):
    def apply_fn(params, x):
        hidden = jnp.tanh(x @ params["w1"] + params["b1"])
        return head(hidden @ params["w2"] + params["b2"])

    return apply_fn


def drawn(outputs):
    keys = jax.random.split(jax.random.key(0))
    return {
        "w1": jax.random.normal(keys[0], (4, 16)) / 2,
        "b1": jnp.zeros(16),
        "w2": jax.random.normal(keys[1], (16, outputs)) / 4,
        "b2": jnp.zeros(outputs),
    }


def same(values):
    return values


def squared(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


def of_labels(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def of_probabilities(outputs, targets):
    return -jnp.mean(jnp.sum(targets * jnp.log(outputs + 1e-7), axis=-1))


def of_logits(outputs, targets):
    return optax.sigmoid_binary_cross_entropy(outputs, targets).mean()


def one_sided(outputs, targets):
    return -jnp.mean(targets * jnp.log(jnp.clip(outputs, 1e-7, 1.0)))


USUAL = {
    "squared error": (same, squared, NUMBERS),
    "its sum": (same, lambda o, t: 200 * squared(o, t), NUMBERS),
    "squared error behind a ReLU": (jax.nn.relu, squared, NUMBERS),
    "labels": (same, of_labels, LABELS),
    "probabilities": (jax.nn.softmax, of_probabilities, ONE_HOT),
    "one logit": (same, of_logits, YES),
}
UNUSUAL = {
    "one-sided": (same, one_sided, NUMBERS),
    "labels as numbers": (same, lambda o, t: squared(o, t[:, None] + 0.0), LABELS),
    "logits as probabilities": (same, of_probabilities, ONE_HOT),
}


def arguments(head, loss, targets):
    apply_fn = network(head)
    outputs = targets.shape[1] if targets.ndim > 1 else 3

    def loss_fn(params, batch):
        return loss(apply_fn(params, batch[0]), batch[1])

    return apply_fn, loss_fn, drawn(outputs), (INPUTS, targets)


def offered(*style):
    problem = checked_problem(
        *arguments(*style),
        key=jax.random.key(1),
        optimizer=optax.adam(0.01),
        batch_size=32,
        num_steps=100,
    )
    return loss_repairs(problem)


@pytest.mark.parametrize("style", USUAL)
def test_the_usual_loss_is_not_repaired(style):
    assert offered(*USUAL[style]) == ()


@pytest.mark.parametrize("style", UNUSUAL)
def test_another_loss_is(style):
    (repair,) = offered(*UNUSUAL[style])
    assert repair.finding.rule == "results/wrong-loss"


@pytest.mark.slow
def test_a_loss_that_asks_for_something_else_leads():
    options = {
        "key": jax.random.key(1),
        "optimizer": optax.adam(0.02),
        "num_steps": 200,
    }
    style = (same, one_sided, NUMBERS)
    report = ns.checkup(*arguments(*style), **options)
    leading = {one.rule: one.message for one in report.findings[:2]}
    assert set(leading) == {"results/unbounded-loss", "results/wrong-loss"}
    assert "Squared error in the place of the loss" in leading["results/wrong-loss"]
    healthy = ns.checkup(*arguments(same, squared, NUMBERS), **options)
    assert [one for one in healthy.findings if one.severity != "info"] == []
