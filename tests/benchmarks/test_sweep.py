"""The sweep: its witness against products written out here, its verdicts on clips that are wrong, and its table."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.__main__ import main
from benchmarks.studies.softmax_witness import SoftmaxWitness
from benchmarks.studies.sweep import Plan, compare, judge, read_sweep
from benchmarks.studies.sweep_architectures import ARCHITECTURES
from benchmarks.studies.sweep_models import Architecture
from muonclip.torch import MaxLogits, QKProjection

PAGE = Path(__file__).parents[2] / "docs" / "architectures"
HEADS, WIDTH, LENGTH = 3, 5, 6


class Layer(nn.Module):
    """Attention with distances, a causal mask, and perhaps a soft cap or the fused kernel."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.qkv = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH)
        self.out = nn.Linear(HEADS * WIDTH, HEADS * WIDTH)

    def heads(self, x):
        return self.qkv(x).unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4)

    def statistic(self, x):
        q, k, _ = self.heads(x)
        return torch.einsum("bhid,bhjd->bhij", q, k) * 0.9

    def forward(self, x):
        q, k, v = self.heads(x)
        later = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        distances = -torch.arange(LENGTH).sub(torch.arange(LENGTH)[:, None]).abs() * torch.rand(HEADS, 1, 1)
        if self.how == "fused":
            mask = distances.masked_fill(later, -math.inf)
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.9)
        else:
            scores = q @ k.mT * 0.9
            if self.how == "capped":
                scores = 2.5 * (scores / 2.5).tanh()
            scores = (scores + distances).masked_fill(later, -1e9)
            y = (scores.sigmoid() if self.how == "sigmoid" else scores.softmax(-1)) @ v
            y = y * y.sigmoid()  # a gate, which weighs nothing
        return x + self.out(y.transpose(1, 2).flatten(2))


class Inputs(list):
    def __call__(self, module, args):
        self.append(args[0].detach())


@pytest.fixture(params=["written out", "capped", "fused", "sigmoid"])
def watched(request):
    """Two layers, a witness of them, and what each layer received in its first run."""
    torch.manual_seed(0)
    model = nn.Sequential(Layer(request.param), Layer(request.param))
    x, received = 1.5 * torch.randn(2, LENGTH, HEADS * WIDTH), Inputs()
    hooks = [layer.register_forward_pre_hook(received) for layer in model]

    def call():
        torch.manual_seed(1)
        return model(x)

    witness = SoftmaxWitness(model, call)
    for hook in hooks:
        hook.remove()
    return model, witness, list(received)


def test_the_witness_reads_products_without_what_is_added(watched):
    model, witness, received = watched
    for layer, x, seen in zip(model, received, witness.attentions(), strict=True):
        wanted = layer.statistic(x)[seen.allowed]
        torch.testing.assert_close(seen.statistic[seen.allowed], wanted, rtol=1e-4, atol=1e-5)
        assert torch.equal(seen.allowed, torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(2, HEADS, -1, -1))
    assert [each.module for each in witness.attentions()] == ["0", "1"]


def test_each_attention_is_repeated_on_the_inputs_of_the_first_run(watched):
    model, witness, received = watched
    with torch.no_grad():
        model[0].qkv.weight[: HEADS * WIDTH] *= 0.3  # queries: what layer 1 receives would move
    for layer, x, seen in zip(model, received, witness.attentions(), strict=True):
        wanted = layer.statistic(x)[seen.allowed]
        torch.testing.assert_close(seen.statistic[seen.allowed], wanted, rtol=1e-4, atol=1e-5)


def test_a_softmax_of_a_router_is_no_attention():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.experts = nn.Linear(8, 4), nn.Parameter(torch.randn(4, 8, 8))

        def forward(self, x):
            return torch.einsum("be,eij,bj->bi", self.router(x).softmax(-1), self.experts, x)

    model = Routed()
    witness = SoftmaxWitness(model, lambda: model(torch.ones(2, 8)))
    assert not witness.attentions()
    assert len(witness.other_softmaxes) == 1


@pytest.mark.parametrize(
    ("quiet", "reported", "callers", "verdict"),
    [
        (1.0, 1.0, ["0", "1"], "found"),
        (0.9, 1.0, ["0", "1"], "inexact"),  # a quiet head was scaled
        (1.0, 1.2, ["0", "1"], "inexact"),  # the clip saw something else
        (1.0, 1.0, ["0"], "missed"),
    ],
)
def test_verdicts(watched, quiet, reported, callers, verdict):
    model, witness, _ = watched
    before = witness.attentions()
    tau = 0.6 * max(each.maximum for each in before)
    heads = {name: each.maxima().transpose(0, 1).flatten(1).amax(1) for name, each in zip("01", before, strict=True)}
    with torch.no_grad():
        for layer, of_heads in zip(model, heads.values(), strict=True):
            gamma = torch.where(of_heads > tau, tau / of_heads, quiet).repeat_interleave(WIDTH)
            layer.qkv.weight[: HEADS * WIDTH] *= gamma[:, None]
            layer.qkv.bias[: HEADS * WIDTH] *= gamma
    projections = {name: QKProjection("mha", HEADS, MaxLogits(HEADS), reason="scaled here") for name in callers}
    for projection in projections.values():
        object.__setattr__(projection, "reason", "")
    plan = Plan(projections, {name: [name] for name in callers})
    seen = {name: reported * heads[name] for name in callers}
    result = compare(Architecture("", ""), before, witness.attentions(), plan, seen, tau, 0)
    assert result.verdict == verdict
    assert result.missed == (("1",) if verdict == "missed" else ())


def test_a_library_that_is_not_installed_is_named():
    result = judge(Architecture("Model", "no_such_library"))
    assert result.verdict == "not installed"
    assert "no_such_library" in result.because


def test_the_command_writes_figures_and_table(tmp_path, capsys):
    models = ["GPT2LMHeadModel", "Qwen3ForCausalLM", "ResNetModel", "JetMoeForCausalLM"]
    assert main(["sweep", "--out", str(tmp_path), "--models", ",".join(models)]) == 0
    written = json.loads((tmp_path / "sweep.json").read_text())
    verdicts = {each["name"]: each["verdict"] for each in written["architectures"]}
    assert verdicts == dict(zip(models, ["found", "observed only", "no softmax", "refused"], strict=True))
    assert written["architectures"][0]["clipped"] == 2
    assert 0 <= written["architectures"][0]["clip"] < 1e-5
    table = (tmp_path / "sweep.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out
    assert all(f"| {name} | transformers | {verdict} |" in table for name, verdict in verdicts.items())


def test_the_table_of_the_page_is_that_of_its_figures():
    written = json.loads((PAGE / "sweep.json").read_text(encoding="utf-8"))
    assert (PAGE / "sweep.md").read_text(encoding="utf-8") == read_sweep(written)
    assert [each["name"] for each in written["architectures"]] == [each.name for each in ARCHITECTURES]
    assert len({each.name for each in ARCHITECTURES}) == len(ARCHITECTURES) > 60
