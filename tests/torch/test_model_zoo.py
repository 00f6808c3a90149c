"""QK-Clip on models that it was not written for, judged by a probe that replays each attention on its own inputs."""

import numpy as np
import pytest
import torch
from dense_probe import Replay
from model_zoo import ZOO

from muonclip.torch import MuonClip, QKClip


def inflated(name, seed=0):
    """The model with weights so large that heads differ widely in loudness, and inputs for it."""
    torch.manual_seed(seed)
    architecture = ZOO[name]
    model = architecture.build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                fan_in = min(parameter.shape[-2:])
                parameter.normal_(0, 1.6 * fan_in**-0.5)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return architecture, model, architecture.inputs(seed=seed)


def loss_of(model, inputs):
    return model(**inputs).logits.float().square().mean()


@pytest.mark.parametrize("name", ZOO)
def test_every_head_ends_at_the_smaller_of_its_maximum_and_tau(name):
    architecture, model, inputs = inflated(name)
    optimizer = MuonClip(model, lr=0.0, weight_decay=0.0, qk_clip=QKClip(model, tau=1.0, observe="always"))
    clip = optimizer.qk_clip
    names = list(clip.projections)
    assert len(names) == architecture.attentions
    assert {projection.kind for projection in clip.projections.values()} == {architecture.kind}

    replay = Replay(model, names)
    with replay.recording():
        loss_of(model, inputs).backward()
    before = {name: (s, qs) for name, (s, qs) in replay.run().items()}
    clip.tau = tau = float(np.median(np.concatenate([s for s, _ in before.values()])))
    assert tau > 0
    original = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()
    report = clip.report()
    clip.remove()
    after = replay.run()
    for name in names:
        seen, queries = before[name]
        np.testing.assert_allclose(report.layers[name].max_logits, seen, rtol=2e-5)
        assert report.layers[name].exact.all()
        if architecture.kind == "qk-norm":
            continue
        np.testing.assert_allclose(after[name][0], np.minimum(seen, tau), rtol=2e-5)
        quiet = torch.from_numpy(seen <= tau)
        assert 0 < report.clipped_heads < report.heads
        for old, new in zip(queries, after[name][1], strict=True):
            assert torch.equal(old[:, quiet], new[:, quiet])
    if architecture.kind == "qk-norm":
        assert report.clipped_heads == 0
        assert all(torch.equal(p, original[n]) for n, p in model.named_parameters())
