"""MuonClip in TorchTitan: its optimizer container, its metrics, and its configurations with both.

    torchrun --nproc-per-node 8 -m torchtitan.train --module muonclip.torch.torchtitan --config moonlight_16b_a3b \\
        --optimizer.lr 4e-4 --optimizer.tau 100

Every configuration of TorchTitan's Llama 3, DeepSeek-V3 and Kimi models is here, by its own name. Imported only where
torchtitan is.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from muonclip.core.arguments import check_kind, shown
from muonclip.torch.clip import QKClip, extremes_of
from muonclip.torch.mesh import plain_name
from muonclip.torch.optimizer import MuonClip

try:
    from torchtitan.components.metrics import MetricsProcessor  # pyright: ignore[reportMissingImports]
    from torchtitan.components.optimizer import OptimizersContainer  # pyright: ignore[reportMissingImports]
    from torchtitan.tools.logging import logger  # pyright: ignore[reportMissingImports]
    from torchtitan.trainer import Trainer  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"muonclip.torch.torchtitan needs TorchTitan 0.3, and {error.name!r} is not installed. The extra of this "
        "package that brings it is torchtitan: pip install 'muonclip[torchtitan]'.",
        name=error.name,
    ) from error

__all__ = ["MuonClipContainer", "QKClipMetrics", "with_muonclip"]

_MOST_STEPS = 1024

_REGISTRIES = {"llama3_": "llama3", "deepseek_v3_": "deepseek_v3", "kimi_": "kimi_k2_7", "moonlight_": "kimi_k2_7"}
"""The models of TorchTitan whose configurations are here, by how the names of those begin."""


class MuonClipContainer(OptimizersContainer):
    """TorchTitan's container of optimizers, with a `MuonClip` for each part of the model that this rank holds.

    Schedules, gradient clipping, checkpoints and the balancing of experts' loads use it as they use TorchTitan's own.

    Args:
        config: The options, which are also options of the command line, `--optimizer.tau 50`.
        model_parts: The model, or its stages of a pipeline on this rank, parallelised and filled.

    Raises:
        ValueError: As from `MuonClip`, and for options of TorchTitan's own optimizers, which have no meaning here.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """Options of `MuonClip`. One that is None is not given: it has the value of the recipe, or the default."""

        lr: float = 8e-4
        """The rate of both halves, per step, before the schedule."""

        weight_decay: float | None = None
        """Decoupled, times the rate; of both halves, none on norms and biases."""

        momentum: float | None = None
        """The share of the old momentum, of the Muon half."""

        tau: float | None = None
        """Heads whose largest attention logit exceeds it are clipped after each step."""

        recipe: str | None = None
        """The values of a published recipe, by its name, for what is not given."""

        clip: bool = True
        """Clip. False is Muon alone."""

        options: dict[str, Any] = field(default_factory=dict)
        """Other arguments of `MuonClip`, by name, for configurations in Python."""

    optimizers: list[MuonClip[Any]]

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        arguments = _arguments(config)
        self.model_parts = model_parts
        self.optimizers = [MuonClip(part, **arguments) for part in model_parts]
        for index, optimizer in enumerate(self.optimizers):
            logger.info(f"Optimizer MuonClip (model_part={index}):\n{optimizer.plan}")
            for group in optimizer.param_groups:  # by which TorchTitan's checkpoints know the parameters
                group["param_names"] = [plain_name(name) for name in group["param_names"]]
        self._steps: deque[Tensor] = deque(maxlen=_MOST_STEPS)
        trained = [each for part in model_parts for each in part.parameters() if each.requires_grad]
        self._post_init(trained)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take a step of every part, and keep what the clips saw for the next log.

        Args:
            closure: None; TorchTitan has no closures.

        Raises:
            RuntimeError: As from `MuonClip.step`.
        """
        super().step(closure)
        if self._clips:
            layers = [layer for clip in self._clips for layer in clip.last_layers.values()]
            self._steps.append(extremes_of(layers).to(self._clips[0].attentions.device))
        return None

    @property
    def _clips(self) -> list[QKClip]:
        return [optimizer.qk_clip for optimizer in self.optimizers if optimizer.qk_clip is not None]

    def scalars(self, stages: dist.ProcessGroup | None = None) -> dict[str, float]:
        """Return what the clips saw since the last call, by the names of `QKClipReport.scalars`; waits for the device.

        `bound`, `max_logit`, `clipped_heads` and `min_gamma` are the extremes over the steps, of which at most the last
        1024 count. Empty without a clip and without a step.

        Args:
            stages: The ranks of this rank's pipeline, which must all call it; None for this rank alone.

        Raises:
            RuntimeError: As from `QKClip.report`.
        """
        if not self._steps:
            return {}
        last = max(clip.report().last_clipped_step for clip in self._clips)
        seen = torch.stack([*self._steps])  # [steps, 4]
        self._steps.clear()
        extremes, clipped = torch.cat([seen.amax(0), seen.new_tensor([last])]), seen[:, 2].clone()
        if stages is not None and stages.size() > 1:
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=stages)
            dist.all_reduce(clipped, group=stages)
        bound, max_logit, _, negative_gamma, last = extremes.tolist()
        values = {
            "bound": bound,
            "clipped_heads": clipped.max().item(),
            "min_gamma": -negative_gamma,
            "last_clipped_step": last,
        }
        if max_logit > -math.inf:
            values["max_logit"] = max_logit
        return {f"qk_clip/{name}": value for name, value in values.items()}


class QKClipMetrics(MetricsProcessor):
    """TorchTitan's metrics, and what QK-Clip saw since the last log: `MuonClipContainer.scalars`.

    It is of all stages of a pipeline. TensorBoard and Weights & Biases get
    them with TorchTitan's own, and the screen a line.

    Args:
        config: TorchTitan's own options of metrics.
        **runtime: What the trainer gives.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        """TorchTitan's own options of metrics."""

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """Log a step.

        Args:
            step: Its number.
            global_avg_loss: The mean loss, in nats per token.
            global_max_loss: The largest mean loss of a rank.
            grad_norm: The norm of the gradients.
            extra_metrics: Other numbers by name.

        Raises:
            RuntimeError: As from `QKClip.report`.
        """
        seen: dict[str, float] = {}
        if isinstance(self.optimizers, MuonClipContainer):
            stages = self.parallel_dims.get_optional_mesh("pp")
            seen = self.optimizers.scalars(None if stages is None else stages.get_group())
        super().log(step, global_avg_loss, global_max_loss, grad_norm, {**(extra_metrics or {}), **seen})
        if seen:
            words = "  ".join(f"{name.removeprefix('qk_clip/')}: {value:g}" for name, value in seen.items())
            logger.info(f"step: {step:2}  qk_clip  {words}")


