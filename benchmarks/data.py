"""What looking at data costs: moments against NumPy, neighbours of a large table.

Run it with ``python benchmarks/data.py``.  Moments and NumPy's mean and std take turns,
so that a busy machine slows both alike; the median of the ratios is told.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import nnsanity as ns

TURNS = 7


def seconds(function, *args):
    began = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - began


def of_moments():
    """Moments of a million rows of a hundred features, over mean and std of NumPy."""
    random = np.random.default_rng(0)
    values = random.normal(size=(1_000_000, 100)).astype(np.float32)
    moments = jax.jit(ns.feature_moments)
    on_device = jnp.asarray(values)
    seconds(moments, on_device)
    ratios = []
    for _ in range(TURNS):
        unit = seconds(lambda: (values.mean(axis=0), values.std(axis=0)))
        ratios.append(seconds(moments, on_device) / unit)
    return statistics.median(ratios)


def of_neighbors():
    """Seconds and mebibytes beside the data, for 50,000 rows of 64 features."""
    random = np.random.default_rng(0)
    inputs = jnp.asarray(random.normal(size=(50_000, 64)), jnp.float32)
    key = jax.random.key(0)
    measure = jax.jit(lambda x: ns.continuity(x, jnp.sin(x[:, 0]), key=key))
    compiled = measure.lower(inputs).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
    seconds(compiled, inputs)
    return seconds(compiled, inputs), memory


if __name__ == "__main__":
    print(f"feature_moments, of NumPy's mean and std: {of_moments():.2f}")
    taken, memory = of_neighbors()
    print(f"continuity of 50,000 x 64: {taken:.1f} s, {memory:.0f} MiB")
