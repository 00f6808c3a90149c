"""Products of quack-kernels by name: when they are refused, and what is asked of the package, by a stand-in for it."""

import importlib.util
import sys
import types

import pytest
import torch
from torch import nn

from muonclip.core import iterate
from muonclip.torch import Muon
from muonclip.torch.update import quack_products as module
from muonclip.torch.update.products import PRODUCTS, choose_products
from muonclip.torch.update.quack_products import check_device, quack_products

CUDA = torch.device("cuda", 0)


def matrix():
    parameter = nn.Parameter(torch.randn(4, 8))
    parameter.grad = torch.ones_like(parameter)
    return parameter


@pytest.fixture
def installed(monkeypatch):
    """A package whose kernel does what quack's does: α AB + β C, of two stacks whose product is symmetric."""
    calls = []

    def gemm_symmetric(a, b, C=None, alpha=1.0, beta=1.0):
        calls.append(tuple(a.shape))
        product = alpha * (a.double() @ b.double())
        assert (product - product.mT).norm() <= 1e-2 * product.norm()
        return (product if C is None else product + beta * C.double()).to(a.dtype)

    interface = types.ModuleType("quack.gemm_interface")
    interface.gemm_symmetric = gemm_symmetric
    package = types.ModuleType("quack")
    package.__spec__ = importlib.util.spec_from_loader("quack", None)
    monkeypatch.setitem(sys.modules, "quack", package)
    monkeypatch.setitem(sys.modules, "quack.gemm_interface", interface)
    return calls


def test_products_that_are_not_installed_are_refused_when_they_are_asked_for():
    with pytest.raises(
        ValueError, match=r"needs quack-kernels, which is not installed: pip install .muonclip\[hopper\]"
    ):
        Muon([matrix()], products="quack")


def test_a_device_that_cannot_run_them_is_named_before_anything_moves(installed):
    parameter = matrix()
    before, optimizer = parameter.detach().clone(), Muon([parameter], products="quack")
    with pytest.raises(ValueError, match=r"param_groups\[0\].*products='quack' is for NVIDIA GPUs, not for cpu"):
        optimizer.step()
    assert torch.equal(parameter, before)
    assert not optimizer.state


@pytest.mark.parametrize(
    ("capability", "dtype", "refusal"),
    [
        ((7, 5), torch.bfloat16, r"cuda:0 has 7\.5"),
        ((13, 0), torch.bfloat16, r"compute capability 8\.0 to 12\.x; cuda:0 has 13\.0"),
        ((9, 0), torch.float32, "multiplies in bfloat16 or float16, not in torch.float32"),
        ((9, 0), torch.float16, None),
        ((8, 0), torch.bfloat16, None),
        ((12, 0), torch.bfloat16, None),
    ],
)
def test_devices_and_dtypes(monkeypatch, capability, dtype, refusal):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    if refusal is None:
        check_device(CUDA, dtype)
    else:
        with pytest.raises(ValueError, match=refusal):
            check_device(CUDA, dtype)


@pytest.mark.parametrize("form", ["standard", "gram"])
def test_the_iteration_is_the_same_and_asks_for_symmetric_products_alone(installed, monkeypatch, form):
    monkeypatch.setattr(module, "_TILE", 8)
    products = quack_products(PRODUCTS["baddbmm"])
    for rows, columns, is_served in ((16, 48, True), (8, 48, False), (16, 42, False)):
        installed.clear()
        x = torch.randn(2, rows, columns).bfloat16()
        x = x / x.norm(dim=(1, 2), keepdim=True)
        done, whole = (
            iterate(x, "jordan", None, form=form, xp=torch, products=each) for each in (products, PRODUCTS["baddbmm"])
        )
        assert (done.float() - whole.float()).norm() <= 0.05 * whole.float().norm()
        asked = set(installed)
        assert ((2, rows, columns) in asked) == is_served
        assert ((2, rows, rows) in asked) == (rows > 8)


def test_nobody_gets_them_without_asking(installed):
    assert choose_products(None, "cuda") is PRODUCTS["baddbmm"]
    assert choose_products("quack", "cuda") is not PRODUCTS["baddbmm"]
