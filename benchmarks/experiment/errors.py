"""The exceptions of the command line: what a user can put right, and a run that failed."""

from __future__ import annotations


class UsageError(ValueError):
    """A wrong option or input, by the option's name; printed without a traceback, exit status 2."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(option, message)
        self.option = option
        self.message = message

    def __str__(self) -> str:
        return f"argument {self.option}: {self.message}"


class RunFailed(RuntimeError):
    """A run ended with an error, or not as it should have; the message says how. Exit status 1."""


class DamagedFile(RunFailed):
    """A file that a command has written cannot be read any more; the message names it and says what to do."""

    def __init__(self, file: object, why: object, what_to_do: str) -> None:
        super().__init__(f"{file} is damaged ({why}). {what_to_do}")
