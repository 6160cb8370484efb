"""Planted faults: does the checkup find them, and leave healthy programs alone?

    python benchmarks/detection/run.py --verify      trains every program first
    python benchmarks/detection/run.py --seeds 3     scores the checkup
    python benchmarks/detection/run.py --only NAME   some programs

``--half chosen`` and ``--half held-out`` take every other program: whatever is chosen
by looking at the first half is reported on the second.  Only errors and warnings count.
Intervals are 95 % Wilson intervals over programs.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import faults_of_data
import faults_of_networks
import faults_of_training
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tasks import HEALTHY

import nnsanity as ns

FAULTS = (
    *faults_of_data.FAULTS,
    *faults_of_training.FAULTS,
    *faults_of_networks.FAULTS,
)
NUM_LEADING = 3
HEALTHY_MARKS = {"accuracy": 0.75, "explained variance": 0.4}
MIN_LOSS = 0.1
"""By how much a fault must hurt."""


def halved(names, half):
    """Every other name, or all."""
    start = {"chosen": 0, "held-out": 1}.get(half)
    return list(names) if start is None else list(names)[start::2]


# Verify: does a program do what is claimed of it?


def trained_quality(problem, key):
    """Trains with the program's own optimizer; accuracy, or share of the variance."""
    optimizer = optax.with_extra_args_support(problem.optimizer)
    inputs, targets = map(jnp.asarray, problem.data)

    def loss_of(params, batch, key):
        if problem.train_loss_fn is None:
            return problem.loss_fn(params, batch)
        return problem.train_loss_fn(params, batch, key)

    def step(state, key):
        params, optimizer_state = state
        rows_key, noise_key = jax.random.split(key)
        rows = jax.random.choice(
            rows_key, len(inputs), (problem.batch_size,), replace=False
        )
        grads = jax.grad(loss_of)(params, (inputs[rows], targets[rows]), noise_key)
        updates, optimizer_state = optimizer.update(grads, optimizer_state, params)
        return (optax.apply_updates(params, updates), optimizer_state), None

    @jax.jit
    def train(params, key):
        state = params, optimizer.init(params)
        keys = jax.random.split(key, problem.num_steps)
        (params, _), _ = jax.lax.scan(step, state, keys)
        return problem.apply_fn(params, inputs)

    outputs = np.asarray(train(problem.params, key), np.float64)
    return quality(outputs, problem.data[1])


def quality(outputs, targets):
    """The name of the measure, and what was reached."""
    if not np.isfinite(outputs).all():
        outputs = np.zeros_like(outputs)
    if targets.dtype.kind == "i":
        return "accuracy", float(np.mean(outputs.argmax(-1) == targets))
    if set(np.unique(targets)) <= {0.0, 1.0}:
        if targets.shape[-1] > 1:
            return "accuracy", float(np.mean(outputs.argmax(-1) == targets.argmax(-1)))
        # Logits are cut at zero and probabilities at one half.
        hits = [np.mean((outputs > cut) == (targets > 0.5)) for cut in (0.0, 0.5)]
        return "accuracy", float(max(hits))
    error = np.mean((outputs - targets) ** 2) / np.mean(
        (targets - targets.mean(0)) ** 2
    )
    return "explained variance", float(max(1 - error, 0.0))


def verify(faults, healthy):
    """Prints each program and whether it fails, or learns, as claimed."""
    reached = {}
    num_wrong = 0

    def of(program):
        if program not in reached:
            build_key, train_key = jax.random.split(jax.random.key(0))
            reached[program] = trained_quality(program(build_key), train_key)
        return reached[program]

    for name, program in healthy.items():
        measure, value = of(program)
        is_right = value >= HEALTHY_MARKS[measure]
        num_wrong += not is_right
        print(
            f"{'ok   ' if is_right else 'WRONG'} {name:44} {measure} {value:.2f}",
            flush=True,
        )
    for fault in faults:
        (measure, value), (_, twin) = of(fault.faulty), of(fault.healthy)
        is_right = value <= twin - MIN_LOSS and twin >= HEALTHY_MARKS[measure]
        num_wrong += not is_right
        print(
            f"{'ok   ' if is_right else 'WRONG'} {fault.name:44} {measure}"
            f" {value:.2f}, repaired {twin:.2f}",
            flush=True,
        )
    print(f"{num_wrong} are not what they claim to be")


