"""An experiment small enough for a test, and its runs, each of which is trained once for all tests that read it."""

import pytest
from bench_runs import trained, with_arms

from benchmarks.experiment.arms import ARMS, choices
from benchmarks.experiment.data import Corpus, open_corpus
from benchmarks.experiment.experiment import Experiment
from benchmarks.experiment.settings import Training
from benchmarks.training.run import Run
from muonclip.models import MoEConfig


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Corpus:
    path = tmp_path_factory.mktemp("text") / "counting.txt"
    path.write_text(" ".join(map(str, range(2000))))
    return open_corpus(path)


@pytest.fixture(scope="session")
def experiment(corpus) -> Experiment:
    return Experiment(
        name="tiny",
        title="Tiny",
        chosen=choices("adamw", "muon", "muonclip"),
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


@pytest.fixture(scope="session")
def every_arm(experiment) -> Experiment:
    return with_arms(experiment, *ARMS, lr=dict.fromkeys(ARMS, 1e-2))


@pytest.fixture(scope="session")
def run_of(corpus, tmp_path_factory):
    """A finished run of an experiment, by arm and seed. Read only: other tests have the same."""
    done: list[tuple[Experiment, str, int, Run]] = []

    def get(experiment: Experiment, arm: str, seed: int = 3) -> Run:
        for other, name, number, run in done:
            if (other, name, number) == (experiment, arm, seed):
                return run
        run = trained(Run(experiment, corpus, tmp_path_factory.mktemp("run"), experiment.arm(arm), seed))
        done.append((experiment, arm, seed, run))
        return run

    return get
