"""The words for where the maxima of an attention come from, for the plan."""

from __future__ import annotations

from muonclip.torch.heads import QKProjection
from muonclip.torch.observe import AttentionKernel


def describe(kernel: AttentionKernel, projection: QKProjection, observe: str) -> str:
    """Say where the maxima come from, in a few words."""
    device = next((parameter.device.type for parameter in projection.qk_parameters()), "cpu")
    return f"{kernel.name}: {kernel.maxima_on(device)}" + (", always" if observe == "always" else "")
