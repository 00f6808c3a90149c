"""What is counted in compiled programs, and what an update of sharded matrices sends."""

import json
import sys
import types
from collections import Counter

import optax
import pytest

from benchmarks.__main__ import main
from benchmarks.studies import optax_collectives
from benchmarks.studies.optax_collectives import Case, collectives, programs

LOOP = """HloModule jit_update

%body (arg: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %x = f32[4,8]{1,0} get-tuple-element(%arg), index=1
  %whole = f32[32,8]{1,0} all-gather(%x), channel_id=1, dimensions={0}
  %sum = bf16[4,8]{1,0} all-reduce(%y), channel_id=2, to_apply=%add
}

%add (a: bf16[], b: bf16[]) -> bf16[] {
  ROOT %c = bf16[] add(%a, %b)
}

ENTRY %main (p: f32[4,8]) -> f32[4,8] {
  %sent = (f32[2,8]{1,0}, /*index=1*/f32[2,8]{1,0}) all-to-all(%p, %q), channel_id=3
  %loop = (s32[], f32[4,8]{1,0}) while(%t), condition=%add, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""


def test_what_a_loop_sends_counts_for_each_round():
    counts, received = collectives(LOOP, devices=8)
    assert counts == {"all-to-all": 1, "all-gather": 5, "all-reduce": 5}
    assert received == {
        "all-to-all": 2 * 64 * 7 // 8,
        "all-gather": 5 * 1024 * 7 // 8,
        "all-reduce": 5 * 2 * 64 * 7 // 8,
    }
    with pytest.raises(ValueError, match="the rounds of a loop are not known"):
        collectives(LOOP.replace("known_trip_count", "trip_count"), devices=8)


def test_each_matrix_travels_once_to_its_owner_and_back():
    """13 matrices as 16; Optax's own sends more than ten times as much."""
    ours, others = (program for _, program in list(programs(Case("13 of them", 13, (16, 64))))[:2])
    assert ours["collectives"] == {"all-to-all": 2}
    assert ours["bytes"] == 2 * 2 * 16 * 64 * 4 * 7 // 8
    assert others["bytes"] > 10 * ours["bytes"]


def test_the_command_writes_figures_and_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(optax_collectives, "CASES", (Case("two layers", 1, (2, 16, 24)),))
    stand_in = types.ModuleType("maxtext.optimizers.muon")
    stand_in.MuonDimensionNumbers = lambda reduction, output, sharding: sharding
    stand_in.scale_by_muon = lambda weight_dimension_numbers: optax.identity()
    monkeypatch.setitem(sys.modules, "maxtext", types.ModuleType("maxtext"))
    monkeypatch.setitem(sys.modules, "maxtext.optimizers", types.ModuleType("maxtext.optimizers"))
    monkeypatch.setitem(sys.modules, "maxtext.optimizers.muon", stand_in)
    assert main(["optax-collectives", "--out", str(tmp_path)]) == 0
    figures = json.loads((tmp_path / "collectives.json").read_text())
    table = (tmp_path / "collectives.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out
    [case] = figures["cases"]
    assert case["programs"]["MaxText"] == {"collectives": Counter(), "bytes": 0}
    assert "| two layers | 2 all-to-all; 0.0 MiB |" in table
    assert "| nothing; 0.0 MiB |" in table
    monkeypatch.delitem(sys.modules, "maxtext.optimizers.muon")
    assert dict(programs(Case("one", 1, (2, 8, 16))))["MaxText"].keys() == {"absent"}
