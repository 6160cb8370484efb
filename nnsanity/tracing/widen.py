"""Widens one layer of a program that was traced with fixed shapes.

The arrays of its weight, and of the weights that read it, get more rows; the
interpreter computes the new units beside the old ones and adds what they say to the
sums of the layers that read them.  No model is changed, and the tree of the parameters
keeps its structure.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nnsanity._types import Array, Params
from nnsanity.tracing import compat
from nnsanity.tracing.biases import is_bias
from nnsanity.tracing.geometry import weight_geometry
from nnsanity.tracing.layers import Located, Network
from nnsanity.tracing.steps import Site, Steps

CASTS = frozenset({"convert_element_type", "copy", "copy_p"})
"""Operations that keep the numbers of an array and their order."""


class Part(NamedTuple):
    """A parameter that gets longer along one axis.

    Attributes:
        layer: name of the layer that it is the weight of.
        leaf: its index among the leaves of the parameters.
        axis: the axis.
        size: how long that is in the user's program.
    """

    layer: str
    leaf: int
    axis: int
    size: int

    def split(self, leaf: Array) -> tuple[Array, Array]:
        """Splits a long parameter into the user's own and what was added."""
        end = leaf.shape[self.axis]
        return (
            jax.lax.slice_in_dim(leaf, 0, self.size, axis=self.axis),
            jax.lax.slice_in_dim(leaf, self.size, end, axis=self.axis),
        )

    def padded(self, leaf: Array, more: int, draw: Callable[[tuple], Array]) -> Array:
        """Makes a parameter longer by numbers that ``draw(shape)`` gives."""
        leaf = jnp.asarray(leaf)
        shape = list(leaf.shape)
        shape[self.axis] = more
        added = draw(tuple(shape)).astype(leaf.dtype)
        return jnp.concatenate([leaf, added], axis=self.axis)


class Widening(NamedTuple):
    """How one layer is made wider.

    Attributes:
        units: its weight, along the axis of its units.
        readers: the weights of the layers that read it, along the axis of their inputs.
        more: how many units are added.
        activation: name of the nonlinearity of the new units, or None.
        bias: its bias, if it has one that is a parameter of one axis.
    """

    units: Part
    readers: tuple[Part, ...]
    more: int
    activation: str | None = None
    bias: Part | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parameters that get longer."""
        bias = () if self.bias is None else (self.bias,)
        return (self.units, *bias, *self.readers)

    def split(self, params: Params) -> tuple[Params, dict[int, Array]]:
        """Splits wide parameters into the user's own and what was added, by leaf."""
        leaves, structure = jax.tree.flatten(params)
        added = {}
        for part in self.parts:
            leaves[part.leaf], added[part.leaf] = part.split(leaves[part.leaf])
        return jax.tree.unflatten(structure, leaves), added

    def padded(self, params: Params, draw: Callable[[Part, tuple], Array]) -> Params:
        """Makes parameters wide.

        Args:
            params: of the user's own shapes.
            draw: ``draw(part, shape)``, the numbers that are added to a parameter.
        """
        leaves, structure = jax.tree.flatten(params)
        for part in self.parts:
            drawn = functools.partial(draw, part)
            leaves[part.leaf] = part.padded(leaves[part.leaf], self.more, drawn)
        return jax.tree.unflatten(structure, leaves)

    def values(self, found: Mapping[str, Located]) -> tuple[int, ...]:
        """Returns the values of a program that the added units read and are added to.

        Args:
            found: the layers of the program by their names in the network alone.
        """
        starts = (found[part.layer].start for part in self.readers)
        return (found[self.units.layer].operand, *starts)

    def writes(
        self,
        found: Mapping[str, Located],
        network: Network,
        added: Mapping[int, Array],
    ) -> Iterator[tuple[Site, Callable[[Array], Array]]]:
        """Yields what makes a program run with the added units.

        Args:
            found: the layers of the program by their names in the network alone.
            network: of the program that runs.
            added: as ``split`` returns.
        """
        narrow = found[self.units.layer]

        def new_units(entering: Array) -> Array:
            weight = added[self.units.leaf]
            sums = _added_product(network, narrow, weight, entering)
            sums = sums.T if _is_turned(narrow) else sums
            if self.bias is not None:
                shape = [1] * sums.ndim
                shape[narrow.unit_axes[0]] = self.more
                sums += added[self.bias.leaf].reshape(shape).astype(sums.dtype)
            return nonlinearity(self.activation)(sums)

        def read_by(part: Part, entering: Array) -> Array:
            reader, weight = found[part.layer], added[part.leaf]
            return _added_product(network, reader, weight, new_units(entering))

        return adding(
            network,
            narrow,
            {
                found[part.layer].start: functools.partial(read_by, part)
                for part in self.readers
            },
        )


