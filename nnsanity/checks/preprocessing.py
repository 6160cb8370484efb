"""Item 3: do things that are alike have numbers that are alike?

"Networks assume a continuous space; large jumps, or one thing with many
representations, make learning hard and redundant" (D. Holden).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nnsanity._tree import in_float32, takes_numbers
from nnsanity._types import Array
from nnsanity.findings import Finding, listed, number
from nnsanity.quantities.columns import CODE_ORDER, Codes, Cycle, Wraparound
from nnsanity.quantities.neighbors import JUMP, Continuity
from nnsanity.quantities.representation import Invariance

FORCED_LIMIT = 0.1
"""Healthy share of the targets' variance between examples with equal inputs."""
COPIES_LIMIT = 2.5
"""Copies of a row from which on equal inputs are the nature of the data: a table of a
few categories, where targets differ by chance."""
PERIOD_SHARE = 0.2
"""Share of the targets' variance that a sine of one column must explain."""
WRAP_DISTANCE = 0.6
"""Distance of the two ends of a range, in units of any two parts of it, from which on
they are two places; parts next to each other on a circle are about 0.35."""
JUMP_EXCESS = 3.0
"""How much rarer middling differences of neighbours must be than jumps over the whole
range, both in units of strangers; smooth functions with noise have more of them."""
JUMP_SHARE = 0.005
"""Share of neighbours that jump, from which on it matters."""
MOVED_LIMIT = 0.3
"""Healthy distance that a transform which keeps the meaning moves the outputs, in units
of that of any two examples."""


class Duplicates(NamedTuple):
    """Equal inputs with unequal targets.

    Attributes:
        forced_share: float32[], share of the targets' variance that no function of the
            inputs can explain; healthy is 0.
        num_repeated: int32[], examples whose inputs occur more than once.
        mean_copies: float32[], how often these occur.
    """

    forced_share: Array
    num_repeated: Array
    mean_copies: Array


@takes_numbers
@jax.jit
def duplicates(inputs: Array, targets: Array) -> Duplicates:
    """Measures how much the targets of equal inputs differ.

    Rows are compared by two 32-bit hashes of their bits.  Costs one sort.

    Args:
        inputs: [examples, ...].
        targets: [examples, ...], numbers; classes as one-hot rows.

    Example:
        >>> inputs = jnp.array([[1.0], [1.0], [2.0], [3.0]])
        >>> measured = duplicates(inputs, jnp.array([0.0, 1.0, 0.0, 1.0]))
        >>> float(measured.forced_share), int(measured.num_repeated)
        (0.5, 2)
    """
    size = inputs.shape[0]
    targets = in_float32(targets).reshape(size, -1)
    order = jnp.lexsort(_row_hashes(inputs))
    hashes = jnp.stack(_row_hashes(inputs))[:, order]
    is_new = jnp.any(hashes[:, 1:] != hashes[:, :-1], axis=0)
    group = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(is_new)])
    count = jax.ops.segment_sum(jnp.ones(size), group, size)
    total = jax.ops.segment_sum(targets[order], group, size)
    mean = total / jnp.maximum(count, 1)[:, None]
    within = jnp.sum((targets[order] - mean[group]) ** 2)
    overall = jnp.sum((targets - jnp.mean(targets, axis=0)) ** 2)
    is_repeated = count > 1
    num_repeated = jnp.sum(jnp.where(is_repeated, count, 0))
    return Duplicates(
        within / jnp.where(overall > 0, overall, 1),
        num_repeated.astype(jnp.int32),
        num_repeated / jnp.maximum(jnp.sum(is_repeated), 1),
    )


def _row_hashes(inputs: Array) -> list[Array]:
    rows = inputs.reshape(inputs.shape[0], -1).astype(jnp.float32)
    rows = jnp.where(rows == 0, 0, rows)  # -0.0 and 0.0 are one number
    bits = jax.lax.bitcast_convert_type(rows, jnp.uint32)
    column = jnp.arange(bits.shape[1], dtype=jnp.uint32)
    hashes = []
    for seed in (0x9E3779B1, 0x85EBCA77):
        factor = (column * jnp.uint32(2) + jnp.uint32(1)) * jnp.uint32(seed)
        mixed = (bits ^ (bits >> 15)) * (factor ^ (factor >> 13))
        hashes.append(jnp.sum((mixed ^ (mixed >> 16)) * factor, 1, dtype=jnp.uint32))
    return hashes


def judge_duplicates(measured: Duplicates) -> tuple[Finding, ...]:
    """Says whether equal inputs come with unequal targets."""
    forced, repeated, copies = (float(one) for one in jax.device_get(measured))
    if forced <= FORCED_LIMIT or copies > COPIES_LIMIT:
        return ()
    return (
        Finding(
            "preprocessing/contradictory-duplicates",
            3,
            "warning",
            "data",
            forced,
            FORCED_LIMIT,
            f"{number(repeated)} examples have inputs that occur more than once, with"
            f" other targets: {number(100 * forced)}% of what the targets vary can't be"
            " told from the inputs.",
            "Look at a few of these rows. Remove wrong labels and double rows, or add"
            " the input that tells them apart.",
        ),
    )


