"""The functions of flash-attn 2.8.4 and the autograd functions that they end at, with their signatures."""

import torch
from dense_attention import backward, forward


def _forward(ctx, q, k, v, starts, dropout_p, scale, causal, window_size, softcap, alibi_slopes, return_softmax):
    options = dict(starts=starts, softcap=softcap, alibi=alibi_slopes)
    out, lse = forward(ctx, q, k, v, scale, causal, window_size, **options)
    return (out, lse, torch.empty(0)) if return_softmax else out


class FlashAttnQKVPackedFunc(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        qkv,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_softmax,
        is_grad_enabled,
    ):
        q, k, v = qkv.unbind(-3)
        options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_softmax
        return _forward(ctx, q, k, v, None, *options)

    @staticmethod
    def backward(ctx, dout, *args):
        dq, dk, dv = backward(ctx, dout)
        return torch.stack([dq, dk, dv], -3), *(None,) * 9


class FlashAttnVarlenQKVPackedFunc(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        qkv,
        cu_seqlens,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_softmax,
        is_grad_enabled,
    ):
        q, k, v = qkv.unbind(-3)
        options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_softmax
        return _forward(ctx, q, k, v, (cu_seqlens, cu_seqlens), *options)

    @staticmethod
    def backward(ctx, dout, *args):
        dq, dk, dv = backward(ctx, dout)
        return torch.stack([dq, dk, dv], -3), *(None,) * 11


class FlashAttnKVPackedFunc(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        q,
        kv,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_softmax,
        is_grad_enabled,
    ):
        k, v = kv.unbind(-3)
        options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_softmax
        return _forward(ctx, q, k, v, None, *options)

    @staticmethod
    def backward(ctx, dout, *args):
        dq, dk, dv = backward(ctx, dout)
        return dq, torch.stack([dk, dv], -3), *(None,) * 9


class FlashAttnVarlenKVPackedFunc(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        q,
        kv,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_softmax,
        is_grad_enabled,
    ):
        k, v = kv.unbind(-3)
        options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_softmax
        return _forward(ctx, q, k, v, (cu_seqlens_q, cu_seqlens_k), *options)

    @staticmethod
    def backward(ctx, dout, *args):
        dq, dk, dv = backward(ctx, dout)
        return dq, torch.stack([dk, dv], -3), *(None,) * 13


class FlashAttnFunc(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_softmax,
        is_grad_enabled,
    ):
        options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_softmax
        return _forward(ctx, q, k, v, None, *options)

    @staticmethod
    def backward(ctx, dout, *args):
        dq, dk, dv = backward(ctx, dout)
        return dq, dk, dv, *(None,) * 9


class FlashAttnVarlenFunc(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_softmax,
        block_table,
        is_grad_enabled,
    ):
        options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_softmax
        return _forward(ctx, q, k, v, (cu_seqlens_q, cu_seqlens_k), *options)

    @staticmethod
    def backward(ctx, dout, *args):
        dq, dk, dv = backward(ctx, dout)
        return dq, dk, dv, *(None,) * 14


def flash_attn_qkvpacked_func(
    qkv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    return FlashAttnQKVPackedFunc.apply(
        qkv,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        torch.is_grad_enabled(),
    )


def flash_attn_varlen_qkvpacked_func(
    qkv,
    cu_seqlens,
    max_seqlen,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    return FlashAttnVarlenQKVPackedFunc.apply(
        qkv,
        cu_seqlens,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        torch.is_grad_enabled(),
    )


def flash_attn_kvpacked_func(
    q,
    kv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    return FlashAttnKVPackedFunc.apply(
        q,
        kv,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        torch.is_grad_enabled(),
    )


def flash_attn_varlen_kvpacked_func(
    q,
    kv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    return FlashAttnVarlenKVPackedFunc.apply(
        q,
        kv,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        torch.is_grad_enabled(),
    )


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    return FlashAttnFunc.apply(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        torch.is_grad_enabled(),
    )


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    return FlashAttnVarlenFunc.apply(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        block_table,
        torch.is_grad_enabled(),
    )
