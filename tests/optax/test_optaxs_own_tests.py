"""Optax's own tests of contributed optimizers, with `muonclip` where Optax puts its Muon.

The cases are those that Optax derives for its `muon`; only the optimizer is another.
"""

import inspect

import jax
import optax
import pytest
from optax.contrib import _common_test as suite

from muonclip.core import MatrixLayout
from muonclip.optax import muonclip


def matrices(params):
    """As for Optax's Muon: what has two axes is a matrix, the rest is AdamW's."""
    return jax.tree.map(lambda p: MatrixLayout() if p.ndim == 2 else None, params)


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


def cases():
    """(test, its arguments) for every optimizer of ours, from the arguments that Optax gives its Muon."""
    found = {}
    for name in dir(suite.ContribTest):
        method = getattr(suite.ContribTest, name)
        if name.startswith("test") and hasattr(method, "__wrapped__"):
            arguments = inspect.getclosurevars(method).nonlocals["testcase_params"]
            if arguments["opt_name"] == "muon":
                found[name] = method.__wrapped__, arguments
    for name, (test, arguments) in found.items():
        target = getattr(arguments.get("target"), "__name__", "")
        for optimizer in OPTIMIZERS:
            label = ", ".join(filter(None, (name, target, str(arguments.get("dtype", "")), optimizer)))
            yield pytest.param(test, {**arguments, "opt_name": optimizer}, id=label)


CASES = list(cases())


def test_every_test_of_optax_is_here():
    names = {test.values[0].__name__ for test in CASES}
    assert len(names) >= 6
    assert len(CASES) >= 10 * len(OPTIMIZERS)


@pytest.mark.parametrize(("test", "arguments"), CASES)
def test_optaxs_own(test, arguments, monkeypatch):
    for name, make in OPTIMIZERS.items():
        monkeypatch.setattr(optax.contrib, name, make, raising=False)
    test(suite.ContribTest(), **arguments)
