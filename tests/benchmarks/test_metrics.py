"""The record of a run survives being cut at any byte, and stays JSON whatever the numbers are."""

import json
import math

import pytest

from benchmarks.records import metrics
from benchmarks.records.metrics import MetricsLog


def write(path, steps):
    log = MetricsLog(path)
    for step in range(1, steps + 1):
        log.append({"step": step, "loss": 1 / step, "max_logits": {"attn": [float(step), -1.0]}})
    return path.read_bytes()


def test_cut_anywhere_and_continued_is_the_same_file(tmp_path):
    whole = write(tmp_path / "whole.jsonl", 4)
    two = write(tmp_path / "two.jsonl", 2)
    for cut in range(len(two), len(whole) + 1):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(whole[:cut])
        log = MetricsLog(path)
        assert log.begin(2)
        assert path.read_bytes() == two
        for record in metrics.read(tmp_path / "whole.jsonl")[2:]:
            log.append(record)
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "damage", [lambda text: text[:-1], lambda text: text[5:], lambda text: b"", lambda text: b"{}\n"]
)
def test_records_that_are_not_all_there_are_dropped(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(damage(write(tmp_path / "whole.jsonl", 3)))
    log = MetricsLog(path)
    assert not log.begin(3)
    log.append({"step": 1})
    assert metrics.read(path) == [{"step": 1}]


def test_non_finite_numbers_stay_json_and_come_back(tmp_path):
    record = {"step": 1, "loss": math.inf, "max_logits": {"attn": [-math.inf, math.nan, 2.5]}}
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(record)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    (back,) = metrics.read(tmp_path / "metrics.jsonl")
    assert back["loss"] == math.inf
    low, nan, number = back["max_logits"]["attn"]
    assert (low, number) == (-math.inf, 2.5)
    assert math.isnan(nan)
