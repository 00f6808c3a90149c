"""Training steps of a self-test: on CUDA none waits for the device; under torchrun all ranks get the same factors."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

from muonclip.selftest.outcomes import Outcome

_WARM_UP, _STEPS = 3, 5
_PATIENCE = timedelta(seconds=60)  # with ranks that do not come
_TAU = 0.02  # which heads pass, so that the clip does something


def layer(width: int, heads: int) -> Any:
    """Return a layer of a transformer, [B, T, width] → the same."""
    import torch.nn.functional as F
    from torch import nn

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
            self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
            self.norm = nn.LayerNorm(width)

        def forward(self, x: Any) -> Any:
            q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            return x + self.down(F.gelu(self.up(x)))

    return Layer()


class Trained:
    """A copy of a model, its optimizer, and a batch that stays in its place. `dtype`: of autocast; float32 is none."""

    def __init__(self, model: Any, like: Any, dtype: Any) -> None:
        import copy

        from muonclip.torch import MuonClip

        self.model, self.dtype = copy.deepcopy(model), dtype
        self.batch = like.clone().zero_()
        self.optimizer = MuonClip(self.model, lr=1e-2, tau=_TAU, capturable=like.is_cuda)

    def step(self) -> None:
        """Take one step; gradients stay where they are."""
        import torch

        self.optimizer.zero_grad(set_to_none=False)
        with torch.autocast(self.batch.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            loss = self.model(self.batch).square().mean()
        loss.backward()
        self.optimizer.step()

    def steps(self, batches: Sequence[Any]) -> None:
        """Take a step with each batch."""
        for batch in batches:
            self.batch.copy_(batch)
            self.step()


def unsynchronised(trained: Trained, batches: Sequence[Any]) -> str:
    """Train; return the error where the host waits for a CUDA device after the first steps, else ""."""
    import torch

    trained.steps(batches[:_WARM_UP])
    if not trained.batch.is_cuda:
        trained.steps(batches[_WARM_UP:])
        return ""
    mode = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        trained.steps(batches[_WARM_UP:])
    except RuntimeError:
        return "\n".join(traceback.format_exc().splitlines()[-12:])
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return ""


def training(device: str) -> Iterator[Outcome]:
    """Train a small model in float32 and under autocast: numbers stay finite, the clip acts, the host does not wait."""
    import torch
    from torch import nn

    width, length = (512, 512) if device == "cuda" else (64, 32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(*(layer(width, 4) for _ in range(2))).to(device)
        batches = [torch.randn(2, length, width).to(device) for _ in range(_WARM_UP + _STEPS)]
    for name in ("float32", "bfloat16"):
        trained = Trained(model, batches[0], getattr(torch, name))
        error = unsynchronised(trained, batches)
        finite = all(bool(each.isfinite().all()) for each in trained.model.parameters())
        clipped = trained.optimizer.qk_clip.report().clipped_heads
        seen = (
            f"{len(batches)} steps, {clipped} of 8 heads clipped in the last, weights {'' if finite else 'not '}finite"
        )
        yield Outcome(f"training, {name}", finite and clipped > 0, seen)
        waits = f"no host synchronisation in a step, {name}"
        if device != "cuda":
            yield Outcome(waits, None, "CUDA alone tells")
        else:
            yield Outcome(waits, not error, "the host waits for the device" if error else f"{_STEPS} steps", error)


def collective(device: str) -> Iterator[Outcome]:
    """Let each rank observe a batch of its own: the maximum of each head, over all ranks, must reach all of them."""
    name = "maxima of all ranks"
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield Outcome(name, None, "for several processes: torchrun --nproc-per-node 2 -m muonclip check")
        return
    if device == "mps":
        yield Outcome(name, None, "torch has no collectives there")
        return
    import torch.distributed as dist

    is_own = not dist.is_initialized()
    if is_own:
        dist.init_process_group({"cpu": "gloo"}.get(device), timeout=_PATIENCE)
    try:
        yield _shared(name, device)
    finally:
        if is_own:
            dist.destroy_process_group()


def _shared(name: str, device: str) -> Outcome:
    import torch
    import torch.distributed as dist

    from muonclip.torch import QKClip

    torch.manual_seed(0)  # the same weights on all ranks
    model = layer(64, 4).to(device)
    batch = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(dist.get_rank())).to(device)
    own_group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    assert isinstance(own_group, dist.ProcessGroup)
    alone = QKClip(model, tau=float("inf"), process_group=own_group)
    model(batch).square().mean().backward()
    alone.step()
    of_ranks: list[list[float]] = [[]] * dist.get_world_size()
    dist.all_gather_object(of_ranks, alone.report().layers[""].max_logits.tolist())
    clip = QKClip(model, tau=0.9 * min(of_ranks[0]))
    model(batch).square().mean().backward()
    clip.step()
    report = clip.report().layers[""]
    highest = [max(heads) for heads in zip(*of_ranks, strict=True)]
    factors: list[list[float]] = [[]] * dist.get_world_size()
    dist.all_gather_object(factors, report.gamma.tolist())
    error = max(abs(seen / own - 1) for seen, own in zip(report.max_logits.tolist(), highest, strict=True))
    differ = any(each != factors[0] for each in factors)
    seen = f"{dist.get_world_size()} ranks by {dist.get_backend()}, maxima off by {error:.0e} of 1e-05"
    holds = error <= 1e-5 and not differ and of_ranks[0] != of_ranks[-1]
    return Outcome(name, holds, seen + (", factors differ between ranks" if differ else ""))
