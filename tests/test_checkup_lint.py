"""What lint reads comes first in a checkup, and its suspicions are tried out."""

import jax
import jax.numpy as jnp
import optax
import pytest

import nnsanity as ns

INPUTS = jax.random.normal(jax.random.key(0), (160, 3))
CLASSES = (INPUTS[:, 0] > 0).astype(int) + 2 * (INPUTS[:, 1] > 0)
PARAMS = {"w": 0.1 * jax.random.normal(jax.random.key(1), (3, 4)), "b": jnp.zeros(4)}


def check(head, loss, targets, params=PARAMS, rate=0.3, **options):
    def apply_fn(params, x):
        return head(x @ params["w"] + params["b"])

    return ns.checkup(
        apply_fn,
        lambda params, batch: loss(apply_fn(params, batch[0]), batch[1]).mean(),
        params,
        (INPUTS, targets),
        key=jax.random.key(2),
        optimizer=optax.sgd(rate),
        num_steps=60,
        **options,
    )


cross_entropy = optax.softmax_cross_entropy_with_integer_labels


@pytest.mark.slow
@pytest.mark.parametrize("head", [jax.nn.softmax, lambda x: x])
def test_a_softmax_twice_leads_and_one_is_fine(head):
    report = check(head, cross_entropy, CLASSES)
    rules = [one.rule for one in report.findings if one.severity != "info"]
    if head is jax.nn.softmax:
        assert rules[0] == "final-activation/double-softmax"
        assert report.findings[0].severity == "error"
        assert report.findings[0].where.startswith("test_checkup_lint.py:")
    else:
        assert rules == []


@pytest.mark.slow
def test_a_suspicion_becomes_a_cause_where_its_repair_helps():
    params = {"w": jnp.zeros((3, 1)), "b": -jnp.ones(1)}  # never positive
    targets = jnp.abs(INPUTS[:, :1]) + INPUTS[:, 1:2] + 3
    head = lambda x: jax.nn.relu(x)  # noqa: E731
    report = check(head, lambda y, t: (y - t) ** 2, targets, params, 0.05)
    (found,) = [one for one in report.findings if one.rule.endswith("relu-head")]
    assert found.severity == "error"
    assert "leaving out the last activation" in found.message.lower()


def test_a_suspicion_stays_one_where_the_network_learns():
    params = {"w": jnp.zeros((3, 1)), "b": jnp.ones(1)}
    targets = 5 + INPUTS[:, :1]
    report = check(jax.nn.relu, lambda y, t: (y - t) ** 2, targets, params, 0.05)
    (found,) = [one for one in report.findings if one.rule.endswith("relu-head")]
    assert found.severity == "info"
    assert [one for one in report.findings if one.severity != "info"] == []


def test_noise_and_mixing_are_told():
    def head(x):
        noise = jax.random.normal(jax.random.key(3), x.shape)
        return x - x.mean(0) + 0.001 * noise

    report = check(head, cross_entropy, CLASSES, interventions=False)
    rules = {one.rule for one in report.findings if one.severity == "warning"}
    assert rules == {"regularization/noise-at-evaluation", "results/mixes-examples"}
