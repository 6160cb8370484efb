"""The functions of a monitor: arrays in, arrays out, inside of the user's own step."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnsanity._tree import in_float32, inexact_leaves
from nnsanity._types import Array, LossFn, Params, PyTree
from nnsanity.findings import Finding
from nnsanity.monitor.state import (
    MonitorState,
    Names,
    Spike,
    blank_state,
    check_step,
    names_of_network,
)
from nnsanity.monitor.verdicts import GROWTH_LIMIT, SPIKE_LENGTH, judge_monitor
from nnsanity.signals import Signals
from nnsanity.units import dead_fraction

WINDOW = 100
"""Watched steps without activity after which a unit counts as dead: 3,200 examples at a
batch of 32, where checks.md asks for 256."""
SPIKE_SPREADS = 6.0
SPIKE_SHARE = 0.1
"""A loss is high above its average by 6 spreads and a tenth of what the run has gained.
Starting values."""
SETTLED = 20
"""Steps before the spread is known well enough to judge by."""
LOSS_RATE = 0.02
LEAF_RATE = 0.01
"""Weight of the newest value in the averages of the loss, and of the leaves."""


class Monitor(NamedTuple):
    """Functions of a monitor, as an optax transformation has them.

    Attributes:
        init: ``init(loss_fn, params, batch) -> state``, from shapes alone.
        due: ``due(state) -> bool[]``, whether to watch this step.
        update: ``update(state, loss=, signals=, grads=, updates=, params=) -> state``;
            ``params`` are those that the updates are added to.
        metrics: ``metrics(state) -> dict[str, Array]``, finite float32 scalars; what is
            not finite is 0, and counted by ``"nonfinite/count"``.
        diagnose: ``diagnose(state) -> tuple[Finding, ...]``, on the host.
    """

    init: Callable[..., MonitorState]
    due: Callable[[MonitorState], Array | bool]
    update: Callable[..., MonitorState]
    metrics: Callable[[MonitorState], dict[str, Array]]
    diagnose: Callable[[MonitorState], tuple[Finding, ...]]


def monitor(*, every: int = 1, window: int = WINDOW) -> Monitor:
    """Watches a training from inside of its jitted step.

    Everything but the loss is looked at in every ``every``-th step, behind a branch of
    the compiled program; ``vmap`` turns the branch into a choice, so that there every
    step pays.  A watched step costs one read of gradients, updates and parameters.  A
    monitor knows the names of the network that it was last initialized for: take one
    for each network.

    Args:
        every: steps from one look to the next; 1 looks at each.
        window: looks without activity after which a unit counts as dead.

    Returns:
        ``Monitor``, a NamedTuple of functions.

    Raises:
        TypeError: if a number is not an integer.
        ValueError: if a number is less than 1.

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
        neural network isn't working!", items 2, 6 and 8.
    """
    for option, value in (("every", every), ("window", window)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"monitor: {option} must be an integer, got {value!r}")
        if value < 1:
            raise ValueError(f"monitor: {option} must be at least 1, got {value}")
    known: list[Names] = []

    def names_of(state: Any, function: str) -> Names:
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
        if (got := jax.tree.map(jnp.shape, state)) != wanted:
            raise ValueError(
                f"{function}: state has shapes {got}, monitor.init made {wanted}; is it"
                " of another network, or of several seeds? Then use jax.vmap, or one"
                " seed at a time"
            )
        return known[0]

    def init(loss_fn: LossFn, params: Params, *rest: PyTree) -> MonitorState:
        known[:] = [names_of_network(loss_fn, params, *rest)]
        return blank_state(known[0], every=every)

    def due(state: MonitorState) -> Array | bool:
        names_of(state, "monitor.due")
        return True if every == 1 else state.step % every == 0

    def update(
        state: MonitorState,
        *,
        loss: Array,
        signals: Signals,
        grads: PyTree,
        updates: PyTree,
        params: Params,
    ) -> MonitorState:
        names = names_of(state, "monitor.update")
        trees = {"grads": grads, "updates": updates, "params": params}
        check_step(names, loss, signals, trees)
        return _updated(state, names, every, loss, signals, trees)

    def metrics(state: MonitorState) -> dict[str, Array]:
        names = names_of(state, "monitor.metrics")
        return _metrics(state, names, window * every)

    def diagnose(state: MonitorState) -> tuple[Finding, ...]:
        names = names_of(state, "monitor.diagnose")
        return judge_monitor(jax.device_get(state), names, every=every, window=window)

    return Monitor(init, due, update, metrics, diagnose)


def _updated(
    state: MonitorState,
    names: Names,
    every: int,
    loss: Array,
    signals: Signals,
    trees: dict[str, PyTree],
) -> MonitorState:
    before = state
    state = _with_loss(state, jnp.asarray(loss).astype(jnp.float32), every)
    watched = signals.watched & (state.step % every == 0)
    leaves = tuple(inexact_leaves(tree) for tree in trees.values())
    look = functools.partial(_looked_at, names)
    state = jax.lax.cond(
        watched, look, lambda state, *_: state, state, signals, *leaves
    )
    if every > 1:
        state = state._replace(spike=_seen_late(state, watched, every))
    state = state._replace(step=state.step + 1)
    return jax.tree.map(_placed_like, state, before)


def _with_loss(state: MonitorState, loss: Array, every: int) -> MonitorState:
    """Looks at the loss, which costs nothing."""
    is_first = state.step == 0
    is_finite = jnp.isfinite(loss)
    start = jnp.where(is_first, loss, state.loss_start)
    average = jnp.where(is_first, loss, state.loss_average)
    # A first loss that is not finite would stay in every average.
    start, average = jnp.nan_to_num(start), jnp.nan_to_num(average)
    margin = jnp.maximum(start - state.lowest_average, 0) * SPIKE_SHARE
    limit = average + SPIKE_SPREADS * state.loss_spread + margin
    is_settled = state.step >= SETTLED
    is_high = ~(loss <= limit) & is_settled
    # The early average still falls, and its spread is not known: nothing is clipped.
    clipped = jnp.where(is_settled, jnp.minimum(loss, limit), loss)
    distance = jnp.where(is_finite, clipped - average, 0)
    rate = jnp.where(is_finite, _rate(state.step, LOSS_RATE), 0)
    average = average + rate * distance
    # Of the size of the larger, so that no square leaves float32.
    spread = jnp.hypot(
        jnp.sqrt(1 - rate) * state.loss_spread, jnp.sqrt(rate) * distance
    )
    is_lowest = is_first | (average < state.lowest_average)
    bad = state.nonfinite
    is_new = ~is_finite & (bad.step < 0)
    bad = bad._replace(
        step=jnp.where(is_new, state.step, bad.step), loss=bad.loss | is_new
    )
    return state._replace(
        loss=loss,
        loss_start=start,
        loss_average=average,
        loss_spread=spread,
        lowest_average=jnp.where(is_lowest, average, state.lowest_average),
        lowest_step=jnp.where(is_lowest, state.step, state.lowest_step),
        spike=_spike(state, is_high, limit, every),
        nonfinite=bad,
    )


def _spike(state: MonitorState, is_high: Array, limit: Array, every: int) -> Spike:
    """Goes on with a rise; one that updates announced stays when it is over."""
    spike = state.spike
    leaf = jnp.argmax(state.update_growth) if state.update_growth.size else 0
    growth = jnp.max(state.update_growth, initial=0)
    none = Spike(
        jnp.int32(-1), jnp.int32(0), *(jnp.zeros_like(one) for one in spike[2:])
    )
    begun = Spike(state.step, jnp.int32(0), limit, jnp.asarray(leaf, jnp.int32), growth)
    # Until the next look nobody knows how large the updates were.
    is_open = state.step - spike.step < every
    is_announced = (spike.growth > GROWTH_LIMIT) | is_open
    is_kept = (spike.length >= SPIKE_LENGTH) & is_announced
    begins = is_high & (spike.step < 0)
    spike = _chosen(begins, begun, _chosen(is_high | is_kept, spike, none))
    # What is kept goes no further once the loss has been back.
    goes_on = is_high & (spike.step + spike.length == state.step)
    return spike._replace(length=spike.length + goes_on.astype(jnp.int32))


def _seen_late(state: MonitorState, watched: Array, every: int) -> Spike:
    """The first look after a spike began shows what the one before it could not."""
    spike = state.spike
    since = state.step - spike.step
    largest = jnp.max(state.update_growth, initial=0)
    is_late = watched & (spike.step >= 0) & (since > 0) & (since < every)
    is_larger = is_late & (largest > spike.growth)
    if not state.update_growth.size:
        return spike
    leaf = jnp.argmax(state.update_growth).astype(jnp.int32)
    return _chosen(is_larger, spike._replace(leaf=leaf, growth=largest), spike)


def _looked_at(
    names: Names, state: MonitorState, signals: Signals, *trees: list[Array]
) -> MonitorState:
    """Reads gradients, updates and parameters once each."""
    gradient, update, parameter = (_norms(leaves) for leaves in trees)
    rate = _rate(state.num_watched, LEAF_RATE)
    known = state.update_average > 0
    growth = update / jnp.where(known, state.update_average, 1)
    ratio = update / jnp.where(parameter > 0, parameter, 1)
    has_ratio = jnp.isfinite(ratio) & (parameter > 0)
    activation = _rows(names, signals.activation_rms)
    came_back = _rows(names, signals.activation_gradient_rms)
    bad = state.nonfinite
    now = bad._replace(
        step=state.step,
        watched=jnp.full_like(bad.watched, fill_value=True),
        gradients=~jnp.isfinite(gradient),
        updates=~jnp.isfinite(update),
        parameters=~jnp.isfinite(parameter),
        activations=~jnp.isfinite(activation) & jnp.isfinite(state.activation_rms),
    )
    is_bad = now.loss | jnp.any(now.gradients) | jnp.any(now.updates)
    is_first = (bad.step < 0) | (bad.step == state.step)
    is_finite = jnp.isfinite(state.loss)
    after = state._replace(
        num_watched=state.num_watched + 1,
        watched_step=jnp.where(is_finite, state.step, state.watched_step),
        nonfinite=_chosen(is_bad & is_first, now, bad),
        gradient_norm=gradient,
        update_norm=update,
        parameter_norm=parameter,
        update_average=_averaged(state.update_average, update, rate),
        update_growth=jnp.where(known & jnp.isfinite(update), growth, 1),
        update_ratio=jnp.where(
            has_ratio,
            _averaged(state.update_ratio, ratio, rate),
            state.update_ratio,
        ),
        activation_rms=activation,
        activation_gradient_rms=came_back,
        last_active={
            # NaN is no activity, nor its absence.
            name: jnp.where(signals.dead[name] | ~is_finite, last, state.step)
            for name, last in state.last_active.items()
        },
    )
    return jax.tree.map(_placed_like, after, state)


def _norms(leaves: list[Array]) -> Array:
    """Returns float32[leaves]; a sharded leaf is summed where it is."""
    if not leaves:
        return jnp.zeros(0, jnp.float32)
    values = [in_float32(leaf) for leaf in leaves]
    squares = [jnp.sum(jnp.real(v * jnp.conj(v))).astype(jnp.float32) for v in values]
    return jnp.sqrt(jnp.stack(squares))


def _rows(names: Names, values: dict[str, Array]) -> Array:
    """Joins values by layer in the order of execution; 0 for those that have none."""
    groups = [
        jnp.stack(
            [values.get(name, jnp.zeros(names.stacks[name])) for name in group], axis=-1
        )
        for group in names.groups
    ]
    flat = [group.reshape(-1).astype(jnp.float32) for group in groups]
    return jnp.concatenate([jnp.zeros(0, jnp.float32), *flat])


def _rate(count: Array, smallest: float) -> Array:
    """Weight of the newest value: a plain mean first, that forgets later."""
    return jnp.maximum(1 / (count + 1).astype(jnp.float32), smallest)


def _averaged(average: Array, value: Array, rate: Array) -> Array:
    return jnp.where(jnp.isfinite(value), average + rate * (value - average), average)


def _chosen(flag: Array, chosen: Any, other: Any) -> Any:
    return jax.tree.map(lambda one, two: jnp.where(flag, one, two), chosen, other)


def _placed_like(value: Array, before: Array) -> Array:
    """Keeps dtype and, on a mesh of explicit axes, the sharding."""
    value = value.astype(before.dtype)
    wanted = jax.typeof(before).sharding
    if jax.typeof(value).sharding == wanted or wanted.mesh.empty:
        return value
    return jax.sharding.reshard(value, wanted)


def _metrics(state: MonitorState, names: Names, patience: int) -> dict[str, Array]:
    values = {
        "step": state.step,
        "loss/last": state.loss,
        "loss/average": state.loss_average,
        "loss/spread": state.loss_spread,
        "loss/lowest-average": state.lowest_average,
        "loss/spike-step": state.spike.step,
        "nonfinite/step": state.nonfinite.step,
    }
    for index, (leaf, _) in enumerate(names.leaves):
        values[f"gradients/{leaf}/norm"] = state.gradient_norm[index]
        values[f"updates/{leaf}/norm"] = state.update_norm[index]
        values[f"updates/{leaf}/ratio"] = state.update_ratio[index]
        values[f"parameters/{leaf}/norm"] = state.parameter_norm[index]
    for index, (row, layer) in enumerate(names.rows):
        values[f"activations/{row}/rms"] = state.activation_rms[index]
        if layer not in names.without_gradient:
            back = state.activation_gradient_rms[index]
            values[f"activations/{row}/gradient-rms"] = back
    for layer, last in state.last_active.items():
        fraction = dead_fraction(state.watched_step - last >= patience)
        for place in np.ndindex(fraction.shape):
            row = layer + "".join(f"[{index}]" for index in place)
            values[f"activations/{row}/dead"] = fraction[place]
    values = {name: value.astype(jnp.float32) for name, value in values.items()}
    flags = [jnp.isfinite(value) for value in values.values()]
    zero = jnp.float32(0)
    shown = {
        name: jnp.where(flag, value, zero)
        for flag, (name, value) in zip(flags, values.items(), strict=True)
    }
    count = sum((~flag).astype(jnp.float32) for flag in flags)
    return {**shown, "nonfinite/count": jnp.asarray(count)}
