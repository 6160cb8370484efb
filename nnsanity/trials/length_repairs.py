"""A repair of trainings that end before much is learned."""

from nnsanity.checks import learning_rate
from nnsanity.trials.problem import Problem
from nnsanity.trials.repairs import Repair
from nnsanity.trials.trial import Outcome

TIMES_AS_LONG = 10
LEAST_STEPS, MOST_STEPS = 1000, 5000
"""Steps of the longer training, at least and at most."""
FEW_STEPS = 200
"""Steps up to which a training is short, whatever its loss does: it may stand on the
first plateau."""
LEARNED_LITTLE = 0.5
"""Quality up to which a longer training is tried; most healthy programs would gain a
little."""


def length_repairs(
    problem: Problem, level: float, outcome: Outcome
) -> tuple[Repair, ...]:
    """Trains a program for longer that learned little and may be on its way.

    Args:
        problem: as given.
        level: its quality.
        outcome: of its training.
    """
    is_falling = learning_rate.is_falling(outcome.losses)
    is_short = problem.num_steps <= FEW_STEPS or is_falling
    if level >= LEARNED_LITTLE or not is_short:
        return ()
    num_steps = min(max(TIMES_AS_LONG * problem.num_steps, LEAST_STEPS), MOST_STEPS)
    if num_steps < 2 * problem.num_steps:
        return ()
    return (
        Repair(
            f"training for {num_steps:,} steps",
            "length",
            lambda copy, key: copy,
            (),
            learning_rate.stops_early(problem.num_steps),
            rewrite=lambda one: one._replace(num_steps=num_steps),
            is_free=True,
        ),
    )
