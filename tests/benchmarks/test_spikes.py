"""The study of spikes: what a probe and a disturbance do to a run, and how what is left is read."""

import math
from dataclasses import replace

import numpy as np
import pytest
from bench_runs import growing, results_of, steps_of, trained, with_arms

from benchmarks.experiment.arms import choices
from benchmarks.experiment.experiment import Experiment
from benchmarks.experiment.settings import Disturbance
from benchmarks.records.run_records import read_run, run_records
from benchmarks.report import style
from benchmarks.report.charts import charts, main_quantities
from benchmarks.studies import spikes, spikes_plots
from benchmarks.training.run import Run

PROBED = {"probe_windows": 4}
PULSE = Disturbance(after=3, steps=2, rate=10.0)
RANDOM = Disturbance(after=3, steps=2, random_tokens=True)


@pytest.fixture
def seen(monkeypatch, corpus, tmp_path):
    """What the learner of a run gets: the windows and the rate of each update, and the windows it evaluates."""

    def get(experiment, arm="muonclip", seed=3):
        run = Run(experiment, corpus, tmp_path / f"{arm}-{seed}", experiment.arm(arm), seed)
        stepped, evaluated = [], []
        step, loss = run.learner.step, run.learner.loss
        run.learner.step = lambda windows, done, lr: stepped.append((windows, lr)) or step(windows, done, lr)
        run.learner.loss = lambda windows: evaluated.append(windows) or loss(windows)
        return trained(run), stepped, evaluated

    return get


def test_the_probe_changes_nothing_of_the_training(experiment, run_of):
    plain, probed = (run_of(with_arms(experiment, "muonclip", **own), "muonclip") for own in ({}, PROBED))
    records = steps_of(probed.folder)
    assert len({record.pop("probe_loss") for record in records}) == experiment.training.steps
    assert records == steps_of(plain.folder)
    for name, weight in plain.learner.model.state_dict().items():
        assert weight.equal(probed.learner.model.state_dict()[name])


def test_the_probe_has_the_same_windows_in_every_arm_and_seed(experiment, corpus, seen):
    probed = with_arms(experiment, "muon", "muonclip", "adamw", validate_every=8, **PROBED)
    expected = corpus.validation_batch(index=0, batch_size=4, length=16)
    for arm, seed in (("muon", 0), ("muonclip", 0), ("adamw", 0), ("muon", 3)):
        run, _, evaluated = seen(probed, arm, seed)
        probes = [windows for windows in evaluated if len(windows) == 4]
        assert len(probes) == 8
        assert all(np.array_equal(windows, expected) for windows in probes)
        last = read_run(run.folder).steps["probe_loss"].iloc[-1]
        assert last == run.learner.loss(expected)  # after the update


def test_a_disturbed_rate_is_multiplied_for_its_steps_alone(experiment, seen):
    run, stepped, _ = seen(with_arms(experiment, "muonclip", disturbance=PULSE))
    _, plain, _ = seen(experiment, seed=0)
    rates = [lr for _, lr in plain]
    assert [lr for _, lr in stepped] == [*rates[:3], *(10 * lr for lr in rates[3:5]), *rates[5:]]
    assert [record["lr"] for record in steps_of(run.folder)] == [lr for _, lr in stepped]


def test_random_batches_take_the_place_of_the_texts(experiment, corpus, seen):
    disturbed = with_arms(experiment, "muon", "muonclip", disturbance=RANDOM)
    arms = [[windows for windows, _ in seen(disturbed, arm)[1]] for arm in ("muon", "muonclip")]
    assert all(map(np.array_equal, *arms))
    for done, windows in enumerate(arms[0]):
        text = corpus.batch(seed=3, step=done, batch_size=2, length=16)
        assert np.array_equal(windows, text) == (not 3 <= done < 5)


def test_random_tokens_are_even_and_depend_on_seed_and_step(corpus):
    many = corpus.random_batch(seed=0, step=0, batch_size=64, length=63)
    assert many.shape == (64, 64)
    assert (many.min(), many.max()) == (0, corpus.vocab_size - 1)
    counts = np.bincount(many.ravel(), minlength=256)  # 16 of each expected
    assert (counts - 16).std() == pytest.approx(4, rel=0.25)
    assert np.array_equal(many[5:7], corpus.random_batch(seed=0, step=0, batch_size=64, length=63, rows=range(5, 7)))
    for own in ({"seed": 1, "step": 0}, {"seed": 0, "step": 1}):
        assert not np.array_equal(many, corpus.random_batch(**own, batch_size=64, length=63))


