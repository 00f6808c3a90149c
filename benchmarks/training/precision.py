"""The choice of bf16: only where this machine is found to be a fifth faster with it. Old processors are slower.

Two choices, each by the medians of interleaved timings on the experiment's model and batch: the forward and backward
pass, and the optimizer's step with its Newton–Schulz products. JAX's runs have fp32 in both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch

from benchmarks.experiment.data import Corpus
from benchmarks.experiment.experiment import Experiment
from benchmarks.experiment.settings import DTYPES, Dtype, Precision
from benchmarks.training.timing import milliseconds, torch_threads
from benchmarks.training.torch_learner import autocast, first_model
from muonclip.torch import MuonClip

PrecisionChoice = Literal["auto", "fp32", "bf16"]
_ROUNDS, _GAIN = 9, 1.2  # bf16 must be 20 % faster: far more than the noise, so that the choice repeats


def choose(
    experiment: Experiment, corpus: Corpus, wanted: PrecisionChoice | Precision
) -> tuple[Precision, dict[str, Any]]:
    """Choose the precision, and return what was measured: median milliseconds by dtype (nothing unless "auto")."""
    if isinstance(wanted, Precision):
        return wanted, {}
    if experiment.framework == "jax":
        return Precision(), {}
    if wanted == "auto" and experiment.device == "cuda":
        wanted = "bf16"  # tensor cores: nothing to find out
    if wanted != "auto":
        return Precision(DTYPES[wanted], DTYPES[wanted]), {}
    with torch_threads(experiment.threads):
        passes = milliseconds(
            {dtype: _forward_backward(experiment, corpus, dtype) for dtype in DTYPES.values()}, _ROUNDS
        )
        updates = milliseconds({dtype: _update(experiment, corpus, dtype) for dtype in DTYPES.values()}, _ROUNDS)
    return Precision(faster(passes), faster(updates)), {"forward_backward_ms": passes, "optimizer_step_ms": updates}


def faster(milliseconds: dict[str, float]) -> Dtype:
    return "bfloat16" if milliseconds["float32"] > _GAIN * milliseconds["bfloat16"] else "float32"


def _forward_backward(experiment: Experiment, corpus: Corpus, dtype: Dtype) -> Callable[[], None]:
    experiment = replace(experiment, precision=Precision(dtype, "float32"))
    model = first_model(experiment, experiment.arms[0], seed=0)
    windows = _windows(experiment, corpus)

    def run() -> None:
        with autocast(experiment):
            loss = model.loss(windows[:, :-1], windows[:, 1:])
        loss.backward()

    return run


def _update(experiment: Experiment, corpus: Corpus, dtype: Dtype) -> Callable[[], None]:
    model = first_model(experiment, experiment.arms[0], seed=0)
    windows = _windows(experiment, corpus)
    model.loss(windows[:, :-1], windows[:, 1:]).backward()
    return MuonClip(model, lr=0.0, qk_clip=None, ns_dtype=getattr(torch, dtype)).step


def _windows(experiment: Experiment, corpus: Corpus) -> torch.Tensor:
    training = experiment.training
    batch = corpus.batch(seed=0, step=0, batch_size=training.batch_size, length=experiment.model.max_seq_len)
    return torch.from_numpy(batch).to(experiment.device)
