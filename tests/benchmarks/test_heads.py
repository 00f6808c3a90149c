"""The heat maps hold every maximum, at its place, however many heads and steps there are."""

import math
from dataclasses import replace

import numpy as np
import pytest
from matplotlib import colormaps, image, pyplot
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm

from benchmarks.experiment.arms import ARMS
from benchmarks.records.summary import PanelResult
from benchmarks.report import head_maps as heads
from benchmarks.report.style import STYLE


def logit(layer, head, step):
    return 1.0 + layer + 0.1 * head + 0.01 * step


def records(steps, layers=2, count=4, clipped=(), **spikes):
    """`logit` everywhere but where `spikes` has {(layer, head, step): value}."""
    special = spikes.get("at", {})
    return [
        {
            "step": step,
            "loss": 2.0,
            "max_logits": {
                f"layers.{layer}.attn": [
                    special.get((layer, head, step), logit(layer, head, step)) for head in range(count)
                ]
                for layer in range(layers)
            },
            "clipped_heads": 1 if step in clipped else 0,
        }
        for step in range(1, steps + 1)
    ]


def sized(panel, arms, steps, tau=50.0, **model):
    training = replace(panel.training, steps=steps, tau=tau, lr=dict.fromkeys(ARMS, 1e-2))
    return replace(panel, arms=tuple(arms), training=training, model=replace(panel.model, **model))


def drawn(*results):
    """The maps by arm, and the colour scale."""
    with pyplot.rc_context(STYLE):
        figure = heads.figure(results)
        figure.canvas.draw()
    labelled = {axis.get_label(): axis for axis in figure.axes if axis.images}
    (scale,) = [axis for axis in figure.axes if axis.get_label() == "scale"]
    pyplot.close(figure)
    return labelled, scale


def values(axis):
    return axis.images[0].get_array().filled(np.nan)


def test_each_cell_is_its_head_at_its_step(panel):
    panel = sized(panel, ["muon", "muonclip"], steps=9)
    runs = {"muon": {0: records(9)}, "muonclip": {0: records(5), 3: records(9)}}
    maps, _ = drawn(PanelResult(panel, runs, {}, {}))
    expected = [[logit(layer, head, step) for step in range(1, 10)] for layer in range(2) for head in range(4)]
    np.testing.assert_array_equal(values(maps["muon"]), expected)
    np.testing.assert_array_equal(values(maps["muonclip"])[:, :5], np.array(expected)[:, :5])  # its first seed
    assert np.isnan(values(maps["muonclip"])[:, 5:]).all()
    assert maps["muon"].images[0].get_extent() == [0.5, 9.5, 8, 0]  # step s from s − ½ to s + ½, the first layer on top
    assert [label.get_text() for label in maps["muon"].get_yticklabels()] == ["layer 0", "layer 1"]
    assert maps["muon"].get_title("left") == "Muon, rate 0.01"
    assert maps["muonclip"].get_xlim() == (0.5, 9.5)


