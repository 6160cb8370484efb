import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

from nnsanity.checks.results import judge_start
from nnsanity.tracing.nonfinite import first_nonfinite
from nnsanity.trials.births import with_births

PARAMS = {
    "w1": jnp.ones((3, 4)),
    "w2": jnp.ones((4, 2)),
}
INPUTS = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
CAUSAL = jnp.tril(jnp.ones((2, 2), bool))


def dense(params, x, hidden):
    return jnp.mean(hidden(x @ params["w1"]) @ params["w2"])


def attention(params, x, mask):
    h = x @ params["w1"]
    scores = jnp.where(mask, h @ h.T, -jnp.inf)
    return jnp.mean(jax.nn.softmax(scores) @ h @ params["w2"])


def normalized(params, x):
    h = x @ params["w1"]
    h = (h - jnp.mean(h)) / jnp.std(h)
    return jnp.mean(h @ params["w2"])


def hand_made_entropy(params, x):
    shares = jax.nn.softmax(50 * x @ params["w1"] * jnp.arange(4.0))
    return -jnp.mean(jnp.log(shares)) + jnp.mean(params["w2"])


def scanned(params, x):
    def turn(h, w):
        return jnp.exp(h @ w), None

    return jnp.mean(jax.lax.scan(turn, x, params["w"])[0])


def looped(params, x):
    def turn(state):
        count, h = state
        return count + 1, jnp.exp(h @ params["w"][0])

    start = 0, jax.lax.stop_gradient(x)
    end = jax.lax.while_loop(lambda state: state[0] < 4, turn, start)
    return jnp.mean(end[1])


def branched(params, x):
    h = x @ params["w1"]
    h = jax.lax.cond(jnp.sum(x) > 0, lambda h: jnp.log(h - h), lambda h: jnp.sqrt(h), h)
    return jnp.mean(h @ params["w2"])


def remade(params, x):
    return jnp.mean(jax.checkpoint(lambda h: jnp.log(h - 6))(x @ params["w1"]))


def line_of(function, text):
    lines, first = inspect.getsourcelines(function)
    (index,) = (number for number, line in enumerate(lines) if text in line)
    return f"test_nonfinite.py:{first + index}"


STACK = {"w": jnp.stack([jnp.eye(3)] * 5)}
BIRTHS = {
    "logarithm of zero": (
        lambda p, x: dense(p, x, lambda h: jnp.log(jax.nn.relu(h))),
        PARAMS,
        -INPUTS,
        ("w1", "log", False, ()),
    ),
    "overflow": (
        lambda p, x: dense(p, x, lambda h: jnp.exp(50 * h)),
        PARAMS,
        INPUTS,
        ("w1", "exp", False, ()),
    ),
    "second layer": (
        lambda p, x: jnp.log(-dense(p, x, jnp.tanh)),
        PARAMS,
        INPUTS,
        ("w2", "log", False, ()),
    ),
    "root of zero behind a where": (
        lambda p, x: dense(
            p, x, lambda h: jnp.where(h > 0, jnp.sqrt(jnp.maximum(h, 0)), 0)
        ),
        PARAMS,
        -INPUTS,
        ("w1", "div", True, ()),
    ),
    "norm of zero": (
        lambda p, x: jnp.linalg.norm(x @ p["w1"]) + jnp.sum(p["w2"]),
        PARAMS,
        0 * INPUTS,
        ("w1", "div", True, ()),
    ),
    "deviation of zero": (normalized, PARAMS, 0 * INPUTS, ("w1", "div", False, ())),
    "logarithm of a softmax": (
        hand_made_entropy,
        PARAMS,
        INPUTS,
        ("w1", "log", False, ()),
    ),
    "a row without a key": (
        lambda p, x: attention(p, x, CAUSAL & jnp.array([[True], [False]])),
        PARAMS,
        INPUTS,
        ("w1", "sub", False, ()),
    ),
    "turn of a scan": (scanned, STACK, INPUTS, ("w", "exp", False, (1,))),
    "turn of a while loop": (looped, STACK, INPUTS, ("w", "exp", False, (1,))),
    "branch": (branched, PARAMS, INPUTS, ("w1", "log", False, ())),
    "remat": (remade, PARAMS, INPUTS, ("w1", "log", False, ())),
}


def birth_of(loss_fn, params, batch):
    return first_nonfinite(loss_fn, params, batch).birth


