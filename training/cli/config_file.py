"""The flag --config of train.py: a Python file, a row of it, and flags for the fields of what it returns."""

import ast
import dataclasses
import importlib.util
import os
import re
import sys
import typing
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from flowmaps.cli.run import fail
from flowmaps.errors import UserError, shorten

MODULE = "config_config"  # the name of a config file's module, and so part of the names of classes defined in it


class ConfigFile(flags.ArgumentParser[Any]):
    """FILE:ROW, where FILE may have colons too; every mistake in the file is one line."""

    def parse(self, argument: Any) -> Any:
        file, row = _split(argument)
        try:
            module = _load(file)
            made = module.get_config(*row)
        except UserError as error:
            raise flags.Error(str(error)) from None  # to which absl adds nothing
        except Exception as error:
            while error.__cause__ is not None and not isinstance(error, SyntaxError):
                error = error.__cause__  # type: ignore[assignment]
            reason = f"{type(error).__name__}: {error}"
            raise flags.Error(f"{file} cannot be used as a config ({shorten(reason)}{_line(error, file)})") from None
        if not isinstance(made, _kinds()):
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
        holder: flags.FlagHolder[Any] = config_flags.DEFINE_config_file(
            "config", None, help_text
        )  # reads what --flagfile names
    except (flags.Error, ValueError, OSError) as error:
        fail(Path(sys.argv[0]).name, error)
    flags.FLAGS["config"].parser = ConfigFile()
    return holder


def _split(argument: str) -> tuple[Path, list[str]]:
    """Return the file and the row, if any: the first colon that has a file before it divides them."""
    expanded = os.path.expanduser(argument)  # noqa: PTH111 (Path.expanduser can raise)
    ends = [i for i, letter in enumerate(expanded) if letter == ":"]
    for end in (*ends, len(expanded)):
        if os.path.isfile(expanded[:end]):  # noqa: PTH113 (Path.is_file can raise)
            return Path(expanded[:end]), [expanded[end + 1 :]] if end < len(expanded) else []
    raise flags.Error(
        f"--config={shorten(argument)}: no such file; configs are in configs/, e.g. configs/digits.py:lagrangian"
    )


def _load(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(MODULE, file)
    if spec is None or spec.loader is None:
        raise UserError(f"{file} is not a Python file")
    module = sys.modules[MODULE] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "get_config", None)):
        raise UserError(f"{file} has no function get_config: choose a file such as configs/digits.py")
    return module


def _line(error: BaseException, file: Path) -> str:
    """Return the last line of ``file`` that the error passed, in words."""
    found, trace = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(file):
            found = trace.tb_lineno
        trace = trace.tb_next
    return f", line {found}" if found else ""


def _kinds() -> tuple[type, ...]:
    from training.config import Config
    from training.config_rows import Chain

    return Config, Chain


def _check_names(made: Any) -> None:
    """Refuse flags --config.a.b that name no field, or a section."""
    for argument in flags.FLAGS.read_flags_from_files(sys.argv, force_gnu=False):
        found = re.match(r"--?(?:no)?config\.([^=]*)", argument)
        if found is None:
            continue
        value, flag = made, shorten(argument.partition("=")[0], 80)
        for name in found[1].split("."):
            if not dataclasses.is_dataclass(value) or name not in {f.name for f in dataclasses.fields(value)}:
                section = type(value).__name__.removesuffix("Section")
                raise flags.Error(f"{flag}: {section} has no such field; config.json of a run lists them all")
            value = getattr(value, name)
        if dataclasses.is_dataclass(value):
            field = next((f.name for f in dataclasses.fields(value)), "")
            raise flags.Error(f"{flag}: this is a section: set its fields, such as {flag}.{field}")


def _register_tuples(section: Any) -> None:
    """Let the flags of tuples take what their annotations say."""
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        if dataclasses.is_dataclass(value):
            _register_tuples(value)
        elif typing.get_origin(f.type) is tuple and typing.get_args(f.type):
            config_flags.register_flag_parser_for_type(f.type, Tuple(f.type))
