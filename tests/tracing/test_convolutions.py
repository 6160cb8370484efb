import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnsanity as ns
from nnsanity.tracing import compat, control
from nnsanity.tracing.convolutions import channels_last
from nnsanity.trials.problem import checked_problem
from nnsanity.trials.trial import prepare
from tests.devices import printed_with_devices

# Elsewhere the compiler chooses layouts, and GPUs have no convolution without axes.
pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="for CPUs")

RNG = np.random.default_rng(0)
LAYOUTS = {
    "NHWC": ((2, 8, 6, 4), (3, 2, 4, 6), ("NHWC", "HWIO", "NHWC")),
    "NCHW": ((2, 4, 8, 6), (6, 4, 3, 2), ("NCHW", "OIHW", "NCHW")),
    "mixed": ((8, 2, 6, 4), (6, 3, 2, 4), ("HNWC", "OHWI", "CNHW")),
    "one axis": ((2, 9, 4), (3, 4, 6), ("NWC", "WIO", "NWC")),
    "three axes": ((2, 4, 5, 4, 3), (6, 4, 2, 2, 2), ("NCDHW", "OIDHW", "NCDHW")),
    "no axis": ((2, 4), (4, 6), ("NC", "IO", "NC")),
}
OPTIONS = {
    "plain": {},
    "strided": {"stride": 2, "padding": "SAME"},
    "dilated": {"rhs_dilation": 2},
    "transposed": {"lhs_dilation": 2, "padding": (2, 1)},
    "grouped": {"feature_group_count": 2},
}


def draw(shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def convolution(layout, *, stride=1, padding="VALID", **options):
    rank = len(LAYOUTS[layout][0]) - 2
    options = {
        name: (value,) * rank if "dilation" in name else value
        for name, value in options.items()
    }
    return functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(stride,) * rank,
        padding=padding if isinstance(padding, str) else [padding] * rank,
        dimension_numbers=LAYOUTS[layout][2],
        **options,
    )


def layouts(jaxpr, *, within=()):
    """Of all convolutions, also inside of calls and control flow.

    Args:
        jaxpr: a program.
        within: kinds of control flow in which alone they count; everywhere if none.
    """
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "conv_general_dilated" and not within:
            yield eqn.params["dimension_numbers"]
        called = compat.called_jaxpr(eqn)
        for inner in [called[0]] if called else []:
            yield from layouts(inner, within=within)
        for body in control.bodies(eqn, ()):
            yield from layouts(body.jaxpr, within=() if name in within else within)


def is_last(numbers):
    """Whether the channels are."""
    rank = len(numbers.lhs_spec)
    image = (0, rank - 1, *range(1, rank - 1))
    kernel = (rank - 1, rank - 2, *range(rank - 2))
    return (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec) == (
        image,
        kernel,
        image,
    )


def assert_channels_are_last(fn, *args):
    """And that there are as many convolutions as there were."""
    found, plain = (
        list(layouts(jax.make_jaxpr(one)(*args).jaxpr))
        for one in (channels_last(fn), fn)
    )
    assert len(found) == len(plain) > 0
    assert all(map(is_last, found))


def assert_equal(fn, *args):
    expected, found = jax.jit(fn)(*args), jax.jit(channels_last(fn))(*args)
    assert jax.tree.structure(expected) == jax.tree.structure(found)
    for one, other in zip(
        jax.tree.leaves(expected), jax.tree.leaves(found), strict=True
    ):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients(layout, options):
    inputs, kernel, numbers = LAYOUTS[layout]
    kernel = list(kernel)
    if options == "grouped":
        kernel[numbers[1].index("I")] //= 2
    convolve = convolution(layout, **OPTIONS[options])

    def loss_fn(kernel, inputs):
        return jnp.mean(jnp.sin(convolve(inputs, kernel)))

    fn = jax.value_and_grad(loss_fn, argnums=(0, 1))
    arguments = draw(kernel), draw(inputs)
    assert_equal(fn, *arguments)
    assert_channels_are_last(fn, *arguments)


