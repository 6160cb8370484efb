"""Where outputs meet targets across different axes of the batch."""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from itertools import permutations
from math import prod
from typing import Any, NamedTuple

import jax

from nnsanity._types import LossFn, Params, PyTree
from nnsanity.tracing import compat
from nnsanity.tracing.reach import Frame, body_of, place


class Label(NamedTuple):
    """What is known of a value.

    Attributes:
        axes: pairs of a kind and an axis.  Along an axis of kind "inputs" or "targets"
            lie their examples; one of kind "added" was put in beside the others.
        sources: which of "params", "inputs" and "targets" it is computed from.
    """

    axes: frozenset[tuple[str, int]] = frozenset()
    sources: frozenset[str] = frozenset()

    def of(self, kind: str) -> frozenset[int]:
        """Returns the axes of one kind."""
        return frozenset(axis for one, axis in self.axes if one == kind)


Found = dict[str, bool]
"""Source line where outputs meet targets -> whether it is a matrix product, every
example with every other, which nobody writes by accident."""

AxisMap = dict[int, int]
"""Axis of an operand -> axis of the result; axes that are left out lose their label."""

Rule = Callable[[compat.Equation], list[AxisMap]]
"""One map for each operand; those that are left out at the end are empty."""


def meets_across_batch(
    loss_fn: LossFn, params: Params, batch: PyTree
) -> tuple[str, ...]:
    """Finds where a loss compares every output with the targets of all examples.

    Outputs of shape ``[N]`` minus targets of shape ``[N, 1]`` make ``[N, N]``: the loss
    falls to that of the mean of the targets, and nothing says why.  The batch axis is
    followed as a label; lengths are not compared.  Silent where both sides come from
    the inputs (attention), where one side already has the examples of the other along
    that axis (masks of pairs), where vectors or a matrix product pair the two on
    purpose (distances between samples), and where the label is lost.

    Reads the program, in time linear in its size; no arithmetic, and shapes suffice.

    Args:
        loss_fn: ``loss_fn(params, batch) -> scalar``.
        params: any pytree of arrays or ``jax.ShapeDtypeStruct``.
        batch: ``(inputs, targets)``, trees of the same whose leaves have a leading
            example axis.

    Returns:
        The lines of the user's program where it happens; empty where it does not.

    Raises:
        ValueError: where ``batch`` is not a pair.

    Example:
        >>> import jax.numpy as jnp
        >>> def loss_fn(weights, batch):
        ...     inputs, targets = batch
        ...     return jnp.mean((inputs @ weights - targets) ** 2)
        >>> inputs, weights = jnp.ones((8, 3)), jnp.ones(3)
        >>> len(meets_across_batch(loss_fn, weights, (inputs, jnp.ones((8, 1)))))
        1
        >>> meets_across_batch(loss_fn, weights, (inputs, jnp.ones(8)))
        ()
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ValueError(
            "meets_across_batch: batch must be a pair (inputs, targets), got "
            f"{type(batch).__name__}"
        )
    program = compat.trace(loss_fn, params, batch)
    labels = [Label(sources=frozenset({"params"})) for _ in jax.tree.leaves(params)]
    for source, part in zip(("inputs", "targets"), batch, strict=True):
        labels += [_example_axis(source, leaf) for leaf in jax.tree.leaves(part)]
    found: Found = {}
    _follow(program.jaxpr, labels, Frame(), found)
    return () if any(found.values()) else tuple(found)


def _example_axis(source: str, leaf: Any) -> Label:
    axes = frozenset({(source, 0)} if jax.numpy.ndim(leaf) else ())
    return Label(axes, frozenset({source}))


def _follow(
    jaxpr: compat.Jaxpr, labels: Sequence[Label], frame: Frame, found: Found
) -> list[Label]:
    """Carries the labels of the inputs to the outputs."""
    known: dict[Any, Label] = dict(zip(jaxpr.invars, labels, strict=True))
    for eqn in used(jaxpr):
        operands = [_label_of(atom, known) for atom in eqn.invars]
        step = CALLS.get(eqn.primitive.name, _apply)
        results = step(eqn, operands, frame, found)
        known.update(zip(eqn.outvars, results, strict=True))
    return [_label_of(atom, known) for atom in jaxpr.outvars]


def used(jaxpr: compat.Jaxpr) -> list[compat.Equation]:
    """Returns the equations that the outputs need; a metric beside them is no loss."""
    needed = {atom for atom in jaxpr.outvars if not compat.is_literal(atom)}
    used = []
    for eqn in reversed(jaxpr.eqns):
        if not needed.isdisjoint(eqn.outvars):
            used.append(eqn)
            needed |= {atom for atom in eqn.invars if not compat.is_literal(atom)}
    return used[::-1]


def _label_of(atom: compat.Atom, known: Mapping[Any, Label]) -> Label:
    return Label() if compat.is_literal(atom) else known.get(atom, Label())


def _apply(
    eqn: compat.Equation, operands: Sequence[Label], frame: Frame, found: Found
) -> list[Label]:
    """Any operation that runs no program of its own."""
    rule = RULES.get(eqn.primitive.name)
    if rule is None:
        return _lost(eqn, operands)
    maps = rule(eqn)
    maps += [{}] * (len(operands) - len(maps))
    results = []
    for var in eqn.outvars:
        moved = [
            _moved(label, axes, atom.aval.shape, var.aval.shape)
            for label, axes, atom in zip(operands, maps, eqn.invars, strict=True)
        ]
        _note_meeting(eqn, moved, frame, found)
        axes = frozenset().union(*(label.axes for label in moved))
        kept = frozenset(one for one in axes if one[0] != "added")
        results.append(Label(kept | _added(eqn, moved, maps), _sources(moved)))
    return results


def _lost(eqn: compat.Equation, operands: Sequence[Label]) -> list[Label]:
    return [Label(sources=_sources(operands))] * len(eqn.outvars)


def _sources(labels: Sequence[Label]) -> frozenset[str]:
    return frozenset().union(*(label.sources for label in labels))


def _moved(
    label: Label, axes: AxisMap, before: Sequence[int], after: Sequence[int]
) -> Label:
    """Renames the axes; one that changes its length no longer holds the batch."""
    kept = frozenset(
        (kind, axes[axis])
        for kind, axis in label.axes
        if axis in axes and (kind == "added" or before[axis] == after[axes[axis]])
    )
    return Label(kept, label.sources)


def _added(
    eqn: compat.Equation, moved: Sequence[Label], maps: Sequence[AxisMap]
) -> frozenset[tuple[str, int]]:
    """Axes that were put in, now or before, in every operand that has axes."""
    arrays = zip(moved, eqn.invars, strict=True)
    whole = [label.of("added") for label, atom in arrays if atom.aval.shape]
    added = frozenset.intersection(*whole) if whole else frozenset()
    if eqn.primitive.name in ("broadcast_in_dim", "reshape"):
        rank = len(eqn.outvars[0].aval.shape)
        added |= frozenset(range(rank)) - set(maps[0].values())
    return frozenset(("added", axis) for axis in added)


def _note_meeting(
    eqn: compat.Equation, operands: Sequence[Label], frame: Frame, found: Found
) -> None:
    product, shape = eqn.primitive.name == "dot_general", eqn.outvars[0].aval.shape
    if not product and eqn.primitive.name not in ELEMENTWISE:
        return
    pairs = [two for two in permutations(operands, 2) if _cross(*two)]
    if any(product or not _paired(*two, shape) for two in pairs):
        found[place(eqn, frame)] = product


def _cross(outputs: Label, targets: Label) -> bool:
    """Tells outputs on one axis of the batch from targets on another one."""
    along, across = outputs.of("inputs"), targets.of("targets")
    return (
        outputs.sources >= {"params", "inputs"}
        and "params" not in targets.sources
        and len(along) == len(across) == 1
        and not across & (along | outputs.of("targets"))
        and not along & targets.of("inputs")
    )


def _paired(outputs: Label, targets: Label, shape: Sequence[int]) -> bool:
    """Tells vectors that both made room for each other: ``x[:, None] - y[None]``."""
    along, across = outputs.of("inputs"), targets.of("targets")
    vectors = any(
        size > 1 for axis, size in enumerate(shape) if axis not in along | across
    )
    return vectors and outputs.of("added") >= across and targets.of("added") >= along


def _call(
    eqn: compat.Equation, operands: Sequence[Label], frame: Frame, found: Found
) -> list[Label]:
    body = body_of(eqn)
    if body is None:
        return _lost(eqn, operands)
    return _follow(body, operands, Frame(body, eqn, frame), found)


def _scan(
    eqn: compat.Equation, operands: Sequence[Label], frame: Frame, found: Found
) -> list[Label]:
    """Keeps on the carry what every step keeps."""
    body, _ = compat.opened(eqn.params["jaxpr"])
    first, last = compat.carried(eqn, body)
    consts, carry = operands[:first], list(operands[first:last])
    xs = [_shifted(label, -1) for label in operands[last:]]
    while True:
        trial: Found = {}
        results = _follow(body, [*consts, *carry, *xs], Frame(body, eqn, frame), trial)
        less = list(map(_meet, carry, results[: last - first]))
        if less == carry:
            break
        carry = less
    found.update(trial)
    return [*carry, *(_shifted(label, 1) for label in results[last - first :])]


def _shifted(label: Label, by: int) -> Label:
    """Drops the leading axis, or puts one in front."""
    axes = ((kind, axis + by) for kind, axis in label.axes)
    return label._replace(axes=frozenset(one for one in axes if one[1] >= 0))


def _meet(one: Label, other: Label) -> Label:
    """What is true of both; constants, such as a first state of zeros, fit anything."""
    if not one.sources or not other.sources:
        return one if one.sources else other
    return Label(one.axes & other.axes, one.sources | other.sources)


def _cond(
    eqn: compat.Equation, operands: Sequence[Label], frame: Frame, found: Found
) -> list[Label]:
    index, *others = operands
    results = []
    for branch in eqn.params["branches"]:
        body, _ = compat.opened(branch)
        results.append(_follow(body, others, Frame(body, eqn, frame), found))
    chosen = [reduce(_meet, labels) for labels in zip(*results, strict=True)]
    return [one._replace(sources=one.sources | index.sources) for one in chosen]


CALLS = {
    **dict.fromkeys({*compat.CALLS, "custom_vmap_call", "shard_map"}, _call),
    "scan": _scan,
    "cond": _cond,
}
"""Operations that run a program of their own."""


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
