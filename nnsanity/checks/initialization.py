"""Item 9: do the weights start at the size that the rest is built around?

""Small random numbers" is not enough: He, LeCun or Glorot" (D. Holden).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnsanity._tree import (
    finite_leaves,
    in_float32,
    inexact_leaves,
    is_inexact,
    leaf_names,
)
from nnsanity._types import ApplyFn, Array, Params, PyTree
from nnsanity.findings import NO_LIMITS, Finding, Limits, listed, number
from nnsanity.tracing.layers import Located, Network, inspect
from nnsanity.tracing.tap import Reading, Taps, evaluate

GAIN_FACTOR = 2.0
"""How far a gain may lie off the one that its nonlinearity needs."""
SIGNAL_FACTOR = 10.0
"""How far the signal may grow or fade over the whole network (TheDeepChecker)."""
SYMMETRY_LIMIT = 1e-5
"""Spread of a layer's units, in units of their size, under which they are equal."""
RECTIFIERS = ("relu", "relu6", "leaky_relu", "elu", "selu", "gelu", "silu", "softplus")


class WeightStats(NamedTuple):
    """How each layer starts, in the order of execution.

    Attributes:
        deviation: float32[layers], of the weights about zero.
        gain: float32[layers], deviation times the root of the fan in; healthy is about
            1.4 before a rectifier and 1 elsewhere.
        signal: float32[layers], deviation of what enters the nonlinearity.
        unit_spread: float32[layers], largest difference between two units for the same
            example, in units of their size; 0 where all units are one, NaN where
            nothing arrives at the layer and all of them are 0.
    """

    deviation: Array
    gain: Array
    signal: Array
    unit_spread: Array


@functools.partial(jax.jit, static_argnums=0)
def weight_stats(apply_fn: ApplyFn, params: Params, inputs: PyTree) -> WeightStats:
    """Measures the weights of each layer and the signal that they make of a batch.

    Costs one forward pass.

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
    network = inspect(apply_fn, params, inputs)
    read = {
        network.site(one.before): functools.partial(_signal, one=one)
        for one in network.layers
    }
    leaves = jax.tree.leaves((params, inputs))
    _, readings = evaluate(network.program, leaves, Taps(read=read))
    deviations = [_size(leaves[one.weight]) for one in network.layers]
    if not deviations:
        return WeightStats(*(jnp.zeros(0) for _ in WeightStats._fields))
    fans = jnp.array([float(one.layer.fan_in) for one in network.layers])
    deviation = jnp.stack(deviations)
    signals = [
        _pooled(readings[network.site(one.before)], one) for one in network.layers
    ]
    signal, spread = (jnp.stack(column) for column in zip(*signals, strict=True))
    columns = (deviation, deviation * jnp.sqrt(fans), signal, spread)
    return WeightStats(*(column.astype(jnp.float32) for column in columns))


def _pooled(reading: Reading, one: Located) -> tuple[Array, Array]:
    """Joins the turns of loops: units are alike where they are in one of a stack."""
    variance, spread = reading.value
    ran = reading.ran
    variance = jnp.mean(variance, where=ran)
    spread = jnp.max(spread, axis=one.shared, initial=-jnp.inf, where=ran)
    return jnp.sqrt(variance), jnp.min(spread)


def _size(weight: Array) -> Array:
    return jnp.sqrt(jnp.mean(in_float32(weight) ** 2)).astype(jnp.float32)


def _signal(values: Array, *, one: Located) -> tuple[Array, Array]:
    values = in_float32(values)
    size = jnp.sqrt(jnp.mean(values**2))
    axes = one.linear_stages[-1].axes if one.linear_stages else one.axes
    centre = jnp.mean(values, axis=axes, keepdims=True)
    spread = jnp.max(jnp.abs(values - centre))
    return jnp.var(values), jnp.where(size > 0, spread / size, jnp.nan)


def needed_gain(one: Located) -> float:
    """Returns the gain that keeps the signal's size: sqrt(2) before a rectifier."""
    is_rectified = one.layer.activation in RECTIFIERS
    return math.sqrt(2.0) if is_rectified else 1.0


def redrawn(network: Network, params: Params, key: Array) -> Params:
    """Draws fresh weights: He normal before rectifiers, LeCun normal elsewhere.

    Parameters of two or more axes that belong to no layer stay, and so do scales of
    normalizations; biases become zero.

    Args:
        network: of ``apply_fn(params, inputs)``.
        params: the parameters.
        key: consumed.
    """
    leaves, structure = jax.tree.flatten(params)
    drawn = list(leaves)
    for one in network.layers:
        if one.layer.kind == "embedding":
            continue
        for leaf in one.leaves - {one.weight}:
            if _is_bias(network, one, leaf):
                drawn[leaf] = jnp.zeros_like(leaves[leaf])
        weight = leaves[one.weight]
        scale = needed_gain(one) / math.sqrt(max(one.layer.fan_in, 1))
        noise = jax.random.normal(
            jax.random.fold_in(key, one.weight), weight.shape, jnp.float32
        )
        drawn[one.weight] = (scale * noise).astype(weight.dtype)
    return jax.tree.unflatten(structure, drawn)


def _is_bias(network: Network, one: Located, leaf: int) -> bool:
    """Tells whether a leaf is only added to what the layer makes."""
    steps = [step for stage in one.stages for step in stage.steps]
    uses = [
        step
        for step in steps
        if any(
            leaf in network.steps.origins[value].parameters
            for value in network.steps.weights(step)
        )
    ]
    return bool(uses) and all(step.eqn.primitive.name == "add" for step in uses)


