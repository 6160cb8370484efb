"""Where the state of a monitor goes: checkpoints, scans, merges, optimizers."""

import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnsanity as ns
from nnsanity.monitor.state import state_of

X = jax.random.normal(jax.random.key(0), (64, 3))
BATCH = X, jnp.sin(2 * X[:, :1])
KEYS = jax.random.split(jax.random.key(1))
PARAMS = {
    "b1": jnp.zeros(16).at[3].set(-100.0),
    "w1": jax.random.normal(KEYS[0], (3, 16)),
    "w2": jax.random.normal(KEYS[1], (16, 1)) / 4,
}
TX = optax.adam(1e-2)


def loss_fn(params, batch):
    hidden = jax.nn.relu(batch[0] @ params["w1"] + params["b1"])
    return jnp.mean((hidden @ params["w2"] - batch[1]) ** 2)


def step(watch, carry, batch, loss=loss_fn, **known):
    params, opt_state, state = carry
    watched = ns.value_and_grad(loss, when=watch.due(state))
    (value, signals), grads = watched(params, batch)
    updates, opt_state = TX.update(grads, opt_state, params)
    state = watch.update(
        state,
        loss=value,
        signals=signals,
        grads=grads,
        updates=updates,
        params=params,
        **known,
    )
    return optax.apply_updates(params, updates), opt_state, state


def start(watch, params=PARAMS, loss=loss_fn):
    return params, TX.init(params), watch.init(loss, params, BATCH)


def trained(watch, num_steps=4, batch=BATCH, params=PARAMS, loss=loss_fn, **known):
    def turn(carry, _):
        return step(watch, carry, batch, loss, **known), None

    return jax.jit(lambda carry: jax.lax.scan(turn, carry, None, length=num_steps)[0])(
        start(watch, params, loss)
    )


def assert_alike(found, expected, rtol=1e-4):
    for left, right in zip(
        *map(jax.tree.leaves_with_path, (found, expected)), strict=True
    ):
        where = jax.tree_util.keystr(left[0])
        np.testing.assert_allclose(
            left[1], right[1], rtol=rtol, atol=1e-6, err_msg=where
        )


