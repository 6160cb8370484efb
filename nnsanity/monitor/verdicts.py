"""Judges the record of a monitor: what went wrong, in which step and where."""

import math

import numpy as np

from nnsanity.checks.gradients import DEAD_LIMIT, VANISHING_LIMIT
from nnsanity.checks.regularization import RISE_LIMIT
from nnsanity.findings import Finding, listed, number
from nnsanity.monitor.names import Names
from nnsanity.monitor.state import MonitorRecord

RATIO_LIMIT = 0.1
"""Healthy |update| / |parameter|: a hundred times Karpathy's usual 1e-3."""
GROWTH_LIMIT = 10.0
"""Healthy |update| over its own average before a spike.  At one rate Adam's own updates
grow to (1 - 0.9) / sqrt(1 - 0.999) = 3.2 times the rate."""
SPIKE_LENGTH = 3
"""Steps in a row that a spike takes: single hard batches are none.  Starting value."""
LOST_SHARE = 0.1
"""Share of what a run had gained that it may lose again.  Starting value."""
RISE_LENGTH = 3
"""Evaluations in a row above the limit that make overfitting.  Starting value."""
SETTLED = 100
"""Watched steps after which averages by leaf are judged."""


def judge_monitor(
    record: MonitorRecord, names: Names, *, every: int, window: int
) -> tuple[Finding, ...]:
    """Says what went wrong, causes first.

    Args:
        record: on the host.
        names: of leaves and layers.
        every: steps from one look to the next.
        window: looks without activity after which a unit counts as dead.
    """
    return (
        *_too_high(record, names),
        *_nonfinite(record, names, every),
        *_dead_units(record, names, every, window),
        *_overfitting(record),
        *_vanishing(record, names),
    )


def _has_lost(record: MonitorRecord) -> bool:
    """Tells whether the loss stands well above its best, or is no number."""
    gained = np.nan_to_num(float(record.loss_start - record.lowest_average)).clip(0)
    best = float(record.lowest_average) + LOST_SHARE * gained
    is_back = bool(np.isfinite(record.loss)) and float(record.loss_average) <= best
    return not is_back


def _too_high(record: MonitorRecord, names: Names) -> list[Finding]:
    spike = record.spike
    if spike.length >= SPIKE_LENGTH and spike.growth > GROWTH_LIMIT:
        return [_spike(record, names)]
    if _rose_before(record) and record.nonfinite.step - spike.step >= SPIKE_LENGTH:
        return [_diverged(record, names)]
    if record.num_watched < SETTLED and np.isfinite(record.loss):
        return []
    ratio = _usual_ratio(record, names)
    if ratio <= RATIO_LIMIT or not _has_lost(record):
        return []
    largest = max(names.weights, key=lambda leaf: record.update_ratio[leaf])
    return [
        Finding(
            "learning-rate/too-high",
            6,
            "warning",
            names.leaves[largest][0],
            ratio,
            RATIO_LIMIT,
            f"Up to step {record.step - 1} an update moved half of the weights by more"
            f" than {number(ratio)} of their own size, where 0.001 is usual, and the"
            f" loss is at {number(float(record.loss))} after an average of"
            f" {number(float(record.lowest_average))} at step {record.lowest_step}."
            f"{_since(record) if _rises(record) else ''}",
            _LOWER.format(record.spike.step)
            if _rises(record)
            else "Divide the learning rate by 10 until the loss falls steadily.",
        )
    ]


_LOWER = "Lower the learning rate, and look at what it did before step {}."


def _rises(record: MonitorRecord) -> bool:
    """Tells whether the loss rose, and has not come back."""
    spike = record.spike
    is_last = spike.step + spike.length == record.step
    return bool(spike.step >= 0 and spike.length >= SPIKE_LENGTH and is_last)


def _since(record: MonitorRecord) -> str:
    level = number(float(record.spike.level))
    return f" The loss had been above {level} since step {record.spike.step}."


def _usual_ratio(record: MonitorRecord, names: Names) -> float:
    """Median over the weights: biases and what starts at zero move far at first."""
    ratios = record.update_ratio[list(names.weights)]
    return float(np.median(ratios)) if ratios.size else 0.0


def _spike(record: MonitorRecord, names: Names) -> Finding:
    spike, growth = record.spike, float(record.spike.growth)
    name = names.leaves[int(spike.leaf)][0]
    lost = _has_lost(record)
    now = f"it is now at {number(float(record.loss))}"
    return Finding(
        "learning-rate/too-high",
        6,
        "warning" if lost else "info",
        name,
        growth,
        GROWTH_LIMIT,
        f"The loss spiked at step {spike.step}, above {number(float(spike.level))},"
        f" after the update of {name} had grown to {number(growth)} times its average;"
        f" {now if lost else 'it has come back since'}.",
        f"Look at what the learning rate did before step {spike.step}: lower it there,"
        " or warm it up more slowly after a restart.",
    )


