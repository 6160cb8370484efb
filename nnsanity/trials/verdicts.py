"""What only a training can show: symmetry, memorizing, a loss that asks otherwise."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from nnsanity._tree import inexact_leaves
from nnsanity._types import Array
from nnsanity.checks import (
    gradients,
    initialization,
    preprocessing,
    regularization,
    results,
)
from nnsanity.findings import Finding
from nnsanity.quantities.errors import constant_baseline, linear_share
from nnsanity.quantities.neighbors import Continuity, continuity
from nnsanity.quantities.targets import target_columns
from nnsanity.tracing.reach import reach
from nnsanity.trials.angles import judge_angles
from nnsanity.trials.by_heart import judge_by_heart, judge_outputs
from nnsanity.trials.inside import measure_network
from nnsanity.trials.interventions import Diagnosis
from nnsanity.trials.levels import FAILED, LEARNED, is_on_its_way, last
from nnsanity.trials.measure import data_loss, few_examples, perfect_loss, some_examples
from nnsanity.trials.problem import Problem
from nnsanity.trials.trial import Outcome

MIN_NEIGHBORHOOD, MAX_NEIGHBORHOOD = 50, 2000
"""Fewest and most examples whose neighbours are compared."""
SMELLS = frozenset({"learning-rate/outlier-examples"})
"""Rules that no repair tests: warnings only where nothing else is found."""
UNREACHABLE = "final-activation/unreachable-targets"
CLASS_SHARE = 0.1
"""Share of targets out of reach from which on they are a class of their own."""
MIN_ROWS_FOR_EACH = 5
"""Fewest examples for each feature with which a linear function says anything."""
MAX_NUMBERS = 2**25
"""Numbers of targets, classes as one-hot rows, up to which they are compared."""
CONSTANT_SHARE = 0.95
"""Loss in units of a constant output's, from which on nothing counts as learned."""


def judge_outcomes(
    problem: Problem,
    diagnosis: Diagnosis,
    findings: Sequence[Finding],
    measurements: Mapping[str, Any],
) -> tuple[list[Finding], dict[str, Any]]:
    """Judges a training and, where it failed and nothing explains it, says so.

    Args:
        problem: what was trained.
        diagnosis: how it went, and what repairs changed.
        findings: what is known already.
        measurements: of the untrained network.

    Returns:
        More findings, and more measurements by name.
    """
    outcome, level = diagnosis.outcomes[0], diagnosis.level
    found = [
        *_symmetry(problem, diagnosis, measurements),
        *_overfitting(outcome, findings),
        *gradients.judge_unchanged(problem.params, outcome.params, _explained(problem)),
    ]
    measured = _errors(problem, outcome)
    if level < LEARNED:
        found += _contradictions(problem, measured)
        found += _seams(problem, diagnosis, measured)
    if level <= FAILED:
        found += _wrong_loss(problem, diagnosis)
    known = (*findings, *diagnosis.causes)
    if not _has_alarm((*known, *found)):
        found += _shuffled(problem, diagnosis, measured)
    if level <= FAILED and not _has_alarm((*known, *found)):
        found += _unexplained(problem, diagnosis, measurements["constant_loss"])
        found += judge_by_heart(problem, found, measured)
    if level <= FAILED:
        found += judge_outputs(problem, diagnosis, measured)
    return found, measured


def _errors(problem: Problem, outcome: Outcome) -> dict[str, Any]:
    """Measures the errors after training, in the unit of the targets."""
    if problem.kind != "numbers":
        return {}
    inputs, targets = problem.counting(some_examples(problem))
    outputs = jax.jit(problem.apply_fn)(outcome.params, inputs)
    return {"constant_baseline": constant_baseline(outputs, targets)}


def _explained(problem: Problem) -> set[str]:
    """Names the parameters of which reading the program says why they stay."""
    batch = problem.batch(slice(problem.batch_size))
    found = reach(problem.loss_fn, problem.params, batch)
    reaches = zip(found.names, found.differentiable, strict=True)
    return {name for name, is_reached in reaches if not is_reached}


def without_blame(
    findings: Sequence[Finding], diagnosis: Diagnosis
) -> tuple[Finding, ...]:
    """Tells smells as such where the network learns, or something else explains it.

    What stands for a class is up to the loss; but a cross entropy that falls below zero
    was not made for the numbers that it gets.
    """
    is_below = last(diagnosis.outcomes[0].losses) < 0
    if diagnosis.level < LEARNED and is_below:
        findings = [
            one._replace(severity="warning") if _is_out_of_reach(one) else one
            for one in findings
        ]
    others = [one for one in findings if one.rule not in SMELLS]
    if diagnosis.level < LEARNED and not _has_alarm((*others, *diagnosis.causes)):
        return tuple(findings)
    return tuple(
        one._replace(severity="info") if one.rule in SMELLS else one for one in findings
    )


def _is_out_of_reach(finding: Finding) -> bool:
    """Tells whether outputs can't be what stands for a whole class."""
    is_noted = (finding.rule, finding.severity) == (UNREACHABLE, "info")
    return is_noted and finding.measured >= CLASS_SHARE


def _has_alarm(findings: Sequence[Finding]) -> bool:
    return any(finding.severity != "info" for finding in findings)


