"""Which parameters reach the loss through operations that have a gradient."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from nnsanity._tree import is_inexact, leaf_names
from nnsanity._types import LossFn, Params, PyTree
from nnsanity.tracing import compat

FLAT = frozenset(
    {
        "bitcast_convert_type",
        "ceil",
        "floor",
        "round",
        "sign",
        "stop_gradient",
    }
)
"""Operations from numbers to numbers whose derivative is zero wherever it exists.

Comparisons, argmax, shifts, casts to integers and their like need no entry: a value
that is not inexact carries no gradient, whatever made it.
"""

TRUSTED = frozenset({"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"})
"""Calls whose gradient the user wrote; what their body does says nothing about it."""


class Cut(NamedTuple):
    """A place where gradients end.

    Attributes:
        operation: the primitive, ``"round"`` or ``"argmax"``.
        where: the user's own line, ``"train.py:41 (loss_fn)"``.
    """

    operation: str
    where: str


class Reach(NamedTuple):
    """How the parameters reach the loss; one entry for each inexact leaf.

    Attributes:
        names: the leaves, as ``ns.leaf_names`` calls them.
        connected: the leaf reaches the loss through some operations.  False means that
            it is not used.
        differentiable: the leaf reaches the loss along at least one path on which every
            operation has a gradient.  False means that it never moves.
        cuts: where the paths of a leaf are cut that is connected and not
            differentiable, in the order of the program; empty for every other leaf.
            Of several operations on one path it is the last one.
    """

    names: tuple[str, ...]
    connected: tuple[bool, ...]
    differentiable: tuple[bool, ...]
    cuts: tuple[tuple[Cut, ...], ...]


class Frame(NamedTuple):
    """A jaxpr and the equation that calls it; both None outside of any call."""

    body: compat.Jaxpr = None
    call: compat.Equation = None
    outer: Any = None


class Mark(NamedTuple):
    """What a value is to the loss.

    Attributes:
        connected: it reaches the loss.
        smooth: a change of it changes the loss smoothly.  For a value that is not
            inexact: what is computed from it does, so that a gradient is lost here.
        cuts: the cuts between it and the loss, one bit for each.
    """

    connected: bool = False
    smooth: bool = False
    cuts: int = 0


Cuts = dict[Cut, int]
Rule = Callable[[compat.Equation, Sequence[Mark], Frame, Cuts], list[Mark]]


def reach(loss_fn: LossFn, params: Params, batch: PyTree) -> Reach:
    """Finds the parameters that no gradient of the loss can reach.

    A parameter that is connected and not differentiable has a gradient of exactly zero
    on every batch, and never learns.  Judged by reachability: a ``stop_gradient``
    inside softmax or a straight-through estimator takes nothing from a parameter that
    has another path.

    Reads the program, in time linear in its size; no arithmetic, and shapes suffice.

    Args:
        loss_fn: ``loss_fn(params, batch) -> scalar``.
        params: any pytree of arrays or ``jax.ShapeDtypeStruct``.
        batch: any pytree of the same.

    Returns:
        A ``Reach`` of plain values, in the order of the inexact leaves of ``params``.
        Custom derivative rules are trusted, and so are operations that are not known.

    Raises:
        ValueError: where ``loss_fn`` does not return a scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> def loss_fn(params, batch):
        ...     return jnp.sum(batch * params["slope"] + jnp.round(params["offset"]))
        >>> params = {"offset": 0.5, "slope": 2.0, "unused": 1.0}
        >>> found = reach(loss_fn, params, jnp.ones(3))
        >>> found.names
        ('offset', 'slope', 'unused')
        >>> found.connected
        (True, True, False)
        >>> found.differentiable
        (False, True, False)
        >>> [cut.operation for cut in found.cuts[0]]
        ['round']
    """
    program = compat.trace(loss_fn, params, batch)
    _check_scalar(program.out_shape)
    cuts: Cuts = {}
    loss = Mark(connected=True, smooth=True)
    marks = _sweep(program.jaxpr, [loss], Frame(), cuts)
    leaves = zip(leaf_names(params), jax.tree.leaves(params), marks, strict=False)
    kept = [(name, mark) for name, leaf, mark in leaves if is_inexact(leaf)]
    return Reach(
        names=tuple(name for name, _ in kept),
        connected=tuple(mark.connected for _, mark in kept),
        differentiable=tuple(mark.smooth for _, mark in kept),
        cuts=tuple(_cuts_of(mark, cuts) for _, mark in kept),
    )


def _check_scalar(out_shape: PyTree) -> None:
    outs = jax.tree.leaves(out_shape)
    if len(outs) != 1:
        raise ValueError(
            f"lint: loss_fn must return a scalar, got a tree of {len(outs)} arrays; "
            "leave the auxiliary output out"
        )
    if outs[0].shape:
        shape = ",".join(map(str, outs[0].shape))
        raise ValueError(
            f"lint: loss_fn must return a scalar, got {outs[0].dtype}[{shape}]; "
            "did you forget a mean?"
        )


def _cuts_of(mark: Mark, cuts: Cuts) -> tuple[Cut, ...]:
    if mark.smooth:
        return ()
    return tuple(cut for cut, bit in reversed(cuts.items()) if mark.cuts & bit)


def _sweep(
    jaxpr: compat.Jaxpr, outs: Sequence[Mark], frame: Frame, cuts: Cuts
) -> list[Mark]:
    """Carries the marks of the outputs back to the inputs."""
    marks: dict[Any, Mark] = {}
    _add(marks, jaxpr.outvars, outs)
    for eqn in reversed(jaxpr.eqns):
        written = [marks.get(var, Mark()) for var in eqn.outvars]
        refs = [marks.get(var, Mark()) for var in eqn.invars if _is_ref(var)]
        if not any(mark.connected for mark in [*written, *refs]):
            continue
        rule = _through if refs else RULES.get(eqn.primitive.name, _through)
        _add(marks, eqn.invars, rule(eqn, [*written, *refs], frame, cuts))
    return [marks.get(var, Mark()) for var in jaxpr.invars]


def _add(
    marks: dict[Any, Mark], atoms: Sequence[compat.Atom], more: Sequence[Mark]
) -> None:
    for atom, mark in zip(atoms, more, strict=True):
        if mark.connected and not compat.is_literal(atom):
            marks[atom] = _join(marks.get(atom, Mark()), mark)


def _join(*marks: Mark) -> Mark:
    cuts = 0
    for mark in marks:
        cuts |= mark.cuts
    return Mark(any(m.connected for m in marks), any(m.smooth for m in marks), cuts)


def _is_ref(atom: compat.Atom) -> bool:
    return hasattr(atom.aval, "inner_aval")


def _through(
    eqn: compat.Equation, outs: Sequence[Mark], frame: Frame, cuts: Cuts
) -> list[Mark]:
    """Any operation: every operand reaches every output.

    Marks beyond the outputs belong to the references that the equation may write to.
    """
    flat = eqn.primitive.name in FLAT
    whole = [not flat and is_inexact(var.aval) for var in eqn.outvars]
    whole += [True] * (len(outs) - len(whole))
    everything = _join(*outs)
    inexact = _join(
        *(
            mark if smooth else _shut(mark, eqn, frame, cuts)
            for mark, smooth in zip(outs, whole, strict=True)
        )
    )
    return [inexact if is_inexact(var.aval) else everything for var in eqn.invars]


def _shut(mark: Mark, eqn: compat.Equation, frame: Frame, cuts: Cuts) -> Mark:
    """Returns the mark of an operand whose gradient the equation drops."""
    if not mark.smooth:
        return mark
    cut = Cut(eqn.primitive.name, place(eqn, frame))
    bit = cuts.setdefault(cut, 1 << len(cuts))
    return Mark(mark.connected, smooth=False, cuts=mark.cuts | bit)


def place(eqn: compat.Equation, frame: Frame) -> str:
    """Says where the user wrote an equation, or the library call that it is part of.

    JAX traces its own jitted functions once for equal shapes, so that the lines inside
    ``jnp.round`` are those of the first call in the process, or none at all.
    """
    if frame.call is None:
        return compat.source_line(eqn)
    lines = {compat.source_line(one) for one in frame.body.eqns} - {""}
    if not lines or (len(lines) == 1 and _from_library(frame.body)):
        return place(frame.call, frame.outer)
    return compat.source_line(eqn) or place(frame.call, frame.outer)


def _from_library(body: compat.Jaxpr) -> bool:
    written = getattr(getattr(body, "debug_info", None), "func_src_info", None) or ""
    return "site-packages" in written or "dist-packages" in written


def _sign(
    eqn: compat.Equation, outs: Sequence[Mark], frame: Frame, cuts: Cuts
) -> list[Mark]:
    """A real sign never moves; a complex one turns, which newer versions follow."""
    if jax.numpy.issubdtype(eqn.invars[0].aval.dtype, jax.numpy.complexfloating):
        return list(outs)
    return _through(eqn, outs, frame, cuts)


def _sort(
    eqn: compat.Equation, outs: Sequence[Mark], frame: Frame, cuts: Cuts
) -> list[Mark]:
    """Each operand moves its own output; a key orders all the others too."""
    marks = list(outs)
    for index, var in enumerate(eqn.invars[: eqn.params["num_keys"]]):
        others = _join(*outs[:index], *outs[index + 1 :])
        if is_inexact(var.aval):
            others = _shut(others, eqn, frame, cuts)
        marks[index] = _join(outs[index], others)
    return marks


def _call(
    eqn: compat.Equation, outs: Sequence[Mark], frame: Frame, cuts: Cuts
) -> list[Mark]:
    body = body_of(eqn)
    if body is None:
        return _through(eqn, outs, frame, cuts)
    return _sweep(body, outs, Frame(body, eqn, frame), cuts)


def body_of(eqn: compat.Equation) -> compat.Jaxpr | None:
    """Returns the one jaxpr that takes the operands and gives the outputs."""
    bodies = [compat.opened(sub)[0] for sub in compat.sub_jaxprs(eqn)]
    arity = len(eqn.invars), len(eqn.outvars)
    fits = [one for one in bodies if (len(one.invars), len(one.outvars)) == arity]
    return fits[0] if len(fits) == 1 else None


def _scan(
    eqn: compat.Equation, outs: Sequence[Mark], frame: Frame, cuts: Cuts
) -> list[Mark]:
    body, _ = compat.opened(eqn.params["jaxpr"])
    first, last = compat.carried(eqn, body)
    carry, ys = list(outs[: last - first]), outs[last - first :]
    while True:
        marks = _sweep(body, [*carry, *ys], Frame(body, eqn, frame), cuts)
        more = list(map(_join, carry, marks[first:last]))
        if more == carry:
            return marks
        carry = more


def _while(
    eqn: compat.Equation, outs: Sequence[Mark], frame: Frame, cuts: Cuts
) -> list[Mark]:
    """The body any number of times, none among them; the test decides how often."""
    test, _ = compat.opened(eqn.params["cond_jaxpr"])
    body, _ = compat.opened(eqn.params["body_jaxpr"])
    num_test, num_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    carry = list(outs)
    while True:
        tested = _sweep(test, [_join(*carry)], Frame(test, eqn, frame), cuts)
        marks = _sweep(body, carry, Frame(body, eqn, frame), cuts)
        more = list(map(_join, carry, marks[num_body:], tested[num_test:]))
        if more == carry:
            return [*tested[:num_test], *marks[:num_body], *carry]
        carry = more


def _cond(
    eqn: compat.Equation, outs: Sequence[Mark], frame: Frame, cuts: Cuts
) -> list[Mark]:
    branches = [compat.opened(branch)[0] for branch in eqn.params["branches"]]
    swept = [_sweep(one, outs, Frame(one, eqn, frame), cuts) for one in branches]
    return [_join(*outs), *map(_join, *swept)]


RULES: dict[str, Rule] = {
    **dict.fromkeys(compat.CALLS - TRUSTED, _call),
    "custom_vmap_call": _call,
    "shard_map": _call,
    "sign": _sign,
    "sort": _sort,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
"""Operations that are not simply from every operand to every output."""
