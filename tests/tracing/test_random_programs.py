"""Networks such as ("scan", ("residual", ("dense", "relu"))), drawn from a grammar."""

import functools
import inspect as reflection
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

import nnsanity as ns
from nnsanity.tracing.layers import inspect
from nnsanity.tracing.replace import Replacement, replaced
from nnsanity.tracing.tap import Taps, evaluate

EXAMPLES, POSITIONS, WIDTH, ROWS = 2, 3, 4, 5
DOTS = jax.checkpoint_policies.dots_saveable
DEVICES = min(jax.device_count(), EXAMPLES)
GRADIENTS = ("back", "stopped", "unseen")


class Use(NamedTuple):
    """A weight, turns of the loops around it and whether they have their own."""

    leaf: str
    loops: tuple[tuple[int, bool], ...] = ()
    gradient: str = "back"


class Part(NamedTuple):
    """``apply(params, x)`` of the same shape as ``x``, and the weights it uses."""

    apply: Callable
    params: dict
    uses: tuple[Use, ...]


tanh_with_own_tangent = jax.custom_jvp(lambda x: jnp.tanh(x))
tanh_with_own_tangent.defjvps(lambda tangent, output, x: 2 * tangent)
NONLINEARITIES = {
    "none": lambda x: x,
    "tanh": jnp.tanh,
    **{kind: getattr(jax.nn, kind) for kind in ("relu", "gelu", "silu", "leaky_relu")},
    "softmax": jax.nn.softmax,
    "maximum": lambda x: jnp.maximum(x, 0),
    "where": lambda x: jnp.where(x > 0, x, 0),
    "own tangent": tanh_with_own_tangent,
}


def convolution(x, kernel, **options):
    images, numbers = x.reshape(-1, *x.shape[-2:]), ("NTC", "TIO", "NTC")
    outputs = jax.lax.conv_general_dilated(
        images, kernel, (1,), "SAME", dimension_numbers=numbers, **options
    )
    return outputs.reshape(x.shape)


with_own_gradient = jax.custom_vjp(lambda x, w: x @ w)
with_own_gradient.defvjp(
    lambda x, w: (x @ w, (x, w)),
    lambda kept, grad: jax.vjp(jnp.matmul, *kept)[1](2 * grad),
)
SHAPES = {
    **dict.fromkeys(("w", "int8"), (WIDTH, WIDTH)),
    **dict.fromkeys(("bias", "scale"), (WIDTH,)),
    **{"flat": (WIDTH**2,), "into": (WIDTH, 2, 2), "out": (2, 2, WIDTH)},
    **{"experts": (POSITIONS, WIDTH, WIDTH), "kernel": (3, WIDTH, WIDTH)},
    **{"half": (3, 2, WIDTH), "side": (WIDTH, 1), "down": (WIDTH, 1), "up": (1, WIDTH)},
}
NO_MAIN_WEIGHTS = {"bias", "scale", "side"}
LAYERS = {
    "dense": lambda x, w: x @ w,
    "bias": lambda x, w, bias: x @ w + bias,
    "transposed": lambda x, w: x @ w.T,
    "weight first": lambda x, w: jnp.einsum("dk,...d->...k", w, x),
    "reshaped": lambda x, flat: x @ flat.reshape(WIDTH, WIDTH),
    "bfloat16": lambda x, w: (x.astype("bfloat16") @ w.astype("bfloat16")).astype(
        x.dtype
    ),
    "masked": lambda x, w: x @ (w * np.tri(WIDTH, dtype=np.float32)),
    "quantized": lambda x, int8, scale: x @ (int8.astype(x.dtype) * scale),
    "weight normed": lambda x, w, scale: (
        x @ (w / jnp.sqrt(jnp.sum(w**2, axis=0) + 0.1) * scale)
    ),
    "normalized": lambda x, w, scale, bias: (
        jax.nn.standardize(x @ w, epsilon=0.1) * scale + bias
    ),
    "heads": lambda x, into, out: jnp.einsum(
        "...hk,hkd->...d", jnp.einsum("...d,dhk->...hk", x, into), out
    ),
    "experts": lambda x, experts: jnp.einsum("...td,tdk->...tk", x, experts),
    "convolution": convolution,
    "grouped": lambda x, half: convolution(x, half, feature_group_count=2),
    "dilated": lambda x, kernel: convolution(x, kernel, rhs_dilation=(2,)),
    "low rank within": lambda x, w, side: x @ (w + side @ side.T),
    "low rank beside": lambda x, w, down, up: x @ w + x @ down @ up,
    "tied": lambda x, w: jnp.tanh(x @ w) @ w.T,
    "own gradient": with_own_gradient,
}


