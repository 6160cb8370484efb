"""Nearest neighbours: whether examples that are alike have targets that are alike."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnsanity._tree import in_float32, takes_numbers
from nnsanity._types import Array
from nnsanity.quantities.moments import feature_moments, z_scores

JUMP = 0.9
"""Share of the targets' range from which on two neighbours lie at its two ends."""
MIDDLE = (0.4, 0.6)
"""Shares of the range between which two neighbours differ by a middling amount."""
MAX_ASKED = 4096
"""Examples whose neighbours are looked for, where there are more."""
_CHUNK = 2**24  # distances that are held at a time: 64 MiB


class Continuity(NamedTuple):
    """How alike the targets of examples with near inputs are.

    Attributes:
        distance: float32[], mean squared difference of the targets of nearest
            neighbours, in units of that of any two; 0 for a smooth function of the
            inputs, 1 where they say nothing.
        z_score: float32[], by how many deviations it lies below what shuffled targets
            give; healthy is above 4.
        jump_share: float32[], share of neighbours whose targets differ by more than 0.9
            of their range; the largest over the columns of the targets.
        middle_share: float32[], of the same column, by 0.4 to 0.6 of it.  Fewer than
            jumps: the two ends of the range are one place.
        stranger_jump_share: float32[], the first share for any two examples.
        stranger_middle_share: float32[], the second.
        jumps: int32[jumps, 2], the examples and their neighbours whose targets differ
            most, the largest first.
        jump_sizes: float32[jumps], by which part of the range.
        num_asked: int32[], examples whose neighbours were looked for.
    """

    distance: Array
    z_score: Array
    jump_share: Array
    middle_share: Array
    stranger_jump_share: Array
    stranger_middle_share: Array
    jumps: Array
    jump_sizes: Array
    num_asked: Array


@takes_numbers
def continuity(
    inputs: Array,
    targets: Array,
    *,
    key: Array,
    num_neighbors: int = 5,
    num_shuffles: int = 64,
    num_jumps: int = 10,
) -> Continuity:
    """Compares the targets of examples with near inputs.

    Networks assume a continuous space: what is alike should have numbers that are
    alike.  Worry where ``z_score`` is under 4, then the inputs do not tell the targets;
    and where neighbours jump over the whole range of the targets more often than over
    half of it, then their representation has a seam, as that of an angle has.

    Inputs are standardized feature by feature first, so that their units play no part.
    Neighbours are exact.  Where there are more than 4,096 examples those of 4,096 drawn
    ones are looked for, among all.  Costs the distances of these to all, in pieces of
    64 MiB.

    Args:
        inputs: [examples, ...].
        targets: [examples, ...], numbers; classes as one-hot rows.
        key: consumed; which examples are asked, and the shuffles.
        num_neighbors: nearest neighbours of each example.
        num_shuffles: of the targets, for what chance gives.
        num_jumps: how many of the largest jumps are named.

    Returns:
        ``Continuity``.

    Raises:
        ValueError: if inputs and targets do not have equally many examples, or there
            are not more of them than neighbours.

    Example:
        >>> angle = jnp.linspace(0.0, 1.0, 100, endpoint=False)
        >>> inputs = jnp.stack([jnp.cos(6.2832 * angle), jnp.sin(6.2832 * angle)], 1)
        >>> found = continuity(inputs, angle, key=jax.random.key(0))
        >>> bool(found.jump_share > 0.01), float(found.middle_share)
        (True, 0.0)
        >>> sorted(found.jumps[0].tolist())  # where 0.99 meets 0.0
        [0, 99]

    References:
        Cover and Hart (1967), "Nearest neighbor pattern classification".
    """
    size = np.shape(inputs)[0] if np.ndim(inputs) else 0
    if np.shape(targets)[:1] != (size,):
        raise ValueError(
            "continuity: inputs and targets must have equally many examples, got shapes"
            f" {np.shape(inputs)} and {np.shape(targets)}"
        )
    if not 1 <= num_neighbors < size:
        raise ValueError(
            f"continuity: num_neighbors must be from 1 to {size - 1} for {size}"
            f" examples, got {num_neighbors}"
        )
    counts = num_neighbors, num_shuffles, num_jumps
    return _continuity(jnp.asarray(inputs), jnp.asarray(targets), key, counts)


