"""Results of attention in experiments: those of a few positions, each repeated for the ones behind it.

    y_t  ←  y_p(t)        p(t): the last of at most 16 evenly spaced positions up to t

Every run gets the same results again, and what they are does not matter, only that nothing scaled is in them. So a run
needs not keep the probabilities [B, heads, T, Tk] of all its layers, nor the outputs of its kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from muonclip.torch.observe import is_jagged

MOST_POSITIONS = 16


@dataclass(frozen=True, slots=True, eq=False)
class Thinned:
    """Hold the rows of some positions of a tensor [..., T, any], how often each is repeated, and the strides of the
    tensor, on which a view of it may rely."""

    rows: Tensor
    counts: Tensor
    strides: tuple[int, ...]

    @classmethod
    def of(cls, value: Any) -> Any:
        """Thin a tensor where that leaves numbers; return anything else as it is, without a graph behind it."""
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        if is_jagged(value) or value.ndim < 3 or value.shape[-2] <= MOST_POSITIONS or not value.is_floating_point():
            return value
        length = value.shape[-2]
        starts = torch.arange(MOST_POSITIONS, device=value.device) * length // MOST_POSITIONS
        rows = value.index_select(-2, starts)
        if not bool(rows.isfinite().all()):  # of a sequence that is padded in front, say: it would spread
            return value
        ends = torch.arange(1, MOST_POSITIONS + 1, device=value.device) * length // MOST_POSITIONS
        return cls(rows, ends - starts, torch.empty_like(value, device="meta").stride())

    def whole(self) -> Tensor:
        """Return all positions."""
        positions = self.rows.repeat_interleave(self.counts, -2)
        if positions.stride() == self.strides:
            return positions
        options: Any = dict(dtype=positions.dtype, device=positions.device)
        return torch.empty_strided(positions.shape, self.strides, **options).copy_(positions)


def whole(value: Any) -> Any:
    """Return a copy of what was thinned, or of a tensor that was left whole."""
    if isinstance(value, Thinned):
        return value.whole()
    return value.clone() if isinstance(value, Tensor) else value
