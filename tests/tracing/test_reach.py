"""Faulty and healthy programs by pairs, and JAX itself as the oracle of the table."""

import inspect
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax

from nnsanity.tracing.reach import FLAT, reach

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
    return f"test_reach.py:{start + at}"


def places(cuts):
    """Operations and lines, without the names of the functions around them."""
    return [(cut.operation, cut.where.split(" ")[0]) for cut in cuts]


# Faulty: the first layer gets no gradient, the second does.


def rounded(params, batch):
    hidden = jax.nn.relu(batch @ params["first"])
    hidden = jnp.round(hidden)  # here: round
    return squared(hidden @ params["second"])


def signed(params, batch):
    hidden = jnp.sign(batch @ params["first"])  # here: sign
    return squared(hidden @ params["second"])


def detached(params, batch):
    trunk = jnp.tanh(batch @ params["first"])
    trunk = lax.stop_gradient(trunk)  # here: stop_gradient
    return squared(trunk @ params["second"])


def cast(params, batch):
    hidden = (batch @ params["first"]).astype(jnp.int32)  # here: convert_element_type
    return squared(hidden.astype(jnp.float32) @ params["second"])


def hard_choice(params, batch):
    probabilities = jax.nn.softmax(batch @ params["first"])
    choice = jnp.argmax(probabilities, axis=-1)  # here: argmax
    return squared(jax.nn.one_hot(choice, 5) @ params["second"])


def stepped(params, batch):
    open_gate = batch @ params["first"] > 0  # here: gt
    return squared(jnp.where(open_gate, 1.0, 0.0) @ params["second"])


def looked_up(params, batch):
    scores = (batch @ params["first"]).sum(-1)
    order = jnp.argsort(scores)  # here: sort
    return squared(params["second"][order])


def sorted_beside(params, batch):
    scores = (batch @ params["first"]).sum(-1)
    rows = lax.sort((scores, batch[:, 0]), num_keys=1)[1]  # here: sort
    return squared(rows[:, None] * params["second"][0])


def in_jit(params, batch):
    @jax.jit
    def quantize(values):
        return jnp.floor(values * 8) / 8

    return squared(quantize(batch @ params["first"]) @ params["second"])


def in_remat(params, batch):
    @jax.checkpoint
    def layer(inputs):
        return jnp.ceil(inputs @ params["first"])  # here: ceil

    return squared(layer(batch) @ params["second"])


def in_scan(params, batch):
    def step(state, row):
        state = jnp.round(state + row @ params["first"])
        return state, state

    _, states = lax.scan(step, jnp.zeros(5), batch)
    return squared(states @ params["second"])


def in_nested_scan(params, batch):
    def outer(state, row):
        def inner(state, gate):
            return state + gate * jnp.floor(row @ params["first"]), gate

        return lax.scan(inner, state, jnp.ones(2))

    state, _ = lax.scan(outer, jnp.zeros(5), batch)
    return squared((state @ params["second"])[None])


def in_carry_of_the_step_before(params, batch):
    def step(carry, row):
        first, second = carry
        return (row @ params["first"], jnp.round(first)), second

    _, states = lax.scan(step, (jnp.zeros(5), jnp.zeros(5)), batch)
    return squared(states @ params["second"])


def in_cond(params, batch):
    hidden = batch @ params["first"]
    hidden = lax.cond(
        batch[0, 0] > 0,
        lambda x: jnp.round(x),
        lambda x: jnp.zeros_like(x),
        hidden,
    )
    return squared(hidden @ params["second"])


def in_predicate(params, batch):
    score = jnp.sum(batch @ params["first"]) > 0  # here: gt
    outputs = lax.cond(score, lambda x: x, lambda x: 2 * x, params["second"])
    return squared(batch[:, :1] * outputs[0])


def in_while_test(params, batch):
    limit = jnp.sum(batch @ params["first"])
    size = lax.while_loop(
        lambda size: size < limit,  # here: lt
        lambda size: 2 * size,
        1.0,
    )
    return squared(size * batch[:, :1] * params["second"][0])


def in_vmap(params, batch):
    def example(row):
        return jnp.round(row @ params["first"]) @ params["second"]

    return squared(jax.vmap(example)(batch))


FAULTY = [
    rounded, signed, detached, cast, hard_choice, stepped, looked_up, sorted_beside,
    in_jit, in_remat, in_scan, in_nested_scan, in_carry_of_the_step_before, in_cond,
    in_predicate, in_while_test, in_vmap,
]  # fmt: skip


