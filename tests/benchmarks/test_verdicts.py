"""The facts follow the numbers: where the numbers flip, so does the verdict."""

import math
from dataclasses import replace

import pytest
from bench_runs import results_of, with_arms

from benchmarks.experiment.arms import ARMS
from benchmarks.report.comparison import setting_rows, shared_rows
from benchmarks.report.verdicts import arm_facts, clip_facts, effect_rows, logit_rows

LN2 = math.log(2)
QUIET = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]  # τ is 10
LOUD = [1.0, 2.0, 11.0, 50.0, 90.0, 200.0, 300.0, 500.0]
HELD = [1.0, 2.0, 11.0, 13.0, 12.0, 13.0, 12.0, 13.0]
ESCAPED = [1.0, 2.0, 11.0, 13.0, 12.0, 13.0, 24.0, 21.0]
ENDED = [1.0, 2.0, 50.0, 13.0, 12.0, 9.0, 8.0, 8.0]
CLIPS = [0, 0, 1, 1, 1, 1, 1, 1]


def run(maxima, bits=2.0, clipped=None, losses=None, entropy=None):
    """Records of a run that ends with so many bits per byte; a maximum of None is a step that was not finite."""
    made = [
        {
            "step": i + 1,
            "loss": losses[i] if losses else bits,
            "max_logits": {} if maximum is None else {"layers.0.attn": [maximum, -5.0, -5.0, -5.0]},
            "clipped_heads": clipped[i] if clipped else 0,
        }
        for i, maximum in enumerate(maxima)
    ]
    made[-1]["val_loss"] = bits * LN2
    if entropy is not None:
        made[-1] |= {name: {"a": [entropy]} for name in ("attention_entropy", "query_norms", "key_norms")}
    return made


def results(experiment, arms, **training):
    """Of records by arm: a list of them, for the seeds 0, 1, …, or by seed."""
    runs = {arm: of if isinstance(of, dict) else dict(enumerate(of)) for arm, of in arms.items()}
    own = {"tau": 10.0, "spike_window": 3, "lr": dict.fromkeys(ARMS, 0.03)} | training
    return results_of(replace(with_arms(experiment, *runs, **own), seeds=(0, 1)), runs)


def of_arm(experiment, arm, *runs):
    return arm_facts(results(experiment, {arm: runs}))[0]


def of_clip(experiment, arms):
    """The facts of the only pair."""
    (fact,) = clip_facts(results(experiment, arms))
    return fact


@pytest.mark.parametrize(
    ("arm", "maxima", "logits", "passed"),
    [
        ("muon", QUIET, "stayed at or under τ", ()),
        ("muonclip", [*QUIET[:-1], 10.0], "stayed at or under τ", ()),
        ("muon", LOUD, "above τ", (3,)),
        ("muon", ENDED, "passed τ, then under it", (3,)),
        ("softcap", LOUD, "above τ", (3,)),
        ("muonclip", HELD, "held", (3,)),
        ("muonclip", ESCAPED, "not held", (3,)),
        ("per-head", ESCAPED, "not held", (3,)),
        ("rescue", HELD, "held", (3,)),
        ("adamw-clip", LOUD, "not held", (3,)),
        ("muon", [None], "not measured", ()),
    ],
)
def test_what_became_of_the_logits(experiment, arm, maxima, logits, passed):
    fact = of_arm(experiment, arm, run(maxima))
    assert (fact.logits, fact.passed) == (logits, passed)
    assert fact.peak == max(filter(None, maxima), default=math.nan) or math.isnan(fact.peak)


def test_seeds_count_together_and_the_loudest_decides(experiment):
    fact = of_arm(experiment, "muonclip", run(HELD, clipped=CLIPS), run(ESCAPED), run(QUIET))
    assert fact.logits == "not held"
    assert fact.passed == (3, 3)
    assert (fact.peak, fact.last_quarter) == (24.0, 22.5)
    assert fact.ever_clipped == (1 / 8, 0.0, 0.0)


def test_a_threshold_of_its_own(experiment):
    arms = {"muonclip@tau=40": [run([*QUIET[:-1], 40.0])], "muonclip": [run(HELD, clipped=CLIPS)]}
    assert [fact.logits for fact in arm_facts(results(experiment, arms))] == ["stayed at or under τ", "held"]


