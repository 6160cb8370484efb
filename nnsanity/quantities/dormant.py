"""Units that are hardly active beside the others of their layer."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nnsanity._types import ApplyFn, Array, Params, PyTree
from nnsanity.quantities.dead import counts_of, shares, sum_of_counts
from nnsanity.quantities.passage import Look, SeenByLook, after, seen_forward
from nnsanity.quantities.units import activity, num_rows
from nnsanity.tracing.layers import Located, Network, Uninspected

DORMANT_SCORE = 0.025
"""Activity, in units of the layer's mean, up to which a unit is dormant (Sokar)."""


class DormantUnits(NamedTuple):
    """Units that are hardly active beside the others of their layer.

    Attributes:
        activity: float32[units] for each layer with a nonlinearity, mean of the
            absolute outputs; stacked layers have one more axis.
        score: float32[units], activity in units of the layer's mean; 1 on the average.
        dormant: bool[units], whose score is at most the threshold.
        fraction: float32[], share of dormant units; healthy is near 0.
        num_seen: int32[], how many examples, positions and turns the mean is over.
        threshold: float32[].
        uninspected: parameters that belong to no layer, and why.
    """

    activity: dict[str, Array]
    score: dict[str, Array]
    dormant: dict[str, Array]
    fraction: dict[str, Array]
    num_seen: dict[str, Array]
    threshold: Array
    uninspected: Uninspected


@functools.partial(jax.jit, static_argnums=0)
def dormant_units(
    apply_fn: ApplyFn,
    params: Params,
    inputs: PyTree,
    *,
    threshold: Array | float = DORMANT_SCORE,
) -> DormantUnits:
    """Finds units whose outputs are next to nothing beside those of their layer.

    Works for any nonlinearity.  A dead unit is dormant, a dormant one is not always
    dead.  Worry where the share grows while a network trains: it uses less and less of
    itself.  Costs one forward pass.

    Args:
        apply_fn: ``apply_fn(params, inputs) -> outputs``.
        params: any pytree of arrays.
        inputs: leading axis the examples.
        threshold: highest score of a dormant unit.

    Returns:
        ``DormantUnits``, by layer name.

    Example:
        >>> params = {"w": jnp.array([[1.0, 0.001]])}
        >>> apply_fn = lambda params, x: jnp.tanh(x @ params["w"])
        >>> dormant_units(apply_fn, params, jnp.array([[1.0], [-1.0]])).dormant
        {'w': Array([False,  True], dtype=bool)}

    References:
        Sokar et al. (2023), "The Dormant Neuron Phenomenon in Deep Reinforcement
        Learning", definition 3.1.
    """
    network, seen = seen_forward(apply_fn, params, inputs, {"active": ACTIVE_LOOK})
    return dormant_of(network, seen, threshold=threshold)


class _Active(NamedTuple):
    """Mean activity of each unit, and over how many values."""

    mean: Array
    num_seen: Array


def _active(values: Array, one: Located) -> _Active:
    return _Active(activity(values, one=one), num_rows(values, one))


def _pooled(earlier: _Active, later: _Active) -> _Active:
    count = sum_of_counts(earlier.num_seen, later.num_seen)
    share = later.num_seen / jnp.maximum(count, 1)
    mean = earlier.mean + (later.mean - earlier.mean) * share[..., None]
    return _Active(mean.astype(jnp.float32), count)


def _with_nonlinearity(network: Network, one: Located) -> int | None:
    return None if one.activation is None else after(network, one)


ACTIVE_LOOK = Look(_with_nonlinearity, _active, _pooled)


def dormant_of(
    network: Network, seen: SeenByLook, *, threshold: Array | float = DORMANT_SCORE
) -> DormantUnits:
    """Gathers what was seen by ``ACTIVE_LOOK``."""
    found = seen.get("active", {})
    means = {
        name: one.only(lambda value: value.mean).merged(jnp.mean)
        for name, one in found.items()
    }
    return _dormant(
        means,
        counts_of(network, found),
        jnp.float32(threshold),
        Uninspected.of(network),
    )


def _dormant(
    means: dict[str, Array],
    counts: dict[str, Array],
    threshold: Array,
    uninspected: Uninspected,
) -> DormantUnits:
    score = {}
    for name, mean in means.items():
        layer = jnp.mean(mean, axis=-1, keepdims=True)
        score[name] = jnp.where(layer == 0, 0, mean / jnp.where(layer == 0, 1, layer))
    dormant = {name: ~(one > threshold) for name, one in score.items()}
    return DormantUnits(
        means, score, dormant, shares(dormant), counts, threshold, uninspected
    )


def merge_dormant_units(a: DormantUnits, b: DormantUnits) -> DormantUnits:
    """Merges what two batches showed of one network; the threshold is that of ``a``.

    Associative up to rounding, and costs nothing.

    Args:
        a: of some examples.
        b: of other examples and the same network.
    """
    merged = {
        name: _pooled(
            _Active(a.activity[name], a.num_seen[name]),
            _Active(b.activity[name], b.num_seen[name]),
        )
        for name in a.activity
    }
    return _dormant(
        {name: one.mean for name, one in merged.items()},
        {name: one.num_seen for name, one in merged.items()},
        a.threshold,
        a.uninspected,
    )
