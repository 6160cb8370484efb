"""Runs the checklist on one problem: read, measure, train, repair, judge."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import optax

from nnsanity._tree import finite_leaves, inexact_leaves
from nnsanity._types import ApplyFn, Array, LossFn, Params, PyTree, TrainLossFn
from nnsanity.checks import (
    final_activation,
    initialization,
    learning_rate,
    results,
)
from nnsanity.findings import CONSEQUENCES, Finding, listed
from nnsanity.lint import lint
from nnsanity.report import Report
from nnsanity.tracing.bounds import output_bounds
from nnsanity.trials.batch_noise import measure_batch_noise
from nnsanity.trials.births import with_births
from nnsanity.trials.compiled import drop_compiled
from nnsanity.trials.data import examine_data, judge_rounding
from nnsanity.trials.dynamics import Dynamics, measure_dynamics
from nnsanity.trials.inside import judge_network, measure_network
from nnsanity.trials.interventions import (
    BUDGET_SECONDS,
    Diagnosis,
    intervene,
    train_original,
    untouched,
)
from nnsanity.trials.invariances import (
    check_transforms,
    judge_invariances,
    named_transforms,
)
from nnsanity.trials.levels import FAILED, LEARNED, unit_of
from nnsanity.trials.measure import (
    constant_loss,
    data_loss,
    few_examples,
    some_examples,
    training_noise,
    wants_other_units,
)
from nnsanity.trials.problem import BATCH_SIZE, Problem, checked_problem
from nnsanity.trials.seeds import typical_first
from nnsanity.trials.trial import prepare
from nnsanity.trials.verdicts import judge_outcomes, without_blame

LIMITED = frozenset(
    {
        "normalization/unnormalized-inputs",
        "normalization/unnormalized-targets",
        "normalization/scale-disparity",
        "results/start-loss",
        "gradients/exploding",
        "gradients/vanishing",
        "gradients/dead-units",
        "initialization/off-scale",
    }
)
"""Rules whose limit the user can set."""


def checkup(
    apply_fn: ApplyFn,
    loss_fn: LossFn,
    params: Params,
    data: tuple[PyTree, PyTree],
    *,
    key: Array,
    optimizer: optax.GradientTransformation | None = None,
    batch_size: int = BATCH_SIZE,
    num_steps: int = 300,
    train_loss_fn: TrainLossFn | None = None,
    validation: tuple[PyTree, PyTree] | None = None,
    groups: Sequence[int] | None = None,
    invariances: Sequence[Any] = (),
    interventions: bool = True,
    limits: Mapping[str, float] | None = None,
    ignore: Collection[str] = (),
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Examines a network that does not train, and says why.

    Reads the program, looks at the data and at the untrained network, trains it for
    ``num_steps`` from three seeds, and where it does not learn well, repairs the
    suspects on copies and trains those beside it: what a repair changes is a cause.
    Nothing that is given is changed.

    Costs three trainings of ``num_steps`` for a network that learns, and dozens for one
    that does not, some of them longer; each as fast as a compiled loop runs.

    Args:
        apply_fn: ``apply_fn(params, inputs) -> outputs``, in evaluation mode.
        loss_fn: ``loss_fn(params, (inputs, targets)) -> scalar``, without noise.
        params: the untrained parameters, any pytree of arrays.
        data: ``(inputs, targets)``, leading axis the examples.
        key: a PRNG key; consumed.
        optimizer: the optax transformation that you train with.  Without it nothing is
            trained, and suspicions stay suspicions.
        batch_size: examples in one of your steps; all of them where there are fewer
            than 32.
        num_steps: how many steps you train for; the trial never runs longer, only a
            copy where training for longer is the repair.
        train_loss_fn: ``train_loss_fn(params, batch, key) -> scalar`` with dropout on.
        validation: held-out ``(inputs, targets)``, prepared as you prepare them.
        groups: one number for each input feature; features of one group share their
            mean and deviation.
        invariances: transforms that keep the meaning of the inputs, functions of
            ``inputs`` or pairs of a name and such a function: what comes out should not
            change with them.
        interventions: whether to repair and train copies.
        limits: other limits, by rule: ``{"results/start-loss": 10.0}``.
        ignore: rules not to report.
        progress: called with a line of text now and then; ``print`` will do.

    Returns:
        A ``Report``: ``print(report)`` shows it, ``report.findings`` holds what was
        found.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if arguments do not fit each other; the text names the argument.

    Example:
        >>> import jax.numpy as jnp
        >>> inputs = jax.random.normal(jax.random.key(0), (200, 3))
        >>> targets = inputs @ jnp.array([1.0, -2.0, 0.5]) - 5.0
        >>> apply_fn = lambda params, x: jax.nn.relu(x @ params["w"] + params["b"])
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((apply_fn(params, batch[0]) - batch[1]) ** 2)
        >>> params = {"w": jnp.ones(3), "b": jnp.zeros(())}
        >>> report = checkup(
        ...     apply_fn, loss_fn, params, (inputs, targets),
        ...     key=jax.random.key(1), optimizer=optax.sgd(0.1), num_steps=100,
        ... )
        >>> report.findings[0].rule
        'final-activation/unreachable-targets'

    References:
        D. Holden, "My Neural Network isn't working! What should I do?" (2017).
    """
    unknown = set(limits or {}) - LIMITED
    if unknown:
        raise ValueError(
            f"checkup: limits holds rules without a limit, {sorted(unknown)}; it takes"
            f" {sorted(LIMITED)}"
        )
    if isinstance(ignore, str):
        raise TypeError(f"checkup: ignore must be a list of rules, got {ignore!r}")
    if not (progress is None or callable(progress)):
        raise TypeError(f"checkup: progress must be like print, got {progress!r}")
    tell = progress or (lambda line: None)
    deadline = time.monotonic() + BUDGET_SECONDS
    transforms = named_transforms(invariances)
    problem = checked_problem(
        apply_fn,
        loss_fn,
        params,
        data,
        key=key,
        optimizer=optimizer,
        batch_size=batch_size,
        num_steps=num_steps,
        train_loss_fn=train_loss_fn,
        validation=validation,
        groups=groups,
    )
    book = _Book(dict(limits or {}))
    if wants_other_units(problem, few_examples(problem)):
        problem = problem._replace(kind=None)
    check_transforms(problem, transforms)
    book.findings += judge_rounding(tuple(data))
    tell("reading the program")
    _read(problem, book)
    tell("measuring the data and the untrained network")
    _measure_data(problem, book)
    _measure_network(problem, book)
    diagnosis = _train(
        problem, book, key, tell, deadline=deadline if interventions else None
    )
    moved, measured = judge_invariances(problem, transforms, diagnosis)
    book.findings += moved
    book.measurements |= measured
    findings = _in_order(book.findings, diagnosis, set(ignore))
    summary = _summary(problem, diagnosis, book)
    ruled_out = () if diagnosis is None else diagnosis.ruled_out
    drop_compiled()
    return Report(findings, book.measurements, book.skipped, summary, ruled_out)


