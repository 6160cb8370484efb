"""How sharply the loss bends: the largest eigenvalue of its Hessian."""

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nnsanity._tree import accumulation_dtype, check_key, in_float32
from nnsanity._types import Array, LossFn, Params, PyTree
from nnsanity.quantities.descent import check_loss, floats_of, with_floats
from nnsanity.tracing.convolutions import channels_last

_BLOCK = 4
"""Vectors that are taken out of another one together."""
_BREAKDOWN = 10.0
"""Residuals under so many units of rounding mean that no new direction is left."""


class Sharpness(NamedTuple):
    """The largest eigenvalue of the Hessian of a loss.

    Attributes:
        eigenvalue: float32[], in units of the loss over the square of a parameter.
            Gradient descent is stable at rates under 2 / eigenvalue.
        residual: float32[], |H v - eigenvalue v| for the unit vector v that was found;
            an eigenvalue of H lies within it.  Healthy is well under the eigenvalue;
            otherwise ask for more iterations.
    """

    eigenvalue: Array
    residual: Array


def sharpness(
    loss_fn: LossFn, params: Params, batch: PyTree, *, key: Array, num_iterations: int
) -> Sharpness:
    """Measures the largest eigenvalue of the Hessian of the loss by the parameters.

    The most positive one, also where the most negative is larger in size.  Gradient
    descent is stable at rates under 2 / eigenvalue, with momentum m under
    2 (1 + m) / eigenvalue; worry where the rate is above.  It is approached from
    below: what comes back is never above the truth, beyond rounding.  Networks that
    train at a constant rate are driven to this edge, so measure it early.

    Lanczos iterations, each vector orthogonal to all before it.  Costs
    ``num_iterations + 1`` products of the Hessian with a vector, each about two to
    three gradients, one read of the vectors so far for each, and memory for
    ``num_iterations`` copies of the parameters in float32, sharded as they are; without
    the copies rounding would bring back what was found already, and the vector could
    not be built.  10 to 30 iterations are usual.  Half precision limits the products
    themselves to two or three digits, which the residual shows.

    Args:
        loss_fn: ``loss_fn(params, batch) -> scalar``, twice differentiable.
        params: any pytree of arrays; leaves that are not floating-point are constants.
        batch: any pytree.
        key: consumed; the first vector.
        num_iterations: at least 1; more than there are parameters do no harm.

    Returns:
        ``Sharpness``; 0 for a loss without curvature, NaN where the products are not
        finite.

    Raises:
        TypeError: if the key is not a key, or ``num_iterations`` not an int.
        ValueError: if ``loss_fn`` does not return a scalar, there are no parameters or
            no iterations.

    Example:
        >>> loss_fn = lambda x, curvatures: 0.5 * jnp.sum(curvatures * x**2)
        >>> found = sharpness(
        ...     loss_fn,
        ...     jnp.ones(3),
        ...     jnp.array([4.0, 1.0, -9.0]),
        ...     key=jax.random.key(0),
        ...     num_iterations=3,
        ... )
        >>> round(float(found.eigenvalue), 4)
        4.0

    References:
        Lanczos (1950), "An iteration method for the solution of the eigenvalue
        problem".
        LeCun, Simard and Pearlmutter (1992), "Automatic learning rate maximization by
        on-line estimation of the Hessian's eigenvectors".
        Cohen et al. (2021), "Gradient descent on neural networks typically occurs at
        the edge of stability".
    """
    check_key("sharpness", key)
    try:
        num_iterations = operator.index(num_iterations)
    except (TypeError, jax.errors.TracerIntegerConversionError):
        raise TypeError(
            f"sharpness: num_iterations must be an int, got {num_iterations!r}; under"
            " jit mark it as static"
        ) from None
    if num_iterations < 1:
        raise ValueError(
            f"sharpness: num_iterations must be at least 1, got {num_iterations}; 20"
            " are usual"
        )
    return _sharpness(loss_fn, num_iterations, params, batch, key)


Vector = list[Array]
"""A direction in the space of parameters: an array for each floating-point leaf."""


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sharpness(
    loss_fn: LossFn, num_iterations: int, params: Params, batch: PyTree, key: Array
) -> Sharpness:
    check_loss("sharpness", loss_fn, params, batch)
    leaves = jax.tree.leaves(floats_of(params))
    gradient = jax.grad(lambda leaves: loss_fn(with_floats(params, leaves), batch))

    def product(vector: Vector) -> Vector:
        """The Hessian times a vector of the dtypes of the parameters."""
        _, products = jax.jvp(gradient, (leaves,), (vector,))
        # By a complex parameter, jax.grad returns the conjugate of the direction.
        return [in_float32(jnp.conj(one)) for one in products]

    start = _random_like(leaves, key)
    vector = _ritz_vector(channels_last(product), leaves, start, num_iterations)
    applied = product(vector)
    vector = [in_float32(one) for one in vector]
    # Half precision has rounded the vector, so its length is measured and not assumed.
    square = _inner(vector, vector)
    eigenvalue = _inner(vector, applied) / square
    rest = _plus(applied, vector, -eigenvalue)
    residual = _length(rest) / jnp.sqrt(square)
    return Sharpness(eigenvalue.astype(jnp.float32), residual.astype(jnp.float32))


def _random_like(leaves: Vector, key: Array) -> Vector:
    keys = jax.random.split(key, len(leaves))
    # Added to zeros of the parameters, so that it is sharded as they are.
    return [
        jax.random.normal(one, leaf.shape, accumulation_dtype(leaf))
        + 0 * in_float32(leaf)
        for one, leaf in zip(keys, leaves, strict=True)
    ]


