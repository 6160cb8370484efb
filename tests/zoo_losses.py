"""Healthy losses of many kinds; the networks are plain."""

import jax
import jax.numpy as jnp
import optax
from jax import lax

from tests.zoo import (
    CLASSES,
    KEY,
    NETWORKS,
    NUMBERS,
    SEQUENCES,
    TABLE,
    TOKENS,
    C,
    D,
    H,
    N,
    Program,
    T,
    cross_entropy,
    dense,
    mlp,
)


def vae():
    params = {"encoder": dense(KEY, D, H, 4), "decoder": dense(KEY, 2, H, D)}

    def loss_fn(params, inputs):
        mean, log_variance = jnp.split(mlp(params["encoder"], inputs), 2, axis=-1)
        noise = jax.random.normal(KEY, mean.shape)
        latent = mean + jnp.exp(0.5 * log_variance) * noise
        logits = mlp(params["decoder"], latent)
        likelihood = optax.sigmoid_binary_cross_entropy(logits, inputs > 0).sum(-1)
        divergence = jnp.exp(log_variance) + mean**2 - 1.0 - log_variance
        return jnp.mean(likelihood + 0.5 * divergence.sum(-1))

    def network(params, inputs):
        mean = mlp(params["encoder"], inputs)[:, :2]
        return jax.nn.sigmoid(mlp(params["decoder"], mean))

    return Program(loss_fn, params, TABLE, network)


def vq_vae():
    params = {
        "encoder": dense(KEY, D, H, 2),
        "codes": jax.random.normal(KEY, (7, 2)),
        "decoder": dense(KEY, 2, H, D),
    }

    def parts(params, inputs):
        latent = mlp(params["encoder"], inputs)
        distances = jnp.sum((latent[:, None] - params["codes"][None]) ** 2, -1)
        code = params["codes"][jnp.argmin(distances, -1)]
        passed = latent + lax.stop_gradient(code - latent)
        return latent, code, mlp(params["decoder"], passed)

    def loss_fn(params, inputs):
        latent, code, outputs = parts(params, inputs)
        commitment = jnp.mean((latent - lax.stop_gradient(code)) ** 2)
        codebook = jnp.mean((lax.stop_gradient(latent) - code) ** 2)
        return jnp.mean((outputs - inputs) ** 2) + codebook + 0.25 * commitment

    return Program(loss_fn, params, TABLE, lambda p, x: parts(p, x)[2])


def gan_discriminator():
    params = dense(KEY, D, H, 1)

    def loss_fn(params, batch):
        real, fake = batch
        losses = jax.nn.softplus(-mlp(params, real)) + jax.nn.softplus(
            mlp(params, fake)
        )
        return jnp.mean(losses)

    return Program(loss_fn, params, (TABLE, TABLE + 1.0))


def gan_by_probabilities():
    params = dense(KEY, D, H, 1)

    def loss_fn(params, batch):
        real, fake = (jax.nn.sigmoid(mlp(params, x)) for x in batch)
        return -jnp.mean(jnp.log(real) + jnp.log(1 - fake))

    return Program(loss_fn, params, (TABLE, TABLE + 1.0))


def gan_generator():
    params, critic = dense(KEY, D, H, D), dense(KEY, D, H, 1)

    def loss_fn(params, noise):
        return -jnp.mean(jax.nn.log_sigmoid(mlp(critic, jnp.tanh(mlp(params, noise)))))

    return Program(loss_fn, params, TABLE, lambda p, x: jnp.tanh(mlp(p, x)))


def wasserstein_critic():
    params = dense(KEY, D, H, 1)
    critic = lambda params, x: mlp(params, x, jax.nn.silu)[..., 0]  # noqa: E731

    def loss_fn(params, batch):
        real, fake = batch
        between = 0.5 * (real + fake)
        slopes = jax.vmap(jax.grad(critic, argnums=1), (None, 0))(params, between)
        penalty = (jnp.sqrt(jnp.sum(slopes**2, -1) + 1e-12) - 1) ** 2
        return jnp.mean(critic(params, fake) - critic(params, real) + 10 * penalty)

    return Program(loss_fn, params, (TABLE, TABLE + 1.0), critic)