class _Book:
    """What has been found so far."""

    def __init__(self, limits: dict[str, float]) -> None:
        self.limits = limits
        self.findings: list[Finding] = []
        self.measurements: dict[str, Any] = {}
        self.skipped: dict[str, str] = {}

    def add(self, measured: Dynamics) -> None:
        self.findings += measured.findings
        self.measurements |= measured.measurements
        self.skipped |= measured.skipped


def _read(problem: Problem, book: _Book) -> None:
    """Reads the program: proofs, and what could not be looked into."""
    batch = problem.batch(slice(problem.batch_size))
    book.findings += lint(
        problem.loss_fn, problem.params, batch, apply_fn=problem.apply_fn
    )
    book.measurements["layers"] = tuple(one.layer for one in problem.network.layers)
    outputs = jax.eval_shape(problem.apply_fn, problem.params, problem.inputs)
    book.findings += results.judge_labels(outputs, problem.targets)
    by_reason: dict[str, list[str]] = {}
    for name, reason in problem.network.uninspected.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        book.skipped[f"parameters {listed(names)}"] = reason
    if not problem.network.layers:
        book.skipped["layers"] = "no weight meets the inputs in a product or look-up"
    if training_noise(problem).differs:
        book.skipped["batch statistics"] = (
            "the training loss differs from loss_fn, and not by noise. Running"
            " statistics stay as they are here while the network trains: let apply_fn"
            " and loss_fn use those of the batch, or trust no verdict of the trial"
        )
    if problem.kind is not None and problem.head is None:
        book.skipped["the last layer"] = (
            "its output is changed before it is returned, so that it can't be replaced;"
            " no baseline of the loss and no repair of the last activation"
        )
    if problem.kind is None:
        book.skipped["final-activation"] = (
            "outputs and targets differ in shape or unit, or are not single arrays of"
            " numbers; learning is told by the loss alone"
        )
    elif problem.kind != "classes":
        _judge_reach(problem, book, batch)


def _judge_reach(problem: Problem, book: _Book, batch: tuple) -> None:
    bounds = output_bounds(problem.apply_fn, problem.params, batch[0])
    measured = final_activation.reachable(bounds, problem.targets)
    book.measurements["reachable"] = measured
    where = problem.head.layer.name if problem.head is not None else "apply_fn"
    if bool(measured.constant):
        return  # which lint has said already
    found = final_activation.judge_reach(measured, where)
    if problem.kind != "numbers":  # what stands for a class is up to the loss
        found = tuple(one._replace(severity="info") for one in found)
    book.findings += found


def _measure_data(problem: Problem, book: _Book) -> None:
    examined = examine_data(problem, limits=book.limits)
    book.findings += examined.findings
    book.measurements |= examined.measurements
    book.skipped |= examined.skipped


