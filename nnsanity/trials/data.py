"""What inputs and targets show by themselves, before anything is trained."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnsanity._tree import in_float32, inexact_leaves
from nnsanity._types import PyTree
from nnsanity.checks import normalization, preprocessing
from nnsanity.findings import Finding, Limits
from nnsanity.quantities import scales
from nnsanity.quantities.columns import Wraparound, wraparound
from nnsanity.quantities.moments import feature_moments
from nnsanity.quantities.outliers import outliers
from nnsanity.trials.data_repairs import column_suspicions
from nnsanity.trials.measure import some_examples
from nnsanity.trials.outlying import MAX_NUMBERS
from nnsanity.trials.problem import Problem


class Examined(NamedTuple):
    """What the data show.

    Attributes:
        findings: in the order of the checks.
        measurements: by name.
        skipped: what was not looked at, and why.
    """

    findings: tuple[Finding, ...]
    measurements: dict[str, Any]
    skipped: dict[str, str]


def examine_data(problem: Problem, *, limits: Limits) -> Examined:
    """Measures and judges inputs and targets.

    Args:
        problem: whose data.
        limits: the user's own, by rule.
    """
    parts = (
        _inputs(problem, limits),
        _targets(problem, limits),
        _splits(problem),
        _columns(problem),
    )
    found = Examined((), {}, {})
    for part in parts:
        found = Examined(
            found.findings + part.findings,
            found.measurements | part.measurements,
            found.skipped | part.skipped,
        )
    return found


def _inputs(problem: Problem, limits: Limits) -> Examined:
    if problem.tokens:
        reason = "they are indices of an embedding"
        return Examined((), {}, {"normalization of the inputs": reason})
    findings: list[Finding] = []
    measurements: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    leaves = jax.tree_util.tree_leaves_with_path(problem.inputs)
    for path, leaf in leaves:
        name = f"inputs{jax.tree_util.keystr(path)}"
        groups = problem.groups if leaf.ndim > 1 else None
        measured = scales.normalization(leaf, groups=groups)
        measurements[name] = measured
        findings += normalization.judge_inputs(measured, name=name, limits=limits)
        if jnp.issubdtype(leaf.dtype, jnp.integer) and len(leaves) == 1:
            findings += preprocessing.judge_integers(name, leaf.dtype)
        if leaf.ndim > 2:
            continue  # the channel of an image has no rows
        if leaf.size > MAX_NUMBERS:
            skipped[f"outliers of {name}"] = f"more than {MAX_NUMBERS:,} numbers"
        else:
            far = outliers(leaf)
            measurements[f"outliers of {name}"] = far
            findings += normalization.judge_outliers(far, name=name)
    return Examined(tuple(findings), measurements, skipped)


def _targets(problem: Problem, limits: Limits) -> Examined:
    if problem.kind != "numbers":
        parts = (feature_moments(leaf) for leaf in inexact_leaves(problem.targets))
        found = [normalization.judge_finite_targets(part) for part in parts]
        return Examined(tuple(one for some in found for one in some), {}, {})
    outputs = jax.jit(problem.apply_fn)(problem.params, some_examples(problem)[0])
    measured = scales.target_scale(outputs, problem.targets)
    findings = [*normalization.judge_targets(measured, limits=limits)]
    measurements: dict[str, Any] = {"targets": measured}
    skipped: dict[str, str] = {}
    if problem.targets.size > MAX_NUMBERS:
        skipped["outliers of targets"] = f"more than {MAX_NUMBERS:,} numbers"
    else:
        far = outliers(problem.targets.reshape(problem.size, -1))
        measurements["outliers of targets"] = far
        findings += normalization.judge_outliers(far, name="targets")
    circle = circle_of_targets(problem)
    if circle is not None:
        measured_circle, period = circle
        measurements["wraparound of targets"] = measured_circle
        findings.append(preprocessing.wrapping_targets(measured_circle, period))
    return Examined(tuple(findings), measurements, skipped)


def circle_of_targets(problem: Problem) -> tuple[Wraparound, float] | None:
    """Returns how targets wrap around, and at what, where they look like angles.

    Where no clock or compass has their range, it is taken to close just beyond its end.

    Args:
        problem: whose targets.
    """
    inputs, targets = problem.inputs, problem.targets
    is_one = problem.kind == "numbers" and targets.size == problem.size
    if not is_one or not isinstance(inputs, jax.Array) or problem.tokens:
        return None
    both = in_float32(inputs), in_float32(targets)
    is_finite = all(bool(jnp.isfinite(one).all()) for one in both)
    if not is_finite or problem.size < 12:
        return None
    measured = jax.device_get(wraparound(targets.reshape(-1), others=inputs))
    if not bool(measured.wraps):
        return None
    span = float(jnp.max(targets) - jnp.min(targets))
    period = float(measured.period)
    return measured, period if np.isfinite(period) else span * (1 + 1 / problem.size)


def _splits(problem: Problem) -> Examined:
    if problem.validation is None:
        return Examined((), {}, {})
    findings: list[Finding] = []
    held_inputs, held_targets = problem.validation
    pairs = [] if problem.tokens else [("inputs", problem.inputs, held_inputs)]
    if problem.kind == "numbers":
        pairs.append(("targets", problem.targets, held_targets))
    for name, ours, theirs in pairs:
        for one, other in zip(
            jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True
        ):
            both = (feature_moments(leaf) for leaf in (one, other))
            findings += normalization.judge_split(*both, name=name)
    return Examined(tuple(findings), {}, {})


def _columns(problem: Problem) -> Examined:
    return Examined(column_suspicions(problem), {}, {})


def judge_rounding(data: PyTree) -> tuple[Finding, ...]:
    """Says where casting float64 arrays to float32 takes away what varies.

    It matters for numbers that are large beside their differences, as Unix times and
    coordinates in metres are.

    Args:
        data: as given, before it is cast; only its NumPy arrays of float64 are looked
            at.
    """
    if jax.config.read("jax_enable_x64"):
        return ()
    findings: list[Finding] = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(data):
        if not isinstance(leaf, np.ndarray) or leaf.dtype != np.float64:
            continue
        name = ("inputs", "targets")[path[0].idx] + jax.tree_util.keystr(path[1:])
        lost = _share_lost(leaf)
        findings += normalization.judge_rounding(lost, name=name)
    return tuple(findings)


def _share_lost(values: np.ndarray) -> np.ndarray:
    """Returns the rounding of each feature in units of its deviation."""
    rows = values.reshape(-1, values.shape[-1]) if values.ndim > 1 else values[:, None]
    with np.errstate(over="ignore", invalid="ignore"):
        error = rows - rows.astype(np.float32)
        deviation = rows.std(axis=0)
        size = np.sqrt(np.mean(error**2, axis=0))
    is_known = np.isfinite(size) & (deviation > 0)
    return np.where(is_known, size / np.where(deviation > 0, deviation, 1), 0.0)
