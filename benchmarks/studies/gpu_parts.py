"""The parts of `gpu-check`, one in a process: `python -m benchmarks.studies.gpu_parts PART DIR [--dry-run]`.

A part yields records, which are written to DIR/PART.json one by one. `ok` in a record says whether it is as it should
be; a record with `absent` instead names what is not installed.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.execution.processes import ROOT
from benchmarks.experiment.arms import choices
from benchmarks.experiment.data import open_corpus
from benchmarks.experiment.experiment import Experiment
from benchmarks.experiment.presets import PRESETS
from benchmarks.experiment.settings import Precision
from benchmarks.records import atomic_files, metrics
from benchmarks.records.environment import environment
from benchmarks.studies import gpu_kernels, gpu_sets, gpu_step
from benchmarks.studies.clip_cost_bench import PLANS, QUICK, Bench
from benchmarks.training.run import Run, State, Store
from muonclip.selftest import results

Records = Iterator[dict[str, Any]]
_SECONDS_OF_AN_ARM = 45.0


def check(out: Path, dry_run: bool) -> Records:
    """Run the self-test of the library, `python -m muonclip check`."""
    for outcome in results("cpu" if dry_run else "cuda"):
        print(outcome)
        of = {"what": outcome.name, "found": outcome.what, "trace": outcome.trace.splitlines()}
        yield of | ({"absent": outcome.what} if outcome.holds is None else {"ok": outcome.holds})


def tests(out: Path, dry_run: bool) -> Records:
    """Run the tests marked `gpu`; a dry run only collects them."""
    if missing := [each for each in ("pytest", "hypothesis") if importlib.util.find_spec(each) is None]:
        yield {"absent": " and ".join(missing)}
        return
    words = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "tests/torch/test_head_maxima.py"]
    if importlib.util.find_spec("xdist") is not None:
        words += ["-n", "0"]
    words += ["--collect-only"] if dry_run else []
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    print(done.stdout, done.stderr)
    yield {"ok": done.returncode == 0, "summary": done.stdout.strip().splitlines()[-1:]}


def kernels(out: Path, dry_run: bool) -> Records:
    """Compare the Triton kernels with float64."""
    return gpu_kernels.records(dry_run)


def step(out: Path, dry_run: bool) -> Records:
    """Run a training step that may not wait for the device, and replay it as a CUDA graph."""
    return gpu_step.records(dry_run)


def sets(out: Path, dry_run: bool) -> Records:
    """Time Muon's step on sets of matrices next to others'."""
    return gpu_sets.records(dry_run, compiled=False)


def sets_compiled(out: Path, dry_run: bool) -> Records:
    """Time it next to torch's, compiled."""
    return gpu_sets.records(dry_run, compiled=True)


def clip_cost(out: Path, dry_run: bool) -> Records:
    """Time whole training steps with the clip and without it, 2 sequences of 4096 tokens in bf16."""
    plan = QUICK if dry_run else replace(PLANS["cuda"], rounds=12, added_steps=6)
    batch, length = plan.tokens[0]
    for cell in Bench("moe", batch, length, "bfloat16", "cpu" if dry_run else "cuda", plan).measure():
        yield {"ok": True} | cell


def explosion(out: Path, dry_run: bool) -> Records:
    """Train the preset `gpu` with Muon and with MuonClip, at the highest of its rates, 45 seconds each."""
    preset, corpus = PRESETS["cpu" if dry_run else "gpu"], open_corpus(None)
    small = {"hidden_size": 32, "num_layers": 1, "max_seq_len": 16} if dry_run else {}
    rate = max(preset.pilot_rates, default=preset.training.lr["muon"])
    training = replace(preset.training, lr={"muon": rate, "muonclip": rate}, validate_every=10_000)
    experiment = Experiment.on(
        corpus,
        name="explosion",
        title="Attention logits",
        chosen=choices("muon", "muonclip"),
        seeds=(0,),
        model=preset.model(vocab_size=corpus.vocab_size, **small),
        training=replace(training, steps=3, batch_size=2, validation_batch_size=2) if dry_run else training,
        device=preset.device,
        precision=Precision() if dry_run else Precision("bfloat16", "bfloat16"),
    )
    for arm in experiment.arms:
        folder = out / "explosion" / arm.name
        curve: list[tuple[int, float, float]] = []
        run = Run(experiment, corpus, folder, arm, 0, store=_NotKept(folder, experiment.device))
        end = time.monotonic() + _SECONDS_OF_AN_ARM
        run.train(lambda record, curve=curve: curve.append(_point(record)), lambda end=end: time.monotonic() > end)
        yield {
            "ok": arm.name == "muon" or not run.diverged,
            "arm": arm.name,
            "rate": rate,
            "tau": experiment.training.tau,
            "steps": run.done,
            "steps_per_second": run.done / run.train_seconds,
            "last_loss": curve[-1][1],
            "highest_logit": max(logit for _, _, logit in curve),
            "curve": curve[:: max(1, len(curve) // 100)],
        }


class _NotKept(Store):
    """No checkpoints: gigabytes that nobody goes on from."""

    def find(self) -> State | None:
        return None

    def save(self, learner: Any, state: State) -> None:
        return


def _point(record: dict[str, Any]) -> tuple[int, float, float]:
    """Step, loss, largest logit."""
    logits = [logit for heads in record["max_logits"].values() for logit in heads]
    return record["step"], record["loss"], max(logits)


_PARTS: dict[str, Callable[[Path, bool], Records]] = {
    "check": check,
    "tests": tests,
    "kernels": kernels,
    "step": step,
    "sets": sets,
    "sets-compiled": sets_compiled,
    "clip-cost": clip_cost,
    "explosion": explosion,
}


def main(name: str, out: Path, dry_run: bool) -> None:
    """Run a part; write what it has yielded whenever it yields."""
    made: dict[str, Any] = {"environment": environment("cpu" if dry_run else "cuda"), "dry_run": dry_run, "records": []}
    for record in _PARTS[name](out, dry_run):
        made["records"].append(record)
        atomic_files.write_json(out / f"{name}.json", metrics.to_json(made))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), "--dry-run" in sys.argv)
