"""Run a command: parse its flags, turn a user's mistake into one line and exit code 2, without a traceback."""

import re
import sys
import traceback
import warnings
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from absl import flags

from flowmaps.errors import Stopped, UserError


def run(command: ModuleType) -> NoReturn:
    """Parse the flags, call ``command.main`` and exit with its value.

    A module with a table ``COMMANDS`` in place of ``main`` has sub-commands, named by the first argument. Exit codes:
    0 success (or stopped politely), 1 failed gate, 2 the user's mistake in one line, 3 a bug with its traceback.
    """
    script = Path(sys.argv[0]).name
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*")  # torch's own, at the first jvp
    if {"--help", "-h", "-help"} & set(sys.argv[1:]):
        print(usage(command.__doc__ or ""))
        sys.exit(0)
    try:
        _check_config_file(sys.argv)
        rest = flags.FLAGS(sys.argv)[1:]
        main = getattr(command, "main", None)
        if main is None:
            if not rest or rest[0] not in command.COMMANDS:
                raise UserError(f"missing sub-command: choose one of {', '.join(command.COMMANDS)}")
            main = command.COMMANDS[rest.pop(0)]
        if rest:
            raise UserError(f"unexpected argument {rest[0]!r}: flags look like --name=value")
    except (flags.Error, UserError, KeyError, AttributeError, TypeError) as error:
        fail(script, error)
    try:
        sys.exit(main() or 0)
    except UserError as error:
        fail(script, error)
    except Stopped as stopped:
        print(f"{script}: {stopped}", file=sys.stderr)
        sys.exit(0)
    except Exception:  # a bug must not look like a failed gate
        traceback.print_exc()
        sys.exit(3)


def required(flag: flags.FlagHolder[str | None], example: str) -> str:
    """Return the value of a flag without which the command cannot run.

    Raises:
        UserError: The flag was not given; the message shows ``example``.
    """
    if flag.value is None:
        raise UserError(f"missing, e.g. --{flag.name}={example}", field=flag.name)
    return flag.value


def usage(doc: str) -> str:
    """Return the command's docstring and its flags, absl's own left out."""
    ours = {m: f for m, f in flags.FLAGS.flags_by_module_dict().items() if not m.startswith(("absl", "ml_collections"))}
    lines = [
        f"  --{flag.name}  {flag.help}" + (f" [{flag.default_as_str}]" if flag.default is not None else "")
        for of_module in ours.values()
        for flag in of_module
    ]
    return f"{doc.strip()}\n\nFlags:\n" + "\n".join(sorted(lines))


def fail(script: str, error: BaseException) -> NoReturn:
    """Print one line and exit with code 2; the field of a ``UserError`` is shown as a flag."""
    message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, UserError) and error.field:
        message = f"--{message}"
    if "Traceback (most recent call last)" in message:  # ml_collections quotes what a config file raised
        message = message.strip().splitlines()[-1].removeprefix(f"{UserError.__module__}.{UserError.__name__}: ")
    if unknown := re.match(r"Field (\w+) not found on dataclass .*?(\w+)'>", message):
        flag = next((a for a in sys.argv if a.partition("=")[0].endswith(f".{unknown[1]}")), unknown[1])
        section = unknown[2].removesuffix("Section")
        message = f"{flag.partition('=')[0]}: {section} has no such field; config.json of a run lists them all"
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
