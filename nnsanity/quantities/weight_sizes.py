"""How large the weights of each layer are, and what they make of a batch."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnsanity._tree import described, in_float32, mean_square
from nnsanity._types import ApplyFn, Array, Params, PyTree
from nnsanity.quantities.descent import floats_of, with_floats
from nnsanity.quantities.passage import (
    Look,
    SeenByLook,
    before,
    in_places,
    places,
    seen_forward,
    weight,
)
from nnsanity.tracing.biases import bias_value
from nnsanity.tracing.layers import Located, Network, Uninspected, inspect
from nnsanity.tracing.tap import Taps, evaluate
from nnsanity.tracing.widen import part_of

MAX_COMPARED = 2**22
"""Numbers of a weight up to which its units are compared."""


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


def doubled_share(network: Network, params: Params) -> dict[str, float]:
    """Returns the share of each layer's units that have the very weights of another.

    On the host; layers whose weight is no parameter as it stands, or a very large one,
    are left out.
    """
    leaves, found = jax.tree.leaves(params), {}
    for one in network.layers:
        part = part_of(network, one, of_units=True)
        if part is not None and leaves[part.leaf].size <= MAX_COMPARED:
            rows = np.moveaxis(np.asarray(leaves[part.leaf]), part.axis, 0)
            unique = np.unique(rows.reshape(len(rows), -1), axis=0)
            found[one.layer.name] = 1 - len(unique) / len(rows)
    return found


@functools.partial(jax.jit, static_argnums=0)
def layer_update_ratios(
    apply_fn: ApplyFn, updates: PyTree, params: Params, inputs: PyTree
) -> Array:
    """Compares each layer's update with its weights, as the layer uses them, by depth.

    Healthy is about 1e-3 at every layer (A. Karpathy); worry where it falls by powers
    of ten from layer to layer, then depth keeps some of them from learning.  Weights
    that are made of parameters (normalized, masked, a sum) change to first order; 0
    inside of a function whose derivative was written by hand.  Costs one forward pass
    with derivatives.

    Args:
        apply_fn: ``apply_fn(params, inputs) -> outputs``.
        updates: of an optimizer, a tree like the parameters.
        params: any pytree of arrays.
        inputs: leading axis the examples; only their shapes count.

    Returns:
        float32[places], ``|update| / |weights|`` in the order of ``layers``, blocks of
        a stack one by one; inf or NaN where the weights are 0.

    Raises:
        ValueError: if the trees differ.

    Example:
        >>> params = {"w1": jnp.full((2, 4), 2.0), "w2": jnp.ones((4, 1))}
        >>> apply_fn = lambda params, x: jnp.tanh(x @ params["w1"]) @ params["w2"]
        >>> updates = {"w1": jnp.full((2, 4), 1.0), "w2": jnp.full((4, 1), 0.25)}
        >>> layer_update_ratios(apply_fn, updates, params, jnp.ones((3, 2)))
        Array([0.5 , 0.25], dtype=float32)
    """
    if jax.tree.map(jnp.shape, updates) != jax.tree.map(jnp.shape, params):
        raise ValueError(
            "layer_update_ratios: updates and params must be trees of the same shapes,"
            f" got {described(updates)} and {described(params)}"
        )

    network = inspect(apply_fn, params, inputs)
    sites = {
        one.layer.name: network.site(value)
        for one in network.layers
        if (value := weight(network, one)) is not None
    }

    def squares(floats: PyTree) -> Array:
        leaves = jax.tree.leaves((with_floats(params, floats), inputs))
        taps = Taps(read=dict.fromkeys(sites.values(), _square))
        _, readings = evaluate(network.program, leaves, taps)
        sizes = {
            one.layer.name: readings[sites[one.layer.name]]
            .merged(one.shared, jnp.mean)
            .where_it_ran()
            for one in network.layers
            if one.layer.name in sites
        }
        return in_places(network, sizes)

    floats = floats_of(params)
    changes = jax.tree.map(
        lambda leaf, update: update.astype(leaf.dtype), floats, floats_of(updates)
    )
    size, change = jax.jvp(squares, (floats,), (changes,))
    return jnp.sqrt(change / size)


_square = jax.custom_jvp(mean_square)
"""The mean square; what it hands on for a tangent is the tangent's own."""


@_square.defjvp
def _square_of_both(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    return mean_square(*primals), mean_square(*tangents)


def _first(pair: tuple) -> Array:
    return pair[0]


def _second(pair: tuple) -> Array:
    return pair[1]


def _largest(values: Array, **options: Any) -> Array:
    return jnp.max(values, initial=-jnp.inf, **options)


def _mean_square(values: Array, one: Located) -> Array:
    del one
    return mean_square(values)


def _signal(values: Array, one: Located) -> tuple[Array, Array]:
    values = jnp.abs(values) if not jnp.isrealobj(values) else values
    values = in_float32(values)
    size = jnp.sqrt(jnp.mean(values**2))
    axes = one.linear_stages[-1].axes if one.linear_stages else one.axes
    centre = jnp.mean(values, axis=axes, keepdims=True)
    spread = jnp.max(jnp.abs(values - centre))
    spread = jnp.where(size > 0, spread / size, jnp.nan)
    # In two passes, corrected: equal numbers have none, however their sum is rounded
    # (Chan, Golub and LeVeque 1983).
    rest = values - jnp.mean(values)
    variance = jnp.mean(rest**2) - jnp.mean(rest) ** 2
    variance = jnp.where(variance <= (_ROUNDING * size) ** 2, 0, variance)
    return variance.astype(jnp.float32), spread.astype(jnp.float32)


_ROUNDING = 1e-6
WEIGHT_LOOKS = {
    "weight": Look(weight, _mean_square),
    "made": Look(lambda network, one: one.start, _mean_square),
    "bias": Look(bias_value, _mean_square),
    "signal": Look(before, _signal),
}
