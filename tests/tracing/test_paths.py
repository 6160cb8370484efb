"""Ways through networks whose layers are counted by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from nnsanity.tracing.layers import inspect
from nnsanity.tracing.paths import depths, merging, on_every_way

X = jnp.ones((5, 4))
SQUARES = {f"w{index}": jnp.eye(4) for index in range(1, 5)}


def plain(p, x):
    for name in sorted(p):
        x = jnp.tanh(x @ p[name])
    return x


def residual(p, x):
    x = x @ p["w1"]
    x = x + jnp.tanh(x @ p["w2"]) @ p["w3"]
    return x @ p["w4"]


def concatenated(p, x):
    x = x @ p["w1"]
    x = jnp.concatenate([x, jnp.tanh(x @ p["w2"])], axis=1)
    return x[:, :4] @ p["w3"] + x[:, 4:] @ p["w4"]


def gated(p, x):
    return (x @ p["w1"]) * jax.nn.sigmoid(jnp.tanh(x @ p["w2"]) @ p["w3"]) @ p["w4"]


def normalized(p, x):
    for name in sorted(p):
        h = x @ p[name]
        x = (h - h.mean(1, keepdims=True)) / (h.std(1, keepdims=True) + 1)
    return x


def looped(p, x):
    weights = jnp.stack([p[name] for name in ("w2", "w3", "w4")])
    turn = lambda h, w: (jnp.tanh(h @ w), None)  # noqa: E731
    return jax.lax.scan(turn, x @ p["w1"], weights)[0]


def looped_residual(p, x):
    weights = jnp.stack([p[name] for name in ("w2", "w3")])
    turn = lambda h, w: (h + jnp.tanh(h @ w), None)  # noqa: E731
    return jax.lax.scan(turn, x @ p["w1"], weights)[0] @ p["w4"]


def shared_turns(p, x):
    return jax.lax.fori_loop(0, 7, lambda i, h: jnp.tanh(h @ p["w1"]), x) @ p["w2"]


def branched(p, x):
    return jax.lax.cond(
        x.sum() > 0, lambda: x @ p["w1"] @ p["w2"], lambda: jnp.tanh(x @ p["w3"])
    )


def in_jit(p, x):
    return jax.jit(residual)(p, jax.checkpoint(lambda x: 2 * x)(x))


WAYS = {
    plain: (4, 4, "w1 w2 w3 w4"),
    residual: (4, 2, "w1 w4"),
    concatenated: (3, 2, "w1"),
    gated: (3, 3, "w4"),
    normalized: (4, 4, "w1 w2 w3 w4"),
    looped_residual: (4, 2, "w1 w4"),
    shared_turns: (2, 2, "w1 w2"),
    branched: (2, 2, ""),
    in_jit: (4, 2, "w1 w4"),
}


@pytest.mark.parametrize("network", WAYS, ids=lambda one: one.__name__)
def test_ways(network):
    longest, unskipped, passed = WAYS[network]
    found = inspect(network, SQUARES, X)
    names = {one.layer.name: one.layer.stack for one in found.layers}
    counted = depths(found)
    assert (counted.longest, counted.unskipped) == (longest, unskipped), names
    everywhere = {name.partition("#")[0] for name in on_every_way(found)}
    assert everywhere == set(passed.split())


def test_blocks_of_a_stack_count_each():
    params = {"w": jnp.ones((3, 4, 4)), "v": jnp.ones((4, 4))}

    def network(p, x):
        turn = lambda h, w: (jnp.tanh(h @ w), None)  # noqa: E731
        return jax.lax.scan(turn, x @ p["v"], p["w"])[0]

    counted = depths(inspect(network, params, X))
    assert (counted.longest, counted.unskipped) == (4, 4)
    assert counted.by_layer == {"v": 1, "w": 4}


def test_attention_and_embedding():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(7, 8)(tokens)
            x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
            return nn.Dense(3)(x + nn.Dense(8)(nn.relu(nn.Dense(16)(x))))

    tokens = jnp.ones((2, 5), jnp.int32)
    params = Block().init(jax.random.key(0), tokens)
    counted = depths(inspect(Block().apply, params, tokens))
    # Embedding, query or key or value, out, two dense ones and the last.
    assert (counted.longest, counted.unskipped) == (6, 2)


def straight(p, x):
    x = jax.nn.relu(x @ p["w1"] @ p["w2"])
    return (x @ p["w3"]).reshape(5, 2, 2).reshape(5, 4) @ p["w4"]


def low_rank(p, x):
    return jnp.tanh(x @ p["w1"][:, :1] @ p["w2"][:1]) @ p["w3"]


def two_readers(p, x):
    x = x @ p["w1"]
    return jnp.tanh(x @ p["w2"]) * jnp.tanh(x @ p["w3"])


def attention(p, x):
    query, key, value = (x @ p[name] for name in ("w1", "w2", "w3"))
    return jax.nn.softmax(query @ key.T) @ value @ p["w4"]


def returned_too(p, x):
    x = x @ p["w1"]
    return x @ p["w2"], x


def linear_recurrence(p, x):
    def turn(state, row):
        state = jnp.concatenate([state, row])[:4] @ p["w1"]
        return state, state @ p["w2"]

    return jax.lax.scan(turn, x[0], x)[1]


def channels_then_tokens(p, x):
    return (x @ p["w1"]).T @ p["w2"].repeat(2, axis=0)[:5]


def copies(p, x):
    weights = jnp.stack([p["w1"], p["w2"]])
    return jax.vmap(lambda w: x @ w @ p["w3"])(weights)


def scaled(p, x):
    return jax.jit(lambda x: 2 * (x @ p["w1"]) + 1)(x) @ p["w2"]


MERGING = dict.fromkeys(WAYS, "") | {
    branched: "w1",
    straight: "w1 w3",
    low_rank: "",
    two_readers: "",
    attention: "",
    returned_too: "",
    linear_recurrence: "",
    channels_then_tokens: "",
    copies: "",
    scaled: "w1",
}


@pytest.mark.parametrize("network", MERGING, ids=lambda one: one.__name__)
def test_layers_with_nothing_nonlinear_between_them(network):
    found = merging(inspect(network, SQUARES, X))
    assert {one.layer.name for one in found} == set(MERGING[network].split())


class Separable(nn.Module):
    groups: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), feature_group_count=self.groups, name="first")(x)
        return nn.Dense(2)(nn.relu(nn.Conv(8, (1, 1), name="second")(x)).mean((1, 2)))


@pytest.mark.parametrize(("groups", "expected"), [(1, {"first"}), (4, set())])
def test_convolutions_by_groups_are_meant_to_be_followed_by_another(groups, expected):
    module, images = Separable(groups), jnp.ones((2, 6, 6, 4))
    params = module.init(jax.random.key(0), images)
    found = merging(inspect(module.apply, params, images))
    assert {one.layer.name for one in found} == expected
