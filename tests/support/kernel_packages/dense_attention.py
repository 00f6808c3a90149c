"""What the stand-ins of kernels compute: dense attention, forwards and backwards, in float64 NumPy."""

import math

import numpy as np
import torch


def pairs_of(rows, columns, causal, window, bottom_right=True):
    """bool [rows, columns] of one sequence: causality and window, aligned at the last or the first positions."""
    i, j = np.arange(rows)[:, None] + (columns - rows if bottom_right else 0), np.arange(columns)[None, :]
    left, right = (math.inf if side is None or side < 0 else side for side in window)
    return (j <= i + (0 if causal else right)) & (j >= i - left)


class Dense:
    """One call. q [B, T, H, d], k and v of G heads; with `starts`, [total, heads, d] and the cumulative lengths."""

    def __init__(self, q, k, v, scale, causal, window, *, starts=None, softcap=0.0, alibi=None, sink=None):
        self.tensors, self.starts = (q, k, v), starts
        arrays = [np.asarray(t.detach().double()) for t in self.tensors]
        self.scale, self.softcap = scale, softcap
        self.sink = None if sink is None else np.asarray(sink.detach().double())
        self.parts = []
        for number, (q, k, v) in enumerate(self.sequences(arrays)):
            allowed = pairs_of(len(q), len(k), causal, window)
            bias = 0.0
            if alibi is not None:
                slopes = np.asarray(alibi.detach().double()).reshape(-1, q.shape[1])[number if alibi.ndim > 1 else 0]
                distance = np.arange(len(q))[:, None] + len(k) - len(q) - np.arange(len(k))
                bias = -slopes[:, None, None] * abs(distance)
            self.parts.append(self.attend(q, k, v, allowed, bias))

    def sequences(self, arrays):
        if self.starts is None:
            return list(zip(*arrays, strict=True))
        q, k, v = arrays
        of_q, of_k = (each.tolist() for each in self.starts)
        ends = zip(of_q, of_q[1:], of_k, of_k[1:], strict=False)
        return [(q[a:b], k[c:d], v[c:d]) for a, b, c, d in ends]

    def attend(self, q, k, v, allowed, bias):
        repeats = q.shape[1] // k.shape[1]
        keys, values = k.repeat(repeats, 1), v.repeat(repeats, 1)
        scores = self.scale * np.einsum("ihd,jhd->hij", q, keys)
        slope = 1.0
        if self.softcap:
            slope = 1 - np.tanh(scores / self.softcap) ** 2
            scores = self.softcap * np.tanh(scores / self.softcap)
        scores = np.where(allowed, scores + bias, -np.inf)
        sum_of = np.exp(scores).sum(-1)
        if self.sink is not None:
            sum_of = sum_of + np.exp(self.sink)[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            p = np.where(sum_of[..., None] > 0, np.exp(scores) / sum_of[..., None], 0.0)
            lse = np.where(sum_of > 0, np.log(sum_of), np.inf)
        return q, keys, values, p, slope, np.einsum("hij,jhd->ihd", p, values), lse

    def outputs(self):
        """out as q, and the log-sum-exp fp32 [B, H, T] or [H, total]."""
        out, lse = [part[5] for part in self.parts], [part[6] for part in self.parts]
        if self.starts is None:
            return self.like(0, np.stack(out)), torch.from_numpy(np.stack(lse)).float()
        q = self.tensors[0]
        padded = np.zeros((*q.shape[:2], self.tensors[2].shape[-1]))
        padded_lse = np.zeros((q.shape[1], q.shape[0]))
        begin = 0
        for each, of_rows in zip(out, lse, strict=True):
            padded[begin : begin + len(each)], padded_lse[:, begin : begin + len(each)] = each, of_rows
            begin += len(each)
        return self.like(0, padded), torch.from_numpy(padded_lse).float()

    def gradients(self, dout):
        """dq, dk, dv as q, k, v."""
        rows = self.sequences([np.asarray(dout.detach().double())] * 3) if self.starts is None else None
        results = [torch.zeros(t.shape, dtype=torch.float64) for t in self.tensors]
        dout = dout.detach().double()
        for number, (q, keys, values, p, slope, out, _) in enumerate(self.parts):
            if rows is None:
                of_q, of_k = (slice(*each[number : number + 2].tolist()) for each in self.starts)
                of_out = np.asarray(dout[of_q])
            else:
                of_q = of_k = number
                of_out = np.asarray(dout[number])
            dp = np.einsum("ihd,jhd->hij", of_out, values)
            ds = p * (dp - (of_out * out).sum(-1).T[..., None]) * slope * self.scale
            groups = self.tensors[1].shape[-2]
            for result, where, value in zip(
                results,
                (of_q, of_k, of_k),
                (
                    np.einsum("hij,jhd->ihd", ds, keys),
                    self.per_group(np.einsum("hij,ihd->jhd", ds, q), groups),
                    self.per_group(np.einsum("hij,ihd->jhd", p, of_out), groups),
                ),
                strict=True,
            ):
                result[where] = torch.from_numpy(value)
        return tuple(result.to(t.dtype) for result, t in zip(results, self.tensors, strict=True))

    @staticmethod
    def per_group(array, groups):
        return array.reshape(len(array), groups, -1, array.shape[-1]).sum(2)

    def like(self, index, array):
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.tensors[index].dtype)


