"""Optax's own tests, as they ship, with `muonclip` where Optax puts one of its optimizers.

- Those of contributed optimizers, with the arguments that Optax gives its `muon`, and inside the wrappers there;
- those of its aliases, with the arguments of its `adamw`: their parameters are vectors, which are AdamW's here, too;
- those of its `muon` that ask for the norm by Frobenius, which is ours;
- those of sharded states, of mixed dtypes and of accumulation.

Left out, for there is no such thing here: complex parameters, the norms `aol` and `schatten`, and the functions of
Optax's own module (`test_newton_schulz`, `test_reshape_inverse`); and of `reduce_on_plateau` what Optax skips, and the
one that gives the loss to optimizers of some names alone.
"""

import inspect
import os
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest
from optax._src import alias
from optax.contrib import MuonDimensionNumbers, _common_test, _muon, _muon_test

from muonclip.core import MatrixLayout
from muonclip.optax import muonclip

flags = os.environ["XLA_FLAGS"]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the optimizers that they make, too
    from optax._src import alias_test, float64_test, sharding_test
    from optax.transforms import _accumulation_test
os.environ["XLA_FLAGS"] = flags  # which one of them sets


def matrices(params):
    """As for Optax's Muon: what has two axes is a matrix, the rest is AdamW's."""
    return jax.tree.map(lambda p: MuonDimensionNumbers() if p.ndim == 2 else None, params)


def factory(**fixed):
    """`muonclip` with `fixed` options, as a factory whose signature Optax's tests can read."""

    def make(learning_rate, weight_decay=0.0, beta=0.95, eps=0.0):
        options = dict(qk_projections=None, muon_weight_dimension_numbers=matrices, **fixed)
        return muonclip(learning_rate, weight_decay, beta, eps=eps, **options)

    annotated = inspect.signature(muonclip, eval_str=True).parameters["learning_rate"].annotation
    make.__signature__ = inspect.signature(make)
    parameters = dict(make.__signature__.parameters)
    parameters["learning_rate"] = parameters["learning_rate"].replace(annotation=annotated)
    make.__signature__ = make.__signature__.replace(parameters=list(parameters.values()))
    return make


OPTIMIZERS = {
    "muonclip": factory(),
    "muonclip_heavy_ball": factory(nesterov=False),
    "muonclip_gram": factory(ns_form="gram"),
}


def as_optaxs_muon(learning_rate, *, preconditioning="frobenius", muon_weight_dimension_numbers=matrices, **options):
    """`muonclip` by the words of `optax.contrib.muon`."""
    assert preconditioning == "frobenius"
    options = dict(weight_decay=0.0, qk_projections=None, adjust_lr_fn="original") | options
    return muonclip(learning_rate, muon_weight_dimension_numbers=muon_weight_dimension_numbers, **options)


def methods_of(case):
    """(name, function, its arguments) of a class of tests, from what `absl.testing.parameterized` has made of it."""
    for name in dir(case):
        method = getattr(case, name)
        if name.startswith("test") and hasattr(method, "__wrapped__"):
            yield name, method.__wrapped__, inspect.getclosurevars(method).nonlocals["testcase_params"]


def label(name, arguments, *words):
    values = arguments.values() if isinstance(arguments, dict) else arguments
    shown = [
        getattr(each, "__name__", each) for each in values if isinstance(each, str | type) or inspect.isfunction(each)
    ]
    return ", ".join([name.rstrip("0123456789"), *map(str, shown), *words])


def contributed():
    for name, test, arguments in methods_of(_common_test.ContribTest):
        if arguments["opt_name"] == "muon":
            for optimizer in OPTIMIZERS:
                given = {**arguments, "opt_name": optimizer}
                yield pytest.param(_common_test.ContribTest, test, given, id=label(name, given))


NOT_ON_A_PLATEAU = {
    ("test_optimizers_accept_extra_args", "reduce_on_plateau"),
    ("test_optimizers_can_be_wrapped_in_inject_hyperparams", "reduce_on_plateau"),
}


def wrapped():
    of_optax = {id(each["wrapper_kwargs"]): each for each in _common_test._MAIN_OPTIMIZERS_UNDER_TEST}
    for name, test, arguments in methods_of(_common_test.ContribTest):
        of_main = id(arguments.get("wrapper_kwargs")) in of_optax
        if (test.__name__, arguments.get("wrapper_name")) in NOT_ON_A_PLATEAU:
            continue
        if arguments["opt_name"] == "sgd" and arguments["wrapper_name"] and of_main:
            given = {**arguments, "opt_name": "muonclip"}
            yield pytest.param(_common_test.ContribTest, test, given, id=label(name, given))


def aliases():
    for name, test, arguments in methods_of(alias_test.AliasTest):
        if arguments.get("opt_name") == "adamw" and "opt_kwargs" in arguments:
            if jnp.issubdtype(arguments.get("dtype", jnp.float32), jnp.complexfloating):
                continue
            given = {**arguments, "opt_name": "muonclip"}
            yield pytest.param(alias_test.AliasTest, test, given, id=label(f"alias {name}", given))


def of_muon():
    for name, test, arguments in methods_of(_muon_test.MuonTest):
        if "frobenius" in arguments:
            yield pytest.param(_muon_test.MuonTest, test, arguments, id=label(name, arguments))


def others():
    layouts = dict(qk_projections=None, muon_weight_dimension_numbers=MatrixLayout(batch_ndim=1))
    for name, test, _ in methods_of(sharding_test.ShardingTest):
        if name.endswith("_adamw"):
            yield pytest.param(sharding_test.ShardingTest, test, (muonclip(1.0, **layouts),), id=name)
    yield pytest.param(
        float64_test.Float64Test,
        next(
            float64_test.Float64Test.__dict__[n].__wrapped__
            for n in dir(float64_test.Float64Test)
            if n.endswith("_adamw")
        ),
        (OPTIMIZERS["muonclip"], dict(learning_rate=0.1)),
        id="mixed dtypes",
    )
    for name, test, arguments in methods_of(_accumulation_test.AccumulationTest):
        if "adam" in str(arguments):
            yield pytest.param(
                _accumulation_test.AccumulationTest, test, ("muonclip", dict(learning_rate=0.1)), id=name
            )
            break


CASES = {"contributed": [*contributed()], "wrapped": [*wrapped()], "aliases": [*aliases()]}
CASES |= {"of muon": [*of_muon()], "others": [*others()]}


def test_every_test_of_optax_is_here():
    counts = {kind: len(cases) for kind, cases in CASES.items()}
    print(counts)
    assert len({case.values[1].__name__ for case in CASES["contributed"]}) >= 6
    assert counts["contributed"] >= 10 * len(OPTIMIZERS)
    assert counts["wrapped"] >= 20
    assert counts["aliases"] >= 10
    assert counts["of muon"] >= 8
    assert counts["others"] >= 5


@pytest.mark.parametrize(("case", "test", "arguments"), [each for cases in CASES.values() for each in cases])
def test_optaxs_own(case, test, arguments, monkeypatch):
    for name, make in OPTIMIZERS.items():
        monkeypatch.setattr(optax.contrib, name, make, raising=False)
        monkeypatch.setattr(alias, name, make, raising=False)
    monkeypatch.setattr(_muon, "muon", as_optaxs_muon)
    if tuple(map(int, jax.__version__.split(".")[:2])) >= (0, 10):
        monkeypatch.setattr(jax, "__version__", "0.9.9")  # some compare it as text, to skip themselves before 0.7
    x64 = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", False)  # as Optax runs them; some set it, for themselves or for good
    try:
        test(case(), **arguments) if isinstance(arguments, dict) else test(case(), *arguments)
    finally:
        jax.config.update("jax_enable_x64", x64)
