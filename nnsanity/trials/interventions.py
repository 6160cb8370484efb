"""Turns suspicions into causes: repairs a copy and trains it beside the original.

Single repairs first.  Where none of them is enough, all of them together, and then one
is taken back at a time: what the repaired program can do without was no cause.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from nnsanity._types import Array
from nnsanity.findings import Finding
from nnsanity.trials.arms import (
    MIN_GAIN,
    Arm,
    Attempt,
    attempt_of,
    gain_of,
    helps,
    joined,
    needed_gain,
)
from nnsanity.trials.copies import Copy
from nnsanity.trials.every_repair import combinations, every_repair
from nnsanity.trials.length_repairs import length_repairs
from nnsanity.trials.levels import (
    LEARNED,
    curve_of,
    grain_of,
    is_lost,
    last,
    level_of,
)
from nnsanity.trials.problem import Problem
from nnsanity.trials.ranking import best_of_groups, ranked
from nnsanity.trials.repairs import Repair
from nnsanity.trials.seeds import keys_of
from nnsanity.trials.trial import (
    Outcome,
    Trial,
    mid_descent,
    prepare,
    train_copies,
    with_data,
)

FIRST_SEED, OTHER_SEEDS, ALL_SEEDS = slice(1), slice(1, None), slice(None)
BUDGET_SECONDS = 60.0
"""How long a checkup may take before nothing new is tried; what was left out then is in
``skipped``."""
LEAST_SECONDS = 15.0
"""What repairs get of it, however long it took to compile and measure."""
SLOW_SECONDS, VERY_SLOW_SECONDS = 3.0, 15.0
"""A training that takes longer is repeated less often: from two seeds where it learns,
from one."""
Progress = Callable[[str], None]


class Diagnosis(NamedTuple):
    """What the trial and its interventions showed.

    Attributes:
        outcomes: of the user's own program, one for each seed, the most typical first.
        level: its quality, the median over the seeds.
        num_steps: how long it was trained.
        causes: findings with their effects, the largest first.
        ruled_out: repairs that did not help.
        skipped: what was not tried, and why.
        attempts: every repair that was tried by itself, in the order of trying, then
            those that it takes together.
        curve: quality at each mark, of the most typical seed of the original.
    """

    outcomes: tuple[Outcome, ...]
    level: float
    num_steps: int
    causes: tuple[Finding, ...]
    ruled_out: tuple[str, ...]
    skipped: dict[str, str]
    attempts: tuple[Attempt, ...]
    curve: np.ndarray


class _Lab(NamedTuple):
    """What is needed to train arms."""

    problem: Problem
    trials: dict[tuple[str, ...], Trial]
    split_key: Array
    keys: tuple[Array, ...]
    start_loss: float
    grain: float
    progress: Progress
    deadline: float


def train_original(problem: Problem, trial: Trial, key: Array) -> tuple[Outcome, ...]:
    """Trains the user's own program with several seeds.

    Stops after two where a training is long and the network learns well, and after one
    where it is very long.  All but the first keep the parameters of mid-descent.
    """
    outcomes: list[Outcome] = []
    copy = trial.plain
    for one in keys_of(key):
        began = time.monotonic()
        outcomes += train_copies(trial, [(copy, one)])
        middle = mid_descent(outcomes[0].losses)
        copy = trial.plain._replace(kept_mark=jnp.int32(middle))
        took = time.monotonic() - began
        if took > VERY_SLOW_SECONDS:
            break
        is_slow = len(outcomes) > 1 and took > SLOW_SECONDS
        start = float(outcomes[0].losses[0])
        if is_slow and level_of(problem, outcomes[-1], start) >= LEARNED:
            break
    return tuple(outcomes)


def untouched(
    problem: Problem, trial: Trial, outcomes: tuple[Outcome, ...]
) -> Diagnosis:
    """Returns how the original learned, with nothing repaired."""
    start = float(outcomes[0].losses[0])
    level = float(np.median([level_of(problem, one, start) for one in outcomes]))
    skipped = {"interventions": "switched off"}
    curve = curve_of(problem, outcomes[0], start)
    return Diagnosis(outcomes, level, trial.num_steps, (), (), skipped, (), curve)


def intervene(
    problem: Problem,
    trial: Trial,
    outcomes: tuple[Outcome, ...],
    suspicions: Sequence[Finding],
    *,
    keys: tuple[Array, ...],
    split_key: Array,
    deadline: float,
    progress: Progress,
) -> Diagnosis:
    """Repairs copies of a program that does not learn well and trains them beside it.

    Costs one training per repair, three for each one that seems to help, and about
    twenty more where no single one is enough; and where the training is short, one to
    three that are up to ten times as long, or of 1,000 steps.

    Args:
        problem: with an optimizer.
        trial: as ``prepare`` returns.
        outcomes: of the original, as ``typical_first`` returns.
        suspicions: findings whose rules say what to try first.
        keys: those of the original, so that both see the same batches.
        split_key: as given to ``prepare``.
        deadline: of ``time.monotonic()``; after it and the first ``LEAST_SECONDS``
            nothing new is tried.
        progress: called with a line of text now and then.
    """
    lab = _Lab(
        problem,
        {(): trial},
        split_key,
        keys,
        float(outcomes[0].losses[0]),
        grain_of(problem, trial.num_held_out),
        progress,
        max(deadline, time.monotonic() + LEAST_SECONDS),
    )
    original = _arm(lab, (), outcomes)
    if original.level >= LEARNED:
        return untouched(problem, trial, outcomes)._replace(skipped={})
    suspected = {finding.rule: finding for finding in reversed(suspicions)}
    failed: dict[str, str] = {}
    repairs = sorted(
        every_repair(problem, suspected=suspected, skipped=failed),
        key=lambda one: not (one.is_suspected or set(one.rules) & set(suspected)),
    )
    repairs += length_repairs(problem, original.level, outcomes[0])
    arms, left_out = _try_singles(lab, original, repairs)
    best = max(0.0, original.level, *(arm.level for arm in arms))
    singles = best_of_groups(original, arms, best)
    reached = max((arm.level for arm in singles), default=original.level)
    joint: list[tuple[Arm, Arm]] = []
    if reached < LEARNED - MIN_GAIN:
        joint, best = _joint_causes(lab, original, repairs, reached, best)
        singles = best_of_groups(original, arms, best)
    pairs = joint or [(original, arm) for arm in singles]
    causes = ranked(problem, original, pairs, suspected, best)
    tried = [(arm, helps(original, arm, best=best)) for arm in arms]
    helped = {one.name for _, arm in pairs for one in arm.repairs}
    helped |= {arm.repairs[0].name for arm, has_helped in tried if has_helped}
    names = [arm.repairs[0].name for arm in arms]
    ruled_out = tuple(name for name in names if name not in helped)
    late = {one.name: "its training did not fit the budget" for one in left_out}
    skipped = failed | late
    if time.monotonic() > lab.deadline:
        skipped["repairs together"] = "not all of their trainings fitted the budget"
    return untouched(problem, trial, outcomes)._replace(
        causes=causes,
        ruled_out=ruled_out,
        skipped=skipped,
        attempts=(
            *(attempt_of(arm, helped=one) for arm, one in tried),
            *_together(pairs if joint else ()),
        ),
    )


def _together(pairs: Sequence[tuple[Arm, Arm]]) -> tuple[Attempt, ...]:
    """What the needed repairs reached, all of them in place."""
    if len(pairs) < 2:
        return ()
    names = [arm.repairs[0].name for _, arm in pairs]
    words = f"{', '.join(names[:-1])} and {names[-1]}"
    full = pairs[0][1]
    return (
        Attempt(
            words,
            "together",
            full.levels,
            full.curve,
            helped=True,
            num_steps=full.num_steps,
        ),
    )


def _trial_of(lab: _Lab, repairs: Sequence[Repair]) -> Trial:
    """Returns the trial of the program that repairs make, compiled once for each."""
    rewriting = [one for one in repairs if one.rewrite is not None]
    names = tuple(one.name for one in rewriting)
    if names not in lab.trials:
        problem = lab.problem
        for one in rewriting:
            problem = problem if one.rewrite is None else one.rewrite(problem)
        lab.trials[names] = prepare(
            problem,
            lab.split_key,
            num_steps=problem.num_steps,
            batch_size=problem.batch_size,
        )
    return lab.trials[names]


def _arm(lab: _Lab, repairs: tuple[Repair, ...], outcomes: Sequence[Outcome]) -> Arm:
    # Other inputs may change the unit of a loss that looks at them, too.
    other_inputs = any(one.group == "inputs" for one in repairs)
    levels = [
        level_of(
            lab.problem,
            one,
            float(one.losses[0]) if other_inputs else lab.start_loss,
        )
        for one in outcomes
    ]
    held_out = [
        last(one.quality) if lab.problem.kind is not None else level
        for one, level in zip(outcomes, levels, strict=True)
    ]
    return Arm(
        repairs,
        np.array(levels),
        np.array(held_out),
        curve_of(lab.problem, outcomes[0], float(outcomes[0].losses[0])),
        len(outcomes[0].batch_losses),
        is_lost(lab.problem, outcomes[0], float(np.median(levels))),
        lab.grain,
    )


def _train(lab: _Lab, repairs: Sequence[Repair], seeds: slice) -> Arm:
    """Trains the program with some repairs, from some of the seeds."""
    trial = _trial_of(lab, repairs)
    inputs, targets = lab.problem.inputs, lab.problem.targets
    for repair in repairs:
        inputs = inputs if repair.inputs is None else repair.inputs(inputs)
        targets = targets if repair.targets is None else repair.targets(targets)
    trial = with_data(trial, (inputs, targets))
    copies = []
    for key in lab.keys[seeds]:
        copy: Copy = trial.plain
        for repair in repairs:
            copy = repair.change(copy, key)
        copies.append((copy, key))
    return _arm(lab, tuple(repairs), train_copies(trial, copies))


def _try_singles(
    lab: _Lab, original: Arm, repairs: Iterable[Repair]
) -> tuple[list[Arm], list[Repair]]:
    """Tries every repair by itself, from one seed and if that may help from all.

    What it has to bring is known only when the best copy is.

    Returns:
        An arm for each repair; and the repairs for which there was no time.
    """
    tried: list[Arm] = []
    left_out: list[Repair] = []
    took: list[float] = []
    for repair in repairs:
        if not _is_next(original, repair, tried):
            continue
        began = time.monotonic()
        # A longer training has to fit, from all seeds.
        longer = _trial_of(lab, (repair,)).num_steps / original.num_steps
        least = min(took, default=0.0) * longer * len(lab.keys) if longer > 1 else 0.0
        if began + least > lab.deadline:
            left_out.append(repair)
            continue
        arm = _train(lab, (repair,), FIRST_SEED)
        took.append(time.monotonic() - began)
        lab.progress(f"{repair.name}: {original.level:.2f} -> {arm.level:.2f}")
        if gain_of(original, arm) >= needed_gain(original, best=0.0):
            arm = joined(arm, _train(lab, (repair,), OTHER_SEEDS))
        tried.append(arm)
    return tried, left_out


def _is_next(original: Arm, repair: Repair, tried: Sequence[Arm]) -> bool:
    """Tells whether what a repair follows was tried, did no harm and was not enough."""
    if repair.follows is None:
        return True
    levels = [arm.level for arm in tried if arm.repairs[0].name == repair.follows]
    return any(original.level <= level < LEARNED for level in levels)


def _joint_causes(
    lab: _Lab, original: Arm, repairs: Sequence[Repair], reached: float, best: float
) -> tuple[list[tuple[Arm, Arm]], float]:
    """Repairs everything at once and finds out which repairs are needed.

    Args:
        lab: what is needed to train.
        original: the user's own program.
        repairs: all of them.
        reached: quality with the best single repair that helps.
        best: that of any copy so far.

    Returns:
        For each needed repair the arm without it and the arm with all of them; empty
        where repairing everything is no better than the best single repair.  And the
        best quality of any copy.
    """
    chosen: Arm | None = None
    for repaired in combinations(repairs):
        if time.monotonic() > lab.deadline:
            break
        arm = _train(lab, repaired, FIRST_SEED)
        if chosen is None or arm.level > chosen.level + MIN_GAIN / 2:
            chosen = arm
    if chosen is None:
        return [], best
    best = max(best, chosen.level)
    # A single repair that helps is told, unless all together come far beyond it.
    reach = best if reached <= original.level else 1.0
    if chosen.level < reached + needed_gain(original, best=reach):
        return [], best
    names = ", ".join(one.name for one in chosen.repairs)
    lab.progress(f"together, {names}: {original.level:.2f} -> {chosen.level:.2f}")
    needed = _without_needless(lab, chosen)
    full = _train(lab, needed, ALL_SEEDS)
    is_in_time = time.monotonic() <= lab.deadline
    is_part = len(needed) < len(chosen.repairs)
    if is_part and is_in_time and not helps(original, full, best=best):
        # The first seed can do without what others can't.
        needed = chosen.repairs
        full = _train(lab, needed, ALL_SEEDS)
    if not helps(original, full, best=best):
        return [], best
    if len(needed) == 1:
        return [(original, full)], best
    seeds = FIRST_SEED if time.monotonic() > lab.deadline else ALL_SEEDS
    pairs = [
        (_train(lab, _but(needed, one), seeds), full._replace(repairs=(one,)))
        for one in needed
    ]
    return [pair for pair in pairs if helps(*pair, best=best)], best


def _but(repairs: tuple[Repair, ...], left_out: Repair) -> tuple[Repair, ...]:
    return tuple(one for one in repairs if one is not left_out)


def _without_needless(lab: _Lab, arm: Arm) -> tuple[Repair, ...]:
    """Takes back one repair after the other, as long as the copy learns as well."""
    needed, level = arm.repairs, arm.level
    for repair in reversed(arm.repairs):
        rest = _but(needed, repair)
        if rest and _train(lab, rest, FIRST_SEED).level >= (1 - MIN_GAIN) * level:
            needed = rest
    return needed
