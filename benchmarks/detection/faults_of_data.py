"""Faults of items 1 to 3: normalization, results, preprocessing."""

import jax.numpy as jnp
import numpy as np
import optax
from programs import Program, cross_entropy, mlp, nnx_mlp, rnn, squared_error, tanh
from tasks import (
    CANCER,
    DIABETES,
    DIGITS,
    IMAGES,
    NNX_DIGITS,
    ROWS,
    SURFACE,
    TOKENS,
    WINE,
    changed,
    digit_images,
    digits,
    on,
    raw_table,
    standardized,
    surface,
    table,
    to,
)


def with_column(values, index, change):
    """Changes one column."""
    values = values.copy()
    values[:, index] = change(values[:, index])
    return values


def shuffled(values):
    """In another order."""
    return np.random.RandomState(3).permutation(values)


NORMALIZATION = (
    changed("raw wine", (1,), WINE, data=lambda: raw_table("wine")),
    changed(
        "raw breast cancer",
        (1,),
        CANCER,
        data=on(
            lambda: table("breast_cancer"), lambda _: raw_table("breast_cancer")[0]
        ),
    ),
    changed(
        "raw targets of diabetes",
        (1, 6),
        DIABETES,
        data=to(lambda: table("diabetes"), lambda _: raw_table("diabetes")[1][:, None]),
    ),
    changed(
        "pixels times 300",
        (1,),
        IMAGES.but(optimizer=optax.sgd(0.05)),
        data=on(digit_images, lambda x: 300 * x),
    ),
    changed(
        "pixels divided by 255 twice",
        (1,),
        NNX_DIGITS,
        data=lambda: (raw_table("digits")[0] / 255**2, raw_table("digits")[1]),
    ),
    changed(
        "rows that saturate a recurrent cell",
        (1,),
        ROWS,
        data=on(digit_images, lambda x: 100 * x + 300),
    ),
    changed(
        "one column in other units",
        (1,),
        SURFACE.but(optimizer=optax.adam(5e-3)),
        data=on(surface, lambda x: with_column(x, 2, lambda one: 1e4 * one)),
    ),
    changed(
        "a NaN among the inputs",
        (1, 2),
        CANCER,
        data=on(
            lambda: table("breast_cancer"),
            lambda x: np.where(np.arange(x.size).reshape(x.shape) == 777, np.nan, x),
        ),
    ),
)


def against_everyone(outputs, targets):
    """(N, 1) against (N,)."""
    return jnp.mean((outputs - targets[:, 0]) ** 2)


def to_the_first_input(network):
    """A network that mixes its examples up."""

    def build(key, inputs):
        built = network(key, inputs)
        return built._replace(
            apply_fn=lambda params, x: jnp.roll(built.apply_fn(params, x), 1, axis=0)
        )

    return build


RESULTS = (
    changed("broadcast loss", (2,), SURFACE, loss=against_everyone),
    changed(
        "broadcast loss of logits",
        (2,),
        CANCER,
        loss=lambda logits, targets: jnp.mean(
            optax.sigmoid_binary_cross_entropy(logits, targets[:, 0])
        ),
    ),
    changed("shuffled labels", (2, 3), IMAGES, data=to(digit_images, shuffled)),
    changed("shuffled targets", (2, 3), SURFACE, data=to(surface, shuffled)),
    changed(
        "shuffled labels, half of them learned by heart",
        (2, 3),
        WINE,
        data=to(lambda: table("wine"), shuffled),
    ),
    changed(
        "sign flipped",
        (2, 7),
        TOKENS,
        loss=lambda logits, labels: -cross_entropy(logits, labels),
    ),
    changed(
        "labels from one to ten", (2, 7), ROWS, data=to(digit_images, lambda y: y + 1)
    ),
    changed(
        "outputs of the neighbour",
        (2,),
        SURFACE,
        network=to_the_first_input(SURFACE.network),
    ),
    changed(
        "labels counted from the wrong end of the batch",
        (2,),
        DIGITS,
        loss=lambda logits, labels: cross_entropy(logits, labels[::-1]),
    ),
)


def hours(num_hours=6000):
    """Hours of a record, and something with a daily cycle."""
    random = np.random.RandomState(0)
    hour = random.uniform(0, num_hours, (2000, 1))
    return hour, np.sin(2 * np.pi * hour / 24 + 1) + 0.1 * random.randn(2000, 1)


def shops(num_shops=100):
    """The number of a shop, its discount, and its sales."""
    random = np.random.RandomState(1)
    level = random.randn(num_shops)
    shop = random.randint(0, num_shops, 4000)
    discount = random.randn(4000)
    sales = level[shop] + 0.3 * discount + 0.1 * random.randn(4000)
    return np.stack([shop, discount], axis=1), standardized(sales)[:, None]


def one_hot_column(values, index, size):
    """Indicators in the place of a number."""
    rest = np.delete(values, index, axis=1)
    return np.concatenate([np.eye(size)[values[:, index].astype(int)], rest], axis=1)


def directions(*, as_degrees):
    """A direction from noisy coordinates, as an angle or as a point on the circle."""
    random = np.random.RandomState(2)
    angle = random.uniform(-np.pi, np.pi, 2000)
    point = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    far = np.stack([np.cos(5 * angle), np.sin(5 * angle)], axis=1)
    inputs = np.concatenate([point, far], axis=1) + 0.1 * random.randn(2000, 4)
    return inputs, (angle[:, None] / np.pi * 1.7 if as_degrees else point)


def checked_daily(data):
    """The position in the day."""
    angle = 2 * np.pi * data / 24
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


CYCLE = Program(
    on(hours, checked_daily),
    mlp(32, 32, 1, hidden=tanh),
    squared_error,
    optax.adam(5e-3),
)
SHOP = Program(
    on(shops, lambda x: one_hot_column(x, 0, 100)),
    mlp(32, 32, 1),
    squared_error,
    optax.adam(5e-3),
)


def labelled_twice():
    """Every digit with its label and with an unrelated one."""
    inputs, labels = digits()
    return np.concatenate([inputs, inputs]), np.concatenate([labels, shuffled(labels)])


def bits(num_examples=3000):
    """A number below 64 as its bits, and a table of what it stands for."""
    random = np.random.RandomState(4)
    number = random.randint(0, 64, num_examples)
    stands_for = random.randint(0, 4, 64)
    return number, stands_for[number]


PREPROCESSING = (
    changed("hours of a record", (3, 1), CYCLE, data=on(hours, standardized)),
    changed("number of a shop", (3,), SHOP, data=on(shops, standardized)),
    changed(
        "number of a shop, NNX",
        (3,),
        SHOP.but(network=nnx_mlp(32, 32, 1)),
        data=on(shops, standardized),
    ),
    changed("every digit labelled twice", (3, 2), DIGITS, data=labelled_twice),
    changed(
        "names as one number",
        (3,),
        Program(
            lambda: (np.eye(64)[bits()[0]], bits()[1]),
            mlp(32, 4),
            cross_entropy,
            optax.adam(1e-2),
        ),
        data=lambda: (standardized(bits()[0][:, None].astype(float)), bits()[1]),
    ),
    changed(
        "days of a record, recurrent over columns",
        (3, 1),
        CYCLE.but(
            data=on(hours, lambda x: checked_daily(x)[:, None]), network=rnn(outputs=1)
        ),
        data=on(hours, lambda x: standardized(x)[:, None]),
    ),
)

FAULTS = (*NORMALIZATION, *RESULTS, *PREPROCESSING)
