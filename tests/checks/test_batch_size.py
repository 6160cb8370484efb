import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnsanity.checks import batch_size
from nnsanity.checks.batch_size import (
    example_gradient_norms,
    gradient_noise_scale,
    suspected,
    wrong_size,
)

PARAMS = {"w": jnp.array([[1.0, -2.0], [0.5, 1.0]]), "b": jnp.array([0.5, -0.5])}
INPUTS = jnp.asarray(np.random.default_rng(0).normal(1, 1, (14, 2)), jnp.float32)


def mean_loss(params, x):
    return jnp.mean(jnp.sum((x @ params["w"] + params["b"]) ** 2, -1))


@pytest.mark.parametrize(
    ("batch_size", "num_examples", "expected"),
    [
        (32, 1000, False),
        (32, 32, False),
        (3, 1000, False),
        (33, 1000, False),
        (249, 1000, False),
        (250, 1000, True),
        (1000, 1000, True),
        (64, 100, True),
        (2, 1000, True),
        (1, 1000, True),
        (1, 32, False),
        (1, 1, False),
    ],
)
def test_suspected(batch_size, num_examples, expected):
    assert suspected(batch_size, num_examples) is expected


@pytest.mark.parametrize(
    ("batch_size", "rule"), [(1, "too-small"), (2, "too-small"), (512, "too-large")]
)
def test_wrong_size(batch_size, rule):
    found = wrong_size(batch_size, 1000)
    assert (found.rule, found.item) == (f"batch-size/{rule}", 5)
    assert (found.severity, found.where) == ("info", "batch_size")
    assert (found.measured, found.limit) == (batch_size, 32)
    assert str(batch_size) in found.message


MEASURES = {
    "norms": example_gradient_norms,
    "exact": gradient_noise_scale,
    "microbatches": lambda *a: gradient_noise_scale(*a, num_microbatches=7),
}


@pytest.mark.parametrize("name", MEASURES)
def test_jit_vmap_and_no_callback(name):
    def measure(params):
        return MEASURES[name](mean_loss, params, INPUTS)

    eager, compiled = measure(PARAMS), jax.jit(measure)
    np.testing.assert_allclose(compiled(PARAMS), eager, 1e-5)
    other = jax.tree.map(lambda leaf: leaf * jnp.array([0.5, 1.0]), PARAMS)
    stacked = jax.tree.map(lambda *v: jnp.stack(v), PARAMS, other)
    found = np.asarray(jax.vmap(measure)(stacked))
    first, second = found if name == "norms" else found.T
    np.testing.assert_allclose(first, eager, 1e-4)
    np.testing.assert_allclose(second, compiled(other), 1e-4)
    assert np.all(first != second)
    assert "callback" not in str(jax.make_jaxpr(measure)(PARAMS))


@pytest.mark.parametrize("name", MEASURES)
def test_one_trace_of_the_loss_for_repeated_calls(name, monkeypatch):
    monkeypatch.setattr(batch_size, "MAX_COPIES", 5)
    traces = []

    def loss_fn(params, x):
        traces.append(x.shape)
        return mean_loss(params, x)

    for scale in (1, 2, 3):
        MEASURES[name](loss_fn, PARAMS, scale * INPUTS)
    assert traces == [(2 if name == "microbatches" else 1, 2)]


def test_the_error_bar_costs_nothing_where_it_is_not_used():
    def square_norm(params, x):
        return gradient_noise_scale(mean_loss, params, x).gradient_square_norm

    def compiled(measure):
        return jax.jit(measure).lower(PARAMS, jnp.ones((300, 2))).compile().as_text()

    whole = compiled(lambda p, x: gradient_noise_scale(mean_loss, p, x))
    assert compiled(square_norm).count(" while(") == 1
    assert whole.count(" while(") == 2


def unequal(params, x):
    return jnp.sum(x, -1) * params["b"][0]


