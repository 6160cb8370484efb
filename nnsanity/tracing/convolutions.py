"""Convolutions that run as fast inside of a loop as outside of one, on a CPU.

XLA's CPU backend has a quick convolution for images with the channels last.  Outside of
loops it transposes the others to that layout, the gradients of every convolution among
them; inside of loops and branches it does not (jax-ml/jax issue 12868), and a step of a
convolutional network then takes twenty to thirty times as long.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax

from nnsanity._types import Array, PyTree
from nnsanity.tracing import compat, control
from nnsanity.tracing.compat import Equation, Jaxpr
from nnsanity.tracing.control import Path
from nnsanity.tracing.tap import Taps, evaluate


def channels_last(fn: Callable) -> Callable:
    """Returns the function with its convolutions in the layout that is quick on a CPU.

    To be put around what is run inside of a loop, after its derivatives were taken.
    Elsewhere, and on other devices, the compiler chooses layouts itself.  What is not
    differentiated and has a derivative of its own (``jax.custom_vjp``) stays as it is.

    Args:
        fn: any function of pytrees of arrays.
    """
    if jax.default_backend() != "cpu":
        return fn

    @functools.wraps(fn)
    def run(*args: PyTree) -> PyTree:
        program = compat.trace(fn, *args)
        instead = dict.fromkeys(_convolutions(program.jaxpr, ()), _transposed)
        outputs, _ = evaluate(program, jax.tree.leaves(args), Taps(instead=instead))
        return jax.tree.unflatten(jax.tree.structure(program.out_shape), outputs)

    return run


def _convolutions(jaxpr: Jaxpr, path: Path) -> Iterator[Path]:
    """Finds the convolutions, also inside of calls, loops and branches."""
    for index, eqn in enumerate(jaxpr.eqns):
        here = (*path, index)
        if eqn.primitive.name == "conv_general_dilated":
            yield here
        elif (called := compat.called_jaxpr(eqn)) is not None:
            if not eqn.primitive.name.startswith("custom_"):
                yield from _convolutions(called[0], here)
        else:
            for body in control.bodies(eqn, here):
                yield from _convolutions(body.jaxpr, body.path)


def _transposed(eqn: Equation, operands: list[Array]) -> list[Array]:
    inputs, kernel = operands
    params = dict(eqn.params)
    old = params.pop("dimension_numbers")
    rank = inputs.ndim
    spatial = range(rank - 2)
    image = (0, rank - 1, *(axis + 1 for axis in spatial))
    new = jax.lax.ConvDimensionNumbers(image, (rank - 1, rank - 2, *spatial), image)
    with eqn.ctx.manager:
        outputs = jax.lax.conv_general_dilated(
            _moved(inputs, old.lhs_spec, new.lhs_spec),
            _moved(kernel, old.rhs_spec, new.rhs_spec),
            dimension_numbers=new,
            **params,
        )
        return [_moved(outputs, new.out_spec, old.out_spec)]


def _moved(array: Array, old: Sequence[int], new: Sequence[int]) -> Array:
    """Moves each axis from where it was to where it shall be."""
    return jax.lax.transpose(array, [old[new.index(axis)] for axis in range(len(new))])
