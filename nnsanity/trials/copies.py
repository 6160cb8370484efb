"""Copies of a program: what is different in them, and how they run.

A copy differs from the user's program in numbers alone, so that one compiled scan
trains any of them: plain, with standardized inputs, at another rate, with fresh
weights, without its last activation.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnsanity._tree import accumulation_dtype, in_float32, is_inexact
from nnsanity._types import Array, Params, PyTree
from nnsanity.quantities.targets import usual_loss
from nnsanity.tracing.paths import merging
from nnsanity.tracing.replace import LayerValues, Replacement, replaced
from nnsanity.trials.problem import Problem

OFF, ON = np.bool_(0), np.bool_(1)
HEAD_KEPT, HEAD_LEFT_OUT, HEAD_SQUASHED = range(3)
LEAK = 0.1
"""Slope on the left of the leaky ReLU that stands in for a hidden activation."""


class Copy(NamedTuple):
    """A program to train; ``plain`` makes the user's own.

    Attributes:
        params: what it starts from.
        input_shift: tree like the inputs; subtracted first.
        input_scale: tree like the inputs; divided by then.
        target_shift: subtracted from the targets first.
        target_scale: what they are divided by then.
        update_scale: float32[], factor of every update: 10 is ten times the rate.
        gradient_scale: float32[], factor of the gradients that the optimizer gets; so
            small that it clips none.
        weight_scale: float32[], factor of the parameters that the optimizer gets; 0
            leaves nothing for its weight decay.
        penalty_scale: float32[], factor of the penalties inside the loss.
        head: int32[], what becomes of the last activation: ``HEAD_KEPT``,
            ``HEAD_LEFT_OUT`` or ``HEAD_SQUASHED``, softmax or sigmoid in its place.
        leaky: bool[], whether hidden activations are replaced by leaky ReLU.
        bent: bool[], whether leaky ReLU follows where layers make up one linear layer.
        skip: bool[], whether layers add their input to their output where that fits.
        noise: bool[], whether it trains on ``train_loss_fn``.
        kept_mark: int32[], after which mark of the trial its parameters are kept.
    """

    params: Params
    input_shift: PyTree
    input_scale: PyTree
    target_shift: Array
    target_scale: Array
    update_scale: Array
    gradient_scale: Array
    weight_scale: Array
    penalty_scale: Array
    head: Array
    leaky: Array | np.bool_
    bent: Array | np.bool_
    skip: Array | np.bool_
    noise: Array | np.bool_
    kept_mark: Array


def plain(problem: Problem) -> Copy:
    """Returns the user's own program as a copy."""
    one = jnp.float32(1)
    targets = problem.targets if problem.kind == "numbers" else one
    return Copy(
        params=problem.params,
        input_shift=jax.tree.map(lambda leaf: _per_feature(leaf, 0), problem.inputs),
        input_scale=jax.tree.map(lambda leaf: _per_feature(leaf, 1), problem.inputs),
        target_shift=_per_feature(targets, 0),
        target_scale=_per_feature(targets, 1),
        update_scale=one,
        gradient_scale=one,
        weight_scale=one,
        penalty_scale=one,
        head=jnp.int32(HEAD_KEPT),
        leaky=OFF,
        bent=OFF,
        skip=OFF,
        noise=OFF if problem.train_loss_fn is None else ON,
        kept_mark=jnp.int32(0),
    )


def _per_feature(values: Array, fill: float) -> Array:
    """Returns an array of the shape that ``feature_moments`` gives."""
    shape = values.shape[-1:] if values.ndim > 1 else ()
    return jnp.full(shape, fill, accumulation_dtype(values))


def prepared(
    problem: Problem, copy: Copy, batch: tuple[PyTree, PyTree]
) -> tuple[PyTree, PyTree]:
    """Applies the copy's changes to the data."""
    inputs, targets = batch
    if not problem.tokens:
        is_alone = len(jax.tree.leaves(inputs)) == 1
        inputs = jax.tree.map(
            lambda leaf, *ends: (
                _affine(leaf, *ends) if _is_number(leaf, is_alone) else leaf
            ),
            inputs,
            copy.input_shift,
            copy.input_scale,
        )
    if problem.kind == "numbers":
        targets = _affine(targets, copy.target_shift, copy.target_scale)
    return inputs, targets


def _is_number(leaf: Array, is_alone: bool) -> bool:  # noqa: FBT001
    """Tells numbers from masks, and from indices that stand beside other inputs."""
    is_integer = jnp.issubdtype(leaf.dtype, jnp.integer)
    return is_inexact(leaf) or (is_integer and is_alone)


