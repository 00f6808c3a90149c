"""The mutations change code that is there: their snippets occur once, and the tests that they name exist."""

import ast
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def test_every_snippet_occurs_once_and_every_named_test_exists():
    done = subprocess.run(
        [sys.executable, TESTS / "mutations.py", "--list"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, "\n".join(line for line in done.stdout.splitlines() if line.startswith("error"))
    named = {word for line in done.stdout.splitlines() for word in line.split() if word.startswith("tests/")}
    assert len(named) >= 60
    missing = []
    for test in named:
        file, _, name = test.partition("::")
        tree = ast.parse((TESTS.parent / file).read_text("utf-8"))
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        if name and name.partition("[")[0].rpartition("::")[2] not in functions:
            missing.append(test)
    assert not missing
