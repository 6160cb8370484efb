"""From an NNX model to pure functions of its parameters."""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen, nnx

from nnsanity._types import Array, Functional, Params, PyTree
from nnsanity.linen import EVALUATION, TRAINING, bind_call, usual_flags


def functional(
    model: nnx.Module, *, wrt: Any = nnx.Param, call: Callable | None = None
) -> Functional:
    """Splits a model into its parameters and two pure functions of them.

    Both run a copy of the model as it is now, put into its mode by ``model.eval()`` or
    ``model.train()`` and by the usual flags (``train``, ``deterministic``, ...) that
    the call takes: the caller's model keeps its mode, its statistics and its random
    state.  In training mode the key is mixed into every random stream, and ``rngs`` is
    passed to a call that takes it.  Costs nothing but the calls.  Running statistics
    stay as they are; see ``nnsanity.linen.functional``.

    Args:
        model: an instance.
        wrt: the filter of the trainable variables, as in ``nnx.grad``.  The other
            variables are constants.
        call: ``call(model, inputs, **flags) -> outputs`` for a model that is called in
            another way; it gets those flags that its own signature takes.

    Returns:
        ``apply_fn``, ``params`` (an ``nnx.State``) and ``train_apply_fn``.

    Raises:
        TypeError: no instance of an NNX module, or a call that takes more arguments.
        ValueError: the filter selects nothing.

    Example:
        >>> import jax.numpy as jnp
        >>> rngs, ones = nnx.Rngs(0), nnx.initializers.ones
        >>> linear = nnx.Linear(3, 1, kernel_init=ones, rngs=rngs)
        >>> model = nnx.Sequential(linear, nnx.Dropout(0.5, rngs=rngs))
        >>> apply_fn, params, train_apply_fn = functional(model)
        >>> x = jnp.ones((64, 3))
        >>> sorted(set(apply_fn(params, x).ravel().tolist()))
        [3.0]
        >>> sorted(set(train_apply_fn(params, x, jax.random.key(0)).ravel().tolist()))
        [0.0, 6.0]
    """
    if not isinstance(model, nnx.Module):
        hint = "give an instance of an NNX module"
        if isinstance(model, linen.Module):
            hint = "a Linen module goes to nnsanity.linen.functional"
        what = f"the class {model.__name__}" if isinstance(model, type) else type(model)
        raise TypeError(f"functional: model is {what}; {hint}")
    graphdef, *states = nnx.split(model, wrt, nnx.RngKey, ...)
    # split shares its variables with the model, which may train on
    params, streams, rest = jax.tree.map(lambda leaf: leaf, states)
    if not jax.tree.leaves(params):
        name = type(model).__name__
        raise ValueError(f"functional: wrt={wrt} selects no variables of {name}")
    flags = usual_flags(model, call, {**EVALUATION, "rngs": None})
    evaluate = bind_call(model, call, flags, "evaluation")

    def apply_fn(params: Params, inputs: PyTree) -> PyTree:
        copy = nnx.merge(graphdef, params, streams, rest, copy=True)
        copy.eval()
        return evaluate(copy, inputs)

    def train_apply_fn(params: Params, inputs: PyTree, key: Array) -> PyTree:
        key, noise = jax.random.split(key)
        bits = jax.random.bits(noise)
        mixed = jax.tree.map(lambda stored: _mix(stored, bits), streams)
        copy = nnx.merge(graphdef, params, mixed, rest, copy=True)
        copy.train()
        flags = usual_flags(copy, call, {**TRAINING, "rngs": nnx.Rngs(key)})
        return bind_call(copy, call, flags, "training")(copy, inputs)

    return Functional(apply_fn, params, train_apply_fn)


def _mix(keys: Array, bits: Array) -> Array:
    """Folds noise into keys of any shape: equal ones stay equal, others different."""
    folded = jax.vmap(jax.random.fold_in, (0, None))(keys.reshape(-1), bits)
    return folded.reshape(keys.shape)