@pytest.mark.parametrize(
    ("muon", "muonclip", "verdict", "mean"),
    [
        ([2.0, 2.1, 2.2], [1.5, 1.62, 1.7], "helped", -0.4933),
        ([2.0, 2.1, 2.2], [2.5, 2.62, 2.7], "cost loss", 0.5067),
        ([2.0, 3.0], [2.25, 2.5], "not told from zero", -0.125),
        ([2.0], [1.5], "one seed", -0.5),
        ([2.0], [math.nan], "not finite", math.nan),
        ([math.inf, 2.0], [2.0, 2.0], "not finite", -math.inf),
    ],
)
def test_what_the_clip_does_to_the_loss(experiment, muon, muonclip, verdict, mean):
    held = [run(HELD, bits, clipped=CLIPS) for bits in muonclip]
    fact = of_clip(experiment, {"muon": [run(LOUD, bits) for bits in muon], "muonclip": held})
    assert fact.verdict == verdict
    assert fact.interval.mean == pytest.approx(mean, abs=1e-3, nan_ok=True)
    assert fact.clips == 6 * len(muonclip)
    assert not fact.identical


def test_where_the_baseline_does_not_pass_tau_nothing_is_shown(experiment):
    quiet = {"muon": [run(QUIET)], "muonclip": [run(QUIET)]}
    fact = of_clip(experiment, quiet)
    assert (fact.verdict, fact.identical) == ("shows nothing", True)
    assert of_clip(experiment, quiet | {"muonclip": [run(QUIET, 1.5)]}).verdict == "shows nothing"
    assert not of_clip(experiment, quiet | {"muonclip": [run(QUIET, 1.5)]}).identical
    assert of_clip(experiment, {"muon": [run([30.0] * 8)], "muonclip@tau=40": [run(QUIET)]}).verdict == "shows nothing"
    assert clip_facts(results(experiment, {"muonclip": [run(QUIET)]})) == []


def test_what_is_the_same_to_the_bit_is_said_so(experiment):
    same = {"muon": [run(LOUD)], "muonclip": [run(LOUD, clipped=CLIPS)]}
    assert of_clip(experiment, same).verdict == "same to the bit"
    other = same | {"muonclip": [run(LOUD, losses=[2.0] * 7 + [2.0 + 1e-15])]}
    assert of_clip(experiment, other).verdict == "does not repeat"


def test_seeds_are_compared_with_themselves(experiment):
    arms = {"muon": {0: run(LOUD, 2.0), 1: run(LOUD, 9.0)}, "muonclip": {0: run(HELD, 1.5, clipped=CLIPS)}}
    assert of_clip(experiment, arms).differences == pytest.approx((-0.5,))
    assert of_clip(experiment, arms | {"muon": {1: run(LOUD, 9.0)}}).verdict == "no common seed"


def test_arms_of_other_rates_are_not_compared(experiment):
    fact = of_clip(experiment, {"muon@lr=0.01": [run(LOUD)], "muonclip": [run(HELD, 1.0, clipped=CLIPS)]})
    assert (fact.verdict, fact.interval) == ("other rates", None)


def test_spikes_and_divergence(experiment):
    jump = run(QUIET, losses=[2.0, 2.0, 2.0, 2.0, 3.0, 2.0, 3.0, 2.0])
    fact = of_arm(experiment, "muon", jump, run(QUIET))
    assert (fact.spikes, fact.diverged) == ((5, 7), {})
    diverged = run([*QUIET[:4], None], math.nan, losses=[2.0, 2.0, 2.0, 2.0, math.nan])
    fact = of_arm(experiment, "muon", run(QUIET), diverged)
    assert (fact.spikes, fact.diverged) == ((), {1: 5})
    assert not math.isfinite(fact.loss)


@pytest.mark.parametrize(
    ("clipped", "share", "last"),
    [(CLIPS, 1 / 8, 8), ([0, 0, 1, 0, 1, 0, 0, 0], 1 / 8, 5), ([0] * 8, 0.0, None)],
)
def test_clipped_heads(experiment, clipped, share, last):
    fact = of_arm(experiment, "muonclip", run(HELD, clipped=clipped))
    assert (fact.ever_clipped, fact.last_clipped) == ((share,), last)


