"""The parts of jaxprs that differ between versions of JAX, and nothing else.

The only file that touches ``jax.extend``.  Everything is told by its shape, never by
its class, since classes were merged and renamed more than once.
"""

import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import source_info_util
from jax.sharding import PartitionSpec, Sharding

Atom = Any
Equation = Any
Jaxpr = Any

CALLS = frozenset(
    {
        "jit",
        "pjit",
        "closed_call",
        "core_call",
        "remat",
        "remat2",
        "checkpoint",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_vjp_call_jaxpr",
    }
)
"""Primitives that run their one sub-jaxpr once, on their own operands."""

REMATERIALIZATIONS = frozenset({"remat", "remat2", "checkpoint"})

_LIBRARIES = tuple(
    str(Path(sysconfig.get_paths()[kind])) for kind in ("purelib", "platlib", "stdlib")
)


class Program(NamedTuple):
    """A traced function.

    Attributes:
        jaxpr: its equations.
        consts: the values of ``jaxpr.constvars``.
        out_shape: tree of ``jax.ShapeDtypeStruct``, as the function returns it.
    """

    jaxpr: Jaxpr
    consts: tuple
    out_shape: Any


def trace(fn: Callable, *args: Any) -> Program:
    """Traces a function on arrays or on their shapes; costs no arithmetic."""
    closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(*args)
    jaxpr, consts = opened(closed)
    return Program(jaxpr, consts, out_shape)


def opened(jaxpr: Jaxpr) -> tuple[Jaxpr, tuple]:
    """Splits a jaxpr, closed or not, into itself and its constants."""
    return getattr(jaxpr, "jaxpr", jaxpr), tuple(getattr(jaxpr, "consts", ()))


def sub_jaxprs(eqn: Equation) -> Iterator[Jaxpr]:
    """Yields the jaxprs among the parameters of an equation."""
    for value in eqn.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if hasattr(one, "eqns") or hasattr(one, "jaxpr"):
                yield one


def called_jaxpr(eqn: Equation) -> tuple[Jaxpr, tuple] | None:
    """Returns the body of a call, or None for any other equation."""
    if eqn.primitive.name not in CALLS:
        return None
    bodies = list(sub_jaxprs(eqn))
    if len(bodies) != 1:
        return None
    body, consts = opened(bodies[0])
    fits = len(body.invars) == len(eqn.invars) and len(body.outvars) == len(eqn.outvars)
    return (body, consts) if fits else None


def carried(eqn: Equation, body: Jaxpr) -> tuple[int, int]:
    """Returns where the carry begins and ends among the operands of a scan.

    Read from the shapes, since the parameters that say so changed with JAX 0.12: what
    is scanned over or stacked has one axis more outside of the body.
    """
    around = zip((eqn.invars, eqn.outvars), (body.invars, body.outvars), strict=True)
    num_xs, num_ys = (
        sum(a.aval.shape != b.aval.shape for a, b in zip(out, inn, strict=True))
        for out, inn in around
    )
    last = len(eqn.invars) - num_xs
    return last - (len(eqn.outvars) - num_ys), last


def manual_axes(eqn: Equation) -> tuple[str, ...]:
    """Returns the axes that a shard_map goes over, in the order of its mesh."""
    params = eqn.params
    names = params.get("newly_manual_axes", params.get("manual_axes", ()))
    return tuple(name for name in params["mesh"].axis_names if name in names)


def shard_map_again(eqn: Equation, fn: Callable, more: PartitionSpec) -> Callable:
    """Returns a shard_map of another function over the same mesh.

    Args:
        eqn: a shard_map.
        fn: ``fn(operands, more_in) -> (results, more_out)`` on each device.
        more: the spec of every leaf of ``more_in`` and ``more_out``.
    """
    return jax.shard_map(
        fn,
        mesh=eqn.params["mesh"],
        in_specs=(list(eqn.params["in_specs"]), more),
        out_specs=(list(eqn.params["out_specs"]), more),
        axis_names=set(manual_axes(eqn)),
        check_vma=eqn.params["check_vma"],
    )


def placed(values: Sequence[Any], shardings: Sequence[Any] | None) -> list:
    """Keeps the shardings that a jit asked for; others are left to the compiler."""
    if shardings is None:
        return list(values)
    return [
        jax.lax.with_sharding_constraint(value, sharding)
        if isinstance(sharding, Sharding)
        else value
        for value, sharding in zip(values, shardings, strict=True)
    ]


def zeros_of(shapes: Any) -> Any:
    """Makes zeros of what ``jax.eval_shape`` said; explicit shardings are kept."""
    explicit = jax.sharding.AxisType.Explicit

    def zeros(one: jax.ShapeDtypeStruct) -> jax.Array:
        sharding = getattr(one, "sharding", None)
        mesh = getattr(sharding, "mesh", None)
        is_kept = mesh is not None and explicit in mesh.axis_types
        return jnp.zeros(one.shape, one.dtype, device=sharding if is_kept else None)

    return jax.tree.map(zeros, shapes)


def varies(value: Any, axis_name: str) -> bool:
    """Tells whether a value differs along an axis of a shard_map that keeps types."""
    kind = jax.typeof(value)
    if hasattr(kind, "vma"):  # up to JAX 0.9
        return axis_name in kind.vma
    return axis_name in kind.manual_axis_type.varying


def is_literal(atom: Atom) -> bool:
    """Tells a literal from a variable."""
    return hasattr(atom, "val")


def bind(eqn: Equation, values: Sequence[Any]) -> list:
    """Evaluates one equation on other operands, in the context it was traced in."""
    arguments = eqn.primitive.get_bind_params(eqn.params)
    with eqn.ctx.manager:
        if isinstance(arguments, tuple):  # (functions, parameters) up to JAX 0.8
            functions, params = arguments
            results = eqn.primitive.bind(*functions, *values, **params)
        else:
            results = eqn.primitive.bind(*values, **arguments)
    return list(results) if eqn.primitive.multiple_results else [results]


def scope(eqn: Equation) -> str:
    """Returns the name scope of an equation in its jaxpr, as profilers show it."""
    return str(getattr(eqn.source_info, "name_stack", ""))


def source_line(eqn: Equation) -> str:
    """Says where the user wrote an equation: ``file.py:41 (function)``.

    Frames of installed libraries are passed over; where all are, the innermost counts.
    """
    traceback = getattr(eqn.source_info, "traceback", None)
    for frame in getattr(traceback, "frames", ()):
        if not frame.file_name.startswith((*_LIBRARIES, "<")):
            name = Path(frame.file_name).name
            line = getattr(frame, "line_num", None) or frame.start_line
            return f"{name}:{line} ({frame.function_name})"
    return source_info_util.summarize(eqn.source_info)
