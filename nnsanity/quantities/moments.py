"""Moments of every feature: mergeable over batches and devices, stable in float32."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnsanity._tree import in_float32, is_inexact, takes_numbers
from nnsanity._types import Array

_CONSTANT = 1e-6


class Moments(NamedTuple):
    """Moments of each feature, mergeable over batches and devices.

    Fields of values without a feature axis are scalars.

    Attributes:
        count: int32[features], finite values seen.
        mean: float32[features].
        square_deviations: float32[features], sum of ``(x - mean)**2``.
        minimum: float32[features], of the finite values; inf where there are none.
        maximum: float32[features], of the finite values; -inf where there are none.
        nonfinite: int32[features], NaN and infinite values seen; healthy is 0.
    """

    count: Array
    mean: Array
    square_deviations: Array
    minimum: Array
    maximum: Array
    nonfinite: Array

    @property
    def deviation(self) -> Array:
        """Standard deviation of each feature, of the population; 0 for no values."""
        count = jnp.maximum(self.count, 1).astype(self.mean.dtype)
        return jnp.sqrt(self.square_deviations / count)

    @property
    def is_constant(self) -> Array:
        """Which features do not vary beyond the rounding of their numbers."""
        size = jnp.maximum(jnp.abs(self.mean), jnp.finfo(self.mean.dtype).tiny)
        return (self.minimum == self.maximum) | ~(self.deviation > _CONSTANT * size)

    @property
    def scale(self) -> Array:
        """What to divide each feature by: its deviation, 1 where it is constant."""
        return jnp.where(self.is_constant, 1, self.deviation)


@takes_numbers
def feature_moments(values: Array, *, axis_name: str | None = None) -> Moments:
    """Measures mean, deviation and range of every feature.

    Features lie on the last axis (channels, for images); all axes before it are
    averaged over.  Values without a second axis are one feature.  NaN and infinite
    values are counted and left out.  Two passes in float32 keep the deviation right
    where the mean is far larger.  Costs about four reads of the values, more where some
    are not finite.

    Args:
        values: [..., features] or [examples], of any dtype.
        axis_name: name of a ``shard_map`` or ``vmap`` axis to merge over.

    Returns:
        ``Moments``, each field of shape [features].

    Raises:
        TypeError: if the values are not numbers.
        ValueError: if there are no values.

    Example:
        >>> moments = feature_moments(jnp.array([[1.0, 5.0], [3.0, 5.0]]))
        >>> moments.mean, moments.deviation
        (Array([2., 5.], dtype=float32), Array([1., 0.], dtype=float32))

    References:
        Chan, Golub and LeVeque (1983), "Algorithms for computing the sample variance".
    """
    values = _checked(values)
    axes = tuple(range(max(values.ndim - 1, 1)))
    lowest, highest = jnp.min(values, axes), jnp.max(values, axes)
    # A sum of numbers near 0 rounds less.
    pivot = lowest / 2 + highest / 2
    total = jnp.sum(values - pivot, axes)
    # A sum tells NaN where a minimum may drop it (XLA on CPU, from JAX 0.10 on); asking
    # every number costs more than all the rest.
    moments = jax.lax.cond(
        jnp.all(jnp.isfinite(total)),
        _moments_of_finite,
        lambda values, *_: _moments_of_any(values),
        values,
        lowest,
        highest,
        pivot,
        total,
    )
    return moments if axis_name is None else _merged_over(moments, axis_name)


def _moments_of_finite(
    values: Array, lowest: Array, highest: Array, pivot: Array, total: Array
) -> Moments:
    axes = tuple(range(max(values.ndim - 1, 1)))
    size = math.prod(values.shape[axis] for axis in axes)
    correction = total / size
    mean = pivot + correction
    squares = jnp.sum((values - mean) ** 2, axes)
    rounding = (pivot - mean) + correction
    corrected = jnp.maximum(squares - size * rounding**2, 0)
    squares = jnp.where(jnp.isfinite(squares), corrected, squares)
    nonfinite = (total != total).astype(jnp.int32)
    return Moments(size - nonfinite, mean, squares, lowest, highest, nonfinite)


def _moments_of_any(values: Array) -> Moments:
    finite = jnp.isfinite(values)
    axes = tuple(range(max(values.ndim - 1, 1)))
    count = jnp.sum(finite, axes, dtype=jnp.int32)
    nonfinite = jnp.sum(~finite, axes, dtype=jnp.int32)
    divisor = jnp.maximum(count, 1).astype(values.dtype)
    low = jnp.min(jnp.where(finite, values, jnp.inf), axes)
    high = jnp.max(jnp.where(finite, values, -jnp.inf), axes)
    pivot = jnp.where(count > 0, low / 2 + high / 2, 0)
    correction = jnp.sum(jnp.where(finite, values - pivot, 0), axes) / divisor
    mean = pivot + correction
    squares = jnp.sum(jnp.where(finite, values - mean, 0) ** 2, axes)
    rounding = (pivot - mean) + correction
    corrected = jnp.maximum(squares - divisor * rounding**2, 0)
    squares = jnp.where(jnp.isfinite(squares), corrected, squares)
    return Moments(count, mean, squares, low, high, nonfinite)


def _checked(values: Array) -> Array:
    dtype = getattr(values, "dtype", None)
    if dtype is not None and not (
        jnp.issubdtype(dtype, np.number) or jnp.issubdtype(dtype, np.bool_)
    ):
        raise TypeError(f"feature_moments: values must be numbers, got dtype {dtype}")
    values = in_float32(jnp.asarray(values))
    if values.ndim == 0 or 0 in values.shape:
        raise ValueError(
            f"feature_moments: values must hold examples, got shape {values.shape}"
        )
    return values


def _merged_over(moments: Moments, axis_name: str) -> Moments:
    count = jax.lax.psum(moments.count, axis_name)
    divisor = jnp.maximum(count, 1).astype(moments.mean.dtype)
    seen = moments.count.astype(divisor.dtype)
    weight = seen / divisor
    mean = jax.lax.psum(weight * moments.mean, axis_name)
    between = seen * (moments.mean - mean) ** 2
    return Moments(
        count,
        mean,
        jax.lax.psum(moments.square_deviations + between, axis_name),
        jax.lax.pmin(moments.minimum, axis_name),
        jax.lax.pmax(moments.maximum, axis_name),
        jax.lax.psum(moments.nonfinite, axis_name),
    )


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Merges the moments of two batches into those of both.

    Associative up to rounding; moments of no values are neutral.  Costs nothing.

    Args:
        a: moments of some values.
        b: moments of other values of the same features.

    Example:
        >>> a, b = (feature_moments(jnp.array(x)) for x in ([1.0, 3.0], [5.0]))
        >>> merge_moments(a, b).mean
        Array(3., dtype=float32)

    References:
        Chan, Golub and LeVeque (1983), equation 1.5.
    """
    count = a.count + b.count
    divisor = jnp.maximum(count, 1).astype(a.mean.dtype)
    delta = b.mean - a.mean
    seen, share = a.count.astype(divisor.dtype), b.count.astype(divisor.dtype) / divisor
    return Moments(
        count,
        a.mean + delta * share,
        a.square_deviations + b.square_deviations + delta**2 * seen * share,
        jnp.minimum(a.minimum, b.minimum),
        jnp.maximum(a.maximum, b.maximum),
        a.nonfinite + b.nonfinite,
    )


