"""Shows what a training does to logits and matrices, next to any optimizer, and scales nothing."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from muonclip.core import MatrixLayout
from muonclip.core.arguments import check_flag, check_kind, check_whole
from muonclip.core.matrix_state import MatrixState, per_block
from muonclip.core.state_storage import absmax_of
from muonclip.torch.clip import JointMaxima, QKClip
from muonclip.torch.mesh import Topology, check_parameter, is_dtensor, local_part
from muonclip.torch.monitor.matrix_statistics import MatrixStatistics, WeightStep, statistics_of
from muonclip.torch.optimizer import MuonClip, default_layout, plan_module
from muonclip.torch.update import is_coded

_FIELDS = tuple(each.name for each in fields(MatrixStatistics))
_MOMENTA = ("momentum_buffer", "exp_avg")


class Monitor:
    """Watch a training: the largest attention logit of every head, and what each step does to every weight matrix.

        monitor = Monitor(model, optimizer)
        …
        optimizer.step()
        log(monitor.scalars())

    Matrices are logical ones: each expert, head that is a matrix of its own, and fused block. The host waits for the
    device only in `scalars` and the like.

    Of parameters that are DTensors (FSDP2, tensor parallelism) the numbers are those of the whole matrices, the same on
    all ranks, which must all take the steps. In a step with a look that costs 18 small all-reduces for each way of
    sharding; no matrix is gathered.

    Args:
        model: The model that is trained.
        optimizer: Any of torch; its steps are watched by its own hooks, and nothing in them changes. A `MuonClip` has a
            clip already, whose observation is shown, with heads under τ as bounds; next to others every maximum is
            exact.
        every: Steps from one look at the matrices to the next. Such a step copies the weights that have gradients.
        logits: Watch the logits.
        matrices: Watch the matrices.
        clip: The QKClip that is on the model already, next to another optimizer than MuonClip; without it a second one
            would take its place, and its next step raise.

    Raises:
        ValueError: For wrong arguments, for parameters that an engine has flattened, and for attention that is not
            understood, here or in the first forward.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        every: int = 1,
        logits: bool = True,
        matrices: bool = True,
        clip: QKClip | None = None,
    ) -> None:
        check_kind("model", model, nn.Module, "a torch.nn.Module")
        check_kind("optimizer", optimizer, Optimizer, "a torch optimizer, whose steps are watched")
        check_options(every=every, logits=logits, matrices=matrices, clip=clip)
        self._model, self._optimizer, self._every = model, optimizer, every
        if matrices:
            for name, parameter in model.named_parameters():
                check_parameter(name, parameter)
        self._steps = 0
        self._topology = Topology()
        self._before: dict[str, tuple[Tensor, Tensor]] = {}
        self._statistics: dict[str, MatrixStatistics] = {}
        self._layouts: dict[str, MatrixLayout] = {}
        self._known = -1  # the version of the attentions that the layouts are made with
        self._hooks: list[Any] = []
        self._clip = optimizer.qk_clip if clip is None and isinstance(optimizer, MuonClip) else clip
        self._clip_is_own = logits and self._clip is None and not isinstance(optimizer, MuonClip)
        try:
            self._put_on(model, optimizer, logits=logits, matrices=matrices)
        except BaseException:
            self._take_off()
            if self._clip is not None and self._clip_is_own:
                self._clip.attentions.withdraw()
            raise

    def _put_on(self, model: nn.Module, optimizer: Optimizer, *, logits: bool, matrices: bool) -> None:
        """Put the observers on the model, and the hooks on the optimizer."""
        if self._clip_is_own:
            self._clip = QKClip(model, tau=math.inf, observe="always", required=False)
            self._hooks.append(self._clip.attach(optimizer))
        elif not logits:
            self._clip = None
        if matrices:
            self._refresh()
            watcher = weakref.WeakMethod(self._begin), weakref.WeakMethod(self._end)
            self._hooks.append(optimizer.register_step_pre_hook(lambda *_: _call(watcher[0])))
            self._hooks.append(optimizer.register_step_post_hook(lambda *_: _call(watcher[1])))

    def matrices(self) -> dict[str, MatrixStatistics]:
        """Return what the last step that was looked at did to each parameter, on the device."""
        return dict(self._statistics)

    def scalars(self, prefix: str = "monitor/", *, details: bool = False) -> dict[str, float]:
        """Return numbers to log, for `SummaryWriter.add_scalar`, `wandb.log` and similar. Waits for the device.

        `max_logit` and `bound` of the last step; of the matrices the largest and the median of each statistic,
        `relative_update.max`, … .

        Args:
            prefix: Text in front of each name.
            details: Also the largest of each parameter, `relative_update/layers.0.up.weight`, and of each attention,
                `bound/layers.0.attn`.
        """
        values: dict[str, float] = {}
        if self._clip is not None and self._clip.last_layers:
            report = self._clip.report()
            seen = report.scalars("")
            values |= {name: seen[name] for name in ("max_logit", "bound") if name in seen}
            if details:
                values |= {f"bound/{name}": layer.bound.max().item() for name, layer in report.layers.items()}
        for name in _FIELDS if self._statistics else ():
            by_parameter = {key: getattr(each, name) for key, each in self._statistics.items()}
            together = torch.cat([each.cpu() for each in by_parameter.values()])
            together = together[~together.isnan()]
            if len(together):
                values |= {f"{name}.max": together.max().item(), f"{name}.median": together.median().item()}
            if details:
                values |= {f"{name}/{key}": each.max().item() for key, each in by_parameter.items()}
        return {prefix + name: value for name, value in values.items()}

    @torch.enable_grad()  # without, forwards are not those of a training, and not observed
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Call the model in evaluation mode, and return the largest logits of this call by attention, fp32 [heads].

        Args:
            *args: What the model is called with.
            **kwargs: What it is called with, by name.

        Raises:
            RuntimeError: Where a forward of the training waits for its step, which would lose what was observed.
            ValueError: Where logits are not watched.
        """
        clip = self._clip
        if clip is None:
            raise ValueError("logits are not watched: Monitor(…, logits=True), next to an optimizer with a clip.")
        if any(bool(state.observed) for state in clip.attentions.states()):
            raise RuntimeError("a forward of the training was observed, and its step is to come; evaluate after it.")
        try:
            with _evaluating(self._model):
                self._model(*args, **kwargs)
            maxima = JointMaxima.from_states(clip.attentions.states(), clip.attentions.device)
        finally:
            clip.reset()  # the next step must not take this for a forward of the training
        return dict(zip(clip.projections, maxima.upper_bound.split(maxima.sizes), strict=True))

    def remove(self) -> None:
        """Take the hooks off the optimizer, and the observers off a model that has no clip of its own."""
        self._take_off()
        if self._clip is not None and self._clip_is_own:
            self._clip.remove()

    def _take_off(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @torch.no_grad()
    def _begin(self) -> None:
        """Keep the weights that are about to move; those of a step that failed are forgotten."""
        self._before = {}
        if self._steps % self._every == 0:
            self._refresh()
            for name, parameter in self._model.named_parameters():
                # Whether a shard has a gradient, ranks need not agree on.
                moves = parameter.grad is not None or (is_dtensor(parameter) and parameter.requires_grad)
                if name in self._layouts and moves:
                    self._before[name] = parameter, local_part(parameter.detach()).clone()
        self._steps += 1

    @torch.no_grad()
    def _end(self) -> None:
        """Compare them with what has become of them."""
        if not self._before:
            return
        steps = [
            WeightStep(parameter, self._layouts[name], before, *self._momentum_of(parameter, self._layouts[name]))
            for name, (parameter, before) in self._before.items()
        ]
        self._statistics = dict(zip(self._before, statistics_of(steps, self._topology), strict=True))
        self._before = {}

    def _refresh(self) -> None:
        """Read the parameters as matrices anew where the first forward has found attentions."""
        version = 0 if self._clip is None else self._clip.attentions.version
        if version != self._known:
            self._layouts, self._known = _layouts_of(self._model, self._clip), version

    def _momentum_of(self, parameter: Tensor, layout: MatrixLayout) -> tuple[Tensor | None, Tensor | None]:
        """Return the momentum of a parameter, and the sizes of its blocks where it is stored as codes."""
        state = self._optimizer.state.get(parameter, {})
        placed = parameter.shape, getattr(parameter, "placements", None)
        for name in _MOMENTA:
            found = state.get(name)
            if isinstance(found, Tensor) and (found.shape, getattr(found, "placements", None)) == placed:
                if not is_coded(found):
                    return found, None
                absmax, fan_in = state.get(absmax_of(name)), layout.axes(parameter.ndim).fan_in
                shape = MatrixState(name, per_block).stored_shape(parameter.shape, fan_in)
                return (found, absmax) if absmax is not None and absmax.shape == shape else (None, None)
        return None, None


def check_options(*, every: Any, logits: Any, matrices: Any, clip: Any) -> None:
    """Raise TypeError or ValueError, naming it, for an option of `Monitor` that does not fit."""
    check_whole("every", every)
    check_flag("logits", logits)
    check_flag("matrices", matrices)
    if clip is not None:
        check_kind("clip", clip, QKClip, "the QKClip of the model, or None")


def _layouts_of(model: nn.Module, clip: QKClip | None) -> dict[str, MatrixLayout]:
    """Return how each parameter with at least two axes is read as matrices, by name."""
    lines = plan_module(model, {} if clip is None else clip.projections, per_head=False)
    return {line.name: line.layout or default_layout(line.shape) for line in lines if len(line.shape) >= 2}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _call(method: weakref.WeakMethod[Any]) -> None:
    bound = method()
    if bound is not None:
        bound()