def _diverged(record: MonitorRecord, names: Names) -> Finding:
    """Between two looks: how large the updates were is not known."""
    begun, bad = int(record.spike.step), record.nonfinite
    flags = np.asarray(bad.parameters) | np.asarray(bad.gradients)
    return Finding(
        "learning-rate/too-high",
        6,
        "warning",
        _first(flags, names) if flags.any() else "optimizer",
        float(bad.step - begun),
        float(SPIKE_LENGTH),
        f"The loss rose above {number(float(record.spike.level))} at step {begun}, and"
        f" {bad.step - begun} steps later it was no number any more: it grew from step"
        " to step, as it does at a rate that is too high.",
        _LOWER.format(begun),
    )


def _nonfinite(record: MonitorRecord, names: Names, every: int) -> list[Finding]:
    bad = record.nonfinite
    if bad.step < 0:
        return []
    leaves = [name for name, _ in names.leaves]
    gradients, updates, parameters = (
        [name for name, one in zip(leaves, flags, strict=True) if one]
        for flags in (bad.gradients, bad.updates, bad.parameters)
    )
    rows = [
        row for (row, _), one in zip(names.rows, bad.activations, strict=True) if one
    ]
    rule, item = ("results", 2) if bad.loss else ("gradients", 8)
    seen = [
        *(["the loss"] if bad.loss else []),
        *([f"the activations from {rows[0]} on ({len(rows)} layers)"] if rows else []),
        *_counted("gradients", gradients, leaves),
        *_counted("updates", updates, leaves),
    ]
    words = f"NaN, infinite or beyond 1e19 first in step {bad.step}: {'; '.join(seen)}."
    if not bad.watched:
        words += f" The layers were not looked at in that step (every={every})."
    if parameters:
        words += (
            f" Of the parameters {len(parameters)} ({listed(parameters)}) were so"
            " already before its update."
        )
    else:
        words += " The parameters were still finite."
    if _rose_before(record):
        words += _since(record)
    flags = [np.asarray(one) for one in (bad.parameters, bad.gradients, bad.updates)]
    where = [*rows, *(_first(flag, names) for flag in flags if flag.any()), "loss"][0]
    num_bad = len(rows) + len(gradients) + len(updates) + int(bad.loss)
    advice = _advice(record, names, rows)
    # Scaled losses overflow now and then; an update of zero leaves the step out.
    is_harmless = not bad.loss and not updates
    if is_harmless:
        words += " The updates were finite: the optimizer left them out."
    return [
        Finding(
            f"{rule}/nonfinite",
            item,
            "warning" if is_harmless else "error",
            where,
            float(num_bad),
            0.0,
            words,
            advice,
        )
    ]


def _first(bad: np.ndarray, names: Names) -> str:
    """Name of the first bad leaf; weights in the order of execution come first."""
    order = [*names.weights, *range(len(names.leaves))]
    return next(names.leaves[leaf][0] for leaf in order if bad[leaf])


def _rose_before(record: MonitorRecord) -> bool:
    """Tells whether the loss rose until it was no number any more."""
    begun, bad = int(record.spike.step), int(record.nonfinite.step)
    return 0 <= begun < bad <= begun + int(record.spike.length)


def _counted(kind: str, bad: list[str], leaves: list[str]) -> list[str]:
    if not bad:
        return []
    return [f"the {kind} of {len(bad)} of {len(leaves)} parameters ({listed(bad)})"]


def _advice(record: MonitorRecord, names: Names, rows: list[str]) -> str:
    bad = record.nonfinite
    if _rose_before(record):
        return _LOWER.format(record.spike.step)
    if not bad.loss and not bad.gradients.any():
        return "Look into the optimizer: finite gradients became other updates."
    if not _usual_ratio(record, names) <= RATIO_LIMIT:
        return "Divide the learning rate by 10: updates are as large as weights."
    if bad.parameters.any() and bad.step > 0:
        return (
            f"Look at step {bad.step - 1}: its update left parameters that are not"
            " finite, though its loss was."
        )
    if bad.parameters.any():
        return "Look at how the parameters were drawn or loaded."
    if not bad.watched:
        return (
            f"Look for NaN, infinite or huge values in the batch of step {bad.step};"
            " watch every step (every=1) to see from which layer on."
        )
    if not bad.parameters.any() and rows and rows[0] == names.rows[0][0]:
        return (
            f"Look for NaN, infinite or huge inputs in the batch of step {bad.step}:"
            " the first layer has them already."
        )
    if rows:
        return (
            f"Look at what enters {rows[0]} and at its weights; a rate that is too high"
            " makes them grow until they overflow."
        )
    return (
        "Look for logarithms, square roots and divisions at zero in the loss, and for"
        f" NaN in the targets of step {bad.step}."
    )


