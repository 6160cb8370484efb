"""Lint on whole programs: what it says of each fault, and that it is silent else."""

import inspect
from pathlib import Path

import jax
import pytest

import nnsanity as ns
from tests.faulty_heads import HEADS
from tests.faulty_programs import PROGRAMS
from tests.zoo_losses import ZOO

PAIRS = HEADS | PROGRAMS


def lint(program):
    fns = {"apply_fn": program.apply_fn}
    return ns.lint(program.loss_fn, program.params, program.batch, **fns)


def shapes_of(tree):
    return jax.eval_shape(lambda tree: tree, tree)


def lines_of(builder):
    """The lines that may be named: of the marked statement."""
    lines, start = inspect.getsourcelines(builder)
    (last,) = [index for index, line in enumerate(lines) if "# here" in line]
    first = last
    while lines[first].count("(") < lines[last].count(")") - lines[last].count("("):
        first -= 1
    if "any of its lines" in lines[last]:
        first -= 2
    name = Path(inspect.getsourcefile(builder)).name
    return {f"{name}:{start + index}" for index in range(first, last + 1)}


@pytest.mark.parametrize("builder", PAIRS, ids=lambda one: one.__name__)
def test_the_fault_is_named_and_its_line(builder):
    rule, severity, name = PAIRS[builder]
    found = lint(builder(True))
    assert {(one.rule, one.severity) for one in found} == {(rule, severity)}
    places = {one.where.split(" (")[0] for one in found}
    assert places <= ({name} if name else lines_of(builder))


@pytest.mark.parametrize("builder", PAIRS, ids=lambda one: one.__name__)
def test_nothing_is_said_without_it(builder):
    assert lint(builder(False)) == ()


@pytest.mark.parametrize("name", ZOO)
def test_healthy_programs(name):
    found = lint(ZOO[name]())
    assert [one for one in found if one.severity != "info"] == []
    assert [one.rule for one in found] == (
        ["results/mixes-examples"] if name == "resnet_in_training" else []
    )


@pytest.mark.parametrize("builder", PAIRS, ids=lambda one: one.__name__)
def test_shapes_are_enough(builder):
    rule = PAIRS[builder][0]
    program = builder(True)
    params, batch = shapes_of((program.params, program.batch))
    found = lint(program._replace(params=params, batch=batch))
    if rule == "final-activation/independent-classes":  # it reads the targets
        assert found == ()
    else:
        assert found == lint(program)


@pytest.mark.parametrize(
    ("builder", "words"),
    [
        ("softmax_and_optax_integer_labels", ("softmax already", "57.6%", "0.551")),
        ("sigmoid_and_optax_binary", ("sigmoid already", "73.1%", "0.313")),
        ("relu_as_logits", ("max", "below 50%")),
        ("tanh_as_logits", ("tanh", "73.1%")),
        ("logarithm_of_logits", ("negative", "-inf")),
        ("logarithm_of_relu", ("can be 0", "from 0 to inf")),
        ("relu_at_the_end", ("relu", "at 0")),
        ("clip_at_the_end", ("-1 and 1",)),
        ("softmax_where_several_are_true", ("Up to 2 classes",)),
        ("batch_normalization_while_evaluating", ("Batch normalization",)),
        ("quantized_without_a_way_around", ("encoder", "argmin")),
    ],
)
def test_the_message_says_what_was_read(builder, words):
    (program,) = [one(True) for one in PAIRS if one.__name__ == builder]
    (found,) = lint(program)
    assert [word for word in words if word not in found.message] == []
    assert found.advice


def test_the_page_lists_the_rules():
    page = (Path(ns.__file__).parents[1] / "docs" / "lint.md").read_text()
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| `")]
    listed = {row[1].strip(" `"): row[2].strip() for row in rows}
    errors_first = sorted(PAIRS.values(), key=lambda row: row[1] != "error")
    severities = {rule: severity for rule, severity, _ in reversed(errors_first)}
    severities["results/mixes-examples"] = "warning"  # info for a batch normalization
    assert listed == severities
