import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import nnsanity as ns
from nnsanity.trials.compiled import drop_compiled

X = jax.random.normal(jax.random.key(0), (64, 2))
MAPS = Path("/proc/self/maps")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_checkups_of_many_programs_take_no_more_and_more_memory_maps():
    counts = []
    for _ in range(3):

        def apply_fn(params, x):
            return jnp.tanh(x @ params["w"])

        def loss_fn(params, batch, apply_fn=apply_fn):
            return jnp.mean((apply_fn(params, batch[0]) - batch[1]) ** 2)

        ns.checkup(
            apply_fn,
            loss_fn,
            {"w": jnp.ones((2, 1))},
            (X, X[:, :1]),
            key=jax.random.key(1),
            optimizer=optax.sgd(0.1),
            num_steps=5,
            interventions=False,
        )
        counts.append(MAPS.read_text().count("\n"))
    assert counts[2] - counts[1] < 100


def test_functions_that_check_their_arguments_first_forget_as_well():
    ns.outliers(X)
    compiled = ns.outliers.__wrapped__
    assert compiled._cache_size() > 0
    drop_compiled()
    assert compiled._cache_size() == 0
