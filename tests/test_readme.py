"""The README's code, as it stands there."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def test_every_block_runs(capsys):
    torch.manual_seed(0)
    names = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "layers.2.attn.kv_b_proj.weight" in printed
    assert "QK-Clip: 0 of 12 heads clipped at tau = 100" in printed
    assert float(re.search(r"loss (\d+\.\d+)", printed)[1]) < 4.5


def test_the_attention_of_one_s_own_is_found_and_clipped():
    names = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 10), names["Attention"](10, 3, 4))
    optimizer = names["MuonClip"](model, lr=1e-3, tau=1e-3)
    model(torch.randn(2, 7, 5)).square().sum().backward()
    optimizer.step()
    assert optimizer.qk_clip.report().clipped_heads == 3


def test_the_pictures_exist():
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", TEXT):
        assert (ROOT / picture).stat().st_size > 10_000
