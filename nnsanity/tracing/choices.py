"""Whether a program chooses among numbers."""

from collections.abc import Callable
from typing import Any

from nnsanity._tree import is_inexact
from nnsanity.tracing import compat

_CHOICES = frozenset({"max", "min", "clamp", "select_n", "cond", "while"})


def chooses(fn: Callable, *args: Any) -> bool:
    """Tells whether a function holds a number against a limit, or takes branches.

    Reads the program; no arithmetic, and shapes suffice.

    Args:
        fn: any function of arrays.
        *args: its arguments, or their shapes.

    Example:
        >>> import jax.numpy as jnp
        >>> chooses(lambda x: jnp.clip(x, 0, 1), 2.0), chooses(lambda x: x**2, 2.0)
        (True, False)
    """
    return _has_choice(compat.trace(fn, *args).jaxpr)


def _has_choice(jaxpr: compat.Jaxpr) -> bool:
    for eqn in jaxpr.eqns:
        is_number = any(is_inexact(var.aval) for var in eqn.outvars)
        if is_number and eqn.primitive.name in _CHOICES:
            return True
        inside = (compat.opened(one)[0] for one in compat.sub_jaxprs(eqn))
        if any(_has_choice(one) for one in inside):
            return True
    return False
