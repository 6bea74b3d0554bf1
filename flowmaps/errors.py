"""Exceptions for a user's mistake and for a polite stop."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

LONGEST_VALUE, LONGEST_LINE = 200, 900  # characters of a value, and of a complete message


def shorten(value: object, longest: int = LONGEST_VALUE) -> str:
    """Return ``value`` as one printable line of at most ``longest`` characters, cut in the middle."""
    text = "".join(c if c.isprintable() else " " for c in str(value))
    text = " ".join(text.split())
    if len(text) <= longest:
        return text
    cut = f" ... [{len(text):,} characters] ... "
    kept = longest - len(cut)
    return text[: kept - kept // 3] + cut + text[-(kept // 3) :]


def closest(word: str, names: Iterable[str]) -> str:
    """Return the name that is most similar to ``word``, in upper or lower case; an empty text if none is."""
    known = {name.lower(): name for name in names}
    found = difflib.get_close_matches(word[:LONGEST_VALUE].lower(), known, n=1)
    return known[found[0]] if found else ""


def choose(word: str, names: Iterable[str], every: bool = True) -> str:
    """Return "did you mean NAME? choose one of NAMES", the question only if a name is similar to ``word``.

    Without ``every`` the list is left out if there is such a name.
    """
    names = list(names)
    similar = closest(word, names)
    question = f"did you mean {similar}?" if similar else ""
    listed = f"choose one of {', '.join(names)}" if every or not similar else ""
    return f"{question} {listed}".strip()


class UserError(ValueError):
    """A mistake in an argument, a config field or a file, explained in one line together with the remedy.

    Args:
        message: What is wrong and how to fix it. Other arguments are mentioned by their plain names.
        field: The argument or config field at fault, such as ``"steps"`` or ``"optim.lr"``; empty for a file.
        value: The value it had, shown if not None, a long one shortened.

    ``str(error)`` reads ``steps=0: must be at least 1``. Only the command line writes it as a flag
    (``--steps=0: must be at least 1``) and exits with code 2.

    Example:
        >>> raise UserError("must be at least 1", field="steps", value=0)
        Traceback (most recent call last):
        flowmaps.errors.UserError: steps=0: must be at least 1
    """

    def __init__(self, message: str, field: str = "", value: object = None) -> None:
        super().__init__(message)
        self.message, self.field, self.value = message, field, value

    def __str__(self) -> str:
        if not self.field:
            return self.message
        return f"{self.field}{'' if self.value is None else f'={shorten(self.value)}'}: {self.message}"


@contextmanager
def within(section: str) -> Iterator[None]:
    """Qualify the fields of errors raised in the block: ``lr`` within ``optim`` becomes ``optim.lr``."""
    try:
        yield
    except UserError as error:
        if error.field:
            error.field = f"{section}.{error.field}"
        raise


@contextmanager
def blame(field: str, value: object = None) -> Iterator[None]:
    """Attribute errors raised in the block to the argument ``field``, such as the one that names a checkpoint."""
    try:
        yield
    except UserError as error:
        error.field, error.value = field, value
        raise


class Stopped(Exception):
    """Training was asked to stop (SIGTERM, Ctrl-C) and has written a checkpoint; scripts exit with code 0."""
