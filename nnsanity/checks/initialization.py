"""Item 9: do the weights start at the size that the rest is built around?

""Small random numbers" is not enough: He, LeCun or Glorot" (D. Holden).
"""

import math
from typing import NamedTuple

import jax
import numpy as np

from nnsanity._tree import finite_leaves, inexact_leaves, is_inexact, leaf_names
from nnsanity._types import Params
from nnsanity.findings import NO_LIMITS, Finding, Limits, listed, number
from nnsanity.quantities.drawing import chance_interval, initializer, needed_gain
from nnsanity.quantities.passage import Place, places, weight
from nnsanity.quantities.signal_gain import SignalGain
from nnsanity.quantities.weight_sizes import WeightStats
from nnsanity.tracing.layers import Located, Network
from nnsanity.tracing.paths import on_every_way

GAIN_FACTOR = 2.0
"""How far a gain may lie off the one that its nonlinearity needs."""
SIGNAL_FACTOR = 10.0
"""How far the signal may grow or fade over the whole network (TheDeepChecker)."""
SYMMETRY_LIMIT = 1e-5
"""Spread of a layer's units, in units of their size, under which they are equal."""
BIAS_LIMIT = 3.0
"""Size of the biases in units of what the weights make, from which on they drown it."""


class Scale(NamedTuple):
    """The layer whose weights are furthest from the size that it needs.

    Attributes:
        layer: the layer.
        ratio: its gain in units of the one that it needs; healthy is within [0.5, 2].
        change: size of the last layer's signal in units of the first's; healthy is
            within [0.1, 10].
        block: which block of a stack it is, as ``"[3]"``.
        chance: factors by which so few weights differ from their law by chance.
    """

    layer: Located
    ratio: float
    change: float
    block: str = ""
    chance: tuple[float, float] = (1.0, 1.0)


def worst_scale(stats: WeightStats, network: Network) -> Scale | None:
    """Finds the layer whose weights are furthest from the size that it needs.

    A normalization that follows takes the size away again; behind a skip a layer may
    start as small as it likes, and be zero.
    """
    host = jax.device_get(stats)
    passed = on_every_way(network)
    scales = [
        _scale(
            network, place, float(gain), is_skipped=place.one.layer.name not in passed
        )
        for place, gain in zip(places(network), host.gain, strict=True)
        if place.one.layer.kind != "embedding"
    ]
    if not scales:
        return None
    first, last = float(host.signal[0]), float(host.signal[-1])
    change = last / first if first > 0 else 0.0
    return max(scales, key=_distance)._replace(change=change)


def _scale(network: Network, place: Place, gain: float, *, is_skipped: bool) -> Scale:
    one, value = place.one, weight(network, place.one)
    size = 0 if value is None else math.prod(network.steps.avals[value].shape)
    ratio = gain / needed_gain(one)
    is_normalized = any(stage.kind == "norm" for stage in one.linear_stages)
    if (is_normalized and 0 < ratio < math.inf) or (is_skipped and ratio < 1):
        ratio = 1.0
    block = place.name.removeprefix(one.layer.name)
    return Scale(one, ratio, math.nan, block, chance_interval(size))


def _distance(scale: Scale) -> float:
    """How far a ratio is from 1, either way; a NaN is furthest, chance is near."""
    if not math.isfinite(scale.ratio):
        return math.inf
    low, high = scale.chance
    return 0.0 if low <= scale.ratio <= high else abs(math.log(max(scale.ratio, 1e-12)))


def judge_scale(
    worst: Scale | None,
    *,
    num_layers: int,
    backward: float = 1.0,
    limits: Limits = NO_LIMITS,
) -> tuple[Finding, ...]:
    """Suspects weights that are off scale where the signal or its gradient shows it.

    A nonlinearity that levels off keeps the signal small, and not the gradient.

    Args:
        worst: as ``worst_scale`` returns.
        num_layers: of the network; a single layer shows nothing.
        backward: as in ``SignalGain``.
        limits: the user's own, by rule.
    """
    if worst is None:
        return ()
    factor = limits.get("initialization/off-scale", GAIN_FACTOR)
    low, high = worst.chance
    off = not min(1 / factor, low) <= worst.ratio <= max(factor, high)
    moved = not all(
        1 / SIGNAL_FACTOR <= change <= SIGNAL_FACTOR
        for change in (worst.change, backward)
    )
    if not (off and (moved or num_layers == 1)):
        return ()
    return (_off_scale(worst, backward, factor),)


