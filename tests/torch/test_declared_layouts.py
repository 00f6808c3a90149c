"""Heads of projections without a softmax, declared by pattern: KDA, gated DeltaNet, an indexer; against NumPy."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from forked_ranks import run_ranks
from linear_attention import LAYOUTS, Model, rows_of_heads
from model_zoo import ZOO
from svd_oracle import svd_polynomial
from variants import VARIANTS, Matrix

from muonclip.core import MatrixLayout, resolve_coefficients, update_scale
from muonclip.torch import MuonClip

WORKER = Path(__file__).parents[1] / "support" / "layouts_worker.py"
USED = {False: ("q", "k", "v"), True: ("qkv",)}


def model_and_optimizer(fused, **options):
    torch.manual_seed(0)
    model = Model(fused).double()
    layouts = {f"*.{name}": LAYOUTS[f"*.{name}"] for name in USED[fused]}
    return model, MuonClip(model, lr=0.05, qk_clip=None, layouts=layouts, adjust_lr_fn="original", **options)


@pytest.mark.parametrize("variant", [{"weight_decay": 0.1}, VARIANTS["normuon"], VARIANTS["hyperball"]])
@pytest.mark.parametrize("fused", [False, True])
def test_a_trajectory_is_numpy_s_head_by_head(fused, variant):
    model, optimizer = model_and_optimizer(fused, **variant)
    heads = {}
    for name, parameter in model.named_parameters():
        projection = name.split(".")[-2]
        if projection in USED[fused]:
            value = parameter.detach().numpy()
            heads[name] = [(r, Matrix(value[r].copy(), lr=0.05, **variant)) for r in rows_of_heads(projection)]
    assert len(heads) == 2 * len(USED[fused])
    for step in range(12):
        model.loss(step).backward()
        gradients = {name: parameter.grad.numpy().copy() for name, parameter in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        for name, matrices in heads.items():
            now = model.get_parameter(name).detach().numpy()
            for rows, matrix in matrices:
                matrix.step(gradients[name][rows])
                np.testing.assert_allclose(now[rows], matrix.weight, atol=1e-9, err_msg=f"{name} {step}")


def test_the_plan_prints_the_heads_and_what_is_not_named_stays():
    _, optimizer = model_and_optimizer(fused=False)
    plan = str(optimizer.plan)
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in plan.splitlines() if line.startswith("layers")}
    assert lines["layers.0,1.q.weight"] == "×2 6×12 muon 2 × (3×12) as layouts= says"
    assert lines["layers.0,1.v.weight"] == "×2 20×12 muon 4 × (5×12) as layouts= says"
    assert lines["layers.0,1.o.weight"] == "×2 12×20 muon (12×20) hidden matrix"
    assert lines["layers.0,1.conv.weight"] == "×2 12×1×3 adamw depthwise convolution"


def test_a_copy_and_a_saved_state_go_on_with_the_same_heads():
    model, optimizer = model_and_optimizer(fused=True)
    model.loss(0).backward()
    optimizer.step()
    model_again, again = copy.deepcopy((model, optimizer))
    other = copy.deepcopy(model)
    loaded = MuonClip(other, lr=0.05, qk_clip=None, layouts={"*.qkv": LAYOUTS["*.qkv"]}, adjust_lr_fn="original")
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, own in ((model, optimizer), (model_again, again), (other, loaded)):
        own.zero_grad()
        each.loss(1).backward()
        own.step()
    for trained in (model_again, other):
        assert all(map(torch.equal, trained.parameters(), model.parameters()))


def test_a_model_without_any_softmax_takes_a_recipe_by_head():
    torch.manual_seed(0)
    layouts = {"*.q": 2, "*.k": 2, "*.v": 4}
    with pytest.raises(ValueError, match="per_head=True needs to know the heads"):
        MuonClip(Model(), recipe="kimi_k3", qk_clip=None)
    optimizer = MuonClip(Model(), recipe="kimi_k3", qk_clip=None, layouts=layouts)
    assert "4 × (5×12)" in str(optimizer.plan)


def test_wrong_numbers_and_parameters_without_names_are_refused():
    with pytest.raises(
        ValueError, match=r"layouts\['\*\.q'\]: 'layers\.0\.q\.weight' .*4 heads do not divide the 6 rows"
    ):
        MuonClip(Model(), qk_clip=None, layouts={"*.q": 4})
    with pytest.raises(ValueError, match=r"layouts= goes by the names of a model"):
        MuonClip(Model().parameters(), qk_clip=None, layouts={"*.q": 2})


# Real models


def gated_delta_net():
    """Qwen3-Next: two key heads and four value heads of width 8; of each key head the rows [q | k | 2 v | 2 z]."""
    rows = {"q": [], "k": [], "v": [], "z": []}
    for key_head in range(2):
        start = 48 * key_head
        rows["q"].append(range(start, start + 8))
        rows["k"].append(range(start + 8, start + 16))
        rows["v"] += [range(start + 16, start + 24), range(start + 24, start + 32)]
        rows["z"] += [range(start + 32, start + 40), range(start + 40, start + 48)]
    layout = MatrixLayout(blocks=(8, 8, 16, 16), heads=(2, 2, 4, 4), repeats=2)
    return (
        ZOO["Qwen3NextForCausalLM"],
        {"*.in_proj_qkvz": layout},
        {"linear_attn.in_proj_qkvz": [*rows["q"], *rows["k"], *rows["v"], *rows["z"]]},
    )


def kimi_delta_attention():
    """Kimi-Linear: four heads of width 8 in q, k and v."""
    heads = [range(8 * head, 8 * head + 8) for head in range(4)]
    names = ("q_proj", "k_proj", "v_proj")
    attention = "linear_attn" if "linear_attn" in _names("KimiLinearForCausalLM") else "self_attn"
    return (
        ZOO["KimiLinearForCausalLM"],
        {f"model.layers.0.{attention}.{name}": 4 for name in names},
        {f"layers.0.{attention}.{name}": heads for name in names},
    )


def _names(architecture):
    return " ".join(name for name, _ in ZOO[architecture].build().named_parameters())


@pytest.mark.parametrize("case", [gated_delta_net, kimi_delta_attention])
def test_heads_of_real_linear_attention_are_matrices_of_their_own(case):
    """One step with the clip on: each head's rows move by the polar factor of their own gradient."""
    architecture, layouts, expected = case()
    torch.manual_seed(0)
    model = architecture.build()
    options = dict(weight_decay=0.0, adjust_lr_fn="original", per_head=True, ns_dtype=torch.float32)
    optimizer = MuonClip(model, lr=0.1, layouts=layouts, **options)
    before = {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}
    tokens = architecture.inputs()["input_ids"]
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    seen = 0
    for name, parameter in model.named_parameters():
        heads = next((heads for end, heads in expected.items() if f".{end}." in name), None)
        if heads is None:
            continue
        seen += 1
        assert sorted(row for rows in heads for row in rows) == [*range(len(parameter))]
        for rows in heads:
            rows, gradient = list(rows), parameter.grad.numpy()
            polar = svd_polynomial(gradient[rows], resolve_coefficients("jordan"))
            scale = update_scale(*polar.shape, "original")
            now = parameter.detach().numpy()[rows]
            np.testing.assert_allclose(now, before[name][rows] - 0.1 * scale * polar, atol=1e-5, err_msg=name)
    assert seen == len(expected)
    declared = [line for line in optimizer.plan.parameters if line.reason == "as layouts= says"]
    assert len(declared) == len(expected)  # the search that the first step ended took none of them
    found = any(line.reason.startswith("attention projection") for line in optimizer.plan.parameters)
    assert found == (architecture.kind == "mla")  # under QK-norm no rows are known


