"""Scaling over ranks: what is timed, and what the shares mean."""

import json
import time

import pytest
import torch
import torch.distributed as dist

from benchmarks.__main__ import main
from benchmarks.studies import scaling
from benchmarks.studies.collective_times import CollectiveTimes, collective_times


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_collectives_in_flight_together_count_once():
    times = CollectiveTimes(intervals=[[0.0, 2.0], [1.0, 3.0], [5.0, 6.0], [5.2, 5.5], [7.0, float("inf")]])
    assert times.in_flight == pytest.approx(4.0)


class Clock:
    """Moves only when it is told to."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(time, "perf_counter", clock := Clock())
    return clock


def test_what_is_computed_during_a_collective_is_not_waiting(alone, clock):
    x = torch.ones(3)
    with collective_times() as times:
        dist.all_reduce(x)
        work = dist.all_reduce(x, async_op=True)
        clock.now += 5
        work.wait()
    assert len(times.intervals) == 2
    assert times.blocked == 0
    assert dist.all_reduce.__module__ == "torch.distributed.distributed_c10d"
    assert x.tolist() == [1, 1, 1]


def test_what_the_host_waits_for_is(clock, monkeypatch):
    class Work:
        def wait(self):
            clock.now += 2

        def get_future(self):
            return torch.futures.Future()  # never done: `wait` ends the collective

    def all_reduce(x, async_op=False):
        clock.now += 1
        return Work() if async_op else None

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    with collective_times() as times:
        dist.all_reduce(torch.ones(1))
        work = dist.all_reduce(torch.ones(1), async_op=True)
        clock.now += 5
        work.wait()
    assert times.blocked == 1 + 1 + 2
    assert times.in_flight == 1 + (1 + 5 + 2)


def test_efficiency_is_beside_the_smallest_number_of_processes():
    rows = [
        {"arm": "muonclip", "case": case, "processes": n, "tokens_per_second": speed}
        for case, speeds in (("weak", (100, 150)), ("strong", (100, 200)))
        for n, speed in zip((2, 4), speeds, strict=True)
    ]
    assert [row["efficiency"] for row in scaling.with_efficiency(rows)] == [1.0, 0.75, 1.0, 1.0]


@pytest.mark.slow
def test_both_cases_are_timed(tmp_path, capsys):
    options = "--processes 1,2 --rounds 2 --batch 2 --arms muonclip"
    main(["scaling", *options.split(), "--out", str(tmp_path)])
    result = json.loads((tmp_path / "scaling.json").read_text())
    rows = {(row["case"], row["processes"]): row for row in result["rows"]}
    assert {key: row["windows"] for key, row in rows.items()} == {
        ("weak", 1): 2,
        ("weak", 2): 4,
        ("strong", 1): 4,
        ("strong", 2): 4,
    }
    for row in rows.values():
        assert 0 < row["optimizer_ms"] < row["step_ms"]
        assert row["compute_share"] + row["communication_share"] == pytest.approx(1)
        assert 0 <= row["communication_share"] < 1
        assert row["processes"] == 1 or 0 <= row["overlap_share"] <= 1
    assert rows["weak", 1]["communication_share"] < rows["weak", 2]["communication_share"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scaling.json", "scaling.md"]
    assert (tmp_path / "scaling.md").read_text() == scaling.table(result)
    assert scaling.table(result) in capsys.readouterr().out
