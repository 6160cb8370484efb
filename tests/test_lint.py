import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnsanity as ns

PARAMS = {"w": jnp.ones((3, 1)), "b": jnp.zeros(1)}
BATCH = jnp.ones((8, 3)), jnp.ones((8, 1))


def linear(params, x):
    return x @ params["w"] + params["b"]


def squared(fn):
    return lambda params, batch: jnp.mean((fn(params, batch[0]) - batch[1]) ** 2)


def head(activation):
    return lambda params, x: activation(linear(params, x))


def cross_entropy(params, batch):
    logits = head(lambda x: jnp.concatenate([x, -x], axis=1))(params, batch[0])
    labels = batch[1][:, 0].astype(int)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def meets(params, batch):
    return jnp.mean((linear(params, batch[0]) - batch[1][:, 0]) ** 2)


HEALTHY = {
    "linear": (squared(linear), linear),
    "sigmoid": (squared(head(jax.nn.sigmoid)), head(jax.nn.sigmoid)),
    "without apply_fn": (squared(linear), None),
    "classes": (cross_entropy, None),
    "straight through": (
        squared(head(lambda x: x + jax.lax.stop_gradient(jnp.round(x) - x))),
        None,
    ),
}
FAULTY = {
    "round": (squared(head(jnp.round)), None, "gradients/blocked", "error"),
    "step": (
        squared(head(lambda x: 1.0 * (x > 0))),
        None,
        "gradients/blocked",
        "error",
    ),
    "unused": (
        squared(lambda p, x: x @ p["w"]),
        None,
        "gradients/disconnected-parameter",
        "info",
    ),
    "broadcast": (meets, linear, "results/broadcast-loss", "error"),
    "one unit": (
        squared(linear),
        head(jax.nn.softmax),
        "final-activation/constant-output",
        "error",
    ),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy(name):
    loss_fn, apply_fn = HEALTHY[name]
    assert ns.lint(loss_fn, PARAMS, BATCH, apply_fn=apply_fn) == ()


@pytest.mark.parametrize("name", FAULTY)
def test_faulty(name):
    loss_fn, apply_fn, rule, severity = FAULTY[name]
    (found,) = ns.lint(loss_fn, PARAMS, BATCH, apply_fn=apply_fn)
    assert (found.rule, found.severity) == (rule, severity)


@pytest.mark.parametrize("name", FAULTY)
def test_shapes_are_enough(name):
    loss_fn, apply_fn, *_ = FAULTY[name]
    shapes = jax.eval_shape(lambda tree: tree, (PARAMS, BATCH))
    assert ns.lint(loss_fn, *shapes, apply_fn=apply_fn) == ns.lint(
        loss_fn, PARAMS, BATCH, apply_fn=apply_fn
    )


def test_errors_come_first():
    def loss_fn(params, batch):
        outputs = jnp.round(batch[0] @ params["w"])
        return jnp.mean((outputs - batch[1][:, 0]) ** 2)

    found = ns.lint(loss_fn, PARAMS, BATCH, apply_fn=head(jax.nn.softmax))
    severities = [one.severity for one in found]
    assert severities == ["error", "error", "error", "info"]


def test_the_line_is_named():
    (found,) = ns.lint(meets, PARAMS, BATCH)
    assert found.where.startswith("test_lint.py:")
    assert "(meets)" in found.where


@pytest.mark.parametrize("batch", [BATCH[0], {"x": BATCH[0]}, (BATCH[0],) * 3])
def test_a_batch_that_is_no_pair(batch):
    def loss_fn(params, batch):
        return jnp.mean(jnp.round(linear(params, jax.tree.leaves(batch)[0])))

    found = ns.lint(loss_fn, PARAMS, batch)
    assert [one.rule for one in found] == ["gradients/blocked"]


@pytest.mark.parametrize("constant", [True, False])
def test_constant_outputs_of_a_tree(constant):
    def apply_fn(params, x):
        y = linear(params, x)
        return {"value": jax.nn.softmax(y) if constant else y, "mask": jnp.ones(len(x))}

    found = ns.lint(squared(linear), PARAMS, BATCH, apply_fn=apply_fn)
    rules = [one.rule for one in found]
    assert rules == ["final-activation/constant-output"] * constant


def test_the_loss_must_be_a_scalar():
    with pytest.raises(ValueError, match="scalar"):
        ns.lint(lambda p, b: (linear(p, b[0]) - b[1]) ** 2, PARAMS, BATCH)


@jax.custom_vjp
def own_derivative(x):
    return jnp.round(x)


own_derivative.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))
ODD = {
    "complex": lambda y: jnp.abs(jnp.fft.fft(y)),
    "bfloat16": lambda y: y.astype(jnp.bfloat16).astype(jnp.float32),
    "nothing": lambda y: y[:, :0].sum(-1, keepdims=True) + y,
    "own derivative": own_derivative,
    "loop": lambda y: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c + y, y),
    "cholesky": lambda y: jnp.linalg.cholesky(jnp.eye(8)) @ y @ jnp.eye(1),
    "matrix functions": lambda y: y * jnp.linalg.slogdet(y[:1, :1] ** 2 + 1)[1],
    "associative scan": lambda y: jax.lax.associative_scan(jnp.add, y, axis=1),
    "callback": lambda y: (
        y
        + jax.pure_callback(
            lambda: np.float32(1), jax.ShapeDtypeStruct((), jnp.float32)
        )
    ),
    "scatter": lambda y: jnp.zeros((8, 1)).at[jnp.arange(8)].add(y),
    "window": lambda y: jax.lax.reduce_window(
        y, -jnp.inf, jax.lax.max, (1, 1), (1, 1), "SAME"
    ),
    "interpolation": lambda y: jnp.interp(y, jnp.arange(3.0), jnp.arange(3.0)),
    "own reduction": lambda y: jax.lax.reduce(y, 0.0, lambda a, b: a + b, (1,))[
        :, None
    ],
    "segments": lambda y: jax.ops.segment_sum(y, jnp.arange(8), 8),
}


@pytest.mark.parametrize("name", ODD)
def test_operations_that_are_not_known_are_read_past(name):
    apply_fn = head(ODD[name])
    assert ns.lint(squared(apply_fn), PARAMS, BATCH, apply_fn=apply_fn) == ()


def test_keys_and_whole_numbers_among_the_parameters():
    params = PARAMS | {"key": jax.random.key(0), "step": jnp.arange(3), "none": None}
    assert ns.lint(squared(linear), params, BATCH, apply_fn=linear) == ()
