"""Repairs of the optimizer: no weight decay, no clipping, a schedule that stops."""

import functools

import jax.numpy as jnp

from nnsanity.checks import learning_rate, regularization
from nnsanity.quantities.clipping import clipping, scales_with_weights, update_degree
from nnsanity.quantities.schedules import held, schedule_of
from nnsanity.trials.dynamics import attempted, share_of_clipped_steps
from nnsanity.trials.problem import Problem
from nnsanity.trials.repairs import Repair

LOWER = 0.1
"""Factor of the rate without clipping."""
WITHOUT_DECAY = "leaving out the weight decay"
AT_ITS_PEAK = "keeping the learning rate at its peak"
WITHOUT_CLIPPING = f"training without clipping at {LOWER:g} times the learning rate"
SMALL = {0: 2.0**-6, 1: 2.0**-30}
"""Factor of gradients that are not clipped, by the degree of the optimizer; where it
divides by their size, they must stay above its epsilon."""


def optimizer_repairs(problem: Problem, skipped: dict[str, str]) -> tuple[Repair, ...]:
    """Lists the repairs that make sense for a problem.

    Args:
        problem: as given.
        skipped: gets the repairs that could not be made, and why.
    """
    if problem.optimizer is None:
        return ()
    makers = {
        WITHOUT_DECAY: _without_decay,
        WITHOUT_CLIPPING: _without_clipping,
        AT_ITS_PEAK: _at_its_peak,
    }
    repairs: tuple[Repair, ...] = ()
    for name, make in makers.items():
        made = attempted(skipped, name, functools.partial(make, problem, skipped))
        repairs += made or ()
    return repairs


def _without_decay(problem: Problem, skipped: dict[str, str]) -> tuple[Repair, ...]:
    """Gives the optimizer zeros for the parameters, so that nothing of them decays."""
    decay = regularization.weight_decay(problem.optimizer, problem.params)
    if not bool(jnp.any(decay > 0)):
        return ()
    if bool(scales_with_weights(problem.optimizer, problem.params)):
        skipped[WITHOUT_DECAY] = "the optimizer needs the weights for more than decay"
        return ()
    return (
        Repair(
            WITHOUT_DECAY,
            "penalty",
            lambda copy, key: copy._replace(weight_scale=jnp.float32(0)),
            (),
            regularization.too_strong("decay"),
        ),
    )


def _without_clipping(problem: Problem, skipped: dict[str, str]) -> tuple[Repair, ...]:
    """Scales the gradients down below the limit, and the updates up again."""
    found = clipping(problem.optimizer, problem.params)
    if not bool(jnp.any(found.clips)):
        return ()
    size = jnp.min(found.threshold) / 8
    degree = float(update_degree(problem.optimizer, problem.params, size=size))
    power = round(degree) if abs(degree - round(degree)) < 0.05 else None
    if power not in SMALL:
        skipped[WITHOUT_CLIPPING] = (
            f"unclipped updates grow with the gradient to the power {degree:.2f}, and"
            " are scaled only where that is 0 or 1"
        )
        return ()
    small = SMALL[power]
    weight = small if power else 1.0
    rate = LOWER / small**power
    return (
        Repair(
            WITHOUT_CLIPPING,
            "rate",
            lambda copy, key: copy._replace(
                gradient_scale=jnp.float32(small),
                weight_scale=jnp.float32(weight),
                update_scale=jnp.float32(rate),
            ),
            ("learning-rate/clipping-active",),
            learning_rate.clipping_active(share_of_clipped_steps(problem)),
            is_free=True,
        ),
    )


def _at_its_peak(problem: Problem, skipped: dict[str, str]) -> tuple[Repair, ...]:
    """Stops a schedule that ends early where its updates are largest."""
    del skipped
    optimizer = problem.optimizer
    schedule = schedule_of(optimizer, problem.params, num_steps=problem.num_steps)
    if schedule is None:
        return ()
    finding = learning_rate.decays_early(schedule.shares)
    if finding is None:
        return ()
    at_its_peak = held(optimizer, schedule.counts)
    return (
        Repair(
            AT_ITS_PEAK,
            "schedule",
            lambda copy, key: copy,
            (finding.rule,),
            finding,
            is_suspected=True,
            rewrite=lambda problem: problem._replace(optimizer=at_its_peak),
            is_free=True,
        ),
    )
