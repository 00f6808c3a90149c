"""Makes every page available as Markdown next to its HTML, and `llms.txt`, a list of them all for language models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_INCLUDED = re.compile(r'^--8<-- "(.*?)(?::(\d+):)?"$', re.MULTILINE)
_pages: dict[str, str] = {}  # by address: the page as Markdown


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str | None:
    """Keep a page with what it includes; the list of changes, which is above `docs`, links to pages by `docs/…`."""
    text = _INCLUDED.sub(_included, markdown)
    outside = page.file.src_uri == "changelog.md"
    _pages[page.file.src_uri] = text = text.replace("](docs/", "](") if outside else text
    return text if outside else None


def on_post_build(config: Any, **_: Any) -> None:
    """Write the pages and the list."""
    site = Path(config["site_dir"])
    for address, text in _pages.items():
        (site / address).write_text(text, encoding="utf-8")
    listed = [f"# {config['site_name']}", f"> {config['site_description']}", *_listed(config["nav"])]
    (site / "llms.txt").write_text("\n\n".join(listed) + "\n", encoding="utf-8")


def _included(found: re.Match[str]) -> str:
    lines = Path(found[1]).read_text(encoding="utf-8").splitlines()
    return "\n".join(lines[int(found[2] or 1) - 1 :])


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
