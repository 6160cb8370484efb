"""Faults of items 4 to 6: regularization, batch size, learning rate."""

import optax
from programs import cnn, mlp, weight_squares
from tasks import (
    CANCER,
    DIABETES,
    DIGITS,
    FLIPPED,
    IMAGES,
    NNX_DIGITS,
    ROWS,
    SURFACE,
    TOKENS,
    WAVE,
    WINE,
    changed,
)

REGULARIZATION = (
    changed("dropout of 0.97", (4,), DIGITS, network=mlp(64, 32, 10, dropout=0.97)),
    changed("dropout of 0.98 in a CNN", (4,), IMAGES, network=cnn(dropout=0.98)),
    changed("penalty of 0.3", (4,), SURFACE, penalty=weight_squares(0.3)),
    changed("penalty of 1 in a CNN", (4,), IMAGES, penalty=weight_squares(1.0)),
    changed(
        "weight decay of 30",
        (4, 6),
        DIGITS,
        optimizer=optax.adamw(3e-3, weight_decay=30.0),
    ),
    changed(
        "decay before the step",
        (4, 6),
        NNX_DIGITS,
        optimizer=optax.chain(optax.add_decayed_weights(1.0), optax.sgd(0.1, 0.9)),
    ),
)

BATCH_SIZE = (
    changed(
        "all digits at once", (5, 6), NNX_DIGITS, batch_size=1797, num_steps=8
    )._replace(healthy=NNX_DIGITS.but(num_steps=8 * 56)),
    changed(
        "all images at once",
        (5, 6),
        IMAGES.but(optimizer=optax.sgd(0.05)),
        batch_size=1797,
        num_steps=6,
    ),
    changed(
        "one example at a time",
        (5, 6),
        WINE.but(optimizer=optax.sgd(0.3, 0.9)),
        batch_size=1,
    ),
    changed(
        "one row at a time",
        (5, 6),
        ROWS.but(optimizer=optax.adam(2e-2)),
        batch_size=1,
    ),
    changed(
        "one image at a time",
        (5, 6),
        TOKENS.but(optimizer=optax.adam(1e-2)),
        batch_size=1,
    ),
)

LEARNING_RATE = (
    changed("rate of 1e-6", (6,), DIGITS, optimizer=optax.adam(1e-6)),
    changed("rate of 3", (6,), IMAGES, optimizer=optax.adam(3.0)),
    changed("rate of 50", (6,), NNX_DIGITS, optimizer=optax.sgd(50.0, 0.9)),
    changed("rate of 1 for attention", (6,), TOKENS, optimizer=optax.adam(1.0)),
    changed("rate of 1e-4 without momentum", (6,), ROWS, optimizer=optax.sgd(1e-4)),
    changed(
        "a rate that dies at once",
        (6,),
        SURFACE,
        optimizer=optax.adam(optax.exponential_decay(5e-3, 5, 0.5)),
    ),
    changed(
        "gradients clipped to nothing",
        (6,),
        CANCER,
        optimizer=optax.chain(optax.clip_by_global_norm(1e-4), optax.sgd(0.1)),
    ),
    changed("a training of 30 steps", (6,), WAVE, num_steps=30),
    changed("rate of 1e-6 on noisy targets", (6,), DIABETES, optimizer=optax.sgd(1e-6)),
    changed("rate of 1e-5 on flipped labels", (6,), FLIPPED, optimizer=optax.sgd(1e-5)),
)

FAULTS = (*REGULARIZATION, *BATCH_SIZE, *LEARNING_RATE)
