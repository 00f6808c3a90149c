"""Engines that call the optimizer: Hugging Face's Trainer, accelerate, Lightning. And QK-Clip after other optimizers.

Wherever an engine only adds its loop, its weights are compared with those of a plain loop, bit for bit.
"""

import copy
import logging
from pathlib import Path

import accelerate
import lightning
import pytest
import torch
import transformers
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from forked_ranks import run_ranks
from tiny_llama import HEAD, HEADS, LAYERS, Probe, attentions_of, tiny_llama, tiny_tokens
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.optimization import Adafactor

from muonclip.torch import Monitor, MuonClip, QKClip
from muonclip.torch import lightning as muonclip_lightning
from muonclip.torch.huggingface import MonitorCallback, MuonClipFactory, QKClipCallback

pytestmark = [
    # Lightning's loaders ask torch in a way that torch has given up.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers:UserWarning"),
]

WORKER = Path(__file__).parents[1] / "support" / "engine_worker.py"
OPTIONS = dict(lr=1e-2, weight_decay=0.1, tau=2.0)


@pytest.fixture(autouse=True)
def _engines_are_quiet_and_fresh():
    _forget_accelerators()
    transformers.utils.logging.disable_progress_bar()
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    transformers.utils.logging.enable_progress_bar()
    _forget_accelerators()


def _forget_accelerators():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def batches_of(number, seed=0, size=4):
    return list(tiny_tokens(number * size, seed).split(size))


def loss_of(model, tokens):
    return model(input_ids=tokens, labels=tokens).loss


