"""Workers of the tests on several ranks of this machine.

The ranks are forked from a process that has imported PyTorch and the library once, which a start by torchrun does anew
for every rank: on a slow machine most of such a test's time.
"""

import multiprocessing
import os
import runpy
import sys
import time

import torch.distributed as dist
import torch.multiprocessing

PRELOADED = [  # what the workers import, but for themselves
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.distributed.tensor.experimental",
    "muonclip.torch",
    "muonclip.models",
    "accelerate",
    "lightning.pytorch",
    "transformers",
    "megatron.core.models.gpt.gpt_layer_specs",  # where it is installed
]


def run_ranks(ranks, script, *words, timeout=1800, prints=None):
    """Run `script` with `words` as its arguments on every rank, as torchrun would. Fails where a rank does.

    prints: a folder that becomes the ranks' current one, and in which each leaves what it prints, as `rank0.txt`.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    arguments = (ranks, store.port, [str(word) for word in (script, *words)], prints)
    context = torch.multiprocessing.start_processes(
        _rank, arguments, nprocs=ranks, join=False, daemon=True, start_method="forkserver"
    )
    deadline = time.monotonic() + timeout
    try:
        while not context.join(timeout=max(deadline - time.monotonic(), 0)):
            assert time.monotonic() < deadline, f"{script} on {ranks} ranks ran longer than {timeout} s"
    finally:
        for process in context.processes:
            process.kill()


def _rank(rank, ranks, port, argv, prints):
    if prints is not None:
        os.chdir(prints)
        os.dup2(os.open(f"rank{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "forked",  # by which Lightning knows such ranks
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is of the process that started the ranks
    }
    torch.set_num_threads(1)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")
    sys.stdout.flush()
