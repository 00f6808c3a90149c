"""The sentences follow the numbers: where the numbers flip, so does the sentence."""

import math
from dataclasses import replace

import pytest

from benchmarks.records.summary import PanelResult, summarise
from benchmarks.report.comparison import compare
from benchmarks.report.verdicts import read

LN2 = math.log(2)
QUIET = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]  # τ is 10
LOUD = [1.0, 2.0, 11.0, 50.0, 90.0, 200.0, 300.0, 500.0]
HELD = [1.0, 2.0, 11.0, 13.0, 12.0, 13.0, 12.0, 13.0]
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
        made[-1] |= {"update_rms": 0.2}
    return made


def result(panel, arms, **training):
    """Of records by arm: a list of them, for the seeds 0, 1, …, or by seed."""
    runs = {arm: of if isinstance(of, dict) else dict(enumerate(of)) for arm, of in arms.items()}
    given = {"tau": 10.0, "spike_window": 3, "lr": dict.fromkeys(ARMS, 0.03)} | training
    panel = replace(panel, arms=tuple(runs), seeds=(0, 1), training=replace(panel.training, **given), title=panel.title)
    summaries = {
        arm: {
            seed: summarise(
                panel,
                arm,
                records,
                {
                    "steps": len(records),
                    "diverged": False,
                    "final_val_loss": records[-1]["val_loss"],
                    "wall_seconds": 1.0,
                    "train_seconds": 1.0,
                },
            )
            for seed, records in of.items()
        }
        for arm, of in runs.items()
    }
    return PanelResult(panel, runs, summaries)


ARMS = ("adamw", "muon", "muonclip", "rescue", "per-head", "adamw-clip", "qk-norm", "softcap")


def told(panel, arms, **training):
    return read(result(panel, arms, **training))


def about(sentences, *words):
    """The only sentence with all these words."""
    found = [sentence for sentence in sentences if all(word in sentence for word in words)]
    assert len(found) == 1, sentences
    return found[0]


def none_about(sentences, word):
    assert not [sentence for sentence in sentences if word in sentence]


@pytest.mark.parametrize(
    ("arm", "runs", "sentence"),
    [
        ("muon", [QUIET], "Muon: logits stayed at or under τ = 10; the largest was 8."),
        ("muon", [[*QUIET[:-1], 10.0]], "Muon: logits stayed at or under τ = 10; the largest was 10."),
        (
            "muon",
            [LOUD],
            "Muon: logits passed τ = 10 at step 3 of 8 and peaked at 500. In the last quarter of the steps they were "
            "mostly above it: the median there is 400, 40.0 times τ.",
        ),
        (
            "muon",
            [[*LOUD[:4], *QUIET[:4]]],
            "Muon: logits passed τ = 10 at step 3 of 8 and peaked at 50. In the last quarter of the steps they were "
            "mostly not above it: the median there is 3.5, 0.3 times τ.",
        ),
        (
            "muon",
            [LOUD, [2.0, *LOUD]],
            "Muon: logits passed τ = 10 at steps 3 to 4 of 8 and peaked at 500. In the last quarter of the steps they "
            "were mostly above it: the median there is 400 in the seed where it is largest, 40.0 times τ.",
        ),
        (
            "muon",
            [[2.0, *LOUD[:-1]], QUIET],
            "Muon: logits passed τ = 10 in 1 of 2 seeds at step 4 of 8 and peaked at 300. In the last quarter of the "
            "steps they were mostly above it: the median there is 250 in the seed where it is largest, 25.0 times τ.",
        ),
        (
            "muonclip",
            [HELD],
            "MuonClip: logits passed τ = 10 at step 3 of 8 and peaked at 13. In the last quarter of the steps they "
            "were held near τ: the median there is 12.5, 1.2 times τ.",
        ),
        (
            "muonclip",
            [LOUD],
            "MuonClip: logits passed τ = 10 at step 3 of 8 and peaked at 500. In the last quarter of the steps they "
            "were not held near τ: the median there is 400, 40.0 times τ.",
        ),
        (
            "muonclip",
            [[v * 100 for v in LOUD]],
            "MuonClip: logits passed τ = 10 at step 1 of 8 and peaked at 50000. In the last quarter of the steps they "
            "were not held near τ: the median there is 40000, 4000 times τ.",
        ),
        (
            "rescue",
            [[*LOUD[:4], *HELD[4:]]],
            "Muon, clip switched on midway: logits passed τ = 10 at step 3 of 8 and peaked at 50. Its clip acts from "
            "step 5 on. In the last quarter of the steps they were held near τ: the median there is 12.5, 1.2 times τ.",
        ),
        (
            "softcap",
            [LOUD],
            "Muon, soft cap: logits (measured before the soft cap) passed τ = 10 at step 3 of 8 and peaked at 500. In "
            "the last quarter of the steps they were mostly above it: the median there is 400, 40.0 times τ.",
        ),
        ("qk-norm", [QUIET], "Muon, QK-norm: logits stayed at or under τ = 10; the largest was 8."),
        ("muon", [[None]], "Muon: no logit was measured."),
    ],
)
def test_logits(panel, arm, runs, sentence):
    assert told(panel, {arm: [run(maxima) for maxima in runs]})[0] == sentence


