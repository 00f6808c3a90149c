"""A training step with MuonClip on a GPU: it never waits for the device, and replays as a CUDA graph.

The graph holds forward, backward, update and clip. What it leaves after several batches is compared with what steps
without it leave, from the same weights on the same batches.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from muonclip.selftest import Trained, layer, unsynchronised

_TOLERANCE = 1e-6  # of the largest weight
_WARM_UP, _STEPS = 3, 5


def records(dry_run: bool) -> Iterator[dict[str, Any]]:
    """Yield what came of both, in fp32 and bf16."""
    warnings.filterwarnings("ignore", "QK-Clip scales")
    device, width, length = ("cpu", 32, 16) if dry_run else ("cuda", 512, 512)
    torch.manual_seed(0)
    model = nn.Sequential(*(layer(width, 4) for _ in range(2))).to(device)
    batches = [torch.randn(2, length, width, device=device) for _ in range(_WARM_UP + _STEPS)]
    for dtype in (torch.float32, torch.bfloat16):
        of = {"dtype": str(dtype).removeprefix("torch.")}
        yield {"what": "no host synchronisation"} | of | _unsynchronised(Trained(model, batches[0], dtype), batches)
        # One kernel whose backward is deterministic, so that bits can be compared.
        with sdpa_kernel(SDPBackend.MATH):
            yield {"what": "replay of a CUDA graph"} | of | _replayed(model, batches, dtype)


def _unsynchronised(trained: Trained, batches: list[Tensor]) -> dict[str, Any]:
    error = unsynchronised(trained, batches)
    if error:
        return {"ok": False, "error": error.splitlines()}
    return {"ok": True, "clipped": trained.optimizer.qk_clip.report().clipped_heads}


def _replayed(model: nn.Module, batches: list[Tensor], dtype: torch.dtype) -> dict[str, Any]:
    eager, graphed = (Trained(model, batches[0], dtype) for _ in range(2))
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
    reports = [each.optimizer.qk_clip.report().clipped_heads for each in (eager, graphed)]
    return {
        "ok": max(differences) <= _TOLERANCE and reports[0] == reports[1] > 0,
        "difference": max(differences),
        "equal": all(torch.equal(a, b) for a, b in pairs),
        "clipped": reports,
        "captured": graphed.batch.is_cuda,
    }


def _replay(trained: Trained, batches: list[Tensor]) -> None:
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
