"""The iteration on a device against float64 on the processor: an update of `Muon`, in each form and dtype."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

from muonclip.selftest.outcomes import Outcome, attempted, within

_SHAPES = ((64, 64), (48, 160), (160, 48), (12, 8, 24), (256, 384), (512, 64))
_TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 6e-2, "float16": 6e-3}  # of the Frobenius norm
_FORMS: tuple[Literal["standard", "gram"], ...] = ("standard", "gram")


def dtypes_on(device: str) -> list[str]:
    """Return the dtypes in which a device multiplies matrices, widest first."""
    without = {"mps": "float64", "cpu": "float16"}
    return [name for name in _TOLERANCES if name != without.get(device)]


def iteration(device: str) -> Iterator[Outcome]:
    """Compare updates with those of the core's iteration, several matrices of a shape, stacks and tall ones."""
    import torch

    from muonclip.core import orthogonalize

    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator) for shape in _SHAPES for _ in range(2)]
    polar = [orthogonalize(each.double(), xp=torch) for each in gradients]
    for dtype in dtypes_on(device):
        for form in _FORMS:
            name = f"iteration, {form} form, {dtype}"
            yield attempted(name, partial(_compared, name, device, form, dtype, gradients, polar))


def _compared(
    name: str, device: str, form: Literal["standard", "gram"], dtype: str, gradients: list[Any], polar: list[Any]
) -> Outcome:
    import torch
    from torch import nn

    from muonclip.torch import Muon

    of_weights = torch.float64 if dtype == "float64" else torch.float32
    weights = [nn.Parameter(torch.zeros(each.shape, device=device, dtype=of_weights)) for each in gradients]
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient.to(weight)
    optimizer = Muon(
        weights, 1.0, 0.0, 0.0, nesterov=False, ns_coefficients="jordan",
        adjust_lr_fn=1.0, ns_dtype=getattr(torch, dtype), ns_form=form,
    )  # fmt: skip
    optimizer.step()
    pairs = zip(weights, polar, strict=True)
    errors = [(weight.detach().cpu().double() + each).norm() / each.norm() for weight, each in pairs]
    return within(name, torch.stack(errors).max().item(), _TOLERANCES[dtype])
