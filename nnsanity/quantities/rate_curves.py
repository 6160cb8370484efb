"""Learning-rate curves: how training answers to the scale of its updates."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nnsanity._tree import check_key, described, num_examples, take_examples
from nnsanity._types import Array, LossFn, Params, PyTree
from nnsanity.quantities.descent import (
    SMOOTHED_SHARE,
    check_training,
    running_mean,
    scaled_losses,
    start_of,
    trainable_scale,
)

SIGHT = 0.9
"""Healthy rise above the best smoothed loss in a ramp, as a share of the fall."""
ROUNDING = 16
"""Of the running mean of equal losses, in units of a loss's last place."""
SAFETY = 0.1
"""Of the largest rate of a ramp, which overshoots the limit of stability."""


class LRRange(NamedTuple):
    """How the loss answers to a rising scale of the updates.

    Attributes:
        scales: float32[steps], the factor of the updates in each step.
        losses: float32[steps], of the batch of each step, before the step.
        smoothed: float32[steps], their running mean.
        diverged: bool[steps], whether this step, or one before it, led to a loss that
            is not finite or has left sight of the best.
        steepest: float32[], where the loss falls fastest by the logarithm of the scale;
            NaN where it falls nowhere.
        largest_stable: float32[], the last scale that has not diverged; NaN if none.
            The end of the range means that the range is too short.
        suggestion: float32[], a tenth of it, or of ``lowest`` where that is smaller,
            and halved until four times as much trains; NaN where every scale diverges.
        lowest: float32[], scale of the lowest smoothed loss; NaN where all diverge.
        spread: float32[steps], standard deviation of the losses between batches, over
            the same steps as ``smoothed``; from how far each loss is from the one
            before it, so that a trend hardly counts.
    """

    scales: Array
    losses: Array
    smoothed: Array
    diverged: Array
    steepest: Array
    largest_stable: Array
    suggestion: Array
    lowest: Array
    spread: Array


class LRSweep(NamedTuple):
    """Where trainings end that differ in the scale of their updates alone.

    Attributes:
        scales: float32[scales].
        losses: float32[scales], running mean of the loss after the last step, averaged
            over the seeds; inf where any loss was not finite.
        diverged: bool[scales], whether from any seed a loss was not finite or the end
            is above the start by more than batches differ.
        best: float32[], scale of the lowest finite loss; NaN if there is none.
        spread: float32[scales], standard deviation of ``seed_losses`` over the seeds;
            NaN for a single seed, and where a loss was not finite.
        seed_losses: float32[seeds, scales], what ``losses`` is the mean of.
    """

    scales: Array
    losses: Array
    diverged: Array
    best: Array
    spread: Array
    seed_losses: Array


def lr_range(
    loss_fn: LossFn,
    params: Params,
    batches: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    min_scale: Array | float,
    max_scale: Array | float,
) -> LRRange:
    """Trains with a scale of the updates that rises until the loss explodes.

    The optimizer's final updates are multiplied by a factor that rises geometrically:
    with ``optax.adam(1.0)`` it is the learning rate, with your own optimizer it says
    how many times too low your rate is.  Worry where ``suggestion`` is far from the
    rate in use.  The state is fresh: leave warm-up out of the optimizer.

    A ramp overshoots.  On smooth problems the directions that are too fast have decayed
    before and must first grow back, so the loss turns only at 4 to 6 times the limit of
    stability, or never where rounding has made them exactly zero.  ``largest_stable``
    does not allow for it.  ``suggestion`` does: with four times as much, the first
    twentieth of the steps was trained from the start and did not end above it.  Where
    the limit itself matters, use ``lr_sweep``.

    Costs one training step for each batch, in one compiled scan, the loss of up to nine
    batches, and a twentieth of the steps (at least 5), again for each halving.  Another
    range compiles nothing anew.

    Args:
        loss_fn: ``loss_fn(params, batch) -> scalar``.
        params: any pytree of arrays; leaves that are not floating-point stay.
        batches: the batches of all steps, each leaf [steps, ...]; 100 steps are usual.
        optimizer: any optax transformation.
        min_scale: first factor, above 0.
        max_scale: last factor, above the first.

    Returns:
        ``LRRange``.

    Raises:
        TypeError: if ``optimizer`` has no ``init`` and ``update``.
        ValueError: if ``loss_fn`` does not return a scalar, there are fewer than 5
            steps, the leaves of ``batches`` differ in length, or the range is empty.

    Example:
        >>> loss_fn = lambda x, curvature: 0.5 * curvature * x**2  # stable under 0.2
        >>> found = lr_range(
        ...     loss_fn,
        ...     jnp.float32(1),
        ...     jnp.full(100, 10.0),
        ...     optax.sgd(1.0),
        ...     min_scale=1e-5,
        ...     max_scale=10.0,
        ... )
        >>> bool(found.largest_stable > 0.2), bool(0 < found.suggestion < 0.2)
        (True, True)

    References:
        Smith (2017), "Cyclical learning rates for training neural networks", section
        3.3; Kingma and Ba (2015), section 3, for the running mean.
    """
    check_training("lr_range", optimizer, batches, min_steps=5)
    low, high = _scalar("min_scale", min_scale), _scalar("max_scale", max_scale)
    is_known = not any(isinstance(one, jax.core.Tracer) for one in (low, high))
    if is_known and not 0 < float(low) < float(high) < np.inf:
        raise ValueError(
            "lr_range: scales must rise from above 0, got"
            f" min_scale={min_scale}, max_scale={max_scale}; are they swapped?"
        )
    return _lr_range(loss_fn, optimizer, params, batches, low, high)


