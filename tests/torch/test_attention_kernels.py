"""A kernel is added by a file and a line; models that bound its function early, by name, are observed too."""

import importlib
import math
import sys
from functools import partial

import pytest
import torch

from muonclip.torch import QKClip
from muonclip.torch.observe import KERNELS, AttentionCall, AttentionKernel, handled

PACKAGE = '''
import math, torch

def toy_attention(q, k, v, softmax_scale=None, causal=False):
    """[B, T, H, D], and the maxima of the logits."""
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (softmax_scale or q.shape[-1] ** -0.5)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
'''
MODEL = """
from torch import nn
from toy_kernel_package import toy_attention

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 16, bias=False) for _ in range(3))

    def heads(self, x):
        return [m(x).unflatten(-1, (4, 4)) for m in (self.a, self.b, self.c)]

    def forward(self, x):
        q, k, v = self.heads(x)
        return toy_attention(q=q, k=k, v=v, causal=True, softmax_scale=2.0).flatten(2)
"""


def read(host, q, k, v, softmax_scale=None, causal=False, *, with_max=False):
    def run_with_max():
        scores = torch.einsum("bihd,bjhd->bhij", q, k).detach() * softmax_scale
        forbidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return host(q, k, v, softmax_scale, causal), scores.masked_fill(forbidden, -math.inf).amax((0, 2, 3))

    return AttentionCall(
        AttentionKernel("toy attention"),
        partial(host, q, k, v, softmax_scale, causal),
        q,
        k,
        v,
        softmax_scale,
        is_causal=causal,
        layout="positions, heads",
        run_with_max=run_with_max if with_max else None,
    )


@pytest.fixture
def layer(tmp_path, monkeypatch):
    """A layer whose module has bound the kernel's function by name before anybody observes it."""
    monkeypatch.syspath_prepend(tmp_path)
    for name, source in (("toy_kernel_package", PACKAGE), ("toy_kernel_model", MODEL)):
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
    torch.manual_seed(0)
    yield importlib.import_module("toy_kernel_model").Layer()
    for name in ("toy_kernel_package", "toy_kernel_model"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("with_max", [False, True])
def test_a_kernel_is_a_file_and_a_line(layer, no_other_patches, with_max):
    kernel = AttentionKernel(
        "toy attention", "toy_kernel_package:toy_attention", handled(partial(read, with_max=with_max))
    )
    KERNELS.append(kernel)
    host, package, model = (
        sys.modules["toy_kernel_model"].toy_attention,
        sys.modules["toy_kernel_package"],
        sys.modules["toy_kernel_model"],
    )
    try:
        x = torch.randn(2, 8, 16)

        def maxima():
            q, k, _ = (t.transpose(1, 2).detach() for t in layer.heads(x))
            forbidden = torch.ones(8, 8, dtype=torch.bool).triu(1)
            return (2.0 * q @ k.mT).masked_fill(forbidden, -math.inf).amax((0, 2, 3))

        expected, before = layer(x), maxima()
        clip = QKClip(layer, tau=before.median().item(), observe="always")
        assert torch.equal(layer(x), expected)
        assert clip.sources() == {"": "toy attention: norm bound, then exact tiles, always"}
        assert package.toy_attention is model.toy_attention is not host
        clip.step()
        torch.testing.assert_close(clip.report().layers[""].max_logits, before, rtol=1e-5, atol=0)
        torch.testing.assert_close(maxima(), before.clamp(max=clip.tau), rtol=1e-5, atol=0)
        clip.remove()
        assert package.toy_attention is model.toy_attention is host
    finally:
        KERNELS.remove(kernel)


def test_a_kernel_that_is_not_registered_is_not_touched(layer):
    """It is written out below its function, so that its products are followed instead."""
    host = sys.modules["toy_kernel_package"].toy_attention
    clip = QKClip(layer, example_inputs=torch.randn(2, 8, 16))
    assert clip.sources()[""].startswith("product and softmax")
    assert sys.modules["toy_kernel_model"].toy_attention is host
