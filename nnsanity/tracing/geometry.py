"""Which operand of a contraction is the weight, its fans, and where its units lie."""

import math
from typing import NamedTuple

from nnsanity.tracing.compat import Equation
from nnsanity.tracing.operations import LOOK_UPS, is_look_up
from nnsanity.tracing.steps import Step, Steps


class Geometry(NamedTuple):
    """A contraction or look-up of a parameter.

    Attributes:
        kind: ``"dense"``, ``"conv"`` or ``"embedding"``.
        weight: number of the value made from parameters.
        operand: number of the value that meets it.
        fan_in: terms in each sum.
        fan_out: outputs that each input takes part in.
        units: output units, or channels.
        axes: which axes of the result are units.
    """

    kind: str
    weight: int
    operand: int
    fan_in: int
    fan_out: int
    units: int
    axes: tuple[int, ...]


def weight_geometry(steps: Steps, step: Step) -> Geometry | None:
    """Describes a contraction of a parameter with data; None for any other step."""
    rule = _RULES.get(step.eqn.primitive.name)
    if rule is None or len(step.inputs) < 2:
        return None
    first, second, *others = step.inputs
    pairs = [(0, first, second), (1, second, first)]
    is_inner = step.path in steps.inner_layers
    if is_inner:  # both may be weights; the second is what is usually learned
        pairs.reverse()
    if step.eqn.primitive.name in LOOK_UPS:  # of one index among several
        pairs = [(0, first, other) for other in (second, *others)]
    for position, weight, operand in pairs:
        if weight is None or operand is None or not steps.is_weight(weight):
            continue
        met = steps.origins[operand]
        if step.eqn.primitive.name in LOOK_UPS and not is_look_up(
            step.eqn, by_data=met.data
        ):
            continue
        if is_inner or met.data or (met.other and not met.parameters):
            return rule(steps, step.eqn, position, weight, operand)
    return None


def _dense(
    steps: Steps, eqn: Equation, position: int, weight: int, operand: int
) -> Geometry:
    contracted, batch = eqn.params["dimension_numbers"]
    shape = steps.avals[weight].shape
    other = steps.avals[operand].shape
    fan_in = math.prod(shape[axis] for axis in contracted[position])
    used = {*contracted[position], *batch[position]}
    free = [size for axis, size in enumerate(shape) if axis not in used]
    repeated = _repeated(steps, weight)
    own = [index for index, axis in enumerate(batch[position]) if axis not in repeated]
    num_batch = len(batch[position])
    num_other = len(other) - len(contracted[1 - position]) - num_batch
    first = num_batch + (num_other if position == 1 else 0)
    axes = (*own, *range(first, first + len(free)))
    units = math.prod(free) * math.prod(shape[batch[position][index]] for index in own)
    return Geometry("dense", weight, operand, fan_in, math.prod(free), units, axes)


def _repeated(steps: Steps, weight: int) -> set[int]:
    """Returns the axes along which a weight is only repeated, as vmap does."""
    maker = steps.makers.get(steps.roots.get(weight, weight))
    if maker is None or maker.eqn.primitive.name != "broadcast_in_dim":
        return set()
    kept = maker.eqn.params["broadcast_dimensions"]
    return {*range(len(steps.avals[weight].shape))} - {*kept}


def _conv(
    steps: Steps, eqn: Equation, position: int, weight: int, operand: int
) -> Geometry | None:
    if position == 0:
        return None
    numbers = eqn.params["dimension_numbers"]
    shape = steps.avals[weight].shape
    units, per_group, *window = (shape[axis] for axis in numbers.rhs_spec)
    size = math.prod(window)
    fan_out = units * size // eqn.params["feature_group_count"]
    axes = (numbers.out_spec[1],)
    return Geometry("conv", weight, operand, per_group * size, fan_out, units, axes)


def _ragged(
    steps: Steps, eqn: Equation, position: int, weight: int, operand: int
) -> Geometry | None:
    """Experts in one array, each for some of the rows."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    if position == 0 or len(numbers.rhs_group_dimensions) != 1:
        return None
    contracted, batch = numbers.dot_dimension_numbers
    shape = steps.avals[weight].shape
    used = {*contracted[1], *batch[1], *numbers.rhs_group_dimensions}
    free = [size for axis, size in enumerate(shape) if axis not in used]
    ndim = len(eqn.outvars[0].aval.shape)
    axes = (*range(len(batch[1])), *range(ndim - len(free), ndim))
    fan_in = math.prod(shape[axis] for axis in contracted[1])
    units = math.prod(free) * math.prod(shape[axis] for axis in batch[1])
    return Geometry("dense", weight, operand, fan_in, math.prod(free), units, axes)


def _embedding(
    steps: Steps, eqn: Equation, position: int, weight: int, operand: int
) -> Geometry | None:
    shape = steps.avals[weight].shape
    if position == 1 or len(shape) < 2:
        return None
    if eqn.primitive.name == "gather":
        axes = tuple(eqn.params["dimension_numbers"].offset_dims)
    else:
        sizes = eqn.params["slice_sizes"]
        axes = tuple(axis for axis, size in enumerate(sizes) if size == shape[axis])
    result = eqn.outvars[0].aval.shape
    units = math.prod(result[axis] for axis in axes)
    return Geometry("embedding", weight, operand, 1, units, units, axes)


_RULES = {
    "dot_general": _dense,
    "ragged_dot_general": _ragged,
    "conv_general_dilated": _conv,
    "gather": _embedding,
    "dynamic_slice": _embedding,
}


def moved_axes(eqn: Equation, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """Follows axes through an operation that only moves numbers; None if they split."""
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    name = eqn.primitive.name
    if name == "transpose":
        permutation = eqn.params["permutation"]
        return tuple(permutation.index(axis) for axis in axes)
    if name == "broadcast_in_dim":
        return tuple(eqn.params["broadcast_dimensions"][axis] for axis in axes)
    if old == new:
        return axes
    return _through_reshape(old, new, axes)


def _through_reshape(
    old: tuple[int, ...], new: tuple[int, ...], axes: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Finds each axis again as one with equal size and equal number before it."""
    starts = {
        (math.prod(new[:axis]), size): axis
        for axis, size in reversed([*enumerate(new)])
    }
    found = tuple(starts.get((math.prod(old[:axis]), old[axis])) for axis in axes)
    if None not in found:
        return tuple(axis for axis in found if axis is not None)
    # Positions and channels laid out as one axis, channels last.
    is_flattened = axes == (len(old) - 1,) and len(new) == 2 and old[0] == new[0]
    return (1,) if is_flattened else None
