"""A repair of the clips that block nearly every gradient: leaving them out."""

from collections.abc import Mapping

from nnsanity.checks import gradients
from nnsanity.findings import Finding, listed
from nnsanity.tracing.clips import without_clips
from nnsanity.tracing.layers import inspect
from nnsanity.tracing.replace import output_layer
from nnsanity.trials.inside import measure_network
from nnsanity.trials.measure import some_examples
from nnsanity.trials.problem import Problem
from nnsanity.trials.repairs import Repair

RULE = "gradients/blocked-share"


def clip_repairs(
    problem: Problem, suspected: Mapping[str, Finding]
) -> tuple[Repair, ...]:
    """Lists the clips to leave out, all at once, where some block nearly everything."""
    if RULE not in suspected:
        return ()
    blocked = measure_network(problem, some_examples(problem)).blocked
    found = gradients.judge_blocked_share(blocked)
    names = frozenset(one.where for one in found)
    return (
        Repair(
            f"leaving out the bound at {listed(sorted(names))}",
            "clips",
            lambda copy, key: copy,
            (RULE,),
            found[0],
            rewrite=lambda one: _without(one, names),
        ),
    )


def _without(problem: Problem, names: frozenset[str]) -> Problem:
    noisy = problem.train_loss_fn
    apply_fn = without_clips(problem.apply_fn, names)
    inputs = problem.batch(slice(problem.batch_size))[0]
    network = inspect(apply_fn, problem.params, inputs)
    return problem._replace(
        apply_fn=apply_fn,
        loss_fn=without_clips(problem.loss_fn, names),
        train_loss_fn=None if noisy is None else without_clips(noisy, names),
        network=network,
        head=output_layer(network),
    )
