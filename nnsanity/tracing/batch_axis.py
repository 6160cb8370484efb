"""Where outputs meet targets across different axes of the batch."""

from collections.abc import Callable, Mapping, Sequence
from itertools import permutations
from math import prod
from typing import Any, NamedTuple

import jax

from nnsanity._types import LossFn, Params, PyTree
from nnsanity.tracing import compat
from nnsanity.tracing.reach import Frame, place

NONE: frozenset = frozenset()


class Label(NamedTuple):
    """What is known of a value.

    Attributes:
        inputs: its axes along which the examples of the inputs lie.
        targets: its axes along which the examples of the targets lie.
        added: its axes that the program put in beside the others.
        sources: which of "params", "inputs" and "targets" it is computed from.
    """

    inputs: frozenset[int] = NONE
    targets: frozenset[int] = NONE
    added: frozenset[int] = NONE
    sources: frozenset[str] = NONE


class Found(NamedTuple):
    """What the walk through a program met.

    Attributes:
        places: source lines of accidental meetings, as keys in order.
        pairings: source lines of matrix products of outputs with targets, every example
            with every other, which nobody writes by accident.
    """

    places: dict[str, None]
    pairings: dict[str, None]


AxisMap = Mapping[int, int]
"""Axis of an operand -> axis of the result; axes that are left out lose their label."""

Rule = Callable[[compat.Equation], list[AxisMap]]


