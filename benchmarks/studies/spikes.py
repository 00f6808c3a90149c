"""The rest of a spike: runs that are disturbed on purpose, judged by the loss of one fixed held-out sample.

The loss of the training batches says little about spikes: most of its own are hard batches. Here 32 windows of the
validation text, the same for every arm and seed, are evaluated after every update, and the arms of a seed see the same
batches. `python -m benchmarks spikes` disturbs (`CASES`); with `--search` it looks for spikes that Muon has without a
disturbance (`SEARCH`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from benchmarks.execution.train import Execution, train
from benchmarks.experiment.arms import ARMS as ENTRIES
from benchmarks.experiment.arms import Choice, choices
from benchmarks.experiment.data import Corpus
from benchmarks.experiment.experiment import Experiment
from benchmarks.experiment.presets import HOT
from benchmarks.experiment.settings import Disturbance, Training
from benchmarks.records import atomic_files, metrics
from benchmarks.records.intervals import CONFIDENCE, Interval, interval
from benchmarks.records.run_records import RunRecords
from benchmarks.records.summary import Results
from benchmarks.studies.templates import render
from benchmarks.training.precision import PrecisionChoice
from muonclip.models import MoEConfig

SEEDS = (0, 1, 2)
PAIRS = (
    *(("muonclip", "muon"), ("rescue", "muon"), ("rescue", "muonclip")),
    *(("qk-norm", "muonclip"), ("softcap", "muonclip"), ("softcap", "muon")),
)
WINDOWS = 32  # of the held-out sample
LEVEL = 10  # steps over which a level of the loss is averaged
REACH = 20  # steps: a rise is over the lowest loss of so many before
Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A regime of training, with its disturbance or without. Windows have 64 tokens unless `model` says otherwise."""

    title: str
    lr: float
    steps: int
    rescue_after: int = 0  # updates, after which the arm `rescue` switches its clip on
    disturbance: Disturbance | None = None
    batch_size: int = 16
    model: Mapping[str, Any] = field(default_factory=dict)
    arms: tuple[str, ...] = ("muon", "muonclip")
    precision: PrecisionChoice = "fp32"

    def experiment(
        self, name: str, corpus: Corpus, model: MoEConfig, chosen: Sequence[Choice] | None, seeds: Sequence[int]
    ) -> Experiment:
        """Make its experiment; of the case's own arms where none are chosen."""
        training = Training(
            steps=self.steps,
            batch_size=self.batch_size,
            lr=dict.fromkeys(ENTRIES, self.lr),
            rescue_at=self.rescue_after / self.steps,
            validate_every=self.steps,
            probe_windows=WINDOWS,
            disturbance=self.disturbance,
        )
        own = {"name": name, "title": self.title, "chosen": chosen or choices(*self.arms), "seeds": tuple(seeds)}
        return Experiment.on(corpus, model=replace(model, **self.model), training=training, **own)


CASES = {
    "rate-pulse": Case(
        title="Rate 0.01, × 10 for 30 steps",
        lr=0.01,
        steps=230,
        rescue_after=150,
        arms=("muon", "muonclip", "rescue", "qk-norm", "softcap"),
        disturbance=Disturbance(after=120, steps=30, rate=10.0),
    ),
    "rate-jump": Case(
        title="Rate 0.03, × 4 from step 120 on",
        lr=0.03,
        steps=200,
        rescue_after=160,
        disturbance=Disturbance(after=120, steps=80, rate=4.0),
    ),
    "constant": Case(title="Rate 0.06 throughout", lr=0.06, steps=200, rescue_after=100),
    "random-bytes": Case(
        title="Rate 0.03, ten batches of random bytes",
        lr=0.03,
        steps=180,
        rescue_after=100,
        disturbance=Disturbance(after=90, steps=10, random_tokens=True),
    ),
}
SEARCH = {
    name: Case(**{"lr": HOT.lr["muon"], "steps": 120, "arms": ("muon",), **own})
    for name, own in {
        "long": {"title": "context of 256", "batch_size": 4, "model": {"max_seq_len": 256}},
        "deep": {"title": "8 layers", "model": {"num_layers": 8}},
        "bfloat16": {"title": "bfloat16", "precision": "bf16"},
        "large-batch": {"title": "batch of 64", "batch_size": 64, "steps": 60},
    }.items()
}
"""Muon alone at the hot rate; nothing is done to it, and each has one thing otherwise than the cases above."""


class Reading(NamedTuple):
    """The numbers of a run, losses in nats per token on the held-out sample, NaN where there is no such thing.

    `before` and `left` are means over LEVEL steps: before the disturbance, and at the end of the run. `peak` and
    `max_logit` are the largest after the beginning of the disturbance, of the whole run where there is none;
    `rise` is the largest over the lowest of the REACH steps before, after the warm-up and before any disturbance.
    """

    before: float
    peak: float
    left: float
    rise: float
    max_logit: float
    last_logit: float


