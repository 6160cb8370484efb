"""What a monitor keeps of a training, and the names that go with it."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnsanity._tree import is_inexact, leaf_names
from nnsanity._types import Array, LossFn, Params, PyTree
from nnsanity.findings import listed
from nnsanity.signals import Signals
from nnsanity.tracing.layers import inspect
from nnsanity.units import is_thresholded


class Nonfinite(NamedTuple):
    """What was NaN or infinite in the first step that had any.

    Squares are summed in float32: a norm beyond 1e19 counts as infinite.

    Attributes:
        step: int32[]; healthy is -1, none.
        watched: bool[], whether more than the loss was looked at in that step.
        loss: bool[].
        gradients: bool[leaves].
        updates: bool[leaves].
        parameters: bool[leaves], before the update.
        activations: bool[rows], those that were finite when they were last looked at.
    """

    step: Array
    watched: Array
    loss: Array
    gradients: Array
    updates: Array
    parameters: Array
    activations: Array


class Spike(NamedTuple):
    """The first spike of the loss that large updates announced, or the latest rise.

    Attributes:
        step: int32[], the first step of it; healthy is -1, none.
        length: int32[], steps in a row; healthy is below 3.
        level: float32[], the loss above which it began.
        leaf: int32[], whose update had grown most when it was last seen before.
        growth: float32[], of this update over its own average; healthy is below 10.
    """

    step: Array
    length: Array
    level: Array
    leaf: Array
    growth: Array


class MonitorState(NamedTuple):
    """What a monitor keeps: small arrays, by leaf, by row and by unit.

    Leaves are the floating-point parameters in the order of ``leaf_names``; rows are
    the layers in the order of execution, one for each turn of a scan over layers.
    Averages pass over what is not finite; what is called last does not.

    Attributes:
        step: int32[], steps seen; the first is step 0.
        num_watched: int32[], those that were watched.
        watched_step: int32[], the last of them with a finite loss.
        loss: float32[], last.
        loss_start: float32[], of step 0.
        loss_average: float32[], over about 50 steps, outliers clipped; should fall.
        loss_spread: float32[], root mean square of the distance from it.
        lowest_average: float32[]; healthy is near ``loss_average``.
        lowest_step: int32[], its step.
        spike: ``Spike``.
        nonfinite: ``Nonfinite``.
        gradient_norm: float32[leaves], last.
        update_norm: float32[leaves], last.
        parameter_norm: float32[leaves], last, before the update.
        update_average: float32[leaves], of the norm, over about 100 watched steps.
        update_growth: float32[leaves], last norm over the average before; near 1.
        update_ratio: float32[leaves], average of update over parameter; about 1e-3,
            and 0 where the parameter is still zero.
        activation_rms: float32[rows], last; of the order of 1.
        activation_gradient_rms: float32[rows], last; alike from row to row, and 0 where
            none can be seen.
        last_active: int32[*stack, units] by thresholding layer, the last step in which
            a unit was active; negative is never.
    """

    step: Array
    num_watched: Array
    watched_step: Array
    loss: Array
    loss_start: Array
    loss_average: Array
    loss_spread: Array
    lowest_average: Array
    lowest_step: Array
    spike: Spike
    nonfinite: Nonfinite
    gradient_norm: Array
    update_norm: Array
    parameter_norm: Array
    update_average: Array
    update_growth: Array
    update_ratio: Array
    activation_rms: Array
    activation_gradient_rms: Array
    last_active: dict[str, Array]


class Names(NamedTuple):
    """What ``init`` learned: leaves with their shapes, and layers with theirs."""

    leaves: tuple[tuple[str, tuple[int, ...]], ...]
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


def blank_state(names: Names, *, every: int) -> MonitorState:
    """Returns the state before the first step; no two of its arrays are one."""
    num_leaves, num_rows = len(names.leaves), len(names.rows)

    def zeros(*shape: int) -> Array:
        return jnp.zeros(shape, jnp.float32)

    def count(value: int) -> Array:
        return jnp.full((), value, jnp.int32)

    def flags(*shape: int) -> Array:
        return jnp.zeros(shape, jnp.bool_)

    return MonitorState(
        step=count(0),
        num_watched=count(0),
        watched_step=count(-1),
        loss=zeros(),
        loss_start=zeros(),
        loss_average=zeros(),
        loss_spread=zeros(),
        lowest_average=zeros(),
        lowest_step=count(0),
        spike=Spike(count(-1), count(0), zeros(), count(0), zeros()),
        nonfinite=Nonfinite(
            step=count(-1),
            watched=flags(),
            loss=flags(),
            gradients=flags(num_leaves),
            updates=flags(num_leaves),
            parameters=flags(num_leaves),
            activations=flags(num_rows),
        ),
        gradient_norm=zeros(num_leaves),
        update_norm=zeros(num_leaves),
        parameter_norm=zeros(num_leaves),
        update_average=zeros(num_leaves),
        update_growth=zeros(num_leaves),
        update_ratio=zeros(num_leaves),
        activation_rms=zeros(num_rows),
        activation_gradient_rms=zeros(num_rows),
        last_active={
            # As if active just before the first look.
            name: jnp.full((*names.stacks[name], units), -every, jnp.int32)
            for name, units in names.units.items()
        },
    )


def check_step(names: Names, loss: Any, signals: Any, trees: dict[str, PyTree]) -> None:
    """Refuses what can't be of a step of this network.

    Raises:
        TypeError: if a value is of another type.
        ValueError: if a value is of another shape or structure.
    """
    shape = getattr(loss, "shape", None)
    if shape != () or not is_inexact(loss):
        hint = "; did you forget a mean?" if shape else ""
        if isinstance(loss, tuple):
            hint = "; with has_aux=True it is the first of (loss, aux)"
        raise ValueError(
            f"monitor.update: loss must be a floating-point scalar, got {loss!r}{hint}"
        )
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
        if (found := _inexact(tree)) != names.leaves:
            differing = [f"{name} {list(shape)}" for name, shape in found]
            wanted = [f"{name} {list(shape)}" for name, shape in names.leaves]
            missing = [f"no {one}" for one in wanted if one not in differing]
            more = [one for one in differing if one not in wanted]
            raise ValueError(
                f"monitor.update: {argument} must have the floating-point leaves of the"
                f" params that monitor.init saw, got {listed(missing + more)}; was it"
                " given the same params?"
            )


def _inexact(tree: PyTree) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Returns names and shapes of the floating-point leaves."""
    named = zip(leaf_names(tree), jax.tree.leaves(tree), strict=True)
    return tuple((name, jnp.shape(leaf)) for name, leaf in named if is_inexact(leaf))
