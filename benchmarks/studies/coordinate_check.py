"""Does a rate carry over from one width to another? A coordinate check (Tensor Programs V, arXiv 2203.03466).

One small transformer at several widths, its depth, head width and proportions the same, each trained for a few steps at
the same rate. A rate carries over where the steps change the activations by the same amount at every width: then the
slope of the change's logarithm over that of the width is 0. Only Muon's matrices move, so the slope is that of the
scale of its updates. The reference model, dense, with embeddings of size 1 and weights of size 1/√width.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from benchmarks.execution.train import make_folder
from benchmarks.experiment.data import Corpus, open_corpus
from benchmarks.records import atomic_files
from benchmarks.records.environment import environment
from benchmarks.report.style import picture, plain_log
from benchmarks.studies.primer import rounded
from benchmarks.training.timing import torch_threads
from muonclip.models import MoEConfig
from muonclip.models.torch import MoE
from muonclip.torch import MuonClip

WIDTHS, STEPS, SEEDS, BATCH, LENGTH, LAYERS, HEAD = (64, 128, 256, 512), 4, (0, 1), 4, 32, 2, 16
RATES = {"original": 0.02, "match_rms_adamw": 0.01, "spectral_unclamped": 0.02}
PLACES = {  # by label: the module, and the colour of its line
    "attention": ("attn.o_proj", "#0072B2"),
    "MLP": ("mlp.down_proj", "#D55E00"),
    "all layers": ("norm", "#009E73"),
}
Json = Mapping[str, Any]


def run(options: argparse.Namespace) -> None:
    """Train all widths by all scales. Writes coordinate-check.json, and its picture for light and for dark pages."""
    make_folder(options.out)
    widths, seeds = (WIDTHS[:2], SEEDS[:1]) if options.quick else (WIDTHS, SEEDS)
    with torch_threads(1):
        values = measure(open_corpus(), widths, seeds)
    made = environment() | {"threads": 1}
    atomic_files.write_json(options.out / "coordinate-check.json", {"environment": made} | rounded(values))
    for name, dark in (("coordinate-check", False), ("coordinate-check-dark", True)):
        title = "Change of activations after some steps, at one rate"
        with picture(options.out / f"{name}.png", [made], title, dark=dark, figsize=(5.0, 7.6)) as figure:
            draw(figure, values)


def measure(corpus: Corpus, widths: Sequence[int], seeds: Sequence[int]) -> dict[str, Any]:
    """Return by scale and place the root mean square of the activations before, and of their change, by width.

    Means over the seeds; and the slope of the change over the width in logarithms.
    """
    scales: dict[str, Any] = {}
    for adjust_lr_fn, lr in RATES.items():
        found = {place: {"before": [], "change": []} for place in PLACES}
        for width in widths:
            runs = [_changes(corpus, width, adjust_lr_fn, lr, seed) for seed in seeds]
            for place in PLACES:
                for which in ("before", "change"):
                    found[place][which].append(float(np.mean([run[place][which] for run in runs])))
            print(adjust_lr_fn, width, {p: found[p]["change"][-1] for p in PLACES}, file=sys.stderr, flush=True)
        slopes = {place: slope(widths, each["change"]) for place, each in found.items()}
        scales[adjust_lr_fn] = {"lr": lr, "places": found, "slopes": slopes}
    return {"widths": list(widths), "steps": STEPS, "seeds": list(seeds), "scales": scales}


def slope(widths: Sequence[int], values: Sequence[float]) -> float:
    """Return the exponent p of values ∝ width^p, by least squares of the logarithms."""
    return float(np.polyfit(np.log(widths), np.log(values), 1)[0])


def model_of(width: int, vocab_size: int) -> MoE:
    """Make the dense model of a width; embeddings have size 1, matrices 1/√width."""
    config = MoEConfig.cpu(
        vocab_size=vocab_size, hidden_size=width, num_layers=LAYERS, num_dense_layers=LAYERS, max_seq_len=LENGTH,
        attention="mha", num_heads=width // HEAD, head_dim=HEAD, intermediate_size=2 * width,
        init_std=1 / math.sqrt(width),
    )  # fmt: skip
    model = MoE(config)
    torch.nn.init.normal_(model.embed_tokens.weight)
    return model


def _changes(corpus: Corpus, width: int, adjust_lr_fn: Any, lr: float, seed: int) -> dict[str, dict[str, float]]:
    torch.manual_seed(seed)
    model = model_of(width, corpus.vocab_size)
    optimizer = MuonClip(
        model, lr=lr, weight_decay=0.0, qk_clip=None, adjust_lr_fn=adjust_lr_fn, adamw={"lr": 0.0}, ns_steps=8,
        ns_coefficients="polar_express",
    )  # fmt: skip
    windows: dict[str, Any] = {"batch_size": BATCH, "length": LENGTH}
    probe = torch.from_numpy(corpus.batch(seed=seed, step=STEPS, **windows))[:, :-1]
    before = activations(model, probe)
    for step in range(STEPS):
        tokens = torch.from_numpy(corpus.batch(seed=seed, step=step, **windows))
        optimizer.zero_grad()
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
    after = activations(model, probe)
    return {place: {"before": _rms(old), "change": _rms(after[place] - old)} for place, old in before.items()}


@torch.no_grad()
def activations(model: MoE, tokens: Tensor) -> dict[str, Tensor]:
    """Return what each place gives out, of all layers: [layers, B, T, width]."""
    seen: dict[str, list[Tensor]] = {place: [] for place in PLACES}
    handles: list[RemovableHandle] = []
    for place, (end, _) in PLACES.items():
        for name, module in model.named_modules():
            if name == end or name.endswith(f".{end}"):
                handles.append(module.register_forward_hook(_keep_in(seen[place], of_input=end == "norm")))
    model(tokens)
    for handle in handles:
        handle.remove()
    return {place: torch.stack(each) for place, each in seen.items()}


def _keep_in(seen: list[Tensor], *, of_input: bool) -> Any:
    """Return a hook that keeps what a module gives out, or what it is given."""
    return lambda _, args, output: seen.append(args[0] if of_input else output)


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def draw(figure: Figure, values: Json) -> None:
    """Draw a panel for each scale: the change of each place over the width."""
    axes = figure.subplots(len(values["scales"]), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axis, (name, scale) in zip(axes, values["scales"].items(), strict=True):
        for place, (_, colour) in PLACES.items():
            label = f"{place}, slope {scale['slopes'][place]:.2f}"
            axis.plot(values["widths"], scale["places"][place]["change"], "o-", color=colour, linewidth=2, label=label)
        axis.set(title=f"{name}, rate {scale['lr']:g}", xscale="log", yscale="log", ylabel="RMS of the change")
        axis.set_xticks(values["widths"], [str(width) for width in values["widths"]])
        axis.minorticks_off()
        axis.set_ylim(0.08, 5)
        axis.legend(frameon=False, fontsize=9, loc="upper left")
        plain_log(axis.yaxis, (1.0, 3.0))
    axes[-1].set_xlabel("width of the model")