@takes_numbers
def z_scores(values: Array, moments: Moments) -> Array:
    """Subtracts the mean and divides by the deviation, feature by feature.

    Constant features become 0 where they keep their value, and are only shifted
    elsewhere: nothing is divided by a deviation of zero.

    Args:
        values: [..., features], of the features that the moments are of.
        moments: as ``feature_moments`` returns.

    Returns:
        float32[..., features].

    Example:
        >>> values = jnp.array([[1.0, 5.0], [3.0, 5.0]])
        >>> z_scores(values, feature_moments(values))
        Array([[-1.,  0.],
               [ 1.,  0.]], dtype=float32)
    """
    return (in_float32(values) - moments.mean) / moments.scale


@takes_numbers
def normalize(values: Array, moments: Moments) -> Array:
    """Brings values to mean 0 and deviation 1, in their own dtype.

    Take the moments from the training data alone, and the same ones for validation.
    ``denormalize`` undoes it: for targets, train on the normalized ones and
    denormalize what the network puts out.

    Args:
        values: [..., features], of the features that the moments are of.
        moments: as ``feature_moments`` or ``group_moments`` returns.

    Returns:
        [..., features], float32 where the values are integers.

    Example:
        >>> targets = jnp.array([[10.0, 7.0], [30.0, 7.0]])
        >>> moments = feature_moments(targets)
        >>> normalize(targets, moments)
        Array([[-1.,  0.],
               [ 1.,  0.]], dtype=float32)
        >>> denormalize(normalize(targets, moments), moments)
        Array([[10.,  7.],
               [30.,  7.]], dtype=float32)
    """
    return _like(values, z_scores(values, moments))