def _measure_network(problem: Problem, book: _Book) -> None:
    """Measures the untrained network on one large batch."""
    batch = some_examples(problem)
    measured = measure_network(problem, batch)
    constant = constant_loss(problem, few_examples(problem))
    book.measurements |= measured._asdict() | {"constant_loss": constant}
    book.add(measure_dynamics(problem, batch))
    limit = book.limits.get("results/start-loss", results.START_LIMIT)
    start = data_loss(problem, problem.params, batch)
    begin = len(book.findings)
    book.findings += results.judge_start(start, constant, limit)
    book.findings += judge_network(problem, measured, batch, limits=book.limits)
    book.findings[begin:] = with_births(
        problem.loss_fn, problem.params, batch, findings=book.findings[begin:]
    )


def _train(
    problem: Problem,
    book: _Book,
    key: Array,
    tell: Callable[[str], None],
    *,
    deadline: float | None,
) -> Diagnosis | None:
    """Trains the network as it is, and repaired where it does not learn well."""
    if problem.optimizer is None:
        book.skipped["trial"] = "no optimizer was given; suspicions stay suspicions"
        book.findings += initialization.judge_symmetry(
            jax.device_get(book.measurements["weights"]), None, problem.network
        )
        return None
    if _has_nonfinite(problem):
        book.skipped["trial"] = "NaN or infinity in the parameters or the data"
        return None
    split_key, train_key = jax.random.split(key)
    tell(f"training for {problem.num_steps} steps")
    trial = prepare(
        problem,
        split_key,
        num_steps=problem.num_steps,
        batch_size=problem.batch_size,
    )
    in_turn = train_original(problem, trial, train_key)
    outcomes, keys = typical_first(problem, in_turn, train_key)
    book.measurements["trial"] = tuple(
        one._replace(params=None, kept=None) for one in outcomes
    )
    book.findings += learning_rate.judge_losses(outcomes[0].batch_losses)
    book.add(measure_batch_noise(problem, trial, in_turn))
    diagnosis = untouched(problem, trial, outcomes)
    if deadline is not None:
        diagnosis = intervene(
            problem,
            trial,
            outcomes,
            book.findings,
            keys=keys,
            split_key=split_key,
            deadline=deadline,
            progress=tell,
        )
    book.skipped |= diagnosis.skipped
    book.measurements |= {
        "repairs": diagnosis.attempts,
        "quality_curve": diagnosis.curve,
    }
    found, measured = judge_outcomes(
        problem, diagnosis, tuple(book.findings), book.measurements
    )
    book.findings = [*without_blame([*book.findings, *found], diagnosis)]
    book.measurements |= measured
    return diagnosis


def _has_nonfinite(problem: Problem) -> bool:
    leaves = inexact_leaves((problem.params, problem.inputs, problem.targets))
    return not all(finite_leaves(leaves))


def _in_order(
    findings: Sequence[Finding], diagnosis: Diagnosis | None, ignored: set[str]
) -> tuple[Finding, ...]:
    """Puts proofs first, then causes by their effect, then consequences, then notes.

    A suspicion that became a cause is told once.
    """
    causes = () if diagnosis is None else diagnosis.causes
    loud = [one for one in findings if one.severity != "info"]
    told = {(finding.rule, finding.where) for finding in causes}
    findings = [
        one
        for one in findings
        if one.severity != "info"
        or all((one.rule, one.where) != (other.rule, other.where) for other in loud)
    ]
    proved = {finding.rule for finding in findings if finding.severity == "error"}
    proved -= CONSEQUENCES

    def rank(finding: Finding) -> int:
        if finding.rule in proved:
            return 0
        return 1 if finding in causes else 2

    ordered = [*causes, *(one for one in findings if (one.rule, one.where) not in told)]
    ordered.sort(key=lambda one: (one.severity == "info", rank(one)))
    return tuple(finding for finding in ordered if finding.rule not in ignored)


def _summary(problem: Problem, diagnosis: Diagnosis | None, book: _Book) -> str:
    """One sentence on how the network learned."""
    if diagnosis is None:
        return f"Not trained: {book.skipped['trial']}."
    measure, to_unit = unit_of(problem)
    level = diagnosis.level
    verdict = (
        "learns"
        if level >= LEARNED
        else "does not learn"
        if level <= FAILED
        else "learns in part"
    )
    return (
        f"The network {verdict}: {measure} {to_unit(level):.2f} after"
        f" {diagnosis.num_steps} steps on {problem.size_in_words}, the mean of"
        f" those trained on and others.{_errors(book)}"
    )


def _errors(book: _Book) -> str:
    measured = book.measurements.get("constant_baseline")
    words = "" if measured is None else results.errors_in_words(measured)
    return f" Its error is {words}, in the unit of the targets." if words else ""
