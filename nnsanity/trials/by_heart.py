"""What a network that failed can still do: learn a few examples by heart."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nnsanity._tree import in_float32
from nnsanity._types import Array, Params, PyTree
from nnsanity.checks import results
from nnsanity.findings import Finding
from nnsanity.quantities.dependence import input_dependence
from nnsanity.quantities.overfit import Overfit, overfit_batch
from nnsanity.quantities.targets import target_columns
from nnsanity.trials.copies import Copy, plain, prepared, quiet_loss_of
from nnsanity.trials.interventions import Diagnosis
from nnsanity.trials.measure import perfect_loss, some_examples
from nnsanity.trials.problem import Problem
from nnsanity.trials.repairs import available_repairs

NUM_EXAMPLES = 16
NUM_STEPS = 300
ADAM = optax.adam(1e-3)
HARMLESS = ("inputs", "targets", "weights", "hidden")
"""Repairs that are made together, so that only the program itself is left to blame."""


def judge_by_heart(
    problem: Problem,
    findings: Sequence[Finding],
    measured: dict[str, Any],
) -> tuple[Finding, ...]:
    """Says whether a network that failed can't even learn one small batch by heart.

    Asked of the program as it is, and of a copy with all harmless repairs and another
    optimizer.  Costs two times twelve trainings on a few examples.

    Args:
        problem: with an optimizer.
        findings: what was said of it; without an alarm there is nothing to explain.
        measured: where the result goes.
    """
    if not any(finding.severity != "info" for finding in findings):
        return ()
    batch = _distinct(problem)
    if batch is None:
        return ()
    repairs = _harmless(problem)
    best: Overfit | None = None
    for chosen in ((), repairs):
        found = _overfit(problem, batch, chosen)
        if best is None or _rank(found) < _rank(best):
            best = found
        if bool(found.fits):
            break
    measured["overfit_batch"] = best
    if best is None:
        return ()
    names = [repair.name for repair in repairs] + ["Adam"]
    return results.judge_overfit(best, len(jax.tree.leaves(batch)[0]), names)


def _rank(one: Overfit) -> float:
    """Nearest to a perfect fit, from either side, first; NaN last."""
    left = abs(float(one.left))
    return left if np.isfinite(left) else float("inf")


def _distinct(problem: Problem) -> tuple[PyTree, PyTree] | None:
    """Returns a few examples, unless all their targets or inputs are one."""
    batch = problem.batch(slice(NUM_EXAMPLES))
    parts = [
        np.concatenate(
            [np.asarray(leaf).reshape(len(leaf), -1) for leaf in jax.tree.leaves(part)],
            axis=1,
        )
        for part in batch
        if jax.tree.leaves(part)
    ]
    is_varied = all(len(np.unique(part, axis=0)) > 1 for part in parts)
    return batch if is_varied and problem.size > 1 else None


def _harmless(problem: Problem) -> list:
    """Returns the first repair of each harmless group."""
    chosen: dict[str, Any] = {}
    for repair in available_repairs(problem):
        is_of_numbers = repair.inputs is None and repair.rewrite is None
        if repair.group in HARMLESS and is_of_numbers:
            chosen.setdefault(repair.group, repair)
    return list(chosen.values())


def _overfit(
    problem: Problem, batch: tuple[PyTree, PyTree], repairs: Sequence[Any]
) -> Overfit:
    key = jax.random.key(0)
    copy: Copy = plain(problem)
    for repair in repairs:
        copy = repair.change(copy, key)
    copy = copy._replace(penalty_scale=0 * copy.penalty_scale)
    quiet = quiet_loss_of(problem, copy)

    def loss_fn(params: Params, given: tuple[PyTree, PyTree]) -> Array:
        return in_float32(quiet(params, given))

    changed = prepared(problem, copy, batch)
    perfect = perfect_loss(problem, changed)

    def learned(best_loss: float | None) -> Overfit:
        optimizer = problem.optimizer
        found = overfit_batch(
            loss_fn,
            copy.params,
            changed,
            ADAM if repairs or optimizer is None else optimizer,
            key=key,
            num_steps=NUM_STEPS,
            best_loss=best_loss,
        )
        return jax.device_get(found)

    if np.isfinite(perfect):
        return learned(perfect)
    found = learned(0.0)
    # Where nobody knows the floor of a loss, one below zero may be a log likelihood.
    return learned(None) if found.loss < 0 else found


def judge_outputs(
    problem: Problem, diagnosis: Diagnosis, measured: dict[str, Any]
) -> list[Finding]:
    """Says of a network that failed what its outputs depend on.

    Args:
        problem: what was trained.
        diagnosis: how it went.
        measured: where the results go.
    """
    params = diagnosis.outcomes[0].params
    batch = some_examples(problem)
    findings: list[Finding] = []
    if problem.kind is not None:
        outputs = in_float32(jax.jit(problem.apply_fn)(params, batch[0]))
        columns = in_float32(target_columns(batch[1], problem.kind))
        spread = float(jnp.mean(jnp.std(outputs, axis=0)))
        wanted = float(jnp.mean(jnp.std(columns, axis=0)))
        findings += results.judge_collapse(spread, wanted)
    if problem.size > 1:
        found = input_dependence(problem.loss_fn, params, batch, key=jax.random.key(0))
        measured["input_dependence"] = found
        if np.isfinite(found.loss):
            findings += results.judge_dependence(float(found.z_score))
    return findings
