"""The way from a model to its attentions: a copy runs one traced forward, and queries and keys are attributed to rows.

Nothing here scales a weight or fills a statistic; how a call to an attention kernel is read is `observe`'s.
"""

from muonclip.torch.discover.discovery import Inputs
from muonclip.torch.discover.monitor import AttentionMonitor
from muonclip.torch.discover.refusals import NOTHING_FOUND

__all__ = [
    "NOTHING_FOUND",
    "AttentionMonitor",
    "Inputs",
]
