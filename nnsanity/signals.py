"""What passes through the layers in a step, and the gradients that come back."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.dtypes import float0

from nnsanity._packed import Packed, packed
from nnsanity._tree import is_inexact, mean_square
from nnsanity._types import Array, LossFn, Params, PyTree
from nnsanity.quantities.units import dead_of, is_thresholded, never_active
from nnsanity.tracing.compat import zeros_of
from nnsanity.tracing.layers import Located, Network, Uninspected, inspect
from nnsanity.tracing.steps import Site
from nnsanity.tracing.tap import (
    Reading,
    Readings,
    Slots,
    Taps,
    evaluate,
    varied,
    watched,
)

FIELDS = (
    "preactivation_rms",
    "activation_rms",
    "preactivation_gradient_rms",
    "activation_gradient_rms",
)


class Signals(NamedTuple):
    """What passed through the layers in one step, by layer name.

    Layers inside of a scan over layers are stacked: one more axis of its length.  Turns
    of a loop with the same weights, such as time steps, count as more examples.  What
    the loss does with the outputs counts as the nonlinearity of the last layer.

    Attributes:
        packed: numbers by field and layer, of layers that are not stacked.
        stacks: the same of stacked layers.
        dead: bool[units] by layer, units that a thresholding nonlinearity held at a
            flat end for every example; only layers that have one.
        ran: bool[] by layer, only layers inside of a branch or a while loop: False
            where that was not taken, then their numbers are 0.
        watched: bool[]; False where ``when`` was, then all the numbers are 0.
        uninspected: parameters that belong to no layer, and why.
    """

    packed: Packed
    stacks: dict[str, dict[str, Array]]
    dead: dict[str, Array]
    ran: dict[str, Array]
    watched: Array
    uninspected: Uninspected

    @classmethod
    def of(
        cls,
        fields: Mapping[str, Mapping[str, Array]],
        *,
        dead: dict[str, Array],
        ran: dict[str, Array],
        watched: Array,
        uninspected: Uninspected,
    ) -> "Signals":
        """Packs numbers by field and layer."""
        single, stacks = (
            {
                field: {name: n for name, n in one.items() if bool(n.ndim) is is_stack}
                for field, one in fields.items()
            }
            for is_stack in (False, True)
        )
        return cls(packed(single), stacks, dead, ran, watched, uninspected)

    def by_layer(self, field: str) -> dict[str, Array]:
        """Returns the numbers of one of ``FIELDS``."""
        return self.packed.opened()[field] | self.stacks[field]

    @property
    def preactivation_rms(self) -> dict[str, Array]:
        """float32[] by layer, root mean square of what enters the nonlinearity."""
        return self.by_layer("preactivation_rms")

    @property
    def activation_rms(self) -> dict[str, Array]:
        """float32[] by layer, of what leaves it."""
        return self.by_layer("activation_rms")

    @property
    def preactivation_gradient_rms(self) -> dict[str, Array]:
        """float32[] by layer, of the gradient by what enters it; 0 if none comes."""
        return self.by_layer("preactivation_gradient_rms")

    @property
    def activation_gradient_rms(self) -> dict[str, Array]:
        """float32[] by layer, of the gradient of the loss by what leaves it."""
        return self.by_layer("activation_gradient_rms")


def value_and_grad(
    loss_fn: LossFn, *, has_aux: bool = False, when: Array | bool = True
) -> Callable:
    """Like ``jax.value_and_grad``, and says what passed through every layer.

    The numbers come from the one forward and the one backward pass of the gradient.
    The gradient by an activation is reduced where it passes, by a tap: an identity
    whose own derivative hands out the statistic of what comes back.  Worry where a
    gradient shrinks from layer to layer, or is 0.

    Args:
        loss_fn: ``loss_fn(params, batch) -> scalar``; with ``has_aux`` it returns
            ``(scalar, aux)``.  More arguments, by position or by name, are passed on.
        has_aux: whether it returns a pair.
        when: bool[], whether to look.  An array is asked in the compiled program: at
            every layer a branch leaves out the measuring where it is False.

    Returns:
        A function of ``(params, batch)`` that returns ``((loss, signals), grads)``;
        with ``has_aux`` ``(((loss, aux), signals), grads)``.  ``signals`` is a
        ``Signals``.  Leaves of ``params`` that are not floating-point have
        gradients of float0.

    Raises:
        TypeError: if ``when`` is not a boolean scalar.
        ValueError: if ``loss_fn`` does not return what it should.

    Example:
        >>> params = {"w": jnp.array([[2.0, -1.0]])}
        >>> loss_fn = lambda params, x: jnp.sum(jax.nn.relu(x @ params["w"]))
        >>> (loss, signals), grads = value_and_grad(loss_fn)(params, jnp.ones((4, 1)))
        >>> loss, grads["w"]
        (Array(8., dtype=float32), Array([[4., 0.]], dtype=float32))
        >>> signals.dead["w"], signals.activation_gradient_rms["w"]
        (Array([False,  True], dtype=bool), Array(1., dtype=float32))
    """
    if jnp.shape(when) != () or jnp.result_type(when) != jnp.bool_:
        raise TypeError(
            "value_and_grad: when must be a bool or a boolean scalar such as"
            f" step % 16 == 0, got {when!r}"
        )

    def value_and_grad_fn(params: Params, *rest: PyTree, **named: PyTree) -> tuple:
        more, call = _arrays_and_the_rest(loss_fn, rest, named)
        network = inspect(call, params, more)
        outputs = _checked_outputs(network.program.out_shape, has_aux=has_aux)
        leaves, structure = jax.tree.flatten(params)
        is_trained = [is_inexact(leaf) for leaf in leaves]
        taps, slots = _taps(network, when=when)

        def run(trained: list, slots: Slots) -> tuple:
            given = iter(trained)
            arguments = [
                next(given) if chosen else leaf
                for leaf, chosen in zip(leaves, is_trained, strict=True)
            ]
            arguments += more
            (loss, *aux), readings = evaluate(network.program, arguments, taps, slots)
            return loss, (aux, readings)

        trained = [leaf for leaf, one in zip(leaves, is_trained, strict=True) if one]
        differentiated = jax.value_and_grad(run, (0, 1), has_aux=True)
        slots = varied(slots, (leaves, more))  # where this is a part of a shard_map
        (loss, (aux, readings)), (grads, backward) = differentiated(trained, slots)
        given = iter(grads)
        grads = [
            next(given) if chosen else np.zeros(np.shape(leaf), float0)
            for leaf, chosen in zip(leaves, is_trained, strict=True)
        ]
        value = jax.tree.unflatten(outputs, [loss, *aux])
        signals = _signals(network, readings, backward, jnp.asarray(when))
        return (value, signals), jax.tree.unflatten(structure, grads)

    return value_and_grad_fn


def _arrays_and_the_rest(
    loss_fn: Callable, rest: tuple, named: dict[str, Any]
) -> tuple[list[Array], Callable]:
    """Splits off the arrays; flags, functions and other numbers are not traced.

    Returns:
        The arrays, and ``call(params, arrays)``.
    """
    leaves, structure = jax.tree.flatten((rest, named))
    is_array = [
        isinstance(leaf, jax.Array | np.ndarray | np.generic) for leaf in leaves
    ]

    def call(params: Params, arrays: list[Array]) -> PyTree:
        given = iter(arrays)
        merged = [
            next(given) if chosen else leaf
            for leaf, chosen in zip(leaves, is_array, strict=True)
        ]
        rest, named = jax.tree.unflatten(structure, merged)
        return loss_fn(params, *rest, **named)

    chosen = zip(leaves, is_array, strict=True)
    return [leaf for leaf, one in chosen if one], call


def _checked_outputs(out_shape: Any, *, has_aux: bool) -> Any:
    """Returns the structure of what the loss function returns, if it is right."""
    got = jax.tree.map(lambda one: f"{one.dtype}{list(one.shape)}", out_shape)
    is_pair = isinstance(out_shape, tuple) and len(out_shape) == 2
    if has_aux and not is_pair:
        raise ValueError(
            f"value_and_grad: with has_aux=True loss_fn must return (loss, aux), got"
            f" {got}"
        )
    loss = out_shape[0] if has_aux else out_shape
    shape = getattr(loss, "shape", None)
    if shape != () or not is_inexact(loss):
        hint = "; did you forget a mean?" if shape else ""
        if isinstance(loss, tuple):
            hint = "; pass has_aux=True if it returns (loss, aux)"
        raise ValueError(
            f"value_and_grad: loss_fn must return a floating-point scalar, got {got}"
            f"{hint}"
        )
    return jax.tree.structure(out_shape)


def _taps(network: Network, *, when: Array | bool) -> tuple[Taps, Slots]:
    """Returns what to read at the layers, and a slot for each gradient.

    A slot is 0 where the gradient is to be measured, and 1 where it is not.
    """
    measures: dict[Site, Callable] = {}
    slots: dict[Site, Array] = {}
    for one in network.layers:
        before, after = network.site(one.before), network.site(one.after)
        measures.setdefault(before, _measure)
        if is_thresholded(one):
            measures[after] = functools.partial(_measure, one=one)
        else:
            measures.setdefault(after, _measure)
        if network.without_gradient(one) is None:
            sizes = [axis.size for axis in one.around]
            slot = jnp.full(sizes, jnp.where(when, 0.0, 1.0), jnp.float32)
            slots |= dict.fromkeys((before, after), slot)
    watch = functools.partial(watched, _add_mean_square if when is True else _add_if)
    if when is True:
        return Taps(measures, watch=dict.fromkeys(slots, watch), fold=_folded), slots
    read = {
        site: functools.partial(_only_if, jnp.asarray(when), measure)
        for site, measure in measures.items()
    }
    return Taps(read, watch=dict.fromkeys(slots, watch), fold=_folded), slots


class _Measure(NamedTuple):
    """Mean squares, summed over turns of a while loop, and units that stood still."""

    squares: Array
    num_turns: Array
    dead: Array | None

    @property
    def mean_square(self) -> Array:
        return self.squares / jnp.maximum(self.num_turns, 1)


def _measure(values: Array, one: Located | None = None) -> _Measure:
    values = jax.lax.stop_gradient(values)
    dead = None if one is None else never_active(values, one=one)
    return _Measure(mean_square(values), jnp.ones((), jnp.float32), dead)


def _folded(earlier: _Measure, later: _Measure) -> _Measure:
    dead = jax.tree.map(jnp.logical_and, earlier.dead, later.dead)
    squares = earlier.squares + later.squares
    return _Measure(squares, earlier.num_turns + later.num_turns, dead)


def _only_if(when: Array, measure: Callable, values: Array) -> PyTree:
    """Measures where it is asked for; zeros elsewhere, at no cost."""
    shapes = jax.eval_shape(measure, values)

    def blank(values: Array) -> PyTree:
        return varied(zeros_of(shapes), values)

    def measured(values: Array) -> PyTree:
        return varied(measure(values), values)

    return jax.lax.cond(when, measured, blank, values)


def _add_mean_square(slot: Array, gradient: Array) -> Array:
    # The sum with the slot varies over the devices that the slot varies over.
    return slot + mean_square(gradient)


def _add_if(slot: Array, gradient: Array) -> Array:
    """The same where the slot is 0."""
    return 0 * slot + _only_if(slot == 0, mean_square, gradient)


def _signals(
    network: Network,
    readings: Readings,
    gradients: Mapping[Site, Array],
    watched: Array,
) -> Signals:
    fields: dict[str, dict[str, Array]] = {field: {} for field in FIELDS}
    dead, has_run = {}, {}
    for one in network.layers:
        name, after = one.layer.name, network.site(one.after)
        for site, forward, backward in (
            (network.site(one.before), *FIELDS[0::2]),
            (after, *FIELDS[1::2]),
        ):
            measure = readings[site].value
            reading = readings[site]._replace(value=measure.mean_square)
            fields[forward][name] = _root(reading, one, watched)
            if site in gradients:
                back = reading._replace(value=gradients[site])
                fields[backward][name] = _root(back, one, watched)
        ran = Reading(None, readings[after].ran).merged(one.shared, jnp.any).ran
        if ran is not None:
            missing = (1,) * (len(one.stack) - ran.ndim)
            ran = jnp.broadcast_to(ran.reshape(ran.shape + missing), one.layer.stack)
            has_run[name] = ran & watched
        if is_thresholded(one):
            mask = readings[after]._replace(value=readings[after].value.dead)
            dead[name] = dead_of(mask, one)
    return Signals.of(
        fields,
        dead=dead,
        ran=has_run,
        watched=watched,
        uninspected=Uninspected.of(network),
    )


def _root(squares: Reading, one: Located, watched: Array) -> Array:
    """Joins turns with the same weights."""
    merged = squares.merged(one.shared, jnp.mean)
    is_seen = watched if merged.ran is None else watched & merged.ran
    return jnp.where(is_seen, jnp.sqrt(merged.value), 0)
