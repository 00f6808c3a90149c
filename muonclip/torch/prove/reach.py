"""Tell which attentions a forward reaches, without a search."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from muonclip.torch.discover import Inputs, Site
from muonclip.torch.prove.attention_run import no_heads
from muonclip.torch.prove.experiments import run_copy


def reached_beside_known(
    model: nn.Module, inputs: Inputs, sites: Mapping[str, Site], *, training: bool
) -> set[str] | None:
    """Return the names of the modules that a forward of a copy reaches, where all calls of attention in it are made by
    known sites, and no more than they make; else None.

    Costs one forward. Raises whatever the model raises.
    """
    outcome = run_copy(model, inputs, no_heads, training=training)
    for call in outcome.calls:
        site = sites.get(call.module)
        if site is None or (call.number >= len(site.projections) > 1):
            return None
    return outcome.ran
