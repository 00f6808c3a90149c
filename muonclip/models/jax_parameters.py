"""The parameters of the reference model in JAX: names, shapes, first values; matrices and heads; from and to PyTorch.

Parameters are a flat dict, name → array, with the names and shapes that PyTorch has; see `models/jax.py`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from muonclip.core import MatrixLayout
from muonclip.core.head_parts import PerHead, heads_per_matrix
from muonclip.models.config import MoEConfig
from muonclip.optax import QKProjection

if TYPE_CHECKING:
    from torch import Tensor, nn

Params: TypeAlias = dict[str, Array]
"""The parameters, by name."""

Buffers: TypeAlias = dict[str, Array]
"""The correction biases of the routers, by name."""

Shape: TypeAlias = tuple[int, ...]

_BIAS = "correction_bias"


def parameter_shapes(config: MoEConfig) -> dict[str, Shape]:
    """Return the shape of every parameter, by name.

    Args:
        config: The sizes of the model.
    """
    hidden, width = config.hidden_size, config.moe_intermediate_size
    vocabulary = (config.vocab_size, hidden)
    shapes: dict[str, Shape] = {"embed_tokens.weight": vocabulary}
    for i in range(config.num_layers):
        attn, mlp = f"layers.{i}.attn", f"layers.{i}.mlp"
        shapes |= {f"{attn}_norm.weight": (hidden,), f"{mlp}_norm.weight": (hidden,)}
        shapes |= {f"{attn}.{part}.weight": shape for part, shape in _attention_shapes(config).items()}
        if i < config.num_dense_layers:
            shapes |= _swiglu_shapes(mlp, hidden, config.intermediate_size)
            continue
        shapes[f"{mlp}.router.weight"] = (config.num_experts, hidden)
        shapes[f"{mlp}.experts.gate_up_proj"] = (config.num_experts, 2 * width, hidden)
        shapes[f"{mlp}.experts.down_proj"] = (config.num_experts, hidden, width)
        if config.num_shared_experts:
            shapes |= _swiglu_shapes(f"{mlp}.shared_experts", hidden, config.num_shared_experts * width)
    return shapes | {"norm.weight": (hidden,), "lm_head.weight": vocabulary}


def init(config: MoEConfig, key: Array, dtype: Any = jnp.float32) -> Params:
    """Draw the first parameters: gains 1; matrices normal(0, init_std).

    Matrices that write to the residual stream have a standard deviation smaller by √(2·num_layers) (GPT-2). The values
    of a parameter depend on the key and on its name, not on which others there are.

    Args:
        config: The sizes of the model.
        key: A key of `jax.random`.
        dtype: The dtype of the parameters.
    """

    def values(name: str, shape: Shape) -> Array:
        if len(shape) == 1:
            return jnp.ones(shape, dtype)
        writes_residual = "o_proj" in name or "down_proj" in name
        std = config.init_std / math.sqrt(2 * config.num_layers if writes_residual else 1)
        own_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return (std * jax.random.normal(own_key, shape, jnp.promote_types(dtype, jnp.float32))).astype(dtype)

    return {name: values(name, shape) for name, shape in parameter_shapes(config).items()}


def init_buffers(config: MoEConfig) -> Buffers:
    """Return the correction bias of each router, float32 [E], zero.

    Args:
        config: The sizes of the model.
    """
    routed = range(config.num_dense_layers, config.num_layers)
    return {f"layers.{i}.mlp.router.{_BIAS}": jnp.zeros(config.num_experts, jnp.float32) for i in routed}


def matrix_layouts(config: MoEConfig, *, per_head: PerHead = False) -> dict[str, MatrixLayout | None]:
    """Return how Muon reads each parameter, by name; None for AdamW's (embedding, output head, norms).

    Args:
        config: The sizes of the model.
        per_head: The heads of queries, keys and values are matrices of their own, or every so many, as `MuonClip` takes
            it.

    Raises:
        ValueError: For a number of heads that does not divide those of a projection.
    """
    heads, together = config.num_heads, heads_per_matrix(per_head)
    counts = {"q_proj": heads, "q_b_proj": heads, "k_proj": num_kv_heads(config), "v_proj": num_kv_heads(config)}

    def divided(count: int) -> int:
        if count % together:
            raise ValueError(
                f"per_head={per_head!r}, and a projection has {count} heads; give a number that divides them."
            )
        return count // together

    def layout(name: str, shape: Shape) -> MatrixLayout | None:
        leaf = name.removesuffix(".weight").rpartition(".")[2]
        if len(shape) == 1 or leaf in ("embed_tokens", "lm_head"):
            return None
        if leaf == "gate_up_proj":
            return MatrixLayout(batch_ndim=len(shape) - 2, blocks=(shape[-2] // 2,) * 2)
        if together and leaf in counts:
            return MatrixLayout(blocks=shape[:1], heads=(divided(counts[leaf]),))
        if together and leaf == "kv_b_proj":
            parts = (config.qk_nope_head_dim, config.v_head_dim)
            return MatrixLayout(blocks=parts, heads=(divided(heads),) * 2, repeats=heads)
        return MatrixLayout(batch_ndim=len(shape) - 2)

    return {name: layout(name, shape) for name, shape in parameter_shapes(config).items()}


def qk_projections(config: MoEConfig) -> dict[str, QKProjection]:
    """Return what QK-Clip may scale of each attention; the keys are those of `Aux.max_logits`.

    Args:
        config: The sizes of the model.
    """

    def projection(attn: str) -> QKProjection:
        if config.qk_norm:
            reason = "QK-norm: scaling the projection would change nothing"
            return QKProjection(config.num_heads, reason=reason)
        if config.attention == "mla":
            return QKProjection.mla(
                q=f"{attn}.{'q_proj' if config.q_lora_rank is None else 'q_b_proj'}.weight",
                kv=f"{attn}.kv_b_proj.weight",
                num_heads=config.num_heads,
                qk_nope_head_dim=config.qk_nope_head_dim,
                qk_rope_head_dim=config.qk_rope_head_dim,
                v_head_dim=config.v_head_dim,
                in_axis=-1,
            )
        return QKProjection.gqa(
            q=f"{attn}.q_proj.weight",
            k=f"{attn}.k_proj.weight",
            num_heads=config.num_heads,
            num_kv_heads=num_kv_heads(config),
            in_axis=-1,
        )

    return {f"layers.{i}.attn": projection(f"layers.{i}.attn") for i in range(config.num_layers)}


def from_torch(model: nn.Module | Mapping[str, Tensor]) -> tuple[Params, Buffers]:
    """Copy parameters and buffers in their dtypes.

    Args:
        model: A `models.torch.MoE`, or its state dict.
    """
    state = model if isinstance(model, Mapping) else model.state_dict()
    arrays = {name: _from_torch(tensor) for name, tensor in state.items()}
    params = {name: array for name, array in arrays.items() if not name.endswith(_BIAS)}
    return params, {name: array for name, array in arrays.items() if name.endswith(_BIAS)}


def to_torch(params: Mapping[str, Array], buffers: Mapping[str, Array]) -> dict[str, Tensor]:
    """Copy parameters and buffers to a state dict: `MoE(config).load_state_dict(to_torch(params, buffers))`.

    Args:
        params: The parameters, by name.
        buffers: The correction biases of the routers, by name.
    """
    return {name: _to_torch(array) for name, array in {**params, **buffers}.items()}


def num_kv_heads(config: MoEConfig) -> int:
    """Return the number of key heads: G of grouped-query attention, H of multi-head attention."""
    return config.num_heads if config.attention == "mha" else config.num_kv_heads


def _attention_shapes(config: MoEConfig) -> dict[str, Shape]:
    c, hidden, q_width = config, config.hidden_size, config.num_heads * config.qk_head_dim
    norms = {"q_norm": (c.qk_head_dim,), "k_norm": (c.qk_head_dim,)} if c.qk_norm else {}
    if c.attention != "mla":
        kv_width = num_kv_heads(c) * c.head_dim
        q = {"q_proj": (q_width, hidden)}
        return norms | q | {"k_proj": (kv_width, hidden), "v_proj": (kv_width, hidden), "o_proj": (hidden, q_width)}
    if c.q_lora_rank is None:
        q = {"q_proj": (q_width, hidden)}
    else:
        rank = c.q_lora_rank
        q = {"q_a_proj": (rank, hidden), "q_a_norm": (rank,), "q_b_proj": (q_width, rank)}
    return {
        **norms,
        **q,
        "kv_a_proj": (c.kv_lora_rank, hidden),
        "kv_a_norm": (c.kv_lora_rank,),
        "kv_b_proj": (c.num_heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank),
        "k_rope_proj": (c.qk_rope_head_dim, hidden),
        "o_proj": (hidden, c.num_heads * c.v_head_dim),
    }


def _swiglu_shapes(name: str, hidden: int, width: int) -> dict[str, Shape]:
    return {f"{name}.gate_up_proj.weight": (2 * width, hidden), f"{name}.down_proj.weight": (hidden, width)}


def _from_torch(tensor: Tensor) -> Array:
    import torch

    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:  # which NumPy has not by itself: its bits
        return jnp.array(tensor.contiguous().view(torch.int16).numpy().view(jnp.bfloat16))
    return jnp.array(tensor.numpy())


def _to_torch(array: Array) -> Tensor:
    import torch

    copy = np.array(array)
    if copy.dtype == jnp.bfloat16:
        return torch.from_numpy(copy.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(copy)
