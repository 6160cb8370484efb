"""The rules of the house, kept by reading the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nnsanity"
FOLDERS = ("nnsanity", "tests", "benchmarks", "examples")
FLOORS = {
    "_types": 0,
    "_packed": 0,
    "_tree": 0,
    "findings": 0,
    "tracing": 1,
    "quantities": 2,
    "checks": 3,
    "signals": 4,
    "monitor": 4,
    "lint": 4,
    "trials": 4,
    "checkup": 4,
    "report": 5,
    "plot": 5,
    "linen": 5,
    "nnx": 5,
}
UPWARD = {("checkup", "report")}  # a checkup returns a Report
FLAX_MODULES = {"nnsanity.linen", "nnsanity.nnx"}
COMPAT = "nnsanity.tracing.compat"
MAX_LINES = 400
DRAWERS = {"utils", "misc", "common", "base"}
NUMBERS = {"bool", "int", "float", "str"}


def sources(*folders):
    return [p for folder in folders for p in sorted((ROOT / folder).rglob("*.py"))]


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def within(name, package):
    return name == package or name.startswith(f"{package}.")


def imports(tree, module):
    """Dotted names that are imported, `from . import x` written out in full."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            origin = [*parents, *([node.module] if node.module else [])]
            yield from (".".join([*origin, alias.name]) for alias in node.names)


def names_used(tree, module):
    """What is imported and what is reached by attributes, such as `jax._src.core`."""
    yield from imports(tree, module)
    attributes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    yield from (ast.unparse(node) for node in attributes)


def floor_faults(source, module):
    """Imports of a module of the package that its floor does not allow."""
    if module == "nnsanity.__init__":
        return []
    room = module.split(".")[1]
    if room not in FLOORS:
        return [f"{module} stands on no floor: give it one in FLOORS"]
    faults = []
    for name in imports(ast.parse(source), module):
        if not within(name, "nnsanity"):
            continue
        other = [*name.split("."), ""][1]
        above = FLOORS.get(other, 6) > FLOORS[room] and (room, other) not in UPWARD
        sibling = room == other == "checks" and not module.endswith("__init__")
        if above or sibling:
            faults.append(f"{module} imports {name}")
    return faults


def border_faults(source, module):
    """Imports from outside that only certain modules may make."""
    faults = []
    for name in names_used(ast.parse(source), module):
        private = within(name, "jax._src")
        extend = within(name, "jax.extend") and module != COMPAT
        flax = within(name, "flax") and module not in FLAX_MODULES
        if private or (within(module, "nnsanity") and (extend or flax)):
            faults.append(f"{module} uses {name}")
    return faults


def statement_faults(source, module):
    """Assertions, prints and silenced types."""
    tree = ast.parse(source, type_comments=True)
    faults = [f"{module}:{mark.lineno} type: ignore" for mark in tree.type_ignores]
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            faults.append(f"{module}:{node.lineno} assert")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
            faults.append(f"{module}:{node.lineno} print")
    return faults


def file_faults(source, module):
    """Files that are too long, and drawers for odds and ends."""
    faults = []
    if len(source.splitlines()) > MAX_LINES:
        faults.append(f"{module} has more than {MAX_LINES} lines")
    if DRAWERS & {part.strip("_") for part in module.split(".")}:
        faults.append(f"{module} is named after nothing in particular")
    return faults


def signature_faults(function):
    """A missing docstring, and options that can be passed by position."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    faults = [] if ast.get_docstring(function) else [f"{function.name}: no docstring"]
    if arguments.defaults or arguments.vararg:
        faults.append(f"{function.name}: options are keyword-only")
    for argument in positional:
        annotation = argument.annotation and ast.unparse(argument.annotation)
        if argument.arg == "key" or annotation in NUMBERS:
            faults.append(f"{function.name}: {argument.arg} is keyword-only")
    is_function = [argument.arg.endswith("_fn") for argument in positional]
    if is_function != sorted(is_function, reverse=True):
        faults.append(f"{function.name}: functions come before trees")
    return faults


def public_names(tree):
    """The names in `__all__`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return []


