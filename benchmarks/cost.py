"""What measurements cost, as ratios against one bare jitted training step.

Run it with ``python benchmarks/cost.py``.  Everything is compiled first; then the
bare step, the same step again and each measurement take turns, in alternating order,
so that a busy machine slows all alike.  Medians of the ratios to the bare step of the
same turn; the step again shows the noise.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import networks
import optax

import nnsanity as ns
from nnsanity.trials.inside import packed_look

TURNS = 60


def seconds(function, *args):
    """How long one call takes until its results are there."""
    began = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - began


def ratios(bare, calls, *, turns=TURNS):
    """Median time of each call in units of the bare one."""
    for call in (bare, *calls.values()):
        seconds(*call)
    found = {name: [] for name in calls}
    for turn in range(turns):
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

    yes, no = jnp.ones((), bool), jnp.zeros((), bool)
    plain = compiled(jax.value_and_grad(case.loss_fn), case)
    again = compiled(jax.value_and_grad(case.loss_fn), case)
    watched = compiled(ns.value_and_grad(case.loss_fn), case)
    asked = compiled(watch, case, yes)
    arguments = case.params, case.batch
    calls = {
        "jax again": (again, *arguments),
        "watched": (watched, *arguments),
        "when, True": (asked, *arguments, yes),
        "when, False": (asked, *arguments, no),
    }
    timed = {one: (step.run, *rest) for one, (step, *rest) in calls.items()}
    found = ratios((plain.run, *arguments), timed)
    print(f"{name}, in units of jax.value_and_grad: run, compile time, peak memory")
    for one, (step, *_) in calls.items():
        compile_time = step.compile_time / plain.compile_time
        print(f"  {one:12} {found[one]:6.3f} {compile_time:6.2f}", end=" ")
        print(f"{step.peak / plain.peak:6.3f}", flush=True)


def of_looking_inside(name, case):
    """Everything of items 8 to 11 in units of ``jax.value_and_grad``."""
    look = functools.partial(packed_look, case.apply_fn, case.loss_fn)
    plain = compiled(jax.value_and_grad(case.loss_fn), case)
    again = compiled(jax.value_and_grad(case.loss_fn), case)
    inside = compiled(look, case)
    arguments = case.params, case.batch
    calls = {"jax again": again, "items 8 to 11": inside}
    timed = {one: (step.run, *arguments) for one, step in calls.items()}
    found = ratios((plain.run, *arguments), timed)
    print(f"{name}, in units of jax.value_and_grad: run, compile time, peak memory")
    for one, step in calls.items():
        compile_time = step.compile_time / plain.compile_time
        print(f"  {one:12} {found[one]:6.3f} {compile_time:6.2f}", end=" ")
        print(f"{step.peak / plain.peak:6.3f}", flush=True)


class Compiled(NamedTuple):
    """A compiled step, and what it took to compile and takes to run."""

    run: Callable
    compile_time: float
    peak: int


def compiled(step, case, *more):
    """Compiles a step for the parameters and the batch of a network."""
    lowered = jax.jit(step).lower(case.params, case.batch, *more)
    began = time.perf_counter()
    run = lowered.compile()
    took = time.perf_counter() - began
    memory = run.memory_analysis()
    sizes = (
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.temp_size_in_bytes,
    )
    return Compiled(run, took, sum(sizes))


def main():
    """Prints the tables."""
    print(jax.devices()[0].device_kind)
    of_single_functions()
    for name, make in networks.CASES.items():
        of_watching(name, make())
        of_looking_inside(name, make())


if __name__ == "__main__":
    main()
