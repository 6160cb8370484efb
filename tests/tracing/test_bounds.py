import math
import time

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnsanity.tracing.bounds import Bounds, output_bounds

INF = math.inf
LOGITS = jax.ShapeDtypeStruct((4, 5), jnp.float32)


def bounds_of(fn, *values):
    """The bounds of a function of values that may be anything."""
    return output_bounds(lambda _, inputs: fn(*inputs), (), values or (LOGITS,))


def interval(fn, *values):
    """The one interval that all elements of the output share."""
    bounds = bounds_of(fn, *values)
    lows, highs = np.unique(bounds.low), np.unique(bounds.high)
    assert lows.size == highs.size == 1
    return float(lows[0]), float(highs[0])


def softmax_by_hand(x, axis=-1):
    return jnp.exp(x) / jnp.exp(x).sum(axis, keepdims=True)


def stable_softmax_by_hand(x):
    exp = jnp.exp(x - jnp.max(x, axis=-1)[:, None])
    return exp / jnp.sum(exp, axis=-1)[:, None]


HEADS = {
    "linear": (lambda x: x @ jnp.ones((5, 2)), -INF, INF),
    "relu": (jax.nn.relu, 0, INF),
    "relu by where": (lambda x: jnp.where(x > 0, x, 0), 0, INF),
    "leaky_relu": (jax.nn.leaky_relu, -INF, INF),
    "sigmoid": (jax.nn.sigmoid, 0, 1),
    "sigmoid by hand": (lambda x: 1 / (1 + jnp.exp(-x)), 0, 1),
    "tanh": (jnp.tanh, -1, 1),
    "softmax": (jax.nn.softmax, 0, 1),
    "softmax of columns": (lambda x: jax.nn.softmax(x, axis=0), 0, 1),
    "softmax with a temperature": (lambda x: jax.nn.softmax(x / 2), 0, 1),
    "softmax in bfloat16": (lambda x: jax.nn.softmax(x.astype(jnp.bfloat16)), 0, 1),
    "softmax by hand": (softmax_by_hand, 0, 1),
    "softmax by hand, stable": (stable_softmax_by_hand, 0, 1),
    "softmax over one unit": (lambda x: jax.nn.softmax(x[:, :1]), 1, 1),
    "softmax by hand over one unit": (lambda x: softmax_by_hand(x[:, :1]), 1, 1),
    "odds by hand": (lambda x: jnp.exp(x) / (1 + jnp.exp(x)), 0, 1),
    "log_softmax": (jax.nn.log_softmax, -INF, 0),
    "log_softmax by hand": (
        lambda x: x - jax.nn.logsumexp(x, axis=-1, keepdims=True),
        -INF,
        0,
    ),
    "log_sigmoid": (jax.nn.log_sigmoid, -INF, 0),
    "clip": (lambda x: jnp.clip(x, -0.5, 2), -0.5, 2),
    "clip by where": (lambda x: jnp.where(x < 0, 0, jnp.where(x > 1, 1, x)), 0, 1),
    "hard_tanh": (jax.nn.hard_tanh, -1, 1),
    "hard_sigmoid": (jax.nn.hard_sigmoid, 0, 1),
    "relu6": (jax.nn.relu6, 0, 6),
    "softplus": (jax.nn.softplus, 0, INF),
    "soft_sign": (jax.nn.soft_sign, -1, 1),
    "elu": (jax.nn.elu, -1, INF),
    "exp": (jnp.exp, 0, INF),
    "2 sigmoid - 1": (lambda x: 2 * jax.nn.sigmoid(x) - 1, -1, 1),
    "255 sigmoid": (lambda x: jax.nn.sigmoid(x) * 255, 0, 255),
    "mean of sigmoids": (lambda x: jax.nn.sigmoid(x).mean(-1), 0, 1),
    "abs": (jnp.abs, 0, INF),
    "square": (jnp.square, 0, INF),
    "product with itself": (lambda x: x * x, 0, INF),
    "cube": (lambda x: x**3, -INF, INF),
    "difference from the maximum": (lambda x: x - x.max(-1, keepdims=True), -INF, 0),
    "unit vectors": (lambda x: x / jnp.linalg.norm(x, axis=1, keepdims=True), -1, 1),
    "difference from itself": (lambda x: x - x, 0, 0),
    "variance": (lambda x: jnp.var(x, axis=-1), 0, INF),
    "one_hot": (lambda x: jax.nn.one_hot(x.argmax(-1), 5), 0, 1),
    "rematerialized": (jax.checkpoint(jax.nn.sigmoid), 0, 1),
    "cond": (lambda x: jax.lax.cond(x[0, 0] > 0, jnp.tanh, jax.nn.relu6, x), -1, 6),
    "while": (
        lambda x: jax.lax.fori_loop(0, 9, lambda _, c: jnp.tanh(c + x), x),
        *(-INF, INF),
    ),
    "while from tanh": (
        lambda x: jax.lax.fori_loop(0, 9, lambda _, c: jnp.tanh(c + x), jnp.tanh(x)),
        -1,
        1,
    ),
    "average pooling": (
        lambda x: nn.avg_pool(jax.nn.sigmoid(x)[..., None], (5,), (5,)),
        0,
        1,
    ),
    "bytes": (lambda x: (jax.nn.sigmoid(x) * 255).astype(jnp.uint8), 0, 255),
    "an unknown operation": (lambda x: jnp.linalg.qr(x)[0], -INF, INF),
    "empty": (lambda x: jax.nn.sigmoid(x[:0]).sum(), -INF, INF),
}