def test_the_table_ranks_losses_of_one_model(experiment):
    arms = {
        "muon": [run(QUIET, 2.0)],
        "adamw": [run(QUIET, 2.5)],
        "qk-norm": [run(QUIET, 1.0)],
        "muonclip": [run(QUIET, math.nan)],
        "muon@attention=gqa": [run(QUIET, 1.5)],
        "adamw@attention=gqa": [run(QUIET, 1.25, entropy=0.5)],
    }
    facts = arm_facts(results(experiment, arms))
    head, *rows = logit_rows(facts)
    assert {len(row) for row in rows} == {len(head)}
    ranked = [(row[0], row[head.index("from the lowest")]) for row in rows]
    assert ranked == [
        ("Muon", "lowest"),
        ("AdamW", "+0.500"),
        ("MuonClip", "not finite"),
        ("Muon, QK-norm", "another model"),
        ("AdamW, GQA", "lowest"),
        ("Muon, GQA", "+0.250"),
    ]
    assert [row[head.index("entropy")] for row in rows] == ["", "", "", "", "0.50", ""]


def test_effects_have_a_row_each(experiment):
    arms = {"muon": [run(LOUD, 2.0), run(LOUD, 2.2)], "muonclip": [run(HELD, 1.5, CLIPS), run(HELD, 1.8, CLIPS)]}
    head, row = effect_rows(clip_facts(results(experiment, arms)))
    assert row == ["MuonClip", "Muon", "not told from zero", "−0.450 (−1.085 to +0.185)", "−0.500, −0.400", "12"]
    assert len(head) == len(row)


def test_unfinished_arms_are_left_out(experiment):
    made = results(experiment, {"muon": [run(LOUD)], "adamw": [run(QUIET)]})
    part = replace(made, records={"adamw": made.records["adamw"]}, summaries={"adamw": made.summaries["adamw"]})
    assert [fact.arm.name for fact in arm_facts(part)] == ["adamw"]
    assert arm_facts(replace(made, records={}, summaries={})) == []


def named(result, title, **environment):
    return replace(result, experiment=replace(result.experiment, title=title), environment=environment)


def test_experiments_side_by_side(experiment):
    hot = named(results(experiment, {"muon": [run(LOUD, 3.0)], "muonclip": [run(HELD, 2.0)]}), "Hot", torch="2.12")
    calm = results(experiment, {"muon": [run(QUIET, 2.25)], "adamw": [run(QUIET)]}, lr={"muon": 0.005, "adamw": 1e-3})
    calm = named(calm, "Calm", torch="2.13", git_commit="0123456789" * 4 + "+")
    assert setting_rows([hot, calm]) == [
        ["differs", "Hot", "Calm"],
        ["made with git_commit", "none", "0123456789+"],
        ["made with torch", "2.12", "2.13"],
        ["training.lr.adamw", "0.03", "0.001"],
        ["training.lr.muon", "0.03", "0.005"],
    ]
    assert shared_rows([hot, calm])[1:] == [
        ["Muon", "3.000 bits, peak logit 500", "2.250 bits, peak logit 8", "+0.750 between them"]
    ]
    again = named(hot, "Again", torch="2.12")
    assert len(setting_rows([hot, again])) == 1
    assert [row[-1] for row in shared_rows([hot, again])[1:]] == ["same to the bit"] * 2
    only = named(results(experiment, {"per-head": [run(QUIET)]}), "Heads", torch="2.12")
    assert len(shared_rows([hot, only])) == 1


def test_losses_of_another_model_are_not_compared(experiment):
    one = named(results(experiment, {"muon": [run(LOUD, 3.0)]}), "A")
    other = named(one, "B")
    gqa = replace(experiment.model, attention="gqa", kv_lora_rank=16)
    other = replace(other, experiment=replace(other.experiment, model=gqa))
    assert [row[-1] for row in shared_rows([one, other])[1:]] == ["of another model or other data: not compared"]
    lost = named(results(experiment, {"muon": [run(LOUD, math.nan)]}), "Lost")
    assert shared_rows([one, lost])[1][-1] == "not finite"


def test_versions_of_jax_are_compared_where_all_runs_are_its(experiment):
    torch_run = named(results(experiment, {"muon": [run(QUIET)]}), "A", jax="1")
    in_jax = replace(torch_run, experiment=replace(torch_run.experiment, framework="jax"))
    assert setting_rows([torch_run, in_jax])[1:] == [["framework", "torch", "jax"]]
    other = replace(in_jax, environment={"jax": "99"})
    assert setting_rows([in_jax, other])[1:] == [["made with jax", "1", "99"]]
