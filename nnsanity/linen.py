"""From a Linen module to pure functions of its parameters."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import errors, linen, nnx

from nnsanity._types import Array, Functional, Params, PyTree

TRAINING = dict.fromkeys(
    ("train", "training", "is_train", "is_training", "enable_dropout"), True
) | dict.fromkeys(
    ("deterministic", "use_running_average", "eval_mode", "inference"), False
)
"""The usual flags as they are in training mode."""
EVALUATION = {name: not value for name, value in TRAINING.items()}


def functional(
    module: linen.Module,
    variables: Mapping[str, PyTree],
    *,
    evaluation: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    call: Callable | None = None,
    streams: Sequence[str] = (),
) -> Functional:
    """Splits a module into its parameters and two pure functions of them.

    The usual flags (``TRAINING``) set the mode where ``__call__`` takes them or the
    module itself has them as attributes; a module without any is called as it is.
    Collections other than ``"params"`` are constants: what the module writes there is
    thrown away.  So running statistics stay as they are while the parameters train; for
    a checkup of a network with batch normalization let both modes use those of the
    batch, ``evaluation={"train": True}`` or as its flag is called.  Costs nothing but
    the calls; a module that writes in evaluation mode too is traced twice there.

    Args:
        module: an instance, not bound to variables.
        variables: what ``module.init`` returned.
        evaluation: keyword arguments of the call in evaluation mode, on top of the
            flags that are found, such as ``{"is_eval": True}``.
        training: the same in training mode.
        call: ``call(module, inputs, **flags) -> outputs`` for a module that is called
            in another way; it gets those flags that its own signature takes.
        streams: random streams other than ``"params"`` and ``"dropout"`` that the
            module asks for by ``has_rng`` or ``split_rngs``.  Without being named here,
            a stream is drawn from ``"params"``, which is the same but for these two.

    Returns:
        ``apply_fn``, ``params`` and ``train_apply_fn``.  Where the module draws random
        numbers in evaluation mode, ``apply_fn`` raises ValueError.

    Raises:
        TypeError: no instance of a Linen module, variables that are no mapping, or
            arguments that the call does not take.
        ValueError: the variables have no ``"params"``.

    Example:
        >>> import jax.numpy as jnp
        >>> class Model(linen.Module):
        ...     @linen.compact
        ...     def __call__(self, x, train):
        ...         x = linen.Dense(1, kernel_init=linen.initializers.ones)(x)
        ...         return linen.Dropout(0.5, deterministic=not train)(x)
        >>> x, key = jnp.ones((64, 3)), jax.random.key(0)
        >>> variables = Model().init(key, x, train=False)
        >>> apply_fn, params, train_apply_fn = functional(Model(), variables)
        >>> sorted(set(apply_fn(params, x).ravel().tolist()))
        [3.0]
        >>> sorted(set(train_apply_fn(params, x, key).ravel().tolist()))
        [0.0, 6.0]
    """
    _check(module, variables)
    state = {name: values for name, values in variables.items() if name != "params"}
    names = ("params", *dict.fromkeys(("dropout", *streams)))
    evaluate = _in_mode(module, call, EVALUATION, evaluation=evaluation)
    train = _in_mode(module, call, TRAINING, training=training)

    def apply_fn(params: Params, inputs: PyTree) -> PyTree:
        collections = {**state, "params": params}
        try:
            try:  # to some modules, mutable statistics mean training
                return evaluate(collections, inputs, mutable=False)
            except errors.ModifyScopeVariableError:
                return evaluate(collections, inputs, mutable=list(state))[0]
        except errors.InvalidRngError as error:
            raise ValueError(
                f"apply_fn: {type(module).__name__} draws random numbers in evaluation "
                f"mode: {error}; give the flag that turns this off in evaluation="
            ) from error

    def train_apply_fn(params: Params, inputs: PyTree, key: Array) -> PyTree:
        rngs = dict(zip(names, jax.random.split(key, len(names)), strict=True))
        collections = {**state, "params": params}
        return train(collections, inputs, rngs=rngs, mutable=list(state))[0]

    return Functional(apply_fn, variables["params"], train_apply_fn)


def usual_flags(
    module: Any, call: Callable | None, usual: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns those arguments that a call takes.

    An argument is left out where it only overrides a flag of the module, that is where
    its default is None and the module has the flag: Linen wants one of the two.

    Args:
        module: Linen or NNX.
        call: ``call(module, inputs, **flags)``; None where the module itself is called.
        usual: arguments and their values.
    """
    taken = dict(_signature(module, call).parameters)
    if (
        call
        and callable(module)
        and any(p.kind is p.VAR_KEYWORD for p in taken.values())
    ):
        taken |= _signature(module, None).parameters
    return {
        name: value
        for name, value in usual.items()
        if name in taken
        and (taken[name].default is not None or not _has_flag(module, name))
    }


