"""The records of a run as tables over its steps (pandas): numbers of the whole step, and numbers of every head.

`benchmarks.records.metrics` says what each field means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.records import metrics
from benchmarks.records.folders import METRICS

Frame = Any
"""A DataFrame of pandas, and below a Series: their annotations leave open what each operation gives."""
SCALARS = ("loss", "probe_loss", "val_loss", "lr", "grad_norm", "clipped_heads", "update_rms", "tokens_per_second")
BY_HEAD = {  # field of a record → what it is called over all heads, and how it is taken over them
    "max_logits": ("max_logit", "max"),
    "attention_entropy": ("attention_entropy", "mean"),
    "query_norms": ("query_norm", "max"),
    "key_norms": ("key_norm", "max"),
}


@dataclass(frozen=True, slots=True, eq=False)
class RunRecords:
    """The records of a run as two tables.

    `steps`: a row per step, a column for each of SCALARS and for each name in BY_HEAD; `heads`: by field, a column for
    each (attention, head). What was not measured at a step is NaN.
    """

    steps: Frame
    heads: Mapping[str, Frame]

    @property
    def diverged_at(self) -> int | None:
        """The step at which the run ended because its loss or gradient was not finite: nothing was measured there."""
        last = self.steps.iloc[-1]
        return int(self.steps.index[-1]) if math.isnan(last["max_logit"]) else None

    def same_as(self, other: RunRecords) -> bool:
        """Tell whether both have the same losses and logits at every step, to the bit."""
        columns = ["loss", "val_loss"]
        same = self.steps[columns].equals(other.steps[columns])
        return same and self.heads["max_logits"].equals(other.heads["max_logits"])

    def clipped(self, tau: float) -> Frame:
        """Tell whether each head was clipped at each step: where an arm clips, all heads above τ are, and no others."""
        acted = self.steps["clipped_heads"] > 0
        return (self.heads["max_logits"] > tau).mul(acted, axis=0)

    def spikes(self, window: int, threshold: float) -> Frame:
        """Tell at which steps the loss spikes.

        It is not finite there or exceeds the median of the `window` losses before it by `threshold` nats.
        """
        loss = self.steps["loss"]
        return ~np.isfinite(loss) | (loss > loss.rolling(window).median().shift(1) + threshold)


def run_records(records: Sequence[Mapping[str, Any]]) -> RunRecords:
    """Make the tables of these records, which are of steps 1, 2, …"""
    import pandas as pd  # which commands that read no runs do without

    steps = pd.DataFrame(records, index=[record["step"] for record in records]).reindex(columns=[*SCALARS])
    heads = {field: _by_head(records, field) for field in BY_HEAD}
    over = {name: heads[field].agg(how, axis=1) for field, (name, how) in BY_HEAD.items()}
    return RunRecords(steps.astype(float).assign(**over), heads)


def read_run(folder: Path) -> RunRecords:
    return run_records(metrics.read(folder / METRICS))


def _by_head(records: Sequence[Mapping[str, Any]], field: str) -> Frame:
    import pandas as pd

    index = [record["step"] for record in records]
    first = next((record[field] for record in records if record.get(field)), {})
    columns = [(attention, head) for attention, heads in first.items() for head in range(len(heads))]
    missing = [math.nan] * len(columns)
    rows = [
        [x for heads in record[field].values() for x in heads] if record.get(field) else missing for record in records
    ]
    return pd.DataFrame(rows, index=index, columns=pd.MultiIndex.from_tuples(columns, names=["attention", "head"]))
