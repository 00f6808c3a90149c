"""The way from a model to its attentions: a copy runs one traced forward, and queries and keys are attributed to rows.

Nothing here scales a weight or fills a statistic; how a call to an attention kernel is read is `observe`'s.
"""

from muonclip.torch.discover.discovery import Discovery, Inputs, NotTraced, Site, discover
from muonclip.torch.discover.example_inputs import guess_inputs
from muonclip.torch.discover.parameter_paths import parameter_names
from muonclip.torch.discover.refusals import (
    NOTHING_FOUND,
    Refusal,
    holds_a_state_space,
    message,
    not_checked,
    nothing_found,
    nothing_to_clip,
)
from muonclip.torch.discover.replica import Replica, has_a_foreign_forward, is_experiment, replica_of
from muonclip.torch.discover.shown_uses import guessed_uses, joint_uses, uses_in
from muonclip.torch.discover.trace import Trace
from muonclip.torch.discover.unfilled import if_unfilled
from muonclip.torch.discover.weighed_sums import may_make_weights

__all__ = [
    "NOTHING_FOUND",
    "Discovery",
    "Inputs",
    "NotTraced",
    "Refusal",
    "Replica",
    "Site",
    "Trace",
    "discover",
    "guess_inputs",
    "guessed_uses",
    "has_a_foreign_forward",
    "holds_a_state_space",
    "if_unfilled",
    "is_experiment",
    "joint_uses",
    "may_make_weights",
    "message",
    "not_checked",
    "nothing_found",
    "nothing_to_clip",
    "parameter_names",
    "replica_of",
    "uses_in",
]
