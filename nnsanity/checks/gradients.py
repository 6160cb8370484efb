"""Item 8: do gradients arrive, and are they of a sane size?

"A ReLU that is never positive passes nothing back, and whole networks die.  Clipping,
rounding, max and min have zero gradients too" (D. Holden).
"""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnsanity._tree import in_float32, inexact_leaves, is_inexact, leaf_names
from nnsanity._types import ApplyFn, Array, Params, PyTree
from nnsanity.findings import NO_LIMITS, Finding, Limits, listed, number
from nnsanity.tracing.layers import Located, Uninspected, inspect
from nnsanity.tracing.reach import Cut, Reach
from nnsanity.tracing.tap import Taps, evaluate
from nnsanity.units import dead_fraction, dead_of, is_thresholded, never_active

DEAD_LIMIT = 0.1
"""Healthy share of dead units in a layer, over at least 256 examples."""
DEAD_EXAMPLES = 256
VANISHING_LIMIT = 1e-3
"""Healthy mean |gradient| of the first layer in units of the last's (AutoTrainer)."""
TINY_GRADIENT = 1e-7
"""Healthy mean |gradient| of a layer (SageMaker Debugger's vanishing-gradient rule)."""
EXPLODING_LIMIT = 70.0
"""Healthy largest |gradient| (AutoTrainer's exploding-gradient rule)."""


class GradientStats(NamedTuple):
    """Statistics of the gradient of each parameter, in the order of ``leaf_names``.

    Attributes:
        norm: float32[leaves].
        largest: float32[leaves], largest absolute value.
        zero_fraction: float32[leaves], share of exact zeros; 1 learns nothing.
        nonfinite_fraction: float32[leaves]; healthy is 0.
        underflow_fraction: float32[leaves], share of the non-zero values that are
            subnormal in the leaf's dtype; healthy is near 0.
    """

    norm: Array
    largest: Array
    zero_fraction: Array
    nonfinite_fraction: Array
    underflow_fraction: Array


def gradient_stats(grads: PyTree) -> GradientStats:
    """Measures the gradient of every floating-point parameter.

    Costs one read of the gradients.  Sums are in float32 whatever the dtype; a NaN
    makes norm and largest NaN.  Leaves without elements count as zero.

    Args:
        grads: any pytree; leaves that are not floating-point are passed over.

    Returns:
        ``GradientStats``, float32[leaves] each.

    Example:
        >>> stats = gradient_stats({"w": jnp.array([3.0, 0.0, -4.0, 0.0])})
        >>> stats.norm, stats.zero_fraction
        (Array([5.], dtype=float32), Array([0.5], dtype=float32))
    """
    leaves = [_leaf_stats(leaf) for leaf in inexact_leaves(grads)]
    if not leaves:
        return GradientStats(*(jnp.zeros(0, jnp.float32) for _ in range(5)))
    return GradientStats(*(jnp.stack(column) for column in zip(*leaves, strict=True)))


def _leaf_stats(leaf: Array) -> tuple[Array, ...]:
    leaf = jnp.asarray(leaf)
    size = max(math.prod(leaf.shape), 1)
    magnitude = jnp.abs(in_float32(leaf) if jnp.isrealobj(leaf) else leaf)
    largest = jnp.max(magnitude, initial=0.0)
    # Scaled by the largest, the squares neither overflow nor vanish.
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    norm = scale * jnp.sqrt(jnp.sum((magnitude / scale) ** 2))
    is_subnormal = _is_subnormal(leaf)
    num_zero = jnp.sum((magnitude == 0) & ~is_subnormal)
    nonfinite = jnp.sum(~jnp.isfinite(magnitude)) / size
    underflow = jnp.sum(is_subnormal) / jnp.maximum(size - num_zero, 1)
    columns = (norm, largest, num_zero / size, nonfinite, underflow)
    return tuple(column.astype(jnp.float32) for column in columns)


def _is_subnormal(leaf: Array) -> Array:
    """Reads the bits: processors may take subnormal numbers for zero."""
    if not jnp.isrealobj(leaf):
        return _is_subnormal(leaf.real) | _is_subnormal(leaf.imag)
    info = jnp.finfo(leaf.dtype)
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{info.bits}"))
    fraction = bits & ((1 << info.nmant) - 1)
    exponent = (bits >> info.nmant) & ((1 << info.nexp) - 1)
    return (exponent == 0) & (fraction != 0)


class DeadUnits(NamedTuple):
    """Units that pass nothing back for any example.

    Attributes:
        dead: bool[units] for each layer that a thresholding nonlinearity follows;
            layers inside of a scan are stacked: bool[length, units].
        fraction: float32[] for each of these layers, float32[length] where they are
            stacked; healthy is under 0.1.
        uninspected: parameters that belong to no layer, and why.
    """

    dead: dict[str, Array]
    fraction: dict[str, Array]
    uninspected: Uninspected = Uninspected()


