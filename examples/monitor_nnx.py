"""An NNX loop that learns its few examples by heart, and what its monitor says.

A classifier of scikit-learn's digits that gets 60 of them to train on, a fifth of them
with wrong labels, while the loss on others is watched.

Run it with ``python examples/monitor_nnx.py``.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

import nnsanity as ns
from nnsanity.nnx import functional

NUM_STEPS, OFTEN = 400, 20


class Classifier(nnx.Module):
    """One hidden layer of 256 units."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 256, rngs=rngs)
        self.output = nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, inputs):
        """Logits of the ten digits."""
        return self.output(nnx.relu(self.hidden(inputs)))


def loss_of(model):
    """Returns the softmax cross entropy as a function of the parameters, and those."""
    apply_fn, params, _ = functional(model)

    def loss_fn(params, batch):
        inputs, labels = batch
        logits = apply_fn(params, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss_fn, params


def train(monitor, data, others):
    """Trains on all of the data at once; returns the monitor's last state."""
    model = Classifier(nnx.Rngs(0))
    loss_fn, _ = loss_of(model)
    transformation = monitor.around(optax.adam(3e-3), loss_fn, data)
    optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, batch, others):
        loss_fn, params = loss_of(model)
        (loss, signals), grads = ns.value_and_grad(loss_fn)(params, batch)
        validation_loss = loss_fn(params, others)
        optimizer.update(
            model,
            grads,
            value=loss,
            signals=signals,
            validation_loss=validation_loss,
        )
        return validation_loss

    validation = [train_step(model, optimizer, data, others) for _ in range(NUM_STEPS)]
    state = jax.tree.map(
        lambda variable: variable[...],
        optimizer.opt_state.monitor,
        is_leaf=lambda one: isinstance(one, nnx.Variable),
    )
    return state, [float(one) for one in validation]


def show(monitor, state, validation):
    """Draws the validation loss, and prints what the monitor has to say."""
    for step in range(0, NUM_STEPS, OFTEN):
        loss = validation[step]
        bar = "#" * round(30 * loss / max(validation))
        print(f"step {step:4}  {loss:6.3f}  {bar}")
    findings = monitor.diagnose(state)
    for finding in findings:
        print(f"{finding.severity.upper()} {finding.rule}")
        print(f"  {finding.message}\n  -> {finding.advice}")
    return findings


def main():
    """Trains on 60 digits, a fifth of them called 3."""
    digits = load_digits()
    inputs = jnp.asarray(digits.data / 16, jnp.float32)
    labels = jnp.asarray(digits.target)
    noisy = jnp.where(
        jax.random.bernoulli(jax.random.key(1), 0.2, (60,)), 3, labels[:60]
    )
    monitor = ns.monitor()
    state, validation = train(monitor, (inputs[:60], noisy), (inputs[60:], labels[60:]))
    found = show(monitor, state, validation)
    if "regularization/overfitting" not in [finding.rule for finding in found]:
        raise SystemExit("overfitting was not seen")


if __name__ == "__main__":
    main()
