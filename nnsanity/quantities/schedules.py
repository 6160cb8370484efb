"""What a schedule does to the updates, told by the optimizer's answers."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nnsanity._tree import in_float32
from nnsanity._types import Array, Params, PyTree
from nnsanity.quantities.descent import floats_of
from nnsanity.quantities.probing import corner, linear


class Schedule(NamedTuple):
    """What the schedules of an optimizer do to one and the same gradient.

    Attributes:
        shares: float32[steps], size of the update as a share of what it would be with
            the schedules stopped at their peak, so 1 up to there; NaN in steps without
            an update.
        counts: where each schedule of the optimizer stood then, in the order of its
            state.
    """

    shares: Array
    counts: tuple[int, ...]


def schedule_of(
    optimizer: optax.GradientTransformation, params: Params, *, num_steps: int
) -> Schedule | None:
    """Feeds an optimizer the same gradient in every step; None without a schedule.

    Compared with the same optimizer at a constant rate, since updates by one gradient
    also change by themselves: they shrink in Adagrad, and grow with momentum.

    Costs twice the updates of a few parameters and the time to compile them.

    Args:
        optimizer: any optax transformation.
        params: the parameters; they stay as they are.
        num_steps: of the training.
    """
    few = jax.tree.map(corner, floats_of(params))
    if not _schedules(jax.eval_shape(optimizer.init, few)):
        return None
    sizes, counts = _sizes(optimizer, num_steps, few)
    peak = int(jnp.argmax(sizes))
    stops = tuple(int(one[peak]) for one in counts)
    constant, _ = _sizes(held(optimizer, stops), num_steps, few)
    is_update = constant > 0
    shares = jnp.where(is_update, sizes / jnp.where(is_update, constant, 1), jnp.nan)
    return Schedule(shares, stops)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sizes(
    optimizer: optax.GradientTransformation, num_steps: int, params: Params
) -> tuple[Array, list[Array]]:
    """The size of the update in every step, and where the schedules stand before it."""
    extended = optax.with_extra_args_support(optimizer)
    grads = jax.tree.map(jnp.ones_like, params)
    value_fn = functools.partial(linear, params, grads)

    def step(state: PyTree, _: None) -> tuple[PyTree, tuple]:
        counts = [one.count for one in _schedules(state)]
        updates, state = extended.update(
            grads, state, params, value=value_fn(params), grad=grads, value_fn=value_fn
        )
        # As one fusion with its norm, an update of many leaves compiles for long.
        updates = jax.lax.optimization_barrier(jax.tree.map(in_float32, updates))
        return state, (optax.tree.norm(updates), counts)

    start = extended.init(params)
    return jax.lax.scan(step, start, None, length=num_steps)[1]


def held(
    optimizer: optax.GradientTransformation, counts: Sequence[int]
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer with its schedules stopped at some step.

    Args:
        optimizer: any optax transformation.
        counts: which, for each of its schedules.
    """
    extended = optax.with_extra_args_support(optimizer)

    def update(
        grads: PyTree, state: PyTree, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        updates, state = extended.update(grads, state, params, **extra)
        parts, structure = jax.tree.flatten(state, is_leaf=_is_schedule)
        stops = iter(counts)
        parts = [
            one._replace(count=jnp.minimum(one.count, next(stops)))
            if _is_schedule(one)
            else one
            for one in parts
        ]
        return updates, jax.tree.unflatten(structure, parts)

    return optax.GradientTransformationExtraArgs(extended.init, update)


def _schedules(state: PyTree) -> list:
    parts = jax.tree.leaves(state, is_leaf=_is_schedule)
    return [one for one in parts if _is_schedule(one)]


def _is_schedule(state: Any) -> bool:
    """Tells the state of a schedule, whose only field counts the steps.

    So does a transformation of the user's own that does something every few steps.
    """
    return getattr(state, "_fields", ()) == ("count",)
