"""Item 5: how many gradient terms does a step average?

"Large batches average away the noise that finds flat minima.  Take the smallest that
trains in bearable time; try 16, 8, even 1" (D. Holden).
"""

import math

from nnsanity.findings import Finding, number
from nnsanity.quantities.noise_estimate import NoiseScale

USUAL = 32
"""The batch size that the trial tries instead (Bengio 2012, section 3.1.1)."""
LARGE_SHARE = 0.25
"""Share of the data from which on a batch is suspected to be too large."""
SMALL = 2
"""Size up to which a batch is suspected to be too small (AutoTrainer)."""
NOISE_LIMIT = 4.0
"""Healthy batch in noise scales: beyond it a training takes five times the fewest
examples (McCandlish et al. 2018, equation 2.11)."""
MIN_SUGGESTED = 8
"""A step on fewer examples hardly takes less time."""
TOO_LARGE = "batch-size/too-large"


def suspected(batch_size: int, num_examples: int) -> bool:
    """Tells whether a batch is so large or small that another size is worth a try."""
    is_large = batch_size > USUAL and batch_size >= LARGE_SHARE * num_examples
    return is_large or (batch_size <= SMALL and num_examples > USUAL)


def wrong_size(batch_size: int, num_examples: int) -> Finding:
    """The finding that another batch size learns, as its trial shows."""
    is_large = batch_size > USUAL
    if is_large:
        message = (
            f"A batch of {batch_size} of the {num_examples} examples leaves few steps"
            " for each pass over the data."
        )
        advice = f"Use batches of {USUAL} or fewer for the same number of examples."
    else:
        message = f"Steps on {batch_size} of the examples jump to and fro."
        advice = f"Use batches of {USUAL}, or a smaller learning rate."
    return Finding(
        TOO_LARGE if is_large else "batch-size/too-small",
        5,
        "info",
        "batch_size",
        float(batch_size),
        float(USUAL),
        message,
        advice,
    )


def suggested_size(limit: float, num_examples: int) -> int:
    """Returns the power of two at or below the noise scale that a limit is made of."""
    size = 2 ** int(math.log2(max(limit / NOISE_LIMIT, MIN_SUGGESTED)))
    return min(size, num_examples)


def judge_noise(
    noise: NoiseScale,
    *,
    batch_size: int,
    num_examples: int,
    step: int,
    places: tuple[str, float],
) -> tuple[Finding, ...]:
    """Suggests a batch size; one far beyond the noise scale is a suspect.

    Args:
        noise: finite, of one large batch in mid-descent.
        batch_size: of the user's steps.
        num_examples: of the user's data.
        step: after which it was measured.
        places: the parameter that is used most in one example, and how often.

    References:
        McCandlish et al. (2018), "An empirical model of large-batch training",
        equations 2.7 and 2.11.
    """
    scale, error = float(noise.noise_scale), float(noise.standard_error)
    limit = max(NOISE_LIMIT * (scale + 2 * error), USUAL)
    size = suggested_size(limit, num_examples)
    if batch_size <= max(scale, size):
        advice = (
            f"Keep the smallest batch that trains in bearable time. Up to {size} a"
            " larger one saves steps nearly in proportion, if your hardware takes it in"
            " the same time."
        )
    else:
        advice = (
            f"Use batches of {size} or fewer: at the noise scale a training takes twice"
            " the fewest steps and twice the fewest examples; beyond it more examples"
            " hardly save steps."
        )
    return (
        Finding(
            "batch-size/suggested" if batch_size <= limit else TOO_LARGE,
            5,
            "info",
            "batch_size",
            float(batch_size),
            limit,
            f"After {step} steps, with the loss on its way down, the noise of a batch's"
            f" gradient is as large as the gradient at {number(scale)} examples"
            f" (standard error {number(error)}); your batches of {batch_size} are"
            f" {number(batch_size / max(scale, 1e-6))} times that.",
            f"{advice}{_for_other_shapes(*places)}",
        ),
    )


def _for_other_shapes(name: str, uses: float) -> str:
    """What counts is how many gradient terms a step averages (D. Holden)."""
    if not 1.5 < uses < math.inf:
        return ""
    return (
        f" That is for inputs of this size, where each example gives {name}"
        f" {number(uses)} gradient terms: at twice the resolution a quarter of the"
        " examples gives as many, at twice the sequence length half."
    )


def judge_rest(batch_size: int, num_examples: int) -> tuple[Finding, ...]:
    """Notes that the examples do not divide into batches.

    Args:
        batch_size: of the user's steps.
        num_examples: of the user's data.
    """
    rest = num_examples % batch_size
    if not rest or batch_size > num_examples:
        return ()
    return (
        Finding(
            "batch-size/not-divisible",
            5,
            "info",
            "batch_size",
            float(rest),
            0.0,
            f"The {num_examples} examples leave a last batch of {rest}.",
            "Leave the last batch out and shuffle anew for each pass: its gradient is"
            " noisier, and its shape is compiled once more.",
        ),
    )
