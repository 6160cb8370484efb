"""Finds the layers of a program and names them after their parameters.

A layer is a contraction or a look-up that has a parameter as an operand, with the bias,
the normalization and the nonlinearity that follow.  What follows is found by asking of
each value through which next value everything made from it has to pass.
"""

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from nnsanity._tree import is_inexact, leaf_names
from nnsanity._types import ApplyFn, Params, PyTree
from nnsanity.tracing import activation, compat
from nnsanity.tracing.activation import Activation
from nnsanity.tracing.compat import Program
from nnsanity.tracing.geometry import moved_axes, weight_geometry
from nnsanity.tracing.steps import (
    CONTRACTIONS,
    ELEMENTWISE,
    STRUCTURAL,
    Site,
    Step,
    Steps,
    open_up,
    operations,
)

_REDUCTIONS = frozenset({"reduce_sum", "reduce_max", "reduce_min", "argmax", "iota"})
_POOLING = frozenset({"reduce_window_max", "reduce_window_sum", "reduce_window"})
_SOFTMAX_PARTS = STRUCTURAL | {"reduce_max", "max", "stop_gradient", "sub", "exp"}
_AFFINE = STRUCTURAL | {"add", "sub", "mul", "div", "neg", "add_any"}
_MAX_STEPS_IN_A_STAGE = 100


class Layer(NamedTuple):
    """One layer of a network.

    Attributes:
        name: tree path of its parameters; see ``layers``.
        kind: ``"dense"``, ``"conv"`` or ``"embedding"``.
        fan_in: how many terms each of its outputs sums.
        fan_out: how many outputs each of its inputs takes part in.
        units: output units, or channels.
        activation: name of the nonlinearity that follows, or None.
    """

    name: str
    kind: str
    fan_in: int
    fan_out: int
    units: int
    activation: str | None


class Stage(NamedTuple):
    """What happens between a value and the next one that all of it passes through.

    Attributes:
        kind: ``"move"``, ``"pool"``, ``"affine"``, ``"norm"``, ``"softmax"`` or
            ``"activation"``.
        steps: its equations.
        end: number of the value that comes out.
        axes: which axes of that value are units.
    """

    kind: str
    steps: tuple[Step, ...]
    end: int
    axes: tuple[int, ...]


class Located(NamedTuple):
    """A layer with its places in the program.

    Attributes:
        layer: what ``layers`` returns.
        weight: index of its main parameter among the leaves of the parameters.
        leaves: indices of all parameters that belong to it.
        step: the contraction or look-up.
        operand: number of the value that enters it.
        start: number of the value that leaves it.
        axes: which axes of that value are units.
        stages: what follows, up to and with the nonlinearity.
        activation: the nonlinearity, or None.
    """

    layer: Layer
    weight: int
    leaves: frozenset[int]
    step: Step
    operand: int
    start: int
    axes: tuple[int, ...]
    stages: tuple[Stage, ...]
    activation: Activation | None

    @property
    def before(self) -> int:
        """Number of the value that enters the nonlinearity."""
        stages = self.stages if self.activation is None else self.stages[:-1]
        return stages[-1].end if stages else self.start

    @property
    def after(self) -> int:
        """Number of the value that leaves the nonlinearity."""
        return self.stages[-1].end if self.stages else self.start

    @property
    def unit_axes(self) -> tuple[int, ...]:
        """Which axes of the value that leaves it are units."""
        return self.stages[-1].axes if self.stages else self.axes


class Network(NamedTuple):
    """A program and its layers.

    Attributes:
        program: as traced.
        steps: as opened up.
        layers: in the order of execution.
        uninspected: name of each floating-point parameter of two or more axes that
            belongs to no layer, and why.
    """

    program: Program
    steps: Steps
    layers: tuple[Located, ...]
    uninspected: dict[str, str]

    def site(self, value: int) -> Site:
        """Returns where a value is born."""
        site = self.steps.sites[value]
        if site is None:
            raise ValueError(f"value {value} is an argument or a constant")
        return site


