"""Looks inside of a network: items 8 to 11 from one forward and one backward pass."""

import functools
import math
from typing import NamedTuple

import jax
import numpy as np

from nnsanity._packed import Packed, packed
from nnsanity._tree import inexact_leaves, is_inexact, num_examples
from nnsanity._types import ApplyFn, Array, LossFn, Params, PyTree
from nnsanity.checks import depth, gradients, initialization, width
from nnsanity.findings import NO_LIMITS, Finding, Limits
from nnsanity.quantities.clipped import BlockedShare
from nnsanity.quantities.dead import DEAD_LOOK, DeadUnits, dead_of, recoverable
from nnsanity.quantities.dormant import ACTIVE_LOOK, DormantUnits, dormant_of
from nnsanity.quantities.gradient_sizes import (
    GradientStats,
    arriving_at,
    gradient_stats,
)
from nnsanity.quantities.passage import Look, seen_both_ways, seen_forward
from nnsanity.quantities.saturated import SATURATED_LOOK, SaturatedUnits, saturated_of
from nnsanity.quantities.signal_gain import (
    SignalGain,
    gain_of,
    gradients_by_depth,
    gradients_of,
)
from nnsanity.quantities.weight_sizes import WEIGHT_LOOKS, WeightStats, stats_of
from nnsanity.tracing.layers import Network, inspect
from nnsanity.tracing.paths import on_every_way
from nnsanity.trials.problem import Problem

_LOOKS: dict[str, Look] = {
    **WEIGHT_LOOKS,
    **depth.DEPTH_LOOKS,
    **width.WIDTH_LOOKS,
    "dead": DEAD_LOOK,
    "active": ACTIVE_LOOK,
    "saturated": SATURATED_LOOK,
}


class Inside(NamedTuple):
    """What one batch shows of a network.

    Attributes:
        loss: float32[].
        gradients: of the loss by each parameter.
        unit_gradients: float32[units] by layer, of the loss by what enters each unit.
        dead_units: by layer.
        dormant_units: by layer.
        saturated_units: by layer.
        recoverable_units: bool[units] by layer, the dead ones that training may move.
        blocked: by clips between the layers and in the loss.
        weights: in the order of the layers.
        signal: in the order of the layers.
        depth: in the order of the layers.
        width: by layer.
    """

    loss: Array
    gradients: GradientStats
    unit_gradients: dict[str, Array]
    dead_units: DeadUnits
    dormant_units: DormantUnits
    saturated_units: SaturatedUnits
    recoverable_units: dict[str, Array]
    blocked: BlockedShare
    weights: WeightStats
    signal: SignalGain
    depth: depth.DepthProfile
    width: width.WidthProfile


def measure_network(problem: Problem, batch: tuple[PyTree, PyTree]) -> Inside:
    """Measures a network on one batch; compiled once for a problem, on the host then.

    Costs one forward and one backward pass and, for each layer, a product of its
    activations with themselves.  A loss that runs the network otherwise than
    ``apply_fn`` does costs one more forward pass.
    """
    looked = packed_look(problem.apply_fn, problem.loss_fn, problem.params, batch)
    return jax.device_get(looked).opened()


@functools.partial(jax.jit, static_argnums=(0, 1))
def packed_look(
    apply_fn: ApplyFn, loss_fn: LossFn, params: Params, batch: tuple[PyTree, PyTree]
) -> Packed:
    """The same as ``look_inside``, in few arrays: many weigh as much as the looking."""
    return packed(look_inside(apply_fn, loss_fn, params, batch))


