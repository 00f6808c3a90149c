"""Activations that are computed again in the backward pass, so that they need not be kept until then.

for layer in model.layers:
    recompute(layer, store_activations="float8", offload_activations=True)  # before the model is distributed
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from muonclip.models.stored_activations import KeptActivations
from muonclip.models.torch import Attention, Experts, Layer, MixtureOfExperts, SwiGLU

StoreActivations = Literal["float8"]

aten = torch.ops.aten
_PRODUCTS = {
    aten.mm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}


def recompute(
    layer: Layer, *, store_activations: StoreActivations | None = None, offload_activations: bool = False
) -> None:
    """Compute activations of a layer again in the backward pass instead of keeping them.

    Of the attention, what the projections and the softmax made is kept, and norms and rotations are computed again; of
    the MLP only its input is kept. The options are those of Kimi K2 (arXiv 2507.20534, §2.4.3), for more memory and
    less work.

    Args:
        layer: Changed in place.
        store_activations: "float8": of the MLP the inputs of up-projections and of SwiGLU are kept in FP8-E4M3, blocks
            of 128 with a scale each, next to what norm and router need. SwiGLU and the down-projection are computed
            again; up-projections are not, nor are tokens routed and sent to their experts a second time. Gradients are
            those of rounded activations; losses are what they are without.
        offload_activations: What is kept is in host memory until the backward pass. The attention is not computed
            again then. Changes no number.

    Raises:
        ValueError: For another way to store activations.
    """
    check_storage(store_activations)
    float8, offload = store_activations == "float8", offload_activations
    kept = KeptActivations(float8=float8, offload=offload)
    if float8:
        for module in _mlps(layer):
            module.keep = kept.only_input

    # On the instance: within the hooks that gather the layer's parameters, and without the new names of a wrapper. As
    # methods: those of a copy of the layer are the copy's. Two regions, because what is kept is found by counting
    # operations, and FSDP does not do the same twice where it gathers experts. Nothing is random in either.
    def attend(layer: Layer, x: Tensor, rotary: tuple[Tensor, Tensor], document_ids: Tensor | None) -> Tensor:
        own = partial(Layer.attend, layer)
        if offload:
            return kept.moved(own, layer.parameters, x, rotary, document_ids)
        return _checkpoint(own, x, rotary, document_ids, context_fn=partial(_contexts, layer.attn))

    def transform(layer: Layer, x: Tensor) -> Tensor:
        own = partial(Layer.transform, layer)
        return kept.moved(own, layer.parameters, x) if float8 else kept.only_input(own, x)

    layer.attend, layer.transform = MethodType(attend, layer), MethodType(transform, layer)


def check_storage(store_activations: StoreActivations | None) -> None:
    """Raise ValueError for a way to store activations that there is not."""
    if store_activations not in (None, *get_args(StoreActivations)):
        known = ", ".join(map(repr, get_args(StoreActivations)))
        raise ValueError(f"store_activations={store_activations!r} is unknown; give {known}, or None for none.")


def _mlps(layer: Layer) -> Iterator[Experts | SwiGLU]:
    mlp = layer.mlp
    if isinstance(mlp, MixtureOfExperts):
        yield mlp.experts
        mlp = mlp.shared_experts
    if mlp is not None:
        assert isinstance(mlp, SwiGLU)
        yield mlp


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
