"""Marks code that needs the code above it; makes every page available as Markdown, and `llms.txt`, a list of them.

In the Markdown of a page of the reference, signatures and docstrings are written out.
"""

from __future__ import annotations

import ast
import builtins
import re
import symtable
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import griffe
import yaml

_PYTHON = re.compile(r"^```python\n((?:.*\n)*?)```$", re.MULTILINE)
_INCLUDED = re.compile(r'^--8<-- "(.*?)(?::(\d+):)?"$', re.MULTILINE)
_DOCUMENTED = re.compile(r"^::: ([\w.]+)\n((?:    .*\n)*)", re.MULTILINE)
_REFERENCE = re.compile(r"\[([^\]]+)\]\[[\w.]*\]")  # which the site resolves
_pages: dict[str, str] = {}  # by address: the page as Markdown


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str | None:
    """Mark blocks, and keep the page with what it includes.

    The list of changes, which is above `docs`, links to pages by `docs/…`.
    """
    marked = _PYTHON.sub(_marked, markdown)
    text = _REFERENCE.sub(r"\1", _DOCUMENTED.sub(_documented, _INCLUDED.sub(_included, marked)))
    outside = page.file.src_uri == "changelog.md"
    _pages[page.file.src_uri] = text = text.replace("](docs/", "](") if outside else text
    return text if outside else marked


def on_page_content(html: str, **_: Any) -> str:
    """Leave folded source out of the search, which finds words of pages."""
    return html.replace(
        '<details class="mkdocstrings-source">', '<details class="mkdocstrings-source" data-search-exclude>'
    )


def on_post_build(config: Any, **_: Any) -> None:
    """Write the pages and the list."""
    site = Path(config["site_dir"])
    for address, text in _pages.items():
        (site / address).write_text(text, encoding="utf-8")
    listed = [f"# {config['site_name']}", f"> {config['site_description']}", *_listed(config["nav"])]
    (site / "llms.txt").write_text("\n\n".join(listed) + "\n", encoding="utf-8")


def needs(code: str) -> set[str]:
    """Return the names that a block of Python uses and does not make: others must run before it.

    What a function's body uses may be made after it.
    """
    made, later, lacking = set(dir(builtins)), set[str](), set[str]()
    for statement in ast.parse(code).body:
        used, bound = _names(statement)
        deferred = isinstance(statement, ast.FunctionDef | ast.ClassDef)
        (later if deferred else lacking).update(used if deferred else used - made)
        made |= bound
    return lacking | (later - made)


def _names(statement: ast.stmt) -> tuple[set[str], set[str]]:
    """Return the names of the module that a statement uses before it may have made them, and those that it makes."""
    tables = list(_tables(symtable.symtable(ast.unparse(statement), "block", "exec")))
    module = tables[0].get_symbols()
    bound = {each.get_name() for each in module if each.is_assigned() or each.is_imported() or each.is_namespace()}
    used = {each.get_name() for each in module if each.is_referenced()}
    used |= {each.get_name() for table in tables[1:] for each in table.get_symbols() if each.is_global()}
    if isinstance(statement, ast.Assign):  # x = f(x) uses x first; a loop's variable is made first
        return {each.id for each in ast.walk(statement.value) if isinstance(each, ast.Name)} & used, bound
    return used | bound if isinstance(statement, ast.AugAssign) else used - bound, bound


def _tables(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield table
    for child in table.get_children():
        yield from _tables(child)


def _marked(found: re.Match[str]) -> str:
    title = ' title="continues from above"' if needs(found[1]) else ""
    return f"```python{title}\n{found[1]}```"


def _included(found: re.Match[str]) -> str:
    lines = Path(found[1]).read_text(encoding="utf-8").splitlines()
    return "\n".join(lines[int(found[2] or 1) - 1 :])


@cache
def _package() -> griffe.Object | griffe.Alias:
    return griffe.load("muonclip", search_paths=[str(Path(__file__).parents[1])])


def _documented(found: re.Match[str]) -> str:
    """Write what the site shows of an object, as Markdown: its signature and docstring, and those of its members."""
    options = (yaml.safe_load(textwrap.dedent(found[2])) or {}).get("options", {})
    return "\n".join(_described(_object(found[1]), options, level=3))


def _object(path: str) -> Any:
    thing = _package()[path.removeprefix("muonclip.")]
    return thing.final_target if isinstance(thing, griffe.Alias) else thing


def _described(thing: Any, options: Mapping[str, Any], *, level: int) -> Iterator[str]:
    """Yield the lines of an object, and of those of its members that the options of mkdocstrings choose."""
    yield f"{'#' * level} {thing.name}\n"
    if hasattr(thing, "signature"):
        yield f"```text\n{thing.signature()}\n```\n"
    elif getattr(thing, "value", None) is not None:
        yield f"```text\n{thing.name} = {thing.value}\n```\n"
    if thing.docstring:
        yield f"{thing.docstring.value}\n"
    asked = options.get("members")
    if not thing.is_class or asked is False:
        return
    inherited = {name: thing.all_members[name] for name in options.get("inherited_members") or ()}
    for name, member in {**inherited, **thing.members}.items():
        chosen = name in asked if isinstance(asked, list) else not name.startswith("_")
        if chosen and member.docstring and name != "__init__":
            yield from _described(member, {"members": False}, level=level + 1)


def _listed(entries: list[Any]) -> list[str]:
    """Make a list of links for the pages of a section, and a section for each one inside."""
    lines, sections = [], []
    for entry in entries:
        ((title, inside),) = entry.items()
        if isinstance(inside, list):
            sections += [f"## {title}", *_listed(inside)]
        else:
            lines.append(f"- [{title}]({inside})")
    return ["\n".join(lines), *sections] if lines else sections
