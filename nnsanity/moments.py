"""Moments of every feature: mergeable over batches and devices, stable in float32."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnsanity._tree import in_float32
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


def feature_moments(values: Array, *, axis_name: str | None = None) -> Moments:
    """Measures mean, deviation and range of every feature.

    Features lie on the last axis (channels, for images); all axes before it are
    averaged over.  Values without a second axis are one feature.  NaN and infinite
    values are counted and left out.  Two passes in float32 keep the deviation right
    where the mean is far larger.  Costs about two reads of the values.

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
    finite = jnp.isfinite(values)
    axes = tuple(range(max(values.ndim - 1, 1)))
    count = jnp.sum(finite, axes, dtype=jnp.int32)
    nonfinite = jnp.sum(~finite, axes, dtype=jnp.int32)
    divisor = jnp.maximum(count, 1).astype(values.dtype)
    filled = jnp.where(finite, values, 0)
    # The first mean is off by the rounding of a long sum; the second pass takes that
    # out of the mean and of the squares.
    first = jnp.sum(filled, axes) / divisor
    residual = jnp.where(finite, values - first, 0)
    correction = jnp.sum(residual, axes) / divisor
    squares = jnp.sum(residual**2, axes)
    corrected = squares - divisor * correction**2
    squares = jnp.where(jnp.isfinite(squares), corrected, squares)
    moments = Moments(
        count,
        first + correction,
        jnp.maximum(squares, 0),
        jnp.min(jnp.where(finite, values, jnp.inf), axes),
        jnp.max(jnp.where(finite, values, -jnp.inf), axes),
        nonfinite,
    )
    return moments if axis_name is None else _merged_over(moments, axis_name)


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
    scale = jnp.where(moments.is_constant, 1, moments.deviation)
    return (in_float32(values) - moments.mean) / scale
