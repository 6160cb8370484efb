"""Training with scaled updates, and what has to be right for it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nnsanity._tree import (
    described,
    in_float32,
    inexact_leaves,
    is_inexact,
    num_examples,
)
from nnsanity._types import Array, LossFn, Params, PyTree
from nnsanity.tracing.convolutions import channels_last

SPREADS = 5.0
"""Healthy rise in standard deviations between batches at the start."""
START_BATCHES = 8
"""How many batches tell the level and the spread of the loss at the start."""
SMOOTHED_SHARE = 20
"""Losses are averaged over about this part of the steps."""
TRIED_SHARE, MIN_TRIED = 20, 5
"""A scale is tried for about this part of the steps, and for so many at least."""
TRIED_FACTOR = 4.0
"""It is tried at so many times as much: beyond the limit of stability, what is unstable
then grows sevenfold in each step.  Of 4,000 random quadratics none got an unstable one;
at twice as much, in as many steps, 1 in 50 of those without momentum did."""
MAX_HALVINGS = 20


class Start(NamedTuple):
    """The loss before the first step, and how far above is not yet worse."""

    level: Array
    tolerance: Array

    def is_healthy(self, losses: Array) -> Array:
        """Which losses are finite and not above the start."""
        return jnp.isfinite(losses) & (losses <= self.level + self.tolerance)


def start_of(name: str, loss_fn: LossFn, params: Params, batches: PyTree) -> Start:
    """Measures the loss of the first batches; raises where there is none.

    Args:
        name: of the public function, for the message.
        loss_fn: ``loss_fn(params, batch) -> scalar``.
        params: before the first step.
        batches: each leaf [steps, ...].
    """
    few = jax.tree.map(lambda leaf: leaf[:START_BATCHES], batches)
    one = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf)[1:], leaf.dtype), few
    )
    dtype = check_loss(name, loss_fn, params, one)
    losses = jax.lax.map(channels_last(functools.partial(loss_fn, params)), few)
    losses = losses.astype(jnp.float32)
    is_finite = jnp.isfinite(losses)
    count = jnp.sum(is_finite).astype(jnp.float32)
    level = jnp.sum(jnp.where(is_finite, losses, 0)) / count
    squares = jnp.sum(jnp.where(is_finite, losses - level, 0) ** 2)
    rounding = 10 * float(jnp.finfo(dtype).eps) * jnp.abs(level)
    return Start(level, SPREADS * jnp.sqrt(squares / count) + rounding)


def scaled_losses(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    params: Params,
    batches: PyTree,
    scales: Array,
) -> Array:
    """Trains; returns float32[steps + 1], of each batch before its step, and the end.

    Only floating-point leaves are trained, so that the optimizer sees no others.

    Args:
        loss_fn: ``loss_fn(params, batch) -> scalar``.
        optimizer: any optax transformation; its state is fresh.
        params: at the start.
        batches: each leaf [steps, ...].
        scales: float32[steps], factors of the updates.
    """
    return trained(loss_fn, optimizer, params, batches, scales)[0]


def trained(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    params: Params,
    batches: PyTree,
    scales: Array,
) -> tuple[Array, Params]:
    """Returns what ``scaled_losses`` does, and the parameters at the end."""
    extended = optax.with_extra_args_support(optimizer)

    def step(state: tuple, now: tuple) -> tuple[tuple, Array]:
        floats, optimizer_state = state
        batch, scale = now

        def value_fn(moved: PyTree) -> Array:
            return loss_fn(with_floats(params, moved), batch)

        loss, grads = jax.value_and_grad(value_fn)(floats)
        updates, optimizer_state = extended.update(
            grads, optimizer_state, floats, value=loss, grad=grads, value_fn=value_fn
        )
        updates = times(scale, updates)
        return (optax.apply_updates(floats, updates), optimizer_state), loss

    floats = floats_of(params)
    state = (floats, extended.init(floats))
    (floats, _), losses = jax.lax.scan(channels_last(step), state, (batches, scales))
    last = jax.tree.map(lambda leaf: leaf[-1], batches)
    params = with_floats(params, floats)
    end = channels_last(functools.partial(loss_fn, params))(last)
    return jnp.concatenate([losses, end[None]]).astype(jnp.float32), params


def times(factor: Array, tree: PyTree) -> PyTree:
    """Multiplies every leaf, in float32 at least; the leaves keep their dtypes."""

    def scaled(leaf: Array) -> Array:
        wide = in_float32(leaf)
        return (wide * factor.astype(wide.dtype)).astype(leaf.dtype)

    return jax.tree.map(scaled, tree)


def trainable_scale(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    params: Params,
    batches: PyTree,
    start: Start,
    guess: Array,
) -> Array:
    """Halves a scale until a few steps with four times as much do not lead away.

    Args:
        loss_fn: ``loss_fn(params, batch) -> scalar``.
        optimizer: any optax transformation.
        params: at the start.
        batches: each leaf [steps, ...].
        start: the loss there.
        guess: float32[], NaN stays.
    """
    few = max(num_examples(batches) // TRIED_SHARE, MIN_TRIED)
    batches = jax.tree.map(lambda leaf: leaf[:few], batches)
    few = num_examples(batches)

    def halve(state: tuple) -> tuple:
        scale, _, count = state
        scales = jnp.broadcast_to(TRIED_FACTOR * scale, (few,))
        losses = scaled_losses(loss_fn, optimizer, params, batches, scales)
        is_healthy = start.is_healthy(losses[-1]) | jnp.isnan(scale)
        return jnp.where(is_healthy, scale, scale / 2), is_healthy, count + 1

    scale, _, _ = jax.lax.while_loop(
        lambda state: ~state[1] & (state[2] < MAX_HALVINGS),
        halve,
        (guess, guess != guess, 0),
    )
    return scale


def running_mean(losses: Array) -> Array:
    """Averages losses over a part of their steps, corrected for the start at zero.

    Args:
        losses: float32[steps + 1].
    """
    weight = max(0.0, 1 - SMOOTHED_SHARE / (len(losses) - 1))

    def step(state: tuple[Array, Array], loss: Array) -> tuple[tuple, Array]:
        # The weights are summed as the losses are: so are they rounded.
        mean, total = (weight * one for one in state)
        mean, total = mean + (1 - weight) * loss, total + (1 - weight)
        return (mean, total), mean / total

    zero = 0 * losses[0]
    return jax.lax.scan(step, (zero, jnp.zeros_like(zero)), losses)[1]


def check_training(
    name: str, optimizer: Any, batches: PyTree, *, min_steps: int
) -> None:
    """Raises where an optimizer or batches are no such thing.

    Args:
        name: of the public function, for the message.
        optimizer: what the user gave for it.
        batches: what the user gave for them.
        min_steps: fewer make no sense.
    """
    check_optimizer(name, optimizer)
    leaves = jax.tree.leaves(batches)
    lengths = {np.shape(leaf)[:1] for leaf in leaves}
    if not leaves or () in lengths:
        flat = next((described(one) for one in leaves if not np.shape(one)), "nothing")
        raise ValueError(
            f"{name}: batches must have a leading step axis on every leaf, got {flat};"
            " stack the batches of all steps"
        )
    if len(lengths) > 1:
        raise ValueError(
            f"{name}: batches must have as many steps in every leaf, got"
            f" {sorted(length for (length,) in lengths)}; is the step axis the first?"
        )
    num_steps = num_examples(batches)
    if num_steps < min_steps:
        raise ValueError(
            f"{name}: batches must have at least {min_steps} steps, got {num_steps};"
            " did you pass one batch without a leading step axis?"
        )


def check_optimizer(name: str, optimizer: Any) -> None:
    """Raises where an optimizer is none.

    Args:
        name: of the public function, for the message.
        optimizer: what the user gave for it.
    """
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            f"{name}: optimizer must have init and update, as optax.adam(1.0) has, got"
            f" {optimizer!r}"
        )


def check_loss(name: str, loss_fn: LossFn, params: Params, batch: PyTree) -> np.dtype:
    """Raises where a loss can't be differentiated; returns its dtype.

    Args:
        name: of the public function, for the message.
        loss_fn: ``loss_fn(params, batch) -> scalar``.
        params: any pytree.
        batch: any pytree.
    """
    if not inexact_leaves(params):
        raise ValueError(
            f"{name}: params must have floating-point leaves, got"
            f" {', '.join(map(described, jax.tree.leaves(params))) or 'no leaves'}; are"
            " they the parameters?"
        )
    loss = jax.eval_shape(loss_fn, params, batch)
    dtype, shape = getattr(loss, "dtype", None), getattr(loss, "shape", None)
    if shape == () and dtype is not None and jnp.issubdtype(dtype, jnp.floating):
        return dtype
    hint = "; did you forget a mean?" if shape else ""
    if isinstance(loss, tuple):
        hint = "; leave out what comes with the loss: lambda p, b: loss_fn(p, b)[0]"
    elif shape == ():
        hint = " that is not floating-point; has it a gradient?"
    raise ValueError(
        f"{name}: loss_fn must return a scalar, got {described(loss)}{hint}"
    )


def floats_of(params: Params) -> PyTree:
    """Keeps the floating-point leaves as arrays, and None in the place of others."""
    return jax.tree.map(lambda leaf: _array(leaf) if is_inexact(leaf) else None, params)


def _array(leaf: Array) -> Array:
    leaf = jnp.asarray(leaf)
    # Python numbers are of a weak type, which a loop would not keep.
    return jax.lax.convert_element_type(leaf, leaf.dtype)


def with_floats(params: Params, floats: PyTree) -> Params:
    """Puts back the leaves that ``floats_of`` left out."""
    moved = iter(jax.tree.leaves(floats))
    return jax.tree.map(lambda leaf: next(moved) if is_inexact(leaf) else leaf, params)
