"""Where the output of one example depends on the inputs of others."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from nnsanity._types import ApplyFn, Params, PyTree
from nnsanity.tracing import compat
from nnsanity.tracing.axes import RULES, named_axes, used
from nnsanity.tracing.operations import CONTRACTIONS
from nnsanity.tracing.reach import Frame, body_of, place


class Mixing(NamedTuple):
    """Where the examples of a batch are mixed.

    Attributes:
        places: the user's lines that do it otherwise than by a batch normalization.
        normalized: the lines of batch normalizations that use the batch itself.
    """

    places: tuple[str, ...]
    normalized: tuple[str, ...]


class Mix(NamedTuple):
    """What is known of a value.

    Attributes:
        axes: along which the examples lie; below 0 the turns of a loop over them.
        sites: where examples were mixed on the way here, a bit each.
        recent: the same, since the last product with a weight.
        data: whether it is made of the inputs.
    """

    axes: frozenset[int] = frozenset()
    sites: int = 0
    recent: int = 0
    data: bool = False


class Book:
    """The places where examples are mixed, and what becomes of them."""

    def __init__(self) -> None:
        self.bits: dict[tuple[str, str, int, int], int] = {}
        self.normalizing = 0

    def bit(self, eqn: compat.Equation, frame: Frame) -> int:
        """Returns the bit of an equation in one of its calls."""
        key = place(eqn, frame), eqn.primitive.name, id(eqn), id(frame.call)
        return self.bits.setdefault(key, 1 << len(self.bits))

    def of(self, *names: str) -> int:
        """Returns the bits of some operations."""
        return sum(bit for key, bit in self.bits.items() if key[1] in names)


def mixes_examples(apply_fn: ApplyFn, params: Params, inputs: PyTree) -> Mixing:
    """Finds where a network lets one example look at the others of its batch.

    A softmax or a mean over the wrong axis, attention among examples, a recurrence that
    runs over the batch.  The batch axis is followed as a label, as in
    ``meets_across_batch``; silent where it is lost, and on the maximum that is only
    subtracted, as in a softmax by hand.

    Reads the program, in time linear in its size; no arithmetic, and shapes suffice.

    Args:
        apply_fn: ``apply_fn(params, inputs) -> outputs``, leading axis the examples.
        params: any pytree of arrays or ``jax.ShapeDtypeStruct``.
        inputs: any pytree of the same, whose leaves have a leading example axis.

    Returns:
        ``Mixing``, two tuples of lines.

    Example:
        >>> import jax.numpy as jnp
        >>> def apply_fn(params, inputs):
        ...     return jax.nn.softmax(inputs @ params, axis=0)
        >>> len(mixes_examples(apply_fn, jnp.ones((3, 2)), jnp.ones((4, 3))).places)
        1
    """
    program = compat.trace(apply_fn, params, inputs)
    known = [Mix() for _ in jax.tree.leaves(params)]
    for leaf in jax.tree.leaves(inputs):
        axes = frozenset({0} if jax.numpy.ndim(leaf) else ())
        known.append(Mix(axes, data=True))
    book = Book()
    outputs = _follow(program.jaxpr, known, Frame(), book, 1)
    sites = 0
    for output in outputs:
        sites |= output.sites if 0 in output.axes else 0
    kept = [(key[0], bit) for key, bit in book.bits.items() if bit & sites]
    places = dict.fromkeys(p for p, bit in kept if not bit & book.normalizing)
    normalized = dict.fromkeys(p for p, bit in kept if bit & book.normalizing)
    return Mixing(tuple(places), tuple(p for p in normalized if p not in places))


def _follow(
    jaxpr: compat.Jaxpr, operands: Sequence[Mix], frame: Frame, book: Book, depth: int
) -> list[Mix]:
    known: dict[Any, Mix] = dict(zip(jaxpr.invars, operands, strict=True))

    def mix_of(atom: compat.Atom) -> Mix:
        return Mix() if compat.is_literal(atom) else known.get(atom, Mix())

    for eqn in used(jaxpr):
        values = [mix_of(atom) for atom in eqn.invars]
        step = _CONTROL.get(eqn.primitive.name)
        if step is not None:
            results = step(eqn, values, frame, book, depth)
        elif (body := body_of(eqn)) is not None:
            results = _follow(body, values, Frame(body, eqn, frame), book, depth)
        else:
            results = _apply(eqn, values, frame, book)
        known.update(zip(eqn.outvars, results, strict=True))
    return [mix_of(atom) for atom in jaxpr.outvars]


def _joined(values: Sequence[Mix]) -> Mix:
    sites = recent = 0
    for one in values:
        sites, recent = sites | one.sites, recent | one.recent
    turns = frozenset(axis for one in values for axis in one.axes if axis < 0)
    return Mix(turns, sites, recent, any(one.data for one in values))


def _apply(
    eqn: compat.Equation, values: list[Mix], frame: Frame, book: Book
) -> list[Mix]:
    """Any operation that runs no program of its own."""
    name = eqn.primitive.name
    if name == "sub":  # a maximum that is only subtracted changes no softmax
        largest = ~book.of("reduce_max", "reduce_min")
        less = values[1]
        if not less.axes:
            sites, recent = less.sites & largest, less.recent & largest
            values = [values[0], less._replace(sites=sites, recent=recent)]
    whole = _joined(values)
    if name in CONTRACTIONS and not all(one.data for one in values):
        whole = whole._replace(recent=0)
    book.normalizing |= _normalizing(name, values, book)
    if _mixes(eqn, values):
        bit = book.bit(eqn, frame)
        whole = whole._replace(sites=whole.sites | bit, recent=whole.recent | bit)
    rule = RULES.get(name)
    maps = [] if rule is None else rule(eqn)
    results = []
    for var in eqn.outvars:
        axes = set(whole.axes)
        for one, moves, atom in zip(values, maps, eqn.invars, strict=False):
            before, after = atom.aval.shape, var.aval.shape
            kept = (axis for axis in one.axes if axis in moves)
            axes |= {moves[a] for a in kept if before[a] == after[moves[a]]}
        axes |= _running(eqn, values)
        results.append(whole._replace(axes=frozenset(axes)))
    return results


def _normalizing(name: str, values: Sequence[Mix], book: Book) -> int:
    """Returns the sums that are part of a batch normalization.

    Those under a root that hold a mean and a sum of squares, and the mean of what is
    divided by that root.
    """
    if name in ("rsqrt", "sqrt", "pow") and not values[0].axes:
        return values[0].recent * (values[0].recent.bit_count() > 1)
    if name in ("mul", "div"):
        others = [one.recent for one in values if not one.axes]
        if any(recent & book.normalizing for recent in others):
            return _joined(values).recent & book.of("reduce_sum")
    return 0


_REDUCTIONS = frozenset(
    {
        *("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and"),
        *("reduce_or", "argmax", "argmin", "reduce"),
    }
)
_RUNNING = frozenset(
    {"cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "sort", "rev"}
)


def _mixes(eqn: compat.Equation, values: Sequence[Mix]) -> bool:
    """Tells whether an operation makes one number of several examples."""
    name = eqn.primitive.name
    if name == "dot_general":
        contracted = eqn.params["dimension_numbers"][0]
        both = zip(values, contracted, strict=True)
        return any(one.axes & set(axes) for one, axes in both)
    if name == "conv_general_dilated":
        batch = eqn.params["dimension_numbers"].lhs_spec[0]
        return any(axis not in (batch,) and axis >= 0 for axis in values[0].axes)
    if name in _REDUCTIONS | _RUNNING:
        return any(one.axes & named_axes(eqn) for one in values)
    return False


def _running(eqn: compat.Equation, values: Sequence[Mix]) -> frozenset[int]:
    """The axis of a running sum over the examples is still theirs."""
    if eqn.primitive.name not in _RUNNING:
        return frozenset()
    return frozenset(axis for one in values for axis in one.axes & named_axes(eqn))


def _scan(
    eqn: compat.Equation, values: Sequence[Mix], frame: Frame, book: Book, depth: int
) -> list[Mix]:
    """A loop; one that runs over the examples and carries something along mixes."""
    body, _ = compat.opened(eqn.params["jaxpr"])
    first, last = compat.carried(eqn, body)
    carry = list(values[first:last])
    xs = [_row(one, depth) for one in values[last:]]
    while True:
        operands = [*values[:first], *carry, *xs]
        results = _follow(body, operands, Frame(body, eqn, frame), book, depth + 1)
        more = [
            _grown(before, after, eqn, frame, book, depth)
            for before, after in zip(carry, results, strict=False)
        ]
        if more == carry:
            break
        carry = more
    over_examples = any(-depth in one.axes for one in xs)
    ys = [_stacked(one, depth) for one in results[last - first :]]
    if over_examples:
        ys = [one._replace(axes=one.axes | {0}) if one.data else one for one in ys]
    return [*carry, *ys]


def _grown(
    before: Mix,
    after: Mix,
    eqn: compat.Equation,
    frame: Frame,
    book: Book,
    depth: int,
) -> Mix:
    """What is true of a carry after another turn."""
    bit = book.bit(eqn, frame) if -depth in after.axes else 0
    axes = after.axes - {-depth}
    if before.data:  # a first state of zeros fits anything
        axes &= before.axes
    return Mix(
        axes,
        before.sites | after.sites | bit,
        before.recent | after.recent | bit,
        before.data or after.data,
    )


def _row(one: Mix, depth: int) -> Mix:
    axes = {-depth if axis == 0 else axis - (axis > 0) for axis in one.axes}
    return one._replace(axes=frozenset(axes))


def _stacked(one: Mix, depth: int) -> Mix:
    axes = {0 if axis == -depth else axis + (axis >= 0) for axis in one.axes}
    return one._replace(axes=frozenset(axes))


def _cond(
    eqn: compat.Equation, values: Sequence[Mix], frame: Frame, book: Book, depth: int
) -> list[Mix]:
    results = []
    for branch in eqn.params["branches"]:
        body, _ = compat.opened(branch)
        inner = Frame(body, eqn, frame)
        results.append(_follow(body, values[1:], inner, book, depth))
    chosen = []
    for several in zip(*results, strict=True):
        joined = _joined([values[0], *several])
        known = [one.axes for one in several if one.data]
        axes = frozenset.intersection(*known) if known else frozenset()
        chosen.append(joined._replace(axes=axes))
    return chosen


def _while(
    eqn: compat.Equation, values: Sequence[Mix], frame: Frame, book: Book, depth: int
) -> list[Mix]:
    """Any number of turns; where the examples lie afterwards is not followed."""
    return [_joined(values)._replace(axes=frozenset())] * len(eqn.outvars)


_CONTROL = {"scan": _scan, "cond": _cond, "while": _while}
