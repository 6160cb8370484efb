"""Dead, dormant and saturated units over batches, and what was never seen active."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnsanity as ns
from nnsanity.quantities.dead import firing_bound

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(60, 5)), jnp.float32)
PARAMS = {
    "w1": jnp.asarray(RNG.normal(size=(5, 9)), jnp.float32),
    "b1": jnp.linspace(-8, 2, 9),
    "w2": jnp.asarray(RNG.normal(size=(9, 4)) * 3, jnp.float32),
}


def apply_fn(params, x):
    return jnp.tanh(jax.nn.relu(x @ params["w1"] + params["b1"]) @ params["w2"])


def scanned(params, x):
    turn = lambda h, w: (jax.nn.relu(h @ w - 1), None)  # noqa: E731
    return jax.lax.scan(turn, x, params)[0]


KINDS = {
    "dead": (ns.dead_units, ns.merge_dead_units),
    "dormant": (ns.dormant_units, ns.merge_dormant_units),
    "saturated": (ns.saturated_units, ns.merge_saturated_units),
}
NETWORKS = {
    "mlp": (apply_fn, PARAMS),
    "stack": (scanned, jnp.asarray(RNG.normal(size=(3, 5, 5)), jnp.float32)),
}


def close(left, right):
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert jax.tree.structure(left) == jax.tree.structure(right)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("kind", KINDS)
def test_batches_merge_to_the_whole(kind, network):
    measure, merge = KINDS[kind]
    function, params = NETWORKS[network]
    whole = measure(function, params, X)
    a, b, c = (measure(function, params, rows) for rows in jnp.split(X, [10, 25]))
    close(merge(merge(a, b), c), whole)
    close(merge(a, merge(b, c)), whole)
    close(merge(c, merge(b, a)), whole)
    jitted = jax.jit(merge)(a, b)
    close(merge(jitted, c), whole)


def test_a_unit_that_fires_in_one_batch_is_alive():
    rows = X[(X @ PARAMS["w1"] + PARAMS["b1"])[:, 4] <= 0]
    first = ns.dead_units(apply_fn, PARAMS, rows)
    both = ns.merge_dead_units(first, ns.dead_units(apply_fn, PARAMS, X))
    assert first.dead["w1"][4]
    assert not both.dead["w1"][4]
    assert both.dead["w1"][0]
    assert float(both.fraction["w1"]) == pytest.approx(both.dead["w1"].mean())
    assert both.num_seen["w1"] == len(rows) + 60


def test_the_count_stops_at_the_largest_number():
    found = ns.dead_units(apply_fn, PARAMS, X)
    full = found._replace(num_seen={"w1": jnp.int32(2**31 - 5)})
    assert ns.merge_dead_units(full, found).num_seen["w1"] == 2**31 - 1


@pytest.mark.parametrize("count", [1, 10, 300, 10**6])
def test_a_unit_at_the_bound_stays_silent_once_in_twenty(count):
    bound = np.float64(firing_bound(jnp.int32(count)))
    assert (1 - bound) ** count == pytest.approx(0.05, rel=0.01)


def test_the_bound_of_nothing_seen_is_one_and_positions_count():
    assert firing_bound(jnp.int32(0)) == 1
    found = ns.dead_units(apply_fn, PARAMS, X.reshape(6, 10, 5))
    assert found.num_seen["w1"] == 60
    assert float(found.firing_bound["w1"]) == pytest.approx(3 / 60, rel=0.1)


USERS = {
    "hard sigmoid": (lambda z: jnp.clip(z / 6 + 0.5, 0, 1), -3.0, 3.0),
    "where": (lambda z: jnp.where(z > 0, z, 0), 0.0, np.inf),
    "maximum": (lambda z: jnp.maximum(z, 0.0), 0.0, np.inf),
    "tanh": (jnp.tanh, -2.18, 2.18),
    "inlined gelu": (
        lambda z: 0.5 * z * (1 + jax.lax.erf(z / 2**0.5)),
        -2.5,
        np.inf,
    ),
    "a user's own": (lambda z: jax.nn.sigmoid(2 * z) - 0.5, -2.18, 2.18),
    "leaky": (lambda z: jnp.where(z > 0, z, 0.2 * z), -np.inf, np.inf),
    "snake": (lambda z: z + jnp.sin(z) ** 2, -np.inf, np.inf),
}


@pytest.mark.parametrize("name", USERS)
def test_level_by_what_it_does(name):
    function, low, high = USERS[name]
    network = lambda w, x: function(x @ w)  # noqa: E731
    found = ns.saturated_units(network, jnp.eye(5) * 3, X)
    entering = np.asarray(X) * 3
    expected = ((entering < low) | (entering > high)).mean()
    if np.isinf([low, high]).all():
        assert found.share == {}
        return
    (share,) = found.share.values()
    assert float(share) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("threshold", [0.025, 0.5])
def test_threshold_of_dormant_units(threshold):
    measure = functools.partial(ns.dormant_units, threshold=threshold)
    found = measure(apply_fn, PARAMS, X)
    score = np.asarray(found.score["w1"])
    assert score.mean() == pytest.approx(1, rel=1e-5)
    assert found.dormant["w1"].tolist() == (score <= threshold).tolist()
    again = measure(apply_fn, PARAMS, X[:20])
    assert ns.merge_dormant_units(found, again).threshold == np.float32(threshold)


def test_a_layer_of_zeros_is_dormant():
    zero = PARAMS | {"b1": jnp.full(9, -99.0)}
    assert ns.dormant_units(apply_fn, zero, X).dormant["w1"].all()


def test_what_was_not_looked_into_is_told():
    params = PARAMS | {"unused": jnp.ones(3)}
    for measure, _ in KINDS.values():
        found = measure(apply_fn, params, X)
        assert dict(found.uninspected.parameters) == {"unused": "not used"}
