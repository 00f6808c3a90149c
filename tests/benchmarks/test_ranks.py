"""The harness under torchrun: the curves of one process, the options, and the files that start it on nodes."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from bench_runs import with_arms
from torchrun import torchrun

from benchmarks.__main__ import main
from benchmarks.commands import parallelism
from benchmarks.experiment.data import open_corpus
from benchmarks.experiment.errors import UsageError
from benchmarks.experiment.presets import PRESETS
from benchmarks.options import make_parser
from benchmarks.records.summary import read_folder
from benchmarks.studies import kill_trials
from benchmarks.training.sharded_learner import Layout
from muonclip.models.parallel import Parallelism

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "benchmarks" / "launch"
STEPS = 50


# With Muon rounding grows, since a token that lies between two experts goes to the other one. Four runs of one process
# that are given the windows of each batch in another order differ in the loss by 1e-6 until step 20, by 2e-4 at step
# 24, by 3e-3 at step 32 and 2e-2 at step 48, at the preset's hot rate and at Muon's own. So both are compared while
# rounding is small; their ends, below, only roughly.
ARMS = {"adamw": 50, "muonclip": 24, "muonclip@lr=0.005@tau=1": 24}  # and steps that are compared


def command(out):
    options = f"--preset cpu --arms {','.join(ARMS)} --seeds 0 --steps {STEPS} --batch 8 --precision fp32"
    return ["-m", "benchmarks", "explosion", *options.split(), "--out", str(out)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    subprocess.run([sys.executable, *command(out)], cwd=ROOT, check=True, timeout=600)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        (2, "--accumulate 2"),
        (2, "--tensor 2"),
        (4, "--replicas 2 --shards 2 --experts 2 --recompute"),
        (8, "--shards 4 --tensor 2 --experts 4 --async-checkpoints --checkpoint-every 7"),
    ],
)
def test_the_curves_of_one_process(processes, layout, alone, tmp_path):
    printed = torchrun(processes, *command(tmp_path), *layout.split(), timeout=1500)
    assert printed.count("MuonClip") == 2, "the first rank alone prints"
    for arm, compared in ARMS.items():
        whole, parts = (kill_trials.records(out, arm) for out in (alone, tmp_path))
        assert len(whole) == len(parts) == STEPS
        for one, many in zip(whole[:compared], parts[:compared], strict=True):
            assert many.keys() == one.keys()
            assert many["loss"] == pytest.approx(one["loss"], abs=1e-3)
            assert many["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.02)
            assert many["max_logits"].keys() == one["max_logits"].keys()
            for attention, heads in one["max_logits"].items():
                assert many["max_logits"][attention] == pytest.approx(heads, rel=0.01, abs=1e-3)
        for name in ("val_loss", "update_rms"):
            assert parts[-1][name] == pytest.approx(whole[-1][name], rel=2e-3 if compared == STEPS else 0.02)
        assert any(record["clipped_heads"] for record in parts) == ("tau" in arm)
    (drawn,) = read_folder(tmp_path)
    assert drawn.environment["world_size"] == processes
    assert (tmp_path / "report.html").exists()
    # Under another number of ranks the folder is the same: all is finished, so it only draws.
    main([*command(tmp_path)[2:]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shards", "2"], "argument --shards: is for several processes: torchrun --nproc-per-node N"),
        (["--async-checkpoints"], "argument --async-checkpoints: is for several processes"),
        (["--tensor", "0"], "argument --tensor: '0' is not an integer of at least 1"),
        (["--checkpoint-every", "x"], "argument --checkpoint-every: 'x' is not an integer"),
    ],
)
def test_wrong_options_alone(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["explosion", "--out", str(tmp_path / "out"), *arguments])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("layout", "ranks", "option", "words"),
    [
        (Layout(Parallelism(shards=3)), 4, "--replicas", "but there are 4"),
        (Layout(Parallelism(shards=4, experts=3)), 4, "--experts", "must divide replicas · shards = 4"),
        (Layout(Parallelism(tensor=3)), 3, "--tensor", "must divide num_heads=4"),
        (
            Layout(Parallelism(shards=2), accumulate=3),
            2,
            "--batch",
            "4 windows cannot be divided over 2 data ranks × 3",
        ),
        (Layout(Parallelism(shards=4)), 4, "--shards", "4 data ranks do not divide the 3 windows of a validation"),
    ],
)
def test_layouts_that_do_not_fit(layout, ranks, option, words, experiment):
    four = with_arms(experiment, "muon", batch_size=4)
    with pytest.raises(UsageError) as raised:
        layout.check(four, ranks)
    assert raised.value.option == option
    assert words in str(raised.value)


def test_a_single_process_leaves_runs_of_torchrun_alone(tmp_path, capsys):
    (tmp_path / "runs" / "adamw-0" / "checkpoints").mkdir(parents=True)
    with pytest.raises(SystemExit):
        main(command(tmp_path)[2:])
    assert "is of a run under torchrun that is not finished" in capsys.readouterr().err


@pytest.mark.parametrize("file", sorted(path.name for path in LAUNCH.glob("*.s*")))
def test_launch_files_are_shell(file):
    subprocess.run(["bash", "-n", LAUNCH / file], check=True)


def launched(tmp_path, nodes, script=LAUNCH / "torchrun.sh", **variables):
    """The words after `torchrun` that the script would start."""
    for name, body in {
        "torchrun": 'printf "%s\\n" "$@"',
        "scontrol": "printf 'head-node\\nother\\n'",
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    }.items():
        tool = tmp_path / name
        tool.write_text(f"#!/bin/sh\n{body}\n")
        tool.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NODES": str(nodes)} | variables
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.split("\n")[:-1], done.stderr


@pytest.mark.parametrize("nodes", [1, 4, 32])
@pytest.mark.parametrize("slurm", [False, True])
def test_launched_commands_fit_the_nodes(nodes, slurm, tmp_path, experiment):
    tokens = tmp_path / "tokens.u32"
    tokens.write_bytes(bytes(4 * 100_000))
    variables = {"DATA": str(tokens), "OUT": "/shared/out"}
    if slurm:
        variables |= {
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_JOB_ID": "7",
            "SLURM_CPUS_PER_TASK": "64",
            "SLURM_JOB_NODELIST": "head-node,other",
            "SLURM_SUBMIT_DIR": str(ROOT),
        }
    script = LAUNCH / ("slurm.sbatch" if slurm else "torchrun.sh")
    status, words, errors = launched(tmp_path, nodes, script, **variables)
    assert status == 0, errors
    launcher, arguments = words[: words.index("-m")], words[words.index("-m") + 2 :]
    assert launcher[launcher.index("--nnodes") + 1] == str(nodes)
    assert launcher[launcher.index("--rdzv-endpoint") + 1] == ("head-node:29400" if slurm else "localhost:29400")
    options = make_parser()[0].parse_args(arguments)
    preset, ranks = PRESETS[options.preset], 8 * nodes
    model = preset.model(vocab_size=open_corpus(tokens).vocab_size)
    on_nodes = replace(experiment, chosen=options.arms, model=model, training=preset.training, device="cuda")
    layout = Layout(parallelism(options, ranks), options.accumulate, options.recompute)
    layout.check(on_nodes, ranks)
    per_rank = 12 * model.num_parameters() / (ranks // layout.parallelism.replicas)
    assert per_rank < 50e9, "weights, momentum and gradients in fp32 beside what training needs, of 80 GB"
    windows = preset.training.batch_size // (layout.parallelism.data * layout.accumulate)
    assert windows == 1


def test_other_numbers_of_nodes_are_refused(tmp_path):
    status, _, errors = launched(tmp_path, 3, DATA="d", OUT="o")
    assert status == 2
    assert "NODES=3: sizes are worked out for 1, 4 and 32 nodes" in errors


def test_recipe_of_the_cluster():
    """Kimi K2's report, section 2.5."""
    training = PRESETS["cluster"].training
    assert (training.tau, training.weight_decay, training.lr["muonclip"]) == (100.0, 0.1, 2e-4)
    schedule = training.schedule
    assert schedule(499) == 1.0
    assert schedule(training.steps) == pytest.approx(0.1)
    tokens = training.batch_size * PRESETS["cluster"].model().max_seq_len
    assert tokens == pytest.approx(67e6, rel=0.01)
    assert (schedule.warmup + schedule.constant) * tokens == pytest.approx(10e12, rel=0.01)
    assert schedule.decay * tokens == pytest.approx(5.5e12, rel=0.01)
