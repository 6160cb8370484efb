"""Finds the layers of a program and names them after their parameters.

A layer is a contraction or a look-up that has a parameter as an operand, with the bias,
the normalization and the nonlinearity that follow.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import jax

from nnsanity._tree import is_inexact, leaf_names
from nnsanity._types import ApplyFn, Params, PyTree
from nnsanity.tracing import activation, compat, control
from nnsanity.tracing.activation import Activation
from nnsanity.tracing.chains import Chains, Stage, all_operations
from nnsanity.tracing.compat import Program
from nnsanity.tracing.control import Axis
from nnsanity.tracing.geometry import weight_geometry
from nnsanity.tracing.opening import open_up
from nnsanity.tracing.operations import CONTRACTIONS, STRUCTURAL, operations
from nnsanity.tracing.steps import Site, Step, Steps


class Layer(NamedTuple):
    """One layer of a network.

    Attributes:
        name: tree path of its parameters; see ``layers``.
        kind: ``"dense"``, ``"conv"`` or ``"embedding"``.
        fan_in: how many terms each of its outputs sums.
        fan_out: how many outputs each of its inputs takes part in.
        units: output units, or channels.
        activation: name of the nonlinearity that follows, or None.
        stack: how many times it stands in the network with other weights, for each scan
            over layers around it, the outermost first; under shard_map also into how
            many parts its weights are split, for each axis of the mesh.
    """

    name: str
    kind: str
    fan_in: int
    fan_out: int
    units: int
    activation: str | None = None
    stack: tuple[int, ...] = ()


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
        around: the axes that its values get on their way out of the loops around it.
        stack: those of them along which it has other weights.
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
    around: tuple[Axis, ...]
    stack: tuple[Axis, ...]
    stages: tuple[Stage, ...] = ()
    activation: Activation | None = None

    @property
    def before(self) -> int:
        """Number of the value that enters the nonlinearity."""
        linear = self.linear_stages
        return linear[-1].end if linear else self.start

    @property
    def entry(self) -> tuple[int, tuple[int, ...]]:
        """Number of the value that the nonlinearity was run on, and its unit axes.

        It stands before the scalings that are a part of the nonlinearity.
        """
        linear = self.linear_stages
        num_scalings = 0 if self.activation is None else self.activation.num_scalings
        kept = linear[: len(linear) - num_scalings]
        return (kept[-1].end, kept[-1].axes) if kept else (self.start, self.axes)

    @property
    def linear_stages(self) -> tuple[Stage, ...]:
        """The stages before the nonlinearity."""
        return linear_part(self.stages)

    @property
    def shared(self) -> tuple[int, ...]:
        """Which of the axes ``around`` are turns of a loop with the same weights."""
        return tuple(
            index for index, axis in enumerate(self.around) if axis not in self.stack
        )

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
        uninspected: name of each floating-point parameter that belongs to no layer,
            and why.
    """

    program: Program
    steps: Steps
    layers: tuple[Located, ...]
    uninspected: dict[str, str]

    def site(self, value: int) -> Site:
        """Returns where a value is born."""
        site = self.steps.sites[value]
        if site is None:
            raise ValueError(f"value {value} is a constant")
        return site

    def without_gradient(self, one: Located) -> str | None:
        """Says why the gradient that comes back to a layer can't be seen, if so."""
        path = one.step.path
        around = [path[:depth] for depth in range(1, len(path))]
        bodies = [self.steps.bodies.get(prefix) for prefix in around]
        if not self.steps.own_derivative.isdisjoint(around):
            return "inside of a function whose derivative was written by hand"
        for body in bodies:
            if body is not None and body.no_gradient:
                return body.no_gradient
        if not is_inexact(self.steps.avals[one.start]):
            return "its output is not floating-point"
        return None


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Uninspected:
    """What could not be looked into, as a part of results that hold arrays.

    It has no leaves, so that it passes through ``jit``, ``vmap`` and ``scan``.

    Attributes:
        parameters: name and reason of each floating-point parameter that belongs to no
            layer.
        gradients: name and reason of each layer whose gradient does not show.
    """

    parameters: tuple[tuple[str, str], ...] = ()
    gradients: tuple[tuple[str, str], ...] = ()

    @staticmethod
    def of(network: Network) -> "Uninspected":
        """Says it of a network."""
        found = (
            (one.layer.name, network.without_gradient(one)) for one in network.layers
        )
        return Uninspected(
            tuple(network.uninspected.items()),
            tuple((name, reason) for name, reason in found if reason),
        )


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
    located = _named(_with_what_follows(steps), names)
    return Network(program, steps, located, _uninspected(steps, located, names))


def _with_what_follows(steps: Steps) -> list[Located]:
    chains = Chains(steps)
    bare = [one for step in steps.steps if (one := _located(steps, step)) is not None]
    found = [
        _nonlinearity(steps, one.start, tuple(chains.stages(one.start, one.axes)))
        for one in bare
    ]
    # The nonlinearity of a sum of layers belongs to the last of them.
    ends = [
        stages[-1].end if stages else one.start
        for one, (stages, _) in zip(bare, found, strict=True)
    ]
    owners = dict(zip(ends, bare, strict=True))
    return [
        _followed(steps, one, stages, nonlinearity)
        if owners[end] is one
        else _followed(steps, one, _until_merge(stages), None)
        for one, end, (stages, nonlinearity) in zip(bare, ends, found, strict=True)
    ]


