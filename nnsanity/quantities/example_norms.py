"""How hard single examples pull at the parameters, and batches cut into chunks."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from nnsanity._tree import (
    accumulation_dtype,
    inexact_leaves,
    is_inexact,
    leaf_names,
    num_examples,
)
from nnsanity._types import Array, LossFn, Params, PyTree
from nnsanity.quantities.example_gradients import (
    GradientFn,
    as_array,
    gradient_of,
    gradients_of,
    squares,
)
from nnsanity.tracing.convolutions import channels_last
from nnsanity.tracing.coupling import coupled_lines

MAX_EXAMPLES = 1024
"""Most examples that are run side by side."""
MAX_BYTES = 2**28
"""Most bytes of example gradients that are written out at a time; a single one may
take more."""
_ARRAY_LIKE = (jax.Array, np.ndarray, np.generic, int, float, complex)


def example_gradient_norms(loss_fn: LossFn, params: Params, batch: PyTree) -> Array:
    """Returns how hard each example pulls at the parameters.

    The norm of ``jax.grad(loss_fn)(params, batch[i:i+1])`` over all floating-point
    leaves, for every i.  Worry where a few examples outweigh all others: they drive the
    step, and are often outliers or wrong labels.  NaN marks examples that break the
    gradient.  A loss that is a sum, a mean over a mask or has a penalty is taken as it
    is on one example.

    Costs about one gradient of the batch, and its memory, where the weights meet the
    data in matrix products, convolutions and look-ups, also inside of loops, of
    ``remat``, and used several times: their gradients are not written out where that
    takes more than comparing positions in pairs.  Weights that are changed before they
    are used (masked, normalized, cut out of a larger array), and those inside of
    branches, cost one gradient for each example, of which at most 256 MiB are in memory
    at a time, but always one; ``ways`` tells which these are.  Squares are float32:
    norms under 1e-19 may come back as 0, over 1e19 as infinite.

    Args:
        loss_fn: ``loss_fn(params, batch) -> scalar``.
        params: any pytree of arrays; of its leaves the floating-point ones count.
        batch: any pytree of arrays, leading axis the examples.

    Returns:
        float32[examples].

    Raises:
        TypeError: if a leaf of the batch is not an array.
        ValueError: if the leaves of the batch differ in their number of examples,
            ``params`` has no floating-point leaf, the loss is not such a scalar, or
            examples change each other's outputs (batch normalization in training mode).

    Example:
        >>> loss_fn = lambda params, x: jnp.mean(x @ params["w"])
        >>> x = jnp.array([[3.0, 4.0], [0.0, -2.0]])
        >>> example_gradient_norms(loss_fn, {"w": jnp.zeros(2)}, x)
        Array([5., 2.], dtype=float32)

    References:
        Goodfellow (2015), "Efficient per-example gradient computations"; Rochette,
        Manoel and Tramel (2019), "Efficient per-example gradient computations in
        convolutional neural networks"; Li et al. (2022), "Large language models can be
        strong differentially private learners", section 4, for the pairs of positions.
    """
    check_examples("example_gradient_norms", params, batch)
    return _example_gradient_norms(loss_fn, params, batch)


@functools.partial(jax.jit, static_argnums=0)
def _example_gradient_norms(loss_fn: LossFn, params: Params, batch: PyTree) -> Array:
    gradient_fn = gradient_of("example_gradient_norms", loss_fn, params)
    check_apart("example_gradient_norms", loss_fn, params, batch)

    def step(_: None, chunk: PyTree) -> tuple[None, Array]:
        return None, jnp.sum(squares(gradients_of(gradient_fn, chunk)), 0)

    _, found = over_chunks(step, None, batch, chunk_size(gradient_fn, batch))
    return jnp.sqrt(found).astype(jnp.float32)


def ways(loss_fn: LossFn, params: Params, batch: PyTree) -> dict[str, str]:
    """Says how the gradients of single examples are had, leaf by leaf.

    Reads the program; shapes suffice and no arithmetic is done.

    Args:
        loss_fn: ``loss_fn(params, batch) -> scalar``.
        params: as in ``example_gradient_norms``.
        batch: as in ``example_gradient_norms``.

    Returns:
        For each floating-point leaf, in leaf order: ``"factors"`` where the gradients
        are never written out, ``"written"`` where they are, ``"constant"`` where they
        are the same for all examples.
    """
    names = [
        name
        for name, leaf in zip(leaf_names(params), jax.tree.leaves(params), strict=True)
        if is_inexact(leaf)
    ]
    found: list[str] = []

    def look(params: Params, batch: PyTree) -> None:
        gradient_fn = gradient_of("ways", loss_fn, params)
        for one in gradients_of(gradient_fn, batch).leaves:
            is_constant = one.array is None and not one.terms
            written = "constant" if is_constant else "written"
            found.append("factors" if one.terms else written)

    jax.eval_shape(look, params, batch)
    return dict(zip(names, found, strict=True))


def chunk_size(gradient_fn: GradientFn, batch: PyTree) -> int:
    """Returns how many examples to run side by side.

    Args:
        gradient_fn: of the loss.
        batch: leading axis the examples.
    """
    count = num_examples(batch)
    num_bytes = sum(
        np.size(leaf) * accumulation_dtype(leaf).itemsize
        for leaf in gradient_fn.trained
    )
    if count > 1 and count * num_bytes > MAX_BYTES:
        num_bytes = _bytes_written(gradient_fn, batch)
    most = max(1, min(count, MAX_EXAMPLES, MAX_BYTES // max(num_bytes, 1)))
    divisors = (size for size in range(most, most // 2, -1) if count % size == 0)
    return next(divisors, most)  # rather somewhat smaller chunks than a rest


def _bytes_written(gradient_fn: GradientFn, batch: PyTree) -> int:
    """Returns what is written out for each example."""
    found = 0

    def look(batch: PyTree) -> None:
        nonlocal found
        gradients = gradients_of(gradient_fn, batch)
        arrays = [one.array for one in gradients.leaves if one.array is not None]
        found = sum(
            array[0].size * accumulation_dtype(array).itemsize for array in arrays
        )

    jax.eval_shape(look, batch)
    return found


def over_chunks(
    step: Callable, start: PyTree, batch: PyTree, size: int
) -> tuple[PyTree, Array]:
    """Like ``lax.scan`` over chunks of examples, with a result for each example.

    Chunks of neighbours would gather a batch that is sharded over devices.

    Args:
        step: ``step(state, chunk) -> (state, results)``, results [..., examples].
        start: the first state.
        batch: leading axis the examples.
        size: of a chunk.
    """
    num_chunks, rest = divmod(num_examples(batch), size)
    batch = jax.tree.map(as_array, batch)
    if (num_chunks, rest) == (1, 0):
        return step(start, batch)
    length = num_chunks * size

    def spread(leaf: Array) -> Array:
        split = leaf[:length].reshape(size, num_chunks, *leaf.shape[1:])
        return split.swapaxes(0, 1)

    state, rows = jax.lax.scan(channels_last(step), start, jax.tree.map(spread, batch))
    rows = jnp.moveaxis(rows, 0, -1).reshape(*rows.shape[1:-1], length)
    if rest:
        state, last = step(state, jax.tree.map(lambda leaf: leaf[length:], batch))
        rows = jnp.concatenate([rows, last], -1)
    return state, rows


def check_examples(caller: str, params: Params, batch: PyTree) -> int:
    """Returns the number of examples, where both trees are what they should be.

    Args:
        caller: name of the public function, for the message.
        params: what the user gave for them.
        batch: what the user gave for it.
    """
    if not inexact_leaves(params):
        raise ValueError(f"{caller}: params must have floating-point leaves, got none")
    shapes = {}
    names, leaves = leaf_names({"batch": batch}), jax.tree.leaves(batch)
    for name, leaf in zip(names, leaves, strict=True):
        is_text = isinstance(leaf, np.ndarray) and leaf.dtype.kind in "OSUMm"
        if is_text or not isinstance(leaf, _ARRAY_LIKE):
            raise TypeError(
                f"{caller}: batch must be a tree of arrays of numbers, got"
                f" {type(leaf).__name__} at {name}; leave it out"
            )
        shapes[name] = np.shape(leaf)
    lengths = {shape[:1] for shape in shapes.values()}
    if len(lengths) != 1 or lengths & {(), (0,)}:
        raise ValueError(
            f"{caller}: the leaves of batch must have a leading axis of the same number"
            f" of examples, at least 1, got {shapes}; is one a scalar, or cut short?"
        )
    return lengths.pop()[0]


def check_apart(caller: str, loss_fn: LossFn, params: Params, batch: PyTree) -> None:
    """Raises where examples change each other's outputs.

    Args:
        caller: name of the public function, for the message.
        loss_fn: ``loss_fn(params, batch) -> scalar``.
        params: any pytree of arrays.
        batch: leading axis the examples.
    """
    lines = coupled_lines(loss_fn, params, batch) if num_examples(batch) > 1 else ()
    if lines:
        raise ValueError(
            f"{caller}: the examples of a batch change each other's outputs at"
            f" {lines[0]}, as batch normalization in training mode does, so that none"
            " has a gradient of its own; let the network use its running statistics"
        )
