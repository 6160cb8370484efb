"""The state of a monitor as a flat dictionary of numbers, for a log."""

import jax.numpy as jnp
import numpy as np

from nnsanity._types import Array
from nnsanity.monitor.state import MonitorState, Names
from nnsanity.quantities.units import dead_fraction


def metrics_of(
    state: MonitorState, names: Names, *, patience: int, is_clipped: bool
) -> dict[str, Array]:
    """Returns finite float32 scalars by name.

    Args:
        state: on the device.
        names: of leaves and layers.
        patience: steps without activity after which a unit counts as dead.
        is_clipped: whether the user said at which norm gradients are clipped.
    """
    values = {
        "step": state.step,
        "loss/last": state.loss,
        "loss/average": state.loss_average,
        "loss/spread": state.loss_spread,
        "loss/lowest-average": state.lowest_average,
        "loss/spike-step": state.spike.step,
        "nonfinite/step": state.nonfinite.step,
        "gradients/norm": jnp.sqrt(jnp.sum(state.gradient_norm**2)),
        "validation/last": state.validation.loss,
        "validation/lowest": state.validation.lowest,
        "validation/lowest-step": state.validation.lowest_step,
    }
    if is_clipped:
        values["gradients/clipped-share"] = state.clipped_share
    noise = state.gradient_noise
    known = noise.square_norm > 0
    share = noise.noise / jnp.where(known, noise.square_norm, 1)
    values["gradients/noise-share"] = jnp.where(known, jnp.minimum(share, 1), 0)
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