@pytest.mark.parametrize("loss_fn", FAULTY)
def test_alarms_where_every_path_is_cut(loss_fn):
    found = reach(loss_fn, PARAMS, INPUTS)
    assert found.connected == (True, True)
    assert verdicts(found) == {"first": False, "second": True}
    assert found.cuts[0]
    assert found.cuts[1] == ()


@pytest.mark.parametrize("loss_fn", [f for f in FAULTY if f is not in_while_test])
def test_the_gradient_agrees(loss_fn):
    grads = jax.grad(loss_fn)(PARAMS, INPUTS)
    assert not np.any(grads["first"])


@pytest.mark.parametrize(
    "loss_fn", [f for f in FAULTY if "# here: " in inspect.getsource(f)]
)
def test_names_the_operation_and_the_users_line(loss_fn):
    mark = "# here: "
    operation = inspect.getsource(loss_fn).split(mark)[1].split("\n")[0]
    cuts = reach(loss_fn, PARAMS, INPUTS).cuts[0]
    assert places(cuts) == [(operation, line_of(loss_fn, mark))]


def test_names_the_line_inside_the_users_own_jitted_function():
    (cuts, _) = reach(in_jit, PARAMS, INPUTS).cuts
    assert places(cuts) == [("floor", line_of(in_jit, "jnp.floor"))]
    assert cuts[0].where.endswith("quantize)")


def test_names_the_line_of_each_call_of_a_function_that_is_traced_once():
    def loss_fn(params, batch):
        first = jnp.round(batch @ params["first"])
        second = jnp.round(batch @ params["second"])
        return jnp.sum(first * second)

    params = {"first": jnp.ones((3, 5)), "second": jnp.ones((3, 5))}
    first, second = reach(loss_fn, params, INPUTS).cuts
    assert places(first) == [("round", line_of(loss_fn, "first = "))]
    assert places(second) == [("round", line_of(loss_fn, "second = "))]


# Healthy: every parameter has a path.


def softmax(params, batch):
    hidden = jax.nn.softmax(batch @ params["first"])
    return -jnp.mean(jax.nn.log_softmax(hidden @ params["second"])[:, 0])


def batch_norm_by_hand(params, batch):
    hidden = batch @ params["first"]
    mean, variance = lax.stop_gradient((hidden.mean(0), hidden.var(0)))
    return squared((hidden - mean) * lax.rsqrt(variance + 1e-5) @ params["second"])


def straight_through(params, batch):
    hidden = batch @ params["first"]
    hidden = hidden + lax.stop_gradient(jnp.round(hidden) - hidden)
    return squared(hidden @ params["second"])


@jax.custom_jvp
def soft_round(values):
    return jnp.round(values)


soft_round.defjvps(lambda tangent, _, __: tangent)


@jax.custom_vjp
def soft_sign(values):
    return jnp.sign(values)


soft_sign.defvjp(lambda values: (jnp.sign(values), None), lambda _, grads: (grads,))


def custom_jvp(params, batch):
    return squared(soft_round(batch @ params["first"]) @ params["second"])


def custom_vjp(params, batch):
    return squared(soft_sign(batch @ params["first"]) @ params["second"])


def gumbel_straight_through(params, batch):
    logits = batch @ params["first"]
    noise = jax.random.gumbel(jax.random.key(0), logits.shape)
    soft = jax.nn.softmax(logits + noise)
    hard = jax.nn.one_hot(jnp.argmax(soft, -1), 5)
    return squared((soft + lax.stop_gradient(hard - soft)) @ params["second"])


def vector_quantized(params, batch):
    latent, codes = batch @ params["first"], params["second"].T
    distances = jnp.sum((latent[:, None] - codes[None]) ** 2, -1)
    nearest = codes[jnp.argmin(distances, -1)]
    passed = latent + lax.stop_gradient(nearest - latent)
    codebook = jnp.mean((lax.stop_gradient(latent) - nearest) ** 2)
    commitment = jnp.mean((latent - lax.stop_gradient(nearest)) ** 2)
    return jnp.mean(passed**2) + codebook + commitment


def mixture_of_experts(params, batch):
    gates, chosen = lax.top_k(jax.nn.softmax(batch @ params["first"]), 2)
    experts = params["second"][chosen]
    return squared(jnp.sum(gates[..., None] * experts, 1))


def masked(params, batch):
    hidden = batch @ params["first"]
    hidden = jnp.where(hidden > 0, hidden, 0.1 * hidden)
    keep = jax.random.bernoulli(jax.random.key(0), 0.9, hidden.shape)
    hidden = jnp.where(keep, hidden / 0.9, 0.0)
    return squared(jnp.clip(hidden, -1.0, 1.0) @ params["second"])


