"""The parts of jaxprs that differ between versions of JAX, and nothing else.

The only file that touches ``jax.extend``.  Everything is told by its shape, never by
its class, since classes were merged and renamed more than once.
"""

import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.extend import source_info_util

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


def is_literal(atom: Atom) -> bool:
    """Tells a literal from a variable."""
    return hasattr(atom, "val")


def bind(eqn: Equation, values: Sequence[Any]) -> list:
    """Evaluates one equation on other operands."""
    arguments = eqn.primitive.get_bind_params(eqn.params)
    if isinstance(arguments, tuple):  # (functions, parameters) up to JAX 0.8
        functions, params = arguments
        results = eqn.primitive.bind(*functions, *values, **params)
    else:
        results = eqn.primitive.bind(*values, **arguments)
    return list(results) if eqn.primitive.multiple_results else [results]


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
