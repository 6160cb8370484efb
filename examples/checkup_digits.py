"""A digit classifier with three classic mistakes, what the checkup says, the repair.

The mistakes: a ReLU on the output, pixels blown up to 0..256, and a learning rate that
is far too high.

Run it with ``python examples/checkup_digits.py``.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import nnsanity as ns


class Classifier(nn.Module):
    """Two hidden layers; ``relu_on_output`` is the first mistake."""

    relu_on_output: bool

    @nn.compact
    def __call__(self, images):
        """Returns [examples, 10] logits, or what a ReLU leaves of them."""
        hidden = nn.relu(nn.Dense(128)(images))
        hidden = nn.relu(nn.Dense(64)(hidden))
        logits = nn.Dense(10)(hidden)
        return nn.relu(logits) if self.relu_on_output else logits


def program(images, *, relu_on_output):
    """Returns what any training loop has: a network, a loss, its first parameters."""
    model = Classifier(relu_on_output)
    params = model.init(jax.random.key(0), images[:1])["params"]

    def apply_fn(params, images):
        return model.apply({"params": params}, images)

    def loss_fn(params, batch):
        images, labels = batch
        losses = optax.softmax_cross_entropy_with_integer_labels(
            apply_fn(params, images), labels
        )
        return jnp.mean(losses)

    return apply_fn, loss_fn, params


def check(title, images, labels, *, relu_on_output, rate):
    """Runs one checkup and shows its report."""
    print(f"\n=== {title} ===\n", flush=True)
    apply_fn, loss_fn, params = program(images, relu_on_output=relu_on_output)
    report = ns.checkup(
        apply_fn,
        loss_fn,
        params,
        (images, labels),
        key=jax.random.key(1),
        optimizer=optax.sgd(rate),
        num_steps=300,
        progress=lambda line: print(f"... {line}", flush=True),
    )
    print(f"\n{report}", flush=True)
    return report


def accuracy(images, labels, *, rate):
    """Trains the repaired program and returns its accuracy on held-out digits."""
    apply_fn, loss_fn, params = program(images, relu_on_output=False)
    optimizer = optax.sgd(rate)
    training, held_out = slice(0, 1400), slice(1400, None)

    @jax.jit
    def step(state, rows):
        params, optimizer_state = state
        batch = images[training][rows], labels[training][rows]
        grads = jax.grad(loss_fn)(params, batch)
        updates, optimizer_state = optimizer.update(grads, optimizer_state)
        return (optax.apply_updates(params, updates), optimizer_state), None

    rows = jax.random.randint(jax.random.key(2), (600, 32), 0, 1400)
    state = params, optimizer.init(params)
    (params, _), _ = jax.lax.scan(step, state, rows)
    predictions = jnp.argmax(apply_fn(params, images[held_out]), axis=-1)
    return float(jnp.mean(predictions == labels[held_out]))


def main():
    """Checks the broken program, then the repaired one."""
    pixels, labels = load_digits(return_X_y=True)
    pixels, labels = jnp.asarray(pixels, jnp.float32), jnp.asarray(labels, jnp.int32)
    broken = check("broken", pixels * 16, labels, relu_on_output=True, rate=5.0)
    scaled = (pixels - pixels.mean()) / pixels.std()
    repaired = check("repaired", scaled, labels, relu_on_output=False, rate=0.05)
    repaired.raise_for("warning")
    reached = accuracy(scaled, labels, rate=0.05)
    print(f"\nThe broken program had {len(broken.findings)} findings.")
    print(f"Accuracy of the repaired one on held-out digits: {np.round(reached, 3)}")


if __name__ == "__main__":
    main()