def lr_sweep(
    loss_fn: LossFn,
    params: Params,
    batches: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    scales: Array,
    keys: Array | None = None,
    num_parallel: int | None = None,
) -> LRSweep:
    """Trains from the same start with each of several scales of the updates.

    The optimizer's final updates are multiplied by the scale: with ``optax.sgd(1.0)``
    it is the learning rate.  On a quadratic, what has diverged is what lies above the
    limit of stability, 2 / eigenvalue, given the steps to show it.  Worry where
    ``best`` is far from the rate in use; take a rate a little below the largest that
    has not diverged.

    With ``keys`` each scale trains once for each key, on the batches in an order of its
    own, the same for all scales.  Two scales differ where their losses are further
    apart than ``spread``; for seeds of the start as well, ``vmap`` over ``params``.

    Costs the steps times the scales times the seeds, by one compiled program.

    Args:
        loss_fn: ``loss_fn(params, batch) -> scalar``.
        params: any pytree of arrays; leaves that are not floating-point stay.
        batches: the batches of all steps, each leaf [steps, ...].
        optimizer: any optax transformation.
        scales: [scales], the factors.
        keys: [seeds] random keys, as ``jax.random.split(key, 3)`` makes them; consumed.
            None trains once for each scale, on the batches as they come.
        num_parallel: how many trainings run side by side, each with a copy of the
            parameters and of the optimizer's state.  None is one on a CPU, where side
            by side is slower for all but tiny networks, and elsewhere all scales.

    Returns:
        ``LRSweep``.

    Raises:
        TypeError: if ``optimizer`` has no ``init`` and ``update``, ``keys`` are none,
            or ``num_parallel`` is not an int.
        ValueError: if ``loss_fn`` does not return a scalar, there are fewer than 2
            steps, the leaves of ``batches`` differ in length, ``scales`` is not 1-D, or
            ``num_parallel`` is under 1.

    Example:
        >>> loss_fn = lambda x, curvature: 0.5 * curvature * x**2  # stable under 0.2
        >>> found = lr_sweep(
        ...     loss_fn,
        ...     jnp.float32(1),
        ...     jnp.full(30, 10.0),
        ...     optax.sgd(1.0),
        ...     scales=jnp.array([0.01, 0.11, 0.19, 0.21]),
        ... )
        >>> found.diverged, found.best
        (Array([False, False, False,  True], dtype=bool), Array(0.11, dtype=float32))

    References:
        LeCun, Bottou, Orr and Mueller (1998), "Efficient BackProp", section 4.6.
    """
    check_training("lr_sweep", optimizer, batches, min_steps=2)
    if np.ndim(scales) != 1 or not np.size(scales):
        raise ValueError(
            "lr_sweep: scales must be a list of numbers, got shape"
            f" {np.shape(scales)}; for one scale pass scales=[1.0]"
        )
    if keys is not None:
        check_key("lr_sweep", keys, num_axes=1)
    if num_parallel is None:
        num_parallel = 1 if jax.default_backend() == "cpu" else np.size(scales)
    if isinstance(num_parallel, bool) or not isinstance(num_parallel, int | np.integer):
        raise TypeError(f"lr_sweep: num_parallel must be an int, got {num_parallel!r}")
    if num_parallel < 1:
        raise ValueError(
            f"lr_sweep: num_parallel must be at least 1, got {num_parallel}"
        )
    scales = jnp.asarray(scales, jnp.float32)
    return _lr_sweep(
        loss_fn, optimizer, int(num_parallel), params, batches, scales, keys
    )


