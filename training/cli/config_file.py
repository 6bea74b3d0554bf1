"""The flag --config of train.py: a config by name or path, a row of it, and flags for the fields of what it returns."""

import ast
import dataclasses
import importlib.util
import os
import re
import sys
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from flowmaps.cli.run import fail
from flowmaps.configs import shipped_configs
from flowmaps.errors import UserError, choose, closest, shorten

MODULE = "config_config"  # the name of a config file's module, and so part of the names of classes defined in it


class ConfigFile(flags.ArgumentParser[Any]):
    """NAME:ROW of a shipped config, or FILE:ROW, where FILE may have colons too; every mistake is one line."""

    def parse(self, argument: Any) -> Any:
        file, row = _split(argument)
        kinds = _kinds()  # imports what a config file imports, before its folder comes first
        try:
            with _neighbours(file):
                made = _load(file).get_config(*row)
        except Exception as error:
            while error.__cause__ is not None and not isinstance(error, SyntaxError):
                error = error.__cause__  # type: ignore[assignment]
            line, names = _place(error, file)
            if isinstance(error, UserError):
                raise flags.Error(f"{file}{line}: {error}" if error.field else str(error)) from None
            reason = _unknown_field(error, names) or f"{type(error).__name__}: {error}"
            raise flags.Error(f"{file}{line}: cannot be used as a config ({shorten(reason)})") from None
        if not isinstance(made, kinds):
            raise flags.Error(f"get_config of {file} returns {shorten(repr(made), 60)}, not a Config or a Chain")
        _check_names(made)
        _register_tuples(made)
        return made


class Tuple(flags.ArgumentParser[Any]):
    """Values between commas, such as 0.9,0.99 or (0.9,0.99), of a tuple's annotation; an empty text is ()."""

    def __init__(self, hint: Any) -> None:
        self.hint = hint

    def parse(self, argument: Any) -> tuple[Any, ...]:
        from training.config_values import describe, fits

        if not isinstance(argument, str):  # the value that the file gave, which is checked with all others
            return tuple(argument) if isinstance(argument, list) else argument
        text = argument.strip()
        texts = typing.get_args(self.hint)[0] is str
        try:
            if text[:1] in ("(", "["):
                made = tuple(ast.literal_eval(text))
            else:
                parts = [part.strip() for part in text.split(",") if part.strip()]
                made = tuple(part if texts else ast.literal_eval(part) for part in parts)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            made = (None,)  # fits no annotation
        if not fits(self.hint, made):
            raise ValueError(f"must be {describe(self.hint)}")
        return made


def define(help_text: str) -> flags.FlagHolder[Any]:
    """Define the flag --config; what --flagfile names is read here already."""
    try:
        read = flags.FLAGS.read_flags_from_files(sys.argv[1:], force_gnu=False)
        sys.argv[1:] = _config_first(read)  # its fields can be flags only once it has been read
        holder: flags.FlagHolder[Any] = config_flags.DEFINE_config_file("config", None, help_text)
    except (flags.Error, ValueError, OSError) as error:
        fail(Path(sys.argv[0]).name, error)
    flags.FLAGS["config"].parser = ConfigFile()
    return holder


def _config_first(arguments: Sequence[str]) -> list[str]:
    """Move --config=X or --config X to the front."""
    first, others, rest = [], [], iter(arguments)
    for argument in rest:
        if argument == "--":
            others += [argument, *rest]
        elif re.match("--?config=", argument):
            first.append(argument)
        elif argument in ("--config", "-config"):
            first += [argument, *islice(rest, 1)]
        else:
            others.append(argument)
    return first + others


def _split(argument: str) -> tuple[Path, list[str]]:
    """Return the file and the row, if any: the first colon that has a file or a shipped config before it divides them.

    A file goes before a shipped config of its name.
    """
    expanded, shipped = os.path.expanduser(argument), shipped_configs()  # noqa: PTH111 (Path.expanduser can raise)
    ends = [*(i for i, letter in enumerate(expanded) if letter == ":"), len(expanded)]
    for end in ends:
        if os.path.isfile(expanded[:end]):  # noqa: PTH113 (Path.is_file can raise)
            return Path(expanded[:end]), [expanded[end + 1 :]] if end < len(expanded) else []
    name, colon, row = expanded.partition(":")
    if name in shipped:
        return shipped[name], [row] if colon else []
    similar = next(filter(None, (_file_like(expanded[:end]) for end in ends)), "") or closest(Path(name).stem, shipped)
    question = f"did you mean {similar}? " if similar else ""
    raise flags.Error(
        f"--config={shorten(argument)}: no such config: {question}give a file, or one of {', '.join(shipped)}"
    )


