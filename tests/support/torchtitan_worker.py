"""One rank of TorchTitan's trainer, `torchtitan_worker.py FOLDER DRIVER MODEL LAYERS [unbalanced] [option …]`.

It begins at weights that are drawn by their names, trains, and leaves in FOLDER what it saw and ended with. DRIVER:
"door", the container of `muonclip.torch.torchtitan`; or "hand", TorchTitan's own container with Muon and AdamW by
patterns of names, and the clip written out here, for one process; or "killed", the first in the last step amid it.
"""

import dataclasses
import os
import signal
import sys
import zlib
from pathlib import Path

import cpu_ring
import torch
import torch.distributed as dist
import torchtitan_host as host
from torch.distributed.tensor import DTensor, distribute_tensor
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

from muonclip.core import MatrixLayout
from muonclip.torch import Muon

LR, TAU = 4e-3, 2.0
ADAMW = dict(betas=(0.9, 0.95), eps=1e-4)  # a smaller eps makes steps of rounding errors of gradients near 0


def plain(name):
    return name.replace("_checkpoint_wrapped_module.", "")


def fill(parts):
    """Draw the weights by their names, the same on every mesh."""
    with torch.no_grad():
        for part in parts:
            for name, parameter in part.named_parameters():
                generator = torch.Generator().manual_seed(zlib.crc32(plain(name).encode()))
                drawn = torch.randn(parameter.shape, generator=generator)
                drawn = 1 + 0.1 * drawn if "norm" in name else drawn * parameter.shape[-1] ** -0.5
                if isinstance(parameter, DTensor):
                    drawn = distribute_tensor(drawn, parameter.device_mesh, parameter.placements, src_data_rank=None)
                parameter.copy_(drawn)


class DenseMaxima:
    """The largest logit of every head, from the queries and keys that attentions get; dense and in float64."""

    def __init__(self, parts):
        self.seen = {}
        for part in parts:
            for name, module in part.named_modules():
                if name.endswith("attention.inner_attention"):
                    hook = self.hook(plain(name).removesuffix(".inner_attention"))
                    module.register_forward_pre_hook(hook, with_kwargs=True)

    def hook(self, name):
        def observe(module, args, kwargs):
            if torch.is_grad_enabled():  # the same in a stage's run for shapes, where a checkpoint compares
                q, k = (each.to_local() if isinstance(each, DTensor) else each for each in args[:2])
                q, k = (each.detach().double().transpose(1, 2) for each in (q, k))  # [B, heads, L, d]
                k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
                scale = kwargs.get("scale") or q.shape[-1] ** -0.5
                allowed = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
                logits = (q @ k.mT * scale).masked_fill(~allowed, -torch.inf).amax((0, 2, 3))
                if not host.ShapesOnly.running:
                    self.seen.setdefault(name, []).append(logits)

        return observe

    def take(self):
        """{name: S [heads of this rank]} since the last call."""
        seen = {name: torch.stack(each).amax(0) for name, each in self.seen.items()}
        self.seen.clear()
        return seen


