"""MuonClip for PyTorch.

    optimizer = MuonClip(model, lr=2e-4, weight_decay=0.1)  # was AdamW(model.parameters(), lr=2e-4, weight_decay=0.1)

The packages, from top to bottom: `optimizer`, `clip`, `discover`, `observe`, `heads` and `update`, `logits` and `mesh`;
each imports only from those below it. The files next to this one are the integrations with engines.
"""

from muonclip.core import MatrixLayout
from muonclip.torch.clip.qk_clip import QKClip
from muonclip.torch.clip.report import LayerReport, QKClipReport
from muonclip.torch.heads.head_rows import HeadRows
from muonclip.torch.heads.qk_projection import QKProjection
from muonclip.torch.logits.attention import attention
from muonclip.torch.logits.exact_maxima import measure_max_logits
from muonclip.torch.logits.mask import AttentionMask
from muonclip.torch.logits.max_logits import MaxLogits
from muonclip.torch.optimizer.muonclip import Muon, MuonClip
from muonclip.torch.optimizer.plan import Plan, PlannedParameter

__all__ = [
    "AttentionMask",
    "HeadRows",
    "LayerReport",
    "MatrixLayout",
    "MaxLogits",
    "Muon",
    "MuonClip",
    "Plan",
    "PlannedParameter",
    "QKClip",
    "QKClipReport",
    "QKProjection",
    "attention",
    "measure_max_logits",
]
