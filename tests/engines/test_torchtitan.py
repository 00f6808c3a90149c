"""MuonClip in TorchTitan's own trainer, on processors: its debug models of DeepSeek-V3, Llama and Kimi, of two layers.

All runs begin at the same weights and see the same rows. The oracle is TorchTitan's own container of optimizers with
Muon and AdamW by patterns of names, in one process, and a clip written out in the worker, whose maxima are dense.
"""

import subprocess
import sys

import forked_ranks
import pytest
import torch
from forked_ranks import run_ranks
from torch.multiprocessing import ProcessExitedException

WORKER = "tests/support/torchtitan_worker.py"
HEADS, TAU = 16, 2.0
MODEL = ("deepseek_v3_debugmodel", 2)
LLAMA, KIMI = ("llama3_debugmodel", 2), ("kimi_debugmodel", 2)
SHARDS = "--parallelism.data_parallel_shard_degree="
CHECKPOINTS = ("--checkpoint.enable", "--checkpoint.interval=1", "--checkpoint.no-last-save-model-only")
PIPELINE = ("--parallelism.pipeline_parallel_degree=2", "--parallelism.pipeline_parallel_schedule=1F1B")
MESHES = {  # the number of ranks, and options
    "one process": (1, ()),
    "FSDP 2": (2, (SHARDS + "2",)),
    "HSDP 4": (4, (SHARDS + "2", "--parallelism.data_parallel_replicate_degree=2", "--training.local_batch_size=1")),
    "EP 2": (2, (SHARDS + "2", "--parallelism.expert_parallel_degree=2")),
    "TP 2": (2, (SHARDS + "1", "--parallelism.tensor_parallel_degree=2")),
    # torch's first forward of a stage, for its shapes, counts tokens by expert as well
    "PP 2": (2, ("unbalanced", *PIPELINE, "--training.local_batch_size=4")),
}


@pytest.fixture(autouse=True, scope="module")
def preloaded():
    forked_ranks.PRELOADED.append("torchtitan_host")


def run(folder, ranks, *words):
    folder.mkdir(exist_ok=True)
    run_ranks(ranks, WORKER, folder, *words, timeout=300)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    return run(tmp_path_factory.mktemp("hand"), 1, "hand", *MODEL)[0]


@pytest.fixture(scope="module")
def unbalanced_oracle(tmp_path_factory):
    return run(tmp_path_factory.mktemp("hand"), 1, "hand", *MODEL, "unbalanced")[0]


@pytest.fixture(scope="module", params=MESHES)
def trained(request, tmp_path_factory):
    ranks, options = MESHES[request.param]
    return run(tmp_path_factory.mktemp("door"), ranks, "door", *MODEL, *options)


def losses(left):
    """What the last rank logged, which has the last stage of a pipeline."""
    return torch.tensor([values["loss_metrics/global_avg_loss"] for values in left[-1]["logged"]], dtype=torch.float64)


def united(left, what):
    """The parameters or buffers of all stages; those of other ranks are the same."""
    return {name: value for each in left for name, value in each[what].items()}


def update_error(left, oracle):
    """The worst over parameters of ‖difference of the updates‖ / ‖update‖."""
    after = united(left, "after")
    assert after.keys() == oracle["after"].keys()
    errors = {
        name: ((after[name] - expected).norm() / (expected - oracle["before"][name]).norm()).item()
        for name, expected in oracle["after"].items()
    }
    return max(errors.values())


def layers_of(left, step):
    parts = [part for each in left for part in each["clips"][step]]
    return {
        name.replace("_checkpoint_wrapped_module.", ""): own for part in parts for name, own in part["layers"].items()
    }


def seen_by_probes(left, step, name):
    """The largest logit of each head over ranks, of which each has all heads or, next to each other, some."""
    seen = [each["maxima"][step][name] for each in left if name in each["maxima"][step]]
    return torch.cat(seen) if len(seen[0]) < HEADS else torch.stack(seen).amax(0)


def check_training(trained, expected):
    torch.testing.assert_close(losses(trained), losses([expected]), rtol=0, atol=1e-5)
    assert update_error(trained, expected) < 1e-4


def test_training_is_that_of_torchtitan_s_container_driven_by_hand(trained, request):
    balanced = bool(united(trained, "biases"))
    expected = request.getfixturevalue("oracle" if balanced else "unbalanced_oracle")
    check_training(trained, expected)
    assert united(trained, "biases").keys() == expected["biases"].keys()  # of the experts, by TorchTitan's own hook
    for name, bias in expected["biases"].items():
        assert bias.any()
        for each in trained:
            assert torch.equal(each["biases"][name], bias)


def test_llama_by_groups_of_queries_is_trained_in_a_ring_and_compiled(tmp_path):
    (expected,) = run(tmp_path, 1, "hand", *LLAMA)
    ring = ("--parallelism.context_parallel_degree=2", "--training.local_batch_size=4")
    trained = run(tmp_path, 2, "door", *LLAMA, SHARDS + "1", *ring)
    check_training(trained, expected)
    compiled = run(tmp_path, 1, "door", *LLAMA, "--compile.enable", "--compile.backend=aot_eager")
    check_training(compiled, expected)
    for left in (trained, compiled):
        assert [values["qk_clip/clipped_heads"] for values in left[0]["logged"]] == [
            sum(int((each > TAU).sum()) for each in maxima.values()) for maxima in expected["maxima"]
        ]


