"""Figures of what was measured; needs matplotlib (``pip install nnsanity[plot]``).

Each function draws one result and returns a ``matplotlib.figure.Figure``, which a
notebook shows by itself.  Nothing touches pyplot or any other global state.
"""

import io
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from nnsanity.quantities.moments import Moments

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from nnsanity.quantities.rate_curves import LRRange, LRSweep
    from nnsanity.report import Report

INK, QUIET, GOOD, BAD = "#2b2b2b", "#b5bac1", "#1b7f6b", "#c0392b"
MAX_ROWS = 12
"""Features or repairs in one figure."""


def learning(report: "Report") -> "Figure":
    """Draws how much was learned by step: the original, and each repair.

    0 is what the best constant output reaches, 1 is perfect.

    Args:
        report: of a checkup that trained.

    Returns:
        One axes; repairs that helped are coloured and named.

    Raises:
        ValueError: if the checkup did not train.
    """
    curve = _measured(report, "quality_curve")
    num_steps = len(report.measurements["trial"][0].batch_losses)
    attempts = sorted(report.measurements["repairs"], key=lambda one: one.helped)
    figure, axes = _figure("How much was learned")
    for one in attempts:
        colour = GOOD if one.helped else QUIET
        steps = np.linspace(0, one.num_steps, len(one.curve))
        axes.plot(steps, one.curve.clip(-0.05), color=colour, lw=1.2 + one.helped)
    steps = np.linspace(0, num_steps, len(curve))
    axes.plot(steps, curve.clip(-0.05), color=INK, lw=2.4)
    best = max(
        (one for one in attempts if one.helped),
        key=lambda one: np.median(one.levels),
        default=None,
    )
    ends = [("as it is", num_steps, curve, INK)]
    if best is not None:
        name = textwrap.fill(best.repair, 60)
        ends.append((name, best.num_steps, best.curve, GOOD))
    for name, end, values, colour in ends:
        _label_end(axes, end, float(values[-1]), name, colour)
    axes.set(
        xlabel="steps", ylabel="quality: 0 a constant, 1 perfect", ylim=(-0.28, 1.08)
    )
    return figure


def repairs(report: "Report") -> "Figure":
    """Draws what each repair changed, by itself or together with others.

    Args:
        report: of a checkup that tried repairs.

    Returns:
        One axes, a row for each repair, from the quality of the original to that of
        the repaired copy; the largest change on top.

    Raises:
        ValueError: if no repair was tried.
    """
    attempts = _measured(report, "repairs")
    if not attempts:
        raise ValueError("repairs: the checkup tried none, so there is nothing to draw")
    before = float(np.median(_measured(report, "quality_curve")[-3:]))
    reached = {one.repair: float(np.median(one.levels)) for one in attempts}
    helped = {one.repair for one in attempts if one.helped}
    rows = sorted(reached, key=lambda name: reached[name])[-MAX_ROWS:]
    figure, axes = _figure("What each repair changes", len(rows))
    for row, name in enumerate(rows):
        colour = GOOD if name in helped else QUIET
        ends = np.clip([before, reached[name]], -0.05, None)
        axes.plot(ends, [row, row], color=colour, lw=2.5, solid_capstyle="round")
        axes.plot(ends[1], row, "o", color=colour, ms=7)
    axes.axvline(max(before, -0.05), color=INK, lw=1.2)
    axes.annotate(
        "as it is",
        (max(before, -0.05), 1),
        (4, 2),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        color=INK,
    )
    axes.set_yticks(range(len(rows)), [textwrap.fill(name, 42) for name in rows])
    axes.set(xlabel="quality: 0 a constant, 1 perfect", xlim=(-0.08, 1.08))
    axes.tick_params(axis="y", length=0)
    return figure


def features(moments: Moments, *, names: Sequence[str] | None = None) -> "Figure":
    """Draws the range of features beside the -1..1 that networks are built for.

    Args:
        moments: as ``feature_moments`` returns.
        names: of the features, otherwise their numbers.

    Returns:
        One axes, a row for each of at most twelve features, those farthest from mean 0
        and deviation 1 on top: the range as a thin line, the mean and one deviation
        around it as a thick one.

    Raises:
        ValueError: if there is not one name for each feature.
    """
    host = jax.tree.map(np.atleast_1d, jax.device_get(moments))
    deviation = np.atleast_1d(np.asarray(moments.deviation))
    names = (
        [f"feature {index}" for index in range(len(host.mean))]
        if names is None
        else names
    )
    if len(names) != len(host.mean):
        raise ValueError(
            f"features: names must hold one name for each of the {len(host.mean)}"
            f" features, got {len(names)}"
        )
    size = np.hypot(host.mean, deviation)
    farthest = np.abs(np.log(np.where(size > 0, size, 1)))
    rows = np.argsort(farthest, kind="stable")[-MAX_ROWS:]
    figure, axes = _figure("Ranges of the features", len(rows))
    axes.axvspan(-1, 1, color=GOOD, alpha=0.15, lw=0)
    for row, index in enumerate(rows):
        mean, spread = host.mean[index], deviation[index]
        axes.plot(
            [host.minimum[index], host.maximum[index]], [row, row], color=QUIET, lw=1.5
        )
        axes.plot([mean - spread, mean + spread], [row, row], color=INK, lw=4)
        axes.plot(mean, row, "o", color="white", mec=INK, ms=5)
    axes.set_xscale("symlog", linthresh=1.0)
    axes.set_yticks(range(len(rows)), [names[index] for index in rows])
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("value; shaded: -1 to 1")
    return figure


