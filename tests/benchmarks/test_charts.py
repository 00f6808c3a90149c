"""Charts hold what was recorded: seeds, means, spikes, thresholds, and every head's maxima however long the run is."""

import math
from dataclasses import replace

import numpy as np
import pytest
from bench_runs import growing, heads, logit, results_of, with_arms

from benchmarks.experiment.arms import ARMS
from benchmarks.report.charts import SMOOTHING, charts, head_map, thin, top_of_logits

TITLES = [
    *("Maximum attention logit", "Train loss", "Validation loss", "Clipped heads"),
    *("Attention entropy", "Query weights", "Key weights", "Update size"),
]


def made(experiment, runs, **training):
    return results_of(with_arms(experiment, *runs, tau=10.0, **training), runs)


def test_a_chart_for_each_quantity_that_was_measured(experiment):
    runs = {"muon": {0: growing(8, 500.0), 3: growing(8, 900.0)}, "muonclip": {0: growing(8, 12.0)}}
    results = made(experiment, runs)
    found = charts(results, top_of_logits([results]))
    assert [chart.title for chart in found] == TITLES
    first, second, mean, other = found[0].lines
    assert [line.kind for line in found[0].lines] == ["seed", "seed", "mean", "mean"]
    assert {line.colour for line in (first, second, mean)} == {ARMS["muon"].colour}
    assert mean.x.tolist() == list(range(1, 9))
    np.testing.assert_allclose(mean.y, np.mean([first.y, second.y], axis=0))
    assert (first.y[-1], second.y[-1], other.y[-1]) == (500.0, 900.0, 12.0)
    assert (found[0].log, found[0].taus, found[0].y_range[0]) == (True, (10.0,), 1.0)
    assert found[0].y_range[1] > 900
    unmeasured = made(experiment, {"muon": {0: growing(8, 20.0, measured=False)}})
    assert [chart.title for chart in charts(unmeasured, 20.0)] == TITLES[:4]


def test_values_are_those_of_the_records(experiment):
    records = growing(8, 5.0)
    for index, record in enumerate(records):
        record["clipped_heads"], record["loss"] = index, float(index)
    by_title = {chart.title: chart.lines[0] for chart in charts(made(experiment, {"muon": {0: records}}), 20.0)}
    assert by_title["Clipped heads"].y.tolist() == by_title["Train loss"].y.tolist() == [i / 2 for i in range(8)]
    assert by_title["Validation loss"].x.tolist() == [4, 8]
    assert by_title["Validation loss"].y == pytest.approx([2 / math.log(2)] * 2)
    assert by_title["Attention entropy"].y.tolist() == [2.5, 2.5]
    assert by_title["Query weights"].y.tolist() == by_title["Key weights"].y.tolist() == [4.0, 4.0]
    assert by_title["Update size"].y.tolist() == [0.2, 0.2]


def test_curves_are_smoothed_over_the_steps_before(experiment):
    records = growing(100, 5.0)
    for record in records:
        record["loss"] = float(record["step"])
    loss = charts(made(experiment, {"muon": {0: records}}, steps=100), 20.0)[1].lines[0]
    assert loss.y[:3].tolist() == [1.0, 1.5, 2.0]
    assert loss.y[-1] == pytest.approx(np.mean(range(101 - SMOOTHING, 101)))


def test_a_diverged_run_ends_its_mean(experiment):
    runs = {"muon": {0: growing(6, 50.0, diverges=True), 3: growing(8, 20.0)}}
    lines = charts(made(experiment, runs), 50.0)[0].lines
    assert [len(line.x) for line in lines] == [5, 8, 5]
    assert all(np.isfinite(line.y).all() for line in lines)


def test_an_arm_that_coincides_with_another_is_dashed(experiment):
    same = made(experiment, {"muon": {0: growing(8, 5.0)}, "muonclip": {0: growing(8, 5.0)}})
    assert [line.dashed for line in charts(same, 20.0)[0].lines] == [False, True]


def test_spikes_are_marked(experiment):
    records = growing(8, 5.0)
    records[6]["loss"] = 9.0
    chart = charts(made(experiment, {"muon": {0: records}}, spike_window=3), 20.0)[1]
    marks = [line for line in chart.lines if line.kind == "marks"]
    assert [(line.x.tolist(), line.y.tolist()) for line in marks] == [([7], [9.0])]
    assert "spikes" in chart.note
    assert chart.y_range[1] > 9.0


