"""τ by patterns of names and as a function of the step."""

import pytest

from muonclip.core.tau_rules import check_patterns, check_tau_rules, tau_in_words, tau_rule, varies

BY_NAME = {"vision.*": 50.0, "*.cross": 30.0, "*": 100.0}


def test_the_first_pattern_that_fits_counts():
    assert [tau_rule(BY_NAME, name) for name in ("vision.0.cross", "text.1.cross", "text.1", "")] == [50, 30, 100, 100]
    assert tau_rule(7.0, "text.1") == 7.0


def test_an_attention_of_which_nothing_is_said_is_refused_by_name():
    with pytest.raises(ValueError, match=r"says nothing of the attention 'text\.1': its patterns are 'vision\.\*'"):
        tau_rule({"vision.*": 50.0}, "text.1")


def test_a_pattern_that_fits_nothing_is_refused():
    check_patterns(BY_NAME, ["vision.0", "text.cross"])
    with pytest.raises(
        ValueError, match=r"tau names 'visoin\.\*', which fits no attention or module here: 'vision\.0'"
    ):
        check_patterns({"visoin.*": 50.0, "*": 100.0}, ["vision.0"])


@pytest.mark.parametrize(
    ("tau", "error", "words"),
    [
        (0.0, ValueError, r"tau=0\.0 must be positive"),
        ({"a": -1.0}, ValueError, r"tau\['a'\]=-1\.0 must be positive"),
        ({"a": "x"}, TypeError, r"tau\['a'\]='x' is a str"),
        ({}, ValueError, "tau is empty"),
        ({3: 1.0}, ValueError, "tau has 3 for a pattern"),
        (None, TypeError, "tau=None is a NoneType"),
    ],
)
def test_what_is_no_tau_is_refused(tau, error, words):
    with pytest.raises(error, match=words):
        check_tau_rules(tau)


def test_functions_are_told_and_shown_in_words():
    assert [varies(tau) for tau in (3.0, BY_NAME, lambda step: 3.0, {"*": lambda step: 3.0})] == [
        False,
        False,
        True,
        True,
    ]
    assert tau_in_words({"a": 3.0, "*": len}) == {"a": 3.0, "*": "a function of the step"}
