"""A small diffusion transformer (diffusers' DiT) that learns to draw scikit-learn's digits, by class.

    python diffusion_transformer.py         # a minute on two cores; diffusion_transformer.png

Needs muonclip[torch], diffusers, scikit-learn, matplotlib, tqdm.
"""

import argparse

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiTTransformer2DModel
from sklearn.datasets import load_digits
from tqdm import trange

from muonclip.torch import MuonClip

options = argparse.ArgumentParser()
options.add_argument("--steps", type=int, default=300)
steps = options.parse_args().steps

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1  # 1797 × 1 × 8 × 8, from −1 to 1
labels = torch.tensor(digits.target)

model = DiTTransformer2DModel(
    num_attention_heads=4,
    attention_head_dim=16,
    in_channels=1,
    out_channels=1,
    num_layers=4,
    sample_size=8,
    patch_size=2,
    num_embeds_ada_norm=10,
)
noise_of = DDPMScheduler(num_train_timesteps=200, beta_schedule="squaredcos_cap_v2")
optimizer = MuonClip(model, lr=5e-3, weight_decay=0.1)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

for _ in (bar := trange(steps)):
    rows = torch.randint(len(images), (64,))
    noise, times = torch.randn(64, 1, 8, 8), torch.randint(200, (64,))
    noisy = noise_of.add_noise(images[rows], noise, times)
    predicted = model(noisy, timestep=times, class_labels=labels[rows]).sample
    loss = F.mse_loss(predicted, noise)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    bar.set_postfix(loss=f"{loss.item():.3f}")
print(optimizer.plan)
print(optimizer.qk_clip.report())

model.eval()
sample, classes = torch.randn(50, 1, 8, 8), torch.arange(10).repeat(5)
noise_of.set_timesteps(50)
with torch.no_grad():
    for time in noise_of.timesteps:
        predicted = model(sample, timestep=time.expand(50), class_labels=classes).sample
        sample = noise_of.step(predicted, time, sample).prev_sample
grid = sample.view(5, 10, 8, 8).permute(0, 2, 1, 3).reshape(40, 80)
figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
axis.imshow(grid, cmap="gray", vmin=-1, vmax=1)
axis.set(title=f"Digits drawn after {steps} steps, one column per class", xticks=[], yticks=[])
figure.savefig("diffusion_transformer.png", dpi=150)
