"""Puts a hidden layer beside the only layer of a program.

The weight of that layer gets longer along both of its axes: what is added along the
units are the weights of the hidden layer, with its biases where both are added, and
what is added along the inputs is what the layer reads of it.  No model is changed, and
the tree of the parameters keeps its structure.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nnsanity._types import Array, Params
from nnsanity.tracing.layers import Located, Network
from nnsanity.tracing.steps import Site
from nnsanity.tracing.widen import Part, adding, nonlinearity, part_of, read_axis


class Deepening(NamedTuple):
    """How a hidden layer of ReLU units is put beside a layer.

    Attributes:
        units: the layer's weight, along the axis of its units.
        inputs: the same weight, along the axis of its inputs.
        more: how many units the hidden layer has.
        activation: name of their nonlinearity.
    """

    units: Part
    inputs: Part
    more: int
    activation: str = "relu"

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parameters that get longer."""
        return (self.units, self.inputs)

    def _oriented(self, weight: Array) -> Array:
        """Brings the inputs to the first axis, or back to their own."""
        return weight if self.inputs.axis < self.units.axis else weight.T

    def split(self, params: Params) -> tuple[Params, dict[int, Array]]:
        """Splits long parameters into the user's own and the long weight, by leaf.

        The inputs lie along the first axis of that.
        """
        leaves, structure = jax.tree.flatten(params)
        long = self._oriented(leaves[self.units.leaf])
        own = long[: self.inputs.size, : self.units.size]
        leaves[self.units.leaf] = self._oriented(own)
        return jax.tree.unflatten(structure, leaves), {self.units.leaf: long}

    def padded(self, params: Params, draw: Callable[[Part, tuple], Array]) -> Params:
        """Makes the weight long; the biases of the hidden layer start at zero.

        Args:
            params: of the user's own shapes.
            draw: ``draw(part, shape)``, the numbers that are added: [inputs, more] for
                the hidden layer, [more, units] for what is read of it.
        """
        leaves, structure = jax.tree.flatten(params)
        own = self._oriented(jnp.asarray(leaves[self.units.leaf]))
        hidden = draw(self.units, (self.inputs.size, self.more)).astype(own.dtype)
        read = draw(self.inputs, (self.more, self.units.size)).astype(own.dtype)
        corner = jnp.zeros((self.more, self.more), own.dtype)
        long = jnp.block([[own, hidden], [read, corner]])
        leaves[self.units.leaf] = self._oriented(long)
        return jax.tree.unflatten(structure, leaves)

    def values(self, found: Mapping[str, Located]) -> tuple[int, ...]:
        """Returns the values of a program that the hidden layer stands between.

        Args:
            found: the layers of the program by their names in the network alone.
        """
        one = found[self.units.layer]
        return one.operand, one.start

    def writes(
        self,
        found: Mapping[str, Located],
        network: Network,
        added: Mapping[int, Array],
    ) -> Iterator[tuple[Site, Callable[[Array], Array]]]:
        """Yields what makes a program run with it, as ``Widening.writes`` does."""
        one = found[self.units.layer]
        num_inputs, num_units = self.inputs.size, self.units.size

        def term(inputs: Array) -> Array:
            rows = inputs if read_axis(network, one) == 1 else inputs.T
            weight = added[self.units.leaf].astype(rows.dtype)
            bias = weight[num_inputs, num_units:]
            hidden = rows @ weight[:num_inputs, num_units:] + bias
            hidden = nonlinearity(self.activation)(hidden)
            more = hidden @ weight[num_inputs:, :num_units]
            return more if one.axes == (1,) else more.T

        return adding(network, one, {one.start: term})


def deepening(network: Network, *, more: int) -> Deepening | None:
    """Plans a hidden layer; None where the program has one, or where it can't be made.

    That takes a network of one dense layer over a table, with a weight that is a
    parameter as it stands, or transposed.

    Args:
        network: of ``apply_fn``.
        more: how many units it gets.
    """
    if len(network.layers) != 1:
        return None
    (one,) = network.layers
    avals = network.steps.avals
    is_table = len(avals[one.start].shape) == 2 == len(avals[one.operand].shape)
    if one.layer.kind != "dense" or not is_table or one.axes not in ((0,), (1,)):
        return None
    units = part_of(network, one, of_units=True)
    inputs = part_of(network, one, of_units=False)
    if units is None or inputs is None:
        return None
    return Deepening(units, inputs, more)