def public_functions():
    """Definitions of the functions in `nnsanity.__all__`, by name."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    functions = {}
    for imported in imports(tree, "nnsanity.__init__"):
        module, _, name = imported.rpartition(".")
        path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        if name in public_names(tree) and path.exists():
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.FunctionDef) and node.name == name:
                    functions[name] = node
    return functions


def faults_in(check, *folders):
    return [
        fault
        for path in sources(*folders)
        for fault in check(path.read_text(), module_name(path))
    ]


@pytest.mark.parametrize("check", [floor_faults, statement_faults])
def test_package(check):
    assert faults_in(check, "nnsanity") == []


@pytest.mark.parametrize("check", [border_faults, file_faults])
def test_all_folders(check):
    assert faults_in(check, *FOLDERS) == []


def test_public_functions():
    functions = public_functions()
    assert functions
    assert [f for node in functions.values() for f in signature_faults(node)] == []


def test_every_public_function_is_read():
    names = public_names(ast.parse((PACKAGE / "__init__.py").read_text()))
    expected = {name for name in names if name.islower() and name[0] != "_"}
    modules = {path.stem for path in PACKAGE.iterdir()}
    assert expected - modules <= set(public_functions())


@pytest.mark.parametrize(
    ("check", "module", "source"),
    [
        (floor_faults, "nnsanity._tree", "from nnsanity.findings import Finding"),
        (floor_faults, "nnsanity.tracing.tap", "from . import layers"),
        (floor_faults, "nnsanity.checks.width", "from ..tracing import layers"),
        (floor_faults, "nnsanity.checks.__init__", "from . import width"),
        (floor_faults, "nnsanity.checkup", "from nnsanity.report import Report"),
        (border_faults, COMPAT, "from jax.extend import core"),
        (border_faults, "nnsanity.nnx", "from flax import nnx"),
        (border_faults, "examples.digits", "from flax import nnx"),
        (statement_faults, "nnsanity.depth", "'assert print()'  # type of x"),
        (file_faults, "nnsanity.depth", "\n" * MAX_LINES),
    ],
)
def test_sound_source_passes(check, module, source):
    assert check(source, module) == []


@pytest.mark.parametrize(
    ("check", "module", "source"),
    [
        (floor_faults, "nnsanity._tree", "from nnsanity.tracing import tap"),
        (floor_faults, "nnsanity.tracing.tap", "import nnsanity.checks.width"),
        (floor_faults, "nnsanity.tracing.tap", "from nnsanity import layers"),
        (floor_faults, "nnsanity.tracing.tap", "import nnsanity as ns"),
        (floor_faults, "nnsanity.checks.depth", "from . import width"),
        (floor_faults, "nnsanity.checks.depth", "from .. import trials"),
        (floor_faults, "nnsanity.trials", "def f():\n    from .report import Report"),
        (floor_faults, "nnsanity.attic", ""),
        (border_faults, "nnsanity.depth", "import flax.linen as nn"),
        (border_faults, "nnsanity.tracing.tap", "from jax.extend import core"),
        (border_faults, "nnsanity.tracing.tap", "jax.extend.core.Jaxpr"),
        (border_faults, COMPAT, "from jax._src import core"),
        (border_faults, "tests.test_tap", "jax._src.core"),
        (statement_faults, "nnsanity.depth", "assert True"),
        (statement_faults, "nnsanity.depth", "print()"),
        (statement_faults, "nnsanity.depth", "x = 1  # type: ignore[assignment]"),
        (file_faults, "nnsanity.depth", "\n" * (MAX_LINES + 1)),
        (file_faults, "nnsanity.utils", ""),
        (file_faults, "tests.common.test_depth", ""),
    ],
)
def test_unsound_source_is_found(check, module, source):
    assert check(source, module) != []


@pytest.mark.parametrize(
    ("source", "num_faults"),
    [
        ("def f(loss_fn, params, batch, *, key, steps=1):\n    'Doc.'", 0),
        ("def f(params): ...", 1),
        ("def f(params, steps=1):\n    'Doc.'", 1),
        ("def f(params, key):\n    'Doc.'", 1),
        ("def f(params, steps: int):\n    'Doc.'", 1),
        ("def f(params, loss_fn):\n    'Doc.'", 1),
    ],
)
def test_signatures(source, num_faults):
    assert len(signature_faults(ast.parse(source).body[0])) == num_faults
