"""A layer with more units: the wide network written by hand is the oracle."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnsanity.tracing.layers import inspect
from nnsanity.tracing.replace import replaced
from nnsanity.tracing.widen import nonlinearity, obstacle, widening

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(6, 5)), jnp.float32)
IMAGES = jnp.asarray(RNG.normal(size=(2, 6, 6, 3)), jnp.float32)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def mlp(p, x):
    x = jnp.tanh(x @ p["w1"] + p["b1"])
    x = jax.nn.relu(x @ p["w2"])
    return x @ p["w3"] + p["b3"]


PARAMS = {
    "w1": normal(5, 4),
    "b1": jnp.zeros(4),
    "w2": normal(4, 2),
    "w3": normal(2, 3),
}
PARAMS["b3"] = normal(3)


def transposed(p, x):
    x = jnp.tanh(x @ p["w1"].T + p["b1"])
    x = jax.nn.relu(x @ p["w2"].T)
    return x @ p["w3"].T + p["b3"]


def biased(p, x):
    x = jnp.tanh(x @ p["w1"] + p["b1"])
    x = jax.nn.relu(x @ p["w2"] + p["b2"])
    return x @ p["w3"] + p["b3"]


def vector(p, x):
    def one(x):
        x = jnp.tanh(p["w1"] @ x + p["b1"])
        return p["w3"] @ jax.nn.relu(p["w2"] @ x + p["b2"])

    return jax.vmap(one)(x) + p["b3"]


TRANSPOSED = {k: v.T if v.ndim == 2 else v for k, v in PARAMS.items()}
BIASED = {"b2": normal(2)}


def in_calls(p, x):
    return jax.jit(jax.checkpoint(mlp))(p, x)


def rewritten_halves(p, x):
    half = lambda h, w: jax.nn.relu(h @ w)  # noqa: E731
    x = half(jnp.tanh(x @ p["w1"] + p["b1"]), p["w2"].astype(jnp.float32))
    return jax.checkpoint(lambda h: h @ p["w3"])(x) + p["b3"]


class Conv(nn.Module):
    width: int = 2

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        x = nn.relu(nn.Conv(self.width, (3, 3), strides=2)(x))
        return nn.Conv(3, (2, 2))(x).mean((1, 2))


def rows_of(part, shape):
    return jax.random.normal(jax.random.key(part.leaf), shape)


DENSE = {
    "plain": (mlp, PARAMS),
    "transposed": (transposed, TRANSPOSED),
    "vmap": (vector, TRANSPOSED | BIASED),
    "with a bias": (biased, PARAMS | BIASED),
    "in calls": (in_calls, PARAMS),
    "half in a checkpoint": (rewritten_halves, PARAMS),
}


@pytest.mark.parametrize("name", DENSE)
def test_a_dense_layer_gets_more_units(name):
    apply_fn, params = DENSE[name]
    network = inspect(apply_fn, params, X)
    plan = widening(network, network.layers[1], more=7)
    wide = plan.padded(params, rows_of)
    given, added = plan.split(wide)
    jax.tree.map(np.testing.assert_array_equal, given, params)
    names = sorted(params)  # the order of the leaves
    longer = {names.index(name) for name in ("b2", "w2", "w3") if name in names}
    assert added.keys() == longer

    def squares(function, params):
        return jnp.mean(function(params, X) ** 2)

    run = replaced(apply_fn, network, {}, wider=plan)
    found = jax.jit(jax.value_and_grad(lambda p: squares(run, p)))(wide)
    expected = jax.value_and_grad(lambda p: squares(apply_fn, p))(wide)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        found,
        expected,
    )


@pytest.mark.parametrize("name", ["plain", "transposed", "vmap", "with a bias"])
def test_units_beside_two_layers_in_a_row(name):
    apply_fn, params = DENSE[name]
    network = inspect(apply_fn, params, X)
    first, second, _ = network.layers
    plan = widening(network, first, more=7, last=second)
    wide = plan.padded(params, rows_of)
    _, added = plan.split(wide)
    names = sorted(params)
    own, bias, read = (added[names.index(one)] for one in ("w1", "b1", "w3"))
    own = own if own.shape == (5, 7) else own.T
    read = read if read.shape == (7, 3) else read.T
    expected = apply_fn(params, X) + jax.nn.relu(X @ own + bias) @ read
    found = replaced(apply_fn, network, {}, wider=plan)(wide, X)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_no_units_beside_layers_whose_rows_differ():
    def net(p, x):
        x = jax.nn.relu(jax.lax.conv(x, p["k"], (1, 1), "SAME")).mean((2, 3))
        return jnp.tanh(x @ p["w"]) @ p["v"]

    params = {"k": normal(2, 3, 3, 3), "w": normal(2, 2), "v": normal(2, 4)}
    network = inspect(net, params, IMAGES.transpose(0, 3, 1, 2))
    first, second, _ = network.layers
    assert widening(network, first, more=4, last=second) is None


def test_a_convolution_gets_more_channels():
    params = Conv().init(jax.random.key(0), IMAGES)
    network = inspect(Conv().apply, params, IMAGES)
    plan = widening(network, network.layers[1], more=3)
    wide = plan.padded(params, rows_of)
    assert wide["params"]["Conv_1"]["bias"].shape == (5,)
    expected = Conv(width=5).apply(wide, IMAGES)
    found = replaced(Conv().apply, network, {}, wider=plan)(wide, IMAGES)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_what_a_skip_carries_is_read_by_all_that_read_it():
    def residual(p, x):
        h = jnp.tanh(x @ p["a"])
        h = h + jnp.tanh(h @ p["b"])
        return h @ p["c"]

    params = {"a": normal(5, 2), "b": normal(2, 2), "c": normal(2, 3)}
    network = inspect(residual, params, X)
    plan = widening(network, network.layers[0], more=4)
    assert [part.layer for part in plan.readers] == ["b", "c"]
    wide = plan.padded(params, rows_of)
    found = replaced(residual, network, {}, wider=plan)(wide, X)
    h = jnp.tanh(X @ wide["a"])
    old, new = h[:, :2], h[:, 2:]
    old = old + jnp.tanh(h @ wide["b"])
    expected = jnp.concatenate([old, new], 1) @ wide["c"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def flattened(p, x):
    images = jax.lax.conv(x, p["k"], (1, 1), "SAME")
    return jax.nn.relu(images).reshape(len(x), -1) @ p["w"]


def tied(p, x):
    return jax.nn.relu(x @ p["w"]) @ p["w"].T


def masked(p, x):
    return jnp.tanh(x @ (p["a"] * jnp.eye(5))) @ p["b"]


def scanned(p, x):
    turn = lambda h, w: (jnp.tanh(h @ w), None)  # noqa: E731
    return jax.lax.scan(turn, x, p["a"])[0] @ p["b"]


@pytest.mark.parametrize(
    ("apply_fn", "params", "x", "reason"),
    [
        (
            flattened,
            {"k": normal(2, 3, 3, 3), "w": normal(72, 4)},
            IMAGES,
            "changes its shape",
        ),
        (tied, {"w": normal(5, 2)}, X, "are one parameter"),
        (masked, {"a": normal(5, 5), "b": normal(5, 3)}, X, "not a parameter as it"),
        (scanned, {"a": normal(3, 5, 5), "b": normal(5, 3)}, X, "inside of a loop"),
        (lambda p, x: x @ p, normal(5, 2), X, "no layer reads"),
    ],
)
def test_what_can_not_be_widened(apply_fn, params, x, reason):
    x = x.transpose(0, 3, 1, 2) if x.ndim == 4 else x
    network = inspect(apply_fn, params, x)
    one = network.layers[0]
    assert widening(network, one, more=4) is None
    assert reason in obstacle(network, one)


def test_the_way_around_a_loop_is_no_way_to_read_a_layer():
    params = {"w": normal(5, 5), "a": normal(3, 5, 5), "b": normal(5, 3)}
    behind = lambda p, x: scanned(p, jnp.tanh(x @ p["w"]))  # noqa: E731
    network = inspect(behind, params, X)
    assert widening(network, network.layers[0], more=4) is None
    assert "inside of a loop" in obstacle(network, network.layers[0])


def test_what_can_be_widened_has_no_obstacle():
    network = inspect(mlp, PARAMS, X)
    assert [bool(obstacle(network, one)) for one in network.layers] == [0, 0, 1]


def test_a_bias_that_layers_share_is_not_made_longer():
    def shared(p, x):
        x = jnp.tanh(x @ p["w1"] + p["b"])
        return jnp.tanh(x @ p["w2"] + p["b"]) @ p["w3"]

    params = {
        "b": normal(2),
        "w1": normal(5, 2),
        "w2": normal(2, 2),
        "w3": normal(2, 3),
    }
    network = inspect(shared, params, X)
    assert widening(network, network.layers[1], more=7).bias is None


def test_nonlinearities_by_name():
    grid = jnp.linspace(-2, 2, 9)
    np.testing.assert_array_equal(nonlinearity(None)(grid), grid)
    np.testing.assert_array_equal(nonlinearity("tanh")(grid), jnp.tanh(grid))
    np.testing.assert_array_equal(nonlinearity("elu")(grid), jax.nn.elu(grid))
    np.testing.assert_array_equal(nonlinearity("the user's")(grid), jax.nn.relu(grid))
