"""The self-test that users run: it holds here, and each part fails where what it tries is broken."""

import functools
import importlib
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from kernel_case import stand_ins
from torchrun import torchrun

import muonclip
from muonclip.__main__ import main
from muonclip.selftest import clip, iteration, jax_parts, kernels, run, steps
from muonclip.selftest.outcomes import Outcome, Part, outcomes_of, within

ROOT = Path(__file__).parents[1]


def tried(part, device="cpu"):
    """Name → outcome, of what was tried."""
    found = outcomes_of([Part("part", part)], device, math.inf)
    return {each.name: each for each in found if each.holds is not None}


def every_clip(device):
    yield from clip.clip(device)
    yield from clip.clip_transformers(device)


def test_everything_holds_here(monkeypatch, capsys):
    monkeypatch.setattr(run, "results", functools.partial(run.results, seconds=math.inf))  # a busy machine, too
    assert main(["check", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"muonclip:    {muonclip.__version__} in ")
    holding = {
        line.partition(":")[0].removeprefix("holds").strip() for line in printed.splitlines() if "holds " in line
    }
    assert holding == {
        *(f"iteration, {form} form, {dtype}" for form in ("standard", "gram") for dtype in ("float64", "float32")),
        *(f"iteration, {form} form, bfloat16" for form in ("standard", "gram")),
        *(f"training, {dtype}" for dtype in ("float32", "bfloat16")),
        *(f"clip, {name}" for name in ("scaled_dot_product_attention", "product and softmax", "FlexAttention")),
        *(f"clip, transformers, {implementation}" for implementation in ("sdpa", "eager")),
        *(
            f"JAX, iteration, {form} form, {dtype}"
            for form in ("standard", "gram")
            for dtype in ("float32", "bfloat16")
        ),
        *("JAX, maxima", "JAX, clip", "JAX, heads not above tau"),
    }
    assert "FAILED" not in printed
    assert f"all {len(holding)} hold, " in printed
    assert "torchrun --nproc-per-node 2 -m muonclip check" in printed


def of_four_steps(original):
    @functools.wraps(original)
    def iterate(x, coefficients, ns_steps=None, **options):
        return original(x, coefficients, 4, **options)

    return iterate


def test_an_iteration_of_a_step_fewer_fails_in_each_form_and_dtype(monkeypatch, capsys):
    execute = importlib.import_module("muonclip.torch.update.execute")
    monkeypatch.setattr(execute, "iterate", of_four_steps(execute.iterate))
    monkeypatch.setattr(run, "OF_TORCH", (Part("iteration", iteration.iteration),))
    monkeypatch.setattr(run, "OF_JAX", ())
    monkeypatch.setattr(run, "LAST", ())
    assert main(["check", "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("FAILED  iteration, ") == 6
    assert "6 of 6 do not hold" in printed
    assert "paste all of the above" in printed


@pytest.mark.parametrize("broken", ["half of the way", "one side", "everything", "nothing"])
def test_factors_that_are_wrong_fail_on_every_kernel(monkeypatch, broken):
    rescaling = importlib.import_module("muonclip.torch.clip.rescaling")
    right = rescaling.clip_factors

    def wrong(*args, **options):
        factors = right(*args, **options)
        one, half = torch.ones_like(factors.key), torch.full_like(factors.key, 0.5)
        return type(factors)(
            *{
                "half of the way": (factors.gamma**0.5, factors.query**0.5, factors.key**0.5),
                "one side": (factors.gamma, factors.query, one),
                "everything": (half**2, half, half),
                "nothing": (one, one, one),
            }[broken]
        )

    monkeypatch.setattr(rescaling, "clip_factors", wrong)
    found = tried(every_clip)
    assert len(found) == 5
    assert not any(each.holds for each in found.values()), found


def test_maxima_that_are_wrong_fail(monkeypatch):
    """As they would be by a kernel that is read with another scale."""
    clips = importlib.import_module("muonclip.torch.clip.qk_clip")
    right = clips.decide

    def wrong(maxima, *args, **options):
        maxima.maximum.mul_(1.01)
        return right(maxima, *args, **options)

    monkeypatch.setattr(clips, "decide", wrong)
    found = tried(every_clip)
    assert len(found) == 5
    assert all("maxima off by" in each.what for each in found.values() if not each.holds)
    assert not any(each.holds for each in found.values())


def test_a_training_step_that_clips_nothing_fails(monkeypatch):
    monkeypatch.setattr(steps, "_TAU", 1e6)
    assert {each.holds for each in tried(steps.training).values()} == {False}


def test_jax_fails_too(monkeypatch):
    module = importlib.import_module("muonclip.optax.newton_schulz")
    monkeypatch.setattr(module, "iterate", of_four_steps(module.iterate))
    assert {each.holds for each in tried(jax_parts.jax_iteration).values()} == {False}
    factors = importlib.import_module("muonclip.optax.qk_clip")
    right = factors.clip_factors
    monkeypatch.setattr(factors, "clip_factors", lambda maxima, *args, **options: right(2 * maxima, *args, **options))
    found = tried(jax_parts.jax_clip)
    assert not found["JAX, clip"].holds
    assert found["JAX, maxima"].holds


def test_a_part_that_fails_does_not_stop_the_next_and_none_begins_too_late():
    def breaks(device):
        yield Outcome("first", True, "seen")
        raise RuntimeError("out of order\nand more")

    def works(device):
        yield Outcome("last", True, device)

    found = list(outcomes_of([Part("breaks", breaks), Part("works", works)], "cpu", math.inf))
    assert [(each.name, each.holds) for each in found] == [("first", True), ("breaks", False), ("last", True)]
    assert found[1].what == "RuntimeError: out of order"
    assert 'raise RuntimeError("out of order' in found[1].trace
    assert "    RuntimeError: out of order" in str(found[1])
    (late,) = outcomes_of([Part("works", works)], "cpu", -math.inf)
    assert late.holds is None
    slow = Part("slow", lambda device: (time.sleep(0.2) or Outcome(str(i), True, "seen") for i in range(9)))
    assert [each.name for each in outcomes_of([slow], "cpu", time.monotonic() + 0.1)] == ["0", "slow, the rest"]
    (waited_for,) = outcomes_of([Part("works", works, always=True)], "cpu", -math.inf)
    assert waited_for.holds


def test_a_dtype_or_a_kernel_that_raises_does_not_stop_the_others(monkeypatch):
    muon = importlib.import_module("muonclip.torch.optimizer.muonclip").Muon

    def step(self, original=muon.step):
        if self.param_groups[0]["ns_dtype"] == "float32":
            raise RuntimeError("not on this device")
        return original(self)

    monkeypatch.setattr(muon, "step", step)
    found = tried(iteration.iteration)
    assert {name: each.holds for name, each in found.items()} == {name: "float32" not in name for name in found}
    assert len(found) == 6
    written = kernels.Kernel("broken", lambda: 1 / 0, is_everywhere=True)
    monkeypatch.setattr(clip, "kernels", lambda device: iter([written, *list(kernels.kernels(device))[:1]]))
    assert [each.holds for each in tried(clip.clip).values()] == [False, True]


def test_nan_is_no_small_error():
    assert not within("x", float("nan"), 1.0).holds


@pytest.mark.parametrize("name", ["flash-attn 2", "flash-attn 3", "flash-attn 4", "xFormers", "TransformerEngine"])
def test_kernels_of_packages_are_tried_as_users_call_them(monkeypatch, name, no_other_patches):
    """By the stand-ins of the tests, which run on the CPU."""
    with stand_ins(monkeypatch):
        kernel = next(each for each in kernels.kernels("cuda") if each.name == name)
        assert kernel.is_installed()
        outcome = clip.clipped_by(kernel, "cpu")
    assert outcome.holds, outcome


@pytest.fixture
def no_other_patches():
    from muonclip.torch.observe.patches import PATCHES

    others = PATCHES.users
    if others:
        PATCHES.users = 1
        PATCHES.remove_user()
    yield
    PATCHES.users += others


def test_a_kernel_that_does_not_run_without_a_clip_is_said_and_one_that_runs_everywhere_must():
    def load():
        raise ImportError("libcudart.so")

    broken = kernels.Kernel("broken", load)
    outcome = clip.clipped_by(broken, "cpu")
    assert outcome.holds is None
    assert "libcudart.so" in outcome.what
    with pytest.raises(ImportError):
        clip.clipped_by(kernels.Kernel("broken", load, is_everywhere=True), "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [("torch",), ("jax",), ("torch", "jax", "numpy")])
def test_without_a_framework_it_says_so_and_tries_the_rest(hidden):
    hide = f"import sys; sys.modules.update(dict.fromkeys({hidden!r})); from muonclip.__main__ import main; "
    for words, status in (([], 0), (["check"], int("torch" in hidden and "jax" in hidden))):
        done = subprocess.run(
            [sys.executable, "-c", f"{hide} sys.exit(main({words!r}))"], capture_output=True, text=True, check=False
        )
        assert done.returncode == status, done.stderr
        assert not done.stderr
        for name in hidden[:2]:
            assert f"\n{name + ':':12} not installed" in done.stdout
    assert ("holds   iteration, gram form, float32" in done.stdout) == ("torch" not in hidden)
    assert ("holds   JAX, clip" in done.stdout) == ("jax" not in hidden)


def test_a_device_that_is_not_there_is_a_wrong_option(capsys):
    if torch.cuda.is_available():
        pytest.skip("CUDA is there")
    assert main(["check", "--device", "cuda"]) == 2
    assert "--device cuda: torch" in capsys.readouterr().out


@pytest.mark.slow
def test_ranks_share_their_maxima(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(
        "import os\n"
        "from muonclip.selftest.outcomes import Part, outcomes_of\n"
        "from muonclip.selftest.steps import collective\n"
        "import torch.distributed as dist\n"
        "def say(outcome):  # in one write, since the ranks share a pipe\n"
        "    os.write(1, f\"{os.environ['RANK']} {outcome}\\n\".encode())\n"
        "dist.init_process_group('gloo')\n"
        "for outcome in outcomes_of([Part('ranks', collective)], 'cpu', float('inf')):\n"
        "    say(outcome)\n"
        "reduce = dist.all_reduce\n"
        "dist.all_reduce = lambda tensor, *args, **options: reduce(tensor.clone(), *args, **options)\n"
        "for outcome in outcomes_of([Part('ranks', collective)], 'cpu', float('inf')):\n"
        "    say(outcome)\n"
        "dist.destroy_process_group()\n",
        encoding="utf-8",
    )
    printed = torchrun(2, script, cwd=tmp_path, timeout=300)
    for rank in range(2):
        assert f"{rank} holds   maxima of all ranks: 2 ranks by gloo" in printed
        assert f"{rank} FAILED  maxima of all ranks: 2 ranks by gloo" in printed