def bind_call(
    module: Any, call: Callable | None, flags: Mapping[str, Any], mode: str
) -> Callable[[Any, PyTree], PyTree]:
    """Returns the call of a module with its flags.

    Flags go by position where they can: lifted transformations know no others.

    Args:
        module: Linen or NNX.
        call: as in ``usual_flags``.
        flags: the arguments besides the inputs.
        mode: the name of the argument that they may have been given in.

    Raises:
        TypeError: the call takes other arguments.
    """
    signature = _signature(module, call)
    leading = [module, None] if call else [None]
    try:
        bound = signature.bind(*leading, **flags)
    except TypeError as error:
        called = "call" if call else f"{type(module).__name__}.__call__"
        raise TypeError(
            f"functional: {mode}={dict(flags)} does not fit {called}{signature}: "
            f"{error}; give what it takes in {mode}=, or write call="
        ) from error
    arguments = bound.args[len(leading) :]

    def run(module: Any, inputs: PyTree) -> PyTree:
        fn = call or type(module).__call__
        return fn(module, inputs, *arguments, **bound.kwargs)

    return run


def _signature(module: Any, call: Callable | None) -> inspect.Signature:
    if call is None and not callable(module):
        name = type(module).__name__
        raise TypeError(
            f"functional: {name} has no __call__; say call=how it is called"
        )
    return inspect.signature(call or module.__call__)


def _has_flag(module: Any, name: str) -> bool:
    return isinstance(getattr(module, name, None), bool)


def _in_mode(
    module: linen.Module,
    call: Callable | None,
    usual: Mapping[str, bool],
    **given: Mapping[str, Any] | None,
) -> Callable:
    """Returns ``module.apply`` with the attributes and the flags of a mode."""
    ((mode, arguments),) = given.items()
    flags = {**usual_flags(module, call, usual), **(arguments or {})}
    method = bind_call(module, call, flags, mode)
    fields = {field.name for field in dataclasses.fields(module)} & set(usual)
    unset = {name for name in fields - set(flags) if getattr(module, name) is None}
    flagged = {name for name in fields if _has_flag(module, name)} | unset
    configured = module.clone(**{name: usual[name] for name in flagged})
    return functools.partial(configured.apply, method=method)


def _check(module: linen.Module, variables: Mapping[str, PyTree]) -> None:
    if not isinstance(module, linen.Module):
        hint = "give an instance of a Linen module"
        if isinstance(module, nnx.Module):
            hint = "an NNX model goes to nnsanity.nnx.functional"
        raise TypeError(f"functional: module is {_what(module)}; {hint}")
    if not isinstance(variables, Mapping):
        raise TypeError(
            f"functional: variables is {_what(variables)}; give the dict that "
            "module.init returned"
        )
    if "params" not in variables:
        raise ValueError(
            f"functional: variables has no 'params' but {sorted(variables)}; did you "
            "give the parameters alone? Write variables={'params': params}"
        )


def _what(value: Any) -> str:
    """Words a value that is of a wrong type."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"of type {type(value).__name__}"
