"""What measurements cost, as ratios against one bare jitted training step.

Run it with ``python benchmarks/cost.py``.  Everything is compiled first; then the
bare step, the same step again and each measurement take turns, in alternating order,
so that a busy machine slows all alike.  Medians of the ratios to the bare step of the
same turn; the step again shows the noise.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import networks
import optax

import nnsanity as ns

TURNS = 60


def seconds(function, *args):
    """How long one call takes until its results are there."""
    began = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - began


def ratios(bare, calls):
    """Median time of each call in units of the bare one."""
    for call in (bare, *calls.values()):
        seconds(*call)
    found = {name: [] for name in calls}
    for turn in range(TURNS):
        unit = seconds(*bare)
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            found[name].append(seconds(*calls[name]) / unit)
    return {name: statistics.median(values) for name, values in found.items()}


def of_single_functions():
    """Each function alone, in units of an Adam step of the MLP."""
    case = networks.mlp()
    params, (inputs, _) = case.params, case.batch
    optimizer = optax.adam(1e-3)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(case.loss_fn)(params, batch)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    grads = jax.jit(jax.grad(case.loss_fn))(params, case.batch)
    bare = step, params, state, case.batch
    calls = {
        "the step again": bare,
        "apply_fn": (jax.jit(case.apply_fn), params, inputs),
        "dead_units": (ns.dead_units, case.apply_fn, params, inputs),
        "activations": (ns.activations, case.apply_fn, params, inputs),
        "weight_stats": (ns.weight_stats, case.apply_fn, params, inputs),
        "gradient_stats": (jax.jit(ns.gradient_stats), grads),
        "feature_moments": (jax.jit(ns.feature_moments), inputs),
    }
    print("In units of an Adam step of the MLP")
    for name, ratio in ratios(bare, calls).items():
        print(f"  {name:16} {ratio:6.3f}")


def of_watching(name, case):
    """``ns.value_and_grad`` in units of ``jax.value_and_grad``."""

    def watch(params, batch, when):
        return ns.value_and_grad(case.loss_fn, when=when)(params, batch)

    steps = {
        "jax again": (jax.value_and_grad(case.loss_fn),),
        "watched": (ns.value_and_grad(case.loss_fn),),
        "when, True": (watch, jnp.ones((), bool)),
        "when, False": (watch, jnp.zeros((), bool)),
    }
    bare = compiled(jax.value_and_grad(case.loss_fn), case)
    calls = {one: compiled(step, case, *more) for one, (step, *more) in steps.items()}
    timed = {one: (call[0], *call[1]) for one, call in calls.items()}
    found = ratios((bare[0], *bare[1]), timed)
    print(
        f"{name}, in units of jax.value_and_grad: run time, compile time, peak memory"
    )
    for one, (_, _, seconds_to_compile, peak) in calls.items():
        compile_ratio, memory_ratio = seconds_to_compile / bare[2], peak / bare[3]
        print(
            f"  {one:12} {found[one]:6.3f} {compile_ratio:6.2f} {memory_ratio:6.3f}",
            flush=True,
        )


def compiled(step, case, *more):
    """The compiled step, its arguments, the time that took, and its memory."""
    arguments = (case.params, case.batch, *more)
    lowered = jax.jit(step).lower(*arguments)
    began = time.perf_counter()
    result = lowered.compile()
    took = time.perf_counter() - began
    memory = result.memory_analysis()
    peak = memory.temp_size_in_bytes + memory.output_size_in_bytes
    return result, arguments, took, peak + memory.argument_size_in_bytes


def main():
    """Prints the tables."""
    print(jax.devices()[0].device_kind)
    of_single_functions()
    for name, make in networks.CASES.items():
        of_watching(name, make())


if __name__ == "__main__":
    main()
