"""How much a clip, a maximum or a minimum blocks at run time."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nnsanity._types import ApplyFn, Array, Params, PyTree
from nnsanity.tracing.clips import Clip, clips, closed, inlined
from nnsanity.tracing.layers import Network, Uninspected, inspect
from nnsanity.tracing.steps import Site
from nnsanity.tracing.tap import Reading, Taps, evaluate


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
    own derivative, such as ``jax.nn.relu``.  Worry above nine tenths, unless it is
    meant as a ReLU: of those ``dead_units`` tells.  Works on any function of parameters
    and inputs, a loss as well.  Costs one forward pass.

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
    found = clips(network)
    inline = frozenset(inlined(network, found.values()))
    measures = at_clips(found)
    read = {site: functools.partial(_all, one) for site, one in measures.items()}
    leaves = jax.tree.leaves((params, inputs))
    _, readings = evaluate(network.program, leaves, Taps(read=read, inline=inline))
    seen = {
        name: (one := readings[clip.result])._replace(value=one.value[name])
        for name, clip in found.items()
    }
    return blocked_of(network, found, seen)


def _all(measures: Mapping[str, Callable], value: Array) -> dict[str, PyTree]:
    return {name: measure(value) for name, measure in measures.items()}


def at_clips(found: Mapping[str, Clip]) -> dict[Site, dict[str, Callable]]:
    """Says what to measure at both ends of each clip, by place and by name.

    At its result, the share of values that it moved to a bound.
    """
    measures: dict[Site, dict[str, Callable]] = {}
    kept: dict[str, Array] = {}

    def keep(name: str, value: Array) -> None:
        kept[name] = value  # of the latest trace: loop bodies have several

    def compare(name: str, value: Array) -> Array:
        return jnp.mean(value != kept[name], dtype=jnp.float32)

    for name, clip in found.items():
        ends = ((clip.operand, f"before {name}", keep), (clip.result, name, compare))
        for site, key, function in ends:
            measures.setdefault(site, {})[key] = functools.partial(function, name)
    return measures


def blocked_of(
    network: Network, found: Mapping[str, Clip], seen: Mapping[str, Reading]
) -> BlockedShare:
    """Gathers what was seen by ``at_clips`` at the results."""
    share = {
        name: seen[name].merged(tuple(range(clip.turns)), jnp.mean).where_it_ran()
        for name, clip in found.items()
    }
    told = Uninspected.of(network)
    return BlockedShare(
        share, Uninspected((*told.parameters, *closed(network)), told.gradients)
    )
