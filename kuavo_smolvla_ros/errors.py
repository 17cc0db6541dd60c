"""Errors whose message is written for the person at the keyboard: what is wrong, where, what to do."""


class UserError(Exception):
    """The thing that was given (a file, a bag, a checkpoint, a machine) is bad; the message says it all."""


class UsageError(UserError):
    """The tool was called wrongly."""
