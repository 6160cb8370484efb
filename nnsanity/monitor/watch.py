"""The functions of a monitor: arrays in, arrays out, inside of the user's own step."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nnsanity._tree import inexact_leaves
from nnsanity._types import Array, LossFn, Params, PyTree
from nnsanity.findings import Finding
from nnsanity.monitor.looks import (
    Look,
    Trees,
    over_microbatches,
    placed_like,
    with_look,
)
from nnsanity.monitor.losses import seen_late, with_loss, with_validation
from nnsanity.monitor.merging import merged
from nnsanity.monitor.metrics import metrics_of
from nnsanity.monitor.names import (
    Names,
    check_scalar,
    check_step,
    names_of_network,
)
from nnsanity.monitor.state import (
    MonitorRecord,
    MonitorState,
    blank_state,
    record_of,
    state_of,
)
from nnsanity.monitor.verdicts import judge_monitor
from nnsanity.monitor.wrapping import wrapped
from nnsanity.signals import Signals
from nnsanity.tracing.compat import varies

WINDOW = 100
"""Watched steps without activity after which a unit counts as dead: 3,200 examples at a
batch of 32, where checks.md asks for 256."""


class Monitor(NamedTuple):
    """Functions of a monitor, as an optax transformation has them.

    Attributes:
        init: ``init(loss_fn, params, batch) -> state``, from shapes alone.
        due: ``due(state) -> bool[]``, whether to watch this step.
        update: ``update(state, loss=, signals=, grads=, updates=, params=) -> state``;
            ``params`` are those that the updates are added to, ``updates`` may be a
            function without arguments that makes them where they are looked at,
            ``signals`` may have a leading axis of microbatches.  Where it is known:
            ``microbatch_norms``, [k], global norms of the gradients whose mean
            ``grads`` is; ``validation_loss``, as in ``validate``; ``axis_name``, the
            axis of a ``shard_map`` over which the batch is split.
        validate: ``validate(state, validation_loss) -> state``, whenever the loss on
            other examples was computed.
        merge: ``merge(a, b) -> state``, of two hosts or two runs; associative.
        read: ``read(state) -> MonitorRecord``, what the state holds.
        metrics: ``metrics(state) -> dict[str, Array]``, finite float32 scalars; what is
            not finite is 0, and counted by ``"nonfinite/count"``; what was never given
            (a validation loss, microbatches) is 0 as well.
        diagnose: ``diagnose(state) -> tuple[Finding, ...]``, on the host.
        around: ``around(optimizer, loss_fn, batch)``, an optax transformation that
            watches another, alone or in a chain; its state is a ``MonitoredState``.
            Call ``tx.update(grads, opt_state, params, value=loss, signals=signals)``.
    """

    init: Callable[..., MonitorState]
    due: Callable[[MonitorState], Array | bool]
    update: Callable[..., MonitorState]
    validate: Callable[[MonitorState, Array], MonitorState]
    merge: Callable[[MonitorState, MonitorState], MonitorState]
    read: Callable[[MonitorState], MonitorRecord]
    metrics: Callable[[MonitorState], dict[str, Array]]
    diagnose: Callable[[MonitorState], tuple[Finding, ...]]
    around: Callable[..., optax.GradientTransformationExtraArgs]


def monitor(
    *, every: int = 1, window: int = WINDOW, clip_norm: float | None = None
) -> Monitor:
    """Watches a training from inside of its jitted step.

    Everything but the loss is looked at in every ``every``-th step, behind a branch of
    the compiled program; ``vmap`` turns the branch into a choice, so that there every
    step pays.  Gradients, updates and parameters are looked at, whatever ``every`` is,
    in the first step whose loss is not finite.  A watched step costs one read of
    gradients, updates and parameters.  Updates that are handed over are written to
    memory in every step, where a plain step adds them as it makes them; ``around``
    makes them a second time in the steps that are looked at instead, if ``every`` is
    above 1.

    A monitor knows the names of the network that it was last initialized for: take one
    for each network.  In a new process call ``init`` first, then restore the state from
    its checkpoint into the one that ``init`` made.

    Args:
        every: steps from one look to the next; 1 looks at each.
        window: looks without activity after which a unit counts as dead.
        clip_norm: the global norm at which the optimizer clips gradients, if it does;
            ``metrics`` then says in which share of the steps.

    Returns:
        ``Monitor``, a NamedTuple of functions.

    Raises:
        TypeError: if ``every`` or ``window`` is not an integer.
        ValueError: if one of them is less than 1, or ``clip_norm`` not above 0.

    Example:
        >>> loss_fn = lambda params, x: jnp.mean((x @ params["w"]) ** 2)
        >>> params, x = {"w": jnp.array([[3.0], [4.0]])}, jnp.eye(2)
        >>> import nnsanity as ns
        >>> watch = monitor()
        >>> state = watch.init(loss_fn, params, x)
        >>> (loss, signals), grads = ns.value_and_grad(loss_fn)(params, x)
        >>> updates = jax.tree.map(lambda grad: -0.1 * grad, grads)
        >>> state = watch.update(state, loss=loss, signals=signals, grads=grads,
        ...                      updates=updates, params=params)
        >>> watch.metrics(state)["parameters/w/norm"], watch.diagnose(state)
        (Array(5., dtype=float32), ())

    References:
        A. Karpathy (2019), "A Recipe for Training Neural Networks"; D. Holden, "My
        neural network isn't working!", items 2, 4, 6 and 8; McCandlish et al. (2018),
        "An empirical model of large-batch training", appendix A.1.
    """
    for option, value in (("every", every), ("window", window)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"monitor: {option} must be an integer, got {value!r}")
        if value < 1:
            raise ValueError(f"monitor: {option} must be at least 1, got {value}")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"monitor: clip_norm must be above 0, got {clip_norm}")
    known: list[Names] = []

    def names_of(function: str, *states: Any) -> Names:
        return _known_names(function, known, states, every=every)

    def init(loss_fn: LossFn, params: Params, *rest: PyTree) -> MonitorState:
        known[:] = [names_of_network(loss_fn, params, *rest)]
        return blank_state(known[0], every=every)

    def due(state: MonitorState) -> Array | bool:
        names_of("monitor.due", state)
        return True if every == 1 else record_of(state).step % every == 0

    def update(
        state: MonitorState,
        *,
        loss: Array,
        signals: Signals,
        grads: PyTree,
        updates: PyTree | Callable[[], PyTree],
        params: Params,
        microbatch_norms: Array | None = None,
        validation_loss: Array | None = None,
        axis_name: str | None = None,
    ) -> MonitorState:
        names = names_of("monitor.update", state)
        if isinstance(signals, Signals) and jnp.ndim(signals.watched) == 1:
            signals = over_microbatches(signals)
        given = jax.eval_shape(updates) if callable(updates) else updates
        trees = {"grads": grads, "updates": given, "params": params}
        check_step(names, loss, signals, trees, is_part=axis_name is not None)
        if microbatch_norms is not None:
            _check_norms(microbatch_norms)
        loss = jnp.asarray(loss).astype(jnp.float32)
        is_local = axis_name is not None and _is_local(loss, axis_name, trees)
        look = Look(names, clip_norm, axis_name, is_local=is_local)
        loss = loss if axis_name is None else jax.lax.pmean(loss, axis_name)
        before = record_of(state)
        record = with_loss(before, loss, every)
        is_due = signals.watched & (record.step % every == 0)
        leaves = Trees(
            inexact_leaves(grads), _leaves_of(updates), inexact_leaves(params)
        )
        record = with_look(look, record, is_due, signals, microbatch_norms, leaves)
        if every > 1:
            record = record._replace(spike=seen_late(record, is_due, every))
        if validation_loss is not None:
            record = validated(record, validation_loss)
        record = record._replace(step=record.step + 1)
        return repacked(record, before, state)

    def validated(record: MonitorRecord, validation_loss: Array) -> MonitorRecord:
        check_scalar("monitor.validate", "validation_loss", validation_loss)
        return with_validation(record, jnp.asarray(validation_loss))

    def repacked(
        record: MonitorRecord, before: MonitorRecord, state: MonitorState
    ) -> MonitorState:
        after = state_of(jax.tree.map(placed_like, record, before))
        return jax.tree.map(placed_like, after, state)

    def validate(state: MonitorState, validation_loss: Array) -> MonitorState:
        names_of("monitor.validate", state)
        before = record_of(state)
        return repacked(validated(before, validation_loss), before, state)

    def merge(a: MonitorState, b: MonitorState) -> MonitorState:
        names_of("monitor.merge", a, b)
        return merged(a, b)

    def read(state: MonitorState) -> MonitorRecord:
        names_of("monitor.read", state)
        return record_of(state)

    def metrics(state: MonitorState) -> dict[str, Array]:
        names = names_of("monitor.metrics", state)
        is_clipped = clip_norm is not None
        record = record_of(state)
        patience = window * every
        return metrics_of(record, names, patience=patience, is_clipped=is_clipped)

    def diagnose(state: MonitorState) -> tuple[Finding, ...]:
        names = names_of("monitor.diagnose", state)
        record = record_of(jax.device_get(state))
        return judge_monitor(record, names, every=every, window=window)

    def around(
        optimizer: optax.GradientTransformation, loss_fn: LossFn, *rest: PyTree
    ) -> optax.GradientTransformationExtraArgs:
        def init_for(params: Params) -> MonitorState:
            return init(loss_fn, params, *rest)

        return wrapped(optimizer, init_for, update, is_repeated=every > 1)

    return Monitor(init, due, update, validate, merge, read, metrics, diagnose, around)


def _known_names(
    function: str, known: list[Names], states: tuple, *, every: int
) -> Names:
    """Returns the names, if the states are of their network."""
    for state in states:
        if not isinstance(state, MonitorState):
            raise TypeError(
                f"{function}: state must be what monitor.init returns, got"
                f" {type(state).__name__}"
            )
    if not known:
        raise ValueError(
            f"{function}: this monitor knows no names yet: call monitor.init first,"
            " also where the state comes from a checkpoint"
        )
    wanted = jax.tree.map(
        jnp.shape,
        jax.eval_shape(functools.partial(blank_state, known[0], every=every)),
    )
    for state in states:
        if (got := jax.tree.map(jnp.shape, state)) != wanted:
            raise ValueError(
                f"{function}: state has shapes {got}, monitor.init made {wanted}; is it"
                " of another network, or of several seeds? Then use jax.vmap, or one"
                " seed at a time"
            )
    return known[0]


def _leaves_of(updates: Any) -> Any:
    if callable(updates):
        return lambda: inexact_leaves(updates())
    return inexact_leaves(updates)


def _check_norms(norms: Any) -> None:
    shape = jnp.shape(norms)
    if len(shape) != 1 or shape[0] < 2:
        raise ValueError(
            "monitor.update: microbatch_norms must be the global norms of at least 2"
            f" microbatch gradients, [k], got shape {shape}; take optax.tree.norm of"
            " each"
        )


def _is_local(loss: Array, axis_name: str, trees: dict[str, PyTree]) -> bool:
    """Tells whether the loss is that of a device's own examples.

    Without the types of ``check_vma`` nothing says so; then it is taken as that.
    """
    for grad, param in zip(
        *(inexact_leaves(trees[name]) for name in ("grads", "params")), strict=True
    ):
        if varies(grad, axis_name) and not varies(param, axis_name):
            raise ValueError(
                f"monitor.update: grads differ along {axis_name!r} where params do not;"
                " average them first: jax.lax.pmean(grads, axis_name)"
            )
    is_told = varies(jax.lax.axis_index(axis_name), axis_name)
    return varies(loss, axis_name) or not is_told
