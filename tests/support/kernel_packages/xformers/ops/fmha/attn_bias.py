"""The biases of xFormers 0.0.33 by their names and attributes, with the masks that they say they are."""

import math
from dataclasses import dataclass

import torch


def band(shape, left, right, bottom_right):
    """The pairs of the last two axes with i − left ≤ j ≤ i + right, i counted from the first or last position."""
    rows, columns = shape[-2:]
    i, j = torch.arange(rows)[:, None] + (columns - rows if bottom_right else 0), torch.arange(columns)
    return torch.where((j >= i - left) & (j <= i + right), 0.0, -math.inf)


class AttentionBias:
    pass


class LowerTriangularMask(AttentionBias):
    def materialize(self, shape):
        return band(shape, math.inf, 0, False)

    def add_bias(self, bias):
        return LowerTriangularMaskWithTensorBias(bias)


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    def __init__(self, bias):
        self._bias = bias

    def materialize(self, shape):
        return super().materialize(shape) + self._bias


class LowerTriangularFromBottomRightMask(AttentionBias):
    def materialize(self, shape):
        return band(shape, math.inf, 0, True)


@dataclass
class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    _window_size: int

    def materialize(self, shape):
        return band(shape, self._window_size - 1, 0, True)


@dataclass
class LocalAttentionFromBottomRightMask(AttentionBias):
    window_left: int
    window_right: int

    def materialize(self, shape):
        return band(shape, self.window_left, self.window_right, True)


@dataclass
class _SeqLenInfo:
    seqstart: torch.Tensor
    seqstart_py: list

    @classmethod
    def from_seqlens(cls, seqlens):
        starts = torch.tensor([0, *seqlens]).cumsum(0).int()
        return cls(starts, starts.tolist())


@dataclass
class BlockDiagonalMask(AttentionBias):
    q_seqinfo: _SeqLenInfo
    k_seqinfo: _SeqLenInfo

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, **options):
        of_q = _SeqLenInfo.from_seqlens(q_seqlen)
        return cls(of_q, of_q if kv_seqlen is None else _SeqLenInfo.from_seqlens(kv_seqlen), **options)

    def block(self, shape):
        return torch.zeros(shape)

    def materialize(self, shape):
        mask = torch.full(shape[-2:], -math.inf)
        q, k = self.q_seqinfo.seqstart_py, self.k_seqinfo.seqstart_py
        for a, b, c, d in zip(q, q[1:], k, k[1:], strict=False):
            mask[a:b, c:d] = self.block((b - a, d - c))
        return mask


@dataclass
class BlockDiagonalCausalMask(BlockDiagonalMask):
    def block(self, shape):
        return band(shape, math.inf, 0, False)


@dataclass
class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    def block(self, shape):
        return band(shape, math.inf, 0, True)


@dataclass
class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalCausalMask):
    _window_size: int = 0

    def block(self, shape):
        return band(shape, self._window_size - 1, 0, False)


@dataclass
class BlockDiagonalCausalLocalAttentionFromBottomRightMask(BlockDiagonalCausalFromBottomRightMask):
    _window_size: int = 0

    def block(self, shape):
        return band(shape, self._window_size - 1, 0, True)


@dataclass
class BlockDiagonalPaddedKeysMask(BlockDiagonalMask):
    pass
