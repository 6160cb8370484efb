"""Puts other values in the place of a layer's, without a change to the model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax

from nnsanity._types import Array, Params, PyTree
from nnsanity.tracing.control import Path
from nnsanity.tracing.deepen import Deepening
from nnsanity.tracing.expand import Expansion, expanding_writes
from nnsanity.tracing.layers import Located, Network, inspect
from nnsanity.tracing.operations import STRUCTURAL
from nnsanity.tracing.steps import Site
from nnsanity.tracing.tap import Taps, evaluate
from nnsanity.tracing.widen import Widening


class LayerValues(NamedTuple):
    """The values around one layer's nonlinearity.

    Attributes:
        entering: what the layer's weight meets; None where that is a constant.
        before: what enters the nonlinearity.
        after: what leaves it; equal to ``before`` where there is none.
    """

    entering: Array | None
    before: Array
    after: Array


class Replacement(NamedTuple):
    """Another value in the place of a layer's output.

    Attributes:
        combine: makes the new output from the layer's values.
        guard: makes the number that the old nonlinearity gets to see, so that what it
            would overflow on can't reach the gradient of a copy that leaves it out.
    """

    combine: Callable[[LayerValues], Array]
    guard: Callable[[Array], Array] = lambda before: before


def replaced(
    fn: Callable,
    blueprint: Network,
    replacements: Mapping[str, Replacement],
    *,
    penalty_scale: Array | float = 1.0,
    wider: Widening | Deepening | None = None,
    expanded: Expansion | None = None,
) -> Callable:
    """Returns a function that runs ``fn`` with other values at some layers.

    Args:
        fn: any function of parameters first, as ``apply_fn`` or ``loss_fn``.
        blueprint: the network alone, which says where each layer ends; inside of a
            loss, what follows the last layer would be taken for a part of it.
        replacements: what to put at which layer, by name.  Layers that ``fn`` does
            not have are passed over, and so are those inside of a call whose
            derivative the user wrote.
        penalty_scale: factor of every scalar made from parameters alone that is added
            to the result; 0 leaves out an L2 penalty inside of the loss.
        wider: a layer that gets more units, or a hidden layer beside it; the function
            then takes wide parameters, as its ``padded`` makes them.
        expanded: a column of the inputs that is fed as several, for whose weights the
            function takes what ``Expansion.padded`` makes.
    """

    def run(params: Params, *rest: PyTree) -> PyTree:
        rows = None
        if expanded is not None:
            params, rows = expanded.split(params)
        params, added = (params, {}) if wider is None else wider.split(params)
        network = inspect(fn, params, *rest)
        write: dict[Site, Callable[[Array], Array]] = {}
        inline = set[Path]()
        pairs = list(matched(network, blueprint))
        found = {located.layer.name: located for located, _ in pairs}
        if expanded is not None and rows is not None and expanded.part.layer in found:
            # First, since without a bias the sums are what the replacements get.
            first, position = found[expanded.part.layer], len(jax.tree.leaves(params))
            for site, function in expanding_writes(
                first, network, expanded, rows, position=position
            ):
                chain(write, site, function)
        for located, stages in pairs:
            replacement = replacements.get(located.layer.name)
            if replacement is not None:
                located = located._replace(stages=stages)
                values = (located.operand, located.before, located.after)
                inline |= _straddled(network, values)
                _add_writes(write, network, located, replacement)
        if wider is not None and found.keys() >= {part.layer for part in wider.parts}:
            inline |= _straddled(network, wider.values(found))
            for site, function in wider.writes(found, network, added):
                chain(write, site, function)
        for value in penalties(network):
            write[network.site(value)] = lambda penalty: penalty * penalty_scale
        leaves = jax.tree.leaves((params, *rest))
        taps = Taps(write=write, inline=frozenset(inline))
        outputs, _ = evaluate(network.program, leaves, taps)
        return jax.tree.unflatten(
            jax.tree.structure(network.program.out_shape), outputs
        )

    return run


def matched(network: Network, blueprint: Network) -> Iterator[tuple[Located, tuple]]:
    """Yields the layers of a program that stand in the blueprint, with their stages."""
    planned = {located.layer.name: located for located in blueprint.layers}
    for located in network.layers:
        plan = planned.get(located.layer.name)
        if plan is None or has_own_derivative(network, located.step.path):
            continue
        stages = located.stages[: len(plan.stages)]
        if [stage.kind for stage in stages] == [stage.kind for stage in plan.stages]:
            yield located._replace(activation=plan.activation), stages


def has_own_derivative(network: Network, path: tuple[int, ...]) -> bool:
    """Tells whether a place lies in a call whose derivative the user wrote."""
    prefixes = {path[:depth] for depth in range(1, len(path))}
    return not prefixes.isdisjoint(network.steps.own_derivative)


def penalties(network: Network) -> list[int]:
    """Finds the scalars that are made from parameters alone and added to the rest."""
    steps, found = network.steps, []
    for step in steps.steps:
        scalars = [steps.avals[value].shape == () for value in step.outputs]
        if step.eqn.primitive.name in ("add", "add_any", "sub") and all(scalars):
            meets_data = any(
                value is not None and steps.origins[value].data for value in step.inputs
            )
            weights = steps.weights(step) if meets_data else []
            found += [value for value in weights if steps.sites[value] is not None]
    return found


def _add_writes(
    write: dict[Site, Callable[[Array], Array]],
    network: Network,
    located: Located,
    replacement: Replacement,
) -> None:
    values: dict[str, Array] = {}
    entering = network.steps.sites[located.operand]

    def keep_entering(value: Array) -> Array:
        values["entering"] = value  # of the latest trace: loop bodies have several
        return value

    def keep_before(before: Array) -> Array:
        values["before"] = before
        return replacement.guard(before)

    def combine(after: Array) -> Array:
        before = values.get("before", after)
        return replacement.combine(LayerValues(values.get("entering"), before, after))

    if entering is not None:
        chain(write, entering, keep_entering)
    if located.activation is not None:
        chain(write, network.site(located.before), keep_before)
    chain(write, network.site(located.after), combine)


def _straddled(network: Network, values: Sequence[int]) -> set[Path]:
    return straddled([s for value in values if (s := network.steps.sites[value])])


def straddled(sites: Sequence[Site]) -> set[Path]:
    """Finds the calls that hold some of the places and not the others.

    What is kept of a value inside of ``remat`` can't be used outside of it.
    """
    prefixes = [
        [site.path[:depth] for depth in range(1, len(site.path))] for site in sites
    ]
    paths = {path for one in prefixes for path in one}
    return {path for path in paths if not all(path in one for one in prefixes)}


def chain(
    write: dict[Site, Callable[[Array], Array]],
    site: Site,
    function: Callable[[Array], Array],
) -> None:
    """Adds a function at a place, after those that are there."""
    earlier = write.get(site)
    if earlier is None:
        write[site] = function
    else:
        write[site] = lambda value: function(earlier(value))


def output_layer(network: Network) -> Located | None:
    """Finds the layer whose output the network returns, if that is one array."""
    steps = network.steps
    if len(steps.outputs) != 1:
        return None
    value = steps.outputs[0]
    by_output = {located.after: located for located in network.layers}
    while value is not None and value not in by_output:
        step = steps.makers.get(value)
        if step is None or step.eqn.primitive.name not in STRUCTURAL:
            return None
        value = step.inputs[0]
    return None if value is None else by_output[value]
