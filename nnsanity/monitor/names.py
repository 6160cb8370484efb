"""The names of a network's leaves and layers, and whether a step is one of it."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnsanity._tree import is_inexact, leaf_names
from nnsanity._types import LossFn, Params, PyTree
from nnsanity.findings import listed
from nnsanity.quantities.units import is_thresholded
from nnsanity.signals import Signals
from nnsanity.tracing.layers import inspect

Leaves = tuple[tuple[str, tuple[int, ...]], ...]


class Names(NamedTuple):
    """What ``init`` learned: leaves with their shapes, and layers with theirs."""

    leaves: Leaves
    stacks: dict[str, tuple[int, ...]]
    units: dict[str, int]
    without_gradient: frozenset[str]
    weights: tuple[int, ...]

    @property
    def groups(self) -> list[list[str]]:
        """Layers next to each other that are stacked alike run turn by turn."""
        by_stack = itertools.groupby(self.stacks, lambda name: self.stacks[name])
        return [list(group) for _, group in by_stack]

    @property
    def rows(self) -> list[tuple[str, str]]:
        """Each row's name, and that of its layer."""
        return [
            (name + "".join(f"[{index}]" for index in place), name)
            for group in self.groups
            for place in np.ndindex(self.stacks[group[0]])
            for name in group
        ]


def names_of_network(loss_fn: LossFn, params: Params, *rest: PyTree) -> Names:
    """Reads the names of leaves and layers from shapes, without arithmetic."""
    network = inspect(loss_fn, params, *rest)
    leaves = jax.tree.leaves(params)
    position = {
        leaf: rank
        for rank, leaf in enumerate(
            leaf for leaf, one in enumerate(leaves) if is_inexact(one)
        )
    }
    return Names(
        _inexact(params),
        {one.layer.name: one.layer.stack for one in network.layers},
        {o.layer.name: o.layer.units for o in network.layers if is_thresholded(o)},
        frozenset(
            one.layer.name
            for one in network.layers
            if network.without_gradient(one) is not None
        ),
        tuple(
            position[one.weight]
            for one in network.layers
            if one.weight in position and one.layer.kind != "embedding"
        ),
    )


def check_scalar(function: str, argument: str, value: Any) -> None:
    """Refuses a loss that is no number.

    Raises:
        ValueError: if it is not a floating-point scalar.
    """
    shape = getattr(value, "shape", None)
    if isinstance(value, float) or (shape == () and is_inexact(value)):
        return
    hint = "; did you forget a mean?" if shape else ""
    if isinstance(value, tuple):
        hint = "; with has_aux=True it is the first of (loss, aux)"
    raise ValueError(
        f"{function}: {argument} must be a floating-point scalar, got {value!r}{hint}"
    )


def check_step(
    names: Names,
    loss: Any,
    signals: Any,
    trees: dict[str, PyTree],
    *,
    is_part: bool = False,
) -> None:
    """Refuses what can't be of a step of this network.

    Args:
        names: of the network.
        loss: given by the user, as are all that follow.
        signals: of the step.
        trees: by the name of their argument.
        is_part: whether leaves may be parts of those that ``init`` saw.

    Raises:
        TypeError: if a value is of another type.
        ValueError: if a value is of another shape or structure.
    """
    check_scalar("monitor.update", "loss", loss)
    if not isinstance(signals, Signals):
        raise TypeError(
            "monitor.update: signals must be the Signals of ns.value_and_grad, got"
            f" {type(signals).__name__}; take them from (loss, signals), grads ="
            " ns.value_and_grad(loss_fn)(params, batch)"
        )
    shapes = {name: jnp.shape(one) for name, one in signals.activation_rms.items()}
    if shapes != names.stacks:
        raise ValueError(
            f"monitor.update: signals are of layers {listed(shapes)}, monitor.init saw"
            f" {listed(names.stacks)}; were they given the same loss_fn?"
        )
    for argument, tree in trees.items():
        found, wanted = _inexact(tree), names.leaves
        if is_part:
            found, wanted = _without_sizes(found), _without_sizes(wanted)
        if found != wanted:
            differing = [f"{name} {list(shape)}" for name, shape in found]
            known = [f"{name} {list(shape)}" for name, shape in wanted]
            missing = [f"no {one}" for one in known if one not in differing]
            more = [one for one in differing if one not in known]
            raise ValueError(
                f"monitor.update: {argument} must have the floating-point leaves of the"
                f" params that monitor.init saw, got {listed(missing + more)}; was it"
                " given the same params?"
            )


def _without_sizes(leaves: Leaves) -> Leaves:
    return tuple((name, (0,) * len(shape)) for name, shape in leaves)


def _inexact(tree: PyTree) -> Leaves:
    """Returns names and shapes of the floating-point leaves."""
    named = zip(leaf_names(tree), jax.tree.leaves(tree), strict=True)
    return tuple((name, jnp.shape(leaf)) for name, leaf in named if is_inexact(leaf))
