"""Item 2: does the network learn anything, and does the loss ask for it?

"A falling loss is not a result: systems that learn fail in silence" (D. Holden).  What
was learned is told by the outputs and the targets themselves, in a unit that neither
the loss nor an affine change of the targets touches.
"""

import math
from collections.abc import Sequence

import numpy as np

from nnsanity._types import PyTree
from nnsanity.findings import Finding, listed, number
from nnsanity.quantities.errors import ConstantBaseline
from nnsanity.quantities.neighbors import Continuity
from nnsanity.quantities.overfit import Overfit
from nnsanity.tracing.mixing import Mixing

START_LIMIT = 3.0
"""Healthy loss at the start, in units of the best constant output's loss (Karpathy:
"verify loss @ init"; TheDeepChecker asks for the same)."""
CHANCE_LIMIT = 4.0
"""Deviations from chance up to which neighbours count as strangers, and a loss as that
of inputs given to other targets."""
BY_HEART_LIMIT = 0.5
"""What may be left of a small batch's loss before a bug is blamed: what fits leaves a
tenth, and what learns slowly lies between."""
COLLAPSED_LIMIT = 0.01
"""Deviation of the outputs over the examples in units of the targets', up to which they
count as one."""
CONSTANT_LIMIT = 0.05
"""Quality up to which outputs count as no better than a constant."""


def judge_meeting(places: Sequence[str]) -> tuple[Finding, ...]:
    """Says where outputs meet the targets of other examples."""
    return tuple(
        Finding(
            "results/broadcast-loss",
            2,
            "error",
            place,
            1.0,
            0.0,
            "The loss compares every output with the targets of all examples: the batch"
            " lies on one axis of the outputs and on another of the targets. The best"
            " that the network can learn is a constant.",
            "Print the shapes of outputs and targets there. (N,) against (N, 1) makes"
            " (N, N): reshape one of them to the other.",
        )
        for place in places
    )


def judge_mixing(measured: Mixing) -> tuple[Finding, ...]:
    """Says where one example looks at the others of its batch."""
    found = [
        _mixed(
            place,
            "warning",
            "The output of an example depends on the other examples of its batch: a"
            " sum, a maximum or a loop runs over them here.",
            "Check the axis there: axis=-1 for a softmax over classes, time and not"
            " batch for a recurrence. A model that compares examples by design says so"
            " by ignore=.",
        )
        for place in measured.places
    ]
    if measured.normalized:
        found.append(
            _mixed(
                listed(measured.normalized),
                "info",
                "Batch normalization uses the mean and the deviation of the batch"
                " itself, so that outputs depend on what else is in it.",
                "Right while training. Where you evaluate use the running averages:"
                " use_running_average=True in Linen, model.eval() in NNX.",
            )
        )
    return tuple(found)


def _mixed(where: str, severity: str, message: str, advice: str) -> Finding:
    rule = "results/mixes-examples"
    return Finding(rule, 2, severity, where, 1.0, 0.0, message, advice)


def judge_start(loss: float, constant_loss: float, limit: float) -> tuple[Finding, ...]:
    """Compares the loss of the untrained network with that of a constant."""
    if not math.isfinite(loss):
        return (_nonfinite_loss(loss),)
    if not constant_loss > 0 or loss <= limit * constant_loss:
        return ()
    return (
        Finding(
            "results/start-loss",
            2,
            "info",
            "loss_fn",
            loss / constant_loss,
            limit,
            f"The untrained network starts at a loss of {number(loss)}, where a"
            f" constant output reaches {number(constant_loss)}.",
            "Scale down the last layer's weights, or normalize inputs and targets, so"
            " that training does not begin by unlearning.",
        ),
    )


def _nonfinite_loss(loss: float) -> Finding:
    return Finding(
        "results/nonfinite",
        2,
        "error",
        "loss_fn",
        loss,
        0.0,
        f"The loss of the untrained network is {loss}.",
        "Look at the inputs first, then at logarithms, divisions and exponentials.",
    )


