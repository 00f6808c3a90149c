"""Training in JAX: what it shares with PyTorch's, what it records, and that a stop leaves no trace."""

import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.execution.workers import _for_jax
from benchmarks.experiment.arms import ARMS
from benchmarks.experiment.data import open_corpus
from benchmarks.experiment.experiment import Panel, differences
from benchmarks.experiment.presets import HOT
from benchmarks.records import atomic_files as checkpoint
from benchmarks.records import metrics
from benchmarks.records.environment import environment
from benchmarks.records.summary import PanelResult, ever_clipped, max_logit
from benchmarks.report.comparison import compare
from benchmarks.report.style import footer
from benchmarks.training.probe import Probe
from benchmarks.training.run import CHECKPOINT, METRICS, RESULT, Run
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


@pytest.fixture
def in_jax(every_arm) -> Panel:
    return replace(every_arm, framework="jax")


def train(run, stop_after=None):
    run.train(lambda record: None, lambda: run.done == stop_after)
    return run


def records(folder):
    return [
        {name: value for name, value in record.items() if name != "tokens_per_second"}
        for record in metrics.read(folder / METRICS)
    ]


SAME_PROGRAMS = ("adamw", "adamw-clip", "muon", "muonclip", "rescue")  # two of them; each other arm is its own
OTHERS = [*(arm for arm in ARMS if arm not in SAME_PROGRAMS), "muonclip@attention=gqa", "per-head@attention=mha"]


