"""One rank of `test_engines.py`: an engine trains its replica on its own data with the clip firing, and saves what it
ended with. Its replicas begin different: it is the engine that makes them the same; but for shards."""

import functools
import logging
import sys
from pathlib import Path

import accelerate
import lightning
import torch
import torch.distributed as dist
import transformers
from accelerate.utils import DistributedType
from tiny_llama import Probe, tiny_llama, tiny_tokens
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from muonclip.torch import MuonClip
from muonclip.torch.huggingface import MuonClipFactory, QKClipCallback

STEPS, SIZE = 6, 3
OPTIONS = dict(lr=1e-2, weight_decay=0.1, tau=2.0)


def loss_of(model, tokens):
    return model(input_ids=tokens, labels=tokens).loss


def with_trainer(model, tokens, folder):
    clipped = []

    class Watch(transformers.TrainerCallback):
        def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            clipped.append(optimizer.optimizer.qk_clip.report().clipped_heads)

    arguments = transformers.TrainingArguments(
        str(folder / "out"),
        max_steps=STEPS,
        per_device_train_batch_size=SIZE,
        logging_steps=2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=[dict(input_ids=row, labels=row) for row in tokens],
        optimizer_cls_and_kwargs=(MuonClipFactory, OPTIONS),
        callbacks=[QKClipCallback(), Watch()],
    )
    trainer.train()
    logged = [logs["qk_clip/clipped_heads"] for logs in trainer.state.log_history if "loss" in logs]
    if trainer.is_world_process_zero():
        assert logged == [max(clipped[i : i + 2]) for i in range(0, STEPS, 2)]
    return clipped


def accelerated(accelerator, model, optimizer, loader):
    clipped = []
    for batch in loader:
        accelerator.backward(loss_of(model, batch))
        optimizer.step()
        optimizer.zero_grad()
        clipped.append(optimizer.optimizer.qk_clip.report().clipped_heads)
    return clipped


def with_accelerate(model, tokens, folder):
    accelerator = accelerate.Accelerator(cpu=True)
    loader = torch.utils.data.DataLoader(tokens, batch_size=SIZE)
    replica, optimizer, loader = accelerator.prepare(model, MuonClip(model, **OPTIONS), loader)
    assert type(replica) is torch.nn.parallel.DistributedDataParallel
    return accelerated(accelerator, replica, optimizer, loader)


def with_accelerate_fsdp2(model, tokens, folder):
    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"]
    )
    accelerator = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin)
    # accelerate shards on accelerators only; its way of doing so is the same on a CPU.
    accelerator.state._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    optimizer = MuonClip(model, **OPTIONS)
    loader = torch.utils.data.DataLoader(tokens, batch_size=SIZE)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # for gloo
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return accelerated(accelerator, model, optimizer, loader)


class LitLlama(lightning.LightningModule):
    def __init__(self, model, whole):
        super().__init__()
        self.model, self.whole, self.clipped = model, whole, []

    def training_step(self, tokens, index):
        return loss_of(self.model, tokens)

    def configure_optimizers(self):
        return MuonClip(self if self.whole else self.model, **OPTIONS)

    def on_train_batch_end(self, *args):
        self.clipped.append(self.optimizers().qk_clip.report().clipped_heads)


def with_lightning(model, tokens, folder, whole=False):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = LitLlama(model, whole)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=STEPS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(tokens, batch_size=SIZE))
    return module.clipped


ENGINES = dict(
    trainer=with_trainer,
    accelerate=with_accelerate,
    accelerate_fsdp2=with_accelerate_fsdp2,
    lightning=with_lightning,
    lightning_whole=functools.partial(with_lightning, whole=True),
)

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, folder = dist.get_rank(), Path(sys.argv[2])
    model = tiny_llama(seed=0 if sys.argv[1] == "accelerate_fsdp2" else rank)
    probe = Probe(model)
    clipped = ENGINES[sys.argv[1]](model, tiny_tokens(STEPS * SIZE * 2), folder)
    assert len(clipped) == STEPS, clipped
    seen = torch.cat([x for x, _ in probe.take()[0]])
    weights = {n: w.full_tensor() if isinstance(w, DTensor) else w for n, w in model.state_dict().items()}
    torch.save({"model": weights, "clipped": clipped, "seen": seen}, folder / f"{rank}.pt")
    dist.barrier()
    if dist.is_initialized():
        dist.destroy_process_group()
