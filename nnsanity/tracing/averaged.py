"""How many gradient terms a step averages for each parameter."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from nnsanity._tree import is_inexact, leaf_names
from nnsanity._types import LossFn, Params, PyTree
from nnsanity.tracing import compat
from nnsanity.tracing.axes import ELEMENTWISE, used
from nnsanity.tracing.reach import body_of


class Part(NamedTuple):
    """What a value holds of parameters and data.

    Attributes:
        copies: for each leaf of the parameters that it is made of, how often each of
            its elements is in it; empty once it has met data.
        data: whether it is made of the batch.
    """

    copies: Mapping[int, float] = {}
    data: bool = False


Terms = dict[int, float]
"""Leaf of the parameters -> uses of each of its elements."""


def averaged_terms(loss_fn: LossFn, params: Params, batch: PyTree) -> dict[str, float]:
    """Counts the gradient terms that one step averages, for each parameter.

    What counts for the noise of a gradient is not the batch alone: a dense layer is
    used once for each example, a recurrent one once for each example and step, a
    convolution once for each example and place, so that "twice the resolution is four
    times the batch" (D. Holden).  Compare the numbers with those of a setting that
    works; worry where they differ by a factor of 100 among the layers of one network.

    Reads the program, in time linear in its size; no arithmetic, and shapes suffice.

    Args:
        loss_fn: ``loss_fn(params, batch) -> scalar``.
        params: any pytree of arrays or ``jax.ShapeDtypeStruct``.
        batch: any pytree of the same.

    Returns:
        A number for each inexact leaf, named as ``ns.leaf_names`` does: how often one
        of its elements meets data, on average over them and summed over all uses; of a
        table that is looked up in, the number of look-ups.  0 for a leaf that meets
        none, NaN inside of a ``while`` loop or a ``shard_map``, whose turns and devices
        are not counted.

    Example:
        >>> import jax.numpy as jnp
        >>> def loss_fn(params, sequences):
        ...     states = jnp.tanh(sequences @ params["first"])
        ...     return jnp.mean(jnp.mean(states, axis=1) @ params["second"])
        >>> params = {"first": jnp.ones((3, 5)), "second": jnp.ones((5, 2))}
        >>> averaged_terms(loss_fn, params, jnp.ones((8, 10, 3)))
        {'first': 80.0, 'second': 8.0}
    """
    program = compat.trace(loss_fn, params, batch)
    leaves = jax.tree.leaves(params)
    known = [Part({index: 1.0}) for index in range(len(leaves))]
    known += [Part(data=True)] * len(jax.tree.leaves(batch))
    terms: Terms = defaultdict(float)
    _follow(program.jaxpr, known, terms)
    named = zip(leaf_names(params), leaves, strict=True)
    return {
        name: terms[index]
        for index, (name, leaf) in enumerate(named)
        if is_inexact(leaf)
    }


def _follow(jaxpr: compat.Jaxpr, operands: Sequence[Part], terms: Terms) -> list[Part]:
    known: dict[Any, Part] = dict(zip(jaxpr.invars, operands, strict=True))

    def part_of(atom: compat.Atom) -> Part:
        return Part() if compat.is_literal(atom) else known.get(atom, Part())

    for eqn in used(jaxpr):
        parts = [part_of(atom) for atom in eqn.invars]
        control = _CONTROL.get(eqn.primitive.name)
        if control is not None:
            results = control(eqn, parts, terms)
        elif (body := body_of(eqn)) is not None:
            results = _follow(body, parts, terms)
        else:
            results = _apply(eqn, parts, terms)
        known.update(zip(eqn.outvars, results, strict=True))
    return [part_of(atom) for atom in jaxpr.outvars]


def _apply(eqn: compat.Equation, parts: Sequence[Part], terms: Terms) -> list[Part]:
    """Any operation that runs no program of its own."""
    if any(part.data for part in parts):
        for index, part in enumerate(parts):
            for leaf, copies in part.copies.items():
                count = copies * _uses(eqn, index)
                terms[leaf] += 0.0 if count < 1 else count  # a share of a penalty
        return [Part(data=True)] * len(eqn.outvars)
    results = []
    for var in eqn.outvars:
        held: Terms = {}
        for atom, part in zip(eqn.invars, parts, strict=True):
            factor = _repeats(eqn, atom, var)
            for leaf, copies in part.copies.items():
                held[leaf] = max(held.get(leaf, 0.0), copies * factor)
        results.append(Part(held))
    return results


def _uses(eqn: compat.Equation, index: int) -> float:
    """How often each element of an operand meets data in an operation."""
    name, operand = eqn.primitive.name, eqn.invars[index]
    size, out = _size(operand), _size(eqn.outvars[0])
    if name == "dot_general":
        axes = eqn.params["dimension_numbers"][0][index]
        return out * math.prod(operand.aval.shape[axis] for axis in axes) / size
    if name == "conv_general_dilated" and index == 1:
        features = eqn.params["dimension_numbers"].out_spec[1]
        return out / eqn.outvars[0].aval.shape[features]
    if name == "ragged_dot_general" and index == 1:
        return out * eqn.invars[0].aval.shape[-1] / size
    if name == "gather":
        return out / max(math.prod(eqn.params["slice_sizes"]), 1)
    return out / size if name in ELEMENTWISE else 1.0


def _repeats(eqn: compat.Equation, operand: compat.Atom, result: compat.Atom) -> float:
    """How often an operation on weights alone repeats each of their elements."""
    name = eqn.primitive.name
    is_reduced = name.startswith("reduce_") and name != "reduce_precision"
    if name == "broadcast_in_dim" or is_reduced or name in ELEMENTWISE:
        return _size(result) / _size(operand)
    return 1.0


def _size(atom: compat.Atom) -> int:
    return max(math.prod(atom.aval.shape), 1)


def _times(part: Part, factor: float) -> Part:
    return Part({leaf: one * factor for leaf, one in part.copies.items()}, part.data)


def _scan(eqn: compat.Equation, parts: Sequence[Part], terms: Terms) -> list[Part]:
    """What is not scanned over is used in every turn."""
    body, _ = compat.opened(eqn.params["jaxpr"])
    first, last = compat.carried(eqn, body)
    length = eqn.params["length"]
    consts = [_times(part, length) for part in parts[:first]]
    carry = [_times(part, length) for part in parts[first:last]]
    while True:
        trial: Terms = defaultdict(float)
        results = _follow(body, [*consts, *carry, *parts[last:]], trial)
        pairs = list(zip(carry, results, strict=False))
        more = [new if new.data and not old.data else old for old, new in pairs]
        if more == carry:
            break
        carry = more
    _add(terms, trial)
    return results


def _cond(eqn: compat.Equation, parts: Sequence[Part], terms: Terms) -> list[Part]:
    """The branch that uses a parameter most."""
    most: Terms = {}
    results = []
    for branch in eqn.params["branches"]:
        trial: Terms = defaultdict(float)
        results.append(_follow(compat.opened(branch)[0], parts[1:], trial))
        for leaf, count in trial.items():
            most[leaf] = max(most.get(leaf, 0.0), count)
    _add(terms, most)
    return [
        next((one for one in several if one.data), several[0])
        for several in zip(*results, strict=True)
    ]


def _uncounted(eqn: compat.Equation, parts: Sequence[Part], terms: Terms) -> list[Part]:
    for part in parts:
        _add(terms, dict.fromkeys(part.copies, math.nan))
    return [Part(data=True)] * len(eqn.outvars)


def _add(terms: Terms, more: Mapping[int, float]) -> None:
    for leaf, count in more.items():
        terms[leaf] += count


_CONTROL = {
    "scan": _scan,
    "cond": _cond,
    "while": _uncounted,
    "shard_map": _uncounted,
}
