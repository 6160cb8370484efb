"""What the values of a program that was read are made of."""

from collections.abc import Sequence

from nnsanity.tracing.bounds import Reading
from nnsanity.tracing.intervals import Value
from nnsanity.tracing.operations import CONTRACTIONS

VIEWS = frozenset(
    {
        *("reshape", "squeeze", "broadcast_in_dim", "convert_element_type", "slice"),
        *("transpose", "rev", "reduce_precision", "dynamic_slice", "expand_dims"),
        *("split", "unstack", "gather", "row"),
    }
)
"""Operations whose every result is one of the numbers of their first operand."""


class Ancestry:
    """Which leaves of the arguments each value of a program is made of.

    Attributes:
        values: all of them, operands before what is made of them.
    """

    def __init__(self, reading: Reading, sizes: Sequence[int]) -> None:
        """Follows a program from its arguments on.

        Args:
            reading: of the program.
            sizes: how many leaves each of its arguments has.
        """
        self.reading = reading
        self.values = ordered(reading.outputs)
        self._leaves = {id(x): 1 << at for at, x in enumerate(reading.inputs)}
        self._users: dict[int, list[Value]] = {}
        self._masks = []
        for at, size in enumerate(sizes):
            self._masks.append(((1 << size) - 1) << sum(sizes[:at]))
        for value in self.values:
            leaves = self._leaves.get(id(value), 0)
            for operand in value.operands:
                leaves |= self._leaves[id(operand)]
                self._users.setdefault(id(operand), []).append(value)
            self._leaves[id(value)] = leaves

    def leaves(self, value: Value) -> int:
        """Returns the leaves of the arguments that a value is made of, a bit each."""
        return self._leaves[id(value)]

    def users(self, value: Value) -> list[Value]:
        """Returns what is made of a value, without anything in between."""
        return self._users.get(id(value), [])

    def holds(self, value: Value, argument: int) -> bool:
        """Tells whether a value is made of an argument, counted from 0."""
        return bool(self._leaves[id(value)] & self._masks[argument])

    def tail(self) -> list[Value]:
        """Lists what lies between the last weights and the results, the last first.

        Behind a product of two values that both hold the first argument, the
        parameters, a network goes on.
        """
        reached = {id(x) for x in self.reading.outputs}
        found = [x for x in reversed(self.values) if x.operands]
        tail = []
        for value in found:
            if id(value) not in reached:
                continue
            tail.append(value)
            for at, operand in enumerate(value.operands):
                others = (*value.operands[:at], *value.operands[at + 1 :])
                is_product = value.name in CONTRACTIONS
                if not (is_product and any(self.holds(x, 0) for x in others)):
                    reached.add(id(operand))
        return tail


def ordered(outputs: Sequence[Value]) -> list[Value]:
    """Lists values and all that they are made of, operands first."""
    found: list[Value] = []
    seen: set[int] = set()
    waiting = [(x, False) for x in reversed(outputs)]
    while waiting:
        value, is_done = waiting.pop()
        if is_done:
            found.append(value)
        elif id(value) not in seen:
            seen.add(id(value))
            waiting.append((value, True))
            waiting += [(x, False) for x in value.operands if id(x) not in seen]
    return found


def viewed(value: Value) -> Value:
    """Follows a value back through what moves and casts numbers alone."""
    while value.name in VIEWS:
        value = value.operands[0]
    return value


def constant(value: Value) -> float | None:
    """Returns the one number that a value is, whatever goes in; None for others."""
    low, high = float(value.low.min()), float(value.high.max())
    return low if low == high else None
