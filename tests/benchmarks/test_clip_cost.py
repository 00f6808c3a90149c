"""The measurement of the clip's cost, run on tiny models: what its regimes are, what it writes. No timing is judged."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.experiment.errors import RunFailed
from benchmarks.studies.clip_cost import read_clip_cost, target_facts, write_into
from benchmarks.studies.clip_cost_bench import AGAIN, ALWAYS, MODELS, NEEDED, QUICK, REGIMES, TAU, WITHOUT, Bench
from benchmarks.studies.templates import BEGIN, END

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("clip-cost")
    assert main(["clip-cost", "--quick", "--threads", "1", "--out", str(out)]) == 0
    return json.loads((out / "cpu.json").read_text())


@pytest.fixture
def bench():
    return Bench("moe", 2, 32, "float32", "cpu", QUICK)


def test_every_cell_is_measured_beside_its_control(quick):
    cells = {(cell["model"], cell["dtype"], cell["regime"]) for cell in quick["cells"]}
    assert len(quick["cells"]) == len(cells) == len(MODELS) * len(QUICK.dtypes) * len(REGIMES)
    for cell in quick["cells"]:
        for measured in (cell["ratio"], cell["control"]):
            assert 0 < measured["low"] <= measured["median"] <= measured["high"]
        assert cell["added"]["median"] > 0
        assert cell["step_ms"] > 0
    assert quick["environment"]["threads"] == 1
    assert {"cpu", "torch", "date", "command"} <= quick["environment"].keys()
    assert quick["config"]["rounds"] == QUICK.rounds


def test_regimes_are_what_they_are_called(quick):
    for cell in quick["cells"]:
        heads = cell["heads"]
        assert heads == 2 * QUICK.layers
        if cell["regime"] == "far below τ":
            assert (cell["exact"], cell["clipped"]) == (0, 0)
            assert cell["highest_bound"] < TAU
        elif cell["regime"] == "above τ":
            assert (cell["exact"], cell["clipped"]) == (heads, heads)
            assert cell["lowest_bound"] > TAU
        else:
            assert (cell["exact"], cell["clipped"]) == (heads, 0)
            assert cell["highest_bound"] < math.log(32)  # diffuse: no bound by LSE could have settled it


def test_the_host_s_time_and_the_first_step_are_tables_of_the_page(quick):
    measured = quick["host"]["us"]
    assert all(value > 0 for value in measured.values())
    table, _, first = read_clip_cost(quick).partition("### Host time")[2].partition("### The first step")
    imports = quick["host"]["imports"]
    assert 0 < imports["muonclip"] < imports["torch"]
    assert f"takes {imports['muonclip']:.2f} s in addition to PyTorch's own {imports['torch']:.2f} s" in table
    assert [f"| {value:.0f} |" in table for value in measured.values()] == [True] * 3
    for row in quick["host"]["first_steps"]:
        assert 0 < row["forward"] < row["step"]
        assert f"| {row['built']:.2f} s | {row['found']:.2f} s | {row['found'] / row['forward']:.1f} |" in first


def test_sources_are_those_of_the_arm(quick):
    for cell in quick["cells"]:
        assert len(cell["sources"]) == QUICK.layers
        for source in cell["sources"].values():
            assert source.startswith("declared" if cell["model"] == "moe" else "scaled_dot_product_attention")
            assert ("always" in source) == (cell["regime"] == "always, diffuse heads")


def test_arms_share_their_weights_and_only_the_clipped_ones_observe(bench):
    weights = {arm: [p.data_ptr() for p in model.parameters()] for arm, model in bench.models.items()}
    assert len({tuple(pointers) for pointers in weights.values()}) == 1
    losses = {
        arm: bench.step(arm) and next(iter(model.parameters())).sum().item() for arm, model in bench.models.items()
    }
    assert len(set(losses.values())) == 1  # nothing has moved
    observing = {
        arm for arm, model in bench.models.items() if any(layer.attn.max_logits is not None for layer in model.layers)
    }
    assert observing == {NEEDED, ALWAYS}
    assert bench.models.keys() - bench.clips.keys() == {WITHOUT, AGAIN}


def test_inflated_weights_return_before_every_step(bench):
    above = next(regime for regime in REGIMES if regime.hot)
    bench.inflate()
    maxima = []
    for _ in range(3):
        bench.step(NEEDED)
        bench.check(above)
        maxima.append(bench.clips[NEEDED].report().max_logit)
    assert len(set(maxima)) == 1
    assert any(not torch.equal(weight, value) for weight, value in bench.saved)  # the last clip is still in them


def test_a_regime_that_is_none_stops_the_measurement(bench):
    bench.step(NEEDED)
    with pytest.raises(RunFailed, match="is not 'above τ'"):
        bench.check(next(regime for regime in REGIMES if regime.hot))


def test_the_page_gets_the_numbers_between_its_marks(quick, tmp_path, capsys):
    (tmp_path / "cpu.json").write_text(json.dumps(quick))
    page = tmp_path / "page.md"
    page.write_text(f"Before.\n{BEGIN}\nold\n{END}\nAfter.\n")
    for _ in range(2):
        assert main(["clip-cost", "--out", str(tmp_path), "--page", str(page)]) == 0
        assert page.read_text() == f"Before.\n{BEGIN}\n{read_clip_cost(quick)}{END}\nAfter.\n"
    page.write_text("No marks.")
    with pytest.raises(SystemExit):
        main(["clip-cost", "--out", str(tmp_path), "--page", str(page)])
    assert "argument --page:" in capsys.readouterr().err


def test_what_is_missed_is_counted(quick):
    cells = [json.loads(json.dumps(cell)) for cell in quick["cells"] if cell["regime"] == REGIMES[0].name]
    for cell in cells:
        cell["ratio"] = {"median": 1.001, "low": 0.999, "high": 1.002}
    assert target_facts(cells).missed == ()
    for cell in cells:
        cell["ratio"] = {"median": 1.2, "low": 1.19, "high": 1.21}
    cells[0]["ratio"] = {"median": 1.3, "low": 1.0, "high": 1.5}
    facts = target_facts(cells)
    assert facts.ratios == (1.2, 1.3)
    assert len(facts.missed) == facts.rows == 4
    assert facts.missed[0] == f"{MODELS['moe']}, 32 tokens, fp32"
    assert facts.surely == 3


@pytest.mark.skipif(not (DOCS / "clip-cost.md").exists(), reason="no page")
def test_the_page_shows_what_was_measured(tmp_path):
    page = (DOCS / "clip-cost.md").read_text(encoding="utf-8")
    copy = tmp_path / "page.md"
    copy.write_text(page, encoding="utf-8")
    write_into(copy, DOCS / "clip-cost" / "cpu.json")
    assert copy.read_text(encoding="utf-8") == page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--models", "moe,bert"], "argument --models: unknown model 'bert'; known: moe, llama"),
        (["--threads", "0"], "argument --threads: '0' is not an integer of at least 1"),
        (["--page", "page.md"], "argument --page: needs"),
    ],
)
def test_wrong_options(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["clip-cost", "--out", str(tmp_path / "out"), *options])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_no_gpu(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["clip-cost", "--device", "cuda", "--out", str(tmp_path / "out")])
    assert "argument --device: torch" in (error := capsys.readouterr().err)
    assert "sees no CUDA device" in error
    assert not (tmp_path / "out").exists()


def test_no_transformers(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit):
        main(["clip-cost", "--quick", "--out", str(tmp_path / "out")])
    assert "argument --models: llama comes from transformers, which is not installed." in (
        error := " ".join(capsys.readouterr().err.split())
    )
    assert "muonclip[dev]" in error
    assert not (tmp_path / "out").exists()
