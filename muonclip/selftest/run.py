"""The self-test as a command: its parts in order, a line for each outcome, and an exit status."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Iterator

from muonclip.selftest.clip import clip, clip_compiled, clip_transformers
from muonclip.selftest.environment import environment, torch_devices
from muonclip.selftest.iteration import iteration
from muonclip.selftest.jax_parts import jax_clip, jax_iteration
from muonclip.selftest.outcomes import Outcome, Part, outcomes_of
from muonclip.selftest.steps import collective, training

SECONDS = 50.0
"""After which no part begins. With what a part takes, the self-test is over within a minute."""

OF_TORCH = (
    Part("iteration", iteration),
    Part("clip", clip),
    Part("training", training),
    Part("maxima of all ranks", collective, always=True),
)
OF_JAX = (Part("JAX, iteration", jax_iteration), Part("JAX, clip", jax_clip))
LAST = (Part("clip, transformers", clip_transformers), Part("clip, compiled", clip_compiled))


def results(device: str | None, seconds: float = SECONDS) -> Iterator[Outcome]:
    """Yield what came of each part. `device`: a kind that torch sees; None: the best there is."""
    end = time.monotonic() + seconds
    if importlib.util.find_spec("torch") is None:
        yield Outcome("torch", None, "not installed")
        yield from outcomes_of(OF_JAX, "", end)
    else:
        yield from outcomes_of((*OF_TORCH, *OF_JAX, *LAST), device or torch_devices()[0], end)


def check(device: str | None = None) -> int:
    """Run the self-test and print what holds, line by line; return 1 where something does not, else 0.

    Under torchrun each rank runs it on a device of its own; the first one prints, and the others where they fail.
    """
    begun, rank = time.monotonic(), int(os.environ.get("RANK", "0"))
    if importlib.util.find_spec("torch") is not None:
        import torch

        there = torch_devices()
        if device not in (None, *there):
            print(f"--device {device}: torch {torch.__version__} sees {', '.join(there)} here.")
            return 2
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if rank == 0:
        print(environment(), end="\n\n", flush=True)
    found: list[Outcome] = []
    for outcome in results(device):
        found.append(outcome)
        if rank == 0 or outcome.holds is False:
            print(f"rank {rank}: {outcome}" if rank else outcome, flush=True)
    failed, tried = sum(each.holds is False for each in found), sum(each.holds is not None for each in found)
    if rank == 0:
        words = f"{failed} of {tried} do not hold" if failed else f"all {tried} hold"
        print(f"\n{words}, {len(found) - tried} not tried, {time.monotonic() - begun:.0f} s.")
        print("In a report of a fault, paste all of the above." if failed or not tried else "", end="\n" * bool(failed))
    return int(failed > 0 or not tried)
