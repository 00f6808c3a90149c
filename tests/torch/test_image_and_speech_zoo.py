"""QK-Clip on models of images and speech, judged by a witness that reads logits below autograd and knows no attention.

Each is built from a tiny configuration and clipped once, at a τ between its heads; then all is repeated on the inputs
that each softmax had. Those of transformers are as in `python -m benchmarks sweep`.
"""

import functools

import pytest
import torch
import transformers
from image_models import INPUTS, argument

from benchmarks.studies.softmax_witness import SoftmaxWitness
from benchmarks.studies.sweep import judge
from benchmarks.studies.sweep_architectures import ARCHITECTURES
from benchmarks.studies.sweep_models import Architecture
from muonclip.torch import MuonClip, QKClip

OF_TRANSFORMERS = {each.name: each for each in ARCHITECTURES if each.library == "transformers"}
WRITTEN_HERE = {
    name: Architecture(
        name,
        "image_models",
        inputs={each: functools.partial(argument, each, shape) for each, shape in inputs.items()},
    )
    for name, inputs in INPUTS.items()
}


@pytest.mark.parametrize(
    ("name", "attentions"),
    [
        ("ViTModel", 2),
        ("SwinModel", 3),
        ("HieraModel", 2),
        ("SamVisionModel", 2),
        ("SamVisionModel eager", 2),
        ("VitDetModel relative", 2),
        ("Qwen2VLModel", 4),  # two layers of images and two of text
        ("OpenAIGPTModel", 2),
        ("XLNetModel", 2),
        ("DebertaModel disentangled", 2),
        ("BigBirdModel sparse", 2),
        ("Wav2Vec2Model", 2),
        ("Wav2Vec2ConformerModel relative", 2),
        ("CoAtNet", 1),
        ("DiT", 2),
        ("UNet", 6),  # to itself and to the text
        ("SD3", 2),
    ],
)
def test_every_head_ends_at_the_smaller_of_its_maximum_and_tau(name, attentions):
    result = judge(WRITTEN_HERE.get(name) or OF_TRANSFORMERS[name])
    assert (result.verdict, result.clipped, result.observed) == ("found", attentions, 0), result.because
    assert result.clip is not None
    assert result.statistic is not None
    assert max(result.clip, result.statistic) < 1e-5


def test_norms_of_queries_and_keys_are_observed_only():
    result = judge(WRITTEN_HERE["Flux"])
    assert (result.verdict, result.clipped, result.observed) == ("observed only", 0, 2)
    assert result.because.startswith("QK-norm")
    assert result.statistic is not None
    assert result.statistic < 1e-5


def test_a_model_of_convolutions_alone_has_no_attention():
    options = {"hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2}
    convnext = Architecture("ConvNextModel", "transformers", options)
    assert judge(convnext).verdict == "no softmax"


def test_wav2vec2_is_clipped_where_layers_are_dropped():
    """Of the layers that ran, by their own inputs; what was dropped keeps its bits."""
    torch.manual_seed(0)
    architecture = OF_TRANSFORMERS["Wav2Vec2Model"]
    options = dict(architecture.options, layerdrop=0.3, num_hidden_layers=4, mask_time_prob=0.0)
    for dropout in ("hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout"):
        options[dropout] = 0.0
    model = Architecture(architecture.name, architecture.library, options, architecture.inputs).build().train()
    waves = architecture.arguments(model)["input_values"]
    clip = QKClip(model, tau=1.0, observe="always", example_inputs={"input_values": waves})
    optimizer = MuonClip(model, lr=0.0, weight_decay=0.0, qk_clip=clip)
    names, seen = list(clip.projections), set()
    assert isinstance(model, transformers.Wav2Vec2Model)
    assert len(names) == 4
    for step in range(3):

        def call(seed=step):
            torch.manual_seed(seed)
            return model(input_values=waves).last_hidden_state

        with torch.no_grad():  # what the witness runs is no part of the step
            witness = SoftmaxWitness(model, call)
            attentions = witness.attentions()
        ran = [next(name for name in names if each.module.startswith(name)) for each in attentions]
        before = {name: each.maxima().amax((0, 2)) for name, each in zip(ran, attentions, strict=True)}
        tau = clip.tau = 0.7 * max(float(each.max()) for each in before.values())
        weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        call().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            attentions = witness.attentions()
        for name, each in zip(ran, attentions, strict=True):
            torch.testing.assert_close(each.maxima().amax((0, 2)), before[name].clamp(max=tau), rtol=1e-5, atol=1e-5)
        dropped = tuple(f"{name}." for name in names if name not in ran)
        assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if n.startswith(dropped))
        seen |= {len(ran)}
    assert len(seen) > 1
