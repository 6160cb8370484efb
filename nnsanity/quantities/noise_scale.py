"""How noisy the gradient of a batch is, and so how many examples pay."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.dtypes import float0

from nnsanity._tree import accumulation_dtype, in_float32, is_inexact, num_examples
from nnsanity._types import Array, LossFn, Params, PyTree
from nnsanity.quantities.example_gradients import (
    ExampleGradients,
    GradientFn,
    along,
    along_total,
    gradient_of,
    gradients_of,
    inner,
    squares,
    totals,
)
from nnsanity.quantities.example_norms import (
    check_apart,
    check_examples,
    chunk_size,
    over_chunks,
)
from nnsanity.quantities.noise_estimate import (
    NoiseScale,
    Sums,
    estimated,
    joined,
    stacked,
)
from nnsanity.tracing.convolutions import channels_last

Grads = list[Array]
"""By the floating-point leaves."""


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
    square norms and the traces of several batches before dividing, as ``add_noise``
    does.

    The loss must be a mean over examples: the whole gradient is taken as the mean of
    the parts'.  A sum has the same noise scale, but with microbatches of b examples
    ``b**2`` times the square norm and trace.  A penalty on the parameters counts as
    gradient without noise.  Examples that change each other's outputs (batch
    normalization in training mode) are refused; microbatches of them have the gradients
    of another loss.

    Costs about one gradient of the batch and a quarter of one for the standard error,
    on the conditions of ``example_gradient_norms``; twice that where the batch is cut
    into chunks, of 1024 examples or of what fits 256 MiB.  With microbatches two
    gradients of the batch; half of that in a compiled program that leaves the standard
    error unused.

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
    caller = "gradient_noise_scale"
    num_parts = _checked_parts(caller, params, batch, num_microbatches)
    sums = _sums(caller, loss_fn, num_parts, params, batch)
    return estimated(joined(sums), _part_size(batch, num_parts))


def leaf_noise_scales(
    loss_fn: LossFn,
    params: Params,
    batch: PyTree,
    *,
    num_microbatches: int | None = None,
) -> NoiseScale:
    """Measures the noise scale of every leaf of the parameters by itself.

    As ``gradient_noise_scale``, at the same cost.  Worry where the leaves of one layer
    stand out: its gradient drowns in noise, or a few examples alone drive it.

    Args:
        loss_fn: ``loss_fn(params, batch) -> scalar``, a mean over examples.
        params: any pytree of arrays.
        batch: any pytree of arrays, leading axis the examples.
        num_microbatches: as in ``gradient_noise_scale``.

    Returns:
        ``NoiseScale`` of float32[leaves]: the floating-point leaves, in leaf order.

    Raises:
        TypeError: as in ``gradient_noise_scale``.
        ValueError: as in ``gradient_noise_scale``.

    Example:
        >>> loss_fn = lambda params, x: jnp.mean(params["v"] + params["w"] * x)
        >>> params, x = {"v": 1.0, "w": 1.0}, jnp.array([2.0, 4.0])
        >>> leaf_noise_scales(loss_fn, params, x).covariance_trace
        Array([0., 2.], dtype=float32)
    """
    caller = "leaf_noise_scales"
    num_parts = _checked_parts(caller, params, batch, num_microbatches)
    sums = _sums(caller, loss_fn, num_parts, params, batch)
    return estimated(sums, _part_size(batch, num_parts))


def value_and_grad_with_noise(loss_fn: LossFn) -> Callable:
    """Like ``jax.value_and_grad``, and measures the noise scale from the same pass.

    The loss and the gradient are the means over single examples of those of
    ``loss_fn(params, batch[i:i+1])``: for a loss that is a mean over examples, with or
    without a penalty on the parameters, the same as those of the batch.  Do not use it
    for others (a sum, a mean over a mask of several examples).

    Costs 1.0 to 1.3 gradients in a compiled step, on the conditions of
    ``example_gradient_norms``.  Estimates of single steps are rough: average them by
    ``add_noise``.

    Args:
        loss_fn: ``loss_fn(params, batch) -> scalar``, a mean over examples.

    Returns:
        A function of ``(params, batch)`` that returns ``((loss, noise), grads)`` with a
        ``NoiseScale``.  Leaves of ``params`` that are not floating-point have gradients
        of float0.  It raises what ``gradient_noise_scale`` raises.

    Example:
        >>> loss_fn = lambda params, x: jnp.mean(params["w"] * x)
        >>> step = value_and_grad_with_noise(loss_fn)
        >>> (loss, noise), grads = step({"w": 1.0}, jnp.array([2.0, 4.0]))
        >>> loss, grads["w"], noise.noise_scale
        (Array(3., dtype=float32), Array(3., dtype=float32), Array(0.25, dtype=float32))
    """

    def value_and_grad_fn(params: Params, batch: PyTree) -> tuple:
        caller = "value_and_grad_with_noise"
        length = _checked_parts(caller, params, batch, None)
        gradient_fn = gradient_of(caller, loss_fn, params)
        check_apart(caller, loss_fn, params, batch)
        loss, sums, mean = _of_examples(gradient_fn, batch, length)
        given = iter(mean)
        grads = [
            next(given).astype(jnp.result_type(leaf))
            if is_inexact(leaf)
            else np.zeros(np.shape(leaf), float0)
            for leaf in gradient_fn.leaves
        ]
        noise = estimated(joined(sums), 1)
        return (loss, noise), jax.tree.unflatten(jax.tree.structure(params), grads)

    return value_and_grad_fn


def _part_size(batch: PyTree, num_parts: int) -> int:
    return num_examples(batch) // num_parts


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _sums(
    caller: str, loss_fn: LossFn, num_parts: int, params: Params, batch: PyTree
) -> Sums:
    gradient_fn = gradient_of(caller, loss_fn, params)
    if num_parts < num_examples(batch):
        return _of_parts(gradient_fn, batch, num_parts)
    check_apart(caller, loss_fn, params, batch)
    return _of_examples(gradient_fn, batch, num_parts)[1]


def _of_examples(
    gradient_fn: GradientFn, batch: PyTree, count: int
) -> tuple[Array, Sums, Grads]:
    """Returns the mean loss, the sums and the mean gradient."""
    size = chunk_size(gradient_fn, batch)
    if size == count:
        gradients = gradients_of(gradient_fn, batch)
        total = totals(gradients)
        products = along_total(gradients, total) / count
        found = squares(gradients), products, gradients.losses
        return _with_mean(*found, total)

    def add(total: Grads, chunk: PyTree) -> tuple[Grads, Array]:
        gradients = gradients_of(gradient_fn, chunk)
        total = [a + b for a, b in zip(total, totals(gradients), strict=True)]
        return total, jnp.stack([*squares(gradients), _losses(gradients)])

    def project(_: None, chunk: PyTree) -> tuple[None, Array]:
        return None, along(gradients_of(gradient_fn, chunk), mean)

    total, rows = over_chunks(add, _zeros(gradient_fn), batch, size)
    mean = [leaf / count for leaf in total]
    _, products = over_chunks(project, None, batch, size)
    return _with_mean(rows[:-1], products, rows[-1], total)


def _losses(gradients: ExampleGradients) -> Array:
    return gradients.losses.astype(jnp.float32)


def _with_mean(
    squares: Array, products: Array, losses: Array, total: Grads
) -> tuple[Array, Sums, Grads]:
    mean = [leaf / losses.size for leaf in total]
    square_norm = stacked([inner(leaf, leaf) for leaf in mean])
    return jnp.mean(losses), Sums(squares, products, square_norm), mean


def _of_parts(gradient_fn: GradientFn, batch: PyTree, num_parts: int) -> Sums:
    """Runs one microbatch after the other, twice."""
    shape = num_parts, num_examples(batch) // num_parts
    parts = jax.tree.map(
        lambda leaf: jnp.reshape(leaf, (*shape, *np.shape(leaf)[1:])), batch
    )

    @channels_last
    def gradient(part: PyTree) -> Grads:
        return [
            in_float32(leaf) for leaf in gradient_fn.run(gradient_fn.leaves, part)[1]
        ]

    def add(total: Grads, part: PyTree) -> tuple[Grads, Array]:
        grads = gradient(part)
        total = [a + b for a, b in zip(total, grads, strict=True)]
        return total, stacked([inner(leaf, leaf) for leaf in grads])

    def project(_: None, part: PyTree) -> tuple[None, Array]:
        pairs = zip(gradient(part), mean, strict=True)
        return None, stacked([inner(*pair) for pair in pairs])

    total, squares = jax.lax.scan(add, _zeros(gradient_fn), parts)
    mean = [leaf / num_parts for leaf in total]
    _, products = jax.lax.scan(project, None, parts)
    return Sums(squares.T, products.T, stacked([inner(leaf, leaf) for leaf in mean]))


def _zeros(gradient_fn: GradientFn) -> Grads:
    # Never true, even of NaN: zeros that are sharded as the parameters are.
    return [
        (jnp.abs(leaf) > jnp.inf).astype(accumulation_dtype(leaf))
        for leaf in gradient_fn.trained
    ]


def _checked_parts(
    caller: str, params: Params, batch: PyTree, num_microbatches: int | None
) -> int:
    """Returns how many parts are compared, where that makes sense."""
    length = check_examples(caller, params, batch)
    if length < 2:
        raise ValueError(f"{caller}: batch has one example, so no variance")
    if num_microbatches is None:
        return length
    got = f"{caller}: got num_microbatches={num_microbatches!r}"
    is_integer = isinstance(num_microbatches, int | np.integer)
    if isinstance(num_microbatches, bool) or not is_integer:
        raise TypeError(f"{got}, but it must be None or an int; is it an array?")
    if num_microbatches < 2 or length % num_microbatches:
        raise ValueError(
            f"{got}, but it must be at least 2 and divide the {length} examples of"
            " batch; is the last batch shorter?"
        )
    return int(num_microbatches)