def layer(kind, nonlinearity):
    function = LAYERS[kind]
    names = [
        name for name in reflection.signature(function).parameters if name in SHAPES
    ]
    main = [name for name in names if name not in NO_MAIN_WEIGHTS]
    gradient = "unseen" if kind == "own gradient" else "back"
    return Part(
        lambda p, x: NONLINEARITIES[nonlinearity](function(x, *(p[n] for n in names))),
        {name: initial(name, SHAPES[name]) for name in names},
        tuple(Use(name, (), gradient) for name in main * (1 + (kind == "tied"))),
    )


def initial(name, shape):
    random = np.random.default_rng([*name.encode()])
    values = random.normal(size=shape) * 0.6
    return (4 * values).astype(np.int8) if name == "int8" else values.astype(np.float32)


# Combinators of parts: what they make of ``f(params, x)``.


def scanned(f, **options):
    def turn(h, own):
        return f(own, h), None

    return lambda p, x: jax.lax.scan(turn, x, p, **options)[0]


def recurrent(f):
    def turn(p, h, entering):
        return f(p, h + entering), jnp.sin(h)

    def scan(p, x):
        last, hs = jax.lax.scan(functools.partial(turn, p), x, jnp.stack([x, x / 2]))
        return last + hs.sum(0)

    return scan


def counted(f):
    def turn(p, index, h):
        return f(jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], p), h)

    return lambda p, x: jax.lax.fori_loop(0, 2, functools.partial(turn, p), x)


def repeated(f):
    def loop(p, x):
        p, start = jax.lax.stop_gradient((p, (0, x)))
        turn = jax.jit(lambda state: (state[0] + 1, f(p, state[1])))
        return x + jax.lax.while_loop(lambda state: state[0] < 2, turn, start)[1]

    return loop


def sharded(f):
    mesh = jax.make_mesh((DEVICES,), ("batch",), axis_types=(AxisType.Auto,))
    whole, part = PartitionSpec(), PartitionSpec("batch")
    return jax.shard_map(f, mesh=mesh, in_specs=(whole, part), out_specs=part)


def branching(f, g, *others):
    def branch(p, x):
        branches = [lambda x: f(p["0"], x), lambda x: g(p["1"], x), *others]
        number = jnp.abs(jnp.sum(8 * x)).astype(jnp.int32) % len(branches)
        return jax.lax.switch(number, branches, x)

    return branch


AROUND_ONE = {
    "residual": lambda f: lambda p, x: x + f(p, x),
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "checkpoint with policy": functools.partial(jax.checkpoint, policy=DOTS),
    "scan": scanned,
    "scan in reverse": functools.partial(scanned, reverse=True),
    "scan unrolled": functools.partial(scanned, unroll=2),
    "fori_loop": counted,
    "recurrent": recurrent,
    "while_loop": repeated,
    "stopped": lambda f: lambda p, x: x + jax.lax.stop_gradient(f(p, x)),
}
OVER_BATCH = {  # inside of these there is no batch, or only a part of it
    "vmap": functools.partial(jax.vmap, in_axes=(None, 0)),
    "map": lambda f: lambda p, x: jax.lax.map(functools.partial(f, p), x),
    "shard_map": sharded,
}
OF_TWO = {
    "sequence": lambda f, g: lambda p, x: g(p["1"], f(p["0"], x)),
    "again": lambda f, g: lambda p, x: f(p["0"], g(p["1"], f(p["0"], x))),
    "cond": branching,
    "switch": lambda f, g: branching(f, g, jnp.sin),
}
WITHIN = {  # turns with weights of their own, or with the same; what comes back
    **{name: {"stack": 2} for name in ("scan", "scan in reverse", "fori_loop")},
    **{"scan unrolled": {"stack": 3}, "recurrent": {"turns": 2}},
    **{"map": {"turns": EXAMPLES}, "shard_map": {"turns": DEVICES}},
    **{"while_loop": {"gradient": "unseen"}, "stopped": {"gradient": "stopped"}},
}


