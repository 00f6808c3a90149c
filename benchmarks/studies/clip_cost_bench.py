"""The cost of QK-Clip, end to end: whole training steps with it and without it, compared in one process.

    ratio = seconds(forward, backward, AdamW, clip) / seconds(forward, backward, AdamW)

of steps of one round, in one process, in changing order. AdamW, because Newton–Schulz would hide the attention; its
rate is 0, so that every step starts from the same weights. The arms are copies of the modules that share one set of
weights, gradients and optimizer state, and call the same attention kernel. One arm is that without the clip a second
time: the ratio of these two shows how far the others can be trusted.

`added` is the time inside `MaxLogits.observe` and `QKClip.step` over that of the rest of the step, from steps of their
own. It leaves out what the calls of these two cost, and sees smaller differences than the ratio.

Seconds are those of the clock on the wall; with a single thread they are the CPU's, which other programs disturb less.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.experiment.errors import RunFailed, UsageError
from benchmarks.records.intervals import median_interval
from benchmarks.training.timing import clocked, in_turn, seconds, wall_clock
from muonclip.models import MoEConfig
from muonclip.models.torch import Attention, MoE
from muonclip.torch import QKClip
from muonclip.torch.logits.max_logits import MaxLogits

MODELS = {"moe": "reference MoE, MLA", "llama": "Hugging Face Llama, GQA"}
DTYPES = {
    "moe": {"float32": "fp32", "bfloat16": "bf16 autocast"},
    "llama": {"float32": "fp32", "bfloat16": "bf16 weights"},
}
VOCABULARY = 1024
_HEAD_WIDTH, _ROTARY_WIDTH = 64, 16
TAU = 100.0
WITHOUT, AGAIN, NEEDED, ALWAYS = "without", "without, again", "needed", "always"


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of the models and of the measurement."""

    width: int = 256
    layers: int = 4
    tokens: tuple[tuple[int, int], ...] = ((2, 512), (1, 2048))  # sequences per step, their length
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    rounds: int = 32
    added_steps: int = 16
    warm_up: int = 2


PLANS = {"cpu": Plan(), "cuda": Plan(width=1536, tokens=((2, 4096),), dtypes=("bfloat16",))}
QUICK = Plan(width=128, layers=2, tokens=((2, 32),), rounds=6, added_steps=2, warm_up=1)


@dataclass(frozen=True, slots=True)
class Regime:
    """A case to measure, and what its heads must do.

    `hot`: at weights with which every head exceeds τ. `exact`, `clipped`: all heads are, at every step; else none.
    """

    name: str
    arm: str
    hot: bool
    exact: bool
    clipped: bool
    target: float


REGIMES = (
    Regime("far below τ", NEEDED, hot=False, exact=False, clipped=False, target=1.01),
    Regime("above τ", NEEDED, hot=True, exact=True, clipped=True, target=1.03),
    Regime("always, diffuse heads", ALWAYS, hot=False, exact=True, clipped=False, target=1.15),
)


