"""The page says what the numbers say, whatever they and the names are; the command reads what is finished."""

import json
import math
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from bench_runs import growing, results_of, store, with_arms
from plotly.offline import get_plotlyjs

from benchmarks.__main__ import main
from benchmarks.records.folders import CONFIG
from benchmarks.report import head_maps, page, plots
from benchmarks.report.redraw import COMPARISON


@pytest.fixture(scope="module")
def records():
    return {
        "muon": {0: growing(8, 500.0), 3: growing(8, 900.0)},
        "muonclip": {0: growing(8, 12.0), 3: growing(8, 13.0)},
    }


@pytest.fixture(scope="module")
def shared(experiment):
    """The experiment of every page here."""
    return with_arms(experiment, "muon", "muonclip", tau=10.0)


@pytest.fixture(scope="module")
def hot(shared, records):
    return results_of(shared, records, {"torch": "2.13", "command": "python -m benchmarks explosion"})


class Parts(HTMLParser):
    """Text, attributes and scripts of a page."""

    def __init__(self, text):
        super().__init__()
        self.text, self.scripts, self.attributes, self.tags, self.inside = [], [], [], [], ""
        self.feed(text)
        self.figures = [json.loads(script) for script in self.scripts if script.startswith("{")]

    def handle_starttag(self, tag, attrs):
        self.inside = tag
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attrs]
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.text.append(data)

    def arms(self):
        return {trace["meta"].get("arm") for figure in self.figures for trace in figure["data"]} - {None}


def read(*results, **options):
    return Parts(page.page(results, **options))


def test_the_page_asks_nothing_of_a_network(hot):
    parts = read(hot)
    assert get_plotlyjs() in parts.scripts
    own = [script for script in parts.scripts if script != get_plotlyjs()]
    assert not [(tag, name, value) for tag, name, value in parts.attributes if name in ("src", "href", "action")]
    policy = next(value for tag, name, value in parts.attributes if tag == "meta" and value and "default-src" in value)
    assert policy.startswith("default-src 'none'")
    for words in ("http:", "https:", "url(", "@import", "fetch(", "XMLHttp"):
        assert not any(words in script for script in own)


def test_names_cannot_become_markup(hot):
    evil = '</script><script>alert("1")</script><b>&amp;'
    data = replace(hot.experiment.data, title=evil, path=f"/{evil}")
    environment = {"command": evil, "cpu": evil, "cores": 2}
    wicked = replace(hot, experiment=replace(hot.experiment, title=evil, data=data), environment=environment)
    for results in ([wicked], [wicked, hot]):
        parts, plain = read(*results), read(*[hot] * len(results))
        assert len(parts.scripts) == len(plain.scripts)
        assert parts.tags.count("b") == plain.tags.count("b")
        assert "".join(parts.text).count("alert") >= 5


def test_numbers_that_are_not_finite(shared):
    runs = {"muon": {0: growing(6, math.inf, diverges=True), 3: growing(8, 20.0)}, "adamw": {0: growing(8, 5.0)}}
    parts = read(results_of(shared, runs))
    text = "\n".join(parts.text)
    assert "NaN" in text
    assert "nan" not in text.split()
    assert "Infinity" not in "".join(parts.scripts[:3])
    assert "Muon, seed 0, diverged: it ended at step 6 of 8." in text
    assert "AdamW, seed 3, is not finished and left out." in text
    assert parts.figures[0]["layout"]["yaxis"]["range"][1] == pytest.approx(math.log10(20), abs=0.1)


def test_a_finished_run_is_said_to_be_neither_diverged_nor_missing(hot):
    text = "".join(read(hot).text)
    assert "diverged" not in text
    assert "not finished" not in text


def test_the_page_holds_what_it_promises(hot):
    parts = read(hot, title="A title")
    text = "\n".join(parts.text)
    charts = ["Maximum attention logit", "Train loss", "Validation loss", "Clipped heads", "Attention entropy"]
    for words in ("A title", hot.experiment.subject, "above τ", "900.0", *charts, "Query weights", "Key weights",
                  "Update size", "python -m benchmarks explosion", hot.experiment.data.sha256, "training.weight_decay"):  # fmt: skip  # noqa: E501
        assert words in text, words
    assert len(parts.figures) == 8 + 2
    assert parts.arms() == {"muon", "muonclip"}


