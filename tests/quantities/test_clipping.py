import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nnsanity.quantities.clipping import clipped_share, clipping

PARAMS = {
    "a": {"w": jax.random.normal(jax.random.key(0), (4, 5)), "b": jnp.ones(5)},
    "c": jax.random.normal(jax.random.key(1), (3, 4)),
    "step": jnp.array(3),
}
LABELS = {"a": "clipped", "c": "plain", "step": "plain"}


def adam_behind(clipper):
    return optax.chain(clipper, optax.adam(1e-3))


CLIPPERS = {
    "global norm": adam_behind(optax.clip_by_global_norm(1.0)),
    "elements": optax.chain(optax.clip(5.0), optax.sgd(0.1, momentum=0.9)),
    "by parameter": optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(0.1)),
    "by block": adam_behind(optax.clip_by_block_rms(1.0)),
    "behind Adam": optax.chain(optax.scale_by_adam(), optax.clip(0.5)),
    "every 16": optax.MultiSteps(adam_behind(optax.clip_by_global_norm(1.0)), 16),
    "decayed": optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-3)),
    "scheduled": optax.chain(
        optax.clip(1.0), optax.adam(optax.linear_schedule(0.0, 1e-3, 100))
    ),
    "injected": optax.inject_hyperparams(
        lambda learning_rate: optax.chain(optax.clip(1.0), optax.sgd(learning_rate))
    )(learning_rate=0.1),
    "in Adafactor": optax.adafactor(1e-3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CLIPPERS)
def test_clippers_are_found(name):
    found = clipping(CLIPPERS[name], PARAMS)
    assert found.clips.tolist() == [True] * 3
    assert np.isfinite(found.threshold).all()


def test_where_it_stands():
    optimizer = optax.multi_transform(
        {
            "clipped": optax.chain(optax.clip(1.0), optax.sgd(0.1)),
            "plain": optax.sgd(0.1),
        },
        {"a": "clipped", "c": "plain", "step": None},
    )
    found = clipping(optimizer, PARAMS)
    assert found.clips.tolist() == [True, True, False]
    assert found.threshold.tolist() == [1, 1, np.inf]


ALIASES = {
    "adabelief, adadelta, adagrad, adam, adamax, adamaxw, adamw, adan, amsgrad",
    "fromage, lamb, lars, lion, nadam, nadamw, noisy_sgd, novograd, optimistic_adam_v2",
    "optimistic_gradient_descent, radam, rmsprop, rprop, sgd, sign_sgd, sm3, yogi",
    "polyak_sgd, lbfgs, signum, optimistic_adam",
}
ALIASES = sorted(", ".join(ALIASES).split(", "))
OTHERS = {
    "adafactor": optax.adafactor(1e-3, clipping_threshold=None),
    "accumulated": optax.MultiSteps(optax.adam(1e-3), 4),
    "normalized": optax.chain(optax.normalize_by_update_norm(), optax.sgd(0.1)),
    "decayed": optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(0.1, 0.9)),
    "centralized": optax.chain(optax.centralize(), optax.adam(1e-3)),
    "quick": optax.rmsprop(1e-3, decay=0.5),
}


def test_every_alias_of_optax_is_looked_at():
    makers = {
        name
        for name, maker in vars(optax).items()
        if getattr(maker, "__module__", "").endswith(".alias")
    }
    assert len(makers) > 25
    assert makers <= {*ALIASES, "adafactor"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Specifying a key")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ALIASES)
def test_no_alias_is_taken_for_a_clipper(name):
    alias = getattr(optax, name, None)
    if alias is None:
        pytest.skip("not in this version")
    optimizer = alias() if name in ("polyak_sgd", "lbfgs") else alias(1e-3)
    assert not clipping(optimizer, PARAMS).clips.any()


@pytest.mark.parametrize("name", OTHERS)
def test_nothing_else_is_taken_for_a_clipper(name):
    assert not clipping(OTHERS[name], PARAMS).clips.any()


def test_wrong_optimizers_are_named():
    with pytest.raises(TypeError, match=r"^clipping: optimizer must have init"):
        clipping(lambda grads: grads, PARAMS)


GRADS = {"a": jnp.array([3.0, 0.5, -4.0]), "b": jnp.array([[0.25, -2.0]])}
ZEROS = jax.tree.map(jnp.zeros_like, GRADS)
SQUARES = np.array([9, 0.25, 16, 0.0625, 4])


@pytest.mark.parametrize(
    ("clipper", "expected"),
    [
        (optax.clip(1.0), (9 + 16 + 4) / SQUARES.sum()),
        (optax.clip(3.5), 16 / SQUARES.sum()),
        (optax.clip(4.1), 0),
        (optax.clip(1e-4), 1),
        (optax.clip_by_global_norm(5.4), 1),
        (optax.clip_by_global_norm(5.5), 0),  # the norm is 5.416
        (optax.clip_by_block_rms(2.0), 25.25 / SQUARES.sum()),  # 2.90 and 1.43
        (optax.identity(), 0),
    ],
)
@pytest.mark.parametrize("then", [optax.sgd(0.1, momentum=0.9), optax.adam(1e-3)])
def test_clipped_share_against_the_clipper_itself(clipper, then, expected):
    found = clipped_share(optax.chain(clipper, then), ZEROS, GRADS)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    changed, _ = clipper.update(GRADS, clipper.init(ZEROS), ZEROS)
    flat = [jnp.concatenate([x.ravel() for x in t.values()]) for t in (GRADS, changed)]
    assert np.sum(SQUARES[flat[0] != flat[1]]) / SQUARES.sum() == pytest.approx(
        expected
    )
