"""Item 5: how many gradient terms does a step average?

"Large batches average away the noise that finds flat minima.  Take the smallest that
trains in bearable time; try 16, 8, even 1" (D. Holden).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnsanity._tree import (
    accumulation_dtype,
    in_float32,
    inexact_leaves,
    is_inexact,
    leaf_names,
    num_examples,
)
from nnsanity._types import Array, LossFn, Params, PyTree
from nnsanity.findings import Finding

USUAL = 32
"""The batch size that the trial tries instead (Bengio 2012, section 3.1.1)."""
LARGE_SHARE = 0.25
"""Share of the data from which on a batch is suspected to be too large."""
SMALL = 2
"""Size up to which a batch is suspected to be too small (AutoTrainer)."""
_ARRAY_LIKE = (jax.Array, np.ndarray, np.generic, int, float, complex)
MAX_COPIES = 128
"""Most example gradients that are in memory at a time."""
MAX_BYTES = 2**28
"""Most bytes that they take together; a single one may take more."""


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


def example_gradient_norms(loss_fn: LossFn, params: Params, batch: PyTree) -> Array:
    """Returns how hard each example pulls at the parameters.

    The norm of ``jax.grad(loss_fn)(params, batch[i:i+1])`` over all floating-point
    leaves, for every i.  Worry where a few examples outweigh all others: they drive the
    step, and are often outliers or wrong labels.  NaN marks examples that break the
    gradient.  A loss that is a sum or has a penalty is taken as it is.  Where examples
    are coupled (batch normalization in training mode), one by itself has another
    gradient than within its batch; this can't be told apart here.

    Costs one gradient of every example: far more than one of the batch where weights
    are large.  At most 128 of them and 256 MiB are in memory at a time, but always one.
    Squares are float32: norms under 1e-19 may come back as 0, over 1e19 as infinite.

    Args:
        loss_fn: ``loss_fn(params, batch) -> scalar``.
        params: any pytree of arrays; of its leaves the floating-point ones count.
        batch: any pytree of arrays, leading axis the examples.

    Returns:
        float32[examples].

    Raises:
        TypeError: if a leaf of the batch is not an array.
        ValueError: if the leaves of the batch differ in their number of examples,
            ``params`` has no floating-point leaf, or the loss is not such a scalar.

    Example:
        >>> loss_fn = lambda params, x: jnp.mean(x @ params["w"])
        >>> x = jnp.array([[3.0, 4.0], [0.0, -2.0]])
        >>> example_gradient_norms(loss_fn, {"w": jnp.zeros(2)}, x)
        Array([5., 2.], dtype=float32)
    """
    _checked_length("example_gradient_norms", params, batch)
    return _example_gradient_norms(loss_fn, params, batch)


@functools.partial(jax.jit, static_argnums=0)
def _example_gradient_norms(loss_fn: LossFn, params: Params, batch: PyTree) -> Array:
    gradient_fn = _gradient_fn("example_gradient_norms", loss_fn, params)
    parts = _divided(batch, num_examples(batch))
    squares, _ = _squares_and_mean(gradient_fn, params, parts)
    return jnp.sqrt(squares).astype(jnp.float32)


def gradient_noise_scale(
    loss_fn: LossFn,
    params: Params,
    batch: PyTree,
    *,
    num_microbatches: int | None = None,
) -> NoiseScale:
    """Measures the batch size beyond which more examples stop to pay.

    The noise scale is the number of examples at which the noise of the batch's gradient
    is as large as the gradient.  Worry where your batch is over four times that, beyond
    its error.  Take it in mid-descent; towards the minimum it grows without limit.

    Let ``g_i`` be the gradients of n single examples and G their mean.  Then the trace
    is ``(sum |g_i|^2 - n |G|^2) / (n - 1)`` and the square norm ``|G|^2 - trace / n``,
    both unbiased.  Where noise covers the gradient, the square norm is negative or 0
    and the noise scale inf.  So it is where every gradient is 0: no batch makes more of
    it, and the trace of 0 tells this case.  NaN in a gradient makes all results NaN.

    The standard error is the delete-one jackknife of both estimates, carried to their
    ratio by the delta method, and errs on the large side.  Where it is not well below
    the noise scale, both are rough and the noise scale errs upwards: then average the
    square norms and the traces of several batches before dividing.

    The loss must be a mean over examples: the whole gradient is taken as the mean of
    the parts'.  A sum has the same noise scale, but with microbatches of b examples
    ``b**2`` times the square norm and trace.  A penalty on the parameters counts as
    gradient without noise.  Where examples are coupled (batch normalization in training
    mode) the parts have the gradients of another loss; this can't be told apart here.

    Costs two gradients of every example (as in ``example_gradient_norms``), or with
    microbatches two gradients of the batch; half of that in a compiled program that
    leaves the standard error unused.  Needs the memory of one gradient more.

    Args:
        loss_fn: ``loss_fn(params, batch) -> scalar``, a mean over examples.
        params: any pytree of arrays; of its leaves the floating-point ones count.
        batch: any pytree of arrays, leading axis the examples.
        num_microbatches: None compares single examples, the most certain; k compares k
            consecutive parts of the batch, and has the wider error.

    Returns:
        ``NoiseScale``.

    Raises:
        TypeError: if a leaf of the batch is not an array, or ``num_microbatches`` not
            an int.
        ValueError: as in ``example_gradient_norms``, for a batch of one example, and if
            ``num_microbatches`` is under 2 or does not divide the examples.

    Example:
        >>> loss_fn = lambda params, x: jnp.mean(params["w"] * x)
        >>> found = gradient_noise_scale(loss_fn, {"w": 1.0}, jnp.array([2.0, 4.0]))
        >>> found.gradient_square_norm, found.covariance_trace, found.noise_scale
        (Array(8., dtype=float32), Array(2., dtype=float32), Array(0.25, dtype=float32))

    References:
        McCandlish et al. (2018), "An empirical model of large-batch training", equation
        2.9 and appendix A.1; Efron and Stein (1981), "The jackknife estimate of
        variance".
    """
    length = _checked_length("gradient_noise_scale", params, batch)
    num_parts = length if num_microbatches is None else num_microbatches
    _check_parts(num_parts, length)
    return _gradient_noise_scale(loss_fn, params, batch, int(num_parts))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _gradient_noise_scale(
    loss_fn: LossFn, params: Params, batch: PyTree, num_parts: int
) -> NoiseScale:
    gradient_fn = _gradient_fn("gradient_noise_scale", loss_fn, params)
    parts = _divided(batch, num_parts)
    squares, mean = _squares_and_mean(gradient_fn, params, parts)
    products = _products(gradient_fn, params, parts, mean)
    part_size = num_examples(batch) // num_parts
    return _estimated(squares, products, _product(mean, mean), part_size)


def _estimated(
    squares: Array, products: Array, square_norm: Array, part_size: int
) -> NoiseScale:
    """Estimates from ``|g_i|^2``, ``g_i . G`` and ``|G|^2``, by McCandlish A.1."""
    n = squares.size
    variance = (jnp.sum(squares) - n * square_norm) / (n - 1)
    variance = jnp.maximum(variance, 0)  # negative only by rounding
    signal = square_norm - variance / n
    is_lost = signal <= 0
    divisor = jnp.where(is_lost, 1, signal)
    ratio = variance / divisor
    error = _jackknife_error(squares, products, ratio) / divisor
    is_unknown = is_lost | ((n < 3) & ~jnp.isnan(ratio))
    ratio = jnp.where(is_lost, jnp.inf, part_size * ratio)
    error = jnp.where(is_unknown, jnp.inf, part_size * error)
    fields = (ratio, signal, part_size * variance, error)
    return NoiseScale(*(field.astype(jnp.float32) for field in fields))


def _jackknife_error(squares: Array, products: Array, ratio: Array) -> Array:
    """Returns the standard error of ``variance - ratio * signal``.

    Without part i the mean is ``(n G - g_i) / (n - 1)``; what all parts share cancels.
    """
    n = squares.size
    squares = squares - jnp.mean(squares)
    products = products - jnp.mean(products)
    square_norm = (squares - 2 * n * products) / (n - 1) ** 2
    variance = -(squares + (n - 1) * square_norm) / max(n - 2, 1)
    signal = square_norm - variance / (n - 1)
    return jnp.sqrt((n - 1) / n * jnp.sum((variance - ratio * signal) ** 2))


def _divided(batch: PyTree, num_parts: int) -> PyTree:
    shape = num_parts, num_examples(batch) // num_parts
    return jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), batch)


Grads = list[Array]
GradientFn = Callable[[PyTree], Grads]


def _gradient_fn(caller: str, loss_fn: LossFn, params: Params) -> GradientFn:
    """Returns the gradient by the floating-point leaves, as a function of a batch."""
    leaves, structure = jax.tree.flatten(params)
    trained = [leaf if is_inexact(leaf) else None for leaf in leaves]

    @jax.jit  # traces the loss once for all the places that call it
    @jax.grad
    def gradient(trained: list, batch: PyTree) -> Array:
        pairs = zip(trained, leaves, strict=True)
        merged = [other if one is None else one for one, other in pairs]
        loss = loss_fn(jax.tree.unflatten(structure, merged), batch)
        _check_loss(caller, loss)
        return loss

    return lambda batch: [
        in_float32(g) for g in inexact_leaves(gradient(trained, batch))
    ]


def _squares_and_mean(
    gradient_fn: GradientFn, params: Params, parts: PyTree
) -> tuple[Array, Grads]:
    """Returns the squared norm of each part's gradient, and the mean gradient."""

    def step(total: Grads, chunk: PyTree) -> tuple[Grads, Array]:
        grads = _gradients(gradient_fn, chunk)
        total = [a + jnp.sum(b, 0) for a, b in zip(total, grads, strict=True)]
        return total, jax.vmap(_product)(grads, grads)

    # Never true, even of NaN: zeros that are sharded as the parameters are.
    zeros = [
        (jnp.abs(leaf) > jnp.inf).astype(accumulation_dtype(leaf))
        for leaf in inexact_leaves(params)
    ]
    total, squares = _over_chunks(step, zeros, parts, _chunk_size(params, parts))
    return squares, [leaf / squares.size for leaf in total]


