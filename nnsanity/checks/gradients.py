"""Item 8: do gradients arrive, and are they of a sane size?

"A ReLU that is never positive passes nothing back, and whole networks die.  Clipping,
rounding, max and min have zero gradients too" (D. Holden).
"""

import math
from collections.abc import Collection, Mapping

import jax
import numpy as np

from nnsanity._tree import is_inexact, leaf_names
from nnsanity._types import Array, Params
from nnsanity.findings import NO_LIMITS, Finding, Limits, listed, number
from nnsanity.quantities.clipped import BlockedShare
from nnsanity.quantities.dead import DeadUnits
from nnsanity.quantities.gradient_sizes import GradientStats
from nnsanity.quantities.saturated import SaturatedUnits
from nnsanity.tracing.layers import Located, Network
from nnsanity.tracing.reach import Cut, Reach

DEAD_LIMIT = 0.1
"""Healthy share of dead units in a layer, over at least 256 examples."""
DEAD_EXAMPLES = 256
BLOCKED_LIMIT = 0.9
"""Healthy share of values at the bound of a clip that is no nonlinearity of a layer.
A ReLU of a sum blocks half of them, one that is sparse some more."""
UNDERFLOW_LIMIT = 0.1
"""Healthy share of subnormal numbers among the gradients that are not 0."""
SATURATED_LIMIT = 0.5
"""Healthy share of values on the level parts of a sigmoid or tanh."""
VANISHING_LIMIT = 1e-3
"""Healthy mean |gradient| of the first layer in units of the last's (AutoTrainer)."""
TINY_GRADIENT = 1e-7
"""Healthy mean |gradient| of a layer (SageMaker Debugger's vanishing-gradient rule)."""
EXPLODING_LIMIT = 70.0
"""Healthy largest |gradient| (AutoTrainer's exploding-gradient rule)."""


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
    findings += _underflow(inexact, host.underflow_fraction)
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


def _underflow(names: list[str], fraction: np.ndarray) -> list[Finding]:
    low = {
        name: float(share)
        for name, share in zip(names, fraction, strict=True)
        if not share <= UNDERFLOW_LIMIT
    }
    if not low:
        return []
    return [
        Finding(
            "gradients/underflow",
            8,
            "info",
            listed(low),
            max(low.values()),
            UNDERFLOW_LIMIT,
            f"Up to {number(100 * max(low.values()))}% of the gradients that are not 0"
            " are subnormal in their dtype: they lose digits, and the next smaller ones"
            " are 0.",
            "Keep the parameters in float32 and compute in bfloat16, or multiply the"
            " loss by a constant and divide the gradients by it.",
        )
    ]


def judge_unchanged(
    start: Params, end: Params, known: Collection[str] = ()
) -> tuple[Finding, ...]:
    """Says which parameters a training left exactly as they were.

    Args:
        start: before it.
        end: after it.
        known: names of parameters of which it is known why.
    """
    leaves = zip(
        leaf_names(start), jax.tree.leaves(start), jax.tree.leaves(end), strict=True
    )
    still = [
        name
        for name, before, after in leaves
        if is_inexact(before)
        and name not in known
        and np.size(before)
        and np.array_equal(np.asarray(before), np.asarray(after))
    ]
    if not still:
        return ()
    return (
        Finding(
            "gradients/unchanged-parameter",
            8,
            "info",
            listed(still),
            float(len(still)),
            0.0,
            f"{len(still)} parameters are after training what they were before, to the"
            " last digit.",
            "If they are not frozen on purpose: look for a gradient of zero, an"
            " optimizer that masks them, or updates that are too small for the dtype;"
            " keep the parameters in float32.",
        ),
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
        if leaf in position
    }
    if len(sizes) < 2:
        return []
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
    measured: DeadUnits,
    num_examples: int,
    *,
    recoverable: Mapping[str, Array] | None = None,
    limits: Limits = NO_LIMITS,
) -> tuple[Finding, ...]:
    """Says which layers have dead units, and whether training may bring them back.

    Args:
        measured: as ``dead_units`` returns.
        num_examples: that it was measured on.
        recoverable: bool[units] by layer, the dead units that may come back; None where
            that was not looked at.
        limits: the user's own, by rule.
    """
    limit = limits.get("gradients/dead-units", DEAD_LIMIT)
    host, awake = jax.device_get((measured, recoverable or {}))
    findings = []
    for name, masks in host.dead.items():
        for place in np.ndindex(masks.shape[:-1]):
            fraction = host.fraction[name][place]
            enough = num_examples >= DEAD_EXAMPLES or fraction == 1
            if enough and not fraction <= limit:
                words = name + "".join(f"[{index}]" for index in place)
                finding = _dead(words, masks[place], float(fraction), num_examples)
                if name in awake:
                    num_dead, num_awake = masks[place].sum(), awake[name][place].sum()
                    message = f"{finding.message} {_outlook(num_dead, num_awake)}"
                    finding = finding._replace(message=message)
                findings.append(finding._replace(limit=limit))
    return tuple(findings)


def _outlook(num_dead: int, num_awake: int) -> str:
    """Says how many dead units training may bring back."""
    if num_awake == 0:
        return "Nothing that training changes enters them: they stay dead."
    some = "them all" if num_awake == num_dead else f"{num_awake} of them"
    return f"What enters {some} still changes with training, and may bring those back."


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


def judge_blocked_share(measured: BlockedShare) -> tuple[Finding, ...]:
    """Suspects clips between the layers and in the loss that block nearly all.

    A share is NaN where the clip did not run; a value that is NaN counts as blocked.
    """
    return tuple(
        Finding(
            "gradients/blocked-share",
            8,
            "info",
            where,
            float(share),
            BLOCKED_LIMIT,
            f"{number(100 * share)}% of the values at {where} stand at a bound, where"
            " no gradient passes.",
            "Leave the bound out, or move it to where the values seldom are.",
        )
        for where, share in jax.device_get(measured.share).items()
        if share > BLOCKED_LIMIT
    )


def judge_saturated_units(
    measured: SaturatedUnits, network: Network
) -> tuple[Finding, ...]:
    """Suspects hidden layers that stand where their nonlinearity is level."""
    shares = jax.device_get(measured.share)
    return tuple(
        _saturated(one.layer.name, float(np.max(shares[one.layer.name])))
        for one in network.layers[:-1]
        if one.layer.name in shares
        and one.activation is not None
        and one.activation.saturates
        and not np.max(shares[one.layer.name]) <= SATURATED_LIMIT
    )


def _saturated(name: str, share: float) -> Finding:
    return Finding(
        "gradients/saturated-units",
        8,
        "info",
        name,
        share,
        SATURATED_LIMIT,
        f"{number(100 * share)}% of what enters the nonlinearity of {name} lies where"
        " it is level: next to no gradient passes.",
        "Normalize the inputs, and draw the weights with"
        " kernel_init=jax.nn.initializers.lecun_normal(), as Flax calls it.",
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
