"""Bounds of whole networks and losses hold, and say what is known on paper."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnsanity._tree import is_inexact
from nnsanity.tracing.bounds import output_bounds
from tests.zoo_losses import ZOO

INF = math.inf


def scaled(tree, factor):
    return jax.tree.map(lambda leaf: leaf * factor if is_inexact(leaf) else leaf, tree)


def assert_within(bounds, outputs):
    ends = zip(*map(jax.tree.leaves, (outputs, bounds.low, bounds.high)), strict=True)
    for output, low, high in ends:
        if np.isfinite(output).all():
            assert (low <= output).all(), (low, output)
            assert (output <= high).all(), (high, output)


COMPILED_SLOWLY = {"gpt", "vit", "lstm", "resnet", "resnet_in_training"}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ZOO.keys() - COMPILED_SLOWLY))
def test_networks_and_losses_stay_within_their_bounds(name):
    program = ZOO[name]()
    params, batch = program.params, program.batch
    fns = [(program.loss_fn, batch)]
    if program.apply_fn is not None:
        is_pair = isinstance(batch, tuple)
        fns.append((program.apply_fn, batch[0] if is_pair else batch))
    for fn, inputs in fns:
        bounds = output_bounds(fn, params, inputs)
        for factor in (1.0, -7.0):
            assert_within(bounds, jax.jit(fn)(scaled(params, factor), inputs))


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("plain_mlp", 0, INF),  # squared error
        ("lstm_by_scan", 0, INF),  # absolute error
        ("quantized", 0, INF),
        ("diffusion", 0, INF),
        ("pinn", 0, INF),
        ("gan_discriminator", 0, INF),  # softplus
        ("gan_by_probabilities", 0, INF),
        ("softmax_by_hand", 0, 3 * math.log(1e7)),  # three clipped probabilities
        ("equinox_classifier", 0, INF),  # log_softmax picked by label
        ("poisson", -INF, INF),
        ("wasserstein_critic", -INF, INF),
        ("normalizing_flow", -6, INF),  # three layers that scale two by exp(tanh)
    ],
)
def test_what_a_loss_can_be(name, low, high):
    program = ZOO[name]()
    bounds = output_bounds(program.loss_fn, program.params, program.batch)
    assert (float(bounds.low), float(bounds.high)) == pytest.approx(
        (low, high), rel=1e-4
    )


def test_heads_of_the_zoo():
    ends = {}
    for name in (
        "softmax_by_hand",
        "sigmoid_by_hand",
        "gan_generator",
        "poisson",
        "vae",
    ):
        program = ZOO[name]()
        batch = program.batch
        inputs = batch[0] if isinstance(batch, tuple) else batch
        bounds = output_bounds(program.apply_fn, program.params, inputs)
        ends[name] = float(jnp.min(bounds.low)), float(jnp.max(bounds.high))
    assert ends == {
        "softmax_by_hand": (0, 1),
        "sigmoid_by_hand": (0, 1),
        "gan_generator": (-1, 1),
        "poisson": (0, INF),
        "vae": (0, 1),
    }
