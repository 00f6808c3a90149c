"""Logits watched without clipping, under any optimizer: maxima of every head, step by step, and a figure.

    python monitor_only.py         # half a minute on two cores; monitor_only.png

Needs muonclip[torch], matplotlib, tqdm.
"""

import inspect
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch
from tqdm import trange

from muonclip.models import MoEConfig
from muonclip.models.torch import MoE
from muonclip.torch import Monitor

torch.manual_seed(0)
model = MoE(MoEConfig.cpu(num_layers=2))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)  # a hot rate, to have something to see
monitor = Monitor(model, optimizer)

text = torch.tensor(list(Path(inspect.__file__).read_bytes()))
logged = []
for _ in (bar := trange(150)):
    starts = torch.randint(len(text) - 65, (8, 1))
    windows = text[starts + torch.arange(65)]
    loss = model.loss(windows[:, :-1], windows[:, 1:])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    logged.append(monitor.scalars("", details=True))
    bar.set_postfix(loss=f"{loss.item():.2f}", max_logit=f"{logged[-1]['max_logit']:.1f}")

panels = {
    "largest logit of each layer": [name for name in logged[0] if name.startswith("bound/")],
    "update over weight, ‖ΔW‖ / ‖W‖": ["relative_update.max", "relative_update.median"],
    "largest singular value of a weight": ["weight_spectral_norm.max", "weight_spectral_norm.median"],
}
figure, axes = plt.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
for axis, (title, names) in zip(axes, panels.items(), strict=True):
    for name in names:
        axis.plot([values[name] for values in logged], label=name.removeprefix("bound/"))
    axis.set(title=title, xlabel="step")
    axis.legend()
axes[1].set_yscale("log")
figure.savefig("monitor_only.png", dpi=150)
print(f"largest logit at the end: {logged[-1]['max_logit']:.1f}")
