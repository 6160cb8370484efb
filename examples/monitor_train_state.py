"""A Flax TrainState loop whose learning rate jumps, and what its monitor says.

A classifier of scikit-learn's digits.  After 300 steps the schedule restarts at a rate
that is far too high; the same network with a sane restart stays silent.

Run it with ``python examples/monitor_train_state.py``.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

import nnsanity as ns

RESTART, NUM_STEPS, BATCH_SIZE = 300, 600, 64


class Classifier(nn.Module):
    """Two hidden layers of 64 units."""

    @nn.compact
    def __call__(self, inputs):
        """Logits of the ten digits."""
        hidden = nn.relu(nn.Dense(64)(inputs))
        hidden = nn.relu(nn.Dense(64)(hidden))
        return nn.Dense(10)(hidden)


MODEL = Classifier()


def loss_fn(params, batch):
    """Softmax cross entropy."""
    inputs, labels = batch
    logits = MODEL.apply({"params": params}, inputs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(monitor, restart_rate, data):
    """Trains with a monitor around the optimizer; returns its last state."""
    batch = jax.tree.map(lambda leaf: leaf[:BATCH_SIZE], data)
    schedule = optax.join_schedules(
        [
            optax.cosine_decay_schedule(0.1, RESTART),
            optax.cosine_decay_schedule(restart_rate, NUM_STEPS - RESTART),
        ],
        [RESTART],
    )
    state = TrainState.create(
        apply_fn=MODEL.apply,
        params=MODEL.init(jax.random.key(0), batch[0])["params"],
        tx=monitor.around(optax.sgd(schedule, 0.9), loss_fn, batch),
    )

    @jax.jit
    def train_step(state, batch):
        watch = ns.value_and_grad(loss_fn, when=monitor.due(state.opt_state.monitor))
        (loss, signals), grads = watch(state.params, batch)
        updates, opt_state = state.tx.update(
            grads, state.opt_state, state.params, value=loss, signals=signals
        )
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state)

    random = np.random.default_rng(0)
    for _ in range(NUM_STEPS):
        rows = random.integers(len(data[1]), size=BATCH_SIZE)
        state = train_step(state, jax.tree.map(lambda leaf, r=rows: leaf[r], data))
    return state.opt_state.monitor


def show(title, monitor, state):
    """Prints the numbers of every layer, and what the monitor has to say."""
    print(f"\n=== {title} ===")
    metrics = jax.device_get(monitor.metrics(state))
    print(f"loss {metrics['loss/average']:.3g} after {metrics['step']:.0f} steps")
    print(f"{'':10}{'activations':>12}{'dead units':>12}{'update ratio':>14}")
    for layer in ("Dense_0", "Dense_1", "Dense_2"):
        rms = metrics[f"activations/{layer}/rms"]
        dead = metrics.get(f"activations/{layer}/dead")
        dead = "-" if dead is None else f"{dead:.0%}"
        ratio = metrics[f"updates/{layer}/kernel/ratio"]
        print(f"{layer:10}{rms:12.3g}{dead:>12}{ratio:14.1e}")
    findings = monitor.diagnose(state)
    for finding in findings:
        print(f"{finding.severity.upper()} {finding.rule} at {finding.where}")
        print(f"  {finding.message}\n  -> {finding.advice}")
    if not findings:
        print("Nothing to say.")
    return findings


def main():
    """Trains with a restart that is too high, then with a sane one."""
    digits = load_digits()
    data = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target)
    monitor = ns.monitor(every=4, window=25)
    found = show("a restart at a rate of 3", monitor, train(monitor, 3.0, data))
    if not found:
        raise SystemExit("the jump was not seen")
    if show("a restart at a rate of 0.05", monitor, train(monitor, 0.05, data)):
        raise SystemExit("a healthy run was called sick")


if __name__ == "__main__":
    main()
