"""LoRA with PEFT: adapters first, then the optimizer. The base is frozen, so that heads above τ are only reported.

    python peft_lora.py         # seconds on two cores

Needs muonclip[torch], transformers, peft, tqdm.
"""

import inspect
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM

from muonclip.torch import MuonClip

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=1,
    eos_token_id=2,
)
base = LlamaForCausalLM(config)  # a pretrained model in practice
before = {name: value.clone() for name, value in base.state_dict().items()}

model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
optimizer = MuonClip(model, lr=5e-3, tau=0.5)  # K2's τ is 100; low, so that heads of a model as small as this exceed it

text = torch.tensor(list(Path(inspect.__file__).read_bytes()))
for _ in (bar := trange(60)):
    starts = torch.randint(len(text) - 64, (8, 1))
    windows = text[starts + torch.arange(64)]
    loss = model(input_ids=windows, labels=windows).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    bar.set_postfix(loss=f"{loss.item():.3f}")

print(optimizer.plan)
print(optimizer.qk_clip.report())
now = {name.replace(".base_layer", ""): value for name, value in base.state_dict().items()}
print("the base is the same to the bit:", all(torch.equal(value, now[name]) for name, value in before.items()))
