"""Styles of the transforms of JAX around the layers of a plain network."""

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.tracing.styles import (
    HEAD,
    B,
    Network,
    Style,
    W,
    X,
    as_arrays,
    mask,
    one_layer,
)

ONCE = {"w": mask(2)}
PLAIN = as_arrays({"w": W[0], "b": B[0], "head": HEAD})


def hidden(w, b, x):
    return jax.nn.relu(x @ w + b)


def once(wrap):
    """A network of one hidden layer, which ``wrap`` puts behind a transform."""

    def build():
        wrapped = wrap(hidden)

        def apply_fn(params, x):
            return wrapped(params["w"], params["b"], x) @ params["head"]

        return Network(apply_fn, PLAIN, X, ("w", "head"), ONCE, one_layer)

    return build


def mesh():
    """Four devices where there are as many, else one."""
    count = 4 if jax.device_count() >= 4 else 1
    return jax.make_mesh(
        (count,),
        ("data",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[:count],
    )


def in_shardings(fn):
    whole, rows = NamedSharding(mesh(), P()), NamedSharding(mesh(), P("data"))
    return jax.jit(fn, in_shardings=(whole, whole, rows))


def policy(fn):
    return jax.checkpoint(fn, policy=jax.checkpoint_policies.dots_saveable)


def each_row(fn):
    return jax.vmap(fn, (None, None, 0))


def with_vjp(fn):
    """A layer whose gradient is twice the usual one, so that its loss is seen."""

    @jax.custom_vjp
    def doubled(w, b, x):
        return fn(w, b, x)

    def forward(*arguments):
        return jax.vjp(fn, *arguments)

    doubled.defvjp(forward, lambda pull, grad: pull(2 * grad))
    return doubled


def with_jvp(fn):
    @jax.custom_jvp
    def doubled(w, b, x):
        return fn(w, b, x)

    @doubled.defjvp
    def _(primals, tangents):
        value, tangent = jax.jvp(fn, primals, tangents)
        return value, 2 * tangent

    return doubled


def own_derivative(wrap):
    return lambda: once(wrap)()._replace(no_gradient=("w",))


def each_in_turn(fn):
    return lambda w, b, x: jax.lax.map(lambda row: fn(w, b, row), x)


def lax_map():
    def reference(sight):
        rows = [sight.relu("w", row @ W[0] + B[0]) for row in sight.array(X)]
        return sight.linear("head", sight.xp.stack(rows) @ HEAD)

    network = once(each_in_turn)()
    return network._replace(reference=reference, turns={"w": (32,)}, own={"w": ()})


def outside():
    """Several networks at once; ``test_styles`` puts vmap around what looks inside."""
    return once(lambda fn: fn)()


def inside_composite(fn):
    return jax.lax.composite(fn, name="project.layer")


def inside_vmap_rule(fn):
    called = jax.custom_batching.custom_vmap(fn)

    @called.def_vmap
    def _(size, is_batched, *arguments):
        del size, is_batched
        return fn(*arguments), True

    return called


def where_positive(fn):
    """A branch for each example, which vmap turns into a selection."""

    def one(w, b, row):
        return jax.lax.cond(row[0] > 0, lambda row: fn(w, b, row), lambda row: row, row)

    return each_row(one)


def both_branches(sight):
    """By hand: vmap runs both branches on every example, and keeps one result."""
    x = sight.array(X)
    hidden = sight.relu("w", x @ W[0] + B[0])
    return sight.linear("head", sight.xp.where(x[:, :1] > 0, hidden, x) @ HEAD)


def told(wrap):
    """A layer that is not looked into, and named with the reason."""
    changes = {"names": ("head",), "dead": {}, "uninspected": ("b", "w")}
    return lambda: once(wrap)()._replace(**changes, reference=None)


TURNS_JOINED = "turns with the same weights count as more examples"
NO_JAX_GRADIENT = "JAX has no gradient of it either"
NO_GRADIENT = "no gradient by what passes through it, and the result says so"
STYLES = tuple(
    Style("transforms", name, build, note)
    for name, build, note in (
        ("jit", once(jax.jit), ""),
        ("jit with in_shardings", once(in_shardings), ""),
        ("vmap inside, for each example", once(each_row), ""),
        ("vmap outside, over stacked parameters", outside, "results get an axis more"),
        ("remat with a policy", once(policy), ""),
        ("named_call", once(jax.named_call), ""),
        ("custom_vjp around a layer", own_derivative(with_vjp), NO_GRADIENT),
        ("custom_jvp around a layer", own_derivative(with_jvp), NO_GRADIENT),
        ("lax.map", lax_map, TURNS_JOINED),
        (
            "cond for each example under vmap",
            lambda: once(where_positive)()._replace(reference=both_branches),
            "examples of the other branch count as well",
        ),
        ("lax.composite around a layer", told(inside_composite), NO_JAX_GRADIENT),
        ("custom_vmap around a layer", told(inside_vmap_rule), NO_JAX_GRADIENT),
    )
)
