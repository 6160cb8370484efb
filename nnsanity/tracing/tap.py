"""Runs a program again, and hands out or replaces the values at chosen places.

All of it happens while tracing: in a jitted function, what is neither read nor replaced
costs nothing.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax

from nnsanity._types import ApplyFn, Array, Params, PyTree
from nnsanity.tracing import compat
from nnsanity.tracing.compat import Equation, Jaxpr, Program
from nnsanity.tracing.layers import inspect
from nnsanity.tracing.steps import Site


@functools.partial(jax.jit, static_argnums=0)
def activations(apply_fn: ApplyFn, params: Params, inputs: PyTree) -> dict[str, Array]:
    """Returns what every layer puts out, after its nonlinearity.

    Costs one forward pass and the memory of all activations.  Dictionaries come out of
    a jitted function sorted by key: ask ``layers`` for the order of execution.

    Args:
        apply_fn: ``apply_fn(params, inputs) -> outputs``.
        params: any pytree of arrays.
        inputs: leading axis the examples.

    Returns:
        The values by layer name, of the shapes that the network computes.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"w": jnp.array([[1.0, -1.0]])}
        >>> apply_fn = lambda params, x: jax.nn.relu(x @ params["w"])
        >>> activations(apply_fn, params, jnp.array([[2.0]]))
        {'w': Array([[2., 0.]], dtype=float32)}
    """
    network = inspect(apply_fn, params, inputs)
    sites = {network.site(one.after): one.layer.name for one in network.layers}
    taps = Taps(read=dict.fromkeys(sites, lambda value: value))
    leaves = jax.tree.leaves((params, inputs))
    _, collected = evaluate(network.program, leaves, taps)
    return {sites[site]: value for site, value in collected.items()}


class Taps(NamedTuple):
    """What to do at which places.

    Attributes:
        read: what to hand out: ``read[site](value)``, a statistic or the value itself.
        write: what to put in the value's place: ``write[site](value)``.  A place that
            is both read and written hands out the new value.
    """

    read: Mapping[Site, Callable[[Array], PyTree]] = {}
    write: Mapping[Site, Callable[[Array], Array]] = {}


def evaluate(
    program: Program, arguments: Sequence[Array], taps: Taps
) -> tuple[list[Array], dict[Site, PyTree]]:
    """Runs a program on the leaves of its arguments.

    Args:
        program: as traced.
        arguments: leaves in the order of the program's arguments, of the same shapes.
        taps: what to read and to write.

    Returns:
        The leaves of the outputs, and what was read by place.
    """
    paths = {site.path for site in (*taps.read, *taps.write)}
    opened = {path[:depth] for path in paths for depth in range(1, len(path))}
    run = _Run(taps, frozenset(paths), frozenset(opened))
    return _run(run, program.jaxpr, program.consts, arguments, ())


class _Run(NamedTuple):
    """Taps, the equations that they touch, and those that hold such equations."""

    taps: Taps
    tapped: frozenset[tuple[int, ...]]
    opened: frozenset[tuple[int, ...]]


def _run(
    run: _Run,
    jaxpr: Jaxpr,
    consts: Sequence,
    arguments: Sequence,
    path: tuple[int, ...],
) -> tuple[list, dict[Site, PyTree]]:
    values = dict(zip(jaxpr.invars, arguments, strict=True))
    values |= dict(zip(jaxpr.constvars, consts, strict=True))
    collected: dict[Site, PyTree] = {}

    def value_of(atom: compat.Atom) -> Array:
        return atom.val if compat.is_literal(atom) else values[atom]

    for index, eqn in enumerate(jaxpr.eqns):
        here = (*path, index)
        operands = [value_of(atom) for atom in eqn.invars]
        if here in run.opened:
            results, more = _run_inside(run, eqn, operands, here)
            collected |= more
        else:
            results = compat.bind(eqn, operands)
        if here in run.tapped:
            results = _tapped(run.taps, results, here, collected)
        values |= dict(zip(eqn.outvars, results, strict=True))
    return [value_of(atom) for atom in jaxpr.outvars], collected


def _run_inside(
    run: _Run, eqn: Equation, operands: list, path: tuple[int, ...]
) -> tuple[list, dict[Site, PyTree]]:
    """Runs the body of a call in which something is tapped."""
    body = compat.called_jaxpr(eqn)
    if body is None:
        raise NotImplementedError(f"can't look inside of {eqn.primitive.name} yet")
    jaxpr, consts = body
    if eqn.primitive.name not in compat.REMATERIALIZATIONS:
        return _run(run, jaxpr, consts, operands, path)
    options = {name: eqn.params[name] for name in ("policy", "prevent_cse")}
    rematerialized = jax.checkpoint(
        lambda *values: _run(run, jaxpr, consts, values, path), **options
    )
    return rematerialized(*operands)


def _tapped(
    taps: Taps, results: list, path: tuple[int, ...], collected: dict[Site, PyTree]
) -> list:
    results = list(results)
    for position, value in enumerate(results):
        site = Site(path, position)
        if site in taps.write:
            results[position] = value = taps.write[site](value)
        if site in taps.read:
            collected[site] = taps.read[site](value)
    return results
