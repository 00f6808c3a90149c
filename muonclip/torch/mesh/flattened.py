"""Engines that divide a model as flat tensors, with no regard to its matrices: FSDP1, and DeepSpeed's ZeRO.

A rank has an arbitrary slice there, which may begin and end within a row, and an optimizer's groups hold slices or flat
tensors of many parameters. They are recognised by what these engines leave on parameters, modules and groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from muonclip.torch.mesh.late_types import imported, is_fsdp1_module

_FSDP1 = (
    "FullyShardedDataParallel (FSDP1), which flattens matrices, with use_orig_params=True too: a rank has an arbitrary "
    "slice of each. Write torch.distributed.fsdp.fully_shard(model) (FSDP2) in the place of the wrapper, after "
    "fully_shard(block) for each block that auto_wrap_policy wrapped, before the optimizer is made. In accelerate and "
    "the Trainer that is fsdp_version=2."
)
_ZERO = (
    "DeepSpeed's ZeRO ({stages}), which flattens matrices. What works is 'zero_optimization': {{'stage': 0}}, or, to "
    "shard, torch.distributed.fsdp.fully_shard(model) (FSDP2) without DeepSpeed."
)


def flattened_by(parameter: Tensor) -> str:
    """Return what has flattened a parameter, and what to do; "" where nothing has."""
    if getattr(parameter, "_is_flat_param", False) or getattr(parameter, "_fsdp_flattened", False):
        return _FSDP1
    if hasattr(parameter, "ds_id"):
        return _ZERO.format(stages="stage 3")
    if getattr(parameter, "_hp_mapping", None) is not None:
        return _ZERO.format(stages="stage 1 or 2")
    return ""


def check_not_flattened(name: str, parameter: Tensor) -> None:
    """Raise ValueError for a parameter that an engine has flattened."""
    engine = flattened_by(parameter)
    if engine:
        raise ValueError(f"{name} is sharded by {engine}")


def check_engine(model: Any) -> None:
    """Raise ValueError for a model that an engine has flattened, all of it or a part."""
    if not isinstance(model, nn.Module):
        return
    if any(is_fsdp1_module(module) for module in model.modules()):
        raise ValueError(f"the model is sharded by {_FSDP1}")
    for name, parameter in model.named_parameters():
        check_not_flattened(name, parameter)


def check_groups_not_flattened(groups: Sequence[Any], counts: Sequence[int]) -> None:
    """Raise ValueError where DeepSpeed has put flat tensors in the place of a group's parameters. `counts`: how many
    each group had. DeepSpeed shows an optimizer one group at a time, so that there may be fewer groups."""
    if imported("deepspeed", "DeepSpeedEngine") is None:
        return
    held = [each.get("params") if isinstance(each, dict) else None for each in groups]
    known = [each for each in held if isinstance(each, list) and all(isinstance(one, Tensor) for one in each)]
    if [len(each) for each in known] == list(counts):
        return
    if len(known) == len(held) and all(len(each) <= 1 and all(one.ndim == 1 for one in each) for each in known):
        raise ValueError(f"the parameters in param_groups are replaced by {_ZERO.format(stages='stage 1, 2 or 3')}")
