"""Repairs: what can be changed on a copy, and which suspicion each of them tests."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nnsanity._types import Array, PyTree
from nnsanity.checks import (
    depth,
    final_activation,
    gradients,
    initialization,
    learning_rate,
    normalization,
    regularization,
    width,
)
from nnsanity.findings import Finding, listed, number
from nnsanity.quantities import scales
from nnsanity.quantities.drawing import redrawn
from nnsanity.quantities.moments import feature_moments, group_moments
from nnsanity.quantities.weight_sizes import doubled_share
from nnsanity.tracing.layers import inspect
from nnsanity.tracing.paths import depths, merging
from nnsanity.tracing.replace import penalties
from nnsanity.trials.copies import HEAD_LEFT_OUT, HEAD_SQUASHED, OFF, ON, Copy
from nnsanity.trials.inside import measure_network
from nnsanity.trials.measure import some_examples, training_noise
from nnsanity.trials.problem import Problem

Change = Callable[[Copy, Array], Copy]


class Repair(NamedTuple):
    """One thing that can be repaired on a copy.

    Attributes:
        name: what is done, as the subject of a sentence.
        group: repairs of one group exclude each other.
        change: ``change(copy, key) -> copy``; changes compose.
        rules: suspicions that it confirms where it helps, the likeliest first.
        finding: what to say where it helps though nothing was suspected.
        is_suspected: whether it is offered on a suspicion alone.
        rewrite: ``rewrite(problem) -> problem``, where the copy is another program,
            with shapes or functions of its own; None where it differs in numbers alone.
        inputs: ``inputs(inputs) -> inputs``, what to train on in their place, of the
            same shapes; or None.
        targets: the same of the targets, which have to stay as they are on all examples
            that count where copies are compared; or None.
        is_free: whether a healthy program could have chosen otherwise, too, so that it
            has to bring more.
        follows: name of the repair that has to be tried before, and be no worse than
            the original; or None.
    """

    name: str
    group: str
    change: Change
    rules: tuple[str, ...]
    finding: Finding
    is_suspected: bool = False
    rewrite: Callable[[Problem], Problem] | None = None
    inputs: Callable[[Array], Array] | None = None
    targets: Callable[[Array], Array] | None = None
    is_free: bool = False
    follows: str | None = None


def available_repairs(problem: Problem) -> tuple[Repair, ...]:
    """Lists the repairs that make sense for a problem."""
    return (
        *_input_repairs(problem),
        *_target_repairs(problem),
        *_rate_repairs(),
        *_weight_repairs(problem),
        *_head_repairs(problem),
        *_hidden_repairs(problem),
        *_bending_repairs(problem),
        *_regularization_repairs(problem),
    )


def _input_repairs(problem: Problem) -> tuple[Repair, ...]:
    leaves = jax.tree.leaves(problem.inputs)
    if problem.tokens or not all(leaf.size for leaf in leaves):
        return ()
    shift, scale = standardizing(problem, problem.inputs)
    measured = [
        scales.normalization(leaf, groups=_groups(problem, leaf)) for leaf in leaves
    ]
    return (
        Repair(
            "standardizing the inputs",
            "inputs",
            lambda copy, key: copy._replace(input_shift=shift, input_scale=scale),
            (
                "normalization/unnormalized-inputs",
                "normalization/scale-disparity",
                "normalization/double-normalized",
            ),
            normalization.unstandardized(measured[0], "inputs"),
            is_free=all(map(normalization.is_usual, measured)),
        ),
    )


def _groups(problem: Problem, leaf: Array) -> tuple[int, ...] | None:
    return problem.groups if leaf.ndim > 1 else None


def standardizing(problem: Problem, inputs: PyTree) -> tuple[PyTree, PyTree]:
    """Returns what to subtract and divide by, feature by feature or group by group.

    Args:
        problem: whose groups count.
        inputs: tree like its inputs.
    """

    @jax.jit
    def shift_and_scale(leaf: Array) -> tuple[Array, Array]:
        moments, groups = feature_moments(leaf), _groups(problem, leaf)
        if groups is not None:
            moments = group_moments(moments, groups=groups)
        return moments.mean, moments.scale

    leaves, structure = jax.tree.flatten(inputs)
    pairs = [shift_and_scale(leaf) for leaf in leaves]
    shift, scale = (
        jax.tree.unflatten(structure, one) for one in zip(*pairs, strict=True)
    )
    return shift, scale


def _target_repairs(problem: Problem) -> tuple[Repair, ...]:
    if problem.kind != "numbers":
        return ()
    measured = scales.normalization(problem.targets)
    shift, scale = measured.moments.mean, measured.moments.scale
    return (
        Repair(
            "standardizing the targets",
            "targets",
            lambda copy, key: copy._replace(target_shift=shift, target_scale=scale),
            ("normalization/unnormalized-targets",),
            normalization.unstandardized(measured, "targets"),
            is_free=normalization.is_usual(measured),
        ),
    )


def _rate_repairs() -> tuple[Repair, ...]:
    near = [_rate_repair(factor) for factor in learning_rate.RATE_FACTORS]
    largest = _rate_repair(max(learning_rate.RATE_FACTORS))
    far = _rate_repair(learning_rate.FAR_RATE_FACTOR)._replace(follows=largest.name)
    return (*near, far)


def _rate_repair(factor: float) -> Repair:
    lower = ("learning-rate/diverges", "learning-rate/too-high")
    return Repair(
        f"{number(factor)} times the learning rate",
        "rate",
        lambda copy, key: copy._replace(update_scale=jnp.float32(factor)),
        lower if factor < 1 else ("learning-rate/too-low",),
        learning_rate.wrong_rate(factor),
        is_free=True,
    )


def _weight_repairs(problem: Problem) -> tuple[Repair, ...]:
    stats = measure_network(problem, some_examples(problem)).weights
    worst = initialization.worst_scale(stats, problem.network)
    if worst is None:
        return ()

    draw = jax.jit(functools.partial(redrawn, problem.network))
    # Units of few inputs are alike without that, and fresh ones would be as well.
    doubled = doubled_share(problem.network, problem.params).values()
    start_alike = max(doubled, default=0.0) > width.REDUNDANT_SHARE

    def redraw(copy: Copy, key: Array) -> Copy:
        return copy._replace(params=draw(copy.params, key))

    return (
        Repair(
            "drawing fresh weights of the usual size",
            "weights",
            redraw,
            (
                "initialization/off-scale",
                "initialization/large-bias",
                "initialization/signal-grows",
                "initialization/signal-fades",
                "gradients/saturated-units",
                *(("width/redundant",) if start_alike else ()),
            ),
            initialization.poor_start(worst),
            is_free=True,
        ),
    )


def _head_repairs(problem: Problem) -> tuple[Repair, ...]:
    head = problem.head
    if head is None:
        return ()
    repairs = []
    if head.activation is not None:
        repairs.append(
            Repair(
                "leaving out the last activation",
                "head",
                lambda copy, key: copy._replace(head=jnp.int32(HEAD_LEFT_OUT)),
                final_activation.SUSPECTED,
                final_activation.harmful_head(head, problem.kind),
            )
        )
    if problem.kind in ("classes", "one-hot", "binary"):
        name = "a sigmoid" if problem.kind == "binary" else "a softmax"
        repairs.append(
            Repair(
                f"{name} as the last activation",
                "head",
                lambda copy, key: copy._replace(head=jnp.int32(HEAD_SQUASHED)),
                final_activation.UNSQUASHED,
                final_activation.unsquashed_head(head, name),
            )
        )
    return tuple(repairs)


def _bending_repairs(problem: Problem) -> tuple[Repair, ...]:
    found = [one.layer.name for one in merging(problem.network)]
    if not found:
        return ()
    return (
        Repair(
            f"a leaky ReLU behind {listed(found)}",
            "merged",
            lambda copy, key: copy._replace(bent=ON),
            ("depth/merged-layers",),
            depth.merged_layers(found),
        ),
    )


def _hidden_repairs(problem: Problem) -> tuple[Repair, ...]:
    hidden = [
        one
        for one in problem.network.layers
        if one.activation is not None and one is not problem.head
    ]
    if not hidden:
        return ()
    names = sorted({one.layer.activation or "" for one in hidden})
    repairs = [
        Repair(
            f"a leaky ReLU in the place of {' and '.join(names)}",
            "hidden",
            lambda copy, key: copy._replace(leaky=ON),
            (
                "gradients/nonfinite",
                "gradients/vanishing",
                "gradients/dead-units",
                "gradients/exploding",
            ),
            gradients.harmful_activation(hidden[0], names),
        )
    ]
    num_layers = depths(problem.network).unskipped
    if num_layers > depth.USUAL_DEPTH:
        repairs.append(
            Repair(
                "adding skip connections",
                "hidden",
                lambda copy, key: copy._replace(skip=ON),
                ("depth/too-deep", "depth/collapsed-inputs"),
                depth.too_deep(num_layers),
            )
        )
    return tuple(repairs)


def _regularization_repairs(problem: Problem) -> tuple[Repair, ...]:
    repairs = []
    if training_noise(problem).varies:
        repairs.append(
            Repair(
                "training without the noise",
                "noise",
                lambda copy, key: copy._replace(noise=OFF),
                (),
                regularization.too_strong("noise"),
            )
        )
    batch = problem.batch(slice(problem.batch_size))
    if problem.kind is not None and penalties(
        inspect(problem.loss_fn, problem.params, batch)
    ):
        repairs.append(
            Repair(
                "leaving out the penalty",
                "penalty",
                lambda copy, key: copy._replace(penalty_scale=jnp.float32(0)),
                (),
                regularization.too_strong("penalty"),
            )
        )
    return tuple(repairs)
