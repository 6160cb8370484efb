"""The noise scale over the steps of a training."""

from typing import NamedTuple

import jax.numpy as jnp

from nnsanity._types import Array
from nnsanity.quantities.noise_estimate import NoiseScale


class NoiseAverage(NamedTuple):
    """What is kept of the estimates of many steps; of any shape, as they are.

    Attributes:
        weight: float32[], steps seen, each with what is left of it.
        weight_squares: float32[], the sum of the squares of what is left.
        gradient_square_norm: float32, mean over the steps.
        covariance_trace: float32, mean over the steps.
        deviations: float32[3, ...], the summed squared deviations of the square norm,
            of the trace, and the products of both.
    """

    weight: Array
    weight_squares: Array
    gradient_square_norm: Array
    covariance_trace: Array
    deviations: Array


def noise_average(noise: NoiseScale) -> NoiseAverage:
    """Returns the average of no steps yet, for estimates of this shape.

    Args:
        noise: an estimate, or its ``jax.eval_shape``; only its shape counts.

    Returns:
        ``NoiseAverage``, the state for ``add_noise``.

    Example:
        >>> noise = NoiseScale(*jnp.float32([0.25, 8, 2, 1]))
        >>> averaged_noise(add_noise(noise_average(noise), noise)).noise_scale
        Array(0.25, dtype=float32)
    """
    shape = noise.gradient_square_norm.shape
    number, zeros = jnp.zeros((), jnp.float32), jnp.zeros(shape, jnp.float32)
    return NoiseAverage(number, number, zeros, zeros, jnp.zeros((3, *shape)))


def add_noise(
    average: NoiseAverage, noise: NoiseScale, *, decay: Array | float = 1.0
) -> NoiseAverage:
    """Adds the estimate of one more step.

    Square norms and traces are averaged apart and divided afterwards: both are
    unbiased, their ratio is not, and in single steps it may be infinite.  Costs
    nothing, and fits into a jitted step.

    Args:
        average: of the steps so far.
        noise: of this step, e.g. from ``value_and_grad_with_noise``.
        decay: what each step leaves of those before it; 0.99 looks back about 100
            steps.  The noise scale grows while a network learns.

    Returns:
        ``NoiseAverage`` of the same shapes.

    Example:
        >>> one, two = (NoiseScale(0.0, jnp.float32(s), jnp.float32(6), 0.0)
        ...             for s in (-1, 3))
        >>> average = add_noise(add_noise(noise_average(one), one), two)
        >>> averaged_noise(average).noise_scale
        Array(6., dtype=float32)

    References:
        McCandlish et al. (2018), "An empirical model of large-batch training",
        appendix A.1; Chan, Golub and LeVeque (1983) for the deviations.
    """
    old = average.weight * decay
    weight = old + 1
    change = jnp.stack(
        [
            noise.gradient_square_norm - average.gradient_square_norm,
            noise.covariance_trace - average.covariance_trace,
        ]
    )
    products = jnp.stack([change[0] ** 2, change[1] ** 2, change[0] * change[1]])
    return NoiseAverage(
        weight,
        average.weight_squares * decay**2 + 1,
        average.gradient_square_norm + change[0] / weight,
        average.covariance_trace + change[1] / weight,
        average.deviations * decay + products * old / weight,
    )


def averaged_noise(average: NoiseAverage) -> NoiseScale:
    """Returns the noise scale over the steps that were added.

    Args:
        average: from ``add_noise``.

    Returns:
        ``NoiseScale``: inf where the mean square norm is not above 0; NaN of no steps.
        The standard error is that of the spread between steps, taken as independent,
        and inf for a single step.

    Example:
        >>> noise = NoiseScale(*jnp.float32([0.25, 8, 2, 1]))
        >>> average = noise_average(noise)
        >>> for _ in range(2):
        ...     average = add_noise(average, noise)
        >>> averaged_noise(average).standard_error
        Array(0., dtype=float32)
    """
    is_empty = average.weight == 0
    signal = jnp.where(is_empty, jnp.nan, average.gradient_square_norm)
    trace = jnp.where(is_empty, jnp.nan, average.covariance_trace)
    is_lost = signal <= 0
    divisor = jnp.where(is_lost, 1, signal)
    ratio = trace / divisor
    of_signal, of_trace, of_both = average.deviations
    squares = of_trace - 2 * ratio * of_both + ratio**2 * of_signal
    # The variance of a weighted mean, from the weighted deviations.
    share = average.weight_squares / average.weight**2
    freedom = average.weight - average.weight_squares / average.weight
    is_known = freedom > 1e-3
    variance = jnp.maximum(squares, 0) * share / jnp.where(is_known, freedom, 1)
    error = jnp.sqrt(variance) / divisor
    return NoiseScale(
        jnp.where(is_lost, jnp.inf, ratio),
        signal,
        trace,
        jnp.where((is_lost | ~is_known) & ~is_empty, jnp.inf, error),
    )
