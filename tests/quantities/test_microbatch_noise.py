import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnsanity as ns
from nnsanity.quantities.microbatch_noise import microbatch_noise_scale
from tests.devices import printed_with_devices

RNG = np.random.default_rng(0)
COUNT, SIZE = 6, 4
GRADS = {
    "w": np.float32(1 + RNG.normal(size=(COUNT, 3, 2))),
    "b": np.float32(RNG.normal(size=(COUNT, 5))),
}
ROWS = np.concatenate([GRADS["b"], GRADS["w"].reshape(COUNT, -1)], 1).astype("f8")


def estimates(rows):
    """Square norm and trace, float64, in the words of McCandlish et al., A.1."""
    small, big = np.mean(np.sum(rows**2, 1)), np.sum(np.mean(rows, 0) ** 2)
    total = SIZE * len(rows)
    square_norm = (total * big - SIZE * small) / (total - SIZE)
    return np.array([square_norm, (small - big) / (1 / SIZE - 1 / total)])


def expected(rows):
    """All four fields; the error leaves out each microbatch in turn."""
    square_norm, trace = estimates(rows)
    count = len(rows)
    without = [estimates(np.delete(rows, i, 0)) for i in range(count)]
    covariance = (count - 1) ** 2 / count * np.cov(np.array(without).T)
    slope = np.array([-trace / square_norm**2, 1 / square_norm])
    error = np.sqrt(slope @ covariance @ slope)
    return np.array([trace / square_norm, square_norm, trace, error])


def test_a_stack_by_hand():
    found = microbatch_noise_scale(GRADS, microbatch_size=SIZE)
    assert all(one.dtype == jnp.float32 and one.shape == () for one in found)
    np.testing.assert_allclose(found, expected(ROWS), 1e-4)
    found = jax.jit(microbatch_noise_scale)(GRADS, microbatch_size=jnp.int32(SIZE))
    np.testing.assert_allclose(found, expected(ROWS), 1e-4)


def test_what_accumulation_gives_is_what_is_measured():
    params = {"w": jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32)}
    x = jnp.asarray(RNG.normal(size=(24, 3)) + 1, jnp.float32)

    def loss_fn(params, x):
        return jnp.mean(jnp.sum(jnp.tanh(x @ params["w"]), -1))

    def accumulate(_, part):
        return None, jax.grad(loss_fn)(params, part)

    _, grads = jax.lax.scan(accumulate, None, x.reshape(6, 4, 3))
    found = microbatch_noise_scale(grads, microbatch_size=4)
    measured = ns.gradient_noise_scale(loss_fn, params, x, num_microbatches=6)
    np.testing.assert_allclose(found, measured, 1e-4)


@pytest.mark.parametrize("mean", [0.0, 0.3, 2.0])
def test_unbiased_over_200_draws(mean):
    """Microbatches of 8 standard normal gradients around a mean, of 10 numbers."""
    noise = RNG.normal(size=(200, 5, 10)) / np.sqrt(8)
    found = jax.vmap(lambda g: microbatch_noise_scale({"w": g}, microbatch_size=8))(
        jnp.asarray(mean + noise, jnp.float32)
    )
    for values, truth in ((found[1], 10 * mean**2), (found[2], 10.0)):
        values = np.asarray(values, "f8")
        assert abs(values.mean() - truth) < 4 * values.std() / np.sqrt(200)
    is_lost = np.asarray(found.gradient_square_norm) <= 0
    assert is_lost.any() == (mean == 0)
    np.testing.assert_array_equal(np.isinf(found.noise_scale), is_lost)
    assert np.all(np.asarray(found.noise_scale) >= 0)


def test_two_microbatches_have_no_error_bar():
    found = microbatch_noise_scale(jnp.array([[2.0], [4.0]]), microbatch_size=1)
    np.testing.assert_allclose(found, (0.25, 8, 2, np.inf), 1e-6)
    found = microbatch_noise_scale(jnp.zeros((4, 2)), microbatch_size=9)
    np.testing.assert_array_equal(found, (np.inf, 0, 0, np.inf))
    found = microbatch_noise_scale(jnp.full((4, 2), jnp.nan), microbatch_size=9)
    assert np.isnan(found).all()


def test_other_leaves_and_dtypes():
    mixed = {
        "half": jnp.asarray(GRADS["w"], jnp.bfloat16),
        "complex": jnp.asarray(GRADS["b"] * (3 + 4j), jnp.complex64),
        "none": None,
        "steps": jnp.arange(3),
    }
    with jax.numpy_dtype_promotion("strict"):
        found = microbatch_noise_scale(mixed, microbatch_size=SIZE)
    half = np.asarray(mixed["half"], "f8").reshape(COUNT, -1)
    rows = np.concatenate([5 * GRADS["b"].astype("f8"), half], 1)
    np.testing.assert_allclose(found, expected(rows), 1e-4)


