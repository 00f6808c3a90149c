"""MuonClip for PyTorch.

optimizer = MuonClip(model, lr=2e-4, weight_decay=0.1)      # was AdamW(model.parameters(), lr=2e-4, weight_decay=0.1)
"""

from muonclip.core import MatrixLayout
from muonclip.torch.attention import HeadRows, QKProjection
from muonclip.torch.attention_mask import AttentionMask
from muonclip.torch.exact_maxima import measure_max_logits
from muonclip.torch.max_logits import MaxLogits, attention
from muonclip.torch.optimizer import Muon, MuonClip
from muonclip.torch.param_groups import Plan, PlannedParameter
from muonclip.torch.qk_clip import QKClip
from muonclip.torch.qk_clip_report import LayerReport, QKClipReport

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
