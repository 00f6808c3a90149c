"""Entropy, spectral norms and update sizes against their definitions."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.training.probe import causal_entropy, head_norms, rms
from benchmarks.training.torch_learner import first_model


@pytest.mark.parametrize(("groups", "softcap"), [(4, None), (2, None), (4, 0.7)])
def test_entropy_by_its_definition(groups, softcap):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 5, 3, generator=generator)
    k = torch.randn(2, groups, 5, 3, generator=generator)
    expected = np.zeros(4)
    for b in range(2):
        for h in range(4):
            for i in range(5):
                s = np.array([0.6 * float(q[b, h, i] @ k[b, h * groups // 4, j]) for j in range(i + 1)])
                s = s if softcap is None else softcap * np.tanh(s / softcap)
                p = np.exp(s) / np.exp(s).sum()
                expected[h] -= (p * np.log(p)).sum() / 10
    np.testing.assert_allclose(causal_entropy(q, k, 0.6, softcap), expected, rtol=1e-5)


def test_entropy_of_even_and_of_single_attention():
    even = causal_entropy(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2), 1.0)
    assert even[0] == pytest.approx(np.mean([math.log(n) for n in (1, 2, 3, 4)]))
    k = 1e3 * torch.eye(4)[None, None]
    assert causal_entropy(k, k, 1.0)[0] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("attention", ["mla", "gqa"])
def test_norms_are_those_of_the_rows_of_each_head(experiment, attention):
    other = replace(experiment, model=replace(experiment.model, attention=attention))
    model = first_model(other, other.arm("muon"), 0)
    config, attn = model.config, model.layers[1].attn
    parts = {side: [rows for of, rows in attn.declare().parts() if of == side] for side in ("query", "key")}
    if attention == "mla":
        q = attn.q_b_proj.weight.detach().numpy().reshape(config.num_heads, config.qk_head_dim, -1)
        kv = attn.kv_b_proj.weight.detach().numpy().reshape(config.num_heads, -1, config.kv_lora_rank)
        k = kv[:, : config.qk_nope_head_dim]
    else:
        q = attn.q_proj.weight.detach().numpy().reshape(config.num_heads, config.head_dim, -1)
        k = attn.k_proj.weight.detach().numpy().reshape(config.num_kv_heads, config.head_dim, -1)
    np.testing.assert_allclose(head_norms(parts["query"]), np.linalg.svd(q, compute_uv=False)[:, 0], rtol=1e-5)
    np.testing.assert_allclose(head_norms(parts["key"]), np.linalg.svd(k, compute_uv=False)[:, 0], rtol=1e-5)


def test_rms():
    assert rms([torch.tensor([3.0, 4.0]), torch.zeros(2)]) == pytest.approx(2.5)
