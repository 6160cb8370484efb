"""Short trainings of a network, as it is and with something repaired.

A copy differs from the user's program in numbers alone, so that one compiled scan
trains any of them: plain, with standardized inputs, at another rate, with fresh
weights, without its last activation.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nnsanity._tree import accumulation_dtype, in_float32, is_inexact, take_examples
from nnsanity._types import Array, Params, PyTree
from nnsanity.checks.results import quality
from nnsanity.problem import Problem
from nnsanity.tracing.replace import LayerValues, Replacement, replaced

HELD_OUT_SHARE = 0.2
MIN_EXAMPLES_TO_HOLD_OUT = 100
MAX_EVALUATED = 1000
NUM_MARKS = 10
"""At how many times a trial is evaluated after its start."""
OFF, ON = np.bool_(0), np.bool_(1)
HEAD_KEPT, HEAD_LEFT_OUT, HEAD_SQUASHED = range(3)
LEAK = 0.1
"""Slope on the left of the leaky ReLU that stands in for a hidden activation."""


class Copy(NamedTuple):
    """A program to train; ``plain`` makes the user's own.

    Attributes:
        params: what it starts from.
        input_shift: tree like the inputs; subtracted first.
        input_scale: tree like the inputs; divided by then.
        target_shift: subtracted from the targets first.
        target_scale: what they are divided by then.
        update_scale: float32[], factor of every update: 10 is ten times the rate.
        penalty_scale: float32[], factor of the penalties inside the loss.
        head: int32[], what becomes of the last activation: ``HEAD_KEPT``,
            ``HEAD_LEFT_OUT`` or ``HEAD_SQUASHED``, softmax or sigmoid in its place.
        leaky: bool[], whether hidden activations are replaced by leaky ReLU.
        skip: bool[], whether layers add their input to their output where that fits.
        noise: bool[], whether it trains on ``train_loss_fn``.
    """

    params: Params
    input_shift: PyTree
    input_scale: PyTree
    target_shift: Array
    target_scale: Array
    update_scale: Array
    penalty_scale: Array
    head: Array
    leaky: Array | np.bool_
    skip: Array | np.bool_
    noise: Array | np.bool_


class Outcome(NamedTuple):
    """How a training went.

    Attributes:
        batch_losses: float32[steps], of the batches, before each step.
        losses: float32[marks + 1], on examples that it trains on, at the start and then
            at even distances.
        seen_quality: float32[marks + 1], on the same examples.
        quality: float32[marks + 1], on examples held out; 1 is perfect, 0 a constant,
            NaN where outputs can't be compared with targets.
        validation_losses: float32[marks + 1], on the user's own validation data; NaN
            where there are none.
        validation_quality: float32[marks + 1], on the same.
        params: at the end.
    """

    batch_losses: Array
    losses: Array
    seen_quality: Array
    quality: Array
    validation_losses: Array
    validation_quality: Array
    params: Params


class Trial(NamedTuple):
    """What is needed to train copies.

    Attributes:
        train: ``train(copy, key) -> Outcome``, compiled once.
        plain: the user's own program.
        num_steps: how long it trains.
        batch_size: examples in one step.
    """

    train: functools.partial[Outcome]
    plain: Copy
    num_steps: int
    batch_size: int


def prepare(problem: Problem, key: Array, *, num_steps: int, batch_size: int) -> Trial:
    """Builds the trial of a problem; compiles nothing yet.

    A fifth of the data is held out to tell learning from memorizing, where there are
    enough examples.

    Args:
        problem: with an optimizer.
        key: consumed; which examples are held out.
        num_steps: steps of every training.
        batch_size: examples in one step.
    """
    seen, held_out = _split(problem, key)
    batch_size = min(batch_size, len(seen))
    marks = min(NUM_MARKS, num_steps)
    per_mark = num_steps // marks
    rows = (seen, seen[:MAX_EVALUATED], held_out[:MAX_EVALUATED])
    train = functools.partial(
        jax.jit(functools.partial(_train, problem, batch_size, marks, per_mark)),
        problem.batch(slice(None)),
        take_examples(problem.validation, slice(MAX_EVALUATED)),
        rows,
    )
    return Trial(train, plain(problem), marks * per_mark, batch_size)


def with_inputs(trial: Trial, inputs: PyTree) -> Trial:
    """Returns the trial on other inputs of the same shapes; compiles nothing anew."""
    (_, targets), *rest = trial.train.args
    train = functools.partial(trial.train.func, (inputs, targets), *rest)
    return trial._replace(train=train)


def plain(problem: Problem) -> Copy:
    """Returns the user's own program as a copy."""
    one = jnp.float32(1)
    targets = problem.targets if problem.kind == "numbers" else one
    return Copy(
        params=problem.params,
        input_shift=jax.tree.map(lambda leaf: _per_feature(leaf, 0), problem.inputs),
        input_scale=jax.tree.map(lambda leaf: _per_feature(leaf, 1), problem.inputs),
        target_shift=_per_feature(targets, 0),
        target_scale=_per_feature(targets, 1),
        update_scale=one,
        penalty_scale=one,
        head=jnp.int32(HEAD_KEPT),
        leaky=OFF,
        skip=OFF,
        noise=OFF if problem.train_loss_fn is None else ON,
    )


