"""The figures in the prose of the pages: made here from what the commands have written, or listed with their source.

`said` has phrases by page, with their figures as the numbers make them: a page whose numbers were measured anew and
whose words were not lacks one. `QUOTED` has phrases with figures of others, or that are no measurement, and where they
are from. `unfounded` finds what is in neither.
"""

import functools
import json
import math
import re
import tomllib
from pathlib import Path
from statistics import fmean

import torch

from benchmarks.experiment.presets import HOT, OWN_RATE
from benchmarks.options import make_parser
from benchmarks.studies import spikes
from benchmarks.studies.evidence_reading import hot_arms, hot_effects
from benchmarks.studies.speed_steps import OURS, facts
from benchmarks.training import precision
from muonclip.core import adamw_update_rms
from muonclip.models import MoEConfig

ROOT = Path(__file__).parents[2]
PAGES = (
    *("README", "index", "install", "faq", "primer", "switching", "monitor", "qk-clip", "clip-cost", "speed"),
    "evidence/index",
    "cluster",
)
K2, MOONLIGHT = "Kimi K2, arXiv 2507.20534", "Moonlight, arXiv 2502.16982"
QK_NORMED_MLA = dict.fromkeys(
    ("less than 2 % of the cost of decoding", "400M parameters"), "QK-Normed MLA, arXiv 2606.16310"
)
QUOTED = {
    "README": {"to 1e-6": "tests/optax/test_trajectories.py", "K2 took 2e-4": K2},
    "evidence/index": {"passing 1000 in a mixture of 53B parameters": K2} | QK_NORMED_MLA,
    "qk-clip": QK_NORMED_MLA
    | {
        "α is 0.5": "the default of `clip_factors`",
        "a mask of −1e4 to a bias": "muonclip.core.attention_mask",
        "about 1e-6 in float32 and 1e-2 in bfloat16": "a rounding of each dtype, twice",
    },
    "switching": {
        "up to 4.2e-4": MOONLIGHT,
        "2e-4 for most of 15.5T tokens": K2,
        "multiplied by 0.2 · √max(m, n), which makes it 0.2 whatever the shape where": "a formula",
        "measured 0.2 to 0.4 for AdamW's updates": MOONLIGHT,
        "Kimi K2 used 0.1": K2,
        "gradients of 1e7": "an issue of Megatron-LM, with a link",
        "a mixture of 0.5B active and 3B total parameters": K2,
    },
    "monitor": {"0.2 to 0.4 for AdamW (Moonlight": MOONLIGHT},
    "speed": {"the median of their ratios, at 95%": "a confidence", "Allowed*: 64 MB": "a limit set by hand"},
    "primer": dict.fromkeys(("singular values between 0.001 and 1", "below 0.001"), "what the sets are made for"),
    "cluster": {
        "peak everywhere: 49 %": "the README of flash-muon, see benchmarks/studies/cluster_machines.toml",
    },
    "faq": {"twice and ten times": "docs/evidence/rates.json"},
}
_FENCE = re.compile(r"^( *)```.*\n(?:.*\n)*?\1```$", re.MULTILINE)
_WRITTEN = re.compile(r"<!-- (\w+): begin -->.*?<!-- \1: end -->", re.DOTALL)
_UNIT = r"(?:%|[kMG]i?B|ms|µs|s|seconds?|minutes?|hours?|times)(?!\w)"
_FIGURE = re.compile(rf"(?<![\w.^])(?:\d+(?:\.\d+(?:e-?\d+)?|e-?\d+|(?: to \d+)? ?{_UNIT})|(?:about|some|up to) \d+)")
_WORDS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine", 10: "ten"}


def path_of(page: str) -> Path:
    return ROOT / "README.md" if page == "README" else ROOT / "docs" / f"{page}.md"


def prose(text: str) -> str:
    """Return the sentences of a page in one line: no blocks, tables, or what a command writes; links as their words."""
    text = _WRITTEN.sub("", _FENCE.sub("", text))
    text = re.sub(r"^(?:\||    |!\[|--8<--).*$", "", text, flags=re.MULTILINE)
    return " ".join(re.sub(r"\[([^\]]*)\](?:\([^)]*\)|\[[^\]]*\])", r"\1", text).replace("**", "").split())


