import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nnsanity.trials.copies import HEAD_LEFT_OUT, HEAD_SQUASHED, OFF
from nnsanity.trials.problem import checked_problem
from nnsanity.trials.trial import (
    NUM_MARKS,
    _batch_rows,
    mid_descent,
    prepare,
    train_copies,
    with_data,
)

RNG = np.random.default_rng(0)
KEY, SPLIT_KEY = jax.random.split(jax.random.key(0))
SIZE, BATCH_SIZE, NUM_STEPS = 120, 8, 20
INPUTS = RNG.normal(3, 2, (SIZE, 3)).astype(np.float32)
TARGETS = (INPUTS @ [0.5, 1, -1] + 2).astype(np.float32)[:, None]
PARAMS = {
    "w1": jnp.asarray(RNG.normal(0, 0.5, (3, 5)), jnp.float32),
    "w2": jnp.asarray(RNG.normal(0, 0.5, (5, 1)), jnp.float32),
    "b": -jnp.ones(1),
}
OPTIMIZERS = {"sgd": optax.sgd(0.003), "adam": optax.adam(0.01)}
PENALTY = 0.1


def without_head(params, x):
    return jnp.tanh(x @ params["w1"]) @ params["w2"] + params["b"]


def apply_fn(params, x):
    return jax.nn.relu(without_head(params, x))


def loss_of(fn, penalty=PENALTY):
    def loss_fn(params, batch):
        error = jnp.mean((fn(params, batch[0]) - batch[1]) ** 2)
        return error + penalty * (jnp.sum(params["w1"] ** 2))

    return loss_fn


LOSS_FN = loss_of(apply_fn)


def noisy_loss(params, batch, key):
    inputs = batch[0] + jax.random.normal(key, batch[0].shape)
    return LOSS_FN(params, (inputs, batch[1]))


def problem_of(**changes):
    options = {
        "apply_fn": apply_fn,
        "loss_fn": LOSS_FN,
        "params": PARAMS,
        "data": (INPUTS, TARGETS),
        "key": KEY,
        "optimizer": OPTIMIZERS["sgd"],
        "batch_size": BATCH_SIZE,
        "num_steps": NUM_STEPS,
        "train_loss_fn": noisy_loss,
        "validation": None,
        "groups": None,
    } | changes
    return checked_problem(**options)


def trial_of(**changes):
    problem = problem_of(**changes)
    return prepare(problem, SPLIT_KEY, num_steps=NUM_STEPS, batch_size=BATCH_SIZE)


TRIALS = {name: trial_of(optimizer=optimizer) for name, optimizer in OPTIMIZERS.items()}
QUIET = TRIALS["sgd"].plain._replace(noise=OFF)


def by_hand(loss_fn, data, optimizer, *, noisy=False, num_steps=NUM_STEPS):
    """Trains as a user would, one step after the other."""
    order_key, noise_key = jax.random.split(KEY)
    seen = TRIALS["sgd"].train.args[-1][0]
    batches = _batch_rows(order_key, seen, num_steps, BATCH_SIZE)
    keys = jax.random.split(noise_key, num_steps)
    params, state, losses = PARAMS, optimizer.init(PARAMS), []

    @jax.jit
    def step(params, state, batch, key):
        args = (params, batch, key) if noisy else (params, batch)
        loss, grads = jax.value_and_grad(loss_fn)(*args)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    for rows, key in zip(np.asarray(batches), keys, strict=True):
        batch = data[0][rows], data[1][rows]
        params, state, loss = step(params, state, batch, key)
        losses.append(float(loss))
    return losses, params


def assert_trains_alike(outcome, losses, params):
    np.testing.assert_allclose(outcome.batch_losses, losses, rtol=1e-4)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5),
        outcome.params,
        params,
    )
    assert np.ptp(losses) > 0.01 * np.max(losses)


