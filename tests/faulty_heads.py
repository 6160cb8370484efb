"""Heads with one fault each, and the same programs without it.

A builder takes whether to build the faulty one.  The line that is to be named ends in
``# here``; where a layer or a parameter is named instead, ``PAIRS`` says so.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen, nnx
from jax import lax

from tests.zoo import (
    CLASSES,
    KEY,
    NUMBERS,
    SEQUENCES,
    TABLE,
    C,
    D,
    H,
    N,
    Program,
    dense,
    mlp,
)

ONE_HOT = jax.nn.one_hot(CLASSES, C)
SEVERAL = (jnp.arange(N * C).reshape(N, C) % 3 > 0).astype(float)
YES = (NUMBERS > 0).astype(float)
WEIGHTS = dense(KEY, D, H, C)
ONE_UNIT = dense(KEY, D, H, 1)


def squared(network):
    return lambda params, batch: jnp.mean((network(params, batch[0]) - batch[1]) ** 2)


def one_output(params, x):
    return mlp(params, x)[:, 0]


# Item 7: a softmax of a softmax.


def softmax_and_optax_integer_labels(faulty):
    def network(params, x):
        return jax.nn.softmax(mlp(params, x)) if faulty else mlp(params, x)

    def loss_fn(params, batch):
        losses = optax.softmax_cross_entropy_with_integer_labels(
            network(params, batch[0]), batch[1]
        )  # here: any of its lines
        return losses.mean()

    return Program(loss_fn, WEIGHTS, (TABLE, CLASSES), network)


def softmax_and_optax_one_hot(faulty):
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Dense(C)(linen.relu(linen.Dense(H)(x)))
            return linen.softmax(x) if faulty else x

    def loss_fn(params, batch):
        outputs = Net().apply(params, batch[0])
        return optax.softmax_cross_entropy(outputs, batch[1]).mean()  # here

    return Program(loss_fn, Net().init(KEY, TABLE), (TABLE, ONE_HOT), Net().apply)


def sigmoid_and_optax_binary(faulty):
    model = nnx.Sequential(nnx.Linear(D, 1, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model)

    def network(params, x):
        outputs = nnx.merge(graphdef, params, copy=True)(x)[:, 0]
        return nnx.sigmoid(outputs) if faulty else outputs

    def loss_fn(params, batch):
        outputs = network(params, batch[0])
        return optax.sigmoid_binary_cross_entropy(outputs, batch[1]).mean()  # here

    return Program(loss_fn, params, (TABLE, YES), network)


def softmax_by_hand_twice(faulty):
    import equinox as eqx

    model = eqx.nn.MLP(D, C, H, 1, key=KEY)
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def softmax(x):
        exp = jnp.exp(x - x.max(-1, keepdims=True))
        return exp / exp.sum(-1, keepdims=True)

    def loss_fn(params, batch):
        outputs = jax.vmap(eqx.combine(params, static))(batch[0])
        outputs = softmax(outputs) if faulty else outputs
        probabilities = softmax(outputs)
        return -jnp.mean(jnp.sum(batch[1] * jnp.log(probabilities), -1))  # here

    return Program(loss_fn, params, (TABLE, ONE_HOT))


def sigmoids_and_softmax(faulty):
    def loss_fn(params, batch):
        outputs = mlp(params, batch[0])
        outputs = jax.nn.sigmoid(outputs) if faulty else outputs
        return -jnp.mean(jax.nn.log_softmax(outputs)[jnp.arange(N), batch[1]])  # here

    return Program(loss_fn, WEIGHTS, (TABLE, CLASSES))


def clipped_probabilities_as_logits(faulty):
    def loss_fn(params, batch):
        outputs = mlp(params, batch[0])
        if faulty:
            outputs = jnp.clip(jax.nn.softmax(outputs), 1e-7, 1 - 1e-7)
        return optax.softmax_cross_entropy(outputs, batch[1]).mean()  # here

    return Program(loss_fn, WEIGHTS, (TABLE, ONE_HOT))


def critic_of_probabilities(faulty):
    def loss_fn(params, batch):
        critic = lambda x: jax.nn.sigmoid(mlp(params, x)) if faulty else mlp(params, x)  # noqa: E731
        real, fake = map(critic, batch)
        return jnp.mean(jax.nn.softplus(-real)) + jnp.mean(fake)  # here

    return Program(loss_fn, ONE_UNIT, (TABLE, TABLE + 1))


def softmax_of_a_scan(faulty):
    def loss_fn(params, batch):
        def step(state, row):
            state = jnp.tanh(state @ params["w"] + row @ params["v"])
            return state, state @ params["head"]

        rows = jnp.swapaxes(batch[0], 0, 1)
        outputs = lax.scan(step, jnp.zeros((N, H)), rows)[1][-1]
        outputs = jax.nn.softmax(outputs) if faulty else outputs
        return optax.softmax_cross_entropy(outputs, batch[1]).mean()  # here

    params = {"w": jnp.ones((H, H)), "v": jnp.ones((D, H)), "head": jnp.ones((H, C))}
    return Program(loss_fn, params, (SEQUENCES, ONE_HOT))


def log_probabilities_twice_are_harmless(faulty):
    def loss_fn(params, batch):
        head = jax.nn.softmax if faulty else jax.nn.log_softmax
        outputs = head(mlp(params, batch[0]))
        return optax.softmax_cross_entropy(outputs, batch[1]).mean()  # here

    return Program(loss_fn, WEIGHTS, (TABLE, ONE_HOT))


# Item 7: a logarithm of what can be 0 or below.


def logarithm_of_logits(faulty):
    def loss_fn(params, batch):
        outputs = mlp(params, batch[0])
        outputs = outputs if faulty else jax.nn.softmax(outputs)
        return -jnp.mean(jnp.sum(batch[1] * jnp.log(outputs), -1))  # here

    return Program(loss_fn, WEIGHTS, (TABLE, ONE_HOT))


def epsilon_does_not_guard_logits(faulty):
    def loss_fn(params, batch):
        outputs = mlp(params, batch[0])
        outputs = outputs if faulty else jax.nn.relu(outputs)
        return -jnp.mean(jnp.sum(batch[1] * jnp.log(outputs + 1e-7), -1))  # here

    return Program(loss_fn, WEIGHTS, (TABLE, ONE_HOT))


def logarithm_of_relu(faulty):
    model = linen.Sequential([linen.Dense(H), linen.relu, linen.Dense(1), linen.relu])

    def loss_fn(params, batch):
        rate = model.apply(params, batch[0])[:, 0] + (0.0 if faulty else 1e-6)
        return jnp.mean(rate - batch[1] * jnp.log(rate))  # here

    return Program(loss_fn, model.init(KEY, TABLE), (TABLE, YES))


def logarithm_of_tanh(faulty):
    def loss_fn(params, batch):
        p = jnp.tanh(one_output(params, batch[0]))
        p = p if faulty else 0.5 * (p + 1)
        return -jnp.mean(batch[1] * jnp.log(p) + (1 - batch[1]) * jnp.log1p(-p))  # here

    return Program(loss_fn, ONE_UNIT, (TABLE, YES))


def logarithm_of_log_softmax(faulty):
    def loss_fn(params, batch):
        outputs = jax.nn.log_softmax(mlp(params, batch[0]))
        outputs = jnp.log(outputs) if faulty else outputs  # here
        return -jnp.mean(jnp.sum(batch[1] * outputs, -1))

    return Program(loss_fn, WEIGHTS, (TABLE, ONE_HOT))


def logarithm_of_clipped(faulty):
    def loss_fn(params, batch):
        least = 0.0 if faulty else 1e-7
        p = jnp.clip(one_output(params, batch[0]), least, 1 - 1e-7)
        return -jnp.mean(
            batch[1] * jnp.log(p) + (1 - batch[1]) * jnp.log(1 - p)
        )  # here

    return Program(loss_fn, ONE_UNIT, (TABLE, YES))


def logarithmic_error(faulty):
    def loss_fn(params, batch):
        outputs = one_output(params, batch[0])
        outputs = outputs if faulty else jax.nn.softplus(outputs)
        return jnp.mean((jnp.log1p(outputs) - jnp.log1p(batch[1])) ** 2)  # here

    return Program(loss_fn, ONE_UNIT, (TABLE, YES))


def poisson_of_a_linear_head(faulty):
    def network(params, x):
        return one_output(params, x) if faulty else jnp.exp(one_output(params, x))

    @jax.jit
    def likelihood(rate, counts):
        return rate - counts * jnp.log(rate)  # here

    def loss_fn(params, batch):
        return likelihood(network(params, batch[0]), batch[1]).mean()

    return Program(loss_fn, ONE_UNIT, (TABLE, YES), network)


# Item 7: the head.


def softmax_over_one_unit(faulty):
    head = jax.nn.softmax if faulty else jax.nn.sigmoid
    network = lambda params, x: head(mlp(params, x))  # noqa: E731
    return Program(squared(network), ONE_UNIT, (TABLE, YES[:, None]), network)


def softmax_over_the_wrong_axis_of_one(faulty):
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Dense(C)(x)[:, None, :]
            return linen.softmax(x, axis=1 if faulty else 2)[:, 0]

    network = Net().apply
    return Program(squared(network), Net().init(KEY, TABLE), (TABLE, ONE_HOT), network)


def relu_at_the_end(faulty):
    model = [linen.Dense(H), linen.relu, linen.Dense(1), *[linen.relu][:faulty]]
    model = linen.Sequential(model)
    network = model.apply
    batch = TABLE, NUMBERS[:, None]
    return Program(squared(network), model.init(KEY, TABLE), batch, network)


def relu_by_where_at_the_end(faulty):
    def network(params, x):
        outputs = x @ params["out"]
        return jnp.where(outputs > 0, outputs, 0.0 if faulty else 0.1 * outputs)

    batch = TABLE, NUMBERS[:, None]
    return Program(squared(network), {"out": jnp.ones((D, 1))}, batch, network)


def clip_at_the_end(faulty):
    def network(params, x):
        outputs = x @ params["out"]
        return jnp.clip(outputs, -1, 1) if faulty else outputs

    batch = TABLE, NUMBERS[:, None]
    return Program(squared(network), {"out": jnp.ones((D, 1))}, batch, network)


def tanh_as_logits(faulty):
    def loss_fn(params, batch):
        outputs = one_output(params, batch[0])
        outputs = jnp.tanh(outputs) if faulty else outputs
        return optax.sigmoid_binary_cross_entropy(outputs, batch[1]).mean()  # here

    return Program(loss_fn, ONE_UNIT, (TABLE, YES))


def relu_as_logits(faulty):
    def loss_fn(params, batch):
        outputs = one_output(params, batch[0])
        outputs = jax.nn.relu(outputs) if faulty else outputs
        return optax.sigmoid_binary_cross_entropy(outputs, batch[1]).mean()  # here

    return Program(loss_fn, ONE_UNIT, (TABLE, YES))


def softmax_where_several_are_true(faulty):
    def loss_fn(params, batch):
        logits = mlp(params, batch[0])
        return optax.softmax_cross_entropy(logits, batch[1]).mean()  # here

    targets = SEVERAL if faulty else ONE_HOT
    return Program(loss_fn, WEIGHTS, (TABLE, targets), mlp)


def sigmoids_where_one_is_true(faulty):
    def loss_fn(params, batch):
        logits = mlp(params, batch[0])
        return optax.sigmoid_binary_cross_entropy(logits, batch[1]).mean()  # here

    targets = ONE_HOT if faulty else SEVERAL
    return Program(loss_fn, WEIGHTS, (TABLE, targets), mlp)


ERROR, INFO = "error", "info"
_DOUBLE = "final-activation/double-softmax", ERROR
_LOGARITHM = "final-activation/probabilities-expected", ERROR
_LOGITS = "final-activation/logits-expected", INFO
_CONSTANT = "final-activation/constant-output", ERROR
_RELU = "final-activation/relu-head", INFO
_CLASSES = "final-activation/independent-classes", INFO
HEADS = {
    softmax_and_optax_integer_labels: (*_DOUBLE, None),
    softmax_and_optax_one_hot: (*_DOUBLE, None),
    sigmoid_and_optax_binary: (*_DOUBLE, None),
    softmax_by_hand_twice: (*_DOUBLE, None),
    sigmoids_and_softmax: (*_DOUBLE, None),
    clipped_probabilities_as_logits: (*_DOUBLE, None),
    critic_of_probabilities: (*_DOUBLE, None),
    softmax_of_a_scan: (*_DOUBLE, None),
    log_probabilities_twice_are_harmless: (*_DOUBLE, None),
    logarithm_of_logits: (*_LOGARITHM, None),
    epsilon_does_not_guard_logits: (*_LOGARITHM, None),
    logarithm_of_relu: (*_LOGARITHM, None),
    logarithm_of_tanh: (*_LOGARITHM, None),
    logarithm_of_log_softmax: (*_LOGARITHM, None),
    logarithm_of_clipped: (*_LOGARITHM, None),
    logarithmic_error: (*_LOGARITHM, None),
    poisson_of_a_linear_head: (*_LOGARITHM, None),
    softmax_over_one_unit: (*_CONSTANT, "1"),
    softmax_over_the_wrong_axis_of_one: (*_CONSTANT, "Dense_0"),
    relu_at_the_end: (*_RELU, "layers_2"),
    relu_by_where_at_the_end: (*_RELU, "out"),
    clip_at_the_end: ("final-activation/clipped-output", INFO, "out"),
    tanh_as_logits: (*_LOGITS, None),
    relu_as_logits: (*_LOGITS, None),
    softmax_where_several_are_true: (*_CLASSES, None),
    sigmoids_where_one_is_true: (*_CLASSES, None),
}
"""Builder -> (rule, severity, what is named in the place of a line)."""
