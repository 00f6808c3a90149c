"""The README as a package index shows it: an index has none of the files that it links to.

With the address of the repository, `Repository` among the `[project.urls]` of pyproject.toml, links and pictures lead
to the files of this version there; without it their words stay and nothing is linked.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface  # pyright: ignore

_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


class ReadmeHook(MetadataHookInterface):
    """Puts the README into the metadata of the package."""

    PLUGIN_NAME = "custom"

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the README."""
        root = Path(self.root)
        version = re.search(r'__version__ = "(.*)"', (root / "muonclip" / "__init__.py").read_text("utf-8"))
        assert version is not None
        text = for_index(
            (root / "README.md").read_text("utf-8"), metadata.get("urls", {}).get("Repository"), version[1]
        )
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def for_index(text: str, repository: str | None, version: str) -> str:
    """Return Markdown without links to files next to it.

    `repository`: its address, of a host with GitHub's paths (`/blob/TAG/…`, `/raw/TAG/…`), or None.
    """

    def instead(link: re.Match[str]) -> str:
        picture, words, target = link.groups()
        if re.match(r"[a-z]+:|#", target):
            return link[0]
        if repository is not None:
            return f"{picture}[{words}]({repository.rstrip('/')}/{'raw' if picture else 'blob'}/v{version}/{target})"
        return f"*{words} (`{target}` in the repository)*" if picture else words

    parts = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)  # code is every second part
    return "".join(part if index % 2 else _LINK.sub(instead, part) for index, part in enumerate(parts))