def lacking(page: str, text: str) -> list[str]:
    """Return the phrases of `said` and `QUOTED` that a page does not have."""
    return [phrase for phrase in _phrases(page) if phrase not in prose(text)]


def unfounded(page: str, text: str) -> list[str]:
    """Return the figures of a page, with words around them, that are in none of its phrases."""
    left = prose(text)
    for phrase in _phrases(page):
        left = left.replace(phrase, "…")
    left = re.sub(r"`[^`]*`|arXiv \d+\.\d+|§[\d.]+|Apache-2\.0", "…", left)
    return [left[max(0, found.start() - 40) : found.end() + 20] for found in _FIGURE.finditer(left)]


def _phrases(page: str) -> list[str]:
    return [*said().get(page, ()), *QUOTED.get(page, ())]


@functools.cache
def said() -> dict[str, list[str]]:
    """Return the phrases that each page must have, with the figures that the numbers give."""
    rms, evidence_minutes = _update_rms(), f"about {_minutes_of('evidence')} minutes on two cores"
    hot_steps = _read("evidence/hot")["config"]["training"]["steps"]
    return {
        "README": [_versions(), *_pythons(), *_reproduction(), evidence_minutes, _remedies(), *_pulse()],
        "index": [_step(), _clip(), _reproduction()[0], _remedies(), *_pulse()],
        "install": _pythons(),
        "switching": [f"{rms} in our runs", f"{adamw_update_rms(0.9):.3f} at β₁ = 0.9"],
        "monitor": [f"{rms} for Muon in our runs"],
        "clip-cost": _bounds(),
        "faq": [_clip().removeprefix("The clip is ").replace("it", "a step")],
        "primer": _primer(),
        "cluster": _cluster(),
        "evidence/index": [
            evidence_minutes,
            f"A step is only {HOT.batch_size * MoEConfig.cpu().max_seq_len} tokens at the hot rate",
            f"{hot_steps} steps at the hot rate, and of `make reproduce` {HOT.steps}",
            f"at least {precision._GAIN - 1:.0%} faster".replace("%", " %"),
            _remedies(),
            *_spikes(),
        ],
    }


def _read(name: str) -> dict:
    return json.loads((ROOT / "docs" / f"{name}.json").read_text(encoding="utf-8"))


def _cluster() -> list[str]:
    """What the predictions are off by, what the optimizers take of a step, and how long plans take."""
    figures = _read("cluster/cluster")
    compute, communication = figures["fit"]["compute"], figures["fit"]["communication"]
    last = figures["paper"]["scaling"]["k2"][-1]["shares"]
    plans = {(row["case"], row["ranks"]): row for row in figures["plans"]}
    assert figures["fit"]["bytes_exact"]
    assert abs(compute["error"]) < abs(compute["worst_error"]) < 0.1  # "met"
    repeats = figures["fit"]["errors"]["compute"]
    first, second = (abs(_read(f"cluster/{name}-fit")["fit"]["compute"]["error"]) for name in ("first", "second"))
    large, small = figures["fit"]["rates"].values()
    assert 0.15 < 1 - large / small < 0.25
    longest = max(row["seconds"] for row in figures["plans"])
    assert longest < 10
    few, many = (plans["a stage", ranks]["balance"] for ranks in (256, 4096))
    said = [
        f"Kimi K2's update takes {last['muonclip']:.1%} of the forward and backward passes, "
        f"AdamW's {last['adamw']:.2%}, and gathering Muon's {last['gathering']:.1%}",
        f"compute of a rank was off by {compute['error']:+.1%} on average, and by {compute['worst_error']:+.1%} "
        "for the worst rank",
        f"missed it, by {first:.1%}",
        f"turns on a core, by {second:.1%}",
        f"communication by {communication['error']:+.1%}, and {communication['worst_error']:+.1%}",
        f"the compute is off by {min(repeats):+.1%} to {max(repeats):+.1%}",
        f"made within {longest:.1f} seconds",
        f"does {few:.2f} times the mean on 256 GPUs and {many:.2f} times on 4096",
    ]
    return [each.replace("%", " %").replace("-", "−") for each in said]


def _versions() -> str:
    pinned = dict(re.findall(r"^(\w+)==(\d+\.\d+)", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE))
    return f"PyTorch {pinned['torch']} and JAX {pinned['jax']}"


