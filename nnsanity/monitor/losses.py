"""What a monitor learns from the loss alone, in every step: its level, its spikes."""

from typing import Any

import jax
import jax.numpy as jnp

from nnsanity._types import Array
from nnsanity.monitor.state import MonitorRecord, Spike
from nnsanity.monitor.verdicts import (
    GROWTH_LIMIT,
    LOST_SHARE,
    RISE_LIMIT,
    SPIKE_LENGTH,
)

SPIKE_SPREADS = 6.0
SPIKE_SHARE = 0.1
"""A loss is high above its average by 6 spreads and a tenth of what the run has gained.
Starting values."""
SETTLED = 20
"""Steps before the spread is known well enough to judge by."""
LOSS_RATE = 0.02
"""Weight of the newest value in the average of the loss."""


def with_loss(record: MonitorRecord, loss: Array, every: int) -> MonitorRecord:
    """Looks at the loss, which costs nothing."""
    is_finite = jnp.isfinite(loss)
    # One that is not finite would stay in every average.
    is_first = is_finite & jnp.isnan(record.loss_start)
    start = jnp.where(is_first, loss, record.loss_start)
    average = jnp.where(is_first, loss, record.loss_average)
    gained = jnp.nan_to_num(start - record.lowest_average)
    margin = jnp.maximum(gained, 0) * SPIKE_SHARE
    limit = average + SPIKE_SPREADS * record.loss_spread + margin
    is_settled = record.step >= SETTLED
    is_high = ~(loss <= limit) & is_settled
    # The early average still falls, and its spread is not known: nothing is clipped.
    clipped = jnp.where(is_settled, jnp.minimum(loss, limit), loss)
    distance = jnp.where(is_finite, clipped - average, 0)
    rate = jnp.where(is_finite, rate_of(record.step, LOSS_RATE), 0)
    average = average + rate * distance
    # Of the size of the larger, so that no square leaves float32.
    spread = jnp.hypot(
        jnp.sqrt(1 - rate) * record.loss_spread, jnp.sqrt(rate) * distance
    )
    is_lowest = is_first | (average < record.lowest_average)
    bad = record.nonfinite
    is_new = ~is_finite & (bad.step < 0)
    bad = bad._replace(
        step=jnp.where(is_new, record.step, bad.step), loss=bad.loss | is_new
    )
    return record._replace(
        loss=loss,
        loss_start=start,
        loss_average=average,
        loss_spread=spread,
        lowest_average=jnp.where(is_lowest, average, record.lowest_average),
        lowest_step=jnp.where(is_lowest, record.step, record.lowest_step),
        spike=_spike(record, is_high, limit, every),
        nonfinite=bad,
    )


def _spike(record: MonitorRecord, is_high: Array, limit: Array, every: int) -> Spike:
    """Goes on with a rise; one that updates announced stays when it is over."""
    spike = record.spike
    leaf = jnp.argmax(record.update_growth) if record.update_growth.size else 0
    growth = jnp.max(record.update_growth, initial=0)
    none = Spike(
        jnp.int32(-1), jnp.int32(0), *(jnp.zeros_like(one) for one in spike[2:])
    )
    begun = Spike(
        record.step, jnp.int32(0), limit, jnp.asarray(leaf, jnp.int32), growth
    )
    # Until the next look nobody knows how large the updates were.
    is_open = record.step - spike.step < every
    is_announced = (spike.growth > GROWTH_LIMIT) | is_open
    is_kept = (spike.length >= SPIKE_LENGTH) & is_announced
    begins = is_high & (spike.step < 0)
    spike = chosen_by(begins, begun, chosen_by(is_high | is_kept, spike, none))
    # What is kept goes no further once the loss has been back.
    goes_on = is_high & (spike.step + spike.length == record.step)
    return spike._replace(length=spike.length + goes_on.astype(jnp.int32))


def seen_late(record: MonitorRecord, watched: Array, every: int) -> Spike:
    """The first look after a spike began shows what the one before it could not."""
    spike = record.spike
    since = record.step - spike.step
    largest = jnp.max(record.update_growth, initial=0)
    is_late = watched & (spike.step >= 0) & (since > 0) & (since < every)
    is_larger = is_late & (largest > spike.growth)
    if not record.update_growth.size:
        return spike
    leaf = jnp.argmax(record.update_growth).astype(jnp.int32)
    return chosen_by(is_larger, spike._replace(leaf=leaf, growth=largest), spike)


@jax.jit
def with_validation(record: MonitorRecord, loss: Array) -> MonitorRecord:
    """Looks at the loss on examples that are not trained on."""
    seen = record.validation
    loss = loss.astype(jnp.float32)
    is_first = seen.num_evaluations == 0
    first = jnp.where(is_first | ~jnp.isfinite(seen.first), loss, seen.first)
    rise = jnp.maximum(
        (RISE_LIMIT - 1) * jnp.abs(seen.lowest), LOST_SHARE * (first - seen.lowest)
    )
    is_low = is_first | (loss <= seen.lowest + rise)
    is_lowest = is_first | ~(loss >= seen.lowest) & jnp.isfinite(loss)
    # Before an update it is of the parameters after the step before.
    step = jnp.maximum(record.step - 1, 0)
    validation = seen._replace(
        num_evaluations=seen.num_evaluations + 1,
        step=step,
        loss=loss,
        first=first,
        lowest=jnp.where(is_lowest, loss, seen.lowest),
        lowest_step=jnp.where(is_lowest, step, seen.lowest_step),
        training=jnp.where(is_lowest, record.loss_average, seen.training),
        length=jnp.where(is_low, 0, seen.length + 1),
    )
    return record._replace(validation=validation)


def rate_of(count: Array, smallest: float) -> Array:
    """Weight of the newest value: a plain mean first, that forgets later."""
    return jnp.maximum(1 / (count + 1).astype(jnp.float32), smallest)


def chosen_by(flag: Array, chosen: Any, other: Any) -> Any:
    """Takes one of two trees."""
    return jax.tree.map(lambda one, two: jnp.where(flag, one, two), chosen, other)
