"""`memory_efficient_attention` of xFormers 0.0.33 and the autograd function that it ends at, with their signatures."""

from dataclasses import dataclass
from typing import Any

import torch
from dense_attention import masked_attention, masked_gradients

from .attn_bias import AttentionBias, LowerTriangularMask

__all__ = ["AttentionBias", "LowerTriangularMask", "memory_efficient_attention"]


@dataclass
class Inputs:
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_bias: Any = None
    p: float = 0.0
    scale: float | None = None

    def normalize_bmhk(self):
        output_shape = (*self.query.shape[:-1], self.value.shape[-1])
        if self.query.ndim == 3:
            self.query, self.key, self.value = (t.unsqueeze(2) for t in (self.query, self.key, self.value))
            if isinstance(self.attn_bias, torch.Tensor):
                self.attn_bias = self.attn_bias.unsqueeze(1)
        return output_shape


def dense_bias(bias, shape):
    if bias is None or isinstance(bias, torch.Tensor):
        return bias
    return bias.materialize(shape)


class _fMHA(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op_fw, op_bw, *args: Any) -> Any:
        inp = Inputs(*args)
        scale = inp.query.shape[-1] ** -0.5 if inp.scale is None else inp.scale
        q, k, v = (t.flatten(2, -2) for t in (inp.query, inp.key, inp.value))
        bias = dense_bias(inp.attn_bias, (q.shape[1], k.shape[1]))
        bias = bias.flatten(1, 2) if bias is not None and bias.ndim == 5 else bias
        ctx.case, ctx.inp, ctx.n_args = (q, k, v, scale, bias), inp, len(args)
        out, lse = masked_attention(*ctx.case)
        return out.view(*inp.query.shape[:-1], -1), lse

    @staticmethod
    def backward(ctx, grad, grad_lse):
        gradients = masked_gradients(grad.flatten(2, -2), *ctx.case)
        tensors = ctx.inp.query, ctx.inp.key, ctx.inp.value
        of_inputs = [g.view(t.shape) for g, t in zip(gradients, tensors, strict=True)]
        return None, None, *of_inputs, *(None,) * (ctx.n_args - 3)


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    inp = Inputs(query=query, key=key, value=value, p=p, attn_bias=attn_bias, scale=scale)
    return _memory_efficient_attention(inp, op=op)


def _memory_efficient_attention(inp, op=None):
    output_shape = inp.normalize_bmhk()
    if all(x.requires_grad is False for x in (inp.query, inp.key, inp.value)):
        return _fMHA.forward(_NoContext(), None, None, *vars(inp).values())[0].reshape(output_shape)
    op_fw, op_bw = (None, None) if op is None else op
    return _fMHA.apply(op_fw, op_bw, inp.query, inp.key, inp.value, inp.attn_bias, inp.p, inp.scale)[0].reshape(
        output_shape
    )


class _NoContext:
    pass