def test_a_threshold_of_its_own(panel):
    sentences = told(panel, {"muonclip@tau=40": [run([*QUIET[:-1], 40.0])], "muonclip": [run(HELD, clipped=CLIPS)]})
    assert sentences[0] == "MuonClip, τ = 40: logits stayed at or under τ = 40; the largest was 40."
    assert sentences[1].startswith("MuonClip: logits passed τ = 10 at step 3")


def test_where_muon_does_not_pass_tau_nothing_is_shown(panel):
    arms = {"muon": [run(QUIET)], "muonclip": [run(QUIET)]}
    nothing = "Muon did not pass τ = 10 here: this panel shows nothing about the clip of MuonClip."
    assert nothing in told(panel, arms)
    assert nothing not in told(panel, arms | {"muon": [run(LOUD)]})
    assert nothing not in told(panel, {"muonclip": [run(QUIET)]})
    variant = told(panel, {"muon": [run([30.0] * 8)], "muonclip": [run(HELD)], "muonclip@tau=40": [run([30.0] * 8)]})
    assert "Muon did not pass τ = 40 here: this panel shows nothing about the clip of MuonClip, τ = 40." in variant
    assert nothing not in variant


@pytest.mark.parametrize(
    ("muon", "muonclip", "sentence"),
    [
        (
            [2.0],
            [1.5],
            "The clip helped here: MuonClip ends with the lower loss; from Muon to MuonClip the final loss changes by "
            "−0.500 bits per byte. One seed each: no spread is known.",
        ),
        (
            [2.0],
            [2.5],
            "The clip cost loss here: MuonClip ends with the higher loss; from Muon to MuonClip the final loss changes "
            "by +0.500 bits per byte. One seed each: no spread is known.",
        ),
        (
            [2.0, 2.1],
            [1.5, 1.7],
            "The clip helped here: MuonClip ends with the lower loss; from Muon to MuonClip the final loss changes by "
            "−0.450 bits per byte (seed by seed −0.500, −0.400). The difference is larger than the spread between "
            "seeds (0.200).",
        ),
        (
            [2.0, 3.0],
            [2.25, 3.25],
            "The clip cost loss here: MuonClip ends with the higher loss; from Muon to MuonClip the final loss changes "
            "by +0.250 bits per byte (seed by seed +0.250, +0.250). The difference is smaller than the spread between "
            "seeds (1.000).",
        ),
        (
            [2.0, 3.0],
            [2.25, 2.5],
            "Neither cost nor gain of the clip is shown: from Muon to MuonClip the final loss changes by −0.125 bits "
            "per byte (seed by seed +0.250, −0.500).",
        ),
        (
            [2.0],
            [2.0001],
            "The clip cost loss here: MuonClip ends with the higher loss; from Muon to MuonClip the final loss changes "
            "by +1e−04 bits per byte. One seed each: no spread is known.",
        ),
    ],
)
def test_what_the_clip_does_to_the_loss(panel, muon, muonclip, sentence):
    arms = {
        "muon": [run(LOUD, bits) for bits in muon],
        "muonclip": [run(HELD, bits, clipped=CLIPS) for bits in muonclip],
    }
    assert about(told(panel, arms), "from Muon to MuonClip") == sentence


