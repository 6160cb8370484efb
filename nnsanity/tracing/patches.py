"""The gradient of a convolution's kernel as a product over positions of patches."""

from collections.abc import Sequence
from math import prod

import jax
import jax.numpy as jnp

from nnsanity._types import Array
from nnsanity.tracing.compat import Equation
from nnsanity.tracing.outer_products import Move, Product, product


def patched(eqn: Equation, values: Array, window: Array) -> Product | None:
    """Writes a convolution of two arrays as a product over the second's positions.

    In the gradient by a kernel, the second is the gradient by what the layer puts out,
    and each position of the result is one of the kernel's.  Groups of channels have
    become groups of the batch.

    Args:
        eqn: a ``conv_general_dilated``.
        values: its first operand.
        window: its second operand.

    Returns:
        The product; None for groups of channels, as no gradient has them.
    """
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    if params["feature_group_count"] != 1:
        return None
    num_groups = params["batch_group_count"]
    values = _padded(values.transpose(numbers.lhs_spec), params)
    window = window.transpose(numbers.rhs_spec)
    num_kernels, _, *positions = window.shape
    sizes = [eqn.outvars[0].aval.shape[axis] for axis in numbers.out_spec[2:]]
    for index, (size, count) in enumerate(zip(sizes, positions, strict=True)):
        stride = params["window_strides"][index], params["rhs_dilation"][index]
        # Axes so far: batch, channel, a pair for each index before.
        values = _windows(values, 2 + 2 * index, size, count, stride)
    rank = len(sizes)
    batch = values.shape[0] // num_groups
    values = values.reshape(num_groups, batch, *values.shape[1:])
    # groups; channels and positions of the window; positions of the kernel, batch.
    first = [2, *range(4, 3 + 2 * rank, 2)]
    kernel = range(3, 3 + 2 * rank, 2)
    left = values.transpose(0, *first, *kernel, 1)
    left = left.reshape(num_groups, -1, prod(sizes) * batch)
    right = window.reshape(num_groups, num_kernels // num_groups, -1).swapaxes(1, 2)
    return _as_kernel(left, right, (sizes, batch, num_groups), numbers.out_spec)


def _padded(values: Array, params: dict) -> Array:
    padding = [
        (low, high, dilation - 1)
        for (low, high), dilation in zip(
            params["padding"], params["lhs_dilation"], strict=True
        )
    ]
    zero = jnp.zeros((), values.dtype)
    return jax.lax.pad(values, zero, [(0, 0, 0), (0, 0, 0), *padding])


def _windows(
    values: Array, axis: int, size: int, count: int, stride: tuple[int, int]
) -> Array:
    """Splits an axis into [size, count]: ``values[k * stride[0] + p * stride[1]]``."""
    parts = [
        jax.lax.slice_in_dim(
            values,
            start * stride[0],
            start * stride[0] + (count - 1) * stride[1] + 1,
            stride[1],
            axis,
        )
        for start in range(size)
    ]
    return jnp.stack(parts, axis)


def _as_kernel(
    left: Array,
    right: Array,
    sizes: tuple[Sequence[int], int, int],
    out_spec: Sequence[int],
) -> Product:
    """Arranges [groups, kernel positions and batch, channels] as the result has it."""
    kernel, batch, num_groups = sizes
    rank, num_channels = len(kernel), right.shape[-1]
    groups = () if num_groups == 1 else (num_groups,)
    split = groups, (*kernel, batch), (num_channels,)
    # Where each axis of the product ends up; the channels right after their groups.
    places = [*out_spec[2:], out_spec[0], out_spec[1]]
    if not groups:
        return product(
            left, right, split, [places.index(axis) for axis in range(rank + 2)]
        )
    order = [1 + places.index(axis) for axis in range(rank + 2)]
    channels = order.index(rank + 2)
    order.insert(channels, 0)
    term = product(left, right, split, order)
    shape = [
        (*kernel, batch, num_groups * num_channels)[places.index(axis)]
        for axis in range(rank + 2)
    ]
    move = Move(("channels", tuple(shape)), lambda values: values.reshape(shape))
    return term._replace(moves=(move,))
