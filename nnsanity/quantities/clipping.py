"""Whether an optimizer clips, told by its answers alone."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nnsanity._tree import in_float32
from nnsanity._types import Array, Params, PyTree
from nnsanity.quantities.descent import check_optimizer, floats_of
from nnsanity.quantities.probing import corner, linear
from nnsanity.tracing.choices import chooses

NUM_STEPS = 16
"""Steps before the probe, and with it; gradients may be summed up over so many."""
FACTORS = 2.0 ** np.arange(-4, 7)
"""Of the warm gradient.  Beyond the last one, the smooth normalization of Adam and its
like could be taken for a limit: its answers differ by ``1 / factor**2``."""
LEVELS = 2.0 ** np.arange(-15, 16, 3)
"""Sizes of the warm gradient."""
TOLERANCE = 1e-5
"""Healthy answers to the two largest factors differ by more, as a share of what the
others differ by."""


class Clipping(NamedTuple):
    """Which updates stop growing with the gradient.

    Attributes:
        clips: bool[leaves], the floating-point leaves in leaf order: whether the update
            of this one has a limit.
        threshold: float32[leaves], size of the elements of the gradient, all of them
            equal in size, at which it stops, by a power of two; inf where it does not.
    """

    clips: Array
    threshold: Array


def clipping(optimizer: optax.GradientTransformation, params: Params) -> Clipping:
    """Finds out whether an optimizer clips gradients, by feeding it some.

    "Turn gradient clipping off": it hides a learning rate that is too high, and what
    needs it are outliers (D. Holden).  Worry where it bites in many steps.

    The optimizer is a black box: after a few equal gradients it gets some that are
    larger or smaller.  A clipper answers to small ones in proportion, and to all large
    ones in exactly the same way; Adam and its like come near to a limit but never reach
    it, and what looks at signs alone has no proportion.  Found wherever it stands: in a
    chain, before or behind Adam, for some parameters, under gradients that are summed
    up over no more than 16 steps.  Limits of elements between 1e-5 and 1e6 are found.
    Not found is a limit behind Adam that every update meets: it is a normalization.

    Costs some 3,000 updates of a few parameters: time to compile, and little more.

    Args:
        optimizer: any optax transformation.
        params: the parameters; their values count for clippers that look at them.

    Returns:
        ``Clipping``.

    Raises:
        TypeError: if ``optimizer`` has no ``init`` and ``update``.

    Example:
        >>> chain = optax.chain(optax.clip(1.0), optax.adam(1e-3))
        >>> clipping(chain, {"w": jnp.ones(3)})
        Clipping(clips=Array([ True], dtype=bool), threshold=Array([1.], dtype=float32))
        >>> clipping(optax.adam(1e-3), {"w": jnp.ones(3)}).clips
        Array([False], dtype=bool)

    References:
        Pascanu, Mikolov and Bengio (2013), "On the difficulty of training recurrent
        neural networks"; Brock et al. (2021), "High-performance large-scale image
        recognition without normalization", section 4.1, for limits by parameter.
    """
    check_optimizer("clipping", optimizer)
    few = jax.tree.map(corner, floats_of(params))
    if not chooses(functools.partial(_updates, optimizer, few), few):
        count = len(jax.tree.leaves(few))
        return Clipping(jnp.zeros(count, bool), jnp.full(count, jnp.inf))
    return _clipping(optimizer, few)


def scales_with_weights(
    optimizer: optax.GradientTransformation, params: Params
) -> Array:
    """Tells whether updates by large gradients depend on the parameters.

    Weight decay does not matter beside them; what scales updates by the size of the
    weights, or clips by it, does.

    Args:
        optimizer: any optax transformation.
        params: the parameters.

    Returns:
        bool[].

    Example:
        >>> decayed, scaled = optax.adamw(0.1), optax.lars(0.1)
        >>> params = jnp.full(3, 2.0)
        >>> [bool(scales_with_weights(one, params)) for one in (decayed, scaled)]
        [False, True]
    """
    few = jax.tree.map(corner, floats_of(params))
    zeros = jax.tree.map(jnp.zeros_like, few)
    large = jax.tree.map(lambda leaf: jnp.full_like(leaf, LEVELS[-1]), few)
    decay = _updates(optimizer, few, zeros)
    with_weights, without = (_updates(optimizer, one, large) for one in (few, zeros))
    difference = jax.tree.map(
        lambda one, two, taken: jnp.abs(one - two) - jnp.abs(taken),
        with_weights,
        without,
        decay,
    )
    pairs = zip(jax.tree.leaves(difference), jax.tree.leaves(without), strict=True)
    return jnp.any(
        jnp.stack([jnp.max(one) > 1e-2 * jnp.max(jnp.abs(two)) for one, two in pairs])
    )


def update_degree(
    optimizer: optax.GradientTransformation, params: Params, *, size: Array | float
) -> Array:
    """Returns with which power of the gradient the first updates grow.

    1 for gradient descent, 0 for Adam and its like, which divide by its size.  Weight
    decay is left out.

    Args:
        optimizer: any optax transformation.
        params: the parameters.
        size: of the elements of the gradient; twice that must not be clipped.

    Returns:
        float32[].

    Example:
        >>> update_degree(optax.sgd(0.1), jnp.ones(2), size=1.0).round(3)
        Array(1., dtype=float32)
    """
    few = jax.tree.map(corner, floats_of(params))
    zeros, ones = jax.tree.map(jnp.zeros_like, few), jax.tree.map(jnp.ones_like, few)
    sizes = []
    for factor in (size, 2 * size):
        grads = jax.tree.map(lambda leaf, factor=factor: factor * leaf, ones)
        leaves = jax.tree.leaves(_updates(optimizer, zeros, grads))
        sizes.append(jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in leaves)))
    small, large = sizes
    return jnp.log2(large / small).astype(jnp.float32)


def _updates(
    optimizer: optax.GradientTransformation, params: Params, grads: PyTree
) -> PyTree:
    """The sum of the first updates by equal gradients."""
    extended = optax.with_extra_args_support(optimizer)
    value_fn = functools.partial(linear, params, grads)

    def step(state: PyTree, _: None) -> tuple[PyTree, PyTree]:
        updates, state = extended.update(
            grads, state, params, value=value_fn(params), grad=grads, value_fn=value_fn
        )
        return state, jax.tree.map(in_float32, updates)

    _, updates = jax.lax.scan(step, extended.init(params), None, length=NUM_STEPS)
    return jax.tree.map(lambda one: jnp.sum(one, 0), updates)


@functools.partial(jax.jit, static_argnums=0)
def clipped_share(
    optimizer: optax.GradientTransformation, params: Params, grads: PyTree
) -> Array:
    """Returns how much of a gradient an optimizer holds back.

    The gradient is fed to a fresh optimizer after smaller ones of the same direction:
    what it holds back does not grow with it any more.

    Costs 576 updates.

    Args:
        optimizer: any optax transformation that clips.
        params: the parameters.
        grads: their gradients, a tree like the parameters.

    Returns:
        float32[], the share of the squared norm; 0 where nothing is clipped, 1 where
        the whole gradient is.

    Example:
        >>> chain = optax.chain(optax.clip(1.0), optax.sgd(0.1))
        >>> params, grads = jnp.zeros(3), jnp.array([3.0, 0.5, 4.0])
        >>> round(float(clipped_share(chain, params, grads)), 2)
        0.99
    """
    params, grads = floats_of(params), floats_of(grads)

    def held(level: Array) -> list[Array]:
        answers = _answers(optimizer, params, grads, level)
        return [_is_held(one) for one in jax.tree.leaves(answers)]

    levels = FACTORS[-2] ** -np.arange(1.0, 4.0)  # a part of the gradient, and of that
    masks = jax.lax.map(held, jnp.asarray(levels, jnp.float32))
    pairs = [
        (jnp.sum(jnp.where(jnp.any(mask, 0), one, 0)), jnp.sum(one))
        for mask, leaf in zip(masks, jax.tree.leaves(grads), strict=True)
        for one in (jnp.abs(in_float32(leaf)) ** 2,)
    ]
    part, whole = (functools.reduce(jnp.add, one) for one in zip(*pairs, strict=True))
    return (part / jnp.where(whole == 0, 1, whole)).astype(jnp.float32)


def _is_held(answers: Array) -> Array:
    """Which elements answer to the two largest factors in the same way."""
    steps = jnp.abs(answers[1:] - answers[:-1])
    largest = jnp.max(steps, 0)
    rounding = 1e-6 * jnp.max(jnp.abs(answers), 0)
    return (steps[-1] <= TOLERANCE * largest + rounding / 10) & (largest > rounding)


@functools.partial(jax.jit, static_argnums=0)
def _clipping(optimizer: optax.GradientTransformation, params: Params) -> Clipping:
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(0), max(len(leaves), 1))
    signs = [
        jax.random.rademacher(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=False)
    ]
    direction = jax.tree.unflatten(structure, signs)

    def of_level(level: Array) -> tuple[Array, Array]:
        answers = _answers(optimizer, params, direction, level)
        found = [_limit(one) for one in jax.tree.leaves(answers)]
        clips, first = (jnp.stack(one) for one in zip(*found, strict=True))
        return clips, jnp.where(clips, level * jnp.asarray(FACTORS)[first], jnp.inf)

    clips, thresholds = jax.lax.map(of_level, jnp.asarray(LEVELS, jnp.float32))
    threshold = jnp.min(thresholds, 0).astype(jnp.float32)
    return Clipping(jnp.any(clips, 0), threshold)


def _answers(
    optimizer: optax.GradientTransformation,
    params: Params,
    direction: PyTree,
    level: Array,
) -> PyTree:
    """Returns the sum of the updates by probes of all factors, [factors, ...]."""
    extended = optax.with_extra_args_support(optimizer)

    def step(state: PyTree, size: Array) -> tuple[PyTree, PyTree]:
        grads = jax.tree.map(lambda one: (size * one).astype(one.dtype), direction)
        value_fn = functools.partial(linear, params, grads)
        updates, state = extended.update(
            grads, state, params, value=value_fn(params), grad=grads, value_fn=value_fn
        )
        return state, jax.tree.map(in_float32, updates)

    def run(state: PyTree, size: Array) -> tuple[PyTree, PyTree]:
        return jax.lax.scan(step, state, jnp.broadcast_to(size, (NUM_STEPS,)))

    warm, _ = run(extended.init(params), level)

    def probe(factor: Array) -> PyTree:
        _, updates = run(warm, factor * level)
        return jax.tree.map(lambda one: jnp.sum(one, 0), updates)

    return jax.lax.map(probe, jnp.asarray(FACTORS, jnp.float32))


def _limit(answers: Array) -> tuple[Array, Array]:
    """Tells whether answers stop changing, and from which one on."""
    answers = answers.reshape(len(answers), -1)
    steps = jnp.linalg.norm(answers[1:] - answers[:-1], axis=1)
    rounding = 1e-6 * jnp.max(jnp.linalg.norm(answers, axis=1))
    largest = jnp.max(steps)
    is_still = steps <= TOLERANCE * largest + rounding / 10
    # From here to the end, and for two steps at least.
    still_to_the_end = jnp.cumprod(is_still[::-1].astype(jnp.int32))[::-1] > 0
    clips = still_to_the_end[-2] & (largest > 100 * rounding)
    return clips, jnp.argmax(still_to_the_end)