def layers(apply_fn: ApplyFn, params: Params, inputs: PyTree) -> tuple[Layer, ...]:
    """Lists the layers of a network in the order of execution.

    Read from the program, so that it works alike for any framework, and costs one
    trace and no arithmetic.  A layer is called by the tree path of its parameters: the
    parent where that belongs to this layer alone (``encoder/Dense_0``), the leaf itself
    where it does not (``w1``), with ``#2``, ``#3`` for a weight that is used again.

    Args:
        apply_fn: ``apply_fn(params, inputs) -> outputs``.
        params: any pytree of arrays or of ``jax.ShapeDtypeStruct``.
        inputs: arrays or shapes; leading axis the examples.

    Returns:
        One ``Layer`` for each contraction or look-up of a parameter.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> params = {"w1": jnp.ones((3, 4)), "w2": jnp.ones((4, 2))}
        >>> def apply_fn(params, x):
        ...     return jax.nn.relu(x @ params["w1"]) @ params["w2"]
        >>> [(one.name, one.activation) for one in layers(apply_fn, params, jnp.ones((5, 3)))]
        [('w1', 'relu'), ('w2', None)]
    """
    return tuple(one.layer for one in inspect(apply_fn, params, inputs).layers)


def inspect(fn: Callable, params: Params, *rest: PyTree) -> Network:
    """Traces a function of parameters and finds its layers."""
    names = leaf_names(params)
    program = compat.trace(fn, params, *rest)
    steps = open_up(program, len(names))
    chains = _Chains(steps)
    located = [
        one
        for step in steps.steps
        for one in (_locate(steps, chains, program, step),)
        if one is not None
    ]
    located = _named(located, steps, names)
    return Network(program, steps, located, _uninspected(steps, located, params))


def _locate(
    steps: Steps, chains: "_Chains", program: Program, step: Step
) -> Located | None:
    geometry = weight_geometry(steps, step)
    if geometry is None:
        return None
    leaves = steps.parameters[geometry.weight]
    main = max(leaves, key=lambda leaf: (math.prod(steps.avals[leaf].shape), -leaf))
    stages = tuple(chains.stages(step.outputs[0], geometry.axes))
    nonlinearity = _activation(steps, program, step.outputs[0], stages)
    own = [
        steps.parameters[operand]
        for stage in stages
        for one in stage.steps
        for operand in one.inputs
        if steps.is_weight(operand)
    ]
    name = None if nonlinearity is None else nonlinearity.name
    return Located(
        Layer(
            "", geometry.kind, geometry.fan_in, geometry.fan_out, geometry.units, name
        ),
        main,
        leaves.union(*own),
        step,
        geometry.operand,
        step.outputs[0],
        geometry.axes,
        stages,
        nonlinearity,
    )


def _activation(
    steps: Steps, program: Program, start: int, stages: tuple[Stage, ...]
) -> Activation | None:
    if not stages or stages[-1].kind not in ("activation", "softmax"):
        return None
    last = stages[-1]
    if last.kind == "softmax":
        is_log = "log" in _all_operations(last.steps)
        return Activation("log_softmax" if is_log else "softmax")
    before = stages[-2].end if len(stages) > 1 else start
    consts = {
        number: value
        for number, value in zip(steps.consts, program.consts, strict=True)
        if np.size(value) == 1
    }
    return activation.recognize(last.steps, before, last.end, consts)


