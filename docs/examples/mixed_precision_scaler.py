"""fp16 with a GradScaler: a step that overflows changes neither weights nor momentum, and clips nothing.

    python mixed_precision_scaler.py         # on a GPU if there is one, else on the CPU in fp16

Needs muonclip[torch], tqdm.
"""

import inspect
from pathlib import Path

import torch
from tqdm import trange

from muonclip.models import MoEConfig
from muonclip.models.torch import MoE
from muonclip.torch import MuonClip

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
model = MoE(MoEConfig.cpu(num_layers=2)).to(device)
optimizer = MuonClip(model, lr=5e-3, weight_decay=0.1)
scaler = torch.amp.GradScaler(device, init_scale=2.0**24)  # too high, so that the first steps overflow

text = torch.tensor(list(Path(inspect.__file__).read_bytes()), device=device)
skipped = 0
for _ in (bar := trange(40)):
    starts = torch.randint(len(text) - 65, (8, 1), device=device)
    windows = text[starts + torch.arange(65, device=device)]
    with torch.autocast(device, dtype=torch.float16):
        loss = model.loss(windows[:, :-1], windows[:, 1:])
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    before = scaler.get_scale()
    scaler.step(optimizer)  # skips where a gradient is inf or NaN
    scaler.update()
    skipped += scaler.get_scale() < before
    optimizer.zero_grad()
    bar.set_postfix(loss=f"{loss.item():.2f}", scale=scaler.get_scale())

report = optimizer.qk_clip.report()
print(f"{skipped} steps skipped, {report.steps} taken")
print(report)
