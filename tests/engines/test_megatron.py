"""Megatron-core's fused, grouped and tensor-parallel projections: what is clipped, and which matrices Muon updates.

Which rows feed which heads is written here from what Megatron says: `linear_qkv` holds the queries, the key and the
value of one group after the other, and each rank of tensor parallelism the rows of its groups.
"""

from pathlib import Path

import megatron_worker as worker
import pytest
import torch
from forked_ranks import run_ranks

from muonclip.torch import Muon

WORKER = Path(worker.__file__)
QKV = "decoder.layers.{}.self_attention.linear_qkv.weight"
SHARED = worker.HEADS // worker.GROUPS  # heads with the same key


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("megatron")
    several = [f"{make},{worker.TAU},3" for make in ("adamw", "recipe")]
    run_ranks(1, WORKER, folder, *several, f"plain,{worker.TAU},3", "plain,inf,1", timeout=300)
    run_ranks(2, WORKER, folder, *several, "refusal", timeout=300)
    return {path.stem: torch.load(path) for path in folder.glob("*.pt")}


def parts_of(weight):
    """Queries [heads · d, in], keys and values [groups · d, in] of a fused weight, group by group."""
    groups = weight.view(worker.GROUPS, SHARED + 2, worker.HEAD, -1)
    return [groups[:, rows].reshape(-1, weight.shape[1]) for rows in (slice(SHARED), [-2], [-1])]


@pytest.mark.parametrize("run", ["adamw-1", "adamw-2", "plain-1", "recipe-1", "recipe-2"])
def test_maxima_and_factors_are_those_of_each_head(run, runs):
    make, ranks = run.split("-")
    of_run = runs[f"{make},{worker.TAU},3-{ranks}"]
    for (maxima, gammas), expected in zip(of_run["seen"], of_run["expected"], strict=True):
        assert expected.shape == (worker.LAYERS, worker.HEADS)
        torch.testing.assert_close(maxima, expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(gammas, (worker.TAU / expected).clamp(max=1), rtol=1e-5, atol=0)
    assert any(0 < (gammas < 1).sum() < gammas.numel() for _, gammas in of_run["seen"])


@pytest.mark.parametrize(("make", "error"), [("adamw", 3e-6), ("recipe", 3e-7)])
def test_two_ranks_train_as_one_does(make, error, runs):
    # Megatron computes the loss in float32; AdamW's first steps make much of its rounding.
    one, two = (runs[f"{make},{worker.TAU},3-{ranks}"] for ranks in (1, 2))
    for step, (whole, divided) in enumerate(zip(one["weights"], two["weights"], strict=True)):
        for name, weight in whole.items():
            torch.testing.assert_close(divided[name], weight, rtol=0, atol=error, msg=f"{name} after {step} steps")
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-6)


def test_the_recipe_is_the_plain_optimizer_on_one_rank(runs):
    recipe, plain = (runs[f"{make},{worker.TAU},3-1"]["weights"][-1] for make in ("recipe", "plain"))
    for name in recipe:
        torch.testing.assert_close(recipe[name], plain[name], rtol=0, atol=1e-12, msg=name)


def test_the_queries_of_a_head_above_tau_take_its_factor(runs):
    clipped, free = runs[f"plain,{worker.TAU},3-1"], runs["plain,inf,1-1"]
    for layer, gammas in enumerate(clipped["seen"][0][1]):
        (q, k, v), (free_q, free_k, free_v) = (
            parts_of(run["weights"][1][QKV.format(layer)]) for run in (clipped, free)
        )
        torch.testing.assert_close(q, free_q * gammas.repeat_interleave(worker.HEAD)[:, None], rtol=1e-6, atol=0)
        assert torch.equal(k, free_k)
        assert torch.equal(v, free_v)


def test_a_shard_is_refused_where_it_would_be_taken_for_a_matrix(runs):
    said, is_unchanged = runs["refusal-2"]
    assert "is divided by Megatron over 2 ranks" in said
    assert is_unchanged


def test_queries_keys_and_values_are_matrices_of_their_own(runs):
    run = runs["plain,inf,1-1"]
    for layer in range(worker.LAYERS):
        name = QKV.format(layer)
        before, gradients, after = (
            parts_of(each[name]) for each in (run["weights"][0], run["gradients"][0], run["weights"][1])
        )
        matrices = [torch.nn.Parameter(each) for each in before]
        for matrix, gradient in zip(matrices, gradients, strict=True):
            matrix.grad = gradient
        Muon(matrices, ns_coefficients="jordan", adjust_lr_fn="match_rms_adamw", **worker.OPTIONS).step()
        for matrix, expected in zip(matrices, after, strict=True):
            torch.testing.assert_close(matrix.detach(), expected, rtol=0, atol=1e-12)
