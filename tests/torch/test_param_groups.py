"""Who updates what: the plan over the shapes and names that real models have."""

import pytest
import torch
from tiny_attention import HEAD, HEADS, NOPE, ROPE, VALUE, WIDTH, TinyAttention, TinyModel, UndeclaredAttention
from torch import nn

from muonclip.core import MatrixLayout
from muonclip.torch import MuonClip, QKClip


def plan_of(model, **options):
    return {line.name: line for line in MuonClip(model, **{"qk_clip": None, **options}).plan.parameters}


def uses(model):
    return {name: (line.use, line.decays) for name, line in plan_of(model).items()}


def test_the_usual_transformer():
    plan = uses(TinyModel())
    assert plan["embed.weight"] == plan["lm_head.weight"] == ("adamw", True)
    assert plan["norm.weight"] == plan["layers.0.q.bias"] == ("adamw", False)
    assert plan["layers.1.q.weight"] == plan["layers.1.out.weight"] == ("muon", True)


def test_a_head_is_known_by_its_name_or_by_the_shape_of_the_embedding():
    model = nn.ModuleDict(
        {
            "tokens": nn.Embedding(11, 6),
            "body": nn.Linear(6, 6),
            "to_vocabulary": nn.Linear(6, 11),
            "head": nn.Linear(6, 3),
        }
    )
    plan = plan_of(model)
    assert plan["to_vocabulary.weight"].reason == "output head: the shape of tokens.weight"
    assert plan["head.weight"].use == "adamw"
    assert plan["body.weight"].use == "muon"


def test_a_hidden_matrix_of_the_shape_of_the_positions_is_no_head():
    model = nn.ModuleDict({"wpe": nn.Embedding(6, 6), "h": nn.ModuleList([nn.Linear(6, 6)])})
    assert plan_of(model)["h.0.weight"].use == "muon"


def test_a_tied_head_is_planned_once():
    model = TinyModel()
    model.lm_head.weight = model.embed.weight
    plan = plan_of(model)
    assert "lm_head.weight" not in plan
    assert plan["embed.weight"].use == "adamw"


def test_stacked_biases_and_norms_are_no_matrices():
    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts_bias = nn.Parameter(torch.zeros(4, 6))
            self.layer_norm = nn.Parameter(torch.zeros(4, 6))
            self.weight = nn.Parameter(torch.randn(4, 6))
            self.gain = nn.Parameter(torch.ones(1, 6))

    plan = uses(Stacked())
    assert plan["experts_bias"] == plan["layer_norm"] == ("adamw", False)
    assert plan["weight"] == ("muon", True)
    assert plan["gain"] == ("adamw", False)


def test_convolutions():
    model = nn.ModuleDict(
        {
            "plain": nn.Conv2d(4, 6, 3),
            "line": nn.Conv1d(4, 6, 3),
            "grouped": nn.Conv2d(4, 6, 3, groups=2),
            "depthwise": nn.Conv1d(4, 4, 3, groups=4),
            "transposed": nn.ConvTranspose1d(4, 6, 3),
        }
    )
    plan = plan_of(model)
    assert plan["plain.weight"].layout.describe((6, 4, 3, 3)) == "(6×36)"
    assert plan["line.weight"].layout.describe((6, 4, 3)) == "(6×12)"
    assert plan["grouped.weight"].layout.describe((6, 2, 3, 3)) == "2 × (3×18)"
    assert plan["transposed.weight"].layout.describe((4, 6, 3)) == "(18×4)"
    assert plan["depthwise.weight"].use == "adamw"


@pytest.mark.parametrize("transposed", [False, True])
def test_fused_gate_up_experts_are_split_whichever_way_they_are_stored(transposed):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            shapes = [(3, 10, 7), (3, 7, 5)]
            shapes = [(e, b, a) for e, a, b in shapes] if transposed else shapes
            self.gate_up_proj, self.down_proj = (nn.Parameter(torch.randn(shape)) for shape in shapes)

    plan = plan_of(Experts())
    line = plan["gate_up_proj"]
    assert line.layout == MatrixLayout(batch_ndim=1, transposed=transposed, blocks=(5, 5))
    assert line.layout.describe(line.shape) == "3 × (5×7) + 3 × (5×7)"
    assert plan["down_proj"].layout == MatrixLayout(batch_ndim=1)


def test_fused_gate_up_linear():
    model = nn.ModuleDict({"gate_up_proj": nn.Linear(7, 10), "down_proj": nn.Linear(5, 7)})
    assert plan_of(model)["gate_up_proj.weight"].layout.blocks == (5, 5)


