"""Targets that are angles: a copy that predicts their sine and cosine instead.

The user's network has one output where two are wanted.  So two copies of it train side
by side, one on the sine and one on the cosine, and the angle of the two is compared
with what the plain network puts out, both by how far they are off around the circle.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nnsanity._tree import in_float32, is_inexact, take_examples
from nnsanity._types import Array, Params
from nnsanity.checks import preprocessing
from nnsanity.findings import Effect, Finding, caused
from nnsanity.quantities.descent import trained
from nnsanity.trials.data import circle_of_targets
from nnsanity.trials.levels import FAILED
from nnsanity.trials.problem import Problem
from nnsanity.trials.trial import HELD_OUT_SHARE

MIN_GAIN = 0.1
"""Gain in the explained share of the angle that counts; as for other repairs."""
NUM_SEEDS = 3


def judge_angles(problem: Problem, *, key: Array, num_steps: int) -> list[Finding]:
    """Tries the sine and cosine of targets that wrap around, and says if it helps.

    Costs three trainings of each seed.

    Args:
        problem: with an optimizer, that does not learn well.
        key: consumed; what is held out, and the batches.
        num_steps: of each training.
    """
    circle = circle_of_targets(problem)
    if circle is None:
        return []
    measured, period = circle
    run = jax.jit(functools.partial(_explained, problem, period, num_steps))
    keys = jax.random.split(key, NUM_SEEDS)
    plain, encoded = np.array([run(one) for one in keys]).T
    gains = np.maximum(encoded, 0) - np.maximum(plain, 0)
    if not (np.median(gains) > MIN_GAIN and (gains > 0).all()):
        return []
    effect = Effect(
        "predicting the sine and the cosine of the targets",
        float(np.median(plain)),
        float(np.median(encoded)),
        "explained share of the angle",
        num_steps,
        NUM_SEEDS,
        float(np.median(gains)),
        MIN_GAIN,
        is_joint=False,
        num_steps_before=num_steps,
    )
    severity = "error" if np.median(plain) <= FAILED else "warning"
    finding = preprocessing.wrapping_targets(measured, period)
    return [caused(finding, effect, severity)]


def _explained(
    problem: Problem, period: float, num_steps: int, key: Array
) -> tuple[Array, Array]:
    """Returns what the plain network and the pair explain of held-out angles."""
    split_key, batch_key = jax.random.split(key)
    order = jax.random.permutation(split_key, problem.size)
    num_held_out = max(int(HELD_OUT_SHARE * problem.size), 1)
    seen, held_out = order[num_held_out:], order[:num_held_out]
    size = min(problem.batch_size, len(seen))
    rows = seen[jax.random.randint(batch_key, (num_steps, size), 0, len(seen))]
    targets = in_float32(problem.targets)
    low = jnp.min(targets)
    angle = 2 * jnp.pi * (targets - low) / period

    def outputs(columns: Array) -> Array:
        if is_inexact(problem.targets):
            columns = columns.astype(problem.targets.dtype)
        params = _trained(problem, columns, rows)
        inputs = take_examples(problem.inputs, held_out)
        return in_float32(problem.apply_fn(params, inputs)).reshape(-1)

    # Both the plain targets and their waves in units of their own deviation, so that
    # the comparison is not about scale.
    shift, scale = jnp.mean(targets), jnp.std(targets)
    plain = outputs((targets - shift) / scale) * scale + shift
    plain_angle = 2 * jnp.pi * (plain - low) / period
    root = np.sqrt(2)
    sine, cosine = (outputs(root * wave(angle)) for wave in (jnp.sin, jnp.cos))
    truth = angle.reshape(-1)[held_out]
    return (
        _share(plain_angle, truth),
        _share(jnp.arctan2(sine, cosine), truth),
    )


def _trained(problem: Problem, targets: Array, rows: Array) -> Params:
    def loss_fn(params: Params, chosen: Array) -> Array:
        batch = take_examples((problem.inputs, targets), chosen)
        return problem.loss_fn(params, batch)

    optimizer = problem.optimizer or optax.identity()
    scales = jnp.ones(len(rows), jnp.float32)
    return trained(loss_fn, optimizer, problem.params, rows, scales)[1]


def _share(angle: Array, truth: Array) -> Array:
    """Returns the explained share of the mean squared chord; 0 for a constant."""
    error = jnp.mean(2 - 2 * jnp.cos(angle - truth))
    resultant = jnp.hypot(jnp.mean(jnp.sin(truth)), jnp.mean(jnp.cos(truth)))
    share = 1 - error / (2 - 2 * resultant)
    return jnp.where(jnp.isfinite(share), share, -1.0)
