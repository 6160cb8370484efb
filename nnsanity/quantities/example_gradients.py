"""Gradients of single examples, from one backward pass and without writing them out.

The gradient of the loss of one example is traced as it is; ``tracing.unwritten`` keeps
the products that it ends in as their two sides, and ``vmap`` runs it for all examples.
So it is right for any loss, and fast where the weights meet the data in products.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nnsanity._tree import (
    accumulation_dtype,
    in_float32,
    inexact_leaves,
    is_inexact,
)
from nnsanity._types import Array, LossFn, Params, PyTree
from nnsanity.tracing import compat, outer_products
from nnsanity.tracing.outer_products import Product, Rows, Term
from nnsanity.tracing.sums import Value, whole
from nnsanity.tracing.unwritten import evaluate_unwritten


class LeafGradients(NamedTuple):
    """The gradients of all examples by one leaf: the sum of what is not None.

    Attributes:
        array: [examples, ...].
        terms: products and rows, with a leading axis of examples on their sides.
        constant: the part that is the same for every example.
    """

    array: Array | None
    terms: tuple[Term, ...]
    constant: Array | None


class ExampleGradients(NamedTuple):
    """The losses of single examples and their gradients, inside of one trace.

    Attributes:
        losses: [examples].
        leaves: one for each floating-point leaf of the parameters.
    """

    losses: Array
    leaves: list[LeafGradients]


class GradientFn(NamedTuple):
    """A loss with its gradient by the floating-point leaves.

    Attributes:
        run: ``run(leaves, batch) -> (loss, gradients)``, of all leaves; gradients of
            the floating-point ones.
        leaves: all leaves of the parameters.
    """

    run: Callable[[list, PyTree], tuple[Array, list]]
    leaves: list

    @property
    def trained(self) -> list[Array]:
        """The floating-point leaves."""
        return [leaf for leaf in self.leaves if is_inexact(leaf)]


def gradient_of(caller: str, loss_fn: LossFn, params: Params) -> GradientFn:
    """Prepares the gradient of a loss; wrong losses raise where it is traced.

    Args:
        caller: name of the public function, for the message.
        loss_fn: ``loss_fn(params, batch) -> scalar``.
        params: any pytree of arrays.
    """
    leaves, structure = jax.tree.flatten(params)

    @jax.jit  # traces the loss once for all the places that call it
    def run(leaves: list, batch: PyTree) -> tuple[Array, list]:
        def loss_of(trained: list) -> Array:
            given = iter(trained)
            merged = [next(given) if is_inexact(leaf) else leaf for leaf in leaves]
            loss = loss_fn(jax.tree.unflatten(structure, merged), batch)
            _check_loss(caller, loss)
            return loss

        return jax.value_and_grad(loss_of)(inexact_leaves(leaves))

    return GradientFn(run, leaves)


def gradients_of(gradient_fn: GradientFn, batch: PyTree) -> ExampleGradients:
    """Runs the gradient of every example, side by side.

    Args:
        gradient_fn: of the loss.
        batch: leading axis the examples.
    """
    templates: list[tuple[Term, ...]] = []

    def of_one(example: PyTree) -> tuple:
        example = jax.tree.map(lambda leaf: leaf[None], example)
        program = compat.trace(gradient_fn.run, gradient_fn.leaves, example)
        arguments = jax.tree.leaves((gradient_fn.leaves, example))
        num_params = len(gradient_fn.leaves)
        varies = [index >= num_params for index in range(len(arguments))]
        loss, *values = evaluate_unwritten(program, arguments, varies)
        leaves = [_of_leaf(value) for value in values]
        templates[:] = [one.terms for one in leaves]
        arrays = [one.array for one in leaves]
        sides = [[(term.left, term.right) for term in one.terms] for one in leaves]
        return (whole(loss), arrays, sides), [one.constant for one in leaves]

    mapped = jax.vmap(of_one, out_axes=(0, None))
    (losses, arrays, sides), constants = mapped(jax.tree.map(as_array, batch))
    leaves = []
    for array, pairs, constant, terms in zip(
        arrays, sides, constants, templates, strict=True
    ):
        filled = tuple(
            term._replace(left=left, right=right)
            for term, (left, right) in zip(terms, pairs, strict=True)
        )
        leaves.append(LeafGradients(array, filled, constant))
    return ExampleGradients(losses, leaves)


def _of_leaf(value: Value) -> LeafGradients:
    """Decides what of a gradient is written out, for one example."""
    if not value.is_sum:
        array = value.array
        return LeafGradients(
            *((array, (), None) if value.varies else (None, (), array))
        )
    terms = outer_products.joined(value.terms or ())
    if not terms:
        return LeafGradients(None, (), whole(value))
    products = [term for term in terms if isinstance(term, Product)]
    rows = [term for term in terms if isinstance(term, Rows)]
    is_written = (
        len(products) > 1
        or len(rows) > 1
        or any(term.is_sooner_written for term in terms)
        or (len(terms) == 2 and not outer_products.can_meet(products[0], rows[0]))
    )
    if is_written:
        return LeafGradients(whole(value), (), None)
    return LeafGradients(None, (*products, *rows), value.constant)


def squares(gradients: ExampleGradients) -> Array:
    """Returns the squared norms, [leaves, examples]."""
    return _stacked([_squares(leaf) for leaf in gradients.leaves], gradients)


def _stacked(rows: Sequence[Array], gradients: ExampleGradients) -> Array:
    shape = gradients.losses.shape
    dtype = accumulation_dtype(*rows)
    return jnp.stack([jnp.broadcast_to(row, shape).astype(dtype) for row in rows])


def _squares(leaf: LeafGradients) -> Array:
    found = jnp.zeros((), jnp.float32)
    if leaf.array is not None:
        return jax.vmap(lambda array: inner(array, array))(leaf.array)
    for term in leaf.terms:
        found = found + _mapped(outer_products.square, term)
        if leaf.constant is not None:
            constant = leaf.constant
            met = _mapped(lambda one: outer_products.along(one, constant), term)  # noqa: B023
            found = found + 2 * met
    if len(leaf.terms) == 2:
        found = found + 2 * _mapped(outer_products.meeting, *leaf.terms)
    if leaf.constant is not None:
        found = found + inner(leaf.constant, leaf.constant)
    return found


def _mapped(function: Callable[..., Array], *terms: Term) -> Array:
    """Applies a function of terms to every example."""

    def of_one(sides: list[tuple[Array, Array]]) -> Array:
        return function(
            *(
                term._replace(left=left, right=right)
                for term, (left, right) in zip(terms, sides, strict=True)
            )
        )

    return jax.vmap(of_one)([(term.left, term.right) for term in terms])


def totals(gradients: ExampleGradients) -> list[Array]:
    """Returns the sum over the examples, by leaf."""
    count = gradients.losses.shape[0]

    def of_leaf(leaf: LeafGradients) -> Array:
        parts = [outer_products.total(term) for term in leaf.terms]
        if leaf.array is not None:
            parts.append(jnp.sum(in_float32(leaf.array), 0))
        if leaf.constant is not None:
            parts.append(count * in_float32(leaf.constant))
        return functools.reduce(jnp.add, map(in_float32, parts))

    return [of_leaf(leaf) for leaf in gradients.leaves]


def along(gradients: ExampleGradients, direction: list[Array]) -> Array:
    """Returns the inner products with a direction, [leaves, examples].

    Args:
        gradients: of examples.
        direction: by leaf.
    """

    def of_leaf(leaf: LeafGradients, one: Array) -> Array:
        if leaf.array is not None:
            return jax.vmap(lambda array: inner(array, one))(leaf.array)
        found = jnp.zeros((), jnp.float32)
        for term in leaf.terms:
            found = found + _mapped(lambda term: outer_products.along(term, one), term)
        if leaf.constant is not None:
            found = found + inner(leaf.constant, one)
        return found

    rows = [of_leaf(*pair) for pair in zip(gradients.leaves, direction, strict=True)]
    return _stacked(rows, gradients)


def along_total(gradients: ExampleGradients, total: list[Array]) -> Array:
    """Returns the inner products with the sum of all, [leaves, examples].

    Where positions are few, comparing all pairs of them costs less.

    Args:
        gradients: of examples.
        total: their sum, by leaf.
    """
    rows = []
    for leaf, one in zip(gradients.leaves, total, strict=True):
        term = _sooner_paired(leaf)
        if term is None:
            rows.append(along(gradients._replace(leaves=[leaf]), [one])[0])
        else:
            rows.append(outer_products.along_all(term))
    return _stacked(rows, gradients)


def _sooner_paired(leaf: LeafGradients) -> Product | None:
    """Returns the one product that a leaf is, if that has few positions."""
    if leaf.constant is not None or len(leaf.terms) != 1:
        return None
    (term,) = leaf.terms
    if not isinstance(term, Product):
        return None
    count, _, positions, size = term.left.shape
    other = term.right.shape[-1]
    is_sooner = count * positions * (size + other) < size * other
    return term if is_sooner else None


def inner(one: Array, other: Array) -> Array:
    """The inner product of two arrays, complex numbers as pairs."""
    product = jnp.conj(in_float32(one)) * in_float32(other)
    return jnp.sum(jnp.real(product))


def as_array(leaf: Any) -> Array:
    """Makes an array of anything like one, and leaves random keys.

    Args:
        leaf: an array or a number.
    """
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


def _check_loss(caller: str, loss: object) -> None:
    got, hint = type(loss).__name__, "; return the loss alone, without aux"
    if isinstance(loss, jax.Array):
        if loss.shape == () and jnp.issubdtype(loss.dtype, jnp.floating):
            return
        got = f"{loss.dtype}{list(loss.shape)}"
        hint = "; did you forget a mean?" if loss.shape else ""
    raise ValueError(
        f"{caller}: loss_fn must return a floating-point scalar, got {got}{hint}"
    )
