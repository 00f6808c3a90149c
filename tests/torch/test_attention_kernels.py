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


EARLY = {
    "early_core": """
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.nn.attention.flex_attention import flex_attention

def attend(q, k, v):
    return sdpa(q, k, v, is_causal=True)
""",
    "early_base": """
from torch import nn
from early_core import attend

class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 12) for _ in range(3))

    def forward(self, x):
        return self.attend(*(m(x).unflatten(-1, (3, 4)).transpose(1, 2) for m in (self.a, self.b, self.c)))

    def attend(self, q, k, v):
        return attend(q, k, v)
""",
    "early_model": """
from early_base import Base
import early_core

class Layer(Base):
    pass

FUNCTIONS = [early_core.sdpa, early_core.flex_attention]

class ByNumber(Base):
    def __init__(self, number):
        super().__init__()
        self.number = number

    def attend(self, q, k, v):
        return FUNCTIONS[self.number](q, k, v)
""",
}


@pytest.fixture
def early(tmp_path, monkeypatch, no_other_patches):
    """Files of a model that have bound kernels by name before anybody observes it."""
    monkeypatch.syspath_prepend(tmp_path)
    for name, source in EARLY.items():
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("early_model")
    for name in EARLY:
        sys.modules.pop(name, None)


def test_a_name_in_the_file_of_a_base_class_or_of_its_functions_is_patched(early):
    host, core = sys.modules["early_core"].sdpa, sys.modules["early_core"]
    clip = QKClip(early.Layer(), example_inputs=torch.randn(2, 5, 6))
    assert list(clip.projections) == [""]
    assert core.sdpa is not host
    clip.remove()
    assert core.sdpa is host


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("number", "kernel"), list(enumerate(("scaled_dot_product_attention", "flex_attention"))))
def test_a_kernel_that_no_patch_reaches_is_refused_by_name(early, monkeypatch, number, kernel):
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)
    with pytest.raises(ValueError, match=f"the model: it calls {kernel} through a reference that QK-Clip cannot reach"):
        QKClip(early.ByNumber(number), example_inputs=torch.randn(2, 5, 6))


LATE_MODEL = """
from torch import nn
import torch.nn.functional as F
from toy_kernel_model import Layer

class Late(Layer):
    imports = False

    def forward(self, x):
        q, k, v = self.heads(x)
        if self.imports:
            from toy_kernel_package import toy_attention

            return toy_attention(q, k, v, causal=True, softmax_scale=2.0).flatten(2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=2.0).transpose(1, 2).flatten(2)
"""


@pytest.mark.parametrize("first", [True, False], ids=["in the first forward", "in a later one"])
def test_a_kernel_imported_while_the_model_runs_is_observed(tmp_path, monkeypatch, no_other_patches, first):
    """Its package was not there when the clip was made, and forwards without it may have gone before."""
    monkeypatch.syspath_prepend(tmp_path)
    names = "toy_kernel_package", "toy_kernel_model", "late_kernel_model"
    sources = PACKAGE, MODEL.replace("from toy_kernel_package import toy_attention", ""), LATE_MODEL
    for name, source in zip(names, sources, strict=True):
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
    kernel = AttentionKernel("toy attention", "toy_kernel_package:toy_attention", handled(read))
    KERNELS.append(kernel)
    torch.manual_seed(0)
    try:
        layer = importlib.import_module("late_kernel_model").Late()
        layer.imports = first
        clip = QKClip(layer, tau=0.5, observe="always")
        for _ in range(2):
            x = torch.randn(2, 8, 16)
            q, k, _ = (t.transpose(1, 2).detach() for t in layer.heads(x))
            forbidden = torch.ones(8, 8, dtype=torch.bool).triu(1)
            expected = (2.0 * q @ k.mT).masked_fill(forbidden, -math.inf).amax((0, 2, 3))
            layer(x).sum().backward()
            clip.step()
            torch.testing.assert_close(clip.report().layers[""].max_logits, expected, rtol=1e-5, atol=0)
            layer.imports = True
        package = sys.modules["toy_kernel_package"]
        assert package.toy_attention is not package.__dict__["toy_attention"].__dict__["_qk_host"]
        clip.remove()
        assert package.toy_attention.__module__ == "toy_kernel_package"
        assert not hasattr(package.toy_attention, "_qk_host")
    finally:
        KERNELS.remove(kernel)
        for name in names:
            sys.modules.pop(name, None)
