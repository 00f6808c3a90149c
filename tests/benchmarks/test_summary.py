"""The figures of the summary on hand-made records."""

import json
import math
from dataclasses import replace

import pytest

from benchmarks.records import summary
from benchmarks.records.summary import PanelResult, spikes, summarise


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
    assert spikes(losses, window=3, threshold=0.5) == found


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


def result(**changes):
    given = {"steps": 9, "diverged": False, "final_val_loss": 1.5, "wall_seconds": 12.0, "train_seconds": 4.0}
    return given | changes


def test_summary_of_a_run(panel):
    made = records([1, 50, 3, 4, 5, 6, 30, 10, 20], clipped=[0, 2, 0, 0, 1, 0, 0, 0, 3])
    for index, update in ((0, 0.2), (4, 0.25), (8, 0.7)):
        made[index] |= {
            "attention_entropy": {"a": [0.1 * index, 0.7], "b": [0.75]},
            "query_norms": {"a": [1.0, index / 2], "b": [3.0]},
            "key_norms": {"a": [3.0], "b": [2.0]},
            "update_rms": update,
        }
    run = summarise(panel, "muonclip", made, result())
    assert run == {
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
        ([], [], 0.0, None),
    ],
)
def test_heads_ever_clipped(panel, maxima, clipped, share, last):
    panel = replace(panel, training=replace(panel.training, tau=5.0))
    run = summarise(panel, "muonclip", records(maxima, clipped=clipped), result())
    assert (run["heads_ever_clipped"], run["last_clipped_step"]) == (share, last)


def test_tokens_have_no_bits_per_byte(panel):
    tokens = replace(panel, data=replace(panel.data, kind="tokens"))
    assert summarise(tokens, "muonclip", records([1.0] * 4), result())["val_bits_per_byte"] is None


def test_a_diverged_run_is_reported_in_json(panel):
    made = records([1.0, 7.0, 9.0], losses=[2.0, 2.0, math.nan])
    made[-1]["max_logits"] = {}
    run = summarise(panel, "muonclip", made, result(diverged=True, final_val_loss=math.nan))
    assert (run["max_logit_peak"], run["loss_spikes"]) == (7.0, 1)
    whole = summary.to_json(PanelResult(panel, {}, {"muon": {0: run}}, {"cpu": "abacus"}))
    assert json.loads(json.dumps(whole, allow_nan=False))["arms"]["muon"]["0"]["final_val_loss"] == "nan"


def test_table_has_a_line_per_run(panel):
    run = summarise(panel, "muonclip", records([1.0] * 4), result())
    lines = summary.table(
        PanelResult(panel, {}, {arm: dict.fromkeys(panel.seeds, run) for arm in panel.arms})
    ).splitlines()
    assert len(lines) == 1 + 6
    assert len({len(line) for line in lines}) == 1
    assert lines[3].split()[:5] == ["MuonClip", "0", "0.03", "1.500", "2.164"]


def test_an_arm_that_changes_the_model_says_so(every_arm):
    run = summarise(every_arm, "muonclip", records([1.0] * 4), result())
    made = PanelResult(every_arm, {}, {arm: dict.fromkeys(every_arm.seeds, run) for arm in every_arm.arms})
    changes = summary.to_json(made)["config"]["model_changes"]
    assert changes == {"qk-norm": {"qk_norm": True}, "softcap": {"softcap": 0.02}}
    assert summary.table(made).splitlines()[-3:] == [
        "",
        "Muon, QK-norm changes the model: qk_norm = True.",
        "Muon, soft cap changes the model: softcap = 0.02; its logits are measured before the cap.",
    ]
