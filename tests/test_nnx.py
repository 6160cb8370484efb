import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import nnsanity as ns
from nnsanity.nnx import functional

KEY, OTHER = jax.random.split(jax.random.key(0))
X = jax.random.normal(jax.random.key(1), (64, 3))
WIDE = jnp.ones((200, 50))


class Model(nnx.Module):
    """Batch statistics and dropout."""

    def __init__(self, rate=0.5):
        rngs = nnx.Rngs(0, dropout=1)
        self.first, self.head = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.norm.mean[...], self.norm.var[...] = jnp.full(4, 0.5), jnp.full(4, 1.5)
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(nnx.relu(self.norm(self.first(x)))))


class Stacked(nnx.Module):
    """Layers made by vmap and run by scan, each with its random stream."""

    def __init__(self):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def make(rngs):
            return nnx.Dropout(0.5, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)

        self.dropout, self.mix = make(nnx.Rngs(0))

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(layers, x):
            dropout, mix = layers
            return dropout(x + mix(x))

        return run((self.dropout, self.mix), x)


class Recurrent(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.cell = nnx.RNN(nnx.SimpleCell(3, 4, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(self.cell(x[:, None])[:, -1])


MODELS = (Model, Stacked, Recurrent)


def by_hand(model, x, *, running):
    """What Model computes without dropout, in NumPy."""
    x = np.asarray(x, np.float64)
    x = x @ np.asarray(model.first.kernel[...]) + np.asarray(model.first.bias[...])
    running_moments = (
        np.asarray(model.norm.mean[...]),
        np.asarray(model.norm.var[...]),
    )
    mean, variance = running_moments if running else (x.mean(0), x.var(0))
    x = np.maximum((x - mean) / np.sqrt(variance + 1e-5), 0)
    return x @ np.asarray(model.head.kernel[...]) + np.asarray(model.head.bias[...])


def contents(model):
    """Every array of a model, random keys as numbers, and its static part."""
    graphdef, state = nnx.split(model)

    def plain(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.array(jax.random.key_data(leaf) if is_key else leaf)

    return graphdef, jax.tree.map(plain, jax.tree.leaves(state))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_statistics_of_the_mode_whatever_the_model_was_in(mode):
    model = Model(rate=0.0)
    getattr(model, mode)()
    apply_fn, params, train_apply_fn = functional(model)
    for outputs, running in (
        (apply_fn(params, X), True),
        (train_apply_fn(params, X, KEY), False),
    ):
        expected = by_hand(model, X, running=running)
        np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", MODELS)
def test_callers_model_comes_back(make):
    model = make()
    graphdef, before = contents(model)
    apply_fn, params, train_apply_fn = functional(model)
    mean = lambda *arguments: train_apply_fn(*arguments).mean()  # noqa: E731
    first = apply_fn(params, X)
    train_apply_fn(params, X, KEY)
    jax.jit(train_apply_fn)(params, X, KEY)
    jax.jit(jax.grad(mean))(params, X, KEY)
    jax.make_jaxpr(apply_fn)(params, X)
    jax.vmap(train_apply_fn, (None, None, 0))(params, X, jnp.stack([KEY, OTHER]))
    graphdef_after, after = contents(model)
    assert graphdef_after == graphdef
    jax.tree.map(np.testing.assert_array_equal, before, after)
    np.testing.assert_array_equal(apply_fn(params, X), first)


def test_the_model_may_train_on():
    model = Model()
    apply_fn, params, _ = functional(model)
    first = apply_fn(params, X)
    model.first.kernel[...] = jnp.zeros((3, 4))
    model.norm.mean[...] = jnp.ones(4)
    np.testing.assert_array_equal(apply_fn(params, X), first)


class Scale(nnx.Module):
    """A factor of one and dropout, whose stream is its own or the caller's."""

    def __init__(self, rngs):
        self.scale = nnx.Param(jnp.ones(()))
        self.dropout = nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, x, rngs=None):
        return self.dropout(self.scale * x, rngs=rngs)


@pytest.mark.parametrize("rngs", [None, nnx.Rngs(0), nnx.Rngs(noise=0, dropout=1)])
@pytest.mark.parametrize("call", [None, lambda model, x: model(x)])
def test_key_decides_the_dropout(rngs, call):
    if rngs is None and call is not None:
        return
    apply_fn, params, fn = functional(Scale(rngs), call=call)
    np.testing.assert_array_equal(apply_fn(params, WIDE), WIDE)
    kept = np.asarray(fn(params, WIDE, KEY)) != 0
    assert abs(kept.mean() - 0.7) < 4 * np.sqrt(0.21 / kept.size)
    np.testing.assert_array_equal(fn(params, WIDE, KEY) != 0, kept)
    assert ((np.asarray(fn(params, WIDE, OTHER)) != 0) != kept).mean() > 0.3
    many = jax.vmap(fn, (None, None, 0))(params, WIDE, jnp.stack([KEY, OTHER]))
    np.testing.assert_allclose(many[1], fn(params, WIDE, OTHER))


def test_scanned_layers_draw_apart():
    """Three scanned layers of dropout keep an eighth, not a half."""
    model = Stacked()
    model.mix.kernel[...] = jnp.zeros((3, 3, 3))
    _, params, train_apply_fn = functional(model)
    kept = np.asarray(train_apply_fn(params, jnp.ones((4000, 3)), KEY)) != 0
    assert abs(kept.mean() - 0.125) < 4 * np.sqrt(0.125 * 0.875 / kept.size)


@pytest.mark.parametrize(
    ("make", "leaves", "layers"),
    [
        (
            Model,
            {"first/kernel", "first/bias", "head/kernel", "head/bias"}
            | {"norm/scale", "norm/bias"},
            ["first", "head"],
        ),
        (Stacked, {"mix/kernel", "mix/bias"}, ["mix"]),
        (
            Recurrent,
            {"cell/cell/dense_i/kernel", "cell/cell/dense_i/bias", "head/kernel"}
            | {"cell/cell/dense_h/kernel", "head/bias"},
            None,
        ),
    ],
)
def test_names_and_gradients(make, leaves, layers):
    apply_fn, params, train_apply_fn = functional(make())
    assert set(ns.leaf_names(params)) == leaves

    def train_loss_fn(params, batch, key):
        inputs, targets = batch
        return jnp.mean((train_apply_fn(params, inputs, key) - targets) ** 2)

    grads = jax.jit(jax.grad(train_loss_fn))(params, (X, jnp.ones((64, 1))), KEY)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    before = train_loss_fn(params, (X, 1.0), KEY)
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g: (g**2).sum(), grads)))
    rate = 0.01 * before / slope
    stepped = jax.tree.map(lambda p, g: p - rate * g, params, grads)
    after = train_loss_fn(stepped, (X, 1.0), KEY)
    np.testing.assert_allclose(before - after, 0.01 * before, rtol=0.1)
    if layers:
        assert [layer.name for layer in ns.layers(apply_fn, params, X)] == layers


