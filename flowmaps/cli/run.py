"""Run a command: parse its flags, turn a user's mistake into one line and exit code 2, without a traceback."""

import contextlib
import errno
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from absl import flags

from flowmaps.errors import LONGEST_LINE, Stopped, UserError, choose, shorten

REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.EROFS: "choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
}
COMMAND_OF = {"import_checkpoint": "import", "prepare_data": "prepare", "train_extractor": "extractor"}  # of scripts
LARGEST, LARGEST_SEED = 10**9, 2**63 - 1  # of the numbers that flags take
OUT_OF_MEMORY = ("DefaultCPUAllocator", "out of memory", "bad alloc")


def run(command: ModuleType) -> NoReturn:
    """Parse the flags, call ``command.main`` and exit with its value.

    A module with a table ``COMMANDS`` in place of ``main`` has sub-commands, named by the first argument; one with
    ``ARGUMENTS``, which says what they are, takes arguments without a flag's name. ``READS`` and
    ``WRITES`` of a module are its flags that name inputs and outputs: no output may be an input, or another output.
    Exit codes: 0 success (or stopped politely), 1 failed gate, 2 the user's mistake or the system's refusal in one
    line, 3 a bug with its traceback, 130 interrupted.
    """
    script = Path(sys.argv[0]).name
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*")  # torch's own, at the first jvp
    if "WORLD_SIZE" in os.environ:  # a process that another one left would print the stack of torch's C++ code
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    sys.stdout, sys.stderr = (_Terminal.around(stream) for stream in (sys.stdout, sys.stderr))
    if {"--help", "-h", "-help"} & set(sys.argv[1:]):
        print(usage(command.__doc__ or "", script))
        sys.exit(0)
    try:
        rest = flags.FLAGS(sys.argv)[1:]
        main = getattr(command, "main", None)
        if main is None:
            if not rest or rest[0] not in command.COMMANDS:
                wrong = f"unknown sub-command {rest[0]!r}" if rest else "missing sub-command"
                raise UserError(f"{wrong}: {choose(''.join(rest[:1]), command.COMMANDS)}")
            main = command.COMMANDS[rest.pop(0)]
        if rest and not hasattr(command, "ARGUMENTS"):
            raise UserError(f"unexpected argument {rest[0]!r}: flags look like --name=value")
        _check_values()
        _check_paths(getattr(command, "READS", ()), getattr(command, "WRITES", ()))
    except flags.UnrecognizedFlagError as error:
        fail(script, _unknown(error.flagname))
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError, OSError) as error:
        fail(script, error)
    except KeyboardInterrupt:
        _interrupted(script)
    try:
        code = main(*rest) or 0
        sys.stdout.flush()
        sys.exit(code)
    except Stopped as stopped:
        for number in (signal.SIGINT, signal.SIGTERM):  # all is written: another one need not be shown
            signal.signal(number, signal.SIG_IGN)
        print(f"{script}: {stopped}", file=sys.stderr)
        sys.exit(0)
    except KeyboardInterrupt:
        _interrupted(script)
    except Exception as error:
        if refused := _settled(error):
            fail(script, refused)
        traceback.print_exc()  # a bug must not look like a failed gate
        sys.exit(3)


def _unknown(name: str) -> UserError:
    """Return the error of a flag that does not exist."""
    if "." in name and (section := name.partition(".")[0]) in flags.FLAGS:
        return UserError(f"needs --{section}, whose field it is", field=name)
    return UserError(f"unknown flag: {choose(f'--{name}', (f'--{f.name}' for f in _own_flags()), every=False)}", name)


def _settled(error: Exception) -> UserError | None:
    """Return ``explain(error)``, in several processes the line of the one that failed first."""
    refused = explain(error)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return refused
    from flowmaps.distributed import settle

    return settle(error, refused)


def explain(error: BaseException) -> UserError | None:
    """Return what the system refused, or the user's mistake, as one line; None for a bug."""
    if isinstance(error, UserError):
        return error
    text = str(error)
    if isinstance(error, MemoryError) or any(words in text for words in OUT_OF_MEMORY):
        return UserError(f"out of memory ({shorten(error, 120) or 'malloc'}): ask for less at a time")
    refused_by_rust = re.search(r"\(os error (\d+)\)", text)  # safetensors
    if isinstance(error, OSError) or refused_by_rust:
        code = int(refused_by_rust[1]) if refused_by_rust else getattr(error, "errno", None)
        reason = os.strerror(code) if code else text
        file = getattr(error, "filename", None)
        file = os.fsdecode(file) if isinstance(file, (str, bytes, os.PathLike)) else ""
        flag = _flag_of(file) if file else None
        where = f"{shorten(file, 120)}: " if file else ""
        remedy = REMEDIES.get(code or 0, "check the path and its permissions" if where else "try again")
        return UserError(f"{where}{shorten(reason, 200)}: {remedy}", *(flag or ()))
    return None


