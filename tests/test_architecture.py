"""Rooms: benchmarks → models → {torch | optax} → core → standard library."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import muonclip
import muonclip.core
import muonclip.optax
import muonclip.torch

ROOT = Path(muonclip.__file__).parent
DOORS = {
    "huggingface.py": {"transformers"},
    "head_maxima.py": {"triton"},
}  # to engines, imported only when used
MAY_IMPORT = {
    "core": {"muonclip.core"},
    "torch": {"muonclip.core", "muonclip.torch", "torch"},
    "optax": {"muonclip.core", "muonclip.optax", "jax", "numpy", "optax"},
    "models": {"muonclip.core", "muonclip.torch", "muonclip.optax", "muonclip.models", "torch", "jax", "numpy"},
}


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_each_room_imports_only_what_stands_below(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        for name in imported_modules(path):
            allowed = MAY_IMPORT[room] | DOORS.get(path.name, set())
            known = any(name == room_ or name.startswith(room_ + ".") for room_ in allowed)
            assert known or name.split(".")[0] in sys.stdlib_module_names, f"{path.name} imports {name}"


def test_muonclip_imports_no_framework():
    code = "import sys, muonclip, muonclip.core; sys.exit(any(m in sys.modules for m in ('torch', 'jax', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_model_configuration_needs_no_framework():
    code = "import sys; from muonclip.models import MoEConfig; MoEConfig.k2(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("module", [muonclip, muonclip.core, muonclip.optax, muonclip.torch])
def test_all_lists_what_exists(module):
    assert sorted(module.__all__) == sorted(set(module.__all__))
    assert all(hasattr(module, name) for name in module.__all__)