def _file_like(name: str) -> str:
    """Return the Python file in the folder of the path ``name`` that is called most like it, or an empty text."""
    try:
        files = {file.stem: str(file) for file in Path(name).parent.glob("*.py") if file.stem != "__init__"}
    except (OSError, ValueError):
        return ""
    return files.get(closest(Path(name).stem, sorted(files)), "")


@contextmanager
def _neighbours(file: Path) -> Iterator[None]:
    """Let a config file import the files next to it: before all others in the block, after them later."""
    folder = str(file.absolute().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        sys.path.append(folder)


def _load(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(MODULE, file)
    if spec is None or spec.loader is None:
        raise UserError(f"{file} is not a Python file")
    module = sys.modules[MODULE] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "get_config", None)):
        raise UserError(f"{file} has no function get_config: a config file has one, such as configs/digits.py")
    return module


def _place(error: BaseException, file: Path) -> tuple[str, dict[str, Any]]:
    """Return in words the last line that the error passed in the folder of ``file``, and the globals there."""
    trace, line, names = error.__traceback__, f"line {error.lineno}" if isinstance(error, SyntaxError) else "", {}
    while trace is not None:
        code = Path(trace.tb_frame.f_code.co_filename)
        if code.parent == file.absolute().parent:
            line, names = f"{code.name} line {trace.tb_lineno}", trace.tb_frame.f_globals
        trace = trace.tb_next
    return f", {line}".replace(f" {file.name} ", " ") if line else "", names


def _unknown_field(error: BaseException, names: dict[str, Any]) -> str:
    """Return in words which field of a config does not exist; empty for other errors."""
    if isinstance(error, AttributeError):
        section, name = error.obj, error.name
    elif found := re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error)):
        section, name = names.get(found[1]), found[2]
    else:
        return ""
    if not dataclasses.is_dataclass(section) or name is None:
        return ""
    kind = section if isinstance(section, type) else type(section)
    fields = [f.name for f in dataclasses.fields(kind)]
    return f"{kind.__name__.removesuffix('Section')} has no field {name}: {choose(name, fields, every=False)}"


def _kinds() -> tuple[type, ...]:
    from training.config import Config
    from training.config_rows import Chain

    return Config, Chain


def _check_names(made: Any) -> None:
    """Refuse flags --config.a.b that name no field, or a section."""
    for argument in sys.argv[1:]:
        found = re.match(r"--?(?:no)?config\.([^=]*)", argument)
        if found is None:
            continue
        value, flag, parent = made, shorten(argument.partition("=")[0], 80), "--config"
        for name in found[1].split("."):
            if not dataclasses.is_dataclass(value):
                raise flags.Error(f"{flag}: this is not a section: set {parent}")
            if name not in (names := [f.name for f in dataclasses.fields(value)]):
                section = type(value).__name__.removesuffix("Section")
                similar = _same_name(made, found[1]) or choose(name, names, every=False)
                raise flags.Error(f"{flag}: {section} has no such field: {similar}")
            value, parent = getattr(value, name), f"{parent}.{name}"
        if dataclasses.is_dataclass(value):
            field = next((f.name for f in dataclasses.fields(value)), "")
            raise flags.Error(f"{flag}: this is a section: set its fields, such as {flag}.{field}")


def _same_name(made: Any, path: str) -> str:
    """Return the fields of the config ``made`` that are called like the last part of ``path``, as a question."""
    same = [p for p in _paths(made) if p.rpartition(".")[2] == path.rpartition(".")[2]]
    return f"did you mean {' or '.join(f'--config.{p}' for p in same[:3])}?" if same else ""


def _paths(section: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all fields."""
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        if dataclasses.is_dataclass(value):
            yield from _paths(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}"


def _register_tuples(section: Any) -> None:
    """Let the flags of tuples take what their annotations say."""
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        if dataclasses.is_dataclass(value):
            _register_tuples(value)
        elif typing.get_origin(f.type) is tuple and typing.get_args(f.type):
            config_flags.register_flag_parser_for_type(f.type, Tuple(f.type))
