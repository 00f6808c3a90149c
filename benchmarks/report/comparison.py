"""Several panels side by side, in sentences: what differs between them, and what became of the arms they share."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.experiment.experiment import flat
from benchmarks.records.summary import PanelResult
from benchmarks.report.verdicts import FinishedArm, against_spread, difference, finished_arms, listing, logit, unit_of

_OWN = ("name", "title", "arms", "data.path", "data.title")  # of each panel, and no setting of a run
_MADE_WITH = ("python", "torch", "muonclip", "git_commit", "platform", "cpu", "gpu", "cuda")
_MADE_WITH_JAX = ("jax", "jaxlib", "optax")  # PyTorch's runs have no version of these to differ in


def compare(results: Sequence[PanelResult]) -> list[str]:
    """Values stand in the order of the panels. Nothing to say of a single panel."""
    if len(results) < 2:
        return []
    settings = [
        {name: value for name, value in flat(result.panel.to_json()).items() if name not in _OWN} for result in results
    ]
    versions_of = _MADE_WITH + _MADE_WITH_JAX * all(result.panel.framework == "jax" for result in results)
    made = [{name: result.environment.get(name) for name in versions_of} for result in results]
    different = _differences(settings)
    told = [f"The panels differ in {different}." if different else "The panels have the same settings."]
    if versions := _differences(made):
        told.append(f"They were made with different {versions}.")
    return told + _shared_arms(results)


def _differences(sides: Sequence[Mapping[str, Any]]) -> str:
    names = sorted({name for side in sides for name in side})
    values = {name: [side.get(name) for side in sides] for name in names}
    unequal = {
        name: of
        for name, of in values.items()
        if any(value != of[0] for value in of) and not (name.startswith("training.lr.") and None in of)  # an arm's own
    }
    return "; ".join(f"{name} ({' / '.join(map(_value, of))})" for name, of in unequal.items())


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{40,64}\+?", value):
        return value[:10] + value[40:].strip(string.hexdigits)  # a hash; "+" where files differ from the commit
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _shared_arms(results: Sequence[PanelResult]) -> list[str]:
    titles = [f"“{result.panel.title}”" for result in results]
    by_name: dict[str, list[tuple[str, FinishedArm]]] = {}
    for title, result in zip(titles, results, strict=True):
        for arm in finished_arms(result):
            by_name.setdefault(arm.name, []).append((title, arm))
    shared = {name: arms for name, arms in by_name.items() if len(arms) > 1}
    if not shared:
        return ["No arm of the same name is finished in two of them."]
    first = results[0].panel
    if any((r.panel.model, r.panel.data.sha256) != (first.model, first.data.sha256) for r in results):
        peaks = [_peaks(arms) for arms in shared.values()]
        return ["They differ in the model or the data, so their losses are not compared.", *peaks]
    return [_compare(arms, unit_of(first)) for arms in shared.values()]


def _compare(arms: Sequence[tuple[str, FinishedArm]], unit: str) -> str:
    label = arms[0][1].label
    seeds = sorted(set.intersection(*(set(arm.runs) for _, arm in arms)))
    first = arms[0][1]
    if seeds and all(arm.trajectory(seeds) == first.trajectory(seeds) for _, arm in arms):
        return f"{label} is the same to the bit in {listing([title for title, _ in arms])}."
    finite = sorted(((t, arm) for t, arm in arms if math.isfinite(arm.mean_loss)), key=lambda pair: pair[1].mean_loss)
    lost = [f"{label} has no finite final loss in {title}." for title, arm in arms if not math.isfinite(arm.mean_loss)]
    told: list[str] = []
    if len(finite) > 1:
        (best, low), (worst, high) = finite[0], finite[-1]
        gap = high.mean_loss - low.mean_loss
        told.append(
            f"{label} ends with {low.mean_loss:.3f} {unit} in {best} and with {high.mean_loss:.3f} in {worst}, "
            f"{difference(gap)}. {against_spread(gap, (low, high))}"
        )
    return " ".join([*told, *lost, _peaks(arms)])


def _peaks(arms: Sequence[tuple[str, FinishedArm]]) -> str:
    return (
        f"Peak logits of {arms[0][1].label}: " + ", ".join(f"{logit(arm.peak)} in {title}" for title, arm in arms) + "."
    )
