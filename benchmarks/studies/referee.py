"""Steps to a target: how many steps an optimizer needs until its loss is, beyond doubt, down to a given value.

Model, data, batch and schedule are fixed, in the manner of the optimizer benchmark of modded-nanogpt. Each optimizer is
tuned over rate, decay and the rate of its AdamW half by the same number of runs (`TUNING`); AdamW, which has one rate,
tries more of those. Then it is trained on fresh seeds for growing numbers of steps, each with its own schedule to the
end, and stops at the first of `Rules.budgets` where

    (target − mean) · √n ≥ z · σ

of n seeds. Two optimizers are compared at the earlier stop of the two, where both have the same tokens and seeds.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean, linear_regression, variance
from typing import Any, Protocol

from benchmarks.execution.train import make_folder
from benchmarks.experiment.arms import ARMS, Choice, choose
from benchmarks.experiment.data import open_corpus
from benchmarks.experiment.experiment import Experiment
from benchmarks.experiment.presets import OWN_RATE
from benchmarks.records import atomic_files
from benchmarks.records.environment import made_with
from benchmarks.records.intervals import interval
from benchmarks.studies.trials import TINY, Trials
from muonclip.models import MoEConfig

ADAMW_RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
MUON_RATES = (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2)
DECAYS = (0.03, 0.3)  # next to 0.1, with which the rates are tried
TIMES = (0.5, 2.0)  # rates of the AdamW half, in rates of Muon's
BETWEEN = (2**-0.5, 2**0.5)  # rates next to AdamW's best
TUNING = len(MUON_RATES) + len(DECAYS) + len(TIMES)  # runs for each optimizer


class Losses(Protocol):
    """The final losses of arms, by name, on seeds; `Trials` trains what is not trained yet."""

    def losses(self, arms: Sequence[str], seeds: Sequence[int]) -> dict[str, list[float]]: ...


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules, the same for all. Losses are in bits per byte.

    `sigma`: the spread of final losses over seeds, here that of AdamW and of Muon at their best rates in
    docs/evidence/sweep.json, rounded up; a page shows that of the runs next to it. `z`: 5 % from one side.
    """

    target: float = 2.7
    sigma: float = 0.035
    z: float = 1.645
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    tuning_seeds: tuple[int, ...] = (100,)
    tuning_steps: int = 200
    budgets: tuple[int, ...] = tuple(round(100 * 1.09**k) for k in range(15))

    def met_by(self, losses: Sequence[float]) -> bool:
        """Tell whether the losses of seeds are down to the target, beyond doubt."""
        return self.margin(losses) >= self.z * self.sigma

    def margin(self, losses: Sequence[float]) -> float:
        return (self.target - fmean(losses)) * math.sqrt(len(losses))


RULES = Rules()
QUICK = Rules(target=7.0, seeds=(0, 1), tuning_steps=2, budgets=(1, 2, 4))


def run(options: argparse.Namespace) -> None:
    """Tune, train, compare. Writes referee.json and, what it also prints, the tables referee.md."""
    make_folder(options.out)
    corpus, rules = open_corpus(), QUICK if options.quick else RULES
    model, training = MoEConfig.cpu(vocab_size=corpus.vocab_size), replace(OWN_RATE, lr={})
    if options.quick:
        model = replace(model, **TINY)
        training = replace(training, batch_size=2, validation_batches=1)
    protocol = Experiment.on(corpus, name="", title="", chosen=(), seeds=(), model=model, training=training)
    trials = Trials(protocol, options.out / "referee.jsonl", options.jobs or 2)
    figures = {
        "environment": trials.environment,
        "protocol": protocol.to_json(),
        "rules": asdict(rules),
        **judge(trials, options.arms, rules),
        "rows": trials.rows,
    }
    atomic_files.write_json(options.out / "referee.json", figures)
    atomic_files.write_text(options.out / "referee.md", text := tables(figures))
    print(text)


