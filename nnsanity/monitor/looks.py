"""What a monitor reads in a step that it watches: gradients, updates, parameters."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nnsanity._tree import in_float32
from nnsanity._types import Array
from nnsanity.monitor.losses import chosen_by, rate_of
from nnsanity.monitor.names import Names
from nnsanity.monitor.state import GradientNoise, MonitorRecord
from nnsanity.quantities.noise_estimate import variance_of_parts
from nnsanity.signals import FIELDS, Signals
from nnsanity.tracing.compat import varies

LEAF_RATE = 0.01
"""Weight of the newest value in the averages of the leaves."""


class Look(NamedTuple):
    """What is known about all looks of a monitor before any of them.

    Attributes:
        names: of leaves and layers.
        clip_norm: at which norm the user clips gradients, or None.
        axis_name: axis of a shard_map over which the batch is split, or None.
        is_local: whether each device's loss is that of its own examples.
    """

    names: Names
    clip_norm: float | None = None
    axis_name: str | None = None
    is_local: bool = False


class Trees(NamedTuple):
    """The floating-point leaves of a step; updates may be made when they are read."""

    grads: list[Array]
    updates: list[Array] | Callable[[], list[Array]]
    params: list[Array]


def with_look(
    look: Look,
    record: MonitorRecord,
    is_due: Array,
    signals: Signals,
    microbatch_norms: Array | None,
    trees: Trees,
) -> MonitorRecord:
    """Looks at a step that is due, and at one whose loss is the first that is NaN."""
    is_broken = record.nonfinite.step == record.step

    def looked(record: MonitorRecord) -> MonitorRecord:
        return _looked_at(look, record, signals, microbatch_norms, trees)

    return jax.lax.cond(is_due | is_broken, looked, lambda record: record, record)


def _looked_at(
    look: Look,
    record: MonitorRecord,
    signals: Signals,
    microbatch_norms: Array | None,
    trees: Trees,
) -> MonitorRecord:
    """Reads gradients, updates and parameters once each."""
    updates = trees.updates() if callable(trees.updates) else trees.updates
    gradient, update, parameter = (
        _norms(look, leaves) for leaves in (trees.grads, updates, trees.params)
    )
    rate = rate_of(record.num_watched, LEAF_RATE)
    known = record.update_average > 0
    growth = update / jnp.where(known, record.update_average, 1)
    ratio = update / jnp.where(parameter > 0, parameter, 1)
    has_ratio = jnp.isfinite(ratio) & (parameter > 0)
    total = jnp.sqrt(jnp.sum(gradient**2))
    limit = jnp.inf if look.clip_norm is None else look.clip_norm
    clipped = (~(total <= limit)).astype(jnp.float32)
    after = record._replace(
        gradient_norm=gradient,
        clipped_share=record.clipped_share + rate * (clipped - record.clipped_share),
        gradient_noise=_with_microbatches(
            record.gradient_noise, microbatch_norms, gradient
        ),
        update_norm=update,
        parameter_norm=parameter,
        update_average=_averaged(record.update_average, update, rate),
        update_growth=jnp.where(known & jnp.isfinite(update), growth, 1),
        update_ratio=jnp.where(
            has_ratio,
            _averaged(record.update_ratio, ratio, rate),
            record.update_ratio,
        ),
    )
    bad = record.nonfinite
    now = bad._replace(
        step=record.step,
        gradients=~jnp.isfinite(gradient),
        updates=~jnp.isfinite(update),
        parameters=~jnp.isfinite(parameter),
    )
    is_bad = now.loss | jnp.any(now.gradients) | jnp.any(now.updates)
    is_first = (bad.step < 0) | (bad.step == record.step)
    after = after._replace(nonfinite=chosen_by(is_bad & is_first, now, bad))
    seen = _with_layers(look, after, signals, is_first=is_bad & is_first)
    after, seen = (jax.tree.map(placed_like, one, record) for one in (after, seen))
    return chosen_by(signals.watched, seen, after)


def _with_layers(
    look: Look, record: MonitorRecord, signals: Signals, *, is_first: Array
) -> MonitorRecord:
    """Looks at the layers as well."""
    names = look.names
    activation = _pooled(look, _rows(names, signals.activation_rms))
    came_back = _pooled(look, _rows(names, signals.activation_gradient_rms))
    if look.is_local and look.axis_name is not None:
        # The gradient of the mean of the devices' losses.
        came_back = came_back / jax.lax.axis_size(look.axis_name)
    is_finite = jnp.isfinite(record.loss)
    bad = record.nonfinite
    rows = ~jnp.isfinite(activation) & jnp.isfinite(record.activation_rms)
    return record._replace(
        num_watched=record.num_watched + 1,
        watched_step=jnp.where(is_finite, record.step, record.watched_step),
        nonfinite=bad._replace(
            watched=bad.watched | is_first,
            activations=jnp.where(is_first, rows, bad.activations),
        ),
        activation_rms=activation,
        activation_gradient_rms=came_back,
        last_active={
            # NaN is no activity, nor its absence.
            name: jnp.where(
                _everywhere(look, signals.dead[name]) | ~is_finite, last, record.step
            )
            for name, last in record.last_active.items()
        },
    )


def over_microbatches(signals: Signals) -> Signals:
    """Joins what a scan over microbatches stacked, for the mean of their losses."""
    (count,) = signals.watched.shape

    def pooled(rms: Array) -> Array:
        return jnp.sqrt(jnp.mean(rms**2, axis=0))

    def came_back(rms: Array) -> Array:
        return pooled(rms) / count

    def everywhere(dead: Array) -> Array:
        return jnp.all(dead, axis=0)

    def anywhere(flag: Array) -> Array:
        return jnp.any(flag, axis=0)

    return Signals.of(
        {
            field: jax.tree.map(
                came_back if "gradient" in field else pooled, signals.by_layer(field)
            )
            for field in FIELDS
        },
        dead=jax.tree.map(everywhere, signals.dead),
        ran=jax.tree.map(anywhere, signals.ran),
        watched=anywhere(signals.watched),
        uninspected=signals.uninspected,
    )


def _with_microbatches(
    before: GradientNoise, norms: Array | None, gradient: Array
) -> GradientNoise:
    """Compares the microbatches' gradients with their mean."""
    if norms is None:
        return before
    square_norm = jnp.sum(gradient**2)
    variance = variance_of_parts(in_float32(norms) ** 2, square_norm)
    rate = rate_of(before.num_steps, LEAF_RATE)
    after = GradientNoise(
        before.num_steps + 1,
        before.square_norm + rate * (square_norm - before.square_norm),
        before.noise + rate * (variance / norms.shape[0] - before.noise),
    )
    is_finite = jnp.isfinite(after.square_norm) & jnp.isfinite(after.noise)
    return chosen_by(is_finite, after, before)


