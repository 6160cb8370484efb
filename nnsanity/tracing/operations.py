"""What kinds of operations there are, by the names of JAX's primitives."""

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


LOOK_UPS = frozenset({"gather", "dynamic_slice"})
"""Operations that pick rows of their first operand."""


def operations(eqn: Equation) -> frozenset[str]:
    """Returns the names of the primitives in an equation, calls opened."""
    bodies = list(compat.sub_jaxprs(eqn))
    if not bodies:
        return frozenset({eqn.primitive.name})
    inside = (compat.opened(body)[0].eqns for body in bodies)
    return frozenset().union(*(operations(one) for eqns in inside for one in eqns))