def _scalar(name: str, value: Array | float) -> Array | np.floating:
    if np.shape(value) != ():
        raise ValueError(f"lr_range: {name} must be a number, got {described(value)}")
    if isinstance(value, jax.Array):
        return value.astype(jnp.float32)
    return np.float32(value)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _lr_range(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    params: Params,
    batches: PyTree,
    low: Array,
    high: Array,
) -> LRRange:
    num_steps = num_examples(batches)
    start = start_of("lr_range", loss_fn, params, batches)
    share = jnp.arange(num_steps, dtype=jnp.float32) / (num_steps - 1)
    scales = low * jnp.exp(share * jnp.log(high / low))
    losses = scaled_losses(loss_fn, optimizer, params, batches, scales)
    curve = running_mean(losses)
    lowest = jax.lax.cummin(jnp.where(jnp.isfinite(curve), curve, jnp.inf))
    best = jnp.minimum(lowest, start.level)
    # What is healthy is written down, so that NaN has diverged.
    limit = best + SIGHT * (start.level - best) + start.tolerance
    is_healthy = jnp.isfinite(losses) & (curve <= limit)
    is_stable = jax.lax.cummin(is_healthy.astype(jnp.int32))[1:] > 0
    last = jnp.sum(is_stable) - 1
    falls = jnp.where(is_stable, curve[1:] - curve[:-1], jnp.inf)
    # The running mean of the first steps is hardly one.
    falls = jnp.where(jnp.arange(num_steps) < num_steps // SMOOTHED_SHARE, 0, falls)
    rounding = ROUNDING * jnp.finfo(curve.dtype).eps * jnp.abs(start.level)
    found = jnp.argmin(jnp.where(is_stable, curve[1:], jnp.inf))
    any_stable = jnp.any(is_stable)
    largest = jnp.where(any_stable, scales[last], jnp.nan)
    at_lowest = jnp.where(any_stable, scales[found], jnp.nan)
    guess = SAFETY * jnp.minimum(largest, at_lowest)
    return LRRange(
        scales,
        losses[:-1],
        curve[:-1],
        ~is_stable,
        jnp.where(jnp.min(falls) < -rounding, scales[jnp.argmin(falls)], jnp.nan),
        largest,
        trainable_scale(loss_fn, optimizer, params, batches, start, guess),
        at_lowest,
        jnp.sqrt(running_mean(_squared_jumps(losses) / 2))[:-1],
    )


def _squared_jumps(losses: Array) -> Array:
    """The squared distance of each loss from the one before; of the first, the next's.

    Half of it has the mean of the variance (von Neumann 1941).
    """
    squares = (losses[1:] - losses[:-1]) ** 2
    return jnp.concatenate([squares[:1], squares])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _lr_sweep(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    num_parallel: int,
    params: Params,
    batches: PyTree,
    scales: Array,
    keys: Array | None,
) -> LRSweep:
    start = start_of("lr_sweep", loss_fn, params, batches)
    num_steps = num_examples(batches)
    orders = jnp.arange(num_steps)[None]
    if keys is not None:
        orders = jax.vmap(lambda key: jax.random.permutation(key, num_steps))(keys)

    def loss_of(params: Params, row: Array) -> Array:
        return loss_fn(params, take_examples(batches, row))

    def end(training: tuple[Array, Array]) -> Array:
        scale, order = training
        repeated = jnp.broadcast_to(scale, order.shape)
        losses = scaled_losses(loss_of, optimizer, params, order, repeated)
        is_finite = jnp.all(jnp.isfinite(losses))
        return jnp.where(is_finite, running_mean(losses)[-1], jnp.inf)

    grid = jnp.tile(scales, len(orders)), jnp.repeat(orders, len(scales), axis=0)
    side_by_side = num_parallel if num_parallel > 1 else None
    ends = jax.lax.map(end, grid, batch_size=side_by_side)
    ends = ends.reshape(len(orders), len(scales))
    losses = jnp.mean(ends, 0)
    spread = jnp.std(ends, 0, ddof=1) if len(orders) > 1 else jnp.nan * losses
    best = jnp.where(jnp.any(jnp.isfinite(losses)), scales[jnp.argmin(losses)], jnp.nan)
    diverged = ~jnp.all(start.is_healthy(ends), 0)
    return LRSweep(scales, losses, diverged, best, spread, ends)
