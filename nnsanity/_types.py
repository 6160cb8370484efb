"""Names for the kinds of arguments that most functions take."""

from collections.abc import Callable
from typing import Any, NamedTuple

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


class Functional(NamedTuple):
    """A network as pure functions of its parameters.

    Attributes:
        apply_fn: ``apply_fn(params, inputs) -> outputs`` in evaluation mode.
        params: the trainable parameters.
        train_apply_fn: ``train_apply_fn(params, inputs, key) -> outputs`` in training
            mode: dropout drawn from the key, statistics taken over the batch itself.
    """

    apply_fn: ApplyFn
    params: Params
    train_apply_fn: Callable[[Params, PyTree, Array], PyTree]
