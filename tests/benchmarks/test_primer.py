"""The figures of the primer: what the command writes, and those in the repository against other mathematics."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.studies import primer
from benchmarks.studies.momenta import saved_momenta
from muonclip.core import resolve_coefficients

DOCS = Path(__file__).parents[2] / "docs"
COMMITTED = json.loads((DOCS / "primer" / "primer.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_command_draws_its_pictures_and_writes_what_they_show(tmp_path, monkeypatch):
    monkeypatch.setattr(primer, "STEPS", 6)
    monkeypatch.setattr(primer, "BAD_STEP", 3)
    assert main(["primer", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {*(f"{name}.png" for name in primer.PICTURES), "primer.json"}
    written = json.loads((tmp_path / "primer.json").read_text(encoding="utf-8"))
    assert written["environment"]["command"]
    arms = written["bad-gradient"]["arms"]
    assert arms["adamw"]["update_rms"][0] == pytest.approx(1, abs=0.01)  # Adam's first step has size 1 in every entry
    for arm in arms.values():
        assert len(arm["update_rms"]) == len(arm["max_logit"]) == 6
        for values in arm["spectra"].values():
            assert np.mean(np.square(values)) == pytest.approx(1, abs=1e-3)
    first = {arm: arms[arm]["spectra"]["bad step"][0] for arm in ("adamw", "muon")}
    assert first["muon"] < first["adamw"]  # the iteration makes singular values equal
    assert written["logits"] == COMMITTED["logits"]


def test_singular_values_after_the_iteration_are_those_of_the_polynomials():
    """Without the iteration: the polynomials, of the singular values themselves, in float64."""
    values = COMMITTED["singular-values"]
    momenta = saved_momenta()
    assert len(values["before"]) == 8
    for name, before in values["before"].items():
        s = np.linalg.svd(momenta[name].double().numpy(), compute_uv=False)
        s /= np.linalg.norm(s)
        np.testing.assert_allclose(before, s, rtol=1e-3, atol=1e-6)
        for label, (coefficients, ns_steps) in primer.ITERATIONS.items():
            mapped = s
            for a, b, c in resolve_coefficients(coefficients, ns_steps):
                mapped = a * mapped + b * mapped**3 + c * mapped**5
            after = {dtype: values["after"][label][dtype][name] for dtype in primer.DTYPES}
            np.testing.assert_allclose(after["float32"], np.sort(mapped)[::-1], atol=2e-3)
            np.testing.assert_allclose(after["bfloat16"], after["float32"], atol=0.08)


def test_the_logits_are_those_of_the_evidence():
    hot = json.loads((DOCS / "evidence" / "hot.json").read_text(encoding="utf-8"))
    assert primer.rounded(primer.logits(hot)) == COMMITTED["logits"]