def rate_range(curve: "LRRange") -> "Figure":
    """Draws a learning-rate range test with its marks.

    Args:
        curve: as ``lr_range`` returns.

    Returns:
        One axes: the loss of each batch, its running mean, and lines at the steepest
        fall, the largest stable scale and the suggestion.
    """
    host = jax.device_get(curve)
    figure, axes = _figure("Loss while the rate rises")
    is_seen = ~host.diverged & np.isfinite(host.losses)
    axes.plot(host.scales[is_seen], host.losses[is_seen], color=QUIET, lw=1)
    axes.plot(host.scales[is_seen], host.smoothed[is_seen], color=INK, lw=2)
    marks = {
        "suggestion": (host.suggestion, GOOD),
        "steepest": (host.steepest, QUIET),
        "largest stable": (host.largest_stable, BAD),
    }
    _mark_scales(axes, marks)
    axes.set(xlabel="scale of the updates", ylabel="loss", xscale="log")
    return figure


def rate_grid(sweep: "LRSweep") -> "Figure":
    """Draws where trainings end that differ in their rate alone.

    Args:
        sweep: as ``lr_sweep`` returns.

    Returns:
        One axes: the last loss against the scale, shaded by its deviation over the
        seeds where there are several; crosses at the top have diverged.
    """
    host = jax.device_get(sweep)
    figure, axes = _figure("Loss after training at each rate")
    is_seen = ~host.diverged & np.isfinite(host.losses)
    axes.plot(host.scales[is_seen], host.losses[is_seen], "o-", color=INK, lw=2, ms=5)
    ends = host.losses - host.spread, host.losses + host.spread
    if np.isfinite(ends)[:, is_seen].any():
        bands = (one[is_seen] for one in ends)
        axes.fill_between(host.scales[is_seen], *bands, color=QUIET, alpha=0.3)
    axes.plot(
        host.scales[~is_seen],
        np.full((~is_seen).sum(), 0.97),
        "x",
        color=BAD,
        transform=axes.get_xaxis_transform(),
    )
    _mark_scales(axes, {"best": (host.best, GOOD)})
    axes.set(xlabel="scale of the updates", ylabel="loss", xscale="log")
    return figure


def figures_of(report: "Report") -> list["Figure"]:
    """Draws all that a report has the measurements for."""
    drawn = []
    if "quality_curve" in report.measurements:
        drawn.append(learning(report))
    if report.measurements.get("repairs"):
        drawn.append(repairs(report))
    inputs = report.measurements.get("inputs")
    if inputs is not None and np.ndim(inputs.moments.mean) == 1:
        drawn.append(features(inputs.moments))
    return drawn


def svg(figure: "Figure") -> str:
    """Returns a figure as an ``<svg>`` element for a page of HTML."""
    from matplotlib import rc_context

    page = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    # Text as text: smaller, searchable, and in the font of the page.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "nnsanity"}):
        figure.savefig(page, format="svg", metadata=nothing)
    text = page.getvalue()
    return re.sub(r' xmlns(:xlink)?="[^"]*"', "", text[text.index("<svg") :])


def _figure(title: str, num_rows: int | None = None) -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure

    height = 3.4 if num_rows is None else 1.2 + 0.3 * num_rows
    figure = Figure(figsize=(7.2, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11, color=INK, pad=18)
    axes.spines[["top", "right"]].set_visible(b=False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(colors=INK, labelsize=9)
    return figure, axes


def _label_end(axes: "Axes", step: float, level: float, name: str, colour: str) -> None:
    axes.annotate(
        name,
        (step, max(level, -0.05)),
        (-4, -6),
        textcoords="offset points",
        ha="right",
        va="top",
        color=colour,
        fontsize=9,
    )


def _mark_scales(axes: "Axes", marks: Mapping[str, tuple[Any, str]]) -> None:
    for row, (name, (scale, colour)) in enumerate(marks.items()):
        if not math.isfinite(scale):
            continue
        axes.axvline(scale, color=colour, lw=1.5, ls="--")
        axes.annotate(
            name,
            (scale, 1),
            (3, -10 - 11 * row),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            color=colour,
            fontsize=9,
        )


def _measured(report: "Report", name: str) -> Any:
    if name not in report.measurements:
        reason = report.skipped.get("trial", "the checkup did not train")
        raise ValueError(f"this figure needs the trial of a checkup: {reason}")
    return report.measurements[name]
