"""The ways in which an attention is observed, and where its maxima come from then, for the plan and for errors."""

from __future__ import annotations

from dataclasses import dataclass

from muonclip.torch.heads.qk_projection import QKProjection

_TILES = "norm bound, then exact tiles"


@dataclass(frozen=True, slots=True)
class Source:
    """One way in which an attention is observed: its name, and how its maxima are computed on each kind of device."""

    name: str
    on_cpu: str = _TILES
    on_cuda: str = "norm bound, then tiles"
    if_unobserved: str = ""
    """What to add to the error where such an attention was not observed."""


SOURCES = {
    "sdpa": Source("scaled_dot_product_attention", on_cpu="row LSE or norm bound, then exact rows"),
    "flex": Source("FlexAttention", on_cuda="max_scores of the kernel"),
    "interface": Source("Hugging Face attention interface"),
    "written out": Source(
        "product and softmax",
        if_unobserved=(
            " This attention is written out as a product and a softmax, which cannot be followed in code that "
            "torch.compile made: let it call scaled_dot_product_attention or muonclip.torch.attention."
        ),
    ),
    "declared": Source("declared", on_cpu="row LSE or norm bound, then exact rows"),
}
"""By the `via` of a site."""


def describe(source: Source, projection: QKProjection, observe: str) -> str:
    """Say where the maxima come from, in a few words."""
    device = next((parameter.device.type for parameter in projection.qk_parameters()), "cpu")
    how = {"cuda": source.on_cuda, "cpu": source.on_cpu}.get(device, "exact tiles")
    return f"{source.name}: {how}" + (", always" if observe == "always" else "")
