"""MuonClip for PyTorch.

    optimizer = MuonClip(model, lr=5e-3, weight_decay=0.1)  # was AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)

The packages, from top to bottom: `monitor`, `optimizer`, `clip`, `discover`, `observe`, `heads` and `update`, `logits`
and `mesh`; each imports only from those below it. The files next to this one are the integrations with engines.
"""

from muonclip.core import MatrixLayout
from muonclip.torch.clip import LayerReport, QKClip, QKClipReport
from muonclip.torch.heads import HeadRows, QKProjection
from muonclip.torch.logits import AttentionMask, MaxLogits, attention, measure_max_logits
from muonclip.torch.monitor import MatrixStatistics, Monitor
from muonclip.torch.optimizer import Muon, MuonClip, Plan, PlannedParameter

__all__ = [
    "AttentionMask",
    "HeadRows",
    "LayerReport",
    "MatrixLayout",
    "MatrixStatistics",
    "MaxLogits",
    "Monitor",
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
