"""The parts of a self-test for JAX: the iteration against float64, and the clip against dense logits."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

from muonclip.selftest.outcomes import Outcome, within

_SHAPES = {"square": (64, 64), "wide": (48, 160), "tall": (160, 48), "large": (256, 384)}
_TOLERANCES = {"float32": 1e-4, "bfloat16": 6e-2}  # of the Frobenius norm
_HEADS, _WIDTH, _LENGTH, _INTO = 4, 8, 20, 24


def jax_iteration(device: str) -> Iterator[Outcome]:
    """Compare the updates of `scale_by_muon`, jitted, with float64."""
    if _is_missing():
        yield Outcome("JAX, iteration", None, "JAX, or Optax, is not installed")
        return
    jax = _jax()
    import numpy as np

    from muonclip.core import orthogonalize
    from muonclip.optax import scale_by_muon

    random = np.random.default_rng(0)
    arrays = {name: random.normal(size=shape).astype(np.float32) for name, shape in _SHAPES.items()}
    polar = {name: orthogonalize(each.astype(np.float64), xp=np) for name, each in arrays.items()}
    where = jax.devices()[0].platform
    for dtype, tolerance in _TOLERANCES.items():
        for form in ("standard", "gram"):
            tx = scale_by_muon(beta=0.0, nesterov=False, ns_dtype=getattr(jax.numpy, dtype), ns_form=form)
            updates, _ = jax.jit(tx.update)(arrays, tx.init(arrays), arrays)
            errors = [
                np.linalg.norm(np.asarray(updates[name], np.float64) - each) / np.linalg.norm(each)
                for name, each in polar.items()
            ]
            yield within(f"JAX, iteration, {form} form, {dtype}", float(max(errors)), tolerance, f"on {where}")


def jax_clip(device: str) -> Iterator[Outcome]:
    """Clip an attention above τ, jitted: its heads end at min(S, τ), and those at most at τ keep their bits."""
    if _is_missing():
        yield Outcome("JAX, clip", None, "JAX, or Optax, is not installed")
        return
    jax = _jax()
    import numpy as np
    import optax

    from muonclip.optax import QKProjection, exact_max_logits, qk_clip

    random = np.random.default_rng(0)
    params = {name: {"kernel": random.normal(size=(_INTO, _HEADS, _WIDTH)).astype(np.float32)} for name in "qk"}
    params["q"]["kernel"] *= np.array([3.0, 0.5, 6.0, 1.0], np.float32)[:, None]
    x = random.normal(size=(2, _LENGTH, _INTO)).astype(np.float32)

    def dense(params: Any) -> Any:
        q, k = (np.einsum("bti,ihd->bthd", x, np.asarray(params[name]["kernel"]), dtype=np.float64) for name in "qk")
        return (np.einsum("bihd,bjhd->bhij", q, k) / _WIDTH**0.5).max((0, 2, 3))

    def observed(params: Any) -> Any:
        q, k = (jax.numpy.einsum("bti,ihd->bthd", x, params[name]["kernel"], precision="highest") for name in "qk")
        return exact_max_logits(q, k)

    before = dense(params)
    tau = float(np.sort(before)[1:3].mean())
    tx = qk_clip(QKProjection.mha(q="q", k="k", num_heads=_HEADS, in_axis=0), tau)
    maxima = jax.jit(observed)(params)
    zero = jax.tree.map(jax.numpy.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zero, tx.init(params), params, max_logits=maxima)
    after: Any = optax.apply_updates(params, updates)
    clipped = float(np.abs(dense(after) / np.minimum(before, tau) - 1).max())
    yield within("JAX, maxima", float(np.abs(np.asarray(maxima) / before - 1).max()), 1e-3)
    yield within("JAX, clip", clipped, 1e-3, f"{(before > tau).sum()} heads above tau")
    quiet = before <= tau
    kept = all(np.array_equal(after[name]["kernel"][:, quiet], params[name]["kernel"][:, quiet]) for name in "qk")
    yield Outcome(
        "JAX, heads not above tau", kept, "their weights are kept bit for bit" if kept else "their weights have moved"
    )


def _is_missing() -> bool:
    return any(importlib.util.find_spec(name) is None for name in ("jax", "optax"))


def _jax() -> Any:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants memory, too
    import jax

    return jax
