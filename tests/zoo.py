"""Healthy programs in real styles of code; nothing may be said against any of them.

Each entry builds a ``Program`` of small shapes.  ``apply_fn`` is the network as it is
evaluated, None where outputs have no one example each.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen, nnx
from jax import lax

N, T, D, H, C = 6, 5, 4, 8, 3
KEY = jax.random.key(0)
TABLE = jax.random.normal(jax.random.key(1), (N, D))
TOKENS = jax.random.randint(jax.random.key(2), (N, T), 0, 11)
IMAGES = jax.random.normal(jax.random.key(3), (N, 8, 8, 3))
SEQUENCES = jax.random.normal(jax.random.key(4), (N, T, D))
CLASSES = jnp.arange(N) % C
NUMBERS = jnp.linspace(-1.0, 1.0, N)


class Program(NamedTuple):
    """What a user trains."""

    loss_fn: Callable
    params: Any
    batch: Any
    apply_fn: Callable | None = None


def dense(key, *sizes):
    """Weights of a plain network."""
    return [
        {"w": jax.random.normal(key, pair) / pair[0] ** 0.5, "b": jnp.zeros(pair[1])}
        for pair in itertools.pairwise(sizes)
    ]


def mlp(layers, x, activation=jax.nn.relu):
    for layer in layers[:-1]:
        x = activation(x @ layer["w"] + layer["b"])
    return x @ layers[-1]["w"] + layers[-1]["b"]


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def plain_mlp():
    def loss_fn(params, batch):
        return jnp.mean((mlp(params, batch[0])[:, 0] - batch[1]) ** 2)

    network = lambda params, x: mlp(params, x)[:, 0]  # noqa: E731
    return Program(loss_fn, dense(KEY, D, H, H, 1), (TABLE, NUMBERS), network)


def linen_classifier():
    model = linen.Sequential([linen.Dense(H), linen.gelu, linen.Dense(C)])
    params = model.init(KEY, TABLE)["params"]
    network = lambda params, x: model.apply({"params": params}, x)  # noqa: E731

    def loss_fn(params, batch):
        return cross_entropy(network(params, batch[0]), batch[1])

    return Program(loss_fn, params, (TABLE, CLASSES), network)


def nnx_classifier():
    model = nnx.Sequential(
        nnx.Linear(D, H, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(H, C, rngs=nnx.Rngs(1))
    )
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    network = lambda params, x: nnx.merge(graphdef, params, rest, copy=True)(x)  # noqa: E731

    def loss_fn(params, batch):
        one_hot = jax.nn.one_hot(batch[1], C)
        return optax.softmax_cross_entropy(network(params, batch[0]), one_hot).mean()

    return Program(loss_fn, params, (TABLE, CLASSES), network)


def equinox_classifier():
    import equinox as eqx

    model = eqx.nn.MLP(D, C, H, 2, key=KEY)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    network = lambda params, x: jax.vmap(eqx.combine(params, static))(x)  # noqa: E731

    @eqx.filter_jit
    def loss_fn(params, batch):
        log_probabilities = jax.nn.log_softmax(network(params, batch[0]))
        return -jnp.mean(log_probabilities[jnp.arange(N), batch[1]])

    return Program(loss_fn, params, (TABLE, CLASSES), network)


def softmax_by_hand():
    def network(params, x):
        exp = jnp.exp(mlp(params, x) - mlp(params, x).max())
        return exp / exp.sum(-1, keepdims=True)

    def loss_fn(params, batch):
        probabilities = jnp.clip(network(params, batch[0]), 1e-7, 1.0)
        one_hot = jax.nn.one_hot(batch[1], C)
        return -jnp.mean(jnp.sum(one_hot * jnp.log(probabilities), -1))

    return Program(loss_fn, dense(KEY, D, H, C), (TABLE, CLASSES), network)


def sigmoid_by_hand():
    def network(params, x):
        return 1 / (1 + jnp.exp(-mlp(params, x)[:, 0]))

    def loss_fn(params, batch):
        p, y = network(params, batch[0]), batch[1]
        return -jnp.mean(y * jnp.log(p + 1e-8) + (1 - y) * jnp.log(1 - p + 1e-8))

    batch = (TABLE, (NUMBERS > 0).astype(float))
    return Program(loss_fn, dense(KEY, D, H, 1), batch, network)


class ResNet(linen.Module):
    train: bool

    @linen.compact
    def __call__(self, x):
        x = linen.Conv(H, (3, 3), use_bias=False)(x)
        for _ in range(2):
            norm = lambda: linen.BatchNorm(use_running_average=not self.train)  # noqa: E731
            y = linen.relu(norm()(linen.Conv(H, (3, 3), use_bias=False)(x)))
            x = linen.relu(x + norm()(linen.Conv(H, (3, 3), use_bias=False)(y)))
        x = linen.max_pool(x, (2, 2), (2, 2))
        return linen.Dense(C)(x.mean((1, 2)))


def resnet(*, train=False):
    model = ResNet(train)
    variables = model.init(KEY, IMAGES)
    rest = {"batch_stats": variables["batch_stats"]}

    def network(params, x):
        outputs, _ = model.apply({"params": params, **rest}, x, mutable=["batch_stats"])
        return outputs

    def loss_fn(params, batch):
        labels = optax.smooth_labels(jax.nn.one_hot(batch[1], C), 0.1)
        decay = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
        logits = network(params, batch[0])
        return optax.softmax_cross_entropy(logits, labels).mean() + 1e-4 * decay

    return Program(loss_fn, variables["params"], (IMAGES, CLASSES), network)


class Block(linen.Module):
    deterministic: bool

    @linen.compact
    def __call__(self, x, mask=None):
        y = linen.LayerNorm()(x)
        y = linen.MultiHeadDotProductAttention(
            2, dropout_rate=0.1, deterministic=self.deterministic
        )(y, y, mask=mask)
        x = x + linen.Dropout(0.1, deterministic=self.deterministic)(y)
        y = linen.Dense(H)(linen.gelu(linen.Dense(2 * H)(linen.LayerNorm()(x))))
        return x + linen.Dropout(0.1, deterministic=self.deterministic)(y)


class GPT(linen.Module):
    deterministic: bool = True

    @linen.compact
    def __call__(self, tokens):
        embed = linen.Embed(11, H)
        positions = self.param("positions", linen.initializers.normal(0.02), (T, H))
        x = embed(tokens) + positions
        x = Block(self.deterministic)(x, linen.make_causal_mask(tokens))
        return embed.attend(linen.LayerNorm()(x))


def gpt():
    noisy = GPT(deterministic=False)
    params = GPT().init(KEY, TOKENS)

    def loss_fn(params, batch):
        logits = noisy.apply(params, batch, rngs={"dropout": KEY})
        mask = (batch[:, 1:] != 0).astype(float)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits[:, :-1], batch[:, 1:]
        )
        return jnp.sum(losses * mask) / jnp.maximum(jnp.sum(mask), 1)

    return Program(loss_fn, params, TOKENS, GPT().apply)


class ViT(linen.Module):
    @linen.compact
    def __call__(self, images):
        x = linen.Conv(H, (4, 4), strides=(4, 4))(images).reshape(len(images), -1, H)
        token = self.param("token", linen.initializers.zeros, (1, 1, H))
        x = jnp.concatenate([jnp.broadcast_to(token, (len(images), 1, H)), x], axis=1)
        x = Block(deterministic=True)(x)
        return linen.Dense(C)(linen.LayerNorm()(x[:, 0]))


def vit():
    params = ViT().init(KEY, IMAGES)

    def loss_fn(params, batch):
        return cross_entropy(ViT().apply(params, batch[0]), batch[1])

    return Program(loss_fn, params, (IMAGES, CLASSES), ViT().apply)


def lstm():
    model = linen.RNN(linen.LSTMCell(H))
    params = {"cell": model.init(KEY, SEQUENCES), "head": dense(KEY, H, 1)}

    def network(params, x):
        return mlp(params["head"], model.apply(params["cell"], x)[:, -1])[:, 0]

    def loss_fn(params, batch):
        return optax.huber_loss(network(params, batch[0]), batch[1]).mean()

    return Program(loss_fn, params, (SEQUENCES, NUMBERS), network)


def lstm_by_scan():
    (gates,), (head,) = dense(KEY, D + H, 4 * H), dense(KEY, H, 1)
    params = {**gates, "head": head["w"][:, 0]}

    def network(params, x):
        def step(state, row):
            h, c = state
            gates = jnp.concatenate([row, h], -1) @ params["w"] + params["b"]
            i, f, g, o = jnp.split(gates, 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zeros = jnp.zeros((x.shape[0], H))
        (h, _), _ = lax.scan(step, (zeros, zeros), jnp.swapaxes(x, 0, 1))
        return h @ params["head"]

    def loss_fn(params, batch):
        return jnp.mean(jnp.abs(network(params, batch[0]) - batch[1]))

    return Program(loss_fn, params, (SEQUENCES, NUMBERS), network)


def resnet_in_training():
    return resnet(train=True)


def padded_pooling():
    params = {"embedding": jnp.ones((11, H)), "head": dense(KEY, H, C)}

    def network(params, tokens):
        mask = (tokens != 0)[..., None]
        hidden = jnp.where(mask, params["embedding"][tokens], 0.0)
        return mlp(params["head"], hidden.sum(1) / jnp.maximum(mask.sum(1), 1))

    def loss_fn(params, batch):
        return cross_entropy(network(params, batch[0]), batch[1])

    return Program(loss_fn, params, (TOKENS, CLASSES), network)


def graph_network():
    params = dense(KEY, D, H, C)
    adjacent = (jnp.arange(T)[:, None] - jnp.arange(T)[None]) ** 2 <= 1

    def network(params, nodes):
        shares = adjacent / adjacent.sum(-1, keepdims=True)
        return mlp(params, jnp.einsum("ij,njd->nid", shares, nodes)).mean(1)

    def loss_fn(params, batch):
        return cross_entropy(network(params, batch[0]), batch[1])

    return Program(loss_fn, params, (SEQUENCES, CLASSES), network)


def scanned_layers():
    params = {"stack": jnp.ones((4, D, D)), "head": dense(KEY, D, C)}

    def network(params, x):
        @jax.checkpoint
        def layer(h, weight):
            return h + jnp.tanh(h @ weight), None

        return mlp(params["head"], lax.scan(layer, x, params["stack"])[0])

    def loss_fn(params, batch):
        return cross_entropy(network(params, batch[0]), batch[1])

    return Program(loss_fn, params, (TABLE, CLASSES), network)


def mixture_of_experts():
    params = {
        "router": dense(KEY, D, C),
        "experts": jax.random.normal(KEY, (C, D, H)),
        "head": dense(KEY, H, C),
    }

    def routed(params, x):
        shares = jax.nn.softmax(mlp(params["router"], x))
        top, chosen = lax.top_k(shares, 2)
        top /= top.sum(-1, keepdims=True)
        gates = jnp.sum(jax.nn.one_hot(chosen, C) * top[..., None], axis=1)
        hidden = jax.nn.silu(jnp.einsum("nd,edh->neh", x, params["experts"]))
        mixed = jnp.einsum("ne,neh->nh", gates, hidden)
        return mlp(params["head"], mixed), shares, gates

    def loss_fn(params, batch):
        logits, shares, gates = routed(params, batch[0])
        balance = C * jnp.sum(shares.mean(0) * (gates > 0).mean(0))
        router = jax.nn.logsumexp(mlp(params["router"], batch[0]), axis=-1)
        return (
            cross_entropy(logits, batch[1])
            + 0.01 * balance
            + 1e-3 * jnp.mean(router**2)
        )

    return Program(
        loss_fn, params, (TABLE, CLASSES), lambda params, x: routed(params, x)[0]
    )


def multi_label():
    params = dense(KEY, D, H, C)

    def loss_fn(params, batch):
        logits = mlp(params, batch[0])
        return optax.sigmoid_binary_cross_entropy(logits, batch[1]).mean()

    targets = (jnp.arange(N * C).reshape(N, C) % 4 < 2).astype(float)
    return Program(loss_fn, params, (TABLE, targets), mlp)


def quantized():
    params = dense(KEY, D, H, 1)

    def straight_through(w):
        return w + lax.stop_gradient(jnp.round(w * 8) / 8 - w)

    def loss_fn(params, batch):
        rounded = jax.tree.map(straight_through, params)
        return jnp.mean((mlp(rounded, batch[0])[:, 0] - batch[1]) ** 2)

    return Program(loss_fn, params, (TABLE, NUMBERS))


NETWORKS = (
    *(plain_mlp, linen_classifier, nnx_classifier, equinox_classifier),
    *(softmax_by_hand, sigmoid_by_hand, gpt, vit, lstm, lstm_by_scan),
    *(padded_pooling, graph_network, scanned_layers, mixture_of_experts),
    *(multi_label, quantized, resnet_in_training, resnet),
)
