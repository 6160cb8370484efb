import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

from nnsanity.quantities.example_norms import example_gradient_norms
from nnsanity.quantities.noise_scale import (
    gradient_noise_scale,
    value_and_grad_with_noise,
)
from nnsanity.tracing.coupling import coupled_lines

WEIGHTS = {"w": jnp.ones((3, 4)), "u": jnp.ones((4, 4))}
INPUTS = jax.random.normal(jax.random.key(0), (8, 5, 3))


def normalized(x, axes):
    return (x - jnp.mean(x, axes)) / jnp.sqrt(jnp.var(x, axes) + 1e-3)


def batch_norm(params, x):
    return jnp.mean(normalized(x @ params["w"], (0, 1)) ** 2)


def in_a_scan(params, x):
    def step(state, x):
        return jnp.tanh(normalized(state @ params["u"] + x @ params["w"], 0)), None

    state, _ = jax.lax.scan(step, jnp.zeros((len(x), 4)), x.swapaxes(0, 1))
    return jnp.mean(state)


def in_a_branch(params, x):
    x = x @ params["w"]
    is_odd = jnp.sum(params["u"]) > 0
    return jnp.mean(jax.lax.cond(is_odd, lambda: normalized(x, 0), lambda: x) ** 2)


def by_axis_name(params, x):
    def one(x):
        hidden = x @ params["w"]
        return jnp.sum((hidden - jax.lax.pmean(hidden, "batch")) ** 2)

    return jnp.mean(jax.vmap(one, axis_name="batch")(x))


def contrastive(params, x):
    z = jax.jit(lambda x: x[:, 0] @ params["w"])(x)
    return jnp.mean(jax.nn.log_softmax(z @ z.T))


def distances(params, x):
    z = jnp.mean(x, 1) @ params["w"]
    return jnp.mean(jnp.sum((z[:, None] - z[None]) ** 2, -1))


def attention_across(params, x):
    x = x.swapaxes(0, 1) @ params["w"]
    return jnp.mean(jax.nn.dot_product_attention(*[x[:, :, None]] * 3))


@pytest.mark.parametrize(
    "loss_fn",
    [
        *(batch_norm, in_a_scan, in_a_branch, by_axis_name),
        *(contrastive, distances, attention_across),
    ],
)
def test_coupled_examples_are_found_and_refused(loss_fn):
    lines = coupled_lines(loss_fn, WEIGHTS, INPUTS)
    assert lines
    assert lines[0].startswith("test_coupling.py")
    for measure in (example_gradient_norms, gradient_noise_scale):
        name = f"^{measure.__name__}: .*change each other's outputs at test_coupling"
        with pytest.raises(ValueError, match=name):
            measure(loss_fn, WEIGHTS, INPUTS)
    with pytest.raises(ValueError, match=r"^value_and_grad_with_noise: .*running"):
        value_and_grad_with_noise(loss_fn)(WEIGHTS, INPUTS)
    gradient_noise_scale(loss_fn, WEIGHTS, INPUTS, num_microbatches=2)


def layer_norm(params, x):
    return jnp.mean(normalized(x.T, 0).T @ params["w"])


def attention(params, x):
    x = x @ params["w"]
    return jnp.mean(jax.nn.dot_product_attention(*[x[:, :, None]] * 3) ** 2)


def weighted(params, x):
    losses = jnp.sum((x @ params["w"]) ** 2, (1, 2))
    weights = jnp.mean(x, (1, 2)) ** 2
    return jnp.sum(losses * (weights / jnp.sum(weights)))


def root_mean_square(params, x):
    return jnp.sqrt(jnp.mean((x @ params["w"]) ** 2)) + jnp.mean(params["w"] ** 2)


def two_means(params, x):
    """A balance between parts of the network, over the batch."""
    gates = jax.nn.softmax(x @ params["w"])
    return jnp.sum(jnp.mean(gates, (0, 1)) * jnp.mean(gates > 0.5, (0, 1)))


def flattened(params, x):
    logits = (x @ params["w"]).reshape(-1, 4)
    labels = jnp.zeros(len(logits), int)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def group_norm(params, x):
    x = nn.GroupNorm(num_groups=2).apply({"params": params["norm"]}, x @ params["w"])
    return jnp.mean(jax.nn.relu(x))


@pytest.mark.parametrize(
    "loss_fn",
    [
        layer_norm,
        attention,
        weighted,
        root_mean_square,
        two_means,
        flattened,
        group_norm,
    ],
)
def test_healthy_losses_pass(loss_fn):
    norm = {"scale": jnp.ones(4), "bias": jnp.zeros(4)}
    assert coupled_lines(loss_fn, WEIGHTS | {"norm": norm}, INPUTS) == ()


class Network(nn.Module):
    """A convolution with batch normalization."""

    is_training: bool

    @nn.compact
    def __call__(self, x):
        """Returns logits."""
        x = nn.Conv(4, (3,))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not self.is_training)(x))
        return nn.Dense(3)(x.reshape(len(x), -1))


@pytest.mark.parametrize("is_training", [True, False])
def test_batch_norm_of_flax(is_training):
    network = Network(is_training)
    variables = network.init(jax.random.key(0), INPUTS)

    def loss_fn(params, x):
        variables["params"] = params
        outputs, _ = network.apply(variables, x, mutable=["batch_stats"])
        return jnp.mean(outputs**2)

    lines = coupled_lines(loss_fn, dict(variables)["params"], INPUTS)
    assert bool(lines) is is_training