@pytest.mark.parametrize("name", HEADS)
def test_common_heads_are_exact(name):
    fn, low, high = HEADS[name]
    assert interval(fn) == (low, high)


@pytest.mark.parametrize("fn", [jax.nn.gelu, jax.nn.silu, jax.nn.mish, jax.nn.selu])
def test_smooth_units_are_unbounded_above(fn):
    low, high = interval(fn)
    assert low < -0.16
    assert high == INF


UNRELATED = {
    "sum over the wrong axis": lambda x, y: jnp.exp(x) / jnp.exp(x).sum(1),
    "sum of another": lambda x, y: jnp.exp(x) / jnp.exp(y).sum(1, keepdims=True),
    "sum less something": lambda x, y: jnp.exp(x) / (jnp.exp(x) + y),
    "sum of products": lambda x, y: (
        jnp.abs(x) / jnp.sqrt((jnp.abs(x) * jnp.abs(y)).sum(1, keepdims=True))
    ),
    "sum of cubes": lambda x, y: (
        jnp.exp(x) / jnp.sqrt((jnp.exp(x) ** 3).sum(1, keepdims=True))
    ),
    "sum of signed numbers": lambda x, y: x - x.sum(1, keepdims=True),
    "maximum along the wrong axis": lambda x, y: jnp.exp(x - x.max(1)),
    "maximum of another": lambda x, y: jnp.exp(x - jnp.maximum(y, 0)),
    "sum in fewer digits": lambda x, y: (
        jnp.exp(x) / jnp.exp(x).astype(jnp.bfloat16).sum(1, keepdims=True)
    ),
}


@pytest.mark.parametrize("name", UNRELATED)
def test_numbers_that_are_not_related_bound_nothing(name):
    square = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    assert interval(UNRELATED[name], square, square)[1] == INF


def test_not_finite_and_not_a_number_are_kept_apart():
    assert interval(lambda x: jnp.where(jnp.isnan(x), 7.0, jnp.tanh(x))) == (-1, 1)
    assert interval(lambda x: jnp.where(jnp.isfinite(x), jnp.tanh(x), 7.0)) == (-1, 7)


@pytest.mark.parametrize("join", ["concatenate", "stack"])
def test_joined_heads_have_bounds_by_column(join):
    def head(x):
        if join == "stack":
            return jnp.stack([jnp.tanh(x[:, 0]), jax.nn.softplus(x[:, 1])], axis=-1)
        return jnp.concatenate([jnp.tanh(x[:, :1]), jax.nn.softplus(x[:, 1:2])], -1)

    bounds = bounds_of(head)
    assert bounds.low.tolist() == [[-1, 0]] * 4
    assert bounds.high.tolist() == [[1, INF]] * 4
    shifted = bounds_of(lambda x: 2 * head(x) + jnp.array([1.0, 5.0]))
    assert shifted.low.tolist() == [[-1, 5]] * 4
    first = bounds_of(lambda x: head(x)[:, 0])
    assert first.high.tolist() == [1] * 4