class ByHand(OptimizersContainer):
    """TorchTitan's own container, which knows one more name of an optimizer."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        pass

    @staticmethod
    def _resolve_optimizer_factory(name):
        return Muon if name == "Muon" else OptimizersContainer._resolve_optimizer_factory(name)


FUSED = {  # the rows that are matrices of their own
    r"attention\.wkv_a\.weight": MatrixLayout(blocks=(512, 64)),
    r"qkv_linear\.wqkv\.weight": MatrixLayout(blocks=(64, 16, 16), repeats=4),
}
HIDDEN = r"(attention\.w\w+|feed_forward\.w\d|gate|shared_experts\.w\d)\.weight$|inner_experts\.w"


def by_hand(model):
    muon = dict(
        lr=LR, weight_decay=0.1, ns_dtype=torch.float32, adjust_lr_fn="match_rms_adamw", fused=False, foreach=False
    )
    adamw = dict(lr=LR, **ADAMW)
    fused = [pattern for pattern in FUSED if ("wqkv" in pattern) == (model == "llama3_debugmodel")]
    groups = [(pattern, "Muon", {**muon, "layout": FUSED[pattern]}) for pattern in fused]
    groups += [
        (HIDDEN, "Muon", muon),
        (r"tok_embeddings|lm_head", "AdamW", {**adamw, "weight_decay": 0.1}),
        (r".*", "AdamW", {**adamw, "weight_decay": 0.0}),
    ]
    return ByHand.Config(
        implementation="for-loop",
        param_groups=[
            ParamGroupConfig(pattern=pattern, optimizer_name=name, optimizer_kwargs=options)
            for pattern, name, options in groups
        ],
    )


@torch.no_grad()
def clip_by_hand(model, maxima, tau):
    """Scale queries and keys by Kimi K2's rule, written out for the two attentions of TorchTitan's models."""
    for name, largest in maxima.items():
        attention = model.get_submodule(name)
        gamma = (tau / largest).clamp(max=1.0)
        if hasattr(attention, "wkv_b"):  # MLA: the key's rotary part is of all heads
            q = local(attention.wq.weight).unflatten(0, (attention.n_heads, -1))
            kv = local(attention.wkv_b.weight).unflatten(0, (attention.n_heads, -1))
            nope = attention.qk_nope_head_dim
            for rows, power in ((q[:, :nope], 0.5), (q[:, nope:], 1.0), (kv[:, :nope], 0.5)):
                rows.copy_((rows.double() * gamma[:, None, None] ** power).float())
        else:  # keys are of several heads
            fused = attention.qkv_linear
            groups = local(fused.wqkv.weight).unflatten(0, (fused.wqkv.weight.shape[0] // (96), 6, 16))
            q = groups[:, :4]  # [kv heads, heads of each, d, in]
            q.copy_((q.double() * gamma.view(-1, 4, 1, 1)).float())


def local(weight):
    return weight.to_local() if isinstance(weight, DTensor) else weight.detach()


def whole(weight):
    return (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach().clone()


def weights(parts):
    return {plain(name): whole(each) for part in parts for name, each in part.named_parameters()}


def main(folder, driver, model, layers, *options):
    if any("context_parallel" in each for each in options):
        cpu_ring.register()
    balanced = "unbalanced" not in options
    optimizer = by_hand(model) if driver == "hand" else None
    config = host.configuration(model, layers=int(layers), balanced=balanced, optimizer=optimizer)
    if driver != "hand":
        config.optimizer.lr, config.optimizer.tau, config.optimizer.options = (
            LR,
            TAU,
            {"adamw": ADAMW, "ns_dtype": torch.float32},
        )
    trainer = host.Trainer(host.parse(config, [*options[not balanced :], f"--dump_folder={folder}"]))
    fill(trainer.model_parts)
    probe = DenseMaxima(trainer.model_parts)
    left = {"losses": [], "logged": [], "maxima": [], "clips": [], "before": weights(trainer.model_parts)}
    metrics = trainer.metrics_processor.logger.log

    def logged(values, step):
        left["logged"].append({"step": step, **values})
        metrics(values, step)

    trainer.metrics_processor.logger.log = logged
    taus = {"tau": TAU if driver == "hand" else config.optimizer.tau}

    def after_step(optimizers, args, kwargs):
        seen = probe.take()
        left["maxima"].append(seen)
        if driver == "hand":
            clip_by_hand(trainer.model_parts[0], seen, taus["tau"])
        else:
            left["clips"].append([each.qk_clip.report().to_dict() for each in optimizers])

    def before_step(optimizers, args, kwargs):
        if driver == "killed" and trainer.step == trainer.config.training.steps:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.optimizers.register_step_pre_hook(before_step)
    trainer.optimizers.register_step_post_hook(after_step)
    trainer.train()
    left["after"] = weights(trainer.model_parts)
    left["biases"] = {
        name: whole(each)
        for part in trainer.model_parts
        for name, each in part.named_buffers()
        if "expert_bias" in name
    }
    torch.save(left, Path(folder) / f"rank{dist.get_rank()}.pt")
    trainer.close()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