def clipped(params, batch):
    hidden = jnp.maximum(batch @ params["first"], 0.0)
    hidden = jnp.minimum(hidden.max(0), jnp.sort(hidden)[0])
    return squared(jnp.clip(hidden, 0, 6)[None] @ params["second"])


def recurrent(params, batch):
    def step(state, row):
        return jnp.tanh(state + row @ params["first"]), ()

    state, _ = lax.scan(step, jnp.zeros(5), batch)
    return squared((state @ params["second"])[None])


def looped(params, batch):
    hidden = lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x), batch @ params["first"])
    hidden = lax.while_loop(lambda x: jnp.sum(x) > 9.0, lambda x: x / 2, hidden)
    return squared(hidden @ params["second"])


def branched(params, batch):
    hidden = batch @ params["first"]
    hidden = lax.cond(hidden[0, 0] > 0, jnp.round, jnp.sin, hidden)
    return squared(hidden @ params["second"])


def scattered(params, batch):
    hidden = jnp.zeros((4, 5)).at[LABELS].add(batch @ params["first"])
    hidden = lax.dynamic_slice(hidden, (LABELS[1], 0), (1, 5))
    return squared(hidden @ params["second"])


def physics_informed(params, batch):
    def network(row):
        return jnp.sum(jnp.tanh(row @ params["first"]) @ params["second"])

    slopes = jax.vmap(jax.grad(network))(batch)
    curvature = jax.vmap(jax.hessian(network))(batch)
    return jnp.mean(slopes**2) + jnp.mean(curvature**2)


def through_reference(params, batch):
    if not hasattr(jax, "new_ref"):
        pytest.skip("this JAX has no references")
    store = jax.new_ref(batch @ params["first"])
    store[...] = store[...] * 2
    return squared(store[...] @ params["second"])


HEALTHY = [
    softmax, batch_norm_by_hand, straight_through, custom_jvp, custom_vjp,
    gumbel_straight_through, vector_quantized, mixture_of_experts, masked, clipped,
    recurrent, looped, branched, scattered, physics_informed, through_reference,
]  # fmt: skip


@pytest.mark.parametrize("loss_fn", HEALTHY)
def test_silent_where_a_path_is_left(loss_fn):
    found = reach(loss_fn, PARAMS, INPUTS)
    assert found.connected == (True, True)
    assert found.differentiable == (True, True)
    assert found.cuts == ((), ())


def test_target_network_is_cut_and_the_online_one_is_not():
    def loss_fn(params, batch):
        values = batch @ params["online"]
        bootstrap = lax.stop_gradient(batch @ params["target"])
        return jnp.mean((values - 1.0 - 0.9 * bootstrap.max(-1, keepdims=True)) ** 2)

    params = {"online": jnp.ones((3, 2)), "target": jnp.ones((3, 2))}
    found = reach(loss_fn, params, INPUTS)
    assert verdicts(found) == {"online": True, "target": False}
    assert places(found.cuts[1]) == [("stop_gradient", line_of(loss_fn, "bootstrap ="))]


def test_unused_parameters_and_those_of_the_closure():
    frozen = jnp.ones((3, 5))

    def loss_fn(params, batch):
        return squared(jnp.round(batch @ frozen) @ params["second"])

    found = reach(loss_fn, PARAMS, INPUTS)
    assert found.connected == (False, True)
    assert found.differentiable == (False, True)
    assert found.cuts == ((), ())


def test_an_accuracy_is_no_loss():
    def loss_fn(params, batch):
        outputs = batch @ params["first"] @ params["second"]
        return jnp.mean(jnp.argmax(outputs, -1) == LABELS)

    found = reach(loss_fn, PARAMS, INPUTS)
    assert found.differentiable == (False, False)
    assert {cut.operation for cut in found.cuts[0]} == {"argmax"}


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


def test_shapes_suffice_and_other_leaves_are_passed_over():
    params = {**PARAMS, "steps": jnp.array(3), "nothing": None}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    inputs = jax.ShapeDtypeStruct(INPUTS.shape, INPUTS.dtype)
    found = reach(rounded, shapes, inputs)
    assert found == reach(rounded, params, INPUTS)
    assert found.names == ("first", "second")


def test_wants_a_scalar():
    with pytest.raises(ValueError, match=r"float32\[4\]; did you forget a mean"):
        reach(lambda params, batch: batch @ params, jnp.ones(3), INPUTS)
    with pytest.raises(ValueError, match="tree of 2 arrays"):
        reach(lambda params, batch: (params, batch), 1.0, 2.0)


