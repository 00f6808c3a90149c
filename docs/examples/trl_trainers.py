"""TRL's trainers with MuonClip: SFT, then DPO against its reference model, then GRPO with two inner epochs.

    python trl_trainers.py         # a minute on two cores

Needs muonclip[torch], transformers, trl. The model is a small Llama over bytes, made from a config.
"""

import copy
import inspect
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from muonclip.torch import MuonClip
from muonclip.torch.huggingface import QKClipCallback

TAU = 0.1  # K2: 100; so low that the clip acts on a model as small as this
SHARED = dict(report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=5, bf16=False, seed=0)
SHARED |= dict(activation_checkpointing=False)


def make_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}
    bytes_alone = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_alone, pad_token="<pad>", eos_token="<eos>")


def make_model(tokenizer):
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=1)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads, **special))


def fine_tune(model, tokenizer, lines, out, steps, resume=None):
    arguments = SFTConfig(
        out, max_steps=steps, save_steps=10, per_device_train_batch_size=8, max_length=64, packing=False, **SHARED
    )
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_list([{"text": line} for line in lines]),
        processing_class=tokenizer,
        optimizers=(MuonClip(model, lr=5e-3, tau=TAU), None),  # None: the schedule of the arguments
        callbacks=[QKClipCallback()],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def tell(name, trainer):
    logged = trainer.state.log_history[-2]  # what QKClipCallback adds is next to the loss
    maximum, heads = logged["qk_clip/max_logit"], logged["qk_clip/clipped_heads"]
    print(f"{name}: loss {logged['loss']:.3f}, largest logit {maximum:.2f}, clipped heads {heads:.0f} at τ = {TAU}")


def main():
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    lines = [line for line in Path(inspect.__file__).read_text().splitlines() if len(line) > 30]
    with tempfile.TemporaryDirectory() as folder:
        first = make_model(tokenizer)
        again = copy.deepcopy(first)
        trainer = fine_tune(first, tokenizer, lines, f"{folder}/sft", 20)
        tell("SFT", trainer)

        fine_tune(again, tokenizer, lines, f"{folder}/again", 20, resume=f"{folder}/sft/checkpoint-10")
        same = all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
        print("resumed after ten steps: the same weights to the bit:", same)

        model = LlamaForCausalLM.from_pretrained(f"{folder}/sft/checkpoint-20")
        pairs = [
            {"prompt": a[:12], "chosen": a[12:], "rejected": b[12:]} for a, b in zip(lines, lines[::-1], strict=True)
        ]
        dpo = DPOTrainer(
            model,  # its reference is loaded from the same checkpoint
            args=DPOConfig(f"{folder}/dpo", max_steps=10, per_device_train_batch_size=4, max_length=64, **SHARED),
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
            optimizers=(MuonClip(model, lr=1e-3, tau=TAU), None),
            callbacks=[QKClipCallback()],
        )
        dpo.train()
        tell("DPO", dpo)

        model = LlamaForCausalLM.from_pretrained(f"{folder}/sft/checkpoint-20")
        grpo = GRPOTrainer(
            model,
            reward_funcs=lambda completions, **_: [text.count(" ") / max(len(text), 1) for text in completions],
            args=GRPOConfig(
                f"{folder}/grpo",
                max_steps=8,
                per_device_train_batch_size=8,
                num_generations=4,
                num_iterations=2,  # every batch of completions trains twice
                max_completion_length=16,
                **SHARED,
            ),
            train_dataset=Dataset.from_list([{"prompt": line[:12]} for line in lines]),
            processing_class=tokenizer,
            optimizers=(MuonClip(model, lr=1e-3, tau=TAU), None),
            callbacks=[QKClipCallback()],
        )
        grpo.train()
        tell("GRPO", grpo)


if __name__ == "__main__":
    main()
