"""Repairs inside of a network: of its biases, of its width and of its depth."""

import math
from collections.abc import Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nnsanity._types import Array, Params
from nnsanity.checks import depth, initialization, width
from nnsanity.findings import listed
from nnsanity.quantities.drawing import (
    gain_before,
    needed_gain,
    without_biases,
)
from nnsanity.tracing.deepen import Deepening, deepening
from nnsanity.tracing.layers import Located, Network
from nnsanity.tracing.widen import Part, Widening, obstacle, readers, widening
from nnsanity.trials.copies import Copy
from nnsanity.trials.inside import measure_network, need_of, waists
from nnsanity.trials.measure import some_examples
from nnsanity.trials.problem import Problem
from nnsanity.trials.repairs import Repair


def inner_repairs(problem: Problem) -> tuple[Repair, ...]:
    """Lists what can be repaired inside of a problem's network."""
    if not problem.network.layers:
        return ()
    return (
        *_bias_repairs(problem),
        *_width_repairs(problem),
        *_depth_repairs(problem),
    )


def _bias_repairs(problem: Problem) -> tuple[Repair, ...]:
    stats = measure_network(problem, some_examples(problem)).weights
    found = initialization.judge_biases(stats, problem.network)
    if not found:
        return ()

    def zero(copy: Copy, key: Array) -> Copy:
        del key
        return copy._replace(params=without_biases(problem.network, copy.params))

    return (
        Repair(
            "starting the biases at zero",
            "weights",
            zero,
            ("initialization/large-bias",),
            found[0],
            is_free=True,
        ),
    )


class _Narrow(NamedTuple):
    """The layers that all has to pass and that are narrower than the outputs need.

    Attributes:
        need: of the task.
        widths: by layer.
        layers: the narrowest first.
        row: the narrowest, with those of them that stand directly before and behind it.
    """

    need: width.Need
    widths: dict[str, int]
    layers: tuple[Located, ...]
    row: tuple[Located, ...]


def _narrow(problem: Problem) -> _Narrow | None:
    need = need_of(problem)
    if need is None:
        return None
    every = waists(problem.network)
    widths = {name: one for name, one in every.items() if need.is_narrow(one)}
    if not widths:
        return None
    layers = [one for one in problem.network.layers if one.layer.name in widths]
    layers.sort(key=lambda one: widths[one.layer.name])
    row = _row(problem.network, widths.keys(), layers[0].layer.name)
    return _Narrow(need, widths, tuple(layers), row)


def _row(network: Network, narrow: Collection[str], name: str) -> tuple[Located, ...]:
    """Returns the narrow layers in a row that a layer is one of, in order."""
    rows: list[list[Located]] = []
    for one in network.layers:  # in the order of execution
        if one.layer.name not in narrow:
            continue
        before = rows[-1][-1] if rows else None
        read_by = [] if before is None else [*readers(network, before)]
        if [reader.layer.name for reader in read_by] == [one.layer.name]:
            rows[-1].append(one)
        else:
            rows.append([one])
    return next(
        tuple(row) for row in rows if any(one.layer.name == name for one in row)
    )


def _widened(
    problem: Problem, found: _Narrow
) -> tuple[Widening, tuple[str, ...]] | None:
    """Plans more units beside all narrow layers in a row, or for one of them.

    Returns:
        The plan and the names of the layers that it is for.
    """
    units = max(found.need.guideline, width.WIDE_UNITS)
    if len(found.row) > 1:
        first, last = found.row[0], found.row[-1]
        plan = widening(problem.network, first, more=units, last=last)
        if plan is not None:
            return plan, tuple(one.layer.name for one in found.row)
    for one in found.layers:
        plan = widening(problem.network, one, more=units - one.layer.units)
        if plan is not None:
            return plan, (one.layer.name,)
    return None


def _width_repairs(problem: Problem) -> tuple[Repair, ...]:
    """Widens the narrowest layers that all has to pass, if the outputs need more."""
    found = _narrow(problem)
    made = None if found is None else _widened(problem, found)
    if found is None or made is None:
        return ()
    plan, wide = made

    def widen(copy: Copy, key: Array) -> Copy:
        return copy._replace(params=_drawn(problem, plan, copy, key))

    narrowest = min(wide, key=lambda name: found.widths[name])
    return (
        Repair(
            f"giving {narrowest} {plan.more} more units"
            if len(wide) == 1
            else f"a layer of {plan.more} units beside {listed(wide)}",
            "hidden",
            widen,
            ("width/bottleneck",),
            width.bottleneck(narrowest, found.widths[narrowest], found.need, math.nan),
            rewrite=lambda one: one._replace(wider=plan),
        ),
    )


def _depth_repairs(problem: Problem) -> tuple[Repair, ...]:
    """Puts a hidden layer beside the only one."""
    plan = deepening(problem.network, more=width.WIDE_UNITS)
    if plan is None or problem.kind is None:
        return ()

    def deepen(copy: Copy, key: Array) -> Copy:
        return copy._replace(params=_drawn(problem, plan, copy, key))

    return (
        Repair(
            f"a hidden layer of {plan.more} ReLU units beside {plan.units.layer}",
            "depth",
            deepen,
            (),
            depth.too_shallow(plan.units.layer),
            rewrite=lambda one: one._replace(wider=plan),
            is_free=True,
        ),
    )


def not_widened(problem: Problem) -> dict[str, str]:
    """Says which narrow layers have no wider copy, and why."""
    found = _narrow(problem)
    if found is None:
        return {}
    made = _widened(problem, found)
    wide = () if made is None else made[1]
    reason = f"more are tried for {listed(wide)} alone"
    return {
        f"more units for {one.layer.name}": obstacle(problem.network, one) or reason
        for one in found.layers
        if one.layer.name not in wide
    }


def _drawn(
    problem: Problem, plan: Widening | Deepening, copy: Copy, key: Array
) -> Params:
    """Draws the weights of the new units, of the size that a wide layer needs."""
    layers = {one.layer.name: one for one in problem.network.layers}

    def draw(part: Part, shape: tuple[int, ...]) -> Array:
        if len(shape) == 1:
            return jnp.zeros(shape)  # biases
        one = layers[part.layer]
        is_new = part is plan.units
        more = 0 if is_new else plan.more
        gain = gain_before(plan.activation) if is_new else needed_gain(one)
        scale = gain / math.sqrt(_fan_in(one) + more * _window(one, part))
        own_key = jax.random.fold_in(jax.random.fold_in(key, part.leaf), part.axis)
        return scale * jax.random.normal(own_key, shape, jnp.float32)

    return plan.padded(copy.params, draw)


def _fan_in(one: Located) -> int:
    return max(one.layer.fan_in, 1)


def _window(one: Located, part: Part) -> int:
    """How many terms of each sum one more input adds: the window of a convolution."""
    return max(one.layer.fan_in // part.size, 1)
