"""Muon and MuonClip as Optax transformations.

M ← β M + (1−β) G
O = NewtonSchulz(M, or with Nesterov (1−β) G + β M) · scale(fan_out, fan_in)     (Kimi K2, arXiv 2507.20534, Alg. 1)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Sharding

from muonclip.core import resolve_coefficients, update_scale
from muonclip.core.coefficients import Coefficients, gram_restarts
from muonclip.core.update_scale import AdjustLR
from muonclip.optax.array_layout import KERNEL, ArrayLayout
from muonclip.optax.newton_schulz import NewtonSchulz
from muonclip.optax.paths import declared_for, named_arrays
from muonclip.optax.plan import plan, weight_layouts
from muonclip.optax.qk_clip import QKProjections, qk_clip
from muonclip.optax.sharding import check_visible, orthogonalize_arrays

Nesterov = bool | Literal["bias_corrected"]


class ScaleByMuonState(NamedTuple):
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    """int32 scalar: steps taken."""
    mu: optax.Updates
    """Momentum, as `torch.optim.Muon` stores it."""


def scale_by_muon(
    ns_coefficients: Coefficients = "jordan",
    ns_steps: int | None = None,
    beta: Any = 0.95,
    eps: Any = 0.0,
    mu_dtype: Any = None,
    *,
    nesterov: Nesterov = True,
    adjust_lr_fn: AdjustLR = 1.0,
    weight_dimension_numbers: Any = None,
    ns_dtype: Any = None,
    ns_form: Literal["standard", "gram"] | None = None,
    shardings: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Momentum, orthogonalised: each logical matrix of the updates becomes its polar factor, times its scale.

    `ns_coefficients`, `ns_steps`, `eps`, `ns_form`: see `muonclip.core.orthogonalize`. `adjust_lr_fn`: the scale, see
    `muonclip.core.update_scale`; 1.0 leaves the polar factor as it is, as `optax.contrib.scale_by_muon` does.
    `mu_dtype`: of the momentum; None: the parameter's. `ns_dtype`: of the products; None: bfloat16 on accelerators,
    float32 on the CPU (float64 for float64).

    `nesterov`: True is `torch.optim.Muon`'s, (1−β) G + β M; "bias_corrected" is `optax.contrib.muon`'s, which divides
    the two terms by 1 − β^t and 1 − β^(t+1) and so has, in the first steps, another direction; False is M.

    `weight_dimension_numbers`: which axes are rows and columns, a tree (or a prefix of one, or a function of the
    parameters) with an `optax.contrib.MuonDimensionNumbers` or a `muonclip.core.MatrixLayout` for each array; None:
    all are [in, out]. `shardings`: see `muonclip.optax.sharding`.

    Raises ValueError for polynomials that do not exist, β outside [0, 1) and arrays that are no matrices.
    """
    resolve_coefficients(ns_coefficients, ns_steps)
    update_scale(1, 1, adjust_lr_fn)
    if ns_form == "gram":
        gram_restarts(ns_coefficients)
    if nesterov not in (True, False, "bias_corrected"):
        raise ValueError(f"nesterov={nesterov!r}; use True, False or 'bias_corrected'.")
    if isinstance(beta, int | float) and not 0 <= beta < 1:
        raise ValueError(f"beta={beta} must lie in [0, 1).")
    newton_schulz = NewtonSchulz(ns_coefficients, ns_steps, eps, ns_dtype, ns_form)

    def init(params: optax.Params) -> ScaleByMuonState:
        _layouts(weight_dimension_numbers, params)
        check_visible(params, shardings)
        return ScaleByMuonState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params, dtype=mu_dtype))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, ScaleByMuonState]:
        del params, extra_args
        layouts = _layouts(weight_dimension_numbers, updates)
        placed = declared_for(updates, shardings, Sharding, "shardings")
        count = jnp.asarray(optax.safe_increment(state.count))
        mu = jax.tree.map(lambda g, m: _average(g, m, beta), updates, state.mu)
        used = jax.tree.map(lambda g, m: _direction(g, m, beta, nesterov, count), updates, mu)
        arrays = named_arrays(used)
        done = orthogonalize_arrays(
            list(arrays.values()),
            [layouts[name] for name in arrays],
            [_scales(layouts[name], array.shape, adjust_lr_fn) for name, array in arrays.items()],
            newton_schulz,
            [placed[name] for name in arrays],
        )
        leaves, treedef = jax.tree.flatten(updates)
        done = [new.astype(old.dtype) for new, old in zip(done, leaves, strict=True)]
        return treedef.unflatten(done), ScaleByMuonState(count, mu)

    return optax.GradientTransformationExtraArgs(init, update)