def _symmetry(
    problem: Problem, diagnosis: Diagnosis, measurements: Mapping[str, Any]
) -> tuple[Finding, ...]:
    params = diagnosis.outcomes[0].params
    finite = all(np.isfinite(leaf).all() for leaf in inexact_leaves(params))
    if not finite or not problem.network.layers:
        return ()
    trained = problem._replace(params=params)
    end = measure_network(trained, some_examples(problem)).weights
    return initialization.judge_symmetry(measurements["weights"], end, problem.network)


def _overfitting(outcome: Outcome, findings: Sequence[Finding]) -> tuple[Finding, ...]:
    if any(finding.rule == "normalization/split-mismatch" for finding in findings):
        return ()  # which explains any gap
    return regularization.judge_overfitting(
        losses=outcome.losses,
        quality=outcome.seen_quality,
        validation_losses=outcome.validation_losses,
        validation_quality=outcome.validation_quality,
    )


def _columns(problem: Problem, targets: Array) -> Array | None:
    """Returns targets as one row for each example, where there is one."""
    inputs = problem.inputs
    is_table = isinstance(inputs, jax.Array) and not np.iscomplexobj(inputs)
    if problem.kind is None or not is_table:
        return None
    numbers = targets.size
    if problem.kind == "classes":
        numbers *= int(targets.max()) + 1
    if numbers > MAX_NUMBERS or numbers % len(targets):
        return None
    columns = target_columns(targets, problem.kind)
    return columns if len(columns) == len(targets) else None


def _contradictions(problem: Problem, measured: dict) -> tuple[Finding, ...]:
    columns = _columns(problem, problem.targets)
    if columns is None:
        return ()
    measured["duplicates"] = preprocessing.duplicates(problem.inputs, columns)
    return preprocessing.judge_duplicates(measured["duplicates"])


def _wrong_loss(problem: Problem, diagnosis: Diagnosis) -> tuple[Finding, ...]:
    batch = problem.counting(few_examples(problem))
    return results.judge_wrong_loss(
        perfect=perfect_loss(problem, batch),
        reached=data_loss(problem, diagnosis.outcomes[0].params, batch),
        start=data_loss(problem, problem.params, batch),
        explained=diagnosis.level,
        learned=FAILED,
    )


def _near(problem: Problem, measured: dict) -> Continuity | None:
    """Measures the neighbours of some examples, once."""
    inputs, targets = problem.batch(slice(MAX_NEIGHBORHOOD))
    columns = _columns(problem, targets)
    if columns is None or problem.tokens or problem.size < MIN_NEIGHBORHOOD:
        return None
    if "continuity" not in measured:
        # A fixed key: the shuffles are a yardstick, no part of the report's chance.
        near = continuity(inputs, columns, key=jax.random.key(0))
        measured["continuity"] = jax.device_get(near)
    return measured["continuity"]


def _seams(
    problem: Problem, diagnosis: Diagnosis, measured: dict
) -> tuple[Finding, ...]:
    if problem.kind != "numbers":
        return ()  # classes have no middle
    near = _near(problem, measured)
    if near is None:
        return ()
    severity = "error" if diagnosis.level <= FAILED else "warning"
    found = preprocessing.judge_continuity(near, severity=severity)
    if not found:
        return ()
    key = jax.random.key(0)
    return (*judge_angles(problem, key=key, num_steps=diagnosis.num_steps), *found)


def _shuffled(
    problem: Problem, diagnosis: Diagnosis, measured: dict
) -> tuple[Finding, ...]:
    """Says of a network that learns nothing, or by heart alone, what neighbours say.

    Of one that learns something only where the inputs tell nothing linearly, either:
    among many features neighbours are poor witnesses.
    """
    held_out = float(np.median([last(one.quality) for one in diagnosis.outcomes]))
    has_failed = diagnosis.level <= FAILED
    if not has_failed and not held_out <= FAILED:
        return ()
    near = _near(problem, measured)
    if near is None or (not has_failed and _tells_linearly(problem)):
        return ()
    severity = "error" if has_failed else "warning"
    return results.judge_neighbors(near, severity=severity)


def _tells_linearly(problem: Problem) -> bool:
    """Tells whether a linear function explains something; also if nobody can say."""
    inputs, targets = problem.batch(slice(MAX_NEIGHBORHOOD))
    columns = _columns(problem, targets)
    if columns is None or len(inputs) < MIN_ROWS_FOR_EACH * inputs[0].size:
        return True
    return float(linear_share(inputs, columns)) > 0


def _unexplained(
    problem: Problem, diagnosis: Diagnosis, constant: float
) -> tuple[Finding, ...]:
    outcome = diagnosis.outcomes[0]
    if is_on_its_way(outcome):
        return ()
    reached = data_loss(problem, outcome.params, some_examples(problem))
    baseline = constant if np.isfinite(constant) else float(outcome.losses[0])
    if reached < baseline - (1 - CONSTANT_SHARE) * abs(baseline):
        return ()
    finding = results.no_better_than_constant(
        diagnosis.level, diagnosis.num_steps, diagnosis.ruled_out
    )
    # Without a baseline, a network that is as good as it gets looks the same.
    is_sure = np.isfinite(constant)
    return (finding if is_sure else finding._replace(severity="warning"),)