def test_bounds_by_column_survive_a_large_batch():
    def head(x):
        return jnp.concatenate([jnp.tanh(x[:, :2]), x[:, 2:]], axis=-1)

    bounds = bounds_of(head, jax.ShapeDtypeStruct((10**9, 5), jnp.float32))
    assert bounds.low.shape == (10**9, 5)
    assert bounds.low[0].tolist() == [-1, -1, -INF, -INF, -INF]


def test_outputs_may_be_a_tree():
    bounds = bounds_of(lambda x: {"mean": x, "rest": (jnp.exp(x), None, jnp.argmax(x))})
    assert isinstance(bounds, Bounds)
    assert jax.tree.structure(bounds.low) == jax.tree.structure(bounds.high)
    assert bounds.low["rest"][0].shape == (4, 5)
    assert bounds.low["rest"][0].dtype == np.float32
    assert bounds.low["rest"][0].min() == 0
    assert bounds.high["rest"][2] == 19


def test_constants_are_read_and_parameters_are_not():
    scale = jnp.array([1.0, 2.0, 3.0, 4.0, 5.0])
    bounds = bounds_of(lambda x: jax.nn.sigmoid(x) * scale)
    assert bounds.high[0].tolist() == [1, 2, 3, 4, 5]
    free = output_bounds(lambda p, x: jax.nn.sigmoid(x) * p, scale, LOGITS)
    assert free.high[0].tolist() == [INF] * 5


def test_dtypes_bound_integers():
    small = jax.ShapeDtypeStruct((3,), jnp.uint8)
    assert interval(lambda x: x, small) == (0, 255)
    assert interval(lambda x: x + 1, small) == (0, 255)  # may wrap around
    assert interval(lambda x: x.astype(jnp.float32) / 255, small) == (0, 1)
    assert interval(lambda x: ~x, jax.ShapeDtypeStruct((3,), jnp.bool_)) == (0, 1)


def test_keys_and_complex_numbers_are_let_through():
    key = jax.eval_shape(lambda: jax.random.key(0))
    assert interval(lambda k: jnp.tanh(jax.random.normal(k, (3,))), key) == (-1, 1)
    assert interval(lambda x: jnp.abs(x * 1j)) == (-INF, INF)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_uniform_random_numbers(dtype):
    key = jax.eval_shape(lambda: jax.random.key(0))
    draw = lambda k: jax.random.uniform(k, (3,), dtype, -2, 3)  # noqa: E731
    low, high = interval(draw, key)
    assert (low, high) == pytest.approx((-2, 3), abs=0.1)
    assert low <= -2 <= 3 <= high


def test_scan_over_layers_with_a_bounded_carry():
    def network(params, x):
        def layer(h, weight):
            h = jnp.tanh(h @ weight)
            return h, jax.nn.relu(h)

        return jax.lax.scan(layer, jnp.tanh(x), params)

    bounds = output_bounds(network, jnp.ones((3, 5, 5)), LOGITS)
    assert [low.shape for low in bounds.low] == [(4, 5), (3, 4, 5)]
    assert [float(low.min()) for low in bounds.low] == [-1, 0]
    assert [float(high.max()) for high in bounds.high] == [1, 1]


def test_scan_widens_what_grows():
    def count(x):
        return jax.lax.scan(
            lambda c, row: ((c[0] + jnp.exp(row), c[1] + 1), c[0]), (x[0], 0), x
        )

    (total, number), _ = bounds_of(count).low
    assert total.min() == -INF
    assert number <= 0

    def grow(x):
        return jax.lax.scan(lambda c, row: (c + jnp.exp(row), None), jnp.zeros(5), x)[0]

    assert interval(grow) == (0, INF)


