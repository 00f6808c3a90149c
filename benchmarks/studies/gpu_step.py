"""A training step with MuonClip on a GPU: it never waits for the device, and replays as a CUDA graph.

The graph holds forward, backward, update and clip. What it leaves after several batches is compared with what steps
without it leave, from the same weights on the same batches.
"""

from __future__ import annotations

import copy
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from muonclip.torch import MuonClip

_TOLERANCE = 1e-6  # of the largest weight
_WARM_UP, _STEPS = 3, 5
_TAU = 0.02  # which heads pass, so that the clip does something


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        self.norm = nn.RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


class _Trained:
    """A model, its optimizer, and a batch that stays in its place."""

    def __init__(self, model: nn.Module, like: Tensor, dtype: torch.dtype) -> None:
        self.model, self.dtype = copy.deepcopy(model), dtype
        self.batch = torch.zeros_like(like)
        self.optimizer = MuonClip(self.model, lr=1e-2, tau=_TAU, capturable=like.is_cuda)

    def step(self) -> None:
        """Take one step; gradients stay where they are."""
        self.optimizer.zero_grad(set_to_none=False)
        with torch.autocast(self.batch.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            loss = self.model(self.batch).square().mean()
        loss.backward()
        self.optimizer.step()

    def steps(self, batches: list[Tensor]) -> None:
        """Take a step with each batch."""
        for batch in batches:
            self.batch.copy_(batch)
            self.step()


def records(dry_run: bool) -> Iterator[dict[str, Any]]:
    """Yield what came of both, in fp32 and bf16."""
    warnings.filterwarnings("ignore", "QK-Clip scales")
    device, width, length = ("cpu", 32, 16) if dry_run else ("cuda", 512, 512)
    torch.manual_seed(0)
    model = nn.Sequential(*(_Layer(width, 4) for _ in range(2))).to(device)
    batches = [torch.randn(2, length, width, device=device) for _ in range(_WARM_UP + _STEPS)]
    for dtype in (torch.float32, torch.bfloat16):
        of = {"dtype": str(dtype).removeprefix("torch.")}
        yield {"what": "no host synchronisation"} | of | _unsynchronised(_Trained(model, batches[0], dtype), batches)
        # One kernel whose backward is deterministic, so that bits can be compared.
        with sdpa_kernel(SDPBackend.MATH):
            yield {"what": "replay of a CUDA graph"} | of | _replayed(model, batches, dtype)


def _unsynchronised(trained: _Trained, batches: list[Tensor]) -> dict[str, Any]:
    trained.steps(batches[:_WARM_UP])
    mode = torch.cuda.get_sync_debug_mode() if trained.batch.is_cuda else 0
    try:
        if trained.batch.is_cuda:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        trained.steps(batches[_WARM_UP:])
    except RuntimeError:
        return {"ok": False, "error": traceback.format_exc().splitlines()[-12:]}
    finally:
        if trained.batch.is_cuda:
            torch.cuda.set_sync_debug_mode(mode)
    return {"ok": True, "clipped": trained.optimizer.qk_clip.report().clipped_heads}  # pyright: ignore[reportOptionalMemberAccess]


def _replayed(model: nn.Module, batches: list[Tensor], dtype: torch.dtype) -> dict[str, Any]:
    eager, graphed = (_Trained(model, batches[0], dtype) for _ in range(2))
    eager.steps(batches)
    try:
        if graphed.batch.is_cuda:
            _replay(graphed, batches)
        else:
            graphed.steps(batches)
    except RuntimeError:
        return {"ok": False, "error": traceback.format_exc().splitlines()[-12:]}
    pairs = list(zip(eager.model.parameters(), graphed.model.parameters(), strict=True))
    differences = [((a - b).abs().max() / a.abs().max()).item() for a, b in pairs]
    reports = [each.optimizer.qk_clip.report().clipped_heads for each in (eager, graphed)]  # pyright: ignore[reportOptionalMemberAccess]
    return {
        "ok": max(differences) <= _TOLERANCE and reports[0] == reports[1] > 0,
        "difference": max(differences),
        "equal": all(torch.equal(a, b) for a, b in pairs),
        "clipped": reports,
        "captured": graphed.batch.is_cuda,
    }


def _replay(trained: _Trained, batches: list[Tensor]) -> None:
    """Take the first steps as they are, on a stream of their own, capture one, and replay it with the other batches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        trained.steps(batches[:_WARM_UP])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        trained.step()
    for batch in batches[_WARM_UP:]:
        trained.batch.copy_(batch)
        graph.replay()
    torch.cuda.synchronize()
