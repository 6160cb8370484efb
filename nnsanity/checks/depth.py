"""Item 10: is the network deeper than what it can train?

"Start with 3 to 8 layers; a deep network will not work where a shallow one learned
nothing" (D. Holden).  Depth alone is no fault: what counts is what gets lost with it.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnsanity._tree import in_float32
from nnsanity._types import ApplyFn, Array, LossFn, Params, PyTree
from nnsanity.findings import Finding, listed, number
from nnsanity.quantities.descent import check_loss
from nnsanity.quantities.passage import (
    Look,
    SeenByLook,
    after,
    in_places,
    places,
    seen_both_ways,
)
from nnsanity.quantities.signal_gain import gradients_by_depth
from nnsanity.quantities.units import by_unit
from nnsanity.tracing.layers import Located, Network, Uninspected, inspect
from nnsanity.tracing.paths import depths, merging, on_every_way

USUAL_DEPTH = 8
"""Layers in a row up to which depth by itself is not suspected (D. Holden)."""
LOST_FACTOR = 1e-3
"""Healthy gradient at the first layer in units of the last's, and the other way round
(AutoTrainer)."""
TREND = 0.8
"""Correlation of the logarithm of the gradient with the depth, from which on it grows
or fades with depth, and not at one layer."""
COLLAPSED = 0.99
"""Cosine of different examples from which on they have become one."""
COLLAPSE = 0.1
"""Rise of the cosine from the first hidden layer to the last one that depth made."""


class DepthProfile(NamedTuple):
    """How deep a network is, and what depth does to the signal.

    Attributes:
        longest_path: int32[], layers on the longest way from the inputs to the outputs;
            layers inside of a scan over layers count for each turn.
        unskipped_path: int32[], layers on the way that takes every skip: as many as
            ``longest_path`` in a plain network.
        gradient: float32[places], root mean square of the gradient of the loss by what
            enters each nonlinearity, in the order of execution; NaN where it does not
            show.
        cosine: float32[places], mean cosine between the activations of two different
            examples, each less its own mean over the units; 1 where all inputs have
            become one, NaN for layers of one unit and where nothing arrives.
        uninspected: parameters that belong to no layer, and why.
    """

    longest_path: Array
    unskipped_path: Array
    gradient: Array
    cosine: Array
    uninspected: Uninspected


@functools.partial(jax.jit, static_argnums=(0, 1))
def depth_profile(
    apply_fn: ApplyFn, loss_fn: LossFn, params: Params, batch: tuple[PyTree, PyTree]
) -> DepthProfile:
    """Measures what gets lost on the way through the layers, and on the way back.

    Worry where the cosine nears 1 or the gradient falls by powers of ten from layer to
    layer: then the first layers learn nothing from the loss, or the last ones see no
    difference between the inputs.  Costs one forward and one backward pass.

    Args:
        apply_fn: ``apply_fn(params, inputs) -> outputs``.
        loss_fn: ``loss_fn(params, batch) -> scalar``, of the same network.
        params: any pytree of arrays.
        batch: ``(inputs, targets)``.

    Returns:
        ``DepthProfile``; blocks of a stacked layer count one by one.

    Example:
        >>> params = {"w1": jnp.eye(2), "w2": jnp.eye(2)}
        >>> def apply_fn(params, x):
        ...     hidden = jnp.tanh(x @ params["w1"])
        ...     return hidden + jnp.tanh(hidden @ params["w2"])
        >>> loss_fn = lambda params, batch: jnp.mean(apply_fn(params, batch[0]))
        >>> inputs = jnp.array([[1.0, 0.0], [0.0, 1.0]])
        >>> profile = depth_profile(apply_fn, loss_fn, params, (inputs, None))
        >>> profile.longest_path, profile.unskipped_path
        (Array(2, dtype=int32), Array(1, dtype=int32))
        >>> jnp.round(profile.cosine, 3)
        Array([-1., -1.], dtype=float32)

    References:
        Schoenholz et al. (2017), "Deep Information Propagation".
    """
    check_loss("depth_profile", loss_fn, params, batch)
    network = inspect(apply_fn, params, batch[0])
    passage = seen_both_ways(
        loss_fn, params, batch, blueprint=network, looks=DEPTH_LOOKS
    )
    return profile_of(network, passage.seen, gradients_by_depth(network, passage))


def profile_of(network: Network, seen: SeenByLook, gradient: Array) -> DepthProfile:
    """Gathers what was seen by ``DEPTH_LOOKS`` and on the way back."""
    cosines = {
        name: one.merged(jnp.mean) for name, one in seen.get("cosine", {}).items()
    }
    found = depths(network)
    return DepthProfile(
        jnp.full((), found.longest, jnp.int32),
        jnp.full((), found.unskipped, jnp.int32),
        gradient,
        in_places(network, cosines),
        Uninspected.of(network),
    )


def _cosine(values: Array, one: Located) -> Array:
    """Returns the mean cosine of all pairs, without making the pairs."""
    free = [axis for axis in range(values.ndim) if axis not in one.unit_axes]
    num_examples = values.shape[free[0]] if free else 1
    rows = in_float32(by_unit(values, one.unit_axes, one.layer.units))
    if num_examples < 2 or one.layer.units < 2:
        return jnp.full((), math.nan, jnp.float32)
    rows = rows.reshape(num_examples, -1, one.layer.units)
    largest = jnp.max(jnp.abs(rows), axis=(1, 2), keepdims=True)
    rows = rows / jnp.where(largest > 0, largest, 1)
    rows = rows - jnp.mean(rows, axis=2, keepdims=True)
    sizes = jnp.sqrt(jnp.sum(rows**2, axis=(1, 2), keepdims=True))
    has_size = sizes > _ROUNDING
    directions = jnp.where(has_size | jnp.isnan(sizes), rows / sizes, 0)
    count = jnp.sum(has_size | jnp.isnan(sizes))
    together = jnp.sum(jnp.sum(directions, axis=0) ** 2)
    pairs = count * (count - 1)
    cosine = jnp.where(pairs > 0, (together - count) / jnp.maximum(pairs, 1), jnp.nan)
    return cosine.astype(jnp.float32)


_ROUNDING = 1e-6
DEPTH_LOOKS = {"cosine": Look(after, _cosine)}


def judge_depth(profile: DepthProfile, network: Network) -> tuple[Finding, ...]:
    """Suspects depth where something gets lost with it; never by the count alone.

    Inputs have become one where they have behind a layer that all of them pass: what a
    skip goes around may look alike.
    """
    host = jax.device_get(profile)
    num_layers = int(host.unskipped_path)
    evidence = _lost_gradient(np.asarray(host.gradient))
    hidden = np.asarray(host.cosine)[:-1]
    passed = on_every_way(network)
    on_way = [place.one.layer.name in passed for place in places(network)[:-1]]
    known = np.flatnonzero(np.isfinite(hidden) & np.array(on_way, bool))
    findings = []
    if len(known) > 1:
        first, last = float(hidden[known[0]]), float(hidden[known[-1]])
        if not last <= COLLAPSED and last - first > COLLAPSE:
            name = places(network)[known[-1]].name
            findings.append(_collapsed(name, first, last))
            evidence = evidence or _similar(first, last)
    if num_layers > USUAL_DEPTH and evidence:
        findings.append(too_deep(num_layers, evidence))
    return tuple(findings)


def judge_merging(network: Network) -> tuple[Finding, ...]:
    """Suspects layers with nothing nonlinear between them; reads the program alone."""
    found = merging(network)
    return (merged_layers([one.layer.name for one in found]),) if found else ()


def merged_layers(names: Sequence[str]) -> Finding:
    """The finding that layers make up one.

    Args:
        names: of the layers that nothing nonlinear follows.
    """
    return Finding(
        "depth/merged-layers",
        10,
        "info",
        listed(names),
        float(len(names)),
        0.0,
        f"Nothing nonlinear stands between {listed(names)} and the layer behind each:"
        " such a pair can do little more than one layer.",
        "Put a nonlinearity such as jax.nn.relu behind each hidden layer; the layers of"
        " Flax and Keras have none by themselves.",
    )


def too_shallow(name: str) -> Finding:
    """The finding that a network of one layer can't say what its targets need.

    Args:
        name: of the layer.
    """
    return Finding(
        "depth/too-shallow",
        10,
        "info",
        name,
        1.0,
        2.0,
        f"{name} is the only layer: what it makes is a linear function of what enters"
        " it.",
        "Put a hidden layer with a nonlinearity before it, such as 64 units of"
        " jax.nn.relu.",
    )


def _lost_gradient(gradient: np.ndarray) -> str:
    """Says how the gradient changes with depth, if it gets lost with it."""
    hidden = gradient[:-1]  # the last layer's follows from the loss
    if len(hidden) < 3 or not np.isfinite(hidden).all():
        return ""
    first, last = float(hidden[0]), float(hidden[-1])
    words = (
        f"The gradient is {number(first)} at the first layer and {number(last)} at the"
    )
    words += f" {len(hidden)}th."
    if last == 0:
        return ""
    if first == 0:
        return words
    if LOST_FACTOR <= first / last <= 1 / LOST_FACTOR or not hidden.all():
        return ""
    trend = np.corrcoef(np.arange(len(hidden)), np.log(hidden))[0, 1]
    return words if abs(trend) > TREND else ""


def _similar(first: float, last: float) -> str:
    return (
        f"The cosine between different examples is {first:.2f} after the first layer"
        f" and {last:.4f} after the last hidden one."
    )


def too_deep(num_layers: int, evidence: str = "") -> Finding:
    """The finding that depth loses the signal.

    Args:
        num_layers: in a row, without a skip.
        evidence: a sentence on what gets lost.
    """
    return Finding(
        "depth/too-deep",
        10,
        "info",
        f"{num_layers} layers",
        float(num_layers),
        float(USUAL_DEPTH),
        f"{num_layers} layers in a row lose the signal. {evidence}".strip(),
        "Take fewer layers: start with 3. Or add skip connections,"
        " x + layer(x) / sqrt(number of layers), and normalization layers.",
    )


def _collapsed(name: str, first: float, last: float) -> Finding:
    return Finding(
        "depth/collapsed-inputs",
        10,
        "info",
        name,
        last,
        COLLAPSED,
        f"Behind {name} all inputs look alike. {_similar(first, last)}",
        "Draw the weights of the size that the nonlinearity needs, or add skip"
        " connections or normalization layers; fewer layers lose less.",
    )
