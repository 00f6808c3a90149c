"""The coordinate check: what it measures at small widths, what the command writes, and the page's slopes."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.experiment.data import open_corpus
from benchmarks.studies import coordinate_check

COMMITTED = json.loads((Path(__file__).parents[2] / "docs" / "primer" / "coordinate-check.json").read_text("utf-8"))
WIDTHS = (64, 256)  # narrower ones have not settled


def test_changes_are_the_same_at_every_width_but_for_the_rms_of_adamw():
    """A rate carries over where the spectral norm of an update follows the shape; that of match_rms_adamw grows."""
    scales = coordinate_check.measure(open_corpus(), WIDTHS, (0,))["scales"]
    for place in coordinate_check.PLACES:
        assert abs(scales["original"]["slopes"][place]) < 0.15
        assert abs(scales["spectral_unclamped"]["slopes"][place]) < 0.15
        assert 0.3 < scales["match_rms_adamw"]["slopes"][place] < 0.6


def test_activations_begin_with_the_same_size_at_every_width():
    for width in (16, 64):
        torch.manual_seed(0)
        model = coordinate_check.model_of(width, 50)
        seen = coordinate_check.activations(model, torch.randint(50, (4, 32)))
        assert [len(seen[place]) for place in ("attention", "MLP", "all layers")] == [2, 2, 1]
        assert seen["all layers"].square().mean().sqrt() == pytest.approx(1.1, abs=0.25)


def test_a_slope_is_the_exponent():
    assert coordinate_check.slope((64, 128, 512), [3 * width**0.5 for width in (64, 128, 512)]) == pytest.approx(0.5)


def test_the_committed_figures_have_the_slopes_of_their_values():
    for scale in COMMITTED["scales"].values():
        for place, each in scale["places"].items():
            slope = coordinate_check.slope(COMMITTED["widths"], each["change"])
            assert slope == pytest.approx(scale["slopes"][place], abs=2e-3)


@pytest.mark.slow
def test_the_command_writes_its_figures_and_draws_them_for_both_grounds(tmp_path):
    assert main(["coordinate-check", "--quick", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "coordinate-check.json", "coordinate-check.png", "coordinate-check-dark.png"
    }  # fmt: skip
    written = json.loads((tmp_path / "coordinate-check.json").read_text("utf-8"))
    assert written["widths"] == [64, 128]
    assert written["environment"]["command"]
    for name, scale in written["scales"].items():
        for place, each in scale["places"].items():
            for which in ("before", "change"):
                expected = COMMITTED["scales"][name]["places"][place][which][:2]
                assert each[which] == pytest.approx(expected, rel=0.2), "of one seed in place of two"
