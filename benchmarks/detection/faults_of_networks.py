"""Faults of items 7 to 11: final activation, gradients, weights, depth, width."""

import jax
import jax.numpy as jnp
import optax
from programs import (
    cnn,
    constant,
    glorot,
    mlp,
    nnx_mlp,
    normal,
    relu,
    rnn,
    sigmoid,
    tanh,
    transformer,
    zeros,
)
from tasks import (
    CANCER,
    DIABETES,
    DIGITS,
    IMAGES,
    NNX_DIGITS,
    ROWS,
    SPIRALS,
    SURFACE,
    TOKENS,
    WAVE,
    changed,
    digit_images,
    surface,
)

FINAL_ACTIVATION = (
    changed(
        "ReLU on negative targets",
        (7, 1),
        SURFACE,
        network=mlp(64, 64, 1, hidden=tanh, head=relu, init=glorot),
    ),
    changed(
        "sigmoid on standardized targets",
        (7, 1),
        DIABETES.but(data=surface, network=mlp(64, 1), num_steps=1000),
        network=mlp(64, 1, head=sigmoid),
    ),
    changed(
        "softmax over one unit", (7,), CANCER, network=mlp(32, 1, head=jax.nn.softmax)
    ),
    changed(
        "softmax, then a loss of logits",
        (7,),
        DIGITS.but(optimizer=optax.sgd(0.05)),
        network=mlp(64, 32, 10, head=jax.nn.softmax),
    ),
    changed(
        "softmax, then a loss of logits, in a CNN",
        (7,),
        IMAGES.but(optimizer=optax.sgd(0.05)),
        network=cnn(head=jax.nn.softmax),
    ),
    changed(
        "logarithm of logits",
        (7, 2),
        TOKENS,
        loss=lambda logits, labels: (
            -jnp.mean(jnp.take_along_axis(jnp.log(logits), labels[:, None], axis=1))
        ),
    ),
    changed(
        "clip on the output",
        (7, 8),
        SURFACE,
        network=mlp(64, 64, 1, hidden=tanh, head=lambda x: jnp.clip(x, 2.0, 3.0)),
    ),
)


def without_gradient(values):
    """Rounds, which passes nothing back."""
    return jnp.round(sigmoid(values))


GRADIENTS = (
    changed(
        "rounded hidden units",
        (8,),
        DIGITS,
        network=mlp(64, 32, 10, hidden=without_gradient),
    ),
    changed(
        "signs as hidden units", (8,), SPIRALS, network=mlp(32, 32, 1, hidden=jnp.sign)
    ),
    changed(
        "biases that kill every ReLU",
        (8, 9),
        IMAGES,
        network=cnn(bias=constant(-20.0)),
    ),
    changed(
        "ten layers of sigmoid",
        (8, 10),
        DIGITS,
        network=mlp(*[32] * 10, 10, hidden=sigmoid, init=glorot),
    ),
    changed(
        "hidden units clipped",
        (8,),
        NNX_DIGITS,
        network=nnx_mlp(64, 10, hidden=lambda x: jnp.clip(x, 8.0, 9.0)),
    ),
    changed(
        "recurrence that forgets",
        (8, 9),
        ROWS.but(data=lambda: (digit_images()[0][:, ::-1], digit_images()[1])),
        network=rnn(scale=0.01, hidden=sigmoid),
    ),
)

INITIALIZATION = (
    changed("zeros", (9, 8), DIGITS, network=mlp(64, 32, 10, init=zeros)),
    changed(
        "all weights equal",
        (9,),
        NNX_DIGITS,
        network=nnx_mlp(64, 10, init=constant(0.05)),
    ),
    changed("zeros in a CNN", (9, 8), IMAGES, network=cnn(init=zeros)),
    changed(
        "weights of deviation 1e-4",
        (9, 8),
        CANCER.but(network=mlp(32, 32, 32, 1)),
        network=mlp(32, 32, 32, 1, init=normal(1e-4)),
    ),
    changed(
        "weights of deviation 3",
        (9, 6),
        NNX_DIGITS,
        network=nnx_mlp(64, 10, init=normal(3.0)),
    ),
    changed(
        "biases of 30",
        (9, 8),
        SURFACE,
        network=mlp(64, 64, 1, hidden=tanh, init=glorot, bias=constant(30.0)),
    ),
    changed(
        "attention from zeros",
        (9, 8),
        TOKENS,
        network=transformer(init=zeros, mlp_init=zeros),
    ),
)

DEPTH = (
    changed(
        "30 layers of ReLU",
        (10, 8, 9),
        DIGITS,
        network=mlp(*[32] * 30, 10, init=glorot),
    ),
    changed(
        "25 layers of tanh",
        (10, 8, 9),
        SPIRALS,
        network=mlp(*[32] * 25, 1, hidden=tanh, init=normal(0.05)),
    ),
    changed(
        "16 layers of sigmoid",
        (10, 8),
        SURFACE,
        network=mlp(*[32] * 16, 1, hidden=sigmoid, init=glorot),
    ),
    changed(
        "24 layers in NNX",
        (10, 8, 9),
        NNX_DIGITS,
        network=nnx_mlp(*[32] * 24, 10, init=glorot),
    ),
    changed(
        "20 layers of sigmoid on a table",
        (10, 8),
        CANCER,
        network=mlp(*[16] * 20, 1, hidden=sigmoid, init=glorot),
    ),
    changed(
        "nothing nonlinear",
        (10, 8),
        SPIRALS,
        network=mlp(64, 64, 1, hidden=lambda x: x, init=glorot),
    ),
    changed(
        "nothing nonlinear, a surface",
        (10, 8),
        SURFACE,
        network=mlp(64, 32, 1, hidden=lambda x: x, init=glorot),
    ),
    changed("one layer", (10, 11), SPIRALS, network=mlp(1, init=glorot)),
)

WIDTH = (
    changed(
        "a waist of one unit",
        (11,),
        DIGITS,
        network=mlp(64, 1, 10, hidden=tanh, init=glorot),
    ),
    changed(
        "a waist of one unit, NNX",
        (11,),
        NNX_DIGITS,
        network=nnx_mlp(64, 1, 10, hidden=tanh),
    ),
    changed("two hidden units", (11,), SPIRALS, network=mlp(2, 1, hidden=tanh)),
    changed("one hidden unit", (11,), SURFACE, network=mlp(1, 1, hidden=tanh)),
    changed("two units for a wave", (11,), WAVE, network=mlp(2, 1, hidden=tanh)),
    changed(
        "a CNN with one unit before its classes",
        (11,),
        IMAGES,
        network=cnn(width=1, hidden=tanh),
    ),
    changed("a recurrent cell of one unit", (11,), ROWS, network=rnn(1)),
)

FAULTS = (*FINAL_ACTIVATION, *GRADIENTS, *INITIALIZATION, *DEPTH, *WIDTH)