def judge_wrong_loss(
    *, perfect: float, reached: float, start: float, explained: float, learned: float
) -> tuple[Finding, ...]:
    """Says whether the loss rates the targets worse than outputs that explain nothing.

    Args:
        perfect: the loss of outputs that equal the targets.
        reached: the loss after the trial.
        start: the loss before it.
        explained: the quality after the trial, 1 is perfect and 0 a constant.
        learned: the quality from which a network counts as learning.
    """
    falls = reached < start - 0.1 * abs(start)
    margin = 0.01 * max(abs(perfect), abs(reached))
    if not falls or not perfect > reached + margin or explained > learned:
        return ()
    return (
        Finding(
            "results/unbounded-loss" if reached < 0 else "results/wrong-loss",
            2,
            "error",
            "loss_fn",
            reached,
            perfect,
            f"The loss falls to {number(reached)} while the outputs explain"
            f" {number(max(explained, 0) * 100)}% of the targets; outputs equal to the"
            f" targets would be rated worse, {number(perfect)}.",
            "The loss asks for something else than the targets. Check its sign, the"
            " order of its arguments, and that it suits the kind of targets.",
        ),
    )


def unusual_loss(kind: str) -> Finding:
    """The finding that the usual loss for such targets learns, where the own does not.

    Args:
        kind: of the targets.
    """
    return Finding(
        "results/wrong-loss",
        2,
        "info",
        "loss_fn",
        math.nan,
        math.nan,
        "The loss asks for something else than the targets: with"
        f" {USUAL_LOSSES[kind]} the same network learns what it does not with this.",
        _LOSS_ADVICE[kind],
    )


USUAL_LOSSES = {
    "classes": "softmax cross entropy",
    "one-hot": "softmax cross entropy",
    "binary": "sigmoid cross entropy",
    "numbers": "squared error",
}
_LOSS_ADVICE = {
    "classes": "Give the logits to"
    " optax.softmax_cross_entropy_with_integer_labels and take the mean.",
    "one-hot": "Give the logits to optax.softmax_cross_entropy and take the mean.",
    "binary": "Give the logits to optax.sigmoid_binary_cross_entropy and take the"
    " mean.",
    "numbers": "Take the mean of (outputs - targets)**2; check axes, signs and weights"
    " of your own loss against it.",
}


def judge_labels(outputs: PyTree, targets: PyTree) -> tuple[Finding, ...]:
    """Says whether integer labels point behind the last output.

    Labels that are far outside, as 255 or -1, are taken for those of examples that the
    loss leaves out.

    Args:
        outputs: array or shape, [examples, ..., classes].
        targets: concrete array, [examples, ...].
    """
    *examples, num_classes = getattr(outputs, "shape", ()) or (0,)
    is_labels = hasattr(targets, "dtype") and np.issubdtype(targets.dtype, np.integer)
    if not is_labels or not examples or tuple(examples) != targets.shape:
        return ()
    labels = np.asarray(targets)
    share = float(np.mean(labels == num_classes))
    if num_classes < 2 or not share or labels.max() > num_classes:
        return ()
    return (
        Finding(
            "results/labels-out-of-range",
            2,
            "warning",
            "targets",
            float(labels.max()),
            float(num_classes - 1),
            f"Labels go from {labels.min()} to {labels.max()}, but the network has"
            f" {num_classes} outputs, 0 to {num_classes - 1}: there is no right one for"
            f" {number(100 * share)}% of the examples. JAX does not complain about an"
            " index out of range.",
            "Count classes from 0, or give the network one more output.",
        ),
    )


def no_better_than_constant(
    explained: float, num_steps: int, tried: Sequence[str]
) -> Finding:
    """The leading finding where a network does not learn and no repair helped."""
    ruled_out = f" Tried without effect: {', '.join(tried)}." if tried else ""
    return Finding(
        "results/no-better-than-constant",
        2,
        "error",
        "network",
        explained,
        CONSTANT_LIMIT,
        f"After {num_steps} steps the outputs explain {number(explained * 100)}% of"
        f" what a constant output does not.{ruled_out}",
        "Look at the data: print a few inputs with their targets and outputs, as the"
        " loss sees them. Check that inputs and targets belong together, and that a"
        " person could tell the target from the input.",
    )


