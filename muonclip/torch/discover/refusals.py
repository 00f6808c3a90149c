"""The messages where attentions are not understood, or none was found."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from muonclip.torch.discover.unfilled import if_unfilled


@dataclass(frozen=True, slots=True)
class Refusal:
    """An attention that is not understood: how many heads it was called with, and why, a sentence without its end.

    `is_seen`: False where its queries and keys are not, and neither is the number of its heads. `is_read`: False where
    its logits cannot be read, whatever is declared.
    """

    num_heads: int
    problem: str
    is_seen: bool = True
    is_read: bool = True


def message(model: nn.Module, refusals: Mapping[str, Refusal]) -> str:
    """Write which attentions are not understood and why, and the declaration to write."""
    lines = [if_unfilled(model) + "QK-Clip does not understand these attentions:"]
    lines += [f"  {name or 'the model'}: {refusal.problem}." for name, refusal in refusals.items()]
    name, refusal = next(((n, r) for n, r in refusals.items() if r.is_seen), ("", None))
    if refusal is None:
        return "\n".join([*lines, *_not_seen(next(iter(refusals)))])
    watched = f'QKProjection("mha", {refusal.num_heads}, MaxLogits({refusal.num_heads}), reason="…")'
    if not refusal.is_read:
        lines += [
            "Its logits cannot be read as it is called. Leave it alone, neither clipped nor watched:",
            f"  QKClip(model, declare={{{name!r}: {watched}}})",
            "or call muonclip.torch.attention there, with a statistic that you declare; or switch the clip off with "
            "qk_clip=None.",
        ]
        return "\n".join(lines)
    inside = dict(model.named_modules()).get(name.partition("#")[0], model)
    weights = [n for n, p in inside.named_parameters() if p.ndim == 2 and n.endswith(".weight")][:2]
    shapes = {inside.get_parameter(n).shape for n in weights}
    if len(shapes) > 1 or any(shape[0] % refusal.num_heads for shape in shapes):
        weights = []  # one fused weight perhaps, and an output
    here = "model" if not name else f"model.get_submodule({name!r})"
    q, k = (f"attn.{n.removesuffix('.weight')}" for n in weights) if len(weights) == 2 else ("attn.…", "attn.…")
    lines += [
        "Say which weights make its queries and keys, with the right names in the place of q and k (.gqa, .mla or "
        "HeadRows for other kinds):",
        f"  attn = {here}",
        f"  projection = QKProjection.mha(q={q}, k={k}, num_heads={refusal.num_heads}, "
        f"max_logits=MaxLogits({refusal.num_heads}))",
        f"  QKClip(model, declare={{{name!r}: projection}})",
        *_without_scaling(refusals),
    ]
    unseen = [n for n, r in refusals.items() if not r.is_seen]
    lines += _not_seen(unseen[0]) if unseen else []
    return "\n".join(lines)


def _without_scaling(refusals: Mapping[str, Refusal]) -> list[str]:
    """Write how to watch or ignore all attentions that are not understood."""
    heads = {n.partition("#")[0]: refusal.num_heads for n, refusal in refusals.items() if refusal.is_seen}
    watched = ", ".join(f'{n!r}: QKProjection("mha", {h}, MaxLogits({h}), reason="…")' for n, h in heads.items())
    if len(set(heads.values())) == 1 < len(heads):
        h = next(iter(heads.values()))
        watched = f'name: QKProjection("mha", {h}, MaxLogits({h}), reason="…") for name in {list(heads)}'
    return [
        "or only watch what is not understood, and scale nothing there:",
        f"  QKClip(model, declare={{{watched}}})",
        f"or, if the model has other attentions, leave it alone, QKClip(model, ignore={tuple(heads)}); or switch the "
        "clip off with qk_clip=None.",
    ]


def _not_seen(name: str) -> list[str]:
    return [
        "What is not observed can explode unseen. Let it call scaled_dot_product_attention or muonclip.torch.attention;"
        " or fill a statistic yourself, MaxLogits.observe(q, k, scale=…, mask=…), and declare it, "
        f"QKClip(model, declare={{{name!r}: projection}}); or leave it alone, QKClip(model, ignore=({name!r},))."
    ]


def not_checked(error: str, declared: Collection[str]) -> str:
    """Write that no forward of the training could be traced, and what was therefore not proven."""
    as_they_are = "the declared attentions are clipped as declared" if declared else ""
    found = "those in the plan, found with other inputs, are clipped as found"
    return (
        f"QK-Clip could not trace the model's forward: {error}. So {as_they_are or found}, without proof that they are "
        "all that this forward reaches, or that scaling their rows scales its logits. Give inputs that a copy of the "
        "model runs with, QKClip(model, example_inputs=…); optimizer.plan says whether a forward was traced since."
    )


def nothing_found(without_logits: Mapping[str, str]) -> str:
    """Write that no attention was found, and, by module, what mixes activations without one."""
    return NOTHING_FOUND + _mixing(without_logits)


def nothing_to_clip(without_logits: Mapping[str, str]) -> str:
    """Write that a model trains without a clip, and, by module, what mixes activations there."""
    return NOTHING_TO_CLIP + _mixing(without_logits)


def holds_a_state_space(module: nn.Module) -> bool:
    """Tell whether a module has the parameters of a state space (Mamba, S4): its products have no logits."""
    return any(_OF_STATE_SPACES.fullmatch(name) for name, _ in module.named_parameters(recurse=False))


_OF_STATE_SPACES = re.compile(r"A_logs?|log_A(_real|_imag)?|A_(real|imag)|dt_bias")


def _mixing(without_logits: Mapping[str, str]) -> str:
    names = [name or "the model" for name in without_logits]
    if not names:
        return ""
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f" {listed} mix activations without a softmax, as state spaces and linear attention do, and have no logits."


NOTHING_FOUND = (
    "QK-Clip: no attention was found. It sees torch's scaled_dot_product_attention, FlexAttention and varlen_attn, "
    "flash-attn, xFormers, TransformerEngine, the attention interface of Hugging Face models, and a product of queries "
    "and keys that reaches a softmax. Pass the model that has the attention; or declare it: give each attention module "
    "`self.max_logits = MaxLogits(num_heads)`, call `muonclip.torch.attention(q, k, v, max_logits=self.max_logits)`, "
    "and add a method `qk_projection()` that returns `QKProjection.mha(q=self.q_proj, k=self.k_proj, num_heads=…, "
    "max_logits=self.max_logits)` (or .gqa, .mla); or switch the clip off with qk_clip=None."
)

NOTHING_TO_CLIP = (
    "QK-Clip: nothing to clip. A search has seen no attention in the model, so it trains without a clip. If there is "
    "attention that the search did not reach, give inputs that reach it, qk_clip=QKClip(model, example_inputs=…). "
    'qk_clip=None says that there is none, qk_clip="required" makes this an error.'
)