def plain_loop(
    batches, *, model=None, accumulate=1, clip_gradients=None, schedule=None, options=OPTIONS, every_step=None
):
    """The model after training without an engine, and its optimizer."""
    model = tiny_llama() if model is None else model
    optimizer = MuonClip(model, **options)
    scheduler = schedule and schedule(optimizer)
    for start in range(0, len(batches), accumulate):
        for tokens in batches[start : start + accumulate]:
            (loss_of(model, tokens) / accumulate).backward()
        if clip_gradients:
            clip_gradients(model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()
        if every_step:
            every_step(optimizer)
    return model, optimizer


def assert_same_weights(model, other):
    expected = other.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def by_norm(parameters):
    nn.utils.clip_grad_norm_(parameters, 0.5)


def by_value(parameters):
    nn.utils.clip_grad_value_(parameters, 0.01)


def differ(model, other):
    return any(not torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


# Hugging Face's Trainer


def trainer_of(folder, batches, *, model=None, options=OPTIONS, callbacks=(), **arguments):
    defaults = dict(
        per_device_train_batch_size=len(batches[0]),
        max_steps=len(batches) // arguments.get("gradient_accumulation_steps", 1),
        lr_scheduler_type="constant",
        max_grad_norm=0,
        train_sampling_strategy="sequential",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = [dict(input_ids=tokens, labels=tokens) for tokens in torch.cat(batches)]
    model = tiny_llama() if model is None else model
    model.accepts_loss_kwargs = False  # the mean of each micro-batch, as in the plain loop
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(str(folder), **{**defaults, **arguments}),
        train_dataset=rows,
        eval_dataset=rows[:2],
        optimizer_cls_and_kwargs=(MuonClipFactory, dict(options)),
        callbacks=list(callbacks),
    )


class AtEachStep(transformers.TrainerCallback):
    """Keeps what `look(optimizer)` returns right after each step of the optimizer, itself unwrapped."""

    def __init__(self, look):
        self.look, self.seen = look, []

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        assert type(optimizer) is AcceleratedOptimizer
        self.seen.append(self.look(optimizer.optimizer))


def test_trainer_trains_as_a_plain_loop_does(tmp_path):
    batches = batches_of(6)
    clipped = []
    plain, _ = plain_loop(
        batches, every_step=lambda optimizer: clipped.append(optimizer.qk_clip.report().clipped_heads)
    )
    trainer = trainer_of(tmp_path, batches)
    trainer.train()
    assert type(trainer.optimizer.optimizer) is MuonClip
    assert clipped[0] > 4
    assert_same_weights(trainer.model, plain)


def test_trainer_s_schedule_and_gradient_clipping_are_the_usual_ones(tmp_path):
    batches = batches_of(6)

    def schedule(optimizer):
        return transformers.get_linear_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=6)

    plain, _ = plain_loop(batches, clip_gradients=by_norm, schedule=schedule)
    trainer = trainer_of(tmp_path, batches, lr_scheduler_type="linear", warmup_steps=2, max_grad_norm=0.5)
    trainer.train()
    assert_same_weights(trainer.model, plain)
    assert differ(plain, plain_loop(batches, schedule=schedule)[0])
    assert differ(plain, plain_loop(batches, clip_gradients=by_norm)[0])


def test_trainer_clips_by_the_maximum_over_micro_batches(tmp_path):
    batches = batches_of(2)
    model = tiny_llama()
    probe = Probe(model)
    arguments = dict(gradient_accumulation_steps=2, max_steps=1)
    trainer_of(tmp_path, batches, model=model, **arguments).train()
    inputs = probe.take()
    assert [len(forwards) for forwards in inputs] == [2, 2]

    unclipped = tiny_llama()
    without_clip = {name: value for name, value in OPTIONS.items() if name != "tau"} | {"qk_clip": None}
    trainer_of(tmp_path, batches, model=unclipped, options=without_clip, **arguments).train()
    start = tiny_llama()
    start_probe = Probe(start)
    maxima = start_probe.maxima(inputs)
    per_forward = torch.stack([start_probe.maxima([[forwards[i]] for forwards in inputs]) for i in (0, 1)])
    largest_in = per_forward.argmax(0)
    fires = maxima > OPTIONS["tau"]
    assert set(largest_in[fires].tolist()) == {0, 1}, "either micro-batch must decide for some head"

    # Keys are shared, so the query's rows take all of gamma.
    gamma = (OPTIONS["tau"] / maxima).clamp(max=1)
    expected = unclipped.state_dict()
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        rows = expected[name].unflatten(0, (HEADS, HEAD))
        expected[name] = (rows * gamma[layer].float()[:, None, None]).flatten(0, 1)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=0, msg=name)
        if "q_proj" not in name:
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("per_head", [False, True])
def test_trainer_resumes_to_the_bit(tmp_path, per_head):
    batches = batches_of(4)
    options = {**OPTIONS, "per_head": per_head}
    arguments = dict(lr_scheduler_type="linear", train_sampling_strategy="random", seed=3, options=options)
    straight = trainer_of(tmp_path / "straight", batches, **arguments)
    straight.train()
    first = trainer_of(tmp_path / "parts", batches, **arguments, save_strategy="steps", save_steps=2)
    first.train()
    assert_same_weights(first.model, straight.model)
    resumed = trainer_of(tmp_path / "parts", batches, model=tiny_llama(seed=1), **arguments)
    steps = AtEachStep(lambda optimizer: optimizer.qk_clip.report().clipped_heads)
    resumed.add_callback(steps)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert len(steps.seen) == 2
    assert max(steps.seen) > 0
    assert_same_weights(resumed.model, straight.model)


def test_trainer_evaluates_in_between_and_trains_a_second_time(tmp_path):
    batches = batches_of(3)
    trainer = trainer_of(tmp_path, batches, eval_strategy="steps", eval_steps=1)
    trainer.train()
    plain, _ = plain_loop(batches)
    assert_same_weights(trainer.model, plain)
    trainer.train()
    assert trainer.optimizer.optimizer.qk_clip.report().steps == 6


def test_trainer_recomputes_activations(tmp_path):
    batches = batches_of(3)
    trainer = trainer_of(tmp_path, batches, activation_checkpointing=True)
    trainer.train()
    plain, _ = plain_loop(batches)
    assert_same_weights(trainer.model, plain)


