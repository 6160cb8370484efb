"""What goes into the logarithms of a loss, for many heads and many losses."""

import math

import jax
import jax.numpy as jnp
import optax
import pytest

from nnsanity.tracing.loss_head import loss_head

PARAMS = {"w": jnp.ones((3, 5)), "b": jnp.zeros(5)}
BATCH = jnp.ones((4, 3)), jnp.ones((4, 5))
LABELS = jnp.zeros(4, int)
INF = math.inf


def softmax(x):
    return jnp.exp(x) / jnp.exp(x).sum(-1, keepdims=True)


# Head -> what made its outputs, their ends, and whether they can be 0 or below.
HEADS = {
    "none": (lambda x: x, "add", -INF, INF, True),
    "softmax": (jax.nn.softmax, "softmax", 0, 1, False),
    "softmax by hand": (softmax, "softmax", 0, 1, False),
    "softmax, an epsilon": (lambda x: softmax(x) + 1e-7, "softmax", 0, 1, False),
    "exp of log_softmax": (
        lambda x: jnp.exp(jax.nn.log_softmax(x)),
        *("softmax", 0, 1, False),
    ),
    "sigmoid": (jax.nn.sigmoid, "sigmoid", 0, 1, False),
    "sigmoid by hand": (lambda x: 1 / (1 + jnp.exp(-x)), "sigmoid", 0, 1, False),
    "odds": (lambda x: jnp.exp(x) / (1 + jnp.exp(x)), "sigmoid", 0, 1, False),
    "doubled sigmoid": (lambda x: 2 * jax.nn.sigmoid(x) - 1, "sigmoid", -1, 1, False),
    "reshaped sigmoid": (
        lambda x: jax.nn.sigmoid(x.reshape(2, 2, 5)).reshape(4, 5),
        *("sigmoid", 0, 1, False),
    ),
    "log_softmax": (jax.nn.log_softmax, "sub", -INF, 0, True),
    "relu": (jax.nn.relu, "max", 0, INF, True),
    "relu by where": (lambda x: jnp.where(x > 0, x, 0), "select_n", 0, INF, True),
    "relu, an epsilon": (lambda x: jax.nn.relu(x) + 1e-7, "max", 0, INF, False),
    "leaky_relu": (jax.nn.leaky_relu, "select_n", -INF, INF, True),
    "elu": (jax.nn.elu, "select_n", -1, INF, True),
    "elu + 1": (lambda x: jax.nn.elu(x) + 1, "select_n", 0, INF, False),
    "tanh": (jnp.tanh, "tanh", -1, 1, True),
    "half of tanh + 1": (lambda x: (jnp.tanh(x) + 1) / 2, "tanh", 0, 1, False),
    "softplus": (jax.nn.softplus, "add", 0, INF, False),
    "clip above 0": (lambda x: jnp.clip(x, 1e-7, 1), "min", 1e-7, 1, False),
    "clip from 0": (lambda x: jax.lax.clamp(0.0, x, 1.0), "clamp", 0, 1, True),
    "absolute value": (jnp.abs, "abs", 0, INF, False),
    "square": (jnp.square, "square", 0, INF, False),
    "exp": (jnp.exp, "exp", 0, INF, False),
    "minus": (lambda x: -3 * x, "add", -INF, INF, True),
}
LOSSES = {
    "integer labels": (
        "softmax",
        lambda y, t: optax.softmax_cross_entropy_with_integer_labels(y, LABELS),
    ),
    "one-hot": ("softmax", optax.softmax_cross_entropy),
    "picked": ("softmax", lambda y, t: jax.nn.log_softmax(y)[jnp.arange(4), LABELS]),
    "log of softmax": ("softmax", lambda y, t: t * jnp.log(softmax(y) + 1e-8)),
    "a temperature": ("softmax", lambda y, t: jax.nn.log_softmax(y / jnp.ones(()))),
    "logsumexp, masked": (
        "softmax",
        lambda y, t: jax.nn.logsumexp(y, -1, where=jnp.arange(5) < 4),
    ),
    "binary": ("sigmoid", optax.sigmoid_binary_cross_entropy),
    "log of sigmoid": ("sigmoid", lambda y, t: t * jnp.log(jax.nn.sigmoid(y))),
    "softplus": ("sigmoid", lambda y, t: jax.nn.softplus(-y)),
    "by hand": ("sigmoid", lambda y, t: jnp.log(1 + jnp.exp(-y))),
}
NO_SQUASH = {
    "log": (lambda y, t: t * jnp.log(y), True),
    "log2": (lambda y, t: t * jnp.log2(y), True),
    "xlogy": (lambda y, t: jax.scipy.special.xlogy(t, y), True),
    "masked log": (lambda y, t: jnp.log(jnp.where(t > 0, y, 1.0)), True),
    "guarded log": (lambda y, t: jnp.log(jnp.where(y > 1e-3, y, 1.0)), False),
    "entropy by hand": (lambda y, t: jnp.where(y > 0, y * jnp.log(y), 0.0), False),
    "chosen by another": (lambda y, t: jnp.where(t > 0, t * jnp.log(y), 0.0), True),
    "log of the absolute value": (lambda y, t: jnp.log(jnp.abs(y)), False),
    "square": (lambda y, t: (y - t) ** 2, False),
}


