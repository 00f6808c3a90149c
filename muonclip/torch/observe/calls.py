"""The doors through which attention passes: who listens sees queries, keys, scale and mask of every call.

- `torch.nn.functional.scaled_dot_product_attention`, under any name that the model's sources gave it;
- FlexAttention, the same;
- the attention interface of Hugging Face models (`huggingface.py`);
- attention written out, product and softmax (`eager.py`).

A door is a function in the place of the host's, which calls it (`patches.py`). Hooks on the modules that call attention
say who listens: the `Observer` of the module that is running. Nothing else of the model changes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import flex_attention as flex_module
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_mask

from muonclip.torch.logits.exact_maxima import statistic_dtype
from muonclip.torch.logits.host_sdpa import host_sdpa, sdpa_with_lse
from muonclip.torch.logits.mask import AttentionMask
from muonclip.torch.logits.max_logits import MaxLogits
from muonclip.torch.logits.sharded_attention import local_queries_and_keys
from muonclip.torch.observe.eager import ScoreTracker, WrittenOut

host_flex = flex_module.flex_attention
_OBSERVER = "_qk_observer"  # the attribute of a module that holds its Observer


class Listener(Protocol):
    """Somebody who sees the attention calls; each method makes the call and returns what it returned."""

    def sdpa(self, call: Callable[..., Tensor], arguments: dict[str, Any]) -> Tensor: ...

    def flex(self, call: Callable[..., Any], arguments: dict[str, Any]) -> Any: ...

    def interface(self, call: Callable[[], Any], q: Tensor, k: Tensor, scale: float, mask: dict[str, Any]) -> Any: ...


class _OfThread(threading.local):
    """The listeners of the running thread: attention of another thread is another model's, or nobody's.

    The threads in which autograd recomputes a module run its hooks, which set the listener there.
    """

    def __init__(self) -> None:
        self.listeners: list[Listener | Silent | None] = []
        self.trackers: list[tuple[Observer, ScoreTracker]] = []


of_thread = _OfThread()


def listener() -> Listener | None:
    """Return the present listener; an `Observer` is none where gradients are off."""
    who = of_thread.listeners[-1] if of_thread.listeners else None
    return None if isinstance(who, Silent) else who


@contextmanager
def listening(who: Listener | None) -> Iterator[None]:
    """Let `who` handle the attention calls within; with None nobody does."""
    of_thread.listeners.append(who)
    try:
        yield
    finally:
        of_thread.listeners.pop()


class Silent:
    """In the place of an observer whose module was entered without gradients: it is not a forward of the training."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer


class Observer:
    """Fills the statistics of the attentions that one module calls, in the order of its calls.

    Where there is only one statistic, all calls fill it. `written_out`: the module writes its attention out.
    """

    def __init__(self, statistics: Sequence[MaxLogits], *, calls: int | None, written_out: bool) -> None:
        self.statistics, self.written_out = list(statistics), written_out
        self.expected, self.calls = calls, 0
        self.silent = Silent(self)

    def statistic(self) -> MaxLogits:
        """Return the statistic of the next call."""
        self.calls += 1
        if self.expected is not None and self.calls > self.expected:
            raise RuntimeError(self._unexpected())
        return self.statistics[min(self.calls, len(self.statistics)) - 1]

    def check_calls(self) -> None:
        """Raise RuntimeError at the end of a run that made too few calls to know which heads they were.

        A run without any call is not one of the module's attention.
        """
        if self.expected is not None and 0 < self.calls < self.expected:
            raise RuntimeError(self._unexpected())

    def _unexpected(self) -> str:
        return (
            f"QK-Clip: a module called attention {self.calls} times where it was seen to call it {self.expected}, "
            "or one inside it did that was not seen before. Which heads these are is not known: let each attention be "
            "a module of its own, or give example_inputs that reach all of them."
        )

    def see(self, q: Tensor, k: Tensor, scale: float | Tensor | None, lse: Tensor | None = None, **mask: Any) -> None:
        """Observe one call: q [..., Tq, d], k [..., Tk, d], the heads before these axes.

        The heads are this rank's or, as DTensors, all of them. `mask`: as `AttentionMask` takes it.
        """
        statistic = self.statistic()
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        if q.is_meta:
            return
        if q.is_nested:
            raise RuntimeError("QK-Clip cannot observe nested tensors. Use padded or packed sequences with a mask.")
        q, k = q.detach(), k.detach()
        if isinstance(q, DTensor):
            q, k = local_queries_and_keys(q, k)
        if isinstance(scale, Tensor):  # which is not read, because the host would wait for it
            own = scale.to_local() if isinstance(scale, DTensor) else scale
            dtype = statistic_dtype(q, k)
            q, k, scale = q.to(dtype) * own, k.to(dtype), 1.0
        mask = {name: each.to_local() if isinstance(each, DTensor) else each for name, each in mask.items()}
        q, k, dense = with_heads(q, k, mask.pop("attn_mask", None), statistic.heads_in(q))
        allowed = AttentionMask(q.shape[-2], k.shape[-2], attn_mask=dense, **mask)
        statistic.observe(q, k, scale=scale, mask=allowed, lse=lse)

    def sdpa(self, call: Callable[..., Tensor], arguments: dict[str, Any]) -> Tensor:
        q, k, scale = arguments["query"], arguments["key"], arguments["scale"]
        mask = dict(attn_mask=arguments["attn_mask"], is_causal=arguments["is_causal"])
        if call is not host_sdpa or isinstance(q, DTensor):
            self.see(q, k, scale, **mask)
            return call(**arguments)
        y, lse = sdpa_with_lse(**arguments)
        self.see(q, k, scale, lse, **mask)
        return y

    def flex(self, call: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        q, k, scale = arguments["query"], arguments["key"], arguments["scale"]
        plain = arguments["score_mod"] is None and not arguments["return_lse"] and arguments["return_aux"] is None
        if plain and q.device.type == "cuda":
            y, seen = call(**{**arguments, "return_aux": AuxRequest(max_scores=True)})
            self.statistic().update(seen.max_scores.detach().amax((0, 2)))
            return y
        self.see(q, k, scale, attn_mask=dense_of(arguments["block_mask"], q, k))
        return call(**arguments)

    def interface(self, call: Callable[[], Any], q: Tensor, k: Tensor, scale: float, mask: dict[str, Any]) -> Any:
        self.see(q, k, scale, **mask)
        with listening(None):
            return call()

    def written(self, found: WrittenOut) -> None:
        if listener() is self:
            self.see(found.q, found.k, found.scale, attn_mask=found.allowed)

    def __deepcopy__(self, memo: object) -> None:
        """Leave a copy of the model unobserved by the optimizer of the original."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ())


def with_heads(q: Tensor, k: Tensor, mask: Tensor | None, heads: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return q [B, heads, Tq, d], k [B, G, Tk, d] and a mask broadcastable to [B, heads, Tq, Tk].

    q and k may have any axes before the last two; they are broadcast as attention does it.
    """
    lengths = q.shape[-2], k.shape[-2]
    if q.ndim == k.ndim == 4 and q.shape[1] == heads:
        batch = max(len(q), len(k))
        q, k = q.expand(batch, -1, -1, -1), k.expand(batch, -1, -1, -1)
        if mask is not None and mask.ndim > 2:
            mask = mask.expand(batch, heads, *mask.shape[-2:])
        return q, k, mask
    leading = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])
    if mask is not None and mask.ndim > 2:
        apart = mask.ndim - 2 > len(leading)  # [B, heads, Tq, Tk] for queries [B · heads, Tq, d]
        in_front = (leading.numel() // heads, heads) if apart else leading
        mask = mask.expand(*in_front, *lengths).reshape(-1, heads, *lengths)
    q, k = (t.expand(*leading, *t.shape[-2:]).reshape(-1, heads, *t.shape[-2:]) for t in (q, k))
    return q, k, mask


def dense_of(block_mask: BlockMask | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Return the mask of FlexAttention as bool [B or 1, H or 1, Tq, Tk]."""
    if block_mask is None:
        return None
    batch, heads = block_mask.shape[:2]
    return create_mask(block_mask.mask_mod, batch, heads, q.shape[-2], k.shape[-2], device=q.device)


def sdpa_door(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    call: Callable[..., Tensor] = host_sdpa,
) -> Tensor:
    arguments: dict[str, Any] = dict(
        query=query,
        key=key,
        value=value,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )
    who = listener()
    return call(**arguments) if who is None else who.sdpa(call, arguments)


sdpa_door.__name__ = host_sdpa.__name__  # under which torch's context parallelism puts its own in the place of it


def flex_door(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Any = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Any = None,
    *,
    return_aux: Any = None,
    call: Callable[..., Any] = host_flex,
) -> Any:
    arguments = dict(
        query=query,
        key=key,
        value=value,
        score_mod=score_mod,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=enable_gqa,
        return_lse=return_lse,
        kernel_options=kernel_options,
        return_aux=return_aux,
    )
    who = listener()
    return call(**arguments) if who is None else who.flex(call, arguments)


class Unclaimed:
    """Listens to a whole model: what reaches it was called by no module that is known to call attention."""

    def __init__(self) -> None:
        self.calls = 0

    def sdpa(self, call: Callable[..., Tensor], arguments: dict[str, Any]) -> Tensor:
        self.calls += 1
        return call(**arguments)

    def flex(self, call: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        self.calls += 1
        return call(**arguments)

    def interface(self, call: Callable[[], Any], q: Tensor, k: Tensor, scale: float, mask: dict[str, Any]) -> Any:
        self.calls += 1
        with listening(None):
            return call()


def begin_listening(who: Listener) -> None:
    of_thread.listeners.append(who)


def end_listening(*whom: object) -> None:
    """Take these off, wherever they stand: an interrupted forward may have left them."""
    if not of_thread.listeners:
        return
    of_thread.listeners[:] = [
        each for each in of_thread.listeners if (each.observer if isinstance(each, Silent) else each) not in whom
    ]
    while of_thread.trackers and of_thread.trackers[-1][0] in whom:
        of_thread.trackers.pop()[1].__exit__(None, None, None)


class Hooks:
    """A pair of hooks on any number of modules, under one key in all of them.

    Compiled code guards on a hook's key, so that layers with keys of their own could not share their code.
    """

    def __init__(self, key: int, before: Callable[..., Any], after: Callable[..., Any], *, with_kwargs: bool) -> None:
        self.key, self.before, self.after, self.with_kwargs = key, before, after, with_kwargs
        self.modules: list[nn.Module] = []

    def put_on(self, module: nn.Module) -> None:
        """Put both hooks on a module; `after` is called even if the module raises."""
        self.modules.append(module)
        module._forward_pre_hooks[self.key] = self.before
        if self.with_kwargs:
            module._forward_pre_hooks_with_kwargs[self.key] = True
        module._forward_hooks[self.key] = self.after
        module._forward_hooks_always_called[self.key] = True

    def observers(self) -> list[Observer]:
        found = (module.__dict__.get(_OBSERVER) for module in self.modules)
        return [observer for observer in found if observer is not None]

    def take_off(self) -> None:
        end_listening(*self.observers())
        for module in self.modules:
            for hooks in (
                module._forward_pre_hooks,
                module._forward_pre_hooks_with_kwargs,
                module._forward_hooks,
                module._forward_hooks_always_called,
            ):
                hooks.pop(self.key, None)
            if self.before is enter:
                module.__dict__.pop(_OBSERVER, None)
        self.modules.clear()


def observers() -> Hooks:
    """Hooks by which the observer of a module listens while it runs; none on any module yet."""
    return Hooks(-2, enter, _leave, with_kwargs=False)


def attach(module: nn.Module, observer: Observer, hooks: Hooks) -> None:
    module.__dict__[_OBSERVER] = observer
    hooks.put_on(module)


def enter(module: nn.Module, args: Any) -> None:
    """Begin the observation of a module that begins to run."""
    observer = module.__dict__.get(_OBSERVER)
    if observer is None:  # a copy of an observed module
        return
    observer.calls = 0
    # What counts is how the module is entered: an autograd.Function has gradients off for what it runs.
    of_thread.listeners.append(observer if torch.is_grad_enabled() else observer.silent)
    if observer.written_out and not torch.compiler.is_compiling():  # which cannot follow it: nothing is observed then
        tracker = ScoreTracker(observer.written)
        tracker.__enter__()
        of_thread.trackers.append((observer, tracker))


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    observer = module.__dict__.get(_OBSERVER)
    listeners, trackers = of_thread.listeners, of_thread.trackers
    if observer is None or not listeners or listeners[-1] not in (observer, observer.silent):
        return
    listeners.pop()
    if trackers and trackers[-1][0] is observer and not torch.compiler.is_compiling():
        trackers.pop()[1].__exit__(None, None, None)
    if output is not None:  # as it is where the module has raised
        observer.check_calls()
