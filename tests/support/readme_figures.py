"""The figures of the README, from the JSON files that the commands have written.

python tests/support/readme_figures.py         puts them between their marks
"""

import json
import re
import textwrap
from pathlib import Path

from benchmarks.records.summary import bits
from benchmarks.studies.evidence_reading import read_rates
from benchmarks.studies.speed_steps import OURS, TORCH, facts

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"


def figures() -> dict[str, str]:
    """Return the text of each mark."""
    return {"rates": _rates(), "cost": _cost(), "reproduce": _reproduce()}


def written(text: str) -> str:
    """Return a README with its figures put between their marks."""
    for name, figure in figures().items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
        text, found = re.subn(f"{begin}.*?{end}", lambda _, t=f"{begin}{figure}{end}": t, text, flags=re.DOTALL)
        assert found == 1, name
    return text


def _read(name: str) -> dict:
    return json.loads((ROOT / "docs" / name).read_text(encoding="utf-8"))


def _rates() -> str:
    return "\n" + read_rates(_read("evidence/rates.json")) + "\n"


def _cost() -> str:
    part = _read("speed/cpu.json")["parts"]["steps"]
    rows = {(row["model"], row["tokens"]): facts(row) for row in part["rows"] if row["dtype"] == "float32"}
    cases = [("Llama, 5M", 1024), ("Llama, 5M", 8192), ("reference MoE", 1024), ("reference MoE", 8192)]
    a, b, c, d = (f"{rows[case][OURS]:.2f}" for case in cases)
    *first, last = (f"{rows[case][TORCH]:.2f}" for case in cases)
    host = _read("clip-cost/cpu.json")["host"]
    small, deep = host["first_steps"]
    made = part["environment"]
    return _filled(
        f"A training step with MuonClip takes {a} times that with fused AdamW for a Llama of 5M parameters and 1024 "
        f"tokens a step, {b} times for 8192 tokens; {c} and {d} times for the mixture above. `torch.optim.Muon`, with "
        f"AdamW for what is not its own, takes {', '.join(first)} and {last} times. The import takes "
        f"{host['imports']['muonclip']:.1f} s more than PyTorch's own. Once, the attention is found: "
        f"{small['built']:.1f} s at the construction and {small['found']:.1f} s in the first forward for "
        f"{small['layers']} layers, {deep['built']:.1f} and {deep['found']:.1f} s for {deep['layers']}. Measured with "
        f"one thread of an {made['cpu']} in float32, {made['date'][:10]}; [speed](docs/speed.md) and "
        "[what QK-Clip costs](docs/clip-cost.md) have all of it."
    )


def _reproduce() -> str:
    lines = ["| rate | optimizer | seed | validation, bits per byte | peak logit | median of the last quarter |"]
    lines.append("|---|---|---|---|---|---|")
    for name in ("hot", "own-rate"):
        result = _read(f"reproduce/{name}.json")
        training = result["config"]["training"]
        labels = {"adamw": "AdamW", "muon": "Muon", "muonclip": f"MuonClip, τ = {training['tau']:g}"}
        for arm, seeds in result["arms"].items():
            for seed, run in seeds.items():
                loss, peak = f"{bits(run['final_val_loss']):.3f}", f"{run['max_logit_peak']:.0f}"
                last = f"{run['max_logit_median_last_quarter']:.0f}"
                lines.append(f"| {training['lr'][arm]:g} | {labels[arm]} | {seed} | {loss} | {peak} | {last} |")
    made = result["environment"]
    said = _filled(
        f"`make reproduce` printed these on {made['date'][:10]} ({made['cores']} cores of an {made['cpu']}, Python "
        f"{made['python']}, PyTorch {made['torch'].partition('+')[0]} for CPU)."
    )
    return "\n" + "\n".join(lines) + "\n" + said


def _filled(said: str) -> str:
    return "\n" + textwrap.fill(said, 120, break_long_words=False, break_on_hyphens=False) + "\n\n"


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
