"""A vision transformer on scikit-learn's handwritten digits.

    python digits_vit.py         # half a minute on two cores

Needs muonclip[torch], scikit-learn, transformers, tqdm.
"""

import torch
from sklearn.datasets import load_digits
from tqdm import trange
from transformers import ViTConfig, ViTForImageClassification

from muonclip.torch import MuonClip

EPOCHS, BATCH = 15, 64

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1  # 1797 × 1 × 8 × 8
labels = torch.tensor(digits.target)
order = torch.randperm(len(labels))
train, test = order[:1500], order[1500:]

model = ViTForImageClassification(
    ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_labels=10,
    )
)
optimizer = MuonClip(model, lr=5e-3, weight_decay=0.1)
steps = EPOCHS * (len(train) // BATCH)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps, cycle_momentum=False)

for _ in (bar := trange(EPOCHS)):
    for rows in train[torch.randperm(len(train))].split(BATCH)[: len(train) // BATCH]:
        loss = model(images[rows], labels=labels[rows]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        accuracy = (model.eval()(images[test]).logits.argmax(-1) == labels[test]).float().mean().item()
    model.train()
    bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{accuracy:.1%}")

print(optimizer.plan)  # the blocks are Muon's; patches, positions, class token, head, norms and biases AdamW's
print(f"{accuracy:.1%} of the test images are read rightly")
