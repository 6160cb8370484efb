"""Units that stand where their nonlinearity is level."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nnsanity._types import ApplyFn, Array, Params, PyTree
from nnsanity.quantities.dead import all_turns, counts_of, sum_of_counts
from nnsanity.quantities.passage import Look, SeenByLook, seen_forward
from nnsanity.quantities.units import has_flat_end, num_rows, saturated
from nnsanity.tracing.layers import Located, Network, Uninspected


class SaturatedUnits(NamedTuple):
    """Units whose nonlinearity passes next to nothing back.

    Attributes:
        saturated: bool[units] for each layer whose nonlinearity levels off somewhere,
            units that stand on a level part for every example; stacked layers have one
            more axis.
        share: float32[], share of the values on a level part; healthy is under 0.5.
        num_seen: int32[], how many examples, positions and turns each unit was seen at.
        uninspected: parameters that belong to no layer, and why.
    """

    saturated: dict[str, Array]
    share: dict[str, Array]
    num_seen: dict[str, Array]
    uninspected: Uninspected


@functools.partial(jax.jit, static_argnums=0)
def saturated_units(
    apply_fn: ApplyFn, params: Params, inputs: PyTree
) -> SaturatedUnits:
    """Finds units that stand where their nonlinearity is level.

    Level is what has less than a twentieth of the steepest slope, and of a slope of 1
    where that is less: sigmoid beyond 4.3, tanh beyond 2.2, ReLU below 0.  Told by
    running the nonlinearity on a grid, not by its name.  Worry where more than half of
    a sigmoid or tanh layer is level: weights or inputs are too large.  Costs one
    forward pass.

    Args:
        apply_fn: ``apply_fn(params, inputs) -> outputs``.
        params: any pytree of arrays.
        inputs: leading axis the examples.

    Returns:
        ``SaturatedUnits``, by layer name.

    Example:
        >>> params = {"w": jnp.array([[1.0, 9.0]])}
        >>> apply_fn = lambda params, x: jnp.tanh(x @ params["w"])
        >>> found = saturated_units(apply_fn, params, jnp.array([[1.0], [-1.0]]))
        >>> found.saturated, found.share
        ({'w': Array([False,  True], dtype=bool)}, {'w': Array(0.5, dtype=float32)})

    References:
        Rakitianskaia and Engelbrecht (2015), "Measuring saturation in neural networks".
    """
    looks = {"saturated": SATURATED_LOOK}
    return saturated_of(*seen_forward(apply_fn, params, inputs, looks))


class _Saturated(NamedTuple):
    """Units that were always level, the share of level values, and of how many."""

    still: Array
    share: Array
    num_seen: Array


def _saturated(values: Array, one: Located) -> _Saturated:
    level = saturated(values, one=one)
    share = jnp.mean(level, dtype=jnp.float32)
    return _Saturated(jnp.all(level, axis=0), share, num_rows(values, one))


def _either(earlier: _Saturated, later: _Saturated) -> _Saturated:
    count = sum_of_counts(earlier.num_seen, later.num_seen)
    weight = later.num_seen / jnp.maximum(count, 1)
    share = earlier.share + (later.share - earlier.share) * weight
    return _Saturated(earlier.still & later.still, share.astype(jnp.float32), count)


def _levels_off(network: Network, one: Located) -> int | None:
    del network
    return one.entry[0] if has_flat_end(one) else None


SATURATED_LOOK = Look(_levels_off, _saturated, _either)


def saturated_of(network: Network, seen: SeenByLook) -> SaturatedUnits:
    """Gathers what was seen by ``SATURATED_LOOK``."""
    found = seen.get("saturated", {})
    return SaturatedUnits(
        {name: all_turns(one) for name, one in found.items()},
        {
            name: one.only(lambda value: value.share).merged(jnp.mean)
            for name, one in found.items()
        },
        counts_of(network, found),
        Uninspected.of(network),
    )


def merge_saturated_units(a: SaturatedUnits, b: SaturatedUnits) -> SaturatedUnits:
    """Merges what two batches showed of one network.

    Associative up to rounding, and costs nothing.

    Args:
        a: of some examples.
        b: of other examples and the same network.
    """
    merged = {
        name: _either(
            _Saturated(a.saturated[name], a.share[name], a.num_seen[name]),
            _Saturated(b.saturated[name], b.share[name], b.num_seen[name]),
        )
        for name in a.saturated
    }
    return SaturatedUnits(
        {name: one.still for name, one in merged.items()},
        {name: one.share for name, one in merged.items()},
        {name: one.num_seen for name, one in merged.items()},
        a.uninspected,
    )
