"""How users call the kernels: imported by name, in a module without a model. Each call is (q, k, v, **options) → out.

q [B, Tq, H, d], k and v [B, Tk, G, d]; a call of packed sequences takes B = 1 and `starts`, the cumulative lengths.
"""

import torch
from flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from flash_attn.cute import flash_attn_func as fourth_flash_attn_func
from flash_attn.cute import flash_attn_varlen_func as fourth_flash_attn_varlen_func
from flash_attn.flash_attn_interface import FlashAttnFunc
from flash_attn_interface import flash_attn_func as third_flash_attn_func
from flash_attn_interface import flash_attn_qkvpacked_func as third_flash_attn_qkvpacked_func
from flash_attn_interface import flash_attn_varlen_func as third_flash_attn_varlen_func


def packed(function):
    def call(q, k, v, starts, **options):
        lengths = [int(each.diff().max()) for each in starts]
        out = function(q[0], k[0], v[0], *starts, *lengths, **options)
        return (out[0] if isinstance(out, tuple) else out)[None]

    return call


def self_packed(function):
    def call(q, k, v, starts, **options):
        return function(torch.stack([q[0], k[0], v[0]], 1), starts[0], int(starts[0].diff().max()), **options)[None]

    return call


CALLS = {
    "2": flash_attn_func,
    "2 class": lambda q, k, v: FlashAttnFunc.apply(
        q, k, v, 0.0, None, False, (-1, -1), 0.0, None, False, False, torch.is_grad_enabled()
    ),
    "2 kv": lambda q, k, v, **options: flash_attn_kvpacked_func(q, torch.stack([k, v], 2), **options),
    "2 qkv": lambda q, k, v, **options: flash_attn_qkvpacked_func(torch.stack([q, k, v], 2), **options),
    "2 varlen": packed(flash_attn_varlen_func),
    "2 varlen kv": packed(
        lambda q, k, v, *args, **options: flash_attn_varlen_kvpacked_func(q, torch.stack([k, v], 1), *args, **options)
    ),
    "2 varlen qkv": self_packed(flash_attn_varlen_qkvpacked_func),
    "3": third_flash_attn_func,
    "3 qkv": lambda q, k, v, **options: third_flash_attn_qkvpacked_func(
        torch.cat([q, k, v], 2), num_heads_q=q.shape[2], **options
    ),
    "3 varlen": packed(third_flash_attn_varlen_func),
    "4": lambda q, k, v, **options: fourth_flash_attn_func(q, k, v, **options)[0],
    "4 varlen": packed(
        lambda q, k, v, q_starts, k_starts, q_longest, k_longest, **options: fourth_flash_attn_varlen_func(
            q, k, v, None, q_starts, k_starts, q_longest, k_longest, **options
        )
    ),
}
