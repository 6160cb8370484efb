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

    Lanczos iterations, whose vectors are made orthogonal to all before them where an
    estimate says that rounding brings these back.  Costs ``num_iterations + 1``
    products of the Hessian with a vector, each about two gradients, a read of the
    vectors so far for some of them, and memory for ``num_iterations`` copies of the
    parameters in float32, sharded as they are, of which the vector is built.  10 to 30
    iterations are usual.  The residual can't fall below rounding, some 1e-4 of the
    eigenvalue that is largest in size.  Half precision limits the products themselves
    to two or three digits, which the residual shows.

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
        Simon (1984), "The Lanczos algorithm with partial reorthogonalization".
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
    space = _lanczos(channels_last(product), leaves, start, num_iterations)
    vector = _ritz_vector(space, leaves)
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


class _Space(NamedTuple):
    """What Lanczos iterations leave.

    Attributes:
        basis: [blocks, vectors, ...] for each leaf.
        alphas: float[iterations], the diagonal of the matrix between the vectors.
        betas: float[iterations], beside the diagonal, after each alpha.
        is_alive: bool[iterations]; False where no new direction was left.
        is_due: bool[iterations], whether the next vector was made orthogonal.
    """

    basis: Vector
    alphas: Array
    betas: Array
    is_alive: Array
    is_due: Array


def _lanczos(
    product: Callable[[Vector], Vector],
    leaves: Vector,
    start: Vector,
    num_iterations: int,
) -> _Space:
    num_blocks = -(-num_iterations // _BLOCK)
    start = _scaled(start, 1 / _length(start))
    shape = num_blocks, _BLOCK
    # Made of the parameters, so that they are sharded as those are.
    basis = [0 * jnp.stack([jnp.stack([one] * shape[1])] * shape[0]) for one in start]
    eps = float(jnp.finfo(_inner(start, start).dtype).eps)
    tolerance = _BREAKDOWN * eps
    # Of a product, as a share of its size, and with room to spare.
    rounding = _BREAKDOWN * max(float(jnp.finfo(leaf.dtype).eps) for leaf in leaves)

    def iterate(state: tuple, row: Array) -> tuple[tuple, tuple]:
        basis, vector, before, beta, size, is_alive, overlap = state
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
        length = _length(rest)
        overlap = _grown(overlap, row, alpha, beta, length, rounding * size)
        is_due = overlap.is_next | ~(jnp.max(overlap.now) < eps**0.5)
        rest, beta = jax.lax.cond(
            is_due,
            lambda rest: _orthogonal(rest, length, basis, block + 1),
            lambda rest: (rest, length),
            rest,
        )
        overlap = overlap._replace(
            now=jnp.where(is_due & (overlap.now > 0), eps, overlap.now),
            is_next=is_due & ~overlap.is_next,
        )
        goes_on = is_alive & (beta > tolerance * size)
        beta = jnp.where(goes_on, beta, 0)
        following = _scaled(
            rest, jnp.where(goes_on, 1 / jnp.where(goes_on, beta, 1), 0)
        )
        state = basis, following, vector, beta, size, goes_on, overlap
        return state, (alpha, beta, is_alive, is_due)

    zero = 0 * _inner(start, start)
    nothing = [0 * one for one in start]
    none = jnp.full(num_iterations, zero)
    overlap = _Overlap(none, none, none, none, zero != 0)
    state: tuple = (basis, start, nothing, zero, zero, zero == 0, overlap)
    rows = jnp.arange(num_iterations)
    (basis, *_), found = jax.lax.scan(iterate, state, rows)
    return _Space(basis, *found)


def _ritz_vector(space: _Space, leaves: Vector) -> Vector:
    """Returns the best vector of the space, in the dtypes of the parameters."""
    weights = _largest_eigenvector(space.alphas, space.betas[:-1], space.is_alive)
    shape = space.basis[0].shape[:2]
    weights = jnp.pad(weights, (0, shape[0] * shape[1] - len(weights)))
    weights = weights.reshape(shape)
    vector = [_combined(weights, one, num_axes=2) for one in space.basis]
    return _rounded(vector, leaves)


class _Overlap(NamedTuple):
    """What the newest vector has in common with those before it, by rounding.

    Attributes:
        now: float[iterations], its inner product with each of them, at most.
        last: the same of the vector before it.
        alphas: the diagonal of the matrix so far.
        betas: beside the diagonal, before each alpha.
        is_next: bool[], whether the next vector has to be made orthogonal in any case:
            only two in a row keep what was taken out from coming back.
    """

    now: Array
    last: Array
    alphas: Array
    betas: Array
    is_next: Array


def _grown(
    overlap: _Overlap,
    row: Array,
    alpha: Array,
    beta: Array,
    length: Array,
    noise: Array,
) -> _Overlap:
    """Goes on to the next vector, by the recurrence of the vectors themselves (Simon).

    Args:
        overlap: of vector ``row``.
        row: of the matrix.
        alpha: its diagonal.
        beta: what stands before it.
        length: what stands behind it, before anything is taken out.
        noise: rounding of a product, in units of its length.
    """
    places = jnp.arange(len(overlap.now))
    now = jnp.where(places == row, 1, overlap.now)
    last = jnp.where(places == row - 1, 1, overlap.last)
    alphas = jnp.where(places == row, alpha, overlap.alphas)
    betas = jnp.where(places == row, beta, overlap.betas)
    products = (
        jnp.roll(betas * now, -1)
        + (alphas - alpha) * now
        + betas * jnp.roll(now, 1)
        - beta * last
    )
    products = jnp.where(places < row, jnp.abs(products), 0) + noise
    products = jnp.where(places <= row, products / length, 0)
    return _Overlap(products, overlap.now, alphas, betas, overlap.is_next)


def _largest_eigenvector(alphas: Array, betas: Array, is_alive: Array) -> Array:
    """Of a tridiagonal matrix, without the rows after a breakdown."""
    size = jnp.max(jnp.abs(alphas)) + jnp.max(jnp.abs(betas), initial=0.0)
    # Out of the way: their zeros would lie above a negative spectrum.
    diagonal = jnp.where(is_alive, alphas, -4 * size - 1)
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
    vector: Vector, length: Array, basis: Vector, num_blocks: Array
) -> tuple[Vector, Array]:
    """Takes out what lies along the first blocks of the basis; and the length then.

    What should not be there is rounding, and one turn takes it out, unless hardly
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

    vector, rest = once(vector)
    return jax.lax.cond(rest > length / 2, lambda one: (one, rest), once, vector)


def _combined(weights: Array, rows: Array, *, num_axes: int) -> Array:
    """The weighted sum along the first axes, in full precision."""
    highest = jax.lax.Precision.HIGHEST
    weights = weights.astype(rows.dtype)
    return jnp.tensordot(weights, rows, axes=num_axes, precision=highest)


def _rounded(vector: Vector, leaves: Vector) -> Vector:
    return [one.astype(leaf.dtype) for one, leaf in zip(vector, leaves, strict=True)]
