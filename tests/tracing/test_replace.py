"""Other values at a layer: the network written by hand is the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnsanity.tracing.layers import inspect
from nnsanity.tracing.replace import Replacement, output_layer, penalties, replaced
from tests.tracing.programs import INPUTS, WEIGHTS, WRAPPED, through

PARAMS = {
    f"{kind}{index}": jnp.asarray(leaf)
    for index, pair in enumerate(WEIGHTS[:2], 1)
    for kind, leaf in zip("wb", pair, strict=True)
}
TARGETS = jnp.linspace(0.0, 1.0, 64 * 5).reshape(64, 5)
KEEP = Replacement(lambda values: values.after)
LEAVE_OUT = Replacement(lambda values: values.before, jnp.zeros_like)


def squared(apply_fn):
    def loss_fn(params, batch):
        return jnp.mean((apply_fn(params, batch[0]) - batch[1]) ** 2)

    return loss_fn


def gradients(loss_fn, params=PARAMS):
    batch = (INPUTS, TARGETS)
    return jax.jit(jax.value_and_grad(loss_fn))(params, batch)


def assert_equal(left, right):
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", WRAPPED)
def test_identity_changes_neither_value_nor_gradient(name):
    loss_fn = squared(WRAPPED[name])
    blueprint = inspect(WRAPPED[name], PARAMS, INPUTS)
    same = replaced(loss_fn, blueprint, {"w1": KEEP, "w2": KEEP, "absent": LEAVE_OUT})
    assert_equal(gradients(same), gradients(loss_fn))


@pytest.mark.parametrize("name", WRAPPED)
def test_another_nonlinearity(name):
    blueprint = inspect(WRAPPED[name], PARAMS, INPUTS)
    tanh = Replacement(lambda values: jnp.tanh(values.before), jnp.zeros_like)
    loss_fn = replaced(squared(WRAPPED[name]), blueprint, {"w1": tanh})
    assert_equal(gradients(loss_fn), gradients(squared(through(jnp.tanh))))


def test_a_skip_from_what_enters_the_layer():
    square = {"w1": jnp.ones((3, 3)), "w2": jnp.eye(3), "b1": jnp.ones(3)}
    square["b2"] = jnp.zeros(3)

    def doubled(params, x):
        return through(jax.nn.relu)(params, 2 * x)

    def by_hand(params, x):
        hidden = 2 * x + jax.nn.relu(2 * x @ params["w1"] + params["b1"])
        return hidden @ params["w2"] + params["b2"]

    skip = Replacement(lambda values: values.after + values.entering)
    blueprint = inspect(doubled, square, INPUTS)
    with_skip = replaced(doubled, blueprint, {"w1": skip})
    assert_equal(with_skip(square, INPUTS), by_hand(square, INPUTS))


HEADS = {
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "softmax": jax.nn.softmax,
    "log_softmax": jax.nn.log_softmax,
    "in_jit": jax.jit(jax.nn.sigmoid),
}
LOSSES = {
    "squared": lambda outputs, targets: jnp.mean((outputs - targets) ** 2),
    "logarithmic": lambda outputs, targets: (
        -jnp.mean(targets * jnp.log(jnp.maximum(outputs, 1e-6)))
    ),
    "a nonlinearity of its own": lambda outputs, targets: jnp.mean(
        jax.nn.softplus(outputs) - targets * outputs
    ),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("head", HEADS)
def test_head_left_out_is_the_network_without_it(head, loss):
    plain = through(jax.nn.relu)

    def apply_fn(params, x):
        return HEADS[head](plain(params, x))

    def loss_of(apply_fn):
        return lambda params, batch: LOSSES[loss](apply_fn(params, batch[0]), batch[1])

    blueprint = inspect(apply_fn, PARAMS, INPUTS)
    assert output_layer(blueprint).layer.name == "w2"
    left_out = {"w2": LEAVE_OUT}
    outputs = replaced(apply_fn, blueprint, left_out)(PARAMS, INPUTS)
    assert_equal(outputs, plain(PARAMS, INPUTS))
    changed = replaced(loss_of(apply_fn), blueprint, left_out)
    assert_equal(gradients(changed), gradients(loss_of(plain)))


def test_guard_keeps_an_overflow_out_of_the_gradient():
    def apply_fn(params, x):
        return jnp.exp(100 * (x @ params["w"]))

    def by_hand(params, batch):
        return jnp.mean((100 * (batch[0] @ params["w"]) - batch[1]) ** 2)

    params, batch = {"w": jnp.ones((3, 5))}, (10 * INPUTS, TARGETS)
    blueprint = inspect(apply_fn, params, INPUTS)

    def gradient(guard):
        linear = Replacement(lambda values: jnp.where(True, values.before, 0), guard)
        chosen = Replacement(
            lambda values: jnp.where(
                jnp.isfinite(values.before), linear.combine(values), values.after
            ),
            guard,
        )
        loss_fn = replaced(squared(apply_fn), blueprint, {"w": chosen})
        return jax.grad(loss_fn)(params, batch)["w"]

    assert np.isnan(gradient(lambda before: before)).any()
    np.testing.assert_allclose(
        gradient(jnp.zeros_like), jax.grad(by_hand)(params, batch)["w"], rtol=1e-4
    )


def l2(params):
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


PENALIZED = {
    "after": lambda loss, params: loss + 0.1 * l2(params),
    "before": lambda loss, params: 0.1 * l2(params) + loss,
    "in jit": jax.jit(lambda loss, params: loss + 0.1 * l2(params)),
    "in two parts": lambda loss, params: (
        loss + 0.1 * jnp.sum(params["w1"] ** 2) + 0.1 * l2({**params, "w1": 0.0})
    ),
}
PLAIN = {
    "mean": lambda loss, params: loss,
    "scaled": lambda loss, params: 0.5 * loss + 1.0,
    "by a parameter": lambda loss, params: loss * jnp.sum(params["b1"]),
    "of outputs": lambda loss, params: loss + 0.1 * loss**2,
}


@pytest.mark.parametrize("form", PENALIZED)
def test_penalties_are_found_and_left_out(form):
    plain = squared(through(jax.nn.relu))

    def loss_fn(params, batch):
        return PENALIZED[form](plain(params, batch), params)

    network = inspect(loss_fn, PARAMS, (INPUTS, TARGETS))
    assert len(penalties(network)) == (2 if form == "in two parts" else 1)
    blueprint = inspect(through(jax.nn.relu), PARAMS, INPUTS)
    without = replaced(loss_fn, blueprint, {}, penalty_scale=0.0)
    bare = gradients(plain)
    assert_equal(gradients(without), bare)
    same = replaced(loss_fn, blueprint, {}, penalty_scale=jnp.float32(1))
    whole = gradients(same)
    assert_equal(whole, gradients(loss_fn))
    expected = sum(np.sum(np.float64(leaf) ** 2) for leaf in PARAMS.values())
    np.testing.assert_allclose(whole[0] - bare[0], 0.1 * expected, rtol=1e-4)


@pytest.mark.parametrize("form", PLAIN)
def test_no_penalty_in_a_plain_loss(form):
    plain = squared(through(jax.nn.relu))
    network = inspect(
        lambda params, batch: PLAIN[form](plain(params, batch), params),
        PARAMS,
        (INPUTS, TARGETS),
    )
    assert penalties(network) == []


@pytest.mark.parametrize(
    ("apply_fn", "name"),
    [
        (lambda p, x: x @ p["w1"], "w1"),
        (lambda p, x: jax.nn.relu(x @ p["w1"]).reshape(-1), "w1"),
        (lambda p, x: x @ p["w1"] + x[:, :1], None),
        (lambda p, x: (x @ p["w1"], x), None),
        (lambda p, x: x, None),
    ],
)
def test_output_layer(apply_fn, name):
    found = output_layer(inspect(apply_fn, PARAMS, jnp.asarray(INPUTS)))
    assert (found and found.layer.name) == name
