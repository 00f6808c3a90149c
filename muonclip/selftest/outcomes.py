"""The outcomes of a self-test: what was tried, whether it holds, and what was seen."""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

_LINES_OF_A_TRACE = 12


@dataclass(frozen=True, slots=True)
class Outcome:
    """One line of a self-test. `holds`: None where it was not tried; `what` says why then. `trace`: of an error."""

    name: str
    holds: bool | None
    what: str
    trace: str = ""

    def __str__(self) -> str:
        word = {True: "holds", False: "FAILED", None: "-"}[self.holds]
        return "\n".join([f"{word:7} {self.name}: {self.what}", *(f"    {line}" for line in self.trace.splitlines())])


class Part(NamedTuple):
    """A part of a self-test: a name, and what is done on a kind of device.

    `always`: however late it is, because other ranks wait for this one.
    """

    name: str
    run: Callable[[str], Iterator[Outcome]]
    always: bool = False


def within(name: str, error: float, tolerance: float, of: str = "") -> Outcome:
    """Return an outcome that holds where an error is at most a tolerance; NaN is more than any."""
    more = f", {of}" if of else ""
    return Outcome(name, error <= tolerance, f"largest relative error {error:.1e} of {tolerance:.0e}{more}")


def outcomes_of(parts: Sequence[Part], device: str, end: float) -> Iterator[Outcome]:
    """Run the parts one after the other, none that would begin after `end`, a time of `time.monotonic`.

    An error of a part is an outcome of its own.
    """
    for part in parts:
        if time.monotonic() > end and not part.always:
            yield Outcome(part.name, None, "not tried, the time is over")
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                found = part.run(device)
                while (outcome := next(found, None)) is not None:
                    yield outcome
                    if time.monotonic() > end and not part.always:
                        yield Outcome(f"{part.name}, the rest", None, "not tried, the time is over")
                        break
        except Exception as error:  # whatever a host raises: the next part is tried all the same
            yield _of_error(part.name, error)


def attempted(name: str, run: Callable[[], Outcome]) -> Outcome:
    """Return what a function returns; what it raises is an outcome by its name."""
    try:
        return run()
    except Exception as error:  # of a host, as above
        return _of_error(name, error)


def _of_error(name: str, error: Exception) -> Outcome:
    lines = traceback.format_exc().splitlines()[-_LINES_OF_A_TRACE:]
    return Outcome(name, False, f"{type(error).__name__}: {error}".splitlines()[0], "\n".join(lines))
