"""What a run may end with besides success and a bug."""


class UserError(ValueError):
    """A mistake in a flag, an argument or a file: the message names it and says what to do, in one line.

    Scripts print that line and exit with code 2.
    """


class Stopped(Exception):
    """Training was asked to stop (SIGTERM, Ctrl-C) and has written a checkpoint; scripts exit with code 0."""
