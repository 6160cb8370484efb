"""Overfitting one small batch: what a program without a bug can always do."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nnsanity._tree import num_examples, take_examples, takes_numbers
from nnsanity._types import Array, LossFn, Params, PyTree
from nnsanity.quantities.descent import check_loss, scaled_losses

SCALES = (1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)
"""Factors of the updates that are tried: a bad rate is not the model's fault."""
FITTED_SHARE = 0.1
"""Share of what a blind network is left with, up to which a batch counts as fitted."""
_AVERAGED = 10  # the last steps, so that no lucky one decides


class Overfit(NamedTuple):
    """Whether a network can learn one batch by heart.

    Attributes:
        fits: bool[]; False points to a bug in the program, or a network too small.
        loss: float32[], at the end of the best training.
        blind_loss: float32[], the same where every example is given the inputs of the
            first: what can be reached without telling examples apart.
        start_loss: float32[], before the first step.
        left: float32[], what is left of the blind loss, 0 for a perfect fit; fits up to
            0.1.  Below -0.1 the loss fell under what right outputs give: a wrong sign.
            Of a loss without a floor the share of the squared errors that a normal
            density of this loss has left.
        scale: float32[], the factor of the updates that led furthest; NaN where all
            diverged.
        scales: float32[scales], those tried.
        losses: float32[scales, steps + 1], along each training.
    """

    fits: Array
    loss: Array
    blind_loss: Array
    start_loss: Array
    left: Array
    scale: Array
    scales: Array
    losses: Array


@takes_numbers
def overfit_batch(
    loss_fn: LossFn,
    params: Params,
    batch: tuple[PyTree, PyTree],
    optimizer: optax.GradientTransformation,
    *,
    key: Array,
    num_steps: int = 500,
    scales: Array | None = None,
    best_loss: float | Array | None = 0.0,
) -> Overfit:
    """Tries to learn one small batch by heart.

    Nearly any network can; one that can't has a bug between inputs and loss, or is too
    small.  Each of a grid of scales of the updates is tried, falling to 0 along a half
    cosine, so that a bad learning rate is not blamed on the model.  The examples come
    in a new order at every step, so that a network that mixes them up can't learn them
    by their places.  Beside it, the same trainings where all examples have the inputs
    of the first show what can be reached blindly.

    Costs two trainings for each scale, by one compiled program, one after another.

    Args:
        loss_fn: ``loss_fn(params, (inputs, targets)) -> scalar``, without noise, and
            better without penalties.
        params: at the start, any pytree of arrays.
        batch: ``(inputs, targets)``, some 8 to 32 examples with different inputs and
            targets.
        optimizer: any optax transformation, such as the one that you train with.
        key: consumed; the order of the examples.
        num_steps: of each training.
        scales: [scales], factors of the updates; by default 0.01 to 1000.
        best_loss: what the loss is where every output is right; give it where it is not
            0, as for smoothed labels, whose entropy it is.  None where it has no floor,
            as the log likelihood of a density in nats, summed over the numbers of a
            target: a wrong sign can't be told then.

    Returns:
        ``Overfit``.

    Raises:
        TypeError: if ``optimizer`` has no ``init`` and ``update``.
        ValueError: if ``loss_fn`` does not return a scalar, there are fewer than 2
            examples, or ``scales`` is not a list of numbers.

    Example:
        >>> x = jnp.arange(8.0)[:, None] / 8
        >>> loss_fn = lambda w, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2)
        >>> blocked = lambda w, batch: loss_fn(jax.lax.stop_gradient(w), batch)
        >>> w, optimizer, key = jnp.zeros((1, 1)), optax.sgd(1e-3), jax.random.key(0)
        >>> overfit_batch(loss_fn, w, (x, 3 * x), optimizer, key=key).fits
        Array(True, dtype=bool)
        >>> overfit_batch(blocked, w, (x, 3 * x), optimizer, key=key).fits
        Array(False, dtype=bool)

    References:
        Karpathy (2019), "A recipe for training neural networks": overfit one batch.
    """
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            "overfit_batch: optimizer must have init and update, as optax.adam(1e-3)"
            f" has, got {optimizer!r}"
        )
    check_loss("overfit_batch", loss_fn, params, batch)
    if num_examples(batch) < 2 or num_steps < 1:
        raise ValueError(
            "overfit_batch: it takes at least 2 examples and 1 step, got"
            f" {num_examples(batch)} and {num_steps}"
        )
    chosen = jnp.asarray(SCALES if scales is None else scales, jnp.float32)
    if chosen.ndim != 1 or not chosen.size:
        raise ValueError(
            f"overfit_batch: scales must be a list of numbers, got shape {chosen.shape}"
        )
    best_loss = jnp.asarray(jnp.nan if best_loss is None else best_loss, jnp.float32)
    return _overfit(
        loss_fn, optimizer, params, batch, key, num_steps, chosen, best_loss
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 5))
def _overfit(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    params: Params,
    batch: tuple[PyTree, PyTree],
    key: Array,
    num_steps: int,
    scales: Array,
    best_loss: Array,
) -> Overfit:
    inputs, targets = batch
    size = num_examples(batch)
    orders = jax.vmap(lambda one: jax.random.permutation(one, size))(
        jax.random.split(key, num_steps)
    )
    share = np.arange(num_steps) / num_steps
    falling = jnp.asarray((1 + np.cos(np.pi * share)) / 2, jnp.float32)

    def loss_of(params: Params, rows: tuple[Array, Array]) -> Array:
        seen, asked = rows
        examples = take_examples(inputs, seen), take_examples(targets, asked)
        return loss_fn(params, examples)

    def train(one: tuple[Array, Array]) -> Array:
        scale, is_blind = one
        seen = jnp.where(is_blind, 0, orders)
        rows = seen, orders
        return scaled_losses(loss_of, optimizer, params, rows, scale * falling)

    grid = jnp.tile(scales, 2), jnp.repeat(jnp.array([False, True]), len(scales))
    losses, blind_losses = jnp.split(jax.lax.map(train, grid), 2)
    ends, blind_ends = (_ends(one) for one in (losses, blind_losses))
    start_loss = losses[0, 0]
    blind = jnp.minimum(jnp.min(blind_ends), blind_losses[0, 0])
    # A loss that falls below right outputs falls blindly too: compare with the start.
    is_blind = (blind >= best_loss) | jnp.isnan(best_loss)
    blind = jnp.where(is_blind, blind, start_loss)
    loss = jnp.min(ends)
    left = _left(loss, blind, best_loss)
    any_finite = jnp.isfinite(loss)
    return Overfit(
        (left <= FITTED_SHARE) & (left >= -FITTED_SHARE),
        jnp.where(any_finite, loss, jnp.nan),
        blind,
        start_loss,
        jnp.where(any_finite, left, jnp.nan),
        jnp.where(any_finite, scales[jnp.argmin(ends)], jnp.nan),
        scales,
        losses,
    )


def _left(loss: Array, blind: Array, best_loss: Array) -> Array:
    """Returns what is left of the blind loss.

    The log likelihood of a normal density whose deviation is that of the errors falls
    by half of the logarithm of what their squares fall by.
    """
    room = jnp.abs(blind - best_loss)
    above_best = (loss - best_loss) / jnp.where(room > 0, room, 1)
    return jnp.where(jnp.isnan(best_loss), jnp.exp(2 * (loss - blind)), above_best)


def _ends(losses: Array) -> Array:
    """Returns the mean loss of the last steps; infinite where it is not finite."""
    end = jnp.mean(losses[:, -_AVERAGED:], axis=1)
    return jnp.where(jnp.isfinite(end), end, jnp.inf)
