"""A run's summary against its definition, and the table and JSON of an experiment."""

import json
import math
from dataclasses import replace

import pytest
from bench_runs import results_of, with_arms

from benchmarks.experiment.arms import ARMS
from benchmarks.records.run_records import run_records
from benchmarks.records.summary import Results, summarise
from benchmarks.report.tables import model_notes, runs_table


def records(maxima, losses=None, clipped=None):
    return [
        {
            "step": i + 1,
            "loss": losses[i] if losses else 2.0,
            "max_logits": {"a": [maximum, -5.0], "b": [maximum - 1]},
            "clipped_heads": clipped[i] if clipped else 0,
        }
        for i, maximum in enumerate(maxima)
    ]


def summary_of(experiment, made, **result):
    given = {"steps": 9, "diverged": False, "final_val_loss": 1.5, "wall_seconds": 12.0, "train_seconds": 4.0}
    return summarise(experiment, experiment.arm("muonclip"), run_records(made), given | result)


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        ([2.0] * 5 + [2.5], []),  # at the threshold is not above it
        ([2.0] * 5 + [2.51], [5]),
        ([2.0, 2.0, 3.0, 2.6], [3]),  # a loss does not raise its own median
        ([9.0, 2.0, 2.0, 2.0, 9.0], [4]),  # not before a whole window has passed
        ([2.0, 2.0, 2.0, 9.0, 9.0, 9.0, 9.0], [3, 4]),  # the window's median follows
        ([2.0, 2.0, 2.0, math.inf, 2.0, math.nan], [3, 5]),
        ([5.0, 4.0, 3.0, 3.9, 2.0], []),
    ],
)
def test_spikes(losses, found):
    spikes = run_records(records([1.0] * len(losses), losses)).spikes(window=3, threshold=0.5)
    assert [index for index, spiked in enumerate(spikes) if spiked] == found


def test_summary_of_a_run(experiment):
    made = records([1, 50, 3, 4, 5, 6, 30, 10, 20], clipped=[0, 2, 0, 0, 1, 0, 0, 0, 3])
    for index, update in ((0, 0.2), (4, 0.25), (8, 0.7)):
        made[index] |= {
            "attention_entropy": {"a": [0.1 * index, 0.7], "b": [0.75]},
            "query_norms": {"a": [1.0, index / 2], "b": [3.0]},
            "key_norms": {"a": [3.0], "b": [2.0]},
            "update_rms": update,
        }
    assert summary_of(experiment, made) == {
        "final_val_loss": 1.5,
        "val_bits_per_byte": pytest.approx(1.5 / math.log(2)),
        "max_logit_peak": 50,
        "max_logit_median_last_quarter": 20,  # of the last three steps
        "clipped_head_steps": 6,
        "heads_ever_clipped": 2 / 8,  # of two layers of four; at steps 2, 5 and 9 both of these were above τ
        "last_clipped_step": 9,
        "loss_spikes": 0,
        "attention_entropy": 0.75,
        "query_norm": 4.0,
        "key_norm": 3.0,
        "update_rms": 0.25,
        "wall_seconds": 12.0,
        "tokens_per_second": 9 * 2 * 16 / 4.0,
    }


@pytest.mark.parametrize(
    ("maxima", "clipped", "share", "last"),
    [
        ([1.0, 7.0, 9.0], [0, 0, 0], 0.0, None),  # above τ, in an arm that does not clip
        ([1.0, 7.0, 2.0], [0, 2, 0], 2 / 8, 2),
        ([5.5, 7.0, 2.0], [1, 0, 0], 1 / 8, 1),  # only the first of its two heads passed τ at that step
        ([7.0, 7.0, 7.0], [2, 2, 2], 2 / 8, 3),  # a head counts once
    ],
)
def test_heads_ever_clipped(experiment, maxima, clipped, share, last):
    run = summary_of(with_arms(experiment, "muonclip", tau=5.0), records(maxima, clipped=clipped))
    assert (run["heads_ever_clipped"], run["last_clipped_step"]) == (share, last)


def test_tokens_have_no_bits_per_byte(experiment):
    tokens = replace(experiment, data=replace(experiment.data, kind="tokens"))
    assert summary_of(tokens, records([1.0] * 4))["val_bits_per_byte"] is None
    assert (experiment.data.unit, tokens.data.unit) == ("bits per byte", "bits per token")


def test_a_diverged_run_is_reported_in_json(experiment):
    made = records([1.0, 7.0, 9.0], losses=[2.0, 2.0, math.nan])
    made[-1]["max_logits"] = {}
    run = summary_of(experiment, made, diverged=True, final_val_loss=math.nan)
    assert (run["max_logit_peak"], run["loss_spikes"]) == (7.0, 1)
    whole = Results(experiment, {}, {"muon": {0: run}}, {"cpu": "abacus"}).to_json()
    assert json.loads(json.dumps(whole, allow_nan=False))["arms"]["muon"]["0"]["final_val_loss"] == "nan"


def test_the_summary_is_plain_json(every_arm):
    made = results_of(with_arms(every_arm, "softcap", "qk-norm", "muon"), {arm: {0: records([1.0] * 4)} for arm in ("softcap", "qk-norm", "muon")})  # fmt: skip  # noqa: E501
    summary = json.loads(json.dumps(made.to_json(), allow_nan=False))
    assert summary["config"]["model_changes"] == {"qk-norm": {"qk_norm": True}, "softcap": {"softcap": 0.02}}
    assert set(summary) == {"config", "environment", "arms"}


def test_the_table_has_a_line_per_run(experiment):
    run = summary_of(experiment, records([1.0] * 4))
    made = Results(experiment, {}, {arm.name: dict.fromkeys(experiment.seeds, run) for arm in experiment.arms})
    rows = runs_table(made)
    assert len(rows) == 1 + 6
    assert len({len(row) for row in rows}) == 1
    assert rows[3][:5] == ["MuonClip", "0", "0.03", "1.500", "2.164"]


def test_arms_that_change_the_model_are_named(every_arm):
    made = Results(every_arm, {}, {})
    notes = model_notes(made)
    assert [note.partition(" changes")[0] for note in notes] == [
        ARMS[name].label for name in ("int4-experts", "qk-norm", "softcap")
    ]
    assert "before the cap" in notes[2]


def test_results_of_some_arms(experiment):
    made = results_of(experiment, {arm: {0: records([1.0])} for arm in ("muon", "muonclip")})
    assert [arm.name for arm in made.only("muonclip").finished] == ["muonclip"]
