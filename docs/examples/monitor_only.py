"""Logits watched without clipping, under any optimizer: maxima of every head, step by step, and a figure.

    python monitor_only.py         # half a minute on two cores; monitor_only.png

Needs muonclip[torch], matplotlib, tqdm.
"""

import inspect
import math
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch
from tqdm import trange

from muonclip.models import MoEConfig
from muonclip.models.torch import MoE
from muonclip.torch import QKClip

torch.manual_seed(0)
model = MoE(MoEConfig.cpu(num_layers=2))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)  # a hot rate, to have something to see
watch = QKClip(model, tau=math.inf, observe="always")  # τ = ∞ scales nothing

text = torch.tensor(list(Path(inspect.__file__).read_bytes()))
maxima = {name: [] for name in watch.projections}
for _ in (bar := trange(150)):
    starts = torch.randint(len(text) - 65, (8, 1))
    windows = text[starts + torch.arange(65)]
    loss = model.loss(windows[:, :-1], windows[:, 1:])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    watch.step()  # reads the maxima of this step's forwards, and starts anew
    for name, layer in watch.report().layers.items():
        maxima[name].append(layer.max_logits)
    bar.set_postfix(loss=f"{loss.item():.2f}", max=f"{max(each[-1].max().item() for each in maxima.values()):.1f}")

figure, axes = plt.subplots(1, len(maxima), figsize=(4 * len(maxima), 3.5), sharey=True, layout="constrained")
for axis, (name, steps) in zip(axes, maxima.items(), strict=True):
    axis.plot(torch.stack(steps), linewidth=1)
    axis.set(title=name, xlabel="step")
axes[0].set_ylabel("largest logit of each head")
figure.savefig("monitor_only.png", dpi=150)
print("largest logit at the end:", round(max(steps[-1].max().item() for steps in maxima.values()), 1))
