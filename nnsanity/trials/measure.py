"""Measures a network on one large batch, and what its loss makes of given outputs."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnsanity._tree import in_float32
from nnsanity._types import Array, Params, PyTree
from nnsanity.quantities.targets import (
    constant_outputs,
    outputs_in_units,
    perfect_outputs,
)
from nnsanity.tracing.replace import LayerValues, Replacement, replaced
from nnsanity.trials.problem import Problem

MAX_MEASURED = 1000
"""Examples that a network is measured on."""
MIN_MEASURED, MAX_OUTPUTS = 8, 2**21
"""Fewest of them, and how many numbers their outputs may have, where several outputs
are compared with each other."""


def some_examples(problem: Problem) -> tuple[PyTree, PyTree]:
    """Returns the batch that networks are measured on."""
    return problem.batch(slice(MAX_MEASURED))


def few_examples(problem: Problem) -> tuple[PyTree, PyTree]:
    """Returns as many of them as losses of many given outputs can be taken of."""
    inputs = problem.batch(slice(problem.batch_size))[0]
    outputs = jax.eval_shape(problem.apply_fn, problem.params, inputs)
    numbers = sum(math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(outputs))
    count = max(MIN_MEASURED, MAX_OUTPUTS // max(numbers, 1))
    return problem.batch(slice(min(MAX_MEASURED, count)))


class TrainingNoise(NamedTuple):
    """What sets the training loss apart.

    Attributes:
        varies: it differs from key to key.
        differs: it differs from ``loss_fn`` for another reason, as that of a network
            does that normalizes with the statistics of its batch.
    """

    varies: bool
    differs: bool


def training_noise(problem: Problem) -> TrainingNoise:
    """Compares the training loss of several keys, and with ``loss_fn``."""
    if problem.train_loss_fn is None:
        return TrainingNoise(varies=False, differs=False)
    batch = problem.batch(slice(problem.batch_size))
    train_loss_fn, keys = jax.jit(problem.train_loss_fn), jax.random.key(0)
    losses = [
        float(train_loss_fn(problem.params, batch, key))
        for key in jax.random.split(keys, 4)
    ]
    plain = float(jax.jit(problem.loss_fn)(problem.params, batch))
    varies = len(set(losses)) > 1
    return TrainingNoise(varies, not varies and not np.isclose(losses[0], plain, 1e-4))


def output_size(problem: Problem, inputs: PyTree) -> float:
    """Returns the root mean square of what the network puts out."""
    outputs = jax.jit(problem.apply_fn)(problem.params, inputs)
    return float(np.sqrt(np.mean(np.asarray(in_float32(outputs)) ** 2)))


def constant_loss(problem: Problem, batch: tuple[PyTree, PyTree]) -> float:
    """Returns the loss of the best constant output, no penalties; NaN if unknown."""
    return _least_loss(problem, batch, constant_outputs)


def perfect_loss(problem: Problem, batch: tuple[PyTree, PyTree]) -> float:
    """Returns the loss of outputs that say what the targets say; NaN if unknown."""
    return _least_loss(problem, batch, perfect_outputs)


def wants_other_units(problem: Problem, batch: tuple[PyTree, PyTree]) -> bool:
    """Tells whether the loss takes outputs in another unit than that of the targets.

    As a loss does that multiplies them by 255, or that standardizes the targets itself.
    Then outputs can't be compared with targets.  A loss that is simply wrong, as one
    with its sign flipped, is lowest for outputs without bound.
    """
    if problem.kind != "numbers" or problem.head is None:
        return False
    outputs = outputs_in_units(in_float32(batch[1]))
    loss_of = functools.partial(loss_of_outputs, problem, batch)
    losses = np.asarray(jax.jit(jax.vmap(loss_of))(outputs))
    losses = np.where(np.isfinite(losses), losses, np.inf)
    same, unbounded, other = losses[0], losses[1:3].min(), losses[3:].min()
    margin = 0.05 * abs(same) if np.isfinite(same) else 0.0
    return bool(other < same - margin and other < unbounded)


def _least_loss(
    problem: Problem, batch: tuple[PyTree, PyTree], candidates: Any
) -> float:
    if problem.kind is None or problem.head is None:
        return math.nan
    shape = jax.eval_shape(problem.apply_fn, problem.params, batch[0]).shape[1:]
    outputs = candidates(shape, np.asarray(batch[1]), problem.kind)
    loss_of = functools.partial(loss_of_outputs, problem, batch)
    losses = np.asarray(jax.jit(jax.vmap(loss_of))(outputs))
    finite = losses[np.isfinite(losses)]
    return float(finite.min()) if finite.size else math.nan


def loss_of_outputs(
    problem: Problem, batch: tuple[PyTree, PyTree], outputs: Array
) -> Array:
    """Returns the loss of given outputs, those of one example or of a whole batch."""

    def put(values: LayerValues) -> Array:
        after = values.after
        is_whole = outputs.size == after.size
        shape = after.shape if is_whole else (1, *after.shape[1:])
        return jnp.broadcast_to(outputs.reshape(shape), after.shape).astype(after.dtype)

    name = problem.head.layer.name if problem.head is not None else ""
    loss_fn = replaced(
        problem.loss_fn,
        problem.network,
        {name: Replacement(put, jnp.zeros_like)},
        penalty_scale=0.0,
    )
    return loss_fn(problem.params, batch)


def data_loss(problem: Problem, params: Params, batch: tuple[PyTree, PyTree]) -> float:
    """Returns the loss without the penalties inside of it."""
    loss_fn = replaced(problem.loss_fn, problem.network, {}, penalty_scale=0.0)
    return float(jax.jit(loss_fn)(params, batch))
