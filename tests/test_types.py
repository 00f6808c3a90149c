"""What a user's type checker says of the lines that the pages show, in its strict mode."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = """# pyright: strict
from torch import nn

from muonclip.torch import MuonClip, QKClip

model = nn.Linear(3, 3)
optimizer = MuonClip(model, lr=1e-3)
print(optimizer.plan, optimizer.qk_clip.report())
print(MuonClip(model, qk_clip="required").qk_clip.report())
print(MuonClip(model, qk_clip=QKClip(model)).qk_clip.report())


class Mine(MuonClip): ...


def train(optimizer: MuonClip) -> float:
    return optimizer.qk_clip.report().max_logit


print(train(optimizer), train(Mine(model)))
off = MuonClip(model, qk_clip=None)
off.qk_clip.report()  # wrong
given: QKClip | None = QKClip(model) if model.in_features else None
MuonClip(model, qk_clip=given).qk_clip.report()  # wrong
MuonClip(model, qk_clip="automatic")  # wrong
"""


@pytest.mark.slow
def test_a_clip_that_is_on_needs_no_check_and_one_that_is_off_is_none(tmp_path):
    script = tmp_path / "user.py"
    script.write_text(SCRIPT, encoding="utf-8")
    words = ("--outputjson", "--pythonpath", sys.executable, "--level", "error", str(script))
    done = subprocess.run(
        [sys.executable, "-m", "basedpyright", *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    found = json.loads(done.stdout)["generalDiagnostics"]
    lines = {each["range"]["start"]["line"] for each in found}
    expected = {number for number, line in enumerate(SCRIPT.splitlines()) if line.endswith("# wrong")}
    assert lines == expected, [(each["range"]["start"]["line"] + 1, each["message"]) for each in found]
