"""The noise scale from the gradients of parts: what all ways to have them share."""

from typing import NamedTuple

import jax.numpy as jnp

from nnsanity._tree import accumulation_dtype
from nnsanity._types import Array


class NoiseScale(NamedTuple):
    """How noisy the gradient is, and so how large a batch pays.

    Attributes:
        noise_scale: float32[], examples: ``covariance_trace / gradient_square_norm``;
            inf where the gradient is lost in its noise.
        gradient_square_norm: float32[], unbiased estimate of the squared norm of the
            gradient over all data; may be negative.
        covariance_trace: float32[], unbiased estimate of the trace of the covariance
            of example gradients; never negative.
        standard_error: float32[], of ``noise_scale``, in examples; inf where that is,
            and for two examples or two microbatches.
    """

    noise_scale: Array
    gradient_square_norm: Array
    covariance_trace: Array
    standard_error: Array


class Sums(NamedTuple):
    """Of the gradients ``g_i`` of parts with the mean G, leaf by leaf.

    Attributes:
        squares: [leaves, parts], ``|g_i|^2``.
        products: [leaves, parts], ``g_i . G``.
        square_norm: [leaves], ``|G|^2``.
    """

    squares: Array
    products: Array
    square_norm: Array


def joined(sums: Sums) -> Sums:
    """Joins the leaves to one."""
    return Sums(*(jnp.sum(one, 0) for one in sums))


def stacked(numbers: list[Array]) -> Array:
    """Stacks numbers of leaves whose dtypes may differ."""
    dtype = accumulation_dtype(*numbers)
    return jnp.stack([one.astype(dtype) for one in numbers])


def variance_of_parts(squares: Array, square_norm: Array) -> Array:
    """Returns the mean squared distance of a part's gradient from their mean.

    Unbiased; McCandlish et al. (2018), appendix A.1.

    Args:
        squares: [..., parts], ``|g_i|^2``.
        square_norm: [...], ``|G|^2`` of their mean.
    """
    count = squares.shape[-1]
    variance = (jnp.sum(squares, -1) - count * square_norm) / (count - 1)
    return jnp.maximum(variance, 0)  # negative only by rounding


def estimated(sums: Sums, part_size: Array | int) -> NoiseScale:
    """Estimates by McCandlish et al. (2018), appendix A.1, along the last axis.

    Args:
        sums: of parts that are equally large.
        part_size: examples in each.
    """
    n = sums.squares.shape[-1]
    variance = variance_of_parts(sums.squares, sums.square_norm)
    signal = sums.square_norm - variance / n
    is_lost = signal <= 0
    divisor = jnp.where(is_lost, 1, signal)
    ratio = variance / divisor
    error = _jackknife_error(sums, ratio) / divisor
    is_unknown = is_lost | ((n < 3) & ~jnp.isnan(ratio))
    ratio = jnp.where(is_lost, jnp.inf, part_size * ratio)
    error = jnp.where(is_unknown, jnp.inf, part_size * error)
    fields = (ratio, signal, part_size * variance, error)
    return NoiseScale(*(field.astype(jnp.float32) for field in fields))


def _jackknife_error(sums: Sums, ratio: Array) -> Array:
    """Returns the standard error of ``variance - ratio * signal``.

    Without part i the mean is ``(n G - g_i) / (n - 1)``; what all parts share cancels.
    """
    n = sums.squares.shape[-1]
    squares, products = (
        one - jnp.mean(one, -1, keepdims=True) for one in (sums.squares, sums.products)
    )
    square_norm = (squares - 2 * n * products) / (n - 1) ** 2
    variance = -(squares + (n - 1) * square_norm) / max(n - 2, 1)
    signal = square_norm - variance / (n - 1)
    spread = jnp.sum((variance - ratio[..., None] * signal) ** 2, -1)
    return jnp.sqrt((n - 1) / n * spread)
