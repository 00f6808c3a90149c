"""Tell which attentions a forward reaches, without a search."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from muonclip.torch.discover import Inputs, Site
from muonclip.torch.prove.attention_run import no_heads
from muonclip.torch.prove.experiments import run_copy


def reaches_known_alone(model: nn.Module, inputs: Inputs, sites: Mapping[str, Site], *, training: bool) -> bool:
    """Tell whether all calls of attention in a forward of a copy are made by known sites, and no more than they make.

    Costs one forward. Raises whatever the model raises.
    """
    outcome = run_copy(model, inputs, no_heads, training=training)
    for call in outcome.calls:
        site = sites.get(call.module)
        if site is None or (call.number >= len(site.projections) > 1):
            return False
    return True