@pytest.mark.parametrize("name", BIRTHS)
def test_births(name):
    loss_fn, params, batch, expected = BIRTHS[name]
    if name == "turn of a while loop":  # which has no gradient
        params = jax.tree.map(jax.lax.stop_gradient, params)
        plain = loss_fn
        loss_fn = lambda p, x: plain(params, x) + 0 * jnp.sum(p["w"])  # noqa: E731
        expected = ("", *expected[1:])
    found = birth_of(loss_fn, params, batch)
    layer, operation, is_backward, turn = expected
    assert found.operation == operation
    assert (found.is_backward, found.turn) == (is_backward, turn)
    assert found.layer == layer
    assert found.source.startswith("test_nonfinite.py:")


HEALTHY = {
    "plain": (lambda p, x: dense(p, x, jnp.tanh), PARAMS, INPUTS),
    "masked attention": (lambda p, x: attention(p, x, CAUSAL), PARAMS, INPUTS),
    "branch not taken": (branched, PARAMS, -INPUTS + 10),
    "guarded root": (
        lambda p, x: dense(p, x, lambda h: jnp.sqrt(jnp.where(h > 0, h, 1.0))),
        PARAMS,
        -INPUTS,
    ),
    "a maximum from minus infinity": (
        lambda p, x: dense(p, x, lambda h: h - jnp.max(h, initial=-jnp.inf)),
        PARAMS,
        INPUTS,
    ),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_programs_have_none(name):
    loss_fn, params, batch = HEALTHY[name]
    if name == "branch not taken":
        batch = -jnp.abs(batch)
        params = jax.tree.map(lambda leaf: -leaf, params)
    assert jnp.isfinite(loss_fn(params, batch))
    assert birth_of(loss_fn, params, batch) is None


def test_source_lines_are_those_of_the_user():
    assert birth_of(branched, PARAMS, INPUTS).source.startswith(
        line_of(branched, "jnp.log(")
    )
    assert birth_of(scanned, STACK, INPUTS).source.startswith(
        line_of(scanned, "jnp.exp(")
    )
    assert birth_of(normalized, PARAMS, 0 * INPUTS).source.startswith(
        line_of(normalized, "jnp.std(")
    )


@pytest.mark.parametrize(
    ("params", "batch", "name"),
    [
        (PARAMS, INPUTS.at[0, 1].set(jnp.nan), "batch"),
        (PARAMS | {"w2": PARAMS["w2"] * jnp.inf}, INPUTS, "w2"),
    ],
)
def test_what_was_given_is_named(params, batch, name):
    found = birth_of(lambda p, x: dense(p, x, jnp.tanh), params, batch)
    assert (found.layer, found.operation, found.source) == (name, "argument", "")


def test_one_compiled_program_and_no_callback():
    loss_fn, params, batch, _ = BIRTHS["overflow"]
    traced = jax.jit(lambda p, x: first_nonfinite(loss_fn, p, x))
    assert "callback" not in str(jax.make_jaxpr(traced)(params, batch))
    eager, compiled = first_nonfinite(loss_fn, params, batch), traced(params, batch)
    assert compiled.birth == eager.birth
    assert traced(params, -batch).birth is None


def test_frameworks_name_their_layers():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(8)(x))
            x = nn.BatchNorm(use_running_average=False)(x)
            return jnp.log(nn.Dense(3)(x))

    model = Network()
    variables = model.init(jax.random.key(0), INPUTS)

    def loss_fn(params, batch):
        inputs, labels = batch
        logits, _ = model.apply(
            variables | {"params": params}, inputs, mutable=["batch_stats"]
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    found = birth_of(loss_fn, variables["params"], (INPUTS, jnp.array([0, 1])))
    assert (found.layer, found.operation) == ("Dense_1", "log")
    assert found.source.startswith(line_of(Network.__call__, "jnp.log("))


def test_within_shard_map():
    mesh = Mesh(np.array(jax.devices()[:1]), "batch")
    spec = PartitionSpec("batch")

    def loss_fn(params, x):
        inside = jax.shard_map(
            lambda x, w: jnp.log(x @ w),
            mesh=mesh,
            in_specs=(spec, PartitionSpec()),
            out_specs=spec,
        )
        return jnp.mean(inside(x, params["w1"]) @ params["w2"])

    assert birth_of(loss_fn, PARAMS, INPUTS) is None
    assert birth_of(loss_fn, PARAMS, -INPUTS).operation == "log"


def test_findings_say_where():
    loss_fn, params, batch, _ = BIRTHS["logarithm of zero"]
    findings = judge_start(float("nan"), 1.0, 3.0)
    (found,) = with_births(loss_fn, params, batch, findings=findings)
    words = "The first infinity is born in the forward pass of layer w1, by log at"
    assert words in found.message
    (given,) = with_births(loss_fn, params, batch * jnp.nan, findings=findings)
    assert "in what was given: batch" in given.message
    assert with_births(loss_fn, params, batch, findings=()) == ()
