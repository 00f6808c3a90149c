"""An attention that calls a kernel of a package, and what it must be observed and clipped to, in float64.

The packages do not run without a GPU; `kernel_packages` has stand-ins with their signatures and structure, which
compute dense attention below autograd.
"""

import importlib
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from muonclip.torch import QKClip

STAND_INS = Path(__file__).parent / "kernel_packages"
WIDTH, HEADS, GROUPS, HEAD, VALUE = 10, 4, 2, 8, 6


@contextmanager
def stand_ins(path):
    """The stand-ins of packages, which nobody else finds; `path` is pytest's monkeypatch."""
    names = {each.stem for each in STAND_INS.iterdir()}

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] in names]:
            del sys.modules[name]

    forget()
    path.syspath_prepend(STAND_INS)
    yield
    forget()


class Attention(nn.Module):
    """A user's attention. Queries of `x`, keys of `memory`, of another number of heads and another width of values."""

    def __init__(self, call, groups=GROUPS, value=VALUE):
        super().__init__()
        self.call = [call]
        self.groups = groups
        self.q = nn.Linear(WIDTH, HEADS * HEAD)
        self.k = nn.Linear(WIDTH, groups * HEAD)
        self.v = nn.Linear(WIDTH, groups * value)
        self.o = nn.Linear(HEADS * value, WIDTH)
        with torch.no_grad():
            self.q.weight.view(HEADS, -1).mul_(torch.tensor([3.0, 0.5, 6.0, 1.0])[:, None])

    def heads(self, x, memory):
        q, k, v = self.q(x), self.k(memory), self.v(memory)
        return q.unflatten(-1, (HEADS, -1)), k.unflatten(-1, (self.groups, -1)), v.unflatten(-1, (self.groups, -1))

    def forward(self, x, memory=None, options=None):
        q, k, v = self.heads(x, x if memory is None else memory)
        return self.o(self.call[0](q, k, v, **(options or {})).flatten(2))


def largest(model, x, memory, options):
    """[H] in float64: of each sequence alone, over the pairs that the kernel computes."""
    pairs_of = importlib.import_module("dense_attention").pairs_of
    with torch.no_grad():
        q, k, _ = model.double().heads(x.double(), memory.double())
    model.float()
    q, k = q.numpy(), k.numpy().repeat(HEADS // model.groups, 2)
    sequences = list(zip(q, k, strict=True))
    if "starts" in options:
        of_q, of_k = (each.tolist() for each in options["starts"])
        ends = zip(of_q, of_q[1:], of_k, of_k[1:], strict=False)
        sequences = [(q[0, a:b], k[0, c:d]) for a, b, c, d in ends]
    scale = options.get("softmax_scale") or HEAD**-0.5
    maxima = np.full(HEADS, -np.inf)
    for q, k in sequences:
        allowed = pairs_of(len(q), len(k), options.get("causal", False), options.get("window_size") or (None, None))
        scores = np.where(allowed, scale * np.einsum("ihd,jhd->hij", q, k), -np.inf)
        maxima = np.maximum(maxima, scores.max((1, 2), initial=-np.inf))
    return maxima


def starts(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def run_case(call, options, *, cross, groups=GROUPS, value=VALUE, observe="always", tau=None):
    torch.manual_seed(0)
    model = Attention(call, groups, value)
    batch = 1 if "starts" in options else 2
    x = torch.randn(batch, 11, WIDTH)
    memory = torch.randn(batch, 15, WIDTH) if cross else x
    before = largest(model, x, memory, options)
    expected = model(x, memory, options)
    expected.square().mean().backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    clip = QKClip(model, tau=float(np.median(before)) if tau is None else tau, observe=observe)
    result = model(x, memory, options)
    assert torch.equal(result, expected)
    result.square().mean().backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
    clip.step()
    return model, clip, before, weights, lambda: largest(model, x, memory, options)


def assert_clipped(case):
    model, clip, before, weights, after = case
    report = clip.report().layers[""]
    loud = before > clip.tau
    of_all = report.exact.numpy()
    assert of_all[loud].all()
    np.testing.assert_allclose(report.max_logits[of_all], before[of_all], rtol=1e-5)
    np.testing.assert_allclose(after(), np.minimum(before, clip.tau), rtol=1e-5)
    assert 0 < loud.sum() < HEADS
    for name, parameter in model.named_parameters():
        if not name.startswith(("q.", "k.")):
            assert torch.equal(parameter, weights[name])
        elif name.startswith("q.") or model.groups == HEADS:
            for head in np.flatnonzero(~loud):
                old, new = (each.unflatten(0, (HEADS, -1))[head] for each in (weights[name], parameter))
                assert torch.equal(old, new)
        else:
            assert torch.equal(parameter, weights[name])  # keys that several heads share


def assert_clipped_to(model, inputs, largest, *, observe="always", tau=None):
    """Run a step of the clip alone, whose loud heads must end at τ and whose quiet ones must not move.

    `largest`: [H] in float64, as the weights are. With a τ above all of them nothing may move. Returns the report of
    the attention, and the maxima before.
    """
    before = largest()
    expected = model(*inputs)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    clip = QKClip(model, tau=float(np.median(before)) if tau is None else tau, observe=observe)
    result = model(*inputs)
    assert torch.equal(result, expected)
    result.square().mean().backward()
    clip.step()
    (report,) = clip.report().layers.values()
    loud, exact = before > clip.tau, report.exact.numpy()
    assert exact[loud].all()
    np.testing.assert_allclose(report.max_logits[exact], before[exact], rtol=1e-5)
    np.testing.assert_allclose(largest(), np.minimum(before, clip.tau), rtol=1e-5)
    for name, parameter in model.named_parameters():
        if name.startswith(("q.", "k.")):
            for head in np.flatnonzero(~loud):
                old, new = (each.unflatten(0, (HEADS, -1))[head] for each in (weights[name], parameter))
                assert torch.equal(old, new)
        else:
            assert torch.equal(parameter, weights[name])
    clip.remove()
    return report, before
