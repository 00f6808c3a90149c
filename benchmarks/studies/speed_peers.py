"""Muon by its other implementations, each with the settings that its own documentation calls fast.

Every entry makes the optimizer of matrices of two axes; one whose package is missing says so. AdamW's parameters are
those of PyTorch's fused one everywhere.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

LR, DECAY = 1e-4, 0.1


class Peer(NamedTuple):
    """An implementation: the package it comes from, its optimizer's step, and whether it compiles for minutes."""

    package: str
    make: Callable[[Sequence[Tensor]], Callable[[], object]]
    compiles: bool = False

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


def versions() -> dict[str, str]:
    """Return the version of every package that is installed; of one that is a plain folder, "source"."""
    found = {each.package: each for each in PEERS.values() if each.installed and each.package != "torch"}
    return {package: _version(package) for package in found}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "source"


def _torch(matrices: Sequence[Tensor], compiled: bool = False) -> Callable[[], object]:
    step = torch.optim.Muon(matrices, lr=LR, weight_decay=DECAY).step
    return torch.compile(step) if compiled else step


def _pytorch_optimizer(matrices: Sequence[Tensor], compiled: bool = False) -> Callable[[], object]:
    linears = [nn.Linear(1, 1, bias=False) for _ in matrices]  # what `create_optimizer` finds matrices in
    for linear, matrix in zip(linears, matrices, strict=True):
        linear.weight = matrix  # pyright: ignore[reportAttributeAccessIssue]
    create: Any = importlib.import_module("pytorch_optimizer").create_optimizer
    return create(nn.Sequential(*linears), "muon", lr=LR, weight_decay=DECAY, foreach=True, compile=compiled).step


def _heavyball(matrices: Sequence[Tensor]) -> Callable[[], object]:
    return importlib.import_module("heavyball").Muon(matrices, lr=LR, weight_decay=DECAY).step


def _dion(matrices: Sequence[Tensor]) -> Callable[[], object]:
    return importlib.import_module("dion").Muon(matrices, lr=LR, weight_decay=DECAY, nesterov=True).step


PEERS = {
    "torch.optim.Muon": Peer("torch", _torch),
    "torch.optim.Muon, compiled": Peer("torch", lambda matrices: _torch(matrices, compiled=True), compiles=True),
    "pytorch_optimizer": Peer("pytorch_optimizer", _pytorch_optimizer),
    "pytorch_optimizer, compiled": Peer(
        "pytorch_optimizer", lambda matrices: _pytorch_optimizer(matrices, compiled=True), compiles=True
    ),
    "heavyball": Peer("heavyball", _heavyball, compiles=True),
    "dion": Peer("dion", _dion, compiles=True),
}