def judge(trials: Losses, chosen: Sequence[Choice], rules: Rules) -> dict[str, Any]:
    """Return what became of every optimizer, and of every two; an infinite loss is None."""
    tuned, tried = tune(trials, chosen, rules)
    stops, trained = find_stops(trials, tuned, rules)
    arms = [
        {
            "name": each.name,
            "label": each.label,
            "tuned": dict(tuned[each.name].settings),
            "tried": [{"arm": name, "loss": _finite(loss)} for name, loss in tried[each.name].items()],
            "budgets": [
                {"steps": steps, "loss": [_finite(loss) for loss in losses], "met": rules.met_by(losses)}
                for steps, losses in sorted(trained[each.name].items())
            ],
            "steps": stops[each.name],
        }
        for each in chosen
    ]
    pairs = [_pair(trials, one, other, tuned, stops, trained, rules) for one, other in itertools.combinations(stops, 2)]
    spread = [variance(of) for own in trained.values() for of in own.values() if all(map(math.isfinite, of))]
    return {"arms": arms, "pairs": pairs, "sigma_of_runs": math.sqrt(fmean(spread)) if spread else None}


def tune(
    trials: Losses, chosen: Sequence[Choice], rules: Rules
) -> tuple[dict[str, Choice], dict[str, dict[str, float]]]:
    """Try rates, then decays at the best of them, then what the AdamW half's rate is, or rates between for AdamW.

    Returns the best of each, by name, and the losses of all that was tried.
    """
    best: dict[str, Choice] = {each.name: each for each in chosen}
    tried: dict[str, dict[str, float]] = {each.name: {} for each in chosen}
    for stage in range(3):
        asked = {
            name: {_at(each, rules.tuning_steps): each for each in _candidates(choice, stage)}
            for name, choice in best.items()
        }
        losses = trials.losses([at for of in asked.values() for at in of], rules.tuning_seeds)
        for name, candidates in asked.items():
            if stage:
                candidates[_at(best[name], rules.tuning_steps)] = best[name]
            tried[name] |= {at: fmean(losses[at]) for at in candidates if at in losses}
            best[name] = candidates[min(candidates, key=tried[name].__getitem__)]
    return best, tried


