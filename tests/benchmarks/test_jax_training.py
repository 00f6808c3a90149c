"""Training in JAX: what it shares with PyTorch's, what it records, and that a stop leaves no trace."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
import torch
from bench_runs import steps_of, trained, with_arms

from benchmarks.__main__ import main
from benchmarks.execution.workers import for_jax
from benchmarks.experiment.arms import ARMS, choices
from benchmarks.experiment.data import open_corpus
from benchmarks.experiment.experiment import Experiment
from benchmarks.experiment.presets import HOT
from benchmarks.records import atomic_files
from benchmarks.records.folders import CHECKPOINT, METRICS, RESULT
from benchmarks.records.run_records import read_run
from benchmarks.training.run import Run
from muonclip.models import MoEConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def _float32_and_compiled_once(tmp_path_factory):
    """As in a worker; and arms that are the same program are compiled once for all tests."""
    cache = str(tmp_path_factory.mktemp("compiled"))
    settings = {
        "jax_enable_x64": False,
        "jax_compilation_cache_dir": cache,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def in_jax(every_arm) -> Experiment:
    return replace(every_arm, framework="jax")


@pytest.fixture
def begin(corpus, tmp_path):
    """A run of one's own."""
    return lambda experiment, arm, seed=0, folder="run": Run(
        experiment, corpus, tmp_path / folder, experiment.arm(arm), seed
    )


SAME_PROGRAMS = ("adamw", "adamw-clip", "muon", "muonclip", "rescue")  # two of them; each other arm is its own
OTHERS = [
    *(arm for arm in ARMS if arm not in (*SAME_PROGRAMS, "torch-muon")),
    "muonclip@attention=gqa",
    "per-head@attention=mha",
]
OTHERS.append("muonclip@lr=0.01@adamw_lr=0.003")


@pytest.mark.slow
@pytest.mark.parametrize("arm", [*SAME_PROGRAMS, *OTHERS])
def test_it_trains_as_pytorch_does(every_arm, run_of, arm):
    short = with_arms(every_arm, arm, tau=0.03, steps=4, validate_every=2, probe_windows=3)
    folders = [run_of(replace(short, framework=framework), arm).folder for framework in ("torch", "jax")]
    theirs, ours = map(steps_of, folders)
    assert len(ours) == 4
    assert all("probe_loss" in record for record in ours)
    stored = "momentum_dtype" in ARMS[choices(arm)[0].entry].options  # of 8 bits: exact in tests of its own
    for their, own in zip(theirs, ours, strict=True):
        assert own.keys() == their.keys()
        assert (own["step"], own["lr"]) == (their["step"], their["lr"])
        for name in own.keys() - {"step", "lr", "clipped_heads"}:
            assert_close(own[name], their[name], rtol=2**-6 if stored else 1e-4)
        assert own["clipped_heads"] == their["clipped_heads"]
    read = read_run(folders[1])
    assert read.clipped(0.03).sum(axis=1).tolist() == read.steps["clipped_heads"].tolist()
    assert any(record["clipped_heads"] for record in ours) == ARMS[choices(arm)[0].entry].clips
    for folder in folders:
        assert {path.name for path in folder.iterdir()} == {METRICS, CHECKPOINT, RESULT}
    results = [json.loads((folder / RESULT).read_text()) for folder in folders]
    assert results[0].keys() == results[1].keys()
    assert results[1]["final_val_loss"] == ours[-1]["val_loss"]


def assert_close(own, their, rtol):
    if isinstance(own, dict):
        assert own.keys() == their.keys()
        for key in own:
            assert_close(own[key], their[key], rtol)
    else:
        assert type(own) is type(their)
        np.testing.assert_allclose(own, their, rtol=rtol)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["adamw-clip", "rescue", "qk-norm"])
