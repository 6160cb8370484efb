"""A program as one list of equations, with the calls opened up.

``jit``, ``remat`` and the like are opened: the equations of their bodies stand in the
list as if they were written there.  Control flow is one step, and so is a call with a
derivative of its own (``custom_jvp``, ``custom_vjp``) unless it holds a layer, since
opening it would lose that derivative.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from nnsanity.tracing import compat
from nnsanity.tracing.compat import Equation, Jaxpr, Program

CONTRACTIONS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot_general"})

STRUCTURAL = frozenset(
    {
        "reshape",
        "transpose",
        "squeeze",
        "expand_dims",
        "broadcast_in_dim",
        "convert_element_type",
        "reduce_precision",
        "copy",
        "copy_p",
        "sharding_constraint",
        "reshard",
        "optimization_barrier",
        "pvary",
        "name",
    }
)
"""Operations that move or cast numbers without mixing or changing them."""

ELEMENTWISE = STRUCTURAL | frozenset(
    {
        *("add", "sub", "mul", "div", "neg", "abs", "sign", "max", "min", "clamp"),
        *("exp", "exp2", "log", "log1p", "expm1", "tanh", "logistic", "erf", "erfc"),
        *("erf_inv", "sin", "cos", "tan", "asin", "acos", "atan", "atan2", "sinh"),
        *("cosh", "asinh", "acosh", "atanh", "sqrt", "rsqrt", "cbrt", "square"),
        *("integer_pow", "pow", "floor", "ceil", "round", "rem", "select_n"),
        *("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "xor", "is_finite"),
        *("stop_gradient", "nextafter", "lgamma", "digamma", "add_any", "real"),
    }
)
"""Operations whose every output element depends on one element of each operand."""


class Site(NamedTuple):
    """Where a value is born: an output of an equation.

    Attributes:
        path: index of the equation in its jaxpr, for each jaxpr from the outermost in.
        position: which of its outputs.
    """

    path: tuple[int, ...]
    position: int


class Step(NamedTuple):
    """One equation of the list.

    Attributes:
        path: where it stands, as in ``Site``.
        eqn: the equation.
        inputs: numbers of the values that it reads, None for a literal.
        outputs: numbers of the values that it makes.
    """

    path: tuple[int, ...]
    eqn: Equation
    inputs: tuple[int | None, ...]
    outputs: tuple[int, ...]


class Steps(NamedTuple):
    """A program, opened up; values are known by numbers.

    Attributes:
        steps: in the order of execution.
        inputs: the values of the arguments.
        consts: the values of the constants.
        outputs: the values that are returned, None for a literal.
        avals: shape and dtype of every value.
        sites: where each value is born, None for arguments and constants.
        parameters: for each value the leaves of the parameters that it depends on.
        data: for each value whether it depends on an argument that is no parameter.
        own_derivative: paths of opened calls whose derivative the user wrote; running
            them again equation by equation would lose it.
        literals: values that are known from the program's text alone.
        makers: the step that makes each value; none for arguments and constants.
    """

    steps: tuple[Step, ...]
    inputs: tuple[int, ...]
    consts: tuple[int, ...]
    outputs: tuple[int | None, ...]
    avals: list
    sites: list[Site | None]
    parameters: list[frozenset[int]]
    data: list[bool]
    own_derivative: frozenset[tuple[int, ...]]
    literals: dict[int, Any]
    makers: dict[int, Step]

    def is_weight(self, value: int | None) -> bool:
        """Tells whether a value is made from parameters alone."""
        return (
            value is not None and bool(self.parameters[value]) and not self.data[value]
        )

    def with_constants(self, steps: Sequence[Step]) -> list[Step]:
        """Adds the steps that make the constants among the operands of some steps."""
        needed = {step.path: step for step in steps}
        waiting = list(steps)
        while waiting:
            for value in waiting.pop().inputs:
                maker = None if value is None else self.makers.get(value)
                if maker is None or value is None or maker.path in needed:
                    continue
                if not self.data[value] and not self.parameters[value]:
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


def open_up(program: Program, num_parameters: int) -> Steps:
    """Lists the steps of a program whose first arguments are the parameters.

    Args:
        program: as traced.
        num_parameters: how many of its leading arguments are leaves of the parameters.
    """
    builder = _Builder()
    jaxpr = program.jaxpr
    inputs = tuple(
        builder.value(var.aval, _only(index, num_parameters), index >= num_parameters)
        for index, var in enumerate(jaxpr.invars)
    )
    consts = tuple(builder.value(var.aval) for var in jaxpr.constvars)
    outputs = builder.open(jaxpr, inputs, consts, ())
    return Steps(
        tuple(builder.steps),
        inputs,
        consts,
        outputs,
        builder.avals,
        builder.sites,
        builder.parameters,
        builder.data,
        frozenset(builder.own_derivative),
        builder.literals,
        {output: step for step in builder.steps for output in step.outputs},
    )


def _only(index: int, num_parameters: int) -> frozenset[int]:
    return frozenset({index}) if index < num_parameters else frozenset()


class _Builder:
    """Walks through a jaxpr and its calls, and numbers the values."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.avals: list = []
        self.sites: list[Site | None] = []
        self.parameters: list[frozenset[int]] = []
        self.data: list[bool] = []
        self.literals: dict[int, Any] = {}
        self.own_derivative: set[tuple[int, ...]] = set()

    def value(
        self,
        aval: object,
        parameters: frozenset[int] = frozenset(),
        data: bool = False,  # noqa: FBT001, FBT002
        site: Site | None = None,
    ) -> int:
        """Adds a value and returns its number."""
        self.avals.append(aval)
        self.sites.append(site)
        self.parameters.append(parameters)
        self.data.append(data)
        return len(self.avals) - 1

    def open(
        self,
        jaxpr: Jaxpr,
        inputs: Iterable[int | None],
        consts: Iterable[int],
        path: tuple[int, ...],
    ) -> tuple[int | None, ...]:
        """Adds the steps of a jaxpr and returns the values of its outputs."""
        numbers = dict(zip(jaxpr.invars, inputs, strict=True))
        numbers |= dict(zip(jaxpr.constvars, consts, strict=True))

        def number(atom: compat.Atom) -> int | None:
            return None if compat.is_literal(atom) else numbers[atom]

        for index, eqn in enumerate(jaxpr.eqns):
            operands = tuple(number(atom) for atom in eqn.invars)
            here = (*path, index)
            body = compat.called_jaxpr(eqn)
            if body is not None and not self._stays_closed(eqn, operands):
                if eqn.primitive.name.startswith("custom_"):
                    self.own_derivative.add(here)
                inner_consts = [self.value(var.aval) for var in body[0].constvars]
                passed = [
                    self._literal(atom) if operand is None else operand
                    for atom, operand in zip(eqn.invars, operands, strict=True)
                ]
                outputs = self.open(body[0], passed, inner_consts, here)
            else:
                outputs = self._add(eqn, operands, here)
            numbers |= dict(zip(eqn.outvars, outputs, strict=True))
        return tuple(number(atom) for atom in jaxpr.outvars)

    def _literal(self, atom: compat.Atom) -> int:
        """Adds a literal that is passed into a call, where it becomes a variable."""
        number = self.value(atom.aval)
        self.literals[number] = atom.val
        return number

    def _stays_closed(self, eqn: Equation, operands: tuple[int | None, ...]) -> bool:
        if not eqn.primitive.name.startswith("custom_"):
            return False
        has_weight = any(
            value is not None and self.parameters[value] and not self.data[value]
            for value in operands
        )
        return not (has_weight and operations(eqn) & CONTRACTIONS)

    def _add(
        self, eqn: Equation, operands: tuple[int | None, ...], path: tuple[int, ...]
    ) -> tuple[int, ...]:
        known = [value for value in operands if value is not None]
        parameters = frozenset().union(*(self.parameters[value] for value in known))
        data = any(self.data[value] for value in known)
        outputs = tuple(
            self.value(var.aval, parameters, data, Site(path, position))
            for position, var in enumerate(eqn.outvars)
        )
        self.steps.append(Step(path, eqn, operands, outputs))
        return outputs


def operations(eqn: Equation) -> frozenset[str]:
    """Returns the names of the primitives in an equation, calls opened."""
    bodies = list(compat.sub_jaxprs(eqn))
    if not bodies:
        return frozenset({eqn.primitive.name})
    inside = (compat.opened(body)[0].eqns for body in bodies)
    return frozenset().union(*(operations(one) for eqns in inside for one in eqns))
