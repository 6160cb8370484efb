"""What a style of writing networks is, and how its layers are computed by hand."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_RANDOM = np.random.default_rng(7)
X = _RANDOM.normal(size=(32, 4)).astype(np.float32)
SEQUENCES = _RANDOM.normal(size=(8, 3, 4)).astype(np.float32)
IMAGES = _RANDOM.normal(size=(4, 7, 7, 4)).astype(np.float32)
TOKENS = np.arange(32, dtype=np.int32).reshape(8, 4) % 7
W = (np.eye(4) + 0.5 * _RANDOM.normal(size=(4, 4, 4))).astype(np.float32)
HEAD = _RANDOM.normal(size=(4, 2)).astype(np.float32)
DEAD = (2, 0, 3, 1)
"""The unit of each of four hidden layers that its bias kills."""
B = np.full((4, 4), 1.0, np.float32)
B[range(4), DEAD] = -100


def masks(*units: int, size: int = 4) -> np.ndarray:
    """Returns one row for each layer, True at its dead unit."""
    return np.arange(size) == np.asarray(units)[:, None]


def mask(unit: int, size: int = 4) -> np.ndarray:
    """Returns bool[units], True at the dead one."""
    return masks(unit, size=size)[0]


class Sight:
    """Notes what passes through the layers of a network that is written out by hand.

    In NumPy it computes in float64.  In jax.numpy it adds zeros before every
    nonlinearity, by which the loss can be differentiated.
    """

    def __init__(self, xp: object, zeros: dict | None = None) -> None:
        self.xp, self.zeros = xp, zeros
        self.before: dict[str, dict[int, object]] = {}
        self.after: dict[str, dict[int, object]] = {}

    def array(self, value: object) -> object:
        """Casts the inputs."""
        return self.xp.asarray(value, np.float64 if self.xp is np else np.float32)

    def linear(self, name: str, value: object, index: int | None = None) -> object:
        """A layer without nonlinearity."""
        return self.through(name, value, lambda value: value, index)

    def relu(self, name: str, value: object, index: int | None = None) -> object:
        """A layer with a ReLU."""
        xp = self.xp
        return self.through(name, value, lambda x: xp.where(x > 0, x, 0 * x), index)

    def through(
        self, name: str, value: object, nonlinearity: Callable, index: int | None = None
    ) -> object:
        """A layer with any nonlinearity; ``index`` is its turn of a loop."""
        before = self.before.setdefault(name, {})
        index = len(before) if index is None else index
        if self.zeros is not None:
            value = value + self.zeros[name][index]
        before[index] = value
        self.after.setdefault(name, {})[index] = nonlinearity(value)
        return self.after[name][index]


class Network(NamedTuple):
    """A network, and what is known about it on paper.

    Attributes:
        apply_fn: ``apply_fn(params, inputs) -> outputs``.
        params: of float32, if not said otherwise.
        inputs: of the 32 examples, or so.
        names: of its layers, in the order of execution.
        dead: mask for each layer that a ReLU follows.
        reference: ``reference(sight)`` computes the outputs; None leaves the layers
            to their names alone.
        turns: of the loops around a layer, where there are any.
        own: which of these axes have weights of their own; all, if not said.
        last: layers of which only the last turn comes out of a while loop.
        not_run: layers of a branch that is not taken.
        no_gradient: layers to which no gradient can be seen to come back.
        uninspected: parameters that belong to no layer.
        tolerance: of what passes through, relative.
    """

    apply_fn: Callable
    params: object
    inputs: object
    names: tuple[str, ...]
    dead: dict[str, np.ndarray]
    reference: Callable | None = None
    turns: Mapping[str, tuple[int, ...]] = {}
    own: Mapping[str, tuple[int, ...]] = {}
    last: tuple[str, ...] = ()
    not_run: tuple[str, ...] = ()
    no_gradient: tuple[str, ...] = ()
    uninspected: tuple[str, ...] = ()
    tolerance: float = 1e-4

    def loss_fn(self, params: object, inputs: object) -> object:
        """Some function of the outputs that no layer is indifferent to."""
        outputs = self.apply_fn(params, inputs)
        return jnp.sum(jnp.sin(outputs.astype(jnp.float32)))

    def _joined(self, name: str, seen: dict[int, object]) -> np.ndarray:
        if name in self.last:
            return np.asarray(seen[max(seen)])
        turns = self.turns.get(name, ())
        values = np.full((math.prod(turns), *seen[0].shape), np.nan)
        for index, value in seen.items():
            values[index] = value
        return values.reshape(*turns, *seen[0].shape)

    def by_numpy(self) -> Sight:
        """Computes everything in float64."""
        sight = Sight(np)
        self.reference(sight)
        return sight

    def activations(self) -> dict[str, np.ndarray]:
        """What the layers put out, in float64."""
        seen = self.by_numpy().after
        return {name: self._joined(name, values) for name, values in seen.items()}

    def gradients(self) -> dict[str, np.ndarray]:
        """The gradient by what enters the nonlinearities, by the added zeros."""
        zeros = jax.tree.map(
            lambda one: np.zeros(one.shape, np.float32), self.by_numpy().before
        )

        def loss_fn(zeros: dict) -> object:
            return jnp.sum(jnp.sin(self.reference(Sight(jnp, zeros))))

        hurry = {"xla_backend_optimization_level": 0}
        grads = jax.jit(jax.grad(loss_fn), compiler_options=hurry)(zeros)
        return {name: self._joined(name, values) for name, values in grads.items()}


class Style(NamedTuple):
    """A row of the table.

    Attributes:
        group: its heading.
        name: what it is called.
        build: returns the network.
        note: what a reader should know.
    """

    group: str
    name: str
    build: Callable[[], Network]
    note: str = ""


def as_arrays(tree: object) -> object:
    """Puts NumPy leaves on the device."""
    return jax.tree.map(jnp.asarray, tree)


def stack_of_layers(sight: Sight, count: int, name: str = "w", order=None) -> object:
    """The usual network by hand: ReLU layers of one name, then a head."""
    x = sight.array(X)
    for index in range(count) if order is None else order:
        x = sight.relu(name, x @ W[index] + B[index], index)
    return sight.linear("head", x @ HEAD)


def stacked_params(count: int) -> dict:
    """Parameters of ``stack_of_layers``."""
    return as_arrays({"w": W[:count], "b": B[:count], "head": HEAD})


def one_layer(sight: Sight, inputs: np.ndarray = X) -> object:
    """A ReLU layer and a head by hand."""
    hidden = sight.relu("w", sight.array(inputs) @ W[0] + B[0])
    return sight.linear("head", hidden @ HEAD)


ONE_LAYER = {"w": W[0], "b": B[0], "head": HEAD}
