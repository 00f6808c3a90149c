"""Tables as text: for the terminal, as Markdown, and the rows of an experiment's finished runs."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.records.summary import Results, bits

Rows = Sequence[Sequence[str]]  # the first is the head


def aligned(rows: Rows) -> str:
    """Align columns with two spaces between them, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def markdown(rows: Rows) -> str:
    head, *rest = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, f"|{'---|' * len(rows[0])}", *rest])


def runs_table(results: Results) -> Rows:
    """Make a row per finished run; bits are per byte, per token for token ids."""
    unit = results.experiment.data.unit.replace("bits per ", "bits/")
    measured = ["val loss", unit, "peak logit", "last quarter", "clips", "spikes", "tokens/s", "time"]
    rows = [["arm", "seed", "rate", *measured]]
    for arm, seed in results.experiment.runs():
        if run := results.summaries.get(arm.name, {}).get(seed):
            rows.append(
                [
                    arm.label,
                    str(seed),
                    f"{arm.lr:g}",
                    f"{run['final_val_loss']:.3f}",
                    f"{bits(run['final_val_loss']):.3f}",
                    f"{run['max_logit_peak']:.1f}",
                    f"{run['max_logit_median_last_quarter']:.1f}",
                    str(run["clipped_head_steps"]),
                    str(run["loss_spikes"]),
                    f"{run['tokens_per_second']:.0f}",
                    f"{run['wall_seconds']:.0f} s",
                ]
            )
    return rows


def runs_text(results: Results) -> str:
    """Write the table for the terminal, and a line for each arm that changes the model."""
    notes = model_notes(results)
    return "\n".join([aligned(runs_table(results)), *([""] if notes else []), *notes])


def model_notes(results: Results) -> list[str]:
    """Write a line for each arm that changes the model."""
    capped = "; its logits are measured before the cap."
    return [
        f"{arm.label} changes the model: {arm.change}{capped if arm.capped else '.'}"
        for arm in results.experiment.arms
        if arm.changes
    ]
