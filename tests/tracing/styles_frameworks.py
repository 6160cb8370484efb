"""Styles of the frameworks: Linen, NNX, Equinox, Haiku-like and plain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from tests.tracing import programs
from tests.tracing.styles import (
    DEAD,
    HEAD,
    SEQUENCES,
    B,
    Network,
    Style,
    W,
    X,
    as_arrays,
    mask,
    masks,
    stack_of_layers,
)

DENSE = {"kernel": W[0], "bias": B[0]}
STACKED = {"kernel": W[:3], "bias": B[:3]}
OUT = {"kernel": HEAD, "bias": np.zeros(2, np.float32)}


def three_layers(program):
    """The network of ``programs``, which three ways to write it share."""

    def build():
        apply_fn, params, names = program()

        def reference(sight):
            x = sight.array(programs.INPUTS)
            for name, (w, b) in zip(names[:2], programs.WEIGHTS, strict=False):
                x = sight.relu(name, x @ w + b)
            w, b = programs.WEIGHTS[2]
            return sight.linear(names[2], x @ w + b)

        dead = {names[0]: mask(2), names[1]: mask(1, 5)}
        return Network(apply_fn, params, programs.INPUTS, names, dead, reference)

    return build


def haiku_like():
    names = ("mlp/~/linear_0", "mlp/~/linear_1", "mlp/~/linear_2")
    params = {
        name: {"w": w, "b": b}
        for name, (w, b) in zip(names, programs.WEIGHTS, strict=True)
    }

    def apply_fn(params, x):
        for name in names:
            x = x @ params[name]["w"] + params[name]["b"]
            x = x if name == names[-1] else jax.nn.relu(x)
        return x

    return programs.Network(apply_fn, as_arrays(params), names)


def apply_of(model):
    return lambda params, x: model.apply({"params": params}, x)


def linen_shared():
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            dense = linen.Dense(4, name="dense")
            return linen.Dense(2, name="head")(linen.relu(dense(linen.relu(dense(x)))))

    def reference(sight):
        x = sight.relu("dense", sight.array(X) @ W[0] + B[0])
        return sight.linear("head", sight.relu("dense#2", x @ W[0] + B[0]) @ HEAD)

    return Network(
        apply_of(Model()),
        as_arrays({"dense": DENSE, "head": OUT}),
        X,
        ("dense", "dense#2", "head"),
        {"dense": mask(2), "dense#2": mask(2)},
        reference,
    )


class Block(linen.Module):
    @linen.compact
    def __call__(self, x, _=None):
        return linen.relu(linen.Dense(4)(x)), None


def linen_scan(remat):
    def build():
        class Model(linen.Module):
            @linen.compact
            def __call__(self, x):
                block = linen.remat(Block) if remat else Block
                scanned = linen.scan(
                    block,
                    variable_axes={"params": 0},
                    split_rngs={"params": True},
                    length=3,
                )
                return linen.Dense(2, name="head")(scanned(name="blocks")(x, None)[0])

        name = "blocks/Dense_0"
        return Network(
            apply_of(Model()),
            as_arrays({"blocks": {"Dense_0": STACKED}, "head": OUT}),
            X,
            (name, "head"),
            {name: masks(*DEAD[:3])},
            lambda sight: stack_of_layers(sight, 3, name),
            turns={name: (3,)},
        )

    return build


def renamed(name):
    """The hidden layer and the head by hand, the hidden one by its name."""

    def reference(sight):
        hidden = sight.relu(name, sight.array(X) @ W[0] + B[0])
        return sight.linear("head", hidden @ HEAD)

    return reference


def linen_remat():
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            x, _ = linen.remat(Block)(name="block")(x)
            return linen.Dense(2, name="head")(x)

    name = "block/Dense_0"
    params = as_arrays({"block": {"Dense_0": DENSE}, "head": OUT})
    names, dead = (name, "head"), {name: mask(2)}
    return Network(apply_of(Model()), params, X, names, dead, renamed(name))


def ensemble(name):
    """Three networks of two layers on one input; their units stand side by side."""

    def reference(sight):
        x = sight.array(X)
        first = [x @ W[member] + B[member] for member in range(3)]
        first = sight.relu(f"{name}0", sight.xp.stack(first))
        second = [first[i] @ W[1 + i] + B[1 + i] for i in range(3)]
        return sight.relu(f"{name}1", sight.xp.stack(second))

    dead = {
        f"{name}0": masks(*DEAD[:3]).reshape(-1),
        f"{name}1": masks(*DEAD[1:4]).reshape(-1),
    }
    return (f"{name}0", f"{name}1"), dead, reference


SHIFTED = {"kernel": W[1:4], "bias": B[1:4]}


def linen_vmap():
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            for index in range(2):
                x = linen.relu(linen.Dense(4, name=f"dense_{index}")(x))
            return x

    members = linen.vmap(
        Model,
        in_axes=None,
        out_axes=0,
        axis_size=3,
        variable_axes={"params": 0},
        split_rngs={"params": True},
    )
    params = as_arrays({"dense_0": STACKED, "dense_1": SHIFTED})
    return Network(apply_of(members()), params, X, *ensemble("dense_"))


def linen_simple_cell():
    cell = linen.SimpleCell(4, activation_fn=linen.relu, name="cell")

    def apply_fn(params, x):
        return linen.RNN(cell).apply({"params": params}, x)

    def reference(sight):
        x = sight.array(SEQUENCES)
        h, outputs = 0 * x[:, 0], []
        for time in range(3):
            entering = sight.linear("cell/i", x[:, time] @ W[0] + B[0])
            h = sight.relu("cell/h", entering + h @ W[1])
            outputs.append(h)
        return sight.xp.stack(outputs, 1)

    return Network(
        apply_fn,
        as_arrays({"cell": {"i": DENSE, "h": {"kernel": W[1]}}}),
        SEQUENCES,
        ("cell/i", "cell/h"),
        {"cell/h": mask(2)},
        reference,
        turns={"cell/i": (3,), "cell/h": (3,)},
        own={"cell/i": (), "cell/h": ()},
    )


def linen_rnn(cell, names):
    def build():
        model = linen.RNN(cell(4, name="cell"))
        params = model.init(jax.random.key(0), SEQUENCES)["params"]
        named = tuple(f"cell/{name}" for name in names.split())
        return Network(apply_of(model), params, SEQUENCES, named, {})

    return build


def linen_batch_norm():
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Dense(4, use_bias=False, name="dense")(x)
            x = linen.BatchNorm(use_running_average=False, name="norm")(x)
            return linen.Dense(2, name="head")(linen.relu(x))

    stats = {"norm": {"mean": jnp.zeros(4), "var": jnp.ones(4)}}

    def apply_fn(params, x):
        variables = {"params": params, "batch_stats": stats}
        return Model().apply(variables, x, mutable=["batch_stats"])[0]

    def reference(sight):
        x = sight.array(X) @ W[0]
        x = (x - x.mean(0)) / sight.xp.sqrt(x.var(0) + 1e-5)
        return sight.linear("head", sight.relu("dense", x + B[0]) @ HEAD)

    norm = {"scale": np.ones(4, np.float32), "bias": B[0]}
    params = as_arrays({"dense": {"kernel": W[0]}, "norm": norm, "head": OUT})
    return Network(
        apply_fn, params, X, ("dense", "head"), {"dense": mask(2)}, reference
    )


def linen_attention():
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
            return linen.Dense(2, name="head")(linen.relu(x))

    def heads(weights):
        return {"kernel": weights.reshape(4, 2, 2), "bias": np.ones((2, 2), np.float32)}

    attention = {name: heads(W[i]) for i, name in enumerate(("query", "key", "value"))}
    attention["out"] = {"kernel": W[3].reshape(2, 2, 4), "bias": B[0]}

    def reference(sight):
        x, xp = sight.array(SEQUENCES), sight.xp
        query, key, value = (
            sight.linear(
                f"attention/{name}",
                (xp.einsum("btd,dhk->bthk", x, leaf["kernel"]) + 1)
                / (np.sqrt(2) if name == "query" else 1),
            )
            for name, leaf in list(attention.items())[:3]
        )
        scores = xp.einsum("bqhk,bthk->bhqt", query, key)
        scores = xp.exp(scores - scores.max(-1, keepdims=True))
        scores = scores / scores.sum(-1, keepdims=True)
        mixed = xp.einsum("bhqt,bthk->bqhk", scores, value)
        out = xp.einsum("bqhk,hkd->bqd", mixed, attention["out"]["kernel"]) + B[0]
        return sight.linear("head", sight.relu("attention/out", out) @ HEAD)

    parts = tuple(f"attention/{name}" for name in attention)
    return Network(
        apply_of(Model()),
        as_arrays({"attention": attention, "head": OUT}),
        SEQUENCES,
        (*parts, "head"),
        {"attention/out": mask(2)},
        reference,
    )


def nnx_stacked(forward):
    """Layers whose parameters are stacked, split from a module made under nnx.vmap."""

    @nnx.vmap
    def create(keys):
        return nnx.Linear(4, 4, rngs=nnx.Rngs(keys))

    split = nnx.split(create(jax.random.split(jax.random.key(0), 3)), nnx.Param, ...)
    graphdef, params, rest = split
    shapes = {4: W, 3: W[:3], 2: B[:3]}
    params = jax.tree.map(lambda leaf: jnp.asarray(shapes[leaf.ndim]), params)

    def apply_fn(params, x):
        linear = nnx.merge(graphdef, params["linear"], rest, copy=True)
        return forward(linear, x) @ params["head"]

    return apply_fn, {"linear": params, "head": jnp.asarray(HEAD)}


def nnx_scan():
    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def forward(linear, x):
        return nnx.relu(linear(x))

    apply_fn, params = nnx_stacked(forward)
    return Network(
        apply_fn,
        params,
        X,
        ("linear", "head"),
        {"linear": masks(*DEAD[:3])},
        lambda sight: stack_of_layers(sight, 3, "linear"),
        turns={"linear": (3,)},
    )


def nnx_vmap():
    @nnx.vmap(in_axes=(0, None), out_axes=0)
    def forward(linear, x):
        return nnx.relu(linear(x))

    def reference(sight):
        x = sight.array(X)
        hidden = [x @ W[member] + B[member] for member in range(3)]
        hidden = sight.relu("linear", sight.xp.stack(hidden))
        return sight.linear("head", hidden @ HEAD)

    apply_fn, params = nnx_stacked(forward)
    dead = {"linear": masks(*DEAD[:3]).reshape(-1)}
    return Network(apply_fn, params, X, ("linear", "head"), dead, reference)


def equinox_scan():
    eqx = pytest.importorskip("equinox")
    layer = eqx.nn.Linear(4, 4, key=jax.random.key(0))
    stacked = (jnp.asarray(W[:3].transpose(0, 2, 1)), jnp.asarray(B[:3]))
    layers = eqx.tree_at(lambda one: (one.weight, one.bias), layer, stacked)
    dynamic, static = eqx.partition(layers, eqx.is_inexact_array)

    def apply_fn(params, x):
        def turn(x, dynamic):
            return jax.nn.relu(jax.vmap(eqx.combine(dynamic, static))(x)), None

        return jax.lax.scan(turn, x, params["layers"])[0] @ params["head"]

    return Network(
        apply_fn,
        {"layers": dynamic, "head": jnp.asarray(HEAD)},
        X,
        ("layers", "head"),
        {"layers": masks(*DEAD[:3])},
        lambda sight: stack_of_layers(sight, 3, "layers"),
        turns={"layers": (3,)},
    )


NAMES_ONLY = "its names, loss and gradients were checked; it has no ReLU"
LINEN = "Flax Linen"
CELLS = {
    linen.GRUCell: "ir hr iz hz in hn",
    linen.LSTMCell: "ii hi if hf ig hg io ho",
    linen.OptimizedLSTMCell: "hf if",
}
STYLES = (
    Style(LINEN, "compact", three_layers(programs.linen_compact)),
    Style(LINEN, "setup", three_layers(programs.linen_setup)),
    Style(LINEN, "module called twice", linen_shared),
    Style(LINEN, "nn.scan over layers", linen_scan(remat=False)),
    Style(LINEN, "nn.scan of nn.remat", linen_scan(remat=True)),
    Style(LINEN, "nn.remat", linen_remat),
    Style(LINEN, "nn.vmap, an ensemble", linen_vmap),
    Style(LINEN, "nn.RNN of SimpleCell with a ReLU", linen_simple_cell),
    *(
        Style(LINEN, f"nn.RNN of {cell.__name__}", linen_rnn(cell, own), NAMES_ONLY)
        for cell, own in CELLS.items()
    ),
    Style(LINEN, "nn.BatchNorm in training mode", linen_batch_norm),
    Style(LINEN, "MultiHeadDotProductAttention", linen_attention),
    Style("Flax NNX", "split and merge(copy=True)", three_layers(programs.nnx_split)),
    Style("Flax NNX", "nnx.scan over layers", nnx_scan),
    Style("Flax NNX", "nnx.vmap, an ensemble", nnx_vmap),
    Style("Equinox", "eqx.partition", three_layers(programs.equinox_partition)),
    Style("Equinox", "lax.scan over stacked layers", equinox_scan),
    Style("Haiku", "nested dicts", three_layers(haiku_like)),
    Style("plain functions", "dict", three_layers(programs.plain_dict)),
    Style("plain functions", "list of tuples", three_layers(programs.list_of_tuples)),
)