# Score.


def findings_of(program, seed):
    """Runs a checkup; returns its findings and the seconds."""
    build_key, checkup_key = jax.random.split(jax.random.key(seed))
    problem = program(build_key)
    began = time.perf_counter()
    report = ns.checkup(
        problem.apply_fn,
        problem.loss_fn,
        problem.params,
        problem.data,
        key=checkup_key,
        optimizer=problem.optimizer,
        batch_size=problem.batch_size,
        num_steps=problem.num_steps,
        train_loss_fn=problem.train_loss_fn,
        validation=problem.validation,
    )
    return report.findings, time.perf_counter() - began


def alarms_of(program, seed):
    """Returns the rules and items of the errors and warnings, and the seconds."""
    findings, seconds = findings_of(program, seed)
    return [(o.rule, o.item) for o in findings if o.severity != "info"], seconds


def wilson(share, number):
    """The 95 % Wilson interval of a share."""
    if not number:
        return 0.0, 1.0
    z = 1.959964**2
    centre, scale = share + z / (2 * number), 1 + z / number
    spread = math.sqrt(z * (share * (1 - share) / number + z / (4 * number**2)))
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def score(faults, healthy, seeds):
    """Scores every program over the seeds, and prints a line for each."""
    rows = []
    for fault in faults:
        alarms, seconds = zip(
            *(alarms_of(fault.faulty, s) for s in range(seeds)), strict=True
        )
        leading = [[item for _, item in one[:NUM_LEADING]] for one in alarms]
        row = {
            "name": fault.name,
            "items": fault.items,
            "detected": statistics.mean(bool(one) for one in leading),
            "first": statistics.mean(
                bool({*one[:1]} & {*fault.items}) for one in leading
            ),
            "among three": statistics.mean(
                bool({*one} & {*fault.items}) for one in leading
            ),
            "alarms": alarms,
            "seconds": seconds,
        }
        rows.append(row)
        _print_row(row, "+" if row["among three"] == 1 else "-")
    quiet = []
    for name, program in healthy.items():
        alarms, seconds = zip(
            *(alarms_of(program, s) for s in range(seeds)), strict=True
        )
        row = {
            "name": name,
            "alarm": statistics.mean(map(bool, alarms)),
            "alarms": alarms,
            "seconds": seconds,
        }
        quiet.append(row)
        _print_row(row, "-" if row["alarm"] else "+")
    return rows, quiet


def _print_row(row, mark):
    rules = ", ".join(rule for rule, _ in row["alarms"][0][:NUM_LEADING]) or "silent"
    print(f"{mark} {row['name']:46} {rules}  ({row['seconds'][0]:.0f} s)", flush=True)


def table(rows, quiet):
    """The scores, in all and for each planted item, as a table."""
    print("\n| | share | interval | programs |\n|---|---|---|---|")
    for name in ("detected", "among three", "first"):
        _print_share(name, [row[name] for row in rows])
    _print_share("alarm on a healthy program", [row["alarm"] for row in quiet])
    print("\n| item | programs | among three | first |\n|---|---|---|---|")
    for item in range(1, 12):
        own = [row for row in rows if row["items"][0] == item]
        if own:
            three, first = (
                sum(row[name] for row in own) for name in ("among three", "first")
            )
            print(f"| {item} | {len(own)} | {three:g} | {first:g} |")


def _print_share(name, values):
    share = statistics.mean(values) if values else 0.0
    low, high = wilson(share, len(values))
    print(
        f"| {name} | {share:.0%} | {low:.0%} to {high:.0%}"
        f" | {sum(values):g} of {len(values)} |"
    )


def main():
    """Verifies or scores."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--half", choices=("chosen", "held-out"))
    parser.add_argument("--only", nargs="*", default=())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    faults = [
        one
        for one in halved(FAULTS, options.half)
        if not options.only or one.name in options.only
    ]
    names = [
        one
        for one in halved(HEALTHY, options.half)
        if not options.only or one in options.only
    ]
    healthy = {name: HEALTHY[name] for name in names}
    if options.verify:
        verify(faults, healthy)
        return
    rows, quiet = score(faults, healthy, options.seeds)
    table(rows, quiet)
    if options.json:
        options.json.write_text(
            json.dumps({"faulty": rows, "healthy": quiet}, indent=1)
        )


if __name__ == "__main__":
    main()
