"""The keys that a new parameter group may have: options, marks of hosts, and no word of others for what is meant here.

`torch.optim` keeps every key of a group and reads those it knows. A misspelt option, or one of another Muon, would be
kept and never read.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Collection, Iterable
from dataclasses import fields

from muonclip.core.arguments import shown
from muonclip.torch.optimizer.options import OFF, AdamWOptions, Group, MuonOptions

_OPTIONS = {use: {each.name for each in fields(kind)} for use, kind in (("muon", MuonOptions), ("adamw", AdamWOptions))}
_OWN = {"params", "param_names", "use", "layout", "planned", "format", "eps_given", "rounding_step"}

OF_HOSTS = {
    "initial_lr", "initial_momentum", "base_momentum", "max_momentum", "base_lr", "max_lr", "min_lr", "swa_lr",
    "lr_scale", "lr_mult", "lr_multiplier", "wd_mult", "weight_decay_mult", "default_config", "decoupled_weight_decay",
    "foreach", "fused", "capturable", "betas", "momentum", "nesterov", "name", "names", "label", "tag", "moe", "bucket",
}  # fmt: skip
"""Keys that torch, its schedulers and engines set in groups; what they scale or mark is theirs."""
_PASS = {*_OWN, *OF_HOSTS, *OFF}
_LEFT_BY_MUONCLIP = {"recipe", "clip_step"}
_MARK = re.compile(r"_|is_|has_|pre_|.*_names?$|.*_labels?$|.*_tags?$|.*_ids?$")

_MATRICES = "layout=MatrixLayout(…), from muonclip.core"
_WHOSE = "use='muon' or use='adamw'"
WORDS = {
    **dict.fromkeys(("split_sizes", "split_dims", "split", "splits", "blocks", "flatten", "transposed"), _MATRICES),
    **dict.fromkeys(("num_heads", "n_heads", "num_kv_heads", "num_attention_heads", "head_dim", "heads"), _MATRICES),
    **dict.fromkeys(("num_query_groups", "qkv_split_shapes", "split_qkv", "is_qkv", "batch_ndim", "rank"), _MATRICES),
    **dict.fromkeys(("algorithm", "algo", "use_muon", "is_muon", "optimizer", "optim", "method", "rule"), _WHOSE),
    **dict.fromkeys(("muon", "adamw", "adam", "use_adamw", "use_adam", "is_adamw", "is_adam", "is_matrix"), _WHOSE),
    **dict.fromkeys(("beta", "mu", "momentum_beta", "muon_beta", "muon_momentum", "mom"), "momentum"),
    **dict.fromkeys(("learning_rate", "muon_lr", "rate"), "lr"),
    **dict.fromkeys(("adamw_lr", "adam_lr", "scalar_lr", "embed_lr", "head_lr"), "lr, in the group with use='adamw'"),
    **dict.fromkeys(("wd", "decay", "l2", "muon_weight_decay"), "weight_decay"),
    **dict.fromkeys(("adamw_wd", "adamw_weight_decay"), "weight_decay, in the group with use='adamw'"),
    **dict.fromkeys(("b1", "b2", "beta1", "beta2", "adamw_betas", "adam_betas"), "betas, with use='adamw'"),
    **dict.fromkeys(("adamw_eps", "adam_eps"), "eps, in the group with use='adamw'"),
    **dict.fromkeys(("epsilon", "muon_eps"), "eps"),
    **dict.fromkeys(("num_ns_steps", "newton_schulz_steps", "backend_steps", "ns_iters", "ns_iter"), "ns_steps"),
    **dict.fromkeys(("coefficients", "coefficient_type", "ns_coeffs", "ns_coefs", "polynomial"), "ns_coefficients"),
    **dict.fromkeys(("scale_mode", "adjust_lr", "scale_factor", "extra_scale_factor", "rms_scale"), "adjust_lr_fn"),
    **dict.fromkeys(("mu_dtype", "buffer_dtype"), "momentum_dtype"),
    **dict.fromkeys(("compute_dtype", "dtype", "matmul_dtype"), "ns_dtype"),
    **dict.fromkeys(("backend", "use_triton", "use_syrk"), "products"),
    **dict.fromkeys(
        ("per_head", "layouts", "tau", "qk_clip", "recipe", "workspace_bytes"),
        "{0}, of the optimizer and not of a group",
    ),
}
"""Words of other implementations, or of other places here, and what a group says for them."""


def check_keys(group: Group, use: str) -> None:
    """Raise ValueError for a key that a group would keep and nothing read."""
    if use == "rest":  # its class tells, see `check_keys_of_class`
        return
    for key in group:
        options = _OPTIONS.get(use, set())
        if key not in options and key not in _PASS and (key in WORDS or not _is_mark(key)):
            raise ValueError(
                f"{key}={shown(group[key])} in a parameter group with use={use!r} is not an option, and would be "
                f"ignored. {_instead(str(key), options)}"
            )


def check_keys_of_class(group: Group, known: Iterable[str], name: str) -> None:
    """Raise ValueError for a key of a group for an optimizer of another class, `name`, that it does not have."""
    known = {*known, "lr"}
    for key, value in group.items():
        is_none = key == "weight_decay" and not value  # which vectors are given, whoever updates them
        if key not in known and key not in _PASS and not is_none and not _is_mark(key):
            raise ValueError(
                f"{key}={shown(value)} in a parameter group with use='rest' is not an option of {name}, and would be "
                f"ignored. Options are {', '.join(sorted(known))}. For a mark of your own begin its name with an "
                "underscore."
            )


def check_held_keys(group: Group, use: str) -> None:
    """Raise ValueError for a key of a group that exists, or was saved, by which a user means what nothing reads: a word
    of others, or a misspelt option. Other keys are marks of whoever has set them."""
    if use == "rest":  # the options of a class, which may be anything
        return
    for key in group.keys() - _LEFT_BY_MUONCLIP:
        if key not in _OPTIONS.get(use, set()) and key not in _PASS and (key in WORDS or _is_misspelt(key)):
            check_keys({key: group[key]}, use)


def options_of(use: str, given: Group) -> Group:
    """Return what was given for a group that is divided, without what only the other use reads."""
    own = _OPTIONS.get(use, set().union(*_OPTIONS.values()) - _OPTIONS["muon"] | {"lr", "weight_decay"})
    of_others = set().union(*_OPTIONS.values()) - own
    return {key: value for key, value in given.items() if key not in of_others}


def _is_mark(key: object) -> bool:
    return isinstance(key, str) and _MARK.match(key) is not None


@functools.cache
def _is_misspelt(key: object) -> bool:
    options = set[str]().union(*_OPTIONS.values())
    return isinstance(key, str) and not _is_mark(key) and bool(difflib.get_close_matches(key.lower(), options, 1, 0.8))


def _instead(key: str, options: Collection[str]) -> str:
    if key in WORDS:
        return f"Here it is: {WORDS[key].format(key)}."
    of_others = sorted(set().union(*_OPTIONS.values()) - set(options))
    for known, where in ((sorted(options), ""), (of_others, ", in a group of the other use")):
        close = difflib.get_close_matches(key.lower(), known, 1, 0.7)
        if close:
            return f"Did you mean {close[0]!r}{where}?"
    return f"Options are {', '.join(sorted(options))}. For a mark of your own begin its name with an underscore."
