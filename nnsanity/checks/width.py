"""Item 11: has every layer enough units, and are they put to use?

"Start with 256 to 1024 units; classes times 5 to 10, or 2 to 3 times the number of
inputs or outputs for regression.  Too few cannot express it, too many only cost time"
(D. Holden).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnsanity._types import ApplyFn, Array, Params, PyTree
from nnsanity.findings import Finding, listed, number
from nnsanity.quantities.passage import Look, Seen, SeenByLook, after, seen_forward
from nnsanity.quantities.units import Spread, spread_of_units
from nnsanity.tracing.layers import Located, Network, Uninspected

UNITS_FOR_EACH_CLASS = 5
UNITS_FOR_EACH_NUMBER = 2
"""Fewest units for each class, and for each input or output of a regression
(D. Holden)."""
USUAL_UNITS = 256
"""Units that are enough to start with, however many classes there are (D. Holden)."""
NARROW_SHARE = 4
"""How many times as many units the guideline has as a layer that is suspected."""
FEW_UNITS = 4
"""Units of a layer that is suspected whatever the task; a wider copy tells."""
WIDE_UNITS = 64
"""Fewest units of the wider copy that a suspected layer is compared with."""
FULL_SHARE = 0.5
"""Effective rank, in units of their number, from which on a layer's units are in use.
Random layers of two to eight units reach 0.7 to 1."""
REDUNDANT_SHARE = 0.1
"""Healthy share of units that double another one."""
MAX_UNITS = 8192
"""Widest layer whose units are compared with each other."""


class WidthProfile(NamedTuple):
    """How many units the layers have, and how many of them say something of their own.

    Layers inside of a scan over layers are stacked.

    Attributes:
        units: int32[] for each layer.
        effective_rank: float32[], tr(C)^2 / tr(C^2) of the covariance C of its units:
            the number of directions of equal variance; at most ``units``, 0 where
            nothing varies, NaN where a value is.
        redundant: bool[units], units that are correlated above 0.999, or below -0.999,
            with one before them.
        constant: bool[units], units that do not vary, as dead ones do not.
        uninspected: parameters that belong to no layer, and layers of too many units or
            that the program does not show; and why.
    """

    units: dict[str, Array]
    effective_rank: dict[str, Array]
    redundant: dict[str, Array]
    constant: dict[str, Array]
    uninspected: Uninspected


@functools.partial(jax.jit, static_argnums=0)
def width_profile(apply_fn: ApplyFn, params: Params, inputs: PyTree) -> WidthProfile:
    """Measures what the units of each layer make of a batch.

    Positions of a sequence or an image count as more examples; a rank is at most the
    number of examples less one, so take more examples than units.  Of turns of a loop
    with the same weights the mean rank counts, and units that are redundant or constant
    in all.  Worry about a narrow layer whose rank is as high as it gets: it may hold
    back what the outputs need.  Costs one forward pass, and for each layer a product as
    large as that of a layer from its units to as many.

    Args:
        apply_fn: ``apply_fn(params, inputs) -> outputs``.
        params: any pytree of arrays.
        inputs: leading axis the examples.

    Returns:
        ``WidthProfile``, by layer name.

    Example:
        >>> params = {"w": jnp.array([[1.0, 2.0, 0.0], [0.0, 0.0, 1.0]])}
        >>> inputs = jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 5**0.5], [0.0, -5**0.5]])
        >>> profile = width_profile(lambda p, x: x @ p["w"], params, inputs)
        >>> profile.redundant["w"]
        Array([False,  True, False], dtype=bool)
        >>> print(f"{profile.effective_rank['w']:.1f} of {profile.units['w']}")
        2.0 of 3

    References:
        Roy and Vetterli (2007), "The effective rank"; the ratio of traces is also
        called the participation ratio, Gao et al. (2017).
    """
    return profile_of(*seen_forward(apply_fn, params, inputs, WIDTH_LOOKS))


def _compared(network: Network, one: Located) -> int | None:
    return after(network, one) if one.layer.units <= MAX_UNITS else None


WIDTH_LOOKS = {
    "spread": Look(_compared, lambda values, one: spread_of_units(values, one=one))
}


def profile_of(network: Network, seen: SeenByLook) -> WidthProfile:
    """Gathers what was seen by ``WIDTH_LOOKS``."""
    profile = WidthProfile({}, {}, {}, {}, Uninspected.of(network))
    told = dict(profile.uninspected.parameters)
    for one in network.layers:
        name = one.layer.name
        if name not in seen.get("spread", {}):
            told[name] = f"{_unseen(one)}; width is not looked at"
            continue
        spread = _merged(seen["spread"][name])
        profile.units[name] = jnp.full((), one.layer.units, jnp.int32)
        profile.effective_rank[name] = spread.effective_rank
        profile.redundant[name] = spread.redundant
        profile.constant[name] = spread.constant
    return profile._replace(
        uninspected=Uninspected(tuple(told.items()), profile.uninspected.gradients)
    )


def _unseen(one: Located) -> str:
    if one.layer.units > MAX_UNITS:
        return f"more than {MAX_UNITS} units"
    return "what leaves it can't be seen where the program runs"


def _merged(one: Seen) -> Spread:
    """Joins turns with the same weights."""
    rank = one.only(lambda spread: spread.effective_rank).merged(jnp.mean)
    masks = one.only(lambda spread: (spread.redundant, spread.constant))
    return Spread(rank, *masks.merged(jnp.all))


class Need(NamedTuple):
    """How wide the layers of a task should be.

    Attributes:
        outputs: directions that the outputs can take: classes less one, or numbers.
        guideline: fewest units that are recommended for a hidden layer.
    """

    outputs: int
    guideline: int

    def is_narrow(self, width: int) -> bool:
        """Tells whether a layer has fewer units than the outputs take, or very few.

        Args:
            width: numbers of an example that pass the layer.
        """
        is_below = width < min(self.outputs, self.guideline)
        return is_below or NARROW_SHARE * width <= self.guideline or width <= FEW_UNITS


def needed_units(*, num_inputs: int, num_outputs: int, is_classification: bool) -> Need:
    """Returns the checklist's guideline for a task.

    Args:
        num_inputs: numbers in one example.
        num_outputs: numbers in one output, or classes.
        is_classification: whether the outputs stand for classes.

    Example:
        >>> needed_units(num_inputs=64, num_outputs=10, is_classification=True)
        Need(outputs=9, guideline=50)
    """
    if is_classification:
        outputs = max(num_outputs - 1, 1)
        return Need(outputs, min(UNITS_FOR_EACH_CLASS * (outputs + 1), USUAL_UNITS))
    units = UNITS_FOR_EACH_NUMBER * max(num_inputs, num_outputs)
    return Need(num_outputs, min(units, USUAL_UNITS))


def judge_width(
    profile: WidthProfile,
    need: Need | None,
    waists: dict[str, int],
) -> tuple[Finding, ...]:
    """Says which layers are narrow and full, and which hold the same unit many times.

    Args:
        profile: as ``width_profile`` returns, on more examples than units.
        need: of the task; None where that is not known.
        waists: how many numbers of an example pass a hidden layer, for each that all of
            them have to pass.
    """
    host = jax.device_get(profile)
    findings = [_redundant(name, mask) for name, mask in host.redundant.items()]
    if need is None:
        return tuple(one for one in findings if one is not None)
    narrow = {
        name: float(np.min(host.effective_rank[name]))
        for name, width in waists.items()
        if name in host.units and need.is_narrow(width)
    }
    full = [
        name
        for name, rank in narrow.items()
        if rank > FULL_SHARE * int(host.units[name])
    ]
    findings += [bottleneck(name, waists[name], need, narrow[name]) for name in full]
    thin = {
        name: width
        for name, width in waists.items()
        if width < need.guideline and name not in full
    }
    findings += [_guideline(thin, need)] if thin else []
    return tuple(one for one in findings if one is not None)


def bottleneck(name: str, width: int, need: Need, rank: float) -> Finding:
    """The finding that all has to pass a layer of few units, and those are in use."""
    units = "unit" if width == 1 else "units"
    used = "" if math.isnan(rank) else f" (effective rank {number(rank)})"
    words = f"All that the outputs say passes the {width} {units} of {name}{used}"
    is_below = width < need.guideline
    words += (
        f"; the checklist starts from {need.guideline} for this task."
        if is_below
        else ", few for any task."
    )
    if width < need.outputs:
        words += f" The outputs can differ in {need.outputs} directions."
    return Finding(
        "width/bottleneck",
        11,
        "info",
        name,
        float(width),
        float(need.guideline if is_below else FEW_UNITS + 1),
        words,
        f"Give {name} more units: {need.guideline} by the checklist's guideline, and"
        " more do no harm."
        if is_below
        else f"Give {name} more units, such as {WIDE_UNITS}: more do no harm.",
    )


def _guideline(widths: dict[str, int], need: Need) -> Finding:
    narrowest = min(widths.values())
    return Finding(
        "width/guideline",
        11,
        "info",
        listed(widths),
        float(narrowest),
        float(need.guideline),
        f"Hidden layers have {narrowest} units and more; the checklist starts from"
        f" {need.guideline} for this task.",
        "Try more units where the training error stays high; too many only cost time.",
    )


def _redundant(name: str, mask: np.ndarray) -> Finding | None:
    share = float(np.mean(mask)) if mask.size else 0.0
    num_units = mask.shape[-1]
    if share <= REDUNDANT_SHARE or num_units < 2 or math.isnan(share):
        return None
    return Finding(
        "width/redundant",
        11,
        "info",
        name,
        share,
        REDUNDANT_SHARE,
        f"{number(100 * share)}% of the {num_units} units of {name} double another one"
        " (correlation above 0.999).",
        "Draw the weights anew if units start alike; if they became alike while"
        " training, fewer units do as well.",
    )
