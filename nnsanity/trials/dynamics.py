"""What is measured of rate, batch size and regularization before the trial."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nnsanity._tree import num_examples
from nnsanity._types import PyTree
from nnsanity.checks import batch_size, learning_rate, regularization
from nnsanity.findings import Finding
from nnsanity.quantities.clipping import clipped_share, clipping
from nnsanity.quantities.example_norms import example_gradient_norms
from nnsanity.trials.measure import training_noise
from nnsanity.trials.problem import Problem

NUM_BATCHES = 10
"""Batches whose gradients tell how often clipping bites."""


class Dynamics(NamedTuple):
    """What was found.

    Attributes:
        findings: suspicions and notes.
        measurements: by name.
        skipped: what could not be measured, and why.
    """

    findings: tuple[Finding, ...]
    measurements: Mapping[str, Any]
    skipped: Mapping[str, str]


def measure_dynamics(problem: Problem, batch: tuple[PyTree, PyTree]) -> Dynamics:
    """Looks for outliers among the examples, clipping, and what is not there.

    Costs one gradient of the batch and the time to compile it; for an optimizer that
    may clip some seconds more.

    Args:
        problem: as given.
        batch: the examples that networks are measured on.
    """
    skipped: dict[str, str] = {}
    measurements = {
        name: attempted(skipped, name, measure)
        for name, measure in _measures(problem, batch).items()
    }
    measurements = {name: one for name, one in measurements.items() if one is not None}
    findings = batch_size.judge_rest(
        problem.given.batch_size, problem.given.num_examples
    )
    if "outlier_examples" in measurements:
        outliers, count = measurements["outlier_examples"], num_examples(batch)
        findings += learning_rate.judge_outliers(outliers, count)
    decay, pull = (measurements.get(name) for name in ("weight_decay", "penalty_pull"))
    if decay is not None and pull is not None:
        findings += regularization.judge_presence(
            has_noise=training_noise(problem).varies,
            has_decay=bool(jnp.any(decay != 0)),
            has_penalty=bool(pull != 0),
            has_validation=problem.validation is not None,
        )
    if "clipping" in measurements and bool(jnp.any(measurements["clipping"].clips)):
        share = share_of_clipped_steps(problem)
        measurements["clipped_steps"] = share
        if not share <= learning_rate.CLIPPED_LIMIT:
            findings += (learning_rate.clipping_active(share),)
    return Dynamics(findings, measurements, skipped)


def _measures(
    problem: Problem, batch: tuple[PyTree, PyTree]
) -> dict[str, Callable[[], Any]]:
    def outliers() -> learning_rate.OutlierExamples:
        norms = example_gradient_norms(problem.loss_fn, problem.params, batch)
        return learning_rate.outlier_examples(norms)

    optimizer, params = problem.optimizer, problem.params
    if optimizer is None:
        return {"outlier_examples": outliers}
    return {
        "outlier_examples": outliers,
        "weight_decay": lambda: regularization.weight_decay(optimizer, params),
        "penalty_pull": lambda: regularization.penalty_pull(
            problem.loss_fn, params, batch
        ),
        "clipping": lambda: clipping(optimizer, params),
    }


def attempted(skipped: dict[str, str], name: str, measure: Callable[[], Any]) -> Any:
    """Measures what a program may not be made for, such as a batch of one example.

    Args:
        skipped: gets the reason where it fails.
        name: of the measurement.
        measure: makes it.

    Returns:
        What was measured, or None.
    """
    try:
        return measure()
    except Exception as error:  # the user's own functions may raise anything
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        skipped[name] = text
        return None


def share_of_clipped_steps(problem: Problem) -> float:
    """Returns how many batches have a gradient that the optimizer clips, at the start.

    Costs 576 updates and a gradient for each of ten batches.

    Args:
        problem: with an optimizer.
    """
    size = min(problem.batch_size, problem.size)
    starts = range(0, problem.size - size + 1, size)[:NUM_BATCHES]
    gradient_fn = jax.jit(jax.grad(problem.loss_fn, allow_int=True))
    shares = [
        clipped_share(
            problem.optimizer,
            problem.params,
            gradient_fn(problem.params, problem.batch(slice(start, start + size))),
        )
        for start in starts
    ]
    held = ~(jnp.stack(shares) <= learning_rate.HELD_BACK)
    return float(jnp.mean(held))