def test_filter_of_the_trainable():
    model = Model()
    head = nnx.All(nnx.Param, nnx.PathContains("head"))
    apply_fn, params, _ = functional(model, wrt=head)
    assert set(ns.leaf_names(params)) == {"head/kernel", "head/bias"}
    expected = by_hand(model, X, running=True)
    np.testing.assert_allclose(apply_fn(params, X), expected, rtol=1e-4, atol=1e-5)


def test_flag_of_the_call():
    class Flagged(nnx.Module):
        def __init__(self):
            self.scale = nnx.Param(jnp.ones(()))
            self.dropout = nnx.Dropout(0.5)

        def __call__(self, x, *, train=None, rngs):
            return self.dropout(self.scale * x, deterministic=not train, rngs=rngs)

    apply_fn, params, train_apply_fn = functional(Flagged())
    np.testing.assert_array_equal(apply_fn(params, WIDE), WIDE)
    assert set(np.unique(train_apply_fn(params, WIDE, KEY))) == {0, 2}


class Masked(nnx.Module):
    def __call__(self, x, mask):
        return x * mask


@pytest.mark.parametrize(
    ("model", "options", "error", "words"),
    [
        (Model, {}, TypeError, "the class Model; give an instance"),
        (linen.Dense(2), {}, TypeError, "nnsanity.linen.functional"),
        ([1], {}, TypeError, "list.*instance of an NNX"),
        (Masked(), {}, ValueError, "wrt=.*Param.* selects no .* Masked"),
        (Model(), {"wrt": nnx.LoRAParam}, ValueError, "wrt=.*LoRAParam.* selects no "),
        (Model(), {"call": lambda x: x}, TypeError, "call.*too many"),
    ],
)
def test_mistakes(model, options, error, words):
    with pytest.raises(error, match=words):
        functional(model, **options)
