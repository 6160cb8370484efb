"""Which repairs are a matter of choice, and which rates follow others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nnsanity.findings import Finding
from nnsanity.trials.arms import Arm
from nnsanity.trials.every_repair import combinations, every_repair
from nnsanity.trials.interventions import _is_next
from nnsanity.trials.problem import checked_problem

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 4)).astype(np.float32)
PARAMS = {"first": jnp.asarray(RNG.normal(size=(4, 8))), "last": jnp.ones((8, 1)) / 8}


def apply_fn(params, x):
    return jax.nn.relu(x @ params["first"]) @ params["last"]


def loss_fn(params, batch):
    return jnp.mean(jnp.abs(apply_fn(params, batch[0]) - batch[1]) ** 3)


@functools.cache
def repairs(*rules):
    problem = checked_problem(
        apply_fn,
        loss_fn,
        PARAMS,
        (X, X[:, :1] * X[:, 1:2]),
        key=jax.random.key(0),
        optimizer=optax.sgd(0.1),
        batch_size=64,
        num_steps=10,
    )
    found = [Finding(rule, 1, "info", "", 16.0, 16.0, "", "") for rule in rules]
    suspected = {one.rule: one for one in found}
    return every_repair(problem, suspected=suspected, skipped={})


@pytest.mark.parametrize(
    ("group", "rules", "is_free"),
    [
        ("batch", (), True),
        ("batch", ("initialization/off-scale",), True),
        ("batch", ("batch-size/too-large",), False),
        ("weights", (), True),
        ("weights", ("batch-size/too-large",), True),
        ("weights", ("initialization/off-scale",), False),
        ("rate", ("learning-rate/diverges",), True),
        ("loss", (), True),
        ("inputs", (), True),  # they are standardized
        ("inputs", ("normalization/scale-disparity",), False),
        ("targets", ("normalization/scale-disparity",), True),
        ("targets", ("normalization/unnormalized-targets",), False),
        ("hidden", (), False),
    ],
)
def test_what_was_measured_to_be_off_is_no_matter_of_choice(group, rules, is_free):
    chosen = [one for one in repairs(*rules) if one.group == group]
    assert chosen
    assert all(one.is_free is is_free for one in chosen)


def arm(level, name=None):
    done = [one for one in repairs() if one.name == name]
    return Arm(tuple(done), *[np.array([level])] * 3, 10)


@pytest.mark.parametrize(
    ("before", "nearer", "is_next"),
    [(-0.1, -0.1, True), (0.2, 0.6, True), (0.2, 0.1, False), (0.2, 0.95, False)],
)
def test_a_far_rate_follows_the_nearer_one_where_that_did_no_harm(
    before, nearer, is_next
):
    (far,) = (one for one in repairs() if one.name.startswith("10,000 times"))
    tried = [arm(0.9, "0.01 times the learning rate"), arm(nearer, far.follows)]
    assert far.follows == "100 times the learning rate"
    assert _is_next(arm(before), far, tried) is is_next
    assert not _is_next(arm(before), far, tried[:1])
    (near,) = (one for one in repairs() if one.name == far.follows)
    assert _is_next(arm(before), near, [])
    assert all(one.follows is None for some in combinations(repairs()) for one in some)


LINEAR = {"w": jnp.asarray(RNG.normal(size=(4, 1)), jnp.float32)}
CODED = np.column_stack([X[:, :3], np.arange(64) % 8]).astype(np.float32)
JUMPS = (np.array([3.0, -2, 5, 0, -4, 1, 4, -1])[np.arange(64) % 8])[:, None]


def linear(params, x):
    return x @ params["w"]


def one_layer_problem(optimizer):
    return checked_problem(
        linear,
        lambda params, batch: jnp.mean((linear(params, batch[0]) - batch[1]) ** 2),
        LINEAR,
        (CODED, JUMPS.astype(np.float32)),
        key=jax.random.key(0),
        optimizer=optimizer,
        batch_size=16,
        num_steps=10,
    )


def test_columns_and_a_hidden_layer_are_not_made_together():
    problem = one_layer_problem(optax.sgd(0.1))
    found = every_repair(problem, suspected={}, skipped={})
    groups = {one.group for one in found}
    assert {"columns", "depth"} <= groups
    for chosen in combinations(found):
        assert {"columns", "depth"} - {one.group for one in chosen}
        for one in chosen:  # and each set can be made
            problem = problem if one.rewrite is None else one.rewrite(problem)


def test_an_optimizer_that_holds_arrays_of_the_users_shapes():
    mask = jax.tree.map(jnp.ones_like, LINEAR)
    masked = optax.stateless(
        lambda updates, _: jax.tree.map(jnp.multiply, updates, mask)
    )
    skipped = {}
    problem = one_layer_problem(optax.chain(masked, optax.adam(0.1)))
    found = every_repair(problem, suspected={}, skipped=skipped)
    assert not {"columns", "depth"} & {
        one.group for one in found if one.rewrite is not None
    }
    told = [reason for name, reason in skipped.items() if "hidden layer" in name]
    assert len(told) == 1
    assert "shape" in told[0]


def test_an_optimizer_that_evaluates_the_loss_gets_longer_parameters():
    skipped = {}
    problem = one_layer_problem(optax.lbfgs())
    found = every_repair(problem, suspected={}, skipped=skipped)
    assert "depth" in {one.group for one in found}
    assert not [name for name in skipped if "hidden layer" in name]
