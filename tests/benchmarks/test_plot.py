"""The picture shows what it is given, a run that ended early included."""

import math

import numpy as np
import pytest
from matplotlib import colors, image

from benchmarks.arms import ARMS
from benchmarks.plot import draw
from benchmarks.summary import PanelResult


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
