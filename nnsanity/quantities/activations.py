"""What every layer puts out."""

import functools
from collections.abc import Iterable, Mapping

import jax

from nnsanity._types import ApplyFn, Array, Params, PyTree
from nnsanity.tracing.layers import Uninspected, inspect
from nnsanity.tracing.tap import Taps, evaluate


@jax.tree_util.register_pytree_with_keys_class
class Activations(dict[str, Array]):
    """Values by layer name, in the order of execution, also out of ``jax.jit``.

    A dictionary; where JAX or Flax ask for a plain one, ``dict(found)`` is.

    Attributes:
        uninspected: parameters that belong to no layer, and why.
    """

    def __init__(self, values: Mapping[str, Array], uninspected: Uninspected) -> None:
        super().__init__(values)
        self.uninspected = uninspected

    def tree_flatten_with_keys(self) -> tuple[list, tuple]:
        """Takes it apart for JAX."""
        leaves = [(jax.tree_util.DictKey(name), one) for name, one in self.items()]
        return leaves, (tuple(self), self.uninspected)

    @classmethod
    def tree_unflatten(cls, static: tuple, leaves: Iterable) -> "Activations":
        """Puts it together again."""
        names, uninspected = static
        return cls(dict(zip(names, leaves, strict=True)), uninspected)


@functools.partial(jax.jit, static_argnums=0)
def activations(apply_fn: ApplyFn, params: Params, inputs: PyTree) -> Activations:
    """Returns what every layer puts out, after its nonlinearity.

    Costs one forward pass and the memory of all activations.

    Args:
        apply_fn: ``apply_fn(params, inputs) -> outputs``.
        params: any pytree of arrays.
        inputs: leading axis the examples.

    Returns:
        A dictionary of the values by layer name, of the shapes that the network
        computes; ``uninspected`` tells which parameters belong to no layer.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"w": jnp.array([[1.0, -1.0]])}
        >>> apply_fn = lambda params, x: jax.nn.relu(x @ params["w"])
        >>> activations(apply_fn, params, jnp.array([[2.0]]))
        {'w': Array([[2., 0.]], dtype=float32)}
    """
    network = inspect(apply_fn, params, inputs)
    sites = {one.layer.name: network.site(one.after) for one in network.layers}
    taps = Taps(read=dict.fromkeys(sites.values(), lambda value: value))
    leaves = jax.tree.leaves((params, inputs))
    _, readings = evaluate(network.program, leaves, taps)
    values = {name: readings[site].where_it_ran() for name, site in sites.items()}
    return Activations(values, Uninspected(tuple(network.uninspected.items())))
