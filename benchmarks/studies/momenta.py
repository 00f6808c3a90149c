"""Momenta of a real training run, saved small: what the Gram form's error is judged on.

The run is MuonClip's at its own best rate, on the small reference model and the standard library's text. Its momenta
are kept early and late, of one matrix of each kind, as float16 divided by the largest entry: rounding eight times finer
than that of bf16, in which they are iterated.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.experiment.arms import choices
from benchmarks.experiment.data import Corpus
from benchmarks.experiment.experiment import Experiment
from benchmarks.experiment.presets import OWN_RATE, PRESETS
from benchmarks.training.timing import torch_threads
from benchmarks.training.torch_learner import TorchLearner

SAVED = Path(__file__).with_suffix(".npz")
STEPS = (20, 150)
MATRICES: Mapping[str, tuple[int | slice, ...]] = {  # by parameter: what is taken of it
    "layers.0.attn.q_b_proj.weight": (),
    "layers.0.attn.kv_a_proj.weight": (),
    "layers.0.attn.kv_b_proj.weight": (),
    "layers.0.attn.k_rope_proj.weight": (),
    "layers.0.mlp.down_proj.weight": (),
    "layers.1.mlp.router.weight": (),
    "layers.1.mlp.experts.gate_up_proj": (0, slice(64)),  # the gate of the first expert
    "layers.1.mlp.experts.down_proj": (3,),
}


def train_momenta(corpus: Corpus, steps: tuple[int, ...] = STEPS) -> dict[str, np.ndarray]:
    """Train, and return the momenta after each of `steps` by name and step, float16."""
    preset = PRESETS["cpu"]
    model = preset.model(vocab_size=corpus.vocab_size)
    own = {"name": "momenta", "title": "Momenta", "chosen": choices("muonclip"), "seeds": (0,)}
    experiment = Experiment.on(corpus, model=model, training=OWN_RATE, **own)
    (arm,) = experiment.arms
    learner, momenta = TorchLearner(experiment, arm, 0), dict[str, np.ndarray]()
    parameters = dict(learner.model.named_parameters())
    size, length = arm.training.batch_size, model.max_seq_len
    with torch_threads(1):
        for done in range(max(steps)):
            windows = corpus.batch(seed=0, step=done, batch_size=size, length=length)
            learner.step(windows, done, arm.training.schedule(done) * arm.lr)
            if done + 1 in steps:
                for name, part in MATRICES.items():
                    momentum = learner.optimizer.state[parameters[name]]["momentum_buffer"][part]
                    momenta[f"{name}, step {done + 1}"] = (momentum / momentum.abs().max()).half().numpy()
    return momenta


def saved_momenta() -> dict[str, Tensor]:
    """Return the momenta in the repository, float32, by name and step."""
    with np.load(SAVED) as file:
        return {name: torch.from_numpy(file[name]).float() for name in file.files}
