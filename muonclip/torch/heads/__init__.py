"""The rows of weights that feed the heads of an attention, whole or sharded.

Facts and declarations only: `discover` finds them, `clip` scales them.
"""

from muonclip.torch.heads.head_rows import HeadRows, scale_heads
from muonclip.torch.heads.qk_projection import QKProjection, declared_qk_projections, out_axis

__all__ = [
    "HeadRows",
    "QKProjection",
    "declared_qk_projections",
    "out_axis",
    "scale_heads",
]