class _Chains:
    """Follows values to the next ones that everything made from them passes through."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.users: list[list[int]] = [[] for _ in steps.avals]
        for index, step in enumerate(steps.steps):
            for value in {value for value in step.inputs if value is not None}:
                self.users[value].append(index)
        self.is_output = {value for value in steps.outputs if value is not None}

    def stages(self, value: int, axes: tuple[int, ...]) -> Iterator[Stage]:
        """Yields the stages that follow a layer, up to and with its nonlinearity."""
        while True:
            stage = self._softmax(value, axes) or self._next(value, axes)
            if stage is None:
                return
            yield stage
            if stage.kind in ("activation", "softmax"):
                return
            value, axes = stage.end, stage.axes

    def _softmax(self, value: int, axes: tuple[int, ...]) -> Stage | None:
        """Joins the stages of a softmax: less the maximum, exp, over the sum."""
        steps: tuple[Step, ...] = ()
        for _ in range(3):
            stage = self._next(value, axes)
            if stage is None or stage.kind == "move":
                return None
            steps += stage.steps
            if stage.kind == "softmax" or _divides_by_sum(stage):
                names = _all_operations(steps)
                is_softmax = "exp" in names and "reduce_sum" in names
                return stage._replace(kind="softmax", steps=steps) if is_softmax else None
            if not _all_operations(stage.steps) <= _SOFTMAX_PARTS:
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

    def _bottleneck(self, value: int) -> tuple[tuple[Step, ...], int] | None:
        """Finds the nearest value that everything made from ``value`` passes through.

        Steps that would bring in other data, or another layer, end the search.
        """
        waiting = list(self.users[value])
        heapq.heapify(waiting)
        num_open = len(waiting) + (value in self.is_output)
        region, taken = {value}, []
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
                if num_open == num_uses:
                    return tuple(taken), output
        return None

    def _brings_in_more(self, step: Step, region: set[int]) -> bool:
        if any(
            value is not None and value not in region and self.steps.data[value]
            for value in step.inputs
        ):
            return True
        return bool(operations(step.eqn) & CONTRACTIONS)

    def _kind(self, steps: tuple[Step, ...], start: int, end: int) -> str | None:
        names = _all_operations(steps)
        if len(steps) == 1 and names <= STRUCTURAL:
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
            if name not in _AFFINE:
                return False
            if name == "mul" and sum(operands) > 1:
                return False
            if name == "div" and operands[1]:
                return False
            made.update(step.outputs)
        return True


def _all_operations(steps: tuple[Step, ...]) -> frozenset[str]:
    return frozenset().union(*(operations(step.eqn) for step in steps))


def _divides_by_sum(stage: Stage) -> bool:
    names = _all_operations(stage.steps)
    return stage.kind == "norm" and names <= STRUCTURAL | {"reduce_sum", "div"}


def _named(
    located: list[Located], steps: Steps, names: tuple[str, ...]
) -> tuple[Located, ...]:
    parents = {one.weight: _parent(names[one.weight]) for one in located}
    named, counts = [], Counter[str]()
    for one in located:
        parent = parents[one.weight]
        below = [leaf for leaf in parents if f"{names[leaf]}/".startswith(f"{parent}/")]
        name = parent if parent and len(below) == 1 else names[one.weight]
        counts[name] += 1
        if counts[name] > 1:
            name = f"{name}#{counts[name]}"
        named.append(one._replace(layer=one.layer._replace(name=name)))
    return tuple(named)


def _parent(name: str) -> str:
    return name.rpartition("/")[0]


def _uninspected(
    steps: Steps, located: tuple[Located, ...], params: Params
) -> dict[str, str]:
    reasons = {}
    for step in steps.steps:
        inside = operations(step.eqn)
        if step.eqn.primitive.name not in inside and inside & CONTRACTIONS:
            weights = (steps.parameters[v] for v in step.inputs if steps.is_weight(v))
            reason = f"used inside of {step.eqn.primitive.name}, not looked into yet"
            reasons |= dict.fromkeys(frozenset().union(*weights), reason)
    covered = frozenset().union(*(one.leaves for one in located))
    for index, (name, aval) in enumerate(
        zip(leaf_names(params), steps.avals, strict=False)
    ):
        if index in covered or not is_inexact(aval) or len(aval.shape) < 2:
            reasons.pop(index, None)
        else:
            reasons.setdefault(index, "not the weight of a contraction or a look-up")
        if index in reasons:
            reasons[name] = reasons.pop(index)
    return reasons
