"""The examples run whole, from an empty folder, and show what their pages say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "examples"
SHORT = {"nanogpt": ["--steps", "60"], "diffusion_transformer": ["--steps", "40"]}
SAYS = {
    "nanogpt": r"AdamW: \d\.\d{3} nats.*MuonClip: \d\.\d{3} nats per byte on held-out files",
    "hf_trainer": r"qk_clip/bound.*QK-Clip: 0 of 12 heads clipped at tau = 100",
    "trl_trainers": r"SFT: .*clipped heads [1-9].*same weights to the bit: True.*DPO: .*GRPO: .*clipped heads",
    "peft_lora": r"above tau, cannot be clipped: frozen.*the base is the same to the bit: True",
    "flax_nnx_gpt": r"proven: blocks/0/attention .*blocks/2/attention: maxima .*γ.*at the same weights: True",
    "flax_linen": r"step 60: loss [01]\.\d+, γ .*attention_1.*0\.9",
    "equinox_attention": r"step 60: loss [0-2]\.\d+, γ .*attention.*0\.9",
    "digits_vit": r"9\d\.\d% of the test images are read rightly",
    "diffusion_transformer": r"QK-Clip: 0 of 16 heads clipped",
    "mixed_precision_scaler": r"[1-9] steps skipped, 3\d taken",
    "monitor_only": r"largest logit at the end: \d+",
}
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))


def output_of(command, folder):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", SAYS)
def test_an_example_runs_whole(name, tmp_path):
    said = output_of([sys.executable, FOLDER / f"{name}.py", *SHORT.get(name, [])], tmp_path)
    assert re.search(SAYS[name], said, re.DOTALL), said[-3000:]
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", (FOLDER / f"{name}.md").read_text(encoding="utf-8")):
        assert (tmp_path / picture).stat().st_size > 10_000


@pytest.mark.slow
def test_fsdp2_goes_on_with_other_numbers_of_ranks(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    first = output_of([*command, "2", FOLDER / "fsdp2.py"], tmp_path)
    second = output_of([*command, "4", FOLDER / "fsdp2.py", "--resume"], tmp_path)
    losses = [float(loss) for loss in re.findall(r"step \d+: loss ([\d.]+), largest logit \d", first + second)]
    assert len(losses) == 8
    assert max(losses[3:]) < losses[0]
    assert "step 40" in second


def test_every_example_has_a_page_and_is_short():
    assert {*SAYS, "fsdp2"} == set(NAMES)
    index = (FOLDER / "index.md").read_text(encoding="utf-8")
    for name in NAMES:
        assert len((FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 120
        assert f'--8<-- "docs/examples/{name}.py"' in (FOLDER / f"{name}.md").read_text(encoding="utf-8")
        assert f"({name}.md)" in index
