"""What a monitor says: planted faults, and their healthy twins."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnsanity as ns
from nnsanity.monitor.watch import monitor as make_monitor
from tests.monitor.watched import (
    BATCH,
    KEY,
    NAMES,
    PARAMS,
    X,
    Y,
    init_mlp,
    mlp_loss,
    start,
    watched_step,
)


def batch_at(key, step, data=(X, Y), size=32):
    rows = jax.random.randint(jax.random.fold_in(key, step), (size,), 0, len(data[0]))
    return jax.tree.map(lambda leaf: leaf[rows], data)


def train(
    loss_fn,
    params,
    tx,
    *,
    watch=None,
    steps=1000,
    data=(X, Y),
    break_batch=lambda batch, step: batch,
    scale=lambda step: 1.0,
):
    """Trains in one scan, and returns the monitor and its last state."""
    watch = watch or make_monitor()
    step = watched_step(watch, loss_fn, tx)

    def turn(carry, index):
        batch = break_batch(batch_at(KEY, index, data), index)
        return step(carry, batch, scale(index)), None

    @jax.jit
    def run(carry):
        return jax.lax.scan(turn, carry, jnp.arange(steps))[0]

    batch = batch_at(KEY, 0, data)
    return watch, run(start(watch, loss_fn, params, tx, batch))[0]


def found(watch, state):
    return [finding.rule for finding in watch.diagnose(state)]


def cnn_loss(params, batch):
    def convolved(images, weights):
        return jax.lax.conv_general_dilated(
            images,
            weights,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    hidden = jax.nn.relu(convolved(batch[0], params["conv1"]))
    hidden = jax.nn.relu(convolved(hidden, params["conv2"]))
    logits = hidden.mean((1, 2)) @ params["head"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
    return losses.mean()


def cnn():
    keys = jax.random.split(KEY, 4)
    params = {
        "conv1": jax.random.normal(keys[0], (3, 3, 1, 8)) * np.sqrt(2 / 9),
        "conv2": jax.random.normal(keys[1], (3, 3, 8, 8)) * np.sqrt(2 / 72),
        "head": jax.random.normal(keys[2], (8, 2)) * np.sqrt(1 / 8),
    }
    labels = jnp.arange(128) % 2
    stripes = jnp.where(jnp.arange(6) % 2 == 0, 1.0, -1.0)
    images = jnp.where(labels[:, None, None] == 0, stripes[:, None], stripes[None])
    noise = jax.random.normal(keys[3], (128, 6, 6))
    return params, (images[..., None] + noise[..., None], labels)


def rnn_loss(params, batch):
    def turn(hidden, x):
        hidden = jnp.tanh(x @ params["input"] + hidden @ params["again"])
        return hidden, None

    hidden = jnp.zeros((len(batch[0]), 16))
    hidden, _ = jax.lax.scan(turn, hidden, batch[0].swapaxes(0, 1))
    return jnp.mean((hidden @ params["head"] - batch[1]) ** 2)


def rnn():
    keys = jax.random.split(KEY, 4)
    params = {
        "again": jnp.eye(16) * 0.9,
        "head": jax.random.normal(keys[0], (16, 1)) / 4,
        "input": jax.random.normal(keys[1], (1, 16)),
    }
    series = jax.random.normal(keys[2], (256, 6, 1))
    return params, (series, series.mean(1))


def with_dead_units(params, num_dead):
    return {**params, "b1": params["b1"].at[:num_dead].set(-100.0)}


WARM_UP = optax.warmup_cosine_decay_schedule(0.0, 0.1, 100, 1000)
SEPARABLE = X, (X[:, :1] > 0).astype(jnp.float32)


def logistic_loss(params, batch):
    hidden = jax.nn.relu(batch[0] @ params["w1"] + params["b1"][None])
    logits = hidden @ params["w2"] + params["b2"][None]
    return optax.sigmoid_binary_cross_entropy(logits, batch[1]).mean()


HEALTHY = {
    "adam": (mlp_loss, PARAMS, (X, Y), optax.adam(1e-2)),
    "momentum, warm-up": (mlp_loss, PARAMS, (X, Y), optax.sgd(WARM_UP, 0.9)),
    "separable": (logistic_loss, PARAMS, SEPARABLE, optax.sgd(0.3, 0.9)),
    "cnn": (cnn_loss, *cnn(), optax.adam(3e-3)),
    "rnn": (rnn_loss, *rnn(), optax.adam(3e-3)),
    "few dead": (
        mlp_loss,
        with_dead_units(init_mlp(KEY, 64), 6),
        (X, Y),
        optax.adam(1e-3),
    ),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_is_silent(name):
    loss_fn, params, data, tx = HEALTHY[name]
    watch, state = train(loss_fn, params, tx, data=data)
    assert watch.diagnose(state) == ()
    seen = watch.read(state)
    assert int(seen.step) == int(seen.num_watched) == 1000
    assert float(seen.loss_average) < 0.9 * float(seen.loss_start)


@pytest.mark.parametrize("every", [1, 16])
@pytest.mark.parametrize(
    "tx", [optax.adam(1e-2), optax.sgd(0.05, 0.9)], ids=["adam", "momentum"]
)
def test_a_rate_that_jumps(tx, every):
    watch, state = train(
        mlp_loss,
        PARAMS,
        tx,
        watch=make_monitor(every=every),
        scale=lambda step: jnp.where(step < 200, 1.0, 100.0),
    )
    finding, seen = watch.diagnose(state)[0], watch.read(state)
    assert finding.rule == "learning-rate/too-high"
    if every > 1 and not jnp.isfinite(seen.loss):  # between two looks
        assert "at step 201, and" in finding.message
        assert "before step 201" in finding.advice
        assert "since step 201" in watch.diagnose(state)[1].message
        return
    assert finding.severity in ("warning", "info")
    assert finding.measured > finding.limit
    assert finding.where in NAMES
    assert int(seen.spike.step) == 201
    assert f"step {seen.spike.step}" in finding.message


def nan_in(part):
    def broken(batch, step):
        value = batch[part].at[0].set(jnp.nan)
        value = jnp.where(step == 300, value, batch[part])
        return tuple(value if one == part else batch[one] for one in (0, 1))

    return broken


def test_a_batch_with_nan_among_its_inputs():
    watch, state = train(mlp_loss, PARAMS, optax.adam(1e-2), break_batch=nan_in(0))
    (finding,) = watch.diagnose(state)
    assert (finding.rule, finding.severity) == ("results/nonfinite", "error")
    assert finding.where == "w1"
    assert "first in step 300" in finding.message
    assert "from w1 on (2 layers)" in finding.message
    assert "parameters were still finite" in finding.message
    assert "inputs in the batch of step 300" in finding.advice


def test_a_batch_with_nan_among_its_targets():
    watch, state = train(mlp_loss, PARAMS, optax.adam(1e-2), break_batch=nan_in(1))
    (finding,) = watch.diagnose(state)
    assert finding.rule == "results/nonfinite"
    assert finding.measured == 1 + 4 + 4  # the loss, gradients and updates, no layer
    assert "NaN in the targets of step 300" in finding.advice


@pytest.mark.parametrize("part", [0, 1])
def test_a_batch_with_nan_in_a_step_that_is_not_watched(part):
    watch = make_monitor(every=16)
    watch, state = train(
        mlp_loss, PARAMS, optax.adam(1e-2), watch=watch, break_batch=nan_in(part)
    )
    (finding,) = watch.diagnose(state)
    assert (finding.rule, finding.where) == ("results/nonfinite", "w1")
    # The ReLU stops NaN in the inputs on its way back to the bias.
    num_bad = 4 if part else 3
    assert finding.measured == 1 + 2 * num_bad
    assert f"first in step 300: the loss; the gradients of {num_bad}" in finding.message
    assert "layers were not looked at" in finding.message
    assert "parameters were still finite" in finding.message
    assert "batch of step 300" in finding.advice


def test_an_update_with_nan_in_a_step_that_is_not_watched():
    watch, state = train(
        mlp_loss,
        PARAMS,
        optax.sgd(0.05),
        watch=make_monitor(every=16),
        scale=lambda step: jnp.where(step == 300, jnp.nan, 1.0),
    )
    (finding,) = watch.diagnose(state)
    assert (finding.rule, finding.where) == ("results/nonfinite", "w1")
    assert "first in step 301: the loss" in finding.message
    assert "already before its update" in finding.message
    assert "Look at step 300" in finding.advice


def test_an_optimizer_that_makes_nan_and_one_that_leaves_the_step_out():
    watch = make_monitor()
    state = watch.init(mlp_loss, PARAMS, BATCH)
    (loss, signals), grads = ns.value_and_grad(mlp_loss)(PARAMS, BATCH)
    bad = {**grads, "w2": grads["w2"] * jnp.nan}
    given = {"loss": loss, "signals": signals, "params": PARAMS}
    (finding,) = watch.diagnose(watch.update(state, grads=grads, updates=bad, **given))
    assert (finding.rule, finding.where) == ("gradients/nonfinite", "w2")
    assert finding.severity == "error"
    assert "optimizer" in finding.advice
    (finding,) = watch.diagnose(watch.update(state, grads=bad, updates=grads, **given))
    assert (finding.rule, finding.severity) == ("gradients/nonfinite", "warning")


@pytest.mark.parametrize("drift", [0.0, -0.01])
def test_units_that_die_slowly(drift):
    def loss_fn(params, batch):
        return mlp_loss(params, batch) - drift * params["b1"][:8].sum()

    def drifting(watch):
        tx = optax.chain(optax.sgd(0.05), optax.add_decayed_weights(0.0))
        step = watched_step(watch, mlp_loss, tx)

        def turn(carry, index):
            state, params, opt_state = step(carry, batch_at(KEY, index))
            moved = params["b1"].at[:8].add(drift)
            return (state, {**params, "b1": moved}, opt_state), watch.read(
                state
            ).last_active["w1"]

        carry = start(watch, mlp_loss, PARAMS, tx, BATCH)
        return jax.lax.scan(turn, carry, jnp.arange(1000))

    watch = make_monitor()
    (state, *_), active = jax.jit(lambda: drifting(watch))()
    findings = watch.diagnose(state)
    if not drift:
        assert findings == ()
        return
    (finding,) = findings
    assert (finding.rule, finding.where) == ("gradients/dead-units", "w1")
    dead = 999 - np.asarray(active[-1]) >= 100
    assert finding.measured == dead.mean() >= 0.25
    assert f"after step {np.asarray(active[-1])[dead].max()}" in finding.message
    assert "never" not in finding.message


@pytest.mark.parametrize("activation", [jax.nn.sigmoid, jax.nn.relu])
def test_gradients_that_vanish(activation):
    keys = jax.random.split(KEY, 8)
    params = [jax.random.normal(key, (3, 3)) * np.sqrt(2 / 3) for key in keys]

    def loss_fn(params, batch):
        x = batch[0]
        for weights in params[:-1]:
            x = activation(x @ weights) + (x if activation is jax.nn.relu else 0)
        return jnp.mean(((x @ params[-1])[:, :1] - batch[1]) ** 2)

    tx = optax.sgd(1e-5)
    watch, state = train(loss_fn, params, tx, steps=120)
    vanishes = "gradients/vanishing" in found(watch, state)
    assert vanishes == (activation is jax.nn.sigmoid)


def test_a_rate_too_high_from_the_start():
    watch, state = train(mlp_loss, PARAMS, optax.sgd(1.0), steps=200)
    rate, broken = watch.diagnose(state)
    assert (rate.rule, rate.severity) == ("learning-rate/too-high", "warning")
    assert broken.rule == "gradients/nonfinite"
    assert "learning rate by 10" in broken.advice


def scanned_with_validation(watch, params, data, other, tx, steps=1000, often=50):
    """Trains on few examples, and asks the loss on others now and then."""
    step = watched_step(watch, mlp_loss, tx)

    def turn(carry, index):
        carry = step(carry, data)

        def evaluated(state):
            return watch.validate(state, mlp_loss(carry[1], other))

        is_time = index % often == often - 1
        state = jax.lax.cond(is_time, evaluated, lambda state: state, carry[0])
        return (state, *carry[1:]), None

    @jax.jit
    def run(carry):
        return jax.lax.scan(turn, carry, jnp.arange(steps))[0]

    return run(start(watch, mlp_loss, params, tx, data))[0]


@pytest.mark.parametrize("num_examples", [12, 256])
def test_examples_learned_by_heart(num_examples):
    watch, params = make_monitor(every=16), init_mlp(jax.random.key(4), 64)
    data = X[:num_examples], Y[:num_examples]
    fresh = jax.random.normal(jax.random.key(6), (256, 3))
    other = fresh, jnp.sin(2 * fresh[:, :1])
    state = scanned_with_validation(watch, params, data, other, optax.adam(1e-2))
    findings = watch.diagnose(state)
    if num_examples == 256:
        assert findings == ()
        return
    (finding,) = findings
    assert (finding.rule, finding.severity) == ("regularization/overfitting", "warning")
    lowest = int(watch.read(state).validation.lowest_step)
    assert lowest < 500
    assert lowest % 50 == 49
    assert f"at step {lowest} and rose again" in finding.message
    assert f"parameters of step {lowest}" in finding.advice
    assert finding.measured > finding.limit


def test_a_validation_loss_that_is_no_number():
    watch = make_monitor()
    state = watch.init(mlp_loss, PARAMS, BATCH)
    state = watch.validate(state, jnp.float32(1))
    assert watch.diagnose(state) == ()
    (finding,) = watch.diagnose(watch.validate(state, jnp.float32(jnp.nan)))
    assert (finding.rule, finding.where) == ("results/nonfinite", "validation data")


@pytest.mark.parametrize("every", [1, 16])
def test_a_rate_that_is_right_at_first_and_grows_wrong(every):
    watch, state = train(
        mlp_loss,
        PARAMS,
        optax.sgd(0.05),
        watch=make_monitor(every=every),
        scale=lambda step: jnp.exp(jnp.maximum(step - 500, 0) / 50),
        steps=800,
    )
    findings = watch.diagnose(state)
    assert findings
    rules = [finding.rule for finding in findings]
    assert rules[0] in ("learning-rate/too-high", "results/nonfinite")
    words = findings[0].message + findings[0].advice
    begun = int(watch.read(state).spike.step)
    assert 550 < begun < 800
    assert f"step {begun}" in words
    assert "rate" in findings[0].advice
