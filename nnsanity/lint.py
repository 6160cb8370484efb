"""Finds what is wrong with a program by reading it, before a step is run."""

from collections.abc import Sequence

import jax

from nnsanity._types import ApplyFn, LossFn, Params, PyTree
from nnsanity.checks import final_activation, gradients, regularization, results
from nnsanity.findings import SEVERITIES, Finding
from nnsanity.tracing.batch_axis import meets_across_batch
from nnsanity.tracing.bounds import Bounds, bounds_of, read
from nnsanity.tracing.layers import inspect
from nnsanity.tracing.loss_head import Squash, loss_head
from nnsanity.tracing.mixing import mixes_examples
from nnsanity.tracing.noise import noise_at_evaluation
from nnsanity.tracing.reach import reach
from nnsanity.tracing.replace import output_layer


def lint(
    loss_fn: LossFn, params: Params, batch: PyTree, *, apply_fn: ApplyFn | None = None
) -> tuple[Finding, ...]:
    """Reads a loss and says what can be proved to be wrong with it.

    Finds parameters that no gradient reaches (``gradients/blocked``) or that nothing
    uses (``gradients/disconnected-parameter``), outputs that meet the targets of other
    examples (``results/broadcast-loss``), a softmax of a softmax
    (``final-activation/double-softmax``) and a logarithm of what can be 0 or below
    (``final-activation/probabilities-expected``).  In the network itself: outputs that
    no parameters change (``final-activation/constant-output``), examples that depend on
    each other (``results/mixes-examples``) and random numbers
    (``regularization/noise-at-evaluation``).  Suspicions about the head are
    infos.  docs/lint.md lists the rules.

    Costs six traces and no arithmetic, in time linear in the size of the program.

    Args:
        loss_fn: ``loss_fn(params, batch) -> scalar``.
        params: any pytree of arrays or of ``jax.ShapeDtypeStruct``.
        batch: any pytree of arrays or shapes; where it is a pair, ``batch[1]`` are the
            targets.
        apply_fn: the network alone, as it is evaluated; the rules about its outputs
            need it.

    Returns:
        The findings, proofs first.

    Raises:
        ValueError: if ``loss_fn`` does not return a scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((jnp.round(batch[0] @ params["w"]) - batch[1]) ** 2)
        >>> batch = jnp.ones((8, 3)), jnp.ones(8)
        >>> [one.rule for one in lint(loss_fn, {"w": jnp.ones(3)}, batch)]
        ['gradients/blocked']
    """
    findings = [*gradients.judge_reach(reach(loss_fn, params, batch))]
    is_pair = isinstance(batch, tuple | list) and len(batch) == 2
    if is_pair:
        places = meets_across_batch(loss_fn, params, tuple(batch))
        findings += results.judge_meeting(places)
    head = loss_head(loss_fn, params, batch)
    findings += final_activation.judge_squashes(head.squashes)
    findings += final_activation.judge_logarithms(head.logarithms)
    if apply_fn is not None:
        inputs = batch[0] if is_pair else batch
        targets = batch[1] if is_pair else None
        findings += _lint_network(apply_fn, params, inputs, targets, head.squashes)
    return tuple(sorted(findings, key=lambda one: SEVERITIES.index(one.severity)))


def _lint_network(
    apply_fn: ApplyFn,
    params: Params,
    inputs: PyTree,
    targets: PyTree,
    squashes: Sequence[Squash],
) -> list[Finding]:
    """Reads the network alone: what its head can give, and what it mixes in."""
    reading = read(apply_fn, params, inputs)
    network = inspect(apply_fn, params, inputs)
    head = output_layer(network)
    where = network.layers[-1].layer.name if network.layers else "apply_fn"
    activation = None if head is None else head.layer.activation
    noise = noise_at_evaluation(apply_fn, params, inputs, reading=reading)
    return [
        *_judge_constant(bounds_of(reading), where),
        *final_activation.judge_head(head),
        *final_activation.judge_classes(squashes, activation, targets, where),
        *regularization.judge_noise(noise),
        *results.judge_mixing(mixes_examples(apply_fn, params, inputs)),
    ]


def _judge_constant(bounds: Bounds, where: str) -> tuple[Finding, ...]:
    lows, highs = jax.tree.leaves(bounds.low), jax.tree.leaves(bounds.high)
    ends = [(low, high) for low, high in zip(lows, highs, strict=True) if low.size]
    # One output among others may be a mask, or a flag.
    if not ends or not all(bool((low == high).all()) for low, high in ends):
        return ()
    return (final_activation.constant_output(where, float(ends[0][0].reshape(-1)[0])),)
