"""Styles of operations that weights take part in: convolutions, look-ups, experts."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.tracing.styles import (
    HEAD,
    IMAGES,
    ONE_LAYER,
    SEQUENCES,
    TOKENS,
    B,
    Network,
    Style,
    W,
    X,
    as_arrays,
    mask,
    masks,
)
from tests.tracing.styles_weights import relu

EXPERTS = masks(2, 0, 3)


def slid(x, kernel, groups, dilation):
    """A convolution as a sum over the places of its kernel."""
    size = kernel.shape[0]
    span = x.shape[1] - dilation * (size - 1)
    per_group, units = kernel.shape[2], kernel.shape[3] // groups
    outputs = []
    for group in range(groups):
        own = kernel[..., group * units : (group + 1) * units]
        part = x[..., group * per_group : (group + 1) * per_group]
        places = (
            (i, j, dilation * i, dilation * j) for i in range(size) for j in range(size)
        )
        outputs.append(
            sum(
                part[:, down : down + span, right : right + span] @ own[i, j]
                for i, j, down, right in places
            )
        )
    return outputs


def spread(x, xp):
    """Puts a zero between any two pixels, and two around."""
    for axis in (1, 2):
        x = xp.stack([x, 0 * x], axis + 1)
        shape = [*x.shape[:axis], x.shape[axis] * 2, *x.shape[axis + 2 :]]
        x = xp.moveaxis(xp.moveaxis(x.reshape(shape), axis, 0)[:-1], 0, axis)
    return xp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))


def convolution(groups=1, dilation=1, spreads=False):
    """A ReLU layer of 3 by 3 pixels and a mean over the image."""

    def build():
        random = np.random.default_rng(groups)
        shape = (3, 3, 4 // groups, 4)
        kernel = 0.4 * random.normal(size=shape).astype(np.float32)
        padding = ((2, 2), (2, 2)) if spreads else "VALID"

        def apply_fn(params, x):
            x = jax.lax.conv_general_dilated(
                x,
                params["conv"]["kernel"],
                (1, 1),
                padding,
                lhs_dilation=(2, 2) if spreads else (1, 1),
                rhs_dilation=(dilation, dilation),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=groups,
            )
            x = relu(x + params["conv"]["bias"])
            return x.mean((1, 2)) @ params["head"]

        def reference(sight):
            x = sight.array(IMAGES)
            x = spread(x, sight.xp) if spreads else x
            x = sight.xp.concatenate(slid(x, kernel, groups, dilation), -1)
            x = sight.relu("conv", x + B[0])
            return sight.linear("head", x.mean((1, 2)) @ HEAD)

        params = as_arrays({"conv": {"kernel": kernel, "bias": B[0]}, "head": HEAD})
        names, dead = ("conv", "head"), {"conv": mask(2)}
        return Network(apply_fn, params, IMAGES, names, dead, reference)

    return build


TABLE = np.random.default_rng(3).normal(size=(7, 4)).astype(np.float32)
TABLE[0] = 1
TABLE[:, 2] = -1


def embedding():
    def apply_fn(params, tokens):
        return relu(params["table"][tokens]) @ params["head"]

    def reference(sight):
        hidden = sight.relu("table", sight.array(TABLE)[TOKENS])
        return sight.linear("head", hidden @ HEAD)

    params = as_arrays({"table": TABLE, "head": HEAD})
    names, dead = ("table", "head"), {"table": mask(2)}
    return Network(apply_fn, params, TOKENS, names, dead, reference)


def tied():
    def apply_fn(params, tokens):
        x = params["table"][tokens]
        return relu(x @ params["w"] + params["b"]) @ params["table"].T

    def reference(sight):
        x = sight.linear("table", sight.array(TABLE)[TOKENS])
        return sight.linear("table#2", sight.relu("w", x @ W[0] + B[0]) @ TABLE.T)

    params = as_arrays({"table": TABLE, "w": W[0], "b": B[0]})
    names, dead = ("table", "w", "table#2"), {"w": mask(2)}
    return Network(apply_fn, params, TOKENS, names, dead, reference)


def softmax(xp, x):
    x = xp.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def experts():
    def apply_fn(params, x):
        gates = jax.nn.softmax(x @ params["router"])
        x = jnp.einsum("nd,edh->neh", x, params["up"]) + params["b"]
        x = jnp.einsum("neh,ehd->ned", relu(x), params["down"])
        return jnp.sum(gates[..., None] * x, 1)

    def reference(sight):
        x, xp = sight.array(X), sight.xp
        gates = sight.through("router", x @ W[3][:, :3], lambda one: softmax(xp, one))
        x = sight.relu("up", xp.einsum("nd,edh->neh", x, W[:3]) + B[:3])
        x = sight.linear("down", xp.einsum("neh,ehd->ned", x, W[1:4]))
        return (gates[..., None] * x).sum(1)

    params = {"router": W[3][:, :3], "up": W[:3], "down": W[1:4], "b": B[:3]}
    names, dead = ("router", "up", "down"), {"up": EXPERTS.reshape(-1)}
    return Network(apply_fn, as_arrays(params), X, names, dead, reference)


def ragged():
    sizes = (10, 15, 7)

    def apply_fn(params, inputs):
        x, sizes = inputs
        return relu(jax.lax.ragged_dot(x, params["w"], sizes) + params["b"])

    def reference(sight):
        parts = np.split(np.arange(32), np.cumsum(sizes)[:-1])
        x = sight.array(X)
        x = [x[rows] @ W[expert] for expert, rows in enumerate(parts)]
        return sight.relu("w", sight.xp.concatenate(x) + B[0])

    params = as_arrays({"w": W[:3], "b": B[0]})
    inputs = (X, np.asarray(sizes, np.int32))
    return Network(apply_fn, params, inputs, ("w",), {"w": mask(2)}, reference)


def standardized(xp, x):
    x = x - x.mean(-1, keepdims=True)
    return x / xp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)


def norm_after():
    def apply_fn(params, x):
        x = standardized(jnp, x @ params["w"]) * params["scale"] + params["b"]
        return relu(x) @ params["head"]

    def reference(sight):
        x = standardized(sight.xp, sight.array(X) @ W[0])
        return sight.linear("head", sight.relu("w", 2 * x + B[0]) @ HEAD)

    params = as_arrays({**ONE_LAYER, "scale": np.full(4, 2, np.float32)})
    names, dead = ("w", "head"), {"w": mask(2)}
    return Network(apply_fn, params, X, names, dead, reference)


def norm_before():
    def apply_fn(params, x):
        x = standardized(jnp, x) * params["scale"] + params["shift"]
        return relu(x @ params["w"] + params["b"]) @ params["head"]

    def reference(sight):
        x = 2 * standardized(sight.xp, sight.array(X)) + 1
        return sight.linear("head", sight.relu("w", x @ W[0] + B[0]) @ HEAD)

    norm = {"scale": np.full(4, 2, np.float32), "shift": np.ones(4, np.float32)}
    return Network(
        apply_fn,
        as_arrays({**ONE_LAYER, **norm}),
        X,
        ("w", "head"),
        {"w": mask(2)},
        reference,
        uninspected=("scale", "shift"),
    )


def temperature():
    def apply_fn(params, x):
        keys = x @ params["keys"]
        scores = jnp.einsum("btd,bsd->bts", x, keys) * params["temperature"]
        x = jax.nn.softmax(scores) @ x
        return relu(x @ params["w"] + params["b"]) @ params["head"]

    def reference(sight):
        x, xp = sight.array(SEQUENCES), sight.xp
        keys = sight.linear("keys", x @ W[1])
        x = softmax(xp, xp.einsum("btd,bsd->bts", x, keys) * 0.5) @ x
        return sight.linear("head", sight.relu("w", x @ W[0] + B[0]) @ HEAD)

    return Network(
        apply_fn,
        as_arrays({**ONE_LAYER, "keys": W[1], "temperature": np.float32(0.5)}),
        SEQUENCES,
        ("keys", "w", "head"),
        {"w": mask(2)},
        reference,
        uninspected=("temperature",),
    )


SIDE_BY_SIDE = "the units of all experts stand side by side"
STYLES = tuple(
    Style("operations", name, build, note)
    for name, build, note in (
        ("convolution", convolution(), ""),
        ("grouped convolution", convolution(groups=2), ""),
        ("dilated convolution", convolution(dilation=2), ""),
        ("transposed convolution", convolution(spreads=True), ""),
        ("depthwise convolution", convolution(groups=4), ""),
        ("embedding", embedding, ""),
        ("tied embedding", tied, ""),
        ("experts, einsum", experts, SIDE_BY_SIDE),
        (
            "experts, ragged_dot",
            ragged,
            "a unit counts once: it is dead where it is dead in all experts",
        ),
        ("normalization after a layer", norm_after, ""),
        ("normalization before any layer", norm_before, ""),
        ("learned temperature of attention", temperature, ""),
    )
)
