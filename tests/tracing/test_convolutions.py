import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnsanity.tracing import compat, control
from nnsanity.tracing.convolutions import channels_last

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


def layouts(jaxpr):
    """Of all convolutions, also inside of calls and control flow."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            yield eqn.params["dimension_numbers"]
        called = compat.called_jaxpr(eqn)
        for inner in [called[0]] if called else []:
            yield from layouts(inner)
        for body in control.bodies(eqn, ()):
            yield from layouts(body.jaxpr)


def assert_channels_are_last(fn, *args):
    """And that there are as many convolutions as there were."""
    found, plain = (
        list(layouts(jax.make_jaxpr(one)(*args).jaxpr))
        for one in (channels_last(fn), fn)
    )
    assert len(found) == len(plain) > 0
    for numbers in found:
        rank = len(numbers.lhs_spec)
        image = (0, rank - 1, *range(1, rank - 1))
        assert numbers.lhs_spec == numbers.out_spec == image
        assert numbers.rhs_spec == (rank - 1, rank - 2, *range(rank - 2))


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
