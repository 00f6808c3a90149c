"""A panel small enough for a test: a model of a few thousand weights on a text of a few thousand bytes."""

from dataclasses import replace

import pytest

from benchmarks.experiment.arms import ARMS
from benchmarks.experiment.data import Corpus, open_corpus
from benchmarks.experiment.experiment import Panel, Training
from muonclip.models import MoEConfig


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    path = tmp_path / "counting.txt"
    path.write_text(" ".join(map(str, range(2000))))
    return open_corpus(path)


@pytest.fixture
def panel(corpus) -> Panel:
    return Panel(
        name="tiny",
        title="Tiny",
        arms=("adamw", "muon", "muonclip"),
        seeds=(0, 3),
        model=MoEConfig.cpu(hidden_size=32, num_layers=2, max_seq_len=16, q_lora_rank=24, kv_lora_rank=16),
        training=Training(
            steps=8,
            batch_size=2,
            lr={"adamw": 1e-3, "muon": 3e-2, "muonclip": 3e-2},
            warmup_steps=2,
            tau=0.02,
            validate_every=4,
            validation_batches=2,
            validation_batch_size=3,
        ),
        data=corpus.record(),
    )


@pytest.fixture
def every_arm(panel) -> Panel:
    return replace(panel, arms=tuple(ARMS), training=replace(panel.training, lr=dict.fromkeys(ARMS, 1e-2)))
