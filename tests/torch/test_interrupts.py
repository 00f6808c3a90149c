"""A step that is interrupted at any operator or collective leaves what docs/stages.md says, and the run goes on."""

import copy
import itertools
from contextlib import suppress

import interrupted_ranks as ranks
import pytest
import torch
from forked_ranks import run_ranks
from interrupted_ranks import TAU, Interrupting, Reference, assert_as_the_page_says
from stages_worker import Model, batch, largest_logits, step
from unchanged import differences

from muonclip.torch import MuonClip

ERRORS = [KeyboardInterrupt, torch.OutOfMemoryError]


def trained(steps):
    model = Model(2)
    optimizer = MuonClip(model, lr=0.01, tau=TAU, workspace_bytes=4000)
    for seed in range(steps):
        step(model, optimizer, seed)
    return model, optimizer


def interrupt_everywhere(steps, points):
    """Interrupt the step after some at many of its operators, each time from the same state.

    Where two neighbours of these are in parts of the step that do not follow each other, so are all between them: a
    part may be few operators.
    """
    start = trained(steps)
    model, optimizer = copy.deepcopy(start)
    model(batch(steps)).square().mean().backward()
    reference = Reference(model, optimizer)
    assert largest_logits(start[0], batch(steps)).max() > TAU
    stride = max(reference.operators // points, 1)
    reached = {}
    for at in range(1, reference.operators + 1, stride):
        reached[at] = interrupt(start, steps, reference, at, ERRORS[len(reached) % 2])
        if reached[at] is None:  # the first step of all has filled caches
            assert at > 0.9 * reference.operators
            break
    parts = ["measured", "adamw", "muon", "clip"]
    tried = [(at, parts.index(part)) for at, part in reached.items() if part is not None]
    for (before, first), (after, second) in itertools.pairwise(tried):
        if second > first + 1:
            between = range(before + 1, after)
            reached |= {at: interrupt(start, steps, reference, at, ERRORS[at % 2]) for at in between}
    print(f"{reference.operators} operators, interrupted at {len(reached)}")
    assert {*reached.values()} - {None} == {*parts}


def interrupt(start, steps, reference, at, error):
    """Interrupt a step at an operator and go on; return the part of the step that it was in, None if it has ended."""
    model, optimizer = copy.deepcopy(start)
    model(batch(steps)).square().mean().backward()
    with suppress(error), Interrupting(error, at) as interrupting:
        optimizer.step()
    if interrupting.at is not None:
        return None
    part = assert_as_the_page_says(model, optimizer, reference)
    optimizer.zero_grad()
    loudest = largest_logits(model, batch(steps + 1)).max()
    step(model, optimizer, steps + 1)
    assert all(p.isfinite().all() for p in model.parameters())
    assert optimizer.qk_clip.report().bound >= loudest * (1 - 1e-5)
    assert largest_logits(model, batch(steps + 1)).max() < 1.5 * TAU, f"operator {at} of {reference.operators}"
    return part


@pytest.mark.parametrize("steps", [0, 1])
def test_an_interrupt_at_some_operators_leaves_what_the_page_says(steps):
    interrupt_everywhere(steps, points=25)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [0, 1])
def test_an_interrupt_at_every_second_operator_leaves_what_the_page_says(steps):
    interrupt_everywhere(steps, points=375)


@pytest.mark.slow
def test_a_rank_that_is_interrupted_at_any_collective_ends_the_others_which_have_what_the_page_says(tmp_path):
    run_ranks(2, ranks.__file__, timeout=300, prints=tmp_path)
    for rank in range(2):
        lines = (tmp_path / f"rank{rank}.txt").read_text().splitlines()
        assert len(lines) >= 4, lines
        print(*lines, sep="\n")


@pytest.mark.parametrize("momentum_dtype", [None, torch.float64])
def test_an_interrupt_of_a_load_leaves_the_state_before_it_or_the_one_after(momentum_dtype):
    model = Model(2)
    optimizer = MuonClip(model, lr=0.01, tau=TAU, momentum_dtype=momentum_dtype)
    step(model, optimizer, 0)
    saved = copy.deepcopy(optimizer.state_dict())
    step(model, optimizer, 1)
    before = copy.deepcopy(optimizer.state_dict())
    assert list(differences(before, saved))
    loaded, at = set(), 0
    while True:
        at += 3
        tried = copy.deepcopy(optimizer)
        with suppress(KeyboardInterrupt), Interrupting(KeyboardInterrupt, at) as interrupting:
            tried.load_state_dict(saved)
        if interrupting.at is not None:
            break
        now = tried.state_dict()
        loaded.add("before" if not list(differences(now, before)) else "after")
        assert loaded == {"before"} or not list(differences(now, saved)), f"operator {at}"
    assert at > 60
    assert not list(differences(tried.state_dict(), saved))


def test_an_interrupt_of_a_construction_takes_its_hooks_off_the_model():
    def hooks(model):
        return [(*m._forward_hooks, *m._forward_pre_hooks, "_qk_observer" in m.__dict__) for m in model.modules()]

    at = 0
    while True:
        at += 7
        model = Model(2)
        without = hooks(model)
        with suppress(KeyboardInterrupt), Interrupting(KeyboardInterrupt, at) as interrupting:
            optimizer = MuonClip(model)
        if interrupting.at is not None:
            break
        assert hooks(model) == without, f"operator {at}"
    assert at > 20
    assert hooks(model) != without
    assert optimizer.qk_clip is not None
