"""A few rows far from all others: where they lie, and which examples do not count."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnsanity._tree import in_float32, num_examples
from nnsanity._types import Array, PyTree
from nnsanity.checks import normalization
from nnsanity.quantities.moments import feature_moments, z_scores
from nnsanity.quantities.neighbors import nearest_neighbors
from nnsanity.quantities.outliers import Outliers, outliers
from nnsanity.trials.problem import Problem

MAX_NUMBERS = 2**23
"""Numbers of a table up to which outliers are looked for."""
MOST_LEFT_OUT = 0.1
"""Share of the examples from which on outlying ones are no exception; one column has
one in a hundred at most."""
MAX_ASKED = 64
"""Outlying examples whose neighbours are looked for."""
ALIKE = 0.5
"""Share of outlying examples with a neighbour that is one too, from which on inputs
tell which they are; one in a hundred by chance."""


class InnerRange(NamedTuple):
    """The range of a table without a few rows that decide its deviation.

    Attributes:
        measured: the outliers, feature by feature.
        low: [features], smallest of all other values; -inf where there are none.
        high: [features], their largest.
    """

    measured: Outliers
    low: Array
    high: Array

    def clipped(self, values: Array) -> Array:
        """Clips values of [examples, ..., features]."""
        rows = values.reshape(len(values), -1)
        clipped = jnp.clip(rows, self.low, self.high)
        return clipped.reshape(values.shape).astype(values.dtype)

    def outside(self, values: Array) -> np.ndarray:
        """Tells which examples have a value outside, bool[examples]."""
        rows = jnp.reshape(values, (len(values), -1))
        return np.asarray(jnp.any((rows < self.low) | (rows > self.high), axis=1))


def inner_range(values: Array) -> InnerRange | None:
    """Finds a few rows that lie apart; None where there are none, or it is too large.

    Args:
        values: [examples, ...].
    """
    if values.size > MAX_NUMBERS:
        return None
    measured = outliers(values.reshape(len(values), -1))
    apart = normalization.lies_apart(measured)
    if not apart.any():
        return None
    return InnerRange(
        measured,
        jnp.where(apart, measured.low, -jnp.inf),
        jnp.where(apart, measured.high, jnp.inf),
    )


def range_of_targets(problem: Problem) -> InnerRange | None:
    """Finds the range of the targets without a few that look like slips.

    None where there are none, where it would be many examples, and where examples with
    alike inputs are outlying too: then they are what has to be learned.

    Args:
        problem: whose targets.
    """
    found = inner_range(problem.targets) if problem.kind == "numbers" else None
    if found is None:
        return None
    outside = found.outside(problem.targets)
    if outside.mean() >= MOST_LEFT_OUT or _inputs_tell(problem.inputs, outside):
        return None
    return found


def _inputs_tell(inputs: PyTree, outside: np.ndarray) -> bool:
    """Tells whether the nearest neighbours of outlying examples are outlying too."""
    leaves = [in_float32(leaf) for leaf in jax.tree.leaves(inputs)]
    if sum(leaf.size for leaf in leaves) > MAX_NUMBERS or outside.sum() < 2:
        return False
    rows = jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)
    rows = z_scores(rows, feature_moments(rows))
    asked = jnp.asarray(np.flatnonzero(outside)[:MAX_ASKED], jnp.int32)
    nearest = np.asarray(nearest_neighbors(rows, asked, num_neighbors=1))[:, 0]
    return bool(outside[nearest].mean() >= ALIKE)


def outlying_targets(problem: Problem, targets: PyTree) -> np.ndarray:
    """Tells which examples do not count where trainings are compared.

    Those whose targets look like slips: they decide what a network explains of the
    targets' variance, whatever it learned of all others.

    Args:
        problem: in whose targets they are found.
        targets: its own, or those of a validation set.

    Returns:
        bool[examples].
    """
    found = range_of_targets(problem)
    if found is not None:
        return found.outside(targets)
    leaves = jax.tree.leaves(targets)
    return np.zeros(num_examples(leaves) if leaves else problem.size, bool)


def examples_in_words(problem: Problem) -> str:
    """Says how many examples a trial is about."""
    size, num_given = problem.size, problem.given.num_examples
    words = f"{size:,} of the {num_given:,}" if size < num_given else f"{size}"
    left_out = int(outlying_targets(problem, problem.targets).sum())
    rest = f" ({left_out} with outlying targets do not count)" if left_out else ""
    return f"{words} examples{rest}"
