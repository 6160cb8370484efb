"""Gradients that are not written out: sums of outer products, and rows of a table.

The gradient of a weight matrix by one example is a sum over positions of outer
products, of what enters the layer with the gradient by what leaves it.  Its norm does
not need the sum: ``|sum_t a_t x d_t|^2 = sum_ts (a_t . a_s) (d_t . d_s)``.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nnsanity._tree import accumulation_dtype, in_float32
from nnsanity._types import Array

EXACT = jax.lax.Precision.HIGHEST
Split = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


class Move(NamedTuple):
    """An operation that only moves the numbers of an array, or casts them.

    Attributes:
        signature: equal for equal operations.
        apply: what it does.
    """

    signature: Hashable
    apply: Callable[[Array], Array]


class Product(NamedTuple):
    """An array ``sum_t left[g, t, i] right[g, t, j]``, brought into its own shape.

    Attributes:
        left: [groups, positions, I].
        right: [groups, positions, J].
        split: the axes that groups, I and J stand for.
        order: permutation of all of these that gives the array.
        moves: made after that.
    """

    left: Array
    right: Array
    split: Split
    order: tuple[int, ...]
    moves: tuple[Move, ...] = ()

    @property
    def key(self) -> Hashable:
        """Products of equal keys add up by joining their positions."""
        return self.split, self.order, tuple(move.signature for move in self.moves)

    @property
    def is_sooner_written(self) -> bool:
        """Whether the array costs no more than comparing all pairs of positions."""
        positions, *_ = self.left.shape[1:]
        size, other = self.left.shape[-1], self.right.shape[-1]
        return positions > 1 and size * other <= positions * (size + other)


class Rows(NamedTuple):
    """An array of zeros with rows added to it, brought into its own shape.

    Attributes:
        left: int[positions], which row; those outside of the table are left out.
        right: [positions, ...], what is added.
        size: rows of the table.
        moves: made after that.
    """

    left: Array
    right: Array
    size: int
    moves: tuple[Move, ...] = ()

    @property
    def key(self) -> Hashable:
        """Rows of equal keys add up by joining their positions."""
        signatures = tuple(move.signature for move in self.moves)
        return self.size, self.right.shape[1:], signatures

    @property
    def is_sooner_written(self) -> bool:
        """Whether the table is no larger than what is added to it."""
        return self.size <= self.left.shape[0]


Term = Product | Rows


def product(left: Array, right: Array, split: Split, order: Sequence[int]) -> Product:
    """Makes a product whose two sides stand in the order of the array's axes."""
    num_groups, num_left, num_right = map(len, split)
    first, last = num_groups + num_left, num_groups + num_left + num_right
    swap = [*range(num_groups), *range(first, last), *range(num_groups, first)]
    swapped = tuple(swap.index(axis) for axis in order)
    if swapped < tuple(order):
        groups, one, two = split
        return Product(right, left, (groups, two, one), swapped)
    return Product(left, right, split, tuple(order))


def dot(left: Array, right: Array, dimension_numbers: tuple) -> Product:
    """Makes a product of what ``lax.dot_general`` would multiply."""
    sides, free = [], []
    for array, summed, shared in zip((left, right), *dimension_numbers, strict=True):
        rest = [one for one in range(array.ndim) if one not in {*summed, *shared}]
        moved = jnp.transpose(array, (*shared, *summed, *rest))
        groups, positions, sizes = (
            tuple(array.shape[axis] for axis in axes) for axes in (shared, summed, rest)
        )
        shape = prod(groups), prod(positions), prod(sizes)
        sides.append(moved.reshape(shape))
        free.append(sizes)
    split = groups, free[0], free[1]
    return product(sides[0], sides[1], split, range(sum(map(len, split))))


def moved(term: Term, move: Move) -> Term:
    """Makes one more move."""
    return term._replace(moves=(*term.moves, move))


def transposed(term: Term, permutation: Sequence[int]) -> Term:
    """Permutes the axes."""
    if isinstance(term, Product) and not term.moves:
        order = [term.order[axis] for axis in permutation]
        return product(term.left, term.right, term.split, order)
    apply = functools.partial(jnp.transpose, axes=tuple(permutation))
    return moved(term, Move(("transpose", tuple(permutation)), apply))


def joined(terms: Sequence[Term]) -> list[Term]:
    """Adds up the terms of equal keys."""
    by_key: dict[Hashable, list[Term]] = {}
    for term in terms:
        by_key.setdefault((type(term), term.key), []).append(term)
    found = []
    for same in by_key.values():
        axis = 1 if isinstance(same[0], Product) else 0
        left, right = (
            sides[0] if len(same) == 1 else jnp.concatenate(sides, axis)
            for sides in ([one.left for one in same], [one.right for one in same])
        )
        found.append(same[0]._replace(left=left, right=right))
    return found


def summed_turns(term: Term) -> Term:
    """Adds up the turns of a loop, which lie along the leading axis of both sides."""
    if isinstance(term, Rows):
        left, right = (x.reshape(-1, *x.shape[2:]) for x in (term.left, term.right))
        return term._replace(left=left, right=right)
    left, right = (
        jnp.swapaxes(x, 0, 1).reshape(x.shape[1], -1, x.shape[-1])
        for x in (term.left, term.right)
    )
    return term._replace(left=left, right=right)


