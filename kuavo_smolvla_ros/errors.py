"""Errors whose message is written for the person at the keyboard: what is wrong, where, what to do."""

from __future__ import annotations

import sys
from collections.abc import Callable

OK, BAD, WRONG_USE = 0, 1, 2


class UserError(Exception):
    """The thing that was given (a file, a bag, a checkpoint, a machine) is bad; the message says it all."""


class UsageError(UserError):
    """The tool was called wrongly."""


def exit_status(name: str, run: Callable[[], int]) -> int:
    """What a command line tool returns, after a sentence under its name where something is wrong."""
    try:
        return run()
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return WRONG_USE if isinstance(error, UsageError) else BAD
