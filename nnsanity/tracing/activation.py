"""What an elementwise nonlinearity does, told by running it on a grid of numbers."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnsanity.tracing import compat
from nnsanity.tracing.operations import STRUCTURAL
from nnsanity.tracing.steps import Step

_GRID = np.linspace(-10.0, 10.0, 401, dtype=np.float32)
_LEVEL = 0.05
"""Slope, in units of the steepest one or of 1, up to which a nonlinearity is level."""
_LOW_END = (_GRID >= -4.0) & (_GRID <= -3.01)
_HIGH_END = (_GRID >= 7.0) & (_GRID <= 9.0)
# Inside of these windows the smooth ones (gelu, tanh, sigmoid) still move in float32,
# and the usual piecewise ones (relu, relu6, hard_swish) stand still.


class Activation(NamedTuple):
    """An elementwise nonlinearity.

    Attributes:
        name: as in ``jax.nn`` where it does the same, else the operation that makes it.
        flat_values: outputs at the ends where it passes nothing back: ``(0.0,)`` for
            relu, ``(0.0, 6.0)`` for relu6, none for tanh, leaky_relu or gelu.
        slope: its largest derivative on [-10, 10]; NaN where that is not known.
        limits: its outputs at -10 and 10; NaN where they are not known.
        is_known: whether it could be run.
        level_below: below it the slope is next to nothing; NaN where there is none.
        level_above: the same at the other end.
        num_scalings: how many stages before it, scalings by numbers, are a part of it.
    """

    name: str
    flat_values: tuple[float, ...] = ()
    slope: float = math.nan
    limits: tuple[float, float] = (math.nan, math.nan)
    is_known: bool = False
    level_below: float = math.nan
    level_above: float = math.nan
    num_scalings: int = 0

    @property
    def saturates(self) -> bool:
        """Whether it levels off at both ends, as sigmoid and tanh do."""
        low, high = self.limits
        return abs(low) < 3 and abs(high) < 3 and self.name not in ("sin", "cos")


def recognize(
    steps: Sequence[Step], start: int, end: int, consts: Mapping[int, Any]
) -> Activation:
    """Tells what elementwise steps do between two values.

    Args:
        steps: in the order of execution.
        start: number of the value that goes in.
        end: number of the value that comes out.
        consts: values of constants by number; larger ones are not looked at.

    Returns:
        The activation; only a name where an operand is not known before the run.
    """
    with jax.ensure_compile_time_eval():
        outputs = _run(steps, start, end, consts)
    if outputs is None or outputs.shape != _GRID.shape:
        return Activation(name_of_last(steps))
    name = _name_by_values(outputs) or name_of_last(steps)
    windows = [outputs[window] for window in (_LOW_END, _HIGH_END)]
    flat = [float(values[0]) for values in windows if (values == values[0]).all()]
    with np.errstate(invalid="ignore", over="ignore"):  # an overflow is an answer, too
        slopes = np.abs(np.diff(outputs) / np.diff(_GRID))
    ends = float(outputs[0]), float(outputs[-1])
    steepest = float(slopes.max())
    level = slopes <= _LEVEL * min(steepest, 1.0)
    return Activation(
        name,
        tuple(flat),
        steepest,
        ends,
        is_known=True,
        level_below=_end_of(level, _GRID),
        level_above=_end_of(level[::-1], _GRID[::-1]),
    )


def _end_of(level: np.ndarray, grid: np.ndarray) -> float:
    """How far the level part reaches that starts at the first number of the grid."""
    if level.all():
        return math.nan  # a constant; or an overflow, which is not level
    length = int(level.argmin())
    return float(grid[length]) if length else math.nan


def _run(
    steps: Sequence[Step], start: int, end: int, consts: Mapping[int, Any]
) -> np.ndarray | None:
    values: dict[int, Any] = {start: jnp.asarray(_GRID)}
    for step in steps:
        operands = []
        for atom, number in zip(step.eqn.invars, step.inputs, strict=True):
            value: Any = None
            if number is None:
                value = atom.val
            elif number in values or number in consts:
                value = values.get(number, consts.get(number))
            if value is None or (np.ndim(value) and np.shape(value) != _GRID.shape):
                return None
            operands.append(value)
        results = _apply(step.eqn, operands)
        if results is None:
            return None
        values |= dict(zip(step.outputs, results, strict=True))
    return np.asarray(values[end], np.float64)


def _apply(eqn: compat.Equation, operands: Sequence) -> list | None:
    """Evaluates one elementwise equation on the grid in place of its own shape."""
    name = eqn.primitive.name
    body = compat.called_jaxpr(eqn)
    if body is not None:
        return _apply_body(*body, operands)
    if any(True for _ in compat.sub_jaxprs(eqn)):
        return None  # a loop or a branch, whose bodies are of the user's shapes
    if name == "convert_element_type":
        return [_cast(operands[0], eqn.params["new_dtype"])]
    if name in STRUCTURAL:
        return list(operands)
    like_grid = [np.ndim(operand) for operand in operands]
    if any(like_grid) and name != "clamp":
        dtypes = [atom.aval.dtype for atom in eqn.invars]
        operands = [
            jnp.broadcast_to(_cast(operand, dtype), _GRID.shape)
            for operand, dtype in zip(operands, dtypes, strict=True)
        ]
    return compat.bind(eqn, operands)


def _cast(operand: Any, dtype: Any) -> jax.Array:
    """Casts, but keeps float32 for all floats: bfloat16 rounds a tanh flat."""
    is_float = jnp.issubdtype(dtype, jnp.floating)
    return jnp.asarray(operand).astype(jnp.float32 if is_float else dtype)


def _apply_body(
    jaxpr: compat.Jaxpr, consts: Sequence, operands: Sequence
) -> list | None:
    values = dict(zip(jaxpr.invars, operands, strict=True))
    values |= dict(zip(jaxpr.constvars, consts, strict=True))
    for eqn in jaxpr.eqns:
        inner = [_read(values, atom) for atom in eqn.invars]
        if any(np.ndim(value) and np.shape(value) != _GRID.shape for value in inner):
            return None
        results = _apply(eqn, inner)
        if results is None:
            return None
        values |= dict(zip(eqn.outvars, results, strict=True))
    return [_read(values, atom) for atom in jaxpr.outvars]


def _read(values: Mapping, atom: compat.Atom) -> Any:
    return atom.val if compat.is_literal(atom) else values[atom]


def name_of_last(steps: Sequence[Step]) -> str:
    """Names what is not known after the operation that it ends in."""
    eqn = steps[-1].eqn
    return str(eqn.params.get("name") or eqn.primitive.name)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _elu(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


def _gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def _tanh_gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


_KNOWN: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
    "gelu": _gelu,
    "silu": lambda x: x * _sigmoid(x),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "elu": _elu,
    "selu": lambda x: (
        1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * _elu(x))
    ),
    "softplus": lambda x: np.logaddexp(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "exp": np.exp,
    "hard_tanh": lambda x: np.clip(x, -1, 1),
    "hard_sigmoid": lambda x: np.clip(x + 3, 0, 6) / 6,
    "hard_swish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "soft_sign": lambda x: x / (1 + np.abs(x)),
    "log_sigmoid": lambda x: -np.logaddexp(-x, 0),
    "mish": lambda x: x * np.tanh(np.logaddexp(x, 0)),
    "square": np.square,
    "abs": np.abs,
    "sin": np.sin,
    "cos": np.cos,
}
NAMES = frozenset(_KNOWN)
"""Names of the nonlinearities that are known by what they do."""
_ALSO_KNOWN = (("gelu", _tanh_gelu),)


def _name_by_values(outputs: np.ndarray) -> str | None:
    x = _GRID.astype(np.float64)
    for name, function in (*_KNOWN.items(), *_ALSO_KNOWN):
        if np.allclose(outputs, function(x), rtol=1e-4, atol=1e-5):
            return name
    return None