def test_identical_to_the_bit(panel):
    same = {"muon": [run(QUIET)], "muonclip": [run(QUIET)]}
    assert "MuonClip is Muon to the bit: no head was clipped, and every loss and logit is the same." in told(
        panel, same
    )
    clipped = same | {"muonclip": [run(QUIET, clipped=CLIPS)]}
    assert "MuonClip is Muon to the bit: though heads were clipped, every loss and logit is the same." in told(
        panel, clipped
    )
    losses = [2.0] * 7 + [2.0 + 1e-15]
    assert about(told(panel, same | {"muonclip": [run(QUIET, losses=losses)]}), "clipped no head, yet") == (
        "MuonClip clipped no head, yet from Muon to MuonClip the final loss changes by +0.000 bits per byte: these "
        "runs do not repeat to the bit."
    )


@pytest.mark.parametrize(
    ("bits", "sentence"),
    [
        (
            (math.nan, 2.0),
            "What the clip costs cannot be said: Muon ends without a finite loss; the loss of MuonClip is finite.",
        ),
        (
            (2.0, math.inf),
            "What the clip costs cannot be said: MuonClip ends without a finite loss; the loss of Muon is finite.",
        ),
        ((math.nan, math.nan), "What the clip costs cannot be said: Muon and MuonClip end without a finite loss."),
    ],
)
def test_a_loss_that_is_not_finite_is_not_compared(panel, bits, sentence):
    arms = {"muon": [run(LOUD, bits[0])], "muonclip": [run(HELD, bits[1], clipped=CLIPS)]}
    assert about(told(panel, arms), "What the clip costs") == sentence


def test_seeds_are_compared_with_themselves(panel):
    arms = {"muon": {0: run(LOUD, 2.0), 1: run(LOUD, 9.0)}, "muonclip": {0: run(HELD, 1.5, clipped=CLIPS)}}
    assert "changes by −0.500 bits per byte. " in about(told(panel, arms), "from Muon to MuonClip")
    apart = arms | {"muon": {1: run(LOUD, 9.0)}}
    assert "MuonClip and Muon have no finished seed in common: what the clip costs is not measured." in told(
        panel, apart
    )


def test_the_partner_of_an_arm_has_its_settings_and_its_rate(panel):
    clipped = run(HELD, 1.0, clipped=CLIPS)
    other_attention = {"muon": [run(LOUD)], "muonclip@attention=gqa": [clipped]}
    none_about(told(panel, other_attention), "from Muon")
    gqa = other_attention | {"muon@attention=gqa": [run(LOUD, 3.0)]}
    assert "−2.000" in about(told(panel, gqa), "from Muon, GQA to MuonClip, GQA")
    none_about(told(panel, {"adamw": [run(LOUD)], "muonclip": [clipped]}), "the clip")
    assert "from AdamW to AdamW + QK-Clip" in about(
        told(panel, {"adamw": [run(LOUD)], "adamw-clip": [clipped]}), "The clip helped"
    )
    unequal = {"muon@lr=0.01": [run(LOUD)], "muonclip": [clipped]}
    rates = (
        "MuonClip and Muon, rate 0.01 have different rates (0.03 and 0.01): what the clip alone does to the loss is "
        "not measured."
    )
    assert rates in told(panel, unequal)
    none_about(told(panel, unequal), "from Muon")
    assert rates not in told(panel, unequal | {"muon": [run(LOUD)]})


