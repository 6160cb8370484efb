"""Feeds a column of the inputs to a program as several columns in its place.

As one-hot, or as a sine and a cosine.  The weight of the first layer gets one more row
for each new column, and what these say is added to the sums of that layer.  In the
place of the column the program sees a constant: 0 where that layer reads the inputs as
they are, so that the column is gone, and else its mean.  No model is changed, and the
tree of the parameters keeps its structure.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nnsanity._tree import in_float32
from nnsanity._types import Array, Params
from nnsanity.tracing.layers import Located, Network
from nnsanity.tracing.steps import ARGUMENTS, Site
from nnsanity.tracing.widen import CASTS, Part, part_of


class Expansion(NamedTuple):
    """One column of the inputs, and the columns that stand for it.

    Attributes:
        part: weight of the first layer, along the axis of its inputs.
        feature: which column.
        more: how many columns stand for it.
        mean: what the program sees in its place; None for 0.
        columns: ``columns(column)``, float32[examples] to float32[examples, more].
    """

    part: Part
    feature: int
    more: int
    mean: Array | float | None
    columns: Callable[[Array], Array]

    def in_units(self, shift: Array, scale: Array) -> "Expansion":
        """Returns the same for inputs that are shifted and divided before."""
        return self._replace(
            mean=None if self.mean is None else (self.mean - shift) / scale,
            columns=lambda column: self.columns(column * scale + shift),
        )

    def split(self, params: Params) -> tuple[Params, Array]:
        """Splits long parameters into the user's own and the rows that were added."""
        leaves, structure = jax.tree.flatten(params)
        leaves[self.part.leaf], added = self.part.split(leaves[self.part.leaf])
        return jax.tree.unflatten(structure, leaves), added

    def padded(self, params: Params) -> Params:
        """Adds rows of zeros: at first the new columns say nothing."""
        leaves, structure = jax.tree.flatten(params)
        leaf = leaves[self.part.leaf]
        leaves[self.part.leaf] = self.part.padded(leaf, self.more, jnp.zeros)
        return jax.tree.unflatten(structure, leaves)


def expandable(network: Network) -> Part | None:
    """Finds the weight that gets more rows; None where it can't.

    That takes inputs that are one table, and a first layer that is dense, with one row
    for each example and a weight that is a parameter as it stands, or transposed.

    Args:
        network: of ``apply_fn``.
    """
    if not network.layers:
        return None
    first = network.layers[0]
    shape = network.steps.avals[first.start].shape
    is_dense = first.layer.kind == "dense" and len(shape) == 2
    if not is_dense or first.axes not in ((0,), (1,)):
        return None
    return part_of(network, first, of_units=False)


def reads_inputs(network: Network) -> bool:
    """Tells whether the first layer reads the inputs as they are."""
    steps, value = network.steps, network.layers[0].operand
    while (maker := steps.makers.get(value)) is not None:
        operand = maker.inputs[0]
        if maker.eqn.primitive.name not in CASTS or operand is None:
            return False
        value = operand
    return value in steps.inputs


def expanding_writes(
    located: Located, network: Network, plan: Expansion, added: Array, *, position: int
) -> Iterator[tuple[Site, Callable[[Array], Array]]]:
    """Yields what makes a program run with the new columns.

    Args:
        located: the first layer in this program.
        network: of the program that runs.
        plan: as made for the network alone.
        added: as ``Expansion.split`` returns.
        position: of the inputs among the leaves of the arguments.
    """
    found: dict[str, Array] = {}

    def take_out(inputs: Array) -> Array:
        found["column"] = inputs[:, plan.feature]
        constant = 0 if plan.mean is None else plan.mean
        return inputs.at[:, plan.feature].set(constant)

    def add(sums: Array) -> Array:
        rows = jnp.moveaxis(added, plan.part.axis, 0)
        columns = plan.columns(in_float32(found["column"]))
        more = (columns.astype(rows.dtype) @ rows)[:, : located.layer.units]
        more = more if located.axes == (1,) else more.T
        return sums + more.astype(sums.dtype)

    yield Site((ARGUMENTS,), position), take_out
    yield network.site(located.start), add