def test_nested_calls_share_what_is_known():
    @jax.jit
    def total(exp):
        return exp.sum(-1, keepdims=True)

    assert interval(lambda x: jnp.exp(x) / total(jnp.exp(x))) == (0, 1)


class Classifier(nn.Module):
    units: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.LayerNorm()(nn.Dense(8)(x)))
        return nn.softmax(nn.Dense(self.units)(x))


@pytest.mark.parametrize(("units", "low"), [(3, 0), (1, 1)])
def test_linen(units, low):
    model = Classifier(units)
    params = jax.eval_shape(model.init, jax.random.key(0), LOGITS)
    bounds = output_bounds(model.apply, params, LOGITS)
    assert bounds.low.tolist() == [[low] * units] * 4
    assert bounds.high.tolist() == [[1] * units] * 4


def test_sixty_four_layers_in_two_seconds():
    def network(params, x):
        for weight, bias in params:
            x = jax.nn.relu(x @ weight + bias)
        return jax.nn.sigmoid(x)

    layer = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((999, 999), (999,))]
    start = time.perf_counter()
    bounds = output_bounds(
        network, [layer] * 64, jax.ShapeDtypeStruct((8, 999), jnp.float32)
    )
    assert time.perf_counter() - start < 2
    assert (bounds.low.min(), bounds.high.max()) == (0.5, 1)


def test_works_while_tracing():
    @jax.jit
    def fn(x):
        return x, output_bounds(lambda p, y: jax.nn.sigmoid(y * p), 1.0, x).high

    assert fn(jnp.ones(2))[1].tolist() == [1, 1]


UNARY = [
    *(jnp.exp, jnp.exp2, jnp.expm1, jnp.tanh, jnp.abs, jnp.square, jnp.negative),
    *(jnp.sin, jnp.cos, jnp.floor, jnp.ceil, jnp.round, jnp.sign, jnp.cbrt, jnp.arctan),
    *(jnp.sinh, jnp.cosh, jnp.arcsinh, jax.lax.erf, jax.lax.erfc, jnp.trunc),
    *(jax.nn.sigmoid, jax.nn.relu, jax.nn.relu6, jax.nn.elu, jax.nn.selu, jax.nn.celu),
    *(jax.nn.softplus, jax.nn.silu, jax.nn.gelu, jax.nn.hard_tanh, jax.nn.hard_sigmoid),
    *(jax.nn.soft_sign, jax.nn.log_sigmoid, jax.nn.softmax, jax.nn.log_softmax),
    *(softmax_by_hand, stable_softmax_by_hand, lambda x: x**3, lambda x: x**-2),
    *(lambda x: jnp.sqrt(jnp.abs(x)), lambda x: jnp.log(jnp.abs(x) + 0.5)),
    *(lambda x: jnp.log1p(jnp.abs(x)), lambda x: jax.lax.rsqrt(x * x + 0.1)),
    *(lambda x: jnp.abs(x) ** 0.7, lambda x: 1 / (jnp.abs(x) + 0.1), lambda x: 2 / x),
    *(lambda x: jnp.where(x > 0.5, x, -x), lambda x: jnp.where(x <= 0, 1.5, x)),
    *(lambda x: jnp.where((x > -1) & (x < 1), x, 0.25), lambda x: x * (x > 0)),
    *(lambda x: jnp.where(~(x > 1), x, jnp.where(x > 2, 2, x)), lambda x: x - x.max()),
    *(lambda x: jnp.clip(x, -0.75, 1.1), lambda x: x / jnp.sqrt((x * x).sum() + 0.1)),
    *(lambda x: x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-3),),
    *(lambda x: x.T.reshape(x.shape), lambda x: x[::-1], lambda x: jnp.sort(x, -1)),
    *(
        lambda x: jnp.cumsum(x, 0),
        lambda x: jax.lax.cummax(x),
        lambda x: jnp.roll(x, 1),
    ),
    *(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32),),
    *(lambda x: x.clip(-99, 99).astype(jnp.int8).astype(jnp.float32),),
    *(lambda x: (x > 0).astype(jnp.float32), lambda x: x - jax.nn.logsumexp(x, 0)),
    *(lambda x: x + x.mean(0), lambda x: x * x.min(-1, keepdims=True)),
    *(
        lambda x: x.var(-1, keepdims=True) + x,
        lambda x: (x - x.mean(0)) / (x.std(0) + 1),
    ),
    *(
        lambda x: (
            jnp.take(x, jnp.array([0, 0, 9]), axis=0, fill_value=7)[: len(x)] + x[:1]
        ),
    ),
    *(lambda x: jnp.pad(x, 1, constant_values=2)[1:-1, 1:-1], lambda x: x.at[0].set(3)),
    *(lambda x: jnp.concatenate([jnp.tanh(x[:, 1:]), x[:, :1] ** 2], -1),),
    *(lambda x: jnp.stack([x, jnp.tanh(x)], 1)[:, 1], lambda x: jnp.tanh(x) @ x.T @ x),
    *(lambda x: jax.lax.top_k(x, x.shape[1])[0], lambda x: jnp.remainder(x, 0.75)),
    *(lambda x: jax.lax.fori_loop(0, 3, lambda i, c: jnp.sin(c) + i * 0.1, x),),
    *(lambda x: jax.lax.scan(lambda c, r: (c * 0.5 + r, jnp.tanh(c)), x[0], x)[1],),
    *(lambda x: jax.lax.cond(x.sum() > 0, jnp.exp, lambda y: y * y, x),),
    *(lambda x: x * jax.random.uniform(jax.random.key(3), x.shape, minval=-1),),
    *(lambda x: (jnp.abs(x).clip(0, 999).astype(jnp.uint32) >> 1).astype(jnp.float32),),
]
BINARY = [
    *(jnp.add, jnp.subtract, jnp.multiply, jnp.maximum, jnp.minimum, jnp.divide),
    *(lambda x, y: jnp.where(x > y, x, y), lambda x, y: jnp.where(x < y, x - y, 0)),
    *(lambda x, y: x / (jnp.abs(x) + y * y), lambda x, y: jax.nn.sigmoid(x) * y),
    *(lambda x, y: jnp.clip(x, jnp.minimum(y, 0), 1), lambda x, y: (x >= y) * x),
    *(lambda x, y: jnp.maximum(jnp.abs(x), y) - jnp.abs(x), jnp.logaddexp),
    *(lambda x, y: jnp.abs(x) ** jnp.tanh(y), lambda x, y: x.T @ y @ y.T @ x @ x.T),
]