def test_the_factory_takes_muonclip_s_options_and_lacks_defaults_where_the_trainer_s_would_be_expected():
    model = tiny_llama()
    optimizer = MuonClipFactory()(model, lr=3e-3, weight_decay=0.2, tau=7.0, momentum=0.9, adamw=dict(betas=(0.8, 0.9)))
    assert optimizer.qk_clip.tau == 7.0
    assert {group["lr"] for group in optimizer.param_groups} == {3e-3}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.2}
    assert {group["momentum"] for group in optimizer.param_groups if group["use"] == "muon"} == {0.9}
    assert {group["betas"] for group in optimizer.param_groups if group["use"] == "adamw"} == {(0.8, 0.9)}
    for missing in ("lr", "weight_decay"):
        with pytest.raises(TypeError, match=f"'{missing}'"):
            MuonClipFactory()(model, **{name: 0.1 for name in ("lr", "weight_decay") if name != missing})


# What the Trainer logs


class Logger(transformers.TrainerCallback):
    """A logger as those of `report_to`: it takes what is in `logs` when its turn comes."""

    def __init__(self):
        self.heard = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.heard.append(dict(logs))


def clip_values(logs):
    return {name: value for name, value in logs.items() if name.startswith("qk_clip/")}


def logging_run(folder, steps, **arguments):
    """The trainer, a report's scalars for each step, and what a logger behind the callback heard."""
    reports, logger = AtEachStep(lambda optimizer: optimizer.qk_clip.report().scalars()), Logger()
    callbacks = [reports, QKClipCallback(), logger]
    arguments = {"logging_strategy": "steps", **arguments}
    trainer = trainer_of(folder, batches_of(steps), callbacks=callbacks, **arguments)
    trainer.train()
    return trainer, reports.seen, logger.heard


def test_logs_have_the_numbers_of_the_report(tmp_path, capsys):
    trainer, reports, heard = logging_run(tmp_path, 4, logging_steps=1)
    assert [clip_values(logs) for logs in trainer.state.log_history] == [*reports, {}]  # and the summary
    assert [clip_values(logs) for logs in heard] == [*reports, {}]
    assert len({report["qk_clip/max_logit"] for report in reports}) == 4
    assert capsys.readouterr().out.count("'qk_clip/clipped_heads'") == 4  # the printer is behind the callback, too


def test_a_monitor_is_logged_next_to_muonclip_and_changes_nothing(tmp_path):
    trainers = []
    for callbacks in ([], [monitored := MonitorCallback()]):
        trainers.append(
            trainer_of(tmp_path, batches_of(3), callbacks=callbacks, logging_strategy="steps", logging_steps=1)
        )
        trainers[-1].train()
    first, *_, last, summary = trainers[1].state.log_history
    assert "monitor/max_logit" in first
    assert last["monitor/update_rms.max"] == max(
        each.update_rms.max() for each in monitored.monitor.matrices().values()
    )
    assert not any(name.startswith("monitor/") for name in summary)
    assert_same_weights(trainers[1].model, trainers[0].model)


def test_logs_have_the_extremes_of_the_steps_since_the_last_log(tmp_path):
    trainer, reports, _ = logging_run(tmp_path, 6, logging_steps=3)
    logged = [clip_values(logs) for logs in trainer.state.log_history[:-1]]
    assert len(logged) == 2
    of_last_step_only = 0
    for values, steps in zip(logged, (reports[:3], reports[3:]), strict=True):
        for name, extreme in dict(bound=max, max_logit=max, clipped_heads=max, min_gamma=min).items():
            name = f"qk_clip/{name}"
            assert values[name] == extreme(step[name] for step in steps if name in step), name
            of_last_step_only += values[name] == steps[-1].get(name)
        assert values["qk_clip/last_clipped_step"] == steps[-1]["qk_clip/last_clipped_step"]
    assert logged[0]["qk_clip/clipped_heads"] > logged[1]["qk_clip/clipped_heads"], "a log begins anew"
    assert of_last_step_only < 8


