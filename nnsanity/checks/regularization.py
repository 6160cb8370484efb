"""Item 4: is there some noise in training, and not too much of it?

"Dropout, small noise or another random process belongs in the network even where
nothing overfits.  Start at 0.25 or 0.1" (D. Holden).
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from nnsanity._tree import in_float32
from nnsanity._types import Array, LossFn, Params, PyTree
from nnsanity.findings import Finding, number
from nnsanity.quantities.descent import (
    check_loss,
    check_optimizer,
    floats_of,
    with_floats,
)
from nnsanity.quantities.example_norms import check_apart, check_examples
from nnsanity.tracing.layers import inspect
from nnsanity.tracing.replace import replaced

GAP_LIMIT = 0.3
"""Healthy distance between the quality on training and on validation data."""
RISE_LIMIT = 1.25
"""Healthy validation loss in units of its own minimum."""


DECAY_STEPS = 16
"""Zero gradients that an optimizer gets: some act only every few steps."""


def weight_decay(optimizer: optax.GradientTransformation, params: Params) -> Array:
    """Measures what an optimizer takes off the weights where the gradient is zero.

    The optimizer is a black box and fresh.  The mean over 16 steps counts, since some
    act only every few steps; with warm-up it is that of its beginning.  Worry where the
    decay of all your steps together is far above 1: then the weights do not stay where
    the data put them.

    Costs 16 updates.

    Args:
        optimizer: any optax transformation.
        params: any pytree of arrays.

    Returns:
        float32[leaves], the floating-point leaves in leaf order: the share that a step
        takes away, ``-(update . weights) / |weights|^2``; 0 where there is no decay.

    Raises:
        TypeError: if ``optimizer`` has no ``init`` and ``update``.

    Example:
        >>> optimizer = optax.adamw(0.01, weight_decay=0.1)
        >>> weight_decay(optimizer, {"w": jnp.array([3.0, -4.0])})
        Array([0.001], dtype=float32)
    """
    check_optimizer("weight_decay", optimizer)
    return _weight_decay(optimizer, floats_of(params))


@functools.partial(jax.jit, static_argnums=0)
def _weight_decay(optimizer: optax.GradientTransformation, params: PyTree) -> Array:
    extended = optax.with_extra_args_support(optimizer)
    zeros = jax.tree.map(jnp.zeros_like, params)

    def step(state: PyTree, _: None) -> tuple[PyTree, list[Array]]:
        updates, state = extended.update(
            zeros,
            state,
            params,
            value=jnp.float32(1),
            grad=zeros,
            value_fn=lambda _: jnp.float32(1),
        )
        # As one fusion with its sums, an update of forty leaves compiles for a minute.
        updates = jax.lax.optimization_barrier(updates)
        pairs = zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True)
        return state, [_taken(*pair) for pair in pairs]

    _, taken = jax.lax.scan(step, extended.init(params), None, length=DECAY_STEPS)
    return jnp.stack([jnp.mean(one) for one in taken])


def _square(leaves: list[Array]) -> Array:
    return functools.reduce(jnp.add, [jnp.sum(jnp.abs(one) ** 2) for one in leaves])


def _taken(update: Array, weights: Array) -> Array:
    update, weights = in_float32(update), in_float32(weights)
    size = jnp.sum(jnp.abs(weights) ** 2)
    along = -jnp.sum(jnp.real(jnp.conj(update) * weights))
    return (along / jnp.where(size == 0, 1, size)).astype(jnp.float32)


def penalty_pull(loss_fn: LossFn, params: Params, batch: PyTree) -> Array:
    """Compares the pull of the penalties inside of a loss with that of the data.

    A penalty is a scalar made from parameters alone that is added to the loss.  Worry
    where it pulls harder than the data at the start.

    Costs two gradients of the batch.

    Args:
        loss_fn: ``loss_fn(params, batch) -> scalar``.
        params: any pytree of arrays; of its leaves the floating-point ones count.
        batch: any pytree of arrays.

    Returns:
        float32[], the norm of the penalties' gradient over that of the rest; 0 without
        penalties, inf where only they pull.

    Raises:
        ValueError: if the loss is not a scalar, or there are no parameters.

    Example:
        >>> loss_fn = lambda w, x: jnp.mean(x @ w) + 0.5 * jnp.sum(w**2)
        >>> penalty_pull(loss_fn, jnp.array([3.0, 4.0]), jnp.array([[0.0, 2.0]]))
        Array(2.5, dtype=float32)
    """
    check_loss("penalty_pull", loss_fn, params, batch)
    return _penalty_pull(loss_fn, params, batch)


@functools.partial(jax.jit, static_argnums=0)
def _penalty_pull(loss_fn: LossFn, params: Params, batch: PyTree) -> Array:
    floats, network = floats_of(params), inspect(loss_fn, params, batch)

    def gradient(scale: float) -> list[Array]:
        scaled = replaced(loss_fn, network, {}, penalty_scale=scale)
        found = jax.grad(lambda moved: scaled(with_floats(params, moved), batch))(
            floats
        )
        return [in_float32(leaf) for leaf in jax.tree.leaves(found)]

    whole, data = gradient(1.0), gradient(0.0)
    pull = _square([one - two for one, two in zip(whole, data, strict=True)])
    of_data = _square(data)
    ratio = jnp.sqrt(pull / jnp.where(of_data == 0, 1, of_data))
    ratio = jnp.where((of_data == 0) & (pull > 0), jnp.inf, ratio)
    return ratio.astype(jnp.float32)


class GeneralizationGap(NamedTuple):
    """How much worse a network is on data that it was not trained on.

    Attributes:
        gap: float32[], mean loss on validation examples over that on training examples.
        standard_error: float32[], of the gap, from the spread between examples; a gap
            of less than twice that is none.
    """

    gap: Array
    standard_error: Array


def generalization_gap(
    loss_fn: LossFn, params: Params, batch: PyTree, validation: PyTree
) -> GeneralizationGap:
    """Measures the gap between training and validation, and its noise.

    Costs one forward pass of both.

    Args:
        loss_fn: ``loss_fn(params, batch) -> scalar``, a mean over examples.
        params: any pytree of arrays.
        batch: examples that were trained on, at least 2.
        validation: other examples, at least 2.

    Returns:
        ``GeneralizationGap``.

    Raises:
        ValueError: if the examples of a batch are coupled, or there are too few.

    Example:
        >>> loss_fn = lambda w, x: jnp.mean(w * x)
        >>> seen, others = jnp.array([1.0, 3.0]), jnp.array([4.0, 8.0])
        >>> generalization_gap(loss_fn, 1.0, seen, others)
        GeneralizationGap(gap=Array(4., dtype=float32),
            standard_error=Array(2.236068, dtype=float32))
    """
    for name, part in (("batch", batch), ("validation", validation)):
        if check_examples("generalization_gap", params, part) < 2:
            raise ValueError(
                f"generalization_gap: {name} has one example, so no variance"
            )
        check_apart("generalization_gap", loss_fn, params, part)
    return _generalization_gap(loss_fn, params, batch, validation)


@functools.partial(jax.jit, static_argnums=0)
def _generalization_gap(
    loss_fn: LossFn, params: Params, batch: PyTree, validation: PyTree
) -> GeneralizationGap:
    def losses(part: PyTree) -> Array:
        def one(example: PyTree) -> Array:
            return loss_fn(params, jax.tree.map(lambda leaf: leaf[None], example))

        return in_float32(jax.vmap(one)(jax.tree.map(jnp.asarray, part)))

    ours, theirs = losses(batch), losses(validation)
    square = sum(jnp.var(one, ddof=1) / len(one) for one in (ours, theirs))
    gap = jnp.mean(theirs) - jnp.mean(ours)
    return GeneralizationGap(
        gap.astype(jnp.float32), jnp.sqrt(square).astype(jnp.float32)
    )


def judge_presence(
    *, has_noise: bool, has_decay: bool, has_penalty: bool, has_validation: bool
) -> tuple[Finding, ...]:
    """Notes what is not there: regularization, and validation data.

    Args:
        has_noise: whether training has noise.
        has_decay: whether the optimizer takes anything off the weights.
        has_penalty: whether the loss has a penalty.
        has_validation: whether there are held-out data.
    """
    found = []
    if not (has_noise or has_decay or has_penalty):
        found.append(
            Finding(
                "regularization/none",
                4,
                "info",
                "network",
                0.0,
                1.0,
                "Nothing regularizes the network: no noise in training, no weight decay"
                " and no penalty.",
                "Add dropout of 0.1 to 0.25 or another small noise, even where nothing"
                " overfits: it smooths the loss and tames outliers.",
            )
        )
    if not has_validation:
        found.append(
            Finding(
                "regularization/no-validation",
                4,
                "info",
                "validation",
                0.0,
                1.0,
                "No validation data were given, so that overfitting can't be seen.",
                "Hold out a part of the data, prepared like the rest, and pass it as"
                " validation.",
            )
        )
    return tuple(found)


def judge_overfitting(
    *,
    losses: npt.ArrayLike,
    quality: npt.ArrayLike,
    validation_losses: npt.ArrayLike,
    validation_quality: npt.ArrayLike,
) -> tuple[Finding, ...]:
    """Says whether a network forgets the task while it learns examples by heart.

    Args:
        losses: [marks], on examples that are trained on.
        quality: [marks], on the same.
        validation_losses: [marks], on validation data, at the same times.
        validation_quality: [marks], on the same.
    """
    names = (losses, quality, validation_losses, validation_quality)
    curves = np.stack([np.asarray(curve, np.float64) for curve in names])
    if not np.isfinite(curves).all():
        return ()
    best = int(np.argmin(curves[2]))
    rise = curves[2, -1] / max(curves[2, best], 1e-12)
    gap = float(np.median(curves[1, -3:]) - np.median(curves[3, -3:]))
    still_falls = curves[0, -1] < curves[0, best]
    if not (rise > RISE_LIMIT and gap > GAP_LIMIT and still_falls and best > 0):
        return ()
    return (
        Finding(
            "regularization/overfitting",
            4,
            "warning",
            "network",
            float(rise),
            RISE_LIMIT,
            f"The validation loss fell to {number(curves[2, best])} and rose again to"
            f" {number(curves[2, -1])}, while the training loss went on to"
            f" {number(curves[0, -1])}: the network learns examples by heart.",
            "Get more data, or make more by augmentation; add dropout of 0.1 to 0.25 or"
            " weight decay; stop at the lowest point of the validation loss.",
        ),
    )


def judge_noise(places: Sequence[str]) -> tuple[Finding, ...]:
    """Says where a network is noisy though it is evaluated."""
    return tuple(
        Finding(
            "regularization/noise-at-evaluation",
            4,
            "warning",
            place,
            1.0,
            0.0,
            "apply_fn draws random numbers for every example: what it returns is not"
            " the prediction of the network, but that of a part of it.",
            "Switch dropout off where you evaluate: deterministic=True in Linen,"
            " model.eval() in NNX, eqx.nn.inference_mode in Equinox. A model that"
            " samples by design says so by ignore=.",
        )
        for place in places
    )


def too_strong(kind: str) -> Finding:
    """The finding that training without some regularization works better.

    Args:
        kind: ``"noise"`` for dropout, ``"penalty"`` for a term of the loss, ``"decay"``
            for the optimizer's.
    """
    message, advice = _WORDS[kind]
    return Finding(
        "regularization/too-strong",
        4,
        "info",
        _PLACES[kind],
        math.nan,
        math.nan,
        message,
        advice,
    )


_WORDS = {
    "noise": (
        "The noise of training drowns what there is to learn.",
        "Lower the dropout rate: start at 0.25 or 0.1.",
    ),
    "penalty": (
        "The penalty on the parameters pulls harder than the data.",
        "Divide the weight of the penalty by 100, then raise it until validation tells"
        " you to stop.",
    ),
    "decay": (
        "The weight decay of the optimizer pulls harder than the data.",
        "Divide the weight decay by 100, then raise it until validation tells you to"
        " stop.",
    ),
}
_PLACES = {"noise": "train_loss_fn", "penalty": "loss_fn", "decay": "optimizer"}
