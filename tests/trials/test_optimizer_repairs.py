import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnsanity as ns
from nnsanity.quantities.clipping import scales_with_weights, update_degree
from nnsanity.trials.optimizer_repairs import (
    WITHOUT_CLIPPING,
    WITHOUT_DECAY,
    optimizer_repairs,
)
from nnsanity.trials.problem import checked_problem

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
INPUTS = jnp.asarray(RNG.normal(size=(200, 4)), jnp.float32)
TARGETS = INPUTS @ jnp.array([[1.0], [-2.0], [0.5], [1.5]])
PARAMS = {
    "w": jnp.asarray(RNG.normal(size=(4, 16)) / 2, jnp.float32),
    "b": jnp.zeros(16),
    "v": jnp.asarray(RNG.normal(size=(16, 1)) / 4, jnp.float32),
}


def apply_fn(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]


def loss_fn(params, batch):
    return jnp.mean((apply_fn(params, batch[0]) - batch[1]) ** 2)


def checked(optimizer, targets=TARGETS, **options):
    return ns.checkup(
        apply_fn,
        loss_fn,
        PARAMS,
        (INPUTS, targets),
        key=jax.random.key(0),
        optimizer=optimizer,
        num_steps=300,
        **options,
    )


def rules(report, *severities):
    return [one.rule for one in report.findings if one.severity in severities]


@pytest.mark.slow
def test_too_much_decay_is_a_cause():
    report = checked(optax.adamw(1e-2, weight_decay=50.0))
    assert report.findings[0].rule == "regularization/too-strong"
    assert report.findings[0].where == "optimizer"
    assert "weight decay" in report.findings[0].message
    np.testing.assert_allclose(report.measurements["weight_decay"], [0, 0.5, 0.5], 1e-5)


@pytest.mark.slow
def test_a_limit_that_is_too_low_is_a_cause():
    chain = optax.chain(optax.clip_by_global_norm(1e-4), optax.sgd(0.1))
    report = checked(chain)
    found = {one.rule: one for one in report.findings}["learning-rate/clipping-active"]
    assert found.severity in ("error", "warning")
    assert found.measured == 1
    assert report.findings[0].rule in (found.rule, "learning-rate/too-low")


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [
        optax.chain(optax.clip_by_global_norm(50.0), optax.adamw(1e-2)),
        optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.05, momentum=0.9)),
    ],
)
def test_healthy_optimizers_stay_silent(optimizer):
    report = checked(optimizer)
    assert rules(report, "error", "warning") == []
    assert "regularization/none" not in rules(report, "info")
    assert "learning-rate/clipping-active" not in rules(report, "info")
    assert "batch-size/not-divisible" in rules(report, "info")
    assert "regularization/no-validation" in rules(report, "info")


@pytest.mark.slow
def test_a_schedule_that_ends_early_is_a_cause():
    ends = optax.cosine_decay_schedule(1e-2, decay_steps=8)  # epochs, not steps
    report = checked(optax.adam(ends))
    assert report.findings[0].rule == "learning-rate/decays-early"
    assert "Keeping the learning rate at its peak" in report.findings[0].message
    assert report.findings[0].severity in ("error", "warning")


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule",
    [
        optax.cosine_decay_schedule(2e-2, decay_steps=300),
        optax.warmup_exponential_decay_schedule(0.0, 3e-2, 20, 100, 0.3),
    ],
)
def test_healthy_schedules_stay_silent(schedule):
    report = checked(optax.adam(schedule))
    assert rules(report, "error", "warning") == []
    assert "learning-rate/decays-early" not in rules(report, "info")


@pytest.mark.slow
def test_outliers_are_named():
    targets = TARGETS.at[jnp.array([17, 90])].set(300.0)
    found = {one.rule: one for one in checked(optax.adam(1e-2), targets).findings}
    found = found["learning-rate/outlier-examples"]
    assert found.where in ("examples 17, 90", "examples 90, 17")
    assert found.measured > 0.9