def test_kimi_is_trained_with_its_experts_on_two_ranks(tmp_path):
    (expected,) = run(tmp_path, 1, "hand", *KIMI)
    trained = run(tmp_path, 2, "door", *KIMI, SHARDS + "2", "--parallelism.expert_parallel_degree=2")
    check_training(trained, expected)


def test_the_maxima_are_those_of_all_ranks_and_the_factors_follow_from_them(trained):
    clipped = 0
    for step in range(3):
        layers = layers_of(trained, step)
        assert len(layers) == 2
        for name, layer in layers.items():
            seen = seen_by_probes(trained, step, name)
            above = seen > TAU
            clipped += int(above.sum())
            gamma = torch.where(above, TAU / seen, 1.0)
            torch.testing.assert_close(torch.tensor(layer["gamma"]).double(), gamma, rtol=1e-5, atol=0)
            exact = torch.tensor(layer["exact"])
            assert exact[above].all()
            maxima = torch.tensor(layer["max_logits"]).double()
            torch.testing.assert_close(maxima[exact], seen[exact], rtol=1e-5, atol=0)
    assert 0 < clipped < 3 * 2 * HEADS


def test_the_metrics_have_what_the_clip_saw_in_all_stages(trained):
    for step, values in enumerate(trained[0]["logged"]):
        layers = layers_of(trained, step).values()
        gamma = [each for layer in layers for each in layer["gamma"]]
        pairs = [each for layer in layers for each in zip(layer["max_logits"], layer["exact"], strict=True)]
        assert values["qk_clip/clipped_heads"] == sum(each < 1 for each in gamma)
        assert values["qk_clip/min_gamma"] == pytest.approx(min(gamma))
        assert values["qk_clip/max_logit"] == pytest.approx(max(largest for largest, exact in pairs if exact))
        assert values["qk_clip/last_clipped_step"] == step + 1


def test_a_run_on_two_ranks_is_resumed_on_four(oracle, tmp_path):
    run(tmp_path, 2, "door", *MODEL, SHARDS + "2", *CHECKPOINTS, "--training.steps=2")
    left = run(tmp_path, 4, "door", *MODEL, SHARDS + "4", "--training.local_batch_size=1", *CHECKPOINTS)
    assert len(left[0]["logged"]) == 1
    torch.testing.assert_close(losses(left), losses([oracle])[2:], rtol=0, atol=1e-5)
    assert update_error(left, oracle) < 1e-4


def test_a_run_that_was_killed_amid_a_step_goes_on_to_the_same_weights(tmp_path):
    experts = (*MODEL, SHARDS + "2", "--parallelism.expert_parallel_degree=2", *CHECKPOINTS)
    whole = run(tmp_path / "whole", 2, "door", *experts)
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run(tmp_path / "killed", 2, "killed", *experts, "--checkpoint.async_mode=async")
    saved = sorted(int(path.name.removeprefix("step-")) for path in (tmp_path / "killed/checkpoint").glob("step-*"))
    left = run(tmp_path / "killed", 2, "door", *experts)
    assert saved
    assert len(left[0]["logged"]) < 3
    for one, other in zip(left, whole, strict=True):
        for what in ("after", "biases"):
            assert one[what].keys() == other[what].keys()
            assert all(torch.equal(each, other[what][name]) for name, each in one[what].items())


def test_without_torchtitan_the_import_names_the_extra():
    code = "import sys; sys.modules['torchtitan'] = None; import muonclip.torch.torchtitan"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'muonclip[torchtitan]'" in done.stderr


@pytest.mark.filterwarnings("ignore")
def test_a_configuration_keeps_its_rate_and_everything_else():
    import torchtitan_host as host
    from torchtitan.config import ConfigManager
    from torchtitan.models.llama3.config_registry import llama3_8b

    own, ours = llama3_8b(), host.door.llama3_8b()
    assert ours.optimizer.lr == own.optimizer.param_groups[0].optimizer_kwargs["lr"]
    for name in ("training", "parallelism", "lr_scheduler", "activation_checkpoint", "compile", "checkpoint"):
        assert getattr(ours, name) == getattr(own, name)
    given = host.parse(ours, ["--optimizer.tau=50", "--optimizer.recipe=k2", "--optimizer.lr=1e-3"])
    assert (given.optimizer.tau, given.optimizer.recipe, given.optimizer.lr) == (50.0, "k2", 1e-3)
    assert {"llama3_debugmodel", "moonlight_16b_a3b", "kimi_k2_5", "deepseek_v3_671b"} <= set(dir(host.door))
    by_words = ["--module", "muonclip.torch.torchtitan", "--config", "moonlight_16b_a3b", "--optimizer.tau", "50"]
    moonlight = ConfigManager().parse_args(by_words)  # as TorchTitan's own entry does
    assert (type(moonlight.optimizer), moonlight.optimizer.tau) == (host.door.MuonClipContainer.Config, 50.0)
    assert moonlight.optimizer.lr == 3e-4
    with pytest.raises(AttributeError, match="llama3_9b"):
        host.door.llama3_9b  # noqa: B018
    with pytest.raises(ValueError, match="param_groups"):
        host.door.MuonClipContainer(host.door.MuonClipContainer.Config(param_groups=[None]), model_parts=[])
    with pytest.raises(ValueError, match="clip=False"):
        host.door.MuonClipContainer(host.door.MuonClipContainer.Config(tau=1.0, clip=False), model_parts=[])
