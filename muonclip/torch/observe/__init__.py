"""The attention calls of a running model, in one form for all kernels: a file for each kernel, the patches that lead
there, the hooks that say which module is running, and who handles a call.

What is done with a call in a trace is `discover`'s; here it fills a statistic.
"""

from muonclip.torch.observe.attention_call import DECLARED, AttentionCall, AttentionKernel
from muonclip.torch.observe.handlers import AttentionCallHandler, handled
from muonclip.torch.observe.kernels import KERNELS
from muonclip.torch.observe.observer import Observer
from muonclip.torch.observe.patches import PATCHES

__all__ = [
    "DECLARED",
    "KERNELS",
    "PATCHES",
    "AttentionCall",
    "AttentionCallHandler",
    "AttentionKernel",
    "Observer",
    "handled",
]
