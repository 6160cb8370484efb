import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnsanity as ns

RNG = np.random.default_rng(0)
KEY = jax.random.key(1)
INPUTS = RNG.normal(size=(200, 4)).astype(np.float32)
SLOPES = np.array([1, -0.5, 0.5, -1])
NUMBERS = (np.tanh(INPUTS @ SLOPES) + 0.05 * RNG.normal(size=200)).astype(np.float32)
NUMBERS = NUMBERS[:, None]
SHUFFLED = RNG.permutation(NUMBERS)
NAN_INPUTS = np.where(INPUTS > 2, np.nan, INPUTS)


def drawn(*widths, seed=0):
    keys = jax.random.split(jax.random.key(seed), len(widths) - 1)
    normal = jax.nn.initializers.glorot_normal()
    return [
        {"w": normal(key, shape), "b": jnp.zeros(shape[1])}
        for key, *shape in zip(keys, widths[:-1], widths[1:], strict=True)
    ]


def network(hidden=jax.nn.relu):
    def apply_fn(params, x):
        *layers, last = params
        for layer in layers:
            x = hidden(x @ layer["w"] + layer["b"])
        return x @ last["w"] + last["b"]

    return apply_fn


MLP = network()
ROUNDED = network(jnp.round)
PARAMS = drawn(4, 16, 1)
BURIED = [PARAMS[0] | {"b": jnp.full(16, -100.0)}, PARAMS[1]]


def squared_error(apply_fn):
    return lambda params, batch: jnp.mean((apply_fn(params, batch[0]) - batch[1]) ** 2)


def negated(params, batch):
    return -jnp.mean((MLP(params, batch[0]) - batch[1]) ** 2)


HEALTHY = {
    "apply_fn": MLP,
    "loss_fn": squared_error(MLP),
    "params": PARAMS,
    "data": (INPUTS, NUMBERS),
    "key": KEY,
    "optimizer": optax.adam(0.02),
    "num_steps": 300,
}


@functools.cache
def healthy():
    lines = []
    return ns.checkup(**HEALTHY, progress=lines.append), lines


def checkup(**changes):
    return ns.checkup(**(HEALTHY | changes))


def rules(report, *severities):
    severities = severities or ("error", "warning", "info")
    return [one.rule for one in report.findings if one.severity in severities]


def test_a_healthy_program_is_clean():
    report, _ = healthy()
    assert rules(report, "error", "warning") == []
    assert report.summary.startswith("The network learns")
    report.raise_for("warning")


def test_what_is_not_built_is_said():
    report = checkup(optimizer=None)
    assert {"trial"} <= set(report.skipped)
    assert all(
        "not" in report.skipped[name] or "no " in report.skipped[name]
        for name in report.skipped
    )
    assert "Not run" in str(report)


def test_progress_is_told():
    report, lines = healthy()
    assert lines == [
        "reading the program",
        "measuring the data and the untrained network",
        "training for 300 steps",
    ]
    assert isinstance(report, ns.Report)


PROOFS = {
    "shuffled targets": (
        {"data": (INPUTS, SHUFFLED), "num_steps": 30},
        "results/uninformative-targets",
        "deviations from chance",
    ),
    "negated loss": (
        {"loss_fn": negated, "num_steps": 60},
        "results/unbounded-loss",
        "rated worse",
    ),
    "rounded hidden layer": (
        {"apply_fn": ROUNDED, "loss_fn": squared_error(ROUNDED)},
        "gradients/blocked",
        "",
    ),
    "NaN": ({"data": (NAN_INPUTS, NUMBERS)}, "normalization/nonfinite-input", ""),
    "broadcast": (
        {"data": (INPUTS, NUMBERS[:, 0])},
        "results/broadcast-loss",
        "compares every output with the targets of all examples",
    ),
    "another scale": (
        {"validation": (INPUTS * 255, NUMBERS), "optimizer": None},
        "normalization/split-mismatch",
        "",
    ),
}


@pytest.mark.parametrize("name", PROOFS)
def test_proofs_and_contradictions_lead(name):
    changes, rule, words = PROOFS[name]
    report = checkup(**changes)
    first = report.findings[0]
    severity = "warning" if name == "another scale" else "error"
    assert (first.rule, first.severity) == (rule, severity)
    assert words in first.message
    with pytest.raises(ns.DiagnosisError, match=rule):
        report.raise_for(severity)


def test_validation_prepared_alike_is_healthy():
    validation = RNG.normal(size=(50, 4)).astype(np.float32), NUMBERS[:50]
    report = checkup(validation=validation, optimizer=None)
    assert "normalization/split-mismatch" not in rules(report)


def test_ignored_rules_are_not_reported():
    changes = {"params": drawn(4, 16, 1, seed=1), "optimizer": None}
    data = 1000 * INPUTS, NUMBERS
    report = checkup(data=data, **changes)
    rule = "normalization/unnormalized-inputs"
    assert rule in rules(report)
    rest = [one for one in report.findings if one.rule != rule]
    assert list(checkup(data=data, **changes, ignore=[rule]).findings) == rest


def test_other_limits():
    data = 1000 * INPUTS, NUMBERS
    (found,) = (
        one
        for one in checkup(data=data, optimizer=None).findings
        if one.rule == "results/start-loss"
    )
    limits = {"results/start-loss": found.measured * 1.01}
    report = checkup(data=data, optimizer=None, limits=limits)
    assert "results/start-loss" not in rules(report)
    limits = {"results/start-loss": found.measured * 0.99}
    report = checkup(data=data, optimizer=None, limits=limits)
    (found,) = (one for one in report.findings if one.rule == "results/start-loss")
    assert found.limit == limits["results/start-loss"]


@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        ("normalization/unnormalized-inputs", {"data": (1000 * INPUTS, NUMBERS)}),
        ("gradients/dead-units", {"params": BURIED}),
    ],
)
def test_every_limit_can_be_set(rule, changes):
    assert rule in rules(checkup(**changes, optimizer=None))
    report = checkup(**changes, optimizer=None, limits={rule: 1e30})
    assert rule not in rules(report)


@pytest.mark.slow
def test_the_same_key_gives_the_same_report():
    changes = {"optimizer": optax.sgd(100.0), "num_steps": 60}
    first, second = (checkup(**changes).to_dict() for _ in range(2))
    assert first == second
    assert first["findings"]
    other = checkup(**changes, key=jax.random.key(2)).to_dict()
    assert first["measurements"]["trial"] != other["measurements"]["trial"]


@pytest.mark.slow
def test_unexplained_failure_names_what_was_ruled_out():
    def constant(params, x):
        return MLP(params, x) * 0 + params[-1]["b"]

    report = checkup(apply_fn=constant, loss_fn=squared_error(constant), num_steps=60)
    assert rules(report, "error") + rules(report, "warning")
    assert report.ruled_out
    assert report.summary.startswith("The network does not learn")


def test_a_linear_model_has_no_hidden_layer_to_judge():
    targets = INPUTS @ jnp.array([[1.0], [-0.5], [0.5], [-1.0]])
    report = checkup(params=drawn(4, 1), data=(INPUTS, targets))
    assert rules(report, "error", "warning") == []
    assert "does not" not in report.summary