@pytest.mark.parametrize(
    ("loss_fn", "params", "batch", "error", "words"),
    [
        (unequal, PARAMS, INPUTS, ValueError, r"float32\[1\]; did you forget a mean"),
        (
            lambda p, x: (mean_loss(p, x), x),
            PARAMS,
            INPUTS,
            ValueError,
            "got tuple; .*aux",
        ),
        (lambda p, x: jnp.argmax(x), PARAMS, INPUTS, ValueError, r"got int32\[\]"),
        (lambda p, x: None, PARAMS, INPUTS, ValueError, "got NoneType"),
        (mean_loss, {"n": np.arange(3), "o": None}, INPUTS, ValueError, "got none"),
        (
            mean_loss,
            PARAMS,
            {"x": INPUTS, "rate": 0.5},
            ValueError,
            "batch/rate.*scalar",
        ),
        (mean_loss, PARAMS, [1.0, 2.0], ValueError, "leading axis.*a scalar"),
        (mean_loss, PARAMS, (INPUTS, INPUTS[1:]), ValueError, r"\(14, 2\).*\(13, 2\)"),
        (mean_loss, PARAMS, INPUTS[:0], ValueError, r"at least 1.*\(0, 2\)"),
        (mean_loss, PARAMS, None, ValueError, r"got \{\}"),
        (mean_loss, PARAMS, {"x": "text"}, TypeError, "got str at batch/x"),
        (mean_loss, PARAMS, np.array(["a", "b"]), TypeError, "got ndarray at batch;"),
    ],
)
def test_mistakes_are_named(loss_fn, params, batch, error, words):
    for measure in (example_gradient_norms, gradient_noise_scale):
        with pytest.raises(error, match=f"^{measure.__name__}: .*{words}"):
            measure(loss_fn, params, batch)


@pytest.mark.parametrize(
    ("count", "error", "words"),
    [
        (4, ValueError, "=4, .*at least 2 and divide the 14 examples"),
        (28, ValueError, "=28, .*divide the 14 examples"),
        (1, ValueError, "=1, .*at least 2"),
        (0, ValueError, "=0, .*at least 2"),
        (-2, ValueError, "=-2, .*at least 2"),
        (2.0, TypeError, "=2.0, .*must be None or an int"),
        (True, TypeError, "=True, .*must be None or an int"),
        (jnp.array(2), TypeError, "is it an array"),
    ],
)
def test_number_of_microbatches(count, error, words):
    with pytest.raises(error, match=f"^gradient_noise_scale: .*{words}"):
        gradient_noise_scale(mean_loss, PARAMS, INPUTS, num_microbatches=count)


@pytest.mark.parametrize("count", [None, 1, 2])
def test_one_example_has_no_noise_scale(count):
    with pytest.raises(ValueError, match=r"^gradient_noise_scale: .*one example"):
        gradient_noise_scale(mean_loss, PARAMS, INPUTS[:1], num_microbatches=count)


SHARDED = """
    import json
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
    from nnsanity.checks.batch_size import example_gradient_norms, gradient_noise_scale

    random = np.random.default_rng(0)
    params = {"w": random.normal(size=(8, 16)), "v": random.normal(size=(16, 4))}
    params = {name: leaf.astype("f4") for name, leaf in params.items()}
    inputs = random.normal(size=(64, 8)).astype("f4")
    mesh = Mesh(np.array(jax.devices()), "d", axis_types=(AxisType.Auto,))

    def loss_fn(params, x):
        return jnp.mean(jnp.sum((jax.nn.gelu(x @ params["w"]) @ params["v"]) ** 2, -1))

    def measure(params, x):
        exact = gradient_noise_scale(loss_fn, params, x)
        parts = gradient_noise_scale(loss_fn, params, x, num_microbatches=8)
        return example_gradient_norms(loss_fn, params, x), exact, parts

    def run(of_params, of_inputs):
        put = lambda tree, spec: jax.device_put(
            tree, NamedSharding(mesh, PartitionSpec(*spec))
        )
        found = jax.jit(measure)(put(params, of_params), put(inputs, of_inputs))
        leaves = [np.ravel(leaf) for leaf in jax.tree.leaves(found)]
        return np.concatenate(leaves).tolist()

    specs = [([], []), ([], ["d"]), (["d"], [])]
    print(json.dumps([len(jax.devices()), *(run(*spec) for spec in specs)]))
"""


def test_sharded_equals_unsharded():
    root = Path(batch_size.__file__).parents[2]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    flags |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SHARDED)],
        env=os.environ | flags,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    num_devices, whole, *sharded = json.loads(run.stdout)
    assert (num_devices, len(whole), len(sharded)) == (4, 64 + 4 + 4, 2)
    for one in sharded:
        np.testing.assert_allclose(one, whole, 1e-3)