def _pythons() -> list[str]:
    """What the package needs, and what `make` takes: the classifiers, which pip shows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    named = [each.rpartition(" ")[2] for each in project["classifiers"] if re.search(r"Python :: 3\.\d", each)]
    ((low, high),) = re.findall(r"\((3, \d+)\) <= .* <= \((3, \d+)\)", (ROOT / "Makefile").read_text("utf-8"))
    assert [named[0], named[-1]] == [each.replace(", ", ".") for each in (low, high)]
    return [f"Python {project['requires-python'].removeprefix('>=')} or later", f"Python {named[0]} to {named[-1]}"]


def _reproduction() -> list[str]:
    hot, own = (_read(f"reproduce/{name}") for name in ("hot", "own-rate"))
    runs = [run for each in (hot, own) for seeds in each["arms"].values() for run in seeds.values()]
    minutes = sum(run["wall_seconds"] for run in runs) / hot["environment"]["cores"] / 60
    assert 3 <= minutes <= 5, minutes
    (again,) = (
        each for each in _read("evidence/sweep")["arms"]["adamw"]["rates"] if each["lr"] == OWN_RATE.lr["adamw"]
    )
    assert abs(own["arms"]["adamw"]["0"]["val_bits_per_byte"] - again["loss"][again["seeds"].index(0)]) < 5e-4
    times = hot["config"]["training"]["lr"]["muon"] / own["config"]["training"]["lr"]["muon"]
    peak = fmean(run["max_logit_peak"] for run in hot["arms"]["muon"].values())
    return [
        f"at a rate {_WORDS[round(times)]} times Muon's best",
        f"those of Muon come to about {round(peak, -3):.0f}",
        "three to five minutes on two cores",
    ]


def _minutes_of(command: str) -> str:
    """What the command's own help says."""
    helped = " ".join(make_parser()[0].format_help().split())
    return re.findall(rf" {command} [^()]*?(\d+) minutes on two cores", helped)[0]


def _remedies() -> str:
    hot = _read("evidence/hot")
    effects = {each.arm: each.difference.verdict for each in hot_effects(hot) if each.against == "MuonClip"}
    arms = hot_arms(hot)
    assert effects["Muon, QK-norm"] == "not told from zero"
    assert abs(arms["loss"]["softcap"] - arms["loss"]["muonclip"]) < arms["spread"]["muonclip"]
    return "QK-norm and a soft cap do as well"


def _spikes() -> list[str]:
    """What the disturbances leave."""
    figures = _read("evidence/spikes")
    pulse, jump = (figures["cases"][name] for name in ("rate-pulse", "rate-jump"))
    before, after = ([run[at] for run in pulse["arms"]["muon"].values()] for at in ("before", "peak"))
    assert round(fmean(after) - fmean(before)) == 2
    assert spikes.effects(pulse)["qk-norm", "muonclip"]["before"].mean < 0
    first, later = (spikes.effects(case)["muonclip", "muon"] for case in (pulse, jump))
    assert {first["peak"].verdict, later["peak"].verdict} == {"not told from zero"}
    assert later["left"].verdict == "lower"
    assert jump["config"]["training"]["disturbance"]["rate"] == 4
    assert min(run["last_logit"] for run in jump["arms"]["muon"].values()) > 2000
    return [
        *_pulse(),
        f"and ends {-later['left'].mean:.3f} nats below Muon's",
        f"with a {figures['confidence']:.0%} interval".replace("%", " %"),
        f"at most {max(_rises(_read('evidence/search'), 'muon')):.3f} nats here",
        f"have rises up to {max(_rises(figures, 'muon')):.3f}, MuonClip's up to {max(_rises(figures, 'muonclip')):.3f}",
    ]


def _rises(figures: dict, arm: str) -> list[float]:
    return [run["rise"] for case in figures["cases"].values() for run in case["arms"][arm].values()]


