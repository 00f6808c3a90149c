"""The clip on attention kernels, by gauge and by scale, against dense logits in float64 on the processor.

gauge   queries × 4, keys ÷ 4   no logit moves, and no maximum that is observed
scale   S > τ                   the head ends at min(S, τ); all others keep their weights bit for bit
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from muonclip.selftest.kernels import COMPILED, TRANSFORMERS, Kernel, kernels
from muonclip.selftest.outcomes import Outcome, attempted

_HEADS, _WIDTH, _LENGTH, _INTO = 4, 32, 40, 48
_LOUDNESS = (3.0, 0.5, 6.0, 1.0)  # of the heads' queries
_OBSERVED = {"float32": 1e-4, "bfloat16": 1e-2}  # largest relative errors of a maximum
_CLIPPED = {"float32": 1e-4, "bfloat16": 4e-2}  # and of what a head ends at: weights and logits are rounded


def clip(device: str) -> Iterator[Outcome]:
    """Try each kernel that is installed and runs on the device."""
    for kernel in kernels(device):
        yield _tried(kernel, device)


def clip_transformers(device: str) -> Iterator[Outcome]:
    """Try Hugging Face's attention interface."""
    for kernel in TRANSFORMERS:
        yield _tried(kernel, device)


def clip_compiled(device: str) -> Iterator[Outcome]:
    """Try FlexAttention as it is used on GPUs."""
    yield _tried(COMPILED, device)


def _tried(kernel: Kernel, device: str) -> Outcome:
    if not kernel.is_installed():
        return Outcome(f"clip, {kernel.name}", None, "not installed")
    if kernel.device not in ("", device):
        return Outcome(f"clip, {kernel.name}", None, f"runs on {kernel.device} alone")
    return attempted(f"clip, {kernel.name}", partial(clipped_by, kernel, device))


def clipped_by(kernel: Kernel, device: str) -> Outcome:
    """Try the clip on one kernel. What the kernel raises without a clip is not a fault of this library, and no outcome,
    unless it runs everywhere."""
    name = f"clip, {kernel.name}"
    try:
        with kernel.setting():
            model, x = _made(kernel, device)
            _trained(model, x)
    except Exception as error:  # of a kernel that is not for this device, or of a broken installation
        if kernel.is_everywhere:
            raise
        return Outcome(name, None, f"does not run here: {type(error).__name__}: {str(error).strip()[:200]}")
    with kernel.setting():
        return _compared(name, kernel, model, x)


def _made(kernel: Kernel, device: str) -> tuple[Any, Any]:
    import torch
    from torch import nn

    class Attention(nn.Module):
        def __init__(self, attend: Any) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(_INTO, _HEADS * _WIDTH) for _ in range(3))
            self.o, self.attend = nn.Linear(_HEADS * _WIDTH, _INTO), attend

        def heads(self, x: Any) -> tuple[Any, ...]:
            return tuple(each(x).unflatten(-1, (_HEADS, _WIDTH)) for each in (self.q, self.k, self.v))

        def forward(self, x: Any) -> Any:
            return self.o(self.attend(*self.heads(x)).flatten(2))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kernel.model:
            model, x = kernel.load(_HEADS, _WIDTH, _INTO, _LENGTH)
        else:
            model, x = Attention(kernel.load()), torch.randn(2, _LENGTH, _INTO)
    with torch.no_grad():
        model.q.weight.view(_HEADS, -1).mul_(torch.tensor(_LOUDNESS)[:, None])
    dtype = getattr(torch, kernel.dtype)
    return model.to(device, dtype), x.to(device, dtype if x.is_floating_point() else None)


def _compared(name: str, kernel: Kernel, model: Any, x: Any) -> Outcome:
    """Gauge and clip a model whose weights have been trained by nobody, and compare."""
    import torch

    from muonclip.torch import QKClip

    before, plain = _largest(kernel, model, x), model(x).detach()
    tau = before.sort().values[1:3].mean().item()  # two heads are above
    with torch.no_grad():
        for projection, factor in ((model.q, 4.0), (model.k, 0.25)):
            for parameter in projection.parameters():
                parameter.mul_(factor)
    clip = QKClip(model, tau, observe="always")
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    disturbed = _relative((_trained(model, x) - plain).abs().max(), plain.abs().max())
    clip.step()
    (report,) = clip.report().layers.values()
    clip.remove()
    gauge = _relative((report.max_logits.cpu().double() - before).abs(), before.abs())
    scale = _relative((_largest(kernel, model, x) - before.clamp(max=tau)).abs(), before.abs())
    quiet = (before <= tau).to(x.device)
    scaled = {id(parameter) for projection in (model.q, model.k) for parameter in projection.parameters()}
    kept = [
        torch.equal(*(each.unflatten(0, (_HEADS, -1))[quiet] for each in pair) if id(pair[1]) in scaled else pair)
        for name, pair in ((name, (weights[name], parameter)) for name, parameter in model.named_parameters())
    ]
    observed, clipped = _OBSERVED[kernel.dtype], _CLIPPED[kernel.dtype]
    of_maxima = f"maxima off by {gauge:.0e} of {observed:.0e}"
    of_heads = f"{_HEADS - int(quiet.sum())} of {_HEADS} heads end off min(S, tau) by {scale:.0e} of {clipped:.0e}"
    wrong = {
        "the forward returns something else under observation": disturbed <= observed,
        of_maxima: gauge <= observed,
        of_heads: scale <= clipped,
        "weights of heads at most at tau have moved": all(kept),
    }
    faults = [words for words, holds in wrong.items() if not holds]
    return Outcome(name, not faults, "; ".join(faults or (of_maxima, of_heads)))


def _trained(model: Any, x: Any) -> Any:
    """Return what a forward returns, with gradients behind it."""
    result = model(x)
    model.zero_grad()
    result.float().square().mean().backward()
    return result.detach()


def _relative(error: Any, size: Any) -> float:
    return (error / size).max().item()


def _largest(kernel: Kernel, model: Any, x: Any) -> Any:
    """Return the largest logit of each head [heads], of what the kernel gets, in float64 on the processor."""
    import torch

    with torch.no_grad():
        q, k, _ = (each.cpu().double() for each in model.heads(x))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / _WIDTH**0.5
    if kernel.causal:
        scores.masked_fill_(torch.ones(_LENGTH, _LENGTH, dtype=torch.bool).triu(1), -torch.inf)
    return scores.amax((0, 2, 3))
