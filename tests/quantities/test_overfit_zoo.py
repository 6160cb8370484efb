"""Every healthy network of the zoo learns a batch by heart; none with a fault does."""

import math

import jax
import jax.numpy as jnp
import optax
import pytest

from nnsanity.quantities.overfit import overfit_batch
from tests.zoo import GPT, TOKENS, C, H, dense, mlp
from tests.zoo_losses import ZOO

pytestmark = pytest.mark.slow

WITHOUT_ANSWERS = {
    *("vae", "vq_vae", "diffusion", "normalizing_flow"),  # inputs alone
    *("gan_discriminator", "gan_by_probabilities", "gan_generator"),  # two players
    *("wasserstein_critic", "dqn", "actor_critic", "soft_actor"),  # and what they reach
    *("pinn", "distillation"),  # what is asked for follows from the inputs
}
"""Losses that ask for no given output of each example; a new program is tried."""
SMOOTHED = (1 - 0.1 + 0.1 / C, *[0.1 / C] * (C - 1))
BEST_LOSSES = {
    # Two sequences start alike, and three others; each asks for four tokens.
    "gpt": (2 * math.log(2) + 3 * math.log(3)) / (6 * 4),
    "resnet": -sum(share * math.log(share) for share in SMOOTHED),
    "resnet_in_training": -sum(share * math.log(share) for share in SMOOTHED),
    "poisson": (0 + 1 + 2 - 2 * math.log(2)) / 3,  # rate - count * log(rate)
    "gaussian_likelihood": None,
    "mixture_density": None,
}
"""Where it is not 0, on paper."""
FEW = {"num_steps": 200, "scales": jnp.array([1.0, 10.0, 100.0])}
"""All six scales are tried in the tests of single faults."""


def next_tokens(params, batch):
    """The loss of the GPT without its noise, of pairs."""
    logits, (_, following) = GPT().apply(params, batch[0])[:, :-1], batch
    return optax.softmax_cross_entropy_with_integer_labels(logits, following).mean()


def of_zoo(name):
    program = ZOO[name]()
    if name == "gpt":
        return next_tokens, program.params, (TOKENS, TOKENS[:, 1:])
    return program[:3]


def overfit(name, loss_fn, params, batch):
    return overfit_batch(
        loss_fn,
        params,
        batch,
        optax.adam(1e-3),
        key=jax.random.key(0),
        best_loss=BEST_LOSSES.get(name, 0.0),
        **FEW,
    )


@pytest.mark.parametrize("name", sorted(ZOO.keys() - WITHOUT_ANSWERS))
def test_healthy_networks_fit(name):
    found = overfit(name, *of_zoo(name))
    assert found.fits, found._replace(losses=None)
    assert found.loss < found.blind_loss


def rolled(tree):
    return jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=0), tree)


FAULTS = {
    "inputs mixed up": lambda loss_fn: lambda p, b: loss_fn(p, (rolled(b[0]), b[1])),
    "targets mixed up": lambda loss_fn: lambda p, b: loss_fn(p, (b[0], rolled(b[1]))),
    "blocked": lambda loss_fn: lambda p, b: loss_fn(jax.lax.stop_gradient(p), b),
    "wrong sign": lambda loss_fn: lambda p, b: -loss_fn(p, b),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["plain_mlp", "graph_network"])
def test_faulty_ones_do_not(name, fault):
    loss_fn, params, batch = of_zoo(name)
    assert not overfit(name, FAULTS[fault](loss_fn), params, batch).fits


def test_a_frozen_trunk_and_a_small_head():
    _, _, (inputs, targets) = of_zoo("plain_mlp")

    def loss_fn(params, batch):
        hidden = jax.lax.stop_gradient(params[:-1])
        return jnp.mean((mlp([*hidden, params[-1]], batch[0])[:, 0] - batch[1]) ** 2)

    key = jax.random.key(1)
    for width, is_enough in ((2, False), (8 * H, True)):
        params = dense(key, inputs.shape[1], width, 1)
        found = overfit("plain_mlp", loss_fn, params, (inputs, targets))
        assert bool(found.fits) == is_enough
