"""One error class a caller can catch, with the exit code the command line gives it."""


class FourfoldError(Exception):
    """Something in the input or on this machine stops the work; nothing that was finished is lost.

    The message names the value, the place and the remedy, in one paragraph for a person.
    """

    exit_code = 1


class UsageError(FourfoldError):
    """The call itself is wrong: an unknown name, an option out of range, a path that is not there."""

    exit_code = 2
