"""What a monitor keeps of a training: a record, packed into a few arrays."""

from typing import NamedTuple

import jax.numpy as jnp

from nnsanity._packed import Packed, packed
from nnsanity._types import Array
from nnsanity.monitor.names import Names


class MonitorState(NamedTuple):
    """A record packed into few arrays; ``monitor.read`` unpacks it.

    Attributes:
        packed: all of the record but what follows.
        last_active: as in ``MonitorRecord``; it may be sharded as the units are.
    """

    packed: Packed
    last_active: dict[str, Array]


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


class MonitorRecord(NamedTuple):
    """What a monitor has seen: by leaf, by row and by unit.

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


def blank_state(names: Names, *, every: int) -> MonitorState:
    """Returns the state before the first step; no two of its arrays are one."""
    last_active = {
        # As if active just before the first look.
        name: jnp.full((*names.stacks[name], units), -every, jnp.int32)
        for name, units in names.units.items()
    }
    record = _blank(len(names.leaves), len(names.rows))
    return state_of(record._replace(last_active=last_active))


def state_of(record: MonitorRecord) -> MonitorState:
    """Packs a record."""
    return MonitorState(packed(record._replace(last_active={})), record.last_active)


def record_of(state: MonitorState) -> MonitorRecord:
    """Takes a state apart, on the device or on the host."""
    return state.packed.opened()._replace(last_active=state.last_active)


def _blank(num_leaves: int, num_rows: int) -> MonitorRecord:
    def zeros(*shape: int) -> Array:
        return jnp.zeros(shape, jnp.float32)

    def count(value: int) -> Array:
        return jnp.full((), value, jnp.int32)

    def flags(*shape: int) -> Array:
        return jnp.zeros(shape, jnp.bool_)

    return MonitorRecord(
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
        last_active={},
    )
