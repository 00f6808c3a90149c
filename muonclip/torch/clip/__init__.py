"""QK-Clip: measure the maximum logits, combine them over ranks, decide the factors, scale the heads, report.

Which attentions a model has is found in `discover`; which rows feed which heads is declared in `heads`; the statistic
is in `logits`.
"""

from muonclip.torch.clip.attach import Attachment, is_idle
from muonclip.torch.clip.attentions import ClipAttentions
from muonclip.torch.clip.frozen import clipping_in_words, frozen_weights
from muonclip.torch.clip.optimizer_steps import OPTIMIZER_STEPS
from muonclip.torch.clip.qk_clip import QKClip
from muonclip.torch.clip.reduction import JointMaxima
from muonclip.torch.clip.report import LayerReport, QKClipReport, extremes_of
from muonclip.torch.clip.rescaling import scaled_rows

__all__ = [
    "OPTIMIZER_STEPS",
    "Attachment",
    "ClipAttentions",
    "JointMaxima",
    "LayerReport",
    "QKClip",
    "QKClipReport",
    "clipping_in_words",
    "extremes_of",
    "frozen_weights",
    "is_idle",
    "scaled_rows",
]
