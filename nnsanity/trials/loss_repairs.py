"""A repair of the loss: the usual one for such targets in the place of the user's."""

import jax
import jax.numpy as jnp
import numpy as np

from nnsanity._types import Array
from nnsanity.checks import results
from nnsanity.quantities.targets import usual_loss
from nnsanity.trials.copies import HEAD_LEFT_OUT, Copy
from nnsanity.trials.measure import few_examples, loss_of_outputs
from nnsanity.trials.problem import Problem
from nnsanity.trials.repairs import Repair

NUM_OUTPUTS = 16
"""How many random outputs two losses are compared on."""
SAME = 0.999
"""Correlation from which on two losses ask for the same."""
_SQUASHING = {None: lambda x: x, "softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}


def loss_repairs(problem: Problem) -> tuple[Repair, ...]:
    """Lists the usual loss, where the user's own asks for something else."""
    kind, head = problem.kind, problem.head
    if kind is None or head is None or _is_usual(problem):
        return ()

    def of_logits(copy: Copy, key: Array) -> Copy:
        del key
        is_number = kind == "numbers"
        return copy if is_number else copy._replace(head=jnp.int32(HEAD_LEFT_OUT))

    return (
        Repair(
            f"{results.USUAL_LOSSES[kind]} in the place of the loss",
            "loss",
            of_logits,
            (),
            results.unusual_loss(kind),
            rewrite=lambda one: one._replace(usual_loss=True),
            is_free=True,
        ),
    )


def _is_usual(problem: Problem) -> bool:
    """Tells whether the loss rates random outputs as the usual one does."""
    activation = None if problem.head is None else problem.head.layer.activation
    squash = _SQUASHING.get(None if problem.kind == "numbers" else activation)
    if squash is None:
        return False
    batch = few_examples(problem)
    shape = jax.eval_shape(problem.apply_fn, problem.params, batch[0]).shape
    # A fixed key: the outputs are a yardstick, no part of the report's chance.
    outputs = jax.random.normal(jax.random.key(0), (NUM_OUTPUTS, *shape))
    theirs = jax.vmap(lambda one: loss_of_outputs(problem, batch, squash(one)))
    usual = jax.vmap(lambda one: usual_loss(one, batch[1], kind=problem.kind))
    both = np.stack([jax.jit(theirs)(outputs), jax.jit(usual)(outputs)])
    varies = np.isfinite(both).all() and (np.ptp(both, axis=1) > 0).all()
    return bool(varies and np.corrcoef(both)[0, 1] >= SAME)
