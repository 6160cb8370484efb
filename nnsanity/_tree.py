"""Names of leaves, and reductions that leave a sharded array where it is."""

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from nnsanity._types import Array, PyTree

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def takes_numbers(
    function: Callable[_Arguments, _Result],
) -> Callable[_Arguments, _Result]:
    """Lets a public function raise a TypeError that names the argument.

    Where an array in it holds words, dates or objects, as ragged lists do, where a
    dictionary in it has keys that can't be sorted, which JAX asks for, and where
    ``key`` is no PRNG key.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        # Too many arguments, or too few, are the function's own to tell.
        named = dict(zip(signature.parameters, args, strict=False)) | kwargs
        for name, argument in named.items():
            if name == "key":
                check_key(function.__name__, argument)
            if name != "axis_name":
                _check_numbers(f"{function.__name__}: {name}", argument)
        return function(*args, **kwargs)

    return checked


def check_key(name: str, key: object, *, num_axes: int = 0) -> None:
    """Raises where a key is none.

    Args:
        name: of the public function, for the message.
        key: what the user gave for it.
        num_axes: 1 for several keys.
    """
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", ())
    is_new = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    is_old = dtype == jnp.uint32 and shape[num_axes:] in ((2,), (4,))
    is_right = (is_new and len(shape) == num_axes) or is_old
    if not is_right or 0 in shape:
        words = (
            "keys must be PRNG keys with a leading axis, as of jax.random.split(key, 3)"
            if num_axes
            else "key must be a PRNG key such as jax.random.key(0)"
        )
        raise TypeError(f"{name}: {words}, got {described(key)}")


def described(value: PyTree) -> str:
    """Words for an array, or for what stands in its place: ``float32[8,3]``.

    Example:
        >>> described(jnp.zeros((8, 3)))
        'float32[8,3]'
    """
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    if dtype is None or shape is None:
        return repr(value)
    return f"{dtype}[{','.join(map(str, shape))}]"


def _check_numbers(name: str, argument: PyTree) -> None:
    if isinstance(argument, str) or callable(argument):
        return  # an option; or a function, which may be a tree with words in it
    try:
        leaves = jax.tree.leaves(argument)
    except ValueError as error:
        raise TypeError(
            f"{name} holds a dictionary with keys of several types, which JAX can't"
            " sort; name them all by strings, or all by numbers"
        ) from error
    for leaf in leaves:
        dtype = getattr(leaf, "dtype", None)
        is_array = isinstance(dtype, np.dtype) and dtype.kind in "OSUmM"
        if is_array or isinstance(leaf, str | bytes):
            got = f"dtype {dtype}" if is_array else repr(leaf)
            raise TypeError(
                f"{name} must hold numbers, got {got}; encode words and dates as"
                " numbers, and cut ragged lists to one length"
            )


def leaf_names(tree: PyTree) -> tuple[str, ...]:
    """Names the leaves of a tree by their paths, in leaf order.

    The name is the path that a checkpoint would use, without a leading ``params/`` and
    without the ``/value`` that NNX variables end in.

    Args:
        tree: any pytree; ``None`` has no leaves.

    Returns:
        One name for each leaf.  A tree that is itself a leaf is called ``params``.

    Example:
        >>> leaf_names({"params": {"Dense_0": {"kernel": 1.0, "bias": 0.0}}})
        ('Dense_0/bias', 'Dense_0/kernel')
    """
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return tuple(_path_name(path) for path, _ in paths)


def _path_name(path: tuple) -> str:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    name = name.removeprefix("params/").removesuffix("/value")
    return name or "params"


def is_inexact(leaf: PyTree) -> bool:
    """Tells whether a leaf is an array of floating-point or complex numbers."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        return isinstance(leaf, float | complex)
    return jnp.issubdtype(dtype, jnp.inexact)


def inexact_leaves(tree: PyTree) -> list[Array]:
    """Returns the floating-point leaves, in leaf order."""
    return [leaf for leaf in jax.tree.leaves(tree) if is_inexact(leaf)]


def mean_square(values: Array) -> Array:
    """Returns the mean square in float32, of complex numbers that of their size."""
    values = in_float32(values)
    values = values if jnp.isrealobj(values) else jnp.abs(values)
    return jnp.mean(values**2).astype(jnp.float32)


@jax.jit
def finite_leaves(leaves: list[Array]) -> list[Array]:
    """Tells for each array whether all of it is finite; compiled for all at once."""
    return [jnp.isfinite(leaf).all() for leaf in leaves]


def accumulation_dtype(*arrays: Array) -> np.dtype:
    """Returns float32, or float64 where an array has it."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(jnp.float32, jnp.result_type(*arrays))


def in_float32(array: Array) -> Array:
    """Casts to float32 for a reduction; float64 stays."""
    array = jnp.asarray(array)
    return array.astype(accumulation_dtype(array))


def num_examples(tree: PyTree) -> int:
    """Returns the length of the leading axis of the first leaf."""
    return int(np.shape(jax.tree.leaves(tree)[0])[0])


def take_examples(tree: PyTree, rows: Array | np.ndarray | slice) -> PyTree:
    """Selects rows of the leading axis of every leaf."""
    return jax.tree.map(lambda leaf: leaf[rows], tree)
