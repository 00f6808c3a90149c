"""The study of a context that YaRN makes longer: the logits that are observed, and what goes on across the switch."""

import json
import math
from dataclasses import replace

import naive_moe
import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.experiment.arms import choices
from benchmarks.experiment.experiment import Experiment
from benchmarks.records import atomic_files
from benchmarks.records.summary import bits
from benchmarks.studies import long_context

MADE = {"command": "python -m benchmarks long-context", "date": "2026-12-01T00:00:00", "muonclip": "0.1.0"}


@pytest.fixture
def protocol(corpus, experiment):
    training = replace(experiment.training, lr={"muonclip": 1e-2})
    of = {"model": replace(experiment.model, max_seq_len=8), "training": training}
    return Experiment.on(corpus, name="", title="", chosen=choices("muonclip"), seeds=(3,), **of)


@pytest.fixture
def short(protocol, corpus):
    learner = long_context.TorchLearner(protocol, protocol.arm("muonclip"), 3)
    for done in range(3):
        long_context.step(learner, corpus, 3, done)
    return learner


def probed(learner, temperature, step):
    """The maximum of all logits in a step, by loops in float64, for each window, head and query: scale written out."""
    found = []

    def probe(attn, inputs):
        for x in inputs[0].detach().double():
            for q, k, _ in naive_moe.heads_of(attn, x, learner.model.config):
                logits = q @ k.T * temperature**2 / math.sqrt(attn.config.qk_head_dim)
                found.append(logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -math.inf).max().item())

    hooks = [layer.attn.register_forward_pre_hook(probe) for layer in learner.model.layers]
    record = step()
    for hook in hooks:
        hook.remove()
    return record, max(found)


@pytest.mark.parametrize(("way", "temperature"), [("rope", 1.0), ("yarn", 0.1 * math.log(8) + 1)])
def test_the_observed_maximum_is_that_of_a_probe_before_and_after_the_switch(protocol, corpus, short, way, temperature):
    """And γ = τ / S brings what YaRN's mscale² has raised down again: every head that is above τ is clipped."""
    tau = protocol.training.tau
    record, expected = probed(short, 1.0, lambda: long_context.step(short, corpus, 3, 3))
    assert record["max_logit"] == pytest.approx(expected, rel=1e-5)
    long = long_context.go_on(protocol, protocol.arm("muonclip"), way, short)
    assert long.model.config.max_seq_len == 64
    record, expected = probed(long, temperature, lambda: long_context.step(long, corpus, 3, 4, 2))
    assert record["max_logit"] == pytest.approx(expected, rel=1e-5)
    assert tau < expected
    assert record["gamma"] == pytest.approx(tau / expected, rel=1e-5)
    assert record["clipped_heads"] > 0


@pytest.mark.parametrize("way", long_context.WORDS)
def test_a_checkpoint_of_the_short_stage_loads_with_the_state_of_the_optimizer(protocol, short, corpus, tmp_path, way):
    atomic_files.save(tmp_path / "short.pt", short.state() | {"done": 3})
    long = long_context.go_on(protocol, protocol.arm("muonclip"), way, short)
    long.restore(atomic_files.load(tmp_path / "short.pt", "cpu"))
    other = long_context.go_on(protocol, protocol.arm("muonclip"), way, short)
    buffers = 0
    for (name, weight), (_, loaded), (_, handed) in zip(
        *(each.model.named_parameters() for each in (short, long, other)), strict=True
    ):
        assert torch.equal(weight, loaded), name
        for key, value in short.optimizer.state[weight].items():
            for learner, parameter in ((long, loaded), (other, handed)):
                of = learner.optimizer.state[parameter][key]
                assert torch.equal(value, of), (name, key)
                assert value is not of
                buffers += value.numel()
    assert buffers > 2 * sum(parameter.numel() for parameter in short.model.parameters())
    first, again = (long_context.step(each, corpus, 3, 3, 2) for each in (long, other))
    assert first == again
    assert all(map(torch.equal, long.model.parameters(), other.model.parameters()))


def test_losses_by_position_average_to_the_loss(protocol, short, corpus, monkeypatch):
    monkeypatch.setattr(long_context, "WINDOWS", 8)
    long = long_context.go_on(protocol, protocol.arm("muonclip"), "yarn", short)
    found = long_context.losses(long, corpus)
    windows = corpus.validation_batch(index=0, batch_size=8, length=64)
    whole = math.fsum(loss * share for loss, share in zip(found, (8, 8, 16, 32), strict=True)) / 64
    assert whole == pytest.approx(bits(long.loss(windows)), rel=1e-5)
    first = bits(short.loss(windows[:, :9]))  # YaRN changes the short context too, a little
    assert found[0] == pytest.approx(first, rel=0.1)
    plain = long_context.go_on(protocol, protocol.arm("muonclip"), "rope", short)
    assert long_context.losses(plain, corpus)[0] == pytest.approx(first, rel=1e-5)


def test_differences_are_of_the_same_seed():
    rows = [
        {"way": way, "seed": seed, "steps": steps, "loss": [seed + above, 2.0]}
        for steps in (0, 5)
        for way, above in (("rope", 0.1), ("yarn", 0.0))
        for seed in (2, 3, 7)
    ]
    step = {"seed": 2, "step": 1, "gamma": 0.5, "clipped_heads": 3}
    switch = [step | {"way": way, "max_logit": logit} for way, logit in (("rope", 11.0), ("yarn", 20.0))]
    of = {"short": 3, "long": 5, "batch": [16, 4], "tau": 10.0, "lengths": [8, 16]}
    text = long_context.table({"rows": rows, "switch": switch, "training": of, "environment": MADE})
    assert "| YaRN − the rotation as it was | 5 | −0.100 (−0.100 to −0.100) | +0.000 |" in text
    assert "| YaRN | 0 | 4.000 | 2.000 |" in text
    assert "| 1 | 20.00 | 0.500 | 3.0 | 11.00 | 0.500 | 3.0 |" in text


@pytest.mark.slow
def test_both_stages_are_trained(tmp_path, capsys):
    main(["long-context", "--quick", "--out", str(tmp_path)])
    figures = json.loads((tmp_path / "long_context.json").read_text(encoding="utf-8"))
    assert len(figures["rows"]) == 2 * 2 * 2
    assert {row["step"] for row in figures["switch"]} == {-2, -1, 0, 1, 2, 3}
    assert (tmp_path / "long_context.md").read_text(encoding="utf-8") in capsys.readouterr().out
