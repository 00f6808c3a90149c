"""The rows of weights that feed the heads of an attention, whole or sharded.

Facts and declarations only: `discover` finds them, `clip` scales them.
"""

from muonclip.torch.heads.head_rows import Axes, HeadRows, axes_of, heads_of_rows, sample_rows, scale_heads
from muonclip.torch.heads.qk_projection import QKProjection, declared_qk_projections, out_axis
from muonclip.torch.heads.reparametrised import NotProportional, entry, followed, places, registered

__all__ = [
    "Axes",
    "HeadRows",
    "NotProportional",
    "QKProjection",
    "axes_of",
    "declared_qk_projections",
    "entry",
    "followed",
    "heads_of_rows",
    "out_axis",
    "places",
    "registered",
    "sample_rows",
    "scale_heads",
]