def test_stopped_and_resumed_is_uninterrupted(in_jax, begin, run_of, tmp_path, arm):
    whole = run_of(in_jax, arm)
    trained(begin(in_jax, arm, 3), until=3)
    folder = tmp_path / "run"
    assert not (folder / RESULT).exists()
    with (folder / METRICS).open("a") as stream:  # as kill -9 leaves it
        stream.write('{"step": 4, "loss": 0.0}\n{"step": 5, "lo')
    parts = trained(begin(in_jax, arm, 3))
    assert len(steps_of(folder)) == in_jax.training.steps
    assert steps_of(folder) == steps_of(whole.folder)
    ours, theirs = parts.learner.state(), whole.learner.state()
    assert ours["optimizer"].keys() == theirs["optimizer"].keys()
    assert len(ours["optimizer"]) > len(ours["model"])
    for part in ("model", "optimizer"):
        for name, value in theirs[part].items():
            assert torch.equal(ours[part][name], value)
            assert ours[part][name].dtype == value.dtype


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["muon", "muonclip"])
def test_its_curves_lie_within_the_spread_of_pytorchs_seeds(arm, tmp_path):
    """At the hot rate, past the explosion: at first the same numbers, then nearer to PyTorch's run of the same seed
    than that is to another seed. Later rounding has its way there, as between two runs of one framework."""
    text, steps, early, compared, bin_, seeds = open_corpus(None), 120, 25, 100, 20, (0, 1)
    curves: dict[str, dict[int, list[tuple[float, float]]]] = {"torch": {}, "jax": {}}
    for framework, of in curves.items():
        experiment = Experiment(
            name="",
            title="",
            chosen=choices(arm),
            seeds=seeds,
            model=MoEConfig.cpu(),
            training=replace(HOT, steps=steps),
            data=text.record(),
            framework=framework,
        )
        for seed in seeds:
            folder = tmp_path / f"{framework}-{seed}"
            trained(Run(experiment, text, folder, experiment.arms[0], seed))
            made = read_run(folder).steps
            of[seed] = list(zip(made["loss"], np.log(made["max_logit"]), strict=True))
            assert (made["max_logit"].tail(steps // 4).median() > 2 * HOT.tau) == (arm == "muon")

    def apart(one, other):
        """Mean absolute distance of two runs in (loss, ln maximum logit), between means of `bin_` steps."""
        binned = [np.reshape(run[bin_:compared], (-1, bin_, 2)).mean(1) for run in (one, other)]
        return np.abs(binned[0] - binned[1]).mean(0)

    spread = apart(*curves["torch"].values())
    for seed in seeds:
        ours, theirs = curves["jax"][seed], curves["torch"][seed]
        np.testing.assert_allclose(ours[:early], theirs[:early], rtol=1e-4, atol=1e-4)
        assert (apart(ours, theirs) < spread / 2).all()


def shapes(state):
    return jax.tree.map(lambda array: (array.shape, array.dtype, array.weak_type), state)


@pytest.fixture(scope="module")
def story(in_jax, corpus, tmp_path_factory):
    """What is seen of one run on its way, which is compiled once: at its start, after two steps, at its end."""
    seen = SimpleNamespace(folder=tmp_path_factory.mktemp("run"))
    one_layer = replace(in_jax.model, num_layers=1, num_dense_layers=0)  # of experts: half the time to compile
    in_jax = with_arms(replace(in_jax, model=one_layer), "muonclip")
    run = Run(in_jax, corpus, seen.folder, in_jax.arm("muonclip"), 0)
    seen.first, seen.shapes, seen.weights = run.learner.now, shapes(run.learner.now), weights(run)
    trained(run, until=2)
    seen.later_weights = weights(run)
    windows = corpus.validation_batch(index=0, batch_size=3, length=in_jax.model.max_seq_len)
    seen.loss = run.learner.loss(windows)
    model, tokens = run.learner.reference(), torch.from_numpy(windows)
    saved = atomic_files.load(seen.folder / CHECKPOINT, "cpu")
    assert saved is not None
    model.load_state_dict(saved["model"])
    seen.expected_loss = model.loss(tokens[:, :-1], tokens[:, 1:]).item()
    trained(run)  # its step is compiled, and would refuse other shapes and types
    seen.run = run
    return seen


def weights(run):
    return run.probe.weights(run.learner.reference())


def test_a_checkpoint_is_read_without_pickle_and_its_model_by_pytorch(story):
    assert story.loss == pytest.approx(story.expected_loss, rel=1e-5)


def test_no_step_is_compiled_again(story):
    assert shapes(story.run.learner.now) == story.shapes
    assert story.run.learner._validation_loss._cache_size() <= 2  # the windows of validation, and those of this test
    assert story.run.finished


def test_a_step_uses_its_arrays_up(story):
    for arrays in (story.first.params, story.first.buffers, optax.tree.get(story.first.optimizer, "inner_states")):
        assert all(array.is_deleted() for array in jax.tree.leaves(arrays))


def test_the_probe_sees_the_weights_of_now(story):
    assert all(not torch.equal(old, new) for old, new in zip(story.weights, story.later_weights, strict=True))


@pytest.mark.slow
def test_rescue_is_muon_until_it_clips(in_jax, run_of):
    muon, rescue = (steps_of(run_of(in_jax, arm).folder) for arm in ("muon", "rescue"))
    assert rescue[:4] == muon[:4]
    assert rescue[4]["max_logits"] == muon[4]["max_logits"]  # seen before the fifth update
    assert rescue[4]["clipped_heads"] > 0
    assert rescue[5]["max_logits"] != muon[5]["max_logits"]


@pytest.mark.slow
@pytest.mark.parametrize("pair", [("muon", "muonclip"), ("adamw", "adamw-clip")])
def test_a_clip_that_has_nothing_to_do_changes_no_bit(in_jax, run_of, pair):
    quiet = with_arms(in_jax, *pair, tau=1e9)
    one, other = (steps_of(run_of(quiet, arm).folder) for arm in pair)
    assert one == other


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted as Linux lists them")
@pytest.mark.parametrize("threads", [1, 3])
def test_a_worker_computes_with_the_threads_of_its_experiment(threads, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")  # several devices
    code = (
        "import jax; from pathlib import Path; jax.numpy.ones(2).block_until_ready(); "
        "print(sum('XLAEigen' in path.read_text() for path in Path('/proc/self/task').glob('*/comm')))"
    )
    made = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | for_jax(threads), capture_output=True, text=True, check=True
    )
    assert int(made.stdout) == threads


@pytest.mark.slow
def test_measuring_changes_nothing(in_jax, run_of):
    models = {}
    for every in (1, 8):
        models[every] = run_of(with_arms(in_jax, "muonclip", validate_every=every), "muonclip").learner.state()["model"]
    for name, weight in models[1].items():
        assert torch.equal(models[8][name], weight)


@pytest.mark.slow
def test_a_run_that_diverges_ends_there(in_jax, begin, tmp_path):
    run = trained(begin(in_jax, "muon"), until=2)
    params = run.learner.now.params
    params["norm.weight"] = jax.numpy.full_like(params["norm.weight"], np.inf)
    run.save()
    trained(begin(in_jax, "muon"))
    assert begin(in_jax, "muon").finished
    assert len(steps_of(tmp_path / "run")) == 3
    result = json.loads((tmp_path / "run" / RESULT).read_text())
    assert (result["steps"], result["diverged"], result["final_val_loss"]) == (3, True, "nan")


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    """Everything is written as with PyTorch; then the other framework is refused in that folder."""
    options = ["--arms", "muonclip@tau=0.3,adamw", "--seeds", "0", "--steps", "3", "--batch", "2", "--jobs", "1"]
    command = ["explosion", *options, "--out", str(tmp_path)]
    assert main([*command, "--framework", "jax"]) == 0
    assert "MuonClip, τ = 0.3" in capsys.readouterr().out
    for name in ("config.json", "summary.json", "curves.png", "heads.png", "report.html"):
        assert (tmp_path / name).exists()
    recorded = json.loads((tmp_path / "config.json").read_text())
    assert recorded["config"]["framework"] == "jax"
    assert recorded["config"]["precision"] == {"autocast": "float32", "ns_dtype": "float32"}
    assert {"jax", "jaxlib", "optax", "torch"} <= recorded["environment"].keys()
    html = (tmp_path / "report.html").read_text()
    assert "<td>JAX</td>" in html
    assert "Attention logits, JAX" in html
    with pytest.raises(SystemExit):
        main(command)
    assert "framework: recorded jax, asked for torch" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["jax", "optax"])
def test_jax_that_is_not_installed(missing, monkeypatch, tmp_path, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else found(name))
    with pytest.raises(SystemExit) as exit_:
        main(["explosion", "--framework", "jax", "--out", str(tmp_path / "out")])
    assert exit_.value.code == 2
    assert f'argument --framework: jax needs {missing}: pip install ".[jax]".' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "gpu"], "argument --device: --framework jax runs on the CPU alone: take --device cpu."),
        (["--device", "cuda"], "argument --device: --framework jax runs on the CPU alone: take --device cpu."),
        (["--precision", "bf16"], "argument --precision: --framework jax runs in fp32."),
        (["--framework", "tinygrad"], "argument --framework: invalid choice: 'tinygrad'"),
    ],
)
def test_what_jax_is_not_made_for(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["explosion", "--framework", "jax", *options, "--out", str(tmp_path / "out")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_pytorchs_runs_do_not_import_jax():
    loads = "import sys, benchmarks.__main__, benchmarks.execution.worker"
    code = f"{loads}; sys.exit('jax' in sys.modules or 'optax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