# Operators below autograd, as the packages have them: nothing in Python sees what they compute; compilers take them.


@torch.library.custom_op("stand_in::attend", mutates_args=())
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    left: int | None,
    right: int | None,
    starts_q: torch.Tensor | None,
    starts_k: torch.Tensor | None,
    softcap: float,
    alibi: torch.Tensor | None,
    sink: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    starts = None if starts_q is None else (starts_q, starts_k)
    return Dense(
        q, k, v, scale, causal, (left, right), starts=starts, softcap=softcap, alibi=alibi, sink=sink
    ).outputs()


@attend.register_fake
def _(q, k, v, *options):
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    return out, q.new_empty(*q.shape[:-3], q.shape[-2], q.shape[-3], dtype=torch.float32)


@torch.library.custom_op("stand_in::attend_backward", mutates_args=())
def attend_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    left: int | None,
    right: int | None,
    starts_q: torch.Tensor | None,
    starts_k: torch.Tensor | None,
    softcap: float,
    alibi: torch.Tensor | None,
    sink: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    starts = None if starts_q is None else (starts_q, starts_k)
    dense = Dense(q, k, v, scale, causal, (left, right), starts=starts, softcap=softcap, alibi=alibi, sink=sink)
    return dense.gradients(dout)


@attend_backward.register_fake
def _(dout, q, k, v, *options):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def forward(ctx, q, k, v, scale, causal, window, *, starts=None, softcap=0.0, alibi=None, sink=None):
    """What the autograd functions of the stand-ins do: out and log-sum-exp."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    starts_q, starts_k = (None, None) if starts is None else starts
    ctx.save_for_backward(q, k, v, starts_q, starts_k, alibi, sink)
    ctx.options = scale, causal, window[0], window[1], softcap
    return torch.ops.stand_in.attend(q, k, v, *ctx.options[:4], starts_q, starts_k, softcap, alibi, sink)


def backward(ctx, dout):
    """dq, dk, dv."""
    q, k, v, starts_q, starts_k, alibi, sink = ctx.saved_tensors
    options = (*ctx.options[:4], starts_q, starts_k, ctx.options[4], alibi, sink)
    return torch.ops.stand_in.attend_backward(dout, q, k, v, *options)


def _masked(q, k, v, scale, bias):
    """q, k, v [B, T, heads, d] of equal heads; `bias` broadcastable to [B, heads, Tq, Tk]."""
    q, k, v = (np.asarray(t.detach().double()) for t in (q, k, v))
    scores = scale * np.einsum("bihd,bjhd->bhij", q, k)
    scores = scores + (0.0 if bias is None else np.asarray(bias.detach().double()))
    with np.errstate(divide="ignore", invalid="ignore"):
        sum_of = np.exp(scores).sum(-1, keepdims=True)
        p = np.where(sum_of > 0, np.exp(scores) / sum_of, 0.0)
        return q, k, v, p, np.where(sum_of > 0, np.log(sum_of), np.inf)[..., 0]


def masked_attention(q, k, v, scale, bias):
    """out and log-sum-exp fp32 [B, heads, T]."""
    _, _, values, p, lse = _masked(q, k, v, scale, bias)
    out = torch.from_numpy(np.einsum("bhij,bjhd->bihd", p, values)).to(q.dtype)
    return out, torch.from_numpy(lse).float()


def masked_gradients(dout, q, k, v, scale, bias):
    """dq, dk, dv."""
    queries, keys, values, p, _ = _masked(q, k, v, scale, bias)
    dout = np.asarray(dout.detach().double())
    dp = np.einsum("bihd,bjhd->bhij", dout, values)
    ds = scale * p * (dp - (p * dp).sum(-1, keepdims=True))
    found = (
        np.einsum("bhij,bjhd->bihd", ds, keys),
        np.einsum("bhij,bihd->bjhd", ds, queries),
        np.einsum("bhij,bihd->bjhd", p, dout),
    )
    return tuple(torch.from_numpy(each).to(q.dtype) for each in found)
