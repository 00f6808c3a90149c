"""The comparison of speeds, run on tiny shapes: what is measured and written. No timing is judged."""

import copy
import json
import re
import statistics
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.studies import speed_peers, speed_sets, speed_steps, speed_updates
from benchmarks.studies.speed import PARTS, read_speed
from benchmarks.studies.speed_limit import Products, passes, peak_bytes
from benchmarks.studies.templates import BEGIN, END
from muonclip.torch import Muon

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """All parts; of the peers only those that PyTorch brings are sure to be there."""
    out = tmp_path_factory.mktemp("speed")
    with pytest.MonkeyPatch.context() as patch:
        for name, peer in speed_peers.PEERS.items():
            if peer.package != "torch":
                patch.setitem(speed_peers.PEERS, name, peer._replace(package="a_package_that_is_not_there"))
        assert main(["speed", "--quick", "--rounds", "9", "--threads", "1", "--out", str(out)]) == 0
    return json.loads((out / "cpu.json").read_text())


def test_every_part_is_measured_with_its_raw_times(quick):
    assert list(quick["parts"]) == list(PARTS)
    for name in ("sets", "others"):
        rows = quick["parts"][name]["rows"]
        assert [(row["name"], row["threads"]) for row in rows] == [(each, 1) for each in speed_sets.TINY]
        for row in rows:
            assert row["seconds"].keys() >= {speed_updates.OURS, speed_updates.AGAIN, "torch.optim.Muon"}
            assert {len(times) for times in row["seconds"].values()} == {9}
            assert min(min(times) for times in row["seconds"].values()) > 0
    for part in quick["parts"].values():
        assert {"cpu", "torch", "date", "command", "rounds", "peers"} <= part["environment"].keys()


def test_an_absent_peer_is_a_row_and_no_failure(quick):
    for row in quick["parts"]["sets"]["rows"]:
        assert row["absent"]["heavyball"] == row["absent"]["dion"] == "not installed"
        assert row["ratios"].keys().isdisjoint(row["absent"])
    assert "| not installed |" in read_speed(quick)


def test_every_row_of_a_table_has_the_cells_of_its_head(quick):
    """A name with a bar in it, such as q|k|v, is one cell."""
    quick = copy.deepcopy(quick)
    quick["parts"]["others"]["rows"][0]["name"] = "fused q|k|v"
    tables = re.findall(r"(?:^\|.*\n)+", read_speed(quick), re.MULTILINE)
    assert len(tables) == 8
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_a_peer_that_fails_is_a_row(monkeypatch):
    def broken(matrices):
        raise RuntimeError("no compiler")

    monkeypatch.setitem(speed_peers.PEERS, "heavyball", speed_peers.Peer("torch", broken))
    row = speed_updates.compare("x", speed_sets.TINY["mixed"], 1, 1, compiled=False, tell=lambda text: None)
    assert row["absent"]["heavyball"] == "failed: RuntimeError"


def test_a_peer_is_called_faster_only_beyond_the_noise(quick):
    row = copy.deepcopy(quick["parts"]["sets"]["rows"][0])
    row["ratios"] = {
        speed_updates.AGAIN: {"median": 1.01, "low": 0.95, "high": 1.02},
        "torch.optim.Muon": {"median": 0.96, "low": 0.9, "high": 1.1},
        "dion": {"median": 0.94, "low": 0.9, "high": 1.1},
    }
    facts = speed_updates.facts(row)
    assert facts["faster"] == {"dion": 0.94}
    assert (facts["best"], facts["ratio"]) == ("dion", 0.94)
    assert facts["noise"] == pytest.approx(0.05)


def test_the_limit_is_products_and_passes(quick):
    for row in quick["parts"]["sets"]["rows"]:
        median = {name: statistics.median(times) for name, times in row["seconds"].items()}
        limit = median[speed_updates.PRODUCTS] + row["passes"] / 2 * median[speed_updates.COPY]
        assert speed_updates.facts(row)["over_limit"] == pytest.approx(median[speed_updates.OURS] / limit)
    assert passes([False, True], [30, 10]) == 5.5


def test_products_are_counted_and_repeated():
    parameter = torch.nn.Parameter(torch.randn(6, 10))
    parameter.grad = torch.randn(6, 10)
    optimizer = Muon([parameter], ns_form="standard", ns_dtype=torch.float32)
    optimizer.step()
    with Products() as counted:
        optimizer.step()
    assert counted.flops == 5 * (4 * 6 * 6 * 10 + 2 * 6**3)
    replay = counted.replay()
    with Products() as again:
        replay()
    assert again.flops == counted.flops


