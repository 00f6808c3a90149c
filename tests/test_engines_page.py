"""The table of engines on docs/engines.md: tests that exist, and the versions that are pinned."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
PACKAGES = {"PyTorch": "torch"}  # where the page writes a name otherwise; case, and - for a blank, are no difference


def rows():
    section = PAGE.partition("\n## What runs where\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    assert lines[0] == "| engine | version | what was run | what happens |"
    return [tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in lines[2:]]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_a_row_names_tests_that_exist_and_a_version_that_is_pinned(row):
    engine, versions, what_was_run, result = row
    assert engine
    assert result
    if what_was_run == "not run":
        assert re.fullmatch(r"(commit [0-9a-f]{7,}|[\w.]+) was read", versions)
        return
    tests = re.findall(r"`(tests/[\w/]+\.py)`", what_was_run)
    assert tests, "name the file of tests in which this was run"
    assert [each for each in tests if not (ROOT / each).is_file()] == []
    for each in versions.split(", "):
        name, _, version = each.rpartition(" ")
        pinned = PINS[PACKAGES.get(name, name.lower().replace(" ", "-"))]
        assert f"{pinned}.".startswith(f"{version}."), (name, pinned)
