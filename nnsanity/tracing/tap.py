"""Runs a program again, and hands out or replaces the values at chosen places.

All of it happens while tracing: in a jitted function, what is neither read nor replaced
costs nothing.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from nnsanity._tree import is_inexact
from nnsanity._types import Array, PyTree
from nnsanity.tracing import compat
from nnsanity.tracing.compat import Equation, Program
from nnsanity.tracing.control import Body, Path, bodies
from nnsanity.tracing.steps import ARGUMENTS, Site

Slots = Mapping[Site, PyTree]


class Taps(NamedTuple):
    """What to do at which places.

    Attributes:
        read: what to hand out: ``read[site](value)``, a statistic or the value itself.
        write: what to put in the value's place: ``write[site](value)``.  A place that
            is both read and written hands out the new value.
        watch: like ``write``, with what is passed in for this place:
            ``watch[site](value, slot)``.
        instead: what to run in the place of an equation: ``instead[path](eqn,
            operands)``, a list of its results.
        inline: paths of ``remat`` calls whose bodies run as if they were not in one.
        fold: joins what two turns of a while loop hand out.
    """

    read: Mapping[Site, Callable[[Array], PyTree]] = {}
    write: Mapping[Site, Callable[[Array], Array]] = {}
    watch: Mapping[Site, Callable[[Array, PyTree], Array]] = {}
    instead: Mapping[Path, Callable[[Equation, list], list]] = {}
    inline: frozenset[Path] = frozenset()
    fold: Callable[[PyTree, PyTree], PyTree] = lambda earlier, later: later


class Reading(NamedTuple):
    """What was handed out at one place.

    Attributes:
        value: what ``read`` made; one more leading axis for each axis of the loops
            around the place, the outermost first.
        ran: bool, whether the place was run at all; None where no branch and no while
            loop lies around it.  It has the axes of the loops around the outermost of
            these, or more of the leading axes.  Where it is False the value is 0.
    """

    value: PyTree
    ran: Array | None = None

    def merged(self, axes: tuple[int, ...], reduce: Callable) -> "Reading":
        """Joins turns of loops; those that were not run are left out.

        Args:
            axes: which of the leading axes.
            reduce: a reduction such as ``jnp.all`` with ``axis`` and ``where``.
        """
        if not axes:
            return self
        ran = self.ran
        if ran is not None:  # what lies inside of a branch runs in all turns or in none
            num_missing = max(axes) + 1 - ran.ndim
            ran = ran.reshape(ran.shape + (1,) * max(num_missing, 0))

        def reduced(one: Array) -> Array:
            return reduce(
                one, axis=axes, where=None if ran is None else _like(ran, one)
            )

        any_ran = None if ran is None else jnp.any(ran, axis=axes)
        return Reading(jax.tree.map(reduced, self.value), any_ran)

    def where_it_ran(self) -> PyTree:
        """Puts NaN where nothing was run; False or 0 where there is no NaN."""
        if self.ran is None:
            return self.value
        ran = self.ran

        def filled(one: Array) -> Array:
            other = jnp.nan if is_inexact(one) else 0
            return jnp.where(_like(ran, one), one, jnp.asarray(other, one.dtype))

        return jax.tree.map(filled, self.value)


Readings = dict[Site, Reading]


def evaluate(
    program: Program,
    arguments: Sequence[Array],
    taps: Taps,
    slots: Slots | None = None,
) -> tuple[list[Array], Readings]:
    """Runs a program on the leaves of its arguments.

    Args:
        program: as traced.
        arguments: leaves in the order of the program's arguments, of the same shapes.
        taps: what to read and to write.
        slots: what ``watch`` gets by place, with the axes of the loops around it; no
            slot for a place inside of a while loop.

    Returns:
        The leaves of the outputs, and what was read by place.
    """
    paths = {site.path for site in (*taps.read, *taps.write, *taps.watch)}
    places = {*paths, *taps.instead}
    opened = {path[:depth] for path in places for depth in range(1, len(path))}
    run = _Run(taps, frozenset(paths), frozenset(opened))
    whole = Body((), program.jaxpr, program.consts)
    return _run(run, whole, arguments, slots or {})


class _Run(NamedTuple):
    """Taps, the equations that they touch, and those that hold such equations."""

    taps: Taps
    tapped: frozenset[Path]
    opened: frozenset[Path]


def _run(
    run: _Run, body: Body, arguments: Sequence, slots: Slots
) -> tuple[list, Readings]:
    readings: Readings = {}
    arguments = _tapped(run, list(arguments), (*body.path, ARGUMENTS), slots, readings)
    values = dict(zip(body.jaxpr.invars, arguments, strict=True))
    values |= dict(zip(body.jaxpr.constvars, body.consts, strict=True))

    def value_of(atom: compat.Atom) -> Array:
        return atom.val if compat.is_literal(atom) else values[atom]

    for index, eqn in enumerate(body.jaxpr.eqns):
        here = (*body.path, index)
        operands = [value_of(atom) for atom in eqn.invars]
        if here in run.opened:
            below = {site: slot for site, slot in slots.items() if _is_in(site, here)}
            results, more = _run_inside(run, eqn, operands, here, below)
            readings |= more
        else:
            with jax.named_scope(compat.scope(eqn)):
                results = run.taps.instead.get(here, compat.bind)(eqn, operands)
        results = _tapped(run, results, here, slots, readings)
        values |= dict(zip(eqn.outvars, results, strict=True))
    return [value_of(atom) for atom in body.jaxpr.outvars], readings


def _is_in(site: Site, path: Path) -> bool:
    return site.path[: len(path)] == path


def _tapped(
    run: _Run, results: list, path: Path, slots: Slots, readings: Readings
) -> list:
    if path not in run.tapped:
        return results
    results, taps = list(results), run.taps
    for position, value in enumerate(results):
        site = Site(path, position)
        if site in taps.write:
            value = taps.write[site](value)
        if site in taps.watch and site in slots:
            value = taps.watch[site](value, slots[site])
        if site in taps.read:
            readings[site] = Reading(taps.read[site](value))
        results[position] = value
    return results


def _run_inside(
    run: _Run, eqn: Equation, operands: list, path: Path, slots: Slots
) -> tuple[list, Readings]:
    """Runs an equation again in whose bodies something is tapped."""
    rule = _CONTROL.get(eqn.primitive.name)
    if rule is not None:
        return rule(run, eqn, bodies(eqn, path), operands, slots)
    called = compat.called_jaxpr(eqn)
    if called is None:
        raise NotImplementedError(f"can't look inside of {eqn.primitive.name}")
    body = Body(path, *called)
    if eqn.primitive.name.startswith("custom_"):
        return _run_beside(run, eqn, body, operands, slots)
    if eqn.primitive.name in compat.REMATERIALIZATIONS and path not in run.taps.inline:
        if eqn.params["differentiated"]:  # what the backward pass computes again
            if eqn.params["prevent_cse"]:
                operands = jax.lax.optimization_barrier(operands)
            return _run(run, body, operands, slots)
        options = {name: eqn.params[name] for name in ("policy", "prevent_cse")}
        rematerialized = jax.checkpoint(
            lambda operands, slots: _run(run, body, operands, slots), **options
        )
        return rematerialized(operands, slots)
    operands = compat.placed(operands, eqn.params.get("in_shardings"))
    results, readings = _run(run, body, operands, slots)
    return compat.placed(results, eqn.params.get("out_shardings")), readings


def _run_beside(
    run: _Run, eqn: Equation, body: Body, operands: list, slots: Slots
) -> tuple[list, Readings]:
    """Reads inside of a call whose derivative the user wrote, and keeps that."""
    is_written = any(_is_in(site, body.path) for site in run.taps.write)
    if is_written:
        return _run(run, body, operands, slots)
    constants = [jax.lax.stop_gradient(operand) for operand in operands]
    _, readings = _run(run, body, constants, {})
    return compat.bind(eqn, operands), readings


def _run_scan(
    run: _Run, eqn: Equation, inside: tuple[Body, ...], operands: list, slots: Slots
) -> tuple[list, Readings]:
    (body,) = inside
    first, last = compat.carried(eqn, body.jaxpr)

    def turn(carry: list, scanned: tuple) -> tuple:
        xs, own_slots = scanned
        arguments = [*operands[:first], *carry, *xs]
        outputs, readings = _run(run, body, arguments, own_slots)
        return outputs[: last - first], (outputs[last - first :], readings)

    names = ("length", "reverse", "unroll", "_split_transpose")
    options = {name: eqn.params[name] for name in names if name in eqn.params}
    scan: Callable = functools.partial(jax.lax.scan, **options)
    scanned = operands[last:], slots
    carry, (ys, readings) = scan(turn, operands[first:last], scanned)
    return [*carry, *ys], readings


def _run_cond(
    run: _Run, eqn: Equation, inside: tuple[Body, ...], operands: list, slots: Slots
) -> tuple[list, Readings]:
    index, *others = operands
    blank: Readings = {}
    for body in inside:
        _, readings = jax.eval_shape(functools.partial(_run, run, body), others, slots)
        blank |= compat.zeros_of(readings)

    def branch(body: Body) -> Callable:
        def run_branch(operands: list, slots: Slots) -> tuple[list, Readings]:
            outputs, readings = _run(run, body, operands, slots)
            return outputs, _filled(blank, readings, like=(operands, slots))

        return run_branch

    return jax.lax.switch(index, [branch(body) for body in inside], others, slots)


def _filled(blank: Readings, readings: Readings, *, like: PyTree) -> Readings:
    """Adds the places that were not run, and says which were."""
    found = {
        site: Reading(
            one.value, jnp.asarray(site in readings) if one.ran is None else one.ran
        )
        for site, one in (blank | readings).items()
    }
    return varied(found, like)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def watched(
    add: Callable[[PyTree, Array], PyTree], value: Array, slot: PyTree
) -> Array:
    """Hands the value on; the gradient by the slot is ``add(slot, its gradient)``."""
    del add, slot
    return value


def _watched_forward(add: Callable, value: Array, slot: PyTree) -> tuple[Array, PyTree]:
    del add
    return value, slot


def _watched_backward(
    add: Callable, slot: PyTree, gradient: Array
) -> tuple[Array, PyTree]:
    return gradient, add(slot, gradient)


watched.defvjp(_watched_forward, _watched_backward)


def varied(tree: PyTree, like: PyTree) -> PyTree:
    """Gives arrays the type of what differs from device to device as others do.

    Under shard_map the branches of a condition have to agree in this.  Costs nothing.
    """
    nothing = jnp.zeros((), bool)
    for leaf in jax.tree.leaves(like):
        if not jax.dtypes.issubdtype(jnp.result_type(leaf), jax.dtypes.extended):
            nothing |= jnp.any((leaf != leaf) & False)
    return jax.tree.map(lambda one: jnp.where(nothing, jnp.zeros_like(one), one), tree)


def _run_while(
    run: _Run, eqn: Equation, inside: tuple[Body, ...], operands: list, slots: Slots
) -> tuple[list, Readings]:
    del slots  # no derivative comes back through it
    (body,) = inside
    num_test, num_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    tested, consts = operands[:num_test], operands[num_test : num_test + num_body]
    init = operands[num_test + num_body :]
    test = Body((*body.path, ARGUMENTS), *compat.opened(eqn.params["cond_jaxpr"]))
    _, shapes = jax.eval_shape(lambda: _run(run, body, [*consts, *init], {}))
    blank = compat.zeros_of(shapes)
    blank = _filled(blank, {}, like=operands)

    is_one_test = test.jaxpr.outvars[0].aval.shape == ()

    def test_of(carry: list) -> Array:
        return _run(run, test, [*tested, *carry], {})[0][0]

    def goes_on(state: tuple) -> Array:
        return jnp.any(test_of(state[0]))

    def turn(state: tuple) -> tuple:
        carry, earlier = state
        outputs, readings = _run(run, body, [*consts, *carry], {})
        if not is_one_test:  # by vmap, one for each example
            is_on = test_of(carry)
            outputs = [
                jnp.where(_like(is_on, new), new, old)
                for new, old in zip(outputs, carry, strict=True)
            ]
        later = _filled(blank, readings, like=operands)
        return outputs, {
            site: _folded(run.taps.fold, earlier[site], later[site]) for site in later
        }

    return jax.lax.while_loop(goes_on, turn, (init, blank))


def _folded(fold: Callable, earlier: Reading, later: Reading) -> Reading:
    """Joins two turns of a while loop, of which either may not have come by."""
    both = fold(earlier.value, later.value)

    had, has = jnp.asarray(earlier.ran), jnp.asarray(later.ran)

    def chosen(one: Array, joined: Array, other: Array) -> Array:
        known = jnp.where(_like(had, joined), joined, other)
        return jnp.where(_like(has, joined), known, one)

    value = jax.tree.map(chosen, earlier.value, both, later.value)
    return Reading(value, had | has)


def _like(flag: Array, value: Array) -> Array:
    return flag.reshape(flag.shape + (1,) * (value.ndim - flag.ndim))


def _run_shard_map(
    run: _Run, eqn: Equation, inside: tuple[Body, ...], operands: list, slots: Slots
) -> tuple[list, Readings]:
    """Every device hands out its own, along one more axis for each of the mesh."""
    (body,) = inside
    num_axes = len(body.axes)
    names = [axis.name for axis in body.axes]
    by_device = PartitionSpec(*names)

    def on_device(operands: list, slots: Slots) -> tuple[list, Readings]:
        own_slots = jax.tree.map(lambda one: one.reshape(one.shape[num_axes:]), slots)
        outputs, readings = _run(run, body, operands, own_slots)
        return outputs, jax.tree.map(
            lambda one: jnp.reshape(one, (1,) * num_axes + jnp.shape(one)), readings
        )

    return compat.shard_map_again(eqn, on_device, by_device)(operands, slots)


_CONTROL = {
    "scan": _run_scan,
    "cond": _run_cond,
    "while": _run_while,
    "shard_map": _run_shard_map,
}