RESTORE = """
    import sys
    import jax
    import orbax.checkpoint as ocp
    import nnsanity as ns
    sys.path.insert(0, sys.argv[2])
    from test_state import BATCH, PARAMS, loss_fn, start, step, TX

    watch = ns.monitor(every=2)
    blank = start(watch)
    with ocp.StandardCheckpointer() as checkpointer:
        carry = checkpointer.restore(sys.argv[1], blank)
    described = [(x.shape, x.dtype) for x in jax.tree.leaves(carry)]
    assert described == [(x.shape, x.dtype) for x in jax.tree.leaves(blank)]
    carry = step(watch, carry, BATCH)
    print(*(repr(float(x)) for x in watch.metrics(carry[2]).values()))
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_state_restored_in_a_fresh_process_goes_on(tmp_path):
    import orbax.checkpoint as ocp

    watch = ns.monitor(every=2)
    carry = trained(watch, 5)
    path = tmp_path / "checkpoint"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, carry)
    folder = str(__file__).rpartition("/")[0]
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(RESTORE), str(path), folder],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    expected = watch.metrics(step(watch, carry, BATCH)[2])
    found = [float(value) for value in run.stdout.split()]
    np.testing.assert_allclose(found, [*expected.values()], rtol=1e-5)


def test_checkpointed_layers_and_half_precision():
    watch = ns.monitor()
    expected = trained(watch)[2]
    assert_alike(trained(watch, loss=jax.checkpoint(loss_fn))[2], expected)

    def half_loss(params, batch):
        params, (x, y) = jax.tree.map(
            lambda one: one.astype("bfloat16"), (params, batch)
        )
        hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
        outputs = (hidden @ params["w2"]).astype(jnp.float32)
        return jnp.mean((outputs - y) ** 2)

    state = trained(watch, loss=half_loss)[2]
    assert jax.tree.map(jnp.result_type, state) == jax.tree.map(
        jnp.result_type, expected
    )
    assert_alike(state, expected, rtol=0.05)


def test_gradient_accumulation_is_the_whole_batch():
    watch = ns.monitor()

    def accumulated(carry, batch):
        params, opt_state, state = carry

        def micro(total, part):
            watched = ns.value_and_grad(loss_fn, when=watch.due(state))
            (loss, signals), grads = watched(params, part)
            total = jax.tree.map(jnp.add, total, grads)
            return total, (loss, signals, optax.tree.norm(grads))

        parts = jax.tree.map(lambda one: one.reshape(4, 16, -1), batch)
        blank = jax.tree.map(jnp.zeros_like, params)
        total, (losses, signals, norms) = jax.lax.scan(micro, blank, parts)
        grads = jax.tree.map(lambda one: one / 4, total)
        updates, opt_state = TX.update(grads, opt_state, params)
        state = watch.update(
            state,
            loss=losses.mean(),
            signals=signals,
            grads=grads,
            updates=updates,
            params=params,
            microbatch_norms=norms,
        )
        return optax.apply_updates(params, updates), opt_state, state

    carry = start(watch)
    for _ in range(4):
        carry = jax.jit(accumulated)(carry, BATCH)
    found, expected = watch.read(carry[2]), watch.read(trained(watch)[2])
    noise = found.gradient_noise
    assert_alike(found._replace(gradient_noise=expected.gradient_noise), expected)
    assert noise.num_steps == 4
    # One step: the same as the function that is made for it.
    carry = jax.jit(accumulated)(start(watch), BATCH)
    found = ns.gradient_noise_scale(loss_fn, PARAMS, BATCH, num_microbatches=4)
    noise = watch.read(carry[2]).gradient_noise
    share = float(watch.metrics(carry[2])["gradients/noise-share"])
    np.testing.assert_allclose(noise.noise * 64, found.covariance_trace, rtol=1e-4)
    np.testing.assert_allclose(64 * share / (1 - share), found.noise_scale, rtol=1e-4)


@pytest.mark.parametrize("clip_norm", [1e-3, 1e3])
def test_the_share_of_clipped_steps(clip_norm):
    watch = ns.monitor(clip_norm=clip_norm)
    metrics = watch.metrics(trained(watch)[2])
    assert metrics["gradients/clipped-share"] == (clip_norm < 1)


def pieces():
    """A monitor, and its states after three trainings that differ."""
    watch = ns.monitor(window=2)
    broken = BATCH[0].at[0, 0].set(jnp.nan), BATCH[1]
    other = {**PARAMS, "b1": PARAMS["b1"].at[:5].set(-100.0)}
    return watch, (
        trained(watch, 5)[2],
        trained(watch, 3, params=other)[2],
        trained(watch, 4, batch=broken)[2],
    )


def test_merging_is_associative_and_a_blank_state_is_neutral():
    watch, (a, b, c) = pieces()
    merge = jax.jit(watch.merge)
    left, right = merge(merge(a, b), c), merge(a, merge(b, c))
    assert_alike(left, right)
    blank = start(watch)[2]
    assert_alike(merge(blank, a), a)
    assert_alike(merge(a, blank), a)
    alone, twice = watch.read(a), watch.read(watch.merge(a, a))
    assert_alike(twice._replace(num_watched=alone.num_watched), alone)


def test_a_merge_pools_what_its_parts_saw():
    watch, (a, b, c) = pieces()
    both, one, other = (watch.read(state) for state in (watch.merge(a, b), a, b))
    assert (both.step, both.num_watched) == (5, 8)
    np.testing.assert_allclose(
        both.gradient_norm**2,
        (5 * one.gradient_norm**2 + 3 * other.gradient_norm**2) / 8,
        rtol=1e-5,
    )
    np.testing.assert_array_equal(
        np.asarray(both.last_active["w1"]) < 0, np.arange(16) == 3
    )
    (finding,) = watch.diagnose(watch.merge(a, c))
    assert finding.rule == "results/nonfinite"
    assert "first in step 0" in finding.message
    spike = one.spike._replace(
        step=jnp.int32(7), length=jnp.int32(3), growth=20 + 0 * one.loss
    )
    later = spike._replace(step=jnp.int32(9))
    for spikes in ((spike, later), (later, spike)):
        parts = (
            state_of(record._replace(spike=seen))
            for record, seen in zip((one, other), spikes, strict=True)
        )
        assert watch.read(watch.merge(*parts)).spike.step == 7


@pytest.mark.parametrize("every", [1, 2])
def test_an_optimizer_that_is_watched(every):
    watch = ns.monitor(every=every)
    tx = optax.chain(
        optax.clip_by_global_norm(1e3),
        watch.around(TX, loss_fn, BATCH),
        optax.snapshot("last", ns.gradient_stats),
        optax.monitor({"smooth": optax.measure_with_ema(ns.gradient_stats, 0.9)}),
    )

    @jax.jit
    def turn(params, opt_state):
        state = optax.tree.get(opt_state, "monitor")
        watched = ns.value_and_grad(loss_fn, when=watch.due(state))
        (loss, signals), grads = watched(params, BATCH)
        updates, opt_state = tx.update(
            grads, opt_state, params, value=loss, signals=signals
        )
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = PARAMS, tx.init(PARAMS)
    for _ in range(4):
        params, opt_state = turn(params, opt_state)
    expected = trained(watch)
    assert_alike(params, expected[0])
    assert_alike(optax.tree.get(opt_state, "monitor"), expected[2])
    last = optax.tree.get(opt_state, "last")
    assert ns.leaf_names(PARAMS) == ("b1", "w1", "w2")
    assert last.norm.shape == (3,)
    assert optax.tree.get(opt_state, "smooth").norm.shape == (3,)


@pytest.mark.parametrize("every", [1, 2])
def test_watched_optimizers_side_by_side_in_a_scan(every):
    watch = ns.monitor(every=every)
    tx = watch.around(TX, loss_fn, BATCH)

    def turn(carry, _):
        params, opt_state = carry
        watched = ns.value_and_grad(loss_fn, when=watch.due(opt_state.monitor))
        (loss, signals), grads = watched(params, BATCH)
        updates, opt_state = tx.update(
            grads, opt_state, params, value=loss, signals=signals
        )
        return (optax.apply_updates(params, updates), opt_state), None

    def run(params):
        return jax.lax.scan(turn, (params, tx.init(params)), None, length=4)[0]

    both = jax.tree.map(lambda one: jnp.stack([one, 0.5 * one]), PARAMS)
    params, opt_state = jax.jit(jax.vmap(run))(both)
    expected = trained(watch)
    found = params, opt_state.monitor
    found = jax.tree.map(lambda one: one[0], found)
    assert_alike(found, (expected[0], expected[2]))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda: ns.monitor(clip_norm=-1.0), ValueError, "clip_norm must be above 0"),
        (
            lambda: ns.monitor().around(3, loss_fn, BATCH),
            TypeError,
            "must have init and update",
        ),
        (
            lambda: (
                ns.monitor().around(TX, loss_fn, BATCH).update(PARAMS, None, PARAMS)
            ),
            ValueError,
            "value=loss, signals=signals",
        ),
        (
            lambda: trained(ns.monitor(), microbatch_norms=jnp.ones(1)),
            ValueError,
            "at least 2 microbatch",
        ),
        (
            lambda: trained(ns.monitor(), validation_loss=jnp.ones(3)),
            ValueError,
            "validation_loss must be .* forget a mean",
        ),
        (lambda: ns.monitor().merge(1, 2), TypeError, "monitor.init returns, got int"),
    ],
)
def test_mistakes_are_named(change, error, words):
    with pytest.raises(error, match=words):
        change()