def categorical_code(feature: int, codes: Codes) -> Finding:
    """The suspicion that a column of names is fed as a number."""
    return Finding(
        "preprocessing/categorical-code",
        3,
        "info",
        f"inputs, feature {feature}",
        codes.order,
        CODE_ORDER,
        f"Feature {feature} has {codes.num_values} values, and neighbouring values have"
        " targets as different as any two: they are names, and as a number they have"
        " an order that means nothing.",
        "Feed it one-hot, or through an embedding.",
    )


def repeating_column(feature: int, cycle: Cycle) -> Finding:
    """The suspicion that targets repeat along a column."""
    return Finding(
        "preprocessing/wraparound",
        3,
        "info",
        f"inputs, feature {feature}",
        cycle.explained,
        PERIOD_SHARE,
        f"The targets repeat along feature {feature} with period"
        f" {number(cycle.period)}: a sine of it explains"
        f" {number(100 * cycle.explained)}% of what they vary, and the network would"
        " have to count the cycles.",
        "Feed the sine and the cosine of 2 pi value / period in its place.",
    )


def wrapping_column(feature: int, measured: Wraparound) -> Finding:
    """The suspicion that a column is an angle, an hour or a day.

    Args:
        feature: which one.
        measured: of this column alone.
    """
    return Finding(
        "preprocessing/wraparound",
        3,
        "info",
        f"inputs, feature {feature}",
        float(measured.end_distance),
        WRAP_DISTANCE,
        f"Feature {feature} fills a range of {number(float(measured.period))}, as"
        " hours and angles do, and the targets are alike at its two ends: to the"
        " network these are as far apart as can be.",
        "Feed the sine and the cosine of 2 pi value /"
        f" {number(float(measured.period))} in its place.",
    )


def wrapping_targets(measured: Wraparound, period: float) -> Finding:
    """The suspicion that the targets are angles or hours.

    Args:
        measured: of the targets.
        period: what they wrap around at.
    """
    return Finding(
        "preprocessing/wraparound",
        3,
        "info",
        "targets",
        float(measured.end_distance),
        WRAP_DISTANCE,
        "Examples whose targets lie at the two ends of their range have inputs that are"
        f" alike, as if the range closed at {number(period)}: just there a small change"
        " of the inputs turns the target over.",
        f"Predict the sine and the cosine of 2 pi target / {number(period)}, two"
        " outputs, and take the angle of the two.",
    )


def judge_continuity(measured: Continuity, *, severity: str) -> tuple[Finding, ...]:
    """Says whether the targets jump over their range between near inputs.

    Noise makes middling differences more often than whole jumps, and targets that are
    two heaps have no middling ones at all, between strangers neither.

    Args:
        measured: of targets that are numbers.
        severity: of what is found.
    """
    host = jax.device_get(measured)
    jumps = float(host.jump_share / max(host.stranger_jump_share, 1e-9))
    middle = float(host.middle_share / max(host.stranger_middle_share, 1e-9))
    is_spread = host.stranger_middle_share > 2 * host.stranger_jump_share
    is_seam = jumps > JUMP_EXCESS * middle and host.jump_share > JUMP_SHARE
    if not (is_spread and is_seam):
        return ()
    pairs = [f"{one} and {other}" for one, other in host.jumps.tolist()]
    return (
        Finding(
            "preprocessing/discontinuous",
            3,
            severity,
            f"examples {listed(pairs, limit=3)}",
            float(host.jump_share),
            JUMP_SHARE,
            f"{number(100 * host.jump_share)}% of nearest neighbours have targets at"
            f" opposite ends of their range (over {number(100 * JUMP)}% of it), and"
            f" only {number(100 * host.middle_share)}% differ by about half of it: the"
            " numbers of the targets or inputs have a seam where the thing has none.",
            "Look at these pairs. An angle or an hour wants its sine and cosine; an"
            " orientation, a continuous description such as two axes of its frame.",
        ),
    )


def judge_invariance(
    name: str, measured: Invariance, *, of: str, severity: str
) -> tuple[Finding, ...]:
    """Says whether a transform that keeps the meaning moves a representation.

    Args:
        name: of the transform.
        measured: how far it moves.
        of: what was moved, as the subject of a sentence.
        severity: of what is found.
    """
    ratio = float(measured.ratio)
    if ratio <= MOVED_LIMIT:
        return ()
    return (
        Finding(
            "preprocessing/not-invariant",
            3,
            severity,
            name,
            ratio,
            MOVED_LIMIT,
            f"{name} moves {of} by {number(ratio)} of the distance between two"
            " examples, though it keeps their meaning.",
            "Encode the inputs so that it does not matter (a local frame, relative"
            " positions, a fixed order), or add transformed copies to the training"
            " data.",
        ),
    )


def judge_integers(name: str, dtype: object) -> tuple[Finding, ...]:
    """Says that integers are fed as numbers."""
    return (
        Finding(
            "preprocessing/integer-input",
            3,
            "info",
            name,
            1.0,
            0.0,
            f"The {name} are of dtype {dtype} and enter the network as numbers, not as"
            " indices of an embedding.",
            "Fine for counts and pixels, once normalized. Feed what is a name one-hot,"
            " or through an embedding.",
        ),
    )
