"""The host's share of the clip: its time per observed attention and per step, where next to nothing is computed.

On an accelerator a launch queue has to hide it. And what the import costs, and the first step, in which attentions are
found and proven. One thread.
"""

from __future__ import annotations

import copy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import muonclip
from benchmarks.training.timing import in_turn, seconds
from muonclip.torch import Muon, QKClip
from muonclip.torch.optimizer.groups import check_gradients

LAYERS, MATRICES = 48, 420
Shape = tuple[int, int, int, int, int]
"""Layers, width, heads, sequences, tokens."""
FIRST_STEPS: tuple[Shape, ...] = ((12, 192, 6, 8, 256), (48, 64, 4, 4, 64))
QUICK_STEPS: tuple[Shape, ...] = ((2, 16, 2, 3, 8),)


class TinyAttention(nn.Module):
    """Attention of two heads, two numbers wide each."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def host_time(rounds: int) -> dict[str, float]:
    """Measure microseconds of CPU time, medians of `rounds`: of a forward with the clip less one without it and of the
    clip's step, per attention; and of what an optimizer of 420 matrices does to find that nothing has changed, per
    step."""
    plain = nn.Sequential(*(TinyAttention() for _ in range(LAYERS)))
    observed, x = copy.deepcopy(plain), torch.randn(2, 4, 4)
    clip = QKClip(observed)
    parameters = [nn.Parameter(torch.randn(4, 6)) for _ in range(MATRICES)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = Muon(parameters)
    optimizer.step()

    def observed_forward() -> float:
        return (_cpu_time(lambda: observed(x)) - _cpu_time(lambda: plain(x))) / LAYERS

    def clip_step() -> float:
        observed(x)
        return _cpu_time(clip.step) / LAYERS

    def unchanged_plan() -> float:
        return _cpu_time(optimizer._refresh_plan) + _cpu_time(lambda: check_gradients(optimizer.param_groups))

    candidates = {"forward_per_attention": observed_forward, "clip_step_per_attention": clip_step}
    measured = in_turn(candidates | {"unchanged_plan_per_step": unchanged_plan}, rounds)
    return {name: 1e6 * statistics.median(of) for name, of in measured.items()}


def import_times(rounds: int) -> dict[str, float]:
    """Measure the imports of torch, and after it of muonclip.torch: seconds of CPU time in new processes, medians."""
    code = (
        "import time; begun = time.process_time(); import torch; between = time.process_time(); "
        "import muonclip.torch; print(between - begun, time.process_time() - between)"
    )
    root = Path(muonclip.__file__).parents[1]
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, cwd=root, capture_output=True, text=True, check=True) for _ in range(1 + rounds)]
    torchs, ours = zip(*(map(float, run.stdout.split()) for run in runs[1:]), strict=True)  # the first one reads files
    return {"torch": statistics.median(torchs), "muonclip": statistics.median(ours)}


def first_steps(shapes: Sequence[Shape], rounds: int) -> list[dict[str, float]]:
    """Measure the first step with a clip: seconds of CPU time, medians of `rounds`, for models of several shapes.

    `forward` and `step`: without a clip, once all is warm. `built`: of `QKClip(model)`. `found`: what the first forward
    takes more than a later one.
    """
    return [_first_step(*shape, rounds=rounds) for shape in shapes]


def _first_step(layers: int, width: int, heads: int, batch: int, length: int, *, rounds: int) -> dict[str, float]:
    layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    plain = nn.Sequential(nn.Embedding(256, width), encoder, nn.Linear(width, 256))
    tokens = torch.randint(256, (batch, length))

    def first() -> tuple[float, float]:
        model, clips = copy.deepcopy(plain), []
        built = _cpu_time(lambda: clips.append(QKClip(model)))
        return built, _cpu_time(lambda: model(tokens)) - _cpu_time(lambda: plain(tokens))

    for _ in range(2):
        plain(tokens).sum().backward()
    forward = statistics.median(_cpu_time(lambda: plain(tokens)) for _ in range(rounds))
    step = statistics.median(_cpu_time(lambda: plain(tokens).sum().backward()) for _ in range(rounds))
    built, found = (statistics.median(each) for each in zip(*(first() for _ in range(rounds)), strict=True))
    shape = dict(layers=layers, width=width, heads=heads, batch=batch, length=length)
    return shape | dict(forward=forward, step=step, built=built, found=found)


def _cpu_time(run: Callable[[], object]) -> float:
    return seconds(run, time.process_time)