@pytest.mark.parametrize(("arms", "steps"), [(1, 2000), (3, 2001)])
def test_long_runs_and_many_heads_keep_their_maxima(panel, arms, steps):
    names = list(ARMS)[:arms]
    panel = sized(panel, names, steps, num_layers=70, num_heads=16, num_dense_layers=1)
    peaks = {(0, 0, 1): 3000.0, (69, 15, steps): 2000.0, (33, 7, 1234): 1000.0}
    run = records(steps, 70, 16, at=peaks)
    (cell, *_) = made = heads.cells(PanelResult(panel, {name: {0: run} for name in names}, {}, {}), columns=arms)
    assert len(made) == arms
    assert cell.steps > 1
    assert cell.heads > 1
    per_layer = 16 // cell.heads
    assert cell.values.shape == (70 * per_layer, math.ceil(steps / cell.steps))
    for (layer, head, step), peak in peaks.items():
        assert cell.values[layer * per_layer + head // cell.heads, (step - 1) // cell.steps] == peak
    others = cell.values[cell.values < 1000]
    assert others.size == cell.values.size - len(peaks)
    last = [max(logit(1, head, step) for step in range(1, 1 + cell.steps)) for head in range(16)]
    assert cell.values[per_layer, 0] == max(last[: cell.heads])


@pytest.mark.parametrize(
    ("count", "layers", "per_layer", "steps"),
    [(2, 61, 64, 12), pytest.param(12, 61, 64, 2, marks=pytest.mark.slow), (3, 3, 4, 3000)],
)
def test_every_cell_has_a_pixel(panel, tmp_path, count, layers, per_layer, steps):
    names = [f"muon@tau={1e4 + index:g}" for index in range(count)]
    panel = sized(panel, names, steps, num_layers=layers, num_heads=per_layer, num_dense_layers=1)
    norm = LogNorm(1, 1.3 * (1e4 + count - 1))
    plain = records(steps, layers, per_layer)

    def picture(last):
        runs = {name: {0: plain} for name in names[:-1]} | {names[-1]: {0: last}}
        heads.draw([PanelResult(panel, runs, {}, {"command": "python " * 100})], tmp_path / "heads.png")
        return image.imread(tmp_path / "heads.png")[..., :3]

    without = picture(plain)
    assert without.shape[1] <= 1300
    for place in ((0, 0, 1), (layers - 1, per_layer - 1, steps), (layers // 2, 0, steps // 2)):
        spike = picture(records(steps, layers, per_layer, at={place: 5000.0}))
        changed = spike[(spike != without).any(-1)]
        assert len(changed), place
        assert np.abs(changed - colormaps["inferno"](norm(5000.0))[:3]).max(-1).min() < 0.01


def test_clipped_cells_are_those_above_their_arms_tau_at_steps_that_clipped(panel):
    panel = sized(panel, ["muon", "muonclip@tau=2.2", "muonclip"], steps=9, tau=2.34)
    runs = {
        "muon": {0: records(9)},
        "muonclip@tau=2.2": {0: records(9, clipped=(4, 5, 6, 9))},
        "muonclip": {0: records(9, clipped=(9,))},
    }
    maps, scale = drawn(PanelResult(panel, runs, {}, {}))
    stretches = {arm: marks(axis) for arm, axis in maps.items()}
    assert stretches["muon"] == []
    clipped = [(4, 3.5, 6.5), (4, 8.5, 9.5)]  # layer 1: its heads from 2.0 on; by step 0.01 more
    assert [stretch for stretch in stretches["muonclip@tau=2.2"] if stretch[0] == 4] == []
    assert stretches["muonclip@tau=2.2"] == [(row, *ends) for row in (6, 7) for _, *ends in clipped]
    assert stretches["muonclip"] == [(7, 8.5, 9.5)]
    assert sorted({line.get_xdata()[0] for line in scale.lines}) == [2.2, 2.34]
    assert [text.get_text() for text in scale.texts] == ["τ = 2.2", "2.34"]


def marks(axis):
    """Row, begin and end of each line."""
    segments = [line for each in axis.collections if isinstance(each, LineCollection) for line in each.get_segments()]
    return [(int(line[0, 1]), line[0, 0], line[1, 0]) for line in segments]


def test_no_marks_where_rows_are_too_thin_for_them(panel):
    panel = sized(panel, ["muonclip"], 5, tau=1.0, num_layers=61, num_heads=64, num_dense_layers=1)
    run = records(5, 61, 64, clipped=range(6))
    maps, _ = drawn(PanelResult(panel, {"muonclip": {0: run}}, {}, {}))
    assert marks(maps["muonclip"]) == []


def test_one_colour_scale_for_all(panel):
    cool, hot = sized(panel, ["adamw"], 5), sized(panel, ["muon", "softcap"], 5)
    runs = {"muon": {0: records(5, at={(1, 2, 3): 777.0})}, "softcap": {0: records(5)}}
    maps, scale = drawn(PanelResult(cool, {"adamw": {0: records(5)}}, {}, {}), PanelResult(hot, runs, {}, {}))
    limits = {axis.images[0].get_clim() for axis in maps.values()}
    assert limits == {(1.0, 777.0)}
    assert scale.get_xscale() == "log"
    ticks = [label.get_text() for label in scale.get_xticklabels()]
    assert ticks[ticks.index("≤ 1") + 1] == "3"
    assert scale.get_xlim() == pytest.approx((1.0, 777.0))


def test_τ_is_on_the_scale_where_no_logit_reaches_it(panel):
    maps, scale = drawn(PanelResult(sized(panel, ["muon"], 5, tau=100.0), {"muon": {0: records(5)}}, {}, {}))
    low, high = scale.get_xlim()
    assert low < 100 < high
    maps, scale = drawn(PanelResult(sized(panel, ["muon"], 5, tau=1e-3), {"muon": {0: tiny(records(5))}}, {}, {}))
    assert scale.get_xlim()[0] < 1e-3
    assert scale.get_xlim() == pytest.approx(maps["muon"].images[0].get_clim())


def tiny(run):
    small = [{name: [1e-3 * each for each in of] for name, of in record["max_logits"].items()} for record in run]
    return [record | {"max_logits": logits} for record, logits in zip(run, small, strict=True)]


def test_a_run_that_diverged_says_where(panel):
    panel = sized(panel, ["muon", "muonclip", "muon@steps=4"], 9)
    end = {"loss": math.nan, "max_logits": {}, "clipped_heads": 0}
    runs = {
        "muon": {0: [*records(4), end | {"step": 5}]},
        "muonclip": {0: [end | {"step": 1}]},
        "muon@steps=4": {0: records(4)},
    }
    maps, _ = drawn(PanelResult(panel, runs, {}, {}))
    assert np.isnan(values(maps["muon"])[:, 4:]).all()
    assert np.isnan(values(maps["muonclip"])).all()
    assert values(maps["muonclip"]).shape == (8, 9)
    words = {arm: [(text.get_text(), text.xy[0]) for text in axis.texts] for arm, axis in maps.items()}
    assert words == {"muon": [("diverged", 5)], "muonclip": [("diverged", 1)], "muon@steps=4": []}


def test_runs_that_diverged_at_once_leave_empty_maps(panel):
    end = {"step": 1, "loss": math.nan, "max_logits": {}, "clipped_heads": 0}
    maps, _ = drawn(PanelResult(sized(panel, ["muon"], 9), {"muon": {0: [end]}}, {}, {}))
    assert np.isnan(values(maps["muon"])).all()


def test_the_note_says_what_is_shown(panel):
    panel = sized(panel, ["muon", "softcap"], 2000)
    runs = {"muon": {0: records(2000)}, "softcap": {3: records(2000)}}  # the others are not finished
    with pyplot.rc_context(STYLE):
        figure = heads.figure([PanelResult(panel, runs, {}, {})])
    note = figure.subfigs[0].get_supxlabel()
    pyplot.close(figure)
    assert note == "the first finished seed of each (of 0, 3) · a cell is the maximum over 4 steps · before a soft cap"