def _flag_of(file: str) -> tuple[str, str] | None:
    """Return name and value of the flag whose value is the path ``file`` or a directory above it."""
    path = Path(file).absolute()
    for name, value in flags.FLAGS.flag_values_dict().items():
        if isinstance(value, str) and value and Path(value).absolute() in (path, *path.parents):
            return name, value
    return None


def _check_paths(reads: Sequence[flags.FlagHolder[Any]], writes: Sequence[flags.FlagHolder[Any]]) -> None:
    """Refuse an output that is an input, or another output, links followed."""
    outputs, inputs = (
        [(flag.name, Path(path)) for flag in holders for path in _listed(flag.value)] for holders in (writes, reads)
    )
    for i, (name, path) in enumerate(outputs):
        for other, same in (*outputs[i + 1 :], *inputs):
            if path.resolve() == same.resolve() or (path.exists() and same.exists() and path.samefile(same)):
                raise UserError(f"is also --{other}, which would be lost: choose another path", name, path)


def _listed(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value] if value else []


def _check_values() -> None:
    """Refuse numbers out of all proportion and empty texts, and replace ~ by the home directory."""
    for flag in _own_flags():
        name = flag.name
        if name.startswith("config"):
            continue  # checked with the config
        value, longest = flag.value, LARGEST_SEED if name == "seed" else LARGEST
        if isinstance(value, (int, float)) and not abs(value) <= longest:
            raise UserError(f"must be a number of at most {longest:,}", field=name, value=value)
        if value == "" and flag.default != "":
            raise UserError("is empty: give a value or leave it out", field=name)
        if isinstance(value, str) and value.startswith("~"):
            flag.value = os.path.expanduser(value)  # noqa: PTH111 (Path.expanduser can raise)


def _own_flags() -> Iterator[Any]:
    """Yield the flags that are not absl's own."""
    for module, found in flags.FLAGS.flags_by_module_dict().items():
        if not module.startswith(("absl", "ml_collections")):
            yield from found


class _Terminal:
    """A stream of text that prints what it can: a reader that has left, or letters it lacks, are not an error."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    @classmethod
    def around(cls, stream: Any) -> Any:
        if stream is None:  # closed when the process started
            return Path(os.devnull).open("w")
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
        return cls(stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(BrokenPipeError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except BrokenPipeError:  # what is left in the buffer would raise again when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def _interrupted(script: str) -> NoReturn:
    print(f"{script}: interrupted", file=sys.stderr)
    sys.exit(130)


def required(flag: flags.FlagHolder[str | None], example: str) -> str:
    """Return the value of a flag without which the command cannot run.

    Raises:
        UserError: The flag was not given; the message shows ``example``.
    """
    if flag.value is None:
        raise UserError(f"missing, e.g. --{flag.name}={example}", field=flag.name)
    return flag.value


def usage(doc: str, script: str) -> str:
    """Return the docstring of the command ``script`` and its flags, absl's own left out."""
    lines = [
        f"  --{flag.name}  {flag.help}" + (f" [{flag.default_as_str}]" if flag.default is not None else "")
        for flag in _own_flags()
    ]
    text = as_typed(f"{doc.strip()}\n\nFlags:\n" + "\n".join(sorted(lines)), script)
    return re.sub(r"\bconfigs/(\w+)\.py", r"\1", text) if script.startswith("flowmaps") else text


def as_typed(text: str, script: str) -> str:
    """Return a text with the scripts as they are called without a checkout, if ``script`` was called so."""
    if not script.startswith("flowmaps"):
        return text
    scripts = "train|sample|fid|stats|schedule|export|app|import_checkpoint|prepare_data|train_extractor"
    return re.sub(
        rf"(?:python scripts/|(?<![\w/.=-])|(?<= )scripts/)({scripts})\.py\b",
        lambda found: f"flowmaps {COMMAND_OF.get(found[1], found[1])}",
        text,
    )


def fail(script: str, error: BaseException) -> NoReturn:
    """Print one line and exit with code 2; the field of a ``UserError`` is shown as a flag."""
    message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, UserError) and error.field:
        message = f"--{message}"
    print(f"{script}: error: {as_typed(shorten(message, LONGEST_LINE), script)}", file=sys.stderr)
    sys.exit(2)
