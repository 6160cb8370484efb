"""All of items 8 to 11 on one batch, against a pass forward and back in NumPy."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnsanity as ns
from nnsanity.trials.inside import look_inside

RNG = np.random.default_rng(0)
SIZES = (6, 8, 8, 5, 3)
ACTIVATIONS = (jax.nn.relu, jnp.tanh, jax.nn.sigmoid)


def params_of(dtype=jnp.float32):
    params = {}
    for index, (fan_in, units) in enumerate(itertools.pairwise(SIZES)):
        params[f"w{index}"] = RNG.normal(size=(fan_in, units)) * 1.3 / fan_in**0.5
        params[f"b{index}"] = RNG.normal(size=units) * 0.2
    params["b0"][3] = -50  # dead
    params["w1"][:, 2] *= 1e-3  # dormant
    params["b1"][2] = 0
    params["w2"][:, 1] *= 40  # saturated
    params["b2"][4] = 30
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)


def apply_fn(params, x):
    for index, activation in enumerate(ACTIVATIONS):
        x = activation(x @ params[f"w{index}"] + params[f"b{index}"])
    return x @ params["w3"] + params["b3"]


def loss_fn(params, batch):
    outputs = apply_fn(params, batch[0])
    return jnp.mean((outputs - batch[1]).astype(jnp.float32) ** 2)


def data(dtype=jnp.float32):
    inputs = RNG.normal(size=(64, 6))
    return jnp.asarray(inputs, dtype), jnp.asarray(RNG.normal(size=(64, 3)), dtype)


class Passed:
    """What passes through the network, written out in float64."""

    def __init__(self, params, batch):
        p = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
        x, y = (np.asarray(leaf, np.float64) for leaf in batch)
        functions = (
            lambda z: np.maximum(z, 0),
            np.tanh,
            lambda z: 1 / (1 + np.exp(-z)),
        )
        slopes = (
            lambda z: (z > 0) * 1.0,
            lambda z: 1 - np.tanh(z) ** 2,
            lambda z: np.exp(-np.abs(z)) / (1 + np.exp(-np.abs(z))) ** 2,
        )
        self.made, self.before, self.after = [], [], []
        for index in range(4):
            self.made.append(x @ p[f"w{index}"])
            self.before.append(self.made[-1] + p[f"b{index}"])
            x = functions[index](self.before[-1]) if index < 3 else self.before[-1]
            self.after.append(x)
        back = 2 * (self.after[3] - y) / y.size
        self.gradient = [back]
        for index in (3, 2, 1):
            back = back @ p[f"w{index}"].T * slopes[index - 1](self.before[index - 1])
            self.gradient.insert(0, back)
        self.weights = [p[f"w{index}"] for index in range(4)]
        self.biases = [p[f"b{index}"] for index in range(4)]


def mean_cosine(values):
    z = values - values.mean(axis=1, keepdims=True)
    size = np.linalg.norm(z, axis=1, keepdims=True)
    z, size = z[size[:, 0] > 0], size[size[:, 0] > 0]  # an example may be all zeros
    cosines = (z / size) @ (z / size).T
    return cosines[~np.eye(len(z), dtype=bool)].mean()


def rms(values, axis=None):
    return np.sqrt(np.mean(np.square(values), axis=axis))


@functools.cache
def measured(dtype):
    params, batch = params_of(dtype), data(dtype)
    return look_inside(apply_fn, loss_fn, params, batch), Passed(params, batch)


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(jnp.float32, 1e-3), (jnp.bfloat16, 0.06)], ids=["f32", "bf16"]
)
def test_everything_against_numpy(dtype, rtol):
    found, by_hand = measured(dtype)
    close = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=rtol / 100)
    close(found.weights.deviation, [rms(w) for w in by_hand.weights])
    gains = [rms(w) * len(w) ** 0.5 for w in by_hand.weights]
    close(found.weights.gain, gains)
    close(found.weights.signal, [np.std(z) for z in by_hand.before])
    pairs = zip(by_hand.biases, by_hand.made, strict=True)
    close(found.weights.bias, [rms(b) / rms(z) for b, z in pairs])
    close(found.signal.gradient, [rms(g) for g in by_hand.gradient])
    close(found.signal.forward, np.std(by_hand.before[3]) / np.std(by_hand.before[0]))
    norms = [np.linalg.norm(g) for g in by_hand.gradient]
    close(found.signal.backward, norms[0] / norms[3])
    close(found.depth.gradient, found.signal.gradient)
    cosines = [mean_cosine(a) for a in by_hand.after]
    np.testing.assert_allclose(found.depth.cosine, cosines, atol=max(rtol / 2, 1e-4))
    assert (int(found.depth.longest_path), int(found.depth.unskipped_path)) == (4, 4)
    for index, gradient in enumerate(by_hand.gradient):
        close(found.unit_gradients[f"w{index}"], rms(gradient, 0))


def test_idle_units_against_numpy():
    found, by_hand = measured(jnp.float32)
    assert found.dead_units.dead.keys() == {"w0"}
    dead = (by_hand.before[0] <= 0).all(axis=0)
    assert dead.sum() == 1
    assert found.dead_units.dead["w0"].tolist() == dead.tolist()
    assert found.unit_gradients["w0"][3] == 0  # it can't recover
    assert found.dead_units.num_seen["w0"] == 64
    for index in range(3):
        size = np.abs(by_hand.after[index]).mean(axis=0)
        name = f"w{index}"
        np.testing.assert_allclose(
            found.dormant_units.score[name], size / size.mean(), rtol=1e-3
        )
        dormant = size / size.mean() <= 0.025
        assert found.dormant_units.dormant[name].tolist() == dormant.tolist()
    assert found.dormant_units.dormant["w1"][2]
    assert found.saturated_units.share.keys() == {"w0", "w1", "w2"}
    level = [by_hand.before[0] < 0, 1 - by_hand.after[1] ** 2 < 0.05]
    slopes = by_hand.after[2] * (1 - by_hand.after[2])
    level.append(slopes < 0.05 * 0.25)
    for index, one in enumerate(level):
        share = float(found.saturated_units.share[f"w{index}"])
        assert share == pytest.approx(one.mean(), abs=0.02)
        saturated = found.saturated_units.saturated[f"w{index}"]
        assert saturated.tolist() == one.all(axis=0).tolist()
    assert found.saturated_units.saturated["w2"].tolist() == [False] * 4 + [True]


def test_one_pass_is_what_the_single_functions_are():
    params, batch = params_of(), data()
    found = look_inside(apply_fn, loss_fn, params, batch)
    both = (apply_fn, loss_fn, params, batch)
    forward = (apply_fn, params, batch[0])
    single = {
        "unit_gradients": ns.unit_gradients(*both),
        "dead_units": ns.dead_units(*forward),
        "dormant_units": ns.dormant_units(*forward),
        "saturated_units": ns.saturated_units(*forward),
        "weights": ns.weight_stats(*forward),
        "signal": ns.signal_gain(*both),
        "depth": ns.depth_profile(*both),
        "width": ns.width_profile(*forward),
        "gradients": ns.gradient_stats(jax.grad(loss_fn)(params, batch)),
        "loss": loss_fn(params, batch),
        "recoverable_units": {"w0": jnp.zeros(8, bool)},  # nothing moves before it
        "blocked": ns.blocked_share(loss_fn, params, batch),
    }
    assert single.keys() == set(found._fields)
    for name, one in single.items():
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
            getattr(found, name),
            one,
        )


def products(function, *arguments):
    return str(jax.make_jaxpr(function)(*arguments)).count("dot_general[")


def test_one_forward_and_one_backward_pass():
    params, batch = params_of(), data()
    plain = products(jax.value_and_grad(loss_fn), params, batch)
    look = functools.partial(look_inside, apply_fn, loss_fn)
    # And for each of the four layers its units with each other.
    assert products(look, params, batch) == plain + 4


def another_loss(params, batch):
    """Runs the network's first layers otherwise than ``apply_fn`` does."""
    return jnp.mean(jax.lax.map(lambda x: apply_fn(params, x), batch[0][:, None]) ** 2)


