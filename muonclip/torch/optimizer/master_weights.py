"""Float32 weights of a model whose bf16 parameters have masters: out of them for saving, and into them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from muonclip.core.arguments import check_kind
from muonclip.core.text_table import in_bytes
from muonclip.torch.mesh import local_part, placed_like
from muonclip.torch.update import error_dtypes, has_master, joined, split_into


def fp32_state_dict(model: nn.Module, errors: Mapping[int, Sequence[Tensor]]) -> dict[str, Any]:
    """Return `model.state_dict()` with masters in the place of their parameters. `errors`: theirs, by the `id`s."""
    check_kind("model", model, nn.Module, "the module whose parameters this optimizer has")
    wide: dict[str, Any] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        plain = value.detach() if isinstance(value, Tensor) else value
        own = errors.get(id(value))
        wide[name] = plain if own is None else _master(plain, own)
    return wide


def load_fp32_state_dict(
    model: nn.Module, state_dict: Mapping[str, Any], errors: Mapping[int, Sequence[Tensor]]
) -> None:
    """Load float32 weights into a model and the errors of its masters, which lose nothing, or 8 bits."""
    check_kind("model", model, nn.Module, "the module whose parameters this optimizer has")
    model.load_state_dict(state_dict)
    for name, parameter in _named(model):
        own, given = errors.get(id(parameter)), state_dict.get(name)
        if own is not None and isinstance(given, Tensor):
            weight = local_part(parameter.detach())
            held = [local_part(each) for each in own]
            near = [each.to(weight.device) for each in held]  # from host memory, with `offload`
            split_into(local_part(given.detach()).to(weight.device).float(), weight, near)
            for each, new in zip(held, near, strict=True):
                if new is not each:
                    each.copy_(new)


def masters_in_words(groups: Iterable[Mapping[str, Any]]) -> str:
    """Say for a plan which parameters have masters, and the bytes of their errors; nothing where none were asked."""
    lines: list[str] = []
    for bits in (32, 24):
        asked = [each for group in groups if group.get("master_weight_bits") == bits for each in group["params"]]
        narrow = [each for each in asked if has_master(each, bits)]
        size = sum(each.numel() * dtype.itemsize for each in narrow for dtype in error_dtypes(bits).values())
        if asked:
            names = " and ".join(error_dtypes(bits))
            lines.append(
                f"master weights of {bits} bits: {len(narrow)} bf16 parameters, {names} {in_bytes(size)}; "
                f"{len(asked) - len(narrow)} wider parameters are their own"
            )
    return "\n".join(lines)


def offload_in_words(sizes: Mapping[str, Mapping[str, int]]) -> str:
    """Say for a plan what is in host memory. `sizes`: bytes by update and state."""
    size = sum(each for states in sizes.values() for each in states.values())
    return f"offload: the states of the Muon half, {in_bytes(size)}, are in host memory"


def _master(parameter: Tensor, errors: Sequence[Tensor]) -> Tensor:
    weight = local_part(parameter)
    return placed_like(parameter, joined(weight, [local_part(each).to(weight.device) for each in errors]))


def _named(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    return ((name, value) for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor))