def muonclip(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: Any = 0.1,
    beta: Any = 0.95,
    *,
    qk_projections: QKProjections | None,
    tau: Any = 100.0,
    alpha: Any = 0.5,
    nesterov: Nesterov = True,
    ns_coefficients: Coefficients = "jordan",
    ns_steps: int | None = None,
    eps: Any = 0.0,
    adjust_lr_fn: AdjustLR = "match_rms_adamw",
    mu_dtype: Any = None,
    ns_dtype: Any = None,
    ns_form: Literal["standard", "gram"] | None = None,
    weight_decay_mask: Any = None,
    muon_weight_dimension_numbers: Any = None,
    adamw: Mapping[str, Any] | None = None,
    shardings: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """MuonClip: Muon for the hidden matrices, AdamW for the rest, then QK-Clip.

        tx = muonclip(2e-4, qk_projections={"attn": QKProjection.mha(q="attn/query", k="attn/key", num_heads=8)})
        updates, state = tx.update(grads, state, params, max_logits={"attn": …})

    `learning_rate`: per step, a number or a schedule; with the default `adjust_lr_fn` AdamW's. `weight_decay`:
    decoupled, times the rate; of matrices, embeddings and head, or where `weight_decay_mask` says. `qk_projections`:
    see `qk_clip`; None: no clip, and no `max_logits`. `muon_weight_dimension_numbers`: see `plan`, which shows what
    becomes of each parameter. `adamw`: arguments of `optax.adamw` other than b1=0.9, b2=0.95, eps=1e-8, the same rate
    and decay. The others: see `scale_by_muon` and `qk_clip`.

    Under `optax.inject_hyperparams` name as `static_args` what is a function but no schedule, and numbers that shape
    the computation:

        static_args=("muon_weight_dimension_numbers", "weight_decay_mask", "ns_steps", "adjust_lr_fn")
    """

    def planned(field: str) -> Callable[[Any], Any]:
        def tree(params: Any) -> Any:
            lines = plan(params, muon_weight_dimension_numbers, qk_projections)
            return lines.tree(params, operator.attrgetter(field))

        return tree

    options = {"learning_rate": learning_rate, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": weight_decay}
    options |= {"mu_dtype": mu_dtype, "mask": planned("decays") if weight_decay_mask is None else weight_decay_mask}
    options |= adamw or {}

    muon = optax.chain(
        scale_by_muon(
            ns_coefficients,
            ns_steps,
            beta,
            eps,
            mu_dtype,
            nesterov=nesterov,
            adjust_lr_fn=adjust_lr_fn,
            weight_dimension_numbers=planned("layout"),
            ns_dtype=ns_dtype,
            ns_form=ns_form,
            shardings=shardings,
        ),
        optax.add_decayed_weights(weight_decay, weight_decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    update = optax.partition({"muon": muon, "adamw": optax.adamw(**options)}, planned("use"))
    return update if qk_projections is None else optax.chain(update, qk_clip(qk_projections, tau, alpha))


def _layouts(weight_dimension_numbers: Any, arrays: Any) -> dict[str, ArrayLayout]:
    declared = weight_layouts(weight_dimension_numbers, arrays)
    layouts: dict[str, ArrayLayout] = {}
    for name, array in named_arrays(arrays).items():
        layout = declared[name]
        if layout is None and array.ndim != 2:
            raise ValueError(
                f"{name!r} has shape {array.shape}; Muon needs a matrix [in, out]. Say which axes are rows and columns "
                "by weight_dimension_numbers=, or leave it to AdamW."
            )
        if jnp.issubdtype(array.dtype, jnp.complexfloating):
            raise ValueError(f"{name!r} is complex; Muon's polynomials are real. Leave it to AdamW.")
        try:
            layouts[name] = ArrayLayout.of(layout or KERNEL, array.shape)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from None
    return layouts


def _scales(layout: ArrayLayout, shape: tuple[int, ...], adjust_lr_fn: AdjustLR) -> tuple[float, ...]:
    blocks = layout.fused.matrix_shapes(layout.unit_shape(shape))
    return tuple(update_scale(fan_out, fan_in, adjust_lr_fn) for _, fan_out, fan_in in blocks)


def _average(gradient: jax.Array, momentum: jax.Array, beta: Any) -> jax.Array:
    """β M + (1−β) G, in float32 or wider, rounded once."""
    wide = jnp.promote_types(momentum.dtype, jnp.float32)
    old, new = momentum.astype(wide), gradient.astype(wide)
    return (old + (1 - beta) * (new - old)).astype(momentum.dtype)


def _direction(gradient: jax.Array, momentum: jax.Array, beta: Any, nesterov: Nesterov, count: jax.Array) -> jax.Array:
    """What is orthogonalised, in the dtype of the momentum."""
    if not nesterov:
        return momentum
    wide = jnp.promote_types(momentum.dtype, jnp.float32)
    m, g = momentum.astype(wide), gradient.astype(wide)
    if nesterov == "bias_corrected":
        steps = count.astype(wide)
        m, g = m / (1 - beta ** (steps + 1)), g / (1 - beta**steps)
    return (g + beta * (m - g)).astype(momentum.dtype)
