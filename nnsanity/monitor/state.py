"""What a monitor keeps of a training, and the names that go with it."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnsanity._tree import is_inexact, leaf_names
from nnsanity._types import Array, LossFn, Params, PyTree
from nnsanity.findings import listed
from nnsanity.quantities.units import is_thresholded
from nnsanity.signals import Signals
from nnsanity.tracing.layers import inspect

Leaves = tuple[tuple[str, tuple[int, ...]], ...]


class Nonfinite(NamedTuple):
    """What was NaN or infinite in the first step that had any.

    Squares are summed in float32: a norm beyond 1e19 counts as infinite.

    Attributes:
        step: int32[]; healthy is -1, none.
        watched: bool[], whether the layers were looked at in that step.
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


class GradientNoise(NamedTuple):
    """What microbatches tell of a batch's gradient, over about 100 watched steps.

    The share of ``noise`` in ``square_norm`` is 0.5 where the batch is as large as the
    noise scale; the noise scale is share / (1 - share) batches.

    Attributes:
        num_steps: int32[], those that gave microbatches.
        square_norm: float32[], of the batch's gradient, its noise included.
        noise: float32[], expected square of the noise in it.
    """

    num_steps: Array
    square_norm: Array
    noise: Array


class Validation(NamedTuple):
    """The loss on examples that are not trained on.

    Attributes:
        num_evaluations: int32[].
        step: int32[], of the last; -1 is none.
        loss: float32[], last.
        first: float32[].
        lowest: float32[]; healthy is near ``loss``.
        lowest_step: int32[], its step.
        training: float32[], average of the training loss at that step.
        length: int32[], evaluations in a row that were clearly above the lowest.
    """

    num_evaluations: Array
    step: Array
    loss: Array
    first: Array
    lowest: Array
    lowest_step: Array
    training: Array
    length: Array


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
        loss_start: float32[], the first one that was finite; NaN before.
        loss_average: float32[], over about 50 steps, outliers clipped; should fall.
        loss_spread: float32[], root mean square of the distance from it.
        lowest_average: float32[]; healthy is near ``loss_average``.
        lowest_step: int32[], its step.
        spike: ``Spike``.
        validation: ``Validation``.
        nonfinite: ``Nonfinite``.
        gradient_norm: float32[leaves], last.
        clipped_share: float32[], of watched steps with a gradient above ``clip_norm``;
            near 1 the clipping sets the step, not the gradient.
        gradient_noise: ``GradientNoise``.
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
    validation: Validation
    nonfinite: Nonfinite
    gradient_norm: Array
    clipped_share: Array
    gradient_noise: GradientNoise
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
        loss_start=zeros() + jnp.nan,
        loss_average=zeros(),
        loss_spread=zeros(),
        lowest_average=zeros(),
        lowest_step=count(0),
        spike=Spike(count(-1), count(0), zeros(), count(0), zeros()),
        validation=Validation(
            num_evaluations=count(0),
            step=count(-1),
            loss=zeros(),
            first=zeros(),
            lowest=zeros(),
            lowest_step=count(-1),
            training=zeros(),
            length=count(0),
        ),
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
        clipped_share=zeros(),
        gradient_noise=GradientNoise(count(0), zeros(), zeros()),
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


def check_scalar(function: str, argument: str, value: Any) -> None:
    """Refuses a loss that is no number.

    Raises:
        ValueError: if it is not a floating-point scalar.
    """
    shape = getattr(value, "shape", None)
    if shape == () and is_inexact(value):
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
