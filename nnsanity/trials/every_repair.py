"""All the repairs that a checkup can try, one by one and together."""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

from nnsanity._types import Array, PyTree
from nnsanity.findings import Finding
from nnsanity.quantities.descent import floats_of
from nnsanity.trials.batch_repairs import batch_repairs
from nnsanity.trials.clip_repairs import clip_repairs
from nnsanity.trials.copies import plain
from nnsanity.trials.data_repairs import data_repairs
from nnsanity.trials.dynamics import attempted
from nnsanity.trials.inner_repairs import inner_repairs, not_widened
from nnsanity.trials.loss_repairs import loss_repairs
from nnsanity.trials.optimizer_repairs import optimizer_repairs
from nnsanity.trials.problem import Problem
from nnsanity.trials.repairs import Repair, available_repairs

SHARED_GROUPS = ("columns", "inputs", "targets", "weights", "hidden", "merged", "depth")
"""Repairs that are harmless to make together, the most harmless first."""
MEASURED = frozenset(
    {
        "batch-size/too-large",
        "initialization/off-scale",
        "normalization/unnormalized-inputs",
        "normalization/scale-disparity",
        "normalization/double-normalized",
        "normalization/unnormalized-targets",
    }
)
"""Suspicions of what could be chosen otherwise that rest on a measured size."""


def every_repair(
    problem: Problem, *, suspected: Mapping[str, Finding], skipped: dict[str, str]
) -> tuple[Repair, ...]:
    """Lists what can be repaired; of equally good repairs the earlier one is told.

    Args:
        problem: as given.
        suspected: findings by rule.
        skipped: gets the repairs that could not be made, and why.
    """
    skipped |= not_widened(problem)
    found = (
        *inner_repairs(problem),
        *clip_repairs(problem, suspected),
        *available_repairs(problem),
        *batch_repairs(problem, suspected),
        *data_repairs(problem),
        *optimizer_repairs(problem, skipped),
        *loss_repairs(problem),
    )
    # What was measured to be off is no matter of choice.
    off = MEASURED & set(suspected)
    return tuple(
        one._replace(is_free=one.is_free and not off & set(one.rules))
        for one in found
        if _can_train(problem, one, skipped)
    )


def _can_train(problem: Problem, repair: Repair, skipped: dict[str, str]) -> bool:
    """Tells whether the optimizer takes the parameters of a copy.

    One that holds arrays of the user's own shapes, such as masks of pruned weights,
    takes no longer ones.
    """
    if repair.rewrite is None or problem.optimizer is None:
        return True
    rewritten = repair.rewrite(problem)
    optimizer = optax.with_extra_args_support(problem.optimizer)

    def update(key: Array) -> PyTree:
        floats = floats_of(repair.change(plain(rewritten), key).params)
        value = jnp.float32(0)
        return optimizer.update(
            floats,
            optimizer.init(floats),
            floats,
            value=value,
            grad=floats,
            value_fn=lambda moved: value,
        )

    trace = functools.partial(jax.eval_shape, update, jax.random.key(0))
    return attempted(skipped, repair.name, trace) is not None


def combinations(repairs: Sequence[Repair]) -> list[tuple[Repair, ...]]:
    """Lists growing sets of repairs, each at several rates."""
    by_group = {
        group: [r for r in repairs if r.group == group] for group in SHARED_GROUPS
    }
    if by_group["columns"]:  # both make the weight of the only layer longer
        by_group["depth"] = []
    growing: list[tuple[Repair, ...]] = [()]
    for group in SHARED_GROUPS:
        if by_group[group]:
            growing.append((*growing[-1], by_group[group][0]))
    heads = [one for one in repairs if one.group == "head"]
    sets = growing[2:] or growing[1:]
    sets += [(*growing[-1], head) for head in heads]
    sets += [(growing[1][0], head) for head in heads] if len(growing) > 1 else []
    rates = [one for one in repairs if one.group == "rate" and one.follows is None]
    return [(*one, *rate) for one in sets for rate in ((), *((r,) for r in rates))]