def _products(
    gradient_fn: GradientFn, params: Params, parts: PyTree, direction: Grads
) -> Array:
    """Returns the inner product of each part's gradient with a direction."""

    def step(_: None, chunk: PyTree) -> tuple[None, Array]:
        grads = _gradients(gradient_fn, chunk)
        return None, jax.vmap(_product, (0, None))(grads, direction)

    return _over_chunks(step, None, parts, _chunk_size(params, parts))[1]


def _gradients(gradient_fn: GradientFn, chunk: PyTree) -> Grads:
    """Returns the gradients of the parts in a chunk, on a leading axis."""
    if num_examples(chunk) > 1:
        return jax.vmap(gradient_fn)(chunk)
    return [leaf[None] for leaf in gradient_fn(jax.tree.map(lambda x: x[0], chunk))]


def _product(a: Grads, b: Grads) -> Array:
    """Inner product over all leaves, each of them reduced where it lies."""
    sums = [jnp.sum(jnp.real(jnp.conj(x) * y)) for x, y in zip(a, b, strict=True)]
    dtype = accumulation_dtype(*sums)
    return functools.reduce(jnp.add, [one.astype(dtype) for one in sums])


def _chunk_size(params: Params, parts: PyTree) -> int:
    """Returns how many gradients to take side by side: one, for microbatches."""
    if jax.tree.leaves(parts)[0].shape[1] > 1:
        return 1
    num_bytes = sum(
        leaf.size * accumulation_dtype(leaf).itemsize for leaf in inexact_leaves(params)
    )
    count = num_examples(parts)
    most = max(1, min(count, MAX_COPIES, MAX_BYTES // max(num_bytes, 1)))
    divisors = (size for size in range(most, most // 2, -1) if count % size == 0)
    return next(divisors, most)  # rather somewhat smaller chunks than a rest


def _over_chunks(
    step: Callable, start: PyTree, parts: PyTree, chunk_size: int
) -> tuple[PyTree, Array]:
    """Like ``lax.scan`` over chunks of parts, with one number for each part.

    Chunks of neighbours would gather a batch that is sharded over devices.
    """
    num_chunks, rest = divmod(num_examples(parts), chunk_size)
    length = num_chunks * chunk_size

    def spread(leaf: Array) -> Array:
        split = leaf[:length].reshape(chunk_size, num_chunks, *leaf.shape[1:])
        return split.swapaxes(0, 1)

    state, rows = jax.lax.scan(step, start, jax.tree.map(spread, parts))
    rows = rows.T.reshape(length)
    if rest:
        state, last = step(state, jax.tree.map(lambda leaf: leaf[length:], parts))
        rows = jnp.concatenate([rows, last])
    return state, rows


def _checked_length(caller: str, params: Params, batch: PyTree) -> int:
    """Returns the number of examples, where both trees are what they should be."""
    if not inexact_leaves(params):
        raise ValueError(f"{caller}: params must have floating-point leaves, got none")
    shapes = {}
    names, leaves = leaf_names({"batch": batch}), jax.tree.leaves(batch)
    for name, leaf in zip(names, leaves, strict=True):
        is_text = isinstance(leaf, np.ndarray) and leaf.dtype.kind in "OSUMm"
        if is_text or not isinstance(leaf, _ARRAY_LIKE):
            raise TypeError(
                f"{caller}: batch must be a tree of arrays of numbers, got"
                f" {type(leaf).__name__} at {name}; leave it out"
            )
        shapes[name] = np.shape(leaf)
    lengths = {shape[:1] for shape in shapes.values()}
    if len(lengths) != 1 or lengths & {(), (0,)}:
        raise ValueError(
            f"{caller}: the leaves of batch must have a leading axis of the same number"
            f" of examples, at least 1, got {shapes}; is one a scalar, or cut short?"
        )
    return lengths.pop()[0]


def _check_parts(num_parts: int, length: int) -> None:
    got = f"gradient_noise_scale: got num_microbatches={num_parts!r}"
    if isinstance(num_parts, bool) or not isinstance(num_parts, int | np.integer):
        raise TypeError(f"{got}, but it must be None or an int; is it an array?")
    if length < 2:
        raise ValueError("gradient_noise_scale: batch has one example, so no variance")
    if num_parts < 2 or length % num_parts:
        raise ValueError(
            f"{got}, but it must be at least 2 and divide the {length} examples of"
            " batch; is the last batch shorter?"
        )


def _check_loss(caller: str, loss: object) -> None:
    got, hint = type(loss).__name__, "; return the loss alone, without aux"
    if isinstance(loss, jax.Array):
        if loss.shape == () and jnp.issubdtype(loss.dtype, jnp.floating):
            return
        got = f"{loss.dtype}{list(loss.shape)}"
        hint = "; did you forget a mean?" if loss.shape else ""
    raise ValueError(
        f"{caller}: loss_fn must return a floating-point scalar, got {got}{hint}"
    )


def suspected(batch_size: int, num_examples: int) -> bool:
    """Tells whether a batch is so large or small that another size is worth a try."""
    is_large = batch_size > USUAL and batch_size >= LARGE_SHARE * num_examples
    return is_large or (batch_size <= SMALL and num_examples > USUAL)


def wrong_size(batch_size: int, num_examples: int) -> Finding:
    """The finding that another batch size learns, as its trial shows."""
    is_large = batch_size > USUAL
    if is_large:
        message = (
            f"A batch of {batch_size} of the {num_examples} examples leaves few steps"
            " for each pass over the data."
        )
        advice = f"Use batches of {USUAL} or fewer for the same number of examples."
    else:
        message = f"Steps on {batch_size} of the examples jump to and fro."
        advice = f"Use batches of {USUAL}, or a smaller learning rate."
    return Finding(
        f"batch-size/{'too-large' if is_large else 'too-small'}",
        5,
        "info",
        "batch_size",
        float(batch_size),
        float(USUAL),
        message,
        advice,
    )
