"""The README's example runs, and its two commands are where readers look for them."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run(source):
    namespace = {"__name__": "__main__"}
    exec(compile(source, str(README), "exec"), namespace)
    return namespace


def test_python_blocks_run_one_after_another():
    found = blocks(README.read_text(), "python")
    assert len(found) > 1
    run("".join(found))


def test_two_bash_blocks():
    setup, gate = blocks(README.read_text(), "bash")[:2]
    assert setup.strip()
    assert "nox" in gate


def test_blocks_are_told_apart_and_run():
    text = "```bash\nls\n```\n```python\nx = 1\n\ny = 2\n```\n```python\n1 / 0\n```\n"
    assert blocks(text, "bash") == ["ls\n"]
    first, second = blocks(text, "python")
    assert run(first)["y"] == 2
    with pytest.raises(ZeroDivisionError):
        run(second)
