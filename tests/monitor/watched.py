"""A small network in training, with a monitor in its step."""

import jax
import jax.numpy as jnp
import optax

import nnsanity as ns

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (256, 3))
Y = jnp.sin(2 * X[:, :1]) + 0.1 * jax.random.normal(jax.random.key(9), (256, 1))
BATCH = X[:32], Y[:32]
NAMES = ("b1", "b2", "w1", "w2")


def init_mlp(key, width=16):
    one, two = jax.random.split(key)
    return {
        "b1": jnp.zeros(width),
        "b2": jnp.zeros(1),
        "w1": jax.random.normal(one, (3, width)) * jnp.sqrt(2 / 3),
        "w2": jax.random.normal(two, (width, 1)) / jnp.sqrt(width),
    }


PARAMS = init_mlp(jax.random.key(1))


def mlp_loss(params, batch):
    hidden = jax.nn.relu(batch[0] @ params["w1"] + params["b1"][None])
    return jnp.mean((hidden @ params["w2"] + params["b2"][None] - batch[1]) ** 2)


def watched_step(watch, loss_fn, tx):
    """One training step: (state, params, opt_state), batch, scale of the updates."""

    def step(carry, batch, scale=1.0):
        state, params, opt_state = carry
        watched = ns.value_and_grad(loss_fn, when=watch.due(state))
        (loss, signals), grads = watched(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        updates = jax.tree.map(lambda one: scale * one, updates)
        state = watch.update(
            state,
            loss=loss,
            signals=signals,
            grads=grads,
            updates=updates,
            params=params,
        )
        return state, optax.apply_updates(params, updates), opt_state

    return step


def start(watch, loss_fn, params, tx, batch):
    return watch.init(loss_fn, params, batch), params, tx.init(params)
