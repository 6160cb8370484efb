"""A regression on raw targets, what the checkup says, and the repair.

Scikit-learn's diabetes table: ten measurements of 442 patients, and the progress of
their disease a year later as a number from 25 to 346.

Run it with ``python examples/checkup_diabetes.py``.
"""

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_diabetes

import nnsanity as ns


def init(key, sizes):
    """Returns He-initialized weights of a plain MLP."""
    keys = jax.random.split(key, len(sizes) - 1)
    return {
        f"layer_{index}": {
            "w": jax.random.normal(one, (rows, columns)) * (2 / rows) ** 0.5,
            "b": jnp.zeros(columns),
        }
        for index, (one, rows, columns) in enumerate(
            zip(keys, sizes, sizes[1:], strict=False)
        )
    }


def apply_fn(params, inputs):
    """Two hidden layers of 32 units."""
    hidden = inputs
    for layer in (params["layer_0"], params["layer_1"]):
        hidden = jax.nn.relu(hidden @ layer["w"] + layer["b"])
    return hidden @ params["layer_2"]["w"] + params["layer_2"]["b"]


def loss_fn(params, batch):
    """Mean squared error."""
    inputs, targets = batch
    return jnp.mean((apply_fn(params, inputs) - targets) ** 2)


def check(title, inputs, targets):
    """Runs one checkup and shows its report."""
    print(f"\n=== {title} ===\n", flush=True)
    report = ns.checkup(
        apply_fn,
        loss_fn,
        init(jax.random.key(0), (10, 32, 32, 1)),
        (inputs, targets),
        key=jax.random.key(1),
        optimizer=optax.sgd(0.01),
        num_steps=300,
        progress=lambda line: print(f"... {line}", flush=True),
    )
    print(f"\n{report}", flush=True)
    return report


def main():
    """Checks the raw table, then the standardized one."""
    inputs, targets = load_diabetes(return_X_y=True, scaled=False)
    inputs, targets = jnp.asarray(inputs), jnp.asarray(targets)[:, None]
    raw = check("raw table", inputs, targets)
    moments = [ns.feature_moments(values) for values in (inputs, targets)]
    standardized = [
        ns.z_scores(values, one)
        for values, one in zip((inputs, targets), moments, strict=True)
    ]
    repaired = check("standardized table", *standardized)
    repaired.raise_for("warning")
    print(f"\nLeading finding on the raw table: {raw.findings[0].rule}")


if __name__ == "__main__":
    main()
