"""Muon and MuonClip as Optax transformations.

M ← β M + (1−β) G
O = NewtonSchulz(M, or with Nesterov (1−β) G + β M) · scale(fan_out, fan_in)     (Kimi K2, arXiv 2507.20534, Alg. 1)
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Sharding
from jax.typing import DTypeLike

from muonclip.core import MatrixLayout, Recipe, update_scale
from muonclip.core.adam_defaults import ADAM_BETAS, ADAM_EPS
from muonclip.core.arguments import BELOW_ONE, NOT_NEGATIVE, check_choice, check_flag, check_kind
from muonclip.core.coefficients import Coefficients
from muonclip.core.declared_layouts import check_layouts
from muonclip.core.recipes import RecipeName, takes_recipe
from muonclip.core.update_rule import MuonRule, agree
from muonclip.core.update_scale import AdjustLR
from muonclip.core.updates import UPDATES, Update, check_update
from muonclip.optax.arguments import (
    check_dtype,
    check_if_concrete,
    check_mask,
    check_momentum_dtype,
    check_rest,
    check_scalar,
    check_tree,
)
from muonclip.optax.newton_schulz import NewtonSchulz
from muonclip.optax.plan import plan
from muonclip.optax.qk_clip import qk_clip
from muonclip.optax.qk_projection import QKProjections
from muonclip.optax.stored_states import storage_of
from muonclip.optax.types import PyTree, Shardings, WeightLayouts
from muonclip.optax.update_rule import ScaleByMuonState as ScaleByMuonState  # where pickles look for it
from muonclip.optax.update_rule import scale_by_rule

Nesterov: TypeAlias = bool | Literal["bias_corrected"]
"""How far the momentum looks ahead, see `scale_by_muon`."""


def scale_by_muon(
    ns_coefficients: Coefficients = "jordan",
    ns_steps: int | None = None,
    beta: float | jax.Array = 0.95,
    eps: float | jax.Array = 0.0,
    mu_dtype: DTypeLike | str | None = None,
    *,
    nesterov: Nesterov = True,
    adjust_lr_fn: AdjustLR = 1.0,
    weight_dimension_numbers: WeightLayouts = None,
    ns_dtype: DTypeLike | None = None,
    ns_form: Literal["standard", "gram"] | None = None,
    shardings: Shardings = None,
    update: Literal["muon", "normuon"] = "muon",
) -> optax.GradientTransformationExtraArgs:
    """Replace each logical matrix of the updates by the polar factor of its momentum, times its scale.

    Args:
        ns_coefficients: The polynomials, see `muonclip.core.resolve_coefficients`.
        ns_steps: The number of steps; None: the own length of a named set or a list, five of one triple.
        beta: Of the momentum, an average: M ← β M + (1−β) G; in [0, 1).
        eps: Floor of the Frobenius norm.
        mu_dtype: The dtype of the momentum; None: the parameter's. "int8" stores codes, with a float32 size for each
            2048 entries of a row (arXiv 2509.23106); "int8_stochastic" and "bfloat16_stochastic" round without a bias,
            by a noise that is a function of the parameter's name, the step and the entry.
        nesterov: True is `torch.optim.Muon`'s, (1−β) G + β M; "bias_corrected" is `optax.contrib.muon`'s, which divides
            the two terms by 1 − β^t and 1 − β^(t+1) and so has, in the first steps, another direction; False is M.
        adjust_lr_fn: The scale, see `muonclip.core.update_scale`; 1.0 leaves the polar factor as it is, as
            `optax.contrib.scale_by_muon` does.
        weight_dimension_numbers: Which axes are rows and columns: a tree (or a prefix of one, or a function of the
            parameters) with an `optax.contrib.MuonDimensionNumbers` or a `muonclip.core.MatrixLayout` for each array;
            None: all are [in, out].
        ns_dtype: The dtype of the products; None: bfloat16 on accelerators, float32 on the CPU (float64 for float64).
        ns_form: "standard" or "gram", see `muonclip.core.orthogonalize`; None: on the CPU the cheaper one for each
            shape, which `plan` shows, elsewhere the standard one.
        shardings: A tree with the sharding of each parameter, needed where a jitted update cannot see it (a mesh of
            automatic axes).
        update: "normuon" gives the rows of each matrix one size over time (arXiv 2510.05491).

    Raises:
        ValueError: For polynomials that do not exist, β outside [0, 1) and arrays that are not matrices.
    """
    check_choice("update", update, *(name for name in UPDATES if not _moves(name)), hint="muonclip has all.")
    return _by_rule(
        UPDATES[update],
        NewtonSchulz(ns_coefficients, ns_steps, eps, ns_dtype, ns_form),
        beta,
        nesterov,
        mu_dtype,
        adjust_lr_fn=adjust_lr_fn,
        weight_dimension_numbers=weight_dimension_numbers,
        shardings=shardings,
    )


@takes_recipe
def muonclip(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule = 0.1,
    beta: float | jax.Array = 0.95,
    *,
    qk_projections: QKProjections | None,
    recipe: RecipeName | Recipe | None = None,
    tau: optax.ScalarOrSchedule | Mapping[str, optax.ScalarOrSchedule] = 100.0,
    alpha: float | jax.Array = 0.5,
    nesterov: Nesterov = True,
    ns_coefficients: Coefficients = "jordan",
    ns_steps: int | None = None,
    eps: float | jax.Array = 0.0,
    adjust_lr_fn: AdjustLR = "match_rms_adamw",
    mu_dtype: DTypeLike | str | None = None,
    ns_dtype: DTypeLike | None = None,
    ns_form: Literal["standard", "gram"] | None = None,
    weight_decay_mask: optax.MaskOrFn | None = None,
    muon_weight_dimension_numbers: WeightLayouts = None,
    layouts: Mapping[str, int | MatrixLayout] | None = None,
    adamw: Mapping[str, Any] | None = None,
    rest: optax.GradientTransformation | None = None,
    shardings: Shardings = None,
    wide_updates: bool = False,
    update: Update = "muon",
    cautious_decay: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Chain Muon for the hidden matrices, AdamW for the rest, then QK-Clip.

        tx = muonclip(5e-3, qk_projections={"attn": QKProjection.mha(q="attn/query", k="attn/key", num_heads=8)})
        updates, state = tx.update(grads, state, params, max_logits={"attn": …})

    Under `optax.inject_hyperparams` name as `static_args` the arguments that are functions but not schedules, and
    numbers that decide the shape of the computation:

        static_args=("muon_weight_dimension_numbers", "weight_decay_mask", "ns_steps", "adjust_lr_fn")

    Args:
        learning_rate: Per step, a number or a schedule; with the default `adjust_lr_fn` from AdamW's own, in large
            runs, to five times that in small ones.
        weight_decay: Decoupled, times the rate; of matrices, embeddings and head, or where `weight_decay_mask` says.
        beta: Of the momentum, see `scale_by_muon`.
        qk_projections: The attentions, see `qk_clip`; None: no clip, and no `max_logits`.
        recipe: The values of a published recipe, by its name, for the arguments that are not given here, but never the
            rate: see `muonclip.core.RECIPES`, and `plan(…, recipe=…)`. One without a clip takes `qk_projections=None`,
            or a `tau` that is given; one whose heads are matrices of their own takes `muon_weight_dimension_numbers`.
        tau: The largest logit a head may keep, see `qk_clip`.
        alpha: The query's share of γ, from 0 to 1, see `qk_clip`.
        nesterov: See `scale_by_muon`.
        ns_coefficients: The polynomials, see `muonclip.core.resolve_coefficients`.
        ns_steps: The number of steps; None: the own length of a named set or a list, five of one triple.
        eps: Floor of the Frobenius norm of Muon.
        adjust_lr_fn: The scale of Muon's updates, see `muonclip.core.update_scale`.
        mu_dtype: The dtype of both momenta; None: the parameter's. "int8", "int8_stochastic" and
            "bfloat16_stochastic", see `scale_by_muon`, are of Muon's alone.
        ns_dtype: The dtype of the products, see `scale_by_muon`.
        ns_form: The form of the iteration, see `scale_by_muon`.
        weight_decay_mask: A tree with True or False for each array, or a function of the parameters that makes it;
            None: not on norms, biases and other vectors.
        muon_weight_dimension_numbers: Which axes are rows and columns, and which arrays are AdamW's (None), see `plan`,
            which shows what becomes of each parameter.
        layouts: The heads of some projections, as those of linear attention or an indexer, where names, shapes or
            `muon_weight_dimension_numbers` say one matrix: see `plan`.
        adamw: Arguments of `optax.adamw` other than b1=0.9, b2=0.95, eps=1e-8, the same rate and decay.
        rest: Another transformation in the place of AdamW, `optax.lion(1e-4)` for instance, with a rate and a decay of
            its own.
        shardings: See `scale_by_muon`.
        wide_updates: See `qk_clip`.
        update: "normuon", as in `scale_by_muon`; "hyperball" (arXiv 2606.16899), which holds the Frobenius norm of
            each matrix, takes the rate relative to it, and has neither decay nor a scale: give `weight_decay=0`; or
            "muown" (arXiv 2605.10797), Muon on the directions of rows, Adam and the decay on their magnitudes.
        cautious_decay: Decay only the entries that Muon's update takes towards zero (arXiv 2510.12402).

    Raises:
        TypeError: For arguments of other kinds.
        ValueError: As from `scale_by_muon`, `plan` and `qk_clip`.
    """

    if learning_rate is not None:  # Optax: no scaling
        check_scalar("learning_rate", learning_rate, NOT_NEGATIVE, schedule=True)
    check_scalar("weight_decay", weight_decay, NOT_NEGATIVE, schedule=True)
    check_flag("cautious_decay", cautious_decay)
    check_update(update, None, cautious_decay=cautious_decay)
    check_if_concrete(weight_decay, lambda decay: check_update(update, decay, cautious_decay=cautious_decay))
    check_mask("weight_decay_mask", weight_decay_mask)
    if update == "muown" and weight_decay_mask is not None:
        raise ValueError(
            "weight_decay_mask with update='muown', which decays the magnitudes of all its matrices. Leave it out; the "
            "AdamW half has its own, adamw=dict(mask=…)."
        )
    if adamw is not None:
        check_kind("adamw", adamw, Mapping, "a dict of arguments of optax.adamw")
    check_rest(rest, adamw)
    check_flag("wide_updates", wide_updates)
    check_layouts(layouts)
    if isinstance(recipe, Recipe):
        _check_recipe(recipe, qk_projections, muon_weight_dimension_numbers or layouts)

    def planned(field: str) -> Callable[[optax.Params], PyTree]:
        def tree(params: optax.Params) -> PyTree:
            lines = plan(params, muon_weight_dimension_numbers, qk_projections, layouts=layouts, rest=rest)
            return lines.tree(params, operator.attrgetter(field))

        return tree

    b1, b2 = ADAM_BETAS
    options = {"learning_rate": learning_rate, "b1": b1, "b2": b2, "eps": ADAM_EPS, "weight_decay": weight_decay}
    check_momentum_dtype(mu_dtype)
    form = storage_of(mu_dtype)
    of_both = None if form.has_codes or form.is_stochastic else mu_dtype
    options |= {"mu_dtype": of_both, "mask": planned("decays") if weight_decay_mask is None else weight_decay_mask}
    options |= adamw or {}
    _check_adamw(options)

    muon = _by_rule(
        UPDATES[update],
        NewtonSchulz(ns_coefficients, ns_steps, eps, ns_dtype, ns_form),
        beta,
        nesterov,
        mu_dtype,
        adjust_lr_fn=adjust_lr_fn,
        weight_dimension_numbers=planned("layout"),
        shardings=shardings,
        **({"learning_rate": learning_rate, "weight_decay": weight_decay} if _moves(update) else {}),
    )
    if not _moves(update):
        decay = optax.add_decayed_weights(weight_decay, weight_decay_mask)
        decay = _cautiously(decay) if cautious_decay else decay
        muon = optax.chain(muon, decay, optax.scale_by_learning_rate(learning_rate))
    other = {"adamw": optax.adamw(**options)} if rest is None else {"rest": rest}
    halves = optax.partition({"muon": muon, **other}, planned("use"))
    return (
        halves
        if qk_projections is None
        else optax.chain(halves, qk_clip(qk_projections, tau, alpha, wide_updates=wide_updates))
    )


