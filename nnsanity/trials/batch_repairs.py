"""Repairs that train on as many examples, in batches of another size."""

import functools
from collections.abc import Mapping

from nnsanity.checks import batch_size
from nnsanity.findings import Finding
from nnsanity.trials.problem import Problem
from nnsanity.trials.repairs import Repair

MAX_REPAIRED_STEPS = 2000
"""Steps of a copy that trains in smaller batches, at most; or those of the original."""


def batch_repairs(
    problem: Problem, suspected: Mapping[str, Finding]
) -> tuple[Repair, ...]:
    """Lists the batches that are worth a try.

    Args:
        problem: as given.
        suspected: findings by rule; a batch that is too large for its noise scale names
            the one to try.
    """
    noisy = suspected.get(batch_size.TOO_LARGE)
    given = problem.given
    if noisy is None and not batch_size.suspected(given.batch_size, given.num_examples):
        return ()
    size = batch_size.USUAL
    if noisy is not None:
        size = batch_size.suggested_size(noisy.limit, problem.size)
    return (
        Repair(
            f"training in batches of {size}",
            "batch",
            lambda copy, key: copy,
            () if noisy is None else (batch_size.TOO_LARGE,),
            noisy or batch_size.wrong_size(given.batch_size, given.num_examples),
            is_suspected=True,
            rewrite=functools.partial(_with_batches, size=size),
            is_free=True,
        ),
    )


def _with_batches(problem: Problem, *, size: int) -> Problem:
    """Trains on as many examples."""
    examples = problem.num_steps * max(problem.batch_size, size)
    most = max(problem.num_steps, MAX_REPAIRED_STEPS)
    return problem._replace(batch_size=size, num_steps=min(examples // size, most))
