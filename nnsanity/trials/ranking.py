"""Words what repairs changed as causes, and orders them."""

from collections.abc import Iterable, Mapping, Sequence

from nnsanity.findings import Effect, Finding, caused
from nnsanity.trials.arms import MIN_GAIN, Arm, gain_of, helps, needed_gain
from nnsanity.trials.levels import FAILED, unit_of
from nnsanity.trials.problem import Problem
from nnsanity.trials.repairs import Repair

SUSPICION_BONUS = 0.15
"""What a suspicion adds to the gain of its repair, as a share of the best quality."""
MAX_CAUSES = 3
SAME_FAULT = {"loss": "head", "length": "rate"}
"""Groups whose repairs are of one fault: a loss and a last activation that do not fit
each other, a rate and a training that is too short for it."""


def best_of_groups(original: Arm, arms: Iterable[Arm], best: float) -> list[Arm]:
    """Returns the arms that helped, the best of each group or fault.

    A layer more is told only where nothing simpler does as well, and a longer training
    where no other rate does.
    """
    arms = list(arms)
    simple = max((a.level for a in arms if a.repairs[0].group != "depth"), default=0.0)
    chosen: dict[str, Arm] = {}
    for arm in arms:
        (repair,) = arm.repairs
        group = SAME_FAULT.get(repair.group, repair.group)
        is_far = repair.follows is not None or repair.group == "length"
        margin = MIN_GAIN if is_far else 0.02
        rival = chosen.get(group)
        is_better = rival is None or arm.level > rival.level + margin
        is_needed = repair.group != "depth" or arm.level > simple + MIN_GAIN
        if is_better and is_needed and helps(original, arm, best=best):
            chosen[group] = arm
    return list(chosen.values())


def ranked(
    problem: Problem,
    original: Arm,
    pairs: Sequence[tuple[Arm, Arm]],
    suspected: Mapping[str, Finding],
    best: float,
) -> tuple[Finding, ...]:
    """Returns the causes, the ones with the largest effect and a suspicion first.

    Args:
        problem: what was trained.
        original: the user's own program.
        pairs: of each cause the arm without its repair and with it.
        suspected: findings by rule.
        best: quality that can be reached, as far as it is known.
    """
    scored = []
    for before, after in pairs:
        (repair,) = after.repairs
        rule = next((rule for rule in repair.rules if rule in suspected), None)
        finding = repair.finding if rule is None else suspected[rule]
        if repair.group == "rate":
            finding = _rate_finding(repair, suspected)
            rule = finding.rule if finding.rule in suspected else None
        effect = _effect(problem, before, after, best)
        severity = "error" if original.level <= FAILED else "warning"
        is_suspected = rule is not None or repair.is_suspected
        bonus = SUSPICION_BONUS * best if is_suspected else 0.0
        scored.append((effect.gain + bonus, caused(finding, effect, severity)))
    scored.sort(key=lambda pair: -pair[0])
    return tuple(finding for _, finding in scored[:MAX_CAUSES])


def _rate_finding(repair: Repair, suspected: Mapping[str, Finding]) -> Finding:
    """Says by how much the rate is wrong, with what its losses showed."""
    finding = repair.finding
    diverged = suspected.get("learning-rate/diverges")
    if finding.rule == "learning-rate/too-low" or diverged is None:
        return finding
    return diverged._replace(message=f"{diverged.message} {finding.message}")


def _effect(problem: Problem, before: Arm, after: Arm, best: float) -> Effect:
    measure, to_unit = unit_of(problem)
    (repair,) = after.repairs
    return Effect(
        repair.name,
        to_unit(before.level),
        to_unit(after.level),
        measure,
        after.num_steps,
        min(len(before.levels), len(after.levels)),
        gain_of(before, after),
        needed_gain(before, after, best=best),
        bool(before.repairs),
        before.num_steps,
    )
