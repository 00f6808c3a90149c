"""Records as event files for TensorBoard: a run folder per arm and seed.

The same records give the same bytes: wall times are 0 and the step is the only clock, file names are fixed, so writing
again replaces a file. That is why the events are written one by one: `SummaryWriter` puts the time, the machine and the
process into names and first events.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.experiment.errors import UsageError
from benchmarks.records.atomic_files import replacing
from benchmarks.records.summary import PanelResult, Record

FILE = "events.out.tfevents.0.muonclip"  # TensorBoard reads what has "tfevents" in its name
_SCALARS = ("loss", "val_loss", "lr", "grad_norm", "clipped_heads", "update_rms", "tokens_per_second")
_BY_HEAD = {  # what stands for all heads, as in the summary
    "max_logits": ("max_logit", max),
    "attention_entropy": ("attention_entropy", statistics.fmean),
    "query_norms": ("query_norm", max),
    "key_norms": ("key_norm", max),
}


def require() -> None:
    """Raise UsageError where the package tensorboard is not installed."""
    try:
        import tensorboard  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise UsageError("--tensorboard", "needs the package tensorboard: pip install tensorboard.") from error


def write(result: PanelResult, folder: Path) -> None:
    """Write `folder`/arm/seed-N for every run of the result. Losses are mean nats per token, as recorded."""
    require()
    from tensorboard.compat.proto import event_pb2, summary_pb2
    from tensorboard.summary.writer.record_writer import RecordWriter

    protocol: Any = event_pb2  # generated at import: no checker sees its names
    values: Any = summary_pb2
    for arm, runs in result.records.items():
        for seed, records in runs.items():
            path = folder / arm / f"seed-{seed}" / FILE
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as stream:
                writer = RecordWriter(stream)
                writer.write(protocol.Event(file_version="brain.Event:2").SerializeToString())
                for record in records:
                    made = [values.Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(record)]
                    event = protocol.Event(step=record["step"], summary=values.Summary(value=made))
                    writer.write(event.SerializeToString())


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """Tags and values of a step: what was recorded as it is; heads by layer, under their common name, and over all."""
    for name in _SCALARS:
        if name in record:
            yield name, record[name]
    for field, (name, over) in _BY_HEAD.items():
        layers: dict[str, list[float]] = record.get(field, {})
        if layers:
            yield name, over([value for heads in layers.values() for value in heads])
        for layer, heads in layers.items():
            yield f"{name}/{layer}", over(heads)
