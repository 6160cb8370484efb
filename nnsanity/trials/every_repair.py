"""All the repairs that a checkup can try, from every part of the checklist."""

from nnsanity.trials.data_repairs import data_repairs
from nnsanity.trials.inner_repairs import inner_repairs
from nnsanity.trials.loss_repairs import loss_repairs
from nnsanity.trials.optimizer_repairs import optimizer_repairs
from nnsanity.trials.problem import Problem
from nnsanity.trials.repairs import Repair, available_repairs


def every_repair(problem: Problem) -> tuple[Repair, ...]:
    """Lists what can be repaired; of equally good repairs the earlier one is told."""
    return (
        *inner_repairs(problem),
        *available_repairs(problem),
        *data_repairs(problem),
        *optimizer_repairs(problem),
        *loss_repairs(problem),
    )
