"""Many small arrays in a few: each that a compiled function returns costs time."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from nnsanity._types import Array, PyTree


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("arrays",),
    meta_fields=("structure", "places"),
)
@dataclasses.dataclass(frozen=True)
class Packed:
    """The arrays of a tree, joined where they have one type.

    A compiled step spends some microseconds on each array that it takes or returns,
    whatever its size: fifty small ones weighed as much as all the measuring of a small
    network.

    Attributes:
        arrays: the numbers of all leaves of a type, by its name; axes of ``vmap`` or
            ``scan`` stand before them.
        structure: of the tree.
        places: type and shape of each leaf.
    """

    arrays: dict[str, Array]
    structure: Any
    places: tuple[tuple[str, tuple[int, ...]], ...]

    def opened(self) -> PyTree:
        """Returns the tree; on the host, where the arrays have been fetched."""
        arrays = self.arrays.values()
        if any(isinstance(one, jax.ShapeDtypeStruct) for one in arrays):
            return jax.eval_shape(_taken_apart, self)
        on_device = any(isinstance(one, jax.Array) for one in arrays)
        return _split(self) if on_device else _taken_apart(self)


def packed(tree: PyTree) -> Packed:
    """Joins the leaves of a tree that have one type.

    Example:
        >>> both = packed({"a": jnp.ones(2), "b": jnp.zeros((), jnp.int32), "c": 7.0})
        >>> both.arrays["float32"], both.opened()["b"]
        (Array([1., 1., 7.], dtype=float32), Array(0, dtype=int32))
    """
    leaves, structure = jax.tree.flatten(tree)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    places = tuple((leaf.dtype.name, leaf.shape) for leaf in leaves)
    arrays = {
        name: jnp.concatenate(
            [jnp.ravel(leaf) for leaf in leaves if leaf.dtype.name == name]
        )
        for name in sorted({name for name, _ in places})
    }
    return Packed(arrays, structure, places)


def _taken_apart(both: Packed) -> PyTree:
    used = dict.fromkeys(both.arrays, 0)
    leaves = []
    for name, shape in both.places:
        numbers, start = both.arrays[name], used[name]
        used[name] = stop = start + math.prod(shape)
        leaves.append(numbers[..., start:stop].reshape(numbers.shape[:-1] + shape))
    return jax.tree.unflatten(both.structure, leaves)


_split = jax.jit(_taken_apart)
"""All at once, where eager slices would be programs of their own."""