@takes_numbers
def denormalize(values: Array, moments: Moments) -> Array:
    """Undoes ``normalize``: from deviations back to the unit of the data.

    Constant features come back as they were.

    Args:
        values: [..., features], normalized, or what a network puts out for them.
        moments: those that were given to ``normalize``.

    Returns:
        [..., features], float32 where the values are integers.

    Example:
        >>> denormalize(jnp.array([0.0, 1.0]), feature_moments(jnp.array([4.0, 8.0])))
        Array([6., 8.], dtype=float32)
    """
    return _like(values, in_float32(values) * moments.scale + moments.mean)


def _like(values: Array, found: Array) -> Array:
    return found.astype(values.dtype) if is_inexact(values) else found


def group_moments(moments: Moments, *, groups: Sequence[int]) -> Moments:
    """Gives the features of one group a mean and a deviation that they share.

    For features of one unit whose sizes say something, as the axes of a position or the
    pixels of an image.  ``normalize`` with the result keeps their proportions.

    Args:
        moments: of each feature, as ``feature_moments`` returns.
        groups: the number of each feature's group.

    Returns:
        ``Moments`` of each feature's group, in the order of the features.

    Raises:
        ValueError: if there is not one group number for each feature.

    Example:
        >>> moments = feature_moments(jnp.array([[0.0, 2.0, 5.0], [0.0, 2.0, 9.0]]))
        >>> shared = group_moments(moments, groups=[0, 0, 1])
        >>> shared.mean, shared.deviation
        (Array([1., 1., 7.], dtype=float32), Array([1., 1., 2.], dtype=float32))
    """
    pooled = pooled_moments(moments, groups=groups)
    index = np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)
    return jax.tree.map(lambda leaf: leaf[index], pooled)


def pooled_moments(moments: Moments, *, groups: Sequence[int]) -> Moments:
    """Merges the moments of each group; results are by group, in order of its number.

    Args:
        moments: of each feature.
        groups: the number of each feature's group.
    """
    if moments.mean.shape != (len(groups),):
        raise ValueError(
            f"groups must hold one number for each of the {moments.mean.size} features,"
            f" got {len(groups)}"
        )
    numbers, index = np.unique(np.asarray(groups), return_inverse=True)
    index, num_groups = index.reshape(-1), len(numbers)

    def total(leaf: Array) -> Array:
        return jax.ops.segment_sum(leaf, index, num_groups)

    count = total(moments.count)
    seen = moments.count.astype(moments.mean.dtype)
    weight = seen / jnp.maximum(count, 1).astype(seen.dtype)[index]
    mean = total(weight * moments.mean)
    between = seen * (moments.mean - mean[index]) ** 2
    return Moments(
        count,
        mean,
        total(moments.square_deviations + between),
        jax.ops.segment_min(moments.minimum, index, num_groups),
        jax.ops.segment_max(moments.maximum, index, num_groups),
        total(moments.nonfinite),
    )
