"""A program as one list of equations, with calls and control flow opened up.

``jit``, ``remat`` and the like are opened: the equations of their bodies stand in the
list as if they were written there.  So are the bodies of loops, branches and
``shard_map``, with values of their own; the equation itself follows them as one more
step.  A call with a derivative of its own (``custom_jvp``, ``custom_vjp``) stays closed
unless it holds a layer, since opening it would lose that derivative.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from nnsanity.tracing.compat import Equation
from nnsanity.tracing.control import Axis, Body, Path

ARGUMENTS = -1
"""Stands in a path in the place of an equation: the arguments of a body."""


class Site(NamedTuple):
    """Where a value is born.

    Attributes:
        path: index of the equation in its jaxpr, for each jaxpr from the outermost in;
            ``ARGUMENTS`` where the value is an argument of a body or of the program.
        position: which of its outputs, or which argument.
    """

    path: Path
    position: int


class Origin(NamedTuple):
    """What a value is made from.

    Attributes:
        parameters: leaves of the parameters.
        data: it depends on an argument that is no parameter, or on what a layer made.
        other: it depends on a random key, or on an array that the function closes over,
            which may be data or a part of a weight (a mask).
        varies: the loops in which it differs from turn to turn for its own sake.
        products: the products among parameters, or with constants, that are in it.
    """

    parameters: frozenset[int] = frozenset()
    data: bool = False
    other: bool = False
    varies: frozenset[Axis] = frozenset()
    products: frozenset[Path] = frozenset()

    @property
    def is_weight(self) -> bool:
        """Made from parameters alone."""
        return bool(self.parameters) and not self.data


def joined(origins: Iterable[Origin]) -> Origin:
    """What is made from several values."""
    origins = tuple(origins)
    return Origin(
        frozenset().union(*(one.parameters for one in origins)),
        any(one.data for one in origins),
        any(one.other for one in origins),
        frozenset().union(*(one.varies for one in origins)),
        frozenset().union(*(one.products for one in origins)),
    )


class Step(NamedTuple):
    """One equation of the list.

    Attributes:
        path: where it stands, as in ``Site``.
        eqn: the equation.
        inputs: numbers of the values that it reads, None for a literal.
        outputs: numbers of the values that it makes.
        is_opened: its bodies stand in the list before it.
    """

    path: Path
    eqn: Equation
    inputs: tuple[int | None, ...]
    outputs: tuple[int, ...]
    is_opened: bool = False


class Steps(NamedTuple):
    """A program, opened up; values are known by numbers.

    Attributes:
        steps: in the order of execution.
        inputs: the values of the arguments.
        outputs: the values that are returned, None for a literal.
        returned: the values that a body returns, those of the program among them.
        avals: shape and dtype of every value.
        sites: where each value is born, None for constants.
        origins: what each value is made from.
        bodies: of the control flow, by their paths.
        own_derivative: paths of opened calls whose derivative the user wrote; running
            them again equation by equation would lose it.
        literals: numbers that are known from the program's text alone.
        makers: the step that makes each value; none for arguments and constants.
        roots: values that are another one under a new name, and that one.
        inner_layers: paths of products among parameters that a nonlinearity follows:
            layers of a network that makes weights, or that starts at parameters.
        ends: the values that each body of the control flow returns, by its path.
    """

    steps: tuple[Step, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int | None, ...]
    returned: frozenset[int]
    avals: list
    sites: list[Site | None]
    origins: list[Origin]
    bodies: dict[Path, Body]
    own_derivative: frozenset[Path]
    literals: dict[int, Any]
    makers: dict[int, Step]
    roots: dict[int, int]
    inner_layers: frozenset[Path]
    ends: dict[Path, tuple[int | None, ...]]

    def is_weight(self, value: int | None) -> bool:
        """Tells whether a value is made from parameters alone."""
        return value is not None and self.origins[value].is_weight

    def axes(self, path: Path) -> tuple[Axis, ...]:
        """Returns the axes that a value born there gets on its way out."""
        around = (self.bodies.get(path[:depth]) for depth in range(1, len(path)))
        return tuple(axis for body in around if body is not None for axis in body.axes)

    def with_constants(self, steps: Sequence[Step]) -> list[Step]:
        """Adds the steps that make the constants among the operands of some steps."""
        needed = {step.path: step for step in steps}
        waiting = list(steps)
        while waiting:
            for value in waiting.pop().inputs:
                maker = None if value is None else self.makers.get(value)
                if maker is None or value is None or maker.path in needed:
                    continue
                if not self.origins[value].data and not self.origins[value].parameters:
                    needed[maker.path] = maker
                    waiting.append(maker)
        return [needed[path] for path in sorted(needed)]

    def weights(self, step: Step) -> list[int]:
        """Returns the operands of a step that are made from parameters alone."""
        return [
            value
            for value in step.inputs
            if value is not None and self.is_weight(value)
        ]