def spikes(
    model: MoEConfig,
    corpus: Corpus,
    execution: Execution,
    *,
    arms: Sequence[Choice] | None,
    seeds: Sequence[int],
    cases: Sequence[str],
) -> None:
    """Train what is not trained yet; write spikes.json, spikes.md, the pictures and report.html."""
    experiments = [CASES[name].experiment(name, corpus, model, arms, seeds) for name in cases]
    from benchmarks.report import page  # what draws costs seconds, and every rank of a run imports this module
    from benchmarks.studies import spikes_plots

    results, out = train(experiments, corpus, execution), execution.out
    figures = figures_of(results)
    atomic_files.write_json(out / "spikes.json", metrics.to_json(figures))
    atomic_files.write_text(out / "spikes.md", text := read_spikes(figures))
    spikes_plots.draw(results, out)
    page.write(results, out / "report.html", title="Spikes")
    print(text)
    print(f"figures  {out}", file=sys.stderr)


def search(model: MoEConfig, corpus: Corpus, execution: Execution, *, seeds: Sequence[int]) -> None:
    """Train Muon in the regimes of SEARCH; write search.json and search.md."""
    results: list[Results] = []
    choices_of_precision: tuple[PrecisionChoice, ...] = ("fp32", "bf16")
    for precision in choices_of_precision:
        cases = {name: case for name, case in SEARCH.items() if case.precision == precision}
        experiments = [case.experiment(name, corpus, model, None, seeds) for name, case in cases.items()]
        results += train(experiments, corpus, replace(execution, precision=precision))
    figures = figures_of(results)
    atomic_files.write_json(execution.out / "search.json", metrics.to_json(figures))
    atomic_files.write_text(execution.out / "search.md", text := read_search(figures))
    print(text)


def reading_of(records: RunRecords, training: Training) -> Reading:
    """Read a run. A run that diverged has nothing left: NaN."""
    loss, logits, disturbance = records.steps["probe_loss"], records.steps["max_logit"], training.disturbance
    first = disturbance.after if disturbance else 0
    settled = loss.iloc[training.warmup_steps : first or None]
    return Reading(
        before=loss.iloc[max(0, first - LEVEL) : first].mean(),
        peak=loss.iloc[first:].max(),
        left=loss.tail(LEVEL).mean(skipna=False),
        rise=(settled - settled.rolling(REACH, min_periods=1).min().shift(1)).max(),
        max_logit=logits.iloc[first:].max(),
        last_logit=logits.tail(LEVEL).median(),
    )


def figures_of(results: Sequence[Results]) -> dict[str, Any]:
    """Return what the JSON file holds: by case its experiment, and by arm and seed the readings."""
    cases = {
        result.experiment.name: {
            "config": result.experiment.to_json(),
            "environment": result.environment,
            "arms": {
                arm.name: {
                    str(seed): reading_of(records, arm.training)._asdict()
                    for seed, records in result.records[arm.name].items()
                }
                for arm in result.finished
            },
        }
        for result in results
    }
    return {"confidence": CONFIDENCE, "cases": cases}


def read_spikes(figures: Json) -> str:
    """Write the section of the page, from the object that spikes.json holds."""
    cases = [_read_case(case) for case in metrics.from_json(figures)["cases"].values()]
    return render("spikes.md", cases=cases, level=LEVEL)


def read_search(figures: Json) -> str:
    """Write the table of the search, from the object that search.json holds."""
    found = metrics.from_json(figures)["cases"].values()
    rows = [
        {"title": case["config"]["title"], **{name: max(run[name] for run in runs) for name in ("rise", "max_logit")}}
        for case in found
        if (runs := list(case["arms"]["muon"].values()))
    ]
    return render("spikes_search.md", rows=rows, reach=REACH, environment=next(iter(found))["environment"])


def effects(case: Json) -> dict[tuple[str, str], dict[str, Interval]]:
    """Return the differences of each pair of PAIRS, by reading, on the seeds that both arms have.

    The runs of a seed saw the same batches.
    """
    runs, found = _runs(case), dict[tuple[str, str], dict[str, Interval]]()
    for one, other in PAIRS:
        if seeds := [seed for seed in runs.get(one, {}) if seed in runs.get(other, {})]:
            found[one, other] = {
                name: interval([runs[one][seed][at] - runs[other][seed][at] for seed in seeds]) for at, name in _FIELDS
            }
    return found


def _read_case(case: Json) -> dict[str, Any]:
    experiment, runs = Experiment.from_json(case["config"]), _runs(case)
    rows = [
        {"label": arm.label, **{name: interval([run[at] for run in runs[arm.name].values()]) for at, name in _FIELDS}}
        for arm in experiment.arms
        if arm.name in runs
    ]
    pairs = [
        {"arm": ENTRIES[one].label, "against": ENTRIES[other].label, **of} for (one, other), of in effects(case).items()
    ]
    return {"experiment": experiment, "environment": case["environment"], "rows": rows, "pairs": pairs}


def _runs(case: Json) -> dict[str, dict[str, Reading]]:
    """Return the readings by arm and seed."""
    return {arm: {seed: Reading(**of) for seed, of in seeds.items()} for arm, seeds in case["arms"].items()}


_FIELDS = tuple(enumerate(Reading._fields))
