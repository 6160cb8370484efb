"""What a monitor measures: a loop by hand in NumPy is the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnsanity as ns
from nnsanity.monitor.watch import monitor as make_monitor
from nnsanity.tracing.compat import sub_jaxprs
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


def train(watch, tx, batches):
    """Trains step by step, and returns the last state."""
    step = jax.jit(watched_step(watch, mlp_loss, tx))
    carry = start(watch, mlp_loss, PARAMS, tx, BATCH)
    for batch in batches:
        carry = step(carry, batch)
    return carry[0]


def updated(watch):
    """The update of a monitor, with its arguments by position."""

    def update(state, loss, signals, grads, updates, params):
        return watch.update(
            state,
            loss=loss,
            signals=signals,
            grads=grads,
            updates=updates,
            params=params,
        )

    return jax.jit(update)


def by_hand(params, num_steps, rate):
    """The same training in NumPy float64, and norms at each of its steps."""
    params = {name: np.asarray(one, np.float64) for name, one in params.items()}
    x, y = (np.asarray(one, np.float64) for one in BATCH)
    history = []
    for _ in range(num_steps):
        before = x @ params["w1"] + params["b1"]
        hidden = np.maximum(before, 0)
        residual = hidden @ params["w2"] + params["b2"] - y
        back = 2 * residual / residual.size
        back_hidden = back @ params["w2"].T
        back_before = back_hidden * (before > 0)
        grads = {
            "b1": back_before.sum(0),
            "b2": back.sum(0),
            "w1": x.T @ back_before,
            "w2": hidden.T @ back,
        }
        metrics = {"loss/last": np.mean(residual**2)}
        for name in NAMES:
            norms = [np.linalg.norm(grads[name]), np.linalg.norm(params[name])]
            metrics[f"gradients/{name}/norm"] = norms[0]
            metrics[f"updates/{name}/norm"] = rate * norms[0]
            metrics[f"parameters/{name}/norm"] = norms[1]
        metrics["activations/w1/rms"] = np.sqrt(np.mean(hidden**2))
        metrics["activations/w2/gradient-rms"] = np.sqrt(np.mean(back**2))
        metrics["activations/w1/gradient-rms"] = np.sqrt(np.mean(back_hidden**2))
        history.append(metrics)
        params = {name: params[name] - rate * grads[name] for name in NAMES}
    return history


def test_metrics_are_those_of_a_loop_by_hand():
    watch, tx, rate, num_steps = make_monitor(), optax.sgd(0.05), 0.05, 8
    step = jax.jit(watched_step(watch, mlp_loss, tx))
    carry = start(watch, mlp_loss, PARAMS, tx, BATCH)
    history = by_hand(PARAMS, num_steps, rate)
    for expected in history:
        carry = step(carry, BATCH)
        metrics = watch.metrics(carry[0])
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
    losses = [one["loss/last"] for one in history]
    # Shorter than both windows: plain means.
    ratios = [one["updates/w1/norm"] / one["parameters/w1/norm"] for one in history]
    np.testing.assert_allclose(metrics["loss/average"], np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(metrics["updates/w1/ratio"], np.mean(ratios), rtol=1e-4)
    assert metrics["step"] == num_steps
    assert metrics["nonfinite/step"] == metrics["loss/spike-step"] == -1


def test_metrics_are_finite_and_count_what_is_not():
    watch, broken = make_monitor(), (jnp.full_like(BATCH[0], jnp.nan), BATCH[1])
    state = train(watch, optax.sgd(0.01), [BATCH] * 3 + [broken, BATCH])
    metrics = jax.jit(watch.metrics)(state)
    assert all(one.shape == () and one.dtype == jnp.float32 for one in metrics.values())
    assert all(np.isfinite(one) for one in metrics.values())
    assert metrics["loss/last"] == 0
    # The loss; both rows, forward and back; a ReLU stops NaN on its way to w1 and b1,
    # whose gradients are then finite, but w1 had met NaN among the inputs; the norm of
    # the whole gradient.
    assert metrics["nonfinite/count"] == 1 + 4 + 2 + 2 + 3 + 1
    assert metrics["nonfinite/step"] == 3


def described(tree):
    return jax.tree.map(lambda one: (one.shape, one.dtype, one.weak_type), tree)


@pytest.mark.usefixtures("strict_jax")
def test_the_state_stays_as_it_is_with_donation_and_is_traced_once():
    watch, tx = make_monitor(every=4), optax.sgd(0.01)
    traced = []
    step = watched_step(watch, mlp_loss, tx)

    def counted(carry, batch):
        traced.append(1)
        return step(carry, batch)

    jitted = jax.jit(counted, donate_argnums=0)
    params = jax.tree.map(jnp.copy, PARAMS)
    carry = start(watch, mlp_loss, params, tx, BATCH)
    first = described(carry[0])
    for _ in range(6):
        carry = jitted(carry, BATCH)
    assert described(carry[0]) == first
    assert len(traced) == 1
    assert jitted._cache_size() == 1
    assert int(watch.read(carry[0]).num_watched) == 2


def test_init_needs_shapes_only():
    watch = make_monitor()
    shapes = jax.eval_shape(lambda: (PARAMS, BATCH))
    state = watch.init(mlp_loss, *shapes)
    assert described(state) == described(watch.init(mlp_loss, PARAMS, BATCH))
    assert bool(watch.due(state))
    assert watch.diagnose(state) == ()


def test_every_16th_step_is_as_it_is_at_every_step():
    batches = [(X[at : at + 32], Y[at : at + 32]) for at in range(33)]
    often, rarely = (
        watch.metrics(train(watch, optax.adam(1e-2), batches))
        for watch in (make_monitor(), make_monitor(every=16))
    )
    averages = {name for name in often if name.endswith("/ratio")}
    for name in often.keys() - averages:
        np.testing.assert_allclose(often[name], rarely[name], rtol=1e-6, err_msg=name)


def test_seeds_side_by_side():
    watch, tx = make_monitor(), optax.sgd(0.05)
    step = watched_step(watch, mlp_loss, tx)
    keys = jax.random.split(jax.random.key(3), 3)

    def run(key):
        carry = start(watch, mlp_loss, init_mlp(key), tx, BATCH)
        return jax.lax.scan(lambda carry, _: (step(carry, BATCH), None), carry, None, 5)

    (states, *_), _ = jax.jit(jax.vmap(run))(keys)
    (alone, *_), _ = jax.jit(run)(keys[1])
    second = jax.tree.map(lambda one: one[1], states)
    for left, right in zip(*map(jax.tree.leaves, (second, alone)), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-6)
    assert jax.vmap(watch.metrics)(states)["loss/last"].shape == (3,)
    with pytest.raises(ValueError, match="several seeds"):
        watch.diagnose(states)


def operations(jaxpr, *, inside_cond):
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn
        if inside_cond or eqn.primitive.name != "cond":
            for inner in sub_jaxprs(eqn):
                yield from operations(inner, inside_cond=inside_cond)


@pytest.mark.parametrize("every", [1, 16])
def test_parameters_are_read_behind_a_branch_and_nothing_leaves_the_device(every):
    watch, tx = make_monitor(every=every), optax.sgd(0.1)
    carry = start(watch, mlp_loss, PARAMS, tx, BATCH)
    signals = ns.value_and_grad(mlp_loss)(PARAMS, BATCH)[0][1]

    given = (carry[0], jnp.float32(1), signals, PARAMS, PARAMS, PARAMS)
    program = jax.make_jaxpr(updated(watch))(*given)
    reads = [
        [
            eqn
            for eqn in operations(program, inside_cond=inside)
            if eqn.primitive.name.startswith("reduce")
            and eqn.invars[0].aval.shape in {one.shape for one in PARAMS.values()}
        ]
        for inside in (False, True)
    ]
    assert reads[0] == []
    assert len(reads[1]) == 3 * len(PARAMS)
    step = jax.make_jaxpr(watched_step(watch, mlp_loss, tx))(carry, BATCH)
    names = [eqn.primitive.name for eqn in operations(step, inside_cond=True)]
    assert not [name for name in names if "callback" in name]


def scanned_loss(params, batch):
    def block(x, weights):
        hidden = jax.nn.relu(x @ weights["up"])
        return x + 0.1 * hidden @ weights["down"], None

    out, _ = jax.lax.scan(block, batch[0], params["block"])
    return jnp.mean((out @ params["head"] - batch[1]) ** 2)


def scanned_params():
    keys = jax.random.split(KEY, 3)
    up = jax.random.normal(keys[0], (3, 3, 8))
    return {
        "block": {"down": jax.random.normal(keys[1], (3, 8, 3)), "up": up},
        "head": jax.random.normal(keys[2], (3, 1)),
    }


def test_layers_of_a_scan_have_a_row_each():
    watch = make_monitor(window=10)
    params, tx = scanned_params(), optax.sgd(0.01)
    params["block"]["up"] = params["block"]["up"].at[1].set(0)
    step = jax.jit(watched_step(watch, scanned_loss, tx))
    carry = start(watch, scanned_loss, params, tx, BATCH)
    for _ in range(10):
        before = carry[1]
        carry = step(carry, BATCH)
    metrics = watch.metrics(carry[0])
    x, blocks = np.asarray(BATCH[0], np.float64), before["block"]
    for index in range(3):
        block = {name: one[index] for name, one in blocks.items()}
        hidden = np.maximum(x @ np.asarray(block["up"], np.float64), 0)
        rms = np.sqrt(np.mean(hidden**2))
        row = f"activations/block/up[{index}]"
        np.testing.assert_allclose(metrics[f"{row}/rms"], rms, rtol=1e-5)
        assert metrics[f"{row}/dead"] == (index == 1)
        x = x + 0.1 * hidden @ np.asarray(block["down"], np.float64)
    (finding,) = watch.diagnose(carry[0])
    assert finding.rule == "gradients/dead-units"
    assert finding.where == "block/up[1]"
    assert "never" in finding.message


def mistaken(**changes):
    watch = make_monitor()
    state = watch.init(mlp_loss, PARAMS, BATCH)
    (loss, signals), grads = ns.value_and_grad(mlp_loss)(PARAMS, BATCH)
    given = {"loss": loss, "signals": signals, "grads": grads, "updates": grads}
    return watch.update(**{"state": state, "params": PARAMS, **given, **changes})


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda: make_monitor(every=0), ValueError, "every must be at least 1, got 0"),
        (lambda: make_monitor(every=2.0), TypeError, "every must be an integer"),
        (
            lambda: make_monitor().due(make_monitor().init(mlp_loss, PARAMS, BATCH)),
            ValueError,
            "monitor.due: .*call monitor.init first",
        ),
        (lambda: mistaken(state={}), TypeError, "what monitor.init returns, got dict"),
        (lambda: mistaken(grads={}), ValueError, "grads must have .* got no b1"),
        (
            lambda: mistaken(updates={**PARAMS, "b2": jnp.zeros(7)}),
            ValueError,
            r"updates must .* b2 \[7\]",
        ),
        (lambda: mistaken(signals=None), TypeError, "signals must be .* got NoneType"),
        (lambda: mistaken(loss=jnp.ones(8)), ValueError, "forget a mean"),
        (lambda: mistaken(loss=(jnp.ones(()), 1)), ValueError, "has_aux=True"),
    ],
)
def test_mistakes_are_named(change, error, words):
    with pytest.raises(error, match=words):
        change()


@pytest.mark.parametrize("first", [jnp.inf, jnp.nan])
def test_a_first_loss_that_is_not_finite_stays_in_no_average(first):
    watch = make_monitor()
    state = watch.init(mlp_loss, PARAMS, BATCH)
    (_, signals), grads = ns.value_and_grad(mlp_loss)(PARAMS, BATCH)
    for loss in [first, 3.0, 1.0, 2.0]:
        state = watch.update(
            state,
            loss=jnp.float32(loss),
            signals=signals,
            grads=grads,
            updates=grads,
            params=PARAMS,
        )
    metrics = watch.metrics(state)
    assert 1 <= metrics["loss/average"] <= 3
    assert 1 <= metrics["loss/lowest-average"] <= 3
    assert metrics["nonfinite/step"] == 0