def test_every_threshold_that_clips_has_its_line(experiment):
    quiet = {0: growing(8, 50.0)}

    def taus(*arms):
        return charts(made(experiment, dict.fromkeys(arms, quiet)), 50.0)[0].taus

    assert taus("muon", "muonclip", "muonclip@tau=30") == (10.0, 30.0)
    assert taus("muon", "muonclip@tau=30") == (30.0,)  # at 10 nothing is clipped
    assert taus("muon") == (10.0,)


def test_logits_before_a_soft_cap_are_said_to_be(experiment):
    notes = [charts(made(experiment, {arm: {0: growing(8, 5.0)}}), 20.0)[0].note for arm in ("muon", "softcap")]
    assert ["soft cap" in note for note in notes] == [False, True]


@pytest.mark.parametrize("count", [3, 10, 11, 57])
def test_thinned_curves_keep_ends_and_extremes(count):
    steps, values = np.arange(count), np.cos(np.arange(count) ** 2)
    x, y = thin(steps, values, 10)
    assert len(x) <= min(count, 10)
    assert (x[0], x[-1]) == (0, count - 1)
    assert (np.diff(x) > 0).all()
    assert (values[x] == y).all()
    assert {values.min(), values.max()} <= set(y)


def cells(experiment, records, steps, *, tau=50.0, columns=1080, rows=512, **model):
    sized = with_arms(replace(experiment, model=replace(experiment.model, **model)), "muon", steps=steps)
    results = results_of(sized, {"muon": {0: records}})
    return head_map(results.records["muon"][0], results.experiment, tau, columns=columns, rows=rows)


def test_each_cell_is_its_head_at_its_step(experiment):
    found = cells(experiment, heads(9), 12)
    expected = [[logit(layer, head, step) for step in range(1, 10)] for layer in range(2) for head in range(4)]
    np.testing.assert_array_equal(found.values[:, :9], expected)
    assert np.isnan(found.values[:, 9:]).all()  # the run was cut there
    assert (found.layers, found.steps, found.heads) == (["layer 0", "layer 1"], 1, 1)


@pytest.mark.parametrize("columns", [1080, 360])
def test_long_runs_and_many_heads_keep_their_maxima(experiment, columns):
    steps, peaks = 1201, {(0, 0, 1): 3000.0, (69, 15, 1201): 2000.0, (33, 7, 734): 1000.0}
    records = heads(steps, 70, 16, at=peaks)
    found = cells(experiment, records, steps, columns=columns, num_layers=70, num_heads=16, num_dense_layers=1)
    per_layer = 16 // found.heads
    assert found.steps > 1 < found.heads
    assert found.values.shape == (70 * per_layer, math.ceil(steps / found.steps))
    assert found.values.shape[0] <= 512
    assert found.values.shape[1] <= columns
    for (layer, head, step), peak in peaks.items():
        assert found.values[layer * per_layer + head // found.heads, (step - 1) // found.steps] == peak
    assert (found.values[found.values < 1000]).size == found.values.size - len(peaks)
    first = [max(logit(1, head, step) for step in range(1, 1 + found.steps)) for head in range(found.heads)]
    assert found.values[per_layer, 0] == max(first)


def test_clipped_cells_are_those_above_tau_at_steps_that_clipped(experiment):
    found = cells(experiment, heads(9, clipped=(4, 5, 6, 9)), 9, tau=2.2)
    expected = np.zeros((8, 9), bool)
    expected[6:, [3, 4, 5, 8]] = True  # layer 1: its heads from 2.0 on, by step 0.01 more
    np.testing.assert_array_equal(found.clipped, expected)


def test_a_run_that_diverged_at_once_is_an_empty_map(experiment):
    end = {"step": 1, "loss": math.nan, "max_logits": {}, "clipped_heads": 0, "val_loss": math.nan}
    found = cells(experiment, [end], 9)
    assert np.isnan(found.values).all()
    assert not found.clipped.any()
    assert found.values.shape[1] == 9
