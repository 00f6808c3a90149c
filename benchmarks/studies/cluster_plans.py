"""Our own plan of the optimizer for Kimi K2 on clusters that one does not have: on torch's fake process group.

The model is on the meta device, divided by FSDP2 and expert parallelism as on a real cluster, and `MuonClip` makes its
plan as the first of N ranks; no rank but this process exists. Planned are

    a stage      what one of 16 pipeline stages has, four layers, over N / 16 ranks: Kimi K2's own way
    whole        all layers over N ranks, without a pipeline
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any, Literal

import torch
import torch.distributed as dist

from benchmarks.execution.processes import start
from benchmarks.experiment.errors import UsageError
from benchmarks.studies.cluster_step import by_link
from muonclip.models import MoEConfig
from muonclip.models.parallel import Parallelism, parallelize
from muonclip.models.torch import MoE
from muonclip.torch import MuonClip
from muonclip.torch.distributed import UpdatePlan

Case = Literal["a stage", "whole"]
PIPELINE, EXPERTS, NODE = 16, 16, 8
RANKS = (256, 512, 1024, 2048, 4096)


def plans(ranks: tuple[int, ...] = RANKS) -> list[dict[str, Any]]:
    """Make the plans, each in a process of its own, and return a row for each."""
    return [_row(case, count) for case in ("a stage", "whole") for count in ranks]


def _row(case: Case, count: int) -> dict[str, Any]:
    process = start("benchmarks.studies.cluster_plans", case, str(count), stdout=subprocess.PIPE)
    said, _ = process.communicate()
    if process.returncode:
        raise UsageError("cluster", f"the plan for {count} ranks ended with status {process.returncode}.")
    return json.loads(said.splitlines()[-1])


def planned(case: Case, count: int) -> dict[str, Any]:
    """Make one plan on a fake process group, and describe it; `count`: ranks of the cluster."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    size = count // PIPELINE if case == "a stage" else count
    config = MoEConfig.k2(num_layers=4, num_dense_layers=0) if case == "a stage" else MoEConfig.k2()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    with torch.device("meta"):
        model = MoE(config)
    parallelize(model, Parallelism(shards=size, experts=min(EXPERTS, size)))
    begun = time.perf_counter()
    decided = MuonClip(model, qk_clip=None).plan.update_plan
    seconds = time.perf_counter() - begun
    assert decided is not None
    return {"case": case, "ranks": count, "of_a_plan": size, "seconds": round(seconds, 3)} | described(decided)


def described(decided: UpdatePlan, node: int = NODE) -> dict[str, Any]:
    """Return the balance of owners, and the bytes that the busiest rank sends, by link."""
    flops = list(decided.flops().values())
    links = by_link(decided, node)
    return {
        "matrices": sum(each.count for each in decided.rounds),
        "balance": max(flops) * len(flops) / sum(flops),
        "idle": sum(not each for each in flops) / len(flops),
        "nvlink": max(each["nvlink"] for each in links.values()),
        "network": max(each["network"] for each in links.values()),
    }


if __name__ == "__main__":
    print(json.dumps(planned(sys.argv[1], int(sys.argv[2]))))  # pyright: ignore[reportArgumentType]
