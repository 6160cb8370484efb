"""A monitor as an optax transformation around another one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from nnsanity._types import Array, Params, PyTree
from nnsanity.monitor.state import MonitorState
from nnsanity.signals import Signals


class MonitoredState(NamedTuple):
    """State of ``monitor.around(optimizer, loss_fn, batch)``.

    Attributes:
        optimizer: state of the optimizer.
        monitor: ``MonitorState``; ``optax.tree.get(opt_state, "monitor")`` finds it
            wherever it lies in the state of a chain.
    """

    optimizer: PyTree
    monitor: MonitorState


def wrapped(
    optimizer: optax.GradientTransformation,
    init_monitor: Callable[[Params], MonitorState],
    update_monitor: Callable[..., MonitorState],
    *,
    is_repeated: bool,
) -> optax.GradientTransformationExtraArgs:
    """Watches what an optimizer makes of the gradients.

    Its ``update`` takes the loss by optax's name, ``value=``, then ``signals=`` and
    what else ``Monitor.update`` knows; more is passed on to the optimizer.

    Args:
        optimizer: any optax transformation.
        init_monitor: ``init_monitor(params) -> state``.
        update_monitor: as ``Monitor.update``.
        is_repeated: whether updates are made again where they are looked at, so that
            in other steps they need not be kept.
    """
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            "monitor.around: optimizer must have init and update, as optax.adam(1e-3)"
            f" has, got {optimizer!r}"
        )
    inner = optax.with_extra_args_support(optimizer)

    def init(params: Params) -> MonitoredState:
        return MonitoredState(inner.init(params), init_monitor(params))

    def update(
        updates: PyTree,
        state: MonitoredState,
        params: Params | None = None,
        *,
        value: Array | None = None,
        signals: Signals | None = None,
        microbatch_norms: Array | None = None,
        validation_loss: Array | None = None,
        axis_name: str | None = None,
        **extra: Any,
    ) -> tuple[PyTree, MonitoredState]:
        if params is None or value is None or signals is None:
            raise ValueError(
                "monitor.around: update needs params, the loss and the signals: call"
                " tx.update(grads, opt_state, params, value=loss, signals=signals)"
            )
        known = {
            "loss": value,
            "signals": signals,
            "microbatch_norms": microbatch_norms,
            "validation_loss": validation_loss,
            "axis_name": axis_name,
        }
        arguments = updates, state.optimizer, params

        def run(updates: PyTree, before: PyTree, params: Params) -> tuple:
            return inner.update(updates, before, params, value=value, **extra)

        def watched(changed: PyTree | Callable[[], PyTree]) -> MonitorState:
            trees = {"grads": updates, "updates": changed, "params": params}
            return update_monitor(state.monitor, **trees, **known)

        # What is looked at is overwritten later: read first, it need not be copied.
        if is_repeated:
            after = watched(lambda: run(*arguments)[0])
            arguments, after = jax.lax.optimization_barrier((arguments, after))
            changed, inner_state = run(*arguments)
        else:
            changed, inner_state = run(*arguments)
            changed, after = jax.lax.optimization_barrier((changed, watched(changed)))
        return changed, MonitoredState(inner_state, after)

    return optax.GradientTransformationExtraArgs(init, update)
