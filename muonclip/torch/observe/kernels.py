"""The attention kernels whose calls are observed, one file each.

Attention that is written out has no function of its own; `eager.py` follows its products.
"""

from __future__ import annotations

from muonclip.torch.observe.attention_call import AttentionKernel
from muonclip.torch.observe.flash_attn import KERNELS as FLASH_ATTN
from muonclip.torch.observe.flex import KERNEL as FLEX
from muonclip.torch.observe.huggingface import KERNEL as HUGGING_FACE
from muonclip.torch.observe.sdpa import KERNEL as SDPA
from muonclip.torch.observe.transformer_engine import KERNEL as TRANSFORMER_ENGINE
from muonclip.torch.observe.varlen import KERNEL as VARLEN
from muonclip.torch.observe.xformers import KERNELS as XFORMERS

KERNELS: list[AttentionKernel] = [
    SDPA,
    FLEX,
    HUGGING_FACE,
    VARLEN,
    *FLASH_ATTN,
    *XFORMERS,
    TRANSFORMER_ENGINE,
]
