"""How far inputs and targets are from mean 0 and deviation 1."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nnsanity._tree import takes_numbers
from nnsanity._types import Array
from nnsanity.quantities.moments import Moments, feature_moments, pooled_moments

_RARE = 20.0  # range in deviations; a normal feature of a million rows has ten


class Normalization(NamedTuple):
    """How far data are from mean 0 and deviation 1.

    Attributes:
        moments: of each feature.
        root_mean_square: float32[features]; healthy is within [0.1, 10].
        constant: bool[features].
        scale_disparity: float32[], largest deviation of a feature over the smallest,
            of those that vary throughout; healthy is under 100.  A pixel at the edge
            that a few images light up is rare, not of another unit.
    """

    moments: Moments
    root_mean_square: Array
    constant: Array
    scale_disparity: Array


@takes_numbers
def normalization(
    inputs: Array, *, groups: Sequence[int] | None = None
) -> Normalization:
    """Measures how far the features of a data set are from mean 0 and deviation 1.

    Costs about two reads of the values.

    Args:
        inputs: [..., features] or [examples].
        groups: the number of each feature's group; features of one group share a mean
            and a deviation, and results are by group.

    Returns:
        ``Normalization``.

    Raises:
        ValueError: if there is not one group number for each feature.

    Example:
        >>> measured = normalization(jnp.array([[3.0, 0.0], [-3.0, 300.0]]))
        >>> measured.root_mean_square[0], measured.scale_disparity
        (Array(3., dtype=float32), Array(50., dtype=float32))
    """
    static = None if groups is None else tuple(int(group) for group in groups)
    return _normalization(inputs, static)


@functools.partial(jax.jit, static_argnums=1)
def _normalization(inputs: Array, groups: tuple[int, ...] | None) -> Normalization:
    moments = feature_moments(inputs)
    if groups is not None:
        moments = pooled_moments(moments, groups=groups)
    deviation, constant = moments.deviation, moments.is_constant
    comparable = vary_throughout(moments)
    smallest = jnp.min(jnp.where(comparable, deviation, jnp.inf))
    largest = jnp.max(jnp.where(comparable, deviation, 0))
    disparity = jnp.where(largest > 0, largest / smallest, 1.0)
    rms = jnp.sqrt(moments.mean**2 + deviation**2)
    return Normalization(moments, rms, constant, disparity)


def vary_throughout(moments: Moments) -> Array:
    """Tells which features are neither constant nor made of a few rare events.

    Args:
        moments: of each feature.
    """
    spread = moments.maximum - moments.minimum
    return ~moments.is_constant & (spread <= _RARE * moments.deviation)


class TargetScale(NamedTuple):
    """The size of targets beside what a network puts out.

    Attributes:
        targets: moments of each column of the targets.
        outputs: moments of each column of the outputs.
        ratio: float32[columns], root mean square of the targets over that of all
            outputs, or over 1 where those are smaller; healthy is up to 10.
    """

    targets: Moments
    outputs: Moments
    ratio: Array


@takes_numbers
@jax.jit
def target_scale(outputs: Array, targets: Array) -> TargetScale:
    """Measures how large targets are for an untrained network.

    It puts out about -1 to 1, whatever the targets: a target of 255 then means huge
    gradients.  Costs a few reads of both.

    Args:
        outputs: [examples, ...], of the untrained network.
        targets: [examples, ...], numbers; any number of examples.

    Returns:
        ``TargetScale``.

    Example:
        >>> found = target_scale(jnp.array([2.0, -2.0]), jnp.array([[30.0], [50.0]]))
        >>> found.ratio.round(1), found.targets.mean
        (Array([20.6], dtype=float32), Array([40.], dtype=float32))
    """
    both = (feature_moments(one.reshape(len(one), -1)) for one in (targets, outputs))
    wanted, given = both
    size = jnp.sqrt(jnp.mean(given.mean**2 + given.deviation**2))
    reference = jnp.where(jnp.isfinite(size), jnp.maximum(size, 1), 1)
    rms = jnp.sqrt(wanted.mean**2 + wanted.deviation**2)
    return TargetScale(wanted, given, rms / reference)