def test_lines_are_those_of_the_charts(hot):
    logits = read(hot).figures[0]
    seeds, mean = logits["data"][:2], logits["data"][2]
    assert [trace["meta"]["arm"] for trace in logits["data"]] == ["muon"] * 3 + ["muonclip"] * 3
    assert [trace["y"][-1] for trace in seeds] == [500.0, 900.0]
    assert mean["y"][-1] == 700.0
    assert mean["line"]["width"] > seeds[0]["line"]["width"]
    assert mean["line"]["color"] == hot.experiment.arm("muon").colour
    assert [shape["y0"] for shape in logits["layout"]["shapes"]] == [10.0]
    assert logits["layout"]["yaxis"]["type"] == "log"


def test_a_single_measurement_is_a_point(shared):
    modes = [
        figure["data"][0].get("mode") for figure in read(results_of(shared, {"muon": {0: growing(3, 5.0)}})).figures
    ]
    assert modes[:8] == ["lines", "lines", "markers", "lines", "markers", "markers", "markers", "markers"]


def test_maps_hold_every_head_of_every_seed(hot):
    first = read(hot).figures[8]["data"]
    assert [(trace["type"], trace["meta"]["seed"], trace["visible"]) for trace in first] == [
        ("heatmap", "0", True),
        ("heatmap", "3", False),
    ]
    assert first[0]["y"][6] == "layer 1, head 2"
    assert first[0]["customdata"][6] == pytest.approx([500 * step / 8 for step in range(1, 9)])
    assert first[0]["z"][6][-1] == pytest.approx(math.log10(500), rel=1e-3)
    assert first[1]["customdata"][6][-1] == 900.0
    assert first[0]["customdata"][7] == [-1.0] * 8


def test_maps_of_shorter_runs_end_early(shared):
    runs = {"muon": {0: growing(6, 50.0, diverges=True)}, "muonclip@steps=4": {0: growing(4, 5.0)}}
    diverged, short = (figure["data"][0] for figure in read(results_of(shared, runs)).figures[8:])
    assert [value is None for value in diverged["z"][6]] == [False] * 5 + [True] * 3
    assert [value is None for value in short["z"][6]] == [False] * 4 + [True] * 4


def test_long_runs_stay_small_and_keep_their_peaks(shared):
    records = growing(2000, 20.0)
    records[1210]["max_logits"]["layers.0.attn"][1] = 777.0
    long = results_of(with_arms(shared, "muon", steps=2000), {"muon": {0: records, 3: records}})
    text = page.page([long])
    figures = Parts(text).figures
    for trace in figures[0]["data"]:
        assert len(trace["x"]) <= page.POINTS
        assert (1211, 777.0) in zip(trace["x"], trace["y"], strict=True)
    heads = figures[8]["data"][0]
    assert len(heads["x"]) <= page.COLUMNS
    assert max(filter(None, heads["customdata"][1])) == 777.0
    assert len(text) < len(get_plotlyjs()) + 400_000


def test_maps_of_many_heads_have_fewer_columns(shared):
    records = growing(200, 20.0)
    for record in records:
        record["max_logits"] = {f"layers.{layer}.attn": [1.0] * 20 for layer in range(20)}
    heads = read(results_of(with_arms(shared, "muon", steps=200), {"muon": {0: records}})).figures[8]["data"][0]
    assert len(heads["z"]) == 400
    assert len(heads["z"]) * len(heads["x"]) <= page.CELLS


def test_an_arm_that_changes_the_model_says_so(shared):
    text = "".join(read(results_of(shared, {"softcap": {0: growing(8, 20.0)}})).text)
    assert "Muon, soft cap changes the model: softcap = 10; its logits are measured before the cap." in text


