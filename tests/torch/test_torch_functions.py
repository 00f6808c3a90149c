"""The arguments of a call of torch, by name, however they are given."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from muonclip.torch.discover import tracer
from muonclip.torch.observe import score_rules
from muonclip.torch.observe.torch_functions import bind, functions

GROUPS = [
    group
    for module in (score_rules, tracer)
    for name, group in vars(module).items()
    if name[0] == "_" and type(group) is set
]
WATCHED = sorted({f for group in GROUPS for f in group} - {torch.einsum}, key=lambda f: (f.__name__, f.__qualname__))
SQUARE = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0))
VALUES = {
    "input": SQUARE,
    "other": SQUARE.flip(0),
    "mat2": SQUARE.flip(1),
    "batch1": SQUARE.flip(1),
    "batch2": SQUARE.flip(2),
    "weight": torch.ones(4, 3),
    "bias": torch.arange(4.0),
    "mask": SQUARE > 0,
    "condition": SQUARE > 0,
    "value": -1.0,
    "min": -0.5,
    "max": 0.5,
    "dim": 0,
    "dtype": torch.float64,
    "tensors": [SQUARE, SQUARE],
    "chunks": 2,
    "sections": 2,
    "split_size": 2,
    "split_size_or_sections": 2,
    "split_sizes": [1, 1],
    "index": 1,
    "start": 0,
    "length": 2,
}
FOR = {
    "mm": dict(input=SQUARE[0], mat2=SQUARE[1]),
    "addmm": dict(input=SQUARE[0], mat1=SQUARE[1], mat2=SQUARE[0]),
    "conv1d": dict(weight=torch.ones(4, 3, 1)),
    "conv2d": dict(input=SQUARE[None], weight=torch.ones(4, 2, 1, 1)),
    "conv3d": dict(input=SQUARE[None, None], weight=torch.ones(4, 1, 1, 1, 1)),
    "bilinear": dict(input1=SQUARE, input2=SQUARE, weight=torch.ones(4, 3, 3)),
    "tensordot": dict(input=SQUARE[0], b=SQUARE[1], dims=1),
    "unflatten": dict(dim=1, sizes=(3, 1)),
    "softmax": dict(_stacklevel=3),
    "log_softmax": dict(_stacklevel=3),
}


@pytest.mark.parametrize("function", WATCHED, ids=lambda f: f.__qualname__)
def test_keywords_and_positions_are_one_call(function):
    values = VALUES | FOR.get(function.__name__, {})
    names = [name for name in bind(function, range(6), {}) if name in values]
    arguments = {name: values[name] for name in names}
    by_position = bind(function, list(arguments.values()), {})
    assert by_position == arguments
    own = {torch.tensordot: {"input": "a"}, torch.split: {"input": "tensor"}}.get(function, {})
    keywords = {own.get(name, name): value for name, value in arguments.items()}
    assert bind(function, (), keywords) == arguments
    is_method = function.__qualname__.startswith("Tensor")
    receiver = [arguments["input"]] if is_method else []
    if is_method:
        keywords.pop("input")
    assert bind(function, receiver, keywords) == arguments
    if function.__name__.startswith("__") or len(names) == 1:
        return  # an operator, which has no keywords; or one of which only the first argument matters
    ours = [v.clone() if isinstance(v, Tensor) else v for v in receiver]
    theirs = [v.clone() if isinstance(v, Tensor) else v for v in arguments.values()]
    torch.testing.assert_close(function(*ours, **keywords), function(*theirs), rtol=0, atol=0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: torch.softmax(input=SQUARE, axis=-1),
        lambda: SQUARE.softmax(axis=-1),
        lambda: F.softmax(SQUARE, dim=-1),
        lambda: torch.special.softmax(input=SQUARE, dim=-1),
    ],
)
def test_names_of_numpy_are_names_too(call):
    seen = []

    class Look(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(bind(func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    with Look():
        call()
    assert seen[0]["dim"] == -1
    assert seen[0]["input"] is SQUARE


def test_where_as_a_function_and_as_a_method():
    condition, other = SQUARE > 0, SQUARE.neg()
    expected = dict(condition=condition, input=SQUARE, other=other)
    assert bind(torch.where, (condition, SQUARE, other), {}) == expected
    assert bind(Tensor.where, (SQUARE, condition, other), {}) == expected
    assert functions("where") == {torch.where, Tensor.where}


def test_positions_without_a_name_keep_their_number():
    assert bind(Tensor.view, (SQUARE, 3, -1), {}) == {"input": SQUARE, "1": 3, "2": -1}