class Bench:
    """One model, length and dtype: the arms, and the weights that every step starts from."""

    def __init__(self, model: str, batch: int, length: int, dtype: str, device: str, plan: Plan) -> None:
        torch.manual_seed(0)
        self.cell = {"model": model, "batch": batch, "length": length, "dtype": dtype}
        self.dtype, self.device, self.plan = dtype, device, plan
        base = build(model, width=plan.width, layers=plan.layers, length=length).to(device)
        if model == "llama":
            base = base.to(getattr(torch, dtype))
        self.tokens = torch.randint(VOCABULARY, (batch, length + 1)).to(device)
        self.optimizer = torch.optim.AdamW(base.parameters(), lr=0.0, weight_decay=0.0, fused=True)
        copies = [copy.deepcopy(base, {id(p): p for p in base.parameters()}) for _ in range(4)]
        for module in (module for each in copies[:2] for module in each.modules() if isinstance(module, Attention)):
            module.max_logits = None  # pyright: ignore[reportAttributeAccessIssue]
        self.models: dict[str, nn.Module] = dict(zip((WITHOUT, AGAIN, NEEDED, ALWAYS), copies, strict=True))
        self.clips = {
            NEEDED: QKClip(copies[2], tau=TAU, observe="needed"),
            ALWAYS: QKClip(copies[3], tau=TAU, observe="always"),
        }
        self.saved: list[tuple[Tensor, Tensor]] = []  # weights that the clip scales, and what they begin with

    def measure(self) -> Iterator[dict[str, Any]]:
        """Measure the cells, one for each regime."""
        for hot in (False, True):
            if hot:
                self.inflate()
            regimes = [regime for regime in REGIMES if regime.hot == hot]
            times = {arm: np.array(values) for arm, values in self.rounds(regimes).items()}
            ratios = {arm: median_interval((values / times[WITHOUT]).tolist()) for arm, values in times.items()}
            for regime in regimes:
                measured = {
                    "regime": regime.name,
                    "target": regime.target,
                    "step_ms": 1e3 * float(np.median(times[WITHOUT])),
                    "ratio": ratios[regime.arm],
                    "control": ratios[AGAIN],
                    "added": median_interval([self.added(regime) for _ in range(self.plan.added_steps)]),
                    "sources": self.clips[regime.arm].sources(),
                }
                yield self.cell | measured | self.check(regime)

    def rounds(self, regimes: Sequence[Regime]) -> dict[str, list[float]]:
        """Return the seconds of a step by arm, one per round; every step of a regime's arm is checked."""

        def checked(regime: Regime) -> float:
            took = self.step(regime.arm)
            self.check(regime)
            return took

        candidates = {arm: partial(self.step, arm) for arm in (WITHOUT, AGAIN)}
        candidates |= {regime.arm: partial(checked, regime) for regime in regimes}
        return in_turn(candidates, self.plan.rounds, self.plan.warm_up)

    def step(self, arm: str) -> float:
        """Return the seconds of one training step of an arm, from the weights that every step starts from."""
        with torch.no_grad():
            for weight, value in self.saved:
                weight.copy_(value)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "QK-Clip scales .* come back")  # as they do here
            return seconds(partial(self._step, arm), self.now)

    def _step(self, arm: str) -> None:
        loss(self.models[arm], self.tokens, self.dtype).backward()
        self.optimizer.step()
        if arm in self.clips:
            self.clips[arm].step()
        self.optimizer.zero_grad()

    def now(self) -> float:
        if self.device == "cpu" and torch.get_num_threads() == 1:
            return time.thread_time()
        return wall_clock(self.device)

    def added(self, regime: Regime) -> float:
        """Return the seconds inside the clip's own functions over those of the rest of one step."""
        spent: list[float] = []
        observe, step = (clocked(each, spent.append, self.now) for each in (MaxLogits.observe, QKClip.step))
        with mock.patch.object(MaxLogits, "observe", observe), mock.patch.object(QKClip, "step", step):
            whole = self.step(regime.arm)
        return sum(spent) / (whole - sum(spent))

    def check(self, regime: Regime) -> dict[str, Any]:
        """Return what the last step of the regime's arm reports. Raises RunFailed where that is not the regime's."""
        report = self.clips[regime.arm].report()
        exact = sum(int(layer.exact.sum()) for layer in report.layers.values())
        found = {"heads": report.heads, "exact": exact, "clipped": report.clipped_heads}
        if (exact, report.clipped_heads) != (report.heads * regime.exact, report.heads * regime.clipped):
            raise RunFailed(f"{self.cell} is not {regime.name!r}: {found}\n{report}")
        lowest = min(layer.bound.min().item() for layer in report.layers.values())
        return found | {"lowest_bound": lowest, "highest_bound": report.bound}

    def inflate(self) -> None:
        """Scale the queries, layer by layer, until every head's maximum is well above τ; begin with these weights."""
        clip = self.clips[ALWAYS]
        for _ in range(10):
            clip.tau = math.inf  # measures, never clips
            self.step(ALWAYS)
            clip.tau = TAU
            lowest = {name: layer.max_logits.min().item() for name, layer in clip.report().layers.items()}
            if min(lowest.values()) > 1.2 * TAU:
                weights = {id(w): w for projection in clip.projections.values() for w in projection.qk_parameters()}
                self.saved = [(weight, weight.detach().clone()) for weight in weights.values()]
                return
            for name, projection in clip.projections.items():
                parts = (*projection.query, *projection.query_facing_shared)
                with torch.no_grad():
                    for weight in {id(weight): weight for rows in parts for weight, _ in rows.parameters()}.values():
                        weight *= max(1.0, 1.5 * TAU / lowest[name])
        raise RunFailed(f"{self.cell}: no weights were found with which every head is above {TAU:g}.")


def build(name: str, *, width: int, layers: int, length: int) -> nn.Module:
    """Build the model in float32, on the CPU. Raises UsageError where transformers is missing."""
    heads = width // _HEAD_WIDTH
    if name == "moe":
        sizes = {"hidden_size": width, "num_layers": layers, "max_seq_len": length, "num_heads": heads}
        ranks = {"q_lora_rank": width // 2, "kv_lora_rank": width // 4}
        own = _HEAD_WIDTH - _ROTARY_WIDTH
        widths = {"qk_nope_head_dim": own, "qk_rope_head_dim": _ROTARY_WIDTH, "v_head_dim": own}
        experts = {"intermediate_size": 2 * width, "moe_intermediate_size": width // 2}
        return MoE(MoEConfig.cpu(vocab_size=VOCABULARY, **sizes, **ranks, **widths, **experts))
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise UsageError(
            "--models", "llama comes from transformers, which is not installed. pip install 'muonclip[dev]' brings it."
        ) from error
    sizes = {"hidden_size": width, "intermediate_size": width * 8 // 3, "num_hidden_layers": layers}
    attention = {"num_attention_heads": heads, "num_key_value_heads": heads // 2, "attn_implementation": "sdpa"}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=length, **sizes, **attention))


def loss(model: nn.Module, tokens: Tensor, dtype: str) -> Tensor:
    """Return the loss of next tokens, int64 [B, T + 1].

    In bfloat16 the MoE runs under autocast; a Llama is cast by its owner.
    """
    if isinstance(model, MoE):
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            return model.loss(tokens[:, :-1], tokens[:, 1:])
    return model(input_ids=tokens[:, :-1], labels=tokens[:, :-1], use_cache=False).loss