def meets_across_batch(
    loss_fn: LossFn, params: Params, batch: PyTree
) -> tuple[str, ...]:
    """Finds where a loss compares every output with the targets of all examples.

    Outputs of shape ``[N]`` minus targets of shape ``[N, 1]`` make ``[N, N]``: the loss
    falls a little, to that of the mean of the targets, and nothing says why.  The batch
    axis is followed as a label, so that equal lengths of unlike axes do no harm.
    Silent where both sides come from the inputs (attention, contrastive losses), where
    one side already carries the examples of the other along that axis (masks and
    weights over pairs), where outputs and targets are vectors that are paired on
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
    labels = [
        Label(sources=frozenset({"params"})) for _ in jax.tree.leaves(params)
    ]
    found = Found({}, {})
    for source, part in zip(("inputs", "targets"), batch, strict=True):
        labels += [_example_axis(source, leaf) for leaf in jax.tree.leaves(part)]
    _follow(program.jaxpr, labels, Frame(), found)
    return () if found.pairings else tuple(found.places)


def _example_axis(source: str, leaf: Any) -> Label:
    label = Label(sources=frozenset({source}))
    first = frozenset({0}) if jax.numpy.ndim(leaf) else NONE
    return label._replace(**{source: first})


def _follow(
    jaxpr: compat.Jaxpr, labels: Sequence[Label], frame: Frame, found: Found
) -> list[Label]:
    """Carries the labels of the inputs to the outputs."""
    known: dict[Any, Label] = dict(zip(jaxpr.invars, labels, strict=True))
    for eqn in jaxpr.eqns:
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
        return _lost(eqn, operands, frame, found)
    maps = rule(eqn)
    results = []
    for var in eqn.outvars:
        moved = [
            _moved(label, axes, atom.aval.shape, var.aval.shape)
            for label, axes, atom in zip(operands, maps, eqn.invars, strict=True)
        ]
        _note_meeting(eqn, moved, frame, found)
        results.append(_union(moved, _added(eqn, moved, maps)))
    return results


def _lost(
    eqn: compat.Equation, operands: Sequence[Label], frame: Frame, found: Found
) -> list[Label]:
    del frame, found
    return [Label(sources=_sources(operands))] * len(eqn.outvars)


def _sources(labels: Sequence[Label]) -> frozenset[str]:
    return NONE.union(*(label.sources for label in labels))


def _moved(
    label: Label, axes: AxisMap, before: Sequence[int], after: Sequence[int]
) -> Label:
    """Renames the axes; one that changes its length no longer holds the batch."""
    kept = {a: b for a, b in axes.items() if b < len(after) and before[a] == after[b]}
    return Label(
        frozenset(kept[axis] for axis in label.inputs if axis in kept),
        frozenset(kept[axis] for axis in label.targets if axis in kept),
        frozenset(axes[axis] for axis in label.added if axis in axes),
        label.sources,
    )


def _union(labels: Sequence[Label], added: frozenset[int]) -> Label:
    return Label(
        NONE.union(*(label.inputs for label in labels)),
        NONE.union(*(label.targets for label in labels)),
        added,
        _sources(labels),
    )


def _added(
    eqn: compat.Equation, moved: Sequence[Label], maps: Sequence[AxisMap]
) -> frozenset[int]:
    """Axes that were put in, now or before, in every operand that has axes."""
    whole = [
        label.added
        for label, atom in zip(moved, eqn.invars, strict=True)
        if atom.aval.shape
    ]
    before = frozenset.intersection(*whole) if whole else NONE
    if eqn.primitive.name not in ("broadcast_in_dim", "reshape"):
        return before
    rank = len(eqn.outvars[0].aval.shape)
    return before | (frozenset(range(rank)) - set(maps[0].values()))


def _note_meeting(
    eqn: compat.Equation, operands: Sequence[Label], frame: Frame, found: Found
) -> None:
    name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
    if name not in ELEMENTWISE and name != "dot_general":
        return
    if any(_cross(one, other) for one, other in permutations(operands, 2)):
        if name == "dot_general":
            found.pairings[place(eqn, frame)] = None
        elif not any(_paired(*two, shape) for two in permutations(operands, 2)):
            found.places[place(eqn, frame)] = None


def _cross(outputs: Label, targets: Label) -> bool:
    """Tells outputs on one axis of the batch from targets on another one."""
    return (
        outputs.sources >= {"params", "inputs"}
        and "targets" in targets.sources
        and "params" not in targets.sources
        and len(outputs.inputs) == len(targets.targets) == 1
        and not targets.targets & (outputs.inputs | outputs.targets)
        and not outputs.inputs & targets.inputs
    )


def _paired(one: Label, other: Label, shape: Sequence[int]) -> bool:
    """Tells vectors that both made room for each other: ``x[:, None] - y[None]``."""
    if not _cross(one, other):
        return False
    across = one.inputs | other.targets
    vectors = any(size > 1 for axis, size in enumerate(shape) if axis not in across)
    return vectors and one.added >= other.targets and other.added >= one.inputs


def _call(
    eqn: compat.Equation, operands: Sequence[Label], frame: Frame, found: Found
) -> list[Label]:
    bodies = [compat.opened(sub)[0] for sub in compat.sub_jaxprs(eqn)]
    fits = [
        body
        for body in bodies
        if len(body.invars) == len(eqn.invars)
        and len(body.outvars) == len(eqn.outvars)
    ]
    if len(fits) != 1:
        return _lost(eqn, operands, frame, found)
    return _follow(fits[0], operands, Frame(fits[0], eqn, frame), found)


def _scan(
    eqn: compat.Equation, operands: Sequence[Label], frame: Frame, found: Found
) -> list[Label]:
    """Keeps on the carry what every step keeps."""
    body, _ = compat.opened(eqn.params["jaxpr"])
    first = eqn.params["num_consts"]
    last = first + eqn.params["num_carry"]
    consts, carry = operands[:first], list(operands[first:last])
    inner = Frame(body, eqn, frame)
    xs = [_shifted(label, -1) for label in operands[last:]]
    while True:
        trial = Found({}, {})
        results = _follow(body, [*consts, *carry, *xs], inner, trial)
        less = list(map(_meet, carry, results[: last - first]))
        if less == carry:
            break
        carry = less
    found.places.update(trial.places)
    found.pairings.update(trial.pairings)
    return [*carry, *(_shifted(label, 1) for label in results[last - first :])]


def _shifted(label: Label, by: int) -> Label:
    """Drops the leading axis, or puts one in front."""
    parts = (label.inputs, label.targets, label.added)
    return Label(
        *(frozenset(axis + by for axis in part if axis + by >= 0) for part in parts),
        label.sources,
    )


def _meet(one: Label, other: Label) -> Label:
    """What is true of both, computed from the sources of either."""
    return Label(
        one.inputs & other.inputs,
        one.targets & other.targets,
        one.added & other.added,
        one.sources | other.sources,
    )


def _cond(
    eqn: compat.Equation, operands: Sequence[Label], frame: Frame, found: Found
) -> list[Label]:
    index, *others = operands
    results = []
    for branch in eqn.params["branches"]:
        body, _ = compat.opened(branch)
        results.append(_follow(body, others, Frame(body, eqn, frame), found))
    return [
        functools_reduce_meet(labels, index.sources)
        for labels in zip(*results, strict=True)
    ]
