"""The pictures of the long evidence draw the numbers they are given, at their places."""

import copy
import itertools
import math

import numpy as np
import pytest
from matplotlib import colors, pyplot
from matplotlib.figure import Figure

from benchmarks.experiment.arms import ARMS
from benchmarks.records import metrics
from benchmarks.studies import evidence_plots
from benchmarks.studies.evidence_plots import PICTURES

BLUE, ORANGE, GREEN = (ARMS[arm].colour for arm in ("adamw", "muon", "muonclip"))


@pytest.fixture
def frame(experiment):
    return {"config": experiment.to_json(), "environment": {"command": "python -m benchmarks"}, "unit": "bits per byte"}


def arm(label, losses, peaks, best, usable):
    rates = [{"lr": lr, "seeds": [0, 3], "loss": loss, "peak_logit": peaks[lr]} for lr, loss in losses.items()]
    return {"label": label, "rates": rates, "best_lr": best, "usable": usable}


@pytest.fixture
def sweep(frame):
    muon = {5e-3: [2.25, 2.75], 1e-2: [2.0, 2.5], 2e-2: [3.0, math.inf]}
    loud, held = ({5e-3: [3.0, 5.0], 1e-2: [20.0, 40.0], 2e-2: [top, top]} for top in (900.0, 35.0))
    arms = {
        "adamw": arm(
            "AdamW", {1e-3: [3.0, 2.0], 2e-3: [2.5, 3.5]}, {1e-3: [4.0, 6.0], 2e-3: [5.0, 5.0]}, 1e-3, [1e-3] * 2
        ),
        "muon": arm("Muon", muon, loud, 1e-2, [5e-3, 1e-2]),
        "muonclip": arm("MuonClip", muon | {2e-2: [2.5, 3.0]}, held, 1e-2, [5e-3, 2e-2]),
    }
    return frame | {"tau": 30.0, "usable_margin": 0.25, "arms": arms}


@pytest.fixture
def efficiency(frame):
    budgets = [(0.4, [2.9, 3.0]), (0.6, [2.4, 2.5]), (1.0, [2.0, math.nan])]
    return frame | {
        "adamw": {"lr": 1e-3, "steps": 300, "loss": [2.5, 2.75]},
        "muon": {"lr": 1e-2, "budgets": [{"share": s, "steps": round(300 * s), "loss": loss} for s, loss in budgets]},
        "seeds": [0, 3],
        "share": {"mean": 0.55, "low": 0.525, "high": 0.575, "per_seed": [0.54, 0.56]},
        "confidence": 0.9,
        "reference": 0.52,
    }


@pytest.fixture
def cost(frame):
    def row(tau, differences, low, high, clipped):
        mean = sum(differences) / len(differences)
        return {
            "name": f"muonclip@tau={tau}",
            "label": f"MuonClip, τ = {tau}",
            "loss": [2.0 + each for each in differences],
            "difference": {"mean": mean, "low": low, "high": high, "per_seed": differences},
            "heads_ever_clipped": clipped,
            "clipped_head_steps": [1, 2],
        }

    arms = [
        row(5, [0.25, 0.75], -0.125, 1.125, [0.5, 1.0]),
        row(10, [-0.125, -0.375], -1.0, 0.5, [0.25, 0.25]),
        row(20, [0.5, math.nan], math.nan, math.nan, [0.0, 0.125]),
        row(30, [0.0, 0.0], 0.0, 0.0, [0.0, 0.0]),
        row(40, [0.5], math.nan, math.nan, [0.0]),
    ]
    return frame | {"baseline": {"label": "Muon", "lr": 0.01, "loss": [2.0, 2.0]}, "arms": arms, "confidence": 0.9}


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """The figure of a picture; its PNG is written where it is asked for, which takes most of the time."""
    kept = []

    def draw(name, value, *, written=False):
        with monkeypatch.context() as patch:
            patch.setattr(pyplot, "close", kept.append)
            if not written:
                patch.setattr(Figure, "savefig", lambda *args, **kwargs: None)
            evidence_plots.draw(name, value, tmp_path / f"{name}.png")
        return kept[-1]

    yield draw
    for figure in kept:
        pyplot.close(figure)


def lines(axis, colour=None, marker=None, style=None):
    """The points of the lines that look so."""
    return [
        np.asarray(line.get_data(), dtype=float).T.tolist()
        for line in axis.lines
        if len(line.get_xdata())  # the others are of the legend
        and (colour is None or colors.same_color(line.get_color(), colour))
        and (marker is None or line.get_marker() == marker)
        and (style is None or line.get_linestyle() == style)
    ]


def texts(axis):
    return [text.get_text() for text in axis.texts]


