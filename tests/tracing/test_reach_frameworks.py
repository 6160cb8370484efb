"""The same faults in the styles of several libraries, and what every caller may do."""

import inspect

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx
from jax import lax

from nnsanity.tracing.reach import reach

INPUTS = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)
LABELS = jnp.array([0, 1, 2, 0])
PARAMS = {"first": jnp.ones((3, 5)), "second": jnp.ones((5, 3))}


def squared(outputs):
    return jnp.mean((outputs - jax.nn.one_hot(LABELS, 3)) ** 2)


def verdicts(found):
    return dict(zip(found.names, found.differentiable, strict=True))


def line_of(function, text):
    """The only line of a function in which a text stands."""
    lines, start = inspect.getsourcelines(function)
    (at,) = [index for index, line in enumerate(lines) if text in line]
    return f"test_reach_frameworks.py:{start + at}"


def places(cuts):
    """Operations and lines, without the names of the functions around them."""
    return [(cut.operation, cut.where.split(" ")[0]) for cut in cuts]


class Linen(linen.Module):
    """Dense, norm, dropout; rounds its hidden layer on demand."""

    rounds: bool

    @linen.compact
    def __call__(self, inputs):
        hidden = linen.Dense(5)(inputs)
        if self.rounds:
            hidden = jnp.round(hidden)  # linen
        hidden = linen.BatchNorm(use_running_average=False)(hidden)
        hidden = linen.Dropout(0.5, deterministic=False)(linen.gelu(hidden))
        return linen.Dense(3)(hidden)


@pytest.mark.parametrize("rounds", [True, False])
def test_linen(rounds):
    model = Linen(rounds)
    key = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = model.init(key, INPUTS)

    def loss_fn(params, batch):
        every = {**variables, "params": params}
        outputs, _ = model.apply(every, batch, rngs=key, mutable=["batch_stats"])
        return squared(outputs)

    found = reach(loss_fn, variables["params"], INPUTS)
    blocked = {name for name, passes in verdicts(found).items() if not passes}
    assert blocked == ({"Dense_0/bias", "Dense_0/kernel"} if rounds else set())
    cuts = {("round", line_of(Linen, "# linen"))} if rounds else set()
    assert set(places(sum(found.cuts, ()))) == cuts


class Nnx(nnx.Module):
    """Two linear maps around a norm; takes a sign on demand."""

    def __init__(self, signs, rngs):
        self.first = nnx.Linear(3, 5, rngs=rngs)
        self.norm = nnx.LayerNorm(5, rngs=rngs)
        self.second = nnx.Linear(5, 3, rngs=rngs)
        self.signs = signs

    def __call__(self, inputs):
        hidden = self.norm(self.first(inputs))
        hidden = jnp.sign(hidden) if self.signs else nnx.silu(hidden)  # nnx
        return self.second(hidden)


@pytest.mark.parametrize("signs", [True, False])
def test_nnx(signs):
    graphdef, params = nnx.split(Nnx(signs, nnx.Rngs(0)), nnx.Param)

    def loss_fn(params, batch):
        return squared(nnx.merge(graphdef, params, copy=True)(batch))

    found = verdicts(reach(loss_fn, params, INPUTS))
    assert found["second/kernel"]
    assert found["first/kernel"] is not signs
    assert found["norm/scale"] is not signs


@pytest.mark.parametrize("detach", [True, False])
def test_equinox(detach):
    eqx = pytest.importorskip("equinox")
    trunk, head = (
        eqx.nn.Linear(*size, key=jax.random.key(0)) for size in ((3, 5), (5, 3))
    )
    params, static = eqx.partition((trunk, head), eqx.is_inexact_array)

    @eqx.filter_jit
    def loss_fn(params, batch):
        trunk, head = eqx.combine(params, static)
        hidden = jax.nn.relu(jax.vmap(trunk)(batch))
        if detach:
            hidden = lax.stop_gradient(hidden)  # equinox
        return squared(jax.vmap(head)(hidden))

    found = reach(loss_fn, params, INPUTS)
    assert found.differentiable == (not detach, not detach, True, True)
    where = line_of(loss_fn.__wrapped__, "# equinox")
    cuts = {("stop_gradient", where)} if detach else set()
    assert set(places(sum(found.cuts, ()))) == cuts


def test_shard_map():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec()

    def loss_fn(params, batch):
        hidden = jax.shard_map(
            lambda x: jnp.round(x), mesh=mesh, in_specs=spec, out_specs=spec
        )(batch @ params["first"])
        return squared(hidden @ params["second"])

    assert reach(loss_fn, PARAMS, INPUTS).differentiable == (False, True)


def rounds_hidden(params, batch):
    hidden = jnp.round(batch @ params["first"])
    return squared(hidden @ params["second"])


def test_shapes_suffice_and_other_leaves_are_passed_over():
    params = {**PARAMS, "steps": jnp.array(3), "nothing": None}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    inputs = jax.ShapeDtypeStruct(INPUTS.shape, INPUTS.dtype)
    found = reach(rounds_hidden, shapes, inputs)
    assert found == reach(rounds_hidden, params, INPUTS)
    assert found.names == ("first", "second")


def test_wants_a_scalar():
    with pytest.raises(ValueError, match=r"float32\[4\]; did you forget a mean"):
        reach(lambda params, batch: batch @ params, jnp.ones(3), INPUTS)
    with pytest.raises(ValueError, match="tree of 2 arrays"):
        reach(lambda params, batch: (params, batch), 1.0, 2.0)


def test_sixty_four_layers():
    def loss_fn(params, batch):
        for weights in params:
            batch = jax.nn.softmax(jnp.round(batch) + jnp.tanh(batch @ weights))
        return jnp.sum(batch)

    params = [jax.ShapeDtypeStruct((3, 3), jnp.float32)] * 64
    assert all(reach(loss_fn, params, INPUTS).differentiable)