def _ritz_vector(
    product: Callable[[Vector], Vector],
    leaves: Vector,
    start: Vector,
    num_iterations: int,
) -> Vector:
    """Returns the best unit vector of the Krylov space, in the parameters' dtypes."""
    num_blocks = -(-num_iterations // _BLOCK)
    start = _scaled(start, 1 / _length(start))
    shape = num_blocks, _BLOCK
    # Made of the parameters, so that they are sharded as those are.
    basis = [0 * jnp.stack([jnp.stack([one] * shape[1])] * shape[0]) for one in start]
    tolerance = _BREAKDOWN * jnp.finfo(_inner(start, start).dtype).eps

    def iterate(state: tuple, row: Array) -> tuple[tuple, tuple]:
        basis, vector, before, beta, size, is_alive = state
        block, place = row // _BLOCK, row % _BLOCK
        basis = [
            jax.lax.dynamic_update_slice(old, one[None, None], (block, place, *zeros))
            for one, old in zip(vector, basis, strict=True)
            for zeros in [(0,) * one.ndim]
        ]
        applied = product(_rounded(vector, leaves))
        alpha = _inner(vector, applied)
        size = jnp.maximum(size, _length(applied))
        rest = _plus(_plus(applied, vector, -alpha), before, -beta)
        rest, beta = _orthogonal(rest, basis, block + 1)
        goes_on = is_alive & (beta > tolerance * size)
        beta = jnp.where(goes_on, beta, 0)
        following = _scaled(
            rest, jnp.where(goes_on, 1 / jnp.where(goes_on, beta, 1), 0)
        )
        state = basis, following, vector, beta, size, goes_on
        return state, (alpha, beta, is_alive)

    zero = 0 * _inner(start, start)
    nothing = [0 * one for one in start]
    state: tuple = (basis, start, nothing, zero, zero, zero == 0)
    rows = jnp.arange(num_iterations)
    (basis, *_), (alphas, betas, is_alive) = jax.lax.scan(iterate, state, rows)
    weights = _largest_eigenvector(alphas, betas[:-1], is_alive)
    weights = jnp.pad(weights, (0, num_blocks * _BLOCK - num_iterations))
    weights = weights.reshape(shape)
    vector = [_combined(weights, one, num_axes=2) for one in basis]
    return _rounded(vector, leaves)


def _largest_eigenvector(alphas: Array, betas: Array, is_alive: Array) -> Array:
    """Of a tridiagonal matrix, without the rows after a breakdown."""
    size = jnp.max(jnp.abs(alphas)) + jnp.max(jnp.abs(betas), initial=0.0)
    # Out of the way: their zeros would lie above a negative spectrum.
    below = jnp.where(size > 0, -4 * size, -1.0)
    diagonal = jnp.where(is_alive, alphas, below)
    matrix = jnp.diag(diagonal) + jnp.diag(betas, 1) + jnp.diag(betas, -1)
    is_finite = jnp.all(jnp.isfinite(matrix))
    _, vectors = jnp.linalg.eigh(jnp.where(is_finite, matrix, 0))
    return jnp.where(is_finite, vectors[:, -1], jnp.nan)


def _inner(one: Vector, two: Vector) -> Array:
    """The inner product over all leaves, complex numbers as pairs."""
    parts = [_summed((jnp.conj(a) * b).real) for a, b in zip(one, two, strict=True)]
    return functools.reduce(operator.add, parts)


def _summed(numbers: Array) -> Array:
    """The sum; over the last axis last, which is four times as fast on a CPU."""
    return jnp.sum(jnp.sum(numbers, axis=tuple(range(numbers.ndim - 1))))


def _length(vector: Vector) -> Array:
    return jnp.sqrt(_inner(vector, vector))


def _scaled(vector: Vector, factor: Array) -> Vector:
    return [one * factor.astype(one.dtype) for one in vector]


def _plus(vector: Vector, other: Vector, factor: Array) -> Vector:
    return [one + two for one, two in zip(vector, _scaled(other, factor), strict=True)]


def _orthogonal(
    vector: Vector, basis: Vector, num_blocks: Array
) -> tuple[Vector, Array]:
    """Takes out what lies along the first blocks of the basis; and the length then.

    What should be there already is rounding, and one turn takes it out, unless hardly
    anything else was there (Daniel, Gragg, Kaufman and Stewart 1976): then two do.
    """

    def without_block(index: Array, vector: Vector) -> Vector:
        rows = [
            jax.lax.dynamic_index_in_dim(one, index, keepdims=False) for one in basis
        ]
        parts = [
            # No matrix product, which explicit meshes refuse along sharded axes.
            jnp.sum(
                (jnp.conj(block) * one[None]).real, axis=tuple(range(1, block.ndim))
            )
            for one, block in zip(vector, rows, strict=True)
        ]
        along = functools.reduce(operator.add, parts)
        return [
            one - _combined(along, block, num_axes=1)
            for one, block in zip(vector, rows, strict=True)
        ]

    def once(vector: Vector) -> tuple[Vector, Array]:
        vector = jax.lax.fori_loop(0, num_blocks, without_block, vector)
        return vector, _length(vector)

    before = _length(vector)
    vector, length = once(vector)
    return jax.lax.cond(length > before / 2, lambda one: (one, length), once, vector)


def _combined(weights: Array, rows: Array, *, num_axes: int) -> Array:
    """The weighted sum along the first axes, in full precision."""
    highest = jax.lax.Precision.HIGHEST
    weights = weights.astype(rows.dtype)
    return jnp.tensordot(weights, rows, axes=num_axes, precision=highest)


def _rounded(vector: Vector, leaves: Vector) -> Vector:
    return [one.astype(leaf.dtype) for one, leaf in zip(vector, leaves, strict=True)]
