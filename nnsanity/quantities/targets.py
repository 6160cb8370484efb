"""How outputs and targets belong together, and how well they agree.

In a unit that neither the loss nor an affine change of the targets touches.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nnsanity._tree import in_float32
from nnsanity._types import Array, PyTree


def kind_of_targets(outputs: PyTree, targets: PyTree) -> str | None:
    """Tells how outputs and targets belong together.

    Args:
        outputs: array or ``jax.ShapeDtypeStruct``, [examples, ...].
        targets: concrete array, [examples, ...].

    Returns:
        ``"classes"`` (integers against one output per class), ``"one-hot"``,
        ``"binary"`` (zeros and ones, or -1 and 1), ``"numbers"``, or None where
        outputs can't be compared with targets.
    """
    if not hasattr(outputs, "shape") or not hasattr(targets, "shape"):
        return None
    if jnp.issubdtype(targets.dtype, jnp.floating):
        targets = in_float32(targets)  # NumPy does not know bfloat16
    targets = np.asarray(targets)
    if targets.dtype.kind not in "biuf":
        return None
    if np.issubdtype(targets.dtype, np.integer) and len(outputs.shape) > 1:
        squeezed = tuple(size for size in targets.shape[1:] if size != 1)
        classes = outputs.shape[-1]
        counts_up = targets.min() >= 0 and classes > max(int(targets.max()), 1)
        if outputs.shape[1:-1] == squeezed and counts_up:
            return "classes"
    if math.prod(outputs.shape[1:]) != math.prod(targets.shape[1:]):
        return None
    values = np.unique(targets[:10_000])
    if np.isin(values, (0, 1)).all():
        rows = targets.reshape(len(targets), -1)
        is_one_hot = rows.shape[1] > 1 and (rows.sum(axis=1) == 1).all()
        return "one-hot" if is_one_hot else "binary"
    return "binary" if np.isin(values, (-1, 1)).all() else "numbers"


def target_columns(targets: Array, kind: str | None) -> Array:
    """Returns targets as [examples, columns] of numbers, classes as one-hot rows."""
    if kind == "classes":
        return jax.nn.one_hot(targets.reshape(-1), int(targets.max()) + 1)
    return in_float32(targets).reshape(targets.shape[0], -1)


def quality(outputs: Array, targets: Array, kind: str) -> Array:
    """Measures how much better the outputs are than the best constant output.

    For classes the share of the errors of the most frequent class that is avoided; for
    numbers the share of the variance that is explained, averaged over the columns.  1
    is perfect, 0 is what a constant reaches; -1 where an output is not finite.

    Args:
        outputs: [examples, ...].
        targets: [examples, ...].
        kind: as ``kind_of_targets`` returns.

    Returns:
        float32[], at least -1.

    Example:
        >>> outputs, targets = jnp.array([0.0, 1.0, 1.0]), jnp.array([0.0, 2.0, 1.0])
        >>> float(quality(outputs, targets, "numbers"))
        0.5
    """
    outputs = in_float32(outputs)
    measure = {"classes": _class_quality, "one-hot": _one_hot_quality}.get(
        kind, _binary_quality if kind == "binary" else _number_quality
    )
    value = measure(outputs, targets)
    healthy = jnp.isfinite(value) & jnp.isfinite(outputs).all()
    return jnp.where(healthy, jnp.maximum(value, -1), -1)


def _class_quality(outputs: Array, targets: Array) -> Array:
    num_classes = outputs.shape[-1]
    labels = jnp.reshape(targets, outputs.shape[:-1])
    shares = jnp.mean(jax.nn.one_hot(labels.reshape(-1), num_classes), axis=0)
    correct = jnp.mean(jnp.argmax(outputs, -1) == labels)
    return _beyond(correct, jnp.max(shares))


def _one_hot_quality(outputs: Array, targets: Array) -> Array:
    targets = jnp.reshape(targets, outputs.shape)
    return _class_quality(outputs, jnp.argmax(targets, -1))


def _binary_quality(outputs: Array, targets: Array) -> Array:
    positive = jnp.reshape(targets, outputs.shape) > 0
    share = jnp.mean(positive)
    # Probabilities are cut at one half and logits at zero; what the outputs are is
    # not known here.
    correct = jnp.maximum(
        jnp.mean((outputs > 0.5) == positive), jnp.mean((outputs > 0.0) == positive)
    )
    return _beyond(correct, jnp.maximum(share, 1 - share))


def _beyond(correct: Array, baseline: Array) -> Array:
    return jnp.where(baseline < 1, (correct - baseline) / (1 - baseline), correct)


def _number_quality(outputs: Array, targets: Array) -> Array:
    targets = jnp.reshape(in_float32(targets), (outputs.shape[0], -1))
    outputs = jnp.reshape(outputs, targets.shape)
    centre = jnp.mean(targets, axis=0)
    variance = jnp.mean((targets - centre) ** 2, axis=0)
    error = jnp.mean((outputs - targets) ** 2, axis=0)
    explained = 1 - error / jnp.where(variance > 0, variance, 1)
    return jnp.sum(jnp.where(variance > 0, explained, 0)) / jnp.maximum(
        jnp.sum(variance > 0), 1
    )


def usual_loss(outputs: Array, targets: Array, *, kind: str | None) -> Array:
    """Returns the loss that targets of a kind usually go with.

    Args:
        outputs: [examples, ...]; logits where the targets are classes.
        targets: [examples, ...].
        kind: as ``kind_of_targets`` returns.

    Returns:
        The mean cross entropy for classes, else the mean squared error.
    """
    outputs = in_float32(outputs)
    if kind == "classes":
        labels = targets.reshape(outputs.shape[:-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
    elif kind == "one-hot":
        losses = optax.softmax_cross_entropy(outputs, targets.reshape(outputs.shape))
    elif kind == "binary":
        is_positive = in_float32(targets.reshape(outputs.shape) > 0)
        losses = optax.sigmoid_binary_cross_entropy(outputs, is_positive)
    else:
        losses = (outputs - in_float32(targets).reshape(outputs.shape)) ** 2
    return jnp.mean(losses)


def constant_outputs(shape: Sequence[int], targets: np.ndarray, kind: str) -> Array:
    """Lists the constant outputs of which one is best for the usual losses.

    Mean and median for numbers; shares of the classes, as probabilities, as logits and
    as log-odds, for classes.

    Returns:
        float32[candidates, ...], each of the shape of one example's output.
    """
    shape = tuple(shape)
    if kind == "numbers":
        rows = targets.astype(np.float64).reshape(len(targets), -1)
        found = [rows.mean(axis=0), np.median(rows, axis=0)]
    else:
        shares = _shares(shape, targets, kind).clip(1e-6, 1 - 1e-6)
        odds = np.log(shares / (1 - shares))
        found = [shares, np.log(shares), odds, np.zeros_like(shares)]
        found += [2 * shares - 1] if targets.min() < 0 else []
    return jnp.asarray(np.stack([one.reshape(shape) for one in found]), jnp.float32)


def _shares(shape: tuple[int, ...], targets: np.ndarray, kind: str) -> np.ndarray:
    if kind == "classes":
        counts = np.bincount(targets.reshape(-1), minlength=shape[-1])
        return np.broadcast_to(counts / counts.sum(), shape)
    return (targets.reshape(len(targets), -1) > 0).mean(axis=0)


def perfect_outputs(shape: Sequence[int], targets: np.ndarray, kind: str) -> Array:
    """Lists outputs that say just what the targets say, for the usual losses.

    The targets themselves; for classes also as logits of three temperatures.

    Returns:
        float32[candidates, examples, ...].
    """
    if kind == "classes":
        truth = np.eye(shape[-1], dtype=np.float32)[targets.reshape(len(targets), -1)]
    else:
        truth = np.asarray(targets, np.float32)
    truth = truth.reshape(len(targets), *shape)
    if kind == "numbers":
        return jnp.asarray(truth[None])
    signs = truth if truth.min() < 0 else 2 * truth - 1
    clipped = truth.clip(1e-6, 1 - 1e-6)  # for a log without a guard
    return jnp.stack([truth, clipped, *(signs * size for size in (2, 5, 20))])


@jax.jit
def outputs_in_units(targets: Array) -> Array:
    """Lists what outputs would be that mean the targets, in several units.

    Returns:
        float32[12, examples, ...]: the targets themselves, two that grow without bound,
        then the targets in other units.
    """
    centred = targets - jnp.mean(targets, axis=0)
    deviation = jnp.std(targets, axis=0)
    low, high = jnp.min(targets, axis=0), jnp.max(targets, axis=0)
    span = jnp.where(high > low, high - low, 1)
    far = 1000 * jnp.max(jnp.abs(targets))
    return jnp.stack(
        [
            targets,
            jnp.full_like(targets, far),
            jnp.full_like(targets, -far),
            *(targets / unit for unit in (1000, 255, 100, 10, 0.1)),
            centred / jnp.where(deviation > 0, deviation, 1),
            (targets - low) / span,
            2 * (targets - low) / span - 1,
            jnp.log(jnp.maximum(targets, 1e-6)),
        ]
    )