@pytest.mark.parametrize("loss", [another_loss, lambda p, b: jnp.mean(p["w0"] ** 2)])
def test_a_loss_that_runs_the_network_otherwise(loss):
    params, batch = params_of(), data()
    found = look_inside(apply_fn, loss, params, batch)
    expected = ns.weight_stats(apply_fn, params, batch[0])
    np.testing.assert_allclose(found.weights.gain, expected.gain, rtol=1e-5)
    assert len(found.width.units) == 4


class Blocks(nn.Module):
    """A stack of blocks under scan, each with a skip and a normalization."""

    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                h = nn.relu(nn.Dense(12)(nn.LayerNorm()(x)))
                return x + nn.Dense(8, kernel_init=nn.initializers.zeros)(h), None

        stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True})
        x = nn.Dense(8)(x)
        x, _ = stack()(x, jnp.zeros((5, 0)))
        return nn.Dense(3)(x)


def test_a_stack_of_blocks():
    model, batch = Blocks(), data()
    params = model.init(jax.random.key(0), batch[0])
    loss = lambda p, b: jnp.mean((model.apply(p, b[0]) - b[1]) ** 2)  # noqa: E731
    found = jax.jit(functools.partial(look_inside, model.apply, loss))(params, batch)
    assert found.weights.gain.shape == found.depth.cosine.shape == (12,)
    (name,) = (one for one in found.dead_units.dead if "Block" in one)
    assert found.dead_units.dead[name].shape == (5, 12)
    assert found.unit_gradients[name].shape == (5, 12)
    assert (int(found.depth.longest_path), int(found.depth.unskipped_path)) == (12, 2)
    assert np.isfinite(found.depth.gradient).all()
    hidden = found.unit_gradients[name]
    assert (hidden == 0).all()  # behind weights of zero nothing comes back yet


