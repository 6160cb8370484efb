"""Where the first NaN or infinity of a step is born, forward or backward."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnsanity._tree import is_inexact, leaf_names, takes_numbers
from nnsanity._types import Array, LossFn, Params, PyTree
from nnsanity.tracing import compat
from nnsanity.tracing.layers import inspect
from nnsanity.tracing.opening import open_up
from nnsanity.tracing.operations import CONTRACTIONS, LOOK_UPS
from nnsanity.tracing.steps import ARGUMENTS, Site, Steps
from nnsanity.tracing.tap import Readings, Taps, evaluate


class Birth(NamedTuple):
    """Where numbers stop to be finite.

    Attributes:
        layer: name of the layer, empty before the first one; for an argument the name
            of the leaf.
        operation: name of JAX's primitive, ``"argument"`` for what was given.
        source: ``file.py:41 (function)``; empty for an argument.
        is_backward: whether the loss is finite, and only its gradient is not.
        is_nan: whether it is a NaN, not an infinity.
        turn: which turn of each loop around it, from 0, the outermost first.
    """

    layer: str
    operation: str
    source: str
    is_backward: bool
    is_nan: bool
    turn: tuple[int, ...]


class _Place(NamedTuple):
    """What is known of one value without running the program."""

    layer: str
    operation: str
    source: str
    sources: tuple[int, ...]
    shape: tuple[int, ...]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Places:
    """The values of a step and what each is made from; has no leaves.

    Attributes:
        values: in the order of execution.
        loss: the index of the loss.
        grads: the indices of the gradients.
    """

    values: tuple[_Place, ...]
    loss: tuple[int, ...]
    grads: tuple[int, ...]


class FirstNonfinite(NamedTuple):
    """Which values of a step are not finite.

    Attributes:
        nonfinite: int32[values], in which turn of the loops around it a value first
            held a NaN or an infinity, counted from 1; 0 where it never did.
        nan: int32[values], the same for NaN alone.
        places: what the values are; no arrays.
    """

    nonfinite: Array
    nan: Array
    places: Places

    @property
    def birth(self) -> Birth | None:
        """Where the first value was born that spoiled the loss, or else a gradient.

        None where both are finite.  Infinities that are written into the program, as
        masks of attention are, count only where a NaN is made of them.  Reads the
        arrays, so not inside of ``jit``.
        """
        return _birth(self)


@takes_numbers
def first_nonfinite(loss_fn: LossFn, params: Params, batch: PyTree) -> FirstNonfinite:
    """Finds where the first NaN or infinity of a training step is born.

    The step runs once, forward and backward, as one compiled program that says of each
    of its values whether it is finite; nothing is run again on the host.  ``birth``
    then follows what spoiled the loss, or the gradients, back to the operation whose
    operands were finite still.

    Costs one gradient and a look at each value of it; compiles for longer than a step.

    Args:
        loss_fn: ``loss_fn(params, batch) -> scalar``.
        params: any pytree of arrays.
        batch: any pytree of arrays.

    Returns:
        ``FirstNonfinite``; its ``birth`` holds layer, operation and source line.

    Raises:
        TypeError: if ``loss_fn`` can't be differentiated.

    Example:
        >>> def loss_fn(params, x):
        ...     return jnp.sum(jnp.sqrt(x @ params["w"]))
        >>> params = {"w": jnp.array([[1.0], [-1.0]])}
        >>> first_nonfinite(loss_fn, params, jnp.array([[2.0, 1.0]])).birth is None
        True
        >>> birth = first_nonfinite(loss_fn, params, jnp.array([[1.0, 2.0]])).birth
        >>> birth.layer, birth.operation, birth.is_backward
        ('w', 'sqrt', False)
        >>> birth = first_nonfinite(loss_fn, params, jnp.array([[1.0, 1.0]])).birth
        >>> birth.layer, birth.operation, birth.is_backward
        ('w', 'div', True)
    """
    return _first_nonfinite(loss_fn, params, batch)


@functools.partial(jax.jit, static_argnums=0)
def _first_nonfinite(loss_fn: LossFn, params: Params, batch: PyTree) -> FirstNonfinite:
    leaves, structure = jax.tree.flatten(params)
    is_trained = [is_inexact(leaf) for leaf in leaves]

    def step(leaves: list, batch: PyTree) -> tuple[Array, list]:
        def loss_of(trained: list) -> Array:
            given = iter(trained)
            merged = [
                next(given) if chosen else leaf
                for leaf, chosen in zip(leaves, is_trained, strict=True)
            ]
            return loss_fn(jax.tree.unflatten(structure, merged), batch)

        trained = [leaf for leaf, one in zip(leaves, is_trained, strict=True) if one]
        return jax.value_and_grad(loss_of)(trained)

    program = compat.trace(step, leaves, batch)
    steps = open_up(program, len(leaves), all_control=True)
    sites = {
        site: value
        for value, site in enumerate(steps.sites)
        if site is not None and is_inexact(steps.avals[value])
    }
    taps = Taps(read=dict.fromkeys(sites, _look), fold=_folded)
    _, readings = evaluate(program, jax.tree.leaves((leaves, batch)), taps)
    labels = _labels(loss_fn, params, batch)
    places = _places(steps, sites, labels)
    numbers = [_first_turns(readings, site) for site in sites]
    nonfinite, nan = (jnp.stack(column) for column in zip(*numbers, strict=True))
    return FirstNonfinite(nonfinite, nan, places)


class _Look(NamedTuple):
    """The first turn, from 1, in which a value was not finite, and how many it had."""

    nonfinite: Array
    nan: Array
    num_turns: Array


def _look(value: Array) -> _Look:
    return _Look(
        jnp.any(~jnp.isfinite(value)).astype(jnp.int32),
        jnp.any(jnp.isnan(value)).astype(jnp.int32),
        jnp.ones((), jnp.int32),
    )


def _folded(earlier: _Look, later: _Look) -> _Look:
    def first(had: Array, has: Array) -> Array:
        return jnp.where(had > 0, had, jnp.where(has > 0, earlier.num_turns + has, 0))

    return _Look(
        first(earlier.nonfinite, later.nonfinite),
        first(earlier.nan, later.nan),
        earlier.num_turns + later.num_turns,
    )


def _first_turns(readings: Readings, site: Site) -> tuple[Array, Array]:
    look = readings[site].where_it_ran()
    return _first_of(look.nonfinite), _first_of(look.nan)


def _first_of(turns: Array) -> Array:
    """Returns the place of the first positive number, from 1; a scalar stays."""
    if turns.ndim == 0:
        return turns
    flat = turns.reshape(-1) > 0
    return jnp.where(jnp.any(flat), jnp.argmax(flat).astype(jnp.int32) + 1, 0)


def _labels(loss_fn: LossFn, params: Params, batch: PyTree) -> tuple[list[str], dict]:
    """Returns the names of the arguments, and the layers by their weights."""
    network = inspect(loss_fn, params, batch)
    layers: dict[int, str] = {}
    for one in network.layers:
        for leaf in one.leaves:
            layers.setdefault(leaf, one.layer.name)
    return [*leaf_names(params), *leaf_names({"batch": batch})], layers


def _places(
    steps: Steps, sites: dict[Site, int], labels: tuple[list[str], dict]
) -> Places:
    names, layers = labels
    index = {value: number for number, value in enumerate(sites.values())}
    sources = _sources(steps, sites)
    belongs = _layers_of(steps, layers, sources)
    values = []
    for site, value in sites.items():
        maker = steps.makers.get(value)
        is_given = site.path == (ARGUMENTS,)
        values.append(
            _Place(
                names[site.position] if is_given else belongs.get(value, ""),
                "argument" if maker is None else maker.eqn.primitive.name,
                _source_line(steps, value),
                tuple(index[one] for one in sources[value] if one in index),
                tuple(axis.size for axis in steps.axes(site.path)),
            )
        )
    loss, *grads = steps.outputs
    return Places(
        tuple(values),
        tuple(index[one] for one in (loss,) if one in index),
        tuple(index[one] for one in grads if one in index),
    )


def _source_line(steps: Steps, value: int) -> str:
    """Says where a value is computed, or what it is computed from."""
    while (maker := steps.makers.get(value)) is not None:
        line = compat.source_line(maker.eqn)
        made_from = [one for one in maker.inputs if one is not None]
        if line or not made_from:
            return line
        value = max(made_from)
    return ""


def _sources(steps: Steps, sites: dict[Site, int]) -> dict[int, list[int]]:
    """Lists what each value is made from, through the control flow."""
    found: dict[int, list[int | None]] = {value: [] for value in sites.values()}
    by_path = {step.path: step for step in steps.steps}
    for step in steps.steps:
        if not step.is_opened:
            for output in step.outputs:
                found[output] = list(step.inputs)
    for path, body in steps.bodies.items():
        control = by_path.get(path) or by_path[path[:-1]]
        ends = steps.ends[path]
        for position, operand in enumerate(body.operands):
            argument = sites.get(Site((*path, ARGUMENTS), position))
            if argument is not None:
                found[argument].append(control.inputs[operand])
                if position in body.feedback:
                    found[argument].append(ends[body.feedback[position]])
        for end, result in zip(ends, body.results, strict=True):
            output = control.outputs[result]
            found.setdefault(output, []).append(end)
    return {
        value: [one for one in made_from if one is not None]
        for value, made_from in found.items()
    }


def _layers_of(
    steps: Steps, layers: dict[int, str], sources: dict[int, list[int]]
) -> dict[int, str]:
    """Says to which layer each value belongs: the last one whose weight it has met.

    What comes back in the backward pass belongs to the layer of what it meets there.
    """
    order = {name: rank for rank, name in enumerate(dict.fromkeys(layers.values()))}
    found: dict[int, str] = {}
    backward: set[int] = set()
    loss = steps.makers.get(steps.outputs[0]) if steps.outputs[0] is not None else None
    is_after = False

    def layer_of(value: int) -> str | None:
        if value not in found and value not in steps.makers:  # an argument of a body
            known = [found[one] for one in sources.get(value, ()) if one in found]
            if known:
                found[value] = max(known, key=order.__getitem__)
        return found.get(value)

    for step in steps.steps:
        read = [value for value in step.inputs if value is not None]
        if step.is_opened:
            read = [one for output in step.outputs for one in sources.get(output, ())]
        of_values = {value: layer_of(value) for value in read}
        known = [name for name in of_values.values() if name is not None]
        if is_after:
            met = [
                name
                for value, name in of_values.items()
                if name is not None and value not in backward
            ]
            known = met or known
            backward.update(step.outputs)
        if step.eqn.primitive.name in CONTRACTIONS | LOOK_UPS:
            leaves = [
                leaf
                for value in steps.weights(step)
                for leaf in steps.origins[value].parameters
            ]
            known += [layers[leaf] for leaf in leaves if leaf in layers]
        if known:
            last = max(known, key=order.__getitem__)
            found |= dict.fromkeys(step.outputs, last)
        is_after |= step is loss
    return found


def _birth(found: FirstNonfinite) -> Birth | None:
    nonfinite, nan = np.asarray(found.nonfinite), np.asarray(found.nan)
    values = found.places.values
    targets = [one for one in found.places.loss if nonfinite[one]]
    is_backward = not targets
    targets = targets or [one for one in found.places.grads if nonfinite[one]]

    def turn(one: int) -> tuple[int, ...]:
        shape, first = values[one].shape, int(nonfinite[one]) - 1
        if not shape:
            return (first,) if first else ()
        return tuple(int(part) for part in np.unravel_index(first, shape))

    turns = {one: turn(one) for one in np.flatnonzero(nonfinite).tolist()}

    def spoiled_by(one: int) -> list[int]:
        return [
            source
            for source in values[one].sources
            if source in turns and source != one and _is_before(turns, source, one)
        ]

    written = _written(found, nan, turns)
    births, waiting, seen = [], list(targets), set(targets)
    while waiting:
        one = waiting.pop()
        causes = [other for other in spoiled_by(one) if other not in written]
        if not causes:
            births.append(one)
        new = [other for other in causes if other not in seen]
        seen.update(new)
        waiting += new
    if not births:
        return None
    first = min(births, key=lambda one: (_outer(turns[one]), one))
    place = values[first]
    return Birth(
        place.layer,
        place.operation,
        place.source,
        is_backward,
        bool(nan[first] == nonfinite[first]),
        turns[first],
    )


def _is_before(turns: dict[int, tuple[int, ...]], one: int, other: int) -> bool:
    depth = min(len(turns[one]), len(turns[other]))
    return turns[one][:depth] <= turns[other][:depth]


def _outer(turn: tuple[int, ...]) -> int:
    return turn[0] if turn else 0


def _written(
    found: FirstNonfinite, nan: np.ndarray, turns: dict[int, tuple[int, ...]]
) -> set[int]:
    """Returns infinities that stand in the program, and what is made of them alone."""
    written: set[int] = set()
    for one in sorted(turns):
        place = found.places.values[one]
        if nan[one] or (place.operation == "argument" and not place.sources):
            continue
        bad = [source for source in place.sources if source in turns]
        if not place.sources or (bad and all(source in written for source in bad)):
            written.add(one)
    return written
