"""What the tools for rate and batch size cost, in units of one gradient.

Run it with ``python benchmarks/dynamics.py``.  Everything is compiled first; then one
``jax.value_and_grad``, the same again and each tool take turns, as in ``cost.py``.
"""

import jax
import jax.numpy as jnp
import networks
import optax
from cost import ratios

import nnsanity as ns

NUM_STEPS = 100
NUM_ITERATIONS = 20


def gradients(case):
    """Norms of examples and the noise scale against the gradient of the batch."""
    arguments = case.params, case.batch
    plain = jax.jit(jax.value_and_grad(case.loss_fn))
    with_noise = ns.value_and_grad_with_noise(case.loss_fn)

    def without_error(params, batch):
        (loss, noise), grads = with_noise(params, batch)
        return loss, noise.noise_scale, grads

    def norms(params, batch):
        return ns.example_gradient_norms(case.loss_fn, params, batch)

    def written_out(params, batch):
        def one(example):
            example = jax.tree.map(lambda leaf: leaf[None], example)
            return optax.tree.norm(jax.grad(case.loss_fn)(params, example))

        return jax.vmap(one)(batch)

    functions = {
        "the gradient again": plain,
        "example_gradient_norms": jax.jit(norms),
        "vmap(grad)": jax.jit(written_out),
        "gradient and noise scale": jax.jit(without_error),
        "with standard error": jax.jit(with_noise),
    }
    calls = {name: (function, *arguments) for name, function in functions.items()}
    return ratios((plain, *arguments), calls)


def curvature(case):
    """Sharpness against the gradient of the batch."""
    arguments = case.params, case.batch
    key = jax.random.key(0)

    def measure(params, batch):
        return ns.sharpness(
            case.loss_fn, params, batch, key=key, num_iterations=NUM_ITERATIONS
        )

    plain = jax.jit(jax.value_and_grad(case.loss_fn))
    name = f"sharpness, {NUM_ITERATIONS} iterations"
    return ratios((plain, *arguments), {name: (jax.jit(measure), *arguments)}, turns=5)


def rates(case):
    """``lr_range`` against its own steps, scanned plainly."""
    optimizer = optax.sgd(1e-3, momentum=0.9)
    batches = jax.tree.map(lambda leaf: jnp.stack([leaf] * NUM_STEPS), case.batch)

    @jax.jit
    def plain(params, batches):
        def step(state, batch):
            params, optimizer_state = state
            loss, grads = jax.value_and_grad(case.loss_fn)(params, batch)
            updates, optimizer_state = optimizer.update(grads, optimizer_state)
            return (optax.apply_updates(params, updates), optimizer_state), loss

        return jax.lax.scan(step, (params, optimizer.init(params)), batches)[1]

    def measure(params, batches):
        return ns.lr_range(
            case.loss_fn, params, batches, optimizer, min_scale=1e-3, max_scale=1.0
        )

    arguments = case.params, batches
    calls = {
        "its steps again": (plain, *arguments),
        "lr_range": (jax.jit(measure), *arguments),
    }
    return ratios((plain, *arguments), calls, turns=5)


def main():
    """Prints the tables."""
    print(jax.devices()[0].device_kind)
    for name, make in networks.CASES.items():
        print(name)
        case = make()
        for measure in (gradients, curvature):
            for tool, ratio in measure(case).items():
                print(f"  {tool:26} {ratio:6.2f}", flush=True)
    print(f"{NUM_STEPS} steps of the MLP, batch 32, in units of the plain steps")
    for tool, ratio in rates(networks.mlp(32)).items():
        print(f"  {tool:26} {ratio:6.2f}")


if __name__ == "__main__":
    main()