@functools.partial(jax.jit, static_argnums=3)
def _continuity(
    inputs: Array, targets: Array, key: Array, counts: tuple[int, int, int]
) -> Continuity:
    num_neighbors, num_shuffles, num_jumps = counts
    size = inputs.shape[0]
    rows = _standardized(inputs)
    targets = _standardized(targets)
    key_asked, key_shuffles = jax.random.split(key)
    asked = jnp.arange(size, dtype=jnp.int32)
    if size > MAX_ASKED:
        asked = jax.random.permutation(key_asked, asked)[:MAX_ASKED]
    nearest = nearest_neighbors(rows, asked, num_neighbors=num_neighbors)

    def differences(values: Array) -> Array:
        return values[asked][:, None] - values[nearest]

    def by_chance(one: Array) -> tuple[Array, Array]:
        found = differences(jax.random.permutation(one, targets))
        return jnp.mean(found**2), _shares(found, span)

    span = jnp.max(targets, axis=0) - jnp.min(targets, axis=0)
    span = jnp.where(span > 0, span, jnp.inf)
    strange, strange_shares = jax.lax.map(
        by_chance, jax.random.split(key_shuffles, num_shuffles)
    )
    found = differences(targets)
    expected = jnp.mean(strange)
    shares, column = _shares(found, span), jnp.argmax(_shares(found, span)[0])
    others = jnp.mean(strange_shares, axis=0)
    sizes = jnp.max(jnp.abs(found) / span, axis=-1)
    largest, place = jax.lax.top_k(sizes.reshape(-1), min(num_jumps, sizes.size))
    pairs = [asked[place // num_neighbors], nearest.reshape(-1)[place]]
    return Continuity(
        jnp.mean(found**2) / jnp.where(expected > 0, expected, 1),
        (expected - jnp.mean(found**2)) / jnp.maximum(jnp.std(strange), 1e-9),
        shares[0, column],
        shares[1, column],
        others[0, column],
        others[1, column],
        jnp.stack(pairs, axis=1),
        largest,
        jnp.int32(len(asked)),
    )


def _standardized(values: Array) -> Array:
    rows = in_float32(values).reshape(values.shape[0], -1)
    return z_scores(rows, feature_moments(rows))


def _shares(differences: Array, span: Array) -> Array:
    """Returns the shares of jumps and of middling differences, float32[2, columns]."""
    part = jnp.abs(differences) / span
    is_middle = (part > MIDDLE[0]) & (part < MIDDLE[1])
    both = jnp.stack([part > JUMP, is_middle])
    return jnp.mean(both, axis=(1, 2), dtype=part.dtype)


def nearest_neighbors(rows: Array, asked: Array, *, num_neighbors: int) -> Array:
    """Finds the nearest rows of some rows, without themselves.

    Candidates by products of rows, which round; the nearest of them by differences.

    Args:
        rows: float32[examples, features].
        asked: int32[asked], which of them.
        num_neighbors: for each.

    Returns:
        int32[asked, neighbors], the nearest first.
    """
    size = rows.shape[0]
    rows = rows - jnp.mean(rows, axis=0)
    squares = jnp.sum(rows**2, axis=1)
    num_candidates = min(2 * num_neighbors + 2, size)
    in_order = jnp.arange(size, dtype=asked.dtype)

    def nearest(one: Array) -> Array:
        far = squares - 2 * (rows @ rows[one])
        far = jnp.where(in_order == one, jnp.inf, far)
        candidates = jax.lax.top_k(-far, num_candidates)[1].astype(asked.dtype)
        exact = jnp.sum((rows[candidates] - rows[one]) ** 2, axis=-1)
        exact = jnp.where(candidates == one, jnp.inf, exact)
        return candidates[jax.lax.top_k(-exact, num_neighbors)[1]]

    chunk = max(min(_CHUNK // size, len(asked)), 1)
    return jax.lax.map(nearest, asked, batch_size=chunk)
