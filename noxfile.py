"""The gate. `nox` runs all of it, `nox -s lint` one session, `nox -l` lists them."""

import os
import sys
from pathlib import Path

import nox

nox.options.reuse_venv = "yes"

CPU = {"JAX_PLATFORMS": "cpu"}
# Nearly all of a test's time is compilation; this takes about a third of it away.
QUICK = CPU | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
PYTHONS = ["3.11", "3.13"]
if not os.environ.get("CI"):  # at home the running interpreter is tested as well
    PYTHONS = sorted({*PYTHONS, f"{sys.version_info.major}.{sys.version_info.minor}"})

DEPENDENCIES = nox.project.load_toml("pyproject.toml")["project"]["dependencies"]
OLDEST = [f"{floor.replace('>=', '==')}.*" for floor in DEPENDENCIES]


@nox.session
def lint(session):
    """Format and lint rules."""
    session.install("ruff==0.17.*")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")


@nox.session(python="3.11")
def types(session):
    """Annotations of the package, against those of jax."""
    session.install("-e", ".", "mypy==2.4.*")
    session.run("mypy")


@nox.session(python="3.11")
def examples(session):
    """Every script of examples/ runs to its end."""
    session.install("-e", ".[examples]")
    for script in sorted(Path("examples").glob("*.py")):
        session.run("python", str(script), env=CPU)


@nox.session(python="3.11")
def oldest(session):
    """The tests that are not slow, on the oldest dependencies that are declared."""
    session.install("-e", ".[test]", *OLDEST)
    session.run("pytest", "-n", "2", "-m", "not slow", *session.posargs, env=QUICK)


@nox.session(python=PYTHONS)
def tests(session):
    """Tests, docstrings and README on the newest jax; slow ones on one Python alone."""
    session.install("-e", ".[test]")
    is_last = session.python == PYTHONS[-1]
    marks, env = ((), CPU) if is_last else (("-m", "not slow"), QUICK)
    session.run("pytest", "-n", "2", *marks, *session.posargs, env=env)
