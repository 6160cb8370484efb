"""What a checkup found, as text, as a dictionary and as a page."""

import dataclasses
import html
import importlib.util
import json
import math
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nnsanity import plot
from nnsanity.findings import ITEMS, SEVERITIES, DiagnosisError, Finding, at_least

WIDTH = 88
_MARKS = {"error": "ERROR", "warning": "WARNING", "info": "note"}


@dataclasses.dataclass(frozen=True, eq=False)
class Report:
    """The result of a checkup; lives on the host.

    Attributes:
        findings: the most severe and most certain first.
        measurements: every raw result, by check name.
        skipped: what was not run or not inspected, and why.
        summary: one sentence on how the network learned.
        ruled_out: repairs that were tried and did not help.
    """

    findings: tuple[Finding, ...]
    measurements: Mapping[str, Any]
    skipped: Mapping[str, str]
    summary: str = ""
    ruled_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Returns a page for a terminal, at most 100 columns wide."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"nnsanity checkup: {self._counts()}"
        yield from _wrapped(self.summary, "")
        leading = [one for one in self.findings if one.severity != "info"]
        notes = [one for one in self.findings if one.severity == "info"]
        for rank, finding in enumerate(leading, start=1):
            yield ""
            yield from _paragraph(rank, finding)
        if notes:
            yield ""
            yield "Worth knowing, and not shown to do harm here:"
            for finding in notes:
                yield from _wrapped(f"{finding.rule}: {finding.message}", "  - ")
        if self.ruled_out:
            yield ""
            yield from _wrapped(f"Ruled out: {'; '.join(self.ruled_out)}.", "")
        if self.skipped:
            yield ""
            yield "Not run or not looked into:"
            for name, reason in self.skipped.items():
                yield from _wrapped(f"{name}: {reason}", "  - ")

    def _counts(self) -> str:
        parts = []
        for severity in SEVERITIES[:2]:
            count = sum(one.severity == severity for one in self.findings)
            if count:
                parts.append(f"{count} {severity}{'s' if count > 1 else ''}")
        return ", ".join(parts) or "nothing wrong found"

    def to_dict(self) -> dict[str, Any]:
        """Returns a dictionary that ``json.dumps`` takes; its keys are stable.

        Numbers that JSON has no word for (NaN, infinity) become strings.
        """
        return {
            "summary": self.summary,
            "findings": [_plain(finding._asdict()) for finding in self.findings],
            "ruled_out": list(self.ruled_out),
            "skipped": dict(self.skipped),
            "measurements": {
                name: _plain(value) for name, value in self.measurements.items()
            },
        }

    def to_html(self, path: str | Path | None = None) -> str:
        """Returns one self-contained page, and writes it where a path is given.

        With figures where matplotlib is installed (``pip install nnsanity[plot]``).
        """
        page = _PAGE.format(
            title=html.escape(f"nnsanity checkup: {self._counts()}"),
            body=self._repr_html_(),
        )
        if path is not None:
            Path(path).write_text(page, encoding="utf-8")
        return page

    def _repr_html_(self) -> str:
        leading = [one for one in self.findings if one.severity != "info"]
        notes = [one for one in self.findings if one.severity == "info"]
        parts = [
            f"<h1>{html.escape(self._counts())}</h1>",
            f"<p>{html.escape(self.summary)}</p>",
            *(_card(rank, one) for rank, one in enumerate(leading, start=1)),
            *_figures(self),
            _list("Worth knowing", [f"{one.rule}: {one.message}" for one in notes]),
            _list("Ruled out", self.ruled_out),
            _list("Not run", [f"{name}: {why}" for name, why in self.skipped.items()]),
        ]
        return f'<div class="nnsanity">{_STYLE}{"".join(parts)}</div>'

    def raise_for(self, severity: str = "error") -> None:
        """Raises if there is a finding that is at least as severe.

        Raises:
            DiagnosisError: with the findings in it.
            ValueError: if the severity is unknown.
        """
        found = at_least(self.findings, severity)
        if found:
            raise DiagnosisError(found)


def _paragraph(rank: int, finding: Finding) -> Iterator[str]:
    item = f"checklist {finding.item}: {ITEMS[finding.item]}"
    yield f"{rank}. {_MARKS[finding.severity]}  {finding.rule}  ({item})"
    yield from _wrapped(f"at {finding.where}", "   ")
    yield from _wrapped(finding.message, "   ")
    yield from _wrapped(finding.advice, "   -> ")


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=" " * len(indent),
        break_on_hyphens=False,
    )


def _plain(value: Any) -> Any:
    """Turns a tree of arrays into what JSON has words for."""
    if hasattr(value, "_asdict"):
        return {name: _plain(one) for name, one in value._asdict().items()}
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.loads(json.dumps(value, default=str))


def _card(rank: int, finding: Finding) -> str:
    text = {name: html.escape(str(value)) for name, value in finding._asdict().items()}
    return (
        f'<section class="{text["severity"]}"><h2>{rank}. {text["rule"]}'
        f" <small>{text['severity']} at {text['where']}</small></h2>"
        f'<p>{text["message"]}</p><p class="advice">{text["advice"]}</p></section>'
    )


def _figures(report: Report) -> list[str]:
    """Draws what was measured, where matplotlib is there."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    drawn = plot.figures_of(report)
    return [f"<figure>{plot.svg(figure)}</figure>" for figure in drawn]


def _list(title: str, lines: Any) -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<h3>{title}</h3><ul>{items}</ul>"


_STYLE = """<style>
.nnsanity {font: 15px/1.5 system-ui, sans-serif; max-width: 50em; color: #222}
.nnsanity h1 {font-size: 1.4em} .nnsanity h2 {font-size: 1.05em; margin: 0}
.nnsanity h2 small {font-weight: normal; color: #666}
.nnsanity section {border-left: 5px solid #999; padding: .5em 1em; margin: 1em 0;
  background: #f7f7f7}
.nnsanity section.error {border-color: #c0392b}
.nnsanity section.warning {border-color: #e0a100}
.nnsanity section p {margin: .3em 0}
.nnsanity .advice::before {content: "\2192\00a0"; color: #1b7f6b}
.nnsanity .advice {font-weight: 600}
.nnsanity li {color: #555}
.nnsanity figure {margin: 1.5em 0} .nnsanity svg {max-width: 100%; height: auto}
</style>"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"></head>
<body style="margin: 2em auto; padding: 0 1em; max-width: 52em">{body}</body></html>
"""
