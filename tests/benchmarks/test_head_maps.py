"""The picture of heads draws every cell of its maps, on one scale, and marks what the clip rescaled."""

import math
from dataclasses import replace

import numpy as np
import pytest
from bench_runs import heads, results_of, with_arms
from matplotlib import colormaps, image, pyplot
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm

from benchmarks.report import head_maps
from benchmarks.report.style import STYLE


def made(experiment, runs, steps, tau=50.0, **model):
    sized = replace(experiment, model=replace(experiment.model, **model))
    return results_of(with_arms(sized, *runs, steps=steps, tau=tau), runs)


def drawn(*results):
    """The maps by arm, and the colour scale."""
    with pyplot.rc_context(STYLE):
        figure = pyplot.figure(figsize=(10.8, 1), layout="constrained")
        head_maps.draw_maps(figure, results)
        figure.canvas.draw()
    labelled = {axis.get_label(): axis for axis in figure.axes if axis.images}
    (scale,) = [axis for axis in figure.axes if axis.get_label() == "scale"]
    pyplot.close(figure)
    return labelled, scale


def values(axis):
    return axis.images[0].get_array().filled(np.nan)


def marks(axis):
    """Row, begin and end of each line."""
    segments = [line for each in axis.collections if isinstance(each, LineCollection) for line in each.get_segments()]
    return [(int(line[0, 1]), line[0, 0], line[1, 0]) for line in segments]


def test_maps_are_at_their_places(experiment):
    runs = {"muon": {0: heads(9)}, "muonclip": {0: heads(5), 3: heads(9)}}
    maps, _ = drawn(made(experiment, runs, 9))
    assert maps["muon"].images[0].get_extent() == [0.5, 9.5, 8, 0]  # step s from s − ½ to s + ½, the first layer on top
    assert [label.get_text() for label in maps["muon"].get_yticklabels()] == ["layer 0", "layer 1"]
    assert np.isfinite(values(maps["muon"])).all()
    assert np.isnan(values(maps["muonclip"])[:, 5:]).all()  # its first seed
    assert maps["muonclip"].get_xlim() == (0.5, 9.5)


@pytest.mark.parametrize(("count", "layers", "per_layer", "steps"), [(2, 61, 64, 4), (3, 3, 4, 1500)])
def test_every_cell_has_a_pixel(experiment, tmp_path, count, layers, per_layer, steps):
    names = [f"muon@tau={1e4 + index:g}" for index in range(count)]
    norm = LogNorm(1, 1.3 * (1e4 + count - 1))
    plain = heads(steps, layers, per_layer)

    def shown(last):
        runs = {name: {0: plain} for name in names[:-1]} | {names[-1]: {0: last}}
        sizes = {"num_layers": layers, "num_heads": per_layer, "num_dense_layers": 1}
        results = made(experiment, runs, steps, **sizes)
        head_maps.draw([results], tmp_path / "heads.png")
        return image.imread(tmp_path / "heads.png")[..., :3]

    without = shown(plain)
    assert without.shape[1] <= 1300
    places = ((0, 0, 1), (layers - 1, per_layer - 1, steps), (layers // 2, 0, steps // 2))
    spike = shown(heads(steps, layers, per_layer, at=dict.fromkeys(places, 5000.0)))
    at = np.argwhere(
        (np.abs(spike - colormaps["inferno"](norm(5000.0))[:3]).max(-1) < 0.01) & (spike != without).any(-1)
    )
    separate = [at[0]]
    for place in at:
        if all(np.abs(place - other).max() > 3 for other in separate):
            separate.append(place)
    assert len(separate) >= len(places)


def test_clipped_cells_are_marked(experiment):
    runs = {
        "muon": {0: heads(9)},
        "muonclip@tau=2.2": {0: heads(9, clipped=(4, 5, 6, 9))},
        "muonclip": {0: heads(9, clipped=(9,))},
    }
    maps, scale = drawn(made(experiment, runs, 9, tau=2.34))
    assert marks(maps["muon"]) == []
    assert marks(maps["muonclip@tau=2.2"]) == [(row, *ends) for row in (6, 7) for ends in ((3.5, 6.5), (8.5, 9.5))]
    assert marks(maps["muonclip"]) == [(7, 8.5, 9.5)]
    assert sorted({line.get_xdata()[0] for line in scale.lines}) == [2.2, 2.34]


def test_no_marks_where_rows_are_too_thin_for_them(experiment):
    runs = {"muonclip": {0: heads(5, 61, 64, clipped=range(6))}}
    maps, _ = drawn(made(experiment, runs, 5, tau=1.0, num_layers=61, num_heads=64, num_dense_layers=1))
    assert marks(maps["muonclip"]) == []


def test_one_colour_scale_for_all(experiment):
    cool = made(experiment, {"adamw": {0: heads(5)}}, 5)
    hot = made(experiment, {"muon": {0: heads(5, at={(1, 2, 3): 777.0})}, "softcap": {0: heads(5)}}, 5)
    maps, scale = drawn(cool, hot)
    assert {axis.images[0].get_clim() for axis in maps.values()} == {(1.0, 777.0)}
    assert scale.get_xscale() == "log"
    assert scale.get_xlim() == pytest.approx((1.0, 777.0))


@pytest.mark.parametrize(("tau", "size"), [(100.0, 1.0), (1e-3, 1e-3)])
def test_τ_is_on_the_scale_wherever_the_logits_are(experiment, tau, size):
    run = heads(5)
    for record in run:
        record["max_logits"] = {name: [size * each for each in of] for name, of in record["max_logits"].items()}
    maps, scale = drawn(made(experiment, {"muon": {0: run}}, 5, tau=tau))
    low, high = scale.get_xlim()
    assert low < tau < high
    assert scale.get_xlim() == pytest.approx(maps["muon"].images[0].get_clim())


def test_a_run_that_diverged_says_where(experiment):
    end = {"loss": math.nan, "max_logits": {}, "clipped_heads": 0}
    runs = {
        "muon": {0: [*heads(4), end | {"step": 5}]},
        "muonclip": {0: [end | {"step": 1}]},
        "muon@steps=4": {0: heads(4)},
    }
    maps, _ = drawn(made(experiment, runs, 9))
    assert np.isnan(values(maps["muon"])[:, 4:]).all()
    assert np.isnan(values(maps["muonclip"])).all()
    words = {arm: [text.xy[0] for text in axis.texts] for arm, axis in maps.items()}
    assert words == {"muon": [5], "muonclip": [1], "muon@steps=4": []}
