"""Second copies of the weights that optimizers keep and write back: scaled with the weights, or the clip is undone.

Schedule-free optimizers average their weights with `z` (arXiv 2405.15682), Lookahead pulls them to slow weights
(arXiv 1907.08610), dual averaging makes them anew from where they began and a sum of gradients, others keep a wider
master. A master in two parts, a bf16 parameter and its errors, is scaled as a whole. An average that is only evaluated
is not such a copy, nor are the weights from before a perturbation. Moments of gradients are not weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from muonclip.torch.clip.optimizer_steps import OPTIMIZER_STEPS
from muonclip.torch.mesh import local_part
from muonclip.torch.update import errors_of

_KNOWN = frozenset(
    (
        *("slow_param", "slow_params"),  # Lookahead's slow weights in torch_optimizer, in pytorch_optimizer,
        *("slow_buffer", "lookahead_params"),  # in Ranger, Ranger21,
        *("lookahead_slow_buff", "cached_params", "slow_weights"),  # timm, the code of the paper
        *("fp32_param", "fp32_params", "param_fp32", "params_fp32", "fp32_weight", "main_param"),  # masters
    )
)
"""Names in an optimizer's state, in addition to all with the word "master"."""

_SCHEDULE_FREE = frozenset("xyz")
"""Names of the weights of schedule-free optimizers, whose groups have a `weight_sum`. (FTRL's z is not a weight.)"""

_DUAL_AVERAGING = frozenset(("x0", "s", "sk"))
"""Names of what x = x0 − s / … is computed from, where there is an x0: MADGRAD, D-Adaptation. Both scale x."""

_NOT_WRITTEN = frozenset(
    (
        *("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "grad_avg"),
        *("acc_delta", "sum", "prev", "step_size", "eta", "mu"),
        "prev_param",  # AdaSmooth reads it only
    )
)
"""Names that torch's own optimizers and others give to what is not written back."""


class SecondCopies:
    """The second copies of parameters: their masters, and those that some optimizers keep under a name that tells."""

    def __init__(self, optimizers: Iterable[Any], master_of: Callable[[Tensor], Tensor | None] | None) -> None:
        self._master_of = master_of
        self._kept = [(_state(each), _names(each), _masters(each)) for each in optimizers]

    def of(self, parameter: Tensor) -> list[Tensor]:
        """Return the copies of a parameter, each once."""
        given = None if self._master_of is None else self._master_of(parameter)
        kept: list[Any] = [getattr(parameter, "main_param", None)]  # Megatron's
        kept += OPTIMIZER_STEPS.in_place_of(parameter)  # DeepSpeed's, where it was given this optimizer
        for state, names, masters in self._kept:
            own = state.get(id(parameter), {})
            dual = _DUAL_AVERAGING if "x0" in own else frozenset[str]()
            kept += [value for name, value in own.items() if name in names or name in dual or "master" in str(name)]
            kept.append(masters.get(id(parameter)))
        copies = [] if given is None else [given]
        return _others([*copies, *(each for each in kept if _is_like(each, parameter))], parameter)

    def errors_of(self, parameter: Tensor) -> tuple[Tensor, ...]:
        """Return the errors with which a bf16 parameter is a master, see `split_weights`; none where it is none."""
        for state, *_ in self._kept:
            errors = errors_of(state.get(id(parameter), {}))
            if errors and all(isinstance(each, Tensor) and each.shape == parameter.shape for each in errors):
                return errors
        return ()


def unnamed_copies(parameter: Tensor, optimizers: Iterable[Any]) -> list[Tensor]:
    """Return the tensors that these optimizers keep for a parameter without a name that tells whether it is a copy."""
    found: list[Any] = []
    for optimizer in optimizers:
        own = _state(optimizer).get(id(parameter), {})
        found += [value for name, value in own.items() if name not in _NOT_WRITTEN]
        parameters = [each for group in getattr(optimizer, "param_groups", ()) for each in group["params"]]
        position = next((index for index, each in enumerate(parameters) if each is parameter), None)
        for held in getattr(optimizer, "__dict__", {}).values():
            if isinstance(held, Mapping):
                of = cast("Mapping[Any, Any]", held).items()
                found += [value for key, value in of if key is parameter or (type(key) is int and key == id(parameter))]
            elif isinstance(held, list | tuple) and position is not None and len(held) == len(parameters):
                found.append(held[position])
    return _others([each for each in found if _is_like(each, parameter)], parameter)


def _state(optimizer: Any) -> dict[int, Mapping[Any, Any]]:
    """Return the state of each parameter, by its `id`: keys that are numbers cannot be compared with a tensor."""
    state = getattr(optimizer, "state", None)
    items = cast("Mapping[Any, Any]", state).items() if isinstance(state, Mapping) else ()
    return {id(key): own for key, own in items if isinstance(key, Tensor) and isinstance(own, Mapping)}


def _names(optimizer: Any) -> frozenset[str]:
    averages = any("weight_sum" in group for group in getattr(optimizer, "param_groups", ()))
    return _KNOWN | _SCHEDULE_FREE if averages else _KNOWN


def _masters(optimizer: Any) -> dict[int, Tensor]:
    """Return the masters of Apex and of DeepSpeed's `engine.optimizer`, which are in the order of the groups."""
    masters: Sequence[Any] = getattr(optimizer, "param_groups_master", None) or ()
    pairs = (
        [(group["params"], wide["params"]) for group, wide in zip(optimizer.param_groups, masters, strict=False)]
        if masters
        else []
    )
    halves, wholes = (getattr(optimizer, name, None) for name in ("fp16_groups", "fp32_groups"))
    if isinstance(halves, list) and isinstance(wholes, list):
        pairs += zip(halves, wholes, strict=False)
    return {id(p): wide for group, wider in pairs for p, wide in zip(group, wider, strict=False)}


def _is_like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point()


def _others(tensors: Iterable[Tensor], parameter: Tensor) -> list[Tensor]:
    by_address = {local_part(each).data_ptr(): each for each in tensors}
    by_address.pop(local_part(parameter).data_ptr(), None)  # a view of the weights themselves
    return list(by_address.values())
