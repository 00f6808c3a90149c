"""A run's model and optimizer over all ranks of torchrun: what `TorchLearner` does alone, to rounding.

Of the batch of a step, rank d of D data ranks takes the d-th part, in micro-batches. Loss, gradient norm and maxima of
the record are of the whole batch, on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule

from benchmarks.experiment.arms import Arm
from benchmarks.experiment.errors import UsageError
from benchmarks.experiment.experiment import Experiment
from benchmarks.training.learner import Windows
from benchmarks.training.torch_learner import TorchLearner, first_model, make_optimizer
from muonclip.models.parallel import DegreeError, Parallelism, parallelize
from muonclip.models.recompute import StoreActivations
from muonclip.models.torch import MoE
from muonclip.torch.distributed import clip_grad_norm_

LARGEST_MEASURED = 10**9
"""Parameters. Larger models are not gathered to measure entropies, head norms and update sizes."""
LARGEST_COPIED = 8 * 10**9
"""Parameters. Larger models never are whole on one device: every rank draws its shards, and so the first weights depend
on the layout."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The division of a step over the ranks; nothing here changes a number of the result by more than rounding."""

    parallelism: Parallelism = field(default_factory=Parallelism)
    accumulate: int = 1  # micro-batches
    recompute: bool = False
    store_activations: StoreActivations | None = None
    offload_activations: bool = False

    def check(self, experiment: Experiment, world_size: int) -> None:
        """Raise UsageError, naming the option, for degrees that do not fit ranks, models or batches."""
        for option in ("store_activations", "offload_activations"):
            if getattr(self, option) and not self.recompute:
                raise UsageError(f"--{option.replace('_', '-')}", "it is an option of --recompute; give both.")
        for arm in experiment.arms:
            if arm.optimizer == "torch-muon":
                raise UsageError("--arms", f"{arm.name} runs alone: torch.optim.Muon knows no shards. Take it away.")
            try:
                self.parallelism.check(arm.model, world_size)
            except DegreeError as error:
                raise UsageError(f"--{error.degree}", str(error)) from error
            data, training = self.parallelism.data, arm.training
            if training.batch_size % (data * self.accumulate):
                raise UsageError(
                    "--batch",
                    f"{training.batch_size} windows cannot be divided over {data} data ranks × {self.accumulate} "
                    f"micro-batches; give a multiple of {data * self.accumulate}, or fewer ranks.",
                )
            if training.validation_batch_size % data:
                raise UsageError(
                    "--shards",
                    f"{data} data ranks do not divide the {training.validation_batch_size} windows of a validation "
                    "batch; take fewer.",
                )

    def to_json(self) -> dict[str, Any]:
        own = asdict(self)
        return {**own.pop("parallelism"), **own}


class ShardedLearner(TorchLearner):
    def __init__(self, experiment: Experiment, arm: Arm, seed: int, layout: Layout) -> None:
        self.experiment, self.arm, self.layout = experiment, arm, layout
        size = arm.model.num_parameters()
        self.measurable = size <= LARGEST_MEASURED
        narrow = experiment.precision.autocast == "bfloat16"
        whole = size <= LARGEST_COPIED
        if whole:
            self.model = first_model(experiment, arm, seed)
        else:
            with torch.device("meta"):
                self.model = MoE(arm.model)
        self.meshes = parallelize(
            self.model,
            layout.parallelism,
            device_type=experiment.device,
            mixed_precision=narrow,
            recompute=layout.recompute,
            store_activations=layout.store_activations,
            offload_activations=layout.offload_activations,
        )
        if not whole:
            self.model.to_empty(device=experiment.device)
            torch.manual_seed(seed)
            self.model.reset_parameters()
        self.parameters = dict(self.model.named_parameters())  # as sharded; evaluation leaves others in the modules
        self.optimizer, self.qk_clip = make_optimizer(self.model, arm, experiment.precision, foreach=False)
        self.optimizer.register_step_post_hook(self.model.step_hook)
        self._whole: MoE | None = None

    def rows(self, batch_size: int) -> range:
        each = batch_size // self.meshes.data_size
        return range(self.meshes.data_rank * each, (self.meshes.data_rank + 1) * each)

    def _gradients(self, windows: Windows) -> tuple[float, float]:
        total = torch.zeros((), device=self.experiment.device)
        for tokens in self._on_device(windows).chunk(self.layout.accumulate):
            loss = self.model.loss(tokens[:, :-1], tokens[:, 1:]) / self.layout.accumulate
            loss.backward()
            total += loss.detach()
        norm = clip_grad_norm_(self.parameters.values(), self.arm.training.grad_clip)
        return self._mean(total), norm.item()

    @torch.no_grad()
    def loss(self, windows: Windows) -> float:
        self.model.eval()
        tokens = self._on_device(windows)
        training = self.arm.training
        at_once = training.batch_size // (self.meshes.data_size * self.layout.accumulate)  # as many as in training
        total = torch.zeros((), device=self.experiment.device)
        for some in tokens.split(at_once):
            total += self.model.loss(some[:, :-1], some[:, 1:]) * (len(some) / len(tokens))
        loss = self._mean(total)
        self.model.train()
        assert isinstance(self.model, FSDPModule)
        self.model.reshard()  # without a backward pass FSDP leaves the root's parameters gathered
        return loss

    def reference(self) -> MoE:
        """Return the whole model on every rank; the same module every time."""
        if self._whole is None:
            self._whole = MoE(self.arm.model).to(self.experiment.device)
        self._whole.load_state_dict(get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True)))
        return self._whole

    def state(self) -> dict[str, Any]:
        """Return all tensors that the run goes on from, by name: `model.NAME` and `optimizer.NAME.PART`.

        Options of groups are not included: they follow from the arm.
        """
        tensors = self._of_model()
        for name, parameter in self.parameters.items():
            for part, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{part}"] = value
        return tensors

    def restore(self, state: dict[str, Any]) -> None:
        """Take what was loaded into the tensors of `empty_state`; the model's are its own and hold it already."""
        for name, parameter in self.parameters.items():
            prefix = f"optimizer.{name}."
            own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            if own:
                self.optimizer.state[parameter] = own

    def empty_state(self, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Tensor]:
        """Return tensors to load a checkpoint of these shapes into.

        The model's are its own; those for the optimizer are new, placed as their parameters are where the shapes agree;
        its counters are the host's.
        """
        tensors = self._of_model()
        for key, (shape, dtype) in shapes.items():
            if key.startswith("optimizer."):
                parameter = self.parameters[key.removeprefix("optimizer.").rpartition(".")[0]].detach()
                same = shape == tuple(parameter.shape)
                tensors[key] = torch.zeros_like(parameter, dtype=dtype) if same else torch.zeros(shape, dtype=dtype)
        return tensors

    def _of_model(self) -> dict[str, Tensor]:
        """Return parameters and buffers, which share their memory with the model's."""
        named = (*self.parameters.items(), *self.model.named_buffers())
        return {f"model.{name}": tensor.detach() for name, tensor in named}

    def _on_device(self, windows: Windows) -> Tensor:
        return torch.from_numpy(windows).to(self.experiment.device)

    def _mean(self, value: Tensor) -> float:
        """Take the mean over the data ranks."""
        value = value.detach().clone()
        if self.meshes.data_group is not None:
            dist.all_reduce(value, group=self.meshes.data_group)
        return value.item() / self.meshes.data_size