class NoReading(TorchDispatchMode):
    """Refuses to take a value off its device, which would wait for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_callback_reports_at_logs_alone_and_reads_no_value_in_between(tmp_path, monkeypatch):
    watched, _, _ = logging_run(tmp_path, 6, logging_steps=3)
    calls, report, on_step = [], QKClip.report, QKClipCallback.on_optimizer_step

    def without_reading(self, *args, **kwargs):
        with NoReading():
            return on_step(self, *args, **kwargs)

    monkeypatch.setattr(QKClip, "report", lambda self: calls.append(self) or report(self))
    monkeypatch.setattr(QKClipCallback, "on_optimizer_step", without_reading)
    arguments = dict(callbacks=[QKClipCallback()], logging_strategy="steps", logging_steps=3)
    trainer = trainer_of(tmp_path, batches_of(6), **arguments)
    trainer.train()
    assert len(calls) == 2
    assert list(map(clip_values, trainer.state.log_history)) == list(map(clip_values, watched.state.log_history))
    with pytest.raises(AssertionError), NoReading():
        torch.ones(1).item()


def test_without_an_exact_maximum_there_is_none_in_the_logs(tmp_path):
    trainer, reports, _ = logging_run(tmp_path, 1, logging_steps=1, options={**OPTIONS, "tau": 1e4})
    values = clip_values(trainer.state.log_history[0])
    assert values == reports[0]
    assert set(values) == {f"qk_clip/{name}" for name in ("bound", "clipped_heads", "min_gamma", "last_clipped_step")}


def test_logs_of_evaluations_have_nothing_of_the_clip(tmp_path):
    logger = Logger()
    callbacks = [QKClipCallback(prefix="clip_"), logger]
    arguments = dict(logging_strategy="steps", logging_steps=2, eval_strategy="steps", eval_steps=1)
    trainer_of(tmp_path, batches_of(2), callbacks=callbacks, **arguments).train()
    kinds = [("eval_loss" in logs, "clip_bound" in logs) for logs in logger.heard]
    assert kinds == [(True, False), (False, True), (True, False), (False, False)]


def test_the_callback_in_front_reaches_every_logger(tmp_path):
    logger = Logger()
    trainer = trainer_of(tmp_path, batches_of(2), callbacks=[logger], logging_strategy="steps", logging_steps=1)
    trainer.callback_handler.callbacks.insert(0, QKClipCallback())
    trainer.train()
    assert [bool(clip_values(logs)) for logs in logger.heard] == [True, True, False]


def test_the_callback_logs_a_clip_behind_another_optimizer_and_refuses_where_there_is_none(tmp_path):
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    clip = QKClip(model, tau=2.0)
    optimizer.register_step_post_hook(lambda *_: clip.step())
    reports = AtEachStep(lambda _: clip.report().scalars())
    trainer = trainer_of(tmp_path, batches_of(3), model=model, logging_strategy="steps", logging_steps=1)
    trainer.optimizer_cls_and_kwargs = None
    trainer.optimizer = optimizer
    for callback in (reports, QKClipCallback(clip)):
        trainer.add_callback(callback)
    trainer.train()
    assert [clip_values(logs) for logs in trainer.state.log_history] == [*reports.seen, {}]
    assert reports.seen[0]["qk_clip/clipped_heads"] > 4

    trainer.pop_callback(QKClipCallback)
    trainer.add_callback(QKClipCallback())
    with pytest.raises(ValueError, match=r"found no QK-Clip in the optimizer, AdamW\. Use MuonClip"):
        trainer.train()


# Steps that a GradScaler skips


def overflowing_scaler():
    """Its first scale makes every gradient infinite; the next one does not."""
    return torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120, growth_interval=1000)


def test_the_trainer_s_callback_passes_over_skipped_steps(tmp_path):
    reports = AtEachStep(lambda optimizer: (optimizer.qk_clip.report().steps, optimizer.qk_clip.report().scalars()))
    arguments = dict(callbacks=[reports, QKClipCallback()], logging_strategy="steps", logging_steps=1)
    trainer = trainer_of(tmp_path, batches_of(3), **arguments)
    trainer.accelerator.scaler = overflowing_scaler()
    trainer.train()
    assert [steps for steps, _ in reports.seen] == [0, 1, 2]
    logged = [clip_values(logs) for logs in trainer.state.log_history]
    assert logged == [{}, reports.seen[1][1], reports.seen[2][1], {}]


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("logits_overflow", [False, True])
def test_a_skipped_step_clips_nothing_and_the_next_one_does(accelerated, logits_overflow):
    """An overflow of the scaled gradients alone, or of the logits, which every gradient then shows."""
    model = tiny_llama()
    probe = Probe(model)
    before = copy.deepcopy(model.state_dict())
    optimizer = MuonClip(model, **OPTIONS)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if logits_overflow else overflowing_scaler()
    skipped, kept = batches_of(2)
    if accelerated:
        accelerate.Accelerator(cpu=True)
        wrapped = AcceleratedOptimizer(optimizer, scaler=scaler)

    def step():
        if accelerated:
            wrapped.step()
        else:
            scaler.step(optimizer)
            scaler.update()

    weight = attentions_of(model)[-1].q_proj.weight
    if logits_overflow:
        with torch.no_grad():
            weight[:, 0] = torch.inf
    scaler.scale(loss_of(model, skipped)).backward()
    inputs = probe.take()
    if logits_overflow:
        inputs[-1].clear()  # none of its logits was finite
        with torch.no_grad():
            weight.copy_(before[f"model.layers.{LAYERS - 1}.self_attn.q_proj.weight"])
    step()
    assert not accelerated or wrapped.step_was_skipped
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for state in optimizer.state.values():  # accelerate asks for it when it wraps the optimizer
        assert not any(value.any() for value in state.values())
    assert optimizer.qk_clip.report().steps == 0

    optimizer.zero_grad()
    scaler.scale(loss_of(model, kept)).backward()
    maxima = probe.maxima([first + second for first, second in zip(inputs, probe.take(), strict=True)])
    step()
    report = optimizer.qk_clip.report()
    assert report.steps == 1
    fires = maxima > OPTIONS["tau"]
    assert int(fires.sum()) == report.clipped_heads > 4
    seen = torch.stack([layer.max_logits for layer in report.layers.values()])
    torch.testing.assert_close(seen[fires].double(), maxima[fires], rtol=1e-5, atol=0)
    assert differ(model, tiny_llama())


# accelerate


@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate_trains_as_a_plain_loop_does(accumulate):
    batches = batches_of(4)
    plain, _ = plain_loop(batches, accumulate=accumulate, clip_gradients=by_norm)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = tiny_llama()
    loader = torch.utils.data.DataLoader(torch.cat(batches), batch_size=len(batches[0]))
    model, optimizer, loader = accelerator.prepare(model, MuonClip(model, **OPTIONS), loader)
    for tokens in loader:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, tokens))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    assert optimizer.optimizer.qk_clip.report().steps == 4 // accumulate
    assert optimizer.optimizer.qk_clip.report().clipped_heads > 0
    assert_same_weights(accelerator.unwrap_model(model), plain)


@pytest.mark.parametrize("per_head", [False, True])
def test_parameters_replaced_after_the_optimizer_was_built_are_found(per_head):
    """As accelerate's FSDP2 replaces them: the modules get new ones, the groups too, by position."""
    options = {**OPTIONS, "per_head": per_head}
    batches = batches_of(3)
    plain, _ = plain_loop(batches, options=options)
    model = tiny_llama()
    optimizer = MuonClip(model, **options)
    assert "above tau" in str(optimizer.plan)  # whoever keeps parameters has had an occasion now
    optimizer.load_state_dict(optimizer.state_dict())  # as accelerate does
    old = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    new = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            new[parameter] = nn.Parameter(parameter.detach().clone())
            module.register_parameter(name, new[parameter])
    for group in optimizer.param_groups:
        group["params"] = [new[parameter] for parameter in group["params"]]
    for tokens in batches:
        loss_of(model, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.qk_clip.report().last_clipped_step > 0
    assert_same_weights(model, plain)
    for name, (parameter, value) in old.items():
        assert torch.equal(parameter, value), name


# Lightning


class LitLlama(lightning.LightningModule):
    def __init__(self, whole, seed=0):
        super().__init__()
        self.model, self.whole = tiny_llama(seed), whole
        self.reports = []

    def training_step(self, tokens, index):
        return loss_of(self.model, tokens)

    def configure_optimizers(self):
        return MuonClip(self if self.whole else self.model, **OPTIONS)

    def on_train_batch_end(self, *args):
        report = self.optimizers().qk_clip.report()
        self.log_dict(report.scalars())
        self.reports.append(report)


class ManualLlama(LitLlama):
    """The loop is the user's, and the step has no closure."""

    automatic_optimization = False

    def training_step(self, tokens, index):
        optimizer = self.optimizers()
        self.manual_backward(loss_of(self.model, tokens))
        optimizer.step()
        optimizer.zero_grad()


def fit(module, folder, batches, checkpoint=None, **arguments):
    defaults = dict(max_steps=len(batches) // arguments.get("accumulate_grad_batches", 1), max_epochs=-1)
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, default_root_dir=folder, **{**defaults, **quiet, **arguments}
    )
    loader = torch.utils.data.DataLoader(torch.cat(batches), batch_size=len(batches[0]))
    trainer.fit(module, loader, ckpt_path=checkpoint)
    return trainer


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning_trains_as_a_plain_loop_does(tmp_path, whole, accumulate):
    batches = batches_of(4)
    plain, _ = plain_loop(batches, accumulate=accumulate, clip_gradients=by_value)
    module = LitLlama(whole)
    clipping = dict(gradient_clip_val=0.01, gradient_clip_algorithm="value")  # by norm it sums in another order
    trainer = fit(module, tmp_path, batches, accumulate_grad_batches=accumulate, **clipping)
    assert_same_weights(module.model, plain)
    last = module.reports[-1]
    assert last.steps == 4 // accumulate
    assert max(report.clipped_heads for report in module.reports) > 4
    prefix = "model." if whole else ""
    assert list(last.layers) == [f"{prefix}model.layers.{layer}.self_attn" for layer in range(LAYERS)]
    logged = {name: value.item() for name, value in trainer.logged_metrics.items()}
    assert logged == pytest.approx(last.scalars(), rel=1e-6)


def test_lightning_s_manual_optimization_is_a_plain_loop(tmp_path):
    batches = batches_of(3)
    module = ManualLlama(whole=False)
    fit(module, tmp_path, batches)
    assert module.reports[-1].steps == 3
    assert_same_weights(module.model, plain_loop(batches)[0])


@pytest.mark.parametrize("whole", [False, True])
def test_lightning_resumes_to_the_bit(tmp_path, whole):
    batches = batches_of(2)
    plain, _ = plain_loop([*batches, *batches])
    first = fit(LitLlama(whole), tmp_path, batches, max_epochs=1, max_steps=-1)
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = LitLlama(whole, seed=1)
    fit(resumed, tmp_path, batches, checkpoint=tmp_path / "half.ckpt", max_epochs=2, max_steps=-1)
    assert len(resumed.reports) == 2
    assert sum(report.clipped_heads for report in resumed.reports) > 0
    assert_same_weights(resumed.model, plain)


class PlainLlama(LitLlama):
    """Any optimizer, and no logging of its own."""

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def on_train_batch_end(self, *args): ...


class Logged(lightning.pytorch.loggers.CSVLogger):
    """Keeps what it is given."""

    def __init__(self, folder):
        super().__init__(folder)
        self.values = {}

    def log_metrics(self, metrics, step=None):
        self.values[step] = metrics


def test_lightning_logs_what_a_monitor_sees(tmp_path, monkeypatch):
    """The same dict as by hand, as often as the Trainer logs, and no bit of the training changes."""
    batches, waits, scalars = batches_of(8), [], Monitor.scalars
    monkeypatch.setattr(Monitor, "scalars", lambda self, prefix: waits.append(prefix) or scalars(self, prefix))
    module, callback = PlainLlama(whole=True), muonclip_lightning.MonitorCallback(every=2)
    logger = Logged(tmp_path)
    fit(module, tmp_path, batches, callbacks=[callback], logger=logger, log_every_n_steps=2, accumulate_grad_batches=2)
    assert len(waits) == 2  # of four steps
    monkeypatch.undo()
    plain = PlainLlama(whole=True)
    fit(plain, tmp_path, batches, accumulate_grad_batches=2)
    assert_same_weights(module.model, plain.model)

    by_hand = PlainLlama(whole=True)
    optimizer, expected = by_hand.configure_optimizers(), {}
    monitor = Monitor(by_hand, optimizer, every=2)
    for number in range(4):
        for tokens in batches[2 * number : 2 * number + 2]:
            (loss_of(by_hand.model, tokens) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        if number % 2:
            expected[number] = monitor.scalars()
    seen = {
        step: {name: each for name, each in values.items() if "monitor/" in name}
        for step, values in logger.values.items()
    }
    seen = {step: values for step, values in seen.items() if values}
    assert seen.keys() == expected.keys()
    for step, values in expected.items():
        assert seen[step] == pytest.approx(values, rel=1e-5)
    assert not module.trainer.optimizers[0]._optimizer_step_pre_hooks


# Two processes


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [
        "trainer",
        "accelerate",
        "lightning",
        "lightning_whole",
    ],
)
def test_replicas_of_an_engine_stay_the_same_to_the_bit_while_the_clip_fires(tmp_path, engine):
    run_ranks(2, WORKER, engine, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["clipped"] == second["clipped"]
    assert sum(first["clipped"]) > 4
    assert not torch.equal(first["seen"], second["seen"]), "each rank has its own data"
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name


@pytest.mark.slow
def test_accelerate_shards_by_fsdp2_and_trains_as_one_process(tmp_path):
    run_ranks(2, WORKER, "accelerate_fsdp2", tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    model = tiny_llama(seed=0)
    optimizer = MuonClip(model, lr=1e-2, weight_decay=0.1, tau=2.0)
    clipped = []
    for of_both in tiny_tokens(6 * 3 * 2).split(3 * 2):
        for of_one in of_both.split(3):
            (loss_of(model, of_one) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        clipped.append(optimizer.qk_clip.report().clipped_heads)
    assert first["clipped"] == second["clipped"] == clipped
    assert sum(clipped) > 4
    for name, value in model.state_dict().items():
        torch.testing.assert_close(first["model"][name], value, rtol=0, atol=1e-5)


# QK-Clip after other optimizers


def adamw(model, lr):
    return torch.optim.AdamW(model.parameters(), lr=lr)


def adafactor(model, lr):
    return Adafactor(model.parameters(), lr=lr, relative_step=False, scale_parameter=False, warmup_init=False)


def torch_muon(model, lr):
    """For the matrices of the layers alone; the rest stays as it is."""
    return torch.optim.Muon([p for p in model.model.layers.parameters() if p.ndim == 2], lr=lr)


@pytest.mark.parametrize("lr", [0.0, 1e-3])
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("make", [adamw, torch_muon, adafactor])
def test_after_another_optimizer_every_head_ends_at_min_of_its_logit_and_tau(make, hooked, lr):
    """Re-measured on the same inputs, by the dense probe: S before the step, moved S after it, and S clipped."""
    tau = 2.0
    model = tiny_llama()
    probe = Probe(model)
    optimizer, clip, inputs, moved = make(model, lr), QKClip(model, tau), [], []
    optimizer.register_step_post_hook(lambda *_: moved.append(probe.maxima(inputs[-1])))
    if hooked:
        optimizer.register_step_post_hook(lambda *_: clip.step())
    for tokens in batches_of(2):
        loss_of(model, tokens).backward()
        inputs.append(probe.take())
        before = probe.maxima(inputs[-1])
        optimizer.step()
        optimizer.zero_grad()
        if not hooked:
            clip.step()
        after = probe.maxima(inputs[-1])
        gamma = (tau / before).clamp(max=1)
        torch.testing.assert_close(after, moved[-1] * gamma, rtol=1e-5, atol=0)
        if lr == 0:
            torch.testing.assert_close(after, before.clamp(max=tau), rtol=1e-5, atol=0)
        else:
            assert not torch.allclose(moved[-1], before, rtol=1e-3)
        fires = before > tau
        report = clip.report()
        assert report.clipped_heads == int(fires.sum())
        seen = torch.stack([layer.max_logits for layer in report.layers.values()])
        torch.testing.assert_close(seen[fires].double(), before[fires], rtol=1e-5, atol=0)
    assert report.steps == 2
    assert report.last_clipped_step > 0