def deep(kernel, inputs):
    """A branch inside of a loop inside of a call, twice computed."""
    convolve = convolution("NCHW", padding="SAME")

    @jax.checkpoint
    def block(inputs, kernel):
        return jax.lax.cond(
            kernel[0, 0, 0, 0] > 0,
            lambda: jnp.tanh(convolve(inputs, kernel)),
            lambda: jax.nn.relu(convolve(inputs, 2 * kernel)),
        )

    @jax.jit
    def network(kernel, inputs):
        return jax.lax.scan(
            lambda now, one: (block(now, one), jnp.max(now)), inputs, kernel
        )

    outputs, largest = network(kernel, inputs)
    return jnp.mean(outputs**2) + jnp.sum(largest)


def test_inside_of_loops_branches_and_calls():
    fn = jax.value_and_grad(deep)
    arguments = draw((3, 4, 4, 3, 2)), draw((2, 4, 8, 6))
    assert_equal(fn, *arguments)
    assert_channels_are_last(fn, *arguments)


def test_while_loops():
    def fn(kernel, inputs):
        convolve = convolution("NCHW", padding="SAME")
        return jax.lax.while_loop(
            lambda now: jnp.mean(now**2) < 100,
            lambda now: convolve(now, kernel) + now,
            inputs,
        )

    arguments = draw((4, 4, 3, 2)), draw((2, 4, 8, 6))
    assert_equal(fn, *arguments)
    assert_channels_are_last(fn, *arguments)


def test_trees_and_what_the_function_closes_over():
    shift = draw((2, 4, 7, 6))

    def fn(tree):
        convolve = convolution("NCHW", padding=(0, 1))
        kernel = tree["kernel"][:, :, :2, :]
        return {"a": [convolve(tree["inputs"], kernel)], "b": (shift, None, 3)}

    assert_equal(fn, {"inputs": draw((2, 4, 8, 6)), "kernel": draw((6, 4, 3, 3))})


def test_half_precision_keeps_what_was_asked_for():
    convolve = functools.partial(
        convolution("NCHW"), preferred_element_type=jnp.float32
    )
    arguments = draw((2, 4, 8, 6)), draw((6, 4, 3, 2))
    assert_equal(convolve, *(one.astype(jnp.bfloat16) for one in arguments))


def test_side_by_side():
    fn = jax.grad(lambda kernel, one: jnp.sum(convolution("NCHW")(one, kernel) ** 2))
    kernels, inputs = draw((3, 6, 4, 3, 2)), draw((3, 2, 4, 8, 6))
    expected, found = (
        jax.vmap(fn)(kernels, inputs),
        jax.vmap(channels_last(fn))(kernels, inputs),
    )
    np.testing.assert_allclose(expected, found, rtol=1e-5, atol=1e-5)


def test_other_devices_choose_for_themselves(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert channels_last(deep) is deep


KEY = jax.random.key(0)
IMAGES, ANSWERS = draw((8, 3, 6, 6)), draw((8, 4))
NETWORK = {"kernel": draw((4, 3, 3, 3)), "w": draw((4, 4))}


def apply_fn(params, images):
    hidden = convolution("NCHW", padding="SAME")(images, params["kernel"])
    return jnp.mean(jnp.tanh(hidden), (2, 3)) @ params["w"]


def loss_fn(params, batch):
    return jnp.mean((apply_fn(params, batch[0]) - batch[1]) ** 2)


def grouped_loss_fn(params, batch):
    """Whose examples have no patches, and are convolved one by one."""
    convolve = convolution("NCHW", padding="SAME", feature_group_count=2)
    hidden = jnp.mean(jnp.tanh(convolve(batch[0][:, :2], params["kernel"])), (2, 3))
    return jnp.mean((hidden @ params["w"] - batch[1]) ** 2)


def noisy_loss_fn(params, batch, key):
    return loss_fn(params, batch) + 0.1 * jax.random.normal(key) * params["w"][0, 0]


BATCH = IMAGES, ANSWERS
MANY = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * 160), BATCH)
BATCHES = jax.tree.map(lambda leaf: jnp.stack([leaf] * 6), BATCH)


