"""Activations that are computed again in the backward pass, so that they need not be kept until then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from muonclip.models.torch import Attention, Layer

aten = torch.ops.aten
_PRODUCTS = {
    aten.mm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}


def recompute(layer: Layer) -> None:
    """Compute activations of a layer again in the backward pass instead of keeping them.

    Of the attention, what the projections and the softmax made is kept, and norms and rotations are computed again; of
    the MLP only its input is kept.
    """
    attend, transform = layer.attend, layer.transform

    # On the instance: within the hooks that gather the layer's parameters, and without the new names of a wrapper.
    # Two regions, because what is kept is found by counting operations, and FSDP does not do the same twice where it
    # gathers experts. Nothing is random in either.
    def attend_again(x: Tensor, rotary: tuple[Tensor, Tensor], document_ids: Tensor | None) -> Tensor:
        contexts = partial(_contexts, layer.attn)
        return _checkpoint(attend, x, rotary, document_ids, context_fn=contexts)

    def transform_again(x: Tensor) -> Tensor:
        return _checkpoint(transform, x)

    layer.attend, layer.transform = attend_again, transform_again


_checkpoint = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def _keep(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = op in _PRODUCTS and torch.is_grad_enabled()  # not the logits of an observation
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _contexts(attention: Attention) -> tuple[Any, Any]:
    forward, again = create_selective_checkpoint_contexts(_keep)
    return forward, _unobserved(attention, again)


@contextmanager
def _unobserved(attention: Attention, context: Any) -> Iterator[None]:
    """Recompute without observing the logits a second time.

    How many operations observing takes depends on what is known by then, and checkpointing counts operations.
    """
    max_logits = attention.max_logits
    attention.max_logits = None  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with context:
            yield
    finally:
        attention.max_logits = max_logits