@pytest.mark.slow
def test_under_jit_vmap_and_scan():
    params, batch = params_of(), data()
    look = functools.partial(look_inside, apply_fn, loss_fn)
    expected = look(params, batch)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)
    found = jax.jit(jax.vmap(look, (0, None)))(stacked, batch)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-4, atol=1e-6),
        found,
        expected,
    )
    turn = lambda carry, _: (look(params, batch), None)  # noqa: E731
    again, _ = jax.lax.scan(turn, expected, None, length=2)
    assert jax.tree.structure(again) == jax.tree.structure(expected)


def rectified(maximum):
    def run(params, x):
        x = maximum(x @ params["w0"] + params["b0"])
        return maximum(x @ params["w1"] + params["b1"]) @ params["w2"]

    return run


def sums(params, x):
    """What enters both nonlinearities, in float64."""
    p = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    first = np.asarray(x, np.float64) @ p["w0"] + p["b0"]
    return first, np.maximum(first, 0) @ p["w1"] + p["b1"]


RELU, AT_ZERO = jax.nn.relu, lambda x: jnp.maximum(x, 0)
OUTLOOKS = {
    # Buried units of the first layer, of the second, and units at exactly 0; then
    # which of both layers may come back.
    "one of each": (RELU, [3], [5], [], [[], [5]]),
    "all of the first": (RELU, [*range(8)], [5], [], [[], []]),
    "at zero, relu": (RELU, [], [], [2], [[], []]),
    "at zero, maximum": (AT_ZERO, [], [], [2], [[2], []]),
}


@pytest.mark.parametrize("name", OUTLOOKS)
def test_dead_units_that_a_step_moves(name):
    maximum, first, second, at_zero, expected = OUTLOOKS[name]
    rng = np.random.default_rng(1)
    params = {f"w{i}": rng.normal(size=(n, 8)) for i, n in enumerate((6, 8))}
    params |= {"b0": np.zeros(8), "b1": np.ones(8), "w2": rng.normal(size=(8, 3))}
    params["b0"][first] = params["b1"][second] = -50
    params["w0"][:, at_zero] = 0
    params = {name: jnp.asarray(one, jnp.float32) for name, one in params.items()}
    apply_fn, batch = rectified(maximum), data()
    loss = lambda p, b: jnp.mean((apply_fn(p, b[0]) - b[1]) ** 2)  # noqa: E731
    found = look_inside(apply_fn, loss, params, batch)
    grads = jax.grad(loss)(params, batch)
    moved = jax.tree.map(lambda one, grad: one - 0.01 * grad, params, grads)
    layers = zip(sums(params, batch[0]), sums(moved, batch[0]), strict=True)
    for index, (before, after) in enumerate(layers):
        dead = (before <= 0).all(axis=0)
        may_come_back = dead & (before != after).any(axis=0)
        recoverable = found.recoverable_units[f"w{index}"]
        assert recoverable.tolist() == may_come_back.tolist()
        assert np.flatnonzero(recoverable).tolist() == expected[index]


def test_clips_between_the_layers_and_in_the_loss_against_numpy():
    def clipped_net(params, x):
        h = jax.checkpoint(lambda h: jax.nn.relu(h @ params["w0"]))(jnp.clip(x, -1, 1))
        h = jnp.minimum(h + x[:, :1], 0.5)
        return jnp.clip(h @ params["w1"], -1, 1)  # a nonlinearity of that layer

    def clipped_loss(params, batch):
        errors = (clipped_net(params, batch[0]) - batch[1]) ** 2
        return jnp.mean(jnp.minimum(errors, 0.3))

    params, batch = {name: params_of()[name] for name in ("w0", "w1")}, data()
    batch = batch[0], jnp.tile(batch[1], 3)[:, :8]
    found = look_inside(clipped_net, clipped_loss, params, batch).blocked.share
    assert [name.rpartition(" ")[2] for name in found] == ["min", "min"]
    assert all(name.startswith("test_inside.py:") for name in found)
    p = {name: np.asarray(one, np.float64) for name, one in params.items()}
    x, y = (np.asarray(one, np.float64) for one in batch)
    h = np.maximum(np.clip(x, -1, 1) @ p["w0"], 0)
    sizes = h + x[:, :1]
    errors = (np.clip(np.minimum(sizes, 0.5) @ p["w1"], -1, 1) - y) ** 2
    shares = [(sizes > 0.5).mean(), (errors > 0.3).mean()]
    np.testing.assert_allclose([*found.values()], shares, atol=0.003)
