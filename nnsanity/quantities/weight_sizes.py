"""How large the weights of each layer are, and what they make of a batch."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nnsanity._tree import in_float32
from nnsanity._types import ApplyFn, Array, Params, PyTree
from nnsanity.quantities.drawing import bias_value
from nnsanity.quantities.passage import (
    Look,
    SeenByLook,
    before,
    in_places,
    places,
    seen_forward,
    weight,
)
from nnsanity.tracing.layers import Located, Network, Uninspected


class WeightStats(NamedTuple):
    """How each layer starts, in the order of execution; blocks of a stack one by one.

    Attributes:
        deviation: float32[places], of the weights about zero, as the layer uses them.
        gain: float32[places], deviation times the root of the fan in; healthy is about
            1.4 before a rectifier and 1 elsewhere.
        signal: float32[places], deviation of what enters the nonlinearity.
        unit_spread: float32[places], largest difference between two units for the same
            example, in units of their size; 0 where all units are one, NaN where all
            of them are 0.
        bias: float32[places], root mean square of the biases, in units of what the
            weights make of the batch; 0 where there is none, healthy is 0 at the start.
        uninspected: parameters that belong to no layer, and why.
    """

    deviation: Array
    gain: Array
    signal: Array
    unit_spread: Array
    bias: Array
    uninspected: Uninspected


@functools.partial(jax.jit, static_argnums=0)
def weight_stats(apply_fn: ApplyFn, params: Params, inputs: PyTree) -> WeightStats:
    """Measures the weights of each layer and the signal that they make of a batch.

    Layers inside of a scan over layers count once for each block, in the order of the
    blocks.  Costs one forward pass.

    Args:
        apply_fn: ``apply_fn(params, inputs) -> outputs``.
        params: any pytree of arrays.
        inputs: leading axis the examples.

    Returns:
        ``WeightStats``, in the order of ``layers``.

    Example:
        >>> params = {"w": jnp.ones((4, 2))}
        >>> stats = weight_stats(lambda p, x: x @ p["w"], params, jnp.eye(4))
        >>> stats.gain, stats.unit_spread
        (Array([2.], dtype=float32), Array([0.], dtype=float32))

    References:
        Glorot and Bengio (2010); LeCun et al. (1998), section 4.6; He et al. (2015).
    """
    return stats_of(*seen_forward(apply_fn, params, inputs, WEIGHT_LOOKS))


def stats_of(network: Network, seen: SeenByLook) -> WeightStats:
    """Gathers what was seen by ``WEIGHT_LOOKS``."""

    def by_layer(key: str, reduce: Callable) -> dict[str, PyTree]:
        return {name: one.merged(reduce) for name, one in seen.get(key, {}).items()}

    squares = by_layer("weight", jnp.mean)
    made = by_layer("made", jnp.mean)
    bias = by_layer("bias", jnp.mean)
    signal = seen.get("signal", {})
    variance = {name: one.only(_first).merged(jnp.mean) for name, one in signal.items()}
    # Units are alike where they are in every turn.
    spread = {name: one.only(_second).merged(_largest) for name, one in signal.items()}
    deviation = jnp.sqrt(in_places(network, squares))
    fans = [float(place.one.layer.fan_in) for place in places(network)]
    ratio = {name: bias[name] / jnp.maximum(made[name], 1e-30) for name in bias}
    no_bias = {one.layer.name: jnp.zeros(()) for one in network.layers}
    return WeightStats(
        deviation,
        deviation * jnp.sqrt(jnp.array(fans, jnp.float32)),
        jnp.sqrt(in_places(network, variance)),
        in_places(network, spread),
        jnp.sqrt(in_places(network, no_bias | ratio)),
        Uninspected.of(network),
    )


def _first(pair: tuple) -> Array:
    return pair[0]


def _second(pair: tuple) -> Array:
    return pair[1]


def _largest(values: Array, **options: Any) -> Array:
    return jnp.max(values, initial=-jnp.inf, **options)


def _mean_square(values: Array, one: Located) -> Array:
    del one
    values = jnp.abs(in_float32(values))
    return jnp.mean(values**2).astype(jnp.float32)


def _signal(values: Array, one: Located) -> tuple[Array, Array]:
    values = jnp.abs(values) if not jnp.isrealobj(values) else values
    values = in_float32(values)
    size = jnp.sqrt(jnp.mean(values**2))
    axes = one.linear_stages[-1].axes if one.linear_stages else one.axes
    centre = jnp.mean(values, axis=axes, keepdims=True)
    spread = jnp.max(jnp.abs(values - centre))
    spread = jnp.where(size > 0, spread / size, jnp.nan)
    variance = jnp.var(values)
    variance = jnp.where(variance <= (_ROUNDING * size) ** 2, 0, variance)
    return variance.astype(jnp.float32), spread.astype(jnp.float32)


_ROUNDING = 1e-6
WEIGHT_LOOKS = {
    "weight": Look(weight, _mean_square),
    "made": Look(lambda network, one: one.start, _mean_square),
    "bias": Look(bias_value, _mean_square),
    "signal": Look(before, _signal),
}
