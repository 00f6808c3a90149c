"""A Llama of one layer from transformers, which looks its attention up in Hugging Face's interface at every forward."""

from __future__ import annotations

from typing import Any


def llama(implementation: str, heads: int, width: int, hidden: int, length: int) -> tuple[Any, Any]:
    """Make the model and tokens [2, length]. `width`: of a head; `hidden`: of the model. Raises ImportError where
    transformers is not installed."""
    import torch
    from torch import nn
    from transformers import LlamaConfig, LlamaModel  # pyright: ignore

    class Llama(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes: dict[str, Any] = dict(
                hidden_size=hidden, intermediate_size=hidden, num_hidden_layers=1, num_attention_heads=heads,
                num_key_value_heads=heads, head_dim=width, vocab_size=64, max_position_embeddings=length,
                initializer_range=0.15, use_cache=False, attn_implementation=implementation,
            )  # fmt: skip
            self.model: Any = LlamaModel(LlamaConfig(**sizes))
            self.attention: Any = self.model.layers[0].self_attn

        @property
        def q(self) -> Any:
            return self.attention.q_proj

        @property
        def k(self) -> Any:
            return self.attention.k_proj

        def forward(self, tokens: Any) -> Any:
            return self.model(input_ids=tokens).last_hidden_state

        def heads(self, tokens: Any) -> tuple[Any, ...]:
            """Return the rotated queries and keys, and the values, [B, T, heads, width]."""
            given: dict[str, Any] = {}
            hook = self.attention.register_forward_pre_hook(
                lambda module, args, kwargs: given.update(kwargs), with_kwargs=True
            )
            self(tokens)
            hook.remove()
            x, turns = given["hidden_states"], [each.unsqueeze(2) for each in given["position_embeddings"]]
            of = (self.attention.q_proj, self.attention.k_proj, self.attention.v_proj)
            q, k, v = (each(x).unflatten(-1, (heads, width)) for each in of)
            return _rotated(q, *turns), _rotated(k, *turns), v

    def _rotated(x: Any, cos: Any, sin: Any) -> Any:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    return Llama(), torch.randint(64, (2, length))
