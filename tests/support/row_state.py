"""The example of docs/contributing.md, a variant of Muon with a state for each row, and the same in NumPy."""

import re
import types
from pathlib import Path

import numpy as np
from svd_oracle import svd_polynomial

from muonclip.core import resolve_coefficients
from muonclip.torch import Muon, MuonClip

PAGE = Path(__file__).parents[2] / "docs" / "contributing.md"


def page_s_rule():
    """The class of the section's first block, from a module of its own."""
    section = PAGE.read_text(encoding="utf-8").partition("## Adding state per row\n")[2]
    code = re.search(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)[1]
    module = types.ModuleType("normuon")
    exec(compile(code, str(PAGE), "exec"), module.__dict__)
    return module.NorMuonRule


NorMuonRule = page_s_rule()


class NorMuon(Muon):
    rule = NorMuonRule()


class NorMuonClip(MuonClip):
    rule = NorMuonRule()


def normuon_step(weight, momentum, squares, gradient, *, lr, weight_decay, scale, mu=0.95, beta2=0.95, eps=1e-8):
    """One step on one float64 matrix; returns the new weight, momentum and mean squares [rows, 1]."""
    momentum = mu * momentum + (1 - mu) * gradient
    update = svd_polynomial(mu * momentum + (1 - mu) * gradient, resolve_coefficients("jordan"))
    squares = beta2 * squares + (1 - beta2) * (update**2).mean(1, keepdims=True)
    scaled = update / (np.sqrt(squares) + eps)
    scaled *= np.linalg.norm(update) / np.linalg.norm(scaled)
    return weight - lr * (scale * scaled + weight_decay * weight), momentum, squares