def around(part, wrap, *, stack=0, turns=0, gradient="back"):
    def stacked(leaf):
        leaves = [leaf * (1 + 0.25 * turn) for turn in range(stack)]
        return np.stack(leaves).astype(leaf.dtype)

    def changed(use):
        loops = ((stack or turns, bool(stack)),) if stack or turns else ()
        worst = max(use.gradient, gradient, key=GRADIENTS.index)
        return Use(use.leaf, loops + use.loops, worst)

    params = jax.tree.map(stacked, part.params) if stack else part.params
    return Part(wrap(part.apply), params, tuple(map(changed, part.uses)))


def build(text):
    """Makes the part that is written down."""
    name, *rest = text
    if name in LAYERS:
        return layer(name, *rest)
    parts = [build(one) for one in rest]
    if name not in OF_TWO:
        return around(*parts, (AROUND_ONE | OVER_BATCH)[name], **WITHIN.get(name, {}))
    uses = [
        use._replace(leaf=f"{index}/{use.leaf}")
        for index in ("010" if name == "again" else "01")
        for use in parts[int(index)].uses
    ]
    params = {str(index): part.params for index, part in enumerate(parts)}
    return Part(OF_TWO[name](*(part.apply for part in parts)), params, tuple(uses))


ENTRIES = {
    "floats": lambda table, x: x,
    "look-up": lambda table, x: table[x],
    "take": lambda table, x: jnp.take(table, x, axis=0),
    "one hot": lambda table, x: jax.nn.one_hot(x, ROWS) @ table,
}


def parts_of(depth, *, in_batch=True):
    """Draws a part whose combinators are nested up to a depth."""
    simple = st.tuples(st.sampled_from([*LAYERS]), st.sampled_from([*NONLINEARITIES]))
    if depth == 0:
        return simple
    same, row = (parts_of(depth - 1, in_batch=flag) for flag in (in_batch, False))
    one = st.tuples(st.sampled_from([*AROUND_ONE]), same)
    two = st.tuples(st.sampled_from([*OF_TWO]), same, same)
    over = st.tuples(st.sampled_from([*OVER_BATCH]), row)
    return st.one_of(simple, one, two, *([over] if in_batch else []))


def programs(depth):
    return st.tuples(st.sampled_from([*ENTRIES]), parts_of(depth))


def program_of(text):
    """Returns the function, its parameters and inputs, and the weights that it uses."""
    entry, part = text[0], build(text[1])
    uses = [use._replace(leaf=f"net/{use.leaf}") for use in part.uses]
    params = {"net": part.params}
    inputs = initial("inputs", (EXAMPLES, POSITIONS, WIDTH))
    if entry != "floats":
        inputs = np.arange(EXAMPLES * POSITIONS).reshape(EXAMPLES, POSITIONS) % ROWS
        params["table"] = initial("table", (ROWS, WIDTH))
        uses = [Use("table"), *uses]

    def apply_fn(params, inputs):
        return part.apply(params["net"], ENTRIES[entry](params.get("table"), inputs))

    return apply_fn, params, inputs, uses


def loss_of(fn):
    return lambda *arguments: jnp.mean(jnp.sin(fn(*arguments) + 0.3))


value_and_grad = functools.partial(jax.value_and_grad, allow_int=True)
FAST = {"xla_backend_optimization_level": 0}


def assert_same(text, found, expected):
    is_coarse = "bfloat16" in str(text)  # a last digit may tip a cast
    rtol, atol = (0.05, 0.01) if is_coarse else (1e-5, 1e-6)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        if one.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(one, other, rtol=rtol, atol=atol)


