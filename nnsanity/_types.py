"""Names for the kinds of arguments that most functions take."""

from collections.abc import Callable
from typing import Any

import jax

Array = jax.Array
PyTree = Any
Params = Any
"""Any pytree of arrays; leaves that are not inexact are passed over."""

ApplyFn = Callable[[Params, PyTree], PyTree]
"""``apply_fn(params, inputs) -> outputs``, deterministic."""

LossFn = Callable[[Params, PyTree], Array]
"""``loss_fn(params, batch) -> scalar``."""

TrainLossFn = Callable[[Params, PyTree, Array], Array]
"""``train_loss_fn(params, batch, key) -> scalar``, with its noise on."""
