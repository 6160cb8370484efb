"""Problems whose curvature is known: every tool has to agree with it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from nnsanity.quantities.curvature import sharpness
from nnsanity.quantities.rate_curves import lr_range, lr_sweep

RNG = np.random.default_rng(0)
NUM_STEPS = 200


def squares(params, batch):
    outputs = batch[0] @ params["w"] + params["b"]
    return jnp.mean((outputs - batch[1]) ** 2)


def least_squares(seed):
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(40, 5)) * 10 ** random.uniform(-1, 1, 5)
    batch = np.float32(inputs), np.float32(random.normal(size=40))
    design = np.concatenate([inputs, np.ones((40, 1))], 1)
    return batch, np.linalg.eigvalsh(2 / 40 * design.T @ design)[-1]


PARAMS = {"w": jnp.ones(5), "b": jnp.zeros(())}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("seed", range(2))
def test_least_squares(seed, momentum):
    batch, eigenvalue = least_squares(seed)
    batches = jax.tree.map(lambda leaf: np.stack([leaf] * NUM_STEPS), batch)
    optimizer = optax.sgd(1.0, momentum=momentum)
    limit = 2 * (1 + momentum) / eigenvalue
    scales = limit * np.geomspace(0.5, 2, 9)  # none of them the limit itself
    scales = np.float32(scales * 1.09)
    swept = lr_sweep(squares, PARAMS, batches, optimizer, scales=scales)
    np.testing.assert_array_equal(swept.diverged, scales > limit)
    found = lr_range(
        squares,
        PARAMS,
        batches,
        optimizer,
        min_scale=1e-5 * limit,
        max_scale=100 * limit,
    )
    assert 0 < found.suggestion < limit
    bent = sharpness(squares, PARAMS, batch, key=jax.random.key(seed), num_iterations=6)
    assert float(bent.eigenvalue) == pytest.approx(eigenvalue, rel=1e-3)


def mlp(params, x):
    hidden = jnp.tanh(x.reshape(len(x), -1) @ params["w"])
    return hidden @ params["v"]


def cnn(params, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(
        x[..., None], params["c"], (1, 1), "SAME", dimension_numbers=numbers
    )
    return jnp.mean(jax.nn.softplus(x), (1, 2)) @ params["v"]


def attention(params, x):
    query, key = x @ params["q"], x @ params["k"]
    weights = jax.nn.softmax(query @ key.swapaxes(1, 2))
    return jnp.mean(weights @ x, 1) @ params["v"]


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


NETWORKS = {
    "mlp": (mlp, {"w": normal(16, 5), "v": normal(5, 3)}),
    "cnn": (cnn, {"c": normal(3, 3, 1, 4), "v": normal(4, 3)}),
    "attention": (
        attention,
        {"q": normal(4, 3), "k": normal(4, 3), "v": normal(4, 3)},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_sharpness_against_the_dense_hessian(name):
    apply_fn, params = NETWORKS[name]

    def loss_fn(params, batch):
        logits = apply_fn(params, batch[0])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
        return jnp.mean(losses)

    batch = normal(20, 4, 4), jnp.arange(20) % 3
    flat, back = ravel_pytree(params)
    hessian = jax.jit(jax.hessian(lambda flat: loss_fn(back(flat), batch)))(flat)
    spectrum = np.linalg.eigvalsh(np.asarray(hessian, np.float64))
    for num_iterations in (4, 25):
        found = sharpness(
            loss_fn,
            params,
            batch,
            key=jax.random.key(0),
            num_iterations=num_iterations,
        )
        distance = np.min(np.abs(spectrum - float(found.eigenvalue)))
        assert distance <= found.residual + 1e-4 * spectrum[-1]
    assert float(found.eigenvalue) == pytest.approx(spectrum[-1], rel=0.01)