@hypothesis.settings(max_examples=150)
@hypothesis.given(programs(depth=3))
def test_every_weight_is_found_once_by_its_name_and_stack(text):
    fn, params, inputs, uses = program_of(text)
    found = ns.layers(fn, params, inputs)
    assert ns.layers(jax.jit(fn), params, inputs) == found
    assert len({one.name for one in found}) == len(found) == len(uses)
    values = jax.eval_shape(lambda *args: ns.activations(fn, *args), params, inputs)
    assert set(values) == {one.name for one in found}
    counts = Counter()
    for one, use in zip(found, uses, strict=True):
        counts[use.leaf] += 1
        name, _, number = one.name.partition("#")
        assert name in (use.leaf, use.leaf.rpartition("/")[0])
        assert int(number or 1) == counts[use.leaf]
        assert one.stack == tuple(turns for turns, is_own in use.loops if is_own)
        turns = tuple(turns for turns, _ in use.loops)
        assert values[one.name].shape[: len(turns)] == turns


def tapped(fn, params, inputs):
    """Reads and writes at every place of the layers, where they can be written."""
    network = inspect(fn, params, inputs)
    sites = {
        network.steps.sites[value]: network.without_gradient(one) is None
        for one in network.layers
        for value in (one.operand, one.before, one.after)
    }
    read = dict.fromkeys(filter(None, sites), lambda value: value)
    write = {site: same for site, same in read.items() if sites[site]}
    leaves = jax.tree.leaves((params, inputs))
    (outputs,), readings = evaluate(network.program, leaves, Taps(read, write))
    assert set(readings) == set(read)
    return outputs


def replaced_by_itself(fn, params, inputs):
    blueprint = inspect(fn, params, inputs)
    keep = Replacement(lambda values: values.after)
    every = {one.layer.name: keep for one in blueprint.layers}
    return replaced(fn, blueprint, every)(params, inputs)


@hypothesis.settings(max_examples=16)
@hypothesis.given(programs(depth=2), st.sampled_from([tapped, replaced_by_itself]))
def test_the_identity_at_every_layer_changes_nothing(text, change):
    fn, *arguments, _ = program_of(text)
    again = functools.partial(change, fn)

    @functools.partial(jax.jit, compiler_options=FAST)
    def both(*arguments):
        return [value_and_grad(loss_of(f))(*arguments) for f in (fn, again)]

    expected, found = both(*arguments)
    assert_same(text, found, expected)


@hypothesis.settings(max_examples=12)
@hypothesis.given(programs(depth=2), st.booleans(), st.booleans())
def test_value_and_grad_is_that_of_jax_and_sees_what_comes_back(text, has_aux, traced):
    fn, params, inputs, uses = program_of(text)

    def loss_fn(params, inputs):
        loss = loss_of(fn)(params, inputs)
        return (loss, {"twice": 2 * loss}) if has_aux else loss

    @functools.partial(jax.jit, compiler_options=FAST)
    def both(when, *arguments):
        when = when if traced else True
        watched = ns.value_and_grad(loss_fn, has_aux=has_aux, when=when)
        return watched(*arguments), value_and_grad(loss_fn, has_aux=has_aux)(*arguments)

    for when in (True, False):
        found, expected = both(jnp.asarray(when), params, inputs)
        (value, signals), grads = found
        assert_same(text, (value, grads), expected)
        assert bool(signals.watched) == (when or not traced)
        if signals.watched:
            names = (one.name for one in ns.layers(fn, params, inputs))
            assert_comes_back(dict(zip(names, uses, strict=True)), signals, grads)
        else:
            assert not any(np.any(leaf) for leaf in jax.tree.leaves(signals))


def assert_comes_back(uses, signals, grads):
    """A branch that was not taken has nothing that comes back."""
    rms, back = signals.preactivation_gradient_rms, Counter()
    leaves = dict(zip(ns.leaf_names(grads), jax.tree.leaves(grads), strict=True))
    for name, use in uses.items():
        assert (name in rms) == (use.gradient != "unseen")
        seen = np.asarray(signals.preactivation_rms[name])
        ran = np.broadcast_to(signals.ran.get(name, True), seen.shape)
        values = np.asarray(rms.get(name, np.ones(ran.shape)))
        back[use.leaf] += np.sum(values)
        assert np.isfinite(values).all()
        assert use.gradient != "stopped" or not values[ran].any()
    for leaf, total in back.items():
        is_trained = leaves[leaf].dtype != jax.dtypes.float0
        assert total > 0 or not (is_trained and leaves[leaf].any())
