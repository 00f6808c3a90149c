"""The updates by name, `update="muon" | "normuon" | …`, and the options that make no sense with them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from muonclip.core.arguments import check_choice, plain_number, shown
from muonclip.core.hyperball import HyperballRule
from muonclip.core.muown import MuownRule
from muonclip.core.normuon import NorMuonRule
from muonclip.core.state_storage import absmax_of
from muonclip.core.text_table import in_bytes
from muonclip.core.update_rule import MuonRule

Update: TypeAlias = Literal["muon", "normuon", "hyperball", "muown"]
"""The rules by which the Muon half updates, by name."""

UPDATES: Mapping[str, MuonRule] = MappingProxyType(
    {"muon": MuonRule(), "normuon": NorMuonRule(), "hyperball": HyperballRule(), "muown": MuownRule()}
)


def check_update(update: Any, weight_decay: Any, *, cautious_decay: bool) -> None:
    """Raise ValueError for an update that does not exist, and for options that would have no effect with it.

    `weight_decay` None: one that cannot be read.
    """
    check_choice("update", update, *UPDATES)
    if update == "muown" and cautious_decay:
        raise ValueError(
            "cautious_decay=True with update='muown', whose decay is of whole rows. Leave one of them out."
        )
    if update != "hyperball":
        return
    decay = None if callable(weight_decay) else plain_number("weight_decay", weight_decay)
    if weight_decay is not None and decay != 0:
        raise ValueError(
            f"weight_decay={shown(weight_decay)} with update='hyperball', which holds the norm of each matrix and "
            "would undo it. Give weight_decay=0; the AdamW half has its own, adamw=dict(weight_decay=0.1)."
        )
    if cautious_decay:
        raise ValueError("cautious_decay=True with update='hyperball', which has no decay. Leave one of them out.")


def states_in_words(sizes: Mapping[str, Mapping[str, int]], momentum_dtype: object = None) -> str:
    """Write the bytes of each state by update, and their sum, for a plan.

    Nothing where Muon itself is the only update, and its momentum as the weights are.
    """
    stored = [name for states in sizes.values() for name in states]
    if not sizes.keys() - {"muon"} and momentum_dtype is None and absmax_of("momentum_buffer") not in stored:
        return ""
    lines = [
        f"update {update}: state " + ", ".join(f"{name} {in_bytes(size)}" for name, size in states.items())
        for update, states in sizes.items()
    ]
    total = in_bytes(sum(sum(states.values()) for states in sizes.values()))
    return "\n".join([*lines, f"state of the Muon half: {total}"])
