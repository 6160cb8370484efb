"""What outputs depend on: their own inputs, and no one else's."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnsanity._tree import (
    in_float32,
    is_inexact,
    num_examples,
    take_examples,
    takes_numbers,
)
from nnsanity._types import ApplyFn, Array, LossFn, Params, PyTree
from nnsanity.quantities.descent import check_loss
from nnsanity.tracing.convolutions import channels_last


class InputDependence(NamedTuple):
    """What the loss loses where inputs are given to other targets.

    Attributes:
        loss: float32[], of the batch as it is.
        permuted_loss: float32[], with the inputs permuted against the targets; mean
            over the permutations.
        permuted_deviation: float32[], its deviation between the permutations.
        z_score: float32[], by how many of these the loss lies below the permuted one; a
            network that uses its inputs is above 4, an untrained one about 0.
    """

    loss: Array
    permuted_loss: Array
    permuted_deviation: Array
    z_score: Array


@takes_numbers
def input_dependence(
    loss_fn: LossFn,
    params: Params,
    batch: tuple[PyTree, PyTree],
    *,
    key: Array,
    num_permutations: int = 16,
) -> InputDependence:
    """Compares the loss with that of inputs permuted against their targets.

    Worry where a trained network is no better on its own inputs than on those of
    others: it ignores them, or they were shuffled against the targets.  Costs 17
    forward passes.

    Args:
        loss_fn: ``loss_fn(params, (inputs, targets)) -> scalar``.
        params: any pytree of arrays.
        batch: ``(inputs, targets)``, every leaf [examples, ...].
        key: consumed; the permutations.
        num_permutations: how many.

    Returns:
        ``InputDependence``.

    Raises:
        ValueError: if ``loss_fn`` does not return a scalar, there are fewer than 2
            examples or fewer than 2 permutations.

    Example:
        >>> loss_fn = lambda params, batch: jnp.mean((batch[0] - batch[1]) ** 2)
        >>> batch = jnp.arange(20.0), jnp.arange(20.0)
        >>> found = input_dependence(loss_fn, {"w": 0.0}, batch, key=jax.random.key(0))
        >>> float(found.loss), bool(found.z_score > 4)
        (0.0, True)

    References:
        Karpathy (2019), "A recipe for training neural networks": input-independent
        baseline.
    """
    check_loss("input_dependence", loss_fn, params, batch)
    if num_examples(batch) < 2 or num_permutations < 2:
        raise ValueError(
            "input_dependence: it takes at least 2 examples and 2 permutations, got"
            f" {num_examples(batch)} and {num_permutations}"
        )
    return _input_dependence(loss_fn, params, batch, key, num_permutations)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _input_dependence(
    loss_fn: LossFn,
    params: Params,
    batch: tuple[PyTree, PyTree],
    key: Array,
    num_permutations: int,
) -> InputDependence:
    inputs, targets = batch
    size = num_examples(batch)

    def permuted(one: Array) -> Array:
        order = jax.random.permutation(one, size)
        return loss_fn(params, (take_examples(inputs, order), targets))

    losses = in_float32(
        jax.lax.map(channels_last(permuted), jax.random.split(key, num_permutations))
    )
    loss = in_float32(loss_fn(params, batch))
    mean, deviation = jnp.mean(losses), jnp.std(losses, ddof=1)
    # Losses that differ by their rounding alone do not differ.
    least = 10 * jnp.finfo(losses.dtype).eps * jnp.abs(mean)
    return InputDependence(
        loss, mean, deviation, (mean - loss) / jnp.maximum(deviation, least + 1e-30)
    )


class ExampleIndependence(NamedTuple):
    """How much each output depends on each example.

    Attributes:
        influence: float32[examples, examples], size of the gradient of the outputs of
            one example (row) by the inputs of one (column).
        mixing: float32[], the largest influence of another example over the largest of
            an example's own; healthy is 0.
    """

    influence: Array
    mixing: Array


@takes_numbers
def example_independence(
    apply_fn: ApplyFn, params: Params, inputs: PyTree
) -> ExampleIndependence:
    """Measures which examples each output depends on, by exact gradients.

    Outputs of one example must not depend on other examples: a wrong reshape, a
    transposed axis, a softmax or a normalization over the batch mixes them.  A
    dependence through rounding or a dead unit has no gradient and does not show.

    Costs one backward pass for each number of the outputs, so give a few examples.

    Args:
        apply_fn: ``apply_fn(params, inputs) -> outputs``.
        params: any pytree of arrays.
        inputs: tree of arrays [examples, ...]; those that are not floating-point stay.

    Returns:
        ``ExampleIndependence``.

    Raises:
        ValueError: if no input is floating-point, or the outputs do not have the
            examples on their leading axis.

    Example:
        >>> apply_fn = lambda params, x: x * params["w"] + jnp.mean(x)
        >>> found = example_independence(apply_fn, {"w": 2.0}, jnp.ones(4))
        >>> found.influence[0], float(found.mixing)
        (Array([2.25, 0.25, 0.25, 0.25], dtype=float32), 0.11...)

    References:
        Karpathy (2019), "A recipe for training neural networks": use backprop to chart
        dependencies.
    """
    if not any(is_inexact(leaf) for leaf in jax.tree.leaves(inputs)):
        raise ValueError(
            "example_independence: inputs must hold floating-point numbers, got"
            f" {[str(leaf.dtype) for leaf in jax.tree.leaves(inputs)]}; give what the"
            " embedding of these indices returns"
        )
    size = num_examples(inputs)
    outputs = jax.eval_shape(apply_fn, params, inputs)
    for leaf in jax.tree.leaves(outputs):
        if leaf.shape[:1] != (size,):
            raise ValueError(
                "example_independence: outputs must have the examples on their leading"
                f" axis: {size} inputs gave shape {leaf.shape}"
            )
    return _example_independence(apply_fn, params, inputs)


@functools.partial(jax.jit, static_argnums=0)
def _example_independence(
    apply_fn: ApplyFn, params: Params, inputs: PyTree
) -> ExampleIndependence:
    leaves, structure = jax.tree.flatten(inputs)
    is_float = [is_inexact(leaf) for leaf in leaves]
    size = np.shape(leaves[0])[0]

    def outputs_of(floats: list[Array]) -> Array:
        given = iter(floats)
        mixed = [
            next(given) if chosen else leaf
            for leaf, chosen in zip(leaves, is_float, strict=True)
        ]
        outputs = apply_fn(params, jax.tree.unflatten(structure, mixed))
        rows = [
            in_float32(leaf).reshape(size, -1)
            for leaf in jax.tree.leaves(outputs)
            if is_inexact(leaf)
        ]
        return jnp.concatenate(rows, axis=1)

    floats = [leaf for leaf, chosen in zip(leaves, is_float, strict=True) if chosen]
    outputs, pull = jax.vjp(outputs_of, floats)

    def of_one(index: Array) -> Array:
        chosen = jnp.zeros(outputs.size, outputs.dtype).at[index].set(1)
        (grads,) = pull(chosen.reshape(outputs.shape))
        squares = [
            jnp.sum(in_float32(grad).reshape(size, -1) ** 2, axis=1) for grad in grads
        ]
        return functools.reduce(jnp.add, squares)

    squares = jax.lax.map(
        channels_last(of_one), jnp.arange(outputs.size), batch_size=16
    )
    influence = jnp.sqrt(jnp.sum(squares.reshape(*outputs.shape, size), axis=1))
    own = jnp.max(jnp.diagonal(influence))
    other = jnp.max(jnp.where(jnp.eye(size, dtype=bool), 0, influence))
    # Without any gradient there is nothing to mix; NaN stays.
    return ExampleIndependence(influence, jnp.where(other == 0, 0, other / own))
