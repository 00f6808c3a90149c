"""TorchTitan on processors: its own trainer and configurations, with gloo between the ranks.

TorchTitan is written for accelerators. What is changed is what a processor lacks: the device type, read when its
modules are imported, and the statistics of a device's memory; the compiled FlexAttention, in whose place is SDPA; the
means of gradients, which gloo has as sums alone; and two functions of a later PyTorch: `set_timeout`, and a step of a
pipeline with the micro-batches given.
"""

import dataclasses
import sys
import types

import torch
import torch._utils
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle
from torch.distributed.tensor import DTensor

torch._utils._get_available_device_type = lambda: "cpu"

import torchtitan.tools.utils as titan_utils  # noqa: E402 - after the device type

titan_utils.device_module = types.SimpleNamespace(
    **{name: getattr(torch.cpu, name) for name in ("device_count", "set_device", "synchronize")},
    current_device=lambda: 0,
    get_device_name=lambda device: "processor",
    get_device_properties=lambda device: types.SimpleNamespace(total_memory=1 << 34),
    memory_stats=lambda device: {},
    reset_peak_memory_stats=lambda: None,
    empty_cache=lambda: None,
)


def step_of_microbatches(
    schedule, *, kwarg_mbs, arg_mbs=None, target_mbs=None, losses=None, loss_kwargs=None, return_outputs=True
):
    """Take a step whose micro-batches are given, which TorchTitan 0.3 expects of a later PyTorch than 2.13."""
    schedule._stage.has_backward = schedule._has_backward
    schedule._stage.clear_runtime_states()
    schedule._step_microbatches(arg_mbs, kwarg_mbs, target_mbs, losses, return_outputs, loss_kwargs=loss_kwargs)


def experts_in_float32(self, x, tokens_per_expert):
    """Compute what TorchTitan's experts do, without the bfloat16 that it rounds their products to.

    The gradients of a rank would be rounded as well, before they are summed: other ones on every mesh.
    """
    w1, w2, w3 = (
        each.to_local() if isinstance(each, DTensor) else each for each in (self.w1_EFD, self.w2_EDF, self.w3_EFD)
    )
    offsets = torch.cumsum(tokens_per_expert, dim=0, dtype=torch.int32)
    h = F.silu(self._grouped_mm(A=x, B_t=w1.mT, offs=offsets)) * self._grouped_mm(A=x, B_t=w3.mT, offs=offsets)
    return self._grouped_mm(A=h, B_t=w2.mT, offs=offsets)


class ShapesOnly:
    """`running`: a stage of a pipeline runs to show the shapes that it returns, on numbers that are no data."""

    running = False
    infer = PipelineStage._forward_metadata_inference

    @classmethod
    def run(cls, *args, **kwargs):
        cls.running = True
        try:
            return cls.infer(*args, **kwargs)
        finally:
            cls.running = False


PipelineStage._forward_metadata_inference = lambda *args, **kwargs: ShapesOnly.run(*args, **kwargs)
PipelineScheduleSingle.step = step_of_microbatches
dist.set_timeout = getattr(dist, "set_timeout", lambda timeout, group: None)

import torch.nn.functional as F  # noqa: E402
import tyro  # noqa: E402
from torchtitan.components.dataloader import BaseDataLoader  # noqa: E402
from torchtitan.components.tokenizer import BaseTokenizer  # noqa: E402
from torchtitan.config.manager import custom_registry  # noqa: E402
from torchtitan.models.common.attention import ScaledDotProductAttention  # noqa: E402
from torchtitan.models.common.moe import GroupedExperts  # noqa: E402
from torchtitan.models.deepseek_v3 import config_registry as deepseek_v3  # noqa: E402 - imported once for all
from torchtitan.models.kimi_k2_7 import model_registry as kimi  # noqa: E402
from torchtitan.models.llama3 import config_registry as llama3  # noqa: E402, F401 - imported once for all
from torchtitan.trainer import Trainer  # noqa: E402

import muonclip.torch.torchtitan as door  # noqa: E402

for missing in ("torchvision", "torchvision.io", "torchvision.transforms", "torchvision.transforms.v2"):
    sys.modules.setdefault(missing, types.ModuleType(missing))  # of Kimi's images, of which there are none here