def test_peak_memory_counts_what_lives_at_once():
    def step():
        first = torch.empty(1000, 1000)
        del first
        second, third = torch.empty(1000, 1000), torch.empty(500, 1000)
        del second, third

    assert peak_bytes(step) == 6_000_000


@pytest.mark.parametrize("name", [*speed_sets.SETS, *speed_sets.OTHERS])
def test_peers_get_every_matrix_once(name):
    """The pieces of a parameter are its elements, and matrices of two axes."""
    weights = (speed_sets.SETS | speed_sets.OTHERS)[name]
    for shape, layout in dict.fromkeys(speed_sets.weights_of(weights)):
        x = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
        pieces = speed_sets.split(x, layout)
        assert torch.equal(torch.cat([piece.flatten() for piece in pieces]).sort().values, x.flatten())
        if layout is not None:
            assert {piece.ndim for piece in pieces} == {2}
            assert len(pieces) == sum(count for count, _, _ in layout.matrix_shapes(shape))


def test_an_update_by_torch_is_that_of_its_own_matrices():
    """Each expert is orthogonalised by itself, and AdamW's parameter moves too."""
    weights = speed_sets.TINY["mixed"]
    gradients = [torch.randn(each.shape) for each in weights]
    arm = speed_updates._peer(speed_peers.PEERS["torch.optim.Muon"].make, weights, gradients)
    before = [parameter.detach().clone() for parameter in arm.parameters]
    arm.step()
    assert [tuple(parameter.shape) for parameter in arm.parameters] == [(6, 8)] * 4 + [(7,)]
    assert not any(torch.equal(old, new) for old, new in zip(before, arm.parameters, strict=True))


def test_training_steps_of_all_arms_move_every_weight(quick):
    case = speed_steps.TINY[0]
    model = speed_steps.MODELS[case.model](case.length)
    batches = torch.randint(256, (4, case.length + 1)).split(2)
    for name in (speed_steps.ADAMW, speed_steps.TORCH, speed_steps.OURS):
        trained = copy.deepcopy(model)
        forward_backward, update = speed_steps._arm(name, trained, batches, "float32")
        forward_backward()
        update()
        moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), trained.parameters(), strict=True)]
        assert all(moved), name
    rows = quick["parts"]["steps"]["rows"]
    assert [(row["model"], row["tokens"], row["dtype"]) for row in rows] == [
        ("tiny", 32, dtype) for dtype in ("float32", "bfloat16")
    ]
    for row in rows:
        facts = speed_steps.facts(row)
        assert facts["rule"] == row["flops"] / (6 * 32 * row["parameters"])
        assert facts["limit"] > 1


def test_parts_are_measured_one_by_one(quick, tmp_path, capsys):
    (tmp_path / "cpu.json").write_text(json.dumps(quick))
    assert main(["speed", "--quick", "--rounds", "2", "--parts", "jax", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "cpu.json").read_text())
    assert result["parts"]["sets"] == quick["parts"]["sets"]
    assert result["parts"]["jax"]["environment"]["rounds"] == 2
    assert capsys.readouterr().out.strip() == read_speed(result).strip()


def test_the_page_gets_the_figures_between_its_marks(quick, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"Before.\n{BEGIN}\nold\n{END}\nAfter.\n")
    with pytest.raises(SystemExit):
        main(["speed", "--out", str(tmp_path), "--page", str(page)])
    assert "argument --page: needs" in capsys.readouterr().err
    (tmp_path / "cpu.json").write_text(json.dumps(quick))
    assert main(["speed", "--out", str(tmp_path), "--page", str(page)]) == 0
    assert page.read_text() == f"Before.\n{BEGIN}\n{read_speed(quick)}{END}\nAfter.\n"


def test_the_page_shows_what_was_measured():
    page = (DOCS / "speed.md").read_text(encoding="utf-8")
    measured = json.loads((DOCS / "speed" / "cpu.json").read_text(encoding="utf-8"))
    assert page.partition(f"{BEGIN}\n")[2].partition(END)[0] == read_speed(measured)
    assert measured["parts"]["sets"]["environment"]["rounds"] >= 9