def test_time_grows_with_the_program_alone():
    def loss_fn(params, batch):
        for weights in params:
            batch = jax.nn.softmax(jnp.round(batch) + jnp.tanh(batch @ weights))
        return jnp.sum(batch)

    params = [jax.ShapeDtypeStruct((3, 3), jnp.float32)] * 64
    started = time.perf_counter()
    found = reach(loss_fn, params, INPUTS)
    assert time.perf_counter() - started < 10.0
    assert all(found.differentiable)


# The table, against what JAX does.

FLAT_EXAMPLES = {
    "bitcast_convert_type": lambda x: lax.bitcast_convert_type(x, jnp.float32),
    "ceil": lax.ceil,
    "floor": lax.floor,
    "round": lax.round,
    "sign": lax.sign,
    "stop_gradient": lax.stop_gradient,
}
DISCRETE_EXAMPLES = [
    lambda x: x > 0.5,
    lambda x: x == 0.5,
    lax.is_finite,
    lambda x: lax.argmax(x, 0, jnp.int32),
    lambda x: lax.argmin(x, 0, jnp.int32),
    lambda x: x.astype(jnp.int32),
    lambda x: x.astype(bool),
    lambda x: lax.bitcast_convert_type(x, jnp.int32),
    lambda x: lax.top_k(x, 2)[1],
    jnp.argsort,
    lambda x: lax.population_count(x.astype(jnp.int32)),
    lambda x: lax.clz(x.astype(jnp.int32)),
    lambda x: x.astype(jnp.int32) << 1,
    lambda x: ~x.astype(jnp.int32) & 3 | 4 ^ 1,
]
SMOOTH_EXAMPLES = [
    *(jnp.abs, jnp.exp, jnp.log1p, jnp.tanh, jnp.sin, jnp.sqrt, jnp.square, jnp.cbrt),
    *(jax.nn.relu, jax.nn.silu, jax.nn.gelu, jax.nn.sigmoid, jax.nn.softmax, jnp.sort),
    *(jnp.max, jnp.min, jnp.sum, jnp.prod, jnp.cumsum, jnp.cumprod, lax.cummax),
    lambda x: jnp.clip(x, 0.0, 1.0),
    lambda x: jnp.maximum(x, 0.25),
    lambda x: jnp.minimum(x, 0.75),
    lambda x: lax.clamp(x, 9.0 * jnp.ones(3), x + 1),
    lambda x: jnp.where(x > 0.5, x, 2 * x),
    lambda x: lax.top_k(x, 2)[0],
    lambda x: x[jnp.array([1, 1])],
    lambda x: jnp.zeros(3).at[jnp.array([1, 1, 0])].add(x),
    lambda x: jnp.zeros(3).at[jnp.array([2, 1, 0])].max(x),
    lambda x: lax.rem(x, 0.4),
    lambda x: lax.reduce_precision(x, 8, 10),
    lambda x: x.astype(jnp.bfloat16),
    lambda x: jnp.fft.fft(x),
    lambda x: jnp.linalg.norm(x),
    lambda x: jnp.linalg.inv(jnp.eye(3) + jnp.diag(x)),
]
POINT = jnp.array([0.3, 0.6, 0.9])


def derivative(fn):
    _, tangent = jax.jvp(fn, (POINT,), (jnp.array([1.0, 1.3, 0.8]),))
    return np.asarray(tangent).astype(complex) if tangent.dtype != jax.float0 else 0.0


def differentiable(fn):
    def loss_fn(params, batch):
        return jnp.sum(jnp.abs(fn(params)).astype(jnp.float32)) + batch

    (answer,) = reach(loss_fn, POINT, 0.0).differentiable
    return answer


def test_the_table_has_an_example_of_each():
    assert set(FLAT_EXAMPLES) == FLAT


@pytest.mark.parametrize("fn", [*FLAT_EXAMPLES.values(), *DISCRETE_EXAMPLES])
def test_has_no_derivative_in_jax(fn):
    assert not np.any(derivative(fn))
    assert not differentiable(fn)


@pytest.mark.parametrize("fn", SMOOTH_EXAMPLES)
def test_has_a_derivative_in_jax(fn):
    assert np.any(derivative(fn))
    assert differentiable(fn)


def test_a_key_of_a_sort_does_not_move_what_it_orders():
    def beside(keys):
        return lax.sort((keys, jnp.arange(3.0)), num_keys=1)[1]

    assert not np.any(derivative(beside))
    assert not differentiable(beside)
    assert differentiable(lambda x: lax.sort((jnp.arange(3.0), x), num_keys=1)[1])
