"""Item 7: can the last activation put out every target?

"The last activation must be able to reach every target: ReLU gives no negatives; for
regression use none" (D. Holden).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnsanity._tree import in_float32
from nnsanity._types import Array, PyTree
from nnsanity.findings import Finding, number
from nnsanity.tracing.bounds import Bounds
from nnsanity.tracing.layers import Located
from nnsanity.tracing.loss_head import Logarithm, Squash

BEST_LIMIT = 0.95
"""Probability that a head should be able to give to the right class.  A softmax of
numbers within [0, 1] gives 0.73 to one of two classes, and 0.23 to one of ten."""
UNREACHABLE_LIMIT = 0.01
"""Share of targets out of reach from which on it is an error."""
SUSPECTED = (
    "final-activation/constant-output",
    "final-activation/unreachable-targets",
    "final-activation/double-softmax",
    "final-activation/logits-expected",
    "final-activation/relu-head",
    "final-activation/clipped-output",
)
"""Rules that leaving out the last activation confirms, the likeliest first."""
UNSQUASHED = (
    "final-activation/probabilities-expected",
    "final-activation/unreachable-targets",
    "final-activation/independent-classes",
)
"""Rules that a softmax or a sigmoid as the last activation confirms."""
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


@jax.jit
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


def judge_squashes(squashes: Sequence[Squash]) -> tuple[Finding, ...]:
    """Says which softmax or sigmoid of a loss gets numbers that are squashed already.

    A proof where these are probabilities.  Where they come from another activation it
    is a suspicion: whether it hurts shows when it is left out.
    """
    found = []
    for one in squashes:
        is_stuck = not one.best >= BEST_LIMIT
        if one.made_by in ("softmax", "sigmoid") and is_stuck:
            found.append(_double_softmax(one))
        elif one.made_by in _LIMITING and (is_stuck or one.is_one_sided):
            found.append(_logits_expected(one))
    return tuple(found)


_LIMITING = frozenset({"max", "min", "clamp", "tanh", "erf", "select_n", "abs"})


def _double_softmax(one: Squash) -> Finding:
    share = f"a {one.kind} of numbers from {number(one.low)} to {number(one.high)}"
    return Finding(
        "final-activation/double-softmax",
        7,
        "error",
        one.where,
        one.best,
        BEST_LIMIT,
        f"The loss takes the {one.kind} of what is a {one.made_by} already: {share}"
        f" gives no class more than {number(100 * one.best)}%, so that the loss stays"
        f" above {number(-math.log(one.best))} however well the network learns.",
        f"Give the loss the logits: leave the {one.made_by} out of the network, and"
        " apply it only where you read probabilities.",
    )


def _logits_expected(one: Squash) -> Finding:
    reach = (
        f"never takes a probability below {number(100 * one.least)}%"
        if one.kind == "sigmoid" and one.low >= 0
        else f"gives no class more than {number(100 * one.best)}%"
        if one.best < BEST_LIMIT
        else "never takes a probability above 50%"
    )
    return Finding(
        "final-activation/logits-expected",
        7,
        "info",
        one.where,
        one.best,
        BEST_LIMIT,
        f"The loss takes the {one.kind} of numbers that an activation ({one.made_by})"
        f" keeps from {number(one.low)} to {number(one.high)}; it {reach}.",
        "Leave the last activation out: a loss that applies a softmax or a sigmoid"
        " wants logits.",
    )


def judge_logarithms(logarithms: Sequence[Logarithm]) -> tuple[Finding, ...]:
    """Says which logarithms are taken of what can be 0 or below."""
    return tuple(
        Finding(
            "final-activation/probabilities-expected",
            7,
            "error",
            one.where,
            one.low,
            0.0,
            f"The loss takes the logarithm of outputs that can be {_nothing(one.low)}:"
            f" they go from {number(one.low)} to {number(one.high)}, and the logarithm"
            " there is NaN or minus infinity.",
            "Give the loss probabilities, from a softmax or a sigmoid; better, keep the"
            " logits and use a loss that takes logits, as optax.softmax_cross_entropy.",
        )
        for one in logarithms
    )


def _nothing(low: float) -> str:
    return "negative" if low < 0 else "0"


def judge_head(head: Located | None) -> tuple[Finding, ...]:
    """Names a last activation that stands still on one side, or on both."""
    if head is None or head.activation is None:
        return ()
    values = head.activation.flat_values
    if not values:
        return ()
    name, ends = head.layer.activation, " and ".join(map(number, values))
    slug = "relu-head" if len(values) == 1 else "clipped-output"
    return (
        Finding(
            f"final-activation/{slug}",
            7,
            "info",
            head.layer.name,
            float(len(values)),
            0.0,
            f"The network ends in {name}: at {ends} it passes no gradient back, and an"
            " output that gets there stays there.",
            "Leave the last activation out, the safe choice, unless the targets end"
            " there too.",
        ),
    )


def judge_classes(
    squashes: Sequence[Squash],
    activation: str | None,
    targets: PyTree,
    where: str,
) -> tuple[Finding, ...]:
    """Compares what the classes share with how many of them are true at a time.

    Args:
        squashes: the softmax and sigmoid of the loss.
        activation: the last one of the network.
        targets: concrete zeros and ones, [examples, classes]; silent on others.
        where: the last layer.
    """
    rows = _rows_of_classes(targets)
    if rows is None:
        return ()
    kinds = {one.kind: one.where for one in squashes if one.shape == rows.shape}
    if not kinds and activation in ("softmax", "sigmoid"):
        kinds = {activation: where}
    most = int(rows.sum(axis=1).max())
    is_one_hot = bool((rows.sum(axis=1) == 1).all())
    if set(kinds) == {"softmax"} and most > 1:
        return (_independent_classes(kinds["softmax"], most, _SEVERAL),)
    if set(kinds) == {"sigmoid"} and is_one_hot and len(rows) > 1:
        return (_independent_classes(kinds["sigmoid"], 1, _ONE),)
    return ()


def _rows_of_classes(targets: PyTree) -> np.ndarray | None:
    is_table = isinstance(targets, jax.Array | np.ndarray) and targets.ndim == 2
    if not is_table or isinstance(targets, jax.core.Tracer) or targets.shape[1] < 2:
        return None
    rows = np.asarray(targets, np.float32)
    return rows if np.isin(rows, (0, 1)).all() else None


_SEVERAL = (
    "Up to {} classes of one example are true, and a softmax shares one probability"
    " among them.",
    "Use a sigmoid for each class, as optax.sigmoid_binary_cross_entropy does.",
)
_ONE = (
    "Each example is of exactly {} class, and every class has a sigmoid of its own.",
    "Use a softmax over the classes, as optax.softmax_cross_entropy does.",
)


def _independent_classes(where: str, most: int, words: tuple[str, str]) -> Finding:
    message, advice = words
    return Finding(
        "final-activation/independent-classes",
        7,
        "info",
        where,
        float(most),
        1.0,
        message.format(most),
        advice,
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
