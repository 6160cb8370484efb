"""Names of leaves, and which of them are numbers."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import nnsanity as ns
from nnsanity._tree import (
    accumulation_dtype,
    in_float32,
    inexact_leaves,
    is_inexact,
    num_examples,
    take_examples,
)


class Pair(NamedTuple):
    kernel: Any
    bias: Any


@chex.dataclass
class Record:
    kernel: Any


NAMES = [
    ({}, ()),
    (None, ()),
    (1.0, ("params",)),
    ({"params": 1.0}, ("params",)),
    ({"b": 1, "a": None, "c": {"d": 2}}, ("b", "c/d")),
    ([(1, 2), (3,)], ("0/0", "0/1", "1/0")),
    (Pair([1, 2], 3), ("kernel/0", "kernel/1", "bias")),
    ({"params": {"Dense_0": Pair(1, 2)}}, ("Dense_0/kernel", "Dense_0/bias")),
    ({"decoder": {"params": 1}}, ("decoder/params",)),
    ({"params": {"params": {"w": 1}}}, ("params/w",)),
    ({"w": {"value": 1}, "valued": 2}, ("valued", "w")),
    (Record(kernel={"x": 1}), ("kernel/x",)),
    ({1: "a", 0: "b"}, ("0", "1")),
]


@pytest.mark.parametrize(("tree", "names"), NAMES)
def test_leaf_names(tree, names):
    assert ns.leaf_names(tree) == names
    assert len(names) == len(jax.tree.leaves(tree))


def test_names_and_leaves_are_in_the_same_order():
    params = {"z": jnp.ones(1), "a": [jnp.ones(2), jnp.ones(3)], "m": jnp.ones(4)}
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    found = dict(zip(ns.leaf_names(params), sizes, strict=True))
    assert found == {"z": 1, "a/0": 2, "a/1": 3, "m": 4}


def test_linen_and_nnx_give_the_same_names():
    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(2, name="head")(linen.Dense(4, name="body")(x))

    class Nnx(nnx.Module):
        def __init__(self):
            self.body = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
            self.head = nnx.Linear(4, 2, rngs=nnx.Rngs(0))

    expected = ("body/bias", "body/kernel", "head/bias", "head/kernel")
    variables = jax.eval_shape(Linen().init, jax.random.key(0), jnp.ones((1, 3)))
    assert ns.leaf_names(variables) == expected
    assert ns.leaf_names(nnx.state(Nnx(), nnx.Param)) == expected


@pytest.mark.parametrize(
    ("leaf", "expected"),
    [
        (1.0, True),
        (1j, True),
        (jnp.ones(2, jnp.bfloat16), True),
        (jnp.ones(2, jnp.complex64), True),
        (np.ones(2), True),
        (jax.ShapeDtypeStruct((2,), jnp.float16), True),
        (1, False),
        (True, False),
        (jnp.ones(2, int), False),
        (np.zeros(2, bool), False),
        (jax.random.key(0), False),
        ("text", False),
    ],
)
def test_is_inexact(leaf, expected):
    assert is_inexact(leaf) == expected
    assert len(inexact_leaves({"a": leaf, "none": None})) == expected


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((jnp.bfloat16,), "float32"),
        ((jnp.float16, jnp.bfloat16), "float32"),
        ((jnp.uint8,), "float32"),
        ((jnp.bool_,), "float32"),
        ((jnp.int32, jnp.float32), "float32"),
        ((jnp.float16, jnp.float64), "float64"),
    ],
)
def test_sums_are_in_float32_or_more(dtypes, expected):
    with jax.enable_x64(True):
        arrays = [jnp.ones(2, dtype) for dtype in dtypes]
        assert accumulation_dtype(*arrays) == expected
        if len(arrays) == 1:
            assert in_float32(arrays[0]).dtype == expected


def test_a_long_sum_in_half_precision():
    ones = jnp.ones(4096, jnp.bfloat16)
    assert float(jnp.sum(in_float32(ones) + 1 / 256)) == 4096 + 16
    assert float(jnp.sum(ones + 1 / 256)) == 4096


def test_examples_of_a_tree():
    data = (jnp.arange(12.0).reshape(6, 2), {"y": np.arange(6)})
    assert num_examples(data) == 6
    rows = np.array([4, 0])
    inputs, targets = take_examples(data, rows)
    np.testing.assert_array_equal(inputs, [[8, 9], [0, 1]])
    assert targets["y"].tolist() == [4, 0]
    assert take_examples(data, slice(1, 3))[1]["y"].tolist() == [1, 2]
