"""Faulty and healthy programs, with the gradients of JAX as their oracle."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