def judge_neighbors(measured: Continuity, *, severity: str) -> tuple[Finding, ...]:
    """Says whether inputs tell anything about the targets.

    For a network that does not learn, or by heart alone: one that does is the better
    witness.

    Args:
        measured: of inputs and targets.
        severity: of the finding.
    """
    distance, z_score = float(measured.distance), float(measured.z_score)
    if abs(z_score) > CHANCE_LIMIT:
        return ()  # neighbours that always differ tell as much as those that agree
    return (
        Finding(
            "results/uninformative-targets",
            2,
            severity,
            "data",
            z_score,
            CHANCE_LIMIT,
            f"Examples with near inputs have targets as different as any two (their"
            f" distance is {number(distance)} of that of strangers,"
            f" {number(z_score)} deviations from chance).",
            "Check that inputs and targets belong together: one may be shuffled, sorted"
            " or shifted against the other. Print a few pairs.",
        ),
    )


def judge_overfit(
    measured: Overfit, num_examples: int, tried: Sequence[str]
) -> tuple[Finding, ...]:
    """Says whether a network can't even learn one small batch by heart.

    Args:
        measured: of the copy that came furthest.
        num_examples: in the batch.
        tried: what was repaired on copies, to no avail.
    """
    if abs(float(measured.left)) <= BY_HEART_LIMIT:
        return ()
    left, blind = float(measured.left), float(measured.blind_loss)
    repaired = f", nor with {', '.join(tried)}" if tried else ""
    return (
        Finding(
            "results/cannot-overfit-batch",
            2,
            "error",
            "network",
            left,
            BY_HEART_LIMIT,
            f"Trained on {num_examples} examples alone, at any of"
            f" {len(measured.scales)} learning rates, the network is left with"
            f" {number(100 * left)}% of the loss that it has without telling them apart"
            f" ({number(float(measured.loss))} of {number(blind)}){repaired}.",
            "Nearly any network can learn a few examples by heart: this points to a bug"
            " between inputs and loss. Look for examples that are mixed up (a reshape,"
            " a transpose, a shuffle of one side), a gradient that is cut off, a part"
            " that is frozen, a layer of one or two units, a loss with a wrong sign.",
        ),
    )


def judge_collapse(
    outputs_deviation: float, targets_deviation: float
) -> tuple[Finding, ...]:
    """Says whether all examples have one output; for a network that does not learn."""
    ratio = outputs_deviation / max(targets_deviation, 1e-30)
    if not ratio <= COLLAPSED_LIMIT:
        return ()
    return (
        Finding(
            "results/collapsed-outputs",
            2,
            "info",
            "network",
            ratio,
            COLLAPSED_LIMIT,
            "After training every example has the same output: they differ by"
            f" {number(100 * ratio)}% of what the targets differ.",
            "A consequence; look for its cause among the other findings: dead units,"
            " inputs that are not normalized, a rate that is too high.",
        ),
    )


def judge_dependence(z_score: float) -> tuple[Finding, ...]:
    """Says whether inputs matter; for a network that was trained."""
    if z_score > CHANCE_LIMIT:
        return ()
    return (
        Finding(
            "results/ignores-inputs",
            2,
            "info",
            "network",
            z_score,
            CHANCE_LIMIT,
            "After training the loss is the same when inputs are given to other targets"
            f" ({number(z_score)} deviations from it).",
            "A consequence; look for its cause among the other findings.",
        ),
    )


def errors_in_words(measured: ConstantBaseline) -> str:
    """Says in the unit of the targets how large the errors are."""
    error, constant = (
        np.atleast_1d(np.asarray(one))
        for one in (measured.error, measured.constant_error)
    )
    if error.size > 3:
        return ""
    pairs = zip(error, constant, strict=True)
    return "; ".join(
        f"{number(float(one))} where the best constant has {number(float(other))}"
        for one, other in pairs
    )