def find_stops(
    trials: Losses, tuned: Mapping[str, Choice], rules: Rules
) -> tuple[dict[str, int | None], dict[str, dict[int, list[float]]]]:
    """Find the first budget of each at which the rule is met, by halving, and the losses on the way.

    A loss that falls with the number of steps is what that takes for granted. None: no budget is enough.
    """
    low, high = dict.fromkeys(tuned, -1), dict.fromkeys(tuned, len(rules.budgets))
    trained: dict[str, dict[int, list[float]]] = {name: {} for name in tuned}
    while going := [name for name in tuned if high[name] - low[name] > 1]:
        middle = {name: (low[name] + high[name]) // 2 for name in going}
        names = {name: _at(tuned[name], rules.budgets[middle[name]]) for name in going}
        losses = trials.losses([*names.values()], rules.seeds)
        for name in going:
            trained[name][rules.budgets[middle[name]]] = losses[names[name]]
            side = high if rules.met_by(losses[names[name]]) else low
            side[name] = middle[name]
    return {name: rules.budgets[at] if at < len(rules.budgets) else None for name, at in high.items()}, trained


def _pair(
    trials: Losses,
    one: str,
    other: str,
    tuned: Mapping[str, Choice],
    stops: Mapping[str, int | None],
    trained: Mapping[str, Mapping[int, Sequence[float]]],
    rules: Rules,
) -> dict[str, Any]:
    """Compare two at the earlier stop, or at the last budget: the difference of their means · √n in 1.4 σ, which is
    that of a difference; and by seed the ratio of the steps at which their own lines cross the target.
    """
    steps = min(stops[one] or rules.budgets[-1], stops[other] or rules.budgets[-1])
    names = {name: _at(tuned[name], steps) for name in (one, other)}
    losses = trials.losses([*names.values()], rules.seeds)
    ahead = [theirs - own for own, theirs in zip(losses[names[one]], losses[names[other]], strict=True)]
    ratios = [
        first / second
        for index in range(len(rules.seeds))
        if (first := _crossing(trained[one], index, rules)) and (second := _crossing(trained[other], index, rules))
    ]
    mean = fmean(ahead)
    return {
        "one": one,
        "other": other,
        "at": steps,
        "ahead": [_finite(each) for each in ahead],
        "score": _finite(mean * math.sqrt(len(ahead)) / (rules.sigma * math.sqrt(2))) if math.isfinite(mean) else None,
        "ratios": ratios,
    }


def _crossing(trained: Mapping[int, Sequence[float]], index: int, rules: Rules) -> float | None:
    """Return the steps at which the line through a seed's losses over log steps is at the target; None: nowhere."""
    losses = [of[index] for of in trained.values()]
    if len(losses) < 2 or not all(map(math.isfinite, losses)):
        return None
    slope, intercept = linear_regression([*map(math.log, trained)], losses)
    return math.exp((rules.target - intercept) / slope) if slope < 0 else None


def _candidates(best: Choice, stage: int) -> Iterator[Choice]:
    is_adamw = ARMS[best.entry].optimizer == "adamw"
    if stage == 0:
        tried = [{"lr": lr} for lr in (ADAMW_RATES if is_adamw else MUON_RATES)]
    elif stage == 1:
        tried = [{"weight_decay": decay} for decay in DECAYS]
    elif is_adamw:
        tried = [{"lr": float(f"{best.settings['lr'] * times:.3g}")} for times in BETWEEN]
    else:
        tried = [{"adamw_lr": best.settings["lr"] * times} for times in TIMES]
    for own in tried:
        yield choose(best.entry, **dict(best.settings) | own)


def _at(choice: Choice, steps: int) -> str:
    return choose(choice.entry, **dict(choice.settings) | {"steps": steps}).name


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def tables(figures: Mapping[str, Any]) -> str:
    """Write the tables: the steps of each optimizer, and every two compared."""
    rules, labels = figures["rules"], {arm["name"]: arm["label"] for arm in figures["arms"]}
    lines = [
        "| optimizer | rate | decay | rate of the AdamW half | steps to the target | loss there |",
        "|---" * 6 + "|",
    ]
    for arm in figures["arms"]:
        of, found = arm["tuned"], {each["steps"]: each["loss"] for each in arm["budgets"]}
        half = "" if arm["name"].startswith("adamw") else f"{of.get('adamw_lr', of['lr']):g}"
        first, last = rules["budgets"][0], rules["budgets"][-1]
        words = f"more than {last}" if arm["steps"] is None else f"at most {first}" if arm["steps"] == first else None
        loss = f"{fmean(found[arm['steps']]):.3f}" if arm["steps"] else ""
        decay = of.get("weight_decay", figures["protocol"]["training"]["weight_decay"])
        lines.append(f"| {arm['label']} | {of['lr']:g} | {decay:g} | {half} | {words or arm['steps']} | {loss} |")
    lines += [
        "",
        "| optimizer | next to | steps, ratio by seed | lead in loss | at step | score | verdict |",
        "|---" * 7 + "|",
    ]
    for pair in figures["pairs"]:
        every = len(pair["ratios"]) == len(rules["seeds"])
        ratio = interval(pair["ratios"]) if every else None
        words = "–" if ratio is None else f"{ratio.mean:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
        finite = None not in pair["ahead"]
        lead, score = (interval(pair["ahead"]), f"{pair['score']:+.1f}") if finite else ("–", "–")
        lines.append(
            f"| {labels[pair['one']]} | {labels[pair['other']]} | {words} | {lead} | {pair['at']} "
            f"| {score.replace('-', '−')} | {_verdict(pair, rules['z'])} |"
        )
    spread = figures["sigma_of_runs"]
    of_runs = "" if spread is None else f" (of these runs: {spread:.3f})"
    notes = (
        f"The target is {rules['target']:g} bits per byte, at the end of a run with its own schedule; "
        f"{len(rules['seeds'])} seeds, z = {rules['z']:g}, σ = {rules['sigma']:g}{of_runs}. Each optimizer was tuned "
        f"by {TUNING} runs of {rules['tuning_steps']} steps on another seed. A lead is in bits per byte, with its 95 % "
        "interval; a score is the lead · √n over √2 σ.",
        f"Made with {made_with(figures['environment'])}.",
    )
    for note in notes:
        lines += ["", note]
    return "\n".join([*lines, ""])


def _verdict(pair: Mapping[str, Any], z: float) -> str:
    if pair["score"] is None:
        return "not finite"
    return "needs fewer" if pair["score"] >= z else "needs more" if pair["score"] <= -z else "not told from zero"
