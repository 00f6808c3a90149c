"""TRL's trainers: each step is clipped once, by the largest logits of the forwards that its gradients come from."""

import contextlib
import copy

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar, enable_progress_bar
from peft import LoraConfig, get_peft_model
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl_probe import OPTIONS, EachStep, llama, sentences, tokenizer

from muonclip.torch import MuonClip, QKClip
from muonclip.torch.huggingface import MuonClipFactory, QKClipCallback

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of TRL and PEFT, which call what is to go

TAU = 0.8
TRAINERS = {"dpo": (DPOTrainer, DPOConfig), "grpo": (GRPOTrainer, GRPOConfig), "sft": (SFTTrainer, SFTConfig)}


@pytest.fixture(autouse=True)
def _engines_are_quiet_and_fresh():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    yield
    enable_progress_bar()
    transformers.utils.logging.enable_progress_bar()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def muonclip(model, observe="always", **options):
    clip = QKClip(model, tau=TAU, observe=observe, **options)
    return MuonClip(model, qk_clip=clip, **OPTIONS)


def rows_of(kind, number=12):
    lines = sentences(number)
    if kind == "sft":
        return [{"text": line} for line in lines]
    if kind == "grpo":
        return [{"prompt": line} for line in lines]
    others = sentences(2 * number, seed=1)
    return [
        {"prompt": line, "chosen": " " + one, "rejected": " " + other}
        for line, one, other in zip(lines, others[:number], others[number:], strict=True)
    ]


def trainer_of(kind, folder, model, optimizer, callbacks=(), more=None, **arguments):
    trainer, config = TRAINERS[kind]
    defaults = dict(
        max_steps=4,
        per_device_train_batch_size=4,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_steps=2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        seed=0,
    )
    optimizers = {} if optimizer is None else dict(optimizers=(optimizer, None))
    return trainer(
        model=model,
        args=config(str(folder), **(defaults | arguments)),
        train_dataset=Dataset.from_list(rows_of(kind)),
        processing_class=tokenizer(),
        callbacks=list(callbacks),
        **optimizers,
        **(more or {}),
    )


@pytest.mark.parametrize("checkpointing", [True, False], ids=["recomputed", "kept"])
def test_sft_counts_all_micro_batches_of_a_step(checkpointing, tmp_path):
    model = llama()
    each = EachStep(model, llama())
    arguments = dict(gradient_accumulation_steps=2, gradient_checkpointing=checkpointing, per_device_train_batch_size=3)
    trainer_of("sft", tmp_path, model, muonclip(model), [each], max_steps=2, **arguments).train()
    each.check(2, TAU)


@pytest.mark.parametrize("reference", ["given", "followed", "computed before"])
def test_dpo_leaves_the_reference_model_out(reference, tmp_path):
    model = llama()
    optimizer = muonclip(model)
    each = EachStep(model, llama())
    ref = copy.deepcopy(llama(seed=1))
    with torch.no_grad():
        for layer in ref.model.layers:  # whose logits are larger than any of the policy
            layer.self_attn.q_proj.weight.mul_(20)
    more, arguments = dict(ref_model=ref), {}
    if reference == "followed":
        arguments = dict(sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.5)
    elif reference == "computed before":
        more, arguments = {}, dict(precompute_ref_log_probs=True)
    before = copy.deepcopy(ref.state_dict())
    trainer_of("dpo", tmp_path, model, optimizer, [each], more, **arguments).train()
    each.check(4, TAU)
    changed = [name for name, value in ref.state_dict().items() if not torch.equal(value, before[name])]
    assert bool(changed) == (reference == "followed")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_grpo_clips_once_in_each_inner_epoch(accumulate, tmp_path):
    model = llama()
    each = EachStep(model, llama())
    optimizer = muonclip(model)
    generation = dict(num_generations=2, num_iterations=2, max_completion_length=5, beta=0.1, temperature=2.0)
    ref = dict(gradient_accumulation_steps=accumulate, steps_per_generation=2)
    rewards = dict(reward_funcs=lambda completions, **_: [float(sum(map(ord, text)) % 7) for text in completions])
    model.config._name_or_path = _saved(model, tmp_path / "reference")
    trainer_of("grpo", tmp_path, model, optimizer, [each], rewards, **generation, **ref).train()
    each.check(4, TAU)
    assert each.forwards[0] > accumulate + 2  # generation, and log-probabilities of the old policy, ran too


def _saved(model, folder):
    model.save_pretrained(folder)
    return str(folder)


def lora(model):
    return get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    )


@pytest.mark.parametrize("clip_frozen", [False, True])
def test_dpo_with_an_adapter_leaves_the_pass_without_it_out(clip_frozen, tmp_path):
    model = lora(llama())
    optimizer = muonclip(model, clip_frozen=clip_frozen)
    each = EachStep(model)
    trainer = trainer_of("dpo", tmp_path, model, optimizer, [each])
    with pytest.warns(UserWarning, match="frozen") if not clip_frozen else contextlib.nullcontext():
        trainer.train()
    torch.testing.assert_close(torch.stack(each.maxima), torch.stack(each.expected), rtol=1e-5, atol=1e-6)
    assert any((gammas < 1).any() for gammas in each.gammas) == clip_frozen


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_a_run_that_is_resumed_ends_at_the_same_weights(kind, tmp_path):
    rewards = dict(reward_funcs=lambda completions, **_: [float(sum(map(ord, text)) % 7) for text in completions])
    more = rewards if kind == "grpo" else {}
    arguments = dict(save_strategy="steps", save_steps=2, save_only_model=False)
    arguments |= dict(num_generations=2, num_iterations=2, max_completion_length=5) if kind == "grpo" else {}
    first, again = llama(), llama()
    trainer_of(kind, tmp_path, first, muonclip(first), (), more, **arguments).train()
    optimizer = muonclip(again)
    trainer = trainer_of(kind, tmp_path / "again", again, optimizer, (), more, **arguments)
    trainer.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-2")
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_adapter_that_the_trainer_makes(tmp_path):
    adapter = LoraConfig(r=4, target_modules=["q_proj", "k_proj"])
    more = dict(peft_config=adapter, optimizer_cls_and_kwargs=(MuonClipFactory, dict(OPTIONS, tau=TAU)))
    trainer = trainer_of("sft", tmp_path, llama(), None, [QKClipCallback()], more)
    with pytest.warns(UserWarning, match="frozen"):
        trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert optimizer.qk_clip.report().steps == 4
    assert "lora_A" in str(optimizer.plan)


def test_an_optimizer_made_before_the_adapter_is_refused(tmp_path):
    model = llama()
    trainer = trainer_of("sft", tmp_path, model, muonclip(model), (), dict(peft_config=LoraConfig(r=4)))
    with pytest.raises(ValueError, match="QK-Clip does not understand these attentions"):
        trainer.train()
