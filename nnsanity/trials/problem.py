"""What the user gives to a checkup, checked before anything runs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nnsanity._tree import (
    check_key,
    inexact_leaves,
    is_inexact,
    num_examples,
    take_examples,
)
from nnsanity._types import ApplyFn, Array, LossFn, Params, PyTree, TrainLossFn
from nnsanity.quantities.targets import kind_of_targets
from nnsanity.tracing.deepen import Deepening
from nnsanity.tracing.expand import Expansion
from nnsanity.tracing.layers import Located, Network, inspect
from nnsanity.tracing.replace import output_layer
from nnsanity.tracing.widen import Widening
from nnsanity.trials.outlying import InnerRange, range_of_targets

BATCH_SIZE = 32
"""Examples in one step where nothing is said."""
MAX_EXAMPLES = 50_000
"""Most examples that a checkup looks at; it draws them where there are more."""


class Given(NamedTuple):
    """What the user gave, before a checkup took as much of it as it looks at.

    Attributes:
        num_examples: of the data.
        batch_size: in one step.
    """

    num_examples: int
    batch_size: int


class Problem(NamedTuple):
    """A training program, as the checks want to see it.

    Attributes:
        apply_fn: ``apply_fn(params, inputs) -> outputs``.
        loss_fn: ``loss_fn(params, (inputs, targets)) -> scalar``.
        train_loss_fn: the same with a key and its noise on, or None.
        params: as given.
        inputs: tree of arrays, leading axis the examples.
        targets: tree of arrays, leading axis the examples.
        optimizer: an optax transformation, or None.
        batch_size: examples in one step.
        num_steps: steps that the user trains for.
        validation: ``(inputs, targets)``, or None.
        network: layers of ``apply_fn`` on one batch.
        head: the layer whose output the network returns, or None.
        kind: how targets and outputs belong together, or None.
        tokens: whether integer inputs are look-up indices.
        groups: the group of each input feature, or None.
        given: how many examples the user has, and in one step.
        target_range: of the targets without a few that look like slips, or None.
        wider: a layer that copies have more units of, or one beside which they have a
            hidden layer; or None.
        expanded: a column of the inputs that copies feed as several, or None.
        usual_loss: whether copies train on the loss that such targets usually go with.
    """

    apply_fn: ApplyFn
    loss_fn: LossFn
    train_loss_fn: TrainLossFn | None
    params: Params
    inputs: PyTree
    targets: PyTree
    optimizer: optax.GradientTransformation | None
    batch_size: int
    num_steps: int
    validation: tuple[PyTree, PyTree] | None
    network: Network
    head: Located | None
    kind: str | None
    tokens: bool
    groups: tuple[int, ...] | None
    given: Given
    target_range: InnerRange | None = None
    wider: Widening | Deepening | None = None
    expanded: Expansion | None = None
    usual_loss: bool = False

    @property
    def size(self) -> int:
        """Number of examples."""
        return num_examples(self.inputs)

    @property
    def size_in_words(self) -> str:
        """How many examples a trial is about."""
        size, num_given = self.size, self.given.num_examples
        words = f"{size:,} of the {num_given:,}" if size < num_given else f"{size}"
        left_out = int(self.left_out(self.targets).sum())
        rest = f" ({left_out} with outlying targets do not count)" if left_out else ""
        return f"{words} examples{rest}"

    def batch(self, rows: Array | np.ndarray | slice) -> tuple[PyTree, PyTree]:
        """Selects examples."""
        return take_examples((self.inputs, self.targets), rows)

    @property
    def slips(self) -> InnerRange | None:
        """The range of the targets without slips, where outputs are compared with them.

        None where nothing lies outside of it.
        """
        return self.target_range if self.kind == "numbers" else None

    def left_out(self, targets: PyTree) -> np.ndarray:
        """Tells which examples do not count where trainings are compared.

        Those whose targets look like slips: they decide what a network explains of the
        targets' variance, whatever it learned of all others.

        Args:
            targets: the problem's own, or those of a validation set.

        Returns:
            bool[examples].
        """
        if self.slips is not None:
            return self.slips.outside(targets)
        leaves = jax.tree.leaves(targets)
        return np.zeros(num_examples(leaves) if leaves else self.size, bool)

    def counting(self, batch: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        """Returns a batch as long as a given one, of examples that count.

        Args:
            batch: the first examples.
        """
        rows = np.flatnonzero(~self.left_out(self.targets))
        return self.batch(rows[: num_examples(batch)])


def checked_problem(
    apply_fn: ApplyFn,
    loss_fn: LossFn,
    params: Params,
    data: tuple[PyTree, PyTree],
    *,
    key: Array,
    optimizer: optax.GradientTransformation | None,
    batch_size: int,
    num_steps: int,
    train_loss_fn: TrainLossFn | None = None,
    validation: tuple[PyTree, PyTree] | None = None,
    groups: Any = None,
) -> Problem:
    """Checks the arguments of a checkup and gathers them.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if arguments do not fit each other.
    """
    _check_functions(apply_fn, loss_fn, train_loss_fn)
    check_key("checkup", key)
    _check_optimizer(optimizer)
    if not inexact_leaves(params):
        raise ValueError(
            "checkup: params must hold a floating-point array, got"
            f" {jax.tree.structure(params)}"
        )
    inputs, targets = _checked_pair(data, "data")
    size = num_examples(inputs)
    for name, number in (("batch_size", batch_size), ("num_steps", num_steps)):
        if not isinstance(number, int | np.integer) or isinstance(number, bool):
            raise TypeError(f"checkup: {name} must be an integer, got {number!r}")
    if batch_size == BATCH_SIZE:  # what nobody may have asked for
        batch_size = min(batch_size, size)
    if not 1 <= batch_size <= size:
        raise ValueError(
            f"checkup: batch_size must be from 1 to the {size} examples of data, got"
            f" {batch_size}"
        )
    if num_steps < 1:
        raise ValueError(f"checkup: num_steps must be at least 1, got {num_steps}")
    held_out = None if validation is None else _checked_pair(validation, "validation")
    if held_out is not None:
        _check_alike((inputs, targets), held_out)
    given = Given(size, batch_size)
    if size > MAX_EXAMPLES:
        rows = jax.random.permutation(key, size)[:MAX_EXAMPLES]
        inputs, targets = take_examples((inputs, targets), np.asarray(rows))
        batch_size = min(batch_size, MAX_EXAMPLES)
    inputs, targets, held_out = jax.tree.map(jnp.asarray, (inputs, targets, held_out))
    batch = take_examples((inputs, targets), slice(batch_size))
    outputs = _checked_outputs(apply_fn, params, batch[0], batch_size)
    _check_loss(loss_fn, params, batch)
    if train_loss_fn is not None:
        _check_loss(train_loss_fn, params, batch, key, name="train_loss_fn")
    network = inspect(apply_fn, params, batch[0])
    first = network.layers[0].layer.kind if network.layers else ""
    kind = kind_of_targets(outputs, targets)
    return Problem(
        apply_fn,
        loss_fn,
        train_loss_fn,
        params,
        inputs,
        targets,
        optimizer,
        batch_size,
        num_steps,
        held_out,
        network,
        output_layer(network),
        kind,
        first == "embedding",
        None if groups is None else tuple(int(group) for group in groups),
        given,
        range_of_targets(inputs, targets) if kind == "numbers" else None,
    )


def _check_functions(
    apply_fn: ApplyFn, loss_fn: LossFn, train_loss_fn: TrainLossFn | None
) -> None:
    named = {"apply_fn": apply_fn, "loss_fn": loss_fn, "train_loss_fn": train_loss_fn}
    for name, function in named.items():
        if not callable(function) and not (
            name == "train_loss_fn" and function is None
        ):
            raise TypeError(f"checkup: {name} must be callable, got {function!r}")


def _check_optimizer(optimizer: object) -> None:
    if optimizer is None:
        return
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            "checkup: optimizer must be an optax transformation such as"
            f" optax.adam(1e-3), with init and update, got {optimizer!r}"
        )


def _checked_pair(data: object, name: str) -> tuple[PyTree, PyTree]:
    if not isinstance(data, tuple | list) or len(data) != 2:
        raise TypeError(f"checkup: {name} must be (inputs, targets), got {type(data)}")
    pair = tuple(jax.tree.map(lambda leaf: _as_array(leaf, name), one) for one in data)
    lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(pair)}
    if not lengths or () in lengths:
        raise ValueError(
            f"checkup: every array of {name} must have a leading axis of examples; give"
            " arrays, not lists of numbers or lists of unequal length: np.asarray(...)"
        )
    if len(lengths) > 1:
        shapes = [np.shape(leaf) for leaf in jax.tree.leaves(pair)]
        raise ValueError(
            f"checkup: inputs and targets of {name} must have equally many examples,"
            f" got shapes {shapes}"
        )
    if lengths == {(0,)}:
        raise ValueError(f"checkup: {name} holds no examples")
    return pair[0], pair[1]


def _check_alike(data: tuple, validation: tuple) -> None:
    ours, theirs = (
        jax.tree.map(lambda leaf: np.shape(leaf)[1:], pair)
        for pair in (data, validation)
    )
    if ours != theirs:
        raise ValueError(
            "checkup: validation must have the same arrays as data, of the same shape"
            f" for each example, got {theirs} against {ours}"
        )


def _as_array(leaf: object, name: str) -> np.ndarray | Array:
    array = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
    if array.dtype == object or array.dtype.kind in "SUmM":
        raise TypeError(
            f"checkup: {name} must hold numbers, got dtype {array.dtype}; encode words"
            " and dates as numbers, and cut ragged lists to one length"
        )
    narrow = jax.dtypes.canonicalize_dtype(array.dtype)
    if narrow != array.dtype and array.dtype.kind in "iu" and array.size:
        limits = np.iinfo(narrow)
        if array.min() < limits.min or array.max() > limits.max:
            raise ValueError(
                f"checkup: {name} holds integers that do not fit {narrow}, up to"
                f" {array.max()}; give what they stand for, or set jax_enable_x64"
            )
    return array


def _checked_outputs(
    apply_fn: ApplyFn, params: Params, inputs: PyTree, batch_size: int
) -> PyTree:
    outputs = _shapes(apply_fn, params, inputs, name="apply_fn")
    for leaf in jax.tree.leaves(outputs):
        if leaf.shape[:1] != (batch_size,):
            raise ValueError(
                "checkup: the outputs of apply_fn must have the examples on their"
                f" leading axis: {batch_size} inputs gave shape {leaf.shape}"
            )
    return outputs


def _check_loss(loss_fn: Callable, *args: PyTree, name: str = "loss_fn") -> None:
    loss = _shapes(loss_fn, *args, name=name)
    shape = getattr(loss, "shape", None)
    if shape != () or not is_inexact(loss):
        hint = "; did you forget a mean?" if shape else ""
        got = f"{loss.dtype}{list(shape)}" if shape is not None else repr(loss)
        raise ValueError(f"checkup: {name} must return a float scalar, got {got}{hint}")


def _shapes(function: Callable, *args: PyTree, name: str) -> PyTree:
    try:
        return jax.eval_shape(function, *args)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if "rng" in text.lower():
            raise ValueError(
                f"checkup: {name} asks for a random key that it was not given. Close"
                " over it, or switch the noise off: lambda params, inputs:"
                " model.apply({'params': params}, inputs, deterministic=True)"
            ) from error
        raise
