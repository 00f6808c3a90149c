"""The host's share of the clip: its time per observed attention and per step, where next to nothing is computed.

Models of a few numbers, one thread. On an accelerator this is what a launch queue has to hide.
"""

from __future__ import annotations

import copy
import statistics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.training.timing import in_turn, seconds
from muonclip.torch import Muon, QKClip
from muonclip.torch.optimizer.groups import check_gradients

LAYERS, MATRICES = 48, 420


class TinyAttention(nn.Module):
    """Attention of two heads, two numbers wide each."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def host_time(rounds: int) -> dict[str, float]:
    """Measure microseconds, medians of `rounds`: of a forward with the clip less one without it and of the clip's step,
    per attention; and of what an optimizer of 420 matrices does to find that nothing has changed, per step."""
    plain = nn.Sequential(*(TinyAttention() for _ in range(LAYERS)))
    observed, x = copy.deepcopy(plain), torch.randn(2, 4, 4)
    clip = QKClip(observed)
    parameters = [nn.Parameter(torch.randn(4, 6)) for _ in range(MATRICES)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = Muon(parameters)
    optimizer.step()

    def observed_forward() -> float:
        return (seconds(lambda: observed(x)) - seconds(lambda: plain(x))) / LAYERS

    def clip_step() -> float:
        observed(x)
        return seconds(clip.step) / LAYERS

    def unchanged_plan() -> float:
        return seconds(optimizer._refresh_plan) + seconds(lambda: check_gradients(optimizer.param_groups))

    candidates = {"forward_per_attention": observed_forward, "clip_step_per_attention": clip_step}
    measured = in_turn(candidates | {"unchanged_plan_per_step": unchanged_plan}, rounds)
    return {name: 1e6 * statistics.median(of) for name, of in measured.items()}