class Scale(NamedTuple):
    """The layer whose weights are furthest from the size that it needs.

    Attributes:
        layer: the layer.
        ratio: its gain in units of the one that it needs; healthy is within [0.5, 2].
        change: size of the last layer's signal in units of the first's; healthy is
            within [0.1, 10].
    """

    layer: Located
    ratio: float
    change: float


def worst_scale(stats: WeightStats, network: Network) -> Scale | None:
    """Finds the layer whose weights are furthest from the size that it needs."""
    host = jax.device_get(stats)
    ratios = {
        index: float(host.gain[index]) / needed_gain(one)
        for index, one in enumerate(network.layers)
        if one.layer.kind != "embedding"
    }
    if not ratios:
        return None
    worst = max(ratios, key=lambda index: _distance(ratios[index]))
    first, last = float(host.signal[0]), float(host.signal[-1])
    change = last / first if first > 0 else 0.0
    return Scale(network.layers[worst], ratios[worst], change)


def _distance(ratio: float) -> float:
    """How far a ratio is from 1, either way; a NaN is furthest."""
    return abs(math.log(max(ratio, 1e-12))) if math.isfinite(ratio) else math.inf


def judge_scale(
    worst: Scale | None, *, num_layers: int, limits: Limits = NO_LIMITS
) -> tuple[Finding, ...]:
    """Suspects weights that are off scale where the signal shows it."""
    if worst is None:
        return ()
    factor = limits.get("initialization/off-scale", GAIN_FACTOR)
    off = not 1 / factor <= worst.ratio <= factor
    moved = not 1 / SIGNAL_FACTOR <= worst.change <= SIGNAL_FACTOR
    if not (off and (moved or num_layers == 1)):
        return ()
    return (off_scale(*worst)._replace(limit=factor),)


def off_scale(one: Located, ratio: float, change: float) -> Finding:
    """The finding that the weights of a layer have the wrong size.

    Args:
        one: the layer.
        ratio: its gain in units of the one that it needs.
        change: size of the last layer's signal in units of the first's.
    """
    name = "he_normal" if needed_gain(one) > 1 else "lecun_normal"
    return Finding(
        "initialization/off-scale",
        9,
        "info",
        one.layer.name,
        ratio,
        GAIN_FACTOR,
        f"The weights of {one.layer.name} are {number(ratio)} times as large as a"
        f" layer before {one.layer.activation or 'a linear output'} needs, and the"
        f" signal changes {number(change)}-fold from the first layer to the last.",
        f"Draw them from jax.nn.initializers.{name}(), as Flax's kernel_init argument,"
        " and start the biases at zero.",
    )


def poor_start(one: Located) -> Finding:
    """The finding that fresh weights learn, though none was off scale."""
    return Finding(
        "initialization/poor-start",
        9,
        "info",
        one.layer.name,
        math.nan,
        math.nan,
        "The network learns less from these weights than from fresh ones of the usual"
        " size, though no layer is off scale.",
        "Try another key, jax.nn.initializers.he_normal() before ReLU, and biases of"
        " zero; a wider network depends less on its first weights.",
    )


def judge_finite(params: Params) -> tuple[Finding, ...]:
    """Says which parameters are NaN or infinite before any training."""
    leaves = zip(leaf_names(params), jax.tree.leaves(params), strict=True)
    names = [name for name, leaf in leaves if is_inexact(leaf)]
    flags = finite_leaves(inexact_leaves(params))
    bad = [name for name, is_finite in zip(names, flags, strict=True) if not is_finite]
    if not bad:
        return ()
    return (
        Finding(
            "initialization/nonfinite",
            9,
            "error",
            listed(bad),
            float(len(bad)),
            0.0,
            f"{len(bad)} parameters hold NaN or infinity before any training.",
            "Draw them anew, or load an earlier checkpoint.",
        ),
    )


def judge_symmetry(
    start: WeightStats, end: WeightStats | None, network: Network
) -> tuple[Finding, ...]:
    """Says which hidden layers compute one unit many times.

    Args:
        start: of the untrained network.
        end: after some training; units that are equal then can never part.  None where
            nothing was trained: then it is a suspicion.
        network: of ``apply_fn(params, inputs)``.
    """
    equal, deviation = _equal_units(start), np.asarray(start.deviation)
    if end is not None:
        equal = equal & _equal_units(end)
    findings = []
    for index, one in enumerate(network.layers[:-1]):
        if not equal[index] or one.layer.units < 2:
            continue
        is_zero = deviation[index] == 0
        findings.append(
            Finding(
                f"initialization/{'zero' if is_zero else 'symmetric'}",
                9,
                "info" if end is None else "error",
                one.layer.name,
                float(np.nan_to_num(start.unit_spread[index])),
                SYMMETRY_LIMIT,
                f"The {one.layer.units} units of {one.layer.name} compute the same"
                f" number{'' if end is None else ', before and after training'}:"
                " they start alike and get the same gradient, so they are one unit.",
                "Draw the weights from jax.nn.initializers.he_normal() or"
                " lecun_normal(); only biases start at zero.",
            )
        )
    return tuple(findings)


def _equal_units(stats: WeightStats) -> np.ndarray:
    """Tells of which layers all units are one, as those of zero weights are."""
    spread, deviation = np.asarray(stats.unit_spread), np.asarray(stats.deviation)
    return (spread <= SYMMETRY_LIMIT) | (np.isnan(spread) & (deviation == 0))
