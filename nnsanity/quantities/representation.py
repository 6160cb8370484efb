"""What a representation keeps: the way back, and what should not matter."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nnsanity._tree import in_float32, takes_numbers
from nnsanity._types import Array, PyTree
from nnsanity.quantities.moments import feature_moments


class RoundtripError(NamedTuple):
    """What is lost on the way to a representation and back.

    Attributes:
        root_mean_square: float32[], of what came back less what was given; in its unit.
        relative: float32[], the same in deviations of each feature; healthy is under
            1e-3.  Constant features count as if their deviation were 1.
        largest: float32[], the largest absolute difference.
        nonfinite: int32[], values that were finite and came back as NaN or infinity.
    """

    root_mean_square: Array
    relative: Array
    largest: Array
    nonfinite: Array


@takes_numbers
def roundtrip_error(
    forward: Callable[[PyTree], PyTree],
    inverse: Callable[[PyTree], PyTree],
    values: PyTree,
) -> RoundtripError:
    """Measures what a preprocessing and its inverse do to values.

    Worry where it is not about the rounding of the numbers: outputs that are brought
    back by a wrong inverse are wrong, however well the network learned.

    Args:
        forward: ``forward(values)``, as the inputs or targets are prepared.
        inverse: ``inverse(prepared)``, back to the unit of the values.
        values: tree of arrays [examples, ...].

    Returns:
        ``RoundtripError``, over all values that are finite.

    Raises:
        ValueError: if what comes back has another structure or other shapes.

    Example:
        >>> values = jnp.array([0.0, 2.0, 4.0])
        >>> error = roundtrip_error(jnp.sqrt, jnp.square, values)
        >>> bool(error.largest < 1e-6)
        True
        >>> roundtrip_error(lambda x: x / 2, lambda x: x, values).largest
        Array(2., dtype=float32)
    """
    back = inverse(forward(values))
    shapes, others = (
        jax.tree.map(lambda leaf: jnp.shape(leaf), tree) for tree in (values, back)
    )
    if shapes != others:
        raise ValueError(
            "roundtrip_error: inverse must return what forward was given, shapes"
            f" {shapes}, got {others}"
        )
    leaves = zip(jax.tree.leaves(values), jax.tree.leaves(back), strict=True)
    parts = [_lost(*pair) for pair in leaves]
    count, squares, scaled, largest, nonfinite = (
        jnp.stack(column) for column in zip(*parts, strict=True)
    )
    total = jnp.maximum(jnp.sum(count), 1)
    return RoundtripError(
        jnp.sqrt(jnp.sum(squares) / total),
        jnp.sqrt(jnp.sum(scaled) / total),
        jnp.max(largest),
        jnp.sum(nonfinite),
    )


def _lost(given: Array, returned: Array) -> tuple[Array, ...]:
    given, returned = jnp.atleast_1d(in_float32(given)), in_float32(returned)
    returned = returned.reshape(given.shape).astype(given.dtype)
    is_known, is_back = jnp.isfinite(given), jnp.isfinite(returned)
    error = jnp.where(is_known & is_back, returned - given, 0)
    return (
        jnp.sum(is_known).astype(error.dtype),
        jnp.sum(error**2),
        jnp.sum((error / feature_moments(given).scale) ** 2),
        jnp.max(jnp.abs(error)),
        jnp.sum(is_known & ~is_back, dtype=jnp.int32),
    )


class Invariance(NamedTuple):
    """How far a transform moves a representation.

    Attributes:
        ratio: float32[], root mean square of the distance between an example and its
            transform, in units of that between any two examples; 0 where the transform
            does not matter, about 1 where it makes another example of it.
        moved: float32[examples], the distance for each example.
        strangers: float32[], root mean square distance of any two examples.
    """

    ratio: Array
    moved: Array
    strangers: Array


@takes_numbers
def invariance(
    encode: Callable[[PyTree], PyTree],
    transform: Callable[[PyTree], PyTree],
    inputs: PyTree,
) -> Invariance:
    """Measures how far a transform that keeps the meaning moves a representation.

    One thing should have one representation.  With ``encode`` the preprocessing it says
    whether that is so; with ``lambda x: apply_fn(params, x)`` whether the network has
    learned it.  Worry above 0.3.  Costs two evaluations of ``encode``.

    Args:
        encode: ``encode(inputs)``, a tree of arrays with the examples leading.
        transform: ``transform(inputs)``, of the same examples in the same order.
        inputs: tree of arrays [examples, ...].

    Returns:
        ``Invariance``.

    Raises:
        ValueError: if ``encode`` gives no arrays with the examples leading, or other
            shapes after the transform.

    Example:
        >>> inputs = jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
        >>> turn = lambda x: jnp.stack([-x[:, 1], x[:, 0]], axis=1)
        >>> invariance(lambda x: jnp.sum(x**2, axis=1), turn, inputs).ratio
        Array(0., dtype=float32)
        >>> round(float(invariance(lambda x: x, turn, inputs).ratio), 3)
        0.866
    """
    before, after = encode(inputs), encode(transform(inputs))
    shapes, others = (
        jax.tree.map(lambda leaf: jnp.shape(leaf), tree) for tree in (before, after)
    )
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(before)}
    if shapes != others or len(lengths) != 1 or () in lengths:
        raise ValueError(
            "invariance: encode must give arrays with the examples on their leading"
            f" axis, of the same shapes after the transform, got {shapes} and {others}"
        )
    rows, moved = (_rows(tree) for tree in (before, after))
    distances = jnp.sqrt(jnp.sum((moved - rows) ** 2, axis=1))
    # Over all pairs of different examples the mean squared distance is twice the
    # unbiased variance.
    spread = jnp.sum((rows - jnp.mean(rows, axis=0)) ** 2)
    strangers = jnp.sqrt(2 * spread / max(len(rows) - 1, 1))
    size = jnp.sqrt(jnp.mean(distances**2))
    ratio = jnp.where(size == 0, 0, size / strangers)
    return Invariance(ratio, distances, strangers)


def _rows(tree: PyTree) -> Array:
    leaves = [in_float32(leaf) for leaf in jax.tree.leaves(tree)]
    return jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)
