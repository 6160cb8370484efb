"""Transforms that keep the meaning, tried on inputs and on the network's outputs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from nnsanity._types import Params, PyTree
from nnsanity.checks import preprocessing
from nnsanity.findings import Finding
from nnsanity.quantities.representation import invariance
from nnsanity.trials.interventions import Diagnosis
from nnsanity.trials.measure import some_examples
from nnsanity.trials.problem import Problem

Transforms = dict[str, Callable[[PyTree], PyTree]]


def named_transforms(invariances: Sequence[Any] | Mapping[str, Any]) -> Transforms:
    """Names the transforms that a user gave.

    Args:
        invariances: functions of inputs, pairs of a name and a function, or a mapping.

    Raises:
        TypeError: if one of them is no function.
        ValueError: if two have one name.
    """
    pairs = invariances.items() if isinstance(invariances, Mapping) else invariances
    named: Transforms = {}
    for number, one in enumerate(pairs):
        name, transform = one if isinstance(one, tuple) and len(one) == 2 else ("", one)
        if not callable(transform) or not isinstance(name, str):
            raise TypeError(
                "checkup: invariances must hold functions of inputs, or pairs of a name"
                f" and a function, got {one!r}"
            )
        name = name or getattr(transform, "__name__", f"transform {number}")
        if name in named:
            raise ValueError(
                f"checkup: invariances holds two transforms called {name!r}; give pairs"
                " of a name and a function"
            )
        named[name] = transform
    return named


def judge_invariances(
    problem: Problem, transforms: Transforms, diagnosis: Diagnosis | None
) -> tuple[list[Finding], dict[str, Any]]:
    """Measures how far each transform moves the inputs and the outputs.

    A warning where the outputs of the trained network move; without a training the
    inputs alone are judged, as worth knowing.

    Args:
        problem: the network and its data.
        transforms: by name.
        diagnosis: with the trained parameters, or None.
    """
    inputs = some_examples(problem)[0]
    findings: list[Finding] = []
    measured: dict[str, Any] = {}
    for name, transform in transforms.items():
        moved = _checked(name, transform, inputs)
        on_inputs = invariance(lambda x: x, _always(moved), inputs)
        measured[f"invariance of the inputs, {name}"] = on_inputs
        if diagnosis is None:
            findings += preprocessing.judge_invariance(
                name, on_inputs, of="the inputs", severity="info"
            )
            continue
        params = diagnosis.outcomes[0].params
        on_outputs = _of_outputs(problem, params, inputs, moved)
        measured[f"invariance of the outputs, {name}"] = on_outputs
        findings += preprocessing.judge_invariance(
            name,
            on_outputs,
            of="the outputs of the trained network",
            severity="warning",
        )
    return findings, measured


def check_transforms(problem: Problem, transforms: Mapping[str, Callable]) -> None:
    """Calls each transform once, before anything takes time.

    Raises:
        ValueError: if one changes the shapes of the inputs.
    """
    inputs = some_examples(problem)[0]
    for name, transform in transforms.items():
        _checked(name, transform, inputs)


def _of_outputs(problem: Problem, params: Params, inputs: PyTree, moved: PyTree) -> Any:
    apply_fn = jax.jit(problem.apply_fn)
    return invariance(lambda x: apply_fn(params, x), _always(moved), inputs)


def _always(moved: PyTree) -> Callable[[PyTree], PyTree]:
    return lambda inputs: moved


def _checked(name: str, transform: Callable, inputs: PyTree) -> PyTree:
    moved = transform(inputs)
    ours, theirs = (
        jax.tree.map(lambda leaf: np.shape(leaf), tree) for tree in (inputs, moved)
    )
    if ours != theirs:
        raise ValueError(
            f"checkup: {name} of invariances must keep the shapes of the inputs, got"
            f" {theirs} for {ours}"
        )
    return moved
