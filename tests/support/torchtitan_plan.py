"""Print MuonClip's plan for TorchTitan's Moonlight on so many ranks, of which this process is one.

    PYTHONPATH=.:tests/support python tests/support/torchtitan_plan.py RANKS LAYERS

It needs no more than a rank's own memory: torch's fake backend stands for the others.
"""

import os
import resource
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version

EXPERT_PARALLEL = 8


def main(ranks, layers):
    os.environ |= {"WORLD_SIZE": ranks, "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8", "NGPU": ranks}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    import torchtitan_host as host

    config = host.configuration("moonlight_16b_a3b", layers=int(layers))
    config.optimizer.lr, config.optimizer.tau = 4.2e-4, 100.0
    config.training.global_batch_size, config.training.local_batch_size = int(ranks), 1
    config.parallelism.data_parallel_shard_degree = int(ranks)
    config.parallelism.expert_parallel_degree = EXPERT_PARALLEL
    config.comm.mode = "fake_backend"
    begin = time.monotonic()
    trainer = host.Trainer(host.parse(config, []))
    (optimizer,) = trainer.optimizers.optimizers
    plan = str(optimizer.plan)
    seconds, peak = time.monotonic() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"Moonlight 16B-A3B, {layers} layers, {ranks} ranks, EP {EXPERT_PARALLEL}")
    print(f"{datetime.now(UTC):%Y-%m-%d}, PyTorch {version('torch')}, TorchTitan {version('torchtitan')}")
    print(f"the trainer and the plan: {seconds:.0f} s, peak memory {peak:.1f} GiB\n")
    print(plan)


if __name__ == "__main__":
    main(*sys.argv[1:])
