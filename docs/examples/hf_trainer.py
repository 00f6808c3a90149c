"""Hugging Face Trainer: a Llama made from a config, MuonClip by one argument, the clip in the logs.

    python hf_trainer.py         # half a minute on two cores

Needs muonclip[torch], transformers, accelerate.
"""

import inspect
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from muonclip.torch.huggingface import MuonClipFactory, QKClipCallback

LENGTH = 64

config = LlamaConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=1,
    eos_token_id=2,
)
text = torch.tensor(list(Path(inspect.__file__).read_bytes()))
windows = text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)
rows = [{"input_ids": window, "labels": window} for window in windows]

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        max_steps=100,
        per_device_train_batch_size=16,
        warmup_steps=10,
        lr_scheduler_type="cosine",
        logging_steps=20,
        eval_strategy="steps",
        eval_steps=50,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(
        LlamaForCausalLM(config),
        arguments,
        train_dataset=rows[:-64],
        eval_dataset=rows[-64:],
        # lr and weight_decay are given here: learning_rate of the arguments does not reach a custom optimizer
        optimizer_cls_and_kwargs=(MuonClipFactory, dict(lr=5e-3, weight_decay=0.1, tau=100.0)),
        callbacks=[QKClipCallback()],
    )
    trainer.train()

optimizer = trainer.optimizer.optimizer  # accelerate's wrapper is around it
print(optimizer.plan)
print(optimizer.qk_clip.report())
