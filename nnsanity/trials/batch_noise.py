"""How noisy gradients are in mid-descent, and the batch size that this suggests."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nnsanity.checks.batch_size import judge_noise
from nnsanity.quantities.noise_estimate import NoiseScale
from nnsanity.quantities.noise_scale import gradient_noise_scale
from nnsanity.tracing.averaged import averaged_terms
from nnsanity.trials.dynamics import Dynamics, attempted
from nnsanity.trials.measure import MAX_MEASURED
from nnsanity.trials.problem import Problem
from nnsanity.trials.trial import Outcome, Trial, mid_descent

NAME = "noise_scale"
MIN_FALL = 0.1
"""Share of its start by which a loss must have fallen to call it a descent."""
MIDDLE = (0.2, 0.8)
"""Share of its fall that lies behind a loss in the midst of it."""


def measure_batch_noise(
    problem: Problem, trial: Trial, outcomes: Sequence[Outcome]
) -> Dynamics:
    """Measures the noise scale where the loss is half-way down.

    At the start the gradient is still clear, and at the minimum lost in its noise.
    Costs one gradient of up to 1,000 examples and the time to compile it.  The loss is
    that without dropout, whose noise comes on top.

    Args:
        problem: what was trained.
        trial: how.
        outcomes: all but the first with the parameters of mid-descent.
    """
    losses = np.asarray(outcomes[0].losses, np.float64)
    middle = mid_descent(losses)
    lowest = np.min(losses[np.isfinite(losses)], initial=np.inf)
    if not lowest < losses[0] - MIN_FALL * abs(losses[0]):
        return _not_told("the loss does not fall, so there is no middle of its descent")
    if len(outcomes) < 2:
        return _not_told("a training takes too long to be made again")
    skipped: dict[str, str] = {}
    order = np.random.default_rng(0).permutation(problem.size)
    rows = jnp.asarray(order[:MAX_MEASURED])
    batch = problem.batch(rows)
    fallen = (losses[0] - float(outcomes[1].losses[middle])) / (losses[0] - lowest)
    if not MIDDLE[0] <= fallen <= MIDDLE[1]:
        return _not_told("the loss falls too fast to be seen half-way down")
    noise = attempted(
        skipped,
        NAME,
        lambda: gradient_noise_scale(problem.loss_fn, outcomes[1].kept, batch),
    )
    if noise is None:
        return Dynamics((), {}, skipped)
    noise = jax.device_get(noise)
    step = middle * trial.per_mark
    if not np.isfinite(noise).all():
        reason = _reason(noise, len(rows), step)
        return _not_told(reason)._replace(measurements={NAME: noise})
    places = attempted(skipped, "averaged_terms", lambda: _most_used(problem))
    findings = judge_noise(
        noise,
        batch_size=problem.given.batch_size,
        num_examples=problem.given.num_examples,
        step=step,
        places=places or ("", 0.0),
    )
    return Dynamics(findings, {NAME: noise}, skipped)


def _not_told(reason: str) -> Dynamics:
    return Dynamics((), {}, {NAME: reason})


def _reason(noise: NoiseScale, num_examples: int, step: int) -> str:
    """Says why a noise scale or its error is not finite."""
    if np.isnan(noise.noise_scale):
        return f"gradients are not finite after {step} steps"
    if np.isfinite(noise.noise_scale):
        return f"{num_examples} examples leave no error bar"
    return (
        f"the gradient of {num_examples} examples is lost in its noise after {step}"
        " steps, so no batch of them is too large"
    )


def _most_used(problem: Problem) -> tuple[str, float]:
    """Returns the parameter that is used most in one example, and how often."""
    batch = problem.batch(slice(problem.batch_size))
    terms = averaged_terms(problem.loss_fn, problem.params, batch)
    known = {name: one for name, one in terms.items() if math.isfinite(one)}
    name = max(known, key=lambda one: known[one], default="")
    return name, known.get(name, 0.0) / problem.batch_size
