"""Follows a value through the stages that it passes: bias, normalization, nonlinearity.

A stage ends at the nearest value through which everything made from its start has to
pass; what lies between tells what it does.
"""

import heapq
from collections.abc import Iterator
from typing import NamedTuple

from nnsanity._tree import is_inexact
from nnsanity.tracing.geometry import moved_axes
from nnsanity.tracing.operations import (
    CONTRACTIONS,
    ELEMENTWISE,
    STRUCTURAL,
    SUMS_OVER_DEVICES,
    operations,
)
from nnsanity.tracing.steps import Step, Steps

_REDUCTIONS = frozenset({"reduce_sum", "reduce_max", "reduce_min", "argmax", "iota"})
_POOLING = frozenset({"reduce_window_max", "reduce_window_sum", "reduce_window"})
_SOFTMAX_PARTS = STRUCTURAL | {"reduce_max", "max", "stop_gradient", "sub", "exp"}
_AFFINE = STRUCTURAL | {"add", "sub", "mul", "div", "neg", "add_any"}
_MAX_STEPS_IN_A_STAGE = 100


class Stage(NamedTuple):
    """What happens between a value and the next one that all of it passes through.

    Attributes:
        kind: ``"move"``, ``"pool"``, ``"affine"``, ``"norm"``, ``"merge"`` (other data
            are added, or decide what is kept), ``"softmax"`` or ``"activation"``.
        steps: its equations.
        end: number of the value that comes out.
        axes: which axes of that value are units.
    """

    kind: str
    steps: tuple[Step, ...]
    end: int
    axes: tuple[int, ...]


class Chains:
    """Follows values to the next ones that everything made from them passes through."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.users: list[list[int]] = [[] for _ in steps.avals]
        self.is_output = steps.returned
        live = set(steps.returned)  # a print or a result thrown away uses nothing
        for index in reversed(range(len(steps.steps))):
            step = steps.steps[index]
            if live.isdisjoint(step.outputs):
                continue
            for value in {value for value in step.inputs if value is not None}:
                self.users[value].insert(0, index)
                live.add(value)

    def stages(self, value: int, axes: tuple[int, ...]) -> Iterator[Stage]:
        """Yields the stages that follow a layer, up to and with its nonlinearity.

        A nonlinearity can take several stages, as a clip is a maximum and a minimum;
        some of the last ones may turn out not to belong to it.
        """
        is_activated = False
        while True:
            stage = (
                self._softmax(value, axes)
                or self._next(value, axes)
                or self._merge(value, axes)
            )
            if stage is None or (is_activated and not self._goes_on(stage)):
                return
            yield stage
            if stage.kind == "softmax":
                return
            is_activated |= stage.kind == "activation"
            value, axes = stage.end, stage.axes

    def _goes_on(self, stage: Stage) -> bool:
        """Tells whether a stage still belongs to the nonlinearity before it."""
        has_weight = any(self.steps.weights(step) for step in stage.steps)
        return stage.kind == "activation" or (stage.kind == "affine" and not has_weight)

    def _softmax(self, value: int, axes: tuple[int, ...]) -> Stage | None:
        """Joins the stages of a softmax: less the maximum, exp, over the sum."""
        steps: tuple[Step, ...] = ()
        for _ in range(3):
            stage = self._next(value, axes)
            if stage is None or stage.kind == "move":
                return None
            steps += stage.steps
            if stage.kind == "softmax" or _divides_by_sum(stage):
                names = all_operations(steps)
                is_softmax = "exp" in names and "reduce_sum" in names
                return (
                    stage._replace(kind="softmax", steps=steps) if is_softmax else None
                )
            if not all_operations(stage.steps) <= _SOFTMAX_PARTS:
                return None
            value = stage.end
        return None

    def _next(self, value: int, axes: tuple[int, ...]) -> Stage | None:
        found = self._bottleneck(value)
        if found is None:
            return None
        steps, end = found
        kind = self._kind(steps, value, end)
        if kind is None:
            return None
        if kind == "move":
            moved = moved_axes(steps[0].eqn, axes)
            return None if moved is None else Stage(kind, steps, end, moved)
        return Stage(kind, steps, end, axes)

    def _merge(self, value: int, axes: tuple[int, ...]) -> Stage | None:
        """Adds what else was made, or masks it: a residual, a state, a padding."""
        if value in self.is_output or len(self.users[value]) != 1:
            return None
        step = self.steps.steps[self.users[value][0]]
        (end, *_) = step.outputs
        if self.steps.avals[end].shape != self.steps.avals[value].shape:
            return None
        name = step.eqn.primitive.name
        is_chosen = name == "select_n" and step.inputs[0] != value
        is_added = name in ("add", "add_any") and step.inputs.count(value) == 1
        return Stage("merge", (step,), end, axes) if is_chosen or is_added else None

    def _bottleneck(self, value: int) -> tuple[tuple[Step, ...], int] | None:
        """Finds the nearest value that everything made from ``value`` passes through.

        Steps that would bring in other data, or another layer, end the search.
        """
        waiting = list(self.users[value])
        heapq.heapify(waiting)
        num_open = len(waiting)
        region, taken = {value}, list[Step]()
        while waiting and len(taken) < _MAX_STEPS_IN_A_STAGE:
            index = heapq.heappop(waiting)
            while waiting and waiting[0] == index:
                heapq.heappop(waiting)
            step = self.steps.steps[index]
            if self._brings_in_more(step, region):
                return None
            num_open -= sum(v in region for v in {*step.inputs} - {None})
            taken.append(step)
            for output in step.outputs:
                region.add(output)
                uses = self.users[output]
                num_uses = len(uses) + (output in self.is_output)
                num_open += num_uses
                for user in uses:
                    heapq.heappush(waiting, user)
                if num_open == num_uses and is_inexact(self.steps.avals[output]):
                    return tuple(taken), output
        return None

    def _brings_in_more(self, step: Step, region: set[int]) -> bool:
        if any(
            value is not None and value not in region and self.steps.origins[value].data
            for value in step.inputs
        ):
            return True
        names = operations(step.eqn)
        return bool(names & CONTRACTIONS) or step.is_opened

    def _kind(self, steps: tuple[Step, ...], start: int, end: int) -> str | None:
        names = all_operations(steps)
        if len(steps) == 1 and names <= STRUCTURAL | SUMS_OVER_DEVICES:
            return "move"
        if names <= _POOLING:
            return "pool"
        if self.steps.avals[start].shape != self.steps.avals[end].shape:
            return None
        if names <= ELEMENTWISE:
            return "affine" if self._is_affine(steps, start) else "activation"
        if names <= ELEMENTWISE | _REDUCTIONS:
            return "softmax" if "exp" in names else "norm"
        return None

    def _is_affine(self, steps: tuple[Step, ...], start: int) -> bool:
        made = {start}
        for step in steps:
            name = step.eqn.primitive.name
            operands = [value in made for value in step.inputs]
            if name == "select_n" and not operands[0]:
                made.update(step.outputs)  # a mask
                continue
            if name not in _AFFINE:
                return False
            if name == "mul" and sum(operands) > 1:
                return False
            if name == "div" and operands[1]:
                return False
            made.update(step.outputs)
        return True


def all_operations(steps: tuple[Step, ...]) -> frozenset[str]:
    """Returns the names of all primitives in some steps, calls opened."""
    return frozenset().union(*(operations(step.eqn) for step in steps))


def _divides_by_sum(stage: Stage) -> bool:
    names = all_operations(stage.steps)
    return stage.kind == "norm" and names <= STRUCTURAL | {"reduce_sum", "div"}