def _located(steps: Steps, step: Step) -> Located | None:
    geometry = weight_geometry(steps, step)
    if geometry is None:
        return None
    origin = steps.origins[geometry.weight]
    size = {leaf: math.prod(steps.avals[leaf].shape) for leaf in origin.parameters}
    around = steps.axes(step.path)
    return Located(
        Layer("", geometry.kind, geometry.fan_in, geometry.fan_out, geometry.units),
        max(size, key=lambda leaf: (size[leaf], -leaf)),
        origin.parameters,
        step,
        geometry.operand,
        step.outputs[0],
        geometry.axes,
        around,
        tuple(axis for axis in around if axis in origin.varies),
    )


def _followed(
    steps: Steps,
    one: Located,
    stages: tuple[Stage, ...],
    nonlinearity: Activation | None,
) -> Located:
    layer = one.layer._replace(
        activation=None if nonlinearity is None else nonlinearity.name,
        stack=tuple(axis.size for axis in one.stack),
    )
    own = [
        steps.origins[value].parameters
        for stage in stages
        for step in stage.steps
        for value in steps.weights(step)
    ]
    leaves = one.leaves.union(*own)
    return one._replace(
        layer=layer, leaves=leaves, stages=stages, activation=nonlinearity
    )


def _until_merge(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    for index, stage in enumerate(stages):
        if stage.kind == "merge":
            return stages[:index]
    return stages


def linear_part(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """Returns the stages before the first nonlinearity."""
    for index, stage in enumerate(stages):
        if stage.kind in ("activation", "softmax"):
            return stages[:index]
    return stages


def _nonlinearity(
    steps: Steps, start: int, stages: tuple[Stage, ...]
) -> tuple[tuple[Stage, ...], Activation | None]:
    """Recognizes the nonlinearity, and drops the stages that do not belong to it."""
    num_linear = len(linear_part(stages))
    if num_linear == len(stages):
        return _until_merge(stages), None
    if stages[-1].kind == "softmax":
        is_log = "log" in all_operations(stages[-1].steps)
        return stages, Activation("log_softmax" if is_log else "softmax")
    first = num_linear  # a scaling by numbers before it is part of what it does
    while first and _is_scaling(steps, stages[first - 1]):
        first -= 1
    known: list[tuple[tuple[Stage, ...], Activation]] = []
    for end in range(len(stages), num_linear, -1):
        for begin in sorted({first, num_linear}):
            before = stages[begin - 1].end if begin else start
            taken = [step for stage in stages[begin:end] for step in stage.steps]
            found = activation.recognize(
                steps.with_constants(taken), before, stages[end - 1].end, steps.literals
            )
            found = found._replace(num_scalings=num_linear - begin)
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
    named, counts, taken = [], Counter[str](), set[str]()
    for one in located:
        parent = parents[one.weight]
        below = [leaf for leaf in parents if f"{names[leaf]}/".startswith(f"{parent}/")]
        name = parent if parent and len(below) == 1 else names[one.weight]
        plain = name
        counts[plain] += 1
        while counts[plain] > 1 and (name := f"{plain}#{counts[plain]}") in taken:
            counts[plain] += 1
        taken.add(name)
        named.append(one._replace(layer=one.layer._replace(name=name)))
    return tuple(named)


def _parent(name: str) -> str:
    return name.rpartition("/")[0]


def _uninspected(
    steps: Steps, located: tuple[Located, ...], names: tuple[str, ...]
) -> dict[str, str]:
    covered = frozenset().union(*(one.leaves for one in located))
    closed: dict[int, str] = {}
    users: dict[int, set[str]] = {}
    for step in steps.steps:
        name = step.eqn.primitive.name
        read = step.inputs
        if step.is_opened:  # all but the test of a while loop stands in the list
            read = tuple(step.inputs[index] for index in control.beside(step.eqn))
        for value in read:
            if value is None or not steps.is_weight(value):
                continue
            for leaf in steps.origins[value].parameters:
                users.setdefault(leaf, set()).add(name)
                if _may_hide_a_layer(step.eqn):
                    closed[leaf] = name
    reasons = {}
    for index, name in enumerate(names):
        if index in closed:
            reasons[name] = f"used inside of {closed[index]}, which is not looked into"
        elif index not in users and is_inexact(steps.avals[index]):
            reasons[name] = "not used"
        elif index not in covered and is_inexact(steps.avals[index]):
            verbs = ", ".join(sorted(users[index] - STRUCTURAL))
            reasons[name] = (
                "not the weight of a product with the inputs or of a look-up, nor a"
                f" part of what follows one; used by {verbs}"
            )
    return reasons


def _may_hide_a_layer(eqn: compat.Equation) -> bool:
    inside = operations(eqn)
    return eqn.primitive.name not in inside and bool(inside & CONTRACTIONS)