def with_muonclip(config: Trainer.Config, **options: Any) -> Trainer.Config:
    """Return a configuration of TorchTitan with `MuonClip` and the metrics of its clip in it; the rest stays.

        def my_config():
            return with_muonclip(qwen3_0_6b(), recipe="moonlight")

    The rate is that of the configuration, which AdamW had: updates have the RMS of AdamW's.

    Args:
        config: A configuration, which is changed.
        **options: `lr` and other arguments of `MuonClip`.

    Raises:
        TypeError: For another kind of configuration.
    """
    check_kind("config", config, Trainer.Config, "a configuration of TorchTitan, a Trainer.Config")
    own = {each.name for each in fields(MuonClipContainer.Config)} - {"options"}
    rates = [group.optimizer_kwargs.get("lr") for group in config.optimizer.param_groups]
    given = {"lr": rates[0]} if rates and rates[0] is not None else {}
    given |= {name: value for name, value in options.items() if name in own}
    others = {name: value for name, value in options.items() if name not in own}
    config.optimizer = MuonClipContainer.Config(**given, options=others)
    metrics = {each.name: getattr(config.metrics, each.name) for each in fields(config.metrics)}
    config.metrics = QKClipMetrics.Config(**metrics)
    return config


def __getattr__(name: str) -> Callable[[], Trainer.Config]:
    """Return a configuration of TorchTitan's by its name, with `MuonClip`."""
    models = {model for prefix, model in _REGISTRIES.items() if name.startswith(prefix)}
    function = next((found[name] for found in map(_configs_of, models) if name in found), None)
    if function is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
    return lambda: with_muonclip(_plain(function()))


def __dir__() -> list[str]:
    names = set(__all__)
    for model in _REGISTRIES.values():
        with suppress(ModuleNotFoundError):  # torchvision, for Kimi's images
            names.update(_configs_of(model))
    return sorted(names)


def _configs_of(model: str) -> Mapping[str, Callable[[], Trainer.Config]]:
    """Return the functions that make TorchTitan's configurations of a model, by name."""
    registry = importlib.import_module(f"torchtitan.models.{model}.config_registry")
    prefixes = tuple(prefix for prefix, each in _REGISTRIES.items() if each == model)
    return {
        name: function
        for name, function in vars(registry).items()
        if name.startswith(prefixes) and inspect.isfunction(function) and not inspect.signature(function).parameters
    }


def _plain(config: Trainer.Config) -> Trainer.Config:
    """Return a configuration without the checks of one that is made for DistMuon, which no stage of a pipeline has."""
    if type(config) is Trainer.Config or not type(config).__module__.startswith("torchtitan.models.kimi"):
        return config
    return Trainer.Config(**{each.name: getattr(config, each.name) for each in fields(config) if each.init})


def _arguments(config: MuonClipContainer.Config) -> dict[str, Any]:
    """Return the arguments of `MuonClip` that a configuration gives."""
    if config.param_groups or config.optimizer_factory_kwargs_by_name:
        raise ValueError(
            "param_groups and optimizer_factory_kwargs_by_name are for TorchTitan's own optimizers. MuonClip divides "
            "the parameters by itself; leave them out, and give its arguments in options."
        )
    if config.implementation == "fused_opt_states_bf16":
        raise ValueError(
            "implementation='fused_opt_states_bf16' is for TorchTitan's own AdamW. Give MuonClip "
            "options={'momentum_dtype': torch.bfloat16}."
        )
    named = {"weight_decay": config.weight_decay, "momentum": config.momentum, "recipe": config.recipe}
    if config.clip:
        named["tau"] = config.tau
    elif config.tau is not None:
        raise ValueError(f"tau={shown(config.tau)} has nothing to clip where clip=False. Leave one of them out.")
    given = {"lr": config.lr, **{name: value for name, value in named.items() if value is not None}}
    twice = sorted(given.keys() & config.options.keys())
    if twice:
        raise ValueError(f"options has {', '.join(twice)}, which the configuration has itself. Give it there.")
    return {**given, **({} if config.clip else {"qk_clip": None}), **config.options}
