"""One rule for both adapters: what it says of names that models have, and that PyTorch and JAX follow it."""

import re
from pathlib import Path

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
import torch
from hypothesis import given
from torch import nn

from muonclip.core.parameter_roles import embedding_shapes, names_a_norm, role_of
from muonclip.optax import plan
from muonclip.torch.optimizer.plan import plan_named

PAGE = Path(__file__).parents[2] / "docs" / "install.md"
EXAMPLE = re.compile(r"^\| `([^`]+)` \| ([\d × ]+) \| (\w+|not known) \| (Muon|AdamW) \| ([^|]+) \|$", re.MULTILINE)
EMBEDDINGS = {(100, 32): "embed.weight"}
OWNERS = {
    "embedding": nn.Embedding(1, 1),
    "norm": nn.LayerNorm(1),
    "linear": nn.Linear(1, 1),
    "convolution": nn.Conv1d(1, 1, 1),
    None: None,
}


@pytest.mark.parametrize("example", EXAMPLE.findall(PAGE.read_text(encoding="utf-8")), ids=lambda example: example[0])
def test_the_table_of_the_docs_is_what_the_rule_says(example):
    name, shape, kind, use, why = example
    shape = tuple(map(int, shape.split("×")))
    role = role_of(name, shape, None if kind == "not known" else kind, EMBEDDINGS)
    assert (role.use, role.reason + ("" if role.decays else ", no decay")) == (use.lower(), why.strip())


def test_the_table_of_the_docs_has_every_reason():
    page = PAGE.read_text(encoding="utf-8")
    assert page.count("| Muon |") + page.count("| AdamW |") == len(EXAMPLE.findall(page))
    reasons = {why.strip().removesuffix(", no decay") for *_, why in EXAMPLE.findall(page)}
    assert reasons >= {"vector", "biases", "norm", "embedding", "not a linear map, by its name", "hidden matrix"}
    assert reasons >= {"output head, by its name", "output head: the shape of embed.weight", "one row or column"}


@pytest.mark.parametrize(
    ("name", "kind", "use"),
    [
        ("score.weight", "linear", "adamw"),
        ("score/kernel", None, "adamw"),
        ("proj_out.weight", None, "adamw"),
        ("blocks.3.proj_out.weight", "linear", "muon"),
        ("decoder/layers/attention/score/kernel", None, "muon"),
        ("pos_table", None, "adamw"),
        ("pos_table/kernel", None, "adamw"),
        ("logits_dense.weight", "linear", "adamw"),
        ("layers.0.time_emb_proj.weight", "linear", "muon"),
        ("layers_0/time_emb_proj/kernel", None, "muon"),
        ("time_embedding.linear_1.weight", None, "muon"),
        ("layers.0.attn_gate.weight", None, "muon"),
        ("layers.0.attn_gated_norm.weight", None, "adamw"),
        ("norm1.linear.weight", "linear", "muon"),
        ("layers.0.modulation.weight", "norm", "adamw"),
        ("layers.0.ln_2.weight", "linear", "muon"),
        ("member.weight", None, "muon"),
        ("patch_embed.proj.weight", "convolution", "adamw"),
        ("embedder.h.0.weight", "linear", "muon"),
        ("x/LayerNorm_0/scale", None, "adamw"),
        ("Embed_0/embedding", None, "adamw"),
        ("mixer.table.weight", "linear", "muon"),
        ("rel_pos_proj", None, "muon"),
        ("layers.0.embed.mlp.fc.weight", "linear", "muon"),
        ("layers/mlp/score/kernel", None, "muon"),
        ("layers/score/kernel", None, "muon"),
        ("blocks/score/kernel", None, "muon"),
        ("head.0.output.weight", "linear", "muon"),
        ("decoder.mlp.output.weight", "linear", "muon"),
        *(
            (f"{name}.weight", "linear", "adamw")
            for name in ("lm_head", "embed_out", "unembed", "logits", "classifier")
        ),
        *((f"{name}.weight", "linear", "adamw") for name in ("head", "output", "output_layer")),
        *(
            (name, None, "adamw")
            for name in ("b_table", "latents", "cls_token", "pos_enc", "rel_pos_h", "relative_bias_w")
        ),
        *((f"x.{name}.weight", None, "adamw") for name in ("emb", "wpe", "wte", "norms", "ln", "BatchNorm1d")),
        ("x.gamma", None, "adamw"),
        *((f"time_emb_{name}.weight", None, "muon") for name in ("projection", "linear", "dense", "mlp", "fc")),
        ("score.w", None, "adamw"),
        ("x_embedder.weight", "linear", "muon"),
        ("context_embedder.weight", "linear", "muon"),
        ("context_embedder/kernel", None, "muon"),
        ("timestep_embedder.linear_1.weight", "linear", "muon"),
        ("timestep_embedder.linear_1.weight", None, "muon"),
        ("embeddings_project.weight", "linear", "muon"),
        ("tok_emb.weight", "linear", "adamw"),
        ("output.weight", "embedding", "adamw"),
        ("word_embedder.weight", None, "adamw"),
        ("fc.weight", "linear", "adamw"),
        ("head.fc.weight", "linear", "adamw"),
        ("mlp.fc.weight", "linear", "muon"),
        ("visual_projection.weight", "linear", "adamw"),
    ],
)
def test_names_of_models(name, kind, use):
    assert role_of(name, (64, 32), kind).use == use


