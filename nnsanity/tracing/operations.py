"""What kinds of operations there are, by the names of JAX's primitives."""

import math

from nnsanity.tracing import compat
from nnsanity.tracing.compat import Equation

CONTRACTIONS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot_general"})

STRUCTURAL = frozenset(
    {
        "reshape",
        "transpose",
        "squeeze",
        "expand_dims",
        "broadcast_in_dim",
        "convert_element_type",
        "reduce_precision",
        "copy",
        "copy_p",
        "sharding_constraint",
        "reshard",
        "optimization_barrier",
        "pvary",
        "pcast",
        "name",
    }
)
"""Operations that move or cast numbers without mixing or changing them."""

SUMS_OVER_DEVICES = frozenset({"psum", "psum2", "psum_invariant"})

ELEMENTWISE = STRUCTURAL | frozenset(
    {
        *("add", "sub", "mul", "div", "neg", "abs", "sign", "max", "min", "clamp"),
        *("exp", "exp2", "log", "log1p", "expm1", "tanh", "logistic", "erf", "erfc"),
        *("erf_inv", "sin", "cos", "tan", "asin", "acos", "atan", "atan2", "sinh"),
        *("cosh", "asinh", "acosh", "atanh", "sqrt", "rsqrt", "cbrt", "square"),
        *("integer_pow", "pow", "floor", "ceil", "round", "rem", "select_n"),
        *("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "xor", "is_finite"),
        *("stop_gradient", "nextafter", "lgamma", "digamma", "add_any", "real"),
    }
)
"""Operations whose every output element depends on one element of each operand."""


ACTIVATING = frozenset(
    {
        *("max", "min", "clamp", "tanh", "logistic", "erf", "exp", "sin", "cos"),
        *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
    }
)
"""Operations that make a layer of the product before them."""

LOOK_UPS = frozenset({"gather", "dynamic_slice"})
"""Operations that pick rows of their first operand."""


def is_look_up(eqn: Equation, *, by_data: bool) -> bool:
    """Tells a look-up of rows from a choice among weights.

    One index for all examples that no data decide, ``w[i]`` in a loop, picks a weight;
    so does one that data decide among more than vectors, as the choice of an expert.
    """
    if eqn.primitive.name not in LOOK_UPS:
        return False
    table, *indices = (atom.aval.shape for atom in eqn.invars)
    is_single = eqn.primitive.name == "dynamic_slice" or math.prod(indices[0]) == 1
    return not is_single or (by_data and len(table) == 2)


def operations(eqn: Equation) -> frozenset[str]:
    """Returns the names of the primitives in an equation, calls opened."""
    bodies = list(compat.sub_jaxprs(eqn))
    if not bodies:
        return frozenset({eqn.primitive.name})
    inside = (compat.opened(body)[0].eqns for body in bodies)
    return frozenset().union(*(operations(one) for eqns in inside for one in eqns))
