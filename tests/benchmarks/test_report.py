"""The page says what the numbers say, whatever they and the names are; the command reads what is finished."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.execution.worker import CONFIG, run_folder
from benchmarks.experiment.arms import ARMS, appearance
from benchmarks.records import metrics
from benchmarks.records.atomic_files import write_json
from benchmarks.records.summary import PanelResult, summarise
from benchmarks.report import page as report
from benchmarks.report import redraw
from benchmarks.report.charts import head_maps, line_charts, top_of_logits
from benchmarks.report.curves import SMOOTHING, curve, mean, smooth, thin
from benchmarks.report.redraw import COMPARISON
from benchmarks.training.run import METRICS, RESULT

LAYERS = ("layers.0.attn", "layers.1.attn")


def run(steps, top, *, measured=True, diverges=False):
    """Records whose largest logit grows to `top`, in head 2 of the second layer."""
    made = []
    for step in range(1, steps + 1):
        logits = {LAYERS[0]: [0.1] * 4, LAYERS[1]: [0.2, 0.3, top * step / steps, -1.0]}
        made.append({"step": step, "loss": 3 + top * 1e-6, "grad_norm": 1.0, "max_logits": logits, "clipped_heads": 0})
        if step % 4 == 0 or step == steps:
            made[-1]["val_loss"] = 2.0
            if measured:
                heads = {name: [1.0, 2.0, 3.0, 4.0] for name in LAYERS}
                made[-1] |= dict.fromkeys(("attention_entropy", "query_norms", "key_norms"), heads)
                made[-1]["update_rms"] = 0.2
    if diverges:
        made[-1] |= {"loss": math.nan, "max_logits": {}, "val_loss": math.nan}
    return made


def ended(records):
    diverged = not math.isfinite(records[-1]["loss"])
    seconds = {"wall_seconds": 1.0, "train_seconds": 1.0}
    return {"steps": len(records), "diverged": diverged, "final_val_loss": records[-1]["val_loss"]} | seconds


def result(panel, arms, **changes):
    panel = replace(panel, arms=tuple(arms), **changes)
    panel = replace(panel, training=replace(panel.training, tau=10.0, lr=dict.fromkeys(ARMS, 0.03)))
    summaries = {
        arm: {seed: summarise(panel, arm, records, ended(records)) for seed, records in runs.items()}
        for arm, runs in arms.items()
    }
    return PanelResult(panel, arms, summaries, {"torch": "2.13", "command": "python -m benchmarks explosion"})


@pytest.fixture
def hot(panel):
    return result(panel, {"muon": {0: run(8, 500.0), 3: run(8, 900.0)}, "muonclip": {0: run(8, 12.0), 3: run(8, 13.0)}})


class Parts(HTMLParser):
    """Text, attributes and scripts of a page."""

    def __init__(self, page):
        super().__init__()
        self.text, self.scripts, self.attributes, self.tags, self.inside = [], [], [], [], ""
        self.feed(page)

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


def read(results, **options):
    parts = Parts(report.page(results, **options))
    return parts, "\n".join(parts.text), charts_of(parts)


def charts_of(parts):
    def refuse(constant):
        raise ValueError(constant)

    return json.loads(parts.scripts[0], parse_constant=refuse)


def colours(of):
    return {arm: look.colour for arm, look in appearance(of.panel).items()}


def test_the_page_asks_nothing_of_a_network(hot):
    parts, _, _ = read([hot])
    assert len(parts.scripts) == 3
    assert parts.scripts[1] == report.get_plotlyjs()
    assert not [(tag, name, value) for tag, name, value in parts.attributes if name in ("src", "href", "action")]
    policy = next(value for tag, name, value in parts.attributes if tag == "meta" and value and "default-src" in value)
    assert policy.split("; ") == [
        "default-src 'none'",
        "script-src 'unsafe-inline'",
        "style-src 'unsafe-inline'",
        "img-src data: blob:",
    ]
    for name in ("report.css", "report.js"):
        assert not re.search(r"https?:|url\(|@import|fetch|XMLHttp", report._beside(name))


def test_names_cannot_become_markup(hot):
    evil = '</script><script>alert("1")</script><b>&amp;'
    data = replace(hot.panel.data, title=evil, path=f"/{evil}")
    wicked = replace(hot, panel=replace(hot.panel, title=evil, data=data), environment={"command": evil, "cpu": evil})
    for results in ([wicked], [wicked, hot]):
        parts, text, _ = read(results)
        assert len(parts.scripts) == 3
        assert "b" in parts.tags  # of the page's own
        assert parts.tags.count("b") == read([hot] * len(results))[0].tags.count("b")
        assert text.count("alert") >= 5
    assert "</script" not in report._json({"<": evil})


def test_numbers_that_are_not_finite(panel):
    made = result(panel, {"muon": {0: run(6, math.inf, diverges=True), 3: run(8, 20.0)}, "adamw": {0: run(8, 5.0)}})
    parts, text, charts = read([made])
    rows = re.findall(r"<tr><th>Muon</th>(.*?)</tr>", report.page([made]))
    assert rows[0].startswith("<td>0</td><td>0.03</td><td>NaN</td><td>NaN</td><td>inf</td><td>inf</td>")
    assert "Muon, seed 0, diverged: it ended at step 6 of 8." in text
    assert "AdamW, seed 3, is not finished and left out." in text
    assert not re.search(r"\bnan\b|Infinity", text)
    assert charts[0]["layout"]["yaxis"]["range"][1] == pytest.approx(math.log10(20), abs=0.1)
    assert len(parts.scripts) == 3


def test_a_finished_run_is_said_to_be_neither_diverged_nor_missing(hot):
    _, text, _ = read([hot])
    assert "diverged" not in text
    assert "not finished" not in text


def test_the_page_holds_what_it_promises_in_order(hot):
    _, text, _ = read([hot], title="A title")
    order = ["A title", hot.panel.subject, "Muon", ": logits passed τ = 10", "Runs", "peak logit", "900.0", "Charts",
             "Maximum attention logit", "Train loss", "Validation loss", "Clipped heads", "Attention entropy",
             "Query weights", "Key weights", "Update size", "Every head", "How it was made",
             "python -m benchmarks explosion", hot.panel.data.sha256, "training.weight_decay"]  # fmt: skip
    places = [text.index(order[0])]
    for words in order[1:]:
        places.append(text.index(words, places[-1]))
    assert read([hot])[1].startswith("Tiny") or hot.panel.title in read([hot])[1]


def test_what_was_not_measured_has_no_chart(panel):
    old = result(panel, {"muon": {0: run(8, 20.0, measured=False)}})
    titles = [chart["title"] for chart in line_charts(old, colours(old), 20.0)]
    assert titles == ["Maximum attention logit", "Train loss", "Validation loss", "Clipped heads"]
    both = read([old, result(panel, {"muon": {0: run(8, 20.0)}})])[2]
    assert len([chart for chart in both if chart["kind"] == "lines"]) == 4 + 8


def test_charts_hold_seeds_and_their_mean_in_the_colours_of_the_pictures(hot):
    chart = line_charts(hot, colours(hot), top_of_logits([hot]))[0]
    assert [trace["meta"]["arm"] for trace in chart["data"]] == ["muon"] * 3 + ["muonclip"] * 3
    assert {trace["meta"]["colour"] for trace in chart["data"]} == set(colours(hot).values())
    first, second, bold = chart["data"][:3]
    assert bold["line"]["width"] > first["line"]["width"]
    assert bold["x"] == list(range(1, 9))
    assert bold["y"] == pytest.approx(np.mean([first["y"], second["y"]], axis=0), rel=1e-3)
    assert (first["y"][-1], second["y"][-1]) == (500.0, 900.0)
    assert chart["taus"] == [10.0]
    assert chart["layout"]["yaxis"]["range"][0] == 0
    low, high = chart["layout"]["yaxis"]["range"]
    assert low < math.log10(900) < high


def test_an_arm_that_coincides_with_another_is_dashed(panel):
    same = result(panel, {"muon": {0: run(8, 5.0)}, "muonclip": {0: run(8, 5.0)}})
    lines = line_charts(same, colours(same), 20.0)[0]["data"]
    assert [trace["line"].get("dash") for trace in lines] == [None, "6px,6px"]


def test_a_single_measurement_is_a_point(panel):
    short = result(panel, {"muon": {0: run(3, 5.0)}})
    modes = [chart["data"][0]["mode"] for chart in line_charts(short, colours(short), 20.0)]
    assert modes == ["lines", "lines", "markers", "lines", "markers", "markers", "markers", "markers"]


def test_spikes_are_marked(panel):
    records = run(8, 5.0)
    records[6]["loss"] = 9.0
    training = replace(panel.training, spike_window=3)
    spiked = result(replace(panel, training=training), {"muon": {0: records}})
    chart = line_charts(spiked, colours(spiked), 20.0)[1]
    crosses = [trace for trace in chart["data"] if trace["mode"] == "markers"]
    assert [(trace["x"], trace["y"]) for trace in crosses] == [([7], [9.0])]
    assert chart["note"].endswith("× spikes")


def test_every_threshold_has_its_line(panel):
    taus = result(
        panel, {"muon": {0: run(8, 50.0)}, "muonclip": {0: run(8, 12.0)}, "muonclip@tau=30": {0: run(8, 50.0)}}
    )
    assert line_charts(taus, colours(taus), 50.0)[0]["taus"] == [10.0, 30.0]
    assert [of["tau"] for of in head_maps(taus, dict.fromkeys(taus.panel.arms, ""), 50.0)] == [10.0, 10.0, 30.0]
    own = result(panel, {"muon": {0: run(8, 50.0)}, "muonclip@tau=30": {0: run(8, 50.0)}})
    assert line_charts(own, colours(own), 50.0)[0]["taus"] == [30.0]  # at 10 nothing is clipped
    none = result(panel, {"muon": {0: run(8, 50.0)}})
    assert line_charts(none, colours(none), 50.0)[0]["taus"] == [10.0]


def test_maps_hold_every_head_of_every_seed(hot):
    first, second = head_maps(hot, {"muon": "Muon", "muonclip": "MuonClip"}, 900.0)
    assert (first["title"], second["title"]) == ("Muon", "MuonClip")
    assert first["layers"] == [["layer 0", 4], ["layer 1", 4]]
    assert first["rows"][6] == "layers.1.attn, head 2"
    assert first["runs"]["0"][6] == pytest.approx([500 * step / 8 for step in range(1, 9)])
    assert first["runs"]["3"][6][-1] == 900.0
    assert first["runs"]["0"][7] == [-1.0] * 8


def test_maps_of_shorter_runs_end_early(panel):
    part = result(panel, {"muon": {0: run(6, 50.0, diverges=True)}, "muonclip@steps=4": {0: run(4, 5.0)}})
    diverged, short = head_maps(part, dict.fromkeys(part.panel.arms, ""), 50.0)
    assert [value is None for value in diverged["runs"]["0"][6]] == [False] * 5 + [True] * 3
    assert [value is None for value in short["runs"]["0"][6]] == [False] * 4 + [True] * 4


def test_long_runs_stay_small_and_keep_their_peaks(panel):
    records = run(5000, 20.0)
    records[3210]["max_logits"][LAYERS[0]][1] = 777.0
    long = result(replace(panel, training=replace(panel.training, steps=5000)), {"muon": {0: records, 3: records}})
    chart = line_charts(long, colours(long), 777.0)[0]
    for trace in chart["data"]:
        assert len(trace["x"]) <= 800
        assert (3211, 777.0) in zip(trace["x"], trace["y"], strict=True)
    (heads,) = head_maps(long, {"muon": ""}, 777.0)
    assert len(heads["bins"]) == 240
    (at,) = [i for i, (first, last) in enumerate(heads["bins"]) if first <= 3211 <= last]
    assert heads["runs"]["0"][1][at] == 777.0
    assert heads["bins"][0][0] == 1
    assert heads["bins"][-1][1] == 5000
    assert all(left[1] + 1 == right[0] for left, right in zip(heads["bins"], heads["bins"][1:], strict=False))
    assert len(report.page([long])) < len(report.get_plotlyjs()) + 400_000


def test_maps_of_many_heads_have_fewer_columns(panel):
    records = run(200, 20.0)
    for record in records:
        record["max_logits"] = {f"layers.{layer}.attn": [1.0] * 20 for layer in range(20)}
    many = result(replace(panel, training=replace(panel.training, steps=200)), {"muon": {0: records}})
    (heads,) = head_maps(many, {"muon": ""}, 20.0)
    assert len(heads["rows"]) == 400
    assert {len(row) for row in heads["runs"]["0"]} == {len(heads["bins"])} == {60}


def test_an_arm_that_changes_the_model_says_so(panel):
    made = result(panel, {"muon": {0: run(8, 20.0)}, "softcap": {0: run(8, 20.0)}}, seeds=(0,))
    _, text, charts = read([made])
    assert "Muon, soft cap changes the model: softcap = 10.0; its logits are measured before the cap." in text
    assert [chart["note"] for chart in charts if chart["kind"] == "heads"] == ["", "before the soft cap"]
    assert charts[0]["note"].endswith("before a soft cap")


def test_curves():
    records = [{"step": i + 1, "v": v} for i, v in enumerate([1.0, math.nan, 3.0, None])]
    found = curve(records, lambda record: record["v"])
    assert found.tolist() == [[1, 3], [1.0, 3.0]]
    steps = np.arange(1.0, 101)
    assert smooth(np.stack((steps, steps)))[1].tolist()[:3] == [1.0, 1.5, 2.0]
    assert smooth(np.stack((steps, steps)))[1, -1] == np.mean(steps[-SMOOTHING:])
    assert mean([np.array([[1, 2, 3], [4.0, 5.0, 6.0]]), np.array([[1, 2], [6.0, 7.0]])]).tolist() == [[1, 2], [5, 6]]


@pytest.mark.parametrize("count", [3, 10, 11, 57])
def test_thinned_curves_keep_ends_and_extremes(count):
    values = np.cos(np.arange(count) ** 2)
    whole = np.stack((np.arange(count), values))
    kept = thin(whole, 10)
    assert kept.shape[1] <= min(count, 10)
    assert set(kept[0]) <= set(whole[0])
    assert (kept[0, 0], kept[0, -1]) == (0, count - 1)
    assert (np.diff(kept[0]) > 0).all()
    assert {values.min(), values.max()} <= set(kept[1])


def test_panels_side_by_side_share_colours_and_axes(hot, panel):
    other = result(panel, {"muon": {0: run(8, 5.0)}, "muon@lr=0.01": {0: run(8, 7.0)}}, title="Other")
    parts, text, charts = read([hot, other])
    shades = {}
    for chart in charts:
        for trace in chart.get("data", []):
            shades.setdefault(trace["meta"]["arm"], set()).add(trace["meta"]["colour"])
    assert sorted(map(len, shades.values())) == [1, 1, 1]
    assert len(set.union(*shades.values())) == 3
    logits = [chart for chart in charts if chart["title"] == "Maximum attention logit"]
    assert logits[0]["layout"]["yaxis"] == logits[1]["layout"]["yaxis"]
    assert "Side by side" in text
    assert "Peak logits of Muon: 900 in “Tiny”, 5 in “Other”." in text
    buttons = [value for tag, name, value in parts.attributes if tag == "button" and name == "data-arm"]
    assert buttons == ["muon", "muonclip", "muon@lr=0.01"]


def store(folder, result, unfinished=()):
    """As a command leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, {"config": result.panel.to_json(), "environment": result.environment})
    for arm, runs in result.records.items():
        for seed, records in runs.items():
            run = run_folder(folder, arm, seed)
            run.mkdir(parents=True)
            log = metrics.MetricsLog(run / METRICS)
            for record in records:
                log.append(record)
            if (arm, seed) not in unfinished:
                write_json(run / RESULT, metrics.to_json(ended(records)))