@functools.partial(jax.jit, static_argnums=(0, 1))
def look_inside(
    apply_fn: ApplyFn, loss_fn: LossFn, params: Params, batch: tuple[PyTree, PyTree]
) -> Inside:
    """Measures everything of items 8 to 11 on one batch.

    Args:
        apply_fn: ``apply_fn(params, inputs) -> outputs``.
        loss_fn: ``loss_fn(params, (inputs, targets)) -> scalar``.
        params: any pytree of arrays.
        batch: ``(inputs, targets)``.
    """
    network = inspect(apply_fn, params, batch[0])
    passage = seen_both_ways(loss_fn, params, batch, blueprint=network, looks=_LOOKS)
    seen = passage.seen
    names = {one.layer.name for one in network.layers}
    if seen.get("signal", {}).keys() != names:
        _, seen = seen_forward(apply_fn, params, batch[0], _LOOKS)
    leaves = zip(jax.tree.leaves(params), jax.tree.leaves(passage.grads), strict=True)
    grads = gradient_stats([grad for leaf, grad in leaves if is_inexact(leaf)])
    dead, at_units = dead_of(network, seen), gradients_of(passage)
    weights = stats_of(network, seen)
    by_depth = gradients_by_depth(network, passage)
    return Inside(
        passage.loss,
        grads,
        at_units,
        dead,
        dormant_of(network, seen),
        saturated_of(network, seen),
        recoverable(network, dead, at_units, arriving_at(grads, params)),
        passage.blocked,
        weights,
        gain_of(network, weights.signal, by_depth),
        depth.profile_of(network, seen, by_depth),
        width.profile_of(network, seen),
    )


def judge_network(
    problem: Problem,
    measured: Inside,
    batch: tuple[PyTree, PyTree],
    *,
    limits: Limits = NO_LIMITS,
) -> tuple[Finding, ...]:
    """Says what is unusual inside of an untrained network.

    Args:
        problem: what was measured.
        measured: as ``measure_network`` returns.
        batch: that it was measured on.
        limits: the user's own, by rule.
    """
    network = problem.network
    # Most rows of a look-up get no gradient from one batch.
    by_layer = {
        one.layer.name: one.weight
        for one in network.layers
        if one.layer.kind != "embedding"
    }
    worst = initialization.worst_scale(measured.weights, network)
    return (
        *initialization.judge_finite(problem.params),
        *gradients.judge_gradients(
            measured.gradients, problem.params, by_layer, limits=limits
        ),
        *gradients.judge_dead_units(
            measured.dead_units,
            num_examples(batch[0]),
            recoverable=measured.recoverable_units,
            limits=limits,
        ),
        *gradients.judge_blocked_share(measured.blocked),
        *gradients.judge_saturated_units(measured.saturated_units, network),
        *initialization.judge_scale(
            worst,
            num_layers=len(network.layers),
            backward=float(np.nan_to_num(measured.signal.backward, nan=1.0)),
            limits=limits,
        ),
        *initialization.judge_biases(measured.weights, network),
        *initialization.judge_signal(measured.signal, network),
        *depth.judge_depth(measured.depth, network),
        *depth.judge_merging(network),
        *width.judge_width(measured.width, need_of(problem), waists(network)),
    )


def need_of(problem: Problem) -> width.Need | None:
    """Returns how wide the layers should be, where outputs stand for targets."""
    if problem.kind is None:
        return None
    inputs = problem.batch(slice(1))[0]
    outputs = jax.eval_shape(problem.apply_fn, problem.params, inputs)
    is_classification = problem.kind != "numbers"
    numbers = sum(math.prod(leaf.shape[1:]) for leaf in inexact_leaves(inputs))
    shape = jax.tree.leaves(outputs)[0].shape
    return width.needed_units(
        num_inputs=numbers,
        num_outputs=math.prod(shape[-1:] if is_classification else shape[1:]),
        is_classification=is_classification,
    )


def waists(network: Network) -> dict[str, int]:
    """Says how many numbers of an example pass each layer that all of them pass.

    The last layer, whose units the task sets, is no waist.
    """
    passed, found = on_every_way(network), {}
    for one in network.layers[:-1]:
        aval = network.steps.avals[one.after]
        free = [axis for axis in range(len(aval.shape)) if axis not in one.unit_axes]
        num_rows = aval.shape[free[0]] if free else 1
        if one.layer.name in passed and one.layer.kind != "embedding":
            found[one.layer.name] = int(np.prod(aval.shape)) // max(num_rows, 1)
    return found