def simclr():
    params = dense(KEY, D, H, H)

    def loss_fn(params, batch):
        views = jnp.concatenate([mlp(params, x) for x in batch])
        views /= jnp.linalg.norm(views, axis=-1, keepdims=True)
        logits = views @ views.T / 0.1
        logits = jnp.where(jnp.eye(2 * N, dtype=bool), -1e9, logits)
        positives = jnp.roll(jnp.arange(2 * N), N)
        return cross_entropy(logits, positives)

    return Program(loss_fn, params, (TABLE, TABLE + 0.1), mlp)


def clip_pairs():
    params = {"a": dense(KEY, D, H), "b": dense(KEY, D, H), "scale": jnp.zeros(())}

    def loss_fn(params, batch):
        one, other = (mlp(params[name], x) for name, x in zip("ab", batch, strict=True))
        one /= jnp.linalg.norm(one, axis=-1, keepdims=True) + 1e-6
        other /= jnp.linalg.norm(other, axis=-1, keepdims=True) + 1e-6
        logits = jnp.exp(params["scale"]) * one @ other.T
        labels = jnp.arange(N)
        return 0.5 * (cross_entropy(logits, labels) + cross_entropy(logits.T, labels))

    return Program(loss_fn, params, (TABLE, TABLE + 0.1))


def dqn():
    params = {"online": dense(KEY, D, H, C), "target": dense(KEY, D, H, C)}

    def loss_fn(params, batch):
        states, action, reward, following = batch
        chosen = mlp(params["online"], states)[jnp.arange(N), action]
        best = jnp.max(mlp(params["target"], following), axis=-1)
        wanted = reward + 0.99 * best
        return optax.huber_loss(chosen, lax.stop_gradient(wanted)).mean()

    return Program(
        lambda online, batch: loss_fn({**params, "online": online}, batch),
        params["online"],
        (TABLE, CLASSES, NUMBERS, TABLE + 1.0),
    )


def actor_critic():
    params = {"actor": dense(KEY, D, H, C), "critic": dense(KEY, D, H, 1)}

    def loss_fn(params, batch):
        states, action, returns = batch
        logits = jax.nn.log_softmax(mlp(params["actor"], states))
        values = mlp(params["critic"], states)[:, 0]
        advantage = lax.stop_gradient(returns - values)
        entropy = -jnp.sum(jnp.exp(logits) * logits, -1)
        chosen = jnp.take_along_axis(logits, action[:, None], 1)[:, 0]
        ratio = jnp.exp(chosen - lax.stop_gradient(chosen))
        clipped = jnp.clip(ratio, 0.8, 1.2)
        policy = -jnp.minimum(ratio * advantage, clipped * advantage)
        return jnp.mean(policy + 0.5 * (values - returns) ** 2 - 0.01 * entropy)

    return Program(loss_fn, params, (TABLE, CLASSES, NUMBERS))


def soft_actor():
    params = dense(KEY, D, H, 2)

    def loss_fn(params, batch):
        mean, log_deviation = jnp.split(mlp(params, batch), 2, axis=-1)
        log_deviation = jnp.clip(log_deviation, -5, 2)
        noise = jax.random.normal(KEY, mean.shape)
        action = jnp.tanh(mean + jnp.exp(log_deviation) * noise)
        log_density = -0.5 * noise**2 - log_deviation - jnp.log(1 - action**2 + 1e-6)
        return jnp.mean(log_density + (action - batch[:, :1]) ** 2)

    return Program(loss_fn, params, TABLE)


def pinn():
    params = dense(KEY, 2, H, H, 1)
    solution = lambda params, point: mlp(params, point, jnp.tanh)[0]  # noqa: E731

    def loss_fn(params, batch):
        points, edge = batch

        def residual(point):
            slope = jax.grad(solution, argnums=1)(params, point)
            bend = jax.hessian(solution, argnums=1)(params, point)
            return slope[1] - bend[0, 0]

        inside = jax.vmap(residual)(points)
        boundary = jax.vmap(solution, (None, 0))(params, edge)
        return jnp.mean(inside**2) + jnp.mean((boundary - jnp.sin(edge[:, 0])) ** 2)

    return Program(loss_fn, params, (TABLE[:, :2], TABLE[:, 2:]))


