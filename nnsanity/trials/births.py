"""Where numbers stop to be finite, said by the findings that report it."""

from collections.abc import Sequence

from nnsanity._types import LossFn, Params, PyTree
from nnsanity.findings import Finding
from nnsanity.tracing.nonfinite import Birth, first_nonfinite

SPOILED = frozenset({"results/nonfinite", "gradients/nonfinite"})


def with_births(
    loss_fn: LossFn, params: Params, batch: PyTree, *, findings: Sequence[Finding]
) -> tuple[Finding, ...]:
    """Adds to findings of NaN and infinity where the first of them is born.

    Costs one compiled step where there are such findings, and nothing elsewhere.

    Args:
        loss_fn: ``loss_fn(params, batch) -> scalar``.
        params: that were judged.
        batch: that they were judged on.
        findings: any.
    """
    if not any(finding.rule in SPOILED for finding in findings):
        return tuple(findings)
    birth = first_nonfinite(loss_fn, params, batch).birth
    if birth is None:
        return tuple(findings)
    return tuple(
        _located(finding, birth) if finding.rule in SPOILED else finding
        for finding in findings
    )


def _located(finding: Finding, birth: Birth) -> Finding:
    if birth.operation == "argument":
        given = birth.layer.replace("batch/0", "inputs").replace("batch/1", "targets")
        words = f"It is there already in what was given: {given}."
        return finding._replace(message=f"{finding.message} {words}")
    what = "NaN" if birth.is_nan else "infinity"
    way = "the backward pass" if birth.is_backward else "the forward pass"
    layer = f" of layer {birth.layer}" if birth.layer else ""
    turn = f", turn {', '.join(map(str, birth.turn))} of its loop" if birth.turn else ""
    words = (
        f"The first {what} is born in {way}{layer}, by {birth.operation} at"
        f" {birth.source or 'an unknown line'}{turn}."
    )
    return finding._replace(message=f"{finding.message} {words}")
