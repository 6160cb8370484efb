"""Bounds of a network's outputs, by interval arithmetic over its jaxpr."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from nnsanity._types import ApplyFn, Params, PyTree
from nnsanity.tracing import compat
from nnsanity.tracing.intervals import (
    ANY,
    LOGIC,
    MOST_ENDS,
    REDUCTIONS,
    RULES,
    Value,
    bounded,
    cases_of,
    hull,
    is_real,
    narrowed,
)
from nnsanity.tracing.reach import Frame, place

Places = dict[int, tuple[Any, Frame]]
"""By the identity of a value: the equation that it was first made by, and where."""


class Reading(NamedTuple):
    """A program as the values that it goes through, each with its interval.

    Values know their operands, so that the outputs hold the whole program.

    Attributes:
        inputs: one value for each leaf of the arguments.
        outputs: one for each leaf of the results.
        out_shape: the results as shapes.
        places: where each value is made.
    """

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    out_shape: PyTree
    places: Places

    def place(self, value: Value) -> str:
        """Says where the user wrote what makes a value; empty for what is given."""
        known = self.places.get(id(value))
        return "" if known is None else place(*known)


class _Book(NamedTuple):
    """What was read so far: equal values are one, each with its place."""

    memo: dict[tuple, tuple[list[Value], list[Value]]]
    places: Places


class Bounds(NamedTuple):
    """Intervals that the outputs of a network cannot leave.

    Attributes:
        low: tree shaped like the outputs, of read-only float32 NumPy arrays; ``-inf``
            where nothing is known.  A target below it is out of reach.
        high: the same for the upper ends.
    """

    low: PyTree
    high: PyTree


def output_bounds(apply_fn: ApplyFn, params: Params, inputs: PyTree) -> Bounds:
    """Bounds every element of the outputs, over all parameters and all inputs.

    A proof, read from the program: what the head cannot give is out of reach, whatever
    the network learns.  Worry where a target lies outside, or where both ends meet.
    Intervals are closed, since rounding reaches the ends (a sigmoid gives 1), and need
    not be the tightest.  They hold in floating point, for runs in which nothing is NaN,
    overflows or is divided by zero, and no maximum is over ``-inf`` alone.
    Costs one trace, and no memory for the outputs.

    Args:
        apply_fn: ``apply_fn(params, inputs) -> outputs``.
        params: any pytree of arrays or of ``jax.ShapeDtypeStruct``; values are not
            read.  Small constants that ``apply_fn`` closes over are.
        inputs: the same.

    Returns:
        The lower and the upper ends.

    Raises:
        Exception: what ``apply_fn`` itself raises while it is traced.

    Example:
        >>> def apply_fn(params, inputs):
        ...     return jax.nn.softmax(inputs @ params)
        >>> params, inputs = jax.numpy.ones((3, 2)), jax.numpy.ones((1, 3))
        >>> bounds = output_bounds(apply_fn, params, inputs)
        >>> bounds.low.tolist(), bounds.high.tolist()
        ([[0.0, 0.0]], [[1.0, 1.0]])

    References:
        R. E. Moore, Interval Analysis, 1966, chapters 2 and 3.
    """
    return bounds_of(read(apply_fn, params, inputs))


def read(fn: Callable, *args: PyTree) -> Reading:
    """Reads a function whose arguments may be anything."""
    jaxpr, consts, out_shape = compat.trace(fn, *args)
    book = _Book({}, {})
    with np.errstate(all="ignore"):
        inputs = [bounded(var.aval, *ANY) for var in jaxpr.invars]
        outputs = _run(jaxpr, consts, inputs, book, Frame())
    return Reading(tuple(inputs), tuple(outputs), out_shape, book.places)


def bounds_of(reading: Reading) -> Bounds:
    """Returns the intervals of what a function returns, in float32."""
    outputs = reading.outputs
    with np.errstate(all="ignore"):
        avals = [jax.ShapeDtypeStruct(x.shape, np.float32) for x in outputs]
        ends = [bounded(a, x.low, x.high) for a, x in zip(avals, outputs, strict=True)]
    lows = [np.broadcast_to(np.float32(x.low) + 0, x.shape) for x in ends]  # no -0
    highs = [np.broadcast_to(np.float32(x.high) + 0, x.shape) for x in ends]
    tree = jax.tree.structure(reading.out_shape)
    return Bounds(jax.tree.unflatten(tree, lows), jax.tree.unflatten(tree, highs))


def _constant(const: Any, aval: Any) -> Value:
    """Reads a small real constant; others, and those far away, may be anything."""
    known = isinstance(const, int | float) or hasattr(const, "__array__")
    known &= not isinstance(const, jax.core.Tracer) and is_real(aval)
    known &= getattr(const, "is_fully_addressable", True)
    if not known or math.prod(aval.shape) > MOST_ENDS:
        return bounded(aval, *ANY)
    numbers = np.asarray(const, aval.dtype).astype(float)
    return bounded(aval, numbers, numbers)


def _run(
    jaxpr: Any, consts: Sequence, operands: Sequence, book: _Book, frame: Frame
) -> list[Value]:
    known = dict(zip(jaxpr.invars, operands, strict=True))
    for var, const in zip(jaxpr.constvars, consts, strict=True):
        known[var] = _constant(const, var.aval)

    def value_of(atom: Any) -> Value:
        if not compat.is_literal(atom):
            return known[atom]
        key = ("literal", _kind(atom.aval), np.asarray(atom.val).tobytes())
        if key not in book.memo:
            book.memo[key] = [], [_constant(atom.val, atom.aval)]
        return book.memo[key][1][0]

    for eqn in jaxpr.eqns:
        outputs = _equation(eqn, [value_of(atom) for atom in eqn.invars], book, frame)
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [value_of(atom) for atom in jaxpr.outvars]


def _equation(eqn: Any, values: list[Value], book: _Book, frame: Frame) -> list[Value]:
    name, avals = eqn.primitive.name, [var.aval for var in eqn.outvars]
    if (call := compat.called_jaxpr(eqn)) is not None:
        return _run(*call, values, book, Frame(call[0], eqn, frame))
    if name in _UNCHANGED and len(values) == len(avals):
        return values
    if name in _CONTROL:
        outputs = _CONTROL[name](eqn, values, book, frame)
    elif not _is_known(name, values, avals):
        outputs = [bounded(aval, *ANY, name, eqn.params, (*values,)) for aval in avals]
    else:
        params = repr(eqn.params) if eqn.params else ""
        key = (name, params, *map(_kind, avals), *map(id, values))
        if key in book.memo:
            return book.memo[key][1]
        outputs = [_output(eqn, aval, values) for aval in avals]
        # It keeps the operands, whose ids must not be used again.
        book.memo[key] = values, outputs
    given = set(map(id, values))
    book.places.update({id(x): (eqn, frame) for x in outputs if id(x) not in given})
    return outputs


def _kind(aval: Any) -> tuple:
    return getattr(aval, "shape", ()), getattr(aval, "dtype", None)


def _is_known(name: str, values: Sequence[Value], avals: Sequence[Any]) -> bool:
    """Tells whether there is a rule for an operation on such values."""
    odd = any(0 in x.shape or not is_real(x) for x in values)
    is_bits = name in LOGIC and avals[0].dtype != np.bool_
    return not odd and name in RULES and not is_bits


def _output(eqn: Any, aval: Any, values: list[Value]) -> Value:
    name, params = eqn.primitive.name, eqn.params
    if name in REDUCTIONS and all(values[0].shape[i] == 1 for i in params["axes"]):
        name, params = "reshape", {}
    if name == "select_n" and len(cases := cases_of(*values)) == 1:
        return cases[0][0]
    if name == "max" and values[0].high.max() == -math.inf:  # jnp.max starts like this
        return values[1]
    ends = narrowed(name, params, values, RULES[name](aval, params, *values))
    return bounded(aval, *ends, name, params, tuple(values))


def _loop(eqn: Any, values: list[Value], book: _Book, frame: Frame) -> list[Value]:
    """Joins the carry over all turns; an end that still moves after three is lost."""
    body, consts = compat.opened(eqn.params.get("jaxpr", eqn.params.get("body_jaxpr")))
    values = values[eqn.params.get("cond_nconsts", 0) :]
    # What is scanned over or stacked has one axis more outside of the body.
    both = zip(eqn.outvars, body.outvars, strict=True)
    count = sum(len(v.aval.shape) == len(w.aval.shape) for v, w in both)
    pairs = list(zip(values, body.invars, strict=True))
    rows = [(x, v.aval) for x, v in pairs if len(x.shape) > len(v.aval.shape)]
    if any(0 in x.shape for x, _ in rows):
        origin = (eqn.primitive.name, eqn.params, tuple(values))
        return [bounded(var.aval, *ANY, *origin) for var in eqn.outvars]
    xs = [
        bounded(aval, x.low.min(0), x.high.max(0), "row", {}, (x,)) for x, aval in rows
    ]
    start, stop = len(values) - len(rows) - count, len(values) - len(rows)
    # Whatever goes into the loop may be in what it carries.
    carry = [bounded(x, *x[:2], "carry", {}, (*values,)) for x in values[start:stop]]
    outputs: list[Value] = []
    turn, still = 0, -1
    while still < count:
        operands = [*values[:start], *carry, *xs]
        outputs = _run(body, consts, operands, book, Frame(body, eqn, frame))
        grown = [_grown(x, y, turn) for x, y in zip(carry, outputs, strict=False)]
        still = sum(new is x for new, x in zip(grown, carry, strict=True))
        carry, turn = grown, turn + 1
    ends = [x[:2] for x in (*carry, *outputs[count:])]
    return [
        bounded(var.aval, *end, eqn.primitive.name, eqn.params, (last, *values))
        for var, end, last in zip(eqn.outvars, ends, outputs, strict=True)
    ]


def _grown(x: Value, y: Value, turn: int) -> Value:
    lower, higher = y.low < x.low, y.high > x.high
    if not lower.any() and not higher.any():
        return x
    far = math.inf if turn > 2 else 0.0
    low = np.where(lower, y.low - far, x.low)
    high = np.where(higher, y.high + far, x.high)
    return bounded(x, low, high, x.name, x.params, x.operands)


def _branches(eqn: Any, values: list[Value], book: _Book, frame: Frame) -> list[Value]:
    bodies = list(map(compat.opened, eqn.params["branches"]))
    runs = [
        _run(*body, values[1:], book, Frame(body[0], eqn, frame)) for body in bodies
    ]
    choices = list(zip(*runs, strict=True))
    ends = [hull(x[:2] for x in several) for several in choices]
    return [
        bounded(var.aval, *end, "cond", eqn.params, (values[0], *several))
        for var, end, several in zip(eqn.outvars, ends, choices, strict=True)
    ]


_UNCHANGED = {
    *("stop_gradient", "copy", "copy_p", "name", "optimization_barrier", "device_put"),
    *("sharding_constraint", "reshard", "pvary"),
}
_CONTROL: dict[str, Callable] = {"scan": _loop, "while": _loop, "cond": _branches}
