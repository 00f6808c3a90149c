"""The agreement of the ranks of one model on what makes their collectives fit and their factors the same.

It is looked for once, before the first collective whose size depends on it: ranks that disagree would end in an error
of the network, or drift from each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
import torch.distributed as dist

Facts = Mapping[str, str]


def check_agreement(facts: Facts, group: dist.ProcessGroup, device: torch.device) -> None:
    """Raise RuntimeError, on every rank of the group, where one has other facts by name. All of them must call it.

    Costs one all-reduce of 16 bytes, which the host waits for.
    """
    digest = hashlib.sha256(repr(sorted(facts.items())).encode()).digest()
    own = int.from_bytes(digest[:8]) >> 1
    extremes = torch.tensor([own, -own], dtype=torch.int64, device="cpu").to(device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    largest, smallest = extremes.tolist()
    if largest != -smallest:
        gathered: list[Facts] = [{} for _ in range(group.size())]
        dist.all_gather_object(gathered, dict(facts), group=group)
        raise RuntimeError(_disagreement(dict(zip(dist.get_process_group_ranks(group), gathered, strict=True))))


def _disagreement(facts: Mapping[int, Facts]) -> str:
    names = sorted({name for own in facts.values() for name in own})
    lines: list[str] = []
    for name in names:
        ranks: dict[str, list[int]] = {}
        for rank, own in facts.items():
            ranks.setdefault(own.get(name, "nothing"), []).append(rank)
        if len(ranks) > 1:
            lines.append(f"  {name}: " + ", ".join(f"{value} on {_called(own)}" for value, own in ranks.items()))
    more = [f"  and {len(lines) - _MOST} more"] if len(lines) > _MOST else []
    return "\n".join(
        [
            "QK-Clip: the ranks that train this model together disagree:",
            *lines[:_MOST],
            *more,
            "Give every rank the same model and the same arguments. Ranks that train something else need a group of "
            "their own, QKClip(…, process_group=…).",
        ]
    )


_MOST = 8  # lines


def _called(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    few = ", ".join(map(str, ranks[:4]))
    return f"ranks {few}{' …' if len(ranks) > 4 else ''}"
