"""Units that pass nothing back for any example, over any number of batches."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nnsanity._types import ApplyFn, Array, Params, PyTree
from nnsanity.quantities.passage import Look, Seen, SeenByLook, after, seen_forward
from nnsanity.quantities.units import (
    dead_fraction,
    is_thresholded,
    never_active,
    num_rows,
)
from nnsanity.tracing.layers import Located, Network, Uninspected

CHANCE = 0.05
"""How often a unit that fires as often as the bound says stays silent by chance."""
_MOST = jnp.iinfo(jnp.int32).max


class DeadUnits(NamedTuple):
    """Units that pass nothing back for any example.

    Attributes:
        dead: bool[units] for each layer that a thresholding nonlinearity follows;
            layers inside of a scan are stacked: bool[length, units].
        fraction: float32[] for each of these layers, float32[length] where they are
            stacked; healthy is under 0.1.
        uninspected: parameters that belong to no layer, and why.
        num_seen: int32[] for each of these layers, how many examples, positions and
            turns of a loop each unit was seen at.
    """

    dead: dict[str, Array]
    fraction: dict[str, Array]
    uninspected: Uninspected = Uninspected()
    num_seen: Mapping[str, Array] = {}

    @property
    def firing_bound(self) -> dict[str, Array]:
        """How often a unit that was never seen active may still fire, float32[].

        The share of examples that it stays below with a certainty of 95 %: about 3
        over the count, the rule of three.  Positions of one sequence or image are
        alike, so that with those the bound is too sharp.
        """
        return {name: firing_bound(count) for name, count in self.num_seen.items()}


def firing_bound(count: Array) -> Array:
    """Returns the share of cases that shows in ``count`` of them but for 1 in 20.

    Example:
        >>> print(f"{firing_bound(jnp.array(300)):.4f}")
        0.0099

    References:
        Hanley and Lippman-Hand (1983), "If nothing goes wrong, is everything all
        right?".
    """
    seen = jnp.maximum(count, 1).astype(jnp.float32)
    return jnp.where(count > 0, -jnp.expm1(jnp.log(CHANCE) / seen), 1.0)


@functools.partial(jax.jit, static_argnums=0)
def dead_units(apply_fn: ApplyFn, params: Params, inputs: PyTree) -> DeadUnits:
    """Finds units that no example activates.

    Looks at layers that a thresholding nonlinearity follows, by what it does and not by
    its name: ReLU, ``jnp.maximum(x, 0)``, ReLU6, hard sigmoid, but not GELU or tanh.  A
    unit is dead where its output stands at a flat end for every example and position.
    Worry above a tenth of a layer, over a few hundred examples; ``merge_dead_units``
    joins batches.  Costs one forward pass.

    Args:
        apply_fn: ``apply_fn(params, inputs) -> outputs``.
        params: any pytree of arrays.
        inputs: leading axis the examples.

    Returns:
        ``DeadUnits``, by layer name.

    Example:
        >>> params = {"w": jnp.array([[1.0, -1.0]])}
        >>> apply_fn = lambda params, x: jax.nn.relu(x @ params["w"])
        >>> dead_units(apply_fn, params, jnp.array([[1.0], [2.0]])).dead
        {'w': Array([False,  True], dtype=bool)}

    References:
        Lu et al. (2019), "Dying ReLU and Initialization".
    """
    return dead_of(*seen_forward(apply_fn, params, inputs, {"dead": DEAD_LOOK}))


class _Never(NamedTuple):
    """Units that stood still, and how often each of them was looked at."""

    still: Array
    num_seen: Array


def _dead(values: Array, one: Located) -> _Never:
    return _Never(never_active(values, one=one), num_rows(values, one))


def _both(earlier: _Never, later: _Never) -> _Never:
    return _Never(earlier.still & later.still, earlier.num_seen + later.num_seen)


def _thresholded(network: Network, one: Located) -> int | None:
    return after(network, one) if is_thresholded(one) else None


DEAD_LOOK = Look(_thresholded, _dead, _both)


def dead_of(network: Network, seen: SeenByLook) -> DeadUnits:
    """Gathers what was seen by ``DEAD_LOOK``."""
    found = seen.get("dead", {})
    dead = {name: all_turns(one) for name, one in found.items()}
    return DeadUnits(
        dead, shares(dead), Uninspected.of(network), counts_of(network, found)
    )


def recoverable(
    network: Network,
    measured: DeadUnits,
    gradients: Mapping[str, Array],
    arriving: Mapping[int, Array],
) -> dict[str, Array]:
    """Says which dead units a training may bring back.

    A dead unit's own weights get no gradient from the examples seen, unless its
    nonlinearity passes one where it stands, as ``jnp.maximum`` does at exactly 0.  Then
    only a change of what enters it can wake it: there must be a parameter before it,
    other than its own, that gets a gradient.  What enters the first layer never moves.

    Args:
        network: of the layers.
        measured: what is dead.
        gradients: of the loss by what enters each unit, as ``unit_gradients`` returns.
        arriving: whether a gradient arrives at each parameter, by leaf.

    Returns:
        bool[*stack, units] by layer, False for units that are not dead.
    """
    found = {}
    for one in network.layers:
        name = one.layer.name
        if name in measured.dead:
            before = network.steps.origins[one.operand].parameters
            moves = [arriving[leaf] for leaf in before if leaf in arriving]
            may_move = functools.reduce(jnp.logical_or, moves, jnp.zeros((), bool))
            if name in gradients:
                may_move = may_move | (gradients[name] != 0)
            found[name] = measured.dead[name] & may_move
    return found


def all_turns(one: Seen) -> Array:
    """Says which units stood still in all turns of the loops around a layer."""
    return one.only(lambda value: value.still).merged(jnp.all)


def counts_of(network: Network, found: Mapping[str, Seen]) -> dict[str, Array]:
    """Counts what each unit was seen at; of a stack the block that was seen least."""
    counts = {
        name: one.only(lambda value: value.num_seen).merged(jnp.sum)
        for name, one in found.items()
    }
    stacks = {one.layer.name: one.layer.stack for one in network.layers}
    return {
        name: jnp.min(jnp.broadcast_to(count, stacks[name]))
        for name, count in counts.items()
    }


def shares(masks: Mapping[str, Array]) -> dict[str, Array]:
    """Returns the share of marked units, by layer."""
    return {name: dead_fraction(mask) for name, mask in masks.items()}


def sum_of_counts(a: Array, b: Array) -> Array:
    """Adds counts; stops at the largest one."""
    return jnp.where(a > _MOST - b, _MOST, a + b)


def merge_dead_units(a: DeadUnits, b: DeadUnits) -> DeadUnits:
    """Merges what two batches showed of one network: dead is what was dead in both.

    Associative, and costs nothing.

    Args:
        a: of some examples.
        b: of other examples and the same network.

    Example:
        >>> params = {"w": jnp.array([[1.0, -1.0]])}
        >>> apply_fn = lambda params, x: jax.nn.relu(x @ params["w"])
        >>> batches = jnp.array([[1.0]]), jnp.array([[-1.0], [-2.0]])
        >>> a, b = (dead_units(apply_fn, params, one) for one in batches)
        >>> merged = merge_dead_units(a, b)
        >>> merged.dead, merged.num_seen
        ({'w': Array([False, False], dtype=bool)}, {'w': Array(3, dtype=int32)})
    """
    dead = {name: a.dead[name] & b.dead[name] for name in a.dead}
    count = {
        name: sum_of_counts(a.num_seen[name], b.num_seen[name]) for name in a.num_seen
    }
    return DeadUnits(dead, shares(dead), a.uninspected, count)