@pytest.mark.slow
@pytest.mark.parametrize("arm", [*SAME_PROGRAMS, *(pytest.param(arm, marks=pytest.mark.slow) for arm in OTHERS)])
def test_it_trains_as_pytorch_does(every_arm, in_jax, corpus, tmp_path, arm):
    short = {"steps": 4, "validate_every": 2}
    for framework, panel in (("torch", every_arm), ("jax", in_jax)):
        panel = replace(panel, training=replace(panel.training, tau=0.03, **short))
        train(Run(panel, corpus, tmp_path / framework, arm, 3))
    theirs, ours = records(tmp_path / "torch"), records(tmp_path / "jax")
    assert len(ours) == 4
    for their, own in zip(theirs, ours, strict=True):
        assert own.keys() == their.keys()
        assert (own["step"], own["lr"]) == (their["step"], their["lr"])
        for name in own.keys() - {"step", "lr", "clipped_heads"}:
            assert_close(own[name], their[name], rtol=1e-4)
        assert own["clipped_heads"] == their["clipped_heads"] == len(ever_clipped([own], 0.03))
    clips = ARMS[arm.partition("@")[0]].clips
    assert any(record["clipped_heads"] for record in ours) == clips
    for name in ("torch", "jax"):
        assert {path.name for path in (tmp_path / name).iterdir()} == {METRICS, CHECKPOINT, RESULT}
    results = [json.loads((tmp_path / name / RESULT).read_text()) for name in ("torch", "jax")]
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
@pytest.mark.parametrize("arm", ["adamw-clip", "rescue", pytest.param("qk-norm", marks=pytest.mark.slow)])
def test_stopped_and_resumed_is_uninterrupted(in_jax, corpus, tmp_path, arm):
    whole = train(Run(in_jax, corpus, tmp_path / "whole", arm, 3))
    train(Run(in_jax, corpus, tmp_path / "parts", arm, 3), stop_after=3)
    assert not (tmp_path / "parts" / RESULT).exists()
    with (tmp_path / "parts" / METRICS).open("a") as stream:  # as kill -9 leaves it
        stream.write('{"step": 4, "loss": 0.0}\n{"step": 5, "lo')
    parts = train(Run(in_jax, corpus, tmp_path / "parts", arm, 3))

    assert len(records(tmp_path / "whole")) == in_jax.training.steps
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
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
        panel = Panel(
            name="",
            title="",
            arms=(arm,),
            seeds=seeds,
            model=MoEConfig.cpu(),
            training=replace(HOT, steps=steps),
            data=text.record(),
            framework=framework,
        )
        for seed in seeds:
            train(Run(panel, text, tmp_path / f"{framework}-{seed}", arm, seed))
            made = records(tmp_path / f"{framework}-{seed}")
            of[seed] = [(record["loss"], math.log(max_logit(record))) for record in made]
            median = statistics.median(max_logit(record) for record in made[-steps // 4 :])
            assert (median > 2 * HOT.tau) == (arm == "muon")

    def apart(one, other):
        """Mean absolute distance of two runs in (loss, ln maximum logit), between means of `bin_` steps."""
        binned = [np.reshape(run[bin_:compared], (-1, bin_, 2)).mean(1) for run in (one, other)]
        return np.abs(binned[0] - binned[1]).mean(0)

    spread = apart(*curves["torch"].values())
    for seed in seeds:
        ours, theirs = curves["jax"][seed], curves["torch"][seed]
        np.testing.assert_allclose(ours[:early], theirs[:early], rtol=1e-4, atol=1e-4)
        assert (apart(ours, theirs) < spread / 2).all()


def test_a_checkpoint_is_read_without_pickle_and_its_model_by_pytorch(in_jax, corpus, tmp_path):
    run = train(Run(in_jax, corpus, tmp_path, "muon", 0), stop_after=2)
    state = checkpoint.load(tmp_path / CHECKPOINT, "cpu")
    assert state is not None
    windows = corpus.validation_batch(index=0, batch_size=3, length=in_jax.model.max_seq_len)
    model = run.learner.reference()
    model.load_state_dict(state["model"])
    tokens = torch.from_numpy(windows)
    assert run.learner.loss(windows) == pytest.approx(model.loss(tokens[:, :-1], tokens[:, 1:]).item(), rel=1e-5)


@pytest.mark.slow
def test_rescue_is_muon_until_it_clips(in_jax, corpus, tmp_path):
    for arm in ("muon", "rescue"):
        train(Run(in_jax, corpus, tmp_path / arm, arm, 0), stop_after=6)
    muon, rescue = (records(tmp_path / arm) for arm in ("muon", "rescue"))
    assert rescue[:4] == muon[:4]
    assert rescue[4]["max_logits"] == muon[4]["max_logits"]  # seen before the fifth update
    assert rescue[4]["clipped_heads"] > 0
    assert rescue[5]["max_logits"] != muon[5]["max_logits"]


@pytest.mark.slow
@pytest.mark.parametrize("pair", [("muon", "muonclip"), ("adamw", "adamw-clip")])
def test_a_clip_that_has_nothing_to_do_changes_no_bit(in_jax, corpus, tmp_path, pair):
    quiet = replace(in_jax, training=replace(in_jax.training, tau=1e9))
    for arm in pair:
        train(Run(quiet, corpus, tmp_path / arm, arm, 0))
    assert records(tmp_path / pair[0]) == records(tmp_path / pair[1])


def test_no_step_is_compiled_again(in_jax, corpus, tmp_path):
    run = Run(in_jax, corpus, tmp_path, "muonclip", 0)
    before = jax.tree.map(lambda array: (array.shape, array.dtype, array.weak_type), run.learner.now)
    train(run)  # its step is compiled, and would refuse other shapes and types
    assert jax.tree.map(lambda array: (array.shape, array.dtype, array.weak_type), run.learner.now) == before
    assert run.learner._validation_loss._cache_size() == 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted as Linux lists them")
@pytest.mark.parametrize("threads", [1, 3])
def test_a_worker_computes_with_the_threads_of_its_panel(threads, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")  # several devices
    code = (
        "import jax; from pathlib import Path; jax.numpy.ones(2).block_until_ready(); "
        "print(sum('XLAEigen' in path.read_text() for path in Path('/proc/self/task').glob('*/comm')))"
    )
    made = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | _for_jax(threads), capture_output=True, text=True, check=True
    )
    assert int(made.stdout) == threads


def test_a_step_uses_its_arrays_up(in_jax, corpus, tmp_path):
    run = Run(in_jax, corpus, tmp_path, "muonclip", 0)
    before = run.learner.now
    run.step()
    for arrays in (before.params, before.buffers, optax.tree.get(before.optimizer, "inner_states")):
        assert all(array.is_deleted() for array in jax.tree.leaves(arrays))


@pytest.mark.slow
def test_measuring_changes_nothing(in_jax, corpus, tmp_path):
    weights = {}
    for every in (1, 8):
        often = replace(in_jax, training=replace(in_jax.training, validate_every=every))
        weights[every] = train(Run(often, corpus, tmp_path / str(every), "muonclip", 0)).learner.state()["model"]
    for name, weight in weights[1].items():
        assert torch.equal(weights[8][name], weight)


def test_the_probe_sees_the_weights_of_now(in_jax, corpus, tmp_path):
    run = Run(in_jax, corpus, tmp_path, "muon", 0)
    before = Probe.weights(run.probe, run.learner.reference())
    run.step()
    after = run.probe.weights(run.learner.reference())
    assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


@pytest.mark.slow
def test_a_run_that_diverges_ends_there(in_jax, corpus, tmp_path):
    run = train(Run(in_jax, corpus, tmp_path, "muon", 0), stop_after=2)
    params = run.learner.now.params
    params["norm.weight"] = jax.numpy.full_like(params["norm.weight"], np.inf)
    run.save()
    train(Run(in_jax, corpus, tmp_path, "muon", 0))
    assert Run(in_jax, corpus, tmp_path, "muon", 0).finished
    assert len(records(tmp_path)) == 3
    result = json.loads((tmp_path / RESULT).read_text())
    assert (result["steps"], result["diverged"], result["final_val_loss"]) == (3, True, "nan")


def test_the_framework_is_recorded_and_recognised(panel):
    in_jax = replace(panel, framework="jax")
    assert in_jax.to_json()["framework"] == "jax"
    assert Panel.from_json(json.loads(json.dumps(in_jax.to_json()))) == in_jax
    assert differences(panel.to_json(), in_jax.to_json()) == ["framework: recorded torch, asked for jax"]
    old = {name: value for name, value in panel.to_json().items() if name != "framework"}
    assert Panel.from_json(old) == panel
    assert differences(old, panel.to_json()) == []
    assert differences(old, in_jax.to_json()) == ["framework: recorded torch, asked for jax"]


def test_pictures_and_pages_name_the_framework(panel):
    made = environment(framework="jax")
    for name in ("jax", "jaxlib", "optax"):
        assert f"{name} {made[name]}" in footer(made)
    assert "torch" not in footer(made)
    assert "jaxlib" not in footer(environment())
    in_jax, in_torch = PanelResult(replace(panel, framework="jax"), {}, {}, made), PanelResult(panel, {}, {})
    told = compare([in_torch, replace(in_jax, environment=made)])
    assert told[0] == "The panels differ in framework (torch / jax)."
    assert not any("jaxlib" in sentence for sentence in told)
    other = replace(in_jax, environment=made | {"jax": "99"})
    assert compare([in_jax, other])[1] == f"They were made with different jax ({made['jax']} / 99)."


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
    assert "<tr><th>framework</th><td>JAX</td></tr>" in html
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
