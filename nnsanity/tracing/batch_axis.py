"""Where outputs meet targets across different axes of the batch."""

from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import permutations
from typing import Any, NamedTuple

import jax

from nnsanity._types import LossFn, Params, PyTree
from nnsanity.tracing import compat
from nnsanity.tracing.axes import ELEMENTWISE, RULES, AxisMap, used
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