@pytest.mark.parametrize(
    ("losses", "sentence"),
    [
        ({"muon": [2.0]}, "Muon ends with a validation loss of 2.000 bits per byte."),
        (
            {"adamw": [2.0], "muon": [1.5]},
            "Muon ends with the lowest validation loss, 1.500 bits per byte; next is AdamW, +0.500. One seed each: no "
            "spread is known.",
        ),
        (
            {"adamw": [1.0], "muon": [1.5], "per-head": [1.75]},
            "AdamW ends with the lowest validation loss, 1.000 bits per byte; next is Muon, +0.500. One seed each: no "
            "spread is known. The highest is MuonClip per head, +0.750.",
        ),
        (
            {"adamw": [2.0, 2.25], "muon": [1.5, 1.75]},
            "Muon ends with the lowest validation loss, 1.625 bits per byte, mean of the seeds; next is AdamW, +0.500. "
            "The difference is larger than the spread between seeds (0.250).",
        ),
        (
            {"adamw": [2.0, 2.5], "muon": [1.75, 2.5]},
            "Muon ends with the lowest validation loss, 2.125 bits per byte, mean of the seeds; next is AdamW, +0.125. "
            "The difference is smaller than the spread between seeds (0.750).",
        ),
        (
            {"muon": [2.0], "muonclip": [2.0]},
            "Muon and MuonClip end with the same validation loss, 2.000 bits per byte.",
        ),
        (
            {"adamw": [2.5], "muon": [2.0], "muonclip": [2.0]},
            "Muon and MuonClip end with the lowest validation loss, 2.000 bits per byte; next is AdamW, +0.500. One "
            "seed each: no spread is known.",
        ),
        (
            {"muon": [2.0], "muon@steps=4": [2.5]},
            "Muon ends with the lowest validation loss, 2.000 bits per byte; next is Muon, 4 steps, +0.500. One seed "
            "each: no spread is known. They were not trained equally long: 4 to 8 steps.",
        ),
    ],
)
def test_which_arm_ends_lowest(panel, losses, sentence):
    assert sentence in told(panel, {arm: [run(QUIET, bits) for bits in of] for arm, of in losses.items()})


def test_losses_of_another_model_stand_apart(panel):
    arms = {
        "muon": [run(QUIET, 2.0)],
        "adamw": [run(QUIET, 2.5)],
        "qk-norm": [run(QUIET, 1.0)],
        "muon@attention=gqa": [run(QUIET, 1.5)],
        "adamw@attention=gqa": [run(QUIET, 1.25)],
    }
    sentences = told(panel, arms)
    assert about(sentences, "Muon ends with the lowest").startswith("Muon ends with the lowest validation loss, 2.000")
    assert (
        "Another model (qk_norm = True), whose losses stand apart: Muon, QK-norm ends with a validation loss of 1.000 "
        "bits per byte." in sentences
    )
    assert (
        about(sentences, "Another model (attention = gqa")
        .partition(": ")[2]
        .startswith("AdamW, GQA ends with the lowest validation loss, 1.250 bits per byte; next is Muon, GQA, +0.250.")
    )


def test_tokens_are_told_in_bits_per_token(panel):
    tokens = replace(panel, data=replace(panel.data, kind="tokens"))
    assert "Muon ends with a validation loss of 2.000 bits per token." in told(tokens, {"muon": [run(QUIET)]})


@pytest.mark.parametrize(
    ("clipped", "sentence"),
    [
        ([CLIPS], "MuonClip clipped 12% of the heads at some step, up to the last step."),
        ([[0, 0, 1, 0, 1, 0, 0, 0]], "MuonClip clipped 12% of the heads at some step, and none after step 5 of 8."),
        ([[0] * 8], "MuonClip clipped no head."),
        ([[0] * 8, CLIPS], "MuonClip clipped 0% to 12% of the heads at some step, up to the last step."),
    ],
)
def test_clipped_heads(panel, clipped, sentence):
    assert sentence in told(panel, {"muonclip": [run(HELD, clipped=of) for of in clipped]})


def test_arms_that_clipped_no_head_share_a_sentence(panel):
    arms = {"muonclip": [run(QUIET)], "rescue": [run(QUIET)], "per-head": [run(HELD, clipped=CLIPS)]}
    sentences = told(panel, arms)
    assert "MuonClip and Muon, clip switched on midway clipped no head." in sentences
    assert about(sentences, "MuonClip per head clipped").startswith("MuonClip per head clipped 12%")


def test_arms_without_a_clip_clip_no_head_and_nothing_is_said_of_it(panel):
    none_about(told(panel, {"muon": [run(LOUD)], "softcap": [run(LOUD)]}), "clipped")