def test_multihead_attention_s_own_fused_weight_is_split():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)})
    assert plan_of(model)["a.in_proj_weight"].layout == MatrixLayout(blocks=(8, 8, 8))


def test_an_undeclared_fused_weight_is_said_to_be_taken_whole():
    model = nn.ModuleDict({"query_key_value": nn.Linear(8, 24)})
    assert "declare" in plan_of(model)["query_key_value.weight"].reason


def layout_in(kind, parameter, **options):
    line = plan_of(TinyModel(kind), qk_clip="auto", **options)[f"layers.0.{parameter}"]
    return line.layout.describe(line.shape)


def test_declared_fused_attention_is_split():
    rows = HEADS * HEAD
    assert layout_in("fused_blocks", "qkv.weight") == " + ".join([f"({rows}×{WIDTH})"] * 3)
    assert layout_in("fused_interleaved", "qkv.weight") == " + ".join([f"({rows}×{WIDTH})"] * 3)
    assert layout_in("transposed", "qkv.weight") == " + ".join([f"({rows}×{WIDTH})"] * 3)
    assert layout_in("mla", "kv_up.weight") == f"({HEADS * (NOPE + VALUE)}×9)"


def test_per_head():
    each = f"{HEADS} × ({HEAD}×{WIDTH})"
    assert layout_in("mha", "q.weight", per_head=True) == each
    assert layout_in("gqa", "k.weight", per_head=True) == f"2 × ({HEAD}×{WIDTH})"
    assert layout_in("gqa", "v.weight", per_head=True) == f"2 × ({HEAD}×{WIDTH})"
    assert layout_in("mha", "out.weight", per_head=True) == f"({WIDTH}×{HEADS * HEAD})"
    for kind in ("fused_blocks", "fused_interleaved", "transposed"):
        assert layout_in(kind, "qkv.weight", per_head=True) == " + ".join([each] * 3)
    assert layout_in("mla", "q_up.weight", per_head=True) == f"{HEADS} × ({NOPE + ROPE}×9)"
    assert layout_in("mla", "kv_up.weight", per_head=True) == f"{HEADS} × ({NOPE}×9) + {HEADS} × ({VALUE}×9)"


def test_some_heads_together():
    pair = f"2 × ({2 * HEAD}×{WIDTH})"
    for together in ("pairs", 2):
        assert (
            layout_in("mha", "q.weight", per_head=together) == layout_in("mha", "v.weight", per_head=together) == pair
        )
        assert layout_in("gqa", "k.weight", per_head=together) == f"({2 * HEAD}×{WIDTH})"
        for kind in ("fused_blocks", "fused_interleaved", "transposed"):
            assert layout_in(kind, "qkv.weight", per_head=together) == " + ".join([pair] * 3)
        assert layout_in("mla", "kv_up.weight", per_head=together) == f"2 × ({2 * NOPE}×9) + 2 × ({2 * VALUE}×9)"
    assert layout_in("mha", "q.weight", per_head=4) == f"({HEADS * HEAD}×{WIDTH})"
    assert layout_in("mha", "q.weight", per_head=1) == layout_in("mha", "q.weight", per_head=True)
    assert layout_in("mha", "q.weight", per_head=0) == layout_in("mha", "q.weight")


@pytest.mark.parametrize(
    ("per_head", "said"),
    [
        (3, r"per_head=3 does not divide the 4 heads of the query of layers\.0\."),
        ("each", "per_head='each'; use False, True, or 'pairs'; or a number"),
        (-1, "per_head=-1 must be a whole number"),
        (1.5, "per_head=1.5 must be a whole number"),
    ],
)
def test_heads_that_do_not_divide_are_refused(per_head, said):
    with pytest.raises(ValueError, match=said):
        MuonClip(TinyModel("mha"), per_head=per_head)


def test_heads_of_attention_that_is_found_are_divided_values_too():
    model = nn.ModuleDict({"attn": UndeclaredAttention()})
    clip = QKClip(model["attn"], example_inputs=torch.randn(2, 5, WIDTH))
    lines = {line.name: line for line in MuonClip(model["attn"], per_head="pairs", qk_clip=clip).plan.parameters}
    for name in ("q.weight", "k.weight", "v.weight"):
        assert lines[name].layout.describe(lines[name].shape) == f"2 × ({2 * HEAD}×{WIDTH})"


