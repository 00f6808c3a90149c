"""Comparison of several experiments: the settings that differ, and the results of the arms they share."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Sequence
from typing import Any

from benchmarks.experiment.experiment import flat
from benchmarks.records.intervals import difference
from benchmarks.records.summary import Results
from benchmarks.report.verdicts import arm_facts, number

_OWN = ("name", "title", "arms", "data.path", "data.title")  # of each experiment, and not a setting of a run
_MADE_WITH = ("python", "torch", "muonclip", "git_commit", "platform", "cpu", "gpu", "cuda")
_MADE_WITH_JAX = ("jax", "jaxlib", "optax")  # PyTorch's runs have no version of these to differ in


def setting_rows(results: Sequence[Results]) -> list[list[str]]:
    """Make a row for each setting and each version that is not the same in all, with its values."""
    jax = all(result.experiment.framework == "jax" for result in results)
    made = _MADE_WITH + (_MADE_WITH_JAX if jax else ())
    sides = [
        {name: value for name, value in flat(result.experiment.to_json()).items() if name not in _OWN}
        | {f"made with {name}": result.environment.get(name) for name in made}
        for result in results
    ]
    rows = [["differs", *(result.experiment.title for result in results)]]
    for name in sorted({name for side in sides for name in side}):
        values = [side.get(name) for side in sides]
        missing = name.startswith("training.lr.") and None in values  # an arm that not all of them have
        if any(value != values[0] for value in values) and not missing:
            rows.append([name, *map(written, values)])
    return rows


def shared_rows(results: Sequence[Results]) -> list[list[str]]:
    """Make a row for each arm that several have: its loss and peak logit in each, and the differences of the losses."""
    facts = [{fact.arm.name: fact for fact in arm_facts(result)} for result in results]
    first = results[0].experiment
    same = all((r.experiment.model, r.experiment.data.sha256) == (first.model, first.data.sha256) for r in results)
    rows = [["arm", *(result.experiment.title for result in results), "losses"]]
    for name in dict.fromkeys(name for of in facts for name in of):
        found = [of.get(name) for of in facts]
        there = [fact for fact in found if fact is not None]
        if len(there) < 2:
            continue
        records = [result.records[name] for result in results if name in result.records]
        seeds = set.intersection(*map(set, records))
        losses = [fact.loss for fact in there if math.isfinite(fact.loss)]
        if not same:
            apart = "of another model or other data: not compared"
        elif seeds and all(of[seed].same_as(records[0][seed]) for of in records for seed in seeds):
            apart = "same to the bit"
        else:
            apart = f"{difference(max(losses) - min(losses))} between them" if len(losses) > 1 else "not finite"
        cells = [f"{fact.loss:.3f} bits, peak logit {number(fact.peak)}" if fact else "" for fact in found]
        rows.append([there[0].arm.label, *cells, apart])
    return rows


def written(value: Any) -> str:
    """Write a setting's value for a table."""
    if isinstance(value, list):
        return ", ".join(map(written, value))
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{40,64}\+?", value):
        return value[:10] + value[40:].strip(string.hexdigits)  # a hash; "+" where files differ from the commit
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