@pytest.mark.parametrize(
    ("grads", "options", "words"),
    [
        ({}, {}, "grads has no floating-point leaves"),
        ({"n": jnp.arange(3)}, {}, "grads has no floating-point leaves"),
        ({"w": jnp.ones(())}, {}, r"leading axis of at least 2 .*\[\(\)\]"),
        ({"w": jnp.ones((1, 3))}, {}, r"leading axis .*\(1, 3\).*axis_name"),
        ([jnp.ones((2, 3)), jnp.ones((3, 3))], {}, r"same leading axis.*\(2, 3\)"),
        (GRADS, {"microbatch_size": 0}, "microbatch_size must be .*got 0"),
        (GRADS, {"microbatch_size": np.nan}, "microbatch_size must be .*got nan"),
        (GRADS, {"microbatch_size": jnp.ones(6)}, "microbatch_size must be the number"),
    ],
)
def test_mistakes(grads, options, words):
    with pytest.raises(ValueError, match=f"^microbatch_noise_scale: .*{words}"):
        microbatch_noise_scale(grads, **{"microbatch_size": SIZE} | options)


@pytest.mark.parametrize("count", [1, 6])
def test_an_axis_of_vmap(count):
    def measure(grads):
        return microbatch_noise_scale(grads, microbatch_size=SIZE, axis_name="batch")

    grads = jax.tree.map(lambda leaf: leaf[:count], GRADS)
    if count == 1:
        with pytest.raises(ValueError, match="at least 2 devices along 'batch', got 1"):
            jax.vmap(measure, axis_name="batch")(grads)
        return
    found = np.asarray(jax.vmap(measure, axis_name="batch")(grads))
    np.testing.assert_allclose(found, np.tile(expected(ROWS)[:, None], 6), 1e-4)


SHARDED = """
    import json
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import PartitionSpec as P
    import nnsanity as ns

    random = np.random.default_rng(0)
    params = {"w": random.normal(size=(3, 4)).astype("f4"), "unused": jnp.ones(2)}
    x = (1 + random.normal(size=(32, 3))).astype("f4")

    def loss_fn(params, x):
        return jnp.mean(jnp.sum(jnp.tanh(x @ params["w"]), -1))

    def of_devices(axis_name, is_checked, params, x):
        if is_checked:
            cast = getattr(jax.lax, "pcast", None)
            varying = lambda leaf: (
                cast(leaf, axis_name, to="varying")
                if cast else jax.lax.pvary(leaf, axis_name)
            )
            params = jax.tree.map(varying, params)
        grads = jax.grad(loss_fn)(params, x)
        return ns.microbatch_noise_scale(
            grads, microbatch_size=len(x), axis_name=axis_name
        )

    def run(kind, axis_name, is_checked):
        shape, names = ((8,), ("d",)) if axis_name == "d" else ((2, 4), ("a", "b"))
        mesh = jax.make_mesh(shape, names, axis_types=(kind,) * len(names))
        sharded = jax.shard_map(
            lambda params, x: of_devices(axis_name, is_checked, params, x),
            mesh=mesh,
            in_specs=(P(), P(axis_name)),
            out_specs=P(),
            check_vma=is_checked,
        )
        placed = [
            jax.device_put(tree, jax.NamedSharding(mesh, spec))
            for tree, spec in ((params, P()), (x, P(axis_name)))
        ]
        with jax.set_mesh(mesh):
            return np.asarray(jax.jit(sharded)(*placed)).tolist()

    Auto, Explicit = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit
    cases = [(Auto, "d", True), (Explicit, "d", True), (Auto, ("a", "b"), True)]
    found = [run(*case) for case in [*cases, (Auto, "d", False)]]
    whole = ns.gradient_noise_scale(loss_fn, params, x, num_microbatches=8)
    try:
        mesh = jax.make_mesh((8,), ("d",), axis_types=(Auto,))
        jax.jit(jax.shard_map(
            lambda p, x: ns.microbatch_noise_scale(
                jax.grad(loss_fn)(p, x), microbatch_size=4, axis_name="d"
            ),
            mesh=mesh, in_specs=(P(), P("d")), out_specs=P(),
        ))(params, x)
        words = "nothing was raised"
    except ValueError as error:
        words = str(error)
    print(json.dumps([np.asarray(whole).tolist(), found, words]))
"""


def test_devices_are_microbatches():
    whole, found, words = printed_with_devices(SHARDED, 8)
    assert len(found) == 4
    for one in found:
        np.testing.assert_allclose(one, whole, 1e-3)
    assert "same all along 'd', so they are summed" in words
