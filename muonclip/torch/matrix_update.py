"""Muon's update of many parameters: momentum, then the logical matrices of all of them iterated in batches by shape.

M ← μ M + (1−μ) G      (torch's EMA; the same update as the sum, since the iteration is scale-invariant)
O = NewtonSchulz(M, or with Nesterov (1−μ) G + μ M) · scale(fan_out, fan_in)
W ← W − η (O + λ W)                                    (Kimi K2, arXiv 2507.20534, Algorithm 1, lines 2–6)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from muonclip.core import MatrixLayout, iterate, normalize, update_scale
from muonclip.torch.products import choose_products, iteration_dtype

DEFAULT_WORKSPACE_BYTES = 256 * 2**20

Bucket: TypeAlias = tuple[object, ...]


@dataclass(slots=True, eq=False)
class _Job:
    """One parameter on its way: `blocks` collects the orthogonalised pieces of each fused block."""

    parameter: Tensor
    layout: MatrixLayout
    options: Mapping[str, Any]
    used: Tensor | None
    missing: int = 0
    blocks: list[list[Tensor]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Piece:
    job: _Job
    block: int
    tall: bool
    matrices: Tensor
    """(count, m, n), small side first."""


class MatrixUpdate:
    """Collects matrices into batches of one shape and updates each parameter as soon as its last one is done.

    A batch is iterated when it reaches `workspace_bytes`, or at `finish`: at most one such batch per shape is held.
    """

    def __init__(self, workspace_bytes: int | None = None) -> None:
        self.workspace_bytes = DEFAULT_WORKSPACE_BYTES if workspace_bytes is None else workspace_bytes
        self._buckets: dict[Bucket, list[_Piece]] = {}
        self._counts: dict[Bucket, int] = {}

    def add(
        self,
        parameter: Tensor,
        gradient: Tensor,
        momentum_buffer: Tensor,
        layout: MatrixLayout,
        options: Mapping[str, Any],
    ) -> None:
        """Advance the momentum of one parameter and queue its matrices.

        `options`: its parameter group, with the resolved `coefficients` and the `floor` of the norm.
        """
        momentum = options["momentum"]
        gradient = gradient.to(momentum_buffer.dtype)
        used = _used(gradient, layout) if options["freeze_unused"] else None
        momentum_buffer.lerp_(gradient, 1 - momentum if used is None else (1 - momentum) * used.to(gradient.dtype))
        update = gradient.lerp(momentum_buffer, momentum) if options["nesterov"] else momentum_buffer
        job = _Job(parameter, layout, options, used)
        for block, matrices in enumerate(layout.split(update, xp=torch)):
            job.blocks.append([])
            tall = matrices.shape[-2] > matrices.shape[-1]
            matrices = matrices.mT if tall else matrices
            limit = max(1, self.workspace_bytes // (matrices[0].numel() * 4))
            for piece in matrices.split(limit):
                job.missing += 1
                self._queue(_Piece(job, block, tall, piece), limit)

    def finish(self) -> None:
        """Iterate and apply everything still queued."""
        for pieces in self._buckets.values():
            self._iterate(pieces)
        self._buckets.clear()
        self._counts.clear()

    def _queue(self, piece: _Piece, limit: int) -> None:
        options, matrices = piece.job.options, piece.matrices
        alike = ("coefficients", "floor", "products", "ns_form")
        dtype = iteration_dtype(matrices, options["ns_dtype"])
        key = (matrices.shape[1:], matrices.device, matrices.dtype, dtype, *(options[name] for name in alike))
        bucket = self._buckets.setdefault(key, [])
        if self._counts.get(key, 0) + len(matrices) > limit:
            self._iterate(bucket)
            bucket.clear()
            self._counts[key] = 0
        bucket.append(piece)
        self._counts[key] = self._counts.get(key, 0) + len(matrices)

    def _iterate(self, pieces: list[_Piece]) -> None:
        if not pieces:
            return
        options = pieces[0].job.options
        products = choose_products(options["products"])
        stack = pieces[0].matrices if len(pieces) == 1 else torch.cat([piece.matrices for piece in pieces])
        normal = normalize(stack, products, xp=torch, eps=options["floor"])
        dtype = iteration_dtype(stack, options["ns_dtype"])
        form = options["ns_form"] or "standard"
        steps = options["ns_coefficients"], options["ns_steps"]
        update = iterate(normal.to(dtype), *steps, form=form, xp=torch, products=products)
        for piece, result in zip(pieces, update.split([len(piece.matrices) for piece in pieces]), strict=True):
            piece.job.blocks[piece.block].append(result.mT if piece.tall else result)
            piece.job.missing -= 1
            if not piece.job.missing:
                _apply(piece.job)


def _apply(job: _Job) -> None:
    """W ← W − η (O · scale + λ W), the scale of each block by its own shape."""
    parameter, options = job.parameter, job.options
    lr, decay = options["lr"], options["weight_decay"]
    blocks = [pieces[0] if len(pieces) == 1 else torch.cat(pieces) for pieces in job.blocks]
    scales = [update_scale(m, n, options["adjust_lr_fn"]) for _, m, n in job.layout.matrix_shapes(parameter.shape)]
    if len(set(scales)) > 1:
        blocks = [block.to(parameter.dtype) * scale for block, scale in zip(blocks, scales, strict=True)]
        scales = [1.0]
    update = job.layout.join(blocks, parameter.shape, xp=torch)
    kept = None if job.used is None else parameter.clone()
    parameter.mul_(1 - lr * decay)
    if isinstance(lr, Tensor):
        parameter.sub_(update.to(parameter.dtype) * (lr * scales[0]))
    else:
        parameter.add_(update, alpha=-lr * scales[0])
    if job.used is not None and kept is not None:
        parameter.copy_(torch.where(job.used, parameter, kept))


def _used(gradient: Tensor, layout: MatrixLayout) -> Tensor:
    """Bool, of the gradient's shape: whether the logical matrix of each entry has any gradient."""
    blocks = [
        (matrices != 0).any((-2, -1), keepdim=True).expand_as(matrices) for matrices in layout.split(gradient, xp=torch)
    ]
    return layout.join(blocks, gradient.shape, xp=torch)
