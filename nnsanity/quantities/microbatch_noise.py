"""The noise scale from gradients that a training step has anyway."""

import jax
import jax.numpy as jnp
import numpy as np

from nnsanity._tree import in_float32, inexact_leaves
from nnsanity._types import Array, PyTree
from nnsanity.quantities.example_gradients import inner
from nnsanity.quantities.noise_estimate import (
    NoiseScale,
    Sums,
    estimated,
    joined,
    stacked,
)
from nnsanity.tracing.compat import varies

CALLER = "microbatch_noise_scale"


def microbatch_noise_scale(
    grads: PyTree,
    *,
    microbatch_size: Array | int,
    axis_name: str | tuple[str, ...] | None = None,
) -> NoiseScale:
    """Measures the noise scale from gradients of microbatches that are there already.

    What gradient accumulation and data-parallel training give for nothing: microbatches
    of one step, whose mean is the gradient of the whole batch.  The estimates are those
    of ``gradient_noise_scale(num_microbatches=k)``, and say the same; with few parts
    their error is wide, so average them over steps by ``add_noise``.

    Costs one read of the gradients, and with ``axis_name`` the mean over devices that a
    step takes anyway, which the compiler joins with yours.  Accumulation that sums its
    gradients up need not keep them for this: give their norms to a ``monitor``, as
    ``microbatch_norms``.

    Args:
        grads: tree of the gradients of losses that are means over equally large
            microbatches; of its leaves the floating-point ones count.  Without
            ``axis_name`` each leaf is [microbatches, ...], as ``jax.lax.scan`` stacks
            them.  With it they are of this device's examples alone, before any mean
            over devices, and no part of a gradient that is sharded over devices.
        microbatch_size: examples in each microbatch.
        axis_name: axis of a ``shard_map`` (or several), over which the batch is split.

    Returns:
        ``NoiseScale``, with ``axis_name`` the same on all devices; ``standard_error``
        is inf for two microbatches.

    Raises:
        ValueError: if there are fewer than two microbatches, the leaves differ in their
            number, there are no floating-point leaves, ``microbatch_size`` is not a
            number of at least 1, or the gradients are the same on all devices.

    Example:
        >>> grads = {"w": jnp.array([2.0, 4.0])}  # of two microbatches
        >>> found = microbatch_noise_scale(grads, microbatch_size=8)
        >>> found.gradient_square_norm, found.covariance_trace, found.noise_scale
        (Array(8., dtype=float32), Array(16., dtype=float32), Array(2., dtype=float32))

    References:
        McCandlish et al. (2018), "An empirical model of large-batch training",
        appendix A.1; Efron and Stein (1981), "The jackknife estimate of variance".
    """
    leaves = inexact_leaves(grads)
    if not leaves:
        raise ValueError(f"{CALLER}: grads has no floating-point leaves")
    _check_size(microbatch_size)
    if axis_name is None:
        _check_stack(leaves)
        return _of_stack(leaves, microbatch_size)
    return estimated(joined(_of_devices(leaves, axis_name)), microbatch_size)


def _check_size(size: Array | int) -> None:
    is_known = not isinstance(size, jax.core.Tracer)
    if np.shape(size) != () or (is_known and not size >= 1):
        raise ValueError(
            f"{CALLER}: microbatch_size must be the number of examples in each"
            f" microbatch, at least 1, got {size}"
        )


def _check_stack(leaves: list[Array]) -> None:
    lengths = {np.shape(leaf)[:1] for leaf in leaves}
    if lengths & {(), (0,), (1,)} or len(lengths) > 1:
        raise ValueError(
            f"{CALLER}: every leaf of grads must have the same leading axis of at least"
            f" 2 microbatches, got shapes {[np.shape(leaf) for leaf in leaves]}; stack"
            " the gradients, or give axis_name inside of a shard_map"
        )


@jax.jit
def _of_stack(leaves: list[Array], microbatch_size: Array | int) -> NoiseScale:
    means = [jnp.mean(in_float32(leaf), 0) for leaf in leaves]
    with_mean = jax.vmap(inner, (0, None))
    sums = Sums(
        stacked([jax.vmap(inner)(leaf, leaf) for leaf in leaves]),
        stacked([with_mean(*pair) for pair in zip(leaves, means, strict=True)]),
        stacked([inner(mean, mean) for mean in means]),
    )
    return estimated(joined(sums), microbatch_size)


def _of_devices(leaves: list[Array], axis_name: str | tuple[str, ...]) -> Sums:
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    count = jax.lax.psum(1, names)
    if count < 2:
        raise ValueError(
            f"{CALLER}: there must be at least 2 devices along {axis_name!r}, got"
            f" {count}"
        )
    index = jax.lax.axis_index(names)
    for name in names:
        is_told = varies(jax.lax.axis_index(name), name)
        if is_told and not any(varies(leaf, name) for leaf in leaves):
            raise ValueError(
                f"{CALLER}: grads are the same all along {name!r}, so they are summed"
                " or averaged already; differentiate by parameters that vary along it:"
                " jax.lax.pcast(params, axis_name, to='varying'), or jax.lax.pvary in"
                " older JAX"
            )
    means = [jax.lax.pmean(in_float32(leaf), names) for leaf in leaves]

    def gathered(numbers: list[Array]) -> Array:
        # A sum, so that the result is known to be the same everywhere.
        mine = stacked(numbers)[:, None]
        return jax.lax.psum(jnp.where(jnp.arange(count) == index, mine, 0), names)

    return Sums(
        gathered([inner(leaf, leaf) for leaf in leaves]),
        gathered([inner(*pair) for pair in zip(leaves, means, strict=True)]),
        stacked([inner(mean, mean) for mean in means]),
    )
