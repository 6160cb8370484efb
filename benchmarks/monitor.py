"""What watching costs in a training step, as ratios against the plain step.

Run it with ``python benchmarks/monitor.py``, with names of networks behind it for some
of them alone.  Every step donates its parameters and its states.  Everything is
compiled first; then the plain step, the same step again and the monitored ones take
turns of 16 steps, in alternating order, so that a busy machine slows all alike.
Medians of the ratios to the plain step of the same turn; the step again shows the
noise.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import networks
import optax

import nnsanity as ns

NAMES = ("MLP, batch 128", "CNN, batch 32", "transformer, batch 16")
TURNS = 30
STEPS = 16
SECONDS = 90.0
"""Turns of slow networks stop after about this time."""


class Compiled(NamedTuple):
    """A compiled step, what it took to compile, and the bytes it needs at its peak."""

    run: Callable
    carry: tuple
    compile_time: float
    peak: int


def compiled(step, carry, batch):
    """Compiles a step that donates what it carries."""
    lowered = jax.jit(step, donate_argnums=0).lower(carry, batch)
    began = time.perf_counter()
    run = lowered.compile()
    took = time.perf_counter() - began
    memory = run.memory_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
    return Compiled(run, jax.tree.map(jnp.copy, carry), took, peak)


def plain_step(case, optimizer):
    """A training step as anybody writes it."""

    def step(carry, batch):
        params, opt_state = carry
        loss, grads = jax.value_and_grad(case.loss_fn)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return step


def watched_step(case, optimizer):
    """The same with a watched gradient, and nothing done with what it returns."""

    def step(carry, batch):
        params, opt_state = carry
        watch = ns.value_and_grad(case.loss_fn)
        (loss, signals), grads = watch(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), (loss, signals)

    return step


def monitored_step(case, optimizer, monitor):
    """The same with a monitor in it."""

    def step(carry, batch):
        params, opt_state, state = carry
        watch = ns.value_and_grad(case.loss_fn, when=monitor.due(state))
        (loss, signals), grads = watch(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        state = monitor.update(
            state,
            loss=loss,
            signals=signals,
            grads=grads,
            updates=updates,
            params=params,
        )
        return (optax.apply_updates(params, updates), opt_state, state), loss

    return step


def wrapped_step(case, optimizer, monitor):
    """The same with a monitor around its optimizer."""

    def step(carry, batch):
        params, opt_state = carry
        when = monitor.due(opt_state.monitor)
        watch = ns.value_and_grad(case.loss_fn, when=when)
        (loss, signals), grads = watch(params, batch)
        updates, opt_state = optimizer.update(
            grads, opt_state, params, value=loss, signals=signals
        )
        return (optax.apply_updates(params, updates), opt_state), loss

    return step


def steps_of(case):
    """Compiles the plain step twice, and the monitored ones."""
    optimizer = optax.adam(1e-4)
    carry = case.params, optimizer.init(case.params)
    steps = {
        name: compiled(plain_step(case, optimizer), carry, case.batch)
        for name in ("plain", "plain again")
    }
    steps["value_and_grad"] = compiled(watched_step(case, optimizer), carry, case.batch)
    for every in (1, 16):
        monitor = ns.monitor(every=every)
        state = monitor.init(case.loss_fn, case.params, case.batch)
        step = monitored_step(case, optimizer, monitor)
        name = f"update, every={every}"
        steps[name] = compiled(step, (*carry, state), case.batch)
        around = monitor.around(optimizer, case.loss_fn, case.batch)
        step = wrapped_step(case, around, monitor)
        name = f"around, every={every}"
        steps[name] = compiled(
            step, (case.params, around.init(case.params)), case.batch
        )
    return steps


def seconds(step, carry, batch):
    """How long some steps take until their results are there."""
    began = time.perf_counter()
    for _ in range(STEPS):
        carry, _ = step.run(carry, batch)
    jax.block_until_ready(carry)
    return time.perf_counter() - began, carry


def ratios(steps, batch):
    """Median time of each step in units of the plain one."""
    carries = {name: step.carry for name, step in steps.items()}
    found = {name: [] for name in steps if name != "plain"}
    began = time.perf_counter()
    for turn in range(TURNS + 1):
        order = list(steps)[:: 1 if turn % 2 else -1]
        took = {}
        for name in order:
            took[name], carries[name] = seconds(steps[name], carries[name], batch)
        if turn == 0:
            continue  # caches are cold
        for name, values in found.items():
            values.append(took[name] / took["plain"])
        if turn >= 5 and time.perf_counter() - began > SECONDS:
            break
    return {name: statistics.median(values) for name, values in found.items()}


def main():
    """Prints the table."""
    print(jax.devices()[0].device_kind)
    print("in units of the plain step: run, compile time, peak memory")
    for name in NAMES:
        if not any(part in name for part in sys.argv[1:] or [""]):
            continue
        case = networks.CASES[name]()
        steps = steps_of(case)
        plain = steps["plain"]
        print(name)
        for one, ratio in ratios(steps, case.batch).items():
            compile_time = steps[one].compile_time / plain.compile_time
            peak = steps[one].peak / plain.peak
            print(f"  {one:16} {ratio:6.3f} {compile_time:6.2f} {peak:6.3f}")


if __name__ == "__main__":
    main()
