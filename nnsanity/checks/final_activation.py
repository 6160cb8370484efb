"""Item 7: can the last activation put out every target?

"The last activation must be able to reach every target: ReLU gives no negatives; for
regression use none" (D. Holden).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nnsanity._tree import in_float32
from nnsanity._types import Array
from nnsanity.findings import Finding, number
from nnsanity.tracing.bounds import Bounds
from nnsanity.tracing.layers import Located

UNREACHABLE_LIMIT = 0.01
"""Share of targets out of reach from which on it is an error."""
_TOLERANCE = 1e-4


class Reachable(NamedTuple):
    """Which targets the outputs can't be, whatever the parameters are.

    Attributes:
        fraction: float32[], share of target elements out of reach; healthy is 0.
        lowest: float32[], least target.
        highest: float32[], greatest target.
        low: float32[], least output that any parameters can make.
        high: float32[], greatest output.
        constant: bool[], whether all parameters make the same output.
    """

    fraction: Array
    lowest: Array
    highest: Array
    low: Array
    high: Array
    constant: Array


def reachable(bounds: Bounds, targets: Array) -> Reachable:
    """Compares targets with what the outputs can be.

    Costs one read of the targets.

    Args:
        bounds: of outputs shaped as the targets, but for axes of length one.
        targets: [examples, ...].

    Returns:
        ``Reachable``, scalars.

    Raises:
        ValueError: if outputs and targets differ in size.

    Example:
        >>> bounds = Bounds(jnp.zeros((4, 1)), jnp.ones((4, 1)))
        >>> float(reachable(bounds, jnp.array([[0.0], [1.0], [2.0], [3.0]])).fraction)
        0.5
    """
    targets = in_float32(jnp.asarray(targets))
    low, high = (jnp.asarray(end, jnp.float32) for end in bounds)
    if math.prod(low.shape[1:]) != math.prod(targets.shape[1:]):
        raise ValueError(
            f"reachable: outputs of shape {low.shape} can't be compared with targets of"
            f" shape {targets.shape}"
        )
    shape = (low.shape[0], -1)
    low, high = (jnp.reshape(end, shape)[:1] for end in (low, high))
    targets = jnp.reshape(targets, (targets.shape[0], -1))
    finite = jnp.where(jnp.isfinite(targets), jnp.abs(targets), 0)
    room = _TOLERANCE * jnp.maximum(jnp.max(finite), 1e-6)
    out = ~((targets >= low - room) & (targets <= high + room))
    return Reachable(
        jnp.mean(out, dtype=jnp.float32),
        jnp.min(targets),
        jnp.max(targets),
        jnp.min(low),
        jnp.max(high),
        jnp.all(low == high),
    )


def judge_reach(measured: Reachable, where: str) -> tuple[Finding, ...]:
    """Says which targets no parameters can reach."""
    host = jax.device_get(measured)
    if host.constant:
        return (constant_output(where, float(host.low)),)
    fraction = float(host.fraction)
    if not fraction > 0:
        return ()
    return (
        Finding(
            "final-activation/unreachable-targets",
            7,
            "error" if fraction >= UNREACHABLE_LIMIT else "info",
            where,
            fraction,
            0.0,
            f"{number(100 * fraction)}% of the targets lie outside of what the last"
            f" activation can put out: targets go from {number(float(host.lowest))} to"
            f" {number(float(host.highest))}, outputs from {number(float(host.low))} to"
            f" {number(float(host.high))}, whatever the parameters are.",
            "Leave the last activation out, the safe choice for regression; or scale"
            " the targets into its range.",
        ),
    )


def constant_output(where: str, value: float) -> Finding:
    """The finding that nothing can change the output."""
    return Finding(
        "final-activation/constant-output",
        7,
        "error",
        where,
        value,
        0.0,
        f"The output is {number(value)} for all inputs and all parameters, as a softmax"
        " over one unit is.",
        "Use a sigmoid for one probability, a softmax over two or more units for"
        " classes, and no activation for regression.",
    )


def harmful_head(one: Located, kind: str | None) -> Finding:
    """The finding that leaving out the last activation helps.

    Args:
        one: the last layer.
        kind: how targets and outputs belong together.
    """
    name = one.layer.activation or "none"
    num_flat = 0 if one.activation is None else len(one.activation.flat_values)
    slug = {0: "saturated", 1: "relu-head"}.get(num_flat, "clipped-output")
    if name in ("softmax", "sigmoid", "log_softmax") and kind not in (None, "numbers"):
        slug = "logits-expected"
    return Finding(
        f"final-activation/{slug}",
        7,
        "info",
        one.layer.name,
        math.nan,
        math.nan,
        f"The last activation ({name}) keeps the network from learning.",
        "Leave it out; for classes give the logits to a loss that takes logits, as"
        " optax.softmax_cross_entropy.",
    )


def unsquashed_head(one: Located, wanted: str) -> Finding:
    """The finding that the outputs have to be made probabilities.

    Args:
        one: the last layer.
        wanted: ``"a sigmoid"`` or ``"a softmax"``.
    """
    name = one.layer.activation or "no activation"
    return Finding(
        "final-activation/probabilities-expected",
        7,
        "info",
        one.layer.name,
        math.nan,
        math.nan,
        f"The loss wants probabilities, and the last layer ends in {name}.",
        f"End it in {wanted}, or keep the logits and use a loss that takes logits, as"
        " optax.softmax_cross_entropy.",
    )
