"""The pages of the reference: everything public and only that, each parameter with its meaning, the errors as lists."""

import functools
import importlib
import inspect
import re
from pathlib import Path

import griffe
import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = {
    "torch": ("muonclip.torch", "muonclip.torch.distributed"),
    "optax": ("muonclip.optax",),
    "core": ("muonclip.core",),
    "models": ("muonclip.models", "muonclip.models.latent_decoding", "muonclip.models.torch"),
    "huggingface": ("muonclip.torch.huggingface",),
    "lightning": ("muonclip.torch.lightning",),
}
TYPES = "## Types in the signatures"  # what only annotations name follows it
ENTRY = re.compile(r"^::: (\S+)\n((?:    .*\n?)*)", re.MULTILINE)
SHOWN = {griffe.DocstringSectionKind.parameters, griffe.DocstringSectionKind.attributes}


def text_of(page):
    return (ROOT / "docs" / "api" / f"{page}.md").read_text(encoding="utf-8")


def entries_of(text):
    """(path, options) of everything that a page takes from the source."""
    for path, options in ENTRY.findall(text):
        yield path, (yaml.safe_load(options) or {}).get("options", {})


@functools.cache
def source():
    return griffe.load("muonclip", search_paths=[ROOT], docstring_parser="google", allow_inspection=False)


def described(path):
    """What a page shows for a path: the object that the path names at run time, as it is written."""
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    if griffe_name := getattr(found, "__qualname__", None):
        path = f"{found.__module__}.{griffe_name}"
    return source()[path.partition(".")[2]]


def members_of(shown, options):
    """The public functions and classes that are shown with a class or a module."""
    asked = options.get("members")
    inherited = options.get("inherited_members") or []
    own = [each for each in shown.members.values() if not each.is_alias]
    own += [shown.inherited_members[name].final_target for name in inherited if name not in shown.members]
    for each in own:
        wanted = each.is_public and each.has_docstring if asked is None else asked and each.name in asked
        if wanted and (each.is_function or each.is_class):
            yield each


def explained(shown):
    """The names that a docstring explains."""
    sections = shown.docstring.parsed if shown.docstring else ()
    return {each.name for section in sections if section.kind in SHOWN for each in section.value}


def parameters_of(shown):
    """The names of what it is called with, as a docstring writes them; of a tuple with names, its fields."""
    if shown.is_class and any(str(base) == "NamedTuple" for base in shown.bases):
        return [each.name for each in shown.members.values() if each.is_attribute]
    call = shown.all_members.get("__init__") if shown.is_class else shown
    stars = {griffe.ParameterKind.var_positional: "*", griffe.ParameterKind.var_keyword: "**"}
    parameters = call.parameters if call is not None and call.is_function else ()
    return [stars.get(each.kind, "") + each.name for each in parameters if each.name not in ("self", "cls")]


@pytest.mark.parametrize("page", PAGES)
def test_a_class_is_shown_with_all_its_constructors(page):
    for path, options in entries_of(text_of(page)):
        asked = options.get("members")
        if isinstance(asked, list):
            found = source()[path.partition(".")[2]]
            members = (found.final_target if found.is_alias else found).members.values()
            constructors = {each.name for each in members if not each.is_alias and "classmethod" in each.labels}
            assert {name for name in constructors if not name.startswith("_")} <= {*asked}, path


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_every_public_name_once_and_no_other(page):
    text = text_of(page).partition(TYPES)[0]
    shown = [path for path, _ in entries_of(text) if path != "muonclip.models.jax"]
    shown += re.findall(r"\[that of `muonclip.core`\]\[(.*)\]", text)
    found = [getattr(importlib.import_module(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in shown]
    modules = map(importlib.import_module, PAGES[page])
    public = [getattr(module, name) for module in modules for name in module.__all__]
    assert len(found) == len(public)
    assert {id(each) for each in found} == {id(each) for each in public}


def test_the_model_in_jax_is_shown_as_far_as_it_is_public():
    (options,) = (options for path, options in entries_of(text_of("models")) if path == "muonclip.models.jax")
    assert sorted(options["members"]) == sorted(importlib.import_module("muonclip.models.jax").__all__)


@pytest.mark.parametrize(
    ("page", "path", "options"), [(p, *each) for p in PAGES for each in entries_of(text_of(p).partition(TYPES)[0])]
)
def test_every_parameter_is_explained(page, path, options):
    if path == "muonclip.models.jax":
        module = importlib.import_module(path)
        values = [getattr(module, name) for name in options["members"]]
        names = (
            f"{each.__module__}.{each.__qualname__}" for each in values if inspect.isroutine(each) or each is module.Aux
        )
        whole = [source()[name.partition(".")[2]] for name in names]
    else:
        shown = described(path)
        whole = [shown, *members_of(shown, options)] if shown.is_class else [shown]
    for each in whole:
        assert each.has_docstring, each.path
        if each.is_class or each.is_function:
            assert set(parameters_of(each)) == explained(each), each.path
            assert "Raises " not in each.docstring.value.replace("Raises:", ""), f"{each.path}: errors as a list"


def test_the_types_that_are_shown_are_named_in_signatures():
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "muonclip").rglob("*.py"))
    for page in PAGES:
        for path, _ in entries_of(text_of(page).partition(TYPES)[2]):
            name = path.rpartition(".")[2]
            assert source()[path.partition(".")[2]].has_docstring
            assert len(re.findall(rf"\b{name}\b", code)) > 1, name