def _per_feature(values: Array, fill: float) -> Array:
    """Returns an array of the shape that ``feature_moments`` gives."""
    shape = values.shape[-1:] if values.ndim > 1 else ()
    return jnp.full(shape, fill, accumulation_dtype(values))


def train_copies(trial: Trial, copies: Sequence[tuple[Copy, Array]]) -> list[Outcome]:
    """Trains copies, each with its own key.

    One after another on a CPU, where batching the small products was measured to be
    slower; the compiled program is the same for all of them.
    """
    return [jax.device_get(trial.train(copy, key)) for copy, key in copies]


def _split(problem: Problem, key: Array) -> tuple[np.ndarray, np.ndarray]:
    order = np.asarray(jax.random.permutation(key, problem.size))
    if problem.size < MIN_EXAMPLES_TO_HOLD_OUT:
        return order, order
    num_held_out = min(int(HELD_OUT_SHARE * problem.size), MAX_EVALUATED)
    return order[num_held_out:], order[:num_held_out]


def _train(
    problem: Problem,
    batch_size: int,
    marks: int,
    per_mark: int,
    data: tuple[PyTree, PyTree],
    validation: tuple[PyTree, PyTree] | None,
    rows: tuple[Array, Array, Array],
    copy: Copy,
    key: Array,
) -> Outcome:
    """Trains one copy; pure, compiled as one scan."""
    seen, seen_evaluated, held_out = rows
    order_key, noise_key = jax.random.split(key)
    optimizer = problem.optimizer or optax.identity()
    loss_fn = _loss_of(problem, copy)
    quiet_loss_fn = _replaced_loss(problem, copy)
    apply_fn = _network_of(problem, copy)
    num_steps = marks * per_mark
    batches = _batch_rows(order_key, seen, num_steps, batch_size)
    noise_keys = jax.random.split(noise_key, num_steps)

    def step(state: tuple, now: tuple) -> tuple[tuple, Array]:
        params, optimizer_state = state
        batch_rows, step_key = now
        batch = _prepared(problem, copy, take_examples(data, batch_rows))
        loss, grads = jax.value_and_grad(loss_fn, allow_int=True)(
            params, batch, step_key
        )
        floats = _floats(params, params)
        updates, optimizer_state = optimizer.update(
            _floats(params, grads), optimizer_state, floats
        )
        updates = jax.tree.map(
            lambda update: (update * copy.update_scale).astype(update.dtype), updates
        )
        moved = optax.apply_updates(floats, updates)
        return (_with_floats(params, moved), optimizer_state), loss

    def evaluate(params: Params) -> tuple[Array, ...]:
        on_seen = _prepared(problem, copy, take_examples(data, seen_evaluated))
        on_held_out = _prepared(problem, copy, take_examples(data, held_out))
        batches = [on_seen, on_held_out]
        losses = [in_float32(quiet_loss_fn(params, on_seen)), jnp.float32(jnp.nan)]
        if validation is not None:
            batches.append(_prepared(problem, copy, validation))
            losses[1] = in_float32(quiet_loss_fn(params, batches[-1]))
        qualities = _qualities(problem, apply_fn, params, *batches)
        qualities += [jnp.float32(jnp.nan)] * (3 - len(batches))
        return (losses[0], *qualities[:2], losses[1], qualities[2])

    def mark(state: tuple, now: tuple) -> tuple[tuple, tuple]:
        state, losses = jax.lax.scan(step, state, now)
        return state, (losses, evaluate(state[0]))

    state = (copy.params, optimizer.init(_floats(copy.params, copy.params)))
    by_mark = jax.tree.map(
        lambda leaf: leaf.reshape(marks, per_mark, *leaf.shape[1:]),
        (batches, noise_keys),
    )
    (params, _), (batch_losses, later) = jax.lax.scan(mark, state, by_mark)
    curves = jax.tree.map(
        lambda first, rest: jnp.concatenate([first[None], rest]),
        evaluate(copy.params),
        later,
    )
    losses, seen, held, validation_losses, validation_quality = curves
    return Outcome(
        in_float32(batch_losses.reshape(-1)),
        losses,
        seen,
        held,
        validation_losses,
        validation_quality,
        params,
    )


