"""Item 5: how many gradient terms does a step average?

"Large batches average away the noise that finds flat minima.  Take the smallest that
trains in bearable time; try 16, 8, even 1" (D. Holden).
"""

from nnsanity.findings import Finding

USUAL = 32
"""The batch size that the trial tries instead (Bengio 2012, section 3.1.1)."""
LARGE_SHARE = 0.25
"""Share of the data from which on a batch is suspected to be too large."""
SMALL = 2
"""Size up to which a batch is suspected to be too small (AutoTrainer)."""


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
        f"batch-size/{'too-large' if is_large else 'too-small'}",
        5,
        "info",
        "batch_size",
        float(batch_size),
        float(USUAL),
        message,
        advice,
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
