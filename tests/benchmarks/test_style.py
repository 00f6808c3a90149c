"""What stands at the foot of a picture, and that it stays inside."""

import pytest
from matplotlib import pyplot

from benchmarks.records.environment import environment
from benchmarks.report.style import STYLE, footer, save

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


def test_the_footer_tells_what_a_picture_was_made_with():
    assert footer(ENVIRONMENT) == (
        "python -m benchmarks explosion --out there · 1843-09-05 · "
        "muonclip 9.8 (commit 0123456), torch 2.99, Python 3.12.1 · 7 cores of Babbage"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"git_commit": "0123456789abcdef+"}, "muonclip 9.8 (commit 0123456 with changes), torch"),
        ({"git_commit": None}, "muonclip 9.8, torch"),
        ({"gpu": "Engine No. 2", "cuda": "1.0"}, " · Engine No. 2, 7 cores of Babbage"),
    ],
)
def test_the_footer_follows_what_was_recorded(changes, words):
    assert words in footer(ENVIRONMENT | changes)


def test_nothing_recorded_is_nothing_said():
    assert footer({}) == ""


def test_it_reads_what_the_harness_records():
    made = environment()
    assert all(str(made[name]) in footer(made) for name in ("python", "torch", "muonclip", "cpu", "cores", "command"))


@pytest.mark.parametrize("width", [6.0, 12.0])
@pytest.mark.parametrize("command", ["python", "python " + r"--data W$\W/$W " * 40, "python " + "W" * 400])
def test_the_footer_is_drawn_inside_the_picture(tmp_path, monkeypatch, width, command):
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    with pyplot.rc_context(STYLE):
        figure = pyplot.figure(figsize=(width, 4), layout="constrained")
        axis = figure.subplots()
        save(figure, tmp_path / "picture.png", [ENVIRONMENT | {"command": command}] * 2)
    monkeypatch.undo()
    text = figure.get_supxlabel()
    (artist,) = [each for each in figure.texts if each.get_text() == text]
    box, below = artist.get_window_extent(), axis.get_tightbbox()
    assert below is not None
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    assert 0 <= box.y0 < box.y1 <= below.y0
    shown = "".join(text.split()).replace("·", "")
    assert shown == "".join(footer(ENVIRONMENT | {"command": command}).split()).replace("·", "")  # once, and all of it
    pyplot.close(figure)


def test_different_environments_have_a_line_each(tmp_path, monkeypatch):
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    with pyplot.rc_context(STYLE):
        figure = pyplot.figure(figsize=(12, 4), layout="constrained")
        figure.subplots()
        later = ENVIRONMENT | {"date": "1843-09-05T18:00:00+00:00"}  # the same day
        save(figure, tmp_path / "picture.png", [ENVIRONMENT, later, ENVIRONMENT | {"cores": 8}])
    monkeypatch.undo()
    assert figure.get_supxlabel() == f"{footer(ENVIRONMENT)}\n{footer(ENVIRONMENT | {'cores': 8})}"
    pyplot.close(figure)


def test_the_footer_takes_no_room_from_the_axes(tmp_path, monkeypatch):
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    heights = {}
    for command in ("", "python " * 300):
        with pyplot.rc_context(STYLE):
            figure = pyplot.figure(figsize=(9, 3), layout="constrained")
            axis = figure.subplots()
            save(figure, tmp_path / "picture.png", [{"command": command}])
        heights[command] = axis.get_window_extent().height
    monkeypatch.undo()
    pyplot.close("all")
    without, long = heights.values()
    assert long >= without