def _off_scale(worst: Scale, backward: float | None, factor: float) -> Finding:
    layer = worst.layer.layer
    name = layer.name + worst.block
    changes = (
        ", though the signal keeps its size"
        if backward is None
        else f", and the signal changes {number(worst.change)}-fold from the first"
        f" layer to the last, its gradient {number(backward)}-fold on the way back"
    )
    return Finding(
        "initialization/off-scale",
        9,
        "info",
        name,
        worst.ratio,
        factor,
        f"The weights of {name} are {number(worst.ratio)} times as large as a"
        f" layer before {layer.activation or 'a linear output'} needs{changes}.",
        f"Draw them with {initializer(worst.layer)}, as Flax calls it, and start the"
        " biases at zero.",
    )


def poor_start(worst: Scale) -> Finding:
    """The finding that fresh weights learn, though nothing was suspected of these."""
    one = worst.layer
    if not 1 / GAIN_FACTOR <= worst.ratio <= GAIN_FACTOR:
        return _off_scale(worst, None, GAIN_FACTOR)
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


def judge_signal(gain: SignalGain, network: Network) -> tuple[Finding, ...]:
    """Suspects the weights where the signal grows or fades on its way.

    Silent where a normalization sets its size anew, or where it starts at a look-up.
    """
    is_plain = all(
        one.layer.kind != "embedding"
        and not any(stage.kind == "norm" for stage in one.linear_stages)
        for one in network.layers
    )
    forward = float(gain.forward)
    is_steady = 1 / SIGNAL_FACTOR <= forward <= SIGNAL_FACTOR
    if len(gain.signal) < 2 or not is_plain or is_steady:
        return ()
    signal = np.maximum(np.asarray(gain.signal, np.float64), 1e-30)
    steps = np.abs(np.diff(np.log(signal)))
    worst = places(network)[1 + int(np.argmax(np.nan_to_num(steps, nan=np.inf)))]
    return (_moved(worst, forward, float(gain.backward)),)


def _moved(worst: Place, forward: float, backward: float) -> Finding:
    grows = not forward < 1
    return Finding(
        f"initialization/signal-{'grows' if grows else 'fades'}",
        9,
        "info",
        worst.name,
        forward,
        SIGNAL_FACTOR if grows else 1 / SIGNAL_FACTOR,
        f"The signal {'grows' if grows else 'fades'} {number(forward)}-fold from the"
        f" first layer to the last, most of all at {worst.name}; its gradient changes"
        f" {number(backward)}-fold on the way back.",
        f"Draw the weights with {initializer(worst.one)}, as Flax calls it.",
    )


def judge_biases(stats: WeightStats, network: Network) -> tuple[Finding, ...]:
    """Suspects biases that drown what the weights make of the batch.

    Those of the last layer may say what the targets are on the average.
    """
    sizes = np.asarray(jax.device_get(stats.bias))
    return tuple(
        _large_bias(place.name, float(size))
        for place, size in zip(places(network), sizes, strict=True)
        if place.one is not network.layers[-1]
        and place.one.layer.kind != "embedding"
        and not size <= BIAS_LIMIT
        and not np.isnan(size)  # of a branch that was not taken
    )


def _large_bias(name: str, size: float) -> Finding:
    return Finding(
        "initialization/large-bias",
        9,
        "info",
        name,
        size,
        BIAS_LIMIT,
        f"The biases of {name} are {number(size)} times as large as what its weights"
        " make of the inputs: its units stand where they are, whatever comes in.",
        "Start the biases at zero: bias_init=jax.nn.initializers.zeros, as Flax calls"
        " it.",
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
    for index, (one, _, name) in enumerate(places(network)):
        is_last = one is network.layers[-1]
        if is_last or not equal[index] or one.layer.units < 2:
            continue
        is_zero = deviation[index] == 0
        findings.append(
            Finding(
                f"initialization/{'zero' if is_zero else 'symmetric'}",
                9,
                "info" if end is None else "error",
                name,
                float(np.nan_to_num(start.unit_spread[index])),
                SYMMETRY_LIMIT,
                f"The {one.layer.units} units of {name} compute the same"
                f" number{'' if end is None else ', before and after training'}:"
                " they start alike and get the same gradient, so they are one unit.",
                "Draw the weights from jax.nn.initializers.he_normal() or"
                " lecun_normal(); only biases start at zero.",
            )
        )
    return tuple(findings)


def _equal_units(stats: WeightStats) -> np.ndarray:
    """Tells of which layers all units are one, as those of zero weights are.

    Where nothing arrives, as behind a dead layer, units are equal for no fault of
    theirs.
    """
    spread, deviation = np.asarray(stats.unit_spread), np.asarray(stats.deviation)
    is_zero = deviation == 0
    has_signal = ~(np.asarray(stats.signal) == 0)
    equal = (spread <= SYMMETRY_LIMIT) & (has_signal | is_zero)
    return equal | (np.isnan(spread) & is_zero)
