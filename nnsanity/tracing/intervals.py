"""Interval arithmetic by operation, and what intervals forget.

Each value has an interval per element; an axis along which all share it has length 1.
Values remember their operands, since intervals forget how two values are related: that
a quotient stays below 1 is seen by following the divisor down to a sum of the dividend.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

MOST_ENDS = 2**16  # of one value; beyond that one interval holds for all elements
_INF = math.inf
ANY = (-_INF, _INF)


class Value(NamedTuple):
    """Intervals of a value and where it comes from; equal values are one object."""

    low: np.ndarray
    high: np.ndarray
    shape: tuple[int, ...]
    dtype: Any
    name: str = ""  # of the primitive
    params: Any = None
    operands: tuple["Value", ...] = ()


Ends = tuple[Any, Any]
Rule = Callable[..., Ends]


def bounded(aval: Any, low: Any, high: Any, *origin: Any) -> Value:
    """Rounds the ends outward and drops the axes along which they are the same."""
    shape, dtype = getattr(aval, "shape", ()), getattr(aval, "dtype", np.dtype("O"))
    least, most = (0.0, 1.0) if dtype == np.bool_ else ANY
    if jnp.issubdtype(dtype, jnp.integer):
        least, most = float(jnp.iinfo(dtype).min), float(jnp.iinfo(dtype).max)
    low, high = np.broadcast_arrays(np.asarray(low, float), np.asarray(high, float))
    low, high = np.minimum(low, high), np.maximum(low, high)
    lost = ~((low >= least) & (high <= most))  # NaN, or integers that wrap around
    low = -_rounded_up(-np.where(lost, least, low), dtype)
    high = _rounded_up(np.where(lost, most, high), dtype)
    if 0 in shape or low.size > MOST_ENDS:
        low, high = np.min(low, initial=_INF), np.max(high, initial=-_INF)
    rank = (1,) * (len(shape) - low.ndim)
    low, high = low.reshape(rank + low.shape), high.reshape(rank + high.shape)
    for axis in range(len(shape) if low.size > 1 else 0):
        first_low, first_high = low.take([0], axis), high.take([0], axis)
        if (low == first_low).all() and (high == first_high).all():
            low, high = first_low, first_high
    return Value(low, high, tuple(shape), dtype, *origin)


def _rounded_up(high: np.ndarray, dtype: Any) -> np.ndarray:
    """Rounds to what an operation in ``dtype`` may give; what it holds stays."""
    if np.isinf(high).all() or not jnp.issubdtype(dtype, jnp.floating):
        return np.ceil(high)
    info = jnp.finfo(dtype)
    wider = high + 16 * float(info.eps) * np.abs(high) + float(info.tiny)  # exp and kin
    near, wider = (end.astype(dtype).astype(float) for end in (high, wider))
    return np.where(near == high, high, wider)


def is_real(x: Any) -> bool:
    """Tells whether x holds real numbers, integers or booleans."""
    kinds = (jnp.floating, jnp.integer, np.bool_)
    return any(jnp.issubdtype(x.dtype, kind) for kind in kinds)


def hull(ends: Iterable[Ends]) -> Ends:
    """Returns the smallest interval that holds all of some."""
    lows, highs = zip(*ends, strict=True)
    return functools.reduce(np.minimum, lows), functools.reduce(np.maximum, highs)


def _meet(ends: Iterable[Ends]) -> Ends:
    high, low = hull((high, low) for low, high in ends)
    return low, high


def _overall(x: Value) -> Ends:
    return x.low.min(), x.high.max()


def _mixed(aval: Any, params: dict, *values: Value) -> Ends:
    """Returns one interval for elements picked from the operands, wherever from."""
    # Places out of reach are filled with NaN, or with an end of the integers.
    exact = params.get("fill_value") is None and _is_float(aval)
    ends = [_overall(x) for x in values if x.dtype == aval.dtype]
    filled = "FILL" in str(params.get("mode")) and not exact
    return hull(ends) if ends and not filled else ANY


def _monotone(fn: Callable, least: float = -_INF) -> Rule:
    """Makes the rule of a function that only rises, or only falls, by all operands."""

    def rule(_: Any, params: dict, *values: Value) -> Ends:
        lows = [np.maximum(x.low, least) for x in values]
        return fn(*lows), fn(*(np.maximum(x.high, least) for x in values))

    return rule


def _even(fn: Callable) -> Rule:
    def rule(_: Any, params: dict, x: Value) -> Ends:
        return fn(np.clip(0.0, x.low, x.high)), fn(np.maximum(-x.low, x.high))

    return rule


def _crossed(fn: Callable) -> Rule:
    return lambda _, __, x, y: (fn(x.low, y.high), fn(x.high, y.low))


def _reduced(fn: Callable) -> Rule:
    return lambda _, p, x: (fn(x.low, p["axes"]), fn(x.high, p["axes"]))


def _corners(fn: Callable, x: Ends, y: Ends) -> Ends:
    corners = [fn(a, b) for a in x for b in y]
    # An infinite end stands for large numbers: 0 * inf and inf / inf count as 0.
    return hull((np.where(np.isnan(c), 0.0, c),) * 2 for c in corners)


def _quotient(aval: Any, _: dict, x: Value, y: Value) -> Ends:
    divisor = np.where(y.low == 0, 0.0, y.low), np.where(y.high == 0, -0.0, y.high)
    low, high = _corners(np.divide, x[:2], divisor)
    split = (y.low < 0) & (y.high > 0) | (not _is_float(aval))
    return np.where(split, -_INF, low), np.where(split, _INF, high)


def _power(aval: Any, params: dict, x: Value, *exponent: Value) -> Ends:
    y = _overall(exponent[0]) if exponent else (float(params["y"]),) * 2
    whole = y[0] == y[1] >= 0 and y[0] % 1 == 0
    if (x.low >= 0).all() or (whole and y[0] % 2 == 1):
        return _corners(np.power, x[:2], y)
    return _even(lambda size: size ** y[0])(aval, params, x) if whole else ANY


def _total(aval: Any, params: dict, x: Value, *weights: Value) -> Ends:
    """Bounds the terms of a sum by one interval, counts them, adds the rounding."""
    ends = _overall(x)
    if weights:
        ends = _corners(np.multiply, ends, _overall(weights[0]))
    if "axes" in params:
        axes = tuple(params["axes"])
        terms = math.prod(x.shape[axis] for axis in axes)
        ends = x.low.min(axes), x.high.max(axes)
    elif weights and "padding" not in params:  # dot_general
        terms = math.prod(x.shape[axis] for axis in params["dimension_numbers"][0][0])
    else:  # convolutions, windows and running sums: some terms may be missing
        terms = math.prod(params.get("window_dimensions", (*weights, x)[0].shape))
        ends = np.minimum(ends[0], 0.0), np.maximum(ends[1], 0.0)
    eps = float(jnp.finfo(aval.dtype).eps) if _is_float(aval) else 0.0
    total = np.array(ends) * terms
    exact = (total == np.rint(total)) & (np.abs(total) * eps <= 1)
    slack = np.where(exact, 0.0, terms * eps * np.abs(total))
    return total[0] - slack[0], total[1] + slack[1]


def _shifted(_: Any, __: dict, x: Value, y: Value) -> Ends:
    """Bits that are shifted to the right: a whole quotient by powers of two."""
    is_positive = (x.low >= 0).all() and (y.low >= 0).all()
    ends = np.floor(x.low / 2.0**y.high), np.floor(x.high / 2.0**y.low)
    return ends if is_positive else ANY


def _recast(aval: Any, _: dict, x: Value) -> Ends:
    """Bits behind the exponent of 1, as random numbers are made of, lie in [1, 2]."""
    if x.name != "or" or not _is_float(aval):
        return ANY
    info, (digits, exponent) = jnp.finfo(aval.dtype), x.operands
    one = int(np.ones((), aval.dtype).view(f"u{info.bits // 8}"))
    is_one = exponent.low.min() == exponent.high.max() == one
    is_below = digits.low.min() >= 0 and digits.high.max() < 2**info.nmant
    return (1.0, 2.0) if is_one and is_below else ANY


def _pooled(_: Any, params: dict, x: Value) -> Ends:
    # A window may lie in the padding, or in a hole, where the maximum is -inf.
    whole = not np.any(params["padding"]) and max(params["base_dilation"]) == 1
    return x.low.min() if whole else -_INF, x.high.max()


def _moved(aval: Any, params: dict, x: Value) -> Ends:
    """Broadcasts, or adds and takes away axes of length one."""
    if (places := _places(x, params, aval.shape)) is None:
        return _overall(x)
    shape = [1] * len(aval.shape)
    for size, place in zip(x.low.shape, places, strict=True):
        if place is not None:
            shape[place] = size
    return x.low.reshape(shape), x.high.reshape(shape)


def _places(x: Value, params: dict, shape: Sequence[int]) -> list[int | None] | None:
    """Says where each axis of x goes; None where one of length one is dropped."""
    if "broadcast_dimensions" in params:
        return list(params["broadcast_dimensions"])
    long = [axis for axis, size in enumerate(shape) if size != 1]
    if [size for size in x.shape if size != 1] != [shape[axis] for axis in long]:
        return None
    return [None if size == 1 else long.pop(0) for size in x.shape]


def _joined(aval: Any, params: dict, *values: Value) -> Ends:
    """Lays intervals side by side along an axis, which a stack adds."""
    axis = params["dimension" if "dimension" in params else "axis"]
    sizes = [x.shape[axis] if "dimension" in params else 1 for x in values]
    ends = [np.array(x[:2]) for x in values]
    if "axis" in params:
        ends = [np.expand_dims(end, axis + 1) for end in ends]
    ends = [np.moveaxis(end, axis + 1, 0) for end in ends]
    rest = np.broadcast_shapes(*(end.shape[1:] for end in ends))
    if sum(sizes) * math.prod(rest) > MOST_ENDS:
        return _mixed(aval, {}, *values)
    both = zip(ends, sizes, strict=True)
    parts = [np.broadcast_to(end, (size, *rest)) for end, size in both]
    low, high = np.moveaxis(np.concatenate(parts), 0, axis + 1)
    return low, high


def _sliced(aval: Any, params: dict, x: Value) -> Ends:
    steps = params["strides"] or [1] * len(x.shape)
    parts = map(slice, params["start_indices"], params["limit_indices"], steps)
    both = zip(x.low.shape, parts, strict=True)
    where = tuple(slice(1) if size == 1 else part for size, part in both)
    return x.low[where], x.high[where]


def cases_of(which: Value, *choices: Value) -> list[tuple[Value, list]]:
    """Lists what a selection may give, and what is known where it does."""
    low, high = _overall(which)
    guards = [_guards(which, truth=bool(number)) for number in range(len(choices))]
    return list(zip(choices, guards, strict=True))[int(low) : int(high) + 1]


def _guards(condition: Value, *, truth: bool) -> list[tuple[Value, Ends]]:
    """Lists the ends of other values where a condition is true, or is false."""
    name, operands = condition.name, condition.operands
    if name == "not":
        return _guards(operands[0], truth=not truth)
    if name in ("gt", "ge", "lt", "le"):
        x, y = operands if (name in ("gt", "ge")) == truth else operands[::-1]
        return [(x, (y.low, _INF)), (y, (-_INF, x.high))]
    if name != ("and" if truth else "or"):
        return []
    return [guard for x in operands for guard in _guards(x, truth=truth)]


def _within(x: Value, guards: list[tuple[Value, Ends]], depth: int = 3) -> Ends:
    """Returns the ends of a value where conditions hold; looks into selections."""
    ends = [x[:2], *(limits for value, limits in guards if value is x)]
    if x.name == "select_n" and depth:
        cases = cases_of(*x.operands)
        ends.append(hull(_within(y, [*guards, *own], depth - 1) for y, own in cases))
    return _meet(ends)


def narrowed(name: str, params: dict, values: Sequence[Value], ends: Ends) -> Ends:
    """Uses what is known of the operands beside their intervals."""
    limits, pairs = [ends], [values, values[::-1]]
    for x, y in pairs[: 1 + (name == "mul")] if name in _LIMITS else ():
        for kind, limit in _LIMITS[name].items():
            sure = kind != "above" or name == "sub" or (x.low >= 0).all()
            limits += [limit] if sure and _along(y, x, kind) is not None else []
    exp = _source(values[0]) if name in REDUCTIONS else None
    if exp is not None and exp.name == "exp" and exp.operands[0].name == "sub":
        x, largest = exp.operands[0].operands  # exp(x - max(x)) is 1 somewhere
        free = {axis for axis, size in enumerate(x.shape) if size > 1}
        if (along := _along(largest, x, "max")) is not None:
            limits += [(1.0, _INF)] if free - along <= set(params["axes"]) else []
    return _meet(limits)


def _source(x: Value) -> Value:
    return _source(x.operands[0]) if x.name in _VIEWS else x


def _along(s: Value, x: Value, kind: str, axes: Any = None, depth: int = 12) -> Any:
    """Follows s down to x and returns the axes of x that s varies along.

    Kinds: s is the "same" as x, its "max" along axes, "above" it, above its "size" |x|
    or its "square", below the "inverse" of |x|, or its "gate".  None if that is not
    known.  ``axes`` are those of x that the axes of s meet; None where one meets all.
    """
    axes = list(range(len(s.shape))) if axes is None else axes
    if s is x and kind in ("same", "max", "above"):
        fits = all(axis in (None, place) for place, axis in enumerate(axes))
        return set(axes) - {None} if fits else None
    asked = kind if s.name in _VIEWS else _ASKED.get((s.name, kind))
    for y, other in zip(s.operands, s.operands[::-1], strict=True):
        below = axes[len(axes) - len(y.shape) :]
        if s.name in REDUCTIONS:
            rest, reduced = iter(axes), s.params["axes"]
            below = [None if i in reduced else next(rest) for i in range(len(y.shape))]
        elif s.name in _VIEWS:
            places = _places(y, s.params, s.shape)
            sizes = zip(places or (), y.shape, strict=False)
            below = [None if p is None or n == 1 else axes[p] for p, n in sizes]
            asked = None if places is None else asked
        if asked and depth and _keeps(s, y, other, x, kind):
            found = _along(y, x, asked, below, depth - 1)
            if found is not None:
                return found
    return None


def _keeps(s: Value, y: Value, other: Value, x: Value, kind: str) -> bool:
    """Tells whether s is of a kind because its operand y is."""
    exact = kind in ("same", "max", "above") and _is_float(s, x)
    return {
        "add": (other.low >= 0).all(),
        "reduce_sum": (y.low >= 0).all(),
        "mul": y is other,
        "integer_pow": s.params.get("y") == 2,
        "convert_element_type": exact or _is_float(s, y),
    }.get(s.name, True)


def _is_float(x: Any, also: Any = None) -> bool:
    """Tells whether x is of a floating type that holds all numbers of another."""
    kinds = [x.dtype, (x if also is None else also).dtype]
    floats = all(jnp.issubdtype(kind, jnp.floating) for kind in kinds)
    return floats and jnp.promote_types(*kinds) == x.dtype


_VIEWS = ("reshape", "squeeze", "broadcast_in_dim", "convert_element_type")
REDUCTIONS = ("reduce_sum", "reduce_max")
_LOWER = ("above", "size", "square")
_ASKED = {  # of an operand, for the result to be of a kind
    **{(name, kind): kind for name in ("add", "max", *REDUCTIONS) for kind in _LOWER},
    **{(name, "square"): "same" for name in ("mul", "square", "integer_pow")},
    ("reduce_max", "max"): "max",
    ("abs", "size"): "same",
    ("sqrt", "size"): "square",
    ("rsqrt", "inverse"): "square",
    ("logistic", "gate"): "same",
}
_UNIT = (-1 - 2.0**-20, 1 + 2.0**-20)  # of x * rsqrt(x**2), which is rounded
_LIMITS: dict[str, dict[str, Ends]] = {  # of f(x, y) where y is of a kind to x
    "sub": {"same": (0.0, 0.0), "above": (-_INF, 0.0)},
    "div": {"same": (1.0, 1.0), "above": (0.0, 1.0), "size": (-1.0, 1.0)},
    "mul": {"same": (0.0, _INF), "gate": (-0.27846455, _INF), "inverse": _UNIT},
    "ne": {"same": (0.0, 0.0)},
    "eq": {"same": (1.0, 1.0)},
}
LOGIC = ("and", "or", "not")
_RISING = ("exp", "exp2", "expm1", "tanh", "cbrt", "floor", "ceil", "sign")
RULES: dict[str, Rule] = {
    **{name: _monotone(getattr(np, name)) for name in _RISING},
    **{name: _monotone(getattr(np, name)) for name in ("sinh", "asinh", "atan")},
    **{name: _monotone(getattr(np, name), 0.0) for name in ("log", "log2", "sqrt")},
    **{name: _even(getattr(np, name)) for name in ("abs", "square", "cosh")},
    **{n: _monotone(np.vectorize(getattr(math, n), [float])) for n in ("erf", "erfc")},
    **dict.fromkeys(("sin", "cos"), lambda *_: (-1.0, 1.0)),
    **dict.fromkeys(("max", "or"), _monotone(np.maximum)),
    **dict.fromkeys(("min", "and"), _monotone(np.minimum)),
    **dict.fromkeys(("reduce_max", "reduce_or"), _reduced(np.max)),
    **dict.fromkeys(("reduce_min", "reduce_and"), _reduced(np.min)),
    **dict.fromkeys(("argmax", "argmin"), lambda _, __, x: (0.0, max(x.shape) - 1.0)),
    **dict.fromkeys(("pow", "integer_pow"), _power),
    **dict.fromkeys(("reshape", "squeeze", "broadcast_in_dim"), _moved),
    **dict.fromkeys(("concatenate", "stack"), _joined),
    **dict.fromkeys(("gather", "pad", "scatter", "rev", "sort", "top_k"), _mixed),
    **dict.fromkeys(("dynamic_slice", "dynamic_update_slice"), _mixed),
    **dict.fromkeys(("split", "unstack", "cummax", "cummin", "transpose"), _mixed),
    **dict.fromkeys(("reduce_sum", "reduce_window_sum", "cumsum"), _total),
    **dict.fromkeys(("dot_general", "conv_general_dilated"), _total),
    "slice": _sliced,
    "add": _monotone(np.add),
    "neg": _monotone(np.negative),
    "log1p": _monotone(np.log1p, -1.0),
    "rsqrt": _monotone(lambda end: 1 / np.sqrt(end), 0.0),
    "logistic": _monotone(lambda end: 1 / (1 + np.exp(-end))),
    "round": lambda _, __, x: (np.ceil(x.low - 0.5), np.floor(x.high + 0.5)),
    "sub": _crossed(np.subtract),
    "gt": _crossed(np.greater),
    "ge": _crossed(np.greater_equal),
    "lt": _crossed(np.less),
    "le": _crossed(np.less_equal),
    "eq": lambda _, __, x, y: (0.0, (x.low <= y.high) & (y.low <= x.high)),
    "ne": lambda _, __, x, y: ((x.low > y.high) | (y.low > x.high), 1.0),
    "not": lambda _, __, x: (1 - x.high, 1 - x.low),
    "mul": lambda _, __, x, y: _corners(np.multiply, x[:2], y[:2]),
    "div": _quotient,
    "clamp": _monotone(lambda least, x, most: np.minimum(np.maximum(x, least), most)),
    "select_n": lambda _, __, *xs: hull(_within(*case) for case in cases_of(*xs)),
    "convert_element_type": lambda a, _, x: ANY if a.dtype == np.bool_ else x[:2],
    "is_finite": lambda _, __, x: (_source(x).name == "reduce_max", 1.0),
    "iota": lambda aval, p: (0.0, aval.shape[p["dimension"]] - 1.0),
    "reduce_window_max": _pooled,
    "shift_right_logical": _shifted,
    "bitcast_convert_type": _recast,
}
