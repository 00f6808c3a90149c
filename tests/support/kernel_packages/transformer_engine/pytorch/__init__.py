"""`DotProductAttention` of TransformerEngine with its signature; it computes dense attention out of sight."""

import math

import torch
from dense_attention import masked_attention, masked_gradients
from torch import nn


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale, bias):
        ctx.case = q, k, v, scale, bias
        return masked_attention(*ctx.case)[0]

    @staticmethod
    def backward(ctx, dout):
        return *masked_gradients(dout, *ctx.case), None, None


class FusedAttention(nn.Module):
    def __init__(self, softmax_scale):
        super().__init__()
        self.softmax_scale = softmax_scale


class DotProductAttention(nn.Module):
    def __init__(
        self,
        num_attention_heads,
        kv_channels,
        num_gqa_groups=None,
        attention_dropout=0.0,
        qkv_format="sbhd",
        attn_mask_type="causal",
        window_size=None,
        bottom_right_diagonal=None,
        cp_group=None,
        softmax_scale=None,
        softmax_type="vanilla",
        return_max_logit=False,
    ):
        super().__init__()
        self.qkv_format, self.window_size, self.cp_group = qkv_format, window_size, cp_group
        self.attn_mask_type = attn_mask_type.replace(",", "_").replace("causal_padding", "padding_causal")
        self.bottom_right_diagonal, self.return_max_logit = bottom_right_diagonal, return_max_logit
        kv_channels = kv_channels if isinstance(kv_channels, int) else kv_channels[0]
        self.fused_attention = FusedAttention(1 / math.sqrt(kv_channels) if softmax_scale is None else softmax_scale)

    def forward(
        self,
        query_layer=None,
        key_layer=None,
        value_layer=None,
        attention_mask=None,
        qkv_format=None,
        cu_seqlens_q=None,
        cu_seqlens_kv=None,
        cu_seqlens_q_padded=None,
        cu_seqlens_kv_padded=None,
        max_seqlen_q=None,
        max_seqlen_kv=None,
        attn_mask_type=None,
        window_size=None,
        bottom_right_diagonal=None,
        checkpoint_core_attention=False,
        core_attention_bias_type="no_bias",
        core_attention_bias=None,
        alibi_slopes=None,
        fast_zero_fill=True,
        inference_params=None,
        pad_between_seqs=None,
        fp8_output=False,
        num_splits=1,
        score_mod=None,
    ):
        layout = qkv_format or self.qkv_format
        first = {"sbhd": lambda t: t.transpose(0, 1), "bshd": lambda t: t, "thd": lambda t: t[None]}[layout]
        q, k, v = (first(t) for t in (query_layer, key_layer, value_layer))
        k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
        bias = self.bias(
            *(attn_mask_type or self.attn_mask_type, window_size or self.window_size, bottom_right_diagonal),
            *(layout, q, k, attention_mask, cu_seqlens_q, cu_seqlens_kv, cu_seqlens_q_padded, cu_seqlens_kv_padded),
        )
        self.last_bias = bias  # for the tests
        whole = bias if core_attention_bias is None else bias + core_attention_bias
        out = _Dense.apply(q, k, v, self.fused_attention.softmax_scale, whole)
        flat = out.flatten(2)
        flat = flat.transpose(0, 1) if layout == "sbhd" else flat[0] if layout == "thd" else flat
        if self.return_max_logit:
            with torch.no_grad():
                logits = self.fused_attention.softmax_scale * torch.einsum("bihd,bjhd->bhij", q, k) + whole
            return flat, logits.amax((0, 2, 3))
        return flat

    def bias(self, kind, window, aligned, layout, q, k, mask, cu_q, cu_k, padded_q, padded_k):
        """0 where a pair is allowed and −∞ elsewhere, [B, 1, Tq, Tk], sequence by sequence."""
        aligned = self.bottom_right_diagonal if aligned is None else aligned
        bottom_right = "bottom_right" in kind or (kind not in ("causal", "padding_causal") and aligned is not False)
        left, right = (math.inf if side < 0 else side for side in window or (-1, -1))
        right = 0 if "causal" in kind else right
        dense = torch.full((len(q), 1, q.shape[1], k.shape[1]), -math.inf)

        def fill(row, a, b, c, d):
            i, j = torch.arange(b - a)[:, None] + ((d - c) - (b - a) if bottom_right else 0), torch.arange(d - c)
            dense[row, 0, a:b, c:d] = torch.where((j >= i - left) & (j <= i + right), 0.0, -math.inf)

        if "padding" in kind and layout == "thd":
            lengths = zip(cu_q.diff().tolist(), cu_k.diff().tolist(), strict=True)
            starts_q, starts_k = ((c if p is None else p).tolist() for c, p in ((cu_q, padded_q), (cu_k, padded_k)))
            for (rows, columns), a, c in zip(lengths, starts_q, starts_k, strict=False):
                fill(0, a, a + rows, c, c + columns)
        elif "padding" in kind:
            of_q, of_k = mask if isinstance(mask, tuple) else (mask, mask)
            for row in range(len(q)):
                rows = int((~of_q[row]).sum()) if cu_q is None else int(cu_q[row + 1] - cu_q[row])
                columns = int((~of_k[row]).sum()) if cu_k is None else int(cu_k[row + 1] - cu_k[row])
                fill(row, 0, rows, 0, columns)
        else:
            for row in range(len(q)):
                fill(row, 0, q.shape[1], 0, k.shape[1])
        return dense.masked_fill(mask, -math.inf) if kind == "arbitrary" else dense
