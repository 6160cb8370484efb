"""Losses that mix up the axes of the batch, and their healthy twins."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax import lax

from nnsanity.tracing.batch_axis import meets_across_batch

N, D, H = 6, 3, 5
INPUTS = jnp.linspace(-1.0, 1.0, N * D).reshape(N, D)
FLAT = jnp.linspace(0.0, 1.0, N)
COLUMN = FLAT[:, None]
CLASSES = jnp.arange(N) % 3
PARAMS = {"first": jnp.ones((D, H)), "second": jnp.ones((H, 1))}


def column(params, inputs):
    """Outputs of shape [N, 1]."""
    return jnp.tanh(inputs @ params["first"]) @ params["second"]


def flat(params, inputs):
    """Outputs of shape [N]."""
    return jnp.squeeze(column(params, inputs), -1)


# Faulty, each with its targets.


def column_minus_flat(params, batch):
    return jnp.mean((column(params, batch[0]) - batch[1]) ** 2)  # here


def flat_minus_column(params, batch):
    return jnp.mean((flat(params, batch[0]) - batch[1]) ** 2)  # here


def reshaped_into_a_row(params, batch):
    return jnp.mean((column(params, batch[0]) - batch[1].reshape(1, -1)) ** 2)  # here


def both_reshaped(params, batch):
    outputs = column(params, batch[0]).reshape(-1)
    return jnp.mean(jnp.abs(outputs - batch[1].reshape(-1, 1)))  # here


def normalized_first(params, batch):
    inputs, targets = batch
    inputs = (inputs - inputs.mean(0)) / (inputs.std(0) + 1e-6)
    targets = (targets - targets.mean()) / targets.std()
    return jnp.mean(jnp.square(flat(params, inputs) - targets))  # here


def by_where(params, batch):
    outputs = flat(params, batch[0])
    error = jnp.where(batch[1] > 0.5, -jax.nn.log_sigmoid(outputs), outputs)  # here
    return jnp.mean(error)


def by_where_after_another(params, batch):
    outputs = flat(params, batch[0])
    first = jnp.where(batch[1] > 0.5, -batch[0][:, 0], 0.0)  # the same shapes
    return jnp.mean(first) + jnp.mean(jnp.where(batch[1] > 0.5, -outputs, 0.0))  # here


def inside_jit(params, batch):
    @jax.jit
    def error(outputs, targets):
        return jnp.mean((outputs - targets) ** 2)  # here

    return error(column(params, batch[0]), batch[1])


def as_many_classes_as_examples(params, batch):
    logits = batch[0] @ jnp.ones((D, N)) * params["second"].sum()
    return jnp.mean((logits - batch[1]) ** 2)  # here


def weights_of_examples(params, batch):
    targets, weights = batch[1]
    error = (flat(params, batch[0]) - targets) ** 2
    return jnp.mean(weights[:, None] * error)  # here


def per_class_error(params, batch):
    logits = batch[0] @ params["first"]
    error = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
    weights = jnp.array([1.0, 2.0, 3.0])[batch[1]]
    return jnp.mean(error * weights[:, None])  # here


def last_state_with_an_axis(params, batch):
    outputs = jnp.stack([batch[0] @ params["first"]] * 2, axis=1)[:, -1:]
    return jnp.mean((outputs - batch[1]) ** 2)  # here


def recurrent(params, batch):
    def step(state, row):
        state = jnp.tanh(state + row @ params["first"])
        return state, state

    steps = jnp.swapaxes(batch[0].reshape(N, D, 1) * jnp.ones((1, 1, D)), 0, 1)
    state, _ = lax.scan(step, jnp.zeros((N, H)), steps)
    return jnp.mean((state @ params["second"] - batch[1]) ** 2)  # here


def convolutional(params, batch):
    images = batch[0][:, None, :, None]
    kernel = jnp.ones((1, 3, 1, 4)) * params["second"].sum()
    images = lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    hidden = linen.max_pool(images, (1, 3), (1, 3)).reshape(N, -1)
    return jnp.mean((hidden.mean(-1, keepdims=True) - batch[1]) ** 2)  # here


def vmapped(params, batch):
    outputs = jax.vmap(lambda row: column(params, row))(batch[0])
    return jnp.mean((outputs - batch[1]) ** 2)  # here


FAULTY = [
    (column_minus_flat, FLAT), (flat_minus_column, COLUMN), (reshaped_into_a_row, FLAT),
    (both_reshaped, FLAT), (normalized_first, COLUMN), (by_where, COLUMN),
    (by_where_after_another, COLUMN), (inside_jit, FLAT),
    (as_many_classes_as_examples, FLAT), (weights_of_examples, (FLAT, FLAT)),
    (per_class_error, CLASSES), (last_state_with_an_axis, jnp.ones((N, H))),
    (recurrent, FLAT), (convolutional, FLAT), (vmapped, FLAT),
]  # fmt: skip


@pytest.mark.parametrize(("loss_fn", "targets"), FAULTY)
def test_names_the_line_where_outputs_meet_the_targets_of_others(loss_fn, targets):
    lines, start = inspect.getsourcelines(loss_fn)
    (at,) = [index for index, line in enumerate(lines) if "# here" in line]
    (where,) = meets_across_batch(loss_fn, PARAMS, (INPUTS, targets))
    assert where.startswith(f"test_batch_axis.py:{start + at} (")


@pytest.mark.parametrize(
    "loss_fn", [column_minus_flat, flat_minus_column, by_where, recurrent, inside_jit]
)
def test_silent_once_the_targets_have_the_shape_of_the_outputs(loss_fn):
    wrong = dict(FAULTY)[loss_fn]
    right = COLUMN if wrong.ndim == 1 else FLAT
    assert meets_across_batch(loss_fn, PARAMS, (INPUTS, right)) == ()


@pytest.mark.parametrize(
    "loss_fn", [column_minus_flat, flat_minus_column, both_reshaped, recurrent]
)
def test_the_order_of_the_targets_makes_no_difference_where_it_alarms(loss_fn):
    params = {**PARAMS, "second": jnp.linspace(-1.0, 2.0, H)[:, None]}
    wrong = dict(FAULTY)[loss_fn]
    loss = loss_fn(params, (INPUTS, wrong))
    np.testing.assert_allclose(loss_fn(params, (INPUTS, wrong[::-1])), loss, rtol=1e-5)


# Healthy.


def cross_entropy(params, batch):
    logits = batch[0] @ params["first"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def cross_entropy_by_indices(params, batch):
    logits = jax.nn.log_softmax(batch[0] @ params["first"])
    return -jnp.mean(logits[jnp.arange(N), batch[1]])


def cross_entropy_by_one_hot(params, batch):
    logits = jax.nn.log_softmax(batch[0] @ params["first"])
    return -jnp.mean(jnp.sum(logits * jax.nn.one_hot(batch[1], H), -1))


def attention_over_examples(params, batch):
    hidden = batch[0] @ params["first"]
    weights = jax.nn.softmax(hidden @ hidden.T)
    return jnp.mean(((weights @ hidden) @ params["second"] - batch[1][:, None]) ** 2)


def contrastive(params, batch):
    hidden = batch[0] @ params["first"]
    hidden /= jnp.linalg.norm(hidden, axis=-1, keepdims=True)
    logits = jnp.where(jnp.eye(N, dtype=bool), -1e9, hidden @ hidden.T)
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(N)).mean()


def supervised_contrastive(params, batch):
    hidden = batch[0] @ params["first"]
    same = batch[1][:, None] == batch[1][None, :]
    return -jnp.mean(jnp.where(same, jax.nn.log_softmax(hidden @ hidden.T), 0.0))


def image_and_text(params, batch):
    images, texts = batch[0] @ params["first"], batch[1][:, None] * params["second"].T
    distances = images[:, None] - texts[None]
    return jnp.mean((images @ texts.T) ** 2) + jnp.mean(distances**2)


def pairwise_ranking(params, batch):
    scores = flat(params, batch[0])
    order = jnp.sign(batch[1][:, None] - batch[1][None, :])
    return jnp.mean(jax.nn.relu(1 - order * (scores[:, None] - scores[None, :])))


def survival(params, batch):
    times, events = batch[1], batch[1] > 0.3
    scores = flat(params, batch[0])
    at_risk = times[None, :] >= times[:, None]
    total = jnp.log(jnp.sum(jnp.where(at_risk, jnp.exp(scores)[None, :], 0.0), 1))
    weighted = at_risk * scores[None, :] * events[:, None]
    return jnp.mean(events * (total - scores)) + jnp.mean(weighted)


def energy_distance(params, batch):
    samples, data = batch[0] @ params["first"], batch[1][:, None] * jnp.ones((1, H))
    apart = jnp.mean(jnp.abs(samples[:, None] - data[None]))
    return apart - jnp.mean(jnp.abs(samples[:, None] - samples[None])) / 2


def kernel_distance(params, batch):
    samples, data = batch[0] @ params["first"], batch[1][:, None] * jnp.ones((1, H))
    squares = jnp.sum(samples**2, 1)[:, None] + jnp.sum(data**2, 1)[None, :]
    return -jnp.mean(jnp.exp(-(squares - 2 * samples @ data.T)))


def quantiles(params, batch):
    error = batch[1][:, None] - batch[0] @ params["first"]
    levels = jnp.linspace(0.1, 0.9, H)
    return jnp.mean(jnp.maximum(levels * error, (levels - 1) * error))


def distributional(params, batch):
    atoms = batch[0] @ params["first"]
    wanted = batch[1][:, None] + jnp.linspace(-1.0, 1.0, H)
    return jnp.mean(jnp.abs(wanted[:, None, :] - atoms[:, :, None]))


def padded_sequences(params, batch):
    hidden = batch[0][:, :, None] * params["first"][None]
    mask = jnp.arange(D)[None, :] < batch[1][:, None]
    return jnp.sum(hidden.mean(-1) * mask) / jnp.sum(mask)


def batch_norm(params, batch):
    hidden = batch[0] @ params["first"]
    hidden = (hidden - hidden.mean(0)) / jnp.sqrt(hidden.var(0) + 1e-5)
    return jnp.mean(((hidden @ params["second"])[:, 0] - batch[1]) ** 2)


def time_major(params, batch):
    steps = jnp.swapaxes(batch[0], 0, 1)
    _, outputs = lax.scan(lambda c, x: (c, x * params["second"][0, 0]), 0.0, steps)
    return jnp.mean((outputs - batch[1]) ** 2)


def per_example(params, batch):
    def error(row, target):
        return (column(params, row)[0] - target) ** 2

    return jax.vmap(error)(*batch).mean()


HEALTHY = [
    (cross_entropy, CLASSES), (cross_entropy_by_indices, CLASSES),
    (cross_entropy_by_one_hot, CLASSES), (attention_over_examples, FLAT),
    (contrastive, FLAT), (supervised_contrastive, CLASSES), (image_and_text, FLAT),
    (pairwise_ranking, FLAT), (survival, FLAT), (energy_distance, FLAT),
    (kernel_distance, FLAT), (quantiles, FLAT), (distributional, FLAT),
    (padded_sequences, CLASSES), (batch_norm, FLAT), (time_major, FLAT),
    (per_example, FLAT), (column_minus_flat, COLUMN), (flat_minus_column, FLAT),
]  # fmt: skip


@pytest.mark.parametrize(("loss_fn", "targets"), HEALTHY)
def test_silent_on_healthy_losses(loss_fn, targets):
    assert meets_across_batch(loss_fn, PARAMS, (INPUTS, targets)) == ()


def test_a_batch_of_one_shows_what_a_larger_one_would():
    batch = (INPUTS[:1], COLUMN[:1])
    assert len(meets_across_batch(flat_minus_column, PARAMS, batch)) == 1
    assert meets_across_batch(column_minus_flat, PARAMS, batch) == ()


def test_silent_on_what_the_loss_does_not_use():
    def loss_fn(params, batch):
        column_minus_flat(params, batch)
        return jnp.mean((flat(params, batch[0]) - batch[1]) ** 2)

    assert meets_across_batch(loss_fn, PARAMS, (INPUTS, FLAT)) == ()


@pytest.mark.parametrize("targets", [FLAT, COLUMN])
def test_linen_recurrent(targets):
    model = linen.Sequential([linen.RNN(linen.LSTMCell(4)), linen.Dense(1)])
    sequences = jnp.ones((N, 2, D))
    variables = model.init(jax.random.key(0), sequences)

    def loss_fn(params, batch):
        return jnp.mean((model.apply(params, batch[0])[:, -1] - batch[1]) ** 2)

    found = meets_across_batch(loss_fn, variables, (sequences, targets))
    assert len(found) == (targets is FLAT)


@pytest.mark.parametrize("targets", [FLAT, COLUMN])
def test_nnx(targets):
    first, second = (
        nnx.Linear(D, H, rngs=nnx.Rngs(0)),
        nnx.Linear(H, 1, rngs=nnx.Rngs(1)),
    )
    graphdef, params = nnx.split(nnx.Sequential(first, nnx.gelu, second))

    def loss_fn(params, batch):
        outputs = nnx.merge(graphdef, params, copy=True)(batch[0])
        return jnp.mean((outputs - batch[1]) ** 2)

    found = meets_across_batch(loss_fn, params, (INPUTS, targets))
    assert len(found) == (targets is FLAT)


@pytest.mark.parametrize("targets", [FLAT, COLUMN])
def test_equinox(targets):
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(D, "scalar", H, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    @eqx.filter_jit
    def loss_fn(params, batch):
        outputs = jax.vmap(eqx.combine(params, static))(batch[0])
        return jnp.mean((outputs - batch[1]) ** 2)

    found = meets_across_batch(loss_fn, params, (INPUTS, targets))
    assert len(found) == (targets is COLUMN)


def test_branches_keep_what_they_share():
    def loss_fn(params, batch):
        outputs = column(params, batch[0])
        outputs = lax.cond(outputs[0, 0] > 0, lambda x: x, jnp.zeros_like, outputs)
        return jnp.mean((outputs - batch[1]) ** 2)

    assert len(meets_across_batch(loss_fn, PARAMS, (INPUTS, FLAT))) == 1
    assert meets_across_batch(loss_fn, PARAMS, (INPUTS, COLUMN)) == ()


def test_shapes_suffice():
    arrays = (PARAMS, (INPUTS, FLAT))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
    found = meets_across_batch(column_minus_flat, *shapes)
    assert found == meets_across_batch(column_minus_flat, *arrays)
    assert len(found) == 1


def test_wants_a_pair():
    with pytest.raises(ValueError, match=r"pair \(inputs, targets\), got dict"):
        meets_across_batch(column_minus_flat, PARAMS, {"inputs": INPUTS})
