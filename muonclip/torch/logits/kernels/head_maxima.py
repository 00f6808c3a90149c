"""The maximum logit of every head as one Triton kernel that leaves out what is certified to be small.

    bound of a row block = max_i min(LSE_i, |scale| · |q_i| · max_j |k_j|)          (log-sum-exp; Cauchy–Schwarz)

Where the bound is at most the head's floor nothing is computed; elsewhere the maximum is exact. The device makes the
choice, so that the host never waits. Shapes: B batch, H query heads, G key heads (G divides H), d head width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from muonclip.torch.logits.mask import AttentionMask

_BLOCK_ROWS, _BLOCK_COLUMNS, _BLOCK_WIDTH = 64, 64, 32
_ROUNDING_MARGIN = 1 + 1e-5  # two float32 norms and a float32 product together err by about 1e-6


@torch.no_grad()
def head_maxima(
    q: Tensor, k: Tensor, *, scale: float, mask: AttentionMask, floor: Tensor, bounds: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute what `measure_max_logits` does where that exceeds `floor`; elsewhere a bound may replace it.

    `q`: [B, H, Tq, d], `k`: [B, G, Tk, d], of any strides, float32, bfloat16 or float16, multiplied in float32.
    `floor`: fp32 [H] on the device of q. `bounds`, fp32 [B, H, Tq]: known of the rows. Returns, fp32 [H]:

    - maximum: over the row blocks that were computed (−inf: none). Above the floor it is the maximum of the head. NaN
      logits give NaN, whatever the floor.
    - bound: at least the maximum of the head. Above the floor it equals `maximum`.

    Raises ValueError for other dtypes.
    """
    if not {q.dtype, k.dtype} <= {torch.float32, torch.bfloat16, torch.float16}:
        raise ValueError(
            f"q is {q.dtype}, k is {k.dtype}; the kernel takes float32, bfloat16 and float16. "
            "Use measure_max_logits, which multiplies float64 in float64."
        )
    if q.dtype != k.dtype:  # on Blackwell, Triton 3.6 multiplies widened numbers in tf32: exact if both were narrow
        q, k = q.float(), k.float()
    batch, heads, query_length, width = q.shape
    groups, key_length = k.shape[1:3]
    blocks = -(-query_length // _BLOCK_ROWS)
    if batch * blocks * key_length == 0:
        return floor.new_full((heads,), -math.inf), floor.new_full((heads,), -math.inf)

    key_norms = _norms(k).amax(-1).repeat_interleave(heads // groups, 1)
    row_bounds = _norms(q) * (key_norms * (abs(scale) * _ROUNDING_MARGIN))[..., None]
    if bounds is not None:  # NaN of the norms is kept
        row_bounds = torch.minimum(row_bounds, bounds)
    documents, key_documents, offsets, attn_mask = _expanded(mask, q.shape, key_length)
    maximum, bound = torch.empty(2, heads, batch * blocks, dtype=torch.float32, device=q.device)
    strides = (
        *q.stride(),
        *k.stride(),
        *row_bounds.stride(),
        floor.stride(0),
        *((0, 0) if documents is None else documents.stride()),
        *((0, 0) if key_documents is None else key_documents.stride()),
        *((0, 0) if offsets is None else offsets.stride()),
        *((0, 0, 0, 0) if attn_mask is None else attn_mask.stride()),
    )
    offset = 0 if isinstance(mask.query_offset, Tensor) else mask.query_offset
    longest = query_length + key_length + abs(offset)
    left, right = (longest if reach is None else min(reach, longest) for reach in mask.reach)
    launch: Any = _head_maxima[(heads * batch * blocks,)]  # its parameters are annotated for Triton's compiler
    with torch.cuda.device_of(q):
        launch(
            q, k, row_bounds, floor, documents, key_documents, offsets, attn_mask, mask.highest_masked,
            maximum, bound, *strides,
            scale=scale, batch=batch, blocks=blocks, queries_per_key=heads // groups,
            query_length=query_length, key_length=key_length, left=left, right=right, offset=offset,
            WIDTH=width,
            BLOCK_ROWS=_BLOCK_ROWS, BLOCK_COLUMNS=_BLOCK_COLUMNS, BLOCK_WIDTH=_BLOCK_WIDTH,
        )  # fmt: skip
    return maximum.amax(-1), bound.amax(-1)


def _norms(x: Tensor) -> Tensor:
    """Return the norms [B, heads, T] in float32, with a margin for squares below its smallest normal number."""
    lost = math.sqrt(x.shape[-1] * torch.finfo(torch.float32).tiny)
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32) + lost


def _expanded(
    mask: AttentionMask, query_shape: torch.Size, key_length: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return document ids of queries and keys [B, T], offsets [B, Tq] and attn_mask [B, H, Tq, Tk], not copied."""
    batch, heads, query_length, _ = query_shape
    offsets = mask.query_offset.expand(batch, query_length) if isinstance(mask.query_offset, Tensor) else None
    documents, of_keys, attn_mask = mask.document_ids, mask.documents_of_keys, mask.attn_mask
    if documents is not None and of_keys is not None:
        documents, of_keys = documents.expand(batch, query_length), of_keys.expand(batch, key_length)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = attn_mask.view(torch.uint8)
        attn_mask = attn_mask.expand(batch, heads, query_length, key_length)
    return documents, of_keys, offsets, attn_mask


@triton.jit
def _head_maxima(
    q, k, row_bounds, floor, documents, key_documents, offsets, attn_mask, highest_masked, maxima, bounds,
    q_batch, q_head, q_row, q_width,
    k_batch, k_head, k_row, k_width,
    bound_batch, bound_head, bound_row, floor_head,
    document_batch, document_row, key_document_batch, key_document_row, offset_batch, offset_row,
    mask_batch, mask_head, mask_row, mask_column,
    scale, batch, blocks, queries_per_key, query_length, key_length, left, right, offset,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute one row block of one head and batch entry; strides follow the tensors, and offsets are 64 bits wide."""
    program = tl.program_id(0)
    first_row = program % blocks * BLOCK_ROWS
    b = (program // blocks % batch).to(tl.int64)
    h = (program // blocks // batch).to(tl.int64)
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    rows_inside = rows < query_length
    rows_64 = rows.to(tl.int64)

    row_bounds += b * bound_batch + h * bound_head
    bound = _amax(tl.load(row_bounds + rows_64 * bound_row, mask=rows_inside, other=0.0))
    maximum = tl.full((), float("-inf"), tl.float32)
    if not (bound <= tl.load(floor + h * floor_head)):  # true of NaN too
        queries = q + b * q_batch + h * q_head + rows_64[:, None] * q_row
        keys = k + b * k_batch + h // queries_per_key * k_head
        if documents is not None:
            documents += b * document_batch
            key_documents += b * key_document_batch
            row_documents = tl.load(documents + rows_64 * document_row, mask=rows_inside, other=0)
        if attn_mask is not None:
            if highest_masked is not None:
                forbids = tl.load(highest_masked)
            mask_rows = attn_mask + b * mask_batch + h * mask_head + rows_64[:, None] * mask_row

        positions = rows + offset
        first_column, stop = 0, key_length
        if offsets is not None:
            positions += tl.load(offsets + b * offset_batch + rows_64 * offset_row, mask=rows_inside, other=0).to(
                tl.int32
            )
        else:
            last_row = tl.minimum(first_row + BLOCK_ROWS, query_length) - 1
            first_column = tl.maximum(first_row + offset - left, 0) // BLOCK_COLUMNS * BLOCK_COLUMNS
            stop = tl.minimum(last_row + offset + right + 1, key_length)
        best = tl.full((BLOCK_ROWS, BLOCK_COLUMNS), float("-inf"), tl.float32)
        for start in range(first_column, stop, BLOCK_COLUMNS):
            columns = start + tl.arange(0, BLOCK_COLUMNS)
            columns_inside = columns < key_length
            columns_64 = columns.to(tl.int64)
            scores = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
            for part in range(0, WIDTH, BLOCK_WIDTH):
                dims = part + tl.arange(0, BLOCK_WIDTH)
                dims_inside = dims < WIDTH
                dims_64 = dims.to(tl.int64)
                q_part = tl.load(
                    queries + dims_64[None, :] * q_width, mask=rows_inside[:, None] & dims_inside[None, :], other=0.0
                )
                k_part = tl.load(
                    keys + columns_64[None, :] * k_row + dims_64[:, None] * k_width,
                    mask=dims_inside[:, None] & columns_inside[None, :],
                    other=0.0,
                )
                # The scale comes afterwards, so that the products of narrow numbers are exact.
                scores = tl.dot(q_part.to(tl.float32), k_part.to(tl.float32), scores, input_precision="ieee")

            distance = positions[:, None] - columns[None, :]
            allowed = rows_inside[:, None] & columns_inside[None, :] & (distance <= left) & (distance >= -right)
            if documents is not None:
                column_documents = tl.load(key_documents + columns_64 * key_document_row, mask=columns_inside, other=0)
                allowed &= row_documents[:, None] == column_documents[None, :]
            if attn_mask is not None:
                values = tl.load(mask_rows + columns_64[None, :] * mask_column, mask=allowed, other=0)
                if highest_masked is None:
                    allowed &= values != 0
                else:
                    allowed &= ~(values.to(forbids.dtype) <= forbids)  # false of NaN
            scores = tl.where(allowed, scores * scale, float("-inf"))
            best = tl.maximum(best, scores, propagate_nan=tl.PropagateNan.ALL)
        maximum = _amax(best)
        bound = maximum
    tl.store(maxima + program, maximum)
    tl.store(bounds + program, bound)


@triton.jit
def _amax(x):
    """Return the maximum of all entries, or NaN where one is. (`tl.max` drops NaN.)"""
    is_nan = x != x
    maximum = tl.max(tl.where(is_nan, float("inf"), x))
    return tl.where(tl.max(is_nan.to(tl.int32)) > 0, float("nan"), maximum)
