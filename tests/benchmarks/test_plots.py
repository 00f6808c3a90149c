"""The picture of curves shows what it is given, a run that ended early included; its foot says what made it."""

import numpy as np
import pytest
from bench_runs import growing, results_of, with_arms
from matplotlib import colors, image, pyplot

from benchmarks.experiment.arms import ARMS
from benchmarks.records.environment import environment, made_with
from benchmarks.report.plots import draw, draw_summary
from benchmarks.report.style import picture

ENVIRONMENT = {
    "python": "3.12.1",
    "torch": "2.99",
    "muonclip": "9.8",
    "platform": "Abacus-1",
    "cpu": "Babbage",
    "cores": 7,
    "git_commit": "0123456789abcdef",
    "date": "1843-09-05T12:00:00+00:00",
    "command": "python -m benchmarks explosion --out there",
}


@pytest.fixture
def kept(monkeypatch):
    """Figures that would be closed."""
    figures = []
    with monkeypatch.context() as patch:
        patch.setattr(pyplot, "close", figures.append)
        yield figures
    for figure in figures:
        pyplot.close(figure)


def shows(path, colour):
    return bool((np.abs(image.imread(path)[..., :3] - colors.to_rgb(colour)).max(-1) < 0.01).any())


@pytest.mark.parametrize("experiments", [1, 2])
def test_every_arm_has_its_colour(experiment, tmp_path, experiments):
    runs = {"muon": {0: growing(80, 3000), 3: growing(71, 900, diverges=True)}, "muonclip": {0: growing(80, 30)}}
    results = results_of(with_arms(experiment, *runs, steps=80), runs)
    draw([results] * experiments, tmp_path / "curves.png")
    assert shows(tmp_path / "curves.png", ARMS["muon"].colour)
    assert shows(tmp_path / "curves.png", ARMS["muonclip"].colour)


@pytest.mark.parametrize("dark", [False, True])
def test_the_summary_has_two_panels_on_a_page_of_its_kind(experiment, tmp_path, kept, dark):
    runs = {"muon": {0: growing(80, 3000)}, "muonclip": {0: growing(80, 30)}}
    results = results_of(with_arms(experiment, *runs, steps=80), runs)
    draw_summary([results, results], tmp_path / "summary.png", dark=dark)
    titles = [axis.get_title(loc="left") for part in kept[0].subfigs for axis in part.axes]
    assert [title.splitlines()[-1].split(",")[0] for title in titles] == ["Maximum attention logit", "Validation loss"]
    assert all(experiment.title in title for title in titles)
    assert shows(tmp_path / "summary.png", ARMS["muonclip"].colour)
    drawn = image.imread(tmp_path / "summary.png")
    assert drawn.shape[1] <= 640
    assert drawn[0, 0, 3] == (0 if dark else 1)
    assert (drawn[..., :3][drawn[..., 3] > 0.5].mean() > 0.9) != dark


@pytest.mark.parametrize("arms", [("muonclip", "softcap"), tuple(ARMS)])
def test_the_legend_names_arms_and_seeds(experiment, tmp_path, kept, arms):
    runs = {arm: {0: growing(8, 30)} for arm in arms}
    draw([results_of(with_arms(experiment, *arms), runs)], tmp_path / "curves.png")
    axis, part = kept[0].axes[0], kept[0].subfigs[0]
    (legend,) = [*part.legends, *filter(None, [axis.get_legend()])]
    labels = [text.get_text() for text in legend.get_texts()]
    assert len(labels) == len(arms) + 1  # the seeds
    assert "Muon, soft cap, rate 0.01 (changes the model)" in labels


def test_made_with_follows_what_was_recorded():
    said = made_with(ENVIRONMENT)
    for words in (ENVIRONMENT["command"], "1843-09-05", "9.8", "0123456", "2.99", "3.12.1", "7 cores of Babbage"):
        assert words in said
    assert "T12" not in said
    assert "with changes" in made_with(ENVIRONMENT | {"git_commit": "0123456789abcdef+"})
    assert "commit" not in made_with(ENVIRONMENT | {"git_commit": None})
    assert "Engine No. 2" in made_with(ENVIRONMENT | {"gpu": "Engine No. 2"})
    assert made_with({}) == ""


def test_made_with_reads_what_the_harness_records():
    made = environment()
    names = ("python", "torch", "muonclip", "cpu", "cores", "command")
    assert all(str(made[name]) in made_with(made) for name in names)
    in_jax = environment(framework="jax")
    assert all(f"{name} {in_jax[name]}" in made_with(in_jax) for name in ("jax", "jaxlib", "optax"))
    assert "torch" not in made_with(in_jax | {"command": ""})
    assert "jaxlib" not in made_with(made)


def foot(tmp_path, kept, environments, size=(9, 3)):
    """The figure with its axis, and the text at its foot."""
    with picture(tmp_path / "picture.png", environments, "Title", figsize=size) as figure:
        axis = figure.subplots()
    return axis, figure, figure.get_supxlabel()


@pytest.mark.parametrize("width", [6.0, 12.0])
@pytest.mark.parametrize("command", ["python", "python " + r"--data W$\W/$W " * 40, "python " + "W" * 400])
def test_the_foot_is_drawn_inside_the_picture(tmp_path, kept, width, command):
    made = ENVIRONMENT | {"command": command}
    axis, figure, text = foot(tmp_path, kept, [made] * 2, (width, 4))
    (artist,) = [each for each in figure.texts if each.get_text() == text]
    box, below = artist.get_window_extent(), axis.get_tightbbox()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    assert 0 <= box.y0 < box.y1 <= below.y0
    assert "".join(text.split()).replace("·", "") == "".join(made_with(made).split()).replace("·", "")  # once, and all


def test_different_environments_have_a_line_each(tmp_path, kept):
    later = ENVIRONMENT | {"date": "1843-09-05T18:00:00+00:00"}  # the same day
    text = foot(tmp_path, kept, [ENVIRONMENT, later, ENVIRONMENT | {"cores": 8}], (12, 4))[2]
    assert text == f"{made_with(ENVIRONMENT)}\n{made_with(ENVIRONMENT | {'cores': 8})}"


def test_the_foot_takes_no_room_from_the_axes(tmp_path, kept):
    without, long = (
        foot(tmp_path, kept, [{"command": command}])[0].get_window_extent().height for command in ("", "python " * 300)
    )
    assert long >= without
