"""The attention calls of a running model, in one form for all kernels: a file for each kernel, the patches that lead
there, the hooks that say which module is running, and who handles a call.

What is done with a call in a trace is `discover`'s; here it fills a statistic.
"""

from muonclip.torch.observe.attention_call import (
    DECLARED,
    UNREAD,
    AttentionCall,
    AttentionKernel,
    broadcast_heads,
    heads_from,
)
from muonclip.torch.observe.eager import KERNEL as EAGER
from muonclip.torch.observe.eager import ScoreTracker
from muonclip.torch.observe.flex import KERNEL as FLEX
from muonclip.torch.observe.handlers import (
    AttentionCallHandler,
    drop_handlers,
    graph_task,
    handled,
    handling,
    of_thread,
)
from muonclip.torch.observe.hooks import Hooks, ObserverHooks, enter, leave
from muonclip.torch.observe.jagged import is_jagged, like, values_of
from muonclip.torch.observe.kernels import KERNELS
from muonclip.torch.observe.loads import LoadHooks
from muonclip.torch.observe.observer import Observer, ObserverRun
from muonclip.torch.observe.patches import PATCHES
from muonclip.torch.observe.score import Block, Score, columns_of, with_heads_from
from muonclip.torch.observe.sdpa import KERNEL as SDPA
from muonclip.torch.observe.torch_functions import bind, derivatives_in_place, functions
from muonclip.torch.observe.unclaimed import Unclaimed, UnclaimedRun
from muonclip.torch.observe.whole_logits import whole_logits

__all__ = [
    "DECLARED",
    "EAGER",
    "FLEX",
    "KERNELS",
    "PATCHES",
    "SDPA",
    "UNREAD",
    "AttentionCall",
    "AttentionCallHandler",
    "AttentionKernel",
    "Block",
    "Hooks",
    "LoadHooks",
    "Observer",
    "ObserverHooks",
    "ObserverRun",
    "Score",
    "ScoreTracker",
    "Unclaimed",
    "UnclaimedRun",
    "bind",
    "broadcast_heads",
    "columns_of",
    "derivatives_in_place",
    "drop_handlers",
    "enter",
    "functions",
    "graph_task",
    "handled",
    "handling",
    "heads_from",
    "is_jagged",
    "leave",
    "like",
    "of_thread",
    "values_of",
    "whole_logits",
    "with_heads_from",
]