def same(points, expected):
    return np.array_equal(np.array(points), np.array(expected, dtype=float), equal_nan=True)


def test_sweep_draws_means_seeds_and_the_best_rate(sweep, drawn):
    losses, _, logits = drawn("sweep", sweep).axes
    means, dots, ring = lines(losses, BLUE)
    assert same(means, [[1e-3, 2.5], [2e-3, 3.0]])
    assert dots == [[1e-3, 3.0], [1e-3, 2.0], [2e-3, 2.5], [2e-3, 3.5]]
    assert ring == [[1e-3, 2.5]]
    (means, dots) = lines(logits, BLUE)
    assert same(means, [[1e-3, 5.0], [2e-3, 5.0]])
    assert dots == [[1e-3, 4.0], [1e-3, 6.0], [2e-3, 5.0], [2e-3, 5.0]]
    assert (losses.get_xscale(), losses.get_yscale()) == ("log", "linear")
    assert (logits.get_xscale(), logits.get_yscale()) == ("log", "log")
    assert losses.get_xlim() == logits.get_xlim()


def test_a_seed_that_diverged_is_at_the_top_and_breaks_the_line(sweep, drawn):
    losses, _, _ = drawn("sweep", sweep).axes
    means, dots, lost, _ = lines(losses, ORANGE)
    assert same(means, [[5e-3, 2.5], [1e-2, 2.25], [2e-2, math.inf]])
    assert [2e-2, 3.0] in dots
    assert len(dots) == 5
    assert lost == [[2e-2, 1.0]]
    (cross,) = [line for line in losses.lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert cross.get_transform() == losses.get_xaxis_transform()
    assert legend(losses) == ["AdamW", "Muon", "MuonClip", "best rate", "diverged"]
    sweep["arms"]["muon"]["rates"][-1]["loss"] = [3.0, 3.0]
    assert legend(drawn("sweep", sweep).axes[0]) == ["AdamW", "Muon", "MuonClip", "best rate"]


def legend(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_an_arm_over_another_is_dashed_and_smaller(sweep, drawn):
    def looks(axes):
        return [
            {line.get_color(): (line.get_linestyle(), line.get_markersize()) for line in axes[0].lines if keep(line)}
            for keep in (lambda line: len(line.get_xdata()) == 3, lambda line: line.get_fillstyle() == "none")
        ]

    means, rings = looks(drawn("sweep", sweep).axes)
    assert {colour: style for colour, (style, _) in means.items()} == {ORANGE: "-", GREEN: "--"}
    assert rings[GREEN][1] < rings[ORANGE][1] == rings[BLUE][1]
    for rate in sweep["arms"]["muonclip"]["rates"]:
        rate["loss"] = [each + 0.125 for each in rate["loss"]]
    means, rings = looks(drawn("sweep", sweep).axes)
    assert {colour: style for colour, (style, _) in means.items()} == {ORANGE: "-", GREEN: "-"}
    assert rings[GREEN] == rings[ORANGE]


def test_usable_rates_are_bars_of_their_own(sweep, drawn):
    _, usable, logits = drawn("sweep", sweep).axes
    assert lines(usable, BLUE) == [[[1e-3, 0], [1e-3, 0]]]
    assert lines(usable, ORANGE) == [[[5e-3, 1], [1e-2, 1]]]
    assert lines(usable, GREEN) == [[[5e-3, 2], [2e-2, 2]]]
    assert usable.get_title("left") == "Usable rates: within 0.25 bits per byte of the best"
    assert texts(logits) == ["τ = 30"]
    assert {line.get_ydata()[0] for line in logits.lines if list(line.get_xdata()) == [0, 1]} == {30.0}


def test_τ_stays_in_sight_where_logits_do_not_reach_it(sweep, drawn):
    logits = drawn("sweep", sweep | {"tau": 1e5}).axes[2]
    assert logits.get_ylim()[1] > 1e5


def test_efficiency_draws_budgets_target_and_crossing(efficiency, drawn):
    (axis,) = drawn("efficiency", efficiency).axes
    means, dots, lost = lines(axis, ORANGE)
    assert same(means, [[0.4, 2.95], [0.6, 2.45], [1.0, math.nan]])
    assert dots == [[0.4, 2.9], [0.4, 3.0], [0.6, 2.4], [0.6, 2.5], [1.0, 2.0]]
    assert lost == [[1.0, 1.0]]
    assert lines(axis, BLUE) == [[[0, 2.625], [1, 2.625]]]
    (band,) = axis.patches
    assert band.get_bbox().intervaly.tolist() == [2.5, 2.75]
    interval, seeds, mean = lines(axis, "#333333")
    assert interval == [[0.525, 2.625], [0.575, 2.625]]
    assert seeds == [[0.54, 2.625], [0.56, 2.625]]
    assert mean == [[0.55, 2.625]]
    assert texts(axis) == ["55% of AdamW's tokens\n(90% interval 52% to 57%, 2 seeds)"]
    assert axis.texts[0].xy == (0.55, 2.625)
    assert legend(axis)[2] == "52%: Moonlight (arXiv 2502.16982), share of AdamW's training FLOPs"
    assert [[0.52, 0], [0.52, 1]] in lines(axis)
    assert axis.get_xscale() == "log"
    low, high = axis.get_xlim()
    assert low < 0.4 < 1 < high


@pytest.mark.parametrize(
    ("adamw", "verdict"),
    [
        ([1.5, 1.75], "not reached"),
        ([3.0, 3.0], "reached with less"),
        ([2.5, 1.75], "not crossed in every seed"),
        ([3.0, 2.75], "not crossed in every seed"),
    ],
)
def test_efficiency_says_why_there_is_no_share(efficiency, adamw, verdict, drawn):
    efficiency["share"] = None
    efficiency["adamw"]["loss"] = adamw
    (axis,) = drawn("efficiency", efficiency).axes
    assert [text.endswith(verdict) for text in texts(axis)] == [True]
    assert lines(axis, "#333333") == []


def test_one_seed_has_no_interval(efficiency, cost, drawn):
    efficiency["share"] = {"mean": 0.55, "low": math.nan, "high": math.nan, "per_seed": [0.55]}
    assert texts(drawn("efficiency", efficiency).axes[0]) == ["55% of AdamW's tokens"]


def test_clip_cost_draws_a_row_per_threshold(cost, drawn):
    axis, words = drawn("clip-cost", cost).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == [
        f"MuonClip, τ = {tau}" for tau in (5, 10, 20, 30, 40)
    ]
    rows = {row: [line for line in lines(axis, GREEN) if line and round(line[0][1]) == row] for row in range(5)}
    assert rows[0] == [[[-0.125, 0], [1.125, 0]], [[0.5, 0]], [[0.25, 0.24], [0.75, 0.24]]]
    assert rows[1][:2] == [[[-1.0, 1], [0.5, 1]], [[-0.25, 1]]]
    assert rows[2][2:] == [[[0.5, 2.24]], [[1, 2]]]  # the other seed: × at the right edge
    (cross,) = [line for line in axis.lines if line.get_marker() == "x"]
    assert cross.get_transform() == axis.get_yaxis_transform()
    assert rows[3] == [[[0, 3], [0, 3]], [[0, 3]], [[0, 3.24], [0, 3.24]]]
    assert [[0, 0], [0, 1]] in lines(axis, "#333333")
    assert axis.get_ylim() == (4.5, -0.5)  # the first row on top
    assert words.get_ylim() == axis.get_ylim()
    said = {(text.get_position()[0], text.get_position()[1]): text.get_text() for text in words.texts}
    column = sorted({x for x, _ in said})
    assert [said[column[0], row] for row in range(5)] == [
        "+0.500 (−0.125 to +1.125)",
        "−0.250 (−1.000 to +0.500)",
        "not finite",
        "+0.000",
        "+0.500",
    ]
    assert [said[column[1], row] for row in range(5)] == ["50% to 100%", "25%", "0% to 12%", "0%", "0%"]
    assert axis.get_title("left") == "Mean, 90% interval and seeds"
    assert axis.get_xlabel() == "final validation loss minus that of Muon, rate 0.01, bits per byte (right: worse)"


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_made_from_json(request, tmp_path, name, drawn):
    value = request.getfixturevalue(name.removeprefix("clip-"))
    stored = metrics.to_json(copy.deepcopy(value))
    assert stored != value  # what is not finite is a string
    expected = [lines(axis) for axis in drawn(name, value).axes]
    figure = drawn(name, stored, written=True)
    assert repr([lines(axis) for axis in figure.axes]) == repr(expected)
    assert figure.get_supxlabel() == "python -m benchmarks"
    height, width, _ = pyplot.imread(tmp_path / f"{name}.png").shape
    assert height < width <= 1300
    inside(figure)


def inside(figure):
    """All that axes and words take up is in the picture, and no words cover others."""
    figure.draw_without_rendering()
    for axis in figure.axes:
        for box in [axis.get_tightbbox(), *(text.get_window_extent() for text in axis.texts)]:
            assert 0 <= box.x0 <= box.x1 <= figure.bbox.x1
            assert 0 <= box.y0 <= box.y1 <= figure.bbox.y1
        for text, other in itertools.combinations(axis.texts, 2):
            assert not text.get_window_extent().overlaps(other.get_window_extent()), (text, other)
