"""The comparison with Optax's own Muon: both do the same work, and the table says what was measured."""

import json

import jax
import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.studies import optax_speed


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(optax_speed, "SHAPES", {"cpu": ((3, 8, 12),)})
    monkeypatch.setattr(optax_speed, "MODEL_SIZES", {"num_layers": 1, "num_dense_layers": 0, "num_experts": 2})


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda: optax_speed._matrices(3, 8, 12), lambda: optax_speed._model()])
def test_candidates_do_the_same_work(small, make):
    """The first step, where the Nesterov conventions agree."""
    results = [jax.tree.leaves(run()[0]) for run, _ in make().values()]
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            np.testing.assert_allclose(one, same, atol=2e-5)


def test_the_command_writes_figures_and_table(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(optax_speed, "_model", lambda: optax_speed._matrices(1, 4, 6))  # its own is compiled above
    assert main(["optax-speed", "--out", str(tmp_path), "--rounds", "2"]) == 0
    figures = json.loads((tmp_path / "cpu.json").read_text())
    table = (tmp_path / "cpu.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out
    assert [case["name"] for case in figures["cases"]] == ["3 × 8×12", optax_speed.MODEL]
    for case in figures["cases"]:
        assert min(case["milliseconds"].values()) > 0
        assert f"| {case['name']} | {case['milliseconds']['optax']:.1f} | " in table
    assert {"jax", "optax", "cpu"} <= set(figures["environment"])