@pytest.mark.slow
def test_what_is_there_is_not_missed():
    split = (INPUTS[:192], TARGETS[:192])
    report = ns.checkup(
        apply_fn,
        loss_fn,
        PARAMS,
        split,
        key=jax.random.key(0),
        optimizer=optax.adam(1e-2),
        num_steps=20,
        validation=(INPUTS[192:], TARGETS[192:]),
        interventions=False,
    )
    notes = rules(report, "info")
    assert "regularization/none" in notes
    assert "regularization/no-validation" not in notes
    assert "batch-size/not-divisible" not in notes


@pytest.mark.parametrize(
    ("optimizer", "degree"),
    [
        (optax.sgd(0.1, momentum=0.9), 1),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), 0),
        (optax.rmsprop(1e-3), 0),
        (optax.MultiSteps(optax.sgd(0.1), 4), 1),
    ],
)
def test_degree(optimizer, degree):
    assert abs(update_degree(optimizer, PARAMS, size=0.05) - degree) < 0.02


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (optax.adamw(1e-3, weight_decay=0.5), False),
        (optax.chain(optax.add_decayed_weights(0.1), optax.adam(1e-3)), False),
        (optax.sgd(0.1), False),
        (optax.lamb(1e-3), True),
        (optax.adaptive_grad_clip(0.1), True),
    ],
)
def test_who_looks_at_the_weights(optimizer, expected):
    params = jax.tree.map(lambda leaf: leaf + 2, PARAMS)
    assert bool(scales_with_weights(optimizer, params)) is expected


def test_a_loss_that_needs_its_own_batch_size_is_told():
    size = len(INPUTS)

    def fixed_loss_fn(params, batch):
        errors = (apply_fn(params, batch[0]) - batch[1])[:, 0]
        return jnp.mean(errors.reshape(-1, 2) ** 2)

    report = ns.checkup(
        apply_fn,
        fixed_loss_fn,
        PARAMS,
        (INPUTS, TARGETS),
        key=jax.random.key(0),
        optimizer=optax.adam(1e-2),
        num_steps=10,
        batch_size=size // 10,
        interventions=False,
    )
    assert "reshape" in report.skipped["outlier_examples"]


def by_square_roots(updates, state, params=None):
    """Clips, then takes roots: unclipped updates grow with the root of gradients."""
    root = lambda one: jnp.sign(one) * jnp.sqrt(jnp.abs(jnp.clip(one, -1, 1)))  # noqa: E731
    return jax.tree.map(root, updates), state


@pytest.mark.parametrize(
    ("optimizer", "name", "reason"),
    [
        (
            optax.chain(
                optax.adaptive_grad_clip(0.1),
                optax.add_decayed_weights(1e-3),
                optax.sgd(0.1),
            ),
            WITHOUT_DECAY,
            "for more than decay",
        ),
        (
            optax.GradientTransformation(lambda params: (), by_square_roots),
            WITHOUT_CLIPPING,
            "to the power 0.50",
        ),
        (
            optax.GradientTransformation(lambda params: (), lambda *_: 1 / 0),
            WITHOUT_DECAY,
            "ZeroDivisionError",
        ),
        (optax.sgd(0.1), None, None),
    ],
)
def test_what_can_not_be_left_out_is_told(optimizer, name, reason):
    problem = checked_problem(
        apply_fn,
        loss_fn,
        jax.tree.map(lambda leaf: leaf + 2, PARAMS),
        (INPUTS, TARGETS),
        key=jax.random.key(0),
        optimizer=optimizer,
        batch_size=32,
        num_steps=10,
    )
    skipped = {}
    repairs = optimizer_repairs(problem, skipped)
    assert all(one.name not in skipped for one in repairs)
    if name is None:
        assert skipped == {}
    else:
        assert reason in skipped[name]