def _by_rule(
    rule: MuonRule,
    newton_schulz: NewtonSchulz,
    beta: Any,
    nesterov: Nesterov,
    mu_dtype: Any,
    *,
    adjust_lr_fn: AdjustLR,
    shardings: Any,
    **others: Any,
) -> optax.GradientTransformationExtraArgs:
    """Check the arguments of `scale_by_rule` and make it."""
    newton_schulz.check()
    update_scale(1, 1, adjust_lr_fn)
    check_momentum_dtype(mu_dtype)
    check_scalar("eps", newton_schulz.eps, NOT_NEGATIVE)
    check_scalar("beta", beta, BELOW_ONE)
    check_tree("shardings", shardings, Sharding, "a tree of Shardings")
    check_if_concrete(nesterov, lambda value: check_choice("nesterov", value, True, False, "bias_corrected"))
    return scale_by_rule(
        rule, newton_schulz, beta, nesterov, mu_dtype, adjust_lr_fn=adjust_lr_fn, shardings=shardings, **others
    )


def _moves(update: str) -> bool:
    """Tell whether an update moves the weights itself, with the rate and the decay."""
    return type(UPDATES[update]).move is not MuonRule.move


def _cautiously(decay: optax.GradientTransformation) -> optax.GradientTransformation:
    """Add decayed weights only to the entries that the update takes towards zero."""

    def update(updates: optax.Updates, state: Any, params: optax.Params | None = None) -> tuple[optax.Updates, Any]:
        decayed, state = decay.update(updates, state, params)

        def chosen(update: jax.Array, other: jax.Array, weight: jax.Array) -> jax.Array:
            return jnp.where(agree(update, weight), other, update)

        return jax.tree.map(chosen, updates, decayed, params), state

    return optax.GradientTransformation(decay.init, update)


