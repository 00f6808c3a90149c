"""Who may import whom: benchmarks → models → {torch | optax} → core → standard library, and within torch."""

import ast
import importlib
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import muonclip
import muonclip.core
import muonclip.optax
import muonclip.torch

ROOT = Path(muonclip.__file__).parent
ENGINES = {
    "optax/known_attention.py": {"equinox", "flax"},  # for types alone
    "torch/huggingface.py": {"transformers"},
    "torch/lightning.py": {"lightning"},
    "torch/torchtitan.py": {"torchtitan"},
    "torch/observe/huggingface.py": {"transformers"},
    "torch/logits/kernels/head_maxima.py": {"triton"},
    "torch/logits/kernels/mask_levels.py": {"triton"},
    "torch/mesh/late_types.py": {"typing_extensions"},  # for types alone
    "torch/optimizer/muonclip.py": {"typing_extensions"},  # which torch needs too
    "selftest/llama.py": {"transformers"},
    "selftest/kernels.py": {"flash_attn", "flash_attn_interface", "transformer_engine", "xformers"},
}  # imported only when used
FRAMEWORKS = {"torch", "jax", "numpy", "optax"}
MAY_IMPORT = {
    "core": {"muonclip.core"},
    "torch": {"muonclip.core", "muonclip.torch", "torch"},
    "optax": {"muonclip.core", "muonclip.optax", "jax", "numpy", "optax"},
    "models": {"muonclip.core", "muonclip.torch", "muonclip.optax", "muonclip.models", "torch", "jax", "numpy"},
    "selftest": {"muonclip", *FRAMEWORKS},
}
TORCH_MAY_IMPORT = {  # package of muonclip.torch → the packages below it, of which its files may import
    "": {
        "monitor",
        "optimizer",
        "clip",
        "prove",
        "discover",
        "observe",
        "heads",
        "update",
        "logits",
        "mesh",
    },  # doors to engines
    "monitor": {"optimizer", "clip", "update", "mesh"},
    "optimizer": {"clip", "prove", "discover", "observe", "heads", "update", "logits", "mesh"},
    "clip": {"prove", "discover", "observe", "heads", "update", "logits", "mesh"},
    "prove": {"discover", "observe", "heads"},
    "discover": {"observe", "heads", "logits", "mesh"},
    "observe": {"logits", "mesh"},
    "heads": {"logits", "mesh"},
    "update": {"mesh"},
    "logits": {"mesh"},
    "mesh": set(),
}


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names if not is_name_in(module, alias.name))


def is_name_in(module, name):
    """Whether `from module import name` names something defined in the module, not a module of its own."""
    folder = ROOT.parent / module.replace(".", "/")
    return not ((folder / name).is_dir() or (folder / f"{name}.py").is_file())


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_each_room_imports_only_what_is_below(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        for name in imported_modules(path):
            allowed = MAY_IMPORT[room] | ENGINES.get(path.relative_to(ROOT).as_posix(), set())
            known = any(name == room_ or name.startswith(room_ + ".") for room_ in allowed)
            assert known or name.split(".")[0] in sys.stdlib_module_names, f"{path.name} imports {name}"


def package_of(module):
    """The package of muonclip.torch in which a module is; "" for the doors, None for modules elsewhere."""
    if module.split(".")[:2] != ["muonclip", "torch"]:
        return None
    head = module.split(".")[2:3]
    return head[0] if head and (ROOT / "torch" / head[0]).is_dir() else ""


@pytest.mark.parametrize("package", TORCH_MAY_IMPORT)
def test_each_package_of_torch_imports_only_packages_below(package):
    folder = ROOT / "torch" / package
    files = sorted(folder.rglob("*.py") if package else folder.glob("*.py"))
    assert files
    for path in files:
        for name in imported_modules(path):
            imported = package_of(name)
            allowed = TORCH_MAY_IMPORT[package] | {None, package}
            assert imported in allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_the_table_names_every_package_and_has_no_circle():
    packages = {path.name for path in (ROOT / "torch").iterdir() if (path / "__init__.py").is_file()}
    assert packages == TORCH_MAY_IMPORT.keys() - {""}
    tuple(TopologicalSorter(TORCH_MAY_IMPORT).static_order())  # raises CycleError


@pytest.mark.parametrize("room", ["core", "torch", "optax", "models", "selftest"])
def test_no_files_import_each_other_in_a_circle(room):
    """Within a package, too; imports for types alone count."""
    graph = {}
    for path in (ROOT / room).rglob("*.py"):
        parts = ("muonclip", *path.relative_to(ROOT).with_suffix("").parts)
        module = ".".join(part for part in parts if part != "__init__")
        graph[module] = {name for name in imported_modules(path) if name != module and is_a_module(name)}
    tuple(TopologicalSorter(graph).static_order())


def is_a_module(name):
    path = ROOT.parent / name.replace(".", "/")
    return name.startswith("muonclip.") and (path.with_suffix(".py").is_file() or (path / "__init__.py").is_file())


def handed_on(init):
    """The names that a package hands on: those of `__all__`, read without an import."""
    for node in ast.parse(init.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


PUBLIC = {".".join(init.relative_to(ROOT.parent).parent.parts): handed_on(init) for init in ROOT.rglob("__init__.py")}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_names_come_from_the_package_that_hands_them_on(path):
    """A file imports those of its package; of another package of muonclip.torch it knows the public names only."""
    own = ".".join(path.relative_to(ROOT.parent).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("muonclip."):
            continue
        above = [name for name, names in PUBLIC.items() if names and f"{node.module}.".startswith(f"{name}.")]
        package = max(above, key=len)
        if own == package or own.startswith(f"{package}."):
            continue
        names = {alias.name for alias in node.names}
        if package.startswith("muonclip.torch."):
            assert node.module == package, f"import {', '.join(names)} from {package}"
            assert names <= PUBLIC[package], f"{package} does not hand on {names - PUBLIC[package]}"
        elif node.module != package:
            assert not names & PUBLIC[package], f"import {names & PUBLIC[package]} from {package}"


@pytest.mark.parametrize("package", TORCH_MAY_IMPORT)
def test_every_package_of_torch_says_what_it_is_for_and_hands_on_names(package):
    module = importlib.import_module(f"muonclip.torch.{package}".rstrip("."))
    assert len(module.__doc__.split()) > 20
    assert module.__all__
    assert all(hasattr(module, each) for each in module.__all__)


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