functional = sys.modules.setdefault(
    "torchvision.transforms.v2.functional", types.ModuleType("torchvision.transforms.v2.functional")
)
sys.modules["torchvision.transforms.v2"].functional = functional
GroupedExperts.forward = experts_in_float32
assert titan_utils.device_type == "cpu", "torchtitan was imported before"


class NoTokenizer(BaseTokenizer):
    """For a loader that makes tokens."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config, *, tokenizer_path):
        super().__init__()

    encode = decode = get_vocab_size = None


class DrawnTokens(BaseDataLoader):
    """The rows of a global batch, drawn by their numbers, so that every mesh trains on the same ones."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        rows: int = 4
        vocabulary: int = 2048

    def __init__(self, config, *, dp_world_size, dp_rank, tokenizer, seq_len, local_batch_size, snapshot_every_n_steps):
        self.config, self.ranks, self.rank = config, dp_world_size, dp_rank
        self.seq_len, self.size, self.taken = seq_len, local_batch_size, 0  # of the rows of this rank

    def __iter__(self):
        own = self.config.rows // self.ranks
        while True:
            rows = []
            for _ in range(self.size):
                step, place = divmod(self.taken, own)
                generator = torch.Generator().manual_seed(step * self.config.rows + self.rank * own + place)
                rows.append(torch.randint(self.config.vocabulary, (self.seq_len + 1,), generator=generator))
                self.taken += 1
            tokens = torch.stack(rows)
            positions = torch.arange(self.seq_len).expand(self.size, -1)
            yield {"input": tokens[:, :-1], "positions": positions}, tokens[:, 1:]

    def state_dict(self):
        return {"rows": self.taken * self.ranks}

    def load_state_dict(self, state):
        self.taken = state["rows"] // self.ranks


def kimi_debugmodel():
    """TorchTitan's Kimi debug model for text alone: its own configuration imports torchvision, for images."""
    config = deepseek_v3.deepseek_v3_debugmodel()
    config.model_spec = kimi("debugmodel")
    config.model_spec.model.vision_encoder = None
    return config


def configuration(name, *, layers, balanced=True, optimizer=None):
    """One of TorchTitan's configurations for processors: `layers` of its layers, and drawn tokens. `balanced`: the
    loads of the experts, by their biases."""
    config = door.with_muonclip(kimi_debugmodel()) if name == "kimi_debugmodel" else getattr(door, name)()
    spec = config.model_spec
    del spec.model.layers[layers:]
    for layer in spec.model.layers:
        if name == "llama3_debugmodel":
            group_queries(layer.attention)
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
        if not balanced and layer.moe is not None:
            layer.moe.load_balance_coeff = None
    spec.parallelize_fn = with_sums(spec.parallelize_fn)
    config.tokenizer, config.dataloader = NoTokenizer.Config(), DrawnTokens.Config()
    config.training.disable_cuda_graphs = True
    config.training.mixed_precision_param = "float32"
    config.training.seq_len = 32
    config.training.steps = config.lr_scheduler.total_steps = 3
    config.training.global_batch_size = DrawnTokens.Config().rows
    config.training.local_batch_size = 2
    config.lr_scheduler.warmup_steps = 1
    config.metrics.disable_color_printing = True
    config.validator.enable = False
    config.checkpoint.async_mode = "disabled"
    config.parallelism.spmd_backend = "partial_dtensor"
    config.optimizer = config.optimizer if optimizer is None else optimizer
    return config


def parse(config, options):
    """Apply options of the command line, as TorchTitan's own entry does."""
    return tyro.cli(type(config), args=[*options], default=config, registry=custom_registry)


def group_queries(attention, kv_heads=4):
    """Give the fused projection of Llama's debug model fewer heads of keys than of queries, as its larger ones have."""
    fused = attention.qkv_linear
    attention.n_kv_heads = fused.n_kv_heads = kv_heads
    fused.wqkv.out_features = (attention.n_heads + 2 * kv_heads) * fused.head_dim
    fused.wqkv.param_init = {"weight": torch.nn.init.normal_}  # its own is for as many keys


def with_sums(parallelize):
    def parallelize_with_sums(*args, **kwargs):
        model = parallelize(*args, **kwargs)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
        return model

    return parallelize_with_sums


__all__ = ["DrawnTokens", "ShapesOnly", "Trainer", "configuration", "parse"]
