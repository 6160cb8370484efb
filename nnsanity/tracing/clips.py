"""Clips, maxima and minima that bound a value, and a program without them."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

from nnsanity._tree import is_inexact
from nnsanity._types import Array, Params, PyTree
from nnsanity.tracing.compat import Equation, called_jaxpr, is_literal
from nnsanity.tracing.control import Path
from nnsanity.tracing.layers import Located, Network, inspect
from nnsanity.tracing.operations import operations
from nnsanity.tracing.reach import Frame, place
from nnsanity.tracing.replace import chain, has_own_derivative, straddled
from nnsanity.tracing.steps import Site, Step
from nnsanity.tracing.tap import Taps, evaluate

_CONTROL = frozenset({"scan", "while", "cond", "shard_map"})
_BLOCKING = {"max": (0, 1), "min": (0, 1), "clamp": (1,)}
"""Operations that pass an operand or a bound, and which operands may be data."""


class Clip(NamedTuple):
    """A clip, a maximum or a minimum.

    Attributes:
        step: the operation.
        operand: where the value that it bounds is made.
        result: where what it passes on is.
        turns: how many loops lie around it.
        has_parameters: whether a gradient is wanted: parameters are in the value.
        value: number of the value that it bounds.
    """

    step: Step
    operand: Site
    result: Site
    turns: int
    has_parameters: bool
    value: int


def clips(network: Network) -> dict[str, Clip]:
    """Finds what bounds data, by source line, ``file.py:41 (function): clamp``."""
    found = dict(_named(network, _bounded(network)))
    steps = network.steps
    return {
        name: Clip(
            step,
            operand,
            network.site(step.outputs[0]),
            len(steps.axes(step.path)),
            bool(steps.origins[value].parameters),
            value,
        )
        for name, (step, value) in found.items()
        if (operand := steps.sites[value]) is not None
    }


def between_layers(network: Network, located: Iterable[Located]) -> dict[str, Clip]:
    """Keeps the clips behind parameters that are no part of a layer's nonlinearity.

    Nor those of a value that is used beside them: a gradient passes there, as in the
    Huber loss.
    """
    inside = {step.path for one in located for s in one.stages for step in s.steps}
    steps = [step for step in network.steps.steps if not step.is_opened]
    uses = Counter(value for step in steps for value in {*step.inputs})
    return {
        name: clip
        for name, clip in clips(network).items()
        if clip.has_parameters and clip.step.path not in inside and uses[clip.value] < 2
    }


def closed(network: Network) -> Iterator[tuple[str, str]]:
    """Yields the loops and branches that hold clips and were not opened, and why."""
    for step in network.steps.steps:
        name = step.eqn.primitive.name
        is_closed = name in _CONTROL and not step.is_opened
        if is_closed and operations(step.eqn) & set(_BLOCKING):
            where = f"{_line(network, step)}: {name}"
            yield where, "its bounds are not looked at, since it holds no layer"


def inlined(network: Network, found: Iterable[Clip]) -> set[Path]:
    """Finds the ``remat`` calls that hold one end of a clip and not the other."""
    ends = [(clip.operand, clip.result) for clip in found]
    return {path for pair in ends for path in straddled(pair)}


def without_clips(fn: Callable, names: Collection[str]) -> Callable:
    """Returns a function that runs ``fn`` and leaves out some of its clips.

    Args:
        fn: any function of parameters first, as ``apply_fn`` or ``loss_fn``.
        names: as ``clips`` gives them; those that ``fn`` does not have, or has inside
            of a call whose derivative the user wrote, are passed over.
    """

    def run(params: Params, *rest: PyTree) -> PyTree:
        network = inspect(fn, params, *rest)
        chosen = [
            clip
            for name, clip in clips(network).items()
            if name in names and not has_own_derivative(network, clip.step.path)
        ]
        inline = frozenset(inlined(network, chosen))
        taps = Taps(write=_passing(chosen), inline=inline)
        leaves = jax.tree.leaves((params, *rest))
        outputs, _ = evaluate(network.program, leaves, taps)
        structure = jax.tree.structure(network.program.out_shape)
        return jax.tree.unflatten(structure, outputs)

    return run


def _passing(chosen: Iterable[Clip]) -> Mapping[Site, Callable[[Array], Array]]:
    """Writes the value that a clip bounds in the place of what it passes on."""
    write: dict[Site, Callable[[Array], Array]] = {}
    for clip in chosen:
        kept: list[Array] = []

        def keep(value: Array, kept: list[Array] = kept) -> Array:
            kept[:] = [value]  # of the latest trace: loop bodies have several
            return value

        def hand_on(value: Array, kept: list[Array] = kept) -> Array:
            del value
            return kept[0]

        for site, function in ((clip.operand, keep), (clip.result, hand_on)):
            chain(write, site, function)
    return write


def _bounded(network: Network) -> Iterator[tuple[Step, int]]:
    """Yields the bounds that data meet, and the value that is bounded."""
    steps = network.steps
    for step in steps.steps:
        places = _BLOCKING.get(step.eqn.primitive.name, ())
        if not is_inexact(step.eqn.outvars[0].aval):
            continue
        if _is_guard(step.eqn):
            continue
        met = [step.inputs[place] for place in places]
        data = [
            value for value in met if value is not None and steps.origins[value].data
        ]
        shape = step.eqn.outvars[0].aval.shape
        if len(data) == 1 and steps.avals[data[0]].shape == shape:
            yield step, data[0]


def _is_guard(eqn: Equation) -> bool:
    """Tells a maximum with minus infinity, as a softmax has it, from a bound."""
    numbers = [atom.val for atom in eqn.invars if is_literal(atom)]
    return any(not np.isfinite(number).all() for number in numbers)


def _named(
    network: Network, found: Iterable[tuple[Step, int]]
) -> Iterator[tuple[str, tuple[Step, int]]]:
    counts = Counter[str]()
    for step, data in found:
        words = f"{_line(network, step)}: {step.eqn.primitive.name}"
        counts[words] += 1
        number = counts[words]
        yield (words if number == 1 else f"{words}#{number}"), (step, data)


def _line(network: Network, step: Step) -> str:
    """Says where the user wrote an operation, or the call that it is a part of."""
    frame = Frame(network.program.jaxpr)
    for depth in range(1, len(step.path)):
        here = step.path[:depth]
        entered = [one for one in network.steps.bodies.values() if one.path == here]
        call = frame.body.eqns[here[-1]] if here[-1] >= 0 else None
        called = None if call is None else called_jaxpr(call)
        if entered:
            frame = Frame(entered[0].jaxpr, call or frame.call, frame)
        elif called is not None:
            frame = Frame(called[0], call, frame)
    return place(step.eqn, frame)
