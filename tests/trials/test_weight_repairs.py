"""When fresh weights confirm that units start alike."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nnsanity.trials.problem import checked_problem
from nnsanity.trials.repairs import available_repairs

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 2)).astype(np.float32)
Y = X[:, :1] * X[:, 1:]
W = np.float32(RNG.normal(size=(2, 40)))
NEARLY = W[:, :20] * (1 + np.float32(1e-4) * RNG.normal(size=(2, 20)))
LAST = jnp.ones((40, 1)) / 40


def apply_fn(params, x):
    return jax.nn.relu(x @ params[0]) @ params[1]


def loss_fn(params, batch):
    return jnp.mean((apply_fn(params, batch[0]) - batch[1]) ** 2)


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        (W, False),
        (np.c_[W[:, :20], W[:, :20]], True),
        (np.c_[W[:, :20], NEARLY].astype(np.float32), False),
        (np.c_[W[:, :38], W[:, :2]], False),  # a twentieth
    ],
)
def test_units_that_start_alike(first, expected):
    problem = checked_problem(
        apply_fn,
        loss_fn,
        [jnp.asarray(first), LAST],
        (X, Y),
        key=jax.random.key(0),
        optimizer=optax.sgd(0.1),
        batch_size=16,
        num_steps=10,
    )
    (fresh,) = (one for one in available_repairs(problem) if one.group == "weights")
    assert ("width/redundant" in fresh.rules) is expected
