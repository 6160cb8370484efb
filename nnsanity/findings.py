"""What a diagnosis is made of: findings, their severities and their words."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

ITEMS = {
    1: "normalization",
    2: "results",
    3: "preprocessing",
    4: "regularization",
    5: "batch size",
    6: "learning rate",
    7: "final activation",
    8: "gradients",
    9: "initialization",
    10: "depth",
    11: "width",
}
"""The checklist of Daniel Holden, "My neural network isn't working! What should I
do?", in its order."""

SEVERITIES = ("error", "warning", "info")

Limits = Mapping[str, float]
"""The user's own limits by rule, in the place of the one that a check has."""
NO_LIMITS: Limits = MappingProxyType({})


class Finding(NamedTuple):
    """One thing that a check has to say.

    Attributes:
        rule: ``"item-slug/rule-slug"``, stable for ever.
        item: number in the checklist, 1 to 11.
        severity: ``"error"`` stops training, ``"warning"`` hurts and was shown to,
            ``"info"`` is worth knowing.
        where: layer or parameter path, feature index, or ``file.py:41 (function)``.
        measured: the number that was seen.
        limit: the threshold that was applied to it.
        message: what was seen, with the numbers.
        advice: what to do, first thing first.
    """

    rule: str
    item: int
    severity: str
    where: str
    measured: float
    limit: float
    message: str
    advice: str


CONSEQUENCES = frozenset(
    {
        "results/nonfinite",
        "results/no-better-than-constant",
        "gradients/nonfinite",
    }
)
"""Rules that say what happened and not why: causes come before them."""


class DiagnosisError(RuntimeError):
    """Raised by ``Report.raise_for``; ``findings`` holds what was found.

    Attributes:
        findings: the findings that are severe enough, in the order of the report.
    """

    def __init__(self, findings: Iterable[Finding]) -> None:
        self.findings = tuple(findings)
        lines = [f"{one.rule} at {one.where}: {one.message}" for one in self.findings]
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple:
        return type(self), (self.findings,)


def at_least(findings: Iterable[Finding], severity: str) -> tuple[Finding, ...]:
    """Returns the findings that are at least as severe.

    Raises:
        ValueError: if the severity is not one of ``SEVERITIES``.
    """
    if severity not in SEVERITIES:
        raise ValueError(f"severity must be one of {SEVERITIES}, got {severity!r}")
    allowed = SEVERITIES[: SEVERITIES.index(severity) + 1]
    return tuple(finding for finding in findings if finding.severity in allowed)


def number(value: float) -> str:
    """Writes a number with three significant digits, as findings do.

    Example:
        >>> number(0.123456), number(12345.0), number(1e-9)
        ('0.123', '12,300', '1e-09')
    """
    if value != value or value in (float("inf"), float("-inf")):
        return str(value)
    if abs(value) >= 1e6 or 0 < abs(value) < 1e-4:
        return f"{value:.3g}"
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 1000 else f"{rounded:g}"


def listed(names: Iterable[str], *, limit: int = 4) -> str:
    """Writes a few names and how many more there are.

    Example:
        >>> listed(["a", "b", "c"], limit=2)
        'a, b and 1 more'
    """
    names = list(names)
    if len(names) <= limit:
        return ", ".join(names)
    return f"{', '.join(names[:limit])} and {len(names) - limit} more"


class Effect(NamedTuple):
    """What a repair did to a short training, beside the original.

    Attributes:
        repair: what was done, as the subject of a sentence.
        before: what the original reached, in the unit of ``measure``.
        after: what the repaired copy reached.
        measure: what was measured: ``"accuracy"``, ``"share of the variance"``.
        num_steps: length of the copy's training.
        num_seeds: how many trainings each number is the median of.
        gain: the difference on a scale from 0, a constant output, to 1, perfect.
        limit: the gain from which on it counts.
        is_joint: whether other repairs were in place in both.
        num_steps_before: length of the original's training.
    """

    repair: str
    before: float
    after: float
    measure: str
    num_steps: int
    num_seeds: int
    gain: float
    limit: float
    is_joint: bool
    num_steps_before: int


def caused(finding: Finding, effect: Effect, severity: str) -> Finding:
    """Turns a suspicion into a cause, by the measured effect of its repair."""
    place = "With the other repairs in place, " if effect.is_joint else ""
    words = f"{place}{effect.repair}"
    before, after = f"{effect.before:.2f}", f"{effect.after:.2f}"
    if effect.num_steps == effect.num_steps_before:
        change = f" after {effect.num_steps:,} steps from {before} to {after}"
    else:
        change = f" from {before} after {effect.num_steps_before:,} steps to {after}"
        change += f" after {effect.num_steps:,}"
    sentence = (
        f"{words[0].upper()}{words[1:]} takes the {effect.measure}{change}"
        f" ({effect.num_seeds} seeds)."
    )
    # A proof stays an error, however much the network learns in spite of it.
    severity = min(severity, finding.severity, key=SEVERITIES.index)
    known = finding.measured == finding.measured
    return finding._replace(
        severity=severity,
        measured=finding.measured if known else effect.gain,
        limit=finding.limit if known else effect.limit,
        message=f"{finding.message} {sentence}",
    )
