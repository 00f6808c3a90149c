"""Signs that a model was not filled: in what `to_empty` leaves, no search means anything."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from muonclip.torch.mesh import local_part

_LARGEST = 1e8  # of a weight; what memory held before is often far beyond


def if_unfilled(model: nn.Module) -> str:
    """Return a line that says which parameters and buffers hold no sensible numbers on this rank, or ""."""
    names = list(_unfilled(model))
    if not names:
        return ""
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"QK-Clip: {listed} hold no numbers that a model could have (NaN, infinite, or beyond {_LARGEST:g}). Fill "
        "every parameter and every buffer first: after to_empty they have whatever the memory held, until the model's "
        "own initialisation or a checkpoint has run. Until then, what follows is a consequence of it alone:\n"
    )


def _unfilled(model: nn.Module) -> Iterator[str]:
    for name, parameter in model.named_parameters():
        values = _values(parameter)
        if values.is_floating_point() and not bool((values.abs() <= _LARGEST).all()):
            yield name
    for name, buffer in model.named_buffers():
        values = _values(buffer)
        if values.is_floating_point() and not bool((values <= _LARGEST).all()):  # a mask may have any below
            yield name


def _values(tensor: Tensor) -> Tensor:
    return local_part(tensor.detach())
