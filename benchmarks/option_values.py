"""The values of command-line options, from their text. Each raises argparse.ArgumentTypeError."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TypeVar

from benchmarks.experiment.arms import ARMS, parse, with_settings
from benchmarks.studies.clip_cost_models import MODELS

T = TypeVar("T")


def arms(text: str) -> tuple[str, ...]:
    try:
        parsed = [parse(name) for name in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return _distinct(tuple(with_settings(base, **settings) for base, settings in parsed))


def models(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in MODELS]:
        raise argparse.ArgumentTypeError(f"unknown model {unknown[0]!r}; known: {', '.join(MODELS)}")
    return _distinct(names)


def seeds(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = (-1,)
    if min(numbers) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of integers from 0, such as 0,1")
    return _distinct(numbers)


def counts(text: str) -> tuple[int, ...]:
    return _distinct(tuple(count(part) for part in text.split(",")))


def distinct_rates(text: str) -> tuple[float, ...]:
    return _distinct(tuple(positive(part) for part in text.split(",")))


def rates(text: str) -> dict[str, float]:
    """By arm; under "" the rate for all."""
    if "=" not in text:
        return {"": positive(text)}
    by_arm: dict[str, float] = {}
    for part in text.split(","):
        arm, equals, rate = part.partition("=")
        if not equals:
            raise argparse.ArgumentTypeError(f"{text!r} is neither one rate nor arm=rate,arm=rate")
        if arm not in ARMS:
            raise argparse.ArgumentTypeError(f"unknown arm {arm!r}; known: {', '.join(ARMS)}")
        if arm in by_arm:
            raise argparse.ArgumentTypeError(f"{arm} has two rates in {text!r}")
        by_arm[arm] = positive(rate)
    return by_arm


def positive(text: str) -> float:
    return _number(text, float, lambda x: 0 < x < math.inf, "a positive number")


def seconds(text: str) -> float:
    return _number(text, float, lambda x: 0 <= x < math.inf, "a number of seconds, zero or more")


def count(text: str) -> int:
    return int(_number(text, int, lambda x: x >= 1, "an integer of at least 1"))


def _distinct(items: tuple[T, ...]) -> tuple[T, ...]:
    if len(set(items)) < len(items):
        raise argparse.ArgumentTypeError(f"{','.join(map(str, items))} names something twice")
    return items


def _number(text: str, kind: Callable[[str], float], holds: Callable[[float], bool], meaning: str) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not holds(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {meaning}")
    return value