def test_the_command_draws_what_is_finished(hot, tmp_path, capsys):
    store(tmp_path / "a", hot, unfinished=[("muonclip", 0), ("muonclip", 3), ("muon", 3)])
    assert main(["report", str(tmp_path / "a"), "--tensorboard"]) == 0
    page = (tmp_path / "a" / "report.html").read_text()
    assert "MuonClip, seed 3, is not finished and left out." in page
    assert [
        arm for chart in charts_of(Parts(page)) for trace in chart.get("data", []) for arm in [trace["meta"]["arm"]]
    ]
    assert {trace["meta"]["arm"] for chart in charts_of(Parts(page)) for trace in chart.get("data", [])} == {"muon"}
    for picture in ("curves.png", "heads.png"):
        assert (tmp_path / "a" / picture).read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "a" / "tensorboard").iterdir()] == ["tiny"]
    heard = capsys.readouterr()
    assert heard.err.splitlines() == [
        f"{tmp_path / 'a'}, Tiny: {label}, seed {seed}, is not finished." for label, seed in
        [("MuonClip", 0), ("Muon", 3), ("MuonClip", 3)]
    ]  # fmt: skip
    assert str(tmp_path / "a" / "report.html") in heard.out


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures are tested elsewhere and are slow; here each is a text of the arms it was asked for."""
    for picture in (redraw.plot, redraw.heads):
        monkeypatch.setattr(
            picture, "draw", lambda results, path: path.write_text(" ".join(",".join(r.panel.arms) for r in results))
        )


def test_pictures_leave_out_arms_without_a_finished_run(hot, tmp_path, undrawn):
    store(tmp_path, hot, unfinished=[("muonclip", 0), ("muonclip", 3), ("muon", 3)])
    main(["report", str(tmp_path)])
    assert (tmp_path / "curves.png").read_text() == (tmp_path / "heads.png").read_text() == "muon"


def test_the_command_writes_what_the_training_wrote(hot, tmp_path, undrawn):
    store(tmp_path / "a", hot)
    main(["report", str(tmp_path / "a")])
    assert (tmp_path / "a" / "report.html").read_text() == report.page([hot])
    assert not (tmp_path / "a" / "tensorboard").exists()


def test_folders_are_compared_in_a_folder_of_their_own(hot, panel, tmp_path, monkeypatch, undrawn):
    store(tmp_path / "a", hot)
    store(tmp_path / "b" / "x", result(panel, {"muon": {0: run(8, 20.0)}}, seeds=(0,), name="x", title="X"))
    store(tmp_path / "b" / "y", result(panel, {"muon": {0: run(8, 30.0)}}, seeds=(0,), name="y", title="Y"))
    (tmp_path / "b" / "figures").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["report", "a", "b"]) == 0
    page = (COMPARISON / "report.html").read_text()
    assert "Peak logits of Muon: 900 in “a”, 20 in “b: X”, 30 in “b: Y”." in page
    assert (COMPARISON / "curves.png").read_text() == "muon,muonclip muon muon"
    assert "“b: X”" not in (tmp_path / "b" / "report.html").read_text()
    assert (tmp_path / "b" / "curves.png").read_text() == "muon muon"
    assert main(["report", "a", "--out", "there/c"]) == 0
    assert (tmp_path / "there" / "c" / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "argument DIR: nowhere is no folder of results (no such folder)"),
        (["empty"], "argument DIR: empty is no folder of results (neither config.json nor a folder with one)"),
        (["begun"], "argument DIR: begun holds no finished run yet"),
        (["old"], "argument DIR: old/config.json is not a configuration that this version wrote"),
        (["good", "good"], "argument DIR: a folder is named twice."),
        (["good", "begun"], "argument DIR: begun holds no finished run yet"),
        (["good", "also", "--out", "good"], "argument --out: good is one of the folders"),
        (["good", "also", "--out", "file"], "argument --out: file cannot be made a folder"),
        ([], "the following arguments are required: DIR"),
    ],
)
def test_wrong_folders(hot, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name in ("good", "also"):
        store(tmp_path / name, hot)
    store(tmp_path / "begun", hot, unfinished=hot.panel.runs())
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / CONFIG).write_text('{"config": {"steps": 3}}')
    with pytest.raises(SystemExit) as exit_:
        main(["report", *arguments])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("report.html"))
