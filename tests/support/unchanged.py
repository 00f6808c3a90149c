"""What an error may not change: parameters, gradients, buffers, states, groups, statistics and hooks, to the bit."""

import copy
import math
from collections.abc import Mapping

import pytest
import torch
from torch import nn

from muonclip.torch import MaxLogits, QKClip


def snapshot(held):
    """Return a copy of all that one model, optimizer, clip, statistic or tensor is, or of each in a list or tuple."""
    if isinstance(held, list | tuple):
        return [snapshot(each) for each in held]
    return copy.deepcopy(_all_of(held))


def differences(before, after, path=""):
    """Yield where two snapshots differ, to the bit: NaN is itself, and −0 is not 0."""
    if type(before) is not type(after):
        yield f"{path}: a {type(before).__name__} became a {type(after).__name__}"
    elif isinstance(before, torch.Tensor):
        if _bits(before) != _bits(after):
            yield f"{path}: {before.dtype} {tuple(before.shape)}"
    elif isinstance(before, Mapping):
        if list(before) != list(after):
            yield f"{path}: keys {[*before]} became {[*after]}"
        for key in before:
            if key in after:
                yield from differences(before[key], after[key], f"{path}.{key}")
    elif isinstance(before, list | tuple):
        if len(before) != len(after):
            yield f"{path}: {len(before)} became {len(after)}"
        for index, pair in enumerate(zip(before, after, strict=False)):
            yield from differences(*pair, f"{path}[{index}]")
    elif before != after and not (isinstance(before, float) and math.isnan(before) and math.isnan(after)):
        yield f"{path}: {before!r} became {after!r}"


class Unchanged:
    """Asserts that what is done inside changes nothing of some models, optimizers, clips, statistics and tensors."""

    def __init__(self, *held):
        self.held = held

    def __enter__(self):
        self.before = snapshot(self.held)
        return self

    def __exit__(self, *error):
        changed = list(differences(self.before, snapshot(self.held)))
        assert not changed, changed


class UnchangedByError(Unchanged):
    """Asserts in addition that it raises an error that says this."""

    def __init__(self, *held, match, error=ValueError):
        super().__init__(*held)
        self.raises = pytest.raises(error, match=match)

    def __enter__(self):
        super().__enter__()
        return self.raises.__enter__()

    def __exit__(self, *error):
        raised = self.raises.__exit__(*error)
        super().__exit__()
        return raised


def _bits(tensor):
    if tensor.is_meta or tensor.layout is not torch.strided:
        return tensor.dtype, tuple(tensor.shape), tensor.layout, str(tensor.device)
    whole = tensor.detach().cpu().contiguous().reshape(-1)
    return tensor.dtype, tuple(tensor.shape), tensor.requires_grad, whole.view(torch.uint8).numpy().tobytes()


def _all_of(held):
    if isinstance(held, nn.Module):
        parameters = {name: (parameter, parameter.grad) for name, parameter in held.named_parameters()}
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in held.modules()]
        statistics = [_all_of(s) for m in held.modules() for s in vars(m).values() if isinstance(s, MaxLogits)]
        return parameters, dict(held.named_buffers()), hooks, [m.training for m in held.modules()], statistics
    if isinstance(held, torch.optim.Optimizer):
        named = {id(p): f"{i}, {j}" for i, g in enumerate(held.param_groups) for j, p in enumerate(g["params"])}
        groups = [{**group, "params": [id(p) for p in group["params"]]} for group in held.param_groups]
        parameters = [(p, p.grad) for group in held.param_groups for p in group["params"]]
        states = {named.get(id(p), "unknown"): dict(own) for p, own in held.state.items()}
        hooks = len(held._optimizer_step_pre_hooks), len(held._optimizer_load_state_dict_pre_hooks)
        clip = getattr(held, "qk_clip", None)
        plan = str(held.plan.parameters) if hasattr(held, "plan") else ""
        return groups, parameters, states, hooks, plan, None if clip is None else _all_of(clip)
    if isinstance(held, QKClip):
        parts = [rows.parameters() for each in held.projections.values() for _, rows in each.parts()]
        weights = [parameter for part in parts for parameter, _ in part]
        statistics = {name: _all_of(each.max_logits) for name, each in held.projections.items()}
        return held.tau, held.alpha, held.observe, held.clip_frozen, statistics, weights
    if isinstance(held, MaxLogits):
        return held.packed, held.threshold, held.resets, held.num_heads
    assert isinstance(held, torch.Tensor), held
    return held, held.grad
