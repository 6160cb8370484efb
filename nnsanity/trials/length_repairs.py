"""A repair of trainings that end while the loss is still on its way down."""

from nnsanity.checks import learning_rate
from nnsanity.trials.problem import Problem
from nnsanity.trials.repairs import Repair

TIMES_AS_LONG = 10
LEAST_STEPS, MOST_STEPS = 1000, 5000
"""Steps of the longer training, at least and at most."""
LEARNED_LITTLE = 0.5
"""Quality up to which a longer training is tried; most healthy programs would gain a
little."""


def length_repairs(problem: Problem) -> tuple[Repair, ...]:
    """Trains for longer; for a program that is on its way and learned little."""
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
            is_suspected=True,
            rewrite=lambda one: one._replace(num_steps=num_steps),
            is_free=True,
        ),
    )
