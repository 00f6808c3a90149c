"""Docstrings stand alone: a sentence that an editor shows without its neighbours, in the words of the field."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for room in ("muonclip", "benchmarks") for path in (ROOT / room).rglob("*.py"))
GENERATED = {
    ROOT / "docs" / name
    for name in (
        "architectures/sweep.md",
        "cluster/fit.md",
        "cluster/plans.md",
        "cluster/published.md",
        "cluster/tables.md",
        "evidence/rates.md",
        "evidence/reading.md",
        "evidence/search.md",
        "evidence/spikes.md",
        "optax-speed/cpu.md",
        "scaling/scaling.md",
    )
}
PAGES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if path not in GENERATED]
FENCE = re.compile(r"^( *)```.*\n(?:.*\n)*?\1```$", re.MULTILINE)

# With one of these a first sentence leans on something that is not shown with it.
FRAGMENT = re.compile(
    r"(As|Because|Both|By|Else|For|Here|How|If|Is|It|Its|Of|On|Same|Since|So|Such|That|Their|Them|There|These|They|"
    r"This|Those|Till|Until|What|When|Where|Whether|Which|While|Who|Whom|Whose|With|Without)\b"
)
# A class, a property or a module is a thing, and may begin with one of these; a function does something.
NOUN = re.compile(r"(A|All|An|Any|Each|Either|Every|Neither|No|None|Not|One|Some|The)\b")
# Words that had several meanings each, and what to say instead.
STALE = {
    re.compile(rf"\b({words})\b"): instead
    for words, instead in {
        "alike": "the same on all ranks; both",
        "apart": "separate; except for",
        "beside": "next to; in addition to",
        "(?<!there )(?<!There )is no(?! longer)": "is not a",
        "dealt": "assigned",
        "lies": "is; is stored",
        "loud(er|est)?|quiet(er|est)?": "above τ; at most τ",
        "stands": "is; is written",
        "doors?": "patches",
        "provenance": "attribution",
        "rehears(al|als|e|ed|es)": "trace",
        "slabs?": "matrix shards",
        "twins?": "replica",
    }.items()
}


def documented(tree):
    """(name, docstring, whether it is of a function) of a module and all it defines; properties are no functions."""
    yield "the module", ast.get_docstring(tree), False
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            is_property = any("property" in ast.unparse(decorator) for decorator in node.decorator_list)
            yield node.name, ast.get_docstring(node), not isinstance(node, ast.ClassDef) and not is_property


def fragment(docstring, of_function):
    """Why a docstring does not stand alone, or ""."""
    is_open = re.match(r"`[^`]*`:" if not of_function else r"\W", docstring)
    if is_open or FRAGMENT.match(docstring) or (of_function and NOUN.match(docstring)):
        return f"begins with {docstring[:20]!r}; write a sentence with a verb, such as 'Return …'"
    if not docstring.partition("\n\n")[0].rstrip().endswith((".", ":", "…", ".)")):
        return "has a first paragraph without an end"
    return ""


def offences(path):
    """What is wrong with the docstrings, the comments and the texts of a file, those of errors for instance."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    for name, docstring, of_function in documented(tree):
        if docstring and (why := fragment(docstring, of_function)):
            yield f"{name} {why}"
    constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    prose = [value for value in constants if isinstance(value, str)]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    prose += [token.string for token in tokens if token.type == tokenize.COMMENT]
    yield from stale_words("\n".join(prose))


def stale_words(text):
    for pattern, instead in STALE.items():
        for match in pattern.finditer(text):
            yield f"says {text[max(match.start() - 30, 0) : match.end() + 20]!r}; say: {instead}"


def name_of(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_docstrings_stand_alone(path):
    assert not list(offences(path))


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_pages_say_it_in_the_words_of_the_field(path):
    assert not list(stale_words(FENCE.sub("", path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize(
    ("docstring", "of_function"),
    [
        ("Those that touch, as one.", True),
        ("The ranks of a mesh.", True),
        ("[B, T] → logits.", True),
        ("Whether it is masked.", False),
        ("`divided`: the ranks that share.", False),
        ("`explosion`, by hand.", True),
        ("Return the ranks", True),
    ],
)
def test_fragments_are_found(docstring, of_function):
    assert fragment(docstring, of_function)


@pytest.mark.parametrize(
    ("docstring", "of_function"),
    [("Merge adjacent ranges.", True), ("The ranks of a mesh.", False), ("Return x.\n\nThose of old", True)],
)
def test_sentences_are_not_fragments(docstring, of_function):
    assert not fragment(docstring, of_function)


def test_stale_words_are_found_in_the_text_of_an_error(tmp_path):
    path = tmp_path / "module.py"
    path.write_text('def f(x):\n    raise ValueError(f"{x} is no matrix")\n', encoding="utf-8")
    (offence,) = offences(path)
    assert "is not a" in offence


def test_stale_words_are_found_and_others_are_not():
    assert len(list(stale_words("This is no product; it stands beside one."))) == 3
    assert not list(stale_words("There is no product, and it is no longer standing."))