def _dead_units(
    record: MonitorRecord, names: Names, every: int, window: int
) -> list[Finding]:
    findings = []
    for layer in names.stacks:
        last = record.last_active.get(layer, np.zeros(0, np.int32))
        for place in np.ndindex(last.shape[:-1]):
            inactive = record.watched_step - last[place] >= window * every
            fraction = float(np.mean(inactive)) if inactive.size else 0.0
            if fraction <= DEAD_LIMIT:
                continue
            row = layer + "".join(f"[{index}]" for index in place)
            dead = last[place][inactive]
            units = [str(unit) for unit in np.flatnonzero(inactive)]
            died = f"the latest fell silent after step {dead.max()}"
            never = f"{int(np.sum(dead < 0))} never were"
            findings.append(
                Finding(
                    "gradients/dead-units",
                    8,
                    "warning",
                    row,
                    fraction,
                    DEAD_LIMIT,
                    f"{len(units)} of {inactive.size} units of {row} were not active in"
                    f" the last {window} watched steps up to {record.watched_step}"
                    f" (units {listed(units)}): {died if dead.max() >= 0 else never}"
                    f"{f', {never}' if dead.min() < 0 <= dead.max() else ''}.",
                    "Lower the learning rate, above all of the biases, start the biases"
                    " at zero, or use jax.nn.leaky_relu.",
                )
            )
    return findings


def _overfitting(record: MonitorRecord) -> list[Finding]:
    seen = record.validation
    still_falls = float(record.loss_average) < float(seen.training)
    if seen.num_evaluations and not np.isfinite(seen.loss) and np.isfinite(record.loss):
        return [
            Finding(
                "results/nonfinite",
                2,
                "warning",
                "validation data",
                float(seen.loss),
                0.0,
                f"The validation loss was {number(float(seen.loss))} after step"
                f" {seen.step}, while that of training was finite.",
                "Look for NaN, infinite or huge values in the validation data.",
            )
        ]
    if seen.length < RISE_LENGTH or not still_falls:
        return []
    lowest, last = float(seen.lowest), float(seen.loss)
    return [
        Finding(
            "regularization/overfitting",
            4,
            "warning",
            "network",
            last / lowest if lowest > 0 else last - lowest,
            RISE_LIMIT,
            f"The validation loss fell to {number(lowest)} at step {seen.lowest_step}"
            f" and rose again to {number(last)} at step {seen.step}, while the average"
            f" training loss went on from {number(float(seen.training))} to"
            f" {number(float(record.loss_average))}: the network learns examples by"
            " heart.",
            f"Keep the parameters of step {seen.lowest_step}; get more data, or make"
            " more by augmentation; add dropout of 0.1 to 0.25 or weight decay.",
        )
    ]


def _vanishing(record: MonitorRecord, names: Names) -> list[Finding]:
    if record.num_watched < SETTLED or not np.isfinite(record.gradient_norm).all():
        return []
    sizes = [math.prod(shape) for _, shape in names.leaves]
    weights = [leaf for leaf in names.weights if record.gradient_norm[leaf] > 0]
    if len(weights) < 2:
        return []
    first, last = weights[0], weights[-1]
    gradients, ratios = (
        [float(norm[leaf]) / math.sqrt(max(sizes[leaf], 1)) for leaf in (first, last)]
        for norm in (record.gradient_norm, record.update_average)
    )
    # An optimizer that divides by the gradient's size learns in spite of it.
    share, moved = gradients[0] / gradients[1], ratios[0] / max(ratios[1], 1e-38)
    if share >= VANISHING_LIMIT or moved >= VANISHING_LIMIT:
        return []
    first_name, last_name = names.leaves[first][0], names.leaves[last][0]
    return [
        Finding(
            "gradients/vanishing",
            8,
            "warning",
            first_name,
            share,
            VANISHING_LIMIT,
            f"At step {record.step - 1} the gradient of {first_name} has the root mean"
            f" square {number(gradients[0])}, that of {last_name}"
            f" {number(gradients[1])}; its updates have been {number(moved)} times as"
            f" large: the first layer hardly learns.",
            "Use ReLU or a relative of it instead of sigmoid or tanh, add skip"
            " connections or normalization layers, or take fewer layers.",
        )
    ]