def test_experiments_side_by_side_share_colours_and_axes(hot, shared):
    other = results_of(shared, {"muon": {0: growing(8, 5.0)}, "muon@lr=0.01": {0: growing(8, 7.0)}})
    other = replace(other, experiment=replace(other.experiment, title="Other"))
    parts = read(hot, other)
    shades = {}
    for figure in parts.figures:
        for trace in figure["data"]:
            if "arm" in trace["meta"]:
                shades.setdefault(trace["meta"]["arm"], set()).add(trace["line"]["color"])
    assert sorted(map(len, shades.values())) == [1, 1, 1]
    assert len(set.union(*shades.values())) == 3
    assert parts.figures[0]["layout"]["yaxis"]["range"] == parts.figures[1]["layout"]["yaxis"]["range"]
    buttons = [value for tag, name, value in parts.attributes if tag == "button" and name == "data-arm"]
    assert buttons == ["muon", "muonclip", "muon@lr=0.01"]
    assert {"Tiny", "Other"} <= set(parts.text)


def test_the_command_draws_what_is_finished(shared, records, tmp_path, capsys):
    store(tmp_path / "a", shared, records, unfinished=[("muonclip", 0), ("muonclip", 3), ("muon", 3)])
    assert main(["report", str(tmp_path / "a"), "--tensorboard"]) == 0
    parts = Parts((tmp_path / "a" / "report.html").read_text())
    assert parts.arms() == {"muon"}
    for picture in ("curves.png", "heads.png"):
        assert (tmp_path / "a" / picture).read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "a" / "tensorboard").iterdir()] == ["tiny"]
    heard = capsys.readouterr()
    assert [line.partition(": ")[2] for line in heard.err.splitlines()] == [
        f"{label}, seed {seed}, is not finished." for label, seed in [("MuonClip", 0), ("Muon", 3), ("MuonClip", 3)]
    ]
    assert str(tmp_path / "a" / "report.html") in heard.out


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures are tested elsewhere and are slow; here each is a text of the arms it was asked for."""

    def draw(results, path, **look):
        path.write_text(" ".join(",".join(arm.name for arm in result.finished) for result in results))

    for picture in (plots, head_maps):
        monkeypatch.setattr(picture, "draw", draw)
    monkeypatch.setattr(plots, "draw_summary", draw)


def test_the_command_writes_what_the_training_wrote(hot, shared, records, tmp_path, undrawn):
    store(tmp_path / "a", shared, records, environment=hot.environment)
    main(["report", str(tmp_path / "a")])
    assert (tmp_path / "a" / "report.html").read_text() == page.page([hot])
    assert not (tmp_path / "a" / "tensorboard").exists()


def test_folders_are_compared_in_a_folder_of_their_own(shared, records, tmp_path, monkeypatch, undrawn):
    store(tmp_path / "a", shared, records)
    for name, top in (("x", 20.0), ("y", 30.0)):
        own = replace(with_arms(shared, "muon"), seeds=(0,), name=name, title=name.upper())
        store(tmp_path / "b" / name, own, {"muon": {0: growing(8, top)}})
    (tmp_path / "b" / "figures").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["report", "a", "b"]) == 0
    compared = Parts((COMPARISON / "report.html").read_text())
    assert {"a", "b: X", "b: Y"} <= set(compared.text)
    assert (COMPARISON / "curves.png").read_text() == "muon,muonclip muon muon"
    assert "b: X" not in (tmp_path / "b" / "report.html").read_text()
    assert (tmp_path / "b" / "curves.png").read_text() == "muon muon"
    assert main(["report", "a", "--out", "there/c"]) == 0
    assert (tmp_path / "there" / "c" / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "argument DIR: nowhere is not a folder of results (no such folder)"),
        (["empty"], "argument DIR: empty is not a folder of results (neither config.json nor a folder with one)"),
        (["begun"], "argument DIR: begun holds no finished run yet"),
        (["old"], "argument DIR: old/config.json is not a configuration that this version wrote"),
        (["good", "good"], "argument DIR: a folder is named twice."),
        (["good", "begun"], "argument DIR: begun holds no finished run yet"),
        (["good", "also", "--out", "good"], "argument --out: good is one of the folders"),
        (["good", "also", "--out", "file"], "argument --out: file cannot be made a folder"),
        ([], "the following arguments are required: DIR"),
    ],
)
def test_wrong_folders(shared, records, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name in ("good", "also"):
        store(tmp_path / name, shared, records)
    store(tmp_path / "begun", shared, records, unfinished=[(arm.name, seed) for arm, seed in shared.runs()])
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / CONFIG).write_text('{"config": {"steps": 3}}')
    with pytest.raises(SystemExit) as exit_:
        main(["report", *arguments])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("report.html"))
