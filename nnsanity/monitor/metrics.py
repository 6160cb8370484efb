"""The record of a monitor as a flat dictionary of numbers, for a log."""

import jax.numpy as jnp
import numpy as np

from nnsanity._types import Array
from nnsanity.monitor.names import Names
from nnsanity.monitor.state import MonitorRecord
from nnsanity.quantities.units import dead_fraction


def metrics_of(
    record: MonitorRecord, names: Names, *, patience: int, is_clipped: bool
) -> dict[str, Array]:
    """Returns finite float32 scalars by name.

    Args:
        record: on the device.
        names: of leaves and layers.
        patience: steps without activity after which a unit counts as dead.
        is_clipped: whether the user said at which norm gradients are clipped.
    """
    values = {
        "step": record.step,
        "loss/last": record.loss,
        "loss/average": record.loss_average,
        "loss/spread": record.loss_spread,
        "loss/lowest-average": record.lowest_average,
        "loss/spike-step": record.spike.step,
        "nonfinite/step": record.nonfinite.step,
        "gradients/norm": jnp.sqrt(jnp.sum(record.gradient_norm**2)),
        "validation/last": record.validation.loss,
        "validation/lowest": record.validation.lowest,
        "validation/lowest-step": record.validation.lowest_step,
    }
    if is_clipped:
        values["gradients/clipped-share"] = record.clipped_share
    noise = record.gradient_noise
    known = noise.square_norm > 0
    share = noise.noise / jnp.where(known, noise.square_norm, 1)
    values["gradients/noise-share"] = jnp.where(known, jnp.minimum(share, 1), 0)
    for index, (leaf, _) in enumerate(names.leaves):
        values[f"gradients/{leaf}/norm"] = record.gradient_norm[index]
        values[f"updates/{leaf}/norm"] = record.update_norm[index]
        values[f"updates/{leaf}/ratio"] = record.update_ratio[index]
        values[f"parameters/{leaf}/norm"] = record.parameter_norm[index]
    for index, (row, layer) in enumerate(names.rows):
        values[f"activations/{row}/rms"] = record.activation_rms[index]
        if layer not in names.without_gradient:
            back = record.activation_gradient_rms[index]
            values[f"activations/{row}/gradient-rms"] = back
    for layer, last in record.last_active.items():
        fraction = dead_fraction(record.watched_step - last >= patience)
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
