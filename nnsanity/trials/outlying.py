"""A few rows far from all others: where they lie, and which examples do not count."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnsanity._tree import in_float32
from nnsanity._types import Array, PyTree
from nnsanity.checks import normalization
from nnsanity.quantities.moments import feature_moments, z_scores
from nnsanity.quantities.neighbors import nearest_neighbors
from nnsanity.quantities.outliers import Outliers, outliers

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
BEYOND = 0.05
"""Share of all others that lie as far at one end of a column as outlying examples do,
up to which that column sets these apart; half of them by chance."""
CHANCE = 1e-3
"""Probability with which a column that says nothing may set them apart."""


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
        """Clips values of [examples, ..., features]; those inside stay as they are."""
        rows = jnp.reshape(values, (len(values), -1))
        low, high = (end.astype(rows.dtype) for end in (self.low, self.high))
        is_low, is_high = self._beyond(rows)
        clipped = jnp.where(is_low, low, jnp.where(is_high, high, rows))
        return clipped.reshape(values.shape)

    def outside(self, values: Array) -> np.ndarray:
        """Tells which examples have a value outside, bool[examples]."""
        rows = jnp.reshape(values, (len(values), -1))
        is_low, is_high = self._beyond(rows)
        return np.asarray(jnp.any(is_low | is_high, axis=1))

    def _beyond(self, rows: Array) -> tuple[Array, Array]:
        """Tells which values lie below and above, as rounded as the ends are."""
        rounded = rows.astype(self.low.dtype)
        return rounded < self.low, rounded > self.high


def inner_range(values: Array) -> InnerRange | None:
    """Finds a few rows that lie apart; None where there are none.

    Neither are they looked for in complex numbers, nor where the table is too large.

    Args:
        values: [examples, ...].
    """
    if values.size > MAX_NUMBERS or jnp.iscomplexobj(values):
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


def range_of_targets(inputs: PyTree, targets: Array) -> InnerRange | None:
    """Finds the range of the targets without a few that look like slips.

    None where there are none, where it would be many examples, and where the inputs
    tell which they are: then they are what has to be learned.

    Args:
        inputs: tree of [examples, ...].
        targets: [examples, ...], numbers.
    """
    found = inner_range(targets)
    if found is None:
        return None
    outside = found.outside(targets)
    if outside.mean() >= MOST_LEFT_OUT or _inputs_tell(inputs, outside):
        return None
    return found


def _inputs_tell(inputs: PyTree, outside: np.ndarray) -> bool:
    """Tells whether inputs say which examples are outlying.

    Where their nearest neighbours are outlying too, as in a class of its own, or where
    they lie at one end of a column, or at both.  There nobody has near neighbours,
    least of all among many columns.
    """
    parts = [
        (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else leaf
        for leaf in jax.tree.leaves(inputs)
    ]
    leaves = [in_float32(leaf) for leaf in jax.tree.leaves(parts)]
    if sum(leaf.size for leaf in leaves) > MAX_NUMBERS:
        return False
    rows = jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)
    rows = z_scores(rows, feature_moments(rows))
    asked = jnp.asarray(np.flatnonzero(outside)[:MAX_ASKED], jnp.int32)
    if bool(jnp.any(_sets_apart(rows, asked, jnp.asarray(outside)))):
        return True
    if len(asked) < 2:
        return False
    nearest = np.asarray(nearest_neighbors(rows, asked, num_neighbors=1))[:, 0]
    return bool(outside[nearest].mean() >= ALIKE)


@jax.jit
def _sets_apart(rows: Array, asked: Array, outside: Array) -> Array:
    """Tells which columns, at which end or both, set outlying examples apart.

    By the shares of all others at least as far out, one for each outlying example: even
    where the column says nothing, so that the sum of their logarithms follows a gamma
    distribution (Fisher 1925).

    Returns:
        bool[3 * features].
    """

    def beyond(one: Array) -> Array:
        sides = [rows, -rows, jnp.abs(rows)]
        # What can't be compared is no sign.
        is_nearer = jnp.concatenate([side < side[one] for side in sides], axis=1)
        return 1 - jnp.mean(is_nearer, axis=0, where=~outside[:, None])

    shares = jax.lax.map(beyond, asked)
    least = 1 / jnp.sum(~outside)
    surprise = -jnp.sum(jnp.log(jnp.maximum(shares, least)), axis=0)
    chance = jax.scipy.special.gammaincc(jnp.float32(len(asked)), surprise)
    is_rare = chance * shares.shape[1] < CHANCE
    return is_rare & (jnp.mean(shares, axis=0) <= BEYOND)