def head_of(head, loss, params=PARAMS):
    def loss_fn(params, batch):
        return jnp.mean(loss(head(batch[0] @ params["w"] + params["b"]), batch[1]))

    return loss_head(loss_fn, params, BATCH)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("loss", LOSSES)
def test_what_goes_into_a_squash(loss, head):
    kind, loss_fn = LOSSES[loss]
    function, made_by, low, high, _ = HEADS[head]
    found = head_of(function, loss_fn)
    assert found.logarithms == ()
    last = found.squashes[-1]
    assert (last.kind, last.num_classes) == (kind, 5 if kind == "softmax" else 2)
    if made_by == "abs" and kind == "sigmoid":
        return  # signs are left out there
    assert last.made_by == made_by
    low, high = (min(low, 0), max(high, 0)) if "masked" in loss else (low, high)
    assert (last.low, last.high) == pytest.approx((low, high), abs=1e-5)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("loss", NO_SQUASH)
def test_logarithms_of_what_can_be_nothing(loss, head):
    loss_fn, is_naked = NO_SQUASH[loss]
    function, _, low, high, can_be_nothing = HEADS[head]
    found = head_of(function, loss_fn)
    if not (is_naked and can_be_nothing):
        assert found.logarithms == ()
    else:
        (one,) = found.logarithms
        high = max(high, 1) if "masked" in loss else high
        assert (one.low, one.high) == pytest.approx((low, high), abs=1e-5)


@pytest.mark.parametrize(
    ("head", "loss", "best"),
    [
        ("softmax", "one-hot", math.e / (math.e + 4)),
        ("tanh", "one-hot", math.e**2 / (math.e**2 + 4)),
        ("sigmoid", "binary", math.e / (math.e + 1)),
        ("doubled sigmoid", "binary", math.e / (math.e + 1)),
        ("relu", "binary", 1),
        ("none", "one-hot", 1),
    ],
)
def test_the_best_probability(head, loss, best):
    found = head_of(HEADS[head][0], LOSSES[loss][1]).squashes[-1]
    assert found.best == pytest.approx(best)
    assert found.is_one_sided == (
        head == "relu" or (head, loss) == ("sigmoid", "binary")
    )


def test_the_best_probability_is_what_the_loss_can_reach():
    """Against a search over the outputs themselves."""
    found = head_of(jax.nn.softmax, LOSSES["one-hot"][1]).squashes[-1]
    outputs = jax.nn.softmax(100 * jnp.eye(5))
    least = optax.softmax_cross_entropy(outputs, jnp.eye(5)).min()
    assert -math.log(found.best) == pytest.approx(float(least), rel=1e-5)


def test_what_lies_behind_weights_is_the_networks_own():
    def loss_fn(params, x):
        gates = jax.nn.softmax(jax.nn.sigmoid(x @ params["w"]))
        hidden = jnp.log(x @ params["w"]) * jnp.log(gates)
        return jnp.mean((hidden @ params["v"]) ** 2)

    found = loss_head(loss_fn, PARAMS | {"v": jnp.ones((5, 1))}, BATCH[0])
    assert found == ((), ())


def test_logarithms_of_data_or_of_parameters_alone_are_none_of_the_outputs():
    def loss_fn(params, batch):
        scale = jnp.log(params["b"]).sum()
        return scale + jnp.mean(jnp.log(batch[1])) + (batch[0] @ params["w"]).sum()

    assert loss_head(loss_fn, PARAMS, BATCH).logarithms == ()


def test_the_sides_of_a_branch_and_a_loop_are_read():
    def loss_fn(params, batch):
        outputs = batch[0] @ params["w"]
        inside = lambda y: jnp.log(y)  # noqa: E731
        both = jax.lax.cond(batch[1].sum() > 0, inside, jnp.zeros_like, outputs)
        turns = jax.lax.scan(lambda c, y: (c + jnp.log(y).sum(), None), 0.0, outputs)
        return both.sum() + turns[0]

    assert len(loss_head(loss_fn, PARAMS, BATCH).logarithms) == 2
