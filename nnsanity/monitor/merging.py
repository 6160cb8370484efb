"""Joins what the monitors of several hosts or runs saw of the same network."""

import jax
import jax.numpy as jnp

from nnsanity._types import Array
from nnsanity.monitor.losses import chosen_by
from nnsanity.monitor.state import (
    GradientNoise,
    MonitorRecord,
    MonitorState,
    Nonfinite,
    Spike,
    Validation,
    record_of,
    state_of,
)
from nnsanity.monitor.verdicts import GROWTH_LIMIT, SPIKE_LENGTH


@jax.jit
def merged(a: MonitorState, b: MonitorState) -> MonitorState:
    """Joins two states; associative up to rounding, and a blank one changes nothing.

    Averages are weighed by the steps that were watched, norms and root mean squares
    pooled as squares.  What broke first stays, a unit is dead where it is dead in both,
    and overfitting is what shows in both.
    """
    return state_of(_merged(record_of(a), record_of(b)))


def _merged(a: MonitorRecord, b: MonitorRecord) -> MonitorRecord:
    counts = a.num_watched, b.num_watched

    def mean(field: str) -> Array:
        return _mean(counts, getattr(a, field), getattr(b, field))

    def pooled(field: str) -> Array:
        return _pooled(counts, getattr(a, field), getattr(b, field))

    return MonitorRecord(
        step=jnp.maximum(a.step, b.step),
        num_watched=a.num_watched + b.num_watched,
        watched_step=jnp.maximum(a.watched_step, b.watched_step),
        loss=mean("loss"),
        loss_start=mean("loss_start"),
        loss_average=mean("loss_average"),
        loss_spread=pooled("loss_spread"),
        lowest_average=mean("lowest_average"),
        lowest_step=jnp.maximum(a.lowest_step, b.lowest_step),
        spike=_worse(a.spike, b.spike),
        validation=_validation(a.validation, b.validation),
        nonfinite=_earlier(a.nonfinite, b.nonfinite),
        gradient_norm=pooled("gradient_norm"),
        clipped_share=mean("clipped_share"),
        gradient_noise=_noise(a.gradient_noise, b.gradient_noise),
        update_norm=pooled("update_norm"),
        parameter_norm=pooled("parameter_norm"),
        update_average=mean("update_average"),
        update_growth=jnp.maximum(a.update_growth, b.update_growth),
        update_ratio=mean("update_ratio"),
        activation_rms=pooled("activation_rms"),
        activation_gradient_rms=pooled("activation_gradient_rms"),
        last_active=jax.tree.map(jnp.maximum, a.last_active, b.last_active),
    )


def _mean(counts: tuple[Array, Array], one: Array, other: Array) -> Array:
    first, second = (count.astype(jnp.float32) for count in counts)
    share = second / jnp.maximum(first + second, 1)
    # Alone, the others' share is exactly 0, and what is not finite stays where it is.
    joined = one + share * (other - one)
    return jnp.where(second == 0, one, jnp.where(first == 0, other, joined))


def _pooled(counts: tuple[Array, Array], one: Array, other: Array) -> Array:
    return jnp.sqrt(_mean(counts, one**2, other**2))


def _worse(a: Spike, b: Spike) -> Spike:
    """Prefers a spike that is announced, then a long one, then the earlier."""

    def rank(spike: Spike) -> Array:
        is_long = spike.length >= SPIKE_LENGTH
        is_announced = is_long & (spike.growth > GROWTH_LIMIT)
        flags = (spike.step >= 0, is_long, is_announced)
        return jnp.sum(jnp.stack(flags, axis=-1), axis=-1)

    is_tie = rank(b) == rank(a)
    return chosen_by((rank(b) > rank(a)) | (is_tie & (b.step < a.step)), b, a)


def _earlier(a: Nonfinite, b: Nonfinite) -> Nonfinite:
    both = Nonfinite(a.step, *map(jnp.logical_or, a[1:], b[1:]))
    is_first = (b.step < 0) | ((a.step >= 0) & (a.step < b.step))
    chosen = chosen_by(is_first, a, b)
    return chosen_by(a.step == b.step, both, chosen)


def _noise(a: GradientNoise, b: GradientNoise) -> GradientNoise:
    counts = a.num_steps, b.num_steps
    return GradientNoise(
        a.num_steps + b.num_steps,
        _mean(counts, a.square_norm, b.square_norm),
        _mean(counts, a.noise, b.noise),
    )


def _validation(a: Validation, b: Validation) -> Validation:
    counts = a.num_evaluations, b.num_evaluations
    shorter = jnp.minimum(a.length, b.length)
    alone = jnp.where(b.num_evaluations == 0, a.length, b.length)
    return Validation(
        num_evaluations=a.num_evaluations + b.num_evaluations,
        step=jnp.maximum(a.step, b.step),
        loss=_mean(counts, a.loss, b.loss),
        first=_mean(counts, a.first, b.first),
        lowest=_mean(counts, a.lowest, b.lowest),
        lowest_step=jnp.maximum(a.lowest_step, b.lowest_step),
        training=_mean(counts, a.training, b.training),
        length=jnp.where(
            (a.num_evaluations == 0) | (b.num_evaluations == 0), alone, shorter
        ),
    )
