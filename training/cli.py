"""How every script starts: flags in, one line and exit code 2 for a user's mistake, no traceback."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from absl import flags

from flowmaps.errors import UserError


def run(main: Callable[[], int | None]) -> NoReturn:
    """Parse the flags, call ``main`` and exit with its value: 0 success, 1 failed gate, 2 the user's mistake."""
    script = Path(sys.argv[0]).name
    try:
        _check_config_file(sys.argv)
        rest = flags.FLAGS(sys.argv)[1:]
        if rest:
            raise UserError(f"unexpected argument {rest[0]!r}: flags look like --name=value")
    except (flags.Error, UserError, KeyError, AttributeError, TypeError) as error:
        fail(script, error)
    try:
        sys.exit(main() or 0)
    except UserError as error:
        fail(script, error)


def fail(script: str, error: BaseException) -> NoReturn:
    """Print one line and exit with code 2."""
    message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    print(f"{script}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _check_config_file(argv: list[str]) -> None:
    """ml_collections lets a missing config file pass until it is used, then exits with code 0."""
    for flag, following in zip(argv, [*argv[1:], ""], strict=True):
        name, _, value = flag.lstrip("-").partition("=")
        if flag.startswith("-") and name == "config":
            path = Path((value or following).split(":")[0])
            if not path.is_file():
                raise UserError(
                    f"--config={path}: no such file; configs are in configs/, e.g. configs/digits.py:lagrangian"
                )


def step_counts(values: list[str]) -> list[int]:
    """The step counts of ``--steps=1,2,4``."""
    try:
        counts = [int(v) for v in values]
    except ValueError:
        raise UserError(f"--steps={','.join(values)}: give whole numbers, e.g. --steps=1,2,4,8") from None
    if not counts or min(counts) < 1 or len(set(counts)) < len(counts):
        raise UserError(f"--steps={','.join(values)}: give different step counts of at least 1")
    return counts
