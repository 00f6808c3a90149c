"""Records as event files for TensorBoard: a run folder per arm and seed.

The same records give the same bytes: wall times are 0 and the step is the only clock, file names are fixed, so writing
again replaces a file. That is why the events are written one by one: `SummaryWriter` puts the time, the machine and the
process into names and first events.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.experiment.errors import UsageError
from benchmarks.records.atomic_files import replacing
from benchmarks.records.run_records import BY_HEAD, Frame, RunRecords
from benchmarks.records.summary import Results

FILE = "events.out.tfevents.0.muonclip"  # TensorBoard reads what has "tfevents" in its name


def require() -> None:
    """Raise UsageError where the package tensorboard is not installed."""
    try:
        import tensorboard  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise UsageError("--tensorboard", "needs the package tensorboard: pip install tensorboard.") from error


def write(result: Results, folder: Path) -> None:
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
                for step, scalars in _scalars(records).iterrows():
                    there = scalars[scalars.notna() | (scalars.index == "loss")]  # what is not a number is a loss, too
                    made = [values.Summary.Value(tag=tag, simple_value=value) for tag, value in there.items()]
                    event = protocol.Event(step=step, summary=values.Summary(value=made))
                    writer.write(event.SerializeToString())


def _scalars(records: RunRecords) -> Frame:
    """Return a column for each tag: heads under their common name, over all and by layer."""
    by_layer = {
        f"{name}/{attention}": heads.T.agg(over, axis=1)
        for field, (name, over) in BY_HEAD.items()
        for attention, heads in records.heads[field].T.groupby(level="attention")
    }
    return records.steps.assign(**by_layer)
