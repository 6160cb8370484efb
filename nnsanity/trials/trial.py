"""Short trainings of a network, as it is and with something repaired."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from nnsanity._tree import in_float32, take_examples
from nnsanity._types import Array, Params, PyTree
from nnsanity.quantities.descent import floats_of, times, with_floats
from nnsanity.quantities.targets import quality
from nnsanity.tracing.convolutions import channels_last
from nnsanity.trials.copies import (
    Copy,
    loss_of,
    network_of,
    plain,
    prepared,
    quiet_loss_of,
)
from nnsanity.trials.outlying import MOST_LEFT_OUT
from nnsanity.trials.problem import Problem

HELD_OUT_SHARE = 0.2
MIN_EXAMPLES_TO_HOLD_OUT = 100
MAX_EVALUATED = 1000
NUM_MARKS = 10
"""At how many times a trial is evaluated after its start."""


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
        kept: parameters after the mark that the copy names; by default at the start.
    """

    batch_losses: Array
    losses: Array
    seen_quality: Array
    quality: Array
    validation_losses: Array
    validation_quality: Array
    params: Params
    kept: Params


class Trial(NamedTuple):
    """What is needed to train copies.

    Attributes:
        train: ``train(copy, key) -> Outcome``, compiled once.
        plain: the user's own program.
        num_steps: how long it trains.
        per_mark: steps from one mark to the next.
        batch_size: examples in one step.
        num_held_out: examples that tell learning from memorizing.
    """

    train: functools.partial[Outcome]
    plain: Copy
    num_steps: int
    per_mark: int
    batch_size: int
    num_held_out: int


def prepare(problem: Problem, key: Array, *, num_steps: int, batch_size: int) -> Trial:
    """Builds the trial of a problem; compiles nothing yet.

    A fifth of the data is held out to tell learning from memorizing, where there are
    enough examples.  Examples whose targets look like slips are evaluated in no copy.

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
    counts = ~problem.left_out(problem.targets)
    rows = (seen, *(some[counts[some]][:MAX_EVALUATED] for some in (seen, held_out)))
    train = functools.partial(
        jax.jit(functools.partial(_train, problem, batch_size, marks, per_mark)),
        problem.batch(slice(None)),
        _validation(problem),
        rows,
    )
    num_steps = marks * per_mark
    return Trial(train, plain(problem), num_steps, per_mark, batch_size, len(rows[2]))


def _validation(problem: Problem) -> tuple[PyTree, PyTree] | None:
    """Returns the validation data that are evaluated.

    All of them where many lie outside the range of the training targets: these are no
    slips but a split from elsewhere, or in another unit.
    """
    if problem.validation is None:
        return None
    left_out = problem.left_out(problem.validation[1])
    counts = ~left_out | (left_out.mean() >= MOST_LEFT_OUT)
    return take_examples(problem.validation, np.flatnonzero(counts)[:MAX_EVALUATED])


def with_data(trial: Trial, data: tuple[PyTree, PyTree]) -> Trial:
    """Returns the trial on other data of the same shapes; compiles nothing anew."""
    _, *rest = trial.train.args
    train = functools.partial(trial.train.func, data, *rest)
    return trial._replace(train=train)


def train_copies(trial: Trial, copies: Sequence[tuple[Copy, Array]]) -> list[Outcome]:
    """Trains copies, each with its own key.

    One after another, by one compiled program.  On a CPU ``vmap`` over the copies was
    measured to be slower for all but tiny networks.
    """
    return [jax.device_get(trial.train(copy, key)) for copy, key in copies]


def mid_descent(losses: npt.ArrayLike) -> int:
    """Returns the mark whose loss is nearest to the middle between start and lowest.

    0, the start, where the loss does not fall.
    """
    values = np.asarray(losses, np.float64)
    values = np.where(np.isfinite(values), values, np.inf)
    lowest = values.min()
    if not lowest < values[0] < np.inf:
        return 0
    return int(np.argmin(np.abs(values - (values[0] + lowest) / 2)))


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
    optimizer = optax.with_extra_args_support(problem.optimizer or optax.identity())
    loss_fn = loss_of(problem, copy)
    quiet_loss_fn = quiet_loss_of(problem, copy)
    apply_fn = network_of(problem, copy)
    num_steps = marks * per_mark
    batches = _batch_rows(order_key, seen, num_steps, batch_size)
    noise_keys = jax.random.split(noise_key, num_steps)

    def step(state: tuple, now: tuple) -> tuple[tuple, Array]:
        params, optimizer_state = state
        batch_rows, step_key = now
        batch = prepared(problem, copy, take_examples(data, batch_rows))
        loss, grads = jax.value_and_grad(loss_fn, allow_int=True)(
            params, batch, step_key
        )
        floats, grads = floats_of(params), floats_of(grads)
        updates, optimizer_state = optimizer.update(
            times(copy.gradient_scale, grads),
            optimizer_state,
            times(copy.weight_scale, floats),
            value=loss,
            grad=grads,
            value_fn=lambda moved: loss_fn(with_floats(params, moved), batch, step_key),
        )
        updates = times(copy.update_scale, updates)
        moved = optax.apply_updates(floats, updates)
        return (with_floats(params, moved), optimizer_state), loss

    def evaluate(params: Params) -> tuple[Array, ...]:
        on_seen = prepared(problem, copy, take_examples(data, seen_evaluated))
        on_held_out = prepared(problem, copy, take_examples(data, held_out))
        batches = [on_seen, on_held_out]
        losses = [in_float32(quiet_loss_fn(params, on_seen)), jnp.float32(jnp.nan)]
        if validation is not None:
            batches.append(prepared(problem, copy, validation))
            losses[1] = in_float32(quiet_loss_fn(params, batches[-1]))
        qualities = _qualities(problem, apply_fn, params, *batches)
        qualities += [jnp.float32(jnp.nan)] * (3 - len(batches))
        return (losses[0], *qualities[:2], losses[1], qualities[2])

    def mark(state: tuple, now: tuple) -> tuple[tuple, tuple]:
        training, kept = state
        index, *steps = now
        training, losses = jax.lax.scan(step, training, tuple(steps))
        is_kept = index == copy.kept_mark
        kept = jax.lax.cond(is_kept, lambda: training[0], lambda: kept)
        return (training, kept), (losses, evaluate(training[0]))

    state = (copy.params, optimizer.init(floats_of(copy.params)))
    by_mark = jax.tree.map(
        lambda leaf: leaf.reshape(marks, per_mark, *leaf.shape[1:]),
        (batches, noise_keys),
    )
    ((params, _), kept), (batch_losses, later) = jax.lax.scan(
        channels_last(mark), (state, copy.params), (jnp.arange(1, marks + 1), *by_mark)
    )
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
        kept,
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