def adding(
    network: Network, one: Located, terms: Mapping[int, Callable[[Array], Array]]
) -> Iterator[tuple[Site, Callable[[Array], Array]]]:
    """Yields what adds to values of a program what is made of a layer's inputs.

    Args:
        network: of the program that runs.
        one: the layer.
        terms: by value, ``term(what enters the layer)``.
    """
    entering: dict[str, Array] = {}

    def keep(value: Array) -> Array:
        entering["value"] = value
        return value

    def add(term: Callable[[Array], Array], value: Array) -> Array:
        return value + term(entering["value"]).astype(value.dtype)

    yield network.site(one.operand), keep
    for value, term in terms.items():
        yield network.site(value), functools.partial(add, term)


def widening(
    network: Network, one: Located, *, more: int, last: Located | None = None
) -> Widening | None:
    """Plans to widen a layer; None where its weights can't be made longer.

    That takes a weight that is a parameter as it stands, or transposed, no loop around
    it, and layers that read what it makes in the same shape, as they do not behind a
    pooling or where an image is flattened.

    Args:
        network: of ``apply_fn``.
        one: the layer.
        more: how many units to add.
        last: the last of several layers in a row, of which ``one`` is the first: the
            new units stand beside them all, and what reads the last reads them.  They
            get its nonlinearity, or a ReLU.
    """
    activation = one.layer.activation if last is None else last.layer.activation
    if last is not None:
        activation = activation or "relu"
    last = last or one
    if obstacle(network, one, last):
        return None
    known = [part for part in _parts(network, one, last) if part is not None]
    bias = _bias(network, one)
    return Widening(known[0], tuple(known[1:]), more, activation, bias)


def _bias(network: Network, one: Located) -> Part | None:
    """Finds a bias of one number for each unit, if no other layer has it."""
    others = [other.leaves for other in network.layers if other is not one]
    for leaf in sorted(one.leaves - {one.weight}.union(*others)):
        shape = network.steps.avals[leaf].shape
        if is_bias(network, one, leaf) and shape == (one.layer.units,):
            return Part(one.layer.name, leaf, 0, one.layer.units)
    return None


def obstacle(network: Network, one: Located, last: Located | None = None) -> str:
    """Says why layers as in ``widening`` can't be made wider; empty where they can."""
    last = last or one
    read_by = list(readers(network, last))
    if any(each.around for each in (one, *read_by)) or _enters_loop(network, last):
        return "it, or a layer that reads it, lies inside of a loop"
    if not read_by:
        return "no layer reads what it makes"
    parts = _parts(network, one, last)
    leaves = [part.leaf for part in parts if part is not None]
    if len(leaves) < len(parts):
        return (
            "its weight, or that of a layer that reads it, is not a parameter as it"
            " stands, or has no single axis for the units"
        )
    if len(set(leaves)) < len(leaves):
        return "its weight and that of a layer that reads it are one parameter"
    if not _fits(network, one, last, read_by):
        return "what it makes changes its shape before the next layer reads it"
    return ""


def _parts(network: Network, one: Located, last: Located) -> list[Part | None]:
    """Returns what has to be longer, None where that can't be."""
    read = [part_of(network, each, of_units=False) for each in readers(network, last)]
    return [part_of(network, one, of_units=True), *read]


def readers(network: Network, one: Located) -> Iterator[Located]:
    """Yields the layers that read what a layer makes, before any other layer does."""
    for reader in network.layers:
        if _comes_from(network, [reader.operand], one):
            yield reader


def _enters_loop(network: Network, one: Located) -> bool:
    """Tells whether a loop or a branch with layers in it reads what a layer makes."""
    return any(
        _comes_from(network, [read for read in step.inputs if read is not None], one)
        for step in network.steps.steps
        if step.is_opened
    )


def _comes_from(network: Network, values: list[int], one: Located) -> bool:
    """Tells whether a value is made from a layer's, with no other layer between."""
    steps = network.steps
    starts = {other.start for other in network.layers}
    waiting, seen = list(values), set[int]()
    while waiting:
        value = waiting.pop()
        if value == one.after:
            return True
        maker = steps.makers.get(value)
        if value in seen or value in starts or maker is None or maker.is_opened:
            continue
        seen.add(value)
        waiting += [read for read in maker.inputs if read is not None]
    return False


