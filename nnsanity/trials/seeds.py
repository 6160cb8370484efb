"""The seeds that a program is trained from, the most typical first."""

from collections.abc import Sequence

import jax
import numpy as np

from nnsanity._types import Array
from nnsanity.trials.levels import level_of
from nnsanity.trials.problem import Problem
from nnsanity.trials.trial import Outcome

NUM_SEEDS = 3


def keys_of(key: Array) -> tuple[Array, ...]:
    """Returns the key of each seed."""
    return tuple(jax.random.fold_in(key, seed) for seed in range(NUM_SEEDS))


def typical_first(
    problem: Problem, outcomes: Sequence[Outcome], key: Array
) -> tuple[tuple[Outcome, ...], tuple[Array, ...]]:
    """Puts the seed that learned as much as the median first.

    A seed may make a program learn by luck: it should not stand for the program, nor be
    what repairs are tried from first.

    Args:
        problem: what was trained.
        outcomes: in the order of the seeds; not all of them need to have run.
        key: as given to ``keys_of``.

    Returns:
        The outcomes, and the keys of all seeds in the same order.
    """
    start, keys = float(outcomes[0].losses[0]), keys_of(key)
    levels = np.array([level_of(problem, one, start) for one in outcomes])
    order = np.argsort(np.abs(levels - np.median(levels)), kind="stable")
    untried = range(len(outcomes), NUM_SEEDS)
    return (
        tuple(outcomes[seed] for seed in order),
        tuple(keys[seed] for seed in (*order, *untried)),
    )
