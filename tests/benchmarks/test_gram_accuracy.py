"""The Gram form's restarts keep the rule of accuracy on the momenta in the repository."""

import json

import numpy as np
import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.experiment.data import open_corpus
from benchmarks.studies import gram_accuracy, momenta
from muonclip.core import COEFFICIENT_SETS
from muonclip.core.coefficients import GRAM_GROWTH, GRAM_GROWTH_WIDE, gram_restarts, restarts_within


@pytest.fixture(scope="module")
def stacks():
    return gram_accuracy.inputs()


@pytest.mark.parametrize("name", [name for name, known in COEFFICIENT_SETS.items() if known.gram_steps])
def test_the_restarts_keep_the_rule(stacks, name):
    known = COEFFICIENT_SETS[name]
    for ns_steps in {known.default_steps, known.gram_steps[0], 15} & set(known.gram_steps):
        for dtype in gram_accuracy.GROWTHS:
            restarts = gram_restarts(name, ns_steps, wide=dtype == torch.float32)
            assert gram_accuracy.share_of_the_limit(known.polynomials(ns_steps), restarts, stacks, dtype) <= 1


def test_numbers_of_steps_are_left_out_where_the_restarts_do_not_keep_it(stacks):
    """Errors of jordan grow from step to step; two that converge, as deepseek_v4 ends, take them away again."""
    for ns_steps in (8, 15):
        polynomials = COEFFICIENT_SETS["jordan"].polynomials(ns_steps)
        restarts = restarts_within(GRAM_GROWTH, polynomials)
        assert gram_accuracy.share_of_the_limit(polynomials, restarts, stacks, torch.bfloat16) > 1.1
        assert gram_restarts("jordan", ns_steps) is None


def test_with_fewer_restarts_a_set_breaks_the_rule(stacks):
    polynomials = COEFFICIENT_SETS["polar_express"].polynomials()
    fewer = restarts_within(2 * GRAM_GROWTH, polynomials)
    assert gram_accuracy.share_of_the_limit(polynomials, fewer, stacks, torch.bfloat16) > 1.1
    fewer = restarts_within(10 * GRAM_GROWTH_WIDE, polynomials, first_alone=False)
    assert gram_accuracy.share_of_the_limit(polynomials, fewer, stacks, torch.float32) > 1.1


def test_the_saved_momenta_are_what_the_run_makes():
    made = momenta.train_momenta(open_corpus(), steps=(1,))
    assert {name.partition(", ")[0] for name in made} == set(momenta.MATRICES)
    assert all(abs(momentum).max() == 1 and momentum.dtype == np.float16 for momentum in made.values())
    saved = momenta.saved_momenta()
    assert {(name.partition(", ")[0], tuple(momentum.shape)) for name, momentum in saved.items()} == {
        (name.partition(", ")[0], momentum.shape) for name, momentum in made.items()
    }
    assert momenta.SAVED.stat().st_size < 400_000


def test_the_command_writes_judgements_and_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gram_accuracy, "GROWTHS", {torch.bfloat16: (GRAM_GROWTH,)})
    monkeypatch.setattr(gram_accuracy, "MOST_STEPS", 10)
    stacks = gram_accuracy.inputs()[-2:-1]
    monkeypatch.setattr(gram_accuracy, "inputs", lambda: stacks)
    assert main(["gram-accuracy", "--out", str(tmp_path)]) == 0
    table = (tmp_path / "gram_accuracy.txt").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out
    (deepseek,) = [line for line in table.splitlines() if line.startswith("deepseek_v4")]
    assert deepseek.split()[1:8] == ["bfloat16", "150", "2,", "4,", "6,", "8,", "10"]
    judgements = json.loads((tmp_path / "gram_accuracy.json").read_text())["judgements"]
    assert len(judgements) == 4 * 10 + 2 * 5
    assert all(judgement["share"] > 0 for judgement in judgements)
