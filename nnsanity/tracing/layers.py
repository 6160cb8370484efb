"""Finds the layers of a program and names them after their parameters.

A layer is a contraction or a look-up that has a parameter as an operand, with the bias,
the normalization and the nonlinearity that follow.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from nnsanity._tree import is_inexact, leaf_names
from nnsanity._types import ApplyFn, Params, PyTree
from nnsanity.tracing import activation, compat
from nnsanity.tracing.activation import Activation
from nnsanity.tracing.chains import Chains, Stage, all_operations
from nnsanity.tracing.compat import Program
from nnsanity.tracing.geometry import weight_geometry
from nnsanity.tracing.steps import (
    CONTRACTIONS,
    Site,
    Step,
    Steps,
    open_up,
    operations,
)


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
        linear = self.linear_stages
        return linear[-1].end if linear else self.start

    @property
    def linear_stages(self) -> tuple[Stage, ...]:
        """The stages before the nonlinearity."""
        return linear_part(self.stages)

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
        >>> found = layers(apply_fn, params, jnp.ones((5, 3)))
        >>> [(one.name, one.activation) for one in found]
        [('w1', 'relu'), ('w2', None)]
    """
    return tuple(one.layer for one in inspect(apply_fn, params, inputs).layers)


def inspect(fn: Callable, params: Params, *rest: PyTree) -> Network:
    """Traces a function of parameters and finds its layers."""
    names = leaf_names(params)
    program = compat.trace(fn, params, *rest)
    steps = open_up(program, len(names))
    chains = Chains(steps)
    found = (_locate(steps, chains, program, step) for step in steps.steps)
    located = _named([one for one in found if one is not None], names)
    return Network(program, steps, located, _uninspected(steps, located, params))


def _locate(
    steps: Steps, chains: "Chains", program: Program, step: Step
) -> Located | None:
    geometry = weight_geometry(steps, step)
    if geometry is None:
        return None
    leaves = steps.parameters[geometry.weight]
    main = max(leaves, key=lambda leaf: (math.prod(steps.avals[leaf].shape), -leaf))
    stages = tuple(chains.stages(step.outputs[0], geometry.axes))
    stages, nonlinearity = _nonlinearity(steps, program, step.outputs[0], stages)
    own = [
        steps.parameters[value]
        for stage in stages
        for one in stage.steps
        for value in steps.weights(one)
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


def linear_part(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """Returns the stages before the first nonlinearity."""
    for index, stage in enumerate(stages):
        if stage.kind in ("activation", "softmax"):
            return stages[:index]
    return stages


def _nonlinearity(
    steps: Steps, program: Program, start: int, stages: tuple[Stage, ...]
) -> tuple[tuple[Stage, ...], Activation | None]:
    """Recognizes the nonlinearity, and drops the stages that do not belong to it."""
    num_linear = len(linear_part(stages))
    if num_linear == len(stages):
        return stages, None
    if stages[-1].kind == "softmax":
        is_log = "log" in all_operations(stages[-1].steps)
        return stages, Activation("log_softmax" if is_log else "softmax")
    consts = steps.literals | {
        number: value
        for number, value in zip(steps.consts, program.consts, strict=True)
        if np.size(value) == 1
    }
    first = num_linear  # a scaling by numbers before it is part of what it does
    while first and _is_scaling(steps, stages[first - 1]):
        first -= 1
    known: list[tuple[tuple[Stage, ...], Activation]] = []
    for end in range(len(stages), num_linear, -1):
        for begin in sorted({first, num_linear}):
            before = stages[begin - 1].end if begin else start
            taken = [step for stage in stages[begin:end] for step in stage.steps]
            found = activation.recognize(
                steps.with_constants(taken), before, stages[end - 1].end, consts
            )
            if found.name in activation.NAMES:
                return stages[:end], found
            if found.is_known:
                known.append((stages[:end], found))
        # For the sake of a name a scaling after it may be left out, no part of it.
        if known and stages[end - 1].kind == "activation":
            return known[-1]
    kept = stages[: num_linear + 1]
    return kept, Activation(activation.name_of_last(kept[-1].steps))


def _is_scaling(steps: Steps, stage: Stage) -> bool:
    has_weight = any(steps.weights(step) for step in stage.steps)
    return stage.kind == "affine" and not has_weight


def _named(located: list[Located], names: tuple[str, ...]) -> tuple[Located, ...]:
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
    hidden_in = {}
    for step in steps.steps:
        inside = operations(step.eqn)
        if step.eqn.primitive.name not in inside and inside & CONTRACTIONS:
            for value in steps.weights(step):
                names = dict.fromkeys(steps.parameters[value], step.eqn.primitive.name)
                hidden_in.update(names)
    covered = frozenset().union(*(one.leaves for one in located))
    reasons = {}
    for index, name in enumerate(leaf_names(params)):
        aval = steps.avals[index]
        if index in hidden_in:
            reasons[name] = f"used inside of {hidden_in[index]}, not looked into yet"
        elif index not in covered and is_inexact(aval) and len(aval.shape) > 1:
            reasons[name] = "not the weight of a product with the inputs or a look-up"
    return reasons
