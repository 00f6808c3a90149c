"""QK-Clip around each step of an optimizer that does not know of it, by torch's own step hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor
from torch._compile import _disable_dynamo  # pyright: ignore[reportPrivateUsage]; imports the compiler when called
from torch.optim import Optimizer

from muonclip.core import ClipFactors
from muonclip.torch.clip.optimizer_steps import OPTIMIZER_STEPS, with_inner


class AroundUpdate(Protocol):
    """An action before and after an update of the weights."""

    def before_update(self, *, idle: bool = False) -> dict[str, ClipFactors]: ...

    def after_update(self, factors: dict[str, ClipFactors]) -> None: ...

    def reset(self) -> None: ...


class Attachment:
    """A clip that acts at the steps of one optimizer, until it is removed."""

    def __init__(self, clip: AroundUpdate, optimizer: Optimizer, loaded: Iterable[Optimizer]) -> None:
        self._clip = clip
        self._factors: dict[str, ClipFactors] = {}
        self._handles = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            *(each.register_load_state_dict_post_hook(self._loaded) for each in loaded),
        )

    def remove(self) -> None:
        """Leave the optimizer's steps without the clip again."""
        for handle in self._handles:
            handle.remove()

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._factors = {}
        itself, *given = args
        closure = given[0] if given else kwargs.get("closure")
        if closure is None:
            self._measure(optimizer)
            return None
        closure = self._measured(closure, optimizer)  # the forward and backward of this step are still to come
        return ((itself, closure, *given[1:]), kwargs) if given else (args, {**kwargs, "closure": closure})

    @_disable_dynamo
    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        factors, self._factors = self._factors, {}
        self._clip.after_update(factors)

    def _loaded(self, optimizer: Optimizer) -> None:
        self._clip.reset()  # what was observed belongs to another run

    def _measured(self, closure: Callable[[], Any], optimizer: Optimizer) -> Callable[[], Any]:
        def run() -> Any:
            loss = closure()
            self._measure(optimizer)
            return loss

        return run

    @_disable_dynamo
    def _measure(self, optimizer: Optimizer) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # by a GradScaler, for fused kernels that skip by themselves
        if found_inf is None or not bool(found_inf):
            self._factors = self._clip.before_update(idle=is_idle(optimizer))


def attach_to(clip: AroundUpdate, optimizer: Any) -> Attachment:
    """Attach a clip to an optimizer, or to that which it wraps, if its own steps do not run hooks.

    Raises ValueError for one that clips by itself, and where no steps run hooks.
    """
    wrapped = list(with_inner(optimizer))
    if any(getattr(each, "qk_clip", None) is not None for each in wrapped):
        raise ValueError(
            f"{type(optimizer).__name__} clips by itself after each step. Attach a QKClip to an optimizer that does "
            "not, or hand it over: MuonClip(model, qk_clip=clip)."
        )
    running_hooks = next((each for each in wrapped if _runs_hooks(each)), None)
    if running_hooks is None:
        raise ValueError(
            f"optimizer is a {type(optimizer).__name__}, and not a torch.optim.Optimizer whose steps run hooks; it "
            "wraps none. Call clip.step() after each of its steps, before the gradients are discarded."
        )
    OPTIMIZER_STEPS.add(optimizer)
    loaded = [each for each in wrapped if hasattr(each, "_optimizer_load_state_dict_post_hooks")]
    return Attachment(clip, running_hooks, loaded)


def _runs_hooks(optimizer: Any) -> bool:
    """Tell whether torch has wrapped the step; wrappers of optimizers that leave out `Optimizer.__init__` miss that."""
    return hasattr(optimizer, "_optimizer_step_pre_hooks") and getattr(type(optimizer).step, "hooked", False)


def is_idle(optimizer: Optimizer) -> bool:
    """Tell whether every rate is 0, as far as the host knows, so that no weight moves."""
    return all(not isinstance(group["lr"], Tensor) and group["lr"] == 0 for group in optimizer.param_groups)