@st.composite
def programs(draw):
    """Operations, each on values that were there before, given by their places."""
    steps = []
    for count in range(2, 2 + draw(st.integers(1, 6))):
        places = st.integers(max(0, count - 3), count - 1)
        if draw(st.integers(0, 3)):
            steps.append((draw(st.sampled_from(UNARY)), (draw(places),)))
        else:
            steps.append((draw(st.sampled_from(BINARY)), (draw(places), draw(places))))
    return steps


def run(steps, params, inputs):
    """Returns all values of a program, the last from a parameter and an input."""
    values = [inputs, params * inputs]
    for fn, places in steps:
        values.append(fn(*(values[place] for place in places)))
        if values[-1].shape != inputs.shape:
            values[-1] = values[0]
    return values


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    steps=programs(),
    shape=st.sampled_from([(2, 3), (3, 3), (3, 1)]),
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([0.3, 1.0, 4.0]),
)
def test_no_output_leaves_its_interval(steps, shape, seed, scale):
    rng = np.random.default_rng(seed)
    params, inputs = (rng.normal(0, scale, shape).astype(np.float32) for _ in "pi")
    bounds = output_bounds(lambda p, x: run(steps, p, x), params, inputs)
    with jax.disable_jit():
        outputs = run(steps, jnp.asarray(params), jnp.asarray(inputs))
    for output, low, high in zip(outputs, bounds.low, bounds.high, strict=True):
        output = np.asarray(output, np.float32)
        if not np.isfinite(output).all():  # what follows may come from an overflow
            break
        assert (low <= output).all(), (low, output)
        assert (output <= high).all(), (high, output)
