"""The levels of an added tensor, by one Triton kernel that reads it once (twice where it has sequences).

It computes the levels that `muonclip.core.attention_mask.mask_levels` defines.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from muonclip.core.attention_mask import BETWEEN_GROUPS, BETWEEN_VALUES, unreachable

_BLOCK_ROWS, _BLOCK_COLUMNS = 8, 128


@torch.no_grad()
def mask_levels(added: Tensor) -> tuple[Tensor, ...]:
    """Return the levels, [] in float32, of a tensor of float32, bfloat16 or float16 of any strides, not empty."""
    of_sequences = added.ndim == 4 and added.shape[0] > 1
    if added.ndim != 4:
        added = added.reshape(1, -1, *(1, 1, *added.shape)[-2:])
    batch, heads, rows, columns = added.shape
    row_blocks, column_blocks = -(-rows // _BLOCK_ROWS), -(-columns // _BLOCK_COLUMNS)
    shape = heads * row_blocks * column_blocks, 11 if of_sequences else 6
    levels = torch.empty(shape, dtype=torch.float32, device=added.device)
    launch: Any = _mask_levels[(len(levels),)]
    with torch.cuda.device_of(added):
        launch(
            added, levels, *added.stride(), batch, rows, columns, row_blocks, column_blocks,
            UNREACHABLE=unreachable(added.dtype, torch), OF_SEQUENCES=of_sequences,
            BETWEEN_VALUES=BETWEEN_VALUES, BETWEEN_GROUPS=BETWEEN_GROUPS,
            BLOCK_ROWS=_BLOCK_ROWS, BLOCK_COLUMNS=_BLOCK_COLUMNS,
        )  # fmt: skip
    return levels.amax(0).unbind()


@triton.jit
def _mask_levels(
    added, levels, stride_batch, stride_head, stride_row, stride_column,
    batch, rows, columns, row_blocks, column_blocks,
    UNREACHABLE: tl.constexpr, OF_SEQUENCES: tl.constexpr,
    BETWEEN_VALUES: tl.constexpr, BETWEEN_GROUPS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Read one tile of one head, of all sequences; offsets are 64 bits wide."""
    program = tl.program_id(0)
    r = program // column_blocks % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    c = program % column_blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    h = (program // column_blocks // row_blocks).to(tl.int64)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    tile = added + h * stride_head + r.to(tl.int64)[:, None] * stride_row + c.to(tl.int64)[None, :] * stride_column
    none = tl.full((BLOCK_ROWS, BLOCK_COLUMNS), float("-inf"), tl.float32)
    neg_lowest_far, highest_far, neg_lowest_near, highest_near = none, none, none, none
    neg_lowest_above, highest_below = none, none
    neg_lowest_step, highest_step, neg_lowest_near_step = none, none, none
    highest_masked, neg_lowest_allowed = none, none
    highest = tl.full((BLOCK_ROWS, BLOCK_COLUMNS), UNREACHABLE, tl.float32)
    if OF_SEQUENCES:
        for b in range(batch):
            x = tl.load(tile + tl.cast(b, tl.int64) * stride_batch, mask=inside, other=float("-inf")).to(tl.float32)
            highest = tl.where(x > highest, x, highest)
    for b in range(batch):
        x = tl.load(tile + tl.cast(b, tl.int64) * stride_batch, mask=inside, other=float("-inf")).to(tl.float32)
        counts = x > UNREACHABLE  # false of NaN and outside, as all conditions below
        far, near = counts & (x <= BETWEEN_VALUES), x > BETWEEN_VALUES
        neg_lowest_far = tl.maximum(neg_lowest_far, tl.where(far, -x, float("-inf")))
        highest_far = tl.maximum(highest_far, tl.where(far, x, float("-inf")))
        neg_lowest_near = tl.maximum(neg_lowest_near, tl.where(near, -x, float("-inf")))
        highest_near = tl.maximum(highest_near, tl.where(near, x, float("-inf")))
        neg_lowest_above = tl.maximum(neg_lowest_above, tl.where(x > BETWEEN_GROUPS, -x, float("-inf")))
        highest_below = tl.maximum(highest_below, tl.where(counts & (x <= BETWEEN_GROUPS), x, float("-inf")))
        if OF_SEQUENCES:
            step = x - highest
            far, near = counts & (step <= BETWEEN_VALUES), counts & (step > BETWEEN_VALUES)
            neg_lowest_step = tl.maximum(neg_lowest_step, tl.where(far, -step, float("-inf")))
            highest_step = tl.maximum(highest_step, tl.where(far, step, float("-inf")))
            neg_lowest_near_step = tl.maximum(neg_lowest_near_step, tl.where(near, -step, float("-inf")))
            highest_masked = tl.maximum(highest_masked, tl.where(far, x, float("-inf")))
            neg_lowest_allowed = tl.maximum(neg_lowest_allowed, tl.where(near, -x, float("-inf")))
    levels += program * (11 if OF_SEQUENCES else 6)
    tl.store(levels, tl.max(neg_lowest_far))
    tl.store(levels + 1, tl.max(highest_far))
    tl.store(levels + 2, tl.max(neg_lowest_near))
    tl.store(levels + 3, tl.max(highest_near))
    tl.store(levels + 4, tl.max(neg_lowest_above))
    tl.store(levels + 5, tl.max(highest_below))
    if OF_SEQUENCES:
        tl.store(levels + 6, tl.max(neg_lowest_step))
        tl.store(levels + 7, tl.max(highest_step))
        tl.store(levels + 8, tl.max(neg_lowest_near_step))
        tl.store(levels + 9, tl.max(highest_masked))
        tl.store(levels + 10, tl.max(neg_lowest_allowed))