@pytest.mark.parametrize("noisy", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_plain_copy_trains_as_the_users_own_loop(name, noisy):
    trial = TRIALS[name]
    copy = trial.plain if noisy else trial.plain._replace(noise=OFF)
    expected = by_hand(
        noisy_loss if noisy else LOSS_FN,
        (INPUTS, TARGETS),
        OPTIMIZERS[name],
        noisy=noisy,
    )
    assert_trains_alike(trial.train(copy, KEY), *expected)


STANDARDIZED = {
    "input_shift": INPUTS.mean(axis=0),
    "input_scale": INPUTS.std(axis=0),
    "target_shift": TARGETS.mean(axis=0),
    "target_scale": TARGETS.std(axis=0),
}
MOVED_INPUTS = (INPUTS - INPUTS.mean(axis=0)) / INPUTS.std(axis=0)
MOVED_TARGETS = (TARGETS - TARGETS.mean(axis=0)) / TARGETS.std(axis=0)
OTHER_PARAMS = jax.tree.map(lambda leaf: leaf + 0.1, PARAMS)
CHANGES = {
    "rate": (
        {"update_scale": jnp.float32(10)},
        (LOSS_FN, (INPUTS, TARGETS), optax.sgd(0.03)),
    ),
    "standardized": (
        STANDARDIZED,
        (LOSS_FN, (MOVED_INPUTS, MOVED_TARGETS), OPTIMIZERS["sgd"]),
    ),
    "no head": (
        {"head": jnp.int32(HEAD_LEFT_OUT)},
        (loss_of(without_head), (INPUTS, TARGETS), OPTIMIZERS["sgd"]),
    ),
    "no penalty": (
        {"penalty_scale": jnp.float32(0)},
        (loss_of(apply_fn, 0), (INPUTS, TARGETS), OPTIMIZERS["sgd"]),
    ),
    "half a penalty": (
        {"penalty_scale": jnp.float32(0.5)},
        (loss_of(apply_fn, PENALTY / 2), (INPUTS, TARGETS), OPTIMIZERS["sgd"]),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_repaired_copy_trains_as_the_repaired_program(name):
    changes, program = CHANGES[name]
    copy = QUIET._replace(**jax.tree.map(jnp.asarray, changes))
    outcome = TRIALS["sgd"].train(copy, KEY)
    assert_trains_alike(outcome, *by_hand(*program))
    original = TRIALS["sgd"].train(QUIET, KEY)
    assert not np.allclose(original.batch_losses, outcome.batch_losses, rtol=1e-3)


def test_other_inputs_and_parameters_compile_nothing_anew():
    trial = with_data(TRIALS["sgd"], (jnp.asarray(MOVED_INPUTS), TARGETS))
    outcome = trial.train(QUIET, KEY)
    data = MOVED_INPUTS, TARGETS
    assert_trains_alike(outcome, *by_hand(LOSS_FN, data, OPTIMIZERS["sgd"]))
    start = TRIALS["sgd"].train(QUIET._replace(params=OTHER_PARAMS), KEY)
    rows = TRIALS["sgd"].train.args[-1][1]
    expected = LOSS_FN(OTHER_PARAMS, (INPUTS[rows], TARGETS[rows]))
    assert start.losses[0] == pytest.approx(float(expected), rel=1e-4)


def test_evaluations():
    outcome = TRIALS["sgd"].train(QUIET, KEY)
    seen, evaluated, held_out = TRIALS["sgd"].train.args[-1]
    assert len(seen) == 96
    np.testing.assert_array_equal(evaluated, seen)
    for curve in (outcome.losses, outcome.seen_quality, outcome.quality):
        assert curve.shape == (NUM_MARKS + 1,)
    for params, place in ((PARAMS, 0), (outcome.params, -1)):
        loss = LOSS_FN(params, (INPUTS[seen], TARGETS[seen]))
        assert outcome.losses[place] == pytest.approx(float(loss), rel=1e-4)
        for rows, curve in ((seen, outcome.seen_quality), (held_out, outcome.quality)):
            error = apply_fn(params, INPUTS[rows]) - TARGETS[rows]
            explained = 1 - np.mean(np.square(error)) / TARGETS[rows].var()
            assert curve[place] == pytest.approx(max(explained, -1), rel=1e-3)


@pytest.mark.parametrize("mark", [0, 3, NUM_MARKS])
def test_parameters_of_a_mark_are_kept(mark):
    outcome = TRIALS["sgd"].train(QUIET._replace(kept_mark=jnp.int32(mark)), KEY)
    rows = TRIALS["sgd"].train.args[-1][1]
    loss = LOSS_FN(outcome.kept, (INPUTS[rows], TARGETS[rows]))
    assert outcome.losses[mark] == pytest.approx(float(loss), rel=1e-4)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([8.0, 7, 4, 1, 0], 2),
        ([8.0, 0.1, 0, 0], 1),
        ([-1.0, -2, -4, -9, -3], 2),
        ([8.0, 6, np.nan, np.inf], 0),
        ([8.0, 4, 3, np.nan, np.inf], 1),
        ([1.0, 2, 3], 0),
        ([np.nan, 2, 1], 0),
        ([np.nan, np.nan], 0),
    ],
)
def test_middle_of_a_descent(losses, expected):
    assert mid_descent(np.float32(losses)) == expected


def test_no_example_is_both_held_out_and_trained_on():
    seen, _, held_out = TRIALS["sgd"].train.args[-1]
    assert sorted([*seen, *held_out]) == list(range(SIZE))
    assert len(held_out) == SIZE // 5
    rows = _batch_rows(KEY, seen, 100, BATCH_SIZE)
    assert not np.isin(rows, held_out).any()


@pytest.mark.parametrize(("size", "held_out"), [(99, 99), (100, 20)])
def test_few_examples_are_not_held_out(size, held_out):
    trial = trial_of(data=(INPUTS[:size], TARGETS[:size]))
    seen, _, others = trial.train.args[-1]
    assert len(others) == held_out
    assert len(seen) == (size if size == held_out else size - held_out)


@pytest.mark.parametrize(
    ("size", "batch_size", "num_steps"), [(10, 3, 7), (8, 8, 4), (9, 1, 20), (5, 4, 1)]
)
def test_batches_are_the_data_in_a_new_order_every_epoch(size, batch_size, num_steps):
    rows = np.arange(size) * 7 + 100
    found = np.asarray(_batch_rows(KEY, rows, num_steps, batch_size))
    assert found.shape == (num_steps, batch_size)
    per_epoch = size // batch_size
    for start in range(0, num_steps, per_epoch):
        epoch = found[start : start + per_epoch].reshape(-1)
        assert np.isin(epoch, rows).all()
        assert len(np.unique(epoch)) == len(epoch)
    if num_steps >= 2 * per_epoch:
        first, second = found[:per_epoch], found[per_epoch : 2 * per_epoch]
        assert (first != second).any() or batch_size == size


def test_a_batch_is_at_most_what_is_trained_on():
    problem = problem_of(batch_size=SIZE)
    trial = prepare(problem, SPLIT_KEY, num_steps=25, batch_size=SIZE)
    assert trial.batch_size == 96
    # Marks lie at even distances, so that a few steps may be left out.
    assert trial.num_steps == 20


def test_several_copies_are_traced_once():
    num_traces = {"apply_fn": 0, "loss_fn": 0}

    def counted(params, x):
        num_traces["apply_fn"] += 1
        return apply_fn(params, x)

    def counted_loss(params, batch):
        num_traces["loss_fn"] += 1
        return loss_of(apply_fn)(params, batch)

    trial = trial_of(apply_fn=counted, loss_fn=counted_loss)
    changes = [
        {},
        {"update_scale": jnp.float32(10)},
        jax.tree.map(jnp.asarray, STANDARDIZED),
        {"head": jnp.int32(HEAD_LEFT_OUT), "noise": OFF, "leaky": np.bool_(1)},
        {"params": OTHER_PARAMS, "penalty_scale": jnp.float32(0)},
    ]
    copies = [(trial.plain._replace(**one), KEY) for one in changes]
    train_copies(trial, copies[:1])
    before = dict(num_traces)
    outcomes = train_copies(trial, copies)
    train_copies(with_data(trial, (jnp.asarray(MOVED_INPUTS), TARGETS)), copies)
    assert num_traces == before
    assert before["loss_fn"] > 0
    assert len({float(one.losses[-1]) for one in outcomes}) == len(copies)


def test_a_softmax_in_the_place_of_the_last_activation():
    labels = (INPUTS @ [0.5, 1, -1] > 1).astype(np.int32)
    params = PARAMS | {"w2": jnp.ones((5, 2)), "b": jnp.zeros(2)}

    def loss_fn(params, batch):
        return jnp.mean((apply_fn(params, batch[0]) - jax.nn.one_hot(batch[1], 2)) ** 2)

    trial = trial_of(
        loss_fn=loss_fn,
        train_loss_fn=None,
        params=params,
        data=(INPUTS, labels),
    )
    rows = trial.train.args[-1][1]
    copy = trial.plain._replace(head=jnp.int32(HEAD_SQUASHED))
    outputs = jax.nn.softmax(without_head(params, INPUTS[rows]))
    expected = jnp.mean((outputs - jax.nn.one_hot(labels[rows], 2)) ** 2)
    found = trial.train(copy, KEY).losses[0]
    assert found == pytest.approx(float(expected), rel=1e-4)
