"""The figures of the pages are those that the commands have written; a stale one, or one without a source, is found."""

import json
import re
import tomllib

import page_figures
import pytest

from benchmarks.studies import spikes
from benchmarks.studies.clip_cost import read_clip_cost
from benchmarks.studies.evidence_reading import read_evidence, read_rates
from benchmarks.studies.speed import read_speed
from benchmarks.studies.templates import BEGIN, END

DOCS = page_figures.ROOT / "docs"


def text_of(page):
    return page_figures.path_of(page).read_text(encoding="utf-8")


def figures_of(name):
    return json.loads((DOCS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", page_figures.PAGES)
def test_the_figures_in_sentences_are_those_of_the_numbers(page):
    why = "tests/support/page_figures.py makes the figures of sentences from the numbers, or names their source"
    assert page_figures.lacking(page, text_of(page)) == [], why
    assert page_figures.unfounded(page, text_of(page)) == [], why


@pytest.mark.parametrize("page", page_figures.PAGES)
def test_a_stale_figure_is_found(page):
    """Each phrase with a figure, with another figure in its place."""
    text = page_figures.prose(text_of(page))
    for phrase in page_figures.said().get(page, ()):
        stale = re.sub(r"\d", lambda digit: str((int(digit[0]) + 1) % 10), phrase)
        if stale != phrase:
            assert page_figures.lacking(page, text.replace(phrase, stale)) == [phrase]


@pytest.mark.parametrize(
    "sentence",
    [
        "It takes 3.7 of them.",
        "The clip costs 4 %.",
        "It needs 350 MB.",
        "That is about 2000.",
        "A rate of 3e-4 is best.",
        "Some 20 to 45 minutes later.",
        "A step takes 7 ms.",
    ],
)
def test_a_figure_without_a_source_is_found(sentence):
    text = text_of("index")
    assert len(page_figures.unfounded("index", f"{text}\n\n{sentence}\n")) == 1
    assert page_figures.unfounded("index", f"{text}\n\n| {sentence} |\n\n```\n{sentence}\n```\n") == []


def test_the_versions_that_the_extras_need_are_those_declared():
    project = tomllib.loads((page_figures.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (torch,) = project["optional-dependencies"]["torch"]
    assert f"| `torch` | PyTorch {torch.removeprefix('torch>=')} or later |" in text_of("install")


def test_what_commands_have_written_into_pages_is_what_they_write():
    names = ("sweep", "efficiency", "clip-cost", "hot")
    assert text_of("evidence/reading") == read_evidence({name: figures_of(f"evidence/{name}") for name in names})
    assert text_of("evidence/spikes") == spikes.read_spikes(figures_of("evidence/spikes"))
    assert text_of("evidence/search") == spikes.read_search(figures_of("evidence/search"))
    assert text_of("evidence/rates") == read_rates(figures_of("evidence/rates"))
    for page, written in (
        ("clip-cost", read_clip_cost(figures_of("clip-cost/cpu"))),
        ("speed", read_speed(figures_of("speed/cpu"))),
    ):
        assert text_of(page).partition(BEGIN)[2].partition(END)[0] == f"\n{written}", page