def _norms(look: Look, leaves: list[Array]) -> Array:
    """Returns float32[leaves]; a sharded leaf is summed where it is."""
    if not leaves:
        return jnp.zeros(0, jnp.float32)
    values = [in_float32(leaf) for leaf in leaves]
    squares = jnp.stack(
        [jnp.sum(jnp.real(v * jnp.conj(v))).astype(jnp.float32) for v in values]
    )
    if look.axis_name is None:
        return jnp.sqrt(squares)
    is_part = [varies(leaf, look.axis_name) for leaf in leaves]
    if not any(is_part):
        return jnp.sqrt(squares)
    total, mean = (
        reduce(squares, look.axis_name) for reduce in (jax.lax.psum, jax.lax.pmean)
    )
    return jnp.sqrt(jnp.where(jnp.asarray(is_part), total, mean))


def _pooled(look: Look, rms: Array) -> Array:
    if look.axis_name is None:
        return rms
    return jnp.sqrt(jax.lax.pmean(rms**2, look.axis_name))


def _everywhere(look: Look, dead: Array) -> Array:
    if look.axis_name is None:
        return dead
    return jax.lax.pmin(dead.astype(jnp.int32), look.axis_name) > 0


def _rows(names: Names, values: dict[str, Array]) -> Array:
    """Joins values by layer in the order of execution; 0 for those that have none."""
    groups = [
        jnp.stack(
            [values.get(name, jnp.zeros(names.stacks[name])) for name in group], axis=-1
        )
        for group in names.groups
    ]
    flat = [group.reshape(-1).astype(jnp.float32) for group in groups]
    return jnp.concatenate([jnp.zeros(0, jnp.float32), *flat])


def _averaged(average: Array, value: Array, rate: Array) -> Array:
    return jnp.where(jnp.isfinite(value), average + rate * (value - average), average)


def placed_like(value: Array, before: Array) -> Array:
    """Keeps dtype and, on a mesh of explicit axes, the sharding."""
    value = value.astype(before.dtype)
    wanted = jax.typeof(before).sharding
    if jax.typeof(value).sharding == wanted or wanted.mesh.empty:
        return value
    return jax.sharding.reshard(value, wanted)
