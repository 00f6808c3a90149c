"""Experts on several ranks: each token's row is sent to the ranks of its experts, and the results come back.

Shapes: S ranks, each with E/S experts; a rank sends the rows [n, D] of its own tokens, sorted by expert over all E, and
computes on the rows [m, D] that all ranks have for its experts. n and m differ by rank and step, and may be 0.

Each rank's loss is the mean over its own tokens, and data parallelism averages gradients over ranks. Between the two
exchanges the gradient is that of the mean loss of the S ranks, so that only the average over the other ranks is left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class ExpertExchange:
    """Sends rows to the ranks of their experts; a value for `Experts.exchange`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(self, rows: Tensor, ends: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """Send each row to the rank of its expert.

        `rows`: [n, D], sorted by expert; `ends`: int32 [E], where the rows of each expert end. Returns the rows for
        this rank's experts [m, D], sorted by expert; their ends, int32 [E/S]; and the function that sends results back,
        [m, D] → [n, D].
        """
        ranks = self.group.size()
        sent = ends.diff(prepend=ends.new_zeros(1)).view(ranks, -1)  # [S, E/S]: what this rank has for whom
        received = torch.empty_like(sent)  # [S, E/S]: what each rank has for this one's experts
        dist.all_to_all_single(received, sent, group=self.group)
        # The one wait for the device: lengths of messages are the host's to know.
        n, m = torch.stack((sent.sum(1), received.sum(1))).tolist()
        rows = exchange_rows(rows, m, n, self.group, gradient_scale=ranks)
        expert = torch.arange(received.shape[1], device=rows.device).repeat(ranks)
        order = expert.repeat_interleave(received.flatten(), output_size=sum(m)).argsort(stable=True)
        ends = received.sum(0).cumsum(0).to(torch.int32)
        return rows.index_select(0, order), ends, lambda y: self._back(y, order, n, m)

    def _back(self, y: Tensor, order: Tensor, n: list[int], m: list[int]) -> Tensor:
        y = y.index_select(0, order.argsort())
        return exchange_rows(y, n, m, self.group, gradient_scale=1 / self.group.size())


def exchange_rows(
    rows: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup, gradient_scale: float = 1.0
) -> Tensor:
    """Exchange rows [Σ sent, D] → [Σ received, D] by one all-to-all, in the order of the ranks.

    `sent`, `received`: numbers of rows by rank. The gradient goes the other way, multiplied by `gradient_scale`.
    """
    return _Exchange.apply(rows, received, sent, group, gradient_scale)  # pyright: ignore[reportReturnType]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup, gradient_scale: float
    ) -> Tensor:
        ctx.way_back, ctx.gradient_scale = (sent, received, group), gradient_scale
        return _sent(rows, received, sent, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _sent(gradients[0], *ctx.way_back).mul_(ctx.gradient_scale), None, None, None, None


def _sent(rows: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived
