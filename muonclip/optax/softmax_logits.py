"""The largest logits that enter the softmaxes of a function, read from the function's own program (its jaxpr).

A softmax is an exponential of x − y, whatever y is (the row's maximum, its log-sum-exp), and x are its logits. They are
seen in compiled parts (`jit`), rematerialised ones, derivatives of one's own and scans; in kernels, in branches and in
`shard_map` they are not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun, jaxprs_in_params, subjaxprs

_EXPONENTIALS = frozenset({"exp", "exp2"})
_INLINED = frozenset({
    "jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call",
    "custom_vjp_call_jaxpr",
})  # fmt: skip

Maxima = dict[int, Array]
"""Of one exponential: number of heads → maxima [*loops, readings, heads], one for each reading of its axes as heads."""


class ObservedProgram(NamedTuple):
    """A function that can be run with what enters its softmaxes."""

    run: Callable[[Any], tuple[Any, list[Maxima]]]
    """First argument → (what the function returns, maxima of each exponential), compiled."""
    is_whole: bool
    """Whether no exponential is out of sight."""
    has_narrow_numbers: bool
    """Whether something is computed in bfloat16, float16 or less."""


def observe_softmaxes(function: Callable[..., Any], *args: Any, heads: Iterable[int]) -> ObservedProgram:
    """Read the program of `function(*args)`, for attentions with so many heads."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    treedef, wanted = jax.tree.structure(shapes), sorted(set(heads))
    constant = jax.tree.leaves(args[1:])

    @jax.jit
    def evaluated(leaves: list[Any], constant: list[Any]) -> tuple[list[Any], list[Maxima]]:
        return _evaluate(closed.jaxpr, closed.consts, [*leaves, *constant], wanted)

    def run(first: Any) -> tuple[Any, list[Maxima]]:
        returned, seen = evaluated(jax.tree.leaves(first), constant)
        return jax.tree.unflatten(treedef, returned), seen

    return ObservedProgram(run, not _hides(closed.jaxpr), _has_narrow_numbers(closed.jaxpr))


def _evaluate(
    jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], heads: Sequence[int]
) -> tuple[list[Any], list[Maxima]]:
    values: dict[Var, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    made_by: dict[Var, JaxprEqn] = {}
    seen: list[Maxima] = []

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for eqn in jaxpr.eqns:
        name, inputs = eqn.primitive.name, [read(atom) for atom in eqn.invars]
        more: list[Maxima] = []
        with eqn.ctx.manager:
            if name in _EXPONENTIALS:
                seen.append(_maxima(read(_logits(eqn.invars[0], made_by)), heads))
            if name == "scan" and _has_exponential(eqn.params["jaxpr"].jaxpr):
                outputs, more = _scan(eqn, inputs, heads)
            elif name in _INLINED and _has_exponential(_inner(eqn)[0]):
                outputs, more = _evaluate(*_inner(eqn), inputs, heads)
            else:
                outputs = _run_one(eqn, jaxpr, inputs)
        seen += more
        for var, value in zip(eqn.outvars, outputs, strict=True):
            values[var] = value
            made_by[var] = eqn
    return [read(atom) for atom in jaxpr.outvars], seen


def _run_one(eqn: JaxprEqn, jaxpr: Jaxpr, inputs: Sequence[Any]) -> list[Any]:
    """Run an equation of a program, as a program of its own."""
    of_value = {atom: value for atom, value in zip(eqn.invars, inputs, strict=True) if not isinstance(atom, Literal)}
    alone = jaxpr.replace(constvars=[], invars=list(of_value), outvars=eqn.outvars, eqns=[eqn], effects=eqn.effects)
    return jaxpr_as_fun(ClosedJaxpr(alone, []))(*of_value.values())


def _scan(eqn: JaxprEqn, inputs: Sequence[Any], heads: Sequence[int]) -> tuple[list[Any], list[Maxima]]:
    """Run a scan; the maxima of its rounds are stacked."""
    closed, consts, carried = eqn.params["jaxpr"], eqn.params["num_consts"], eqn.params["num_carry"]

    def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], tuple[list[Any], list[Maxima]]]:
        outputs, seen = _evaluate(closed.jaxpr, closed.consts, [*inputs[:consts], *carry, *xs], heads)
        return outputs[:carried], (outputs[carried:], seen)

    carry, (ys, seen) = jax.lax.scan(
        body,
        list(inputs[consts : consts + carried]),
        list(inputs[consts + carried :]),
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
    )
    return [*carry, *ys], seen


def _logits(atom: Any, made_by: dict[Var, JaxprEqn]) -> Any:
    """Return x where an exponential takes x − y, perhaps converted; else what it takes."""
    at = atom
    while not isinstance(at, Literal) and at in made_by:
        eqn = made_by[at]
        if eqn.primitive.name == "sub":
            return eqn.invars[0]
        if eqn.primitive.name not in ("convert_element_type", "copy", "stop_gradient"):
            break
        at = eqn.invars[0]
    return atom


def _maxima(x: Any, heads: Sequence[int]) -> Maxima:
    """Return the maxima over all other axes for each one axis, or pair of axes, that has so many entries."""
    found: Maxima = {}
    for number in heads:
        readings: list[Array] = []
        for count in (1, 2):
            for axes in itertools.permutations(range(jnp.ndim(x)), count):
                sizes = [jnp.shape(x)[axis] for axis in axes]
                if sizes[0] * sizes[-1] ** (count - 1) == number and (count == 1 or 1 not in sizes):
                    others = tuple(axis for axis in range(jnp.ndim(x)) if axis not in axes)
                    of_heads = jnp.max(x, others)
                    readings.append((of_heads.T if axes[0] > axes[-1] else of_heads).reshape(number))
        if readings:
            found[number] = jnp.stack(readings)
    return found


def _inner(eqn: JaxprEqn) -> tuple[Jaxpr, Sequence[Any]]:
    """Return the program that an equation calls, and its constants."""
    called: Any = next(eqn.params[key] for key in ("call_jaxpr", "jaxpr", "fun_jaxpr") if key in eqn.params)
    return (called, ()) if isinstance(called, Jaxpr) else (called.jaxpr, called.consts)


def _has_exponential(jaxpr: Jaxpr) -> bool:
    return any(eqn.primitive.name in _EXPONENTIALS for eqn in jaxpr.eqns) or any(
        map(_has_exponential, subjaxprs(jaxpr))
    )


def _hides(jaxpr: Jaxpr) -> bool:
    """Tell whether an exponential is where `_evaluate` does not look."""
    for eqn in jaxpr.eqns:
        inner = [each for each in jaxprs_in_params(eqn.params) if _has_exponential(each)]
        if inner and (eqn.primitive.name not in (*_INLINED, "scan") or any(map(_hides, inner))):
            return True
    return False


def _has_narrow_numbers(jaxpr: Jaxpr) -> bool:
    def is_narrow(var: Any) -> bool:
        dtype = getattr(var.aval, "dtype", None)
        return dtype is not None and jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32

    return any(is_narrow(var) for eqn in jaxpr.eqns for var in eqn.outvars) or any(
        map(_has_narrow_numbers, subjaxprs(jaxpr))
    )
