"""Programs with one fault each, and the same programs without it.

A builder takes whether to build the faulty one.  The line that is to be named ends in
``# here``; where a layer or a parameter is named instead, ``PAIRS`` says so.
"""

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax import lax

from tests.zoo import (
    CLASSES,
    IMAGES,
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
from tests.zoo import cross_entropy as healthy_cross_entropy

ONE_HOT = jax.nn.one_hot(CLASSES, C)
SEVERAL = (jnp.arange(N * C).reshape(N, C) % 3 > 0).astype(float)
YES = (NUMBERS > 0).astype(float)
WEIGHTS = dense(KEY, D, H, C)
ONE_UNIT = dense(KEY, D, H, 1)


def squared(network):
    return lambda params, batch: jnp.mean((network(params, batch[0]) - batch[1]) ** 2)


def one_output(params, x):
    return mlp(params, x)[:, 0]


# Item 8: no gradient.


def rounded_outputs(faulty):
    def network(params, x):
        outputs = one_output(params, x)
        return jnp.round(outputs) if faulty else outputs  # here

    return Program(squared(network), ONE_UNIT, (TABLE, NUMBERS), network)


def trained_on_accuracy(faulty):
    def loss_fn(params, batch):
        logits = mlp(params, batch[0])
        wrong = jnp.argmax(logits, -1) != batch[1]  # here
        return wrong.mean() if faulty else healthy_cross_entropy(logits, batch[1])

    return Program(loss_fn, WEIGHTS, (TABLE, CLASSES))


def binary_gate(faulty):
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            gate = linen.Dense(H)(x)
            hard = (gate > 0).astype(x.dtype)  # here
            hard = hard if faulty else hard + gate - lax.stop_gradient(gate)
            return linen.Dense(1)(hard * linen.Dense(H)(x))[:, 0]

    params = Net().init(KEY, TABLE)
    return Program(squared(Net().apply), params, (TABLE, NUMBERS), Net().apply)


def cast_to_integers(faulty):
    model = nnx.Linear(D, 1, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)

    def network(params, x):
        outputs = nnx.merge(graphdef, params, copy=True)(x)[:, 0] * 255
        outputs = outputs.astype(jnp.int32) if faulty else outputs  # here
        return outputs / 255

    return Program(squared(network), params, (TABLE, NUMBERS), network)


def quantized_without_a_way_around(faulty):
    def network(params, x):
        latent = x @ params["encoder"]
        codes = jnp.argmin(jnp.abs(latent[..., None] - params["codes"]), -1)  # here
        code = params["codes"][codes]
        passed = code if faulty else latent + lax.stop_gradient(code - latent)
        return passed @ params["decoder"]

    def loss_fn(params, batch):
        pulled = 0.0
        if not faulty:
            code = params["codes"].mean()
            pulled = jnp.mean((code - batch[0]) ** 2)
        return squared(network)(params, batch) + pulled

    params = {
        "encoder": jnp.ones((D, 2)),
        "codes": jnp.arange(3.0),
        "decoder": jnp.ones((2, 1)),
    }
    return Program(loss_fn, params, (TABLE, NUMBERS[:, None]), network)


def sign_inside_a_scan(faulty):
    def network(params, x):
        def step(state, weight):
            state = state @ weight
            return jnp.sign(state) if faulty else jnp.tanh(state), None  # here

        return lax.scan(step, x, params["layers"])[0][:, 0] + params["offset"]

    params = {"layers": jnp.ones((3, D, D)), "offset": jnp.zeros(())}
    return Program(squared(network), params, (TABLE, NUMBERS), network)


def a_layer_that_is_thrown_away(faulty):
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            hidden = linen.relu(linen.Dense(H, name="hidden")(x))
            x = linen.Dense(1, name="head")(x if faulty else hidden)
            return x[:, 0]

    params = Net().init(KEY, TABLE)["params"]
    network = lambda params, x: Net().apply({"params": params}, x)  # noqa: E731
    return Program(squared(network), params, (TABLE, NUMBERS), network)


# Item 2: examples meet others.


def column_against_flat(faulty):
    def loss_fn(params, batch):
        outputs = mlp(params, batch[0]) if faulty else one_output(params, batch[0])
        return jnp.mean((outputs - batch[1]) ** 2)  # here

    return Program(loss_fn, ONE_UNIT, (TABLE, NUMBERS))


def optax_does_not_check_shapes(faulty):
    model = linen.Sequential([linen.Dense(H), linen.tanh, linen.Dense(1)])

    def loss_fn(params, batch):
        outputs, targets = model.apply(params, batch[0]), batch[1]
        targets = targets if faulty else targets[:, None]
        return jnp.mean(jnp.abs(outputs - targets))  # here

    return Program(loss_fn, model.init(KEY, TABLE), (TABLE, NUMBERS), model.apply)


def vmapped_scalar_against_column(faulty):
    import equinox as eqx

    model = eqx.nn.MLP(D, "scalar", H, 1, key=KEY)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    network = lambda params, x: jax.vmap(eqx.combine(params, static))(x)  # noqa: E731

    def loss_fn(params, batch):
        return jnp.mean((network(params, batch[0]) - batch[1]) ** 2)  # here

    targets = NUMBERS[:, None] if faulty else NUMBERS
    return Program(loss_fn, params, (TABLE, targets), network)


def softmax_over_the_examples(faulty):
    def network(params, x):
        return jax.nn.softmax(mlp(params, x), axis=0 if faulty else -1)  # here

    return Program(squared(network), WEIGHTS, (TABLE, ONE_HOT), network)


def recurrence_over_the_examples(faulty):
    def network(params, x):
        rows = x if faulty else jnp.swapaxes(x, 0, 1)
        state = jnp.zeros((rows.shape[1], H))
        step = lambda state, row: (jnp.tanh(state + row @ params["w"]),) * 2  # noqa: E731
        states = lax.scan(step, state, rows)[1]  # here
        states = states if faulty else jnp.swapaxes(states, 0, 1)
        return states[:, -1].mean(-1)

    return Program(
        squared(network), {"w": jnp.ones((D, H))}, (SEQUENCES, NUMBERS), network
    )


def attention_over_the_examples(faulty):
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            q, k, v = (linen.Dense(H)(x) for _ in range(3))
            pairs = "ntd,mtd->tnm" if faulty else "ntd,nsd->nts"
            back = "tnm,mtd->ntd" if faulty else "nts,nsd->ntd"
            softmax = linen.softmax
            x = jnp.einsum(back, softmax(jnp.einsum(pairs, q, k)), v)  # here
            return linen.Dense(1)(x.mean(1))[:, 0]

    params = Net().init(KEY, SEQUENCES)
    return Program(squared(Net().apply), params, (SEQUENCES, NUMBERS), Net().apply)


def divided_by_the_norm_of_all(faulty):
    def network(params, x):
        axis = None if faulty else -1
        norm = jnp.linalg.norm(x, axis=axis, keepdims=True)  # here
        return one_output(params, x / norm)

    return Program(squared(network), ONE_UNIT, (TABLE, NUMBERS), network)


def batch_normalization_while_evaluating(faulty):
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Conv(H, (3, 3))(x)
            x = linen.BatchNorm(use_running_average=not faulty)(x)  # here
            return linen.Dense(C)(linen.relu(x).mean((1, 2)))

    variables = Net().init(KEY, IMAGES)

    def network(params, x):
        every = {**variables, "params": params}
        return Net().apply(every, x, mutable=["batch_stats"])[0]

    def loss_fn(params, batch):
        return healthy_cross_entropy(network(params, batch[0]), batch[1])

    return Program(loss_fn, variables["params"], (IMAGES, CLASSES), network)


# Item 4: noise.


def linen_dropout_left_on(faulty):
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.relu(linen.Dense(H)(x))
            x = linen.Dropout(0.5, deterministic=not faulty)(x)  # here
            return linen.Dense(1)(x)[:, 0]

    params = Net().init({"params": KEY, "dropout": KEY}, TABLE)
    network = lambda params, x: Net().apply(params, x, rngs={"dropout": KEY})  # noqa: E731
    return Program(squared(network), params, (TABLE, NUMBERS), network)


def equinox_dropout_left_on(faulty):
    import equinox as eqx

    model = eqx.nn.MLP(D, "scalar", H, 1, key=KEY)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    dropout = eqx.nn.Dropout(0.25, inference=not faulty)

    def network(params, x):
        keys = jax.random.split(KEY, len(x))
        x = jax.vmap(dropout)(x, key=keys)  # here
        return jax.vmap(eqx.combine(params, static))(x)

    return Program(squared(network), params, (TABLE, NUMBERS), network)


def noise_on_the_inputs(faulty):
    features = 0.1 * jax.random.normal(KEY, (D, D))

    def network(params, x):
        shape = x.shape if faulty else (D,)
        x = x @ features + jax.random.normal(KEY, shape)  # here
        return one_output(params, x)

    return Program(squared(network), ONE_UNIT, (TABLE, NUMBERS), network)


ERROR, WARNING, INFO = "error", "warning", "info"
_BLOCKED = "gradients/blocked", ERROR
_BROADCAST = "results/broadcast-loss", ERROR
_MIXED = "results/mixes-examples", WARNING
_NOISE = "regularization/noise-at-evaluation", WARNING
PROGRAMS = {
    rounded_outputs: (*_BLOCKED, None),
    trained_on_accuracy: (*_BLOCKED, None),
    binary_gate: (*_BLOCKED, None),
    cast_to_integers: (*_BLOCKED, None),
    quantized_without_a_way_around: (*_BLOCKED, None),
    sign_inside_a_scan: (*_BLOCKED, None),
    a_layer_that_is_thrown_away: (
        "gradients/disconnected-parameter",
        INFO,
        "hidden/bias, hidden/kernel",
    ),
    column_against_flat: (*_BROADCAST, None),
    optax_does_not_check_shapes: (*_BROADCAST, None),
    vmapped_scalar_against_column: (*_BROADCAST, None),
    softmax_over_the_examples: (*_MIXED, None),
    recurrence_over_the_examples: (*_MIXED, None),
    attention_over_the_examples: (*_MIXED, None),
    divided_by_the_norm_of_all: (*_MIXED, None),
    batch_normalization_while_evaluating: ("results/mixes-examples", INFO, None),
    linen_dropout_left_on: (*_NOISE, None),
    equinox_dropout_left_on: (*_NOISE, None),
    noise_on_the_inputs: (*_NOISE, None),
}
"""Builder -> (rule, severity, what is named in the place of a line)."""
