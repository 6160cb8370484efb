"""Which signs a value certainly takes on, for some parameters.

Intervals say what a value can't be.  This is the other side: what it can be, since a
weight or a bias of its own moves it anywhere.
"""

from typing import NamedTuple

from nnsanity.tracing.ancestry import VIEWS, Ancestry, constant, viewed
from nnsanity.tracing.intervals import Value
from nnsanity.tracing.operations import CONTRACTIONS

_DEPTH = 60


class Signs(NamedTuple):
    """What is proved to happen for some parameters.

    Attributes:
        low: some element of the value is 0 or below.
        high: some element is 0 or above.
    """

    low: bool = False
    high: bool = False


_BOTH = Signs(low=True, high=True)
_SUMS = frozenset({"add", "add_any", "sub"})
_LINEAR = _SUMS | CONTRACTIONS | {"mul", "reduce_sum", "cumsum", "neg"}
_JOINING = frozenset({"concatenate", "stack"})
_ODD = frozenset(
    {"tanh", "sinh", "asinh", "atan", "cbrt", "erf", "sin", "expm1", "sign", "round"}
)


def free_of(value: Value, ancestry: Ancestry, depth: int = _DEPTH) -> int:
    """Returns the parameters that alone move a value to any real number; 0 for none.

    The weight of a product, or a term of a sum, that nothing else in it depends on.
    """
    if not depth or not ancestry.holds(value, 0):
        return 0
    if not value.operands:
        return ancestry.leaves(value)
    candidates = value.operands
    if value.name in VIEWS or value.name == "div":
        candidates = value.operands[:1]
    elif value.name not in _LINEAR:
        return 0
    for at, x in enumerate(candidates):
        own = free_of(x, ancestry, depth - 1)
        others = [*value.operands[:at], *value.operands[at + 1 :]]
        is_zero = value.name not in _SUMS and any(constant(y) == 0 for y in others)
        if own and not is_zero and not any(ancestry.leaves(y) & own for y in others):
            return own
    return 0


def signs_of(value: Value, ancestry: Ancestry, depth: int = _DEPTH) -> Signs:
    """Tells which signs a value takes on for some parameters and all inputs.

    What is not proved is False.
    """
    if not depth or not ancestry.holds(value, 0):
        return Signs()
    if value.high.max() <= 0:
        return Signs(low=True)
    if free_of(value, ancestry, depth):
        return _BOTH
    signs = [signs_of(x, ancestry, depth - 1) for x in value.operands]
    if value.name in VIEWS or value.name in _ODD:
        return signs[0]
    if value.name in _JOINING:
        return Signs(any(x.low for x in signs), any(x.high for x in signs))
    if value.name == "neg":
        return Signs(signs[0].high, signs[0].low)
    if value.name in ("mul", "div"):
        return _scaled(value, signs)
    if value.name in ("max", "min", "clamp"):
        return _clipped(value, signs)
    if value.name in ("add", "sub"):
        return _shifted(value, signs)
    if value.name == "select_n":
        return _selected(value, ancestry, depth)
    return Signs()


def _scaled(value: Value, signs: list[Signs]) -> Signs:
    for one, other in zip(signs, value.operands[::-1], strict=True):
        if other.low.min() > 0:
            return one
        if other.high.max() < 0:
            return Signs(one.high, one.low)
    return Signs()


def _shifted(value: Value, signs: list[Signs]) -> Signs:
    """A sum with a constant, which keeps one of the signs."""
    number, sign = constant(value.operands[1]), signs[0]
    if number is None and value.name == "add":
        number, sign = constant(value.operands[0]), signs[1]
    if number is None:
        return Signs()
    number = -number if value.name == "sub" else number
    return Signs(sign.low and number <= 0, sign.high and number >= 0)


def _clipped(value: Value, signs: list[Signs]) -> Signs:
    """Something that falls below 0, or rises above, kept within constants."""
    low = any(one.low for one in signs)
    high = any(one.high for one in signs)
    numbers = [constant(x) for x in value.operands]
    if value.name == "clamp":
        least, most = numbers[0], numbers[2]
        if least is None or most is None:
            return Signs()
        return Signs(low and least <= 0, high and most >= 0)
    number = next((x for x in numbers if x is not None), None)
    if number is None:
        return Signs()
    if value.name == "max":
        return Signs(low and number <= 0, high or number >= 0)
    return Signs(low or number <= 0, high and number >= 0)


def _selected(value: Value, ancestry: Ancestry, depth: int) -> Signs:
    """One of several cases; where a comparison with 0 decides, the one below 0."""
    which, *cases = value.operands
    if not ancestry.holds(which, 0):
        signs = [signs_of(x, ancestry, depth - 1) for x in cases]
        return Signs(any(x.low for x in signs), any(x.high for x in signs))
    if which.name not in ("gt", "ge", "lt", "le") or len(cases) != 2:
        return Signs()
    compared, limit = which.operands
    if constant(limit) != 0 or not free_of(compared, ancestry, depth):
        return Signs()
    below = cases[0] if which.name in ("gt", "ge") else cases[1]
    return Signs(low=below.high.max() <= 0 or _falls_with(below, compared))


def _falls_with(below: Value, compared: Value) -> bool:
    """Tells a positive multiple of a number, which is below 0 where that one is."""
    below, compared = viewed(below), viewed(compared)
    if below is compared:
        return True
    if below.name != "mul":
        return False
    pairs = zip(below.operands, below.operands[::-1], strict=True)
    return any(viewed(x) is compared and y.low.min() > 0 for x, y in pairs)