def _affine(values: Array, shift: Array, scale: Array) -> Array:
    if not is_inexact(values):
        values = in_float32(values)
    return ((values - shift) / scale).astype(values.dtype)


def _replacements(problem: Problem, copy: Copy) -> dict[str, Replacement]:
    """Says what a copy puts in the place of each layer's output."""
    head = None if problem.head is None else problem.head.layer.name
    found = {}
    num_layers = sum(math.prod(one.layer.stack) for one in problem.network.layers)
    branch_scale = 1 / math.sqrt(max(num_layers, 1))
    for one in problem.network.layers:
        if one.layer.name == head:
            found[one.layer.name] = _head(problem, copy)
        elif one.activation is not None:
            found[one.layer.name] = _hidden(copy, branch_scale)
    return found | {one.layer.name: _bent(copy) for one in merging(problem.network)}


def _bent(copy: Copy) -> Replacement:
    """A nonlinearity where there is none."""

    def combine(values: LayerValues) -> Array:
        bent = jax.nn.leaky_relu(values.before, LEAK)
        return jnp.where(copy.bent, bent, values.after)

    return Replacement(combine)


def _head(problem: Problem, copy: Copy) -> Replacement:
    squash = jax.nn.sigmoid if problem.kind == "binary" else jax.nn.softmax

    def combine(values: LayerValues) -> Array:
        left_out = jnp.where(copy.head == HEAD_LEFT_OUT, values.before, values.after)
        if problem.kind in (None, "numbers"):
            return left_out
        return jnp.where(copy.head == HEAD_SQUASHED, squash(values.before), left_out)

    return Replacement(
        combine, lambda before: jnp.where(copy.head == HEAD_KEPT, before, 0)
    )


def _hidden(copy: Copy, branch_scale: float) -> Replacement:
    """Another nonlinearity, or a skip around a layer.

    What the layers add to a skip is scaled down, so that its variance grows no more
    than e-fold over the whole network.
    """

    def combine(values: LayerValues) -> Array:
        leaky = jax.nn.leaky_relu(values.before, LEAK)
        after = jnp.where(copy.leaky, leaky, values.after)
        entering = values.entering
        if entering is None or entering.shape != after.shape:
            return after
        return jnp.where(copy.skip, entering + branch_scale * after, after)

    return Replacement(combine, lambda before: jnp.where(copy.leaky, 0, before))


def network_of(problem: Problem, copy: Copy) -> Callable:
    """Returns ``apply_fn`` as a copy runs it."""
    return _changed(problem, copy, problem.apply_fn, penalty_scale=1.0)


def quiet_loss_of(problem: Problem, copy: Copy) -> Callable:
    """Returns ``loss_fn`` as a copy runs it."""
    if problem.usual_loss:
        return _usual_loss_of(problem, copy)
    return _changed(problem, copy, problem.loss_fn, penalty_scale=copy.penalty_scale)


def _changed(
    problem: Problem, copy: Copy, fn: Callable, *, penalty_scale: Array | float
) -> Callable:
    """Returns a function of the user as a copy runs it."""
    expanded = problem.expanded
    if expanded is not None:
        ends = (copy.input_shift, copy.input_scale)
        expanded = expanded.in_units(*(one[expanded.feature] for one in ends))
    return replaced(
        fn,
        problem.network,
        _replacements(problem, copy),
        penalty_scale=penalty_scale,
        wider=problem.wider,
        expanded=expanded,
    )


def _usual_loss_of(problem: Problem, copy: Copy) -> Callable:
    network = network_of(problem, copy)

    def loss_fn(params: Params, batch: tuple[PyTree, PyTree]) -> Array:
        inputs, targets = batch
        return usual_loss(network(params, inputs), targets, kind=problem.kind)

    return loss_fn


def loss_of(problem: Problem, copy: Copy) -> Callable:
    """Returns ``loss(params, batch, key)`` of a copy."""
    quiet = quiet_loss_of(problem, copy)
    if problem.train_loss_fn is None or problem.usual_loss:
        return lambda params, batch, key: quiet(params, batch)
    noisy = _changed(
        problem, copy, problem.train_loss_fn, penalty_scale=copy.penalty_scale
    )
    return lambda params, batch, key: jax.lax.cond(
        copy.noise,
        lambda: in_float32(noisy(params, batch, key)),
        lambda: in_float32(quiet(params, batch)),
    )
