"""Where the examples of a batch change each other's outputs."""

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax
import numpy as np

from nnsanity._types import LossFn, Params, PyTree
from nnsanity.tracing import compat
from nnsanity.tracing.axes import RULES, used
from nnsanity.tracing.reach import Frame, body_of, place


class Mark(NamedTuple):
    """What is known of a value.

    Attributes:
        axes: those along which the examples lie.
        learned: whether it depends on the parameters.
        mixed: whether it is made from several examples and the parameters.
    """

    axes: frozenset[int] = frozenset()
    learned: bool = False
    mixed: bool = False


def coupled_lines(loss_fn: LossFn, params: Params, batch: PyTree) -> tuple[str, ...]:
    """Finds where a network computes an example with the help of the others.

    What is reduced over the examples, such as the mean of batch normalization, meets
    single examples again; or every example meets every other one, as in a contrastive
    loss.  Only where parameters take part: weights of the examples that add up to one
    couple nothing.  Silent where the axis of the examples can't be followed.

    Reads the program, in time linear in its size; no arithmetic, and shapes suffice.

    Args:
        loss_fn: ``loss_fn(params, batch) -> scalar``.
        params: any pytree of arrays or ``jax.ShapeDtypeStruct``.
        batch: any pytree of the same, leading axis the examples.

    Returns:
        The lines of the user's program where it happens, the first one first.

    Example:
        >>> import jax.numpy as jnp
        >>> def loss_fn(weights, inputs):
        ...     outputs = inputs @ weights
        ...     return jnp.mean((outputs - jnp.mean(outputs, 0)) ** 2)
        >>> len(coupled_lines(loss_fn, jnp.ones((3, 2)), jnp.ones((8, 3))))
        1
    """
    program = compat.trace(loss_fn, params, batch)
    marks = [Mark(learned=True) for _ in jax.tree.leaves(params)]
    marks += [
        Mark(frozenset({0} if np.ndim(leaf) else ())) for leaf in jax.tree.leaves(batch)
    ]
    found: dict[str, None] = {}
    _follow(program.jaxpr, marks, Frame(), found)
    return tuple(found)


def _follow(
    jaxpr: compat.Jaxpr, marks: Sequence[Mark], frame: Frame, found: dict[str, None]
) -> list[Mark]:
    known: dict[Any, Mark] = dict(zip(jaxpr.invars, marks, strict=True))

    def mark_of(atom: compat.Atom) -> Mark:
        return Mark() if compat.is_literal(atom) else known.get(atom, Mark())

    for eqn in used(jaxpr):
        operands = [mark_of(atom) for atom in eqn.invars]
        rule = _CONTROL.get(eqn.primitive.name, _call)
        known |= dict(zip(eqn.outvars, rule(eqn, operands, frame, found), strict=True))
    return [mark_of(atom) for atom in jaxpr.outvars]


def _call(
    eqn: compat.Equation,
    operands: Sequence[Mark],
    frame: Frame,
    found: dict[str, None],
) -> list[Mark]:
    is_call = eqn.primitive.name in compat.CALLS or eqn.primitive.name == "shard_map"
    body = body_of(eqn) if is_call else None
    if body is not None:
        return _follow(body, operands, Frame(body, eqn, frame), found)
    return _apply(eqn, operands, frame, found)


def _apply(
    eqn: compat.Equation,
    operands: Sequence[Mark],
    frame: Frame,
    found: dict[str, None],
) -> list[Mark]:
    """Any operation that runs no program of its own."""
    learned = any(one.learned for one in operands)
    mixed = any(one.mixed for one in operands)
    rule = _AXES.get(eqn.primitive.name)
    if rule is None:
        return [Mark(frozenset(), learned, mixed)] * len(eqn.outvars)
    maps = rule(eqn)
    maps += [{}] * (len(operands) - len(maps))
    results = []
    for var in eqn.outvars:
        moved = [
            _moved(mark, axes, atom.aval.shape, var.aval.shape)
            for mark, axes, atom in zip(operands, maps, eqn.invars, strict=True)
        ]
        axes = frozenset().union(*moved)
        meets = any(
            one.mixed and any(rows for index, rows in enumerate(moved) if index != own)
            for own, one in enumerate(operands)
        )
        if learned and (len(axes) > 1 or meets):
            found.setdefault(place(eqn, frame))
        results.append(Mark(axes, learned, mixed or _mixes(eqn, operands, axes)))
    return results


def _moved(
    mark: Mark, axes: dict[int, int], before: Sequence[int], after: Sequence[int]
) -> frozenset[int]:
    """Renames the axes; one that changes its length no longer holds the batch."""
    return frozenset(
        axes[axis]
        for axis in mark.axes
        if axis in axes and before[axis] == after[axes[axis]]
    )


_AXES = RULES | dict.fromkeys(("psum", "pmax", "pmin"), RULES["reduce_sum"])
"""Where axes end up; vmap turns sums over its axis into sums over numbered ones."""

_SUMS = frozenset(
    {
        *("psum", "pmax", "pmin"),
        *("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "dot_general"),
        *("cumsum", "cumprod", "cummax", "cummin", "sort"),
    }
)
"""Operations that lose the axis of the examples by joining them."""


def _mixes(
    eqn: compat.Equation, operands: Sequence[Mark], axes: frozenset[int]
) -> bool:
    is_sum = eqn.primitive.name in _SUMS and not axes
    return (
        is_sum
        and any(one.axes for one in operands)
        and any(one.learned for one in operands)
    )


def _scan(
    eqn: compat.Equation,
    operands: Sequence[Mark],
    frame: Frame,
    found: dict[str, None],
) -> list[Mark]:
    """Keeps of the carry what every turn keeps."""
    body, _ = compat.opened(eqn.params["jaxpr"])
    first, last = compat.carried(eqn, body)
    fixed, carry = operands[:first], list(operands[first:last])
    xs = [_shifted(mark, -1) for mark in operands[last:]]
    while True:
        seen: dict[str, None] = {}
        results = _follow(body, [*fixed, *carry, *xs], Frame(body, eqn, frame), seen)
        after = list(map(_both, carry, results[: last - first]))
        if after == carry:
            break
        carry = after
    found |= seen
    return [*carry, *(_shifted(mark, 1) for mark in results[last - first :])]


def _shifted(mark: Mark, by: int) -> Mark:
    """Drops the leading axis, or puts one in front."""
    axes = frozenset(axis + by for axis in mark.axes)
    return mark._replace(axes=frozenset(axis for axis in axes if axis >= 0))


def _both(one: Mark, other: Mark) -> Mark:
    """What is true of both; a start that is constant fits anything."""
    axes = one.axes & other.axes if one.axes else other.axes
    return Mark(axes, one.learned or other.learned, one.mixed or other.mixed)


def _cond(
    eqn: compat.Equation,
    operands: Sequence[Mark],
    frame: Frame,
    found: dict[str, None],
) -> list[Mark]:
    _, *others = operands
    results = []
    for branch in eqn.params["branches"]:
        body, _ = compat.opened(branch)
        results.append(_follow(body, others, Frame(body, eqn, frame), found))
    return [reduce(_both, marks) for marks in zip(*results, strict=True)]


_CONTROL = {"scan": _scan, "cond": _cond}
