"""Runs a program and leaves the products that it ends in unwritten.

Meant for the gradient of a loss of one example: what comes back for a weight is then
known by its factors, through calls, loops and weights that are used again.
"""

from collections.abc import Callable, Sequence
from math import prod

import jax
import jax.numpy as jnp
import numpy as np

from nnsanity._tree import is_inexact
from nnsanity._types import Array
from nnsanity.tracing import compat
from nnsanity.tracing.compat import Equation, Jaxpr, Program
from nnsanity.tracing.outer_products import Move, Rows, Term, dot, moved, transposed
from nnsanity.tracing.patches import patched
from nnsanity.tracing.summed_loops import scan
from nnsanity.tracing.sums import Run, Value, sum_of


def evaluate_unwritten(
    program: Program, arguments: Sequence[Array], varies: Sequence[bool]
) -> list[Value]:
    """Runs a program on the leaves of its arguments.

    Args:
        program: as traced.
        arguments: leaves in the order of the program's arguments.
        varies: which of them depend on the example.

    Returns:
        The outputs.
    """
    inputs = [Value(*pair) for pair in zip(varies, arguments, strict=True)]
    return _evaluate(Run(_evaluate), program.jaxpr, program.consts, inputs)


def _evaluate(
    run: Run, jaxpr: Jaxpr, consts: Sequence, inputs: Sequence[Value]
) -> list[Value]:
    known = dict(zip(jaxpr.invars, inputs, strict=True))
    for var, const in zip(jaxpr.constvars, consts, strict=True):
        known[var] = Value(varies=False, array=const)

    def value_of(atom: compat.Atom) -> Value:
        if compat.is_literal(atom):
            return Value(varies=False, array=atom.val)
        return known[atom]

    for eqn in jaxpr.eqns:
        operands = [value_of(atom) for atom in eqn.invars]
        rule = _RULES.get(eqn.primitive.name)
        results = None if rule is None else rule(run, eqn, operands)
        if results is None:
            results = _plain(run, eqn, operands)
        known |= dict(zip(eqn.outvars, results, strict=True))
    return [value_of(atom) for atom in jaxpr.outvars]


def _plain(run: Run, eqn: Equation, operands: Sequence[Value]) -> list[Value]:
    with jax.named_scope(compat.scope(eqn)):
        results = compat.bind(eqn, [run.whole(one) for one in operands])
    varies = any(one.varies for one in operands)
    return [Value(varies, result) for result in results]


CALLS = frozenset(name for name in compat.CALLS if not name.startswith("custom_"))

Results = list[Value] | None
"""What a rule returns; None where it does not fit, and the equation runs as it is."""


def _zeros(run: Run, eqn: Equation, operands: Sequence[Value]) -> Results:
    """Zeros are the sum of nothing."""
    (atom, *_), (operand, *_) = eqn.invars, operands
    if operand.is_sum:
        return _move(run, eqn, operands)
    is_zero = compat.is_literal(atom) and np.ndim(atom.val) == 0 and atom.val == 0
    if not (is_zero and is_inexact(eqn.outvars[0].aval)):
        return None
    (zeros,) = _plain(run, eqn, operands)
    return [zeros._replace(terms=())]


def _dot(run: Run, eqn: Equation, operands: Sequence[Value]) -> Results:
    if not _can_be_product(eqn, operands):
        return None
    left, right = (run.whole(one) for one in operands)
    (result,) = _plain(run, eqn, operands)
    return [result._replace(terms=(dot(left, right, eqn.params["dimension_numbers"]),))]


def _conv(run: Run, eqn: Equation, operands: Sequence[Value]) -> Results:
    if not _can_be_product(eqn, operands):
        return None
    term = patched(eqn, *(run.whole(one) for one in operands))
    return None if term is None else [Value(varies=True, terms=(term,))]


def _can_be_product(eqn: Equation, operands: Sequence[Value]) -> bool:
    is_real = jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating)
    has_sides = all(one.array is not None for one in operands)
    varies = any(one.varies for one in operands)
    return is_real and has_sides and varies


def _scatter_add(run: Run, eqn: Equation, operands: Sequence[Value]) -> Results:
    """Rows that are added to a table, as the gradient of a look-up does."""
    table, indices, updates = operands
    numbers, mode = eqn.params["dimension_numbers"], eqn.params["mode"]
    shape, rank = eqn.outvars[0].aval.shape, eqn.invars[2].aval.ndim
    window = tuple(range(rank - len(shape) + 1, rank))
    is_by_row = (
        table.is_sum
        and is_inexact(eqn.outvars[0].aval)
        and tuple(numbers.inserted_window_dims) == (0,)
        and tuple(numbers.scatter_dims_to_operand_dims) == (0,)
        and not numbers.operand_batching_dims
        and tuple(numbers.update_window_dims) == window
        and eqn.invars[2].aval.shape[rank - len(window) :] == shape[1:]
    )
    if not is_by_row:
        return None
    rows = run.whole(indices).reshape(-1).astype(jnp.int32)
    if mode == jax.lax.GatherScatterMode.CLIP:
        rows = jnp.clip(rows, 0, shape[0] - 1)
    added = run.whole(updates).reshape(-1, *shape[1:])
    term = Rows(rows, added, shape[0])
    varies = any(one.varies for one in operands)
    return [sum_of(table, Value(varies, terms=(term,)))]


