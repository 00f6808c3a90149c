"""The shapes at which optimizers are compared, frozen so that figures of different days and machines can be compared.

A weight is a shape and how it is read as matrices; without that it is AdamW's. Peers that know matrices of two axes
only get every logical matrix as a parameter of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from muonclip.models import MoEConfig
from muonclip.models.torch import MoE
from muonclip.torch import MatrixLayout, MuonClip

WHOLE = MatrixLayout()


class Weight(NamedTuple):
    """The shape of a parameter, rows first, and its matrices; None where AdamW updates it."""

    shape: tuple[int, ...]
    layout: MatrixLayout | None = WHOLE


Weights: TypeAlias = tuple[Weight, ...] | Callable[[], tuple[Weight, ...]]
"""The weights of a set, or what makes them."""


def weights_of(made: Weights) -> tuple[Weight, ...]:
    """Return the weights of a set."""
    return made() if callable(made) else made


def matrices(count: int, *shape: int, layout: MatrixLayout = WHOLE) -> tuple[Weight, ...]:
    return (Weight(shape, layout),) * count


def reference_moe() -> tuple[Weight, ...]:
    """Return the parameters of the reference model, preset cpu, as MuonClip's own plan reads them."""
    planned = MuonClip(MoE(MoEConfig.cpu()), qk_clip=None).plan.parameters
    return tuple(Weight(tuple(each.shape), each.layout if each.use == "muon" else None) for each in planned)


K2_QUARTER = ((384, 1792), (3072, 384), (192, 1792), (4096, 128), (1792, 2048))  # q down, up; kv down, up; out
SETS: dict[str, Weights] = {
    "64 × (64×128)": matrices(64, 64, 128),
    "16 × (256×512)": matrices(16, 256, 512),
    "8 × (512×1792)": matrices(8, 512, 1792),
    "2 × 1024²": matrices(2, 1024, 1024),
    "MLA of K2/4": tuple(Weight(shape) for shape in K2_QUARTER),
    "reference MoE": reference_moe,
    "2048×7168": matrices(1, 2048, 7168),
}
OTHERS: dict[str, Weights] = {
    "ViT-tiny, 12 layers": (*matrices(12, 576, 192), *matrices(12, 192, 192), *matrices(24, 768, 192)),
    "Llama, width 512": (*matrices(2, 512, 512), *matrices(2, 256, 512), *matrices(2, 1376, 512), Weight((512, 1376))),
    "Llama, width 1024": (*matrices(2, 1024, 1024), *matrices(2, 256, 1024), *matrices(3, 2816, 1024)),
    "odd, 9 × (127×391)": matrices(9, 127, 391),
    "tall, 4 × (3001×64)": matrices(4, 3001, 64),
    "LoRA, 24 pairs of rank 16": (*matrices(24, 16, 768), *matrices(24, 768, 16)),
    "one 128×128": matrices(1, 128, 128),
    "experts, 16×128×256": matrices(2, 16, 128, 256, layout=MatrixLayout(batch_ndim=1)),
    "experts, gate|up": matrices(2, 16, 256, 128, layout=MatrixLayout(batch_ndim=1, blocks=(128, 128))),
    "per head, 12 of 64": matrices(4, 768, 768, layout=MatrixLayout(heads=(12,))),
    "fused q|k|v": matrices(4, 1152, 384, layout=MatrixLayout(blocks=(384, 384, 384))),
}
TINY = {
    "3 × (8×12)": matrices(3, 8, 12),
    "mixed": (*matrices(1, 2, 12, 8, layout=MatrixLayout(batch_ndim=1, blocks=(6, 6))), Weight((7,), None)),
}


def split(x: Tensor, layout: MatrixLayout | None) -> list[Tensor]:
    """Return the logical matrices of a parameter, or of its gradient; AdamW's as it is."""
    if layout is None:
        return [x]
    return [matrix for block in layout.split(x, xp=torch) for matrix in block]
