import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnsanity as ns

# Names that are not in the order of execution, and one that no layer uses.
PARAMS = {"z": jnp.array([[1.0, -1.0]]), "a": jnp.array([[1.0], [2.0]]), "b": 1.0}
X = jnp.array([[2.0], [-3.0]])
EXPECTED = {"z": [[2.0, 0.0], [0.0, 3.0]], "a": [[2.0], [6.0]]}


def apply_fn(params, x):
    return jax.nn.relu(x @ params["z"]) @ params["a"]


def assert_right(found):
    assert list(found) == list(EXPECTED)
    for name, values in EXPECTED.items():
        np.testing.assert_array_equal(found[name], values)
    assert found.uninspected.parameters == (("b", "not used"),)


WAYS = {
    "as it is": lambda fn: fn(PARAMS, X),
    "jit": lambda fn: jax.jit(fn)(PARAMS, X),
    "vmap": lambda fn: jax.tree.map(
        lambda one: one[0], jax.vmap(fn, (None, 0))(PARAMS, X[None])
    ),
    "scan": lambda fn: jax.tree.map(
        lambda one: one[0],
        jax.lax.scan(lambda _, x: (None, fn(PARAMS, x)), None, X[None])[1],
    ),
    "device_get": lambda fn: jax.device_get(fn(PARAMS, X)),
    "a copy": lambda fn: copy.deepcopy(fn(PARAMS, X)),
    "a pickle": lambda fn: pickle.loads(pickle.dumps(jax.device_get(fn(PARAMS, X)))),
}


@pytest.mark.parametrize("way", WAYS)
def test_in_the_order_of_execution_with_what_was_left_out(way):
    assert_right(WAYS[way](lambda params, x: ns.activations(apply_fn, params, x)))


def test_it_is_a_dictionary():
    found = ns.activations(apply_fn, PARAMS, X)
    assert isinstance(found, dict)
    paths = [
        jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(found)
    ]
    assert paths == ["['z']", "['a']"]