def trained(params):
    problem = checked_problem(
        apply_fn,
        loss_fn,
        params,
        BATCH,
        key=KEY,
        optimizer=optax.adam(1e-3),
        batch_size=4,
        num_steps=6,
    )
    trial = prepare(problem, KEY, num_steps=6, batch_size=4)
    return jax.make_jaxpr(trial.train)(trial.plain, KEY)


SGD = optax.sgd(1e-3)
CALLERS = {
    "lr_range": lambda p: ns.lr_range(
        loss_fn, p, BATCHES, SGD, min_scale=0.1, max_scale=1.0
    ),
    "lr_sweep": lambda p: ns.lr_sweep(loss_fn, p, BATCHES, SGD, scales=[0.1, 1.0]),
    "overfit_batch": lambda p: ns.overfit_batch(
        loss_fn, p, BATCH, SGD, num_steps=6, key=KEY
    ),
    "sharpness": lambda p: ns.sharpness(loss_fn, p, BATCH, key=KEY, num_iterations=3),
    "gradient_noise_scale": lambda p: ns.gradient_noise_scale(
        loss_fn, p, BATCH, num_microbatches=4
    ),
    "example_gradient_norms": lambda p: ns.example_gradient_norms(
        grouped_loss_fn, p | {"kernel": p["kernel"][:, :1]}, MANY
    ),
    "noise": lambda p: ns.noise(noisy_loss_fn, p, BATCH, key=KEY),
    "worst_examples": lambda p: ns.worst_examples(loss_fn, p, MANY, num_worst=2),
    "example_independence": lambda p: ns.example_independence(apply_fn, p, IMAGES),
    "input_dependence": lambda p: ns.input_dependence(loss_fn, p, BATCH, key=KEY),
}


@pytest.mark.parametrize("name", [*CALLERS, "checkup"])
def test_whatever_runs_a_network_in_a_loop(name):
    if name == "checkup":
        program = trained(NETWORK)
    else:
        program = jax.make_jaxpr(CALLERS[name])(NETWORK)
    found = list(layouts(program.jaxpr, within=("scan", "while")))
    assert len(found) > 0
    assert all(map(is_last, found))


def test_what_the_backward_pass_computes_again_stays_apart():
    """Behind a barrier, without which the compiler would keep the values instead."""

    def network(kernels, inputs):
        block = jax.checkpoint(
            lambda now, one: jnp.tanh(convolution("NCHW", padding="SAME")(now, one))
        )
        for kernel in kernels:
            inputs = block(inputs, kernel)
        return jnp.mean(inputs**2)

    fn, arguments = jax.grad(network), (draw((3, 4, 4, 3, 3)), draw((2, 4, 8, 6)))
    assert_equal(fn, *arguments)
    assert_channels_are_last(fn, *arguments)
    plain, found = (
        jax.jit(one).lower(*arguments).as_text().count("optimization_barrier")
        for one in (fn, channels_last(fn))
    )
    assert found == plain == 3


SWITCHED = """
    import json
    import jax
    import jax.numpy as jnp
    import optax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    import nnsanity as ns

    def plain(kernel, images):
        made = jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME")
        return jnp.mean(jnp.tanh(made) ** 2)

    loss_fn = jax.sharding.auto_axes(plain, out_sharding=P())
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    kernel = jax.random.normal(jax.random.key(0), (4, 3, 3, 3))
    images = jax.random.normal(jax.random.key(1), (5, 8, 3, 6, 6))

    def measured(loss_fn, kernel, images):
        found = ns.lr_range(
            loss_fn, kernel, images, optax.sgd(1.0), min_scale=0.1, max_scale=1.0
        )
        return found.losses.tolist()

    here = measured(plain, kernel, images)
    with jax.set_mesh(mesh):
        images = jax.device_put(images, NamedSharding(mesh, P(None, "data")))
        kernel = jax.device_put(kernel, NamedSharding(mesh, P()))
        there = measured(loss_fn, kernel, images)
    print(json.dumps([here, there]))
"""


def test_losses_that_leave_an_explicit_mesh():
    here, there = printed_with_devices(SWITCHED, 4)
    np.testing.assert_allclose(here, there, rtol=1e-4)
