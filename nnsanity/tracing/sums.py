"""Values that are known as a sum of terms that are not written out."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp

from nnsanity._types import Array
from nnsanity.tracing.compat import Jaxpr
from nnsanity.tracing.outer_products import Term, joined, written


class Value(NamedTuple):
    """What is known of a value while the program runs.

    Attributes:
        varies: whether it may depend on the example.
        array: the numbers; None where only the terms are there.
        terms: a sum that it is equal to, or None.
        constant: added to the terms; depends on no example.
        carries: sums from earlier turns of a loop that are in it as well.
    """

    varies: bool
    array: Array | None = None
    terms: tuple[Term, ...] | None = None
    constant: Array | None = None
    carries: frozenset[int] = frozenset()

    @property
    def is_sum(self) -> bool:
        """Whether it is known as a sum of terms; zeros are an empty one."""
        return self.terms is not None


Evaluate = Callable[["Run", Jaxpr, Sequence, Sequence[Value]], list[Value]]


class Run:
    """One run, and which carried sums were looked at in it.

    Attributes:
        evaluate: ``evaluate(run, jaxpr, consts, inputs) -> outputs``.
        broken: numbers of the carried sums of a loop that something looked at.
    """

    def __init__(self, evaluate: Evaluate) -> None:
        self.evaluate = evaluate
        self.broken: set[int] = set()

    def whole(self, value: Value) -> Array:
        """Returns the numbers."""
        self.broken |= value.carries
        return whole(value)


def whole(value: Value) -> Array:
    """Writes a value out.

    Args:
        value: with terms or with numbers.
    """
    if value.array is not None:
        return value.array
    parts = [written(term) for term in joined(value.terms or ())]
    parts += [] if value.constant is None else [value.constant]
    return functools.reduce(jnp.add, parts)


def sum_of(one: Value, other: Value) -> Value:
    """Adds two values that are sums, or the same for all examples.

    Args:
        one: a value.
        other: of the same shape.
    """
    for value, rest in ((one, other), (other, one)):
        is_empty = value.is_sum and not value.terms and value.constant is None
        if is_empty and not value.carries:
            return rest
    constants = [
        array
        for value in (one, other)
        if (array := value.constant if value.is_sum else value.array) is not None
    ]
    return Value(
        one.varies or other.varies,
        terms=(*(one.terms or ()), *(other.terms or ())),
        constant=functools.reduce(jnp.add, constants) if constants else None,
        carries=one.carries | other.carries,
    )
