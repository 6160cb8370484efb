import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnsanity.quantities.weight_sizes import layer_update_ratios

RNG = np.random.default_rng(0)


def test_update_ratios_by_layer_are_those_of_the_weights_as_they_are_used():
    shapes = {"w": (3, 4, 4), "again": (4, 4), "masked": (4, 4), "head": (2, 4)}
    params = {name: jnp.asarray(RNG.normal(size=one)) for name, one in shapes.items()}
    updates = {
        name: 1e-3 * jnp.asarray(RNG.normal(size=shapes[name])) for name in shapes
    }
    mask = np.triu(np.ones((4, 4)))

    def apply_fn(params, x):
        x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]
        turn = lambda x, _: (jnp.tanh(x @ params["again"]), None)  # noqa: E731
        x = jax.lax.scan(turn, x, None, length=5)[0]
        return jnp.tanh(x @ (params["masked"] * mask)) @ params["head"].T

    found = layer_update_ratios(apply_fn, updates, params, jnp.ones((7, 4)))
    norm = np.linalg.norm
    pairs = jax.tree.map(lambda *pair: np.float64(pair), updates, params)
    expected = [
        *(
            norm(pairs["w"][0][block]) / norm(pairs["w"][1][block])
            for block in range(3)
        ),
        norm(pairs["again"][0]) / norm(pairs["again"][1]),
        norm(pairs["masked"][0] * mask) / norm(pairs["masked"][1] * mask),
        norm(pairs["head"][0]) / norm(pairs["head"][1]),
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    with pytest.raises(ValueError, match="updates and params must be trees"):
        layer_update_ratios(apply_fn, updates["w"], params, jnp.ones((7, 4)))
