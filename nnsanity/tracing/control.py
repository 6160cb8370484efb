"""The bodies of loops, branches and shard_map, and what goes in and out of them."""

from collections.abc import Mapping
from typing import NamedTuple

from jax.sharding import PartitionSpec

from nnsanity.tracing import compat
from nnsanity.tracing.compat import Equation, Jaxpr

Path = tuple[int, ...]


class Axis(NamedTuple):
    """The leading axis that a value gets on its way out of a loop.

    Attributes:
        path: of the equation.
        name: of the mesh axis, or None for a scan.
        size: turns of the scan, or devices along the mesh axis.
    """

    path: Path
    name: str | None
    size: int


class Body(NamedTuple):
    """One of the jaxprs that an equation runs, any number of times.

    Attributes:
        path: of the equation, and which branch it is.
        jaxpr: its equations.
        consts: values of ``jaxpr.constvars``.
        operands: the operand of the equation that each of its inputs is made from.
        results: the result of the equation that each of its outputs becomes.
        feedback: its inputs that are an output of the turn before, by that output.
        axes: that its values get on their way out.
        varies: for each input the axes along which it differs by itself.
        no_gradient: why no whole gradient comes back through it; empty where one does.
    """

    path: Path
    jaxpr: Jaxpr
    consts: tuple
    operands: tuple[int, ...] = ()
    results: tuple[int, ...] = ()
    feedback: Mapping[int, int] = {}
    axes: tuple[Axis, ...] = ()
    varies: tuple[frozenset[Axis], ...] = ()
    no_gradient: str = ""


def bodies(eqn: Equation, path: Path) -> tuple[Body, ...]:
    """Returns what an equation of control flow runs; nothing for any other equation."""
    rule = _BODIES.get(eqn.primitive.name)
    return () if rule is None else rule(eqn, path)


def beside(eqn: Equation) -> tuple[int, ...]:
    """Returns which operands no body gets: what decides how often, or which branch."""
    inside = {operand for body in bodies(eqn, ()) for operand in body.operands}
    return tuple(index for index in range(len(eqn.invars)) if index not in inside)


def _scan(eqn: Equation, path: Path) -> tuple[Body, ...]:
    jaxpr, consts = compat.opened(eqn.params["jaxpr"])
    first, last = compat.carried(eqn, jaxpr)
    axis = Axis(path, None, eqn.params["length"])
    num_inputs = len(jaxpr.invars)
    feedback = {first + index: index for index in range(last - first)}
    kept = {*range(first)} | {
        index
        for index, output in feedback.items()
        if jaxpr.outvars[output] is jaxpr.invars[index]
    }
    return (
        Body(
            path,
            jaxpr,
            consts,
            operands=tuple(range(num_inputs)),
            results=tuple(range(len(jaxpr.outvars))),
            feedback=feedback,
            axes=(axis,),
            varies=tuple(
                frozenset() if index in kept else frozenset({axis})
                for index in range(num_inputs)
            ),
        ),
    )


def _while(eqn: Equation, path: Path) -> tuple[Body, ...]:
    jaxpr, consts = compat.opened(eqn.params["body_jaxpr"])
    num_test, num_consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    num_carried = len(jaxpr.outvars)
    return (
        Body(
            path,
            jaxpr,
            consts,
            operands=tuple(range(num_test, num_test + len(jaxpr.invars))),
            results=tuple(range(num_carried)),
            feedback={num_consts + index: index for index in range(num_carried)},
            varies=(frozenset(),) * len(jaxpr.invars),
            no_gradient="inside of a while loop, through which no gradient comes back",
        ),
    )


def _cond(eqn: Equation, path: Path) -> tuple[Body, ...]:
    return tuple(
        Body(
            (*path, index),
            *compat.opened(branch),
            operands=tuple(range(1, len(eqn.invars))),
            results=tuple(range(len(eqn.outvars))),
            varies=(frozenset(),) * (len(eqn.invars) - 1),
        )
        for index, branch in enumerate(eqn.params["branches"])
    )


def _shard_map(eqn: Equation, path: Path) -> tuple[Body, ...]:
    jaxpr, consts = compat.opened(eqn.params["jaxpr"])
    sizes = eqn.params["mesh"].shape
    axes = tuple(Axis(path, name, sizes[name]) for name in compat.manual_axes(eqn))
    return (
        Body(
            path,
            jaxpr,
            consts,
            operands=tuple(range(len(jaxpr.invars))),
            results=tuple(range(len(jaxpr.outvars))),
            axes=axes,
            varies=tuple(
                frozenset(axis for axis in axes if axis.name in _mentioned(spec))
                for spec in eqn.params["in_specs"]
            ),
            no_gradient=""
            if eqn.params["check_vma"]
            else "inside of a shard_map without check_vma: each device has a part",
        ),
    )


_BODIES = {"scan": _scan, "while": _while, "cond": _cond, "shard_map": _shard_map}


def _mentioned(spec: PartitionSpec) -> set[str]:
    parts = (part if isinstance(part, tuple) else (part,) for part in spec)
    return {name for part in parts for name in part if name is not None}
