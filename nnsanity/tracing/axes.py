"""Where the axes of operands end up, operation by operation."""

from collections.abc import Callable
from math import prod

from nnsanity.tracing import compat

AxisMap = dict[int, int]
"""Axis of an operand -> axis of the result; axes that are left out lose their label."""

Rule = Callable[[compat.Equation], list[AxisMap]]
"""One map for each operand; those that are left out at the end are empty."""


def used(jaxpr: compat.Jaxpr) -> list[compat.Equation]:
    """Returns the equations that the outputs need; a metric beside them is no loss."""
    needed = {atom for atom in jaxpr.outvars if not compat.is_literal(atom)}
    used = []
    for eqn in reversed(jaxpr.eqns):
        if not needed.isdisjoint(eqn.outvars):
            used.append(eqn)
            needed |= {atom for atom in eqn.invars if not compat.is_literal(atom)}
    return used[::-1]


def _same(eqn: compat.Equation) -> list[AxisMap]:
    """Axes stay; a scalar beside an array has none."""
    rank = len(eqn.outvars[0].aval.shape)
    axes = {axis: axis for axis in range(rank)}
    return [axes if len(atom.aval.shape) == rank else {} for atom in eqn.invars]


def _same_but(eqn: compat.Equation) -> list[AxisMap]:
    """Axes stay but for those that the equation works along."""
    named = named_axes(eqn)
    return [{a: b for a, b in axes.items() if a not in named} for axes in _same(eqn)]


def _without(eqn: compat.Equation) -> list[AxisMap]:
    """The axes that the equation names are gone, the others close up."""
    rank, named = len(eqn.invars[0].aval.shape), named_axes(eqn)
    kept = [axis for axis in range(rank) if axis not in named]
    axes = {axis: at for at, axis in enumerate(kept)}
    return [axes if len(atom.aval.shape) == rank else {} for atom in eqn.invars]


def named_axes(eqn: compat.Equation) -> set[int]:
    """Returns the axes that an equation works along."""
    names = ("axes", "axis", "dimensions", "dimension")
    last = len(eqn.invars[0].aval.shape) - 1
    named = next((eqn.params[name] for name in names if name in eqn.params), last)
    return set(named) if isinstance(named, tuple | list) else {named}


def _first_only(eqn: compat.Equation) -> list[AxisMap]:
    """The first operand keeps its axes; indices, fillers and updates say nothing."""
    return _same(eqn)[:1]


def _broadcast(eqn: compat.Equation) -> list[AxisMap]:
    return [dict(enumerate(eqn.params["broadcast_dimensions"]))]


def _stack(eqn: compat.Equation) -> list[AxisMap]:
    axes, new = range(len(eqn.invars[0].aval.shape)), eqn.params["axis"]
    return [{axis: axis + (axis >= new) for axis in axes} for _ in eqn.invars]


def _transpose(eqn: compat.Equation) -> list[AxisMap]:
    return [{axis: at for at, axis in enumerate(eqn.params["permutation"])}]


def _reshape(eqn: compat.Equation) -> list[AxisMap]:
    """An axis stays where it has the same length and as much before it."""
    before, after = _strides(eqn.invars[0]), _strides(eqn.outvars[0])
    return [{axis: after[key] for key, axis in before.items() if key in after}]


def _strides(atom: compat.Atom) -> dict[tuple[int, int], int]:
    shape = atom.aval.shape
    return {
        (prod(shape[:axis]), size): axis for axis, size in enumerate(shape) if size > 1
    }


def _dot(eqn: compat.Equation) -> list[AxisMap]:
    contracted, batched = eqn.params["dimension_numbers"]
    maps: list[AxisMap] = []
    offset = len(batched[0])
    for atom, summed, shared in zip(eqn.invars, contracted, batched, strict=False):
        rank = len(atom.aval.shape)
        free = [axis for axis in range(rank) if axis not in {*summed, *shared}]
        maps.append({axis: at for at, axis in enumerate(shared)})
        maps[-1] |= {axis: offset + at for at, axis in enumerate(free)}
        offset += len(free)
    return maps


def _conv(eqn: compat.Equation) -> list[AxisMap]:
    numbers = eqn.params["dimension_numbers"]
    return [{numbers.lhs_spec[0]: numbers.out_spec[0]}]


def _gather(eqn: compat.Equation) -> list[AxisMap]:
    numbers = eqn.params["dimension_numbers"]
    before, after = (range(len(x.aval.shape)) for x in (eqn.invars[0], *eqn.outvars))
    looked_up = [axis for axis in after if axis not in numbers.offset_dims]
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = [axis for axis in before if axis not in gone]
    batching = zip(
        numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True
    )
    from_operand = dict(zip(kept, numbers.offset_dims, strict=True))
    from_operand |= {axis: looked_up[at] for axis, at in batching}
    return [from_operand, dict(enumerate(looked_up))]


ELEMENTWISE = frozenset(
    {
        *("abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan"),
        *("atan2", "atanh", "cbrt", "ceil", "clamp", "convert_element_type", "copy"),
        *("cos", "cosh", "digamma", "div", "eq", "erf", "erf_inv", "erfc", "exp"),
        *("exp2", "expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le"),
        *("lgamma", "log", "log1p", "log2", "logistic", "lt", "max", "min", "mul"),
        *("name", "ne", "neg", "not", "one_minus_square", "or", "pow", "pvary", "real"),
        *("reduce_precision", "rem", "reshard", "round", "rsqrt", "select_n", "sign"),
        *("sharding_constraint", "sin", "sinh", "sqrt", "square", "stop_gradient"),
        *("sub", "tan", "tanh", "xor"),
    }
)
"""Operations on one element of every operand at a time."""

RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _same),
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min", "reduce"), _without),
    **dict.fromkeys(("reduce_prod", "reduce_or", "argmax", "argmin"), _without),
    **dict.fromkeys(("squeeze", "unstack"), _without),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "sort"), _same_but),
    **dict.fromkeys(("rev", "top_k", "split", "concatenate"), _same_but),
    **dict.fromkeys(("slice", "dynamic_slice", "dynamic_update_slice"), _first_only),
    **dict.fromkeys(("pad", "tile", "scatter", "scatter-add"), _first_only),
    **dict.fromkeys(("reduce_window_sum", "reduce_window_max"), _first_only),
    "broadcast_in_dim": _broadcast,
    "stack": _stack,
    "reshape": _reshape,
    "transpose": _transpose,
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "gather": _gather,
}
"""Where the axes of operands end up; behind any other operation they are not known."""
