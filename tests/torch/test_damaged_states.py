"""A checkpoint or a group with a generated wrong value is refused in words, and changes nothing; or the step works."""

import copy
import functools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from unchanged import differences, snapshot
from wrong_arguments import NO_NUMBER, RAW

from muonclip.torch import Muon, MuonClip

SPECIAL = st.sampled_from(
    [
        *(0, 1, -1, 2, 1e30, 2**70, -0.0, "muon", "float32", torch.float16, [], {}, (0.9, 0.9), True, False),
        *(torch.ones(()), torch.ones(2), torch.zeros(6), torch.zeros(6, 6), torch.zeros(6, 6).bfloat16()),
        torch.ones(6, 6) > 0,
    ]
)  # fmt: skip
EXAMPLES = 150
WRONG = st.one_of(NO_NUMBER, SPECIAL)


def made(model, kind):
    if kind == "Muon":
        return Muon([item for item in model.named_parameters() if item[1].ndim == 2], lr=0.01)
    return MuonClip(model.named_parameters(), lr=0.01, qk_clip=None)


@functools.cache
def trained(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    optimizer = made(model, kind)
    step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()


def assert_refused_or_works(act, model, optimizer, words, counts):
    """`act` raises an error with one of these words and changes nothing, or the optimizer goes on."""
    before = snapshot((model, optimizer))
    try:
        act()
    except (TypeError, ValueError) as error:
        said = str(error)
        assert any(word in said for word in words), said
        assert not any(raw in said for raw in RAW), said
        changed = list(differences(before, snapshot((model, optimizer))))
        assert not changed, (changed, said)
        counts["named"] += 1
    else:
        counts["taken"] += 1
        step(model, optimizer)


def report(name, counts):
    print(f"{name}: {counts.total()} wrong values, {counts['named']} named, {counts['taken']} taken")
    assert counts["named"] > counts.total() / 3


@pytest.mark.filterwarnings("ignore:the checkpoint holds no state")
@pytest.mark.parametrize("kind", ["Muon", "MuonClip"])
def test_a_checkpoint_with_a_wrong_value_anywhere_is_refused_whole_or_taken(kind):
    counts = Counter()
    model, optimizer = copy.deepcopy(trained(kind))
    right = copy.deepcopy(optimizer.state_dict())
    places = [("param_groups", i, key) for i, group in enumerate(right["param_groups"]) for key in group]
    places += [("state", i, part) for i, state in right["state"].items() for part in state]
    places += [("state", i) for i in right["state"]] + [("param_groups", 0), ("state",), ("param_groups",)]
    places += [
        ("param_groups", i, key, 0) for i in range(len(right["param_groups"])) for key in ("params", "param_names")
    ]

    @settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=True)
    @given(st.sampled_from(places), WRONG)
    def every(place, wrong):
        saved = copy.deepcopy(right)
        functools.reduce(lambda held, key: held[key], place[:-1], saved)[place[-1]] = wrong
        optimizer.load_state_dict(copy.deepcopy(right))
        words = ("checkpoint", "state_dict", "state of an optimizer")
        assert_refused_or_works(lambda: optimizer.load_state_dict(saved), model, optimizer, words, counts)

    every()
    report(f"load_state_dict of {kind}", counts)


@pytest.mark.parametrize("kind", ["Muon", "MuonClip"])
def test_a_group_or_a_state_with_a_wrong_value_is_refused_by_the_step_or_taken(kind):
    counts = Counter()
    groups = trained(kind)[1].param_groups
    places = [("group", i, key) for i, group in enumerate(groups) for key in group]
    own = [p for group in groups for p in group["params"]]
    places += [("state", i, part) for i, p in enumerate(own) for part in trained(kind)[1].state[p]]

    @settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=True)
    @given(st.sampled_from(places), WRONG)
    def every(place, wrong):
        model, optimizer = copy.deepcopy(trained(kind))
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        where, index, key = place
        held = optimizer.param_groups[index] if where == "group" else optimizer.state[parameters[index]]
        optimizer.zero_grad()
        model(torch.ones(2, 6)).square().sum().backward()
        before = snapshot(model)
        held[key] = wrong
        try:
            optimizer.step()
        except (TypeError, ValueError) as error:
            said = str(error)
            assert "param_groups[" in said or "Nothing was changed" in said or "capturable" in said, said
            assert not any(raw in said for raw in RAW), said
            assert not list(differences(before, snapshot(model)))
            counts["named"] += 1
        else:
            counts["taken"] += 1

    every()
    report(f"step of {kind}", counts)