def stacked_turns(term: Product) -> Product:
    """Stacks the turns of a loop, which lie along the leading axis of both sides."""
    length = term.left.shape[0]
    left, right = (x.reshape(-1, *x.shape[2:]) for x in (term.left, term.right))
    (groups, one, two), order = term.split, [0, *(axis + 1 for axis in term.order)]
    moves = tuple(
        Move(("stacked", move.signature), jax.vmap(move.apply)) for move in term.moves
    )
    return Product(left, right, ((length, *groups), one, two), tuple(order), moves)


def written(term: Term) -> Array:
    """Writes the array out."""
    if isinstance(term, Rows):
        zeros = jnp.zeros((term.size, *term.right.shape[1:]), term.right.dtype)
        return _arranged(term, zeros.at[_wrapped(term)].add(term.right, mode="drop"))
    dtype = accumulation_dtype(term.left, term.right)
    return _arranged(
        term,
        jnp.einsum("gti,gtj->gij", *_sides(term), preferred_element_type=dtype),
    )


def total(term: Term) -> Array:
    """Writes out the sum over examples, which lie along the leading axis."""
    if isinstance(term, Rows):
        return written(summed_turns(term))
    # Contracting both axes at once keeps them apart for a compiler that shards.
    left, right = _sides(term)
    dtype = accumulation_dtype(left, right)
    return _arranged(
        term, jnp.einsum("ngti,ngtj->gij", left, right, preferred_element_type=dtype)
    )


def _sides(term: Term) -> tuple[Array, Array]:
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.promote_types(term.left.dtype, term.right.dtype)
    return term.left.astype(dtype), term.right.astype(dtype)


def _arranged(term: Term, values: Array) -> Array:
    if isinstance(term, Product):
        values = values.reshape(sum(term.split, ())).transpose(term.order)
    for move in term.moves:
        values = move.apply(values)
    return values


def _rearranged(term: Term, array: Array) -> Array:
    """Undoes the moves: what meets the product, or the table, of the term."""
    if isinstance(term, Product):
        shape = (*(prod(axes) for axes in term.split),)
    else:
        shape = term.size, *term.right.shape[1:]
    core = jax.ShapeDtypeStruct(shape, array.dtype)
    (values,) = jax.linear_transpose(functools.partial(_arranged, term), core)(array)
    return values


def square(term: Term) -> Array:
    """The sum of the squares of the array, which is not written out."""
    left, right = term.left, in_float32(term.right)
    if isinstance(term, Rows):
        # Equal rows add up where the first of them stands.
        places = jnp.where(_is_inside(term), left, -1)
        first = jnp.argmax(places[:, None] == places[None, :], axis=1)
        right = jnp.where(_along_rows(places >= 0, right), right, 0)
        return jnp.sum(jnp.zeros_like(right).at[first].add(right) ** 2)
    left = in_float32(left)
    if left.shape[1] == 1:
        return jnp.sum(jnp.sum(left**2, (1, 2)) * jnp.sum(right**2, (1, 2)))
    pairs = [
        jnp.einsum("gti,gsi->gts", one, one, precision=EXACT) for one in (left, right)
    ]
    return jnp.sum(pairs[0] * pairs[1])


def along(term: Term, direction: Array) -> Array:
    """The inner product of the array with another one."""
    direction = _rearranged(term, in_float32(direction))
    right = in_float32(term.right)
    if isinstance(term, Rows):
        met = direction[_wrapped(term)]
        return jnp.sum(jnp.where(_along_rows(_is_inside(term), met), met, 0) * right)
    left = in_float32(term.left)
    met = jnp.einsum("gti,gij->gtj", left, direction, precision=EXACT)
    return jnp.sum(met * right)


def along_all(term: Product) -> Array:
    """The inner products of the arrays of examples with their sum, [examples].

    The examples lie along the leading axis of both sides; all pairs are compared.
    """
    pairs = []
    for side in (term.left, term.right):
        count, groups, positions, size = side.shape
        rows = in_float32(side).swapaxes(0, 1).reshape(groups, -1, size)
        pairs.append(jnp.einsum("gti,gsi->gts", rows, rows, precision=EXACT))
    return jnp.sum(jnp.sum(pairs[0] * pairs[1], (0, 2)).reshape(count, positions), 1)


def can_meet(one: Product, rows: Rows) -> bool:
    """Whether ``meeting`` knows how the two lie: a table that is multiplied, too."""
    is_plain = not one.moves and not rows.moves and one.order == (0, 1)
    shape = (rows.size, *rows.right.shape[1:])
    return is_plain and one.split == ((), shape[:1], shape[1:])


def meeting(one: Product, rows: Rows) -> Array:
    """The inner product of the two arrays."""
    picked = in_float32(one.left[0][:, _wrapped(rows)])
    picked = jnp.where(_is_inside(rows), picked, 0)
    right = in_float32(one.right[0]), in_float32(rows.right)
    return jnp.sum(picked * jnp.einsum("si,ti->st", *right, precision=EXACT))


def _is_inside(rows: Rows) -> Array:
    return (rows.left >= 0) & (rows.left < rows.size)


def _wrapped(rows: Rows) -> Array:
    """Indices of which those outside of the table are too large, never negative."""
    return jnp.where(_is_inside(rows), rows.left, rows.size)


def _along_rows(flags: Array, rows: Array) -> Array:
    return flags.reshape(-1, *(1,) * (rows.ndim - 1))