def _add(run: Run, eqn: Equation, operands: Sequence[Value]) -> Results:
    shape = eqn.outvars[0].aval.shape
    fits = all(atom.aval.shape == shape for atom in eqn.invars)
    is_known = [one.is_sum or not one.varies for one in operands]
    if not (fits and all(is_known) and any(one.is_sum for one in operands)):
        return None
    if all(one.carries for one in operands):
        return None
    found = sum_of(*operands)
    arrays = [one.array for one in operands]
    if not found.carries and all(array is not None for array in arrays):
        found = found._replace(array=compat.bind(eqn, arrays)[0])
    return [found]


def _move(run: Run, eqn: Equation, operands: Sequence[Value]) -> Results:
    """Moves of numbers are made when the terms are written out."""
    value, *others = operands
    before, after = eqn.invars[0].aval, eqn.outvars[0].aval
    is_move = value.is_sum and not others and not value.carries
    if not is_move or prod(before.shape) != prod(after.shape):
        return None
    if not (is_inexact(before) and is_inexact(after)):
        return None

    def apply(values: Array) -> Array:
        if eqn.primitive.name == "convert_element_type":
            return values  # sums are kept in float32 until the end
        if eqn.primitive.name == "transpose":
            return jnp.transpose(values, eqn.params["permutation"])
        return values.reshape(after.shape)  # axes of length 1 come and go

    def of(term: Term) -> Term:
        if eqn.primitive.name == "transpose":
            return transposed(term, eqn.params["permutation"])
        if before.shape == after.shape:
            return term
        return moved(term, Move(("reshape", before.shape, after.shape), apply))

    constant = None if value.constant is None else apply(value.constant)
    array = None
    if value.array is not None:
        (array,) = compat.bind(eqn, [value.array])
    terms = tuple(of(term) for term in value.terms or ())
    return [Value(value.varies, array, terms, constant)]


def _sum_over_ones(run: Run, eqn: Equation, operands: Sequence[Value]) -> Results:
    """A sum over axes of length 1."""
    sizes = [eqn.invars[0].aval.shape[axis] for axis in eqn.params["axes"]]
    return _move(run, eqn, operands) if prod(sizes) == 1 else None


def _scale(run: Run, eqn: Equation, operands: Sequence[Value]) -> Results:
    """Multiplies, divides or negates by one number."""
    which = [one.is_sum for one in operands]
    if sum(which) != 1 or any(one.carries for one in operands):
        return None
    position = which.index(True)
    value, others = operands[position], [*operands]
    del others[position]
    is_number = all(eqn.invars[1 - position].aval.shape == () for _ in others)
    if not is_number or (eqn.primitive.name == "div" and position == 1):
        return None
    if value.constant is not None and any(one.varies for one in others):
        return None
    numbers = [run.whole(one) for one in others]

    def scaled(array: Array) -> Array:
        if eqn.primitive.name == "neg":
            return -array
        number = jnp.asarray(numbers[0], array.dtype)
        return array / number if eqn.primitive.name == "div" else array * number

    terms = tuple(one._replace(right=scaled(one.right)) for one in value.terms or ())
    constant = None if value.constant is None else scaled(value.constant)
    array = None if value.array is None else scaled(value.array)
    varies = any(one.varies for one in operands)
    return [Value(varies, array, terms, constant)]


def _call(run: Run, eqn: Equation, operands: Sequence[Value]) -> Results:
    body = compat.called_jaxpr(eqn)
    if body is None:
        return None
    if eqn.primitive.name in compat.REMATERIALIZATIONS:
        operands = _behind_a_barrier(run, operands)
    return _evaluate(run, *body, operands)


def _behind_a_barrier(run: Run, operands: Sequence[Value]) -> list[Value]:
    """Keeps the compiler from merging what is computed again with the first time."""
    arrays = jax.lax.optimization_barrier([run.whole(one) for one in operands])
    return [
        Value(one.varies, array) for one, array in zip(operands, arrays, strict=True)
    ]


_RULES: dict[str, Callable[[Run, Equation, Sequence[Value]], Results]] = {
    **dict.fromkeys(CALLS, _call),
    **dict.fromkeys(("add", "add_any"), _add),
    **dict.fromkeys(("mul", "div", "neg"), _scale),
    **dict.fromkeys(("transpose", "reshape", "squeeze", "expand_dims"), _move),
    **dict.fromkeys(("convert_element_type", "copy", "copy_p", "name"), _move),
    "broadcast_in_dim": _zeros,
    "reduce_sum": _sum_over_ones,
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "scatter-add": _scatter_add,
    "scan": scan,
}
