"""How the signal grows or fades on its way through a network, forward and back."""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nnsanity._tree import in_float32
from nnsanity._types import ApplyFn, Array, LossFn, Params, PyTree
from nnsanity.quantities.descent import check_loss
from nnsanity.quantities.passage import (
    Look,
    Passage,
    before,
    in_places,
    places,
    seen_both_ways,
)
from nnsanity.tracing.layers import Located, Network, Uninspected, inspect


class SignalGain(NamedTuple):
    """What each layer makes of the signal, in the order of execution.

    Blocks of a stacked layer count one by one, as in ``weight_stats``.

    Attributes:
        signal: float32[places], deviation of what enters the nonlinearity.
        gradient: float32[places], root mean square of the gradient of the loss by that;
            NaN where it does not show.
        forward: float32[], signal of the last layer in units of the first's; healthy is
            within [0.1, 10].
        backward: float32[], gradient of an example at the first layer in units of the
            last's, each the norm over the units; healthy is within [0.1, 10].
        uninspected: parameters that belong to no layer, and why.
    """

    signal: Array
    gradient: Array
    forward: Array
    backward: Array
    uninspected: Uninspected


@functools.partial(jax.jit, static_argnums=(0, 1))
def signal_gain(
    apply_fn: ApplyFn, loss_fn: LossFn, params: Params, batch: tuple[PyTree, PyTree]
) -> SignalGain:
    """Measures what the layers make of a batch on its way through, and of its gradient.

    A network whose every layer multiplies the deviation by 2 multiplies it by 1,000
    within ten.  Worry beyond a factor of 10 over the whole network, if it has no
    normalization.  Costs one forward and one backward pass.

    Args:
        apply_fn: ``apply_fn(params, inputs) -> outputs``.
        loss_fn: ``loss_fn(params, batch) -> scalar``, of the same network.
        params: any pytree of arrays.
        batch: ``(inputs, targets)``.

    Returns:
        ``SignalGain``, in the order of ``layers``.

    Example:
        >>> params = {"w1": 2 * jnp.eye(2), "w2": 3 * jnp.eye(2)}
        >>> apply_fn = lambda params, x: jnp.abs(x @ params["w1"]) @ params["w2"]
        >>> loss_fn = lambda params, batch: jnp.sum(apply_fn(params, batch[0]))
        >>> inputs = jnp.array([[1.0, 0.0], [0.0, 1.0]])
        >>> gain = signal_gain(apply_fn, loss_fn, params, (inputs, None))
        >>> gain.signal, gain.gradient
        (Array([1., 3.], dtype=float32), Array([3., 1.], dtype=float32))

    References:
        Glorot and Bengio (2010), section 4.2.
    """
    check_loss("signal_gain", loss_fn, params, batch)
    network = inspect(apply_fn, params, batch[0])
    looks = {"deviation": SIGNAL_LOOK}
    passage = seen_both_ways(loss_fn, params, batch, blueprint=network, looks=looks)
    variances = {
        name: one.merged(jnp.mean)
        for name, one in passage.seen.get("deviation", {}).items()
    }
    signal = jnp.sqrt(in_places(network, variances))
    return gain_of(network, signal, gradients_by_depth(network, passage))


def _variance(values: Array, one: Located) -> Array:
    del one
    values = in_float32(jnp.abs(values) if jnp.iscomplexobj(values) else values)
    return jnp.var(values).astype(jnp.float32)


SIGNAL_LOOK = Look(before, _variance)


def gradients_by_depth(network: Network, passage: Passage) -> Array:
    """Returns the root mean square of the gradient at each place."""
    units: Mapping[str, Array] = gradients_of(passage)
    return jnp.sqrt(
        in_places(
            network, {name: jnp.mean(one**2, axis=-1) for name, one in units.items()}
        )
    )


def gain_of(network: Network, signal: Array, gradient: Array) -> SignalGain:
    """Gathers what was measured at each place."""
    units = [float(place.one.layer.units) for place in places(network)]
    norms = gradient * jnp.sqrt(jnp.array(units, jnp.float32))
    forward, backward = _ratio(signal), _ratio(norms[::-1])
    return SignalGain(signal, gradient, forward, backward, Uninspected.of(network))


def _ratio(values: Array) -> Array:
    """The last number in units of the first; NaN where there are not two."""
    if len(values) < 2:
        return jnp.full((), math.nan, jnp.float32)
    return values[-1] / values[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def unit_gradients(
    apply_fn: ApplyFn, loss_fn: LossFn, params: Params, batch: tuple[PyTree, PyTree]
) -> dict[str, Array]:
    """Measures the gradient that arrives at each unit.

    A unit that no gradient reaches can't recover by itself: a dead ReLU, or a unit
    whose every weight to the next layer is zero.  Costs one forward and one backward
    pass.

    Args:
        apply_fn: ``apply_fn(params, inputs) -> outputs``.
        loss_fn: ``loss_fn(params, batch) -> scalar``.
        params: any pytree of arrays.
        batch: ``(inputs, targets)``.

    Returns:
        float32[units] by layer name, root mean square over the examples of the
        gradient by what enters the nonlinearity; layers whose gradient does not show
        are missing.

    Example:
        >>> params = {"w": jnp.array([[1.0, -1.0]])}
        >>> apply_fn = lambda params, x: jax.nn.relu(x @ params["w"])
        >>> loss_fn = lambda params, batch: jnp.sum(apply_fn(params, batch[0]))
        >>> unit_gradients(apply_fn, loss_fn, params, (jnp.ones((4, 1)), None))
        {'w': Array([1., 0.], dtype=float32)}
    """
    check_loss("unit_gradients", loss_fn, params, batch)
    blueprint = inspect(apply_fn, params, batch[0])
    passage = seen_both_ways(loss_fn, params, batch, blueprint=blueprint, looks={})
    return gradients_of(passage)


def gradients_of(passage: Passage) -> dict[str, Array]:
    """Gathers the gradients at the units."""
    return {
        name: jnp.sqrt(one.merged(jnp.mean))
        for name, one in passage.unit_gradients.items()
    }