def _batch_rows(key: Array, rows: Array, num_steps: int, batch_size: int) -> Array:
    """Returns int[steps, batch]: the data in a new order for every epoch."""
    per_epoch = len(rows) // batch_size
    num_epochs = -(-num_steps // per_epoch)
    orders = jax.vmap(lambda one: jax.random.permutation(one, rows))(
        jax.random.split(key, num_epochs)
    )
    batches = orders[:, : per_epoch * batch_size].reshape(-1, batch_size)
    return batches[:num_steps]


def _prepared(
    problem: Problem, copy: Copy, batch: tuple[PyTree, PyTree]
) -> tuple[PyTree, PyTree]:
    """Applies the copy's changes to the data."""
    inputs, targets = batch
    if not problem.tokens:
        inputs = jax.tree.map(_affine, inputs, copy.input_shift, copy.input_scale)
    if problem.kind == "numbers":
        targets = _affine(targets, copy.target_shift, copy.target_scale)
    return inputs, targets


def _affine(values: Array, shift: Array, scale: Array) -> Array:
    if not is_inexact(values):
        values = in_float32(values)
    return ((values - shift) / scale).astype(values.dtype)


def _floats(params: Params, tree: PyTree) -> PyTree:
    """Keeps what stands where the parameters are floating-point, and None elsewhere."""
    return jax.tree.map(
        lambda leaf, one: one if is_inexact(leaf) else None, params, tree
    )


def _with_floats(params: Params, floats: PyTree) -> Params:
    """Puts back what ``_floats`` left out."""
    moved = iter(jax.tree.leaves(floats))
    return jax.tree.map(lambda leaf: next(moved) if is_inexact(leaf) else leaf, params)


def _replacements(problem: Problem, copy: Copy) -> dict[str, Replacement]:
    """Says what a copy puts in the place of each layer's output."""
    head = None if problem.head is None else problem.head.layer.name
    found = {}
    for one in problem.network.layers:
        if one.layer.name == head:
            found[one.layer.name] = _head(problem, copy)
        elif one.activation is not None:
            found[one.layer.name] = _hidden(copy)
    return found


def _head(problem: Problem, copy: Copy) -> Replacement:
    squash = jax.nn.sigmoid if problem.kind == "binary" else jax.nn.softmax

    def combine(values: LayerValues) -> Array:
        left_out = jnp.where(copy.head == HEAD_LEFT_OUT, values.before, values.after)
        if problem.kind in (None, "numbers"):
            return left_out
        return jnp.where(copy.head == HEAD_SQUASHED, squash(values.before), left_out)

    return Replacement(
        combine, lambda before: jnp.where(copy.head == HEAD_KEPT, before, 0)
    )


def _hidden(copy: Copy) -> Replacement:
    def combine(values: LayerValues) -> Array:
        leaky = jax.nn.leaky_relu(values.before, LEAK)
        after = jnp.where(copy.leaky, leaky, values.after)
        entering = values.entering
        if entering is None or entering.shape != after.shape:
            return after
        return jnp.where(copy.skip, after + entering, after)

    return Replacement(combine, lambda before: jnp.where(copy.leaky, 0, before))


def _network_of(problem: Problem, copy: Copy) -> Callable:
    return replaced(problem.apply_fn, problem.network, _replacements(problem, copy))


def _replaced_loss(problem: Problem, copy: Copy) -> Callable:
    return replaced(
        problem.loss_fn,
        problem.network,
        _replacements(problem, copy),
        penalty_scale=copy.penalty_scale,
    )


def _loss_of(problem: Problem, copy: Copy) -> Callable:
    """Returns ``loss(params, batch, key)`` of a copy."""
    quiet = _replaced_loss(problem, copy)
    if problem.train_loss_fn is None:
        return lambda params, batch, key: quiet(params, batch)
    noisy = replaced(
        problem.train_loss_fn,
        problem.network,
        _replacements(problem, copy),
        penalty_scale=copy.penalty_scale,
    )
    return lambda params, batch, key: jax.lax.cond(
        copy.noise,
        lambda: noisy(params, batch, key),
        lambda: quiet(params, batch).astype(jnp.result_type(float)),
    )


def _qualities(
    problem: Problem, apply_fn: Callable, params: Params, *batches: tuple
) -> list[Array]:
    """Returns the quality on each batch, from one pass over all of them."""
    if problem.kind is None:
        return [jnp.float32(jnp.nan) for _ in batches]
    inputs = jax.tree.map(
        lambda *leaves: jnp.concatenate(leaves), *(b[0] for b in batches)
    )
    outputs = apply_fn(params, inputs)
    ends = np.cumsum([len(jax.tree.leaves(batch[0])[0]) for batch in batches])
    parts = jnp.split(outputs, ends[:-1])
    return [
        quality(part, batch[1], problem.kind)
        for part, batch in zip(parts, batches, strict=True)
    ]
