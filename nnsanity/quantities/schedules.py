"""What a schedule does to the updates, told by the optimizer's answers."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nnsanity._tree import in_float32
from nnsanity._types import Array, Params, PyTree
from nnsanity.quantities.clipping import corner, linear
from nnsanity.quantities.descent import floats_of


class Schedule(NamedTuple):
    """How large the updates by one and the same gradient are.

    Attributes:
        sizes: float32[steps], as a share of the largest.
        counts: int32[steps] for each clock of the optimizer, before the step.
    """

    sizes: Array
    counts: list[Array]


def schedule_of(
    optimizer: optax.GradientTransformation, params: Params, *, num_steps: int
) -> Schedule | None:
    """Feeds an optimizer the same gradient in every step; None without a schedule.

    Costs the updates of a few parameters and the time to compile them.

    Args:
        optimizer: any optax transformation.
        params: the parameters; they stay as they are.
        num_steps: of the training.
    """
    few = jax.tree.map(corner, floats_of(params))
    if not _clocks(jax.eval_shape(optimizer.init, few)):
        return None
    return _schedule(optimizer, num_steps, few)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _schedule(
    optimizer: optax.GradientTransformation, num_steps: int, params: Params
) -> Schedule:
    extended = optax.with_extra_args_support(optimizer)
    grads = jax.tree.map(jnp.ones_like, params)
    value_fn = functools.partial(linear, params, grads)

    def step(state: PyTree, _: None) -> tuple[PyTree, tuple]:
        counts = [one.count for one in _clocks(state)]
        updates, state = extended.update(
            grads, state, params, value=value_fn(params), grad=grads, value_fn=value_fn
        )
        leaves = [in_float32(leaf) for leaf in jax.tree.leaves(updates)]
        return state, (optax.tree.norm(leaves), counts)

    _, (sizes, counts) = jax.lax.scan(
        step, extended.init(params), None, length=num_steps
    )
    largest = jnp.max(sizes)
    return Schedule(sizes / jnp.where(largest > 0, largest, 1), counts)


def held_at_its_peak(
    optimizer: optax.GradientTransformation, schedule: Schedule
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer with its clocks stopped where its updates are largest."""
    extended = optax.with_extra_args_support(optimizer)
    peak = int(jnp.argmax(schedule.sizes))
    last = [int(counts[peak]) for counts in schedule.counts]

    def update(
        grads: PyTree, state: PyTree, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        updates, state = extended.update(grads, state, params, **extra)
        parts, structure = jax.tree.flatten(state, is_leaf=_is_clock)
        ends = iter(last)
        parts = [
            one._replace(count=jnp.minimum(one.count, next(ends)))
            if _is_clock(one)
            else one
            for one in parts
        ]
        return updates, jax.tree.unflatten(structure, parts)

    return optax.GradientTransformationExtraArgs(extended.init, update)


def _clocks(state: PyTree) -> list:
    return [one for one in jax.tree.leaves(state, is_leaf=_is_clock) if _is_clock(one)]


def _is_clock(state: Any) -> bool:
    """Tells a state that counts steps and does nothing else, as a schedule's does."""
    return getattr(state, "_fields", ()) == ("count",)
