"""Tables as text: as Markdown, and the rows of an experiment's finished runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.records.summary import Results, bits
from muonclip.core.text_table import table

Rows = Sequence[Sequence[str]]  # the first is the head
_OF_RUNS = {  # by their heading, from a summary
    "val loss": "{final_val_loss:.3f}",
    "{unit}": "{bits:.3f}",
    "peak logit": "{max_logit_peak:.1f}",
    "last quarter": "{max_logit_median_last_quarter:.1f}",
    "clips": "{clipped_head_steps}",
    "spikes": "{loss_spikes}",
    "tokens/s": "{tokens_per_second:.0f}",
    "time": "{wall_seconds:.0f} s",
}


def rows_of(cells: Sequence[Mapping[str, str]]) -> Rows:
    """Make rows of cells by their heading; none of no cells."""
    return [list(head) for head in cells[:1]] + [list(row.values()) for row in cells]


def runs_table(results: Results) -> Rows:
    """Make a row per finished run; bits are per byte, per token for token ids."""
    unit = results.experiment.data.unit.replace("bits per ", "bits/")
    rows = [["arm", "seed", "rate", *(heading.format(unit=unit) for heading in _OF_RUNS)]]
    for arm, seed in results.experiment.runs():
        if run := results.summaries.get(arm.name, {}).get(seed):
            values = {**run, "bits": bits(run["final_val_loss"])}
            rows.append([arm.label, str(seed), f"{arm.lr:g}", *(cell.format(**values) for cell in _OF_RUNS.values())])
    return rows


def runs_text(results: Results) -> str:
    """Write the table for the terminal, and a line for each arm that changes the model."""
    return "\n".join([table(runs_table(results)), *(f"\n{note}" for note in model_notes(results))])


def model_notes(results: Results) -> list[str]:
    """Write a line for each arm that changes the model."""
    capped = "; its logits are measured before the cap."
    return [
        f"{arm.label} changes the model: {arm.change}{capped if arm.capped else '.'}"
        for arm in results.experiment.arms
        if arm.changes
    ]
