"""Layouts by pattern: which lines of a plan they change, and what is refused, in words."""

import pytest

from muonclip.core import MatrixLayout
from muonclip.core.declared_layouts import DECLARED, check_layouts, with_layouts
from muonclip.core.parameter_plan import PlannedParameter

PLAIN = MatrixLayout()
FUSED = MatrixLayout(blocks=(2, 2, 4), heads=(3, 3, 6), repeats=3)


def line(name, shape=(24, 8), use="muon", layout=PLAIN):
    return PlannedParameter(name, shape, use, "hidden matrix", layout if use == "muon" else None)


LINES = [
    line("layers.0.linear_attn.q_proj.weight"),
    line("layers.0.linear_attn.in_proj.weight"),
    line("layers.1.mixer/q_proj/kernel", (8, 24), layout=MatrixLayout(transposed=True)),
    line("layers.1.self_attn.q_proj.weight", layout=MatrixLayout(heads=(4,))),
    line("layers.1.self_attn.qkv.weight", layout=MatrixLayout(blocks=(8, 8, 8))),
    line("embed.weight", use="adamw"),
    line("layers.0.experts", (2, 24, 8), layout=MatrixLayout(batch_ndim=1)),
]


def test_a_pattern_fits_a_parameter_or_its_module_and_the_first_counts():
    layouts = {
        "*.linear_attn.q_proj": 6,
        "*.in_proj.weight": FUSED,
        "*/q_proj": 2,
        "*.q_proj": 3,
        "*.experts": 4,
    }
    found = {each.name: each for each in with_layouts(LINES, layouts)}
    assert [found[each.name].layout for each in LINES] == [
        MatrixLayout(heads=(6,)),
        FUSED,
        MatrixLayout(transposed=True, heads=(2,)),
        MatrixLayout(heads=(3,)),
        MatrixLayout(blocks=(8, 8, 8)),
        None,
        MatrixLayout(batch_ndim=1, heads=(4,)),
    ]
    assert [each.reason == DECLARED for each in found.values()] == [True, True, True, True, False, False, True]


def test_without_layouts_nothing_changes():
    assert with_layouts(LINES, None) == LINES


def test_wrappers_do_not_hide_a_name():
    (found,) = with_layouts(
        [line("_orig_mod.q_proj.weight")], {"q_proj": 4}, plain_name=lambda name: name.removeprefix("_orig_mod.")
    )
    assert found.layout == MatrixLayout(heads=(4,))


@pytest.mark.parametrize(
    ("layouts", "message"),
    [
        (
            {"*.linear_attn.q_proj": 5},
            r"layouts\['\*\.linear_attn\.q_proj'\]: .*q_proj\.weight' .*5 heads do not divide",
        ),
        ({"*.linear_attn.q_proj": 24}, r"would be single rows, 24 × \(1×8\)\. Leave it out"),
        (
            {"*.in_proj": MatrixLayout(blocks=(8, 8))},
            r"in_proj\.weight' of shape \(24, 8\): blocks=\(8, 8\) .* do not fill",
        ),
        ({"*.qkv": 3}, r"qkv\.weight' of shape \(24, 8\) holds more than one block: .*MatrixLayout in place of 3"),
        ({"*.k_proj": 3}, r"names '\*\.k_proj', which fits no matrix of Muon's here"),
        ({"embed": 3}, r"names 'embed', which fits no matrix of Muon's here"),
        ({"*.self_attn.*": 3, "*.self_attn.q_proj": 3}, "more than one block|or none first"),
    ],
)
def test_what_does_not_fit_is_refused_with_pattern_and_parameter(layouts, message):
    with pytest.raises(ValueError, match=message):
        with_layouts(LINES, layouts)


@pytest.mark.parametrize(
    ("layouts", "error", "message"),
    [
        ([("*", 3)], TypeError, "layouts="),
        ({}, ValueError, "layouts is empty"),
        ({3: 3}, TypeError, "a pattern of layouts"),
        ({"*.q_proj": 0}, ValueError, r"layouts\['\*\.q_proj'\]=0"),
        ({"*.q_proj": "each"}, TypeError, r"layouts\['\*\.q_proj'\]"),
        ({"*.q_proj": True}, TypeError, r"layouts\['\*\.q_proj'\]"),
    ],
)
def test_other_kinds_are_refused(layouts, error, message):
    with pytest.raises(error, match=message):
        check_layouts(layouts)
