"""What a release consists of: its files, its description without dead links, the README's blocks, one version."""

import importlib.util
import re
import sys
import tarfile
import tomllib
import types
import zipfile
from pathlib import Path

import pytest
import yaml

import muonclip

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
LINKS = """See [the page
of it](docs/a.md#part), [this](#below), [there](https://x.org/a.md).

![A picture](docs/a.png)

```python
x = table[0](docs/a.md)
[one](docs/b.md)
```
"""


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def release():
    return load(ROOT / ".ci" / "release.py")


@pytest.fixture
def hook(monkeypatch):
    """The hook of the build; hatchling need not be there."""
    stub = types.SimpleNamespace(MetadataHookInterface=type("Interface", (), {}))
    for name in ("hatchling", "hatchling.metadata", "hatchling.metadata.plugin"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "hatchling.metadata.plugin.interface", stub)
    return load(ROOT / "hatch_build.py")


def test_without_an_address_nothing_is_linked_and_every_word_stays(hook, release):
    text = hook.for_index(LINKS, None, "1.2.3")
    assert text == LINKS.replace("[the page\nof it](docs/a.md#part)", "the page\nof it").replace(
        "![A picture](docs/a.png)", "*A picture (`docs/a.png` in the repository)*"
    )
    assert release.dead_links(LINKS) == ["docs/a.md#part", "docs/a.png"]
    assert not release.dead_links(text)


def test_with_an_address_links_and_pictures_lead_to_the_tag(hook, release):
    text = hook.for_index(LINKS, "https://example.org/o/n/", "1.2.3")
    assert "[the page\nof it](https://example.org/o/n/blob/v1.2.3/docs/a.md#part)" in text
    assert "![A picture](https://example.org/o/n/raw/v1.2.3/docs/a.png)" in text
    assert "[one](docs/b.md)\n```" in text
    assert not release.dead_links(text)


@pytest.mark.parametrize("urls", [{}, {"Repository": "https://example.org/o/n"}])
def test_the_readme_in_the_metadata_has_no_dead_link(hook, release, urls):
    own = hook.ReadmeHook()
    own.root = str(ROOT)
    metadata = {"urls": urls}
    own.update(metadata)
    assert metadata["readme"]["content-type"] == "text/markdown"
    assert not release.dead_links(metadata["readme"]["text"])
    assert release.dead_links(release.README)  # else there is nothing to do
    assert (f"https://example.org/o/n/raw/v{muonclip.__version__}/docs/" in metadata["readme"]["text"]) == bool(urls)


def wheel_of(path, names, description):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "")
        archive.writestr("muonclip-1.0.dist-info/METADATA", f"Name: muonclip\n\n{description}")
    return path


def test_a_wheel_is_the_package_and_nothing_else(release, tmp_path):
    names = [*release.sources(), "muonclip/py.typed"]
    good = wheel_of(tmp_path / "good.whl", names, "[a](https://x.org)")
    assert release.faults_of_wheel(good) == []
    bad = wheel_of(
        tmp_path / "bad.whl",
        [*names[:-2], "muonclip/core/data.npz", "tests/golden/0.1.0/torch.pt", "benchmarks/__init__.py"],
        "[a](docs/a.md)",
    )
    faults = release.faults_of_wheel(bad)
    assert "muonclip/py.typed is not in the wheel" in faults
    assert f"{names[-2]} is not in the wheel" in faults
    assert "tests/golden/0.1.0/torch.pt is in the wheel" in faults
    assert "benchmarks/__init__.py is in the wheel" in faults
    assert "muonclip/core/data.npz is in the wheel" in faults
    assert "the README links to docs/a.md, which no index has" in faults
    release.LARGEST_WHEEL = 10
    assert any("more than 10" in fault for fault in release.faults_of_wheel(good))


