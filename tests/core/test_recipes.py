"""The frozen recipes, and how they stand in for arguments that were not given."""

import dataclasses

import pytest

from muonclip.core import RECIPES, resolve_coefficients, update_scale
from muonclip.core.recipes import find_recipe, saved_recipe, takes_recipe


@takes_recipe
def train(model, lr=1e-3, momentum=0.5, *, ns_coefficients="you", ns_steps=None, tau=7.0, qk_clip="auto", recipe=None):
    return lr, momentum, ns_coefficients, ns_steps, tau, qk_clip, recipe


@takes_recipe
def train_in_jax(learning_rate, beta=0.5, tau=7.0, *, recipe=None):
    return learning_rate, beta, tau


def test_every_recipe_is_frozen_names_its_source_and_can_be_run():
    for name, recipe in RECIPES.items():
        assert recipe.name == name
        assert "arXiv" in recipe.source
        assert recipe.sentence.endswith(".")
        assert (recipe.tau is None) == bool(recipe.no_clip)
        assert recipe.per_head == (recipe.heads != "whole")
        assert recipe.borrowed <= {field.name for field in dataclasses.fields(recipe)}
        assert bool(recipe.borrowed) == bool(recipe.lender)
        update_scale(3, 5, recipe.adjust_lr_fn)
        resolve_coefficients(recipe.ns_coefficients or "jordan", recipe.ns_steps)
        with pytest.raises(dataclasses.FrozenInstanceError):
            recipe.momentum = 0.1


def test_values_stand_in_for_what_is_not_given_and_the_rate_is_never_one():
    assert train(0)[:6] == (1e-3, 0.5, "you", None, 7.0, "auto")
    assert train(0, recipe="nvidia")[:6] == (1e-3, 0.9, "polar_express", 16, 7.0, None)
    assert train(0, recipe=RECIPES["k2"])[:6] == (1e-3, 0.95, "jordan", None, 100.0, "auto")
    assert train_in_jax(2, recipe="k2") == (2, 0.95, 100.0)


def test_what_is_given_wins_even_where_it_is_the_default():
    assert train(0, 1e-3, 0.5, recipe="k2")[1] == 0.5
    assert train(0, momentum=0.5, tau=7.0, recipe="k2")[1:5:3] == (0.5, 7.0)
    assert train_in_jax(2, 0.5, recipe="k2") == (2, 0.5, 100.0)


def test_a_given_polynomial_has_its_own_length():
    assert train(0, ns_coefficients="jordan", recipe="nvidia")[2:4] == ("jordan", None)
    assert train(0, ns_steps=7, recipe="nvidia")[2:4] == ("polar_express", 7)


def test_a_given_tau_or_clip_switches_on_what_a_recipe_leaves_off():
    assert train(0, tau=7.0, recipe="moonlight")[4:6] == (7.0, "auto")
    assert train(0, qk_clip="auto", recipe="moonlight")[4:6] == (7.0, "auto")
    assert train(0, recipe="moonlight")[5] is None


def test_each_value_says_where_it_comes_from():
    recipe = train(0, lr=3, ns_steps=7, recipe="k2")[6]
    origins = {name: recipe.origin(name) for name in ("lr", "momentum", "ns_steps", "ns_coefficients", "eps", "tau")}
    assert origins == {
        "lr": "given", "momentum": "recipe k2", "ns_steps": "given", "ns_coefficients": "recipe k2", "eps": "default",
        "tau": "recipe k2",
    }  # fmt: skip
    assert "published 0.0002, warm-up" in train(0, recipe="k2")[6].origin("lr")
    assert train(0, recipe="glm5")[6].origin("nesterov") == "default; glm5 does not publish it"
    assert train(0, recipe="moonlight")[6].origin("tau") == "recipe moonlight"
    assert train(0, qk_clip="auto", recipe="moonlight")[6].origin("tau") == "default"
    assert train(0, qk_clip=object(), recipe="k2")[6].origin("tau") == "given"
    assert train(0, recipe="k2")[6].origin("ns_steps") == "recipe k2, the polynomial's own length"


def test_a_checkpoint_keeps_name_and_what_was_given_but_not_the_clip():
    made = train(0, lr=3, tau=5.0, recipe="k2")[6]
    assert made.as_saved() == ("k2", "lr")
    other = train(0, momentum=0.3, tau=5.0, recipe="k2")[6]
    assert saved_recipe(made.as_saved(), other).given == {"lr", "tau"}
    assert saved_recipe(made.as_saved(), None).origin("tau") == "given"
    assert saved_recipe(["of a later release"], other) is None
    assert saved_recipe((), other) is None


def test_other_names_are_refused_with_those_that_are_known():
    with pytest.raises(
        ValueError, match="recipe='kimi' is not known; known are moonlight, k2, kimi_k3, glm5, deepseek"
    ):
        train(0, recipe="kimi")
    with pytest.raises(TypeError, match="recipe=2 is a int"):
        find_recipe(2)


def test_arguments_that_a_wrapper_has_filled_in_are_not_taken_for_given():
    with pytest.raises(ValueError, match=r"RECIPES\['k2'\]\.arguments\(\)"):
        train_in_jax(2, 0.5, 7.0, recipe="k2")