def _pulse() -> list[str]:
    """What the first disturbance leaves."""
    case = _read("evidence/spikes")["cases"]["rate-pulse"]
    training = case["config"]["training"]
    disturbance = training["disturbance"]
    assert disturbance["rate"] == 10
    left = {pair: effect["left"] for pair, effect in spikes.effects(case).items()}
    assert left["qk-norm", "muonclip"].verdict == left["muonclip", "muon"].verdict == "lower"
    assert left["rescue", "muon"].verdict == "lower"
    same = ("rescue", "muonclip"), ("softcap", "muonclip"), ("softcap", "muon")
    assert {left[pair].verdict for pair in same} == {"not told from zero"}
    after = training["steps"] - disturbance["after"] - disturbance["steps"]
    return [
        f"ten times as large for {disturbance['steps']} steps",
        f"{after} steps later Muon's logits are still high, and its",
        f"loss is {-left['muonclip', 'muon'].mean:.3f} nats above MuonClip's",
    ]


def _step() -> str:
    ratios = [facts(row)[OURS] for row in _read("speed/cpu")["parts"]["steps"]["rows"]]
    assert 0.9 < min(ratios) < 1 < max(ratios) < 1.5
    return "A training step takes as long as AdamW's or up to half as long again"


def _clip() -> str:
    most = max(each["ratio"]["median"] for each in _read("clip-cost/cpu")["cells"] if each["target"] < 1.05)
    return f"The clip is up to {most - 1:.0%} of it".replace("%", " %")


def _update_rms() -> str:
    return f"{hot_arms(_read('evidence/hot'))['update']['muon']:.2f}"


def _bounds() -> list[str]:
    draw = torch.Generator().manual_seed(0)
    for d in (64, 128):
        q, k = torch.randn(2, 2048, d, generator=draw)
        assert 2 < q.norm(dim=1).max() * k.norm(dim=1).max() / (q @ k.T).max() < 4
    gamma = 100 / 180
    return [
        f"{math.log(2048):.1f} at 2048 tokens",
        "two to four times for random directions in 64 or 128 dimensions",
        f"would be scaled by {gamma:.2f} at τ = 100, down to {60 * gamma:.0f}",
    ]


def _primer() -> list[str]:
    primer = _read("primer/primer")
    bad, arms = primer["bad-gradient"]["bad_step"], primer["bad-gradient"]["arms"]
    before, after = ({arm: each["update_rms"][step] for arm, each in arms.items()} for step in (bad - 1, bad))
    largest = {arm: [each["max_logit"][bad - 1], max(each["max_logit"])] for arm, each in arms.items()}
    sizes = arms["adamw"]["update_rms"]
    back = next(step for step in range(bad, len(sizes)) if sizes[step] <= sizes[bad - 1])
    first = {}
    for arm in ("adamw", "muon"):
        squares = [value**2 for value in arms[arm]["spectra"]["bad step"]]
        first[arm] = f"{max(squares) / sum(squares):.0%}".replace("%", " %")
    return [
        f"from {before['adamw']:.2f} to {after['adamw']:.2f}, and takes {back - bad} steps to come back",
        f"{first['adamw']} of its squared size",
        f"from {before['muon']:.2f} to {after['muon']:.2f}",
        f"the first direction has {first['muon']}",
        f"from {largest['adamw'][0]:.1f} to {largest['adamw'][1]:.1f} under AdamW",
        f"from {largest['muon'][0]:.1f} to {largest['muon'][1]:.1f} under Muon",
        f"do not exceed {largest['muonclip'][1]:.1f} under MuonClip",
        *(f"{label}: {_band(label)}" for label in primer["singular-values"]["after"]),
        _coordinate_check(),
    ]


def _coordinate_check() -> str:
    check = _read("primer/coordinate-check")
    slopes = {name: scale["slopes"]["all layers"] for name, scale in check["scales"].items()}
    first, last = check["widths"][0], check["widths"][-1]
    return (
        f"From width {first} to {last} the change after all layers grows as the width to the power "
        f"{slopes['original']:.2f} with `original`, {slopes['spectral_unclamped']:.2f} with `spectral_unclamped` "
        f"and {slopes['match_rms_adamw']:.2f} with `match_rms_adamw`"
    )


def _band(label: str) -> str:
    values = _read("primer/primer")["singular-values"]
    bands = []
    for dtype, after in values["after"][label].items():
        pairs = [pair for name in after for pair in zip(values["before"][name], after[name], strict=True)]
        within = [y for x, y in pairs if x >= 1e-3]
        bands.append(f"{min(within):.2f} to {max(within):.2f} in {dtype}")
    return ", ".join(bands)