def test_a_disturbed_experiment_is_recognised(experiment):
    disturbed = with_arms(experiment, "muon", disturbance=PULSE, **PROBED)
    assert Experiment.from_json(disturbed.to_json()) == disturbed


def losses(values, **own):
    """Records with these losses of the probe, whose largest logit is ten times the step."""
    made = growing(len(values), 10.0 * len(values), **own)
    for record, value in zip(made, values, strict=True):
        record["probe_loss"] = value
    return made


def test_what_is_left_is_read_at_the_end(experiment):
    """2 before; 3, then 5 in the disturbance of steps 13 and 14; then 4; the last ten are 2.5."""
    values = [9.0] * 2 + [2.0] * 4 + [2.5] + [1.5] + [2.0] * 4 + [3.0, 5.0] + [4.0] * 3 + [2.5] * 10
    training = with_arms(
        experiment, "muon", steps=27, warmup_steps=1, disturbance=Disturbance(after=12, steps=2)
    ).training
    reading = spikes.reading_of(run_records(losses(values)), training)
    assert reading._asdict() == {
        "before": 2.0, "peak": 5.0, "left": 2.5, "rise": 0.5, "max_logit": 270.0, "last_logit": 225.0,
    }  # fmt: skip
    diverged = spikes.reading_of(run_records(losses([*values[:-1], math.nan], diverges=True)), training)
    assert math.isnan(diverged.left)
    assert diverged.peak == 5.0


@pytest.fixture
def results(experiment):
    """Two arms, with 0.5 and 0.1 left; the seeds are a nat apart."""
    case = with_arms(
        experiment, "muon", "muonclip", steps=27, warmup_steps=2, disturbance=Disturbance(after=12, steps=2), **PROBED
    )
    values = {"muon": 0.5, "muonclip": 0.1}
    runs = {
        arm: {seed: losses([seed + 2.0] * 12 + [seed + 4.0] * 2 + [seed + 2 + left] * 13) for seed in (0, 1)}
        for arm, left in values.items()
    }
    return results_of(case, runs)


def test_arms_are_compared_on_the_same_seeds(results):
    figures = spikes.figures_of([results])
    text = spikes.read_spikes(figures)
    assert "| MuonClip | Muon | +0.000 | −0.400 | lower |" in text
    assert "| Muon | 2.500 ± 6.353 | 4.500 ± 6.353 | 3.000 ± 6.353 | 270 | 225 |" in text
    del figures["cases"]["tiny"]["arms"]["muon"]["0"]
    assert "| MuonClip | Muon | +0.000 | −0.400 | one seed |" in spikes.read_spikes(figures)


def test_pictures_mark_the_disturbance(results, tmp_path):
    (chart,) = charts(results, 300.0, [main_quantities(results)[1]])
    assert (chart.title, chart.disturbed) == ("Loss of a fixed held-out sample", (13, 14))
    assert chart.lines[0].y[12] == 4.0
    spikes_plots.draw([results], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("spike.png", "spikes.png", "spike-dark.png", "spikes-dark.png")
    }


def test_black_lines_are_light_on_dark_pages():
    with style.pyplot.rc_context(style.STYLE):
        assert style.ink("#000000") == "#000000"
    with style.pyplot.rc_context({"text.color": "#e6e6e6"}):
        assert (style.ink("#000000"), style.ink("#D55E00")) == ("#e6e6e6", "#D55E00")


def test_cases_end_after_their_disturbance(corpus):
    from muonclip.models import MoEConfig

    for name, case in spikes.CASES.items():
        made = case.experiment(name, corpus, MoEConfig.cpu(), choices("muon", "rescue"), spikes.SEEDS)
        assert made.arm("rescue").clips_from == case.rescue_after
        if case.disturbance:
            assert case.disturbance.after + case.disturbance.steps <= case.steps
            assert case.disturbance.after > made.training.warmup_steps + spikes.LEVEL


def test_the_search_takes_the_largest_rise(results):
    alone = replace(results.experiment.training, disturbance=None)
    found = replace(results, experiment=replace(results.experiment, title="Deep", training=alone))
    assert "| Deep | 2.000 | 270 |" in spikes.read_search(spikes.figures_of([found]))
