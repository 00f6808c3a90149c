"""The pilot is the beginning of the experiment at other rates, and the lowest exploding rate is taken."""

from dataclasses import replace

import pytest

from benchmarks.records.summary import Results
from benchmarks.studies.pilot import choose_rate, pilot_experiment


def test_a_pilot_is_the_beginning(experiment):
    long = replace(experiment, training=replace(experiment.training, steps=1000), seeds=(3, 5))
    pilot = pilot_experiment(long, (0.04, 0.01))
    assert tuple(arm.name for arm in pilot.arms) == ("muon@lr=0.01", "muon@lr=0.04")
    assert pilot.seeds == (3,)
    assert pilot.training == replace(long.training, steps=150, lr={})
    assert (pilot.model, pilot.data, pilot.device) == (long.model, long.data, long.device)


@pytest.mark.parametrize(
    ("peaks", "rate", "words"),
    [
        ({0.01: 20.0, 0.02: 101.0, 0.04: 900.0}, 0.02, "the lowest whose logits passed 100"),
        ({0.01: 100.0, 0.02: 99.0}, 0.02, "no pilot passed 100"),
        ({0.02: 500.0, 0.01: 300.0}, 0.01, "the lowest whose logits passed 100"),
    ],
)
def test_the_lowest_rate_that_explodes(experiment, peaks, rate, words):
    pilot = pilot_experiment(experiment, tuple(peaks))
    summaries = {f"muon@lr={lr:g}": {0: {"max_logit_peak": peak}} for lr, peak in peaks.items()}
    chosen, reason = choose_rate(Results(pilot, {}, summaries))
    assert chosen == rate
    assert words in reason