def _check_recipe(recipe: Recipe, qk_projections: Any, numbers: Any) -> None:
    """Raise ValueError for what a recipe needs to be told here."""
    if recipe.tau is None and "tau" not in recipe.given and qk_projections is not None:
        raise ValueError(
            f"recipe={recipe.name!r} is without a clip, and qk_projections declares attentions. Pass "
            "qk_projections=None, or the tau of a clip."
        )
    if recipe.per_head and numbers is None:
        raise ValueError(
            f"recipe={recipe.name!r} takes heads as matrices of their own ({recipe.heads}). Say which rows these are: "
            "layouts= with a pattern and a number of heads for each, or muon_weight_dimension_numbers=, see plan."
        )


def _check_adamw(options: Mapping[str, Any]) -> None:
    """Raise ValueError or TypeError, naming the key, for arguments that `optax.adamw` does not take."""
    known = list(inspect.signature(optax.adamw).parameters)
    for name, value in options.items():
        key = f"adamw[{name!r}]"
        if name not in known:
            raise ValueError(f"{key} is not an argument of optax.adamw; it takes {', '.join(known)}.")
        if name in ("learning_rate", "weight_decay"):
            if value is not None:
                check_scalar(key, value, NOT_NEGATIVE, schedule=True)
        elif name in ("b1", "b2", "eps", "eps_root"):
            check_scalar(key, value, BELOW_ONE if name.startswith("b") else NOT_NEGATIVE)
        elif name == "mu_dtype":
            check_dtype(key, value)
        elif name == "mask":
            check_mask(key, value)
        elif name == "nesterov":
            check_flag(key, value)
