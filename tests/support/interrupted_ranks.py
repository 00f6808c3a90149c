"""What an interrupted step has left, against the page's list of what it may leave.

As a script, one of two ranks, of which the first is interrupted at each collective of a step in turn, each time in
processes of their own.
"""

import contextlib
import copy
import datetime
import importlib
import itertools
import os
import re
import sys
import traceback

import pytest
import torch
import torch.distributed as dist
from stages_worker import TAU, Model, batch, step
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from muonclip.torch import MuonClip

after_update = importlib.import_module("muonclip.torch.clip.qk_clip").QKClip.after_update
LR, DECAY = 0.01, 0.1


class Interrupting(TorchDispatchMode):
    """Raises before the `at`-th operator of some namespaces that runs inside; without a number it counts them."""

    def __init__(self, error=KeyboardInterrupt, at=None, namespaces=()):
        super().__init__()
        self.error, self.at, self.namespaces, self.count = error, at, namespaces, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not self.namespaces or func.namespace in self.namespaces
        if self.count == self.at:
            self.at = None
            raise self.error
        return func(*args, **(kwargs or {}))


def local(tensor):
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().clone()


def taken(model, optimizer):
    """Weights and states by name."""
    return {
        name: (local(p), {part: local(value) for part, value in optimizer.state.get(p, {}).items()})
        for name, p in model.named_parameters()
    }


class Reference:
    """A step that is not interrupted: what is there before it, after the update, and after the clip; and its counts."""

    def __init__(self, model, optimizer, namespaces=()):
        self.before, updated = taken(model, optimizer), []
        clip = optimizer.qk_clip

        def between(factors):
            with _disable_current_modes():
                updated.append(taken(model, optimizer))
            after_update(clip, factors)

        clip.after_update = between
        with Interrupting(namespaces=namespaces) as counting:
            optimizer.step()
        del clip.after_update
        self.updated, self.after, self.operators = updated[0], taken(model, optimizer), counting.count
        self.uses = {line.name: line.use for line in optimizer.plan.parameters}

    def fits(self, name, now):
        """Where one parameter may be: "before" the update, "updated", "clipped", and "under way" to the update."""
        before, updated, after = (each[name] for each in (self.before, self.updated, self.after))
        old = {part: before[1].get(part, torch.zeros_like(value)) for part, value in updated[1].items()}
        held = now[1] or old
        fits = set()
        if torch.equal(now[0], before[0]) and all(map(torch.equal, held.values(), old.values())):
            fits.add("before")
        if all(map(torch.equal, held.values(), updated[1].values())):
            if torch.equal(now[0], updated[0]):
                fits.add("updated")
            if any_of(now[0], updated[0], after[0]):
                fits.add("clipped")
        if self.uses[name] == "muon":  # what has changed is on the page
            decayed = before[0] * (1 - LR * DECAY)
            right = any_of(now[0], before[0], decayed, updated[0])
            right &= any_of(held["momentum_buffer"], old["momentum_buffer"], updated[1]["momentum_buffer"])
        else:
            right = bool(old["step"] <= held["step"] <= updated[1]["step"])
        if right:
            fits.add("under way")
        return fits


def assert_as_the_page_says(model, optimizer, reference):
    """Return where the step was interrupted, in the page's order: "measured", "adamw", "muon" or "clip"."""
    now = taken(model, optimizer)
    for weight, state in now.values():
        assert all(each.isfinite().all() for each in (weight, *state.values()))
    fits = {name: reference.fits(name, now[name]) for name in now}
    muon, *others = ([fits[name] for name in group["param_names"]] for group in optimizer.param_groups)
    adamw = [*itertools.chain(*others)]
    under_way = next((index for index, each in enumerate(adamw) if "updated" not in each), len(adamw))
    if all("before" in each for each in fits.values()):
        return "measured"
    if all("before" in each for each in muon):
        assert all("before" in each for each in adamw[under_way + 1 :]), fits
        assert all("under way" in each for each in adamw), fits
        return "adamw"
    if all("updated" in each or "clipped" in each for each in fits.values()):
        if not all("updated" in each for each in fits.values()):  # else a head could get its factor twice
            states = optimizer.qk_clip.attentions.states()
            assert all(not each.observed and (each.bound == -torch.inf).all() for each in states), states
        return "clip"
    assert all("updated" in each for each in adamw), fits
    assert all("under way" in each for each in muon), fits
    return "muon"


def any_of(value, *others):
    """Tell whether each number is one of those in its place."""
    return bool(torch.stack([value == each for each in others]).any(0).all())


def sharded(at, rank, ranks):
    """One process of one try: it is interrupted at its `at`-th collective if it is rank 0. Without a number it counts
    them, and rank 0 leaves the number."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore(f"try {at}", store),
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=60),
    )
    model = Model(2)
    for part in (*model.layers, model):
        fully_shard(part)
    optimizer = MuonClip(model, lr=LR, tau=TAU, workspace_bytes=4000)
    step(model, optimizer, 0, slice(rank, None, ranks))
    start = copy.deepcopy(optimizer.state_dict()), {name: local(p) for name, p in model.named_parameters()}
    model(batch(1)[rank::ranks]).square().mean().backward()
    reference = Reference(model, optimizer, ("c10d",))
    if at is None:
        load_with_nan_on(1, optimizer, rank)
        return reference.operators if rank == 0 else 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.to_local().copy_(start[1][name])
            parameter.grad = None
    optimizer.load_state_dict(start[0])
    model(batch(1)[rank::ranks]).square().mean().backward()
    dist.barrier()
    interrupting = Interrupting(KeyboardInterrupt, at if rank == 0 else None, ("c10d",))
    try:
        with interrupting:
            optimizer.step()
    except KeyboardInterrupt:
        assert rank == 0
    except RuntimeError as error:
        if not (rank == 1 and re.search("(closed|reset) by peer", str(error))):
            raise
    else:
        raise AssertionError(f"rank {rank} has made its step")
    print(f"collective {at}: {assert_as_the_page_says(model, optimizer, reference)}", flush=True)
    return 0


def load_with_nan_on(wrong, optimizer, rank):
    """The rank whose shard has it refuses the checkpoint, and waits for nobody."""
    saved = copy.deepcopy(optimizer.state_dict())
    if rank == wrong:
        next(state for state in saved["state"].values() if "momentum_buffer" in state)[
            "momentum_buffer"
        ].to_local().fill_(torch.nan)
    with pytest.raises(ValueError, match="holds nan") if rank == wrong else contextlib.nullcontext():
        optimizer.load_state_dict(saved)


def in_a_process_of_its_own(function, *arguments):
    """Return what a function returns, a small number; called in a fork, which ends as one does that was interrupted."""
    process = os.fork()
    if not process:
        code = 255
        try:
            code = function(*arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert 0 <= code < 255
    return code


def main():
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    count = in_a_process_of_its_own(sharded, None, rank, ranks)
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    if rank == 0:
        store.set("collectives", str(count))
    count = int(store.get("collectives"))
    for at in range(1, count + 1):
        in_a_process_of_its_own(sharded, at, rank, ranks)


if __name__ == "__main__":
    main()
