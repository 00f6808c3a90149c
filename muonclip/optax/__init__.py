"""MuonClip for Optax: transformations like any other, with the extra argument `max_logits`.

An attention is declared by `QKProjection`, its maximum logits are computed by the model (`exact_max_logits`).
Orthogonalisation and the factors of the clip are `muonclip.core`'s; nothing here imports PyTorch.
"""

from muonclip.optax.accumulation import AccumulateState, accumulate
from muonclip.optax.check import check
from muonclip.optax.head_rows import HeadRows
from muonclip.optax.known_attention import qk_projections_of
from muonclip.optax.max_logits import certified_max_logits, dot_product_attention, exact_max_logits
from muonclip.optax.muon import ScaleByMuonState, muonclip, scale_by_muon
from muonclip.optax.plan import Plan, PlannedParameter, plan
from muonclip.optax.qk_clip import QKClipState, qk_clip
from muonclip.optax.qk_projection import QKProjection

__all__ = [
    "AccumulateState",
    "HeadRows",
    "Plan",
    "PlannedParameter",
    "QKClipState",
    "QKProjection",
    "ScaleByMuonState",
    "accumulate",
    "certified_max_logits",
    "check",
    "dot_product_attention",
    "exact_max_logits",
    "muonclip",
    "plan",
    "qk_clip",
    "qk_projections_of",
    "scale_by_muon",
]
