"""The pictures of docs/primer.md, from real steps, real momenta and the runs of the evidence.

    bad-gradient     one gradient that is wrong and a hundred times as large, in AdamW's and in Muon's hands
    singular-values  momenta of a training run before and after the iteration, by polynomial and precision
    logits           the largest logit and the loss at the hot rate, with the clip and other remedies, of docs/evidence

Everything drawn is in `primer.json`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.execution.train import make_folder
from benchmarks.experiment.arms import ARMS, choices
from benchmarks.experiment.data import Corpus, open_corpus
from benchmarks.experiment.presets import OWN_RATE, PRESETS
from benchmarks.records import atomic_files
from benchmarks.records.environment import environment
from benchmarks.records.summary import bits
from benchmarks.report.style import INK, QUIET, picture, plain_log
from benchmarks.studies.momenta import STEPS as MOMENTA_STEPS
from benchmarks.studies.momenta import saved_momenta
from benchmarks.training.timing import torch_threads
from muonclip.core import orthogonalize
from muonclip.models.torch import MoE
from muonclip.torch import MuonClip, QKClip
from muonclip.torch.update.products import PRODUCTS

STEPS, BAD_STEP, TIMES = 60, 30, 100.0
TAUS = {"adamw": math.inf, "muon": math.inf, "muonclip": 2.0}
MATRIX = "layers.1.attn.o_proj.weight"
ITERATIONS = {  # by label: a set and its number of steps
    "jordan × 5": ("jordan", 5),
    "polar_express × 5": ("polar_express", 5),
    "polar_express × 8": ("polar_express", 8),
    "deepseek_v4 × 10": ("deepseek_v4", 10),
    "polar_express × 16, NVIDIA's": ("polar_express", 16),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HOT = Path(__file__).parents[2] / "docs" / "evidence" / "hot.json"
REMEDIES = ("muon", "muonclip@tau=10", "muonclip", "muonclip@tau=100", "rescue", "per-head", "qk-norm", "softcap")
_WIDTH = 5.0  # inches: 600 pixels, of which a phone shows about 360
Json = Mapping[str, Any]


def run(options: argparse.Namespace) -> None:
    """Compute and draw."""
    make_folder(options.out)
    with torch_threads(1):
        late = {name: momentum for name, momentum in saved_momenta().items() if name.endswith(f" {max(MOMENTA_STEPS)}")}
        values = {"bad-gradient": bad_gradient(open_corpus()), "singular-values": singular_values(late)}
    values["logits"] = logits(atomic_files.read_record(HOT))
    made = environment()
    atomic_files.write_json(options.out / "primer.json", {"environment": made} | rounded(values))
    for name, (title, height, draw) in PICTURES.items():
        with picture(
            options.out / f"{name}.png", [values[name].get("environment", made)], title, figsize=(_WIDTH, height)
        ) as figure:
            draw(figure, values[name])


def bad_gradient(corpus: Corpus) -> dict[str, Any]:
    """Train the small reference model by each optimizer, one batch being a repeated byte whose gradient counts `TIMES`.

    Returns for each by step the RMS of the update of `MATRIX` over the rate and the largest logit, and the singular
    values of the update before the bad step and in it, over their own root mean square. Nothing decays, and gradients
    are not clipped.
    """
    model = PRESETS["cpu"].model(vocab_size=corpus.vocab_size)
    found: dict[str, Any] = {}
    for arm, tau in TAUS.items():
        torch.manual_seed(0)
        moe, lr = MoE(model), OWN_RATE.lr[arm]
        clip = QKClip(moe, tau=tau, observe="always")
        if arm == "adamw":
            optimizer = torch.optim.AdamW(moe.parameters(), lr=lr, weight_decay=0.0, betas=OWN_RATE.betas)
            clip.attach(optimizer)
        else:
            optimizer = MuonClip(moe, lr=lr, weight_decay=0.0, qk_clip=clip)
        matrix = moe.get_parameter(MATRIX)
        rms, largest, spectra = [], [], {}
        for step in range(STEPS):
            windows = corpus.batch(seed=0, step=step, batch_size=OWN_RATE.batch_size, length=model.max_seq_len)
            tokens = torch.from_numpy(windows)
            bad = step == BAD_STEP
            if bad:
                tokens = torch.full_like(tokens, ord("e"))
            optimizer.zero_grad()
            (moe.loss(tokens[:, :-1], tokens[:, 1:]) * (TIMES if bad else 1)).backward()
            before = matrix.detach().clone()
            optimizer.step()
            largest.append(clip.report().max_logit)
            update = (before - matrix.detach()).double() / lr
            rms.append(_rms(update))
            if step in (BAD_STEP - 1, BAD_STEP):
                values = np.array(_singular_values(update))
                spectra["bad step" if bad else "step before"] = (values / np.sqrt(np.mean(values**2))).tolist()
        found[arm] = {"lr": lr, "update_rms": rms, "max_logit": largest, "spectra": spectra}
    frame = {"steps": STEPS, "bad_step": BAD_STEP, "times": TIMES, "matrix": MATRIX, "tau": TAUS["muonclip"]}
    return frame | {"arms": found}


def singular_values(momenta: Mapping[str, Tensor]) -> dict[str, Any]:
    """Iterate each momentum; return its singular values before, over its norm, and after, both in descending order."""
    own = {"xp": torch, "products": PRODUCTS["baddbmm"]}

    def after(momentum: Tensor, name: str, ns_steps: int, dtype: torch.dtype) -> list[float]:
        return _singular_values(orthogonalize(momentum[None], name, ns_steps, dtype=dtype, **own)[0])

    return {
        "before": {name: _singular_values(momentum / momentum.norm()) for name, momentum in momenta.items()},
        "after": {
            label: {
                short: {name: after(momentum, *iteration, dtype) for name, momentum in momenta.items()}
                for short, dtype in DTYPES.items()
            }
            for label, iteration in ITERATIONS.items()
        },
    }


def logits(hot: Json) -> dict[str, Any]:
    """Return largest logits, medians of the last quarter and losses in bits, by seed, of the runs at the hot rate."""
    arms = {
        name: {
            "label": choice.label,
            "colour": ARMS[choice.entry].colour,
            "peak": [run["max_logit_peak"] for run in hot["arms"][name].values()],
            "last_quarter": [run["max_logit_median_last_quarter"] for run in hot["arms"][name].values()],
            "loss": [bits(run["final_val_loss"]) for run in hot["arms"][name].values()],
        }
        for name, choice in zip(REMEDIES, choices(*REMEDIES), strict=True)
    }
    return {"environment": hot["environment"], "tau": hot["config"]["training"]["tau"], "arms": arms}


def rounded(value: Any) -> Any:
    """Round every number to four digits: more cannot be seen in a picture."""
    if isinstance(value, Mapping):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _singular_values(x: Tensor) -> list[float]:
    return torch.linalg.svdvals(x.double()).tolist()


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def _draw_bad_gradient(figure: Figure, value: Json) -> None:
    sizes, spectra, largest = figure.subplots(3, 1)
    for arm, found in value["arms"].items():
        look: dict[str, Any] = {"color": ARMS[arm].colour, "linewidth": 2, "label": ARMS[arm].label}
        largest.plot(found["max_logit"], **look)
        if arm == "muonclip":
            continue  # its updates are Muon's
        sizes.plot(found["update_rms"], **look)
        for when, style in (("step before", ":"), ("bad step", "-")):
            values = found["spectra"][when]
            spectra.plot(
                np.linspace(0, 100, len(values)), values, style, **look | {"label": f"{ARMS[arm].label}, {when}"}
            )
    for axis in (sizes, largest):
        axis.axvline(value["bad_step"], color=QUIET, linewidth=1, linestyle="--")
        axis.set(xlabel="step", ylim=(0, None))
        axis.legend(frameon=False, fontsize=10)
    sizes.set_title("Size: RMS of the update over the rate")
    spectra.set(title="Shape: singular values of the update", xlabel="% of them, largest first")
    spectra.set(yscale="log", ylim=(1e-3, 1e3))
    plain_log(spectra.yaxis, (1.0,))
    spectra.legend(frameon=False, fontsize=10, ncols=2, loc="upper center")
    largest.set_title(f"Largest attention logit; MuonClip's τ is {value['tau']:g}")


def _draw_singular_values(figure: Figure, value: Json) -> None:
    axes = figure.subplots(len(ITERATIONS), 2, sharex=True, sharey=True, squeeze=False)
    for row, (label, by_dtype) in zip(axes, value["after"].items(), strict=True):
        for axis, (dtype, after) in zip(row, by_dtype.items(), strict=True):
            _draw_map(axis, value["before"], after)
            axis.set_title(f"{label}\n{dtype}" if axis is row[0] else f"\n{dtype}", size=10)
    for axis in axes[-1]:
        axis.set_xlabel("before")
    figure.supylabel("after", size=11)


def _draw_map(axis: Axes, before: Json, after: Json) -> None:
    axis.axhline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    for name, values in after.items():
        axis.plot(before[name], values, ".", color=ARMS["muon"].colour, markersize=2.5, alpha=0.5)
    axis.set(xscale="log", xlim=(1e-5, 1), ylim=(0, 1.35), yticks=[0, 0.5, 1])
    axis.set_xticks([1e-4, 1e-2, 1], ["0.0001", "0.01", "1"])


def _draw_logits(figure: Figure, value: Json) -> None:
    arms = list(value["arms"].values())
    axes = figure.subplots(2, 1)
    for axis, quantity in zip(axes, ("peak", "loss"), strict=True):
        for row, arm in enumerate(arms):
            values = arm[quantity]
            axis.plot(values, [row] * len(values), "o", color=arm["colour"], markersize=5, alpha=0.8)
        axis.set_yticks(range(len(arms)), [arm["label"].replace(", ", ",\n") for arm in arms], size=10)
        axis.invert_yaxis()
    peaks, losses = axes
    peaks.axvline(value["tau"], color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    peaks.set(xlabel=f"largest logit of the run (dashed: τ = {value['tau']:g})", xscale="log")
    plain_log(peaks.xaxis, (1.0, 3.0))
    losses.set_xlabel("final validation loss, bits per byte")


PICTURES = {  # by name: title, height in inches, and what draws it
    "bad-gradient": (f"One bad gradient, {TIMES:g} times as large", 8.8, _draw_bad_gradient),
    "singular-values": ("Singular values of momenta, before\nand after the iteration", 8.6, _draw_singular_values),
    "logits": ("Remedies at a hot rate, three seeds each", 7.4, _draw_logits),
}