def test_spikes_and_divergence(panel):
    calm = {"muon": [run(QUIET)], "adamw": [run(QUIET)]}
    quiet = "No train loss spiked, and all stayed finite."
    assert quiet in told(panel, calm)
    jump = run(QUIET, losses=[2.0, 2.0, 2.0, 2.0, 3.0, 2.0, 3.0, 2.0])
    sentences = told(panel, calm | {"muon": [jump, run(QUIET)]})
    assert about(sentences, "spiked") == (
        "Train losses spiked (more than 0.5 nats above the median of the 3 steps before): Muon at 2 steps over all "
        "seeds, first at 5."
    )
    diverged = run([*QUIET[:4], None], math.nan, losses=[2.0, 2.0, 2.0, 2.0, math.nan])
    sentences = told(panel, calm | {"muon": [run(QUIET), diverged]})
    assert quiet not in sentences
    none_about(sentences, "spiked")
    assert "Muon diverged: seed 1 ended at step 5 of 8, where its loss or gradient was not finite." in sentences
    assert "Muon (seed 1) has no finite final loss and is not ranked." in sentences
    assert "AdamW ends with a validation loss of 2.000 bits per byte." in sentences


def test_entropy_is_told_where_it_was_measured(panel):
    none_about(told(panel, {"muon": [run(QUIET)]}), "entropy")
    sentences = told(panel, {"adamw": [run(QUIET)], "muon": [run(QUIET, entropy=0.5), run(QUIET, entropy=1.0)]})
    even = sum(math.log(t) for t in range(1, 17)) / 16  # windows of 16 tokens
    assert about(sentences, "entropy") == (
        "Attention entropy at the end, mean over heads, in nats. Muon: 0.75. Spread evenly over all keys, attention "
        f"would have {even:.2f}; looking at one key alone, 0."
    )


def test_unfinished_arms_are_left_out(panel):
    made = result(panel, {"muon": [run(LOUD)], "adamw": [run(QUIET)]})
    part = replace(made, records={"adamw": made.records["adamw"]}, summaries={"adamw": made.summaries["adamw"]})
    none_about(read(part), "Muon")
    assert read(replace(made, records={}, summaries={})) == ["No run is finished: there is nothing to read."]


def named(result, title, **environment):
    return replace(result, panel=replace(result.panel, title=title), environment=environment)


def test_panels_side_by_side(panel):
    hot = named(result(panel, {"muon": [run(LOUD, 3.0)], "muonclip": [run(HELD, 2.0)]}), "Hot", torch="2.12")
    calm = result(panel, {"muon": [run(QUIET, 2.25)], "adamw": [run(QUIET)]}, lr={"muon": 0.005, "adamw": 1e-3})
    sentences = compare([hot, named(calm, "Calm", torch="2.13", git_commit="0123456789" * 4 + "+")])
    assert sentences == [
        "The panels differ in training.lr.adamw (0.03 / 0.001); training.lr.muon (0.03 / 0.005).",
        "They were made with different git_commit (none / 0123456789+); torch (2.12 / 2.13).",
        "Muon ends with 2.250 bits per byte in “Calm” and with 3.000 in “Hot”, +0.750. One seed each: no spread is "
        "known. Peak logits of Muon: 500 in “Hot”, 8 in “Calm”.",
    ]
    assert compare([hot]) == []
    assert compare([hot, named(hot, "Again", torch="2.12")]) == [
        "The panels have the same settings.",
        "Muon is the same to the bit in “Hot” and “Again”.",
        "MuonClip is the same to the bit in “Hot” and “Again”.",
    ]
    only = named(result(panel, {"per-head": [run(QUIET)]}), "Heads", torch="2.12")
    assert compare([hot, only])[-1] == "No arm of the same name is finished in two of them."


def test_losses_of_panels_with_another_model_are_not_compared(panel):
    one = named(result(panel, {"muon": [run(LOUD, 3.0)]}), "A")
    other = named(one, "B")
    other = replace(other, panel=replace(other.panel, model=replace(panel.model, attention="gqa", kv_lora_rank=16)))
    assert compare([one, other])[1:] == [
        "They differ in the model or the data, so their losses are not compared.",
        "Peak logits of Muon: 500 in “A”, 500 in “B”.",
    ]
    lost = named(result(panel, {"muon": [run(LOUD, math.nan)]}), "Lost")
    assert (
        compare([one, lost])[-1]
        == "Muon has no finite final loss in “Lost”. Peak logits of Muon: 500 in “A”, 500 in “Lost”."
    )
