"""The random numbers that a program draws, and the share of values that they drop."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax

from nnsanity._types import ApplyFn, Array, Params, PyTree
from nnsanity.tracing.ancestry import constant, ordered, viewed
from nnsanity.tracing.bounds import Reading, read
from nnsanity.tracing.intervals import Value

DRAWS = frozenset(
    {"random_bits", "random_gamma", "rng_bit_generator", "rng_uniform", "threefry2x32"}
)
"""Operations that draw random numbers from a key."""


class Dropout(NamedTuple):
    """A place where a program sets values to zero at random.

    Attributes:
        where: the user's line, ``"train.py:41 (loss_fn)"``.
        rate: share of the values that become zero; 0.1 to 0.25 is usual.
        shape: of the mask.
    """

    where: str
    rate: float
    shape: tuple[int, ...]


def dropout_rates(
    train_loss_fn: Callable, params: Params, batch: PyTree, *, key: Array
) -> tuple[Dropout, ...]:
    """Reads from a program which share of its values it drops, and where.

    Finds each comparison of uniform random numbers with a constant that decides what is
    kept, whoever wrote it.  0.25 or 0.1 is a good start; worry above 0.7, and where
    none is found in a network that learns its examples by heart.

    Reads the program, no arithmetic; shapes suffice.

    Args:
        train_loss_fn: ``train_loss_fn(params, batch, key)``, with its noise on; what it
            returns is not looked at.
        params: any pytree of arrays or ``jax.ShapeDtypeStruct``.
        batch: any pytree of the same.
        key: a PRNG key, or its shape; its value is not used.

    Returns:
        One ``Dropout`` for each place, in the order of the program.  A rate that is not
        known before the run, as one that is scheduled, is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> def train_loss_fn(params, batch, key):
        ...     kept = jax.random.bernoulli(key, 0.75, batch.shape)
        ...     return jnp.mean(jnp.where(kept, batch / 0.75, 0.0) @ params)
        >>> found = dropout_rates(
        ...     train_loss_fn, jnp.ones(3), jnp.ones((4, 3)), key=jax.random.key(0)
        ... )
        >>> [(one.rate, one.shape) for one in found]
        [(0.25, (4, 3))]

    References:
        N. Srivastava et al., "Dropout" (JMLR 2014).
    """
    reading = read(train_loss_fn, params, batch, key)
    found: dict[int, Dropout] = {}
    for value in ordered(reading.outputs):
        for mask, rate in _dropped(value):
            found.setdefault(id(mask), Dropout(reading.place(mask), rate, mask.shape))
    return tuple(found.values())


def _dropped(value: Value) -> Iterator[tuple[Value, float]]:
    """Yields the comparison that decides what becomes zero, and how often it does."""
    if value.name == "select_n" and len(value.operands) == 3:
        which, *cases = value.operands
        zeros = [constant(one) == 0 for one in cases]
        if zeros[0] != zeros[1]:
            yield from _with_rate(which, dropped_if=zeros[1])
    elif value.name in ("mul", "div"):
        for one in value.operands[: 1 + (value.name == "mul")]:
            yield from _with_rate(one, dropped_if=False)


def _with_rate(mask: Value, *, dropped_if: bool) -> Iterator[tuple[Value, float]]:
    """Follows a mask, or a multiple of it, to a comparison with a random number."""
    for _ in range(40):
        mask = viewed(mask)
        if mask.name == "not" or (
            mask.name == "sub" and constant(mask.operands[0]) == 1
        ):
            dropped_if = not dropped_if
            mask = mask.operands[-1]
        elif mask.name in ("div", "mul") and constant(mask.operands[1]) is not None:
            mask = mask.operands[0]
        else:
            break
    if mask.name not in ("lt", "le", "gt", "ge"):
        return
    smaller, larger = mask.operands if mask.name[0] == "l" else mask.operands[::-1]
    if _is_uniform(smaller):
        share = _share_below(smaller, larger)
    elif _is_uniform(larger):
        share = 1 - _share_below(larger, smaller)
    else:
        return
    yield mask, round(share if dropped_if else 1 - share, 6)


def _share_below(random: Value, limit: Value) -> float:
    """Returns the probability that a uniform number lies below a limit."""
    low, high = float(random.low.min()), float(random.high.max())
    least, most = float(limit.low.min()), float(limit.high.max())
    is_known = most - least <= 1e-5 * (high - low)  # it is computed, and so rounded
    if not is_known or not high > low:
        return math.nan
    return min(max(((least + most) / 2 - low) / (high - low), 0.0), 1.0)


def _is_uniform(value: Value) -> bool:
    """Tells random bits behind the exponent of 1, moved and scaled by constants."""
    for _ in range(40):
        value = viewed(value)
        if value.name == "bitcast_convert_type":
            return any(one.name in DRAWS for one in ordered([value]))
        rest = [one for one in value.operands if constant(one) is None]
        if value.name not in ("sub", "add", "mul", "max") or len(rest) != 1:
            return False
        value = rest[0]
    return False


def noise_at_evaluation(
    apply_fn: ApplyFn, params: Params, inputs: PyTree, *, reading: Reading
) -> tuple[str, ...]:
    """Says where a network draws a random number for each of its examples.

    Random numbers of a fixed key that do not grow with the number of examples, as
    random features, are a part of the network.

    Args:
        apply_fn: ``apply_fn(params, inputs) -> outputs``, in evaluation mode.
        params: any pytree of arrays or shapes.
        inputs: the same; the leading axis are the examples.
        reading: of ``apply_fn`` on these.

    Returns:
        The user's lines; empty where nothing is drawn that reaches the outputs.
    """
    draws = [one for one in ordered(reading.outputs) if one.name in DRAWS]
    if not draws:
        return ()
    sizes = [leaf.shape[0] for leaf in jax.tree.leaves(inputs) if leaf.shape]
    more = _with_more_examples(apply_fn, params, inputs, max(sizes, default=1))
    if more is None:
        drawn = [one for one in draws if set(one.shape) & set(sizes)]
    else:
        others = [one.shape for one in ordered(more.outputs) if one.name in DRAWS]
        drawn = draws if len(draws) != len(others) else []
        pairs = zip(draws, others, strict=False)
        drawn = drawn or [one for one, shape in pairs if one.shape != shape]
    given = {id(one) for one in reading.inputs}
    drawn += [one for one in draws if given & {id(x) for x in ordered([one])}]
    return tuple(dict.fromkeys(reading.place(one) for one in drawn))


def _with_more_examples(
    apply_fn: ApplyFn, params: Params, inputs: PyTree, size: int
) -> Reading | None:
    """Reads a network on twice as many examples; None where it wants just as many."""

    def doubled(leaf: Array) -> Array | jax.ShapeDtypeStruct:
        if leaf.shape[:1] != (size,):
            return leaf
        return jax.ShapeDtypeStruct((2 * size, *leaf.shape[1:]), leaf.dtype)

    try:
        return read(apply_fn, params, jax.tree.map(doubled, inputs))
    except Exception:
        return None
