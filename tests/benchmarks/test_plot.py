"""The picture shows what it is given, a run that ended early included."""

import math
from dataclasses import replace

import numpy as np
import pytest
from matplotlib import colors, image, pyplot

from benchmarks.experiment.arms import ARMS
from benchmarks.records.summary import PanelResult
from benchmarks.report.plots import draw


def records(steps, top):
    for step in range(1, steps + 1):
        record = {
            "step": step,
            "loss": 3.0 + (step == 60),
            "max_logits": {"a": [top * step / steps]},
            "clipped_heads": 1,
        }
        yield record | ({"val_loss": 3.0} if step % 10 == 0 else {})


def shows(picture, colour):
    return bool((np.abs(picture[..., :3] - colors.to_rgb(colour)).max(-1) < 0.01).any())


@pytest.mark.parametrize("panels", [1, 2])
def test_every_arm_has_its_colour(panel, tmp_path, panels):
    runs = {"muon": {0: list(records(80, 3000)), 3: list(records(70, 900))}, "muonclip": {0: list(records(80, 30))}}
    runs["muon"][3] += [{"step": 71, "loss": math.nan, "max_logits": {}, "clipped_heads": 0, "val_loss": math.nan}]
    draw([PanelResult(panel, runs, {})] * panels, tmp_path / "curves.png")
    picture = image.imread(tmp_path / "curves.png")
    assert shows(picture, ARMS["muon"].colour)
    assert shows(picture, ARMS["muonclip"].colour)
    draw([PanelResult(panel, {"muonclip": runs["muonclip"]}, {})] * panels, tmp_path / "one.png")


@pytest.mark.parametrize("arms", [("muonclip", "softcap"), tuple(ARMS)])
def test_the_legend_tells_which_arms_change_the_model(every_arm, tmp_path, monkeypatch, arms):
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    panel = replace(every_arm, arms=arms)
    draw([PanelResult(panel, {arm: {0: list(records(80, 30))} for arm in arms}, {})], tmp_path / "curves.png")
    monkeypatch.undo()
    axis = figures[0].axes[0]
    (legend,) = [*figures[0].subfigs[0].legends, *filter(None, [axis.get_legend()])]
    labels = [text.get_text() for text in legend.get_texts()]
    assert len(labels) == len(arms) + 1  # the seeds
    assert "MuonClip, rate 0.01" in labels
    assert "Muon, soft cap, rate 0.01 (changes the model)" in labels
    assert axis.get_title("left").endswith("(before a soft cap)")
    pyplot.close(figures[0])
