"""A column that is fed as several: the wide network on wide inputs is the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnsanity.quantities.columns import one_hot_columns, wave_columns
from nnsanity.tracing.expand import Expansion, expandable, reads_inputs
from nnsanity.tracing.layers import inspect
from nnsanity.tracing.replace import Replacement, replaced
from nnsanity.tracing.widen import widening
from tests.tracing.test_widen import DENSE, IMAGES, Conv, flattened, normal, scanned

CODES = jnp.array([3.0, 7.0, 4.0, 3.0, 9.0, 7.0])
X = normal(6, 5).at[:, 2].set(CODES)
ONE_HOT = jnp.stack([value == CODES for value in (3, 4, 7, 9)], axis=1).astype(float)
WAVES = jnp.stack([jnp.sin(CODES - 3), jnp.cos(CODES - 3)], axis=1) * 2**0.5
COLUMNS = {
    "one-hot": (one_hot_columns(np.array([3.0, 4.0, 7.0, 9.0])), ONE_HOT),
    "waves": (wave_columns(2 * np.pi, start=3.0), WAVES),
}


def without_bias(p, x):
    return jax.nn.relu(x @ p["w1"]) @ p["w2"]


PROGRAMS = {**DENSE, "without bias": (without_bias, DENSE["plain"][1])}


def planned(apply_fn, params, name):
    network = inspect(apply_fn, params, X)
    columns, expected = COLUMNS[name]
    plan = Expansion(expandable(network), 2, expected.shape[1], 0.5, columns)
    wide_inputs = jnp.concatenate([X.at[:, 2].set(0.5), expected], axis=1)
    return network, plan, wide_inputs


def drawn_rows(plan, params):
    """Rows of zeros at first; others here, so that they can be seen."""
    wide = plan.padded(params)
    given, added = plan.split(wide)
    jax.tree.map(np.testing.assert_array_equal, given, params)
    assert not added.any()
    leaves, structure = jax.tree.flatten(wide)
    leaf = leaves[plan.part.leaf]
    leaves[plan.part.leaf] = leaf + jax.random.normal(jax.random.key(0), leaf.shape)
    return jax.tree.unflatten(structure, leaves)


def assert_close(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        found,
        expected,
    )


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_column_is_fed_as_several(name, columns):
    apply_fn, params = PROGRAMS[name]
    network, plan, wide_inputs = planned(apply_fn, params, columns)
    wide = drawn_rows(plan, params)
    squares = lambda outputs: jnp.mean(outputs**2)  # noqa: E731
    run = replaced(apply_fn, network, {}, expanded=plan)
    found = jax.jit(jax.value_and_grad(lambda p: squares(run(p, X))))(wide)
    by_hand = jax.value_and_grad(lambda p: squares(apply_fn(p, wide_inputs)))(wide)
    assert_close(found, by_hand)


def test_beside_other_changes():
    apply_fn, params = PROGRAMS["without bias"]
    network, plan, wide_inputs = planned(apply_fn, params, "one-hot")
    wide = drawn_rows(plan, params)
    leaky = lambda values: jax.nn.leaky_relu(values.before, 0.1)  # noqa: E731
    found = replaced(apply_fn, network, {"w1": Replacement(leaky)}, expanded=plan)
    by_hand = jax.nn.leaky_relu(wide_inputs @ wide["w1"], 0.1) @ wide["w2"]
    assert_close(found(wide, X), by_hand)

    wider = widening(network, network.layers[0], more=3)
    both = wider.padded(wide, lambda part, shape: jnp.ones(shape))
    run = replaced(apply_fn, network, {}, expanded=plan, wider=wider)
    # New units see the user's own columns alone.
    own = jax.nn.relu(wide_inputs @ wide["w1"])
    new = jax.nn.relu(X.at[:, 2].set(0.5) @ jnp.ones((5, 3)))
    expected = jnp.concatenate([own, new], axis=1) @ both["w2"]
    assert_close(run(both, X), expected)


def test_inputs_in_other_units():
    apply_fn, params = PROGRAMS["plain"]
    network, plan, wide_inputs = planned(apply_fn, params, "one-hot")
    wide = drawn_rows(plan, params)
    shift, scale = jnp.arange(5.0), 1 + jnp.arange(5.0)
    run = replaced(apply_fn, network, {}, expanded=plan.in_units(shift[2], scale[2]))
    wide_inputs = wide_inputs.at[:, :5].set((wide_inputs[:, :5] - shift) / scale)
    assert_close(run(wide, (X - shift) / scale), apply_fn(wide, wide_inputs))


def test_the_first_layer_may_read_the_inputs_as_they_are():
    apply_fn, params = PROGRAMS["plain"]
    network, plan, wide_inputs = planned(apply_fn, params, "one-hot")
    assert reads_inputs(network)
    wide = drawn_rows(plan, params)
    run = replaced(apply_fn, network, {}, expanded=plan._replace(mean=None))
    assert_close(run(wide, X), apply_fn(wide, wide_inputs.at[:, 2].set(0)))
    scaled = inspect(lambda p, x: apply_fn(p, x / 2), params, X)
    assert not reads_inputs(scaled)
    assert all(reads_inputs(inspect(*one, X)) for one in DENSE.values())


def looked_up(p, x):
    return p["table"][x[:, 0].astype(int)] @ p["w"]


@pytest.mark.parametrize(
    ("apply_fn", "params", "x"),
    [
        (flattened, {"k": normal(2, 3, 3, 3), "w": normal(72, 4)}, IMAGES),
        (Conv().apply, Conv().init(jax.random.key(0), IMAGES), IMAGES),
        (scanned, {"a": normal(3, 5, 5), "b": normal(5, 3)}, X),
        (looked_up, {"table": normal(10, 4), "w": normal(4, 2)}, X),
        (lambda p, x: (x - p) ** 2, normal(5), X),
    ],
)
def test_what_has_no_dense_layer_first(apply_fn, params, x):
    x = x.transpose(0, 3, 1, 2) if apply_fn is flattened else x
    assert expandable(inspect(apply_fn, params, x)) is None
