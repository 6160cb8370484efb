"""Small networks, written in several ways, and the same ones in NumPy."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

DEAD = (2, 1)
"""The unit of each hidden layer that a bias of -100 kills."""
_RANDOM = np.random.default_rng(0)
INPUTS = _RANDOM.normal(size=(64, 3)).astype(np.float32)
IMAGES = _RANDOM.normal(size=(8, 6, 6, 2)).astype(np.float32)
WEIGHTS = tuple(
    (_RANDOM.normal(size=shape).astype(np.float32), np.full(shape[1], 1.0, np.float32))
    for shape in ((3, 4), (4, 5), (5, 2))
)
KERNEL = _RANDOM.normal(size=(3, 3, 2, 4)).astype(np.float32)
for _layer, _unit in enumerate(DEAD):
    WEIGHTS[_layer][1][_unit] = -100.0


class Network(NamedTuple):
    """A network and what its layers should be called, in the order of execution."""

    apply_fn: object
    params: object
    names: tuple


def linen_compact():
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            for features in (4, 5):
                x = linen.relu(linen.Dense(features)(x))
            return linen.Dense(2)(x)

    names = ("Dense_0", "Dense_1", "Dense_2")
    params = {
        name: {"kernel": jnp.asarray(w), "bias": jnp.asarray(b)}
        for name, (w, b) in zip(names, WEIGHTS, strict=True)
    }
    return Network(Model().apply, {"params": params}, names)


def linen_setup():
    class Hidden(linen.Module):
        def setup(self):
            self.inner = [linen.Dense(4), linen.Dense(5)]

        def __call__(self, x):
            for layer in self.inner:
                x = linen.relu(layer(x))
            return x

    class Model(linen.Module):
        def setup(self):
            self.trunk, self.head = Hidden(), linen.Dense(2)

        def __call__(self, x):
            return self.head(self.trunk(x))

    leaves = [{"kernel": jnp.asarray(w), "bias": jnp.asarray(b)} for w, b in WEIGHTS]
    params = {
        "trunk": {"inner_0": leaves[0], "inner_1": leaves[1]},
        "head": leaves[2],
    }
    names = ("trunk/inner_0", "trunk/inner_1", "head")
    return Network(lambda p, x: Model().apply({"params": p}, x), params, names)


def nnx_split():
    class Model(nnx.Module):
        def __init__(self):
            self.first, self.second, self.third = (
                nnx.Linear(
                    *w.shape,
                    kernel_init=lambda *_, w=w: jnp.asarray(w),
                    bias_init=lambda *_, b=b: jnp.asarray(b),
                    rngs=nnx.Rngs(0),
                )
                for w, b in WEIGHTS
            )

        def __call__(self, x):
            return self.third(nnx.relu(self.second(nnx.relu(self.first(x)))))

    graphdef, params, rest = nnx.split(Model(), nnx.Param, ...)
    return Network(
        lambda p, x: nnx.merge(graphdef, p, rest, copy=True)(x),
        params,
        ("first", "second", "third"),
    )


def equinox_partition():
    eqx = pytest.importorskip("equinox")

    class Model(eqx.Module):
        layers: list

        def __call__(self, x):
            for layer in self.layers[:-1]:
                x = jax.nn.relu(layer(x))
            return self.layers[-1](x)

    layers = []
    for w, b in WEIGHTS:
        blank = eqx.nn.Linear(*w.shape, key=jax.random.key(0))
        pair = (jnp.asarray(w.T), jnp.asarray(b))
        layers.append(eqx.tree_at(lambda one: (one.weight, one.bias), blank, pair))
    params, static = eqx.partition(Model(layers), eqx.is_inexact_array)
    names = ("layers/0", "layers/1", "layers/2")
    return Network(lambda p, x: jax.vmap(eqx.combine(p, static))(x), params, names)


def plain_dict():
    def apply_fn(params, x):
        x = jax.nn.relu(x @ params["w1"] + params["b1"])
        x = jax.nn.relu(x @ params["w2"] + params["b2"])
        return x @ params["w3"] + params["b3"]

    pairs = enumerate(WEIGHTS, 1)
    params = {f"{kind}{i}": p for i, pair in pairs for kind, p in zip("wb", pair)}  # noqa: B905
    return Network(apply_fn, jax.tree.map(jnp.asarray, params), ("w1", "w2", "w3"))


def list_of_tuples():
    def apply_fn(params, x):
        for w, b in params[:-1]:
            x = jax.nn.relu(x @ w + b)
        return x @ params[-1][0] + params[-1][1]

    return Network(apply_fn, jax.tree.map(jnp.asarray, [*WEIGHTS]), ("0", "1", "2"))


STYLES = (
    linen_compact,
    linen_setup,
    nnx_split,
    equinox_partition,
    plain_dict,
    list_of_tuples,
)


def numpy_activations():
    """What the three layers put out on INPUTS, in float64."""
    x, outputs = INPUTS.astype(np.float64), []
    for index, (w, b) in enumerate(WEIGHTS):
        x = x @ w.astype(np.float64) + b
        x = np.maximum(x, 0) if index < 2 else x
        outputs.append(x)
    return outputs


def numpy_convolution():
    """What KERNEL makes of IMAGES without padding, in float64."""
    windows = np.lib.stride_tricks.sliding_window_view(
        IMAGES.astype(np.float64), (3, 3), axis=(1, 2)
    )
    return np.einsum("nyxchw,hwco->nyxo", windows, KERNEL)


def convolution(images, kernel, **options):
    return jax.lax.conv_general_dilated(
        images,
        kernel,
        options.pop("strides", (1, 1)),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        **options,
    )


@jax.custom_vjp
def relu_with_own_gradient(x):
    """A ReLU whose gradient is seven times too large, so that its loss is seen."""
    return jnp.maximum(x, 0)


relu_with_own_gradient.defvjp(
    lambda x: (relu_with_own_gradient(x), x > 0),
    lambda active, grad: (7 * grad * active,),
)


@jax.custom_jvp
def relu_with_own_tangent(x):
    """A ReLU whose tangent is seven times too large."""
    return jnp.maximum(x, 0)


@relu_with_own_tangent.defjvp
def _(primals, tangents):
    (x,), (tangent,) = primals, tangents
    return relu_with_own_tangent(x), 7 * jnp.where(x > 0, tangent, 0)


def through(nonlinearity):
    """A plain network of two layers with a nonlinearity between them."""

    def apply_fn(params, x):
        hidden = nonlinearity(x @ params["w1"] + params["b1"])
        return hidden @ params["w2"] + params["b2"]

    return apply_fn


def saving(policy):
    return lambda fn: jax.checkpoint(fn, policy=policy)


WRAPPED = {
    "plain": through(jax.nn.relu),
    "jit": jax.jit(through(jax.jit(jax.nn.relu))),
    "custom_jvp": through(relu_with_own_tangent),
    "custom_vjp": through(relu_with_own_gradient),
    "remat": jax.checkpoint(through(jax.nn.relu)),
    "remat_policy": saving(jax.checkpoint_policies.dots_saveable)(through(jax.nn.relu)),
    "remat_in_jit": jax.jit(jax.checkpoint(jax.jit(through(jax.nn.relu)))),
    "vmap": lambda params, x: jax.vmap(lambda row: through(jax.nn.relu)(params, row))(
        x
    ),
}
"""The same network of the first two layers, behind the calls of JAX."""
