"""Errors in the unit of the targets, beside what a constant reaches."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnsanity._tree import described, in_float32, num_examples, takes_numbers
from nnsanity._types import Array, LossFn, Params, PyTree
from nnsanity.quantities.descent import check_loss
from nnsanity.quantities.moments import (
    Moments,
    denormalize,
    feature_moments,
    z_scores,
)
from nnsanity.tracing.convolutions import channels_last


class ConstantBaseline(NamedTuple):
    """The error of the outputs beside that of the best constant output.

    For numbers each field is float32[columns], one for each number of a target; for
    classes float32[].

    Attributes:
        error: root mean square error in the unit of the targets; for classes the share
            of wrong answers.
        constant_error: the same of the best constant output.
        explained: share of the variance that the outputs explain, or of the constant's
            wrong answers that they avoid; 1 is perfect, 0 no better than a constant,
            below that worse.
        absolute_error: mean absolute error; for classes the same as ``error``.
        bias: mean of outputs less targets; 0 for classes.
        constant: the best constant: the mean, or the commonest class.
    """

    error: Array
    constant_error: Array
    explained: Array
    absolute_error: Array
    bias: Array
    constant: Array


@takes_numbers
@jax.jit
def constant_baseline(
    outputs: Array, targets: Array, *, moments: Moments | None = None
) -> ConstantBaseline:
    """Compares the error of outputs with that of the best constant.

    A falling loss is not a result: know what an error of that size means.  Worry where
    ``explained`` is near 0.  Costs two reads of outputs and targets.

    Args:
        outputs: [examples, ...], or [examples, ..., classes] where targets are integer
            classes.
        targets: [examples, ...].
        moments: of the targets before they were normalized; then outputs and targets
            are denormalized first, and errors are in the unit of the data.

    Returns:
        ``ConstantBaseline``.

    Raises:
        ValueError: if the shapes fit neither way.

    Example:
        >>> targets = jnp.array([10.0, 20.0, 30.0])
        >>> found = constant_baseline(jnp.array([11.0, 19.0, 30.0]), targets)
        >>> found.constant, found.constant_error.round(), found.explained
        (Array([20.], dtype=float32), Array([8.], dtype=float32),
         Array([0.99], dtype=float32))
        >>> found = constant_baseline(jnp.eye(4), jnp.array([0, 0, 2, 3]))
        >>> found.error, found.constant_error, found.explained
        (Array(0.25, dtype=float32), Array(0.5, dtype=float32),
         Array(0.5, dtype=float32))
    """
    outputs, targets = jnp.asarray(outputs), jnp.asarray(targets)
    is_class = jnp.issubdtype(targets.dtype, jnp.integer)
    if is_class and moments is None and outputs.shape[:-1] == targets.shape:
        return _of_classes(outputs, targets)
    size = targets.shape[0] if targets.ndim else 0
    fits = math.prod(outputs.shape) == math.prod(targets.shape)
    if not size or outputs.shape[:1] != (size,) or not fits:
        raise ValueError(
            "constant_baseline: outputs and targets must hold equally many numbers for"
            " equally many examples, or targets the class of each output row, got"
            f" {described(outputs)} and {described(targets)}"
        )
    if moments is not None:
        outputs = denormalize(in_float32(outputs).reshape(targets.shape), moments)
        targets = denormalize(in_float32(targets), moments)
    outputs, targets = (in_float32(one).reshape(size, -1) for one in (outputs, targets))
    constant = jnp.mean(targets, axis=0)
    variance = jnp.mean((targets - constant) ** 2, axis=0)
    errors = outputs - targets
    square = jnp.mean(errors**2, axis=0)
    return ConstantBaseline(
        jnp.sqrt(square),
        jnp.sqrt(variance),
        _explained(square, variance),
        jnp.mean(jnp.abs(errors), axis=0),
        jnp.mean(errors, axis=0),
        constant,
    )


def _of_classes(outputs: Array, targets: Array) -> ConstantBaseline:
    outputs = in_float32(outputs)
    classes = jnp.arange(outputs.shape[-1])
    counts = jnp.sum(targets.reshape(-1, 1) == classes, axis=0)
    constant = jnp.argmax(counts)
    is_finite = jnp.all(jnp.isfinite(outputs), axis=-1)
    is_wrong = ~(is_finite & (jnp.argmax(outputs, axis=-1) == targets))
    error = jnp.mean(is_wrong, dtype=outputs.dtype)
    constant_error = jnp.mean(targets != constant, dtype=outputs.dtype)
    return ConstantBaseline(
        error,
        constant_error,
        _explained(error, constant_error),
        error,
        jnp.zeros_like(error),
        constant.astype(outputs.dtype),
    )


def _explained(error: Array, constant_error: Array) -> Array:
    """Constant targets are explained by no error, and by nothing else."""
    perfect = jnp.where(error == 0, 1.0, -jnp.inf).astype(error.dtype)
    perfect = jnp.where(jnp.isnan(error), jnp.nan, perfect)
    scale = jnp.where(constant_error > 0, constant_error, 1)
    return jnp.where(constant_error > 0, 1 - error / scale, perfect)


class WorstExamples(NamedTuple):
    """The examples with the largest loss.

    Attributes:
        indices: int32[worst], the worst first.
        losses: float32[worst], NaN counts as the largest.
        share: float32[], of the total loss that these bring; near 1 where a few
            examples drive the training.
    """

    indices: Array
    losses: Array
    share: Array


@jax.jit
def linear_share(inputs: Array, targets: Array) -> Array:
    """Returns what a linear function of the inputs explains of examples left out.

    Least squares with every example left out in turn, by the residuals of one fit and
    its leverages (Allen 1974).  Costs one singular value decomposition of the inputs.

    Args:
        inputs: [examples, ...], several times as many examples as features.
        targets: [examples, columns], numbers; classes as one-hot rows.

    Returns:
        float32[], share of the variance; 0 or below where it is no better than the mean
        of the others.

    Example:
        >>> x = jnp.arange(8.0)[:, None]
        >>> print(f"{linear_share(x, 3 * x + 1):.3f}")
        1.000
    """
    rows = in_float32(inputs).reshape(inputs.shape[0], -1)
    rows = z_scores(rows, feature_moments(rows))
    rows = jnp.concatenate([rows, jnp.ones_like(rows[:, :1])], axis=1)
    targets = in_float32(targets)
    basis, sizes, _ = jnp.linalg.svd(rows, full_matrices=False)
    basis = basis * (sizes > 1e-5 * sizes[0])
    leverage = jnp.minimum(jnp.sum(basis**2, axis=1, keepdims=True), 1 - 1e-6)
    left_out = (targets - basis @ (basis.T @ targets)) / (1 - leverage)
    size = len(rows)
    by_mean = (targets - jnp.mean(targets, axis=0)) * size / max(size - 1, 1)
    total = jnp.sum(by_mean**2)
    return 1 - jnp.sum(left_out**2) / jnp.where(total > 0, total, 1)


@takes_numbers
def worst_examples(
    loss_fn: LossFn, params: Params, batch: PyTree, *, num_worst: int = 10
) -> WorstExamples:
    """Finds the examples with the largest loss: the ones to look at first.

    Wrong labels, broken rows and what the network can't tell apart gather there.  Costs
    one forward pass over the batch, example by example.

    Args:
        loss_fn: ``loss_fn(params, batch) -> scalar``; it is given one example at a
            time, so a normalization over the batch sees one example.
        params: any pytree of arrays.
        batch: any pytree, every leaf [examples, ...].
        num_worst: how many to name, at most all.

    Returns:
        ``WorstExamples``.

    Raises:
        ValueError: if ``loss_fn`` does not return a scalar.

    Example:
        >>> loss_fn = lambda params, x: jnp.mean((x - params["m"]) ** 2)
        >>> x = jnp.array([0.0, 3.0, 1.0])
        >>> found = worst_examples(loss_fn, {"m": 0.0}, x, num_worst=2)
        >>> found.indices, found.losses
        (Array([1, 2], dtype=int32), Array([9., 1.], dtype=float32))
    """
    first = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((1, *np.shape(leaf)[1:]), leaf.dtype), batch
    )
    check_loss("worst_examples", loss_fn, params, first)
    return _worst_examples(loss_fn, params, batch, min(num_worst, num_examples(batch)))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _worst_examples(
    loss_fn: LossFn, params: Params, batch: PyTree, num_worst: int
) -> WorstExamples:
    def loss_of(example: PyTree) -> Array:
        alone = jax.tree.map(lambda leaf: leaf[None], example)
        return loss_fn(params, alone).astype(jnp.float32)

    losses = jax.lax.map(channels_last(loss_of), batch, batch_size=64)
    order = jnp.where(jnp.isnan(losses), jnp.inf, losses)
    indices = jax.lax.top_k(order, num_worst)[1]
    total = jnp.sum(jnp.abs(losses))
    share = jnp.sum(jnp.abs(losses[indices])) / jnp.where(total > 0, total, 1)
    return WorstExamples(indices, losses[indices], share)
