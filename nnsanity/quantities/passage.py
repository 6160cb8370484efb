"""One forward pass and one backward pass, and what is seen at the layers on the way."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnsanity._tree import in_float32
from nnsanity._types import ApplyFn, Array, LossFn, Params, PyTree
from nnsanity.quantities.clipped import BlockedShare, at_clips, blocked_of
from nnsanity.quantities.units import by_unit
from nnsanity.tracing.clips import between_layers, inlined
from nnsanity.tracing.geometry import weight_geometry
from nnsanity.tracing.layers import Located, Network, inspect
from nnsanity.tracing.replace import matched
from nnsanity.tracing.steps import Site
from nnsanity.tracing.tap import (
    Reading,
    Readings,
    Taps,
    evaluate,
    varied,
    watched,
)


class Look(NamedTuple):
    """Something to measure at a layer.

    Attributes:
        value: ``value(network, one)``, the number of the value to look at, or None.
        measure: ``measure(values, one)``, any tree of arrays.
        fold: joins what two turns of a while loop hand out; the later one otherwise.
    """

    value: Callable[[Network, Located], int | None]
    measure: Callable[[Array, Located], PyTree]
    fold: Callable[[PyTree, PyTree], PyTree] = lambda earlier, later: later


def before(network: Network, one: Located) -> int:
    """What enters the nonlinearity."""
    del network
    return one.before


def after(network: Network, one: Located) -> int:
    """What leaves the nonlinearity."""
    del network
    return one.after


def weight(network: Network, one: Located) -> int | None:
    """The weight as the product gets it: transposed, masked, one of a stack."""
    geometry = weight_geometry(network.steps, one.step)
    return None if geometry is None else geometry.weight


class Seen(NamedTuple):
    """What was measured at one layer.

    Attributes:
        reading: with an axis for each loop around the value.
        shared: which of these axes are turns with the same weights.
    """

    reading: Reading
    shared: tuple[int, ...]

    def merged(self, reduce: Callable) -> PyTree:
        """Joins turns with the same weights; NaN, False or 0 where nothing ran."""
        return self.reading.merged(self.shared, reduce).where_it_ran()

    def only(self, choose: Callable[[PyTree], PyTree]) -> "Seen":
        """Keeps a part of what was measured."""
        return self._replace(
            reading=self.reading._replace(value=choose(self.reading.value))
        )


Looks = Mapping[str, Look]
SeenByLook = dict[str, dict[str, Seen]]
"""What was measured, by the name of the look and by the name of the layer."""


def seen_forward(
    apply_fn: ApplyFn, params: Params, inputs: PyTree, looks: Looks
) -> tuple[Network, SeenByLook]:
    """Runs a network once and measures at its layers."""
    network = inspect(apply_fn, params, inputs)
    leaves = jax.tree.leaves((params, inputs))
    taps, sites = _taps(network, network.layers, looks)
    _, readings = evaluate(network.program, leaves, taps)
    return network, _seen(network, network.layers, sites, readings)


class Passage(NamedTuple):
    """What one forward and one backward pass show.

    Attributes:
        loss: float32[].
        grads: of the loss by the parameters.
        seen: what was measured on the way forward.
        unit_gradients: mean square of the gradient that comes back to each unit, by
            what enters the nonlinearity: float32[*around, units]; only layers whose
            gradient shows.
        blocked: what clips between the layers, and behind them, block.
    """

    loss: Array
    grads: PyTree
    seen: SeenByLook
    unit_gradients: dict[str, Seen]
    blocked: BlockedShare


def seen_both_ways(
    loss_fn: LossFn, params: Params, batch: PyTree, *, blueprint: Network, looks: Looks
) -> Passage:
    """Differentiates a loss once, and measures at the layers of the network inside.

    Args:
        loss_fn: ``loss_fn(params, batch) -> scalar``.
        params: the parameters.
        batch: as the loss takes it.
        blueprint: the network alone, which says where each layer ends.
        looks: what to measure on the way forward.

    Returns:
        The passage; layers of the network that the loss does not run, or runs
        otherwise, are missing in it.
    """
    network = inspect(loss_fn, params, batch)
    located = tuple(
        one._replace(stages=stages) for one, stages in matched(network, blueprint)
    )
    found = between_layers(network, located)
    taps, sites = _taps(network, located, looks, at_clips(found))
    watch, slots = dict[Site, Callable](), dict[Site, Array]()
    for one in located:
        if network.without_gradient(one) is None:
            site = network.site(one.before)
            shape = (*(axis.size for axis in one.around), one.layer.units)
            add = functools.partial(_add_squares, one)
            watch[site] = functools.partial(watched, add)
            slots[site] = jnp.zeros(shape, jnp.float32)
    inline = frozenset(inlined(network, found.values()))
    taps = taps._replace(watch=watch, inline=inline)
    more = jax.tree.leaves(batch)

    def run(params: Params, slots: Mapping[Site, Array]) -> tuple:
        arguments = [*jax.tree.leaves(params), *more]
        (loss,), readings = evaluate(network.program, arguments, taps, slots)
        return loss, readings

    slots = varied(slots, (params, batch))
    differentiated = jax.value_and_grad(run, (0, 1), has_aux=True, allow_int=True)
    (loss, readings), (grads, backward) = differentiated(params, slots)
    unit_gradients = {
        one.layer.name: Seen(
            Reading(backward[site], _ran(readings, sites, one.layer.name)), one.shared
        )
        for one in located
        if (site := network.site(one.before)) in backward
    }
    at_ends = {
        name: (one := readings[clip.result])._replace(value=one.value[(_CLIP, name)])
        for name, clip in found.items()
    }
    return Passage(
        in_float32(loss),
        grads,
        _seen(network, located, sites, readings),
        unit_gradients,
        blocked_of(network, found, at_ends),
    )


_CLIP = "clip"


def _taps(
    network: Network,
    located: Iterable[Located],
    looks: Looks,
    beside: Mapping[Site, Mapping[str, Callable]] = {},
) -> tuple[Taps, dict[tuple[str, str], Site]]:
    """Returns what to read, and where each look at each layer is to be found.

    Args:
        network: the program.
        located: its layers.
        looks: what to measure at each.
        beside: what to measure besides, by place and by name.
    """
    sites: dict[tuple[str, str], Site] = {}
    measures: dict[Site, dict[tuple[str, str], Callable]] = {
        site: {(_CLIP, name): one for name, one in named.items()}
        for site, named in beside.items()
    }
    for one in located:
        for key, look in looks.items():
            value = look.value(network, one)
            site = None if value is None else network.steps.sites[value]
            if site is not None:
                entry = (key, one.layer.name)
                sites[entry] = site
                measure = functools.partial(_measured, look, one)
                measures.setdefault(site, {})[entry] = measure

    def read(site: Site, values: Array) -> PyTree:
        values = jax.lax.stop_gradient(values)
        return {entry: measure(values) for entry, measure in measures[site].items()}

    def fold(earlier: PyTree, later: PyTree) -> PyTree:
        return {
            entry: looks[entry[0]].fold(earlier[entry], later[entry])
            if entry[0] in looks
            else later[entry]
            for entry in later
        }

    reads = {site: functools.partial(read, site) for site in measures}
    return Taps(read=reads, fold=fold), sites


def _measured(look: Look, one: Located, values: Array) -> PyTree:
    return look.measure(values, one)


def _seen(
    network: Network,
    located: Iterable[Located],
    sites: Mapping[tuple[str, str], Site],
    readings: Readings,
) -> SeenByLook:
    by_name = {one.layer.name: one for one in located}
    seen: SeenByLook = {}
    for (key, name), site in sites.items():
        reading = readings[site]
        reading = reading._replace(value=reading.value[(key, name)])
        axes = network.steps.axes(site.path)
        stack = by_name[name].stack
        shared = tuple(i for i, axis in enumerate(axes) if axis not in stack)
        seen.setdefault(key, {})[name] = Seen(reading, shared)
    return seen


def _ran(
    readings: Readings, sites: Mapping[tuple[str, str], Site], name: str
) -> Array | None:
    """Whether the place of a layer was run, told by what was read inside of it."""
    found = [
        site for (_, other), site in sites.items() if other == name and site in readings
    ]
    deepest = max(found, key=lambda site: len(site.path), default=None)
    return None if deepest is None else readings[deepest].ran


def _add_squares(one: Located, slot: Array, gradient: Array) -> Array:
    """Adds the mean squares of a gradient, unit by unit."""
    axes = one.linear_stages[-1].axes if one.linear_stages else one.axes
    rows = in_float32(by_unit(gradient, axes, one.layer.units))
    # The sum with the slot varies over the devices that the slot varies over.
    return slot + jnp.mean(jnp.abs(rows) ** 2, axis=0).astype(jnp.float32)


class Place(NamedTuple):
    """A layer, or one block of a stack of them.

    Attributes:
        one: the layer.
        block: its index in the stack.
        name: of the layer, with the block in brackets.
    """

    one: Located
    block: tuple[int, ...]
    name: str


def places(network: Network) -> list[Place]:
    """Lists the layers in the order of execution, each block of a stack by itself."""
    return [
        Place(one, block, one.layer.name + "".join(f"[{index}]" for index in block))
        for one in network.layers
        for block in np.ndindex(one.layer.stack)
    ]


def in_places(network: Network, values: Mapping[str, Array]) -> Array:
    """Lays out numbers by layer in the order of ``places``; NaN where there is none.

    Args:
        network: the network.
        values: [*stack] for each layer.
    """
    rows = [
        jnp.broadcast_to(values[one.layer.name], one.layer.stack).reshape(-1)
        if one.layer.name in values
        else jnp.full(math.prod(one.layer.stack), jnp.nan)
        for one in network.layers
    ]
    joined = jnp.concatenate(rows) if rows else jnp.zeros(0)
    return joined.astype(jnp.float32)
