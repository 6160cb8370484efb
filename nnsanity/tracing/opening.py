"""Opens a program up: its calls, loops and branches become one list of steps."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from nnsanity.tracing import compat, control
from nnsanity.tracing.compat import Equation, Jaxpr, Program
from nnsanity.tracing.control import Body, Path
from nnsanity.tracing.operations import (
    ACTIVATING,
    CONTRACTIONS,
    LOOK_UPS,
    is_look_up,
    operations,
)
from nnsanity.tracing.steps import ARGUMENTS, Origin, Site, Step, Steps, joined


def open_up(
    program: Program, num_parameters: int, *, all_control: bool = False
) -> Steps:
    """Lists the steps of a program whose first arguments are the parameters.

    Args:
        program: as traced.
        num_parameters: how many of its leading arguments are leaves of the parameters.
        all_control: whether loops and branches are opened that hold no layer.
    """
    inner_layers: frozenset[Path] = frozenset()
    while True:
        builder = _Builder(inner_layers, all_control=all_control)
        inputs, outputs = builder.whole(program, num_parameters)
        if builder.found <= inner_layers:
            break
        inner_layers |= builder.found
    return Steps(
        tuple(builder.steps),
        inputs,
        outputs,
        frozenset(builder.returned),
        builder.avals,
        builder.sites,
        builder.origins,
        builder.bodies,
        frozenset(builder.own_derivative),
        builder.literals,
        {output: step for step in builder.steps for output in step.outputs},
        builder.roots,
        inner_layers,
        builder.ends,
    )


def _is_key(aval: Any) -> bool:
    dtype = getattr(aval, "dtype", None)
    return dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


class _Builder:
    """Walks through a jaxpr and what it runs, and numbers the values."""

    def __init__(self, inner_layers: frozenset[Path], *, all_control: bool) -> None:
        self.all_control = all_control
        self.inner_layers = inner_layers
        self.found: frozenset[Path] = frozenset()
        self.steps: list[Step] = []
        self.avals: list = []
        self.sites: list[Site | None] = []
        self.origins: list[Origin] = []
        self.returned: set[int] = set()
        self.literals: dict[int, Any] = {}
        self.bodies: dict[Path, Body] = {}
        self.own_derivative: set[Path] = set()
        self.roots: dict[int, int] = {}
        self.ends: dict[Path, tuple[int | None, ...]] = {}

    def whole(
        self, program: Program, num_parameters: int
    ) -> tuple[tuple[int, ...], tuple[int | None, ...]]:
        """Adds a whole program; returns the values of its inputs and outputs."""
        inputs = tuple(
            self.value(
                var.aval,
                Origin(frozenset({index}))
                if index < num_parameters
                else Origin(data=not _is_key(var.aval), other=_is_key(var.aval)),
                Site((ARGUMENTS,), index),
            )
            for index, var in enumerate(program.jaxpr.invars)
        )
        outputs = self.open(program.jaxpr, inputs, program.consts, ())
        self.returned.update(value for value in outputs if value is not None)
        return inputs, outputs

    def value(self, aval: object, origin: Origin, site: Site | None = None) -> int:
        """Adds a value and returns its number."""
        self.avals.append(aval)
        self.sites.append(site)
        self.origins.append(origin)
        return len(self.avals) - 1

    def open(
        self, jaxpr: Jaxpr, inputs: Iterable[int], consts: Sequence, path: Path
    ) -> tuple[int | None, ...]:
        """Adds the steps of a jaxpr and returns the values of its outputs."""
        numbers = dict(zip(jaxpr.invars, inputs, strict=True))
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            numbers[var] = self._constant(var.aval, const)

        def number(atom: compat.Atom) -> int | None:
            return None if compat.is_literal(atom) else numbers[atom]

        for index, eqn in enumerate(jaxpr.eqns):
            operands = tuple(number(atom) for atom in eqn.invars)
            here = (*path, index)
            body = compat.called_jaxpr(eqn)
            if body is not None and not self._stays_closed(eqn, operands):
                if eqn.primitive.name.startswith("custom_"):
                    self.own_derivative.add(here)
                found = self.open(body[0], self._passed(eqn, operands), body[1], here)
                outputs = tuple(self._numbered(body[0].outvars, found))
            elif bodies := self._bodies(eqn, here):
                outputs = self._add_control(eqn, operands, bodies, here)
            else:
                outputs = self._add(eqn, operands, here)
            numbers |= dict(zip(eqn.outvars, outputs, strict=True))
        return tuple(number(atom) for atom in jaxpr.outvars)

    def _bodies(self, eqn: Equation, path: Path) -> tuple[Body, ...]:
        is_opened = self.all_control or _holds_layers(eqn)
        return control.bodies(eqn, path) if is_opened else ()

    def _passed(self, eqn: Equation, operands: tuple[int | None, ...]) -> list[int]:
        """Gives literals a number that are passed into a body."""
        return self._numbered(eqn.invars, operands)

    def _numbered(
        self, atoms: Sequence[compat.Atom], values: tuple[int | None, ...]
    ) -> list[int]:
        return [
            self._constant(atom.aval, atom.val) if value is None else value
            for atom, value in zip(atoms, values, strict=True)
        ]

    def _constant(self, aval: Any, const: Any) -> int:
        is_known = not isinstance(const, jax.core.Tracer) and not _is_key(aval)
        is_number = is_known and np.size(const) == 1
        number = self.value(aval, Origin(other=not is_number))
        if is_number:
            self.literals[number] = const
        return number

    def _stays_closed(self, eqn: Equation, operands: tuple[int | None, ...]) -> bool:
        if not eqn.primitive.name.startswith("custom_"):
            return False
        has_weight = any(
            value is not None and self.origins[value].is_weight for value in operands
        )
        return not (has_weight and _holds_layers(eqn))

    def _add(
        self, eqn: Equation, operands: tuple[int | None, ...], path: Path
    ) -> tuple[int, ...]:
        known = [self.origins[value] for value in operands if value is not None]
        origin = joined(known)
        by_data = any(one.data and not one.is_weight for one in known)
        if eqn.primitive.name in CONTRACTIONS or is_look_up(eqn, by_data=by_data):
            # The first layer of a network that makes its own inputs.
            meets_other = any(one.other and not one.parameters for one in known)
            has_weight = any(one.is_weight for one in known)
            meets_other |= path in self.inner_layers
            origin = origin._replace(data=origin.data or (has_weight and meets_other))
            if origin.is_weight and eqn.primitive.name in CONTRACTIONS:
                origin = origin._replace(products=origin.products | {path})
        elif eqn.primitive.name in ACTIVATING and origin.is_weight:
            self.found |= origin.products
        elif (
            eqn.primitive.name in LOOK_UPS
            and operands[0] is not None
            and self.origins[operands[0]].is_weight
        ):
            origin = origin._replace(data=False)
        root = self._root(eqn, operands)
        if root is not None:
            origin = self.origins[root]
        outputs = self._outputs(eqn, operands, [origin] * len(eqn.outvars), path)
        if root is not None:
            self.roots[outputs[0]] = root
        return outputs

    def _root(self, eqn: Equation, operands: tuple[int | None, ...]) -> int | None:
        """Finds the value that an equation hands on, as a choice between equals does.

        A branch under ``vmap`` becomes one, for each of its operands.
        """
        if eqn.primitive.name not in ("stop_gradient", "select_n"):
            return None
        cases = operands[1:] if eqn.primitive.name == "select_n" else operands
        roots = {None if case is None else self.roots.get(case, case) for case in cases}
        return roots.pop() if len(roots) == 1 else None

    def _outputs(
        self,
        eqn: Equation,
        operands: tuple[int | None, ...],
        origins: Iterable[Origin],
        path: Path,
        *,
        is_opened: bool = False,
    ) -> tuple[int, ...]:
        outputs = tuple(
            self.value(var.aval, origin, Site(path, position))
            for position, (var, origin) in enumerate(
                zip(eqn.outvars, origins, strict=True)
            )
        )
        self.steps.append(Step(path, eqn, operands, outputs, is_opened))
        return outputs

    def _add_control(
        self,
        eqn: Equation,
        operands: tuple[int | None, ...],
        bodies: Sequence[Body],
        path: Path,
    ) -> tuple[int, ...]:
        passed = self._passed(eqn, operands)
        # What decides which branch is taken, or how often, is in every result.
        decides = joined(self.origins[passed[index]] for index in control.beside(eqn))
        results: list[list[Origin]] = [[] for _ in eqn.outvars]
        for body in bodies:
            self.bodies[body.path] = body
            for index, origin in zip(
                body.results, self._add_body(body, passed), strict=True
            ):
                results[index].append(origin)
        return self._outputs(
            eqn,
            operands,
            [_outside(joined([*origins, decides]), bodies) for origins in results],
            path,
            is_opened=True,
        )

    def _add_body(self, body: Body, passed: Sequence[int]) -> list[Origin]:
        """Adds the steps of a body; returns the origins of its outputs."""
        origins = [
            self.origins[passed[operand]]._replace(
                varies=self.origins[passed[operand]].varies | varies
            )
            for operand, varies in zip(body.operands, body.varies, strict=True)
        ]
        begin = len(self.avals), len(self.steps)
        while True:
            inputs = [
                self.value(var.aval, origin, Site((*body.path, ARGUMENTS), position))
                for position, (var, origin) in enumerate(
                    zip(body.jaxpr.invars, origins, strict=True)
                )
            ]
            for number, operand in zip(inputs, body.operands, strict=True):
                if passed[operand] in self.literals:
                    self.literals[number] = self.literals[passed[operand]]
            for index in body.feedback:
                self.literals.pop(inputs[index], None)
            outputs = self.open(body.jaxpr, inputs, body.consts, body.path)
            self.ends[body.path] = outputs
            found = [
                Origin() if value is None else self.origins[value] for value in outputs
            ]
            more = list(origins)
            for index, output in body.feedback.items():
                more[index] = joined([origins[index], found[output]])
            if more == origins:
                self.returned.update(value for value in outputs if value is not None)
                return [
                    joined(
                        [one, *(more[k] for k, o in body.feedback.items() if o == i)]
                    )
                    for i, one in enumerate(found)
                ]
            origins = more
            self._back_to(*begin)

    def _back_to(self, num_values: int, num_steps: int) -> None:
        """Forgets what was added since; to be added again with other origins."""
        del self.avals[num_values:], self.sites[num_values:], self.origins[num_values:]
        del self.steps[num_steps:]
        self.literals = {k: v for k, v in self.literals.items() if k < num_values}
        self.returned = {value for value in self.returned if value < num_values}
        self.roots = {k: v for k, v in self.roots.items() if k < num_values}


def _outside(origin: Origin, bodies: Sequence[Body]) -> Origin:
    """Drops the loops that a value has left."""
    inner = {axis for body in bodies for axis in body.axes}
    return origin._replace(varies=origin.varies - inner)


def _holds_layers(eqn: Equation) -> bool:
    return bool(operations(eqn) & (CONTRACTIONS | LOOK_UPS))
