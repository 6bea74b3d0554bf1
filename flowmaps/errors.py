"""The one exception that means "the user can fix this"; scripts print it as one line and exit with code 2."""


class UserError(ValueError):
    """A mistake in a flag, an argument or a file: the message names it and says what to do, in one line."""