def normalizing_flow():
    params = [dense(KEY, D // 2, H, D) for _ in range(3)]

    def loss_fn(params, x):
        total = jnp.zeros(len(x))
        for layer in params:
            kept, moved = jnp.split(x, 2, axis=-1)
            shift, log_scale = jnp.split(mlp(layer, kept), 2, axis=-1)
            log_scale = jnp.tanh(log_scale)
            moved = moved * jnp.exp(log_scale) + shift
            total += log_scale.sum(-1)
            x = jnp.concatenate([moved, kept], axis=-1)
        return jnp.mean(0.5 * jnp.sum(x**2, -1) - total)

    return Program(loss_fn, params, TABLE)


def masked_sequences():
    params = dense(KEY, D, H, C)

    def loss_fn(params, batch):
        inputs, (labels, lengths) = batch
        mask = jnp.arange(T)[None, :] < lengths[:, None]
        logits = mlp(params, inputs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.sum(jnp.where(mask, losses, 0.0)) / jnp.sum(mask)

    targets = (TOKENS % C, 1 + CLASSES)
    return Program(loss_fn, params, (SEQUENCES, targets), mlp)


def ctc():
    params = dense(KEY, D, H, C)

    def loss_fn(params, batch):
        inputs, labels = batch
        paddings = jnp.zeros((N, T)), jnp.zeros((N, 2))
        return optax.ctc_loss(
            mlp(params, inputs), paddings[0], labels, paddings[1]
        ).mean()

    return Program(loss_fn, params, (SEQUENCES, 1 + TOKENS[:, :2] % (C - 1)), mlp)


def distillation():
    params, teacher = dense(KEY, D, H, C), dense(KEY, D, H, C)

    def loss_fn(params, batch):
        soft = jax.nn.softmax(mlp(teacher, batch[0]) / 4.0)
        student = jax.nn.log_softmax(mlp(params, batch[0]) / 4.0)
        return 16.0 * optax.kl_divergence(student, soft).mean()

    return Program(loss_fn, params, (TABLE, CLASSES), mlp)


def gaussian_likelihood():
    params = dense(KEY, D, H, 2)

    def loss_fn(params, batch):
        mean, raw = jnp.split(mlp(params, batch[0]), 2, axis=-1)
        deviation = jax.nn.softplus(raw) + 1e-3
        scaled = (batch[1][:, None] - mean) / deviation
        return jnp.mean(0.5 * scaled**2 + jnp.log(deviation))

    return Program(loss_fn, params, (TABLE, NUMBERS))


def mixture_density():
    params = dense(KEY, D, H, 9)

    def loss_fn(params, batch):
        logits, mean, log_scale = jnp.split(mlp(params, batch[0]), 3, axis=-1)
        scaled = (batch[1][:, None] - mean) * jnp.exp(-log_scale)
        densities = jax.nn.log_softmax(logits) - 0.5 * scaled**2 - log_scale
        return -jnp.mean(jax.nn.logsumexp(densities, axis=-1))

    return Program(loss_fn, params, (TABLE, NUMBERS))


def poisson():
    params = dense(KEY, D, H, 1)
    network = lambda params, x: jnp.exp(mlp(params, x)[:, 0])  # noqa: E731

    def loss_fn(params, batch):
        rate = network(params, batch[0])
        return jnp.mean(rate - batch[1] * jnp.log(rate))

    return Program(loss_fn, params, (TABLE, CLASSES.astype(float)), network)


def diffusion():
    params = dense(KEY, D + 1, H, D)

    def loss_fn(params, batch):
        time_key, noise_key = jax.random.split(KEY)
        time = jax.random.uniform(time_key, (N, 1))
        noise = jax.random.normal(noise_key, batch.shape)
        noisy = jnp.sqrt(1 - time) * batch + jnp.sqrt(time) * noise
        guess = mlp(params, jnp.concatenate([noisy, time], -1))
        return jnp.mean((guess - noise) ** 2)

    return Program(loss_fn, params, TABLE)


LOSSES = (
    *(vae, vq_vae, gan_discriminator, gan_by_probabilities, gan_generator),
    *(wasserstein_critic, simclr, clip_pairs, dqn, actor_critic, soft_actor, pinn),
    *(normalizing_flow, masked_sequences, ctc, distillation, gaussian_likelihood),
    *(mixture_density, poisson, diffusion),
)
ZOO = {one.__name__: one for one in (*NETWORKS, *LOSSES)}
