"""The time of one optimizer step by MuonClip and by its peers: the same gradients, in turn, in one process.

MuonClip runs twice: what the second differs from the first by is noise, and a peer is called faster only beyond it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.records.intervals import median_interval
from benchmarks.studies.speed_limit import Products, copies, passes, peak_bytes
from benchmarks.studies.speed_peers import DECAY, LR, PEERS
from benchmarks.studies.speed_sets import Weight, split
from benchmarks.training.timing import in_turn, seconds, torch_threads, wall_clock
from muonclip.torch import MuonClip

OURS, AGAIN, PRODUCTS, COPY = "muonclip", "muonclip, again", "its products alone", "a copy of the weights"
WARM_UP = 1  # in addition to the step that compiles


class Arm:
    """One optimizer with weights and gradients of its own. `step` takes the seconds of one update."""

    def __init__(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], update: Callable[[], object]) -> None:
        self.parameters, self.gradients, self.update = parameters, gradients, update

    def step(self) -> float:
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient  # which some optimizers take away
        return seconds(self.update, clock())


def clock() -> Callable[[], float]:
    """Return the clock: of the CPU with one thread, which other programs disturb less, else the one on the wall."""
    return time.thread_time if torch.get_num_threads() == 1 else lambda: wall_clock("cpu")


def compare(
    name: str, weights: Sequence[Weight], threads: int, rounds: int, *, compiled: bool, tell: Callable[[str], object]
) -> dict[str, Any]:
    """Measure one set: raw seconds by candidate, ratios to MuonClip with their intervals, limit and memory."""
    torch.manual_seed(0)
    torch.compiler.reset()
    _settle_allocator()
    gradients = [torch.randn(each.shape) for each in weights]
    absent: dict[str, str] = {}
    with torch_threads(threads):
        arms = {each: _ours(weights, gradients) for each in (OURS, AGAIN)}
        for peer, entry in PEERS.items():
            if not entry.installed:
                absent[peer] = "not installed"
            elif entry.compiles and not compiled:
                absent[peer] = "not run"
            else:
                try:
                    arms[peer] = _peer(entry.make, weights, gradients)
                    arms[peer].step()
                except Exception as error:  # a peer's failure is a row of the table
                    absent[peer] = f"failed: {type(error).__name__}"
                    arms.pop(peer, None)
        arms[OURS].step()
        with Products() as products:
            arms[OURS].step()
        replay, copy = products.replay(), copies(arms[OURS].parameters)
        candidates = {each: arm.step for each, arm in arms.items()}
        candidates |= {PRODUCTS: lambda: seconds(replay, clock()), COPY: lambda: seconds(copy, clock())}
        samples = in_turn(candidates, rounds, WARM_UP)
        memory = {each: peak_bytes(arm.step) for each, arm in arms.items()}
    sizes = [gradient.numel() for gradient in gradients]
    largest = max((m for each in weights if each.layout for m in each.layout.matrix_shapes(each.shape)), key=_volume)
    row = {
        "name": name,
        "threads": threads,
        "seconds": samples,
        "ratios": {
            each: median_interval([theirs / ours for theirs, ours in zip(of, samples[OURS], strict=True)])
            for each, of in samples.items()
            if each in arms and each != OURS
        },
        "absent": absent,
        "flops": products.flops,
        "dtypes": sorted({str(left[2]).removeprefix("torch.") for left, _ in products.calls}),
        "passes": passes([each.layout is None for each in weights], sizes),
        "elements": sum(sizes),
        "memory": memory,
        "largest": list(largest[1:]),
    }
    tell(f"{name}, {threads} threads: {facts(row)}")
    return row


def facts(row: Mapping[str, Any]) -> dict[str, Any]:
    """Derive what the page shows of a set from what was measured."""
    median = {each: statistics.median(of) for each, of in row["seconds"].items()}
    peers = {each: ratio["median"] for each, ratio in row["ratios"].items() if each != AGAIN}
    control = row["ratios"][AGAIN]
    noise = max(abs(1 - (control[bound] or control["median"])) for bound in ("median", "low", "high"))
    best = min(peers, key=peers.__getitem__, default=None)
    limit = median[PRODUCTS] + row["passes"] / 2 * median[COPY]
    m, n = sorted(row["largest"])
    itemsize = max(torch.empty(0, dtype=getattr(torch, dtype)).element_size() for dtype in row["dtypes"])
    return {
        "ms": 1e3 * median[OURS],
        "best": best,
        "ratio": peers[best] if best else None,
        "noise": noise,
        "faster": {each: ratio for each, ratio in peers.items() if ratio < 1 - noise},
        "limit_ms": 1e3 * limit,
        "over_limit": median[OURS] / limit,
        "gflops": 1e-9 * row["flops"] / median[PRODUCTS],
        "gbytes": 8e-9 * row["elements"] / median[COPY],
        "extra_mb": 1e-6 * row["memory"][OURS],
        "allowed_mb": 64 + 1e-6 * itemsize * (m * n + 3 * m * m),
    }


def _settle_allocator() -> None:
    """Free a large tensor once, as training programs do: glibc then keeps what is freed, for all candidates.

    In a young process it returns memory at every free, and page faults would be a part of each time.
    """
    torch.empty(32 * 2**20 - 2**16, dtype=torch.uint8)


def _ours(weights: Sequence[Weight], gradients: Sequence[Tensor]) -> Arm:
    parameters = [nn.Parameter(torch.randn(each.shape) * 0.02) for each in weights]
    muon = [parameter for parameter, each in zip(parameters, weights, strict=True) if each.layout is not None]
    rest = [parameter for parameter, each in zip(parameters, weights, strict=True) if each.layout is None]
    layouts = [each.layout for each in weights if each.layout is not None]
    groups: list[dict[str, Any]] = [{"params": muon, "use": "muon", "layout": layouts}]
    groups += [{"params": rest, "use": "adamw"}] if rest else []
    return Arm(
        parameters,
        [g.clone() for g in gradients],
        MuonClip(groups, LR, DECAY, adamw={"fused": True}, qk_clip=None).step,
    )


def _peer(
    make: Callable[[Sequence[Tensor]], Callable[[], object]], weights: Sequence[Weight], gradients: Sequence[Tensor]
) -> Arm:
    pieces = [
        (piece.clone(), each.layout)
        for each, g in zip(weights, gradients, strict=True)
        for piece in split(g, each.layout)
    ]
    parameters = [nn.Parameter(torch.randn_like(piece) * 0.02) for piece, _ in pieces]
    update = make([parameter for parameter, (_, layout) in zip(parameters, pieces, strict=True) if layout is not None])
    rest = [parameter for parameter, (_, layout) in zip(parameters, pieces, strict=True) if layout is None]
    adamw = torch.optim.AdamW(rest, lr=LR, weight_decay=DECAY, fused=True) if rest else None

    def both() -> None:
        update()
        if adamw is not None:
            adamw.step()

    return Arm(parameters, [piece for piece, _ in pieces], both)


def _volume(matrix: tuple[int, int, int]) -> int:
    return matrix[1] * matrix[2]
