"""Styles of weights: what is done to them before they meet the data."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.tracing.styles import (
    HEAD,
    ONE_LAYER,
    SEQUENCES,
    B,
    Network,
    Style,
    W,
    X,
    as_arrays,
    mask,
    one_layer,
)

LEFT_OUT = np.tri(4, dtype=np.float32)
INTEGERS = np.round(2 * W[0])


def relu(x):
    return jax.nn.relu(x)


def made(weight, kept=None, by_hand=W[0], **changes):
    """A hidden layer whose weight is made from other arrays."""

    def build():
        kept_params = {"w": W[0]} if kept is None else kept

        def apply_fn(params, x):
            return relu(x @ weight(params) + params["b"]) @ params["head"]

        def reference(sight):
            hidden = sight.relu("w", sight.array(X) @ by_hand + B[0])
            return sight.linear("head", hidden @ HEAD)

        params = as_arrays({**kept_params, "b": B[0], "head": HEAD})
        dead = {"w": mask(2)}
        network = Network(apply_fn, params, X, ("w", "head"), dead, reference)
        return network._replace(**changes)

    return build


def normalized(params):
    direction = params["layer"]["direction"]
    return params["layer"]["scale"] * direction / jnp.linalg.norm(direction, axis=0)


def weight_norm():
    scale = np.linalg.norm(W[0], axis=0)
    layer = {"direction": 3 * W[0], "scale": scale}

    def reference(sight):
        hidden = sight.relu("layer", sight.array(X) @ W[0] + B[0])
        return sight.linear("head", hidden @ HEAD)

    return made(
        normalized,
        {"layer": layer},
        names=("layer", "head"),
        dead={"layer": mask(2)},
        reference=reference,
    )()


def in_bf16():
    whole = np.round(X)

    def apply_fn(params, x):
        w, b, x = (one.astype(jnp.bfloat16) for one in (params["w"], params["b"], x))
        return relu(x @ w + b).astype(jnp.float32) @ params["head"]

    def reference(sight):
        hidden = sight.relu("w", sight.array(whole) @ INTEGERS + B[0])
        return sight.linear("head", hidden @ HEAD)

    params = as_arrays({"w": INTEGERS, "b": B[0], "head": HEAD})
    names, dead = ("w", "head"), {"w": mask(2)}
    return Network(apply_fn, params, whole, names, dead, reference, tolerance=0.02)


def used_twice():
    def apply_fn(params, x):
        for _ in range(2):
            x = relu(x @ params["w"] + params["b"])
        return x @ params["head"]

    def reference(sight):
        x = sight.relu("w", sight.array(X) @ W[0] + B[0])
        return sight.linear("head", sight.relu("w#2", x @ W[0] + B[0]) @ HEAD)

    names, dead = ("w", "w#2", "head"), {"w": mask(2), "w#2": mask(2)}
    return Network(apply_fn, as_arrays(ONE_LAYER), X, names, dead, reference)


def heads():
    into, out = W[0].reshape(4, 2, 2), W[1].reshape(2, 2, 4)

    def apply_fn(params, x):
        x = relu(jnp.einsum("btd,dhk->bthk", x, params["in"]) + params["b"])
        return jnp.einsum("bthk,hkd->btd", x, params["out"])

    def reference(sight):
        x = sight.xp.einsum("btd,dhk->bthk", sight.array(SEQUENCES), into)
        x = sight.relu("in", x + B[0].reshape(2, 2))
        return sight.linear("out", sight.xp.einsum("bthk,hkd->btd", x, out))

    params = as_arrays({"in": into, "out": out, "b": B[0].reshape(2, 2)})
    names, dead = ("in", "out"), {"in": mask(2)}
    return Network(apply_fn, params, SEQUENCES, names, dead, reference)


LOW_RANK = {"w": W[0], "down": W[1][:, :2], "up": W[2][:2]}


def low_rank():
    def apply_fn(params, x):
        x = x @ params["w"] + x @ params["down"] @ params["up"]
        return relu(x + params["b"]) @ params["head"]

    def reference(sight):
        x = sight.array(X)
        whole = sight.linear("w", x @ W[0])
        down = sight.linear("down", x @ LOW_RANK["down"])
        hidden = sight.relu("up", whole + down @ LOW_RANK["up"] + B[0])
        return sight.linear("head", hidden @ HEAD)

    params = as_arrays({**LOW_RANK, "b": B[0], "head": HEAD})
    names, dead = ("w", "down", "up", "head"), {"up": mask(2)}
    return Network(apply_fn, params, X, names, dead, reference)


def closed_over():
    network = made(lambda params: params["w"])()
    data = jnp.asarray(X)
    return network._replace(
        apply_fn=lambda params, _: network.apply_fn(params, data), inputs=np.zeros(3)
    )


def generator():
    network = made(lambda params: params["w"])()
    key = jax.random.key(3)
    noise = np.asarray(jax.random.normal(key, (32, 4)))

    return network._replace(
        apply_fn=lambda params, key: network.apply_fn(
            params, jax.random.normal(key, (32, 4))
        ),
        inputs=key,
        reference=lambda sight: one_layer(sight, noise),
    )


def data_added():
    """A bias that comes with the data, before the nonlinearity."""

    def apply_fn(params, inputs):
        x, shift = inputs
        return relu(x @ params["w"] + shift + params["b"]) @ params["head"]

    def reference(sight):
        hidden = sight.array(X) @ W[0] + 0.1 * X + B[0]
        return sight.linear("head", sight.relu("w", hidden) @ HEAD)

    params, names = as_arrays(ONE_LAYER), ("w", "head")
    inputs = (X, np.float32(0.1) * X)
    return Network(apply_fn, params, inputs, names, {"w": mask(2)}, reference)


def data_kept(nonlinearity):
    """Something that comes with the data, between the layer and its nonlinearity."""

    def build():
        def apply_fn(params, x):
            return nonlinearity(x @ params["w"] + params["b"], x) @ params["head"]

        return Network(
            apply_fn, as_arrays(ONE_LAYER), X, ("w", "head"), {"w": mask(2)}, None
        )

    return build


def dropped(x, _):
    kept = jax.random.bernoulli(jax.random.key(0), 0.5, x.shape)
    return relu(jnp.where(kept, 2 * x, 0))


FLAT = {"w": W[0].reshape(-1)}
QUANTIZED = {"w": INTEGERS.astype(np.int8), "scale": np.full(4, 0.5, np.float32)}
MERGED = W[0] + W[1][:, :2] @ W[2][:2]
LAST_OF_SUM = "the nonlinearity of a sum of layers belongs to the last of them"
STYLES = tuple(
    Style("weights", name, build, note)
    for name, build, note in (
        ("used twice", used_twice, ""),
        ("transposed", made(lambda p: p["w"].T, {"w": W[0].T}), ""),
        ("reshaped", made(lambda p: p["w"].reshape(4, 4), FLAT), ""),
        ("cast to bf16", in_bf16, ""),
        ("weight normalization", weight_norm, ""),
        (
            "masked",
            made(lambda p: p["w"] * LEFT_OUT, by_hand=W[0] * LEFT_OUT),
            "",
        ),
        (
            "int8, cast and scaled",
            made(
                lambda p: p["w"].astype(jnp.float32) * p["scale"],
                QUANTIZED,
                by_hand=INTEGERS * np.float32(0.5),
            ),
            "",
        ),
        ("einsum into heads and out of them", heads, "units of all heads in a row"),
        ("LoRA beside its layer", low_rank, LAST_OF_SUM),
        (
            "LoRA merged into its layer",
            made(lambda p: p["w"] + p["down"] @ p["up"], LOW_RANK, by_hand=MERGED),
            "",
        ),
        ("data that the function closes over", closed_over, ""),
        ("generator, its input a random key", generator, ""),
        ("data added before the nonlinearity", data_added, ""),
        ("inputs added before the ReLU", data_kept(lambda h, x: relu(h + x)), ""),
        ("dropout before the ReLU", data_kept(dropped), ""),
        (
            "masked by the data before the ReLU",
            data_kept(lambda h, x: relu(jnp.where(x[:, :1] > 0, h, 0))),
            "",
        ),
    )
)
