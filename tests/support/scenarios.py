"""What one rank does, scenario by scenario, and what it writes for the test that started it."""

import json
import sys
import traceback

import torch.distributed as dist


def run_scenarios(work, wanted, folder):
    """Run the scenarios whose names hold one of the words `wanted`, or all; write FOLDER/RANK.json and end the group.

    `work`: name → a function that returns what the rank saw.
    """
    rank, results = dist.get_rank(), {}
    for name, run in work.items():
        if not wanted or any(each in name for each in wanted):
            try:
                results[name] = run()
            except Exception:
                print(f"rank {rank}, {name}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
                raise
    json.dump(results, open(f"{folder}/{rank}.json", "w"), indent=1)  # noqa: SIM115
    dist.barrier()
    dist.destroy_process_group()
