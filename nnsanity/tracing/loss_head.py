"""What a loss does with the outputs of a network: softmax, sigmoid and logarithm."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax

from nnsanity._types import LossFn, Params, PyTree
from nnsanity.tracing.ancestry import VIEWS, Ancestry, constant, viewed
from nnsanity.tracing.attained import signs_of
from nnsanity.tracing.bounds import read
from nnsanity.tracing.intervals import Value


class Squash(NamedTuple):
    """A softmax or a sigmoid whose logarithm a loss takes.

    Attributes:
        kind: ``"softmax"`` or ``"sigmoid"``.
        made_by: what made the numbers that go in: ``"softmax"``, ``"sigmoid"``, else
            the name of the last operation.
        low: least number that can go in, whatever the parameters are.
        high: the largest.
        shape: of what goes in.
        num_classes: how many share the probability; 2 for a sigmoid.
        where: the user's line.
    """

    kind: str
    made_by: str
    low: float
    high: float
    shape: tuple[int, ...]
    num_classes: int
    where: str

    @property
    def best(self) -> float:
        """The largest probability that any class can get."""
        if self.kind == "sigmoid":
            return 1 / (1 + math.exp(-min(max(self.high, -self.low), 700.0)))
        width = min(self.high - self.low, 700.0)
        return 1 / (1 + (self.num_classes - 1) * math.exp(-width))

    @property
    def least(self) -> float:
        """The smallest probability that a class can get; of a sigmoid, of a yes."""
        if self.kind == "sigmoid":
            return 1 / (1 + math.exp(min(-self.low, 700.0)))
        return 0.0

    @property
    def is_one_sided(self) -> bool:
        """Whether a sigmoid can say only yes, or only no."""
        return self.kind == "sigmoid" and (self.low >= 0 or self.high <= 0)


class Logarithm(NamedTuple):
    """A logarithm of what is 0 or below for some parameters.

    Attributes:
        low: the least that it may be taken of.
        high: the most.
        where: the user's line.
    """

    low: float
    high: float
    where: str


class LossHead(NamedTuple):
    """What a loss does behind the last weights.

    Attributes:
        squashes: each softmax or sigmoid that it takes the logarithm of.
        logarithms: of what can be 0 or below.
    """

    squashes: tuple[Squash, ...]
    logarithms: tuple[Logarithm, ...]


def loss_head(loss_fn: LossFn, params: Params, batch: PyTree) -> LossHead:
    """Reads what a loss does with the outputs of the network inside of it.

    Sees what lies between the last weights and the loss, and depends on the parameters
    and the batch alike.  A softmax is recognized by what it is, exponentials over their
    sum or the logarithm of that sum, whoever wrote it; what goes into it and into a
    logarithm is bounded by interval arithmetic with free parameters.

    Reads the program, no arithmetic; shapes suffice.

    Args:
        loss_fn: ``loss_fn(params, batch) -> scalar``.
        params: any pytree of arrays or ``jax.ShapeDtypeStruct``.
        batch: any pytree of the same.

    Returns:
        ``LossHead``, in the order of the program.

    Example:
        >>> import jax.numpy as jnp
        >>> def loss_fn(params, batch):
        ...     return -jnp.mean(jnp.log(jax.nn.softmax(jnp.tanh(batch @ params))))
        >>> found = loss_head(loss_fn, jnp.ones((3, 2)), jnp.ones((4, 3)))
        >>> [(one.kind, one.made_by, one.low, one.high) for one in found.squashes]
        [('softmax', 'tanh', -1.0, 1.0)]
    """
    reading = read(loss_fn, params, batch)
    sizes = [len(jax.tree.leaves(tree)) for tree in (params, batch)]
    ancestry = Ancestry(reading, sizes)
    squashes: dict[tuple, Squash] = {}
    logarithms = []
    for value in reversed(ancestry.tail()):
        if value.name not in _LOGARITHMS or not _is_learned(value, ancestry):
            continue
        where = reading.place(value)
        for kind, argument, num_classes in _squashed(value):
            if _is_learned(argument, ancestry):
                key = kind, id(argument)
                squashes.setdefault(key, _squash(kind, argument, num_classes, where))
        if _can_be_of_nothing(value, ancestry) and not _is_passed_over(value, ancestry):
            (ends,) = value.operands
            low, high = float(ends.low.min()), float(ends.high.max())
            logarithms.append(Logarithm(low, high, where))
    return LossHead(tuple(squashes.values()), tuple(logarithms))


_LOGARITHMS = ("log", "log2", "log1p")
_UNIT = (0.0, 1.0)


def _is_learned(value: Value, ancestry: Ancestry) -> bool:
    return ancestry.holds(value, 0) and ancestry.holds(value, 1)


def _can_be_of_nothing(value: Value, ancestry: Ancestry) -> bool:
    """Tells a logarithm of what is 0 or below for some parameters."""
    (argument,) = value.operands
    if value.name != "log1p":
        return signs_of(argument, ancestry).low
    never = bool(argument.high.max() <= -1)
    return never or (argument.low.min() < -1 and signs_of(argument, ancestry).low)


def _is_passed_over(value: Value, ancestry: Ancestry) -> bool:
    """Tells a logarithm that is taken everywhere and chosen by its argument's sign.

    ``where(p > 0, p * log(p), 0)`` never lets out what the logarithm of 0 is.
    """
    argument, waiting = viewed(value.operands[0]), [value]
    for _ in range(40):
        if not waiting:
            return True
        users = ancestry.users(waiting.pop())
        for user in users:
            which = viewed(user.operands[0])
            compared = [id(viewed(x)) for x in which.operands]
            if user.name == "select_n" and id(argument) in compared:
                continue
            if user.name not in _AFFINE | VIEWS:
                return False
            waiting.append(user)
        if not users:
            return False
    return False


def _squashed(value: Value) -> Iterator[tuple[str, Value, int]]:
    """Yields what a logarithm is a part of: the kind, what goes in, how many classes.

    ``log(sum(exp(x)))``, ``log(softmax(x))``, ``log(sigmoid(x))``,
    ``log(1 - sigmoid(x))``, ``log(1 + exp(x))``.
    """
    (inside,) = value.operands
    inside = _bare(inside)
    if value.name == "log1p":
        yield from _softplus(inside)
        return
    if inside.name == "add":
        for one, other in _both_ways(inside):
            if constant(one) == 1:
                yield from _softplus(other)
    elif inside.name == "reduce_sum":
        yield from _softmax(inside)
    elif inside.name == "sub" and constant(inside.operands[0]) == 1:
        inside = _bare(inside.operands[1])
    if _squash_of(inside) == "softmax" and inside.name == "div":
        yield from _softmax(_bare(inside.operands[1]))
    elif inside.name == "logistic":
        yield "sigmoid", _signed(inside.operands[0]), 2


def _softmax(total: Value) -> Iterator[tuple[str, Value, int]]:
    """Yields what the exponentials of a sum are taken of, less their maximum."""
    if total.name != "reduce_sum":
        return
    exp = _exponential(total.operands[0])
    if exp is None:
        return
    argument, axes = _moved(exp.operands[0]), total.params["axes"]
    if argument.name == "sub":
        argument, less = argument.operands
        if constant(less) is not None or not _is_shared(less, axes):
            argument = _moved(exp.operands[0])
    num_classes = math.prod(exp.shape[axis] for axis in axes)
    yield "softmax", argument, num_classes


def _softplus(exp: Value) -> Iterator[tuple[str, Value, int]]:
    exp = viewed(exp)
    if exp.name == "exp":
        yield "sigmoid", _signed(exp.operands[0]), 2


def _exponential(value: Value, depth: int = 8) -> Value | None:
    """Finds the exponential below a mask, a weight or a view."""
    value = viewed(value)
    if value.name == "exp" or not depth:
        return value if value.name == "exp" else None
    below = {"select_n": value.operands[1:], "mul": value.operands}
    found = (_exponential(x, depth - 1) for x in below.get(value.name, ()))
    return next((one for one in found if one is not None), None)


def _is_shared(value: Value, axes: tuple[int, ...]) -> bool:
    """Tells what is the same along some axes, as a maximum over them is."""
    if not value.shape:
        return True
    size = math.prod(value.shape[axis] for axis in axes)
    return math.prod(viewed(value).shape) * size <= math.prod(value.shape)


def _bare(value: Value) -> Value:
    """Leaves out views, an epsilon that is added and a limit."""
    for _ in range(40):
        value = viewed(value)
        if value.name == "abs":
            value = value.operands[0]
        elif value.name in ("max", "min", "clamp"):
            unknown = [x for x in value.operands if constant(x) is None]
            if len(unknown) != 1:
                return value
            value = unknown[0]
        elif value.name == "add" and (rest := _beside(value, 1e-2)):
            value = rest
        else:
            return value
    return value


def _beside(value: Value, limit: float) -> Value | None:
    """Returns what a small constant is added to."""
    for one, other in _both_ways(value):
        number = constant(one)
        if number is not None and abs(number) <= limit and constant(other) is None:
            return other
    return None


def _both_ways(value: Value) -> list[tuple[Value, Value]]:
    one, other = value.operands
    return [(one, other), (other, one)]


def _moved(value: Value) -> Value:
    """Follows a value back as long as no part of it is left out."""
    while value.name in ("reshape", "convert_element_type", "squeeze", "transpose"):
        value = value.operands[0]
    return value


def _signed(value: Value) -> Value:
    """Leaves out signs: of ``exp(-abs(x))``, or of ``1 - sigmoid(-x)``."""
    for _ in range(40):
        value = viewed(value)
        is_shift = value.name in ("sub", "add") and constant(value.operands[1]) == 0
        if is_shift or value.name in ("neg", "abs"):
            value = value.operands[0]
        elif value.name == "sub" and constant(value.operands[0]) == 0:
            value = value.operands[1]
        else:
            return value
    return value


def _squash(kind: str, argument: Value, num_classes: int, where: str) -> Squash:
    low, high = float(argument.low.min()), float(argument.high.max())
    made_by = _maker(argument)
    return Squash(kind, made_by, low, high, argument.shape, num_classes, where)


def _maker(value: Value) -> str:
    """Names what made some numbers, before a change of their unit.

    A softmax or a sigmoid, limited or not; else the last operation, or the limit.
    """
    limit = ""
    for _ in range(40):
        value = viewed(value)
        if squash := _squash_of(value):
            return squash
        if value.name in ("concatenate", "stack"):
            makers = {_maker(x) for x in value.operands}
            return limit or (makers.pop() if len(makers) == 1 else value.name)
        unknown = _unmasked(value)
        is_single = len(unknown) == 1 and value.name in {"select_n"} | _AFFINE | _LIMITS
        is_average = value.name == "reduce_sum" and _within_unit(unknown[0])
        if not is_single and not is_average:
            break
        limit = limit or (value.name if value.name in _LIMITS else "")
        value = unknown[0]
    return limit or value.name


def _unmasked(value: Value) -> list[Value]:
    """Returns the operands that are no constants; of a mask what it lets through."""
    unknown = [x for x in value.operands if constant(x) is None]
    if value.name != "select_n":
        return unknown
    which, *cases = value.operands
    compared = {id(viewed(x)) for x in which.operands}
    kept = [x for x in unknown if x is not which and id(viewed(x)) not in compared]
    return kept if len(cases) == 2 and len(unknown) == 2 else []


_AFFINE = frozenset({"mul", "div", "add", "sub", "neg"})
_LIMITS = frozenset({"clamp", "min", "max"})


def _squash_of(value: Value) -> str:
    """Names a softmax or a sigmoid, by hand or not; empty for anything else."""
    if value.name == "logistic":
        return "sigmoid"
    if not _within_unit(value):
        return ""
    if value.name == "div":
        total = viewed(value.operands[1])
        if _bare(total).name == "reduce_sum":
            return "softmax" if _exponential(value.operands[0]) is not None else ""
        return "sigmoid" if _is_odds(total) else ""
    if value.name == "exp":
        inside = _moved(value.operands[0])
        is_log = inside.name == "sub" and viewed(inside.operands[1]).name in _LOGARITHMS
        return "softmax" if is_log else ""
    return ""


def _is_odds(total: Value) -> bool:
    """Tells ``1 + exp(x)``."""
    if total.name != "add":
        return False
    pairs = _both_ways(total)
    return any(constant(x) == 1 and viewed(y).name == "exp" for x, y in pairs)


def _within_unit(value: Value) -> bool:
    low, high = float(value.low.min()), float(value.high.max())
    return low >= _UNIT[0] and high <= _UNIT[1] and low < high