@functools.partial(jax.jit, static_argnums=0)
def dead_units(apply_fn: ApplyFn, params: Params, inputs: PyTree) -> DeadUnits:
    """Finds units that no example activates.

    Looks at layers that a thresholding nonlinearity follows, by what it does and not by
    its name: ReLU, ``jnp.maximum(x, 0)``, ReLU6, hard sigmoid, but not GELU or tanh.  A
    unit is dead where its output stands at a flat end for every example and position.
    Worry above a tenth of a layer, over a few hundred examples.  Costs one forward
    pass.

    Args:
        apply_fn: ``apply_fn(params, inputs) -> outputs``.
        params: any pytree of arrays.
        inputs: leading axis the examples.

    Returns:
        ``DeadUnits``, by layer name.

    Example:
        >>> params = {"w": jnp.array([[1.0, -1.0]])}
        >>> apply_fn = lambda params, x: jax.nn.relu(x @ params["w"])
        >>> dead_units(apply_fn, params, jnp.array([[1.0], [2.0]])).dead
        {'w': Array([False,  True], dtype=bool)}

    References:
        Lu et al. (2019), "Dying ReLU and Initialization".
    """
    network = inspect(apply_fn, params, inputs)
    watched = [one for one in network.layers if is_thresholded(one)]
    read = {
        network.site(one.after): functools.partial(never_active, one=one)
        for one in watched
    }
    leaves = jax.tree.leaves((params, inputs))
    taps = Taps(read=read, fold=jnp.logical_and)
    _, readings = evaluate(network.program, leaves, taps)
    dead = {
        one.layer.name: dead_of(readings[network.site(one.after)], one)
        for one in watched
    }
    return DeadUnits(
        dead,
        {name: dead_fraction(mask) for name, mask in dead.items()},
        Uninspected.of(network),
    )


def judge_gradients(
    stats: GradientStats,
    params: Params,
    weights: Mapping[str, int],
    *,
    limits: Limits = NO_LIMITS,
) -> tuple[Finding, ...]:
    """Says what is unusual about the gradients of an untrained network.

    Args:
        stats: as ``gradient_stats`` returns, on one large batch.
        params: to name the leaves.
        weights: leaf index of the main weight of each layer, in the order of execution.
        limits: the user's own, by rule.
    """
    host = jax.device_get(stats)
    inexact = [
        name
        for name, leaf in zip(leaf_names(params), jax.tree.leaves(params), strict=True)
        if is_inexact(leaf)
    ]
    findings = []
    bad = host.nonfinite_fraction > 0
    if bad.any():
        names = [name for name, one in zip(inexact, bad, strict=True) if one]
        findings.append(_nonfinite(names, len(inexact)))
    largest = np.nan_to_num(host.largest, nan=np.inf)
    limit = limits.get("gradients/exploding", EXPLODING_LIMIT)
    if largest.size and not largest.max() <= limit:
        name = inexact[int(largest.argmax())]
        findings.append(_exploding(name, float(largest.max()), limit))
    if len(weights) > 1:
        limit = limits.get("gradients/vanishing", VANISHING_LIMIT)
        findings += _vanishing(host, params, weights, limit)
    return tuple(findings)


def _nonfinite(names: list[str], num_leaves: int) -> Finding:
    return Finding(
        "gradients/nonfinite",
        8,
        "error",
        listed(names),
        float(len(names)),
        0.0,
        f"The gradients of {len(names)} of {num_leaves} parameters are NaN or infinite"
        " on the untrained network: the first step destroys it.",
        "Find where the numbers leave float32: exponentials without a bound, divisions"
        " by zero, square roots and logarithms at zero.",
    )


def _exploding(name: str, largest: float, limit: float) -> Finding:
    return Finding(
        "gradients/exploding",
        8,
        "info",
        name,
        largest,
        limit,
        f"The largest gradient of the untrained network is {number(largest)}.",
        "Normalize inputs and targets, then rescale the weights; a smaller learning"
        " rate only hides it.",
    )