def test_an_sdist_builds_the_wheel(release, tmp_path):
    def sdist(path, names):
        with tarfile.open(path, "w:gz") as archive:
            for name in names:
                archive.addfile(tarfile.TarInfo(f"muonclip-1.0/{name}"))
        return path

    needed = ["pyproject.toml", "hatch_build.py", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"]
    assert release.faults_of_sdist(sdist(tmp_path / "good.tar.gz", [*needed, *release.sources()])) == []
    faults = release.faults_of_sdist(sdist(tmp_path / "bad.tar.gz", [*needed[:-1], *release.sources()[1:]]))
    assert faults == ["CITATION.cff is not in the sdist", f"{release.sources()[0]} is not in the sdist"]
    included = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["build"]["targets"]["sdist"]
    assert set(needed) - {"pyproject.toml", "LICENSE"} <= set(included["only-include"])  # these two always are


def test_the_readme_s_blocks_are_one_script_and_bring_what_they_need(release):
    assert release.blocks("```python\na = 1\n```\ntext\n```sh\nls\n```\n```python\nb = a\n```\n") == [
        "a = 1\n",
        "b = a\n",
    ]
    assert len(release.blocks(release.README)) >= 2
    assert release.extras("```python\nimport muonclip.optax\n```\n") == "torch,jax"
    assert release.extras("```python\nimport muonclip.torch\n```\n") == "torch"


def test_a_step_that_fails_ends_the_release(release, monkeypatch, capsys, tmp_path):
    done = []
    monkeypatch.setattr(
        release,
        "steps",
        lambda dist, scratch: iter(
            [
                ("works", lambda: done.append("works")),
                ("fails", lambda: release.run(sys.executable, "-c", "raise SystemExit(3)")),
                ("never", lambda: done.append("never")),
            ]
        ),
    )
    assert release.main(str(tmp_path)) == 1
    assert done == ["works"]
    assert "fails: failed" in capsys.readouterr().out
    monkeypatch.setattr(release, "steps", lambda dist, scratch: iter([("finds", lambda: ["a fault"])]))
    assert release.main(str(tmp_path)) == 1
    assert "release: a fault" in capsys.readouterr().out


def test_the_metadata_say_who_what_and_for_which_python():
    assert PROJECT["authors"] == [{"name": "muonclip developers"}]
    assert {"optimizer", "muon", "qk-clip", "pytorch", "jax"} <= set(PROJECT["keywords"])
    classifiers = PROJECT["classifiers"]
    assert not [each for each in classifiers if each.startswith("License ::")]  # an expression says it (PEP 639)
    assert PROJECT["license"] == "Apache-2.0"
    assert "Typing :: Typed" in classifiers
    assert len([each for each in classifiers if each.startswith("Development Status ::")]) == 1
    versions = {each.rpartition(" ")[2] for each in classifiers if re.search(r":: 3\.\d+$", each)}
    assert versions == {"3.11", "3.12", "3.13"}
    assert PROJECT["requires-python"] == ">=3.11"
    supported = re.search(
        r"^SUPPORTED := .*\((3, \d+)\) <= .* <= \((3, \d+)\)", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    assert {bound.replace(", ", ".") for bound in supported.groups()} == {min(versions), max(versions)}


def test_addresses_come_from_one_place_or_are_left_out_as_releasing_says():
    said = (ROOT / "RELEASING.md").read_text("utf-8")
    assert "[project.urls]" in said
    assert "urls" in PROJECT or "Name the repository, in one place, `pyproject.toml`" in said


def test_the_citation_is_of_this_version():
    """Against what the format requires; `cffconvert --validate` has the whole schema."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == muonclip.__version__
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == [{"name": "muonclip developers"}]
    for each in citation["references"]:
        assert {"type", "title", "authors"} <= each.keys()


def test_the_changelog_has_an_unreleased_part_and_can_be_a_page():
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ \(\d{4}-\d\d-\d\d\)", each) for each in headings[1:])
    for target in re.findall(
        r"\]\((?!https?:)([^)#]*)[^)]*\)", text
    ):  # links of the site are without docs/, by its hook
        assert target.startswith("docs/")
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "RELEASING.md", "SECURITY.md"])
def test_files_at_the_top_link_to_files_that_exist(name):
    text = (ROOT / name).read_text("utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)]*)\)", text):
        assert (ROOT / target).exists(), target