@pytest.mark.parametrize("kind", ["fused_interleaved", "transposed", "mla"])
def test_per_head_layouts_read_the_rows_that_the_heads_use(kind):
    """The matrices of the layout are the rows that the declaration names, head by head."""
    layer = TinyAttention(kind)
    model = nn.ModuleDict({"attn": layer})
    plan = {line.name: line for line in MuonClip(model, per_head=True).plan.parameters}
    name = {"mla": "kv_up"}.get(kind, "qkv")
    weight = getattr(layer, name).weight.detach()
    blocks = plan[f"attn.{name}.weight"].layout.split(weight, xp=torch)
    (rows,) = layer.qk_projection().key
    key = blocks[0] if kind == "mla" else blocks[1]
    heads = rows.of(weight, rows.axis)
    for head in range(HEADS):
        expected = heads.select(rows.axis, head)
        torch.testing.assert_close(key[head], expected.T)


def test_the_plan_prints_every_parameter_every_attention_and_every_default():
    optimizer = MuonClip(TinyModel("gqa"), lr=0.25, tau=7.0)
    text = str(optimizer.plan)
    names = {name.replace("layers.1.", "layers.0,1.") for name, _ in TinyModel("gqa").named_parameters()}
    assert all(name in text for name in names if not name.startswith("layers.0."))
    for words in (
        "layers.0,1 ×2  gqa   4      above tau",
        "lr = 0.25",
        "tau = 7.0",
        "momentum = 0.95",
        "hidden matrix",
    ):
        assert words in text


def test_the_plan_says_which_attention_is_only_observed():
    model = TinyModel("gqa")
    for parameter in model.layers[0].parameters():
        parameter.requires_grad_(False)
    text = str(MuonClip(model, lr=0.25).plan)
    assert "layers.0   gqa   4      frozen: observed only" in text
    assert "layers.1   gqa   4      above tau" in text


def test_names_and_modules_of_real_models():
    class Mamba(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_proj = nn.Linear(6, 12)
            self.A_log = nn.Parameter(torch.zeros(12, 4))

    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 3, 4, 5))

    model = nn.ModuleDict(
        {
            "embedder": nn.ModuleDict({"h": nn.ModuleList([nn.Linear(6, 8)])}),
            "tok_emb": nn.Linear(11, 6, bias=False),
            "ln1": nn.Linear(6, 6),
            "mixer": Mamba(),
            "deep": nn.ModuleDict({"attn": nn.ModuleDict({"output": nn.Linear(6, 6)})}),
            "stacked": Stacked(),
            "lstm": nn.LSTM(6, 5),
        }
    )
    plan = plan_of(model)
    assert {name: line.use for name, line in plan.items() if line.decays} == {
        "embedder.h.0.weight": "muon",
        "tok_emb.weight": "adamw",
        "ln1.weight": "muon",
        "mixer.in_proj.weight": "muon",
        "mixer.A_log": "adamw",
        "deep.attn.output.weight": "muon",
        "stacked.weight": "muon",
        "lstm.weight_ih_l0": "muon",
        "lstm.weight_hh_l0": "muon",
    }
    assert plan["stacked.weight"].layout == MatrixLayout(batch_ndim=2)
    assert plan["lstm.weight_ih_l0"].layout.describe((20, 6)) == " + ".join(["(5×6)"] * 4)


def test_a_head_tied_to_an_embedding_is_an_embedding_whoever_owns_it():
    model = nn.ModuleDict({"shared": nn.Embedding(11, 6), "body": nn.Linear(6, 6), "to_words": nn.Linear(6, 11)})
    model["to_words"].weight = model["shared"].weight
    assert plan_of(model)["shared.weight"].reason == "embedding"


def test_a_head_at_the_end_of_a_sequence():
    plan = plan_of(nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11)))
    assert [plan[f"{i}.weight"].use for i in range(3)] == ["adamw", "muon", "adamw"]


def test_conv1d_is_read_transposed_and_a_norm_is_known_by_its_class():
    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 9))

    class RootMeanSquareNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(4, 6))

    plan = plan_of(nn.ModuleDict({"c_proj": Conv1D(), "scale": RootMeanSquareNorm()}))
    assert plan["c_proj.weight"].layout == MatrixLayout(transposed=True)
    assert plan["c_proj.weight"].layout.describe((6, 9)) == "(9×6)"
    assert (plan["scale.gain"].use, plan["scale.gain"].decays) == ("adamw", False)