def _vanishing(
    host: GradientStats, params: Params, weights: Mapping[str, int], limit: float
) -> list[Finding]:
    leaves = jax.tree.leaves(params)
    position = {
        index: rank
        for rank, index in enumerate(
            index for index, leaf in enumerate(leaves) if is_inexact(leaf)
        )
    }
    sizes = {
        name: float(host.norm[position[leaf]]) / math.sqrt(max(leaves[leaf].size, 1))
        for name, leaf in weights.items()
    }
    (first, first_size), *_, (last, last_size) = sizes.items()
    ratio = first_size / last_size if last_size > 0 else math.inf
    if ratio >= limit and first_size >= TINY_GRADIENT:
        return []
    if not math.isfinite(ratio) and first_size >= TINY_GRADIENT:
        return []
    return [
        Finding(
            "gradients/vanishing",
            8,
            "info",
            first,
            ratio,
            limit,
            f"The gradient of {first} is {number(first_size)}, that of {last}"
            f" {number(last_size)}: what the loss says does not arrive at the first"
            " layers.",
            "Use ReLU or a relative of it instead of sigmoid or tanh, add skip"
            " connections or normalization layers, or take fewer layers.",
        )
    ]


def harmful_activation(first: Located, names: list[str]) -> Finding:
    """The finding that other hidden activations learn, though no gradient looked bad.

    Args:
        first: the first layer that has one of them.
        names: of the hidden activations.
    """
    kind = first.activation
    if kind is not None and kind.saturates:
        rule = "vanishing"
    else:
        rule = "dead-units" if kind and kind.flat_values else "hidden-activation"
    return Finding(
        f"gradients/{rule}",
        8,
        "info",
        first.layer.name,
        math.nan,
        math.nan,
        f"The network learns less with its hidden activations ({', '.join(names)}) than"
        " with one that passes every gradient on.",
        "Use jax.nn.leaky_relu or jax.nn.elu for the hidden layers.",
    )


def judge_dead_units(
    measured: DeadUnits, num_examples: int, *, limits: Limits = NO_LIMITS
) -> tuple[Finding, ...]:
    """Says which layers have dead units."""
    limit = limits.get("gradients/dead-units", DEAD_LIMIT)
    host = jax.device_get(measured)
    findings = []
    for name, masks in host.dead.items():
        for place in np.ndindex(masks.shape[:-1]):
            fraction = host.fraction[name][place]
            enough = num_examples >= DEAD_EXAMPLES or fraction == 1
            if enough and not fraction <= limit:
                words = name + "".join(f"[{index}]" for index in place)
                finding = _dead(words, masks[place], float(fraction), num_examples)
                findings.append(finding._replace(limit=limit))
    return tuple(findings)


def _dead(name: str, mask: np.ndarray, fraction: float, num_examples: int) -> Finding:
    units = [str(unit) for unit in np.flatnonzero(mask)]
    return Finding(
        "gradients/dead-units",
        8,
        "info",
        name,
        fraction,
        DEAD_LIMIT,
        f"{len(units)} of {mask.size} units of {name} are never active on"
        f" {num_examples} examples (units {listed(units)}): no gradient passes them.",
        "Start the biases at zero and the weights from"
        " jax.nn.initializers.he_normal(), normalize the inputs, or use"
        " jax.nn.leaky_relu.",
    )


def judge_reach(measured: Reach) -> tuple[Finding, ...]:
    """Says which parameters no gradient can reach."""
    findings = []
    by_cuts: dict[tuple[Cut, ...], list[str]] = {}
    for name, differentiable, cuts in zip(
        measured.names, measured.differentiable, measured.cuts, strict=True
    ):
        if cuts and not differentiable:
            by_cuts.setdefault(cuts, []).append(name)
    for cuts, names in by_cuts.items():
        findings.append(_blocked(cuts, names, len(measured.names)))
    unused = [
        name
        for name, connected in zip(measured.names, measured.connected, strict=True)
        if not connected
    ]
    if unused:
        findings.append(_disconnected(unused))
    return tuple(findings)


def _blocked(cuts: tuple[Cut, ...], names: list[str], num_leaves: int) -> Finding:
    operations = sorted({cut.operation for cut in cuts})
    # Target networks and frozen parts stop a gradient on purpose.
    is_deliberate = operations == ["stop_gradient"]
    return Finding(
        "gradients/blocked",
        8,
        "info" if is_deliberate else "error",
        cuts[0].where,
        float(len(names)),
        0.0,
        f"Every path from {listed(names)} to the loss passes {' or '.join(operations)},"
        f" which has no gradient: {len(names)} of {num_leaves} parameters never learn.",
        "Leave the operation out of the path to the loss, or pass the gradient around"
        " it: x + jax.lax.stop_gradient(f(x) - x).",
    )


def _disconnected(names: list[str]) -> Finding:
    return Finding(
        "gradients/disconnected-parameter",
        8,
        "info",
        listed(names),
        float(len(names)),
        0.0,
        f"The loss does not use {len(names)} of the parameters.",
        "Look for a layer whose result is thrown away, or leave the parameter out.",
    )
