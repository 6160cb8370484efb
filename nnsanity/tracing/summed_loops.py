"""Loops whose turns add products to what they carry: the sums of an unwritten run."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from nnsanity._types import Array
from nnsanity.tracing import compat
from nnsanity.tracing.compat import Equation
from nnsanity.tracing.outer_products import (
    Product,
    Term,
    joined,
    stacked_turns,
    summed_turns,
)
from nnsanity.tracing.sums import Run, Value, sum_of


def scan(run: Run, eqn: Equation, operands: Sequence[Value]) -> list[Value] | None:
    """Hands the sides of each turn's products out, and adds them up behind the loop.

    Args:
        run: that the loop is a part of.
        eqn: a scan.
        operands: its operands.

    Returns:
        Its results; None where nothing in it depends on the example.
    """
    if not any(one.varies for one in operands):
        return None
    first, last = compat.carried(eqn, compat.opened(eqn.params["jaxpr"])[0])
    fixed, scanned = (
        [Value(one.varies, run.whole(one)) for one in some]
        for some in (operands[:first], operands[last:])
    )
    loop = _Loop(eqn, fixed, list(operands[first:last]), scanned)
    sums = _only_added_to(run, loop)
    turns: list[_Kept] = []

    def turn(carry: dict[int, Array], xs: Sequence[Array]) -> tuple:
        inner = Run(run.evaluate)
        outputs = loop.turn(inner, sums, carry, xs)
        kept = _kept(outputs, sums)
        after = {index: inner.whole(outputs[index]) for index in carry}
        ys = {
            index: inner.whole(one)
            for index, one in enumerate(outputs)
            if index >= len(loop.carried) and index not in kept.stacks
        }
        turns.append(kept)
        return after, (ys, _sides(kept.sums), _sides(kept.stacks))

    names = ("length", "reverse", "unroll", "_split_transpose")
    options = {name: eqn.params[name] for name in names if name in eqn.params}
    start = {
        index: run.whole(one)
        for index, one in enumerate(loop.carried)
        if index not in sums
    }
    repeat: Callable = functools.partial(jax.lax.scan, **options)
    carry, (ys, sums_sides, stacks_sides) = repeat(
        turn, start, [one.array for one in scanned]
    )
    kept = turns[-1]
    found = {
        index: Value(varies=True, array=one) for index, one in (carry | ys).items()
    }
    for index, terms in _with_sides(kept.sums, sums_sides).items():
        added = Value(varies=True, terms=tuple(map(summed_turns, terms)))
        found[index] = sum_of(loop.carried[index], added)
    for index, terms in _with_sides(kept.stacks, stacks_sides).items():
        found[index] = Value(
            varies=True,
            terms=tuple(
                stacked_turns(one) for one in terms if isinstance(one, Product)
            ),
        )
    return [found[index] for index in range(len(eqn.outvars))]


class _Loop(NamedTuple):
    """A scan, and what it starts from."""

    eqn: Equation
    fixed: list[Value]
    carried: list[Value]
    scanned: list[Value]

    def turn(
        self, run: Run, sums: set[int], carry: dict[int, Array], xs: Sequence[Array]
    ) -> list[Value]:
        """Runs the body once; the sums are handed in as if they were 0."""
        jaxpr, consts = compat.opened(self.eqn.params["jaxpr"])
        carried = [
            Value(
                varies=True,
                array=carry.get(index),
                terms=(),
                carries=frozenset({index}),
            )
            if index in sums
            else Value(varies=True, array=carry[index])
            for index in range(len(self.carried))
        ]
        scanned = [
            Value(one.varies, x) for one, x in zip(self.scanned, xs, strict=True)
        ]
        return run.evaluate(run, jaxpr, consts, [*self.fixed, *carried, *scanned])


class _Kept(NamedTuple):
    """What is handed out of one turn, by its outputs.

    Attributes:
        sums: terms that are added to what is carried.
        stacks: the one product that a stacked output is.
    """

    sums: dict[int, list[Term]]
    stacks: dict[int, list[Term]]


def _kept(outputs: Sequence[Value], sums: set[int]) -> _Kept:
    terms = {index: joined(one.terms or ()) for index, one in enumerate(outputs)}
    stacks = {
        index: terms[index]
        for index, one in enumerate(outputs)
        if index not in sums and one.constant is None and len(terms[index]) == 1
    }
    return _Kept(
        {index: terms[index] for index in sums},
        {
            index: same
            for index, same in stacks.items()
            if isinstance(same[0], Product) and not same[0].is_sooner_written
        },
    )


def _sides(terms: dict[int, list[Term]]) -> dict[int, list[tuple[Array, Array]]]:
    return {
        index: [(one.left, one.right) for one in same] for index, same in terms.items()
    }


def _with_sides(
    terms: dict[int, list[Term]], sides: dict[int, list[tuple[Array, Array]]]
) -> dict[int, list[Term]]:
    return {
        index: [
            one._replace(left=left, right=right)
            for one, (left, right) in zip(same, sides[index], strict=True)
        ]
        for index, same in terms.items()
    }


def _only_added_to(run: Run, loop: _Loop) -> set[int]:
    """Finds the carried sums that no turn looks at: it only adds terms to them."""
    sums = {index for index, one in enumerate(loop.carried) if one.is_sum}
    jaxpr, _ = compat.opened(loop.eqn.params["jaxpr"])
    first = len(loop.fixed)
    carry = {
        index: jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)
        for index, var in enumerate(jaxpr.invars[first : first + len(loop.carried)])
    }
    xs = [
        jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)
        for var in jaxpr.invars[first + len(loop.carried) :]
    ]
    while sums and (broken := _looked_at(run, loop, sums, carry, xs)):
        sums -= broken
    return sums


def _looked_at(
    run: Run, loop: _Loop, sums: set[int], carry: dict, xs: list
) -> set[int]:
    """Traces a turn; returns the sums that it does more with than to add to them."""
    broken: set[int] = set()

    def look(carry: dict, xs: list) -> None:
        inner = Run(run.evaluate)
        for index, one in enumerate(loop.turn(inner, sums, carry, xs)):
            is_sum = index in sums and one.carries == {index} and one.constant is None
            broken.update(one.carries if not is_sum else ())
            broken.update({index} & sums if not is_sum else ())
        broken.update(inner.broken)

    jax.eval_shape(look, carry, xs)
    return broken
