"""The study of fine-tuning."""

import json

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.records.intervals import interval
from benchmarks.studies import fine_tuning
from muonclip.models import MoEConfig
from muonclip.models.torch import MoE
from muonclip.torch import MuonClip

MADE = {"command": "python -m benchmarks fine-tuning", "date": "2026-11-30T00:00:00", "muonclip": "0.1.0"}


def a_row(before, way, seed, rate, *, prose, code):
    return {
        "before": before, "way": way, "seed": seed, "rate": rate,
        "prose": prose, "code": code, "prose_before": 5.0 + seed, "code_before": 3.0 + seed,
    }  # fmt: skip


def the_rows():
    """Every way is 0.1 and 0.2 above AdamW on prose and forgets twice that more; its second rate is worse on seed 0."""
    rows = []
    for before in fine_tuning.BEFORE:
        for way, rates in fine_tuning.RATES.items():
            for seed, more in enumerate((0.1, 0.2)):
                above = 0.0 if way.endswith("adamw") else more
                rows.append(a_row(before, way, seed, rates[0], prose=4 + seed + above, code=3.5 + seed + 2 * above))
            rows.append(a_row(before, way, 0, rates[1], prose=9.0, code=0.0))
    return rows


def test_differences_are_of_the_same_seed_at_the_best_rate():
    training = {"steps": 2, "pretraining_steps": 3, "batch_size": 4}
    text = fine_tuning.table({"rows": the_rows(), "training": training, "environment": MADE})
    apart = f"{interval([0.1, 0.2])} | 0.800 | {interval([0.2, 0.4])}"
    assert f"| MuonClip | AdamW | 0.0003 (the edge) | 4.650 | {apart} |" in text
    assert "| A and B by AdamW | MuonClip | 0.001 (the edge) | 4.500 |  | 0.500 |  |" in text
    assert "AdamW's 5.500 on prose, 3.500 on sources; MuonClip's" in text


def test_the_first_text_lacks_the_second():
    code, prose = fine_tuning.texts()
    assert fine_tuning.HELP not in code.files
    assert len(code.files) > 100
    sentence = b"An identifier occurring as an atom is a name."
    assert sentence in bytes(prose.train) + bytes(prose.validation)
    assert sentence not in bytes(code.train) + bytes(code.validation)


@pytest.mark.parametrize(("way", "muon"), [("lora-muon", "AB"), ("lora-split", "B"), ("lora-adamw", "")])
def test_muon_has_the_factors_of_its_way(way, muon):
    pytest.importorskip("peft")
    model = MoE(MoEConfig.cpu())
    optimizer = fine_tuning.lora(model, way, 0.01, fine_tuning.TUNING)
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names
    assert all("lora_" in name for name in names.values())
    taken = {
        factor
        for group in optimizer.param_groups
        if isinstance(optimizer, MuonClip) and group["use"] == "muon"
        for factor in "AB"
        for parameter in group["params"]
        if f"lora_{factor}" in names[parameter]
    }
    assert taken == set(muon)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in trained} == {id(parameter) for parameter in names}
    assert isinstance(optimizer, torch.optim.AdamW) == (way == "lora-adamw")


@pytest.mark.slow
def test_each_way_is_tuned_from_the_same_weights(tmp_path, capsys):
    main(["fine-tuning", "--quick", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "fine_tuning.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["before"], row["way"]) for row in rows] == [
        (before, way) for before in fine_tuning.BEFORE for way in fine_tuning.RATES
    ]
    assert len({row["code_before"] for row in rows}) == 2
    assert len({row["prose"] for row in rows}) == len(rows)
    assert (tmp_path / "fine_tuning.md").read_text(encoding="utf-8") in capsys.readouterr().out
