"""How much a clip, a maximum or a minimum blocks at run time."""

import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnsanity._tree import is_inexact
from nnsanity._types import ApplyFn, Array, Params, PyTree
from nnsanity.tracing.compat import Equation, is_literal, source_line
from nnsanity.tracing.layers import Network, Uninspected, inspect
from nnsanity.tracing.operations import operations
from nnsanity.tracing.steps import Site, Step
from nnsanity.tracing.tap import Taps, evaluate

_CONTROL = frozenset({"scan", "while", "cond", "shard_map"})
_BLOCKING = {"max": (0, 1), "min": (0, 1), "clamp": (1,)}
"""Operations that pass an operand or a bound, and which operands may be data."""


class BlockedShare(NamedTuple):
    """How much gets stuck at bounds.

    Attributes:
        share: float32[] for each clip, maximum or minimum: the part of its values that
            is a bound, and so passes no gradient.  By the source line,
            ``file.py:41 (function): clamp``, with ``#2``, ``#3`` where it stands there
            more than once.
        uninspected: parameters that belong to no layer, and loops and branches without
            layers that hold such bounds; and why.
    """

    share: dict[str, Array]
    uninspected: Uninspected


@functools.partial(jax.jit, static_argnums=0)
def blocked_share(apply_fn: ApplyFn, params: Params, inputs: PyTree) -> BlockedShare:
    """Measures how many values stand at the bound of a clip, a maximum or a minimum.

    No gradient passes there.  A maximum or minimum of two values that both depend on
    the inputs passes one of them, and is left out; so are functions that bring their
    own derivative, such as ``jax.nn.relu``.  Worry above a half, unless it is meant as
    a ReLU: of those ``dead_units`` tells.  Works on any function of parameters and
    inputs, a loss as well.  Costs one forward pass.

    Args:
        apply_fn: ``apply_fn(params, inputs) -> outputs``.
        params: any pytree of arrays.
        inputs: leading axis the examples.

    Returns:
        ``BlockedShare``.

    Example:
        >>> apply_fn = lambda params, x: x * jnp.minimum(params * x, 1.0)
        >>> inputs = jnp.array([0.5, 3.0, -7.0, 1.5])
        >>> blocked = blocked_share(apply_fn, jnp.ones(1), inputs)
        >>> [round(float(one), 2) for one in blocked.share.values()]
        [0.5]
    """
    network = inspect(apply_fn, params, inputs)
    found = dict(_named(_bounded(network)))
    kept: dict[str, Array] = {}
    chained: dict[Site, list[tuple[str, bool]]] = {}
    for name, (step, data) in found.items():
        operand = network.steps.sites[data]
        if operand is not None:
            chained.setdefault(operand, []).append((name, False))
            chained.setdefault(network.site(step.outputs[0]), []).append((name, True))

    def look(names: list[tuple[str, bool]], value: Array) -> dict[str, Array]:
        shares = {}
        for name, is_result in names:
            if is_result:
                blocked = value != kept[name]
                shares[name] = jnp.mean(blocked, dtype=jnp.float32)
            else:
                kept[name] = value  # of the latest trace: loop bodies have several
        return shares

    read = {site: functools.partial(look, names) for site, names in chained.items()}
    leaves = jax.tree.leaves((params, inputs))
    _, readings = evaluate(network.program, leaves, Taps(read=read))
    share = {}
    for name, (step, data) in found.items():
        if network.steps.sites[data] is not None:
            reading = readings[network.site(step.outputs[0])]
            reading = reading._replace(value=reading.value[name])
            turns = tuple(range(len(network.steps.axes(step.path))))
            share[name] = reading.merged(turns, jnp.mean).where_it_ran()
    told = Uninspected.of(network)
    more = (*told.parameters, *_closed(network))
    return BlockedShare(share, Uninspected(more, told.gradients))


def _closed(network: Network) -> Iterator[tuple[str, str]]:
    """Yields the loops and branches that hold bounds and were not opened."""
    for step in network.steps.steps:
        name = step.eqn.primitive.name
        is_closed = name in _CONTROL and not step.is_opened
        if is_closed and operations(step.eqn) & set(_BLOCKING):
            where = f"{source_line(step.eqn)}: {name}"
            yield where, "its bounds are not looked at, since it holds no layer"


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


def _named(found: Iterable[tuple[Step, int]]) -> Iterator[tuple[str, tuple[Step, int]]]:
    counts = Counter[str]()
    for step, data in found:
        words = f"{source_line(step.eqn)}: {step.eqn.primitive.name}"
        counts[words] += 1
        number = counts[words]
        yield (words if number == 1 else f"{words}#{number}"), (step, data)
