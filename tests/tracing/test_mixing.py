"""Networks whose examples look at each other; the numbers are the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from jax import lax

from nnsanity.tracing.mixing import mixes_examples
from tests.zoo_losses import ZOO

N, T, D = 5, 4, 4
KEY = jax.random.key(0)
TABLE = jax.random.normal(KEY, (N, D))
SEQUENCES = jax.random.normal(KEY, (N, T, D))
WEIGHTS = jax.random.normal(jax.random.key(1), (D, D))


def attention(w, x):
    return jax.nn.softmax((x @ w) @ (x @ w).T) @ x


def recurrent(axis):
    def apply_fn(w, x):
        rows = jnp.moveaxis(x, axis, 0)
        step = lambda h, row: (jnp.tanh(h @ w + row), h)  # noqa: E731
        states = lax.scan(step, jnp.zeros(rows.shape[1:]), rows)[1]
        return jnp.moveaxis(states, 0, axis)

    return apply_fn


def softmax_by_hand(w, x):
    exp = jnp.exp(x @ w - jnp.max(x @ w))
    return exp / exp.sum(-1, keepdims=True)


def one_pass(w, x):
    y = x @ w
    deviation = jnp.sqrt(jnp.mean(y**2, 0) - jnp.mean(y, 0) ** 2 + 1e-5)
    return (y - jnp.mean(y, 0)) / deviation


APART = {
    "dense": (lambda w, x: jnp.tanh(x @ w), TABLE),
    "softmax": (lambda w, x: jax.nn.softmax(x @ w), TABLE),
    "layer norm": (lambda w, x: (x - x.mean(-1, keepdims=True)) @ w, TABLE),
    "vmap": (lambda w, x: jax.vmap(lambda r: jax.nn.softmax(r @ w))(x), TABLE),
    "map": (lambda w, x: lax.map(lambda r: jnp.tanh(r @ w), x), TABLE),
    "attention over time": (
        lambda w, x: jax.vmap(attention, (None, 0))(w, x),
        SEQUENCES,
    ),
    "recurrence over time": (recurrent(1), SEQUENCES),
    "running sum over time": (lambda w, x: jnp.cumsum(x @ w, 1), SEQUENCES),
    "sorted features": (lambda w, x: jnp.sort(x @ w, -1), TABLE),
    "conv": (
        lambda w, x: lax.conv(x[:, None], w[None, None], (1, 1), "SAME")[:, 0],
        SEQUENCES,
    ),
    "branches": (
        lambda w, x: lax.cond(w[0, 0] > 0, jnp.tanh, lambda y: y @ w, x),
        TABLE,
    ),
    "constant for all": (lambda w, x: x + (w @ w).mean(0), TABLE),
}
MIXED = {
    "softmax over examples": (lambda w, x: jax.nn.softmax(x @ w, axis=0), TABLE),
    "centred": (lambda w, x: x @ w - (x @ w).mean(0), TABLE),
    "by the largest": (lambda w, x: x / jnp.abs(x).max(), TABLE),
    "by the norm of all": (lambda w, x: x / jnp.linalg.norm(x), TABLE),
    "attention over examples": (attention, TABLE),
    "recurrence over examples": (recurrent(0), SEQUENCES),
    "running sum over examples": (lambda w, x: jnp.cumsum(x @ w, 0), TABLE),
    "sorted examples": (lambda w, x: jnp.sort(x @ w, 0), TABLE),
    "turned around": (lambda w, x: x[::-1] @ w, TABLE),
    "softmax after a norm": (
        lambda w, x: jax.nn.softmax(one_pass(w, x) @ w, axis=0),
        TABLE,
    ),
}
NORMALIZED = {
    "in one pass": (one_pass, TABLE),
    "in two passes": (lambda w, x: (x - x.mean(0)) / (x.std(0) + 1e-3) @ w, TABLE),
    "by variance": (
        lambda w, x: (x - x.mean(0)) * lax.rsqrt(jnp.var(x, 0) + 1e-5) @ w,
        TABLE,
    ),
}


def is_mixed(apply_fn, params, inputs):
    """Whether other outputs move with the input of the first example."""
    is_integer = jnp.issubdtype(inputs.dtype, jnp.integer)
    first = 1 + inputs[:1] % 3 if is_integer else 5 * inputs[:1] + 0.1
    other = jnp.concatenate([first, inputs[1:]])
    one, two = (np.asarray(apply_fn(params, x))[1:] for x in (inputs, other))
    return not np.allclose(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", APART)
def test_examples_that_are_apart(name):
    apply_fn, inputs = APART[name]
    assert mixes_examples(apply_fn, WEIGHTS, inputs) == ((), ())
    assert not is_mixed(apply_fn, WEIGHTS, inputs)


@pytest.mark.parametrize("name", MIXED)
def test_examples_that_are_mixed(name):
    apply_fn, inputs = MIXED[name]
    found = mixes_examples(apply_fn, WEIGHTS, inputs)
    assert found.places
    assert all(place.startswith("test_mixing.py:") for place in found.places)
    assert is_mixed(apply_fn, WEIGHTS, inputs)


@pytest.mark.parametrize("name", NORMALIZED)
def test_batch_normalization_is_told_apart(name):
    apply_fn, inputs = NORMALIZED[name]
    found = mixes_examples(apply_fn, WEIGHTS, inputs)
    assert found.places == ()
    assert found.normalized
    assert is_mixed(apply_fn, WEIGHTS, inputs)


@pytest.mark.parametrize("name", [name for name in ZOO if ZOO[name]().apply_fn])
def test_the_zoo_by_numbers(name):
    program = ZOO[name]()
    batch, leaves = program.batch, jax.tree.leaves(program.batch)
    inputs = batch[0] if len(leaves) > 1 else leaves[0]
    found = mixes_examples(program.apply_fn, program.params, inputs)
    assert found.places == ()
    assert bool(found.normalized) == (name == "resnet_in_training")
    mixed = is_mixed(program.apply_fn, program.params, inputs)
    assert mixed == bool(found.normalized)


def test_a_mean_that_is_returned_beside_the_outputs_is_no_mixing():
    def apply_fn(w, x):
        shares = jax.nn.softmax(x @ w)
        return x @ w, shares.mean(0)

    assert mixes_examples(apply_fn, WEIGHTS, TABLE) == ((), ())


def test_each_normalization_is_named_once():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            for _ in range(3):
                x = linen.BatchNorm(use_running_average=False)(linen.Dense(4)(x))
            return x

    variables = Net().init(KEY, TABLE)
    network = lambda v, x: Net().apply(v, x, mutable=["batch_stats"])  # noqa: E731
    found = mixes_examples(network, variables, TABLE)
    assert (found.places, len(found.normalized)) == ((), 1)