def _fits(
    network: Network, one: Located, last: Located, read_by: list[Located]
) -> bool:
    avals = network.steps.avals
    start, own, shape = (
        avals[value].shape for value in (one.start, one.after, last.after)
    )
    if not len(one.axes) == len(one.unit_axes) == len(last.unit_axes) == 1:
        return False
    (axis,) = one.unit_axes
    is_like = len(own) == len(shape) and all(
        size == other
        for index, (size, other) in enumerate(zip(own, shape, strict=True))
        if index != axis
    )
    return (
        own[axis] == one.layer.units
        and _is_at_start(start, own, is_turned=_is_turned(one))
        and is_like
        and last.unit_axes == one.unit_axes
        and all(avals[reader.operand].shape == shape for reader in read_by)
        and all(read_axis(network, reader) == axis for reader in read_by)
    )


def _is_at_start(start: tuple, own: tuple, *, is_turned: bool) -> bool:
    return len(own) == 2 and start == own[::-1] if is_turned else start == own


def _is_turned(one: Located) -> bool:
    """Tells whether what a layer makes is transposed, as under ``vmap``."""
    return one.axes != one.unit_axes


def part_of(network: Network, one: Located, *, of_units: bool) -> Part | None:
    """Finds the axis of a layer's weight that has to be longer."""
    eqn, steps = one.step.eqn, network.steps
    found = _parameter(steps, _weight(network, one))
    if found is None or one.around or one.layer.kind == "embedding":
        return None
    leaf, order = found
    side = _side(network, one)
    if one.layer.kind == "conv":
        if (
            eqn.params["feature_group_count"] != 1
            or eqn.params["batch_group_count"] != 1
        ):
            return None
        axis = eqn.params["dimension_numbers"].rhs_spec[0 if of_units else 1]
    else:
        contracted, batch = eqn.params["dimension_numbers"]
        free = [i for i in range(len(order)) if i not in contracted[side]]
        if len(contracted[side]) != 1 or len(free) != 1 or batch[side]:
            return None
        axis = free[0] if of_units else contracted[side][0]
    size = steps.avals[_weight(network, one)].shape[axis]
    return Part(one.layer.name, leaf, order[axis], size)


def _weight(network: Network, one: Located) -> int:
    geometry = weight_geometry(network.steps, one.step)
    if geometry is None:
        raise ValueError(f"{one.layer.name} has no weight")
    return geometry.weight


def _side(network: Network, one: Located) -> int:
    """Which operand of the product the weight is."""
    return one.step.inputs.index(_weight(network, one))


def read_axis(network: Network, one: Located) -> int | None:
    """Which axis of what enters a layer it sums over, if that is one."""
    eqn, side = one.step.eqn, _side(network, one)
    if one.layer.kind == "conv":
        return eqn.params["dimension_numbers"].lhs_spec[1]
    summed = eqn.params["dimension_numbers"][0][1 - side]
    return summed[0] if len(summed) == 1 else None


def _parameter(steps: Steps, value: int) -> tuple[int, list[int]] | None:
    """Returns the leaf that a weight is, and which axis of it each axis is."""
    order = list(range(len(steps.avals[value].shape)))
    while (maker := steps.makers.get(value)) is not None:
        name, operand = maker.eqn.primitive.name, maker.inputs[0]
        if name == "transpose":
            permutation = maker.eqn.params["permutation"]
            order = [permutation[axis] for axis in order]
        elif name not in CASTS:
            return None
        if operand is None:
            return None
        value = operand
    site = steps.sites[value]
    if site is None or len(site.path) != 1 or not steps.is_weight(value):
        return None
    return site.position, order


def _added_product(
    network: Network, one: Located, weight: Array, value: Array
) -> Array:
    """Returns what a layer's product makes of a value with another weight."""
    own = _weight(network, one)
    _, order = _parameter(network.steps, own) or (0, [*range(weight.ndim)])
    weight = weight.transpose(order).astype(network.steps.avals[own].dtype)
    is_second = _side(network, one) == 1
    operands = [value, weight] if is_second else [weight, value]
    return compat.bind(one.step.eqn, operands)[0]


def nonlinearity(name: str | None) -> Callable[[Array], Array]:
    """Returns the nonlinearity of a name, a ReLU where the name is not known."""
    if name is None:
        return lambda values: values
    found = getattr(jax.nn, name, None) or getattr(jnp, name, None)
    return found if callable(found) else jax.nn.relu
