import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import freeze

import nnsanity as ns
from nnsanity.linen import functional

KEY, OTHER = jax.random.split(jax.random.key(0))
X = jax.random.normal(jax.random.key(1), (64, 3))
WIDE = jnp.ones((200, 50))


class Model(nn.Module):
    """Batch statistics and dropout, the flag in the call."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(4)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(2)(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)))


class Setup(nn.Module):
    """The same with the layers in setup and the flag as an attribute."""

    deterministic: bool = False

    def setup(self):
        self.first, self.head = nn.Dense(4), nn.Dense(2)
        self.norm = nn.BatchNorm(use_running_average=self.deterministic)

    def __call__(self, x):
        return self.head(nn.relu(self.norm(self.first(x))))


def variables_of(module, x=X, **flags):
    """Variables that no default gives: statistics away from 0 and 1."""
    variables = module.init({"params": KEY, "dropout": KEY}, x, **flags)
    filled = {
        name: jax.tree.map(lambda leaf: leaf + 0.5, values)
        for name, values in variables.items()
        if name != "params"
    }
    return {**variables, **filled}


def batch_norm(x, mean, variance):
    return (x - mean) / np.sqrt(variance + 1e-5)


def setup_by_hand(variables, x, *, running):
    """What Setup computes, in NumPy."""
    tree = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    params, stats = tree["params"], tree["batch_stats"]["norm"]
    x = x.astype(np.float64) @ params["first"]["kernel"] + params["first"]["bias"]
    moments = (stats["mean"], stats["var"]) if running else (x.mean(0), x.var(0))
    x = batch_norm(x, *moments) * params["norm"]["scale"] + params["norm"]["bias"]
    return np.maximum(x, 0) @ params["head"]["kernel"] + params["head"]["bias"]


@pytest.mark.parametrize("before", [True, False])
def test_statistics_of_the_mode_whatever_the_attribute_was(before):
    module = Setup(deterministic=before)
    variables = variables_of(module)
    apply_fn, params, train_apply_fn = functional(module, variables)
    x = np.asarray(X)
    by_hand = setup_by_hand(variables, x, running=True)
    np.testing.assert_allclose(apply_fn(params, X), by_hand, rtol=1e-4, atol=1e-5)
    by_hand = setup_by_hand(variables, x, running=False)
    trained = train_apply_fn(params, X, KEY)
    np.testing.assert_allclose(trained, by_hand, rtol=1e-4, atol=1e-5)
    assert module.deterministic is before


@pytest.mark.parametrize("jit", [jax.jit, lambda fn: fn])
@pytest.mark.parametrize("kind", [dict, freeze])
def test_callers_variables_come_back(jit, kind):
    variables = kind(variables_of(Model(), train=False))
    before = jax.tree.map(np.array, variables)
    apply_fn, params, train_apply_fn = functional(Model(), variables)
    first = jit(apply_fn)(params, X)
    jit(train_apply_fn)(params, X, KEY)
    assert jax.tree.structure(before) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, before, variables)
    np.testing.assert_array_equal(jit(apply_fn)(params, X), first)


def test_key_decides_the_dropout():
    module = nn.Dropout(0.3)
    fn = functional(module, {"params": {}}).train_apply_fn
    kept = np.asarray(fn({}, WIDE, KEY)) != 0
    assert abs(kept.mean() - 0.7) < 4 * np.sqrt(0.21 / kept.size)
    np.testing.assert_array_equal(fn({}, WIDE, KEY), fn({}, WIDE, KEY))
    assert (np.asarray(fn({}, WIDE, OTHER) != 0) != kept).mean() > 0.3
    many = jax.vmap(fn, (None, None, 0))({}, WIDE, jnp.stack([KEY, OTHER]))
    np.testing.assert_array_equal(many[1], fn({}, WIDE, OTHER))


@pytest.mark.parametrize("deterministic", [None, True, False])
@pytest.mark.parametrize("call", [None, lambda module, x, **flags: module(x, **flags)])
def test_attribute_and_argument_of_one_name(deterministic, call):
    module = nn.Dropout(0.5, deterministic=deterministic)
    apply_fn, _, train_apply_fn = functional(module, {"params": {}}, call=call)
    np.testing.assert_array_equal(apply_fn({}, WIDE), WIDE)
    assert set(np.unique(train_apply_fn({}, WIDE, KEY))) == {0, 2}


def test_loss_from_train_apply_fn():
    apply_fn, params, train_apply_fn = functional(
        Model(), variables_of(Model(), train=False)
    )

    def train_loss_fn(params, batch, key):
        inputs, targets = batch
        return jnp.mean((train_apply_fn(params, inputs, key) - targets) ** 2)

    batch = (X, jnp.ones((64, 2)))
    grads = jax.jit(jax.grad(train_loss_fn))(params, batch, KEY)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    before = train_loss_fn(params, batch, KEY)
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g: (g**2).sum(), grads)))
    rate = 0.01 * before / slope
    stepped = jax.tree.map(lambda p, g: p - rate * g, params, grads)
    after = train_loss_fn(stepped, batch, KEY)
    np.testing.assert_allclose(before - after, 0.01 * before, rtol=0.1)
    names = [layer.name for layer in ns.layers(apply_fn, params, X)]
    assert names == ["Dense_0", "Dense_1"]


class Silent(nn.Module):
    """Is not called."""


class Drop(nn.Module):
    @nn.compact
    def __call__(self, x, off):
        return nn.Dropout(0.5, deterministic=off)(x)


FLAGS = {
    "train": lambda module, x, train: module(x, off=not train),
    "training": lambda module, x, *, training: module(x, off=not training),
    "is_train": lambda module, x, is_train=True: module(x, off=not is_train),
    "is_training": lambda module, x, is_training=False: module(x, off=not is_training),
    "enable_dropout": lambda module, x, enable_dropout: module(x, not enable_dropout),
    "deterministic": lambda module, x, deterministic: module(x, off=deterministic),
    "running": lambda module, x, use_running_average: module(x, use_running_average),
    "eval_mode": lambda module, x, eval_mode: module(x, off=eval_mode),
    "inference": lambda module, x, inference: module(x, off=inference),
}


@pytest.mark.parametrize(
    "options",
    [
        *({"call": call} for call in FLAGS.values()),
        {"evaluation": {"off": True}, "training": {"off": False}},
    ],
    ids=[*FLAGS, "given"],
)
def test_flags(options):
    apply_fn, _, train_apply_fn = functional(Drop(), {"params": {}}, **options)
    np.testing.assert_array_equal(apply_fn({}, WIDE), WIDE)
    assert (train_apply_fn({}, WIDE, KEY) == 0).any()


class Implicit(nn.Module):
    """Takes its mode from what it is given: statistics to write, a random stream."""

    @nn.compact
    def __call__(self, x):
        frozen = not self.is_mutable_collection("batch_stats")
        x = nn.BatchNorm(use_running_average=frozen)(x)
        return nn.Dropout(0.5, deterministic=not self.has_rng("dropout"))(x)


def test_modes_without_flags():
    variables = variables_of(Implicit())
    apply_fn, params, train_apply_fn = functional(Implicit(), variables)
    evaluated = batch_norm(np.asarray(X), 0.5, 1.5)
    np.testing.assert_allclose(apply_fn(params, X), evaluated, rtol=1e-4, atol=1e-5)
    trained = np.asarray(train_apply_fn(params, X, KEY))
    by_hand = 2 * batch_norm(np.asarray(X), X.mean(0), X.var(0))
    kept = trained != 0
    assert 0.3 < kept.mean() < 0.7
    np.testing.assert_allclose(trained[kept], by_hand[kept], rtol=1e-3, atol=1e-5)


class Always(nn.Module):
    """Writes in both modes."""

    @nn.compact
    def __call__(self, x):
        calls = self.variable("counter", "calls", lambda: jnp.zeros(()))
        calls.value += 1
        self.sow("intermediates", "inputs", x)
        return x + calls.value


def test_module_that_always_writes():
    variables = {"params": {}, **Always().init(KEY, X)}
    apply_fn, params, train_apply_fn = functional(Always(), variables)
    for outputs in (apply_fn(params, X), train_apply_fn(params, X, KEY)):
        np.testing.assert_array_equal(outputs, X + 2)
    assert variables["counter"]["calls"] == 1


class Noise(nn.Module):
    """Noise from a stream with a name of its own."""

    @nn.compact
    def __call__(self, x, train=True):
        return x + jax.random.normal(self.make_rng("measurement"), x.shape) * train


LIFT = {"in_axes": (0, None), "variable_axes": {}}


@pytest.mark.parametrize(
    ("module", "streams"),
    [
        (Noise, []),
        (nn.vmap(Noise, split_rngs={"params": True}, **LIFT), []),
        (nn.vmap(Noise, split_rngs={"measurement": True}, **LIFT), ["measurement"]),
    ],
)
def test_named_stream(module, streams):
    fn = functional(module(), {"params": {}}, streams=streams).train_apply_fn
    noise = np.asarray(fn({}, WIDE, KEY)) - 1
    assert len(np.unique(noise)) > 0.9 * noise.size
    assert abs(noise.std() - 1) < 4 / np.sqrt(2 * noise.size)
    np.testing.assert_allclose(
        jax.jit(fn)({}, WIDE, KEY), 1 + noise, rtol=1e-4, atol=1e-5
    )
    assert not np.allclose(fn({}, WIDE, OTHER), 1 + noise)


class Block(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x, _):
        x = x + nn.Dense(3, name="mix")(x)
        return nn.Dropout(0.5, deterministic=not self.train)(x), None


class Stack(nn.Module):
    """Scanned layers, and the flag in an attribute that is not set."""

    train: bool | None = None

    @nn.compact
    def __call__(self, x):
        split = {"params": True, "dropout": True}
        axes = {"params": 0}
        scan = nn.scan(nn.remat(Block), variable_axes=axes, split_rngs=split, length=3)
        return nn.Dense(2, name="head")(scan(self.train, name="blocks")(x, None)[0])


def test_scanned_layers():
    variables = Stack(train=False).init(KEY, X)
    apply_fn, params, train_apply_fn = functional(Stack(), variables)
    x = np.asarray(X, np.float64)
    for kernel in np.asarray(params["blocks"]["mix"]["kernel"]):
        x = x + x @ kernel
    x = x @ np.asarray(params["head"]["kernel"])
    np.testing.assert_allclose(jax.jit(apply_fn)(params, X), x, rtol=1e-3, atol=1e-4)
    loss = jax.jit(lambda params, key: train_apply_fn(params, X, key).std())
    assert loss(params, KEY) == loss(params, KEY) != loss(params, OTHER)
    grads = jax.grad(loss)(params, KEY)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert [n.name for n in ns.layers(apply_fn, params, X)] == ["blocks/mix", "head"]


def test_dropout_that_no_flag_turns_off():
    module = nn.Sequential([nn.Dropout(0.5, deterministic=False)])
    with pytest.raises(ValueError, match=r"in evaluation mode.*dropout.*evaluation="):
        functional(module, {"params": {}}).apply_fn({}, X)


@pytest.mark.parametrize(
    ("module", "variables", "options", "error", "words"),
    [
        (Model, {"params": {}}, {}, TypeError, "the class Model; give an instance"),
        (nnx.Linear(1, 1, rngs=nnx.Rngs(0)), {}, {}, TypeError, "nnsanity.nnx"),
        (len, {"params": {}}, {}, TypeError, "builtin_function.*instance of a Linen"),
        (Model(), [1], {}, TypeError, "variables is of type list"),
        (Model(), {"Dense_0": {}}, {}, ValueError, r"no 'params'.*\['Dense_0'\]"),
        (
            Model(),
            None,
            {"evaluation": {"of": 1}},
            TypeError,
            "evaluation=.*'of'.*Model",
        ),
        (Model(), None, {"training": {"on": 1}}, TypeError, "training=.*'on'.*Model"),
        (Drop(), None, {}, TypeError, "evaluation=.*missing.*'off'"),
        (Silent(), None, {}, TypeError, "Silent has no __call__.*call="),
    ],
)
def test_mistakes(module, variables, options, error, words):
    variables = {"params": {}} if variables is None else variables
    with pytest.raises(error, match=words):
        functional(module, variables, **options)
