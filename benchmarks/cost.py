"""What measurements cost, as ratios against one bare jitted training step.

Run it with ``python benchmarks/cost.py``.  Everything is compiled first; then the step,
the step again and each measurement take turns, so that a busy machine slows all alike.
Medians of the ratios to the step of the same turn; ``the step itself`` shows the noise.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import optax

import nnsanity as ns

SIZES = (784, 1000, 500, 100, 10)
BATCH = 128
TURNS = 60


def init(key):
    """He-initialized weights of an MLP for MNIST, 1.3 million parameters."""
    keys = jax.random.split(key, len(SIZES) - 1)
    shapes = zip(keys, SIZES, SIZES[1:], strict=False)
    return {
        f"layer_{index}": {
            "w": jax.random.normal(one, (rows, columns)) * (2 / rows) ** 0.5,
            "b": jnp.zeros(columns),
        }
        for index, (one, rows, columns) in enumerate(shapes)
    }


def apply_fn(params, inputs):
    """ReLU between the layers, logits at the end."""
    hidden = inputs
    for index in range(len(SIZES) - 1):
        layer = params[f"layer_{index}"]
        hidden = hidden @ layer["w"] + layer["b"]
        hidden = jax.nn.relu(hidden) if index < len(SIZES) - 2 else hidden
    return hidden


def loss_fn(params, batch):
    """Softmax cross entropy."""
    inputs, labels = batch
    outputs = apply_fn(params, inputs)
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()


def seconds(function, *args):
    """How long one call takes until its results are there."""
    began = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - began


def main():
    """Prints a table of ratios."""
    params = init(jax.random.key(0))
    inputs = jax.random.normal(jax.random.key(1), (BATCH, SIZES[0]))
    batch = inputs, jnp.arange(BATCH) % SIZES[-1]
    optimizer = optax.adam(1e-3)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    grads = jax.jit(jax.grad(loss_fn))(params, batch)
    gradient_stats = jax.jit(ns.gradient_stats)
    moments = jax.jit(ns.feature_moments)
    calls = {
        "the step itself": (step, params, state, batch),
        "apply_fn": (jax.jit(apply_fn), params, inputs),
        "dead_units": (ns.dead_units, apply_fn, params, inputs),
        "activations": (ns.activations, apply_fn, params, inputs),
        "weight_stats": (ns.weight_stats, apply_fn, params, inputs),
        "gradient_stats": (gradient_stats, grads),
        "feature_moments": (moments, inputs),
    }
    for call in calls.values():
        seconds(*call)
    ratios = {name: [] for name in calls}
    for _ in range(TURNS):
        bare = seconds(step, params, state, batch)
        for name, call in calls.items():
            ratios[name].append(seconds(*call) / bare)
    print(f"MLP {SIZES}, batch {BATCH}, Adam, {jax.devices()[0].device_kind}")
    for name, values in ratios.items():
        print(f"{name:16} {statistics.median(values):6.3f} of a step")


if __name__ == "__main__":
    main()
