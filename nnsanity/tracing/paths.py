"""The ways from the inputs of a network to its outputs, counted in layers."""

import functools
import math
import operator
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from nnsanity.tracing.chains import Chains
from nnsanity.tracing.layers import Located, Network
from nnsanity.tracing.operations import STRUCTURAL
from nnsanity.tracing.steps import ARGUMENTS, Site, Step

_JOINS = frozenset({"add", "add_any", "concatenate"})
"""Operations that join what went through layers with what went around them."""


class Depths(NamedTuple):
    """How many layers lie on the ways through a network.

    Layers inside of a scan over layers count once for each turn, those of a loop with
    the same weights once.

    Attributes:
        longest: on the longest way from the inputs to the outputs.
        unskipped: on the way that takes every skip, a sum or a concatenation that
            what went around a layer joins: what a plain network has on its only way.
        by_layer: on the longest way up to and with each layer, by name.
    """

    longest: int
    unskipped: int
    by_layer: dict[str, int]


def depths(network: Network) -> Depths:
    """Counts the layers on the ways through a network; reads the program alone."""
    at = {one.step.path: one for one in network.layers}
    longest, shortest = dict[int, int](), dict[int, int]()
    by_layer: dict[str, int] = {}
    for step, met in _with_data(network):
        one = at.get(step.path)
        more = 0 if one is None else math.prod(one.layer.stack)
        far = max((longest.get(value, 0) for value in met), default=0) + more
        joins = min if step.eqn.primitive.name in _JOINS else max
        near = joins((shortest.get(value, 0) for value in met), default=0) + more
        longest |= dict.fromkeys(step.outputs, far)
        shortest |= dict.fromkeys(step.outputs, near)
        if one is not None:
            by_layer[one.layer.name] = far
    ends = [value for value in network.steps.outputs if value in longest]
    return Depths(
        max((longest.get(value, 0) for value in ends), default=0),
        max((shortest[value] for value in ends), default=0),
        by_layer,
    )


def on_every_way(network: Network) -> frozenset[str]:
    """Names the layers that all of the inputs passes, on whatever way."""
    at = {one.step.path: index for index, one in enumerate(network.layers)}
    passed = dict[int, int]()  # by value, one bit for each layer
    for step, met in _with_data(network):
        bits = [passed.get(value, 0) for value in met]
        common = functools.reduce(operator.and_, bits) if bits else 0
        if step.path in at:
            common |= 1 << at[step.path]
        passed |= dict.fromkeys(step.outputs, common)
    ends = [passed[value] for value in network.steps.outputs if value in passed]
    common = functools.reduce(operator.and_, ends) if ends else 0
    return frozenset(
        one.layer.name
        for index, one in enumerate(network.layers)
        if common >> index & 1
    )


def merging(network: Network) -> tuple[Located, ...]:
    """Finds the layers that make up one linear layer with the layer behind them.

    Nothing nonlinear and nothing else than the layer stands in between.  Left out are
    those that are meant so: narrower than what enters and what leaves both together,
    as the factors of a matrix of low rank are; layers by groups, of channels or of
    copies; and embeddings.  What a loop carries into its next turn, or enters a branch,
    is not followed.
    """
    entered: dict[int, Located] = {one.operand: one for one in network.layers}
    chains = Chains(network.steps)
    found = []
    for one in network.layers:
        stages = one.linear_stages
        is_straight = all(stage.kind in ("move", "affine") for stage in stages)
        if one.activation is not None or not is_straight:
            continue
        after = _next_layer(chains, one.before, entered)
        if after is None or "embedding" in (one.layer.kind, after.layer.kind):
            continue
        is_grouped = any(_is_grouped(layer) for layer in (one, after))
        meets_units = _entering(after) % one.layer.units == 0
        if is_grouped or not meets_units:
            continue
        if one.layer.units >= min(_entering(one), after.layer.units):
            found.append(one)
    return tuple(found)


def _next_layer(
    chains: Chains, value: int, entered: Mapping[int, Located]
) -> Located | None:
    """Returns the layer that a value enters, reshaped at most, if nothing else does."""
    while len(chains.users[value]) == 1 and value not in chains.is_output:
        if value in entered:
            return entered[value]
        step = chains.steps.steps[chains.users[value][0]]
        if step.eqn.primitive.name not in STRUCTURAL:
            return None
        (value, *_) = step.outputs
    return None


def _is_grouped(one: Located) -> bool:
    """Tells whether a layer is several side by side."""
    params = one.step.eqn.params
    if one.step.eqn.primitive.name == "dot_general":
        _, (batch, _) = params["dimension_numbers"]
        return bool(batch)
    return params.get("feature_group_count", 1) > 1


def _entering(one: Located) -> int:
    """Returns how many features, or channels, enter a layer."""
    if one.layer.kind != "conv":
        return one.layer.fan_in
    kernel = one.step.eqn.invars[1].aval.shape
    return kernel[one.step.eqn.params["dimension_numbers"].rhs_spec[1]]


def _with_data(network: Network) -> Iterator[tuple[Step, list[int]]]:
    """Yields the steps with the values, made from data, that each result is made from.

    Arguments of the bodies of loops and branches are the values that are passed in.
    """
    steps = network.steps
    passed = _passed_in(network)

    def outermost(value: int | None) -> int | None:
        while value in passed:
            value = passed[value]
        return value

    made = set[int]()
    for step in steps.steps:
        read = [outermost(value) for value in step.inputs]
        if step.is_opened:
            depth = len(step.path)
            read += [
                outermost(value)
                for value in steps.returned
                if (site := steps.sites[value]) is not None
                and len(site.path) > depth
                and site.path[:depth] == step.path
            ]
        met = [
            value
            for value in read
            if value is not None
            and (value in made or _is_argument(network, value))
            and steps.origins[value].data
        ]
        if step.is_opened:  # what goes in shows in what its bodies return
            inside = [value for value in met if value not in step.inputs]
            met = inside or met
        made.update(step.outputs)
        yield step, met


def _passed_in(network: Network) -> dict[int, int | None]:
    """Says which value each argument of a body is, when the body starts."""
    steps = network.steps
    by_site = {site: value for value, site in enumerate(steps.sites) if site}
    found: dict[int, int | None] = {}
    for step in steps.steps:
        if not step.is_opened:
            continue
        for body in steps.bodies.values():
            is_of_step = body.path in (step.path, (*step.path, body.path[-1]))
            if not is_of_step:
                continue
            for position, operand in enumerate(body.operands):
                value = by_site.get(Site((*body.path, ARGUMENTS), position))
                if value is not None:
                    found[value] = step.inputs[operand]
    return found


def _is_argument(network: Network, value: int) -> bool:
    """Tells whether a value is an argument of the program, and no parameter."""
    site = network.steps.sites[value]
    is_outer = site is not None and site.path == (ARGUMENTS,)
    return is_outer and network.steps.origins[value].data
