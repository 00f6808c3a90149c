"""Packages of benchmarks: experiment → records → training → execution, report → studies → the command line."""

import ast
from pathlib import Path

import pytest

import benchmarks

ROOT = Path(benchmarks.__file__).parent
MAY_IMPORT = {
    "experiment": (),
    "records": ("experiment",),
    "training": ("experiment", "records"),
    "execution": ("experiment", "records", "training"),
    "report": ("experiment", "records"),
    "studies": ("experiment", "records", "training", "execution", "report"),
}


def imports(path):
    """Every module of benchmarks that the file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "benchmarks" and "." in name)


def module_of(path):
    return ".".join(("benchmarks", *path.relative_to(ROOT).with_suffix("").parts))


def test_the_table_names_every_package_from_below():
    assert sorted(MAY_IMPORT) == sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
    order = list(MAY_IMPORT)
    for package, below in MAY_IMPORT.items():
        assert set(below) <= set(order[: order.index(package)]), f"{package} stands below what it imports"


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_no_package_imports_upwards(package):
    allowed = {package, *MAY_IMPORT[package]}
    for path in sorted((ROOT / package).glob("*.py")):
        for name in imports(path):
            assert name.split(".")[1] in allowed, f"{module_of(path)} imports {name}"


def test_no_modules_import_each_other_in_a_circle():
    files = {module_of(path): path for path in ROOT.rglob("*.py")}
    graph = {module: {name for name in imports(path) if name in files} - {module} for module, path in files.items()}
    while ready := [module for module, below in graph.items() if not below & graph.keys()]:
        for module in ready:
            del graph[module]
    assert not graph, f"in a circle, or above one: {', '.join(sorted(graph))}"


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_every_package_says_what_lives_there(package):
    docstring = ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8")))
    assert docstring
    assert len(docstring.split()) > 20