@pytest.mark.parametrize(
    ("name", "shape", "kind", "use"),
    [
        ("to_words.weight", (100, 32), "linear", "adamw"),
        ("to_layers.weight", (100, 32), "linear", "adamw"),
        ("to_words.weight", (32, 100), "linear", "muon"),
        ("to_words/kernel", (32, 100), None, "adamw"),
        ("layers.0.up.weight", (100, 32), "linear", "muon"),
        ("up.weight", (64, 64), "linear", "muon"),
        ("up.weight", (0, 32), "linear", "adamw"),
    ],
)
def test_the_shape_of_an_embedding_is_a_head_outside_of_the_layers(name, shape, kind, use):
    assert role_of(name, shape, kind, {**EMBEDDINGS, (64, 64): "square.weight"}).use == use


def test_classes_of_norms():
    assert all(
        map(names_a_norm, ["LlamaRMSNorm", "LayerNorm", "GroupNorm32", "MambaRMSNormGated", "BatchNorm1d", "Ln"])
    )
    assert not any(map(names_a_norm, ["NormalizedLinear", "Normal", "Enorm_proj", "Linear", "Kiln"]))


def test_the_shape_of_positions_says_nothing():
    named = [("wpe.weight", (6, 8), "embedding"), ("tokens.weight", (9, 8), "embedding"), ("pos_embed", (5, 8), None)]
    assert embedding_shapes(named) == {(9, 8): "tokens.weight"}


PARTS = """
    layers 0 h.3 blocks_2 embed time_emb_proj tok_emb wte head score proj_out output logits_dense pos_table rel_pos
    norm ln_1 attn_gated_norm scale gain bias experts_bias b weight kernel w q_proj mlp conv gate_up_proj embedding x
"""
names = st.lists(st.sampled_from(PARTS.split()), min_size=1, max_size=4)
shapes = st.lists(st.sampled_from([0, 1, 2, 6, 8]), min_size=0, max_size=4).map(tuple)


@given(st.lists(st.tuples(names, shapes), min_size=1, max_size=4))
def test_both_adapters_give_the_same_answer_where_only_names_are_known(parameters):
    named = {f"m{i}/" + "/".join(parts): shape for i, (parts, shape) in enumerate(parameters)}
    by_torch = plan_named([(name, torch.empty(shape)) for name, shape in named.items()])
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in named.items()}
    try:
        by_jax = plan(tree).parameters
    except ValueError as error:  # which axes are rows: asked for Muon's matrices alone
        by_jax = ()
        asked = [name for name in named if f"\n  {name} (" in str(error)]
        assert asked
        embeddings = embedding_shapes((name, shape, None) for name, shape in named.items())
        assert all(role_of(name, named[name], None, embeddings).use == "muon" for name in asked)
    for ours, theirs in zip(by_torch, by_jax, strict=bool(by_jax)):
        # The order of the axes of a convolution is each framework's own, so one may be a row in one of them only.
        one_row = len(ours.shape) > 2 and "one row or column" in (ours.reason, theirs.reason)
        assert one_row or (ours.name, ours.use, ours.decays) == (theirs.name, theirs.use, theirs.decays)


@given(st.lists(st.tuples(names, shapes, st.sampled_from(list(OWNERS))), min_size=1, max_size=4))
def test_pytorch_follows_the_rule_where_modules_are_known(parameters):
    named = [(f"m{i}." + ".".join(parts), torch.empty(shape)) for i, (parts, shape, _) in enumerate(parameters)]
    kinds = [kind for _, _, kind in parameters]
    owners = {id(tensor): OWNERS[kind] for (_, tensor), kind in zip(named, kinds, strict=True) if kind}
    embeddings = embedding_shapes((name, t.shape, kind) for (name, t), kind in zip(named, kinds, strict=True))
    for line, (name, tensor), kind in zip(plan_named(named, owners=owners), named, kinds, strict=True):
        role = role_of(name, tensor.shape, kind, embeddings)
        assert line.use == role.use or line.reason == "one row or column"
        assert role.use == "muon" or (line.reason, line.decays) == (role.reason, role.decays)