def test_an_indexer_s_query_heads_are_declared():
    """DeepSeek's lightning indexer: its query projection has heads of its own, its key is one for all."""
    architecture = ZOO["DeepseekV3ForCausalLM"]
    sizes = dict(architecture.options, index_n_heads=3, index_head_dim=8, index_topk=4)
    torch.manual_seed(0)
    model = transformers.DeepseekV32ForCausalLM(transformers.DeepseekV32Config(**sizes))
    optimizer = MuonClip(model, lr=0.1, qk_clip=None, layouts={"*.indexer.wq_b": 3})
    lines = {line.name: line for line in optimizer.plan.parameters if ".0.self_attn.indexer." in line.name}
    (heads,) = (line for name, line in lines.items() if name.endswith("wq_b.weight"))
    assert heads.layout.describe(heads.shape) == "3 × (8×20)"
    assert all(line.layout.heads == () for name, line in lines.items() if name.endswith("wk.weight"))


def test_declared_heads_on_shards_are_those_of_the_whole(tmp_path):
    run_ranks(2, WORKER, tmp_path)
    for rank in range(2):
        errors = json.loads((tmp_path / f"{rank}.json").read_text())
        assert errors.keys() == {f"{kind} {name}" for kind in ("fsdp", "tensor") for name in ("*.q", "*.qkv")}
        assert max(errors.values()) <= 1e-12, errors
