"""Styles of control flow: loops over layers and over time, branches, devices."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from tests.tracing.styles import (
    DEAD,
    HEAD,
    SEQUENCES,
    B,
    Network,
    Style,
    W,
    X,
    as_arrays,
    mask,
    masks,
    stack_of_layers,
    stacked_params,
)
from tests.tracing.styles_transforms import (
    NO_GRADIENT,
    ONCE,
    TURNS_JOINED,
    hidden,
    mesh,
    once,
)

FALLING = W[0].copy()
"""A layer whose unit 1 is alive in the first turn of a loop and dead in the others."""
FALLING[:, 1] = (-1, 0, 0, 0)
FALLING_BIAS = np.array([1, 0, -100, 1], np.float32)
REPEATED = as_arrays({"w": FALLING, "b": FALLING_BIAS, "head": HEAD})


def layers(stack, **changes):
    """Several hidden layers with a head, as ``stack(params, x)`` runs them."""

    def build():
        network = Network(
            lambda params, x: stack(params, x) @ params["head"],
            stacked_params(3),
            X,
            ("w", "head"),
            {"w": masks(*DEAD[:3])},
            lambda sight: stack_of_layers(sight, 3),
            turns={"w": (3,)},
        )
        return network._replace(**changes)

    return build


def scan(wrap=lambda fn: fn, **options):
    block = wrap(hidden)

    def stack(params, x):
        def turn(x, own):
            return block(*own, x), None

        return jax.lax.scan(turn, x, (params["w"], params["b"]), **options)[0]

    return stack


def scan_in_scan(params, x):
    def outer(x, own):
        return jax.lax.scan(lambda x, own: (hidden(*own, x), None), x, own)[0], None

    pairs = params["w"].reshape(2, 2, 4, 4), params["b"].reshape(2, 2, 4)
    return jax.lax.scan(outer, x, pairs)[0]


def scan_with_data(params, x):
    factors = jnp.arange(1, 4, dtype=x.dtype)

    def turn(x, own):
        w, b, factor = own
        return hidden(w, b, x * factor), None

    return jax.lax.scan(turn, x, (params["w"], params["b"], factors))[0]


def scan_with_data_by_hand(sight):
    x = sight.array(X)
    for index in range(3):
        x = sight.relu("w", x * (index + 1) @ W[index] + B[index])
    return sight.linear("head", x @ HEAD)


def collected(params, x):
    def turn(x, own):
        x = hidden(*own, x)
        return x, x

    return jax.lax.scan(turn, x, (params["w"], params["b"]))[1].sum(0)


def collected_by_hand(sight):
    x, total = sight.array(X), 0
    for index in range(3):
        x = sight.relu("w", x @ W[index] + B[index])
        total = total + x
    return sight.linear("head", total @ HEAD)


def fori_loop(params, x):
    def turn(index, x):
        return hidden(params["w"][index], params["b"][index], x)

    return jax.lax.fori_loop(0, 3, turn, x)


def scan_over_indices(params, x):
    def turn(x, index):
        return hidden(params["w"][index], params["b"][index], x), None

    return jax.lax.scan(turn, x, np.array([2, 1, 0]))[0]


def backwards(sight):
    x = sight.array(X)
    for layer in (2, 1, 0):
        x = sight.relu("w", x @ W[layer] + B[layer])
    return sight.linear("head", x @ HEAD)


def repeated_by_hand(sight):
    x = sight.array(X)
    for _ in range(3):
        x = sight.relu("w", x @ FALLING + FALLING_BIAS)
    return sight.linear("head", x @ HEAD)


def repeat(loop, **changes):
    """One layer with the same weights in every turn of a loop."""

    def build():
        def apply_fn(params, x):
            turn = lambda x: hidden(params["w"], params["b"], x)  # noqa: E731
            return loop(turn, x) @ params["head"]

        network = Network(
            apply_fn,
            REPEATED,
            X,
            ("w", "head"),
            ONCE,
            repeated_by_hand,
            turns={"w": (3,)},
            own={"w": ()},
        )
        return network._replace(**changes)

    return build


def repeat_in_fori(turn, x):
    return jax.lax.fori_loop(0, 3, lambda _, x: turn(x), x)


def repeat_in_while(params, x):
    w, b = jax.lax.stop_gradient((params["w"], params["b"]))
    _, x = jax.lax.while_loop(
        lambda state: state[0] < 3,
        lambda state: (state[0] + 1, hidden(w, b, state[1])),
        (0, x),
    )
    return x @ params["head"]


def while_over_layers(params, x):
    w, b = jax.lax.stop_gradient((params["w"], params["b"]))

    def turn(state):
        index, x = state
        return index + 1, hidden(w[index], b[index], x)

    return jax.lax.while_loop(lambda state: state[0] < 3, turn, (0, x))[1]


IN_WHILE = {"turns": {}, "own": {}, "last": ("w",), "no_gradient": ("w",)}


def while_loop():
    network = repeat(repeat_in_fori, **IN_WHILE)()
    return network._replace(apply_fn=repeat_in_while)


def while_for_each():
    def apply_fn(params, x):
        w, b = jax.lax.stop_gradient((params["w"], params["b"]))

        def one(row):
            state = jnp.sum(row > 9), row  # a number of its own for each example
            return jax.lax.while_loop(
                lambda state: state[0] < 3,
                lambda state: (state[0] + 1, hidden(w, b, state[1])),
                state,
            )[1]

        return jax.vmap(one)(x) @ params["head"]

    return while_loop()._replace(apply_fn=apply_fn)


def recurrent():
    def apply_fn(params, x):
        def turn(h, x):
            h = jax.nn.relu(x @ params["wx"] + h @ params["wh"] + params["b"])
            return h, h

        outputs = jax.lax.scan(turn, jnp.zeros((8, 4)), jnp.swapaxes(x, 0, 1))[1]
        return outputs @ params["head"]

    def reference(sight):
        x = sight.array(SEQUENCES)
        h, outputs = 0 * x[:, 0], []
        for time in range(3):
            entering = sight.linear("wx", x[:, time] @ W[0])
            h = sight.relu("wh", entering + h @ W[1] + B[0])
            outputs.append(h)
        return sight.linear("head", sight.xp.stack(outputs) @ HEAD)

    return Network(
        apply_fn,
        as_arrays({"wx": W[0], "wh": W[1], "b": B[0], "head": HEAD}),
        SEQUENCES,
        ("wx", "wh", "head"),
        {"wh": mask(2)},
        reference,
        turns={"wx": (3,), "wh": (3,)},
        own={"wx": (), "wh": ()},
    )


def branches(choose, *, taken, count):
    """Layers of which only one is run."""

    def build():
        def apply_fn(params, x):
            own = [(params[f"w{i}"], params[f"b{i}"]) for i in range(count)]
            runs = [lambda x, own=one: hidden(*own, x) for one in own]
            return choose(x, runs) @ params["head"]

        def reference(sight):
            x = sight.relu(f"w{taken}", sight.array(X) @ W[taken] + B[taken])
            return sight.linear("head", x @ HEAD)

        names = tuple(f"w{i}" for i in range(count))
        params = {f"w{i}": W[i] for i in range(count)}
        params |= {f"b{i}": B[i] for i in range(count)}
        dead = {f"w{i}": mask(DEAD[i]) & (i == taken) for i in range(count)}
        return Network(
            apply_fn,
            as_arrays({**params, "head": HEAD}),
            X,
            (*names, "head"),
            dead,
            reference,
            not_run=tuple(name for name in names if name != f"w{taken}"),
        )

    return build


def cond(x, runs):
    return jax.lax.cond(jnp.sum(x**2) > 0, runs[1], runs[0], x)


def switch(x, runs):
    return jax.lax.switch(jnp.sum(x**2 < 0), runs, x)


def sometimes(params, x):
    def turn(x, own):
        index, w, b = own
        return jax.lax.cond(index == 1, lambda x: x, lambda x: hidden(w, b, x), x), None

    return jax.lax.scan(turn, x, (jnp.arange(3), params["w"], params["b"]))[0]


def shard_map(fn):
    return jax.shard_map(
        fn, mesh=mesh(), in_specs=(P(), P(), P("data")), out_specs=P("data")
    )


def by_device(sight):
    count = mesh().size
    parts = sight.array(X).reshape(count, -1, 4)
    parts = [sight.relu("w", part @ W[0] + B[0]) for part in parts]
    return sight.linear("head", sight.xp.concatenate(parts) @ HEAD)


def in_shard_map():
    turns = {"w": (mesh().size,)}
    network = once(shard_map)()
    return network._replace(reference=by_device, turns=turns, own={"w": ()})


def scan_in_shard_map():
    def by_hand(sight):
        parts = sight.array(X).reshape(mesh().size, -1, 4)
        for turn in range(3):
            parts = [
                sight.relu("w", one @ W[turn] + B[turn], 3 * device + turn)
                for device, one in enumerate(parts)
            ]
        return sight.linear("head", sight.xp.concatenate(parts) @ HEAD)

    def stack(params, x):
        run = shard_map(lambda w, b, x: scan()({"w": w, "b": b}, x))
        return run(params["w"], params["b"], x)

    turns, own = {"w": (mesh().size, 3)}, {"w": (1,)}
    return layers(stack, reference=by_hand, turns=turns, own=own)()


PAIRS = {
    "params": stacked_params(4),
    "dead": {"w": masks(*DEAD).reshape(2, 2, 4)},
    "reference": lambda sight: stack_of_layers(sight, 4),
    "turns": {"w": (2, 2)},
}
REVERSED = {"reference": lambda sight: stack_of_layers(sight, 3, order=(2, 1, 0))}
BACKWARDS = {
    "reference": backwards,
    "dead": {"w": masks(*DEAD[2::-1])},
}
SKIPPED = {
    "reference": lambda sight: stack_of_layers(sight, 3, order=(0, 2)),
    "dead": {"w": masks(*DEAD[:3]) & [[True], [False], [True]]},
}
NONE_DEAD = {"dead": {"w": np.zeros(4, bool)}, **IN_WHILE}
FORWARD = f"the mask is of all turns, the activation of the last; {NO_GRADIENT}"
STYLES = tuple(
    Style("transforms", name, build, note)
    for name, build, note in (
        ("scan over layers", layers(scan()), ""),
        ("scan of remat", layers(scan(jax.checkpoint)), ""),
        ("scan in scan", layers(scan_in_scan, **PAIRS), ""),
        (
            "scan over layers and data",
            layers(scan_with_data, reference=scan_with_data_by_hand),
            "",
        ),
        ("scan, outputs stacked", layers(collected, reference=collected_by_hand), ""),
        ("scan, reverse", layers(scan(reverse=True), **REVERSED), ""),
        ("scan, unroll=2", layers(scan(unroll=2)), ""),
        ("scan over time", recurrent, TURNS_JOINED),
        ("scan over indices of layers", layers(scan_over_indices, **BACKWARDS), ""),
        ("fori_loop over layers", layers(fori_loop), ""),
        ("fori_loop, the same layer", repeat(repeat_in_fori), TURNS_JOINED),
        ("while_loop, the same layer", while_loop, FORWARD),
        ("while_loop over layers", layers(while_over_layers, **NONE_DEAD), FORWARD),
        (
            "cond",
            branches(cond, taken=1, count=2),
            "a branch that is not taken is named; nothing in it counts as dead",
        ),
        ("switch", branches(switch, taken=0, count=3), ""),
        (
            "cond in scan",
            layers(sometimes, **SKIPPED),
            "a turn that is not run is not dead",
        ),
        ("shard_map, data parallel", in_shard_map, "devices count as more examples"),
        ("scan in shard_map", scan_in_shard_map, ""),
        (
            "vmap of while_loop",
            while_for_each,
            "each example takes its own number of turns",
        ),
    )
)
